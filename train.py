"""Train a language model on preference pairs with SimPER.

    python train.py                                                        # the demo: a small model, on a laptop
    torchrun --nproc_per_node 2 train.py                                   # the same with two processes
    torchrun --nproc_per_node 8 train.py recipes/llama-3-8b-instruct.yaml  # a set-up of the paper
    python train.py recipes/demo.yaml --learning_rate 1e-5 --output_dir runs/demo-1e-5

Every field of Config is a flag. What is not on the command line comes from the recipe, then from Config's defaults.
"""

import argparse
import ctypes
import difflib
import functools
import hashlib
import inspect
import json
import math
import os
import resource
import shutil
import signal
import sys
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime
from pathlib import Path

import datasets
import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import transformers
import yaml
from torch.distributed.tensor import DTensor
from tqdm import tqdm
from transformers import AutoConfig

import loss as loss_functions
from data import CACHE_DIR, InputError, fingerprint, load_pairs, load_tokenizer, pack_rows, split, step_indices
from loss import sum_logps
from model import export, load_model, resolve_model, weights_fingerprint

# Every function of loss.py that is called NAME_loss, by its NAME.
LOSSES = {name.removesuffix("_loss"): value for name, value in vars(loss_functions).items() if name.endswith("_loss")}


def option(default, help: str):
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class Config:
    model: str = option("", "hub id or folder of the model to start from; 'demo' is the demo's")
    train_data: str = option("", "sources of pairs, comma-separated: FILE, FOLDER, or hub NAME[[:CONFIG]:SPLIT]")
    eval_data: str = option("", "the same for the held-out pairs; empty: no evaluation")
    output_dir: str = option("", "folder of this run: config.yaml, metrics.jsonl, checkpoints/, final/")
    loss: str = option("simper", f"the objective, a function of loss.py: {', '.join(LOSSES)}")
    loss_args: str = option("", "its hyperparameters, comma-separated, such as beta=2.5,gamma=0.5; simper has none")
    batch_size: int = option(128, "pairs per optimizer step, over all ranks together")
    learning_rate: float = option(1e-6, "peak learning rate of AdamW")
    warmup_ratio: float = option(0.1, "share of the steps in which the learning rate rises; then it follows a cosine to 0")
    max_grad_norm: float = option(1.0, "gradients of a larger norm are scaled down to it")
    num_epochs: int = option(1, "passes over the training pairs")
    max_steps: int = option(0, "optimizer steps instead of num_epochs; 0: as many as num_epochs takes")
    max_length: int = option(2048, "tokens of prompt + response above which a pair is truncated")
    max_prompt_length: int = option(1800, "tokens at the end of the prompt that truncation keeps")
    micro_batch_tokens: int = option(8192, "distinct tokens in one forward on one rank; lower it when memory runs out")
    seed: int = option(42, "decides the order of the pairs")
    dtype: str = option("auto", "of forward and backward: float32, bfloat16, or auto (bfloat16 on GPUs, float32 on CPU)")
    activation_checkpointing: bool = option(False, "keep only the blocks' inputs for the backward pass: less memory, slower")
    compile: bool = option(False, "torch.compile every transformer block")
    replicas: int = option(1, "groups of ranks that hold a whole sharded model each (HSDP); 1 shards over all ranks")
    eval_every: int = option(100, "steps between evaluations; 0: only before and after training")
    save_every: int = option(100, "steps between checkpoints; 0: only when the run is stopped by SIGTERM")
    keep_checkpoints: int = option(1, "newest checkpoints to keep; 0: all")
    log_every: int = option(1, "steps that a line of metrics is the mean of")
    resume: str = option("auto", "auto: go on from output_dir's newest whole checkpoint; never: start anew; or a checkpoint")
    wandb: str = option("auto", "online, offline, off, or auto (online when logged in, otherwise off)")


# What may differ between a run and its resumption: none of these changes the pairs of a step or their gradient.
FREE_TO_CHANGE = {"output_dir", "micro_batch_tokens", "activation_checkpointing", "compile", "replicas", "wandb", "resume"}
FREE_TO_CHANGE |= {"eval_data", "eval_every", "save_every", "keep_checkpoints", "log_every"}

METRICS = ("loss", "inverse_perplexity/chosen", "inverse_perplexity/rejected", "logps/chosen", "logps/rejected")
METRICS += ("accuracy", "length/chosen", "length/rejected", "gradient_weight/chosen", "gradient_weight/rejected")


def train(config: Config) -> None:
    """One run, from the data to the exported model. Every rank calls it."""
    rank, ranks, device = start_process()
    say = print if rank == 0 else lambda *args, **kwargs: None
    output = Path(config.output_dir)
    if config.resume != "never" and (output / "final").exists():
        say(f"{output} holds a finished run (final/). To train again: --resume never, or another --output_dir.")
        return

    # Everything that can be wrong with the input is found before the model is loaded and before ranks wait for ranks.
    loss, needs_reference = choose_loss(config)
    tokenizer = load_tokenizer(resolve_model(config.model))
    pairs, report = load_pairs(config.train_data, tokenizer, config.max_length, config.max_prompt_length)
    say(f"training: {report}")
    limit = getattr(AutoConfig.from_pretrained(resolve_model(config.model)), "max_position_embeddings", config.max_length)
    if config.max_length > limit:
        raise InputError(f"max_length={config.max_length} exceeds the {limit} positions of {config.model}")
    tokens = [sum(lengths) for lengths in pairs["lengths"]]  # distinct tokens of each pair
    schedule = make_schedule(config, tokens, ranks)
    total_steps, steps_per_epoch = len(schedule), len(pairs) // config.batch_size
    heldout, heldout_split = None, []
    if config.eval_data:
        heldout, report = load_pairs(config.eval_data, tokenizer, config.max_length, config.max_prompt_length)
        heldout_split = split([sum(lengths) for lengths in heldout["lengths"]], ranks, config.micro_batch_tokens)
        say(f"held out: {report}")
    say(
        f"{total_steps} steps of {config.batch_size} pairs, {steps_per_epoch} an epoch; the {len(pairs) % config.batch_size} "
        f"pairs that do not fill a batch, others in each epoch, are left out"
    )

    start_group(device)
    checkpoint, state = prepare_output(config, fingerprint(pairs))
    log = Logger(config, state["step"])
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}.get(config.dtype)
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    lengths = [*pairs["lengths"], *(heldout["lengths"] if heldout else [])]
    longest = max(prompt + max(chosen, rejected) for prompt, chosen, rejected in lengths)
    layout = (config.replicas, config.activation_checkpointing, config.compile, longest)
    model = load_model(resolve_model(config.model), device.type, dtype, *layout)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.999), weight_decay=0.0, fused=True)
    rehearse(model, optimizer, pairs, tokens, schedule, rank, device)
    reference = heldout_reference = None
    if needs_reference:  # before a checkpoint is loaded: the model still is the one that training starts from
        reference = reference_logps(model, pairs, split(tokens, ranks, config.micro_batch_tokens), config, dtype, device)
        if heldout:
            heldout_reference = reference_logps(model, heldout, heldout_split, config, dtype, device)
    if checkpoint:
        say(f"resuming from {checkpoint}")
        load_checkpoint(checkpoint, model, optimizer, state["step"])

    start, evaluated = state["step"], state["evaluated"]
    stop = StopRequest()
    progress = tqdm(total=total_steps, initial=start, desc="SimPER", unit="step", disable=rank > 0, dynamic_ncols=True)
    sums, logged_steps, seconds, logged_tokens = torch.zeros(len(METRICS), dtype=torch.float64, device=device), 0, 0.0, 0

    for step in range(start, total_steps + 1):
        finished = step == total_steps
        evaluation_due = step == 0 or finished or (config.eval_every and step % config.eval_every == 0)
        if heldout and evaluation_due and not evaluated and (finished or not stop.requested):
            means, _ = reduce(evaluate(model, loss, heldout, heldout_reference, heldout_split, device), len(heldout))
            log.write({"step": step, **{f"eval/{name}": value for name, value in means.items()}})
            evaluated = True
        checkpoint_due = step > start and config.save_every and step % config.save_every == 0
        if not finished and (checkpoint_due or stop.requested):
            save_checkpoint(model, optimizer, config, state | {"step": step, "evaluated": evaluated})
        if finished or stop.requested:
            break
        evaluated = False

        # One optimizer step. The learning rate is transformers' cosine schedule with warm-up.
        began = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, total_steps, config)
        indices, micro_batches = schedule[step]
        finite = torch.ones((), device=device, dtype=torch.bool)
        for shares in micro_batches:
            batch = pack_rows(pairs, [indices[position] for position in shares[rank]], reference).to(device)
            losses, metrics = pair_losses(model, batch, loss)
            # FSDP averages gradients over ranks: times their number, the gradient is that of the mean over the batch.
            (losses.sum() * ranks / config.batch_size).backward()
            finite &= losses.detach().isfinite().all()
            sums += metrics.sum(dim=0)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        norm = (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()  # a single process may not be sharded
        all_finite = stop.agree(finite, device)
        if not (all_finite and math.isfinite(norm)):
            rows = pairs[indices]
            names = ", ".join(f"{source} row {row}" for source, row in zip(rows["source"], rows["row"]))
            raise FloatingPointError(f"step {step + 1}: loss or gradient (norm {norm}) is not finite. Its pairs: {names}")
        optimizer.step()
        optimizer.zero_grad()
        seconds += time.perf_counter() - began

        logged_steps, logged_tokens = logged_steps + 1, logged_tokens + sum(tokens[i] for i in indices)
        if (step + 1) % config.log_every == 0 or step + 1 == total_steps:
            means, memory = reduce(sums, logged_steps * config.batch_size)
            means |= {"grad_norm": norm, "learning_rate": optimizer.param_groups[0]["lr"]}
            means |= {"pairs_per_second": logged_steps * config.batch_size / seconds}
            means |= {"tokens_per_second": logged_tokens / seconds, "peak_memory_gb": memory}
            log.write({"step": step + 1, "epoch": (step + 1) / steps_per_epoch, **means})
            progress.set_postfix(loss=f"{means['loss']:+.3f}", accuracy=f"{means['accuracy']:.2f}")
            sums, logged_steps, seconds, logged_tokens = torch.zeros_like(sums), 0, 0.0, 0
        progress.update()

    progress.close()
    if finished:
        export(model, resolve_model(config.model), tokenizer, output / "final", dtype)
        say(log.summary() + f"\nThe trained model is in {output / 'final'}")
    else:
        say(f"stopped by SIGTERM after step {step}, with a checkpoint: the same command goes on from there")
    log.close()
    dist.destroy_process_group()


def make_schedule(config: Config, tokens: list[int], ranks: int) -> list[tuple[list[int], list[list[list[int]]]]]:
    """What every step does: (indices of its pairs, its micro-batches as positions in these indices [m][rank]).

    tokens: distinct tokens of each pair. Raises InputError if a step cannot be spread over the ranks.
    """
    steps_per_epoch = len(tokens) // config.batch_size
    if steps_per_epoch == 0:
        raise InputError(f"{len(tokens)} pairs do not fill one batch: lower batch_size={config.batch_size}")
    schedule = []
    for step in range(config.max_steps or config.num_epochs * steps_per_epoch):
        indices = step_indices(len(tokens), config.batch_size, config.seed, step)
        schedule.append((indices, split([tokens[i] for i in indices], ranks, config.micro_batch_tokens)))
    return schedule


def rehearse(model, optimizer, pairs: datasets.Dataset, tokens: list[int], schedule: list, rank: int, device) -> None:
    """Run forward and backward of the micro-batch with the most tokens on one rank, with Adam's state in place, and forget
    the result: memory that will not suffice is missed now and not hours later. Collective.

    tokens, schedule: as in make_schedule. The error gets a note that says what to do, on the ranks that lack memory.
    """

    def cost(shares: list[list[int]]) -> int:
        return max(sum(tokens[i] for i in share) for share in shares)

    every = ([[indices[i] for i in share] for share in shares] for indices, batches in schedule for shares in batches)
    largest = max(every, key=cost)
    checkpoint_tensors(model, optimizer)  # creates Adam's state
    try:
        model(pack_rows(pairs, largest[rank]).to(device)).sum().backward()  # the loss itself takes next to nothing
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error):  # on a GPU, or on CPU
            advice = f"lower --micro_batch_tokens (the longest pair has {max(tokens)}), or set --activation_checkpointing true"
            error.add_note(f"The run's largest micro-batch, {cost(largest)} tokens on a rank, needs too much memory: {advice}.")
        raise
    optimizer.zero_grad()


def learning_rate(step: int, total_steps: int, config: Config) -> float:
    """The learning rate of `step` (counted from 0): linear warm-up from 0, then half a cosine to 0.

    As transformers' get_cosine_schedule_with_warmup, which the authors use.
    """
    warmup = math.ceil(total_steps * config.warmup_ratio)
    if step < warmup:
        return config.learning_rate * step / warmup
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total_steps - warmup)))


# ---- Metrics --------------------------------------------------------------------------------------------------------


def pair_losses(model, batch, loss: Callable) -> tuple[torch.Tensor, torch.Tensor]:
    """The objective of every pair of a MicroBatch, for training and evaluation: (pairs,) float32 losses with gradient, and
    (pairs, 10) float64 METRICS without. `loss` is simper_loss or what else --loss names."""
    logps = model(batch)
    reference = {} if batch.reference is None else {"reference": batch.reference}
    losses = loss(logps, batch.lengths, **reference)
    # Gradient weights: how hard the loss raises the mean log-prob of the chosen and lowers that of the rejected response,
    # −∂loss/∂m_w and ∂loss/∂m_l. Under SimPER these are the two inverse perplexities.
    with torch.enable_grad():
        probe = logps.detach().requires_grad_()
        (slopes,) = torch.autograd.grad(loss(probe, batch.lengths, **reference).sum(), probe)
    with torch.no_grad():
        chosen_weight, rejected_weight = sum_logps(slopes.double(), batch.lengths).unbind(dim=1)
        mean_logps = sum_logps(logps.double(), batch.lengths) / batch.lengths
        correct = mean_logps[:, :1] > mean_logps[:, 1:]
        weights = torch.stack((-chosen_weight, rejected_weight), dim=1)
        return losses, torch.cat((losses[:, None], mean_logps.exp(), mean_logps, correct, batch.lengths, weights), dim=1)


@torch.no_grad()
def evaluate(model, loss: Callable, pairs: datasets.Dataset, reference, micro_batches: list, device) -> torch.Tensor:
    """Sums of METRICS over this rank's share of the pairs: (10,) float64. Collective."""
    sums = torch.zeros(len(METRICS), dtype=torch.float64, device=device)
    for shares in micro_batches:
        batch = pack_rows(pairs, shares[dist.get_rank()], reference).to(device)
        sums += pair_losses(model, batch, loss)[1].sum(dim=0)
    model.reshard()
    return sums


@torch.no_grad()
def reference_logps(model, pairs: datasets.Dataset, micro_batches: list, config: Config, dtype, device) -> torch.Tensor:
    """log p(response | prompt) of every pair under the model as it was loaded: (len(pairs), 2) float32 on CPU, chosen and
    rejected. Collective.

    One forward over the pairs, which rank 0 keeps beside the tokenized pairs: for the same tokens, weights and dtype it is
    read from there.
    """
    rank, file = dist.get_rank(), None
    sums = torch.zeros(len(pairs), 2, dtype=torch.float64, device=device)
    if rank == 0:
        code = inspect.getsource(inspect.getmodule(load_model))  # a fork that edits model.py never meets stale log-probs
        weights = weights_fingerprint(resolve_model(config.model))
        key = (fingerprint(pairs), weights, code, str(dtype), transformers.__version__)
        file = CACHE_DIR / "reference" / f"{hashlib.sha256(repr(key).encode()).hexdigest()[:32]}.npy"
    found = [rank == 0 and file.exists()]
    dist.broadcast_object_list(found, src=0)
    if found[0] and rank == 0:
        sums += torch.from_numpy(np.load(file)).to(device)
    if not found[0]:
        for shares in tqdm(micro_batches, desc="reference", unit="micro-batch", disable=rank > 0, dynamic_ncols=True):
            batch = pack_rows(pairs, shares[rank]).to(device)
            sums[shares[rank]] = sum_logps(model(batch).double(), batch.lengths)
        model.reshard()
    dist.all_reduce(sums)  # every pair is on one rank, and 0 on the others
    if not found[0] and rank == 0:
        file.parent.mkdir(parents=True, exist_ok=True)
        scratch = file.with_name(f"{uuid.uuid4().hex}.npy")
        np.save(scratch, sums.cpu().numpy())
        os.replace(scratch, file)
    return sums.float().cpu()


def reduce(sums: torch.Tensor, num_pairs: int) -> tuple[dict, float]:
    """Sums of METRICS on every rank → ({name: mean over the num_pairs pairs of all ranks}, GB of memory at the peak of
    the rank that took most). One collective."""
    mine = torch.cat((sums, sums.new_tensor([peak_memory(sums.device)])))
    rows = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(rows, mine)
    *totals, _ = torch.stack(rows).sum(dim=0).tolist()
    means = {name: total / num_pairs for name, total in zip(METRICS, totals)}
    means["inverse_perplexity/margin"] = means["inverse_perplexity/chosen"] - means["inverse_perplexity/rejected"]
    return means, max(row[-1].item() for row in rows)


def peak_memory(device: torch.device) -> float:
    """GB that this process had at most: allocated on its GPU, or resident on the host."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


class Logger:
    """Writes metrics to metrics.jsonl and, if wanted, to wandb. Does something on rank 0 only; holds no collective."""

    def __init__(self, config: Config, start: int):
        self.on = dist.get_rank() == 0
        if not self.on:
            return
        self.path = Path(config.output_dir) / "metrics.jsonl"
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        # What an interrupted run logged after the checkpoint is about to happen again.
        kept = [line for line in lines if json.loads(line)["step"] <= start]
        self.path.write_text("".join(line + "\n" for line in kept))
        self.wandb = start_wandb(config)

    def write(self, metrics: dict) -> None:
        """Log one line; `metrics` has the key "step"."""
        if not self.on:
            return
        with open(self.path, "a") as file:
            print(json.dumps(metrics), file=file)
        if self.wandb:
            self.wandb.log(metrics, step=metrics["step"])
        if "eval/accuracy" in metrics:
            chosen, rejected = (metrics[f"eval/inverse_perplexity/{side}"] for side in ("chosen", "rejected"))
            text = f"accuracy {metrics['eval/accuracy']:.3f}, inverse perplexity {chosen:.3f} chosen, {rejected:.3f} rejected"
            tqdm.write(f"held-out pairs after step {metrics['step']}: {text}", file=sys.stderr)

    def summary(self) -> str:
        """The held-out metrics before and after training, as a table; empty without evaluation or on other ranks."""
        if not self.on:
            return ""
        evaluations = [line for line in map(json.loads, self.path.read_text().splitlines()) if "eval/loss" in line]
        if not evaluations:
            return ""
        rows = [f"\n{'held-out pairs':<30}{'before':>9}  → {'after':>8}"]
        for name in ("accuracy", "inverse_perplexity/chosen", "inverse_perplexity/rejected", "loss"):
            before, after = (line[f"eval/{name}"] for line in (evaluations[0], evaluations[-1]))
            rows.append(f"{name:<30}{before:>9.4f}  → {after:>8.4f}")
        return "\n".join(rows)

    def close(self) -> None:
        if self.on and self.wandb:
            self.wandb.finish()


def start_wandb(config: Config):
    """A wandb run, or None. Never asks for anything: without a login, `auto` is off and `online` is an error."""
    if config.wandb == "off":
        return None
    import wandb

    logged_in = config.wandb != "offline" and wandb.login(prompt=False)
    if config.wandb == "online" and not logged_in:
        raise InputError("wandb=online, but nobody is logged in: run `wandb login`, or set --wandb offline or off")
    if config.wandb == "auto" and not logged_in:
        return None
    output = Path(config.output_dir)
    id_file = output / "wandb_run_id"
    if not id_file.exists():
        id_file.write_text(uuid.uuid4().hex)
    mode = "offline" if config.wandb == "offline" else "online"
    return wandb.init(
        project="simper", name=output.name, id=id_file.read_text(), resume="allow", mode=mode, dir=output, config=asdict(config)
    )


# ---- Checkpoints ----------------------------------------------------------------------------------------------------


def prepare_output(config: Config, data_sha256: str) -> tuple[Path | None, dict]:
    """Make output_dir and write config.yaml; find the checkpoint to resume from, if any, and its trainer.json.

    Raises InputError if that checkpoint is of a run with other data or other settings. Collective.
    """
    output = Path(config.output_dir)
    if dist.get_rank() == 0 and config.resume == "never" and output.exists():
        os.rename(output, f"{output}.{datetime.now():%Y%m%d-%H%M%S}")  # set aside: nothing is lost
    dist.barrier()
    if config.resume in ("auto", "never"):
        found = sorted((output / "checkpoints").glob("step_*"), key=lambda folder: folder.stat().st_mtime)
        checkpoint = next((folder for folder in reversed(found) if is_whole(folder)), None)
    else:
        checkpoint = Path(config.resume)
        if not is_whole(checkpoint):
            raise InputError(f"resume={checkpoint}: no whole checkpoint is there")
    state = {"step": 0, "evaluated": False, "config": asdict(config), "data_sha256": data_sha256}
    if checkpoint:
        state = json.loads((checkpoint / "trainer.json").read_text())
        names = [name for name in asdict(config) if name not in FREE_TO_CHANGE]
        pairs = [(name, state["config"].get(name), getattr(config, name)) for name in names]
        changed = [f"{name} was {old}, is {new}" for name, old, new in pairs if old != new]
        if state["data_sha256"] != data_sha256:
            changed.append("the training tokens are others")
        if changed:
            raise InputError(
                f"{checkpoint} is of another run: {'; '.join(changed)}. Use --resume never or another --output_dir."
            )
    if dist.get_rank() == 0:
        output.mkdir(parents=True, exist_ok=True)
        versions = ", ".join(f"{module.__name__} {module.__version__}" for module in (torch, transformers, datasets))
        text = f"# {versions}\n# {dist.get_world_size()} ranks; SHA-256 of the training tokens: {data_sha256}\n"
        (output / "config.yaml").write_text(text + yaml.safe_dump(asdict(config), sort_keys=False))
    dist.barrier()
    return checkpoint, state


def is_whole(folder: Path) -> bool:
    """Whether every file of a checkpoint is there, of the size that it was saved with."""
    if not (folder / "trainer.json").is_file():
        return False
    sizes = json.loads((folder / "trainer.json").read_text())["sizes"]
    return all((folder / name).is_file() and (folder / name).stat().st_size == size for name, size in sizes.items())


def checkpoint_tensors(model, optimizer) -> dict:
    """Parameters and Adam's two moments by name, as they are in the running model, sharded or not; moments start at 0."""
    tensors = {}
    for name, parameter in model.named_parameters():
        state = optimizer.state[parameter]
        if not state:
            state |= {"step": torch.zeros((), dtype=torch.float32, device=parameter.device)}
            state |= {key: torch.zeros_like(parameter) for key in ("exp_avg", "exp_avg_sq")}
        tensors |= {name: parameter, f"exp_avg.{name}": state["exp_avg"], f"exp_avg_sq.{name}": state["exp_avg_sq"]}
    return tensors


def save_checkpoint(model, optimizer, config: Config, state: dict) -> None:
    """Write checkpoints/step_N: sharded safetensors and trainer.json, nothing that is unpickled on loading. Collective.

    The folder gets its name when all ranks have written, so that it is whole or not there.
    """
    folder = Path(config.output_dir) / "checkpoints" / f"step_{state['step']}"
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
        (scratch / "trainer.json").write_text(json.dumps(state | {"config": asdict(config), "sizes": sizes}, indent=1))
        shutil.rmtree(folder, ignore_errors=True)
        os.rename(scratch, folder)
        found = sorted(folder.parent.glob("step_*"), key=lambda other: other.stat().st_mtime)
        for old in found[: -config.keep_checkpoints] if config.keep_checkpoints else []:
            shutil.rmtree(old)
    dist.barrier()


def load_checkpoint(folder: Path, model, optimizer, step: int) -> None:
    """Read a checkpoint taken after `step` steps, by any number of ranks, into model and optimizer. Collective."""
    dcp.load(checkpoint_tensors(model, optimizer), storage_reader=dcp.HuggingFaceStorageReader(str(folder)))
    for state in optimizer.state.values():
        state["step"].fill_(step)


class StopRequest:
    """Notices SIGTERM (a preempted or cancelled job), which may reach the ranks during different steps."""

    def __init__(self):
        self.received = self.requested = False
        signal.signal(signal.SIGTERM, lambda *_: setattr(self, "received", True))

    def agree(self, finite: torch.Tensor, device) -> bool:
        """Set `requested` if any rank received a SIGTERM; return whether `finite` holds on every rank. Collective."""
        problems = torch.stack([~finite, torch.tensor(self.received, device=device)]).int()
        dist.all_reduce(problems, op=dist.ReduceOp.MAX)
        not_finite, self.requested = map(bool, problems.tolist())
        return not not_finite


# ---- Starting -------------------------------------------------------------------------------------------------------


def start_process() -> tuple[int, int, torch.device]:
    """(rank, number of ranks, device) of this process, from torchrun's environment; one process without it."""
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if rank > 0:
        datasets.disable_progress_bars()
        transformers.utils.logging.disable_progress_bar()
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    else:
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        if processes > 1:  # torchrun gives each of them one thread; they can share all cores
            cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
            torch.set_num_threads(max(1, cores // processes))
        libc = ctypes.CDLL(None) if sys.platform == "linux" else None
        if hasattr(libc, "mallopt"):
            # glibc hands large freed buffers back to the kernel, and a sixth of every step went into getting them again.
            libc.mallopt(-4, 0)  # M_MMAP_MAX: none of them is mapped on its own
            libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: the heap never shrinks
        device = torch.device("cpu")
    return rank, ranks, device


def start_group(device: torch.device) -> None:
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if "RANK" in os.environ:
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)


def parse_args(args: list[str]) -> Config:
    """Command line → Config: defaults, then the recipe, then the flags.

    Raises InputError for an unknown name, with the nearest one, and for a value of the wrong kind.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("recipe", nargs="?", default=str(Path(__file__).parent / "recipes" / "demo.yaml"))
    for option in fields(Config):
        text = f"{option.metadata['help']} (default: {option.default})" if option.default != "" else option.metadata["help"]
        parser.add_argument(f"--{option.name}", metavar=option.type.__name__.upper(), help=text.replace("%", "%%"))
    known, unknown = parser.parse_known_args(args)
    if unknown:
        raise InputError(unknown_name(unknown[0].split("=")[0].lstrip("-"), "the command line"))
    recipe = Path(known.recipe)
    if not recipe.is_file():
        raise InputError(f"no recipe {recipe}; those that come along are in recipes/")
    values = yaml.safe_load(recipe.read_text()) or {}
    if not isinstance(values, dict):
        raise InputError(f"{recipe} must hold `name: value` lines")
    for name in values:
        if name not in Config.__dataclass_fields__:
            raise InputError(unknown_name(name, recipe))
    values |= {name: value for name, value in vars(known).items() if name != "recipe" and value is not None}
    config = Config(**{name: convert(name, value) for name, value in values.items()})
    check(config)
    return config


def choose_loss(config: Config) -> tuple[Callable, bool]:
    """(the function of loss.py that `loss` names, with `loss_args` bound to it, whether it needs a reference).

    Raises InputError, with the right names, for an unknown loss or argument, and for a value that is not a finite number.
    """
    if config.loss not in LOSSES:
        raise InputError(f"loss: there is no '{config.loss}'; loss.py has {', '.join(LOSSES)}")
    parameters = inspect.signature(LOSSES[config.loss]).parameters
    known = {name: entry.default for name, entry in parameters.items() if entry.default is not entry.empty}
    takes = ", ".join(f"{name}={default}" for name, default in known.items()) or "none"
    arguments = {}
    for text in filter(None, config.loss_args.replace(" ", "").split(",")):
        name, _, value = text.partition("=")
        if name not in known:
            raise InputError(f"loss_args: the loss {config.loss} has no argument '{name}'; its arguments: {takes}")
        try:
            arguments[name] = float(value)
        except ValueError:
            arguments[name] = math.nan
        if not math.isfinite(arguments[name]):
            raise InputError(f"loss_args: {name} must be a number, as in {takes}, not '{value}'")
    return functools.partial(LOSSES[config.loss], **arguments), "reference" in parameters


def unknown_name(name: str, place) -> str:
    near = difflib.get_close_matches(str(name), Config.__dataclass_fields__, n=1, cutoff=0.5)
    return f"{place}: there is no option '{name}'" + (f"; did you mean '{near[0]}'?" if near else "; see --help")


def convert(name: str, value):
    """A value of the recipe or the command line as its field's type (YAML reads 3e-7 as text)."""
    kind = Config.__dataclass_fields__[name].type
    try:
        if kind is bool:
            return {"true": True, "false": False}[str(value).lower()]
        return kind(str(value))
    except (KeyError, ValueError):
        raise InputError(
            f"{name}: {value!r} is not {'true or false' if kind is bool else f'a valid {kind.__name__}'}"
        ) from None


def check(config: Config) -> None:
    """Raise InputError for a value that makes no sense, whatever the data."""
    for name in ("model", "train_data", "output_dir"):
        if not getattr(config, name):
            raise InputError(f"{name} is needed: give --{name}, or set it in the recipe")
    for name in ("batch_size", "num_epochs", "log_every", "micro_batch_tokens", "replicas", "learning_rate", "max_grad_norm"):
        if not getattr(config, name) > 0:
            raise InputError(f"{name} must be positive, not {getattr(config, name)}")
    for name in ("max_steps", "eval_every", "save_every", "keep_checkpoints"):
        if getattr(config, name) < 0:
            raise InputError(f"{name} must not be negative, not {getattr(config, name)}")
    if not 0 <= config.warmup_ratio <= 1:
        raise InputError(f"warmup_ratio must be between 0 and 1, not {config.warmup_ratio}")
    if config.dtype not in ("auto", "float32", "bfloat16"):
        raise InputError(f"dtype must be auto, float32 or bfloat16, not {config.dtype}")
    if config.wandb not in ("auto", "online", "offline", "off"):
        raise InputError(f"wandb must be auto, online, offline or off, not {config.wandb}")
    if not 0 < config.max_prompt_length < config.max_length:
        raise InputError(f"max_prompt_length={config.max_prompt_length} must be below max_length={config.max_length}")


def main() -> None:
    try:
        train(parse_args(sys.argv[1:]))
    except InputError as error:
        # Every rank meets the same error; one of them reports it.
        sys.exit(f"error: {error}" if int(os.environ.get("RANK", 0)) == 0 else 1)


if __name__ == "__main__":
    main()
