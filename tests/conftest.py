"""What the tests share: a tokenizer trained here, tiny random models, and a process group of
one."""

import json
import multiprocessing
import os
import random
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from types import ModuleType, SimpleNamespace

os.environ.setdefault(
    "CUDA_VISIBLE_DEVICES", ""
)  # the tests are about the CPU path, also on a machine with GPUs
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import datasets
import huggingface_hub
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import transformers
from huggingface_hub.constants import HF_HUB_CACHE
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parent.parent
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{{ message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEXT = [
    "Human: Assistant: system user assistant",
    "a small tokenizer for tests, trained on this text",
    "what is two plus two?",
]


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    """Tests neither read nor fill the user's caches, ours and that of the datasets library."""
    os.environ["SIMPER_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("datasets")
    os.environ["HF_DATASETS_CACHE"] = str(datasets.config.HF_DATASETS_CACHE)


@pytest.fixture(autouse=True)
def subnormal_numbers():
    """A run in this process flushes them to 0; the tests have them."""
    yield
    torch.set_flush_denormal(False)


def make_tokenizer(
    chat_template: str | None = CHATML, adds_bos: bool = False
) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of about 300 tokens: <s>, </s>, <|im_start|>, <|im_end|>, bytes, a
    few merges."""
    special = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 0)]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = chat_template
    return tokenizer


TINY = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
TINY |= {"max_position_embeddings": 256, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
GQA = {"num_key_value_heads": 2, "head_dim": 8}
ARCHITECTURES = {
    "llama": TINY | GQA | {"tie_word_embeddings": False},
    "llama-tied": TINY | GQA | {"tie_word_embeddings": True},
    "mistral": TINY | GQA | {"sliding_window": None},
    "mistral-sliding-window": TINY | GQA | {"sliding_window": 6},
    "gpt_neox": TINY,
    "qwen2": TINY | {"num_key_value_heads": 2},
    "qwen3": TINY | GQA,
    "gemma3_text": TINY | GQA | {"sliding_window": 6, "tie_word_embeddings": True},
    "gpt2": {
        "vocab_size": 320,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 256,
        "tie_word_embeddings": True,
    },
    "phi3": TINY | {"num_key_value_heads": 2},
    "olmo2": TINY | {"num_key_value_heads": 2},
}


def make_config(name: str = "llama"):
    """A tiny transformers config, by a name of ARCHITECTURES."""
    kind = "llama" if name == "llama-tied" else name.removesuffix("-sliding-window")
    return AutoConfig.for_model(kind, **ARCHITECTURES[name])


def make_model(name: str = "llama", seed: int = 0, **changes):
    """A tiny random transformers model in float32. Larger initial weights than usual, so that
    attention matters."""
    config = make_config(name)
    for key, value in changes.items():
        setattr(config, key, value)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.15)
    return model.eval()


@pytest.fixture
def group():
    """A process group of one, as train.py makes it without torchrun."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """A tiny Llama with its tokenizer, saved as a Hugging Face folder."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    make_model("llama").save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


# ---- Short runs ----------------------------------------------------------------------------------


def write_pairs(path: Path, count: int, seed: int = 0) -> str:
    """Conversations with answers of very different lengths; chosen ones hold lower-case letters,
    rejected ones digits."""
    draw = random.Random(seed)
    text = lambda letters, most: "".join(draw.choice(letters) for _ in range(draw.randint(1, most)))  # noqa: E731
    with open(path, "w") as file:
        for _ in range(count):
            prompt = [{"role": "user", "content": text("what is two plus ", 40)}]
            print(
                json.dumps(
                    {"prompt": prompt, "chosen": text("abcde", 30), "rejected": text("01234", 50)}
                ),
                file=file,
            )
    return str(path)


@pytest.fixture(scope="session")
def base(tmp_path_factory, model_folder) -> dict:
    """Settings of a short run: 3 steps of 8 pairs."""
    folder = tmp_path_factory.mktemp("data")
    values = {
        "model": str(model_folder),
        "train_data": write_pairs(folder / "train.jsonl", 26),
        "wandb": "off",
    }
    values |= {
        "eval_data": write_pairs(folder / "heldout.jsonl", 11, seed=1),
        "batch_size": 8,
        "learning_rate": 1e-3,
    }
    return values | {
        "max_length": 96,
        "max_prompt_length": 60,
        "micro_batch_tokens": 600,
        "max_grad_norm": 1e9,
    }


def run(values: dict, output: Path) -> list[dict]:
    """Train in this process, alone; return the lines of metrics.jsonl."""
    import train

    try:
        train.train(train.Config(**without_zero_rate(values) | {"output_dir": str(output)}))
    finally:
        if torch.distributed.is_initialized():  # it has failed
            torch.distributed.destroy_process_group()
    return read_metrics(output)


def as_flags(values: dict, output: Path) -> list[str]:
    values = without_zero_rate(values) | {"output_dir": output}
    return [f"--{name}={value}" for name, value in values.items()]


def without_zero_rate(values: dict) -> dict:
    """A single step must not be one of the warm-up."""
    return ({"warmup_ratio": 0.0} if values.get("max_steps") == 1 else {}) | values


def command(values: dict, output: Path, ranks: int) -> list[str]:
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        str(ranks),
    ]
    return [*launcher, str(ROOT / "train.py"), *as_flags(values, output)]


def run_python(
    *words, cwd: Path = ROOT, ranks: int = 0, meanwhile=None, **environment
) -> subprocess.CompletedProcess:
    """`python *words` (a script, -m MODULE or -c CODE, with arguments), or as many ranks of it as
    torchrun would start. In place of the seconds that each would take to import the libraries, they
    are forks of a process that has them; not the project's own modules. meanwhile: a function that
    gets the processes when they have been started."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    folder, started = Path(tempfile.mkdtemp()), []
    for rank in range(max(1, ranks)):
        settings = os.environ | environment
        if ranks:
            numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_PORT": port}
            numbers |= {"LOCAL_WORLD_SIZE": ranks, "GROUP_WORLD_SIZE": 1, "OMP_NUM_THREADS": 1}
            numbers |= {"MASTER_ADDR": "localhost", "TORCHELASTIC_RESTART_COUNT": 0}
            settings |= {name: str(number) for name, number in numbers.items()}
        output = folder / f"out{rank}", folder / f"err{rank}"
        arguments = [*map(str, words)], cwd, settings, *output
        started.append(FORKS.Process(target=become_python, args=arguments))
        started[-1].start()
    failed = []
    if meanwhile:
        meanwhile(started)
    # (Asked once: of none, wait would wait for ever.)
    while not failed and (alive := [process for process in started if process.is_alive()]):
        multiprocessing.connection.wait([process.sentinel for process in alive])
        failed = [p for p in started if p.exitcode]
    for process in started:
        process.join(1 if failed else None)  # as torchrun, which ends the ranks that are left
        process.kill()
    out, err = (
        "".join(p.read_text() for p in sorted(folder.glob(f"{n}*"))) for n in ("out", "err")
    )
    shutil.rmtree(folder)
    status = next((p.exitcode for p in started if p.exitcode), 0)
    return subprocess.CompletedProcess(words, status, out, err)


def become_python(words: list[str], cwd: Path, environment: dict, out: Path, err: Path) -> None:
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    for number, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.stdout, sys.stderr = (open(n, "w", buffering=1, closefd=False) for n in (1, 2))
    if home := environment.get("HF_HOME"):  # read when the libraries were imported
        environment = {"HF_HUB_CACHE": f"{home}/hub"} | environment
        datasets.config.HF_DATASETS_CACHE = Path(home) / "datasets"
        datasets.config.HF_MODULES_CACHE = f"{home}/modules"
    huggingface_hub.constants.HF_HUB_CACHE = environment.get("HF_HUB_CACHE", HF_HUB_CACHE)
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the tests may run in the background
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    option, *rest = words
    first = str(Path(option).resolve().parent) if option[0] != "-" else str(cwd)
    sys.path[:0] = [first, *filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))]
    sys.argv = words if option[0] != "-" else ["-c", *rest[1:]]
    if option == "-c":
        sys.modules["__main__"] = ModuleType("__main__")
        exec(compile(rest[0], "<string>", "exec"), vars(sys.modules["__main__"]))
    elif option == "-m":
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(option, run_name="__main__")


FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    ["torch.distributed.fsdp", "torch.distributed.checkpoint", "torch.nn.attention.varlen"]
    + ["torch._dynamo", "pytest"]
    + ["datasets", "sklearn", "transformers.models.llama.modeling_llama", "wandb", "xxhash", "yaml"]
    + ["transformers.integrations.sdpa_attention", "transformers.generation.utils", "tqdm"]
)


def start_two(function, folder: Path) -> None:
    """function(rank, folder) in two processes, that are forks as those of run_python."""
    torch.multiprocessing.start_processes(function, (folder,), 2, start_method="forkserver")


def run_ranks(values: dict, output: Path, ranks: int = 2, script: Path = ROOT / "train.py"):
    """The same on several ranks."""
    done = run_python(script, *as_flags(values, output), ranks=ranks)
    assert done.returncode == 0, done.stderr[-3000:]
    return read_metrics(output)


SEVERAL = """
import json, os, sys
from pathlib import Path
import train
from conftest import interrupt
{code}
for number, (flags, source) in enumerate(json.loads(sys.argv[1])):
    os.environ["TORCHELASTIC_RESTART_COUNT"] = str(number)  # for keys of its own in the store
    config = train.parse_args(flags)
    if source and os.environ["RANK"] == "0":
        interrupt(Path(source), Path(config.output_dir))
    train.train(config)
"""


def run_several(runs: list[tuple], folder: Path, ranks: int = 2, code: str = "") -> str:
    """Several runs one after the other, on ranks that are started once. Returns what they have
    printed.

    runs: (values, output) or (values, output, source), where output is made from the finished run
    `source`: see interrupt; folder: for the script; code: what it does first, with `train`
    imported, and `number` of the run when it is called later.
    """
    script, given = folder / "several.py", []
    script.write_text(SEVERAL.replace("{code}", code))
    for values, output, *source in runs:
        given.append((as_flags(values, output), str(source[0]) if source else None))
    path = os.pathsep.join((str(ROOT), str(ROOT / "tests")))
    done = run_python(script, json.dumps(given), ranks=ranks, PYTHONPATH=path)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def interrupt(whole: Path, output: Path) -> None:
    """Copy a finished run, as if it had been killed before its newest checkpoint was there."""
    shutil.copytree(whole, output, ignore=shutil.ignore_patterns("final"))
    folders = (output / "checkpoints").iterdir()
    shutil.rmtree(max(folders, key=lambda path: int(path.name.removeprefix("step_"))))


@pytest.fixture(scope="session")
def three_steps(base, tmp_path_factory) -> dict[str, tuple[Path, list[dict]]]:
    """The same run, with all its checkpoints, in one process, in many small micro-batches, and on
    two ranks, sharded and as two replicas: {name: (output_dir, lines of metrics.jsonl)}."""
    folder = tmp_path_factory.mktemp("runs")
    values = base | {"max_steps": 3, "save_every": 1, "keep_checkpoints": 0}
    run(values, folder / "one")
    run(values | {"micro_batch_tokens": 200}, folder / "split")
    ranks = values | {"micro_batch_tokens": 250}
    run_several([(ranks, folder / "ranks"), (ranks | {"replicas": 2}, folder / "replicas")], folder)
    return {path.name: (path, read_metrics(path)) for path in folder.iterdir() if path.is_dir()}


class Signals:
    """In place of what watch_signals gives: SIGTERM when it has been asked `quiet` times."""

    def __init__(self, quiet: int):
        self.quiet = quiet

    def __call__(self) -> int:
        self.quiet -= 1
        return signal.SIGTERM if self.quiet < 0 else 0


@pytest.fixture
def gpu_of(monkeypatch):
    """A function that lets every GPU have so many bytes."""

    def has(size: int) -> None:
        card = SimpleNamespace(total_memory=size)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)

    return has


@pytest.fixture
def sigterm_after(monkeypatch):
    """A function: from its call on, a run in this process finds that SIGTERM has arrived when it
    has asked so many times. (The run's code stays as it is, so that it can be resumed.)"""
    import train
    from runtime import processes

    def arrive(quiet: int) -> None:
        patched = ModuleType("processes")
        vars(patched).update(vars(processes))
        patched.watch_signals = lambda: Signals(quiet)
        monkeypatch.setattr(train, "processes", patched)

    return arrive


def read_metrics(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def same_weights(some: Path, other: Path) -> bool:
    """Whether two exported models are equal, bit for bit."""
    a, b = (load_file(folder / "final" / "model.safetensors") for folder in (some, other))
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def plain_logps(model, prompt: list[int], response: list[int]) -> torch.Tensor:
    """Log-probs of a response's tokens by a transformers model's own forward of one sequence."""
    ids = torch.tensor([prompt + response])
    logps = model(ids).logits[0, :-1].log_softmax(dim=-1).gather(1, ids[0, 1:, None])[:, 0]
    return logps[len(prompt) - 1 :]


def read_checkpoint(folder: Path) -> dict[str, torch.Tensor]:
    """Whole tensors of a checkpoint that any number of ranks wrote."""
    reader = dcp.HuggingFaceStorageReader(str(folder))
    state = {
        name: torch.empty(entry.size)
        for name, entry in reader.read_metadata().state_dict_metadata.items()
    }
    dcp.load(state, storage_reader=dcp.HuggingFaceStorageReader(str(folder)), no_dist=True)
    return state


def gradients(folder: Path) -> dict[str, torch.Tensor]:
    """The gradient of step 1, from Adam's first moment after it: exp_avg = (1 - 0.9) · gradient."""
    tensors = read_checkpoint(folder / "checkpoints" / "step_1")
    return {
        name.removeprefix("exp_avg.model."): 10 * t
        for name, t in tensors.items()
        if name.startswith("exp_avg.")
    }


def relative_difference(some: dict, others: dict) -> float:
    assert some.keys() == others.keys()
    difference = sum((some[name] - others[name]).square().sum() for name in some).sqrt()
    return (difference / sum(tensor.square().sum() for tensor in others.values()).sqrt()).item()


def timeless(lines: list[dict]) -> list[dict]:
    """Metrics without what depends on the machine's speed."""
    return [
        {
            k: v
            for k, v in line.items()
            if k
            not in ("pairs_per_second", "tokens_per_second", "peak_memory_gb", "peak_reserved_gb")
        }
        for line in lines
    ]


transformers.utils.logging.disable_progress_bar()
torch.set_num_threads(1)  # several threads slow tiny models down
