"""Checkpoints: where a run begins, and its state on disk, of any optimizer and any number of ranks.

<output_dir>/checkpoints/step_N/*.safetensors   optimized weights and the optimizer's tensors
<output_dir>/checkpoints/step_N/trainer.json    the rest: see TrainerState
"""

import copy
import json
import math
import os
import shutil
import sys
import time
import uuid
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import xxhash
from torch.distributed.tensor import DTensor, Replicate, Shard, zeros
from tqdm import tqdm

from runtime.cache import file_digest, is_intact
from runtime.errors import InputError
from runtime.identity import VERSIONS
from runtime.log import lock_folder, read_config, read_lines, sync, write_whole
from runtime.processes import gather, say
from runtime.weights import FINAL_DIGESTS

# What may differ between a run and its resumption: none of these changes the pairs of a step or
# their gradient. (Of the held-out data and the chat template, the content is compared and not the
# name.)
FREE_TO_CHANGE = {"output_dir", "micro_batch_tokens", "activation_checkpointing", "compile"}
FREE_TO_CHANGE |= {"replicas", "wandb", "resume", "eval_data", "eval_every", "save_every"}
FREE_TO_CHANGE |= {"keep_checkpoints", "log_every", "chat_template", "template_args"}
FREE_TO_CHANGE |= {"stream_optimizer"}
FORMAT = 2  # of trainer.json
FILE_BYTES = 2**30  # tensors that begin in the same GiB share a file
SCHEDULED = ("params", "param_names", "lr", "initial_lr")  # of a group of parameters


# ---- Where a run begins --------------------------------------------------------------------------


@dataclass
class Start:
    """checkpoint: the one to resume from, or None; step: the steps that it has; changed: whether
    it, or metrics.jsonl, comes from a run with other settings, data or code, which --resume anyway
    accepts; other: whether the checkpoint itself does; evaluated: whether metrics.jsonl has the
    evaluation after that step; finished: whether nothing is left to do; lock: see lock_folder, on
    rank 0."""

    checkpoint: Path | None = None
    step: int = 0
    changed: bool = False
    other: bool = False
    evaluated: bool = False
    finished: bool = False
    lock: int | None = field(default=None, compare=False)


def find_start(config, made_of: dict[str, str], last: float = math.inf) -> Start:
    """Where to begin, the same on every rank. With resume=never, an existing output_dir is set
    aside. Collective.

    made_of: see checks.digests; and the dtype in use. Raises InputError if the newest checkpoint is
    of a run that is made of something else or has other settings (unless resume=anyway), if it is
    beyond the `last` step, and if ranks differ in them or in what they see of output_dir."""
    output, found = Path(config.output_dir), [None]
    if dist.get_world_size() > 1:
        check_agreement(asdict(config) | made_of | VERSIONS)
    if dist.get_rank() == 0:
        try:
            found = [choose_start(config, made_of)]
        except InputError as error:
            found = [error]
    # Not each rank by itself: a shared file system may show them different things.
    dist.broadcast_object_list(found, src=0)
    if isinstance(found[0], InputError):
        raise found[0]
    if dist.get_world_size() > 1:
        check_shared(output)
    if found[0].step > last:
        problem = f"{found[0].checkpoint} has more steps than the {last} that are asked for"
        raise InputError(f"{problem}. python -m eval.export writes its model")
    return found[0]


def check_agreement(mine: dict) -> None:
    """Raise InputError, naming what, if ranks differ. Collective."""
    settings = gather(mine)
    for rank, other in enumerate(settings):
        if names := [name for name in other if other[name] != settings[0][name]]:
            problem = f"rank {rank} and rank 0 do not have the same {', '.join(names)}"
            raise InputError(f"{problem}: every machine needs the same files and flags")


def check_shared(output: Path) -> None:
    """Raise InputError if ranks see different folders as output_dir: each would write its part of a
    checkpoint to its own. Collective."""
    probe = [output / f".{uuid.uuid4().hex}"]
    dist.broadcast_object_list(probe, src=0)
    if dist.get_rank() == 0:
        probe[0].touch()
    dist.barrier()
    for _ in range(60):  # NFS may remember so many seconds what was not there
        if not probe[0].exists():
            time.sleep(1)
    seen = gather(probe[0].exists())
    if dist.get_rank() == 0:
        probe[0].unlink()
    if not all(seen):
        problem = f"{output} of rank {seen.index(False)} is not that of rank 0"
        raise InputError(f"{problem}: it must be on a file system that all machines share")


def choose_start(config, made_of: dict[str, str]) -> Start:
    """find_start, on rank 0; from here on, no other run writes to output_dir."""
    output = Path(config.output_dir)
    if config.resume == "never" and output.exists():
        set_aside(output)
    output.resolve().mkdir(parents=True, exist_ok=True)  # where a link points to
    lock, before = lock_folder(output), read_config(output)
    # The lines of metrics.jsonl are from the last start, so of another run, too.
    start = Start(changed=bool(before and differences(config, made_of, before)), lock=lock)
    try:
        if any((output / "final").glob("*")):
            check_finished(output, config, made_of)
            say(f"{output} holds this run, finished. To train again: --resume never")
            os.close(lock)
            return Start(finished=True)
        for folder in checkpoints(output):
            if is_whole(folder):
                resume(start, folder, config, made_of)
                break
            say(f"{folder} is damaged: it is passed over")
        return start
    except InputError:
        os.close(lock)
        raise


def set_aside(output: Path) -> None:
    """Rename the folder of a run, with all that it holds. Raises InputError for a folder that is
    not a run's, and for the working directory."""
    folder = output.resolve()
    if not {path.name for path in folder.iterdir()} - {".lock"}:
        return
    here = Path.cwd().is_relative_to(folder)
    if here or "output_dir" not in read_config(output):
        reason = "it is the working directory" if here else "it has no config.yaml of a run"
        raise InputError(f"--resume never sets aside the folder of a run; not {output}: {reason}")
    os.close(lock_folder(output))  # no run writes to it
    os.rename(folder, f"{folder}.{datetime.now():%Y%m%d-%H%M%S-%f}")  # a link stays where it is


def check_finished(output: Path, config, made_of: dict[str, str]) -> None:
    """Raise InputError if the finished run in output_dir is not the one that is asked for, or if
    its final/ is not as it was exported."""
    final = output / "final"
    if not is_intact(final, output / FINAL_DIGESTS):
        raise InputError(f"{final} is damaged: move it away, and it is exported anew")
    if not (before := read_config(output)):
        raise InputError(f"{output} holds a finished run, and its config.yaml is damaged")
    if changed := differences(config, made_of, before):
        advice = "Use another --output_dir, or --resume never, which sets it aside"
        problem = f"{output} holds a finished run, which is another one: {'; '.join(changed)}"
        raise InputError(f"{problem}. {advice}")


def differences(config, made_of: dict[str, str], before: dict) -> list[str]:
    """What of a run is not as it was before, in words."""
    return [
        f"other {name}" if name in made_of else f"{name} was {before.get(name)}, is {value}"
        for name, value in (asdict(config) | made_of).items()
        if name not in FREE_TO_CHANGE and before.get(name) != value
    ]


def resume(start: Start, checkpoint: Path, config, made_of: dict[str, str]) -> None:
    """Have a run begin with a checkpoint."""
    state = read_state(checkpoint)
    if state.get("format") != FORMAT:
        advice = "finish the run with that version, or use --resume never"
        raise InputError(f"{checkpoint} is of another version of this code: {advice}")
    if changed := differences(config, made_of, state["config"] | state["made_of"]):
        text = f"{checkpoint} is of another run: {'; '.join(changed)}"
        if config.resume != "anyway":
            raise InputError(f"{text}. Use --resume never or anyway, or another --output_dir")
        say(f"going on, but {text}", file=sys.stderr)
        start.changed = start.other = True
    if others := {k: old for k, old in state["versions"].items() if old != VERSIONS.get(k)}:
        was = ", ".join(f"{k} was {old}, is {VERSIONS.get(k)}" for k, old in others.items())
        say(f"going on with other versions: {was}", file=sys.stderr)
    start.checkpoint, start.step = checkpoint, state["step"]
    lines = read_lines(checkpoint.parents[1] / "metrics.jsonl")
    found = any(line["step"] == start.step and "eval/loss" in line for line in lines)
    start.evaluated = found and not start.changed


def checkpoints(output: Path) -> list[Path]:
    """The checkpoints of a run, whole or not, the one with the most steps first."""
    numbers = [path.name.removeprefix("step_") for path in output.glob("checkpoints/step_*")]
    steps = sorted((int(number) for number in numbers if number.isdecimal()), reverse=True)
    return [output / "checkpoints" / f"step_{step}" for step in steps]


def is_whole(folder: Path) -> bool:
    """Whether a checkpoint has just the files, of just the sizes, that were saved. (TrainerState
    compares their digests when it reads them.)"""
    try:
        state = read_state(folder)
        if state.get("format") != FORMAT:
            return True  # resume refuses it
        sizes = {path.name: path.stat().st_size for path in folder.glob("*.safetensors")}
        return sizes == {name: size for name, (size, _) in state["files"].items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError):  # not there, or damaged
        return False


def read_state(folder: Path) -> dict:
    """The content of trainer.json. Raises ValueError if it is not as it was written."""
    state = json.loads((folder / "trainer.json").read_text())
    if "format" in state and state.pop("digest") != digest_of(state):
        raise ValueError("damaged")
    if state.get("format") == FORMAT and folder.name != f"step_{state['step']}":
        raise ValueError("of another step")
    return state


def write_state(folder: Path, state: dict) -> None:
    """Write trainer.json, with a digest of itself."""
    text = json.dumps(state | {"digest": digest_of(state)}, indent=1)
    write_whole(folder / "trainer.json", text)


def digest_of(state: dict) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(state).encode())


# ---- The state of a run --------------------------------------------------------------------------


class TrainerState:
    """The optimized weights and the optimizer's state, by name. The optimizer may be any that keeps
    `state[parameter][key]` and `param_groups` as torch's do; a state that cannot be saved is
    refused by name.

    On disk, a weight is the tensor NAME and a tensor of its state KEY.NAME. In trainer.json,
    "optimizer" lists every state {NAME: {KEY: entry}}; "groups" is what the optimizer has changed
    in its groups' settings, the learning rates aside, which the schedule sets.
    """

    def __init__(self, config, made_of: dict[str, str], model, optimizer, start: Start):
        self.config, self.made_of, self.model, self.optimizer = config, made_of, model, optimizer
        self.step = start.step  # of the newest checkpoint
        self.first_groups = [copy.deepcopy(settings(group)) for group in optimizer.param_groups]
        if start.checkpoint:
            self.load(start.checkpoint)
            say(f"resuming from {start.checkpoint}")

    def entries(self) -> tuple[dict, dict, list]:
        """(tensors by their names on disk, "optimizer", "groups")."""
        tensors, states, groups = dict(self.model.optimized()), {}, []
        for name, parameter in self.model.optimized().items():
            state = states[name] = {}
            for key, value in self.optimizer.state.get(parameter, {}).items():
                state[key] = describe(value, parameter, f"{key} of {name}")
                if "shape" in state[key]:
                    tensors[f"{key}.{name}"] = value
        for group, first in zip(self.optimizer.param_groups, self.first_groups):
            changed = {k: v for k, v in settings(group).items() if k not in first or v != first[k]}
            groups.append({k: describe(v, None, f"a group's {k}") for k, v in changed.items()})
        if beside := self.optimizer.state.keys() - self.model.optimized().values():
            problem = f"it keeps {[*beside][0]!r} beside that of its parameters"
            raise InputError(f"the optimizer's state cannot be saved: {problem}")
        return tensors, states, groups

    def save(self, step: int) -> None:
        """Write checkpoints/step_N, if it is not there: nothing that is unpickled on loading. The
        folder gets its name when all ranks have written, so that it is whole or not there.
        Collective."""
        if step == self.step:
            return
        self.step = step
        output, began = Path(self.config.output_dir), time.perf_counter()
        folder = output / "checkpoints" / f"step_{step}"
        scratch = folder.with_name(folder.name + ".part")
        tensors, states, groups = self.entries()
        mine = [name for name, t in tensors.items() if not local(t).isfinite().all()]
        if strange := sum(gather(mine), []):
            raise FloatingPointError(f"{strange[0]} is not finite after step {step}: not saved")
        if dist.get_rank() == 0:
            shutil.rmtree(scratch, ignore_errors=True)
            scratch.mkdir(parents=True)
        dist.barrier()
        # The writer holds a whole file in memory, and a rank's tensors would all go into one.
        file_numbers, size = {}, 0
        for name, tensor in tensors.items():
            file_numbers[name] = 1 + size // FILE_BYTES
            size += tensor.numel() * tensor.element_size()
        writer = dcp.HuggingFaceStorageWriter(str(scratch), file_numbers, save_distributed=True)
        dcp.save(tensors, storage_writer=writer)  # returns when all ranks have written
        mine = scratch.glob(f"shard-{dist.get_rank() + 1:05d}-*")
        files = gather({path.name: (path.stat().st_size, file_digest(path)) for path in mine})
        if dist.get_rank() == 0:
            files = {name: entry for of_rank in files for name, entry in of_rank.items()}
            state = {"format": FORMAT, "step": step, "made_of": self.made_of}
            state |= {"config": asdict(self.config)}
            state |= {"versions": VERSIONS, "optimizer": states, "groups": groups, "files": files}
            write_state(scratch, state)
            for path in (*scratch.iterdir(), scratch):
                sync(path)
            shutil.rmtree(folder, ignore_errors=True)
            os.rename(scratch, folder)
            sync(folder.parent)  # before an older one goes
            if keep := self.config.keep_checkpoints:
                kept = [*filter(is_whole, checkpoints(output))][:keep]
                for old in {*checkpoints(output)} - {*kept}:  # what is damaged goes, too
                    shutil.rmtree(old, ignore_errors=True)  # a link, or in use: no reason to stop
            size = sum(size for size, _ in files.values())
            report_save(folder, size, time.perf_counter() - began)
        dist.barrier()

    def load(self, folder: Path) -> None:
        """Read a checkpoint of any number of ranks into model and optimizer. Collective. Raises
        InputError if it cannot be read, or is of other weights or groups."""
        saved = read_state(folder)
        weights, tensors = self.model.optimized(), dict(self.model.optimized())
        if others := [name for name in {*weights} ^ {*saved["optimizer"]}]:
            problem = f"{sorted(others)[0]} is trained in {folder} or in this model, not in both"
            raise InputError(f"{problem}: has surgery() changed? Use --resume never")
        if len(saved["groups"]) != len(self.optimizer.param_groups):
            raise InputError(f"{folder} has {len(saved['groups'])} groups of parameters")
        states = {name: {} for name in weights}
        for name, entries in saved["optimizer"].items():
            for key, entry in entries.items():
                states[name][key] = restore(entry, weights[name])
                if "shape" in entry:
                    tensors[f"{key}.{name}"] = states[name][key]
        self.check_files(folder, saved["files"])
        try:
            dcp.load(tensors, storage_reader=dcp.HuggingFaceStorageReader(str(folder)))
        except (Exception, dcp.CheckpointException) as error:
            reason = str(error).strip().split("\n")[-1]
            advice = "If it is damaged, move it away: the one before it is taken, if there is one"
            raise InputError(f"{folder} cannot be read ({reason}). {advice}") from error
        for name, state in states.items():
            if state:
                self.optimizer.state[weights[name]] = state
        for group, changed in zip(self.optimizer.param_groups, saved["groups"]):
            group |= {key: restore(entry, group["params"][0]) for key, entry in changed.items()}
        self.model.refresh()

    def check_files(self, folder: Path, files: dict) -> None:
        """Raise InputError if a file is not as it was saved. Each rank reads some. Collective."""
        mine = sorted(files)[dist.get_rank() :: dist.get_world_size()]
        damaged = [name for name in mine if file_digest(folder / name) != files[name][1]]
        if damaged := sum(gather(damaged), []):
            advice = f"move {folder} away: the checkpoint before it is taken, if there is one"
            raise InputError(f"{folder / damaged[0]} is damaged: {advice}")


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def settings(group: dict) -> dict:
    """Of a group of parameters, but the learning rates, which the schedule sets."""
    return {key: value for key, value in group.items() if key not in SCHEDULED}


def describe(value, parameter, what: str) -> dict:
    """The entry in trainer.json of a value of an optimizer's state: a tensor's shape, dtype and
    the dimension that is sharded; a number itself. Raises InputError for another value."""
    dtype = str(getattr(value, "dtype", "")).removeprefix("torch.")
    if isinstance(value, DTensor):
        if all(place.is_replicate() or place.is_shard() for place in value.placements):
            dims = [place.dim for place in value.placements if place.is_shard()]
            return {"shape": [*value.shape], "dtype": dtype, "sharded": (*dims, None)[0]}
    elif isinstance(value, torch.Tensor) and value.ndim == 0:
        # PyTorch's fused optimizers count steps on the GPU, the others on the host.
        home = "" if parameter is None else parameter.device.type
        on_host = value.device.type == "cpu" != home
        return {"number": value.item(), "dtype": dtype, "on_host": on_host}
    elif isinstance(value, torch.Tensor) and not isinstance(parameter, DTensor | None):
        return {"shape": [*value.shape], "dtype": dtype, "sharded": None}
    elif value is None or isinstance(value, bool | int | float | str):
        return {"value": value}
    kind = f"{type(value).__name__}, which this rank alone has" if dtype else type(value).__name__
    raise InputError(f"the optimizer's state cannot be saved: {what} is a {kind}")


def restore(entry: dict, parameter: torch.Tensor):
    """The value of an entry: a number, or a tensor to read into, that is sharded as the parameter
    is."""
    if "value" in entry:
        return entry["value"]
    dtype = getattr(torch, entry["dtype"])
    if "number" in entry:
        device = "cpu" if entry["on_host"] else parameter.device
        return torch.tensor(entry["number"], dtype=dtype, device=device)
    if [*parameter.shape] == entry["shape"]:
        return torch.zeros_like(parameter, dtype=dtype)
    if not isinstance(parameter, DTensor):
        return torch.zeros(entry["shape"], dtype=dtype, device=parameter.device)
    mesh, dim = parameter.device_mesh, entry["sharded"]
    places = [Replicate()] * (mesh.ndim - 1) + [Replicate() if dim is None else Shard(dim)]
    return zeros(entry["shape"], dtype=dtype, device_mesh=mesh, placements=places)


def report_save(folder: Path, size: int, seconds: float) -> None:
    """Say what was written; and whether torchrun might end a run before it has written so much."""
    tqdm.write(f"wrote {folder}: {size / 1e9:.1f} GB in {seconds:.0f} s", file=sys.stderr)
    patience = int(os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", 30))
    if seconds > patience / 2 and "TORCHELASTIC_RUN_ID" in os.environ:
        tqdm.write(
            f"torchrun kills a run {patience} s after SIGTERM, which may be too soon for a "
            f"checkpoint: set TORCH_ELASTIC_SHUTDOWN_TIMEOUT={60 + 4 * math.ceil(seconds)}",
            file=sys.stderr,
        )
