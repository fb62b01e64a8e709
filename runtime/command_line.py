"""The command line: a recipe and flags → a checked dataclass; errors in one line."""

import argparse
import difflib
import errno
import functools
import inspect
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, fields
from pathlib import Path

import torch.distributed.checkpoint as dcp
import yaml

from loss import LOSSES
from runtime.cache import cache_path
from runtime.errors import InputError
from runtime.identity import ROOT

DISK_FAULTS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)
DISK_FAULTS += (errno.EEXIST, errno.ENOTDIR)  # a file where a folder should be


class Printer:
    """A text stream that drops what cannot be printed, since the reader of a pipe is gone or the
    disk of a log is full: never a reason to lose a run. What a terminal's encoding lacks is
    escaped."""

    def __init__(self, stream):
        self.stream, self.fault = stream, None
        stream.reconfigure(errors="backslashreplace")

    def __getattr__(self, name: str):
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        self.attempt(self.stream.write, text)
        return len(text)

    def flush(self) -> None:
        self.attempt(self.stream.flush)

    def attempt(self, function: Callable, *args) -> None:
        try:
            function(*args)
        except BrokenPipeError:  # for good; what is buffered has to go somewhere at the end
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())
        except OSError as error:
            self.fault = error


def run_command(main: Callable[[], None], shows: bool = False) -> None:
    """Run a script's main; an InputError, numbers that are not finite, a file that cannot be
    written, or Ctrl-C end it with one line in place of a traceback. shows: whether what is printed
    is all that the script makes, so that it fails without."""
    sys.stdout, sys.stderr = (stream and Printer(stream) for stream in (sys.stdout, sys.stderr))
    try:
        main()
        if shows and sys.stdout:
            sys.stdout.flush()
        if shows and getattr(sys.stdout, "fault", None):
            raise InputError(f"the output cannot be written: {sys.stdout.fault}")
    except KeyboardInterrupt:
        print("\nended by SIGINT", file=sys.stderr)
        if sys.stdout:
            sys.stdout.flush()
        os._exit(128 + signal.SIGINT)  # not waiting for threads that wait for a reply
    except (Exception, dcp.CheckpointException) as error:  # which is a BaseException
        expected = isinstance(error, InputError | FloatingPointError)
        problem = error if expected else disk_fault(error)
        if not problem:
            raise
        rank = os.environ.get("RANK", "0")
        if rank == "0":
            sys.exit(f"error: {printable(str(problem))}")
        # All ranks usually meet the same error: rank 0 reports it, and torchrun ends the others.
        time.sleep(10)
        sys.exit(f"error on rank {rank}: {printable(str(problem))}")


def printable(text: str) -> str:
    """A text of data, models or judges, whose terminal commands are shown and not carried out: line
    breaks and tabs stay, other control characters are escaped."""
    return "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text)


def disk_fault(error: BaseException | None) -> str | None:
    """What to say if a file could not be written: the OSError, or safetensors' error of that kind,
    in the chain of causes; None without one."""
    while error:
        # DCP keeps the errors of its ranks in a dict, and safetensors writes the number as text.
        for cause in (error, *(e for e, _ in getattr(error, "failures", {}).values())):
            text = str(cause)
            written = [f"(os error {number})" in text for number in DISK_FAULTS]
            if getattr(cause, "errno", None) in DISK_FAULTS or any(written):
                return (
                    f"{text}. A run writes to its output_dir and to SIMPER_CACHE, "
                    f"{cache_path()}. Checkpoints are as they were: once this is fixed, "
                    "--resume auto resumes from the newest, if any."
                )
        error = error.__cause__ or error.__context__
    return None


def true_or_false(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"'{text}' is not true or false")
    return text.lower() == "true"


def parse_args(config_class: type, args: list[str], description: str = ""):
    """A command line, [RECIPE.yaml] [--name value ...], → config_class, a dataclass whose fields
    have a help text in their metadata: defaults, then the recipe, then the flags. Without a recipe
    it is the demo's, unless a flag names another model or data, which it may not fit. Raises
    InputError for an unknown name, with the nearest one, and for a wrong value."""
    parser = argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,  # what is not given is not in the result
        allow_abbrev=False,
        exit_on_error=False,
    )
    parser.add_argument(
        "recipe",
        nargs="?",
        help="a file of `name: value` lines; with no --model and no --train_data: the demo's",
    )
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
    demo = None if {"model", "train_data"} & flags.keys() else ROOT / "recipes" / "demo.yaml"
    recipe = flags.pop("recipe", demo)
    lines = read_recipe(Path(recipe)) if recipe else {}
    values = parse([f"--{name}={value}" for name, value in lines.items()], recipe, lines)
    config = config_class(**values | flags)
    check_config(config)
    return config


class RecipeLoader(yaml.BaseLoader):
    """Each value is the text that is written there: `off` is a word and not false. A name that is
    there twice is an error."""

    def construct_mapping(self, node, deep=False):
        names = [name.value for name, _ in node.value]
        if twice := [name for name in names if names.count(name) > 1]:
            raise InputError(f"{twice[0]} is there twice")
        return super().construct_mapping(node, deep)


def read_recipe(path: Path) -> dict[str, str]:
    """The `name: value` lines of a YAML file, as text. Raises InputError for anything else."""
    if not path.is_file():
        raise InputError(f"no recipe {path}; those that come with the code are in recipes/")
    try:
        lines = yaml.load(path.read_text(encoding="utf-8"), RecipeLoader) or {}
    except (ValueError, yaml.YAMLError) as error:  # an InputError is a ValueError
        raise InputError(f"{path} cannot be read: {error}") from error
    if not isinstance(lines, dict):
        raise InputError(f"{path} must hold `name: value` lines")
    for name, value in lines.items():
        if not isinstance(value, str):
            raise InputError(f"{path}: {name} must have a single value, as text or a number")
    return lines


def check_config(config) -> None:
    """Raise InputError for a value that makes no sense, whatever the data."""
    positive = ("batch_size", "num_epochs", "log_every", "replicas")
    positive += ("learning_rate", "max_grad_norm")
    not_negative = ("max_steps", "eval_every", "save_every", "keep_checkpoints", "seed")
    not_negative += ("micro_batch_tokens",)
    choices = {"loss": LOSSES, "dtype": ("auto", "float32", "bfloat16")}
    choices |= {"wandb": ("auto", "online", "offline", "off", "trackio")}
    choices |= {"resume": ("auto", "never", "anyway")}
    choices |= {"activation_checkpointing": ("false", "selective", "true")}
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


def choose_loss(name: str, arguments: str) -> tuple[Callable, list[str]]:
    """The function `name`_loss of loss.py, with `arguments` ("beta=2.5,gamma=0.5") bound to it, and
    the names of what else it asks for: its parameters without a default after the first two,
    which are `reference` and columns of the data. Where a default is an int, a whole number stays
    one. Raises InputError for an unknown argument, and
    for a value that is not a finite number."""
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
        if type(defaults.get(key)) is int and values[key].is_integer():
            values[key] = int(values[key])
        if key not in defaults or not math.isfinite(values[key]):
            raise InputError(f"loss_args: '{text}' does not fit the loss {name}, which has {known}")
    asked = [p.name for p in parameters if p.default is p.empty][2:]
    return functools.partial(LOSSES[name], **values), asked
