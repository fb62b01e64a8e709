"""The training loop: one gradient under any split, exact metrics, resume, learning, and clear
errors."""

import copy
import dataclasses
import hashlib
import inspect
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed.checkpoint as dcp
import transformers
import yaml
from conftest import CHATML, make_model, make_tokenizer
from safetensors.torch import load_file

import data
import loss
import model
import runtime
import train
from data import InputError, load_pairs, step_indices
from train import Config, parse_args

ROOT = Path(__file__).parent.parent


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


@pytest.fixture(scope="module")
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
    try:
        train.train(Config(**values | {"output_dir": str(output)}))
    finally:
        if torch.distributed.is_initialized():  # it has failed
            torch.distributed.destroy_process_group()
    return read_metrics(output)


def as_flags(values: dict, output: Path) -> list[str]:
    return [f"--{name}={value}" for name, value in (values | {"output_dir": output}).items()]


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


def run_ranks(values: dict, output: Path, ranks: int = 2) -> list[dict]:
    """The same through torchrun."""
    done = subprocess.run(command(values, output, ranks), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return read_metrics(output)


def read_metrics(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


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
            if k not in ("pairs_per_second", "tokens_per_second", "peak_memory_gb")
        }
        for line in lines
    ]


# ---- One gradient --------------------------------------------------------------------------------


def plain_gradient(values: dict, indices: list[int]) -> tuple[dict, list[float]]:
    """Gradient and per-pair losses of a batch in float64, from separate plain forwards: written
    from the paper."""
    model = make_model("llama").double()
    pairs, _ = load_pairs(
        values["train_data"], make_tokenizer(), values["max_length"], values["max_prompt_length"]
    )
    losses = []
    for pair in pairs.select(indices):
        inverse_perplexity = {}
        for side in ("chosen", "rejected"):
            ids = torch.tensor([pair["prompt"] + pair[side]])
            logps = model(ids).logits[0, :-1].log_softmax(dim=-1).gather(1, ids[0, 1:, None])[:, 0]
            inverse_perplexity[side] = torch.exp(logps[len(pair["prompt"]) - 1 :].mean())
        losses.append(inverse_perplexity["rejected"] - inverse_perplexity["chosen"])
    (sum(losses) / len(losses)).backward()
    return {name: p.grad for name, p in model.named_parameters()}, [loss.item() for loss in losses]


@pytest.fixture(scope="module")
def three_runs(base, tmp_path_factory) -> dict[str, tuple[Path, list[dict]]]:
    """The same run in one process, in many small micro-batches, and on two ranks."""
    folder = tmp_path_factory.mktemp("runs")
    values = base | {"max_steps": 3, "save_every": 1, "keep_checkpoints": 0}
    return {
        "one": (folder / "one", run(values, folder / "one")),
        "split": (folder / "split", run(values | {"micro_batch_tokens": 200}, folder / "split")),
        "ranks": (
            folder / "ranks",
            run_ranks(values | {"micro_batch_tokens": 250}, folder / "ranks"),
        ),
        "replicas": (
            folder / "replicas",
            run_ranks(values | {"micro_batch_tokens": 250, "replicas": 2}, folder / "replicas"),
        ),
    }


def test_gradient_equals_plain_float64_forwards(base, three_runs):
    folder, lines = three_runs["one"]
    expected, losses = plain_gradient(base, step_indices(26, 8, seed=42, step=0))
    found = gradients(folder)
    assert relative_difference(found, expected) < 1e-5
    first = next(line for line in lines if line["step"] == 1)
    assert first["loss"] == pytest.approx(sum(losses) / 8, abs=1e-6)
    norm = sum(tensor.square().sum() for tensor in expected.values()).sqrt().item()
    assert first["grad_norm"] == pytest.approx(norm, rel=1e-5)


@pytest.mark.parametrize("other", ["split", "ranks", "replicas"])
def test_gradient_is_the_same_for_any_split(three_runs, other):
    assert (
        relative_difference(gradients(three_runs[other][0]), gradients(three_runs["one"][0])) < 1e-6
    )


@pytest.mark.parametrize("other", ["split", "ranks", "replicas"])
def test_metrics_are_the_same_for_any_split(three_runs, other):
    ours, theirs = (timeless(three_runs[name][1]) for name in ("one", other))
    assert [line["step"] for line in ours] == [0, 1, 2, 3, 3]  # evaluated before and after
    assert len(ours) == len(theirs)
    for mine, its in zip(ours, theirs):
        assert mine == pytest.approx(its, rel=1e-5, abs=1e-6)


def test_metrics_are_exact_means(base, three_runs, model_folder):
    """Every held-out metric of the untrained model, from plain forwards."""
    model, pairs = make_model("llama"), load_pairs(base["eval_data"], make_tokenizer(), 96, 60)[0]
    means = {"chosen": [], "rejected": []}
    for pair in pairs:
        for side in means:
            ids = torch.tensor([pair["prompt"] + pair[side]])
            with torch.no_grad():
                logps = (
                    model(ids).logits[0, :-1].log_softmax(dim=-1).gather(1, ids[0, 1:, None])[:, 0]
                )
            means[side].append(logps[len(pair["prompt"]) - 1 :].double().mean())
    chosen, rejected = torch.stack(means["chosen"]), torch.stack(means["rejected"])
    expected = {
        "step": 0,
        "eval/loss": (rejected.exp() - chosen.exp()).mean().item(),
        "eval/inverse_perplexity/chosen": chosen.exp().mean().item(),
        "eval/inverse_perplexity/rejected": rejected.exp().mean().item(),
        "eval/inverse_perplexity/margin": (chosen.exp() - rejected.exp()).mean().item(),
        "eval/logps/chosen": chosen.mean().item(),
        "eval/logps/rejected": rejected.mean().item(),
        "eval/accuracy": (chosen > rejected).double().mean().item(),
        "eval/length/chosen": sum(len(ids) for ids in pairs["chosen"]) / len(pairs),
        "eval/length/rejected": sum(len(ids) for ids in pairs["rejected"]) / len(pairs),
        "eval/gradient_weight/chosen": chosen.exp()
        .mean()
        .item(),  # SimPER's weights are the inverse perplexities
        "eval/gradient_weight/rejected": rejected.exp().mean().item(),
    }
    assert three_runs["one"][1][0] == pytest.approx(expected, abs=1e-6)
    assert 0 < expected["eval/accuracy"] < 1  # the case tells something


def test_a_line_of_training(base, tmp_path, monkeypatch):
    """Of two steps, the last of one: epoch, rates, and the gradient weights that SimPER has by its
    closed form. Every look at the clock is 20 s later, and waiting for the means, during which a
    GPU finishes the optimizer's step, takes another 20 s."""
    clock, mean_over_ranks = itertools.count(0, 20), train.mean_over_ranks

    def wait(rows: list[dict]) -> dict:
        next(clock)
        return mean_over_ranks(rows)

    monkeypatch.setattr(train, "mean_over_ranks", wait)
    monkeypatch.setattr(train, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    values = base | {"max_steps": 7, "log_every": 2, "eval_data": "", "micro_batch_tokens": 250}
    lines = run(values, tmp_path / "run")
    lengths = load_pairs(base["train_data"], make_tokenizer(), 96, 60)[0]["lengths"]
    assert [line["step"] for line in lines] == [2, 4, 6, 7]
    for line, steps in zip(lines, ([0, 1], [2, 3], [4, 5], [6])):
        assert line["epoch"] == line["step"] / 3  # 26 pairs fill 3 batches of 8
        rate = 1e-3 * 0.5 * (1 + math.cos(math.pi * (steps[-1] - 1) / 6))  # after one of warm-up
        assert line["learning_rate"] == pytest.approx(rate, rel=1e-12)
        for side in ("chosen", "rejected"):
            weight = line[f"inverse_perplexity/{side}"]
            assert line[f"gradient_weight/{side}"] == pytest.approx(weight, rel=1e-5)
        indices = [i for step in steps for i in step_indices(26, 8, 42, step)]
        seconds = 20 * len(steps) + 20
        assert line["pairs_per_second"] == pytest.approx(8 * len(steps) / seconds)
        tokens = sum(sum(lengths[i]) for i in indices)
        assert line["tokens_per_second"] == pytest.approx(tokens / seconds)


def test_peak_memory_is_of_this_process_alone():
    """The kernel's ru_maxrss counts the process that started it, too."""
    block = bytearray(2**31)
    del block
    code = "import torch, runtime\nones = torch.ones(2**26)  # 0.27 GB\n"
    code += "print(runtime.peak_memory(torch.device('cpu')))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert 0.27 < float(done.stdout) < 2


def test_a_tie_is_no_accuracy():
    logps, losses = torch.tensor([-1.0, -1.0]), torch.zeros(1)
    metrics = train.pair_metrics(logps, losses, logps, data.pack([([1], [2], [3])]))
    assert metrics["accuracy"].tolist() == [False]


def test_flags_reach_the_model(base, tmp_path, monkeypatch):
    """And the longest sequence, which here is a held-out one."""
    given = {}

    def load_model(name, device, dtype, **options):
        given.update(options, dtype=dtype)
        raise InputError("seen")

    monkeypatch.setattr(train, "load_model", load_model)
    heldout = tmp_path / "heldout.jsonl"
    heldout.write_text(json.dumps({"prompt": "a", "chosen": "b", "rejected": "0123" * 20}))
    flags = {"dtype": "bfloat16", "activation_checkpointing": True, "compile": True}
    with pytest.raises(InputError, match="seen"):
        run(base | flags | {"eval_data": str(heldout)}, tmp_path / "run")
    (row,) = load_pairs(str(heldout), make_tokenizer(), 96, 60)[0]
    expected = {"dtype": torch.bfloat16, "replicas": 1, "activation_checkpointing": True}
    longest = len(row["prompt"]) + len(row["rejected"])
    assert given == expected | {"compile": True, "longest": longest}


def test_held_out_tokens_need_an_embedding(base, tmp_path, model_folder, monkeypatch):
    shutil.copytree(model_folder, tmp_path / "model")
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([f"w{n}" for n in range(320 - len(tokenizer) + 1)])
    tokenizer.save_pretrained(tmp_path / "model")
    row = {"prompt": "what?", "chosen": tokenizer.convert_ids_to_tokens(320), "rejected": "a"}
    (tmp_path / "heldout.jsonl").write_text(json.dumps(row))
    monkeypatch.setattr(train, "load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    names = {"model": tmp_path / "model", "eval_data": tmp_path / "heldout.jsonl"}
    with pytest.raises(InputError, match="gives token 320, the model has 320"):
        run(base | {name: str(path) for name, path in names.items()}, tmp_path / "run")


def test_the_model_has_the_dtype_of_the_run(base, tmp_path):
    losses = {}
    for dtype in ("float32", "bfloat16"):
        line, *_ = run(base | {"max_steps": 1, "eval_data": "", "dtype": dtype}, tmp_path / dtype)
        losses[dtype] = line["loss"]
        tensors = load_file(tmp_path / dtype / "final" / "model.safetensors")
        assert {tensor.dtype for tensor in tensors.values()} == {getattr(torch, dtype)}
    assert losses["bfloat16"] != losses["float32"] == pytest.approx(losses["bfloat16"], abs=0.01)


@pytest.mark.parametrize(
    "changes, trained, evaluated",
    [
        ({"save_every": 2, "eval_every": 3}, [2, 3, 4, 6, 7], [0, 3, 6, 7]),
        ({"save_every": 0, "eval_every": 3}, [3, 6, 7], [0, 3, 6, 7]),
        ({"save_every": 2, "eval_data": ""}, [2, 4, 6, 7], []),
        ({"save_every": 0, "eval_data": ""}, [7], []),
    ],
)
def test_lines_end_before_a_save_and_an_evaluation(base, tmp_path, changes, trained, evaluated):
    lines = run(base | {"max_steps": 7, "log_every": 10} | changes, tmp_path / "run")
    assert [line["step"] for line in lines if "loss" in line] == trained
    assert [line["step"] for line in lines if "eval/loss" in line] == evaluated


def test_run_directory(three_runs):
    folder, lines = three_runs["ranks"]
    assert {path.name for path in folder.iterdir()} == {
        ".lock",
        "config.yaml",
        "metrics.jsonl",
        "checkpoints",
        "final",
    }
    text = (folder / "config.yaml").read_text()
    assert "torch 2" in text and "transformers 5" in text and "datasets" in text
    assert set(yaml.safe_load(text)) == set(Config.__dataclass_fields__)
    assert parse_args([str(folder / "config.yaml")]).batch_size == 8  # a run's config is a recipe
    names = {
        "epoch",
        "step",
        "loss",
        "accuracy",
        "grad_norm",
        "learning_rate",
        "pairs_per_second",
        "tokens_per_second",
    }
    groups = ("inverse_perplexity", "logps", "length", "gradient_weight")
    names |= {f"{group}/{side}" for group in groups for side in ("chosen", "rejected")}
    assert set(lines[1]) == names | {"inverse_perplexity/margin", "peak_memory_gb"}
    final = transformers.AutoModelForCausalLM.from_pretrained(folder / "final")
    trained = read_checkpoint(folder / "checkpoints" / "step_2")
    assert not torch.equal(
        final.lm_head.weight, trained["model.lm_head.weight"]
    )  # step 3 has moved it


def test_memory_is_the_most_of_any_rank(base, tmp_path, monkeypatch):
    most = lambda _, *values: [*map(float, values[:2]), 7.0]  # noqa: E731
    monkeypatch.setattr(runtime, "max_over_ranks", most)
    (line,) = run(base | {"max_steps": 1, "eval_data": ""}, tmp_path / "run")
    assert line["peak_memory_gb"] == 7


def test_config_yaml_has_the_hashes_of_what_the_run_is_made_of(base, tmp_path):
    run(base | {"max_steps": 1, "eval_data": ""}, tmp_path / "run")
    digest = hashlib.sha256()
    for name in ("config.json", "model.safetensors"):
        digest.update(hashlib.sha256((Path(base["model"]) / name).read_bytes()).digest())
    text = (tmp_path / "run" / "config.yaml").read_text()
    assert f"# model files: {digest.hexdigest()}\n" in text and "# training tokens: " in text
    assert "# dtype in use: float32\n" in text


def test_small_learning_rate_moves_float32_weights(base, tmp_path):
    run(base | {"learning_rate": 5e-7, "max_steps": 3}, tmp_path / "run")
    before = load_file(Path(base["model"]) / "model.safetensors")
    after = load_file(tmp_path / "run" / "final" / "model.safetensors")
    for name in before:
        moved = (after[name] != before[name]).float().mean()
        assert moved > (0.1 if "embed" in name else 0.5), (
            name
        )  # many tokens of the vocabulary do not occur


# ---- Resume --------------------------------------------------------------------------------------


def test_resume_is_bitwise(base, three_runs, tmp_path):
    whole, lines = three_runs["one"]
    checkpoint = whole / "checkpoints" / "step_2"
    resumed = run(
        base | {"max_steps": 3, "save_every": 1, "resume": str(checkpoint)}, tmp_path / "resumed"
    )
    assert timeless(resumed) == timeless(lines)[3:]  # steps after 2, and the last evaluation
    a, b = (
        load_file(folder / "final" / "model.safetensors")
        for folder in (whole, tmp_path / "resumed")
    )
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_checkpoint_of_many_files_resumes_bitwise(base, tmp_path, monkeypatch):
    """The embedding is larger than what is asked of a file."""
    monkeypatch.setattr(runtime, "FILE_BYTES", 30_000)
    values = base | {"max_steps": 3, "save_every": 1, "keep_checkpoints": 0, "eval_data": ""}
    output = tmp_path / "run"
    lines = timeless(run(values, output))
    weights = load_file(output / "final" / "model.safetensors")
    assert len([*output.glob("checkpoints/step_2/*.safetensors")]) > 4
    for folder in ("final", "checkpoints/step_3"):
        shutil.rmtree(output / folder)
    assert timeless(run(values, output)) == lines
    again = load_file(output / "final" / "model.safetensors")
    assert all(torch.equal(again[key], tensor) for key, tensor in weights.items())


@pytest.mark.parametrize("started, resume", [("ranks", run), ("one", run_ranks)])
def test_another_number_of_ranks_resumes(base, three_runs, tmp_path, started, resume):
    """One process, which is not sharded, what two ranks began, and they what it began."""
    folder, lines = three_runs[started]
    output = tmp_path / "run"
    shutil.copytree(folder, output)
    shutil.rmtree(output / "final")
    for step in (2, 3):
        shutil.rmtree(output / "checkpoints" / f"step_{step}")
    # An interrupted save is not a checkpoint, however much of it was written.
    shutil.copytree(output / "checkpoints" / "step_1", output / "checkpoints" / "step_3.part")
    resumed = resume(base | {"max_steps": 3, "save_every": 0}, output)  # finds step_1 by itself
    assert [line["step"] for line in resumed] == [
        0,
        1,
        2,
        3,
        3,
    ]  # what it repeats is not logged twice
    assert timeless(resumed)[:2] == timeless(lines)[:2]
    for mine, its in zip(timeless(resumed), timeless(lines)):
        assert mine == pytest.approx(its, rel=1e-5, abs=1e-6)


def test_damaged_checkpoint_is_passed_over(base, three_runs, tmp_path, monkeypatch, capsys):
    output = tmp_path / "run"
    shutil.copytree(three_runs["one"][0], output)
    shutil.rmtree(output / "final")
    shutil.rmtree(output / "checkpoints" / "step_3")
    shard = next((output / "checkpoints" / "step_2").glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1])
    values = base | {"max_steps": 3, "save_every": 2, "keep_checkpoints": 1}
    monkeypatch.setattr(runtime, "watch_sigterm", lambda: Signals(0))
    (output / "checkpoints" / "step_9").mkdir()  # damaged, too, and the one with the most steps
    with pytest.raises(SystemExit):
        run(values, output)
    assert f"resuming from {output / 'checkpoints' / 'step_1'}" in capsys.readouterr().out
    # What is damaged does not count as kept.
    assert [path.name for path in (output / "checkpoints").iterdir()] == ["step_2"]


def test_an_older_checkpoint_goes_on_elsewhere(base, three_runs, tmp_path):
    """In its own folder, the newer ones would pass for those of the run that begins there."""
    shutil.copytree(three_runs["one"][0], tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "final")
    older = tmp_path / "run" / "checkpoints" / "step_1"
    values = base | {"max_steps": 3, "resume": str(older)}
    with pytest.raises(InputError, match="step_1: .*step_3 is there, too: go on from it"):
        run(values, tmp_path / "run")
    assert run(values, tmp_path / "other")[-1]["step"] == 3
    for step in (2, 3):
        (older.parent / f"step_{step}").rename(tmp_path / f"step_{step}")
    assert timeless(run(values, tmp_path / "run")) == timeless(three_runs["one"][1])


def test_torchrun_heals_and_sigterm_saves_and_the_same_command_goes_on(base, tmp_path):
    values = base | {"max_steps": 100, "save_every": 0, "eval_every": 0}
    metrics = tmp_path / "run" / "metrics.jsonl"
    launch = command(values, tmp_path / "run", 2)
    launch[3:3] = ["--max-restarts", "1"]
    process = subprocess.Popen(launch, cwd=ROOT, stdout=subprocess.PIPE, text=True)

    def wait_for_lines(other_than: int = 0) -> int:
        deadline = time.monotonic() + 120
        while (
            not metrics.exists()
            or metrics.stat().st_ino == other_than
            or len(runtime.read_lines(metrics)) < 4
        ):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        return metrics.stat().st_ino

    try:
        first = wait_for_lines()
        ranks = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(ranks[-1]), signal.SIGKILL)
        wait_for_lines(other_than=first)  # begun again: there was no checkpoint yet
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode != 0 and "stopped by SIGTERM after step" in output
    (checkpoint,) = (tmp_path / "run" / "checkpoints").iterdir()
    reached = int(checkpoint.name.removeprefix("step_"))
    assert 3 <= reached < 100 and not (tmp_path / "run" / "final").exists()
    lines = run(values, tmp_path / "run")
    assert [line["step"] for line in lines] == [0, *range(1, 101), 100]
    run(values, tmp_path / "run")  # and once more is no harm: it says that the run is finished
    assert read_metrics(tmp_path / "run") == lines


def test_sigterm_while_the_data_is_tokenized_leaves_no_worker_behind(base, tmp_path):
    row = Path(base["train_data"]).read_text().splitlines()[0]
    (tmp_path / "many.jsonl").write_text(f"{row}\n" * 40_000)
    values = base | {"train_data": str(tmp_path / "many.jsonl"), "eval_data": ""}
    launch = [sys.executable, "train.py", *as_flags(values, tmp_path / "run")]
    process = subprocess.Popen(launch, cwd=ROOT)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    deadline, workers = time.monotonic() + 120, []
    # Those that tokenize, and one that holds their queue.
    while len(workers) < 1 + min(os.cpu_count(), 2):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
        workers = children.read_text().split()
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 143

    def alive(worker: str) -> bool:
        try:
            return Path(f"/proc/{worker}/cmdline").read_bytes() != b""  # a dead one that waits
        except OSError:
            return False

    while any(map(alive, workers)):
        assert time.monotonic() < deadline
        time.sleep(0.05)


class Signals:
    """In place of the event that SIGTERM sets: set when it has been asked `quiet` times."""

    def __init__(self, quiet: int):
        self.quiet = quiet

    def is_set(self) -> bool:
        self.quiet -= 1
        return self.quiet < 0


def test_sigterm_at_any_moment_loses_no_line(base, tmp_path, monkeypatch):
    """Stopped at every place that asks for the signal, a step or an evaluation's micro-batch: the
    lines are in the end those of a run that was not stopped."""
    values = base | {"max_steps": 2, "save_every": 0, "eval_every": 1}
    places = []
    monkeypatch.setattr(runtime, "watch_sigterm", lambda: Signals(places[-1]))
    for quiet in (1000, *range(1000)):
        places.append(quiet)
        output = tmp_path / str(quiet)
        try:
            lines = run(values, output)
            if quiet < 1000:
                break  # there is no other place
        except SystemExit as error:
            assert error.code == 143 and not (output / "final").exists()
            places.append(1000)
            lines = run(values, output)
        assert timeless(lines) == timeless(read_metrics(tmp_path / "1000"))
    evaluation_batches = 2
    assert quiet == 2 + 3 * evaluation_batches


def test_a_checkpoint_of_an_evaluation_that_sigterm_stopped_is_that_of_its_step(
    base, tmp_path, monkeypatch
):
    """In bfloat16 the model is sharded also on one rank, and a forward without a backward leaves
    the root's parameters gathered, as copies in bfloat16."""
    values = base | {"dtype": "bfloat16", "max_steps": 2, "save_every": 1, "eval_every": 1}
    run(values | {"keep_checkpoints": 0}, tmp_path / "whole")
    # Asked once a step and once a held-out micro-batch: before the second one after step 1.
    monkeypatch.setattr(runtime, "watch_sigterm", lambda: Signals(4))
    with pytest.raises(SystemExit):
        run(values, tmp_path / "run")
    expected, found = (
        read_checkpoint(tmp_path / name / "checkpoints" / "step_1") for name in ("whole", "run")
    )
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensor, found[name]), name


def test_an_evaluation_that_is_made_again_is_logged_once(base, tmp_path, monkeypatch):
    """Stopped in the evaluation after step 1; continued, and killed when it had been made."""
    values = base | {"max_steps": 2, "save_every": 0, "eval_every": 1}
    monkeypatch.setattr(runtime, "watch_sigterm", lambda: Signals(4))
    with pytest.raises(SystemExit):
        run(values, tmp_path / "run")
    monkeypatch.setattr(runtime, "watch_sigterm", lambda: Signals(1000))
    run(values, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "final")  # as if killed before it was written
    lines = run(values, tmp_path / "run")
    assert timeless(lines) == timeless(run(values, tmp_path / "whole"))


SIGTERM_OF_ONE_RANK = """
import os, sys, runtime, train

class Signal:
    asked = 0

    def is_set(self):
        self.asked += 1
        return os.environ["RANK"] == "1" and self.asked >= int(sys.argv[1])

runtime.watch_sigterm = Signal
train.train(train.parse_args(sys.argv[2:]))
"""


@pytest.mark.parametrize("asked, changes, step", [(2, {"eval_data": ""}, 2), (1, {}, 0)])
def test_sigterm_of_one_rank_stops_all(base, tmp_path, asked, changes, step):
    """In step 2, and in the evaluation before training."""
    (tmp_path / "one.py").write_text(SIGTERM_OF_ONE_RANK)
    values = base | {"max_steps": 4, "save_every": 0} | changes
    launch = command(values, tmp_path / "run", 2)
    launch[6:7] = [str(tmp_path / "one.py"), str(asked)]  # in place of train.py
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        launch, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=150
    )
    assert f"stopped by SIGTERM after step {step};" in done.stdout, done.stderr[-2000:]
    saved = [path.name for path in (tmp_path / "run").glob("checkpoints/*")]
    assert saved == ([f"step_{step}"] if step else [])


def test_metrics_wait_for_their_line_without_the_graph_of_their_step(base, tmp_path, monkeypatch):
    rows, mean_over_ranks = [], train.mean_over_ranks
    monkeypatch.setattr(train, "mean_over_ranks", lambda r: rows.extend(r) or mean_over_ranks(r))
    run(base | {"max_steps": 1, "log_every": 1}, tmp_path / "run")
    assert rows and not any(values.requires_grad for row in rows for values in row.values())


def test_log_every_with_a_stop_in_between_reports_every_step_once(base, tmp_path, monkeypatch):
    values = base | {"max_steps": 6, "log_every": 4, "eval_data": ""}
    each = run(values | {"log_every": 1}, tmp_path / "each")
    monkeypatch.setattr(runtime, "watch_sigterm", lambda: Signals(2))
    with pytest.raises(SystemExit):
        run(values, tmp_path / "run")
    monkeypatch.undo()
    lines = run(values, tmp_path / "run")
    assert [line["step"] for line in lines] == [3, 4, 6]
    for line, steps in zip(lines, (each[:3], each[3:4], each[4:])):
        assert line["loss"] == pytest.approx(sum(s["loss"] for s in steps) / len(steps), abs=1e-9)


def test_a_slow_checkpoint_warns_of_torchruns_patience(base, tmp_path, monkeypatch, capsys):
    clock = iter(range(0, 10**6, 20))
    monkeypatch.setattr(runtime.time, "perf_counter", lambda: next(clock))
    for place, expected in (("TORCHELASTIC_RUN_ID", True), ("OTHER", False)):
        monkeypatch.setenv(place, "1")
        run(base | {"max_steps": 1, "eval_data": ""}, tmp_path / place)
        warned = "torchrun kills a run 30 s after SIGTERM" in capsys.readouterr().err
        assert warned == expected
        monkeypatch.delenv(place)


def test_a_chat_template_of_a_file_is_trained_and_exported(base, tmp_path, monkeypatch):
    template = CHATML.replace("<|im_start|>", "<s>")
    (tmp_path / "template.jinja").write_text(template)
    seen, pack_rows = [], train.pack_rows
    monkeypatch.setattr(train, "pack_rows", lambda *a: seen.append(pack_rows(*a)) or seen[-1])
    values = base | {"max_steps": 1, "chat_template": str(tmp_path / "template.jinja")}
    run(values, tmp_path / "run")
    final = transformers.AutoTokenizer.from_pretrained(tmp_path / "run" / "final")
    assert final.chat_template == template
    assert final.decode(seen[0].input_ids).startswith("<s>user\n")
    with pytest.raises(InputError, match="No such file or directory: 'nowhere.jinja'"):
        run(base | {"chat_template": "nowhere.jinja"}, tmp_path / "other")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"learning_rate": 2e-3}, "learning_rate was 0.001, is 0.002"),
        ({"seed": 1}, "seed was 42, is 1"),
        ({"loss": "sft"}, "loss was simper, is sft"),
        ({"max_length": 97}, "max_length was 96, is 97"),
        ({"batch_size": 4}, "batch_size was 8, is 4"),
    ],
)
def test_resume_of_another_run_is_refused(base, three_runs, tmp_path, change, message):
    checkpoint = str(three_runs["one"][0] / "checkpoints" / "step_2")
    with pytest.raises(InputError, match=message):
        run(base | {"max_steps": 3, "resume": checkpoint} | change, tmp_path / "run")


def test_resume_with_other_data_is_refused(base, three_runs, tmp_path, capsys):
    shutil.copytree(three_runs["one"][0], tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "final")
    changed = Path(base["train_data"]).read_text().replace("a", "e", 1)
    original = Path(base["train_data"]).read_text()
    try:
        Path(base["train_data"]).write_text(changed)
        with pytest.raises(InputError, match="run: other training tokens. Use"):
            run(base | {"max_steps": 3}, tmp_path / "run")
        lines = run(base | {"max_steps": 4, "resume": "anyway"}, tmp_path / "run")
    finally:
        Path(base["train_data"]).write_text(original)
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 3, 4, 4]  # 3 was evaluated as the last
    error = capsys.readouterr().err
    assert "going on, but" in error and "max_steps was 3, is 4; other training tokens" in error


def test_resume_with_another_model_or_template_says_so(base, three_runs, model_folder, tmp_path):
    shutil.copytree(three_runs["one"][0], tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "final")
    shutil.copytree(model_folder, tmp_path / "model")
    checkpoint = tmp_path / "run" / "checkpoints" / "step_3" / "trainer.json"
    state = json.loads(checkpoint.read_text())
    state["config"]["model"] = str(tmp_path / "model")
    checkpoint.write_text(json.dumps(state))
    values = base | {"max_steps": 3, "model": str(tmp_path / "model")}
    make_model("llama", seed=1).save_pretrained(tmp_path / "model")
    with pytest.raises(InputError, match="run: other model files. Use"):
        run(values, tmp_path / "run")
    make_model("llama").save_pretrained(tmp_path / "model")
    config = (tmp_path / "model" / "config.json").read_text()
    assert "rope_theta" in config
    (tmp_path / "model" / "config.json").write_text(
        config.replace('"rope_theta": 1', '"rope_theta": 9')
    )
    with pytest.raises(InputError, match="run: other model files. Use"):
        run(values, tmp_path / "run")
    (tmp_path / "model" / "config.json").write_text(config)
    tokenizer = make_tokenizer(CHATML.replace("{% for", "{{ 'Be kind.' }}{% for", 1))
    tokenizer.save_pretrained(tmp_path / "model")
    message = "run: other chat template; other training tokens. Use"
    with pytest.raises(InputError, match=message):
        run(values, tmp_path / "run")
    # A checkpoint of a version that did not know these hashes is taken.
    make_tokenizer().save_pretrained(tmp_path / "model")
    del state["digests"], state["config"]["chat_template"]
    checkpoint.write_text(json.dumps(state))
    assert run(values, tmp_path / "run") == three_runs["one"][1]


def write_state(folder: Path, config: Config, digests: dict) -> Path:
    """A checkpoint without tensors."""
    checkpoint = folder / "checkpoints" / "step_1"
    checkpoint.mkdir(parents=True)
    state = {"step": 1, "evaluated": True, "comparable_from": 0, "sizes": {}}
    state |= {"config": dataclasses.asdict(config), "digests": digests}
    (checkpoint / "trainer.json").write_text(json.dumps(state))
    return checkpoint


FREE = "micro_batch_tokens activation_checkpointing compile replicas wandb eval_data eval_every "
FREE += "save_every keep_checkpoints log_every chat_template"


@pytest.mark.parametrize("name", sorted({*Config.__dataclass_fields__} - {"output_dir", "resume"}))
def test_what_may_change_when_a_run_is_resumed(name, tmp_path):
    digests = {"training tokens": "a", "held-out tokens": "b"}
    config = Config(model="m", train_data="d", output_dir=str(tmp_path))
    checkpoint, value = write_state(tmp_path, config, digests), getattr(config, name)
    other = f"{value}x" if isinstance(value, str) else value * 2 + 1
    other = not value if isinstance(value, bool) else other
    changed = dataclasses.replace(config, **{name: other})
    if name in FREE.split():
        assert runtime.choose_checkpoint(changed, digests)[0] == checkpoint
    else:
        said = f"step_1 is of another run: {name} was {value}, is {other}"
        with pytest.raises(InputError, match=said):
            runtime.choose_checkpoint(changed, digests)


def test_an_older_checkpoint_that_cannot_go_stops_no_run(base, tmp_path):
    """As a link to another disk, to which it was moved."""
    run(base | {"max_steps": 1, "save_every": 1, "eval_data": ""}, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "final")
    checkpoints = tmp_path / "run" / "checkpoints"
    (checkpoints / "step_1").rename(tmp_path / "step_1")
    (checkpoints / "step_1").symlink_to(tmp_path / "step_1")
    values = base | {"max_steps": 2, "save_every": 1, "eval_data": "", "resume": "anyway"}
    assert [line["step"] for line in run(values, tmp_path / "run")] == [1, 2]
    assert {path.name for path in checkpoints.iterdir()} == {"step_1", "step_2"}


def test_an_exported_model_is_on_disk_before_it_has_its_name(base, tmp_path, monkeypatch):
    calls, rename = [], os.rename
    monkeypatch.setattr(os, "sync", lambda: calls.append("sync"))
    monkeypatch.setattr(os, "rename", lambda *a: calls.append(Path(a[1]).name) or rename(*a))
    run(base | {"max_steps": 1, "eval_data": "", "save_every": 0}, tmp_path / "run")
    assert calls == ["sync", "final"]


DIGESTS = ("tokenizer", "chat template", "training tokens", "model files", "held-out tokens")
DIGESTS += ("dtype in use",)


@pytest.mark.parametrize("name", DIGESTS)
def test_what_a_resumed_run_is_made_of(name, tmp_path):
    digests = dict.fromkeys(DIGESTS, "a")
    config = Config(model="m", train_data="d", output_dir=str(tmp_path))
    checkpoint = write_state(tmp_path, config, digests)
    if name == "held-out tokens":
        assert runtime.choose_checkpoint(config, digests | {name: "b"})[0] == checkpoint
    else:
        with pytest.raises(InputError, match=f"another run: other {name}. Use"):
            runtime.choose_checkpoint(config, digests | {name: "b"})


def test_a_checkpoint_of_another_folder_brings_no_lines(base, tmp_path):
    values = base | {"max_steps": 2, "save_every": 1, "keep_checkpoints": 0}
    lines = run(values, tmp_path / "run")
    (tmp_path / "other").mkdir()
    line = {"step": 0} | {f"eval/{name}": 0.123 for name in runtime.SHOWN}
    (tmp_path / "other" / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    resume = {"resume": str(tmp_path / "run" / "checkpoints" / "step_1")}
    assert timeless(run(values | resume, tmp_path / "other")) == timeless(lines)[2:]


def test_a_checkpoint_is_on_disk_before_it_has_its_name(base, tmp_path, monkeypatch):
    synced, named, sync, rename = set(), [], runtime.sync, os.rename

    def watch(source, target):
        if Path(target).name == "step_1":
            assert {Path(source), *Path(source).iterdir()} <= synced
            named.append(target)
        rename(source, target)

    monkeypatch.setattr(runtime, "sync", lambda path: synced.add(path) or sync(path))
    monkeypatch.setattr(os, "rename", watch)
    run(base | {"max_steps": 1, "eval_data": ""}, tmp_path / "run")
    assert named and tmp_path / "run" / "checkpoints" in synced


def test_a_file_is_replaced_only_when_the_new_one_is_on_disk(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_text("old")

    def full(path):
        raise OSError("No space left on device")

    monkeypatch.setattr(runtime, "sync", full)
    with pytest.raises(OSError):
        runtime.write_whole(path, "new")
    assert path.read_text() == "old"


def test_checkpoints_are_ordered_by_number(tmp_path):
    for name in ("step_9", "step_10", "step_100", "step_20.part"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    names = [path.name for path in runtime.checkpoints(tmp_path)]
    assert names == ["step_100", "step_10", "step_9"]


def test_a_run_goes_on_without_held_out_pairs(base, tmp_path):
    run(base | {"max_steps": 2, "save_every": 1}, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "final")
    (line,) = run(base | {"max_steps": 2, "eval_data": ""}, tmp_path / "run")[-1:]
    assert line["step"] == 2 and "eval/loss" in line  # that of before: nothing is evaluated again


def test_resume_never_sets_the_old_run_aside(base, tmp_path):
    run(base | {"max_steps": 1}, tmp_path / "run")
    run(base | {"max_steps": 1, "resume": "never"}, tmp_path / "run")
    (old,) = (path for path in tmp_path.iterdir() if path.name.startswith("run."))
    assert (old / "final" / "model.safetensors").exists() and (tmp_path / "run" / "final").exists()


# ---- Faults --------------------------------------------------------------------------------------


def test_a_run_that_fails_at_the_export_continues_from_its_end(base, tmp_path):
    values = base | {"max_steps": 3, "save_every": 2}
    code = "import sys, train\ndef full(*_): raise OSError('No space left on device')\n"
    code += "train.export = full\ntrain.train(train.parse_args(sys.argv[1:]))"
    flags = as_flags(values, tmp_path / "run")
    process = [sys.executable, "-c", code, *flags]
    failed = subprocess.run(process, cwd=ROOT, capture_output=True, text=True)
    assert "No space left on device" in failed.stderr
    lines = read_metrics(tmp_path / "run")
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 3]
    assert run(values, tmp_path / "run") == lines  # no step is taken again
    assert (tmp_path / "run" / "final" / "model.safetensors").exists()


LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))
import runtime, train
runtime.run_command(lambda: train.train(train.parse_args(sys.argv[2:])))
"""


@pytest.mark.parametrize(
    "limit, place, values",
    [
        (40_000, "save_checkpoint (runtime.py)", {"save_every": 1}),
        (40_000, "export (model.py)", {"save_every": 0}),
        (9_000, "load_pairs (data.py)", {}),
        (2_500, "write (runtime.py)", {}),
    ],
)
def test_a_file_that_cannot_be_written_is_one_line(base, tmp_path, limit, place, values):
    """The limit on the size of a file stands for a full disk."""
    values = base | {"max_steps": 2, "eval_every": 1} | values
    if limit > 2_500:
        values["train_data"] = write_pairs(tmp_path / "train.jsonl", 26, seed=3)  # not cached yet
    flags = as_flags(values, tmp_path / "run")
    if limit == 2_500:
        run(values, tmp_path / "cached")
    process = [sys.executable, "-c", LIMITED, str(limit), *flags]
    failed = subprocess.run(process, cwd=ROOT, capture_output=True, text=True)
    assert failed.returncode == 1 and "Traceback" not in failed.stderr, failed.stderr
    error = rf"error: File too large[^,]*, in {re.escape(place)}. A run writes to its output_dir"
    assert re.search(error, failed.stderr), failed.stderr
    lines = run(values, tmp_path / "run")
    assert [line["step"] for line in lines] == [0, 1, 1, 2, 2]


def test_the_table_is_of_this_run(base, tmp_path, capsys):
    """Lines of another run without a checkpoint, also cut-off ones, are not taken for its own."""
    output = tmp_path / "run"
    output.mkdir()
    line = {"step": 0} | {f"eval/{name}": 0.123 for name in runtime.SHOWN}
    (output / "metrics.jsonl").write_text(json.dumps(line) + '\n{"step": 0, "eval')
    lines = run(base | {"max_steps": 1}, output)
    assert [line["step"] for line in lines] == [0, 1, 1]
    assert f"{lines[0]['eval/loss']:.4f}" in capsys.readouterr().out


def test_other_held_out_pairs_have_a_before_of_their_own(base, three_runs, tmp_path, capsys):
    shutil.copytree(three_runs["one"][0], tmp_path / "run")
    for name in ("final", "checkpoints/step_3"):
        shutil.rmtree(tmp_path / "run" / name)
    other = write_pairs(tmp_path / "other.jsonl", 9, seed=7)
    lines = run(base | {"max_steps": 3, "eval_data": other}, tmp_path / "run")
    assert [line["step"] for line in lines] == [0, 1, 2, 2, 3, 3]
    table = capsys.readouterr().out
    before = rf"held-out pairs +step 2 .*\naccuracy +{lines[3]['eval/accuracy']:.4f} "
    assert re.search(before, table)
    # And also when the next resumption finds them as they were.
    shutil.rmtree(tmp_path / "run" / "final")
    run(base | {"max_steps": 3, "eval_data": other}, tmp_path / "run")
    assert re.search(before, capsys.readouterr().out)


def test_torn_files_block_no_restart(base, three_runs, tmp_path):
    output = tmp_path / "run"
    shutil.copytree(three_runs["one"][0], output)
    shutil.rmtree(output / "final")
    (output / "checkpoints" / "step_3" / "trainer.json").write_text("")
    (output / "checkpoints" / "step_2" / "trainer.json").write_text('{"step": 2, "siz')
    text = (output / "metrics.jsonl").read_text()
    (output / "metrics.jsonl").write_text(text[:-20])
    lines = run(base | {"max_steps": 3, "save_every": 1}, output)  # from step 1
    assert timeless(lines) == timeless(three_runs["one"][1])


def test_metrics_are_read_as_far_as_they_are_whole(tmp_path):
    for damage in ('{"st', "7", "[1]", '{"loss": 1}', '{"step": null}'):
        (tmp_path / "m.jsonl").write_text(f'{{"step": 1}}\n{damage}\n{{"step": 2}}\n')
        assert runtime.read_lines(tmp_path / "m.jsonl") == [{"step": 1}]


def test_the_newest_checkpoint_has_the_most_steps(base, three_runs, tmp_path, capsys):
    shutil.copytree(three_runs["one"][0], tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "final")
    os.utime(tmp_path / "run" / "checkpoints" / "step_1")  # as a plain copy may order them
    run(base | {"max_steps": 3}, tmp_path / "run")
    assert f"resuming from {tmp_path / 'run' / 'checkpoints' / 'step_3'}" in capsys.readouterr().out


def test_two_runs_in_one_folder(base, tmp_path):
    """The second is refused before it changes a file."""
    values = base | {"max_steps": 5000, "eval_every": 0, "save_every": 0}
    first = subprocess.Popen(
        command(values, tmp_path / "run", 1), cwd=ROOT, stderr=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + 120
        while not (tmp_path / "run" / "metrics.jsonl").exists():
            assert first.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        config = (tmp_path / "run" / "config.yaml").read_text()
        for resume in ("auto", "never"):
            with pytest.raises(InputError, match="run: another run is writing to it"):
                run(values | {"max_steps": 1, "resume": resume}, tmp_path / "run")
        assert [path.name for path in tmp_path.iterdir()] == ["run"]
        assert (tmp_path / "run" / "config.yaml").read_text() == config
    finally:
        first.terminate()  # which the launcher passes on
        first.wait()


def different_data(rank: int, folder: Path) -> None:
    store = torch.distributed.FileStore(str(folder / "store"), 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    config = Config(model="m", train_data="d", output_dir=str(folder / "run"))
    with pytest.raises(InputError, match="rank 1 and rank 0 do not have the same training tokens"):
        runtime.find_checkpoint(config, {"training tokens": f"hash {rank}"})
    with pytest.raises(InputError, match="rank 1 and rank 0 do not have the same model files"):
        runtime.find_checkpoint(config, {"training tokens": "", "model files": f"hash {rank}"})
    torch.distributed.destroy_process_group()


def different_folders(rank: int, folder: Path) -> None:
    store = torch.distributed.FileStore(str(folder / "store"), 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    (folder / str(rank)).mkdir()
    os.chdir(folder / str(rank))  # as on two machines without a common file system
    runtime.time.sleep = lambda seconds: None
    digests = {"training tokens": "", "held-out tokens": ""}
    config = Config(model="m", train_data="d", output_dir="run")
    with pytest.raises(InputError, match="run of rank 1 is not that of rank 0: it must be on a"):
        runtime.find_checkpoint(config, digests)
    config = Config(model="m", train_data="d", output_dir=str(folder / "shared"))
    assert runtime.find_checkpoint(config, digests)[0] is None
    torch.distributed.destroy_process_group()


def test_ranks_with_different_data_are_refused(tmp_path):
    torch.multiprocessing.spawn(different_data, (tmp_path,), nprocs=2)
    assert not (tmp_path / "run").exists()


def test_ranks_with_different_folders_are_refused(tmp_path):
    """Each would write its half of a checkpoint, and none could be read."""
    torch.multiprocessing.spawn(different_folders, (tmp_path,), nprocs=2)
    assert not [*(tmp_path / "0" / "run").iterdir(), *(tmp_path / "shared").iterdir()]


def test_a_linked_output_dir_stays_where_it_points_to(base, tmp_path):
    (tmp_path / "scratch" / "run").mkdir(parents=True)
    (tmp_path / "run").symlink_to(tmp_path / "scratch" / "run")
    run(base | {"max_steps": 1}, tmp_path / "run")
    run(base | {"max_steps": 1, "resume": "never"}, tmp_path / "run")
    assert (tmp_path / "run").is_symlink() and (tmp_path / "scratch" / "run" / "final").exists()
    assert len([path for path in (tmp_path / "scratch").iterdir()]) == 2  # the old one set aside


@pytest.mark.parametrize("fails", ["login", "init"])
def test_wandb_never_stops_a_run(base, tmp_path, monkeypatch, fails):
    import wandb

    monkeypatch.setenv("WANDB_SILENT", "true")
    start = wandb.init

    def unreachable(*args, mode="online", **kwargs):
        if mode == "online":
            raise wandb.errors.CommError("the server cannot be reached")
        return start(*args, mode=mode, **kwargs)

    monkeypatch.setattr(wandb, "init", unreachable)
    monkeypatch.setattr(wandb, "login", unreachable if fails == "login" else lambda **_: True)
    assert len(run(base | {"max_steps": 1, "wandb": "auto"}, tmp_path / "run")) == 3
    offline = list((tmp_path / "run").glob("wandb/offline-run-*"))
    assert len(offline) == (fails == "init")


def test_a_run_goes_on_when_the_process_of_wandb_is_gone(base, tmp_path, monkeypatch, capsys):
    """Slurm sends SIGTERM to it, too; what comes after the line is the checkpoint."""
    import wandb

    def gone(*args, **options):
        raise ConnectionResetError("Connection lost")

    fake = SimpleNamespace(log=gone, finish=gone, define_metric=lambda *args, **options: None)
    monkeypatch.setattr(wandb, "init", lambda **settings: fake)
    monkeypatch.setattr(runtime, "watch_sigterm", lambda: Signals(0))
    values = base | {"max_steps": 3, "wandb": "offline", "eval_data": "", "save_every": 0}
    with pytest.raises(SystemExit):
        run(values, tmp_path / "run")
    assert (tmp_path / "run" / "checkpoints" / "step_1" / "trainer.json").exists()
    assert capsys.readouterr().err.count("wandb ends here: ConnectionResetError") == 1


def test_wandb_holds_every_line_once_in_a_run_that_is_stopped_and_killed(
    base, tmp_path, monkeypatch
):
    """wandb, also when it resumes a run, takes only steps above the last one that it has."""
    import wandb

    rows, ids = {}, set()

    class Run:
        def __init__(self, id, **settings):
            ids.add(id)
            self.start = max(rows, default=-1) + 1

        def log(self, metrics, step):
            if step >= max(self.start, max(rows, default=0)):
                rows.setdefault(step, {}).update(metrics)

        def define_metric(self, *args, **kwargs):
            pass

        def finish(self):
            pass

    monkeypatch.setattr(wandb, "login", lambda **_: True)
    monkeypatch.setattr(wandb, "init", lambda **settings: Run(**settings))
    values = base | {"max_steps": 4, "save_every": 3, "eval_every": 1, "wandb": "online"}
    values["keep_checkpoints"] = 2
    output = tmp_path / "run"
    for quiet in (6, 6):  # SIGTERM in the evaluation after step 2, then after step 4
        monkeypatch.setattr(runtime, "watch_sigterm", lambda: Signals(quiet))  # noqa: B023
        with pytest.raises(SystemExit):
            run(values, output)
    shutil.rmtree(output / "checkpoints" / "step_4")  # as if killed before it was written
    monkeypatch.setattr(runtime, "watch_sigterm", lambda: Signals(1000))
    lines = run(values, output)
    assert len(ids) == 1 and timeless(rows.values()) == timeless(lines)
    assert [line["step"] for line in lines] == [0, 1, 1, 2, 2, 3, 3, 4, 4]
    # A run from the start in the same folder is another one: wandb would drop its steps.
    for name in ("checkpoints", "final"):
        shutil.rmtree(output / name)
    rows.clear()
    lines = run(values | {"learning_rate": 2e-3}, output)
    assert len(ids) == 2 and timeless(rows.values()) == timeless(lines)
    # And so is one that goes on with other settings: of the two curves, wandb would keep the old.
    shutil.rmtree(output / "final")
    rows.clear()
    run(values | {"learning_rate": 1e-3, "max_steps": 5, "resume": "anyway"}, output)
    assert len(ids) == 3 and {*rows} == {10, 11}


# ---- Exactness: whole trajectories against the textbook's step -----------------------------------


def plain_objective(name: str, m: torch.Tensor, s: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
    """Written from the papers: m mean and s summed log-probs, r the reference's sums, each (2,
    pairs), chosen and rejected."""
    if name == "simper":
        return -torch.exp(m[0]) + torch.exp(m[1])
    if name == "dpo":
        return torch.log1p(torch.exp(-0.1 * ((s[0] - r[0]) - (s[1] - r[1]))))
    if name == "simpo":
        return torch.log1p(torch.exp(-(2.5 * m[0] - 2.5 * m[1] - 0.5)))
    raise ValueError(name)


def plain_trajectory(
    values: dict, name: str, steps: int, micro_batch: int = 4
) -> tuple[list[float], dict]:
    """Losses of every step, and the last weights, of the step that the authors' code takes, in
    float64: chosen and rejected padded into one batch, log_softmax, gather, AdamW, cosine schedule
    with warm-up, clipping, accumulation."""
    model = make_model("llama").double()
    start = copy.deepcopy(model)
    pairs, _ = load_pairs(
        values["train_data"], make_tokenizer(), values["max_length"], values["max_prompt_length"]
    )
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=values["learning_rate"], betas=(0.9, 0.999), weight_decay=0.0
    )
    schedule = transformers.get_cosine_schedule_with_warmup(
        optimizer, 2, steps
    )  # a tenth of 20 steps

    def forward(model, rows):  # (mean, summed) log-probs of the responses, each (2, pairs)
        sequences = [
            (p, y) for side in ("chosen", "rejected") for p, y in zip(rows["prompt"], rows[side])
        ]
        longest = max(len(p) + len(y) for p, y in sequences)
        ids, labels, mask = (
            torch.zeros(len(sequences), longest, dtype=torch.long) for _ in range(3)
        )
        for row, (p, y) in enumerate(sequences):
            ids[row, : len(p) + len(y)] = torch.tensor(p + y)
            mask[row, : len(p) + len(y)] = 1
            labels[row, len(p) : len(p) + len(y)] = 1
        logps = (
            model(ids, attention_mask=mask)
            .logits[:, :-1]
            .log_softmax(-1)
            .gather(2, ids[:, 1:, None])[..., 0]
        )
        sums, counts = (logps * labels[:, 1:]).sum(1), labels.sum(1)
        return (sums / counts).view(2, -1), sums.view(2, -1)

    losses = []
    for step in range(steps):
        indices, total = step_indices(len(pairs), values["batch_size"], 42, step), 0.0
        for begin in range(0, len(indices), micro_batch):
            rows = pairs[indices[begin : begin + micro_batch]]
            with torch.no_grad():
                _, reference = forward(start, rows)
            loss = (
                plain_objective(name, *forward(model, rows), reference).mean()
                * micro_batch
                / len(indices)
            )
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), values["max_grad_norm"])
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses, model.state_dict()


@pytest.mark.parametrize(
    "name, arguments", [("simper", ""), ("dpo", ""), ("simpo", "beta=2.5, gamma=0.5")]
)
def test_twenty_steps_equal_the_plain_implementation(base, tmp_path, name, arguments):
    values = base | {
        "max_steps": 20,
        "max_grad_norm": 0.02,
        "micro_batch_tokens": 250,
        "eval_data": "",
        "save_every": 0,
    }
    lines = run(values | {"loss": name, "loss_args": arguments}, tmp_path / "run")
    losses, weights = plain_trajectory(values, name, steps=20)
    assert [line["loss"] for line in lines] == pytest.approx(losses, abs=1e-5)
    assert max(losses) - min(losses) > 0.01  # the model has moved
    assert any(line["grad_norm"] > 0.02 for line in lines)  # and gradients were clipped
    trained = load_file(tmp_path / "run" / "final" / "model.safetensors")
    start = make_model("llama").state_dict()
    moved = relative_difference({k: start[k] for k in trained}, trained)
    assert relative_difference(trained, {k: weights[k].float() for k in trained}) < 1e-3 * moved


# ---- Losses with a reference ---------------------------------------------------------------------


@pytest.fixture
def counted(monkeypatch) -> list:
    """The results of every pass of the reference that this process makes or reads."""
    results, reference_logps = [], train.reference_logps
    monkeypatch.setattr(
        train,
        "reference_logps",
        lambda *args: results.append(reference_logps(*args)) or results[-1],
    )
    return results


def test_reference_is_the_starting_model(base, tmp_path, counted):
    """Its log-probs, from plain float64 forwards; the loss before the first update; and the
    gradient weights."""
    values = base | {
        "loss": "dpo",
        "loss_args": "beta=0.5",
        "micro_batch_tokens": 200,
        "max_steps": 2,
    }
    lines = run(values, tmp_path / "run")
    model = make_model("llama").double()
    for source, found in zip(("train_data", "eval_data"), counted):
        pairs = load_pairs(base[source], make_tokenizer(), 96, 60)[0]
        for pair, both in zip(pairs, found.tolist(), strict=True):
            for side, value in zip(("chosen", "rejected"), both):
                ids = torch.tensor([pair["prompt"] + pair[side]])
                with torch.no_grad():
                    logps = (
                        model(ids)
                        .logits[0, :-1]
                        .log_softmax(dim=-1)
                        .gather(1, ids[0, 1:, None])[:, 0]
                    )
                assert value == pytest.approx(
                    logps[len(pair["prompt"]) - 1 :].sum().item(), rel=1e-5
                )
    assert lines[0]["eval/loss"] == pytest.approx(math.log(2), abs=1e-6)
    # ∂/∂m = |y| ∂/∂s = |y| β σ(0)
    assert lines[0]["eval/gradient_weight/chosen"] == pytest.approx(
        0.25 * lines[0]["eval/length/chosen"], rel=1e-5
    )
    assert lines[0]["eval/gradient_weight/rejected"] == pytest.approx(
        0.25 * lines[0]["eval/length/rejected"], rel=1e-5
    )
    assert lines[-1]["eval/loss"] != pytest.approx(math.log(2), abs=1e-3)


def test_reference_is_computed_once_and_resumed_with(base, tmp_path, monkeypatch):
    """Two ranks write it; one rank reads it on resuming, with a model whose weights have moved, and
    goes on as they would."""
    monkeypatch.setenv("SIMPER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(model, "CACHE_DIR", tmp_path / "cache")
    values = base | {"loss": "kto", "max_steps": 3, "save_every": 2, "eval_data": ""}
    whole = run_ranks(values, tmp_path / "two")
    (file,) = (tmp_path / "cache" / "reference").iterdir()
    written = file.stat().st_mtime_ns
    shutil.copytree(tmp_path / "two", tmp_path / "run", ignore=shutil.ignore_patterns("final"))
    lines = timeless(run(values, tmp_path / "run"))
    assert file.stat().st_mtime_ns == written and [
        *(tmp_path / "cache" / "reference").iterdir()
    ] == [file]
    assert [line["step"] for line in lines] == [1, 2, 3] and lines[:2] == timeless(whole)[:2]
    assert lines[2] == pytest.approx(timeless(whole)[2], rel=1e-5, abs=1e-6)
    alone = timeless(run(values, tmp_path / "alone"))  # the same from the start, by one rank
    for mine, its in zip(alone, timeless(whole), strict=True):
        assert mine == pytest.approx(its, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["simper", "dpo"])
def test_resume_is_bitwise_also_sharded(base, tmp_path, monkeypatch, name, dtype):
    """In bfloat16 also a single process is sharded. The reference is computed again, before the
    checkpoint is read; and evaluations come between training and checkpoints."""
    monkeypatch.setattr(model, "CACHE_DIR", tmp_path / "cache")
    values = base | {"loss": name, "dtype": dtype, "max_steps": 4, "save_every": 2}
    values |= {"eval_every": 1, "keep_checkpoints": 0}
    output = tmp_path / "run"
    lines = timeless(run(values, output))
    weights = load_file(output / "final" / "model.safetensors")
    for folder in ("final", "checkpoints/step_4"):
        shutil.rmtree(output / folder)
    shutil.rmtree(tmp_path / "cache" / "reference", ignore_errors=True)
    assert timeless(run(values, output)) == lines
    again = load_file(output / "final" / "model.safetensors")
    assert all(torch.equal(again[key], tensor) for key, tensor in weights.items())


def test_a_damaged_reference_is_computed_again(base, tmp_path, monkeypatch):
    monkeypatch.setattr(model, "CACHE_DIR", tmp_path / "cache")
    values = base | {"loss": "dpo", "max_steps": 1, "eval_data": ""}
    run(values, tmp_path / "whole")
    (file,) = (tmp_path / "cache" / "reference").iterdir()
    whole = file.read_bytes()
    for damaged in (b"", whole[:40], whole[:-1]):
        file.write_bytes(damaged)
        run(values, tmp_path / str(len(damaged)))
        assert [*file.parent.iterdir()] == [file] and file.read_bytes() == whole


def test_other_weights_have_another_reference(base, tmp_path, counted):
    values = base | {"loss": "dpo", "max_steps": 1, "eval_data": ""}
    run(values, tmp_path / "first")
    other = tmp_path / "other"
    make_model("llama", seed=1).save_pretrained(other)
    make_tokenizer().save_pretrained(other)
    first = (Path(base["model"]) / "model.safetensors").stat()
    assert (
        other / "model.safetensors"
    ).stat().st_size == first.st_size  # neither the size nor the time tells
    os.utime(other / "model.safetensors", ns=(first.st_atime_ns, first.st_mtime_ns))
    (line,) = run(values | {"model": str(other)}, tmp_path / "second")
    assert line["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert not torch.allclose(*counted)
    # The config decides, too, what the weights compute.
    config = (other / "config.json").read_text()
    (other / "config.json").write_text(config.replace('"rope_theta": 1', '"rope_theta": 9'))
    (line,) = run(values | {"model": str(other)}, tmp_path / "third")
    assert line["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert len(counted) == 3 and not torch.allclose(*counted[1:])


def test_edited_code_has_another_reference(base, tmp_path, monkeypatch):
    """A fork may change how tokens are laid out, what the model computes, or what is summed."""
    monkeypatch.setattr(model, "CACHE_DIR", tmp_path / "cache")
    values = base | {"loss": "dpo", "max_steps": 1, "eval_data": ""}
    getsource = inspect.getsource
    (line,) = run(values | {"dtype": "bfloat16"}, tmp_path / "bfloat16")  # has one of its own, too
    assert line["loss"] == pytest.approx(math.log(2), abs=1e-6)
    for count, edited in enumerate((None, data, model, loss), 2):
        monkeypatch.setattr(inspect, "getsource", lambda m, e=edited: getsource(m) + "#" * (m is e))
        run(values, tmp_path / str(count))
        assert len([*(tmp_path / "cache" / "reference").iterdir()]) == count


@pytest.mark.parametrize("name", train.LOSSES)
def test_every_loss_trains(base, tmp_path, name):
    lines = run(base | {"loss": name, "max_steps": 2, "eval_data": ""}, tmp_path / "run")
    assert len(lines) == 2 and all(
        math.isfinite(value) for line in lines for value in line.values()
    )
    assert lines[0]["grad_norm"] > 0 and lines[0]["gradient_weight/chosen"] > 0


# ---- Learning, and the loop's edges --------------------------------------------------------------


def test_a_tiny_model_learns_its_pairs(base, tmp_path):
    values = base | {
        "eval_data": base["train_data"],
        "num_epochs": 20,
        "learning_rate": 3e-3,
        "max_grad_norm": 1.0,
    }
    lines = [
        line
        for line in run(values | {"log_every": 60, "eval_every": 0}, tmp_path / "run")
        if "eval/loss" in line
    ]
    assert lines[0]["eval/accuracy"] < 0.8
    assert lines[-1]["eval/accuracy"] > 0.95
    assert (
        lines[-1]["eval/inverse_perplexity/chosen"] > 2 * lines[0]["eval/inverse_perplexity/chosen"]
    )
    assert (
        lines[-1]["eval/inverse_perplexity/rejected"]
        < 0.5 * lines[0]["eval/inverse_perplexity/rejected"]
    )


@pytest.mark.parametrize("steps, warmup", [(27, 3), (24, 3), (20, 2), (3, 1)])
def test_learning_rate_is_transformers_cosine_schedule(steps, warmup):
    config = Config(learning_rate=2.0, warmup_ratio=0.1)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2.0)
    schedule = transformers.get_cosine_schedule_with_warmup(optimizer, warmup, steps)
    for step in range(steps):
        expected = schedule.get_last_lr()[0]
        assert train.learning_rate(step, steps, config) == pytest.approx(expected, abs=1e-12)
        optimizer.step()
        schedule.step()


def test_log_every_reports_means_of_all_its_steps(base, three_runs, tmp_path):
    each = [line for line in three_runs["one"][1] if "loss" in line]
    (line,) = (
        line
        for line in run(base | {"max_steps": 3, "log_every": 3}, tmp_path / "run")
        if "loss" in line
    )
    means = {name for name in line if "/" in name} | {"loss", "accuracy"}
    assert len(means) == 11
    for name in means:
        assert line[name] == pytest.approx(sum(other[name] for other in each) / 3, rel=1e-9)


def test_the_costliest_micro_batches_come_first(base, tmp_path, monkeypatch):
    """With a pair of a long prompt, and one of fewer tokens but longer responses, whose log-probs
    take more memory."""
    rows = [{"prompt": "a" * n, "chosen": "b" * n, "rejected": "c" * n} for n in (4, 5, 6, 7)]
    rows += [{"prompt": "a" * 90, "chosen": "b", "rejected": "c"}]
    rows += [{"prompt": "a", "chosen": "b" * 30, "rejected": "c" * 29}]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = base | {"train_data": str(tmp_path / "pairs.jsonl"), "eval_data": ""}
    values |= {"batch_size": 6, "num_epochs": 2, "max_length": 120, "max_prompt_length": 100}
    values["micro_batch_tokens"] = 105
    seen, pack_rows = [], train.pack_rows

    def watch(*args):
        batch = pack_rows(*args)
        seen.append((len(batch.input_ids), len(batch.targets)))
        return batch

    monkeypatch.setattr(train, "pack_rows", watch)
    lines = run(values, tmp_path / "run")
    rehearsed, steps = seen[:2], seen[2:]
    assert {max(steps), max(steps, key=lambda size: size[1])} == {*rehearsed}
    assert len({*rehearsed}) == 2 and len(steps) > 4
    # The first step's learning rate is 0: had the rehearsal left a gradient behind, the norm would
    # be another.
    plain = run(values | {"micro_batch_tokens": 2000}, tmp_path / "plain")
    assert lines[0]["grad_norm"] == pytest.approx(plain[0]["grad_norm"], rel=1e-5)


@pytest.mark.parametrize("tokens, gradients", [(2000, False), (200, True)])
def test_the_rehearsal_has_in_place_what_a_step_has(base, tmp_path, monkeypatch, tokens, gradients):
    """Adam's state and, where a step has several micro-batches, the gradients of earlier ones."""
    seen, rehearse = [], train.rehearse

    def watch(model, optimizer, *rest):
        def look(*_):
            parameters = [*model.parameters()]
            state = all("exp_avg_sq" in optimizer.state[p] for p in parameters)
            seen.append((state, all(p.grad is not None for p in parameters)))

        hook = model.register_forward_pre_hook(look)
        rehearse(model, optimizer, *rest)
        hook.remove()

    monkeypatch.setattr(train, "rehearse", watch)
    run(base | {"max_steps": 1, "eval_data": "", "micro_batch_tokens": tokens}, tmp_path / "run")
    assert seen[0] == (True, gradients)


def cuda_out_of_memory():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


@pytest.mark.parametrize(
    "fail", [cuda_out_of_memory, lambda: torch.empty(2**60)], ids=["cuda", "cpu"]
)
def test_too_little_memory_says_what_to_lower(base, tmp_path, monkeypatch, fail):
    monkeypatch.setattr(train, "pack_rows", lambda *args: fail())
    with pytest.raises(RuntimeError) as caught:
        run(base | {"eval_data": ""}, tmp_path / "run")
    (note,) = caught.value.__notes__
    assert re.search(
        r"largest micro-batch, \d+ tokens on a rank, .* "
        r"lower --micro_batch_tokens \(the longest pair has \d+\)",
        note,
    )
    assert read_metrics(tmp_path / "run") == []


def test_nonfinite_gradient_stops_before_the_optimizer_moves(base, tmp_path, monkeypatch):
    rows, load_model = step_indices(26, 8, seed=42, step=0), train.load_model

    def break_model(*args, **kwargs):
        loaded = load_model(*args, **kwargs)
        with torch.no_grad():  # a token of one pair only
            embedding = loaded.model.get_input_embeddings().weight
            embedding[make_tokenizer()("|").input_ids] = float("nan")
        return loaded

    monkeypatch.setattr(train, "load_model", break_model)
    lines = [json.loads(line) for line in Path(base["train_data"]).read_text().splitlines()]
    lines[rows[3]]["rejected"] = "a|b"
    data = tmp_path / "train.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    values = base | {
        "train_data": str(data),
        "eval_data": "",
        "save_every": 1,
    }
    with pytest.raises(FloatingPointError, match=rf"step 1: .* row {rows[3]}\b"):
        run(values, tmp_path / "run")
    assert (
        not (tmp_path / "run" / "checkpoints").exists()
        and not (tmp_path / "run" / "final").exists()
    )


def test_bare_command(base, tmp_path):
    """`train.py` without a recipe is the demo: here with its own data and a tiny model, by plain
    python."""
    flags = [
        "--model",
        base["model"],
        "--max_steps",
        "2",
        "--output_dir",
        str(tmp_path / "run"),
        "--wandb",
        "off",
    ]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("WANDB")}
    done = subprocess.run(
        [sys.executable, "train.py", *flags, "--max_length", "200", "--max_prompt_length", "100"],
        cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert (
        "before" in done.stdout
        and "after" in done.stdout
        and f"is in {tmp_path / 'run' / 'final'}" in done.stdout
    )
    assert "inverse_perplexity/chosen" in done.stdout and "accuracy=" in done.stderr
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert (
        config["train_data"] == "demo/train.jsonl" and config["eval_data"] == "demo/heldout.jsonl"
    )


# ---- The command line and wandb ------------------------------------------------------------------


def test_recipe_and_command_line_precedence(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "model: m\ntrain_data: d\noutput_dir: o\nlearning_rate: 3e-7\nbatch_size: 64\n"
    )
    config = parse_args([str(recipe), "--batch_size=32", "--compile", "true"])
    assert (config.learning_rate, config.batch_size, config.compile, config.max_length) == (
        3e-7,
        32,
        True,
        2048,
    )
    recipe.write_text("model: m\nbeta: 2.0\n")
    with pytest.raises(InputError, match=f"{recipe}: there is no option 'beta'"):
        parse_args([str(recipe)])


def test_help_names_every_option():
    done = subprocess.run(
        [sys.executable, "train.py", "--help"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0 and all(
        f"--{name} " in done.stdout for name in Config.__dataclass_fields__
    )


def test_wandb_never_asks(base, tmp_path, monkeypatch):
    """Without a login, `auto` is off, `online` an error and `offline` writes a run to disk."""
    for name in [name for name in os.environ if name.startswith("WANDB")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked for input"))
    assert len(run(base | {"max_steps": 1, "wandb": "auto"}, tmp_path / "auto")) == 3
    assert not (tmp_path / "auto" / "wandb").exists()
    with pytest.raises(InputError, match="nobody is logged in"):
        run(base | {"max_steps": 1, "wandb": "online"}, tmp_path / "online")
    run(base | {"max_steps": 1, "wandb": "offline"}, tmp_path / "offline")
    assert list((tmp_path / "offline" / "wandb").glob("offline-run-*"))


# ---- Processes -----------------------------------------------------------------------------------


def test_a_gpu_that_torch_cannot_use_is_an_error(base, tmp_path, monkeypatch):
    """Unless it is hidden on purpose: the run would take the CPU without a word."""
    (tmp_path / "version").write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  470.82.01\n")
    monkeypatch.setattr(runtime, "NVIDIA_DRIVER", tmp_path / "version")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for build, said in ((None, "(none: a CPU build)"), ("13.0", "13.0")):
        monkeypatch.setattr(torch.version, "cuda", build)
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
        said = f"470.82.01; torch {torch.__version__} is built for CUDA {said}."
        with pytest.raises(InputError, match=re.escape(said)):
            run(base, tmp_path / "run")
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert len(run(base | {"max_steps": 1}, tmp_path / "run")) == 3


def test_more_processes_than_gpus_is_an_error(monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "0")
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "8")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    with pytest.raises(InputError, match="8 processes for 4 GPUs: lower --nproc_per_node"):
        runtime.start_process()


def test_a_run_without_a_gpu_says_so_first(base, tmp_path, capsys):
    run(base | {"max_steps": 1}, tmp_path / "run")
    assert capsys.readouterr().out.startswith("no GPU: 1 process(es) on the CPU\n")


@pytest.mark.parametrize("rank", ["0", "1"])
def test_an_error_that_only_one_rank_meets_is_printed_by_it(rank):
    code = "import runtime, data\ndef main(): raise data.InputError('too small')\n"
    code += "runtime.time.sleep = lambda seconds: None\n"
    command = [sys.executable, "-c", code + "runtime.run_command(main)"]
    environment = os.environ | {"RANK": rank}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    said = "error: too small" if rank == "0" else "error on rank 1: too small"
    assert (done.returncode, done.stderr.strip()) == (1, said)
