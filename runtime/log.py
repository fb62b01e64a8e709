"""The log of a run: config.yaml, code.diff, metrics.jsonl, wandb or trackio."""

import fcntl
import json
import os
import sys
import uuid
from dataclasses import asdict
from pathlib import Path
from typing import TextIO

import torch.distributed as dist
import yaml
from tqdm import tqdm

from runtime.errors import InputError
from runtime.identity import VERSIONS, git_state
from runtime.intervals import t_quantile

# The held-out metrics that the terminal shows.
SHOWN = ("accuracy", "inverse_perplexity/chosen", "inverse_perplexity/rejected", "loss")


class Logger:
    """Writes config.yaml, metrics.jsonl and, if wanted, to wandb, and shows the progress; on ranks
    above 0, nothing. Never waits for other ranks.

    start: see checkpoints.Start; made_of: see checks.digests. Lines of steps that will be
    repeated are dropped. If it resumes despite changes, the lines until then
    move to metrics-until-step_N.jsonl.
    """

    def __init__(self, config, start, made_of: dict[str, str]):
        self.on = dist.get_rank() == 0
        if not self.on:
            return
        output = Path(config.output_dir)
        self.lock = start.lock
        commit, difference = git_state()
        made_of = VERSIONS | {"ranks": dist.get_world_size(), "commit": commit} | made_of
        head = "".join(f"# {name}: {value}\n" for name, value in made_of.items())
        values = yaml.safe_dump(asdict(config), sort_keys=False)
        self.config = output / "config.yaml"
        write_whole(self.config, head + values)
        (output / "code.diff").unlink(missing_ok=True)
        if difference:
            write_whole(output / "code.diff", difference)
        self.path, kept = output / "metrics.jsonl", []
        if start.changed and self.path.exists():
            before, number = output / f"metrics-until-step_{start.step}.jsonl", 1
            while before.exists():
                number += 1
                before = before.with_name(f"metrics-until-step_{start.step}_{number}.jsonl")
            os.replace(self.path, before)
            tqdm.write(f"the lines of metrics.jsonl until now are in {before}", file=sys.stderr)
        elif start.checkpoint:  # without one, no line is of a step that is kept
            lines = read_lines(self.path)
            kept = [line for line in lines if line["step"] <= start.step]
            if lost := self.path.exists() and len(self.path.read_bytes().splitlines()) - len(lines):
                tqdm.write(f"{self.path}: {lost} damaged lines are left out", file=sys.stderr)
        write_whole(self.path, "".join(json.dumps(line) + "\n" for line in kept))
        self.evaluations = [line for line in kept if "eval/loss" in line]
        self.whole = not self.evaluations  # whether the first one will be of this process
        resumed = bool(start.checkpoint) and not start.changed
        start_it = start_trackio if config.wandb == "trackio" else start_wandb
        self.wandb = None if config.wandb == "off" else start_it(config, resumed)

    def note(self, name: str, value) -> None:
        """Print a fact of the run, and add it to the head of config.yaml."""
        if self.on:
            print(f"{name}: {value}", flush=True)
            write_whole(self.config, f"# {name}: {value}\n{self.config.read_text()}")

    def steps(self, first: int, last: int) -> tqdm:
        """The numbers from `first` to `last`; shows the progress while they are taken."""
        options = {"initial": first, "unit": "step", "disable": not self.on}
        self.progress = tqdm(range(first, last + 1), "SimPER", last, **options)
        return self.progress

    def write(self, metrics: dict, errors: dict[str, float] | None = None) -> None:
        """Log one line; `metrics` has the key "step". errors: of the changes, see evaluate."""
        if not self.on:
            return
        with open(self.path, "a") as file:
            print(json.dumps(metrics), file=file)
        # wandb drops a step that it has: what a resumed run repeats. A step's evaluation is a step
        # of its own there, since the run may have been stopped between the two.
        self.to_wandb("log", metrics, step=2 * metrics["step"] + ("eval/loss" in metrics))
        if "loss" in metrics:
            self.progress.set_postfix({k: f"{metrics[k]:.3f}" for k in ("loss", "logps/chosen")})
        if "eval/loss" in metrics:
            self.evaluations.append(metrics)
            self.errors = errors
            shown = [f"{k} {metrics[f'eval/{k}']:.3f}" for k in SHOWN if f"eval/{k}" in metrics]
            text = f"held-out pairs after step {metrics['step']}: {', '.join(shown)}"
            tqdm.write(text, file=sys.stderr)

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
        ranks and without two evaluations. The change has its 95 % interval, pair by pair, unless
        the first evaluation was another process's."""
        if not self.on:
            return ""
        self.progress.close()
        self.to_wandb("finish")
        os.close(self.lock)
        if len(self.evaluations) < 2:
            return ""
        first, last = self.evaluations[0], self.evaluations[-1]
        before = f"step {first['step']}" if first["step"] else "before"
        title = f"{last.get('eval/pairs', '')} held-out pairs".strip()
        paired = self.errors if self.whole else {}
        change = "   change [95 %]" if paired else ""
        table = f"\n{title:<30}{before:>9}  → {'after':>8}{change}\n"
        for name in (name for name in SHOWN if f"eval/{name}" in last):
            old, new = first[f"eval/{name}"], last[f"eval/{name}"]
            table += f"{name:<30}{old:>9.4f}  → {new:>8.4f}"
            if name in paired:
                half = t_quantile(last["eval/pairs"] - 1) * paired[name]
                low, high = new - old - half, new - old + half
                table += f"   {new - old:+.4f} [{low:+.4f}, {high:+.4f}]"
            table += "\n"
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


def open_alone(path: Path) -> TextIO:
    """A file of lines, open for more, and locked until it is closed. Raises InputError if another
    process has it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = open(path, "a")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise InputError(f"{path}: another process is writing to it") from None
    except OSError:
        pass  # a file system without locks
    return file


def read_config(output: Path) -> dict:
    """What config.yaml says of the last start in output_dir: its settings, and by its head what it
    was made of; {} if that cannot be read."""
    try:
        text = (output / "config.yaml").read_text()
        head = [line[2:].partition(": ")[::2] for line in text.splitlines() if line[:2] == "# "]
        return dict(head) | yaml.safe_load(text)
    except (OSError, ValueError, TypeError, yaml.YAMLError):  # not there, or damaged
        return {}


def read_lines(path: Path) -> list[dict]:
    """The lines of a metrics.jsonl that are whole: one may have been cut off."""
    lines = []
    for text in path.read_text(errors="replace").splitlines() if path.exists() else []:
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            continue
        if isinstance(line, dict) and isinstance(line.get("step"), int):
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


def start_trackio(config, resumed: bool):
    """A run of trackio, whose dashboard is on this machine (`trackio show`): that of the output_dir
    if `resumed`. Raises InputError if it is not installed."""
    try:
        import trackio
    except ImportError:
        raise InputError("wandb=trackio, which is not installed (pip install trackio)") from None
    name, resume = Path(config.output_dir).name, "allow" if resumed else "never"
    return trackio.init(project="simper", name=name, config=asdict(config), resume=resume)


def start_wandb(config, resumed: bool):
    """A wandb run, that of the output_dir if `resumed`, or None. Never asks for anything: without a
    login, `auto` is off and `online` is an error."""
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
