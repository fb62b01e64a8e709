"""What a run needs around the training itself, and what rarely changes: the command line, the
processes, the log, the checkpoints."""

import argparse
import ctypes
import difflib
import errno
import fcntl
import functools
import inspect
import json
import math
import os
import re
import resource
import shutil
import signal
import sys
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Iterable
from dataclasses import asdict, fields
from datetime import datetime, timedelta
from pathlib import Path

import datasets
import multiprocess
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import transformers
import yaml
from tqdm import tqdm

from data import CACHE_DIR, InputError
from loss import LOSSES

# What may differ between a run and its resumption: none of these changes the pairs of a step or
# their gradient. (Of the chat template, the text is compared and not the file's name.)
FREE_TO_CHANGE = {"output_dir", "micro_batch_tokens", "activation_checkpointing", "compile"}
FREE_TO_CHANGE |= {"replicas", "wandb", "resume", "eval_data", "eval_every", "save_every"}
FREE_TO_CHANGE |= {"keep_checkpoints", "log_every", "chat_template", "held-out tokens"}

ROOT = Path(__file__).resolve().parent
DISK_FAULTS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)
DISK_FAULTS += (errno.EEXIST, errno.ENOTDIR)  # a file where a folder should be
# The held-out metrics that the terminal shows.
SHOWN = ("accuracy", "inverse_perplexity/chosen", "inverse_perplexity/rejected", "loss")
NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")  # there if and only if the driver is loaded
FILE_BYTES = 2**30  # tensors that begin in the same GiB share a checkpoint's file


# ---- The command line ----------------------------------------------------------------------------


def run_command(main: Callable[[], None]) -> None:
    """Run a script's main; an InputError, a full disk or a missing permission ends it with one line
    in place of a traceback."""
    try:
        main()
    except (Exception, dcp.CheckpointException) as error:  # which is a BaseException
        problem = error if isinstance(error, InputError) else disk_fault(error)
        if not problem:
            raise
        rank = os.environ.get("RANK", "0")
        if rank == "0":
            sys.exit(f"error: {problem}")
        # All ranks usually meet the same error: rank 0 reports it, and torchrun ends the others.
        time.sleep(10)
        sys.exit(f"error on rank {rank}: {problem}")


def disk_fault(error: BaseException) -> str | None:
    """What to say if a file could not be written, at whatever place and however wrapped: by its
    number, which Python writes as [Errno 28], and safetensors as (os error 28)."""
    text = "".join(traceback.format_exception(error))
    number = f"(?:{'|'.join(map(str, DISK_FAULTS))})"
    reason = re.search(rf"\[Errno {number}\] (.+)|I/O error: (.+) \(os error {number}\)", text)
    here = [f for f in traceback.extract_tb(error.__traceback__) if Path(f.filename).parent == ROOT]
    if not (reason and here):
        return None
    return (
        f"{reason[1] or reason[2]}, in {here[-1].name} ({Path(here[-1].filename).name}). A run "
        f"writes to its output_dir and to SIMPER_CACHE, {CACHE_DIR}. Checkpoints are as they were: "
        "once this is fixed, --resume auto goes on from the newest, if there is one."
    )


def true_or_false(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"'{text}' is not true or false")
    return text.lower() == "true"


def parse_args(config_class: type, args: list[str], description: str = ""):
    """A command line, [RECIPE.yaml] [--name value ...], → config_class, a dataclass whose fields
    have a help text in their metadata: defaults, then the recipe (by default the demo's), then the
    flags. Raises InputError for an unknown name, with the nearest one, and for a wrong value."""
    parser = argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,  # what is not given is not in the result
        allow_abbrev=False,
        exit_on_error=False,
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

    def parse(args: list[str], place: object, names: Iterable[str] = ()) -> dict:
        unknown = [name for name in names if name not in config_class.__dataclass_fields__]
        try:
            known, rest = parser.parse_known_args([] if unknown else args)
        except argparse.ArgumentError as error:
            raise InputError(f"{place}: {error}") from None
        for name in unknown + [arg.split("=")[0].lstrip("-") for arg in rest]:
            near = difflib.get_close_matches(name, config_class.__dataclass_fields__, 1, 0.5)
            hint = f"did you mean '{near[0]}'?" if near else "see --help"
            raise InputError(f"{place}: there is no option '{name}'; {hint}")
        return vars(known)

    flags = parse(args, "the command line")
    recipe = Path(flags.pop("recipe", ROOT / "recipes" / "demo.yaml"))
    lines = read_recipe(recipe)
    values = parse([f"--{name}={value}" for name, value in lines.items()], recipe, lines)
    config = config_class(**values | flags)
    check_config(config)
    return config


def read_recipe(path: Path) -> dict[str, str]:
    """The `name: value` lines of a YAML file. Each value is the text that is written there, as on
    the command line: `off` is a word and not false. Raises InputError for anything else."""
    if not path.is_file():
        raise InputError(f"no recipe {path}; those that come with the code are in recipes/")
    try:
        top = yaml.compose(path.read_text(encoding="utf-8"), yaml.SafeLoader)
    except (ValueError, yaml.YAMLError) as error:
        raise InputError(f"{path} cannot be read: {error}") from error
    if not isinstance(top, yaml.MappingNode | None):
        raise InputError(f"{path} must hold `name: value` lines")
    lines = {}
    for name, value in top.value if top else ():
        if not (isinstance(name, yaml.ScalarNode) and isinstance(value, yaml.ScalarNode)):
            raise InputError(f"{path}: {name.value} must have a single value, as text or a number")
        if name.value in lines:
            raise InputError(f"{path}: {name.value} is there twice")
        lines[name.value] = value.value
    return lines


def check_config(config) -> None:
    """Raise InputError for a value that makes no sense, whatever the data."""
    positive = ("batch_size", "num_epochs", "log_every", "micro_batch_tokens", "replicas")
    positive += ("learning_rate", "max_grad_norm")
    not_negative = ("max_steps", "eval_every", "save_every", "keep_checkpoints", "seed")
    choices = {"loss": LOSSES, "dtype": ("auto", "float32", "bfloat16")}
    choices["wandb"] = ("auto", "online", "offline", "off")
    for name, value in asdict(config).items():
        if name in ("model", "train_data", "output_dir") and not value:
            raise InputError(f"{name} is needed: give --{name}, or set it in the recipe")
        if name in positive and not 0 < value < math.inf:
            raise InputError(f"{name} must be a positive number, not {value}")
        if name in not_negative and value < 0:
            raise InputError(f"{name} must not be negative, not {value}")
        if value not in choices.get(name, (value,)):
            raise InputError(f"{name} must be one of {', '.join(choices[name])}, not {value}")
    if not 0 <= config.warmup_ratio <= 1:
        raise InputError(f"warmup_ratio must be between 0 and 1, not {config.warmup_ratio}")


def choose_loss(name: str, arguments: str) -> Callable:
    """The function `name`_loss of loss.py, with `arguments` ("beta=2.5,gamma=0.5") bound to it.
    Raises InputError for an unknown argument, and for a value that is not a finite number."""
    parameters = inspect.signature(LOSSES[name]).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
    known = ", ".join(f"{key}={value}" for key, value in defaults.items()) or "no arguments"
    values = {}
    for text in filter(None, arguments.replace(" ", "").split(",")):
        key, _, value = text.partition("=")
        try:
            values[key] = float(value)
        except ValueError:
            values[key] = math.nan
        if key not in defaults or not math.isfinite(values[key]):
            raise InputError(f"loss_args: '{text}' does not fit the loss {name}, which has {known}")
    return functools.partial(LOSSES[name], **values)


# ---- Processes -----------------------------------------------------------------------------------


def start_process() -> tuple[int, int, torch.device]:
    """(rank, number of ranks, device) of this process, from torchrun's environment; one process
    without it. Raises InputError if only a part of that environment is there, or if there are GPUs
    that torch cannot use and CUDA_VISIBLE_DEVICES does not hide: the run would take the CPU."""
    signal.signal(signal.SIGTERM, end_with_workers)
    rank, ranks, local_rank, local_ranks = 0, 1, 0, 1
    if "RANK" in os.environ or "WORLD_SIZE" in os.environ:
        names = "RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT".split()
        found = {name: os.environ.get(name, "") for name in names}
        try:
            rank, ranks, local_rank, local_ranks = (int(found[name]) for name in names[:4])
        except ValueError:
            ranks = 0
        if not (0 <= rank < ranks and all(found.values())):
            text = " ".join(f"{name}={value}" for name, value in found.items())
            problem = f"the environment ({text}) is not what torchrun sets"
            raise InputError(f"{problem}: start with torchrun, or unset RANK and WORLD_SIZE")
    if rank > 0:
        datasets.disable_progress_bars()
        transformers.utils.logging.disable_progress_bar()
    if torch.cuda.is_available():
        if local_ranks > (count := torch.cuda.device_count()):
            raise InputError(f"{local_ranks} processes for {count} GPUs: lower --nproc_per_node")
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        # On H100s SDPA would prefer cuDNN's attention, which plans anew for every length: up to
        # half a second a call.
        torch.backends.cuda.enable_cudnn_sdp(False)
        return rank, ranks, device
    if NVIDIA_DRIVER.exists() and os.environ.get("CUDA_VISIBLE_DEVICES") not in ("", "-1"):
        version = NVIDIA_DRIVER.read_text().split("\n")[0]
        raise InputError(
            f"this machine has NVIDIA GPUs that torch cannot use. Its driver: {version}; torch "
            f"{torch.__version__} is built for CUDA {torch.version.cuda or '(none: a CPU build)'}. "
            "Update the driver, or install a torch built for its CUDA (`nvidia-smi` shows it). To "
            "train on the CPU, set CUDA_VISIBLE_DEVICES to an empty string."
        )
    if rank == 0:
        print(f"no GPU: {ranks} process(es) on the CPU", flush=True)
    if local_ranks > 1:  # torchrun gives each of them one thread; they can share all cores
        affinity = getattr(os, "sched_getaffinity", None)
        cores = len(affinity(0)) if affinity else os.cpu_count() or 1
        torch.set_num_threads(max(1, cores // local_ranks))
    libc = ctypes.CDLL(None)
    if ranks == 1 and hasattr(libc, "mallopt"):
        # glibc hands large freed buffers back to the kernel, and a sixth of every step went into
        # getting them again. (Between the buffers of a sharded model, memory would lie unused.)
        libc.mallopt(-4, 0)  # M_MMAP_MAX: none of them is mapped on its own
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: the heap never shrinks
    return rank, ranks, torch.device("cpu")


def end_with_workers(*_) -> None:
    """What SIGTERM does until start_group: by itself, it would leave datasets' workers behind."""
    for worker in multiprocess.active_children():
        worker.kill()
    os._exit(128 + signal.SIGTERM)


def start_group(device: torch.device) -> None:
    """The process group of torchrun's ranks, or of this process alone."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # while a rank waits for another, no handler runs
    options = {"backend": "gloo", "timeout": timedelta(minutes=30)}
    if device.type == "cuda":
        options |= {"backend": "cpu:gloo,cuda:nccl", "device_id": device}
    store, rank, ranks = dist.HashStore(), 0, 1
    if "RANK" in os.environ:
        store, rank, ranks = next(dist.rendezvous("env://", timeout=options["timeout"]))
        if os.environ.get("GROUP_WORLD_SIZE") == "1":  # several machines count restarts differently
            # After a restart, torchrun's store still holds the addresses of the failed attempt.
            store = dist.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)
    dist.init_process_group(**options, store=store, rank=rank, world_size=ranks)


def watch_sigterm() -> threading.Event:
    """An event that SIGTERM sets, which a preempted job's ranks receive at different times."""
    received = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: received.set())
    return received


def max_over_ranks(device: torch.device, *values) -> list[float]:
    """The largest over all ranks of each value, a number or a () tensor. Collective; one wait for
    the GPU."""
    maxima = torch.stack([torch.as_tensor(v, dtype=torch.float64, device=device) for v in values])
    dist.all_reduce(maxima, op=dist.ReduceOp.MAX)
    return maxima.tolist()


def peak_memory(device: torch.device) -> float:
    """GB that this process had at most: allocated on its GPU, or resident on the host."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    if sys.platform == "linux":  # whose ru_maxrss counts the process that started this one, too
        status = Path("/proc/self/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024 / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e9  # in bytes on macOS


# ---- The log -------------------------------------------------------------------------------------


class Logger:
    """Writes config.yaml, metrics.jsonl and, if wanted, to wandb; on ranks above 0, nothing. Never
    waits for other ranks. Raises InputError if another run writes to output_dir."""

    def __init__(self, config, state: dict):
        self.on = dist.get_rank() == 0
        if not self.on:
            return
        output = Path(config.output_dir)
        self.lock = lock_folder(output)
        versions = [f"{m.__name__} {m.__version__}" for m in (torch, transformers, datasets)]
        head = f"# {', '.join(versions)}\n"
        head += f"# {dist.get_world_size()} ranks; SHA-256 of what it is made of:\n"
        head += "".join(f"# {name}: {digest}\n" for name, digest in state["digests"].items())
        values = yaml.safe_dump(asdict(config), sort_keys=False)
        write_whole(output / "config.yaml", head + values)
        self.path = output / "metrics.jsonl"
        # Another run's lines go, and those of the steps and the evaluation that are made again.
        last = (state["step"], state["evaluated"])
        kept = read_lines(self.path) if state["in_output_dir"] else []
        kept = [line for line in kept if (line["step"], "eval/loss" in line) <= last]
        write_whole(self.path, "".join(json.dumps(line) + "\n" for line in kept))
        if not (state["in_output_dir"] and state["heldout_unchanged"]):
            state["comparable_from"] = len(kept)  # earlier lines are of other held-out pairs
        comparable = kept[state["comparable_from"] :]
        self.evaluations = [line for line in comparable if "eval/loss" in line]
        self.wandb = start_wandb(config, state["same_curves"])

    def write(self, metrics: dict) -> None:
        """Log one line; `metrics` has the key "step"."""
        if not self.on:
            return
        with open(self.path, "a") as file:
            print(json.dumps(metrics), file=file)
        # wandb drops a step that it has: what a resumed run repeats. A step's evaluation is a step
        # of its own there, since the run may have been stopped between the two.
        self.to_wandb("log", metrics, step=2 * metrics["step"] + ("eval/loss" in metrics))
        if "eval/loss" in metrics:
            self.evaluations.append(metrics)
            shown = ", ".join(f"{name} {metrics[f'eval/{name}']:.3f}" for name in SHOWN)
            tqdm.write(f"held-out pairs after step {metrics['step']}: {shown}", file=sys.stderr)

    def to_wandb(self, method: str, *args, **options) -> None:
        """Call a method of the wandb run, if there is one. Its process may be gone: Slurm's SIGTERM
        reaches it, too."""
        try:
            if self.wandb:
                getattr(self.wandb, method)(*args, **options)
        except Exception as error:  # never a reason to lose a run
            tqdm.write(f"wandb ends here: {error!r}", file=sys.stderr)
            self.wandb = None

    def close(self) -> str:
        """End the log. Returns the first and the last held-out metrics as a table, or "" on other
        ranks and without two evaluations."""
        if not self.on:
            return ""
        self.to_wandb("finish")
        os.close(self.lock)
        if len(self.evaluations) < 2:
            return ""
        first, last = self.evaluations[0], self.evaluations[-1]
        before = f"step {first['step']}" if first["step"] else "before"
        table = f"\n{'held-out pairs':<30}{before:>9}  → {'after':>8}\n"
        for name in SHOWN:
            old, new = first[f"eval/{name}"], last[f"eval/{name}"]
            table += f"{name:<30}{old:>9.4f}  → {new:>8.4f}\n"
        return table


def lock_folder(folder: Path) -> int:
    """Lock a folder until the returned file is closed, or this process ends. Raises InputError if
    another run has locked it."""
    # By a file: the lock of a folder itself holds on one machine only where the folder is on NFS.
    lock = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(f"{folder}: another run is writing to it") from None
    except OSError:
        pass  # a file system without locks
    return lock


def read_lines(path: Path) -> list[dict]:
    """The lines of a metrics.jsonl, as far as it is whole: one may have been cut off."""
    lines = []
    for text in path.read_text(errors="replace").splitlines() if path.exists() else []:
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            break
        if not isinstance(line, dict) or not isinstance(line.get("step"), int):
            break
        lines.append(line)
    return lines


def write_whole(path: Path, text: str) -> None:
    """Replace a file so that a crash leaves the old one or the new one, whole."""
    scratch = path.with_name(path.name + ".part")
    scratch.write_text(text)
    sync(scratch)
    os.replace(scratch, path)


def sync(path: Path) -> None:
    """Wait until a file or folder is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def start_wandb(config, resumed: bool):
    """A wandb run, that of the output_dir if `resumed`, or None. Never asks for anything: without a
    login, `auto` is off and `online` is an error."""
    if config.wandb == "off":
        return None
    import wandb

    try:
        logged_in = config.wandb != "offline" and wandb.login(prompt=False)
    except Exception:  # a server that cannot be reached, a key that it does not take
        logged_in = False
    if config.wandb == "online" and not logged_in:
        raise InputError("wandb=online, but nobody is logged in: run `wandb login`")
    if config.wandb == "auto" and not logged_in:
        return None
    output = Path(config.output_dir)
    file = output / "wandb_run_id"
    if not (resumed and file.exists()):
        write_whole(file, uuid.uuid4().hex)
    settings = {"project": "simper", "name": output.name, "dir": output, "config": asdict(config)}
    settings |= {"id": file.read_text(), "resume": "allow"}
    try:
        run = wandb.init(mode="online" if logged_in else "offline", **settings)
    except Exception as error:  # never a reason to lose a run
        tqdm.write(f"wandb is offline: {error}. Later: `wandb sync`.", file=sys.stderr)
        run = wandb.init(mode="offline", **settings)
    run.define_metric("*", step_metric="step")  # the axis of its figures
    return run


# ---- Checkpoints ---------------------------------------------------------------------------------


def find_checkpoint(config, digests: dict[str, str]) -> tuple[Path | None, dict]:
    """The checkpoint to resume from, if any, and the state to start with: that of its trainer.json,
    or a new one. With resume=never, an existing output_dir is set aside. Collective.

    state: step; evaluated, whether its evaluation is logged; in_output_dir, whether the checkpoint
    lies there; heldout_unchanged, whether its held-out pairs are still in use; same_curves, whether
    both hold and no setting has changed; comparable_from, the number of metrics.jsonl's lines that
    are of other held-out pairs; config and digests, those of now.

    digests: SHA-256 of what the run is made of, by name; and the dtype that it computes in.
    Raises InputError if the checkpoint is of a run with others or with other settings (unless
    resume=anyway), and if ranks differ in them or in what they see of output_dir."""
    mine = asdict(config) | digests
    settings = [None] * dist.get_world_size()
    dist.all_gather_object(settings, mine)
    for rank, other in enumerate(settings):
        names = [name for name in other if other[name] != settings[0][name]]
        if names:
            problem = f"rank {rank} and rank 0 do not have the same {', '.join(names)}"
            raise InputError(f"{problem}: every machine needs the same files and flags")
    output = Path(config.output_dir)
    found = [None, output / f".{uuid.uuid4().hex}"]
    if dist.get_rank() == 0:
        try:
            found[0] = choose_checkpoint(config, digests)
            output.resolve().mkdir(parents=True, exist_ok=True)  # where a link points to
            found[1].touch()
        except InputError as error:
            found[0] = error
    # Not each rank by itself: a shared file system may show them different things.
    dist.broadcast_object_list(found, src=0)
    result, probe = found
    if isinstance(result, InputError):
        raise result
    waited = 0
    while not probe.exists() and waited < 60:  # NFS may remember for so long what was not there
        time.sleep(1)
        waited += 1
    seen = [None] * dist.get_world_size()
    dist.all_gather_object(seen, probe.exists())
    if dist.get_rank() == 0:
        probe.unlink()
    if not all(seen):
        problem = f"{output} of rank {seen.index(False)} is not that of rank 0"
        raise InputError(f"{problem}: it must be on a file system that all machines share")
    return result


def choose_checkpoint(config, digests: dict[str, str]) -> tuple[Path | None, dict]:
    """find_checkpoint, on rank 0."""
    output = Path(config.output_dir)
    if config.resume == "never" and output.exists():  # set aside: nothing is lost
        os.close(lock_folder(output))  # no run writes to it
        folder = output.resolve()  # a link stays where it is
        os.rename(folder, f"{folder}.{datetime.now():%Y%m%d-%H%M%S}")
    checkpoint = newest = next(filter(is_whole, checkpoints(output)), None)
    if config.resume not in ("auto", "never", "anyway"):
        checkpoint = Path(config.resume)
        if not is_whole(checkpoint):
            raise InputError(f"resume={checkpoint}: no whole checkpoint is there")
        if newest and not checkpoint.samefile(newest):  # which would pass for this run's
            advice = "go on from it (--resume auto), move it away, or use another --output_dir"
            raise InputError(f"resume={checkpoint}: {newest} is there, too: {advice}")
    state, before = {"step": 0, "evaluated": False, "comparable_from": 0}, digests
    changed = []
    if checkpoint:
        state |= json.loads((checkpoint / "trainer.json").read_text())
        # Checkpoints of earlier versions have less in them.
        before = {option.name: option.default for option in fields(config)} | digests
        before |= state["config"] | state.get("digests", {})
        changed = [
            f"other {name}" if name in digests else f"{name} was {before[name]}, is {value}"
            for name, value in (asdict(config) | digests).items()
            if name not in FREE_TO_CHANGE and before[name] != value
        ]
        if changed:
            text = f"{checkpoint} is of another run: {'; '.join(changed)}"
            if config.resume != "anyway":
                raise InputError(f"{text}. Use --resume never or anyway, or another --output_dir")
            tqdm.write(f"going on, but {text}", file=sys.stderr)
    own = (output / "checkpoints").resolve()
    state["in_output_dir"] = bool(checkpoint) and checkpoint.parent.resolve() == own
    state["heldout_unchanged"] = before["held-out tokens"] == digests["held-out tokens"]
    state["same_curves"] = state["in_output_dir"] and state["heldout_unchanged"] and not changed
    return checkpoint, state | {"config": asdict(config), "digests": digests}


def checkpoints(output: Path) -> list[Path]:
    """The checkpoints of a run, whole or not, the one with the most steps first."""
    numbers = [path.name.removeprefix("step_") for path in output.glob("checkpoints/step_*")]
    steps = sorted((int(number) for number in numbers if number.isdigit()), reverse=True)
    return [output / "checkpoints" / f"step_{step}" for step in steps]


def is_whole(folder: Path) -> bool:
    """Whether every file of a checkpoint is there, of the size that it was saved with."""
    try:
        state = json.loads((folder / "trainer.json").read_text())
        sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
        whole = state["sizes"].items() <= sizes.items()
        return whole and isinstance(state["config"], dict) and isinstance(state["step"], int)
    except (OSError, ValueError, LookupError, TypeError, AttributeError):  # not there, or damaged
        return False


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
    loading. The folder gets its name when all ranks have written, so that it is whole or not there.
    Collective."""
    output, began = Path(config.output_dir), time.perf_counter()
    folder = output / "checkpoints" / f"step_{state['step']}"
    scratch = folder.with_name(folder.name + ".part")
    if dist.get_rank() == 0:
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
    dist.barrier()
    tensors = checkpoint_tensors(model, optimizer)
    # The writer holds a whole file in memory, and a rank's tensors would all go into one.
    file_numbers, size = {}, 0
    for name, tensor in tensors.items():
        file_numbers[name] = 1 + size // FILE_BYTES
        size += tensor.numel() * tensor.element_size()
    writer = dcp.HuggingFaceStorageWriter(str(scratch), file_numbers, save_distributed=True)
    dcp.save(tensors, storage_writer=writer)  # returns when all ranks have written
    if dist.get_rank() == 0:
        sizes = {file.name: file.stat().st_size for file in scratch.iterdir()}
        write_whole(scratch / "trainer.json", json.dumps(state | {"sizes": sizes}, indent=1))
        for path in (*scratch.iterdir(), scratch):
            sync(path)
        shutil.rmtree(folder, ignore_errors=True)
        os.rename(scratch, folder)
        sync(folder.parent)  # before an older one goes
        if config.keep_checkpoints:
            kept = [*filter(is_whole, checkpoints(output))][: config.keep_checkpoints]
            for old in {*checkpoints(output)} - {*kept}:  # what is damaged goes, too
                shutil.rmtree(old, ignore_errors=True)  # a link, or in use: no reason to stop
        size, seconds = sum(sizes.values()) / 1e9, time.perf_counter() - began
        tqdm.write(f"wrote {folder}: {size:.1f} GB in {seconds:.0f} s", file=sys.stderr)
        patience = int(os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", 30))
        if seconds > patience / 2 and "TORCHELASTIC_RUN_ID" in os.environ:
            tqdm.write(
                f"torchrun kills a run {patience} s after SIGTERM, which may be too soon for a "
                f"checkpoint: set TORCH_ELASTIC_SHUTDOWN_TIMEOUT={60 + 4 * math.ceil(seconds)}",
                file=sys.stderr,
            )
    dist.barrier()


def load_checkpoint(folder: Path, model, optimizer, step: int) -> None:
    """Read a checkpoint taken after `step` steps, by any number of ranks, into model and optimizer.
    Collective. Raises InputError if it cannot be read."""
    reader = dcp.HuggingFaceStorageReader(str(folder))
    try:
        dcp.load(checkpoint_tensors(model, optimizer), storage_reader=reader)
    except (Exception, dcp.CheckpointException) as error:
        reason = str(error).strip().split("\n")[-1]
        advice = "If it is damaged, move it away: the one before it is taken, if there is one"
        raise InputError(f"{folder} cannot be read ({reason}). {advice}") from error
    for state in optimizer.state.values():
        state["step"].fill_(step)
