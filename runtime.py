"""What a run needs around the training itself, and what rarely changes: the command line, the
processes, the log, the checkpoints."""

import argparse
import ctypes
import difflib
import functools
import inspect
import json
import math
import os
import resource
import shutil
import signal
import sys
import threading
import uuid
from collections.abc import Callable
from dataclasses import asdict, fields
from datetime import datetime
from pathlib import Path

import datasets
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import transformers
import yaml
from tqdm import tqdm

from data import InputError
from loss import LOSSES

# What may differ between a run and its resumption: none of these changes the pairs of a step or
# their gradient.
FREE_TO_CHANGE = {"output_dir", "micro_batch_tokens", "activation_checkpointing", "compile"}
FREE_TO_CHANGE |= {"replicas", "wandb", "resume", "eval_data", "eval_every", "save_every"}
FREE_TO_CHANGE |= {"keep_checkpoints", "log_every"}


# ---- The command line ----------------------------------------------------------------------------


def run_command(main: Callable[[], None]) -> None:
    """Run a script's main; an InputError ends it with one line, printed by rank 0, in place of a
    traceback."""
    try:
        main()
    except InputError as error:
        # Every rank meets the same error; one of them reports it.
        sys.exit(f"error: {error}" if int(os.environ.get("RANK", 0)) == 0 else 1)


class Parser(argparse.ArgumentParser):
    """Raises InputError where argparse would print its usage and exit."""

    def error(self, message: str):
        raise InputError(message)


def true_or_false(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"'{text}' is not true or false")
    return text.lower() == "true"


def parse_args(config_class: type, args: list[str], description: str = ""):
    """A command line, [RECIPE.yaml] [--name value ...], → config_class: defaults, then the recipe
    (by default the demo's), then the flags.

    config_class: a dataclass whose fields have a help text in their metadata. Raises InputError for
    an unknown name, with the nearest one, and for a value of the wrong kind.
    """
    parser = Parser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,  # what is not given is not in the result
        allow_abbrev=False,
    )
    parser.add_argument("recipe", nargs="?", help="a file of `name: value` lines; default: demo's")
    for option in fields(config_class):
        default = "" if option.default == "" else f" (default: {option.default})"
        parser.add_argument(
            f"--{option.name}",
            type=true_or_false if option.type is bool else option.type,
            metavar=option.type.__name__.upper(),
            help=(option.metadata["help"] + default).replace("%", "%%"),
        )

    def parse(args: list[str], place: object) -> dict:
        known, unknown = parser.parse_known_args(args)
        if unknown:
            name = unknown[0].split("=")[0].lstrip("-")
            near = difflib.get_close_matches(name, config_class.__dataclass_fields__, 1, 0.5)
            hint = f"did you mean '{near[0]}'?" if near else "see --help"
            raise InputError(f"{place}: there is no option '{name}'; {hint}")
        return vars(known)

    flags = parse(args, "the command line")
    recipe = Path(flags.pop("recipe", Path(__file__).parent / "recipes" / "demo.yaml"))
    if not recipe.is_file():
        raise InputError(f"no recipe {recipe}; those that come with the code are in recipes/")
    lines = yaml.safe_load(recipe.read_text()) or {}
    if not isinstance(lines, dict):
        raise InputError(f"{recipe} must hold `name: value` lines")
    config = config_class(**parse([f"--{k}={v}" for k, v in lines.items()], recipe) | flags)
    check_config(config)
    return config


def check_config(config) -> None:
    """Raise InputError for a value that makes no sense, whatever the data."""
    positive = ("batch_size", "num_epochs", "log_every", "micro_batch_tokens", "replicas")
    positive += ("learning_rate", "max_grad_norm")
    choices = {"dtype": ("auto", "float32", "bfloat16")}
    choices["wandb"] = ("auto", "online", "offline", "off")
    for name, value in asdict(config).items():
        if name in ("model", "train_data", "output_dir") and not value:
            raise InputError(f"{name} is needed: give --{name}, or set it in the recipe")
        if name in positive and not value > 0:
            raise InputError(f"{name} must be positive, not {value}")
        if name in ("max_steps", "eval_every", "save_every", "keep_checkpoints") and value < 0:
            raise InputError(f"{name} must not be negative, not {value}")
        if value not in choices.get(name, (value,)):
            raise InputError(f"{name} must be one of {', '.join(choices[name])}, not {value}")
    if not 0 <= config.warmup_ratio <= 1:
        raise InputError(f"warmup_ratio must be between 0 and 1, not {config.warmup_ratio}")
    if not 0 < config.max_prompt_length < config.max_length:
        limit, length = config.max_prompt_length, config.max_length
        raise InputError(f"max_prompt_length={limit} must be below max_length={length}")


def choose_loss(name: str, arguments: str) -> Callable:
    """The function `name`_loss of loss.py, with `arguments` ("beta=2.5,gamma=0.5") bound to it.

    Raises InputError, with the right names, for an unknown loss or argument, and for a value that
    is not a finite number.
    """
    if name not in LOSSES:
        raise InputError(f"loss: there is no '{name}'; loss.py has {', '.join(LOSSES)}")
    parameters = inspect.signature(LOSSES[name]).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
    known = ", ".join(f"{key}={default}" for key, default in defaults.items()) or "none"
    values = {}
    for text in filter(None, arguments.replace(" ", "").split(",")):
        key, _, value = text.partition("=")
        if key not in defaults:
            problem = f"the loss {name} has no argument '{key}'; its arguments: {known}"
            raise InputError(f"loss_args: {problem}")
        try:
            values[key] = float(value)
        except ValueError:
            values[key] = math.nan
        if not math.isfinite(values[key]):
            raise InputError(f"loss_args: {key} must be a number, as in {known}, not '{value}'")
    return functools.partial(LOSSES[name], **values)


# ---- Processes -----------------------------------------------------------------------------------


def start_process() -> tuple[int, int, torch.device]:
    """(rank, number of ranks, device) of this process, from torchrun's environment; one process
    without it."""
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if rank > 0:
        datasets.disable_progress_bars()
        transformers.utils.logging.disable_progress_bar()
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        return rank, ranks, device
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if processes > 1:  # torchrun gives each of them one thread; they can share all cores
        affinity = getattr(os, "sched_getaffinity", None)
        cores = len(affinity(0)) if affinity else os.cpu_count() or 1
        torch.set_num_threads(max(1, cores // processes))
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):
        # glibc hands large freed buffers back to the kernel, and a sixth of every step went into
        # getting them again.
        libc.mallopt(-4, 0)  # M_MMAP_MAX: none of them is mapped on its own
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: the heap never shrinks
    return rank, ranks, torch.device("cpu")


def start_group(device: torch.device) -> None:
    """The process group of torchrun's ranks, or of this process alone."""
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if "RANK" in os.environ:
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)


def watch_sigterm() -> threading.Event:
    """Set when this process receives SIGTERM: a preempted job's ranks do at different times."""
    received = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: received.set())
    return received


def max_over_ranks(device: torch.device, *values) -> list[float]:
    """The largest over all ranks of each value, a number or a () tensor. Collective; one wait for
    the GPU."""
    values = [torch.as_tensor(v, dtype=torch.float64, device=device) for v in values]
    maxima = torch.stack(values)
    dist.all_reduce(maxima, op=dist.ReduceOp.MAX)
    return maxima.tolist()


def peak_memory(device: torch.device) -> float:
    """GB that this process had at most: allocated on its GPU, or resident on the host."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


# ---- The log -------------------------------------------------------------------------------------


# The held-out metrics that the terminal shows.
SHOWN = ("accuracy", "inverse_perplexity/chosen", "inverse_perplexity/rejected", "loss")


class Logger:
    """Writes metrics to metrics.jsonl and, if wanted, to wandb. On ranks above 0 it does nothing;
    it never waits for other ranks."""

    def __init__(self, config, start: int):
        self.on = dist.get_rank() == 0
        if not self.on:
            return
        self.path = Path(config.output_dir) / "metrics.jsonl"
        # What an interrupted run logged after the checkpoint is about to happen again.
        kept = [line for line in self.read() if line["step"] <= start]
        self.path.write_text("".join(json.dumps(line) + "\n" for line in kept))
        self.wandb = start_wandb(config)

    def read(self) -> list[dict]:
        """The lines written so far."""
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        return [json.loads(line) for line in lines]

    def write(self, metrics: dict) -> None:
        """Log one line; `metrics` has the key "step"."""
        if not self.on:
            return
        with open(self.path, "a") as file:
            print(json.dumps(metrics), file=file)
        if self.wandb:
            self.wandb.log(metrics, step=metrics["step"])
        if "eval/loss" in metrics:
            accuracy, chosen, rejected = (metrics[f"eval/{name}"] for name in SHOWN[:3])
            tqdm.write(
                f"held-out pairs after step {metrics['step']}: accuracy {accuracy:.3f}, "
                f"inverse perplexity {chosen:.3f} chosen, {rejected:.3f} rejected",
                file=sys.stderr,
            )

    def close(self) -> str:
        """End the log. Returns the held-out metrics before and after training as a table, or "" on
        other ranks and without evaluation."""
        if not self.on:
            return ""
        if self.wandb:
            self.wandb.finish()
        evaluations = [line for line in self.read() if "eval/loss" in line]
        if not evaluations:
            return ""
        rows = [f"\n{'held-out pairs':<30}{'before':>9}  → {'after':>8}\n"]
        for name in SHOWN:
            before, after = (line[f"eval/{name}"] for line in (evaluations[0], evaluations[-1]))
            rows.append(f"{name:<30}{before:>9.4f}  → {after:>8.4f}\n")
        return "".join(rows)


def start_wandb(config):
    """A wandb run, or None. Never asks for anything: without a login, `auto` is off and `online` is
    an error."""
    if config.wandb == "off":
        return None
    import wandb

    logged_in = config.wandb != "offline" and wandb.login(prompt=False)
    if config.wandb == "online" and not logged_in:
        raise InputError("wandb=online, but nobody is logged in: run `wandb login`")
    if config.wandb == "auto" and not logged_in:
        return None
    output = Path(config.output_dir)
    id_file = output / "wandb_run_id"
    if not id_file.exists():
        id_file.write_text(uuid.uuid4().hex)
    return wandb.init(
        project="simper",
        name=output.name,
        id=id_file.read_text(),
        resume="allow",
        mode="offline" if config.wandb == "offline" else "online",
        dir=output,
        config=asdict(config),
    )


# ---- Checkpoints ---------------------------------------------------------------------------------


def prepare_output(config, data_sha256: str) -> tuple[Path | None, dict]:
    """Make output_dir and write config.yaml; find the checkpoint to resume from, if any, and its
    trainer.json.

    Raises InputError if that checkpoint is of a run with other data or other settings. Collective.
    """
    output = Path(config.output_dir)
    if dist.get_rank() == 0 and config.resume == "never" and output.exists():
        os.rename(output, f"{output}.{datetime.now():%Y%m%d-%H%M%S}")  # set aside: nothing is lost
    dist.barrier()
    if config.resume in ("auto", "never"):
        newest_first = sorted_checkpoints(output)[::-1]
        checkpoint = next((folder for folder in newest_first if is_whole(folder)), None)
    else:
        checkpoint = Path(config.resume)
        if not is_whole(checkpoint):
            raise InputError(f"resume={checkpoint}: no whole checkpoint is there")
    state = {"step": 0, "evaluated": False, "config": asdict(config), "data_sha256": data_sha256}
    if checkpoint:
        state = json.loads((checkpoint / "trainer.json").read_text())
        changed = [
            f"{name} was {state['config'].get(name)}, is {value}"
            for name, value in asdict(config).items()
            if name not in FREE_TO_CHANGE and state["config"].get(name) != value
        ]
        if state["data_sha256"] != data_sha256:
            changed.append("the training tokens differ")
        if changed:
            raise InputError(
                f"{checkpoint} is of another run: {'; '.join(changed)}. "
                "Use --resume never or another --output_dir."
            )
    if dist.get_rank() == 0:
        output.mkdir(parents=True, exist_ok=True)
        modules = (torch, transformers, datasets)
        versions = ", ".join(f"{module.__name__} {module.__version__}" for module in modules)
        head = f"# {versions}\n# {dist.get_world_size()} ranks; "
        head += f"SHA-256 of the training tokens: {data_sha256}\n"
        (output / "config.yaml").write_text(head + yaml.safe_dump(asdict(config), sort_keys=False))
    dist.barrier()
    return checkpoint, state


def sorted_checkpoints(output: Path) -> list[Path]:
    """The checkpoints of a run, whole or not, oldest first."""
    folders = (output / "checkpoints").glob("step_*")
    return sorted(folders, key=lambda folder: folder.stat().st_mtime)


def is_whole(folder: Path) -> bool:
    """Whether every file of a checkpoint is there, of the size that it was saved with."""
    if not (folder / "trainer.json").is_file():
        return False
    sizes = json.loads((folder / "trainer.json").read_text())["sizes"]
    files = {path.name: path.stat().st_size for path in folder.iterdir()}
    return all(files.get(name) == size for name, size in sizes.items())


def checkpoint_tensors(model, optimizer) -> dict:
    """Parameters and Adam's two moments by name, as they are in the running model, sharded or not.
    Moments that do not exist yet are made, as zeros."""
    tensors = {}
    for name, parameter in model.named_parameters():
        state = optimizer.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            state |= {key: torch.zeros_like(parameter) for key in ("exp_avg", "exp_avg_sq")}
        moments = {f"{key}.{name}": state[key] for key in ("exp_avg", "exp_avg_sq")}
        tensors |= {name: parameter} | moments
    return tensors


def save_checkpoint(model, optimizer, config, state: dict) -> None:
    """Write checkpoints/step_N: sharded safetensors and trainer.json, nothing that is unpickled on
    loading. Collective.

    The folder gets its name when all ranks have written, so that it is whole or not there.
    """
    output = Path(config.output_dir)
    folder = output / "checkpoints" / f"step_{state['step']}"
    scratch = folder.with_name(folder.name + ".part")
    if dist.get_rank() == 0:
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
    dist.barrier()
    writer = dcp.HuggingFaceStorageWriter(str(scratch), save_distributed=True)
    dcp.save(checkpoint_tensors(model, optimizer), storage_writer=writer)
    dist.barrier()
    if dist.get_rank() == 0:
        sizes = {file.name: file.stat().st_size for file in scratch.iterdir()}
        state = state | {"config": asdict(config), "sizes": sizes}
        (scratch / "trainer.json").write_text(json.dumps(state, indent=1))
        shutil.rmtree(folder, ignore_errors=True)
        os.rename(scratch, folder)
        if config.keep_checkpoints:
            for old in sorted_checkpoints(output)[: -config.keep_checkpoints]:
                shutil.rmtree(old)
    dist.barrier()


def load_checkpoint(folder: Path, model, optimizer, step: int) -> None:
    """Read a checkpoint taken after `step` steps, by any number of ranks, into model and optimizer.
    Collective."""
    reader = dcp.HuggingFaceStorageReader(str(folder))
    dcp.load(checkpoint_tensors(model, optimizer), storage_reader=reader)
    for state in optimizer.state.values():
        state["step"].fill_(step)
