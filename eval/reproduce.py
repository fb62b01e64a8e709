"""One row of the paper's table, with today's judge: train a set-up, and judge the model beside the
published SFT, DPO and SimPO models of the same set-up.

    python -m eval.reproduce llama-3-8b-base --dry_run     # what it would do, disk and hours
    python -m eval.reproduce llama-3-8b-base               # eight GPUs, the authors' learning rates
    python -m eval.reproduce llama-3-8b-base --rates 1e-6  # one of them

Stages: check the GPUs (benchmarks/gpu_check.py); train the recipe, once for each learning rate; let
all models answer AlpacaEval's 805 instructions, sampled as the authors do; serve the judge; judge
each answer against GPT-4 Turbo's published one, and SimPER's against each of the others', in both
orders (eval/win_rate.py); write the tables with paired intervals (eval/report.py), and pack what
others need to check them. Each stage is a command that can also be run alone. A stage that is done
is not run again, and one that was interrupted continues: run the same command again.

Everything is in OUTPUT_DIR, a log of each stage in its logs/. vLLM needs an environment of its own
(docs/evaluation.md): --vllm_python is the Python there. Flags that are not listed are train.py's.
"""

import functools
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import urllib.request
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch
from huggingface_hub.constants import HF_HUB_CACHE

import train
from benchmarks.plan import GPUS, plan, sizes_of
from eval.alpaca_eval2 import DECODING, HUB, RECIPES, REFERENCE, hub_file, load_outputs
from eval.generate import short_name
from eval.judge import MODEL
from eval.results import AGAINST, at_least, make_parser
from runtime.command_line import run_command
from runtime.errors import InputError
from runtime.log import write_whole
from runtime.weights import load_config, resolve_model

ROOT = RECIPES.parent
# The published models of SimPO's authors (their README), and the learning rates of SimPER's: of
# tengxiao1/SimPER, and of the submission's SimPER-ICLR/SimPER where it has another.
SETUPS = {
    "mistral-7b-base": (
        (3e-7,),
        "alignment-handbook/zephyr-7b-sft-full",
        "princeton-nlp/Mistral-7B-Base-SFT-DPO",
        "princeton-nlp/Mistral-7B-Base-SFT-SimPO",
    ),
    "mistral-7b-instruct": (
        (5e-7, 3e-7),
        "mistralai/Mistral-7B-Instruct-v0.2",
        "princeton-nlp/Mistral-7B-Instruct-DPO",
        "princeton-nlp/Mistral-7B-Instruct-SimPO",
    ),
    "llama-3-8b-base": (
        (6e-7, 1e-6),
        "princeton-nlp/Llama-3-Base-8B-SFT",
        "princeton-nlp/Llama-3-Base-8B-SFT-DPO",
        "princeton-nlp/Llama-3-Base-8B-SFT-SimPO",
    ),
    "llama-3-8b-instruct": (
        (1e-6, 3e-7),
        "meta-llama/Meta-Llama-3-8B-Instruct",
        "princeton-nlp/Llama-3-Instruct-8B-DPO",
        "princeton-nlp/Llama-3-Instruct-8B-SimPO",
    ),
}
# Assumed, not measured: of vLLM, tokens/s of an 8B model that answers on one GPU, and judgments/s
# of a 70B judge on eight; minutes to load either.
ANSWER_TOKENS, JUDGMENTS, LOADING = 2500, 8, 10
TOKENS = 600  # of an answer
PORT = 8765
RUNNING: list[subprocess.Popen] = []  # the stages' processes


@dataclass(frozen=True)
class Stage:
    """name: of its log and its mark; environment: what is added to the process's own; depends: the
    files, (folder, pattern), that it reads or writes, whose change undoes it."""

    name: str
    command: list[str]
    environment: dict[str, str] = field(default_factory=dict)
    depends: tuple[tuple[Path, str], ...] = ()

    def __str__(self) -> str:
        variables = [f"{name}={value}" for name, value in self.environment.items()]
        return " ".join([*variables, shlex.join(self.command)])

    def made_of(self) -> str:
        """The command, and size and time of each file in `depends`."""
        files = [file for folder, pattern in self.depends for file in sorted(folder.glob(pattern))]
        stats = [(file.name, file.stat()) for file in files]
        return "\n".join([str(self), *(f"{n} {s.st_size} {s.st_mtime_ns}" for n, s in stats)])

    def is_done(self, output: Path) -> bool:
        mark = output / "done" / self.name
        return mark.exists() and mark.read_text() == self.made_of()

    def run(self, output: Path) -> None:
        """Run it, unless output/done/NAME says that this very command has succeeded. Raises
        InputError, with the end of its log, if it fails."""
        mark, log = output / "done" / self.name, output / "logs" / f"{self.name}.log"
        if self.is_done(output):
            print(f"{self.name}: done before", flush=True)
            return
        for path in (mark, log):
            path.parent.mkdir(parents=True, exist_ok=True)
        print(f"{self.name}: {self}", flush=True)
        began = time.monotonic()
        with open(log, "a") as file:
            print(f"$ {self}", file=file, flush=True)
            environment = os.environ | {"PYTHONPATH": str(ROOT)} | self.environment
            options = {"cwd": ROOT, "env": environment, "stdout": file, "stderr": file}
            with subprocess.Popen(self.command, **options) as process:  # waits, see end_stages
                RUNNING.append(process)
                status = process.wait()
                RUNNING.remove(process)
        if status:
            end = "".join(log.read_text(errors="replace").splitlines(True)[-15:])
            raise InputError(
                f"{self.name} failed ({status}); its log is {log}. Run the same command again to "
                f"continue there.\n{end}"
            )
        write_whole(mark, self.made_of())
        print(f"{self.name}: done, {(time.monotonic() - began) / 60:.0f} min", flush=True)


def end_stages(number: int, _) -> None:
    """On a signal: hand SIGTERM on to what runs (a training saves a checkpoint), and end when it
    has ended."""
    for process in [*RUNNING]:
        process.terminate()
    sys.exit(128 + number)


def run_name(rate: float) -> str:
    return f"simper-{rate:g}"


def write_prompts(reference: str, path: Path, limit: int) -> None:
    """AlpacaEval's instructions with GPT-4 Turbo's outputs as the answers to win against, as rows
    of data."""
    rows = load_outputs(reference or hub_file(REFERENCE, advice="; give --reference FILE"))
    rows = rows[: limit or None]
    lines = [{"prompt": row["instruction"], "responses": [row["output"]]} for row in rows]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    if not path.exists() or path.read_text() != text:  # its time is part of the stages' marks
        write_whole(path, text)


def needs(
    setup: str, models: list[str], rates: list[float], args, flags: list[str]
) -> tuple[str, int]:
    """The predicted disk (GB) and hours of each part, as text; and how many bytes training writes
    to output_dir. Raises InputError if the GPUs do not hold the training."""

    @functools.cache
    def parameters(name: str) -> int:
        return sizes_of(load_config(resolve_model(name)), 1, 1).whole

    size = parameters(models[0])
    disk = {
        "the published models": sum(2 * parameters(model) for model in models),
        "the trained models": 2 * size * len(rates),
        # Float32 weights and two moments: the last of each run stays, and the new one is written
        # before the old one goes.
        "checkpoints": 12 * size * (len(rates) + 1),
    }
    calls = 2 * args.num_prompts * (len(models) + len(rates) * (1 + len(models)))
    seconds = args.num_prompts * TOKENS * (len(models) + len(rates)) / ANSWER_TOKENS
    hours = {"answers": (seconds / max(1, args.gpus) + 60 * LOADING) / 3600}
    hours[f"{calls} judgments"] = (calls / JUDGMENTS + 60 * LOADING) / 3600
    if not args.judge_base_url:
        disk["the judge"] = 2 * parameters(args.judge)
    recipe = train.parse_args([str(RECIPES / f"{setup}.yaml"), "--model", models[0], *flags])
    config, gpu = load_config(resolve_model(models[0])), GPUS[args.gpu]
    how = {"lengths": "ultrafeedback", "pairs": 60_000}
    planned = plan(recipe, config, max(1, args.gpus), gpu, **how)
    if not planned["fits"] and args.gpus:
        raise InputError(
            f"{args.gpus} × {args.gpu} do not hold the training of {models[0]} as it is set: try "
            "--activation_checkpointing selective or true, on one GPU --stream_optimizer true"
        )
    if planned["fits"]:
        hours[f"training with {len(rates)} rates"] = len(rates) * planned["epoch"] / 3600
    lines = [f"predicted for {args.gpus or 'one'} × {args.gpu}:"]
    lines += [f"  {name:<28}{bytes_ / 1e9:8.1f} GB" for name, bytes_ in disk.items()]
    lines += [f"  {name:<28}{hour:8.1f} h" for name, hour in hours.items()]
    total = sum(disk.values()) / 1e9
    lines.append(f"  together{'':<20}{total:8.1f} GB, {sum(hours.values()):.1f} h")
    folders = {"output_dir": args.output_dir, "the hub's cache": Path(HF_HUB_CACHE)}
    for name, folder in folders.items():
        there = next(path for path in (folder, *folder.parents) if path.exists())
        free = shutil.disk_usage(there).free / 1e9
        lines.append(f"  free in {name:<20}{free:8.1f} GB ({folder})")
    return "\n".join(lines), disk["the trained models"] + disk["checkpoints"]


def training(setup: str, start: str, rates: list[float], args, flags: list[str]) -> list[Stage]:
    """One for each rate. An interrupted one resumes from its checkpoint."""
    recipe = str(RECIPES / f"{setup}.yaml")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(args.gpus)]
    launcher = launcher if args.gpus > 1 else []
    found = []
    for rate in rates:
        output = args.output_dir / "runs" / run_name(rate)
        command = [sys.executable, *launcher, "train.py", recipe, "--model", start]
        command += ["--learning_rate", f"{rate:g}", "--output_dir", str(output), *flags]
        model = output / "final", "config.json"
        found.append(Stage(f"train-{run_name(rate)}", command, depends=(model,)))
    return found


def win_rate(model: str, other: str, decoding: dict, args, *more: str) -> list[str]:
    """A command of eval/win_rate.py; without `other`, against GPT-4 Turbo's outputs."""
    python = args.vllm_python if args.engine == "vllm" else sys.executable
    command = [python, "-m", "eval.win_rate", model, *filter(None, [other])]
    command += ["--data", str(args.output_dir / "alpaca_eval.jsonl"), "--num_prompts", "0"]
    command += ["--output_dir", str(args.output_dir / "results"), "--engine", args.engine]
    command += ["--engine_args", args.engine_args] if args.engine_args else []
    for name, value in decoding.items():
        command += [f"--{name}", f"{value:g}"]
    return [*command, *more]


def read_by(args, name: str, model: str) -> tuple[tuple[Path, str], ...]:
    """The files that a model's answers depend on and that another stage may rewrite, the prompts
    and the weights, and the answers."""
    answers = args.output_dir / "results" / name / "win_rate", "*/answers.jsonl"
    return (args.output_dir, "alpaca_eval.jsonl"), (Path(model), "*.safetensors"), answers


def answering(models: dict[str, str], decoding: dict, args) -> list[Stage]:
    """One for each of {name: model}, each on a GPU of its own, of those that are visible."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(args.gpus)))
    gpus, stages = visible.split(","), []
    if len(gpus) < args.gpus:
        raise InputError(f"--gpus {args.gpus}, and CUDA_VISIBLE_DEVICES is {visible}")
    for number, (name, model) in enumerate(models.items()):
        command = win_rate(model, "", decoding, args, "--generate_only")
        own = {"CUDA_VISIBLE_DEVICES": gpus[number % args.gpus]} if args.gpus else {}
        stages.append(Stage(f"answer-{name}", command, own, read_by(args, name, model)))
    return stages


def judging(
    published: dict[str, str], ours: dict[str, str], decoding: dict, url: str, args
) -> list[Stage]:
    """Each of {name: model} against GPT-4 Turbo's outputs, and each of ours against each of the
    published."""
    judge = ("--judge", args.judge, "--judge_base_url", url, "--workers", str(args.workers))
    stages, results = [], args.output_dir / "results"
    for name, model in (published | ours).items():
        depends = (*read_by(args, name, model), (results / name, "win_rate.json"))
        command = win_rate(model, "", decoding, args, *judge)
        stages.append(Stage(f"judge-{name}", command, depends=depends))
    for name, model in ours.items():
        for other, rival in published.items():
            depends = (*read_by(args, name, model), *read_by(args, other, rival))
            depends += ((results / name, f"{AGAINST}{other}.json"),)
            command = win_rate(model, rival, decoding, args, *judge)
            stages.append(Stage(f"judge-{name}-against-{other}", command, depends=depends))
    return stages


def is_served(url: str) -> bool:
    """Whether a server like OpenAI's is there."""
    try:
        urllib.request.urlopen(f"{url}/models", timeout=5).close()
    except OSError:
        return False
    return True


@contextmanager
def serve(args) -> Iterator[str]:
    """vLLM with the judge on all GPUs, until the block ends: its URL. Raises InputError if it ends
    before it answers, or does not within an hour."""
    url, log = f"http://localhost:{PORT}/v1", args.output_dir / "logs" / "judge-server.log"
    command = [str(Path(args.vllm_python).with_name("vllm")), "serve", args.judge]
    command += ["--tensor-parallel-size", str(max(1, args.gpus)), "--port", str(PORT)]
    log.parent.mkdir(parents=True, exist_ok=True)
    print(f"judge-server: {shlex.join(command)}", flush=True)
    if is_served(url):
        raise InputError(f"another server is at {url}: end it, or give it as --judge_base_url")
    with open(log, "a") as file:
        try:
            server = subprocess.Popen(command, stdout=file, stderr=file, start_new_session=True)
        except OSError as error:
            raise InputError(f"vLLM cannot be started: {error}; see --vllm_python") from None
    try:
        for _ in range(3600):
            if server.poll() is not None:
                raise InputError(f"the judge ended ({server.returncode}); its log is {log}")
            if is_served(url):
                break
            time.sleep(1)
        else:
            raise InputError(f"the judge does not answer after an hour; its log is {log}")
        yield url
    finally:
        server.terminate()
        try:
            with suppress(subprocess.TimeoutExpired):
                server.wait(60)
        finally:  # also after a second signal
            with suppress(ProcessLookupError):  # its workers, which may outlive it
                os.killpg(server.pid, signal.SIGKILL)


def pack(output: Path, ours: Iterable[str]) -> Path:
    """What others need to check the tables, without weights: one archive."""
    path = output / f"{output.name}.tar.gz"
    files = [
        *output.glob("report.*"),
        *output.glob("gpu_check.jsonl"),
        output / "alpaca_eval.jsonl",
    ]
    files += [p for p in (output / "results").rglob("*") if p.is_file() and p.suffix != ".lock"]
    for model in ours:
        run = Path(model).parent
        files += [*run.glob("*.yaml"), *run.glob("*.jsonl"), *run.glob("code.diff")]
    with tarfile.open(path, "w:gz") as archive:
        for file in sorted(files):
            archive.add(file, output.name / file.relative_to(output))
    return path


def main() -> None:
    parser = make_parser(__doc__, "--engine", "--engine_args")
    parser.set_defaults(engine="vllm")
    parser.add_argument("setup", choices=SETUPS, help="a recipe")
    parser.add_argument(
        "--rates", default="", help="learning rates, with commas; by default the authors' two"
    )
    parser.add_argument(
        "--models", default="", help="the start, then its rivals, with commas; by default SimPO's"
    )
    parser.add_argument("--gpus", type=at_least(0), default=8, help="0: CPUs, to rehearse")
    parser.add_argument("--gpu", default="h100", help="for the prediction; see benchmarks/plan.py")
    parser.add_argument("--vllm_python", default=sys.executable, help="of vLLM's environment")
    parser.add_argument("--judge", default=MODEL, help="its hub id, or its name at the endpoint")
    parser.add_argument(
        "--judge_base_url", default="", help="a judge that is served already; empty: served here"
    )
    parser.add_argument("--workers", type=at_least(1), default=64, help="calls at a time")
    parser.add_argument("--reference", default="", help=f"a file; empty: {REFERENCE} of {HUB}")
    parser.add_argument("--limit", type=at_least(0), default=0, help="instructions; 0: all")
    parser.add_argument("--max_new_tokens", type=at_least(1), help="in place of the authors'")
    parser.add_argument("--output_dir", default="", help="empty: reproduction/SETUP")
    parser.add_argument("--dry_run", action="store_true", help="print the plan and end")
    parser.allow_abbrev = False  # --model would be taken for --models
    args, flags = parser.parse_known_args()
    own = ("model", "learning_rate", "output_dir", "loss", "loss_args")
    if wrong := [f for f in flags if f[:2] == "--" and f[2:].partition("=")[0] in own]:
        raise InputError(f"{wrong[0]} is set by this command: see --models, --rates, --output_dir")
    if args.gpu not in GPUS:
        raise InputError(f"--gpu {args.gpu}: must be one of {', '.join(GPUS)}")

    rates, *models = SETUPS[args.setup]
    models = [*filter(None, args.models.split(","))] or models
    try:
        rates = [float(rate) for rate in args.rates.split(",")] if args.rates else [*rates]
    except ValueError:
        raise InputError(f"--rates {args.rates}: must be numbers, with commas") from None
    if not all(0 < rate < 1 for rate in rates):
        raise InputError(f"--rates {args.rates}: must be between 0 and 1")
    args.output_dir = Path(args.output_dir or f"reproduction/{args.setup}").resolve()
    decoding = {**DECODING[args.setup]}
    decoding |= {"max_new_tokens": args.max_new_tokens} if args.max_new_tokens else {}
    runs = args.output_dir / "runs"
    ours = {run_name(rate): str(runs / run_name(rate) / "final") for rate in rates}
    published = {short_name(model): model for model in models}
    if len(ours | published) < len(rates) + len(models):
        raise InputError(f"two models have the same name: {', '.join([*ours, *published])}")
    # Whatever is missing is found before a GPU works.
    train.parse_args([str(RECIPES / f"{args.setup}.yaml"), *flags])
    for model in [*models, *([] if args.judge_base_url else [args.judge])]:
        load_config(resolve_model(model))
    vllm = Path(args.vllm_python).with_name("vllm")
    needed = args.engine == "vllm" or not args.judge_base_url
    if needed and not args.dry_run and not vllm.is_file():
        raise InputError(f"{vllm} is not there: --vllm_python is the Python of vLLM's environment")
    if args.gpus > torch.cuda.device_count() and not args.dry_run:
        raise InputError(f"--gpus {args.gpus}, and torch sees {torch.cuda.device_count()}")
    prompts = args.output_dir / "alpaca_eval.jsonl"
    args.num_prompts = args.limit or 805
    text, space = needs(args.setup, models, rates, args, flags)
    print(text, flush=True)
    url = args.judge_base_url or f"http://localhost:{PORT}/v1"
    check = [sys.executable, "benchmarks/gpu_check.py", "--seconds", "0"]
    check += ["--log", str(args.output_dir / "gpu_check.jsonl")]
    checks = [Stage("check-gpus", check)] if args.gpus else []
    trainings = training(args.setup, models[0], rates, args, flags)
    answerings = answering(published | ours, decoding, args)
    judgments = judging(published, ours, decoding, url, args)
    results = [str(args.output_dir / "results" / name) for name in ours | published]
    report = [sys.executable, "-m", "eval.report", *results]
    report += ["--output", str(args.output_dir / "report")]
    if args.dry_run:
        print(f"alpaca_eval.jsonl: {args.num_prompts} instructions of {args.reference or HUB}")
        for stage in [*checks, *trainings, *answerings, *judgments, Stage("report", report)]:
            print(f"{stage.name}: {stage}")
        return

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup does
            signal.signal(number, end_stages)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(args.output_dir).free
    if free < space and not (args.output_dir / "runs").exists():
        raise InputError(
            f"{args.output_dir}: training writes {space / 1e9:.0f} GB, {free / 1e9:.0f} are free"
        )
    write_prompts(args.reference, prompts, args.limit)
    for stage in [*checks, *trainings]:
        stage.run(args.output_dir)
    at_once = max(1, args.gpus)
    for start in range(0, len(answerings), at_once):
        with ThreadPoolExecutor(at_once) as pool:
            together = answerings[start : start + at_once]
            list(pool.map(lambda stage: stage.run(args.output_dir), together))
    to_do = not all(stage.is_done(args.output_dir) for stage in judgments)
    with serve(args) if to_do and not args.judge_base_url else nullcontext(url):
        for stage in judgments:
            stage.run(args.output_dir)
    (args.output_dir / "done" / "report").unlink(missing_ok=True)  # it is cheap
    Stage("report", report).run(args.output_dir)
    print((args.output_dir / "report.md").read_text())
    print(f"to send in (docs/reproduce.md): {pack(args.output_dir, ours.values())}")


if __name__ == "__main__":
    run_command(main, shows=True)
