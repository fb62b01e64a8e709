"""Train a language model on preference pairs with SimPER.

    python train.py                                  # the demo: a small model, on a laptop
    torchrun --nproc_per_node 2 train.py             # the same with two processes
    torchrun --nproc_per_node 8 train.py recipes/llama-3-8b-instruct.yaml  # a set-up of the paper
    python train.py recipes/demo.yaml --learning_rate 1e-5 --output_dir runs/demo-1e-5

Every field of Config is a flag. A value that is not on the command line comes from the recipe
(without one, the demo's), then from Config's defaults.
"""

import inspect
import math
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from datasets import Dataset
from torch.distributed.tensor import DTensor
from tqdm import tqdm

import runtime
from data import (
    InputError,
    MicroBatch,
    fingerprint,
    load_pairs,
    load_tokenizer,
    longest_sequence,
    pack_rows,
    pair_lengths,
    spread_pairs,
    step_indices,
    tokenizer_digests,
)
from demo.smollm2 import resolve_model
from loss import LOSSES, simper_loss, sum_logps
from model import check_model, export, load_model, reference_logps


def option(default, help: str):
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class Config:
    model: str = option("", "hub id or folder of the model to start from; 'demo' is the demo's")
    chat_template: str = option("", "file of a chat template in place of the tokenizer's own")
    train_data: str = option("", "FILE, FOLDER or hub NAME[[:CONFIG]:SPLIT], comma-separated")
    eval_data: str = option("", "the same for the held-out pairs; empty: no evaluation")
    output_dir: str = option("", "folder of config.yaml, metrics.jsonl, checkpoints/, final/")
    loss: str = option("simper", f"the objective, a function of loss.py: {', '.join(LOSSES)}")
    loss_args: str = option("", "its hyperparameters, as in beta=2.5,gamma=0.5; simper has none")
    batch_size: int = option(128, "pairs per optimizer step, over all ranks together")
    learning_rate: float = option(1e-6, "peak learning rate of AdamW")
    warmup_ratio: float = option(0.1, "share of steps with a linear warm-up; then a cosine to 0")
    max_grad_norm: float = option(1.0, "gradients are clipped to this global norm")
    num_epochs: int = option(1, "passes over the training pairs")
    max_steps: int = option(0, "optimizer steps; 0: as many as num_epochs takes")
    max_length: int = option(2048, "tokens of prompt + response above which a pair is truncated")
    max_prompt_length: int = option(1800, "tokens at the end of the prompt that truncation keeps")
    micro_batch_tokens: int = option(8192, "tokens in a forward, prompts once; sets the memory")
    seed: int = option(42, "decides the order of the pairs")
    dtype: str = option("auto", "float32, bfloat16, or auto: bfloat16 on GPUs, float32 on CPU")
    activation_checkpointing: bool = option(False, "recompute blocks in backward: saves memory")
    compile: bool = option(False, "torch.compile every transformer block")
    replicas: int = option(1, "copies of the sharded model (HSDP); must divide the ranks")
    eval_every: int = option(100, "steps between evaluations; 0: only before and after training")
    save_every: int = option(100, "steps between checkpoints; 0: only when stopped by SIGTERM")
    keep_checkpoints: int = option(1, "newest checkpoints to keep; 0: all")
    log_every: int = option(1, "steps per line of metrics; fewer before a save or evaluation")
    resume: str = option("auto", "auto: newest checkpoint; anyway: despite changes; never; PATH")
    wandb: str = option("auto", "online, offline, off, or auto: online if logged in, otherwise off")


def train(config: Config) -> None:
    """One run, from the data to the exported model. Collective: every rank calls it."""
    rank, ranks, device = runtime.start_process()
    print_once = print if rank == 0 else lambda *args: None
    output = Path(config.output_dir)
    if config.resume != "never" and (output / "final").exists():
        print_once(f"{output} holds a finished run (final/). To train again: --resume never")
        return

    # ---- Data. Whatever is wrong with the input is found before a model is loaded.
    loss_function = simper_loss
    if config.loss != "simper" or config.loss_args:
        loss_function = runtime.choose_loss(config.loss, config.loss_args)
    source = resolve_model(config.model)
    tokenizer = load_tokenizer(source, config.chat_template)
    limits = {"max_length": config.max_length, "max_prompt_length": config.max_prompt_length}
    pairs, report = load_pairs(config.train_data, tokenizer, **limits)
    print_once(f"training: {report}")
    pair_tokens = pair_lengths(pairs).sum(axis=1)  # of each pair, its prompt counted once
    schedule, budget = make_schedule(config, pair_tokens, ranks), config.micro_batch_tokens
    heldout, heldout_schedule, data_sets = None, [], [pairs]
    if config.eval_data:
        heldout, report = load_pairs(config.eval_data, tokenizer, **limits)
        print_once(f"held out: {report}")
        heldout_tokens = pair_lengths(heldout).sum(axis=1)
        try:
            heldout_schedule = spread_pairs(range(len(heldout)), heldout_tokens, ranks, budget)
        except InputError as error:
            raise InputError(f"eval_data: {error}") from None
        data_sets.append(heldout)
    digests = tokenizer_digests(tokenizer) | {"training tokens": fingerprint(pairs)}
    digests["held-out tokens"] = fingerprint(heldout) if heldout else ""
    digests["model files"] = check_model(source, config.max_length, data_sets)
    dtype = config.dtype.replace("auto", "bfloat16" if device.type == "cuda" else "float32")
    digests["dtype in use"], dtype = dtype, getattr(torch, dtype)
    steps_per_epoch, left_out = divmod(len(pairs), config.batch_size)
    print_once(f"{len(schedule)} steps; {left_out} pairs per epoch fill no batch and are left out")

    # ---- Model and optimizer
    runtime.start_group(device)
    checkpoint, state = runtime.find_checkpoint(config, digests)
    log = runtime.Logger(config, state)
    model = load_model(
        source,
        device.type,
        dtype,
        replicas=config.replicas,
        activation_checkpointing=config.activation_checkpointing,
        compile=config.compile,
        longest=max(map(longest_sequence, data_sets)),
    )
    optimizer = torch.optim.AdamW(
        model.parameters(), betas=(0.9, 0.999), weight_decay=0.0, fused=True
    )
    rehearse(model, optimizer, pairs, schedule, device)
    reference = heldout_reference = None
    if "reference" in inspect.signature(loss_function).parameters:
        # Before a checkpoint is loaded: the model is still the one that training starts from.
        micro_batches = spread_pairs(range(len(pairs)), pair_tokens, ranks, budget)
        reference = reference_logps(model, source, pairs, micro_batches, dtype)
        if heldout:
            heldout_reference = reference_logps(model, source, heldout, heldout_schedule, dtype)
    heldout_batches = [pack_rows(heldout, s[rank], heldout_reference) for s in heldout_schedule]
    if checkpoint:
        began = time.perf_counter()
        runtime.load_checkpoint(checkpoint, model, optimizer, state["step"])
        print_once(f"resuming from {checkpoint}, read in {time.perf_counter() - began:.0f} s")

    # ---- Training
    start, last = state["step"], len(schedule)

    def pack_step(step: int) -> list[MicroBatch]:
        """This rank's micro-batches of a step (counted from 1), on CPU; none after the last."""
        micro_batches = schedule[step - 1] if step <= last else []
        return [pack_rows(pairs, shares[rank], reference) for shares in micro_batches]

    evaluate_at = {last, *range(0, last, config.eval_every or last)} if heldout else set()
    new_heldout = start > 0 and heldout and not state["heldout_unchanged"]
    sigterm, stop = runtime.watch_sigterm(), False
    if new_heldout or (start in evaluate_at and not state["evaluated"]):
        if means := evaluate(model, loss_function, heldout_batches, device, sigterm):
            log.write({"step": start} | means)
        stop = not means
    progress = tqdm(desc="SimPER", total=last, initial=start, unit="step", disable=rank > 0)
    metrics_since_log, tokens_since_log, seconds_since_log, logged = [], 0, 0.0, start
    batches = pack_step(start + 1)
    for step in range(start + 1, last + 1):  # schedule, learning_rate and step_indices begin at 0
        if stop:
            break
        began = time.perf_counter()
        optimizer.param_groups[0]["lr"] = learning_rate(step - 1, last, config)
        for number, batch in enumerate(batches, 1):
            if config.replicas > 1:  # FSDP's method: replicas exchange a step's gradient once
                model.set_requires_all_reduce(number == len(batches))
            batch = batch.to(device)
            logps = model(batch)  # (R,) float32: the log-prob of each of R response tokens
            logps.retain_grad()  # for the metrics
            losses = loss_function(logps, batch.lengths, *batch.reference)  # (pairs,)
            # The mean over the batch. FSDP averages gradients over ranks, so times their number.
            (losses.sum() * ranks / config.batch_size).backward()
            grads = logps.grad * config.batch_size / ranks  # ∂(the pair's loss) / ∂logps
            metrics_since_log.append(pair_metrics(logps, losses, grads, batch))
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        batches = pack_step(step + 1)  # before the host waits for the GPU
        memory = runtime.peak_memory(device)
        norm, stop, memory = runtime.max_over_ranks(device, norm, sigterm.is_set(), memory)
        indices = step_indices(len(pairs), config.batch_size, config.seed, step - 1)
        if not math.isfinite(norm):
            places = ", ".join(f"{pairs[i]['source']} row {pairs[i]['row']}" for i in indices)
            raise FloatingPointError(f"step {step}: gradient of norm {norm}. Its pairs: {places}")
        optimizer.step()
        optimizer.zero_grad()
        saves = config.save_every and (step == last or step % config.save_every == 0)
        # Also before a checkpoint or an evaluation: a resumed run begins a new line there.
        logs = stop or saves or step == last or step in evaluate_at or step % config.log_every == 0
        means = mean_over_ranks(metrics_since_log) if logs else {}  # waits for the optimizer, too
        seconds_since_log += time.perf_counter() - began
        tokens_since_log += pair_tokens[indices].sum()
        if logs:
            line = {"step": step, "epoch": step / steps_per_epoch} | means
            line |= {"grad_norm": norm, "learning_rate": optimizer.param_groups[0]["lr"]}
            line["pairs_per_second"] = (step - logged) * config.batch_size / seconds_since_log
            line["tokens_per_second"] = tokens_since_log / seconds_since_log
            line["peak_memory_gb"] = memory
            log.write(line)
            progress.set_postfix({name: f"{means[name]:.3f}" for name in ("loss", "accuracy")})
            metrics_since_log, tokens_since_log, seconds_since_log, logged = [], 0, 0.0, step
        state |= {"step": step, "evaluated": False}
        if step in evaluate_at and not stop:
            if means := evaluate(model, loss_function, heldout_batches, device, sigterm):
                log.write({"step": step} | means)
            state["evaluated"], stop = bool(means), not means
        if saves or stop:
            runtime.save_checkpoint(model, optimizer, config, state)
        progress.update()
    progress.close()

    if not stop:
        export(model, source, tokenizer, output / "final", dtype)
    table = log.close()
    dist.destroy_process_group()
    if stop:
        print_once(f"stopped by SIGTERM after step {state['step']}; --resume auto continues there")
        sys.exit(128 + signal.SIGTERM)  # for torchrun and schedulers: this was not the end
    print_once(f"{table}The trained model is in {output / 'final'}")


# ---- The schedule --------------------------------------------------------------------------------


def make_schedule(config: Config, pair_tokens: np.ndarray, ranks: int) -> list:
    """What every step does: result[step][m][rank] are the indices of the pairs in the rank's
    micro-batch m. pair_tokens: (pairs,) tokens of each pair, its prompt once. Raises
    InputError if a step cannot be spread over the ranks."""
    count, size = len(pair_tokens), config.batch_size
    if count < size:
        raise InputError(f"{count} pairs do not fill one batch: lower batch_size={size}")
    steps = range(config.max_steps or config.num_epochs * (count // size))
    indices = (step_indices(count, size, config.seed, step) for step in steps)
    return [spread_pairs(i, pair_tokens, ranks, config.micro_batch_tokens) for i in indices]


def learning_rate(step: int, total_steps: int, config: Config) -> float:
    """The learning rate of `step` (counted from 0): linear warm-up from 0, then half a cosine to 0,
    as transformers' get_cosine_schedule_with_warmup, which the authors use."""
    warmup = math.ceil(total_steps * config.warmup_ratio)
    if step < warmup:
        return config.learning_rate * step / warmup
    progress = (step - warmup) / max(1, total_steps - warmup)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


def rehearse(model, optimizer, pairs: Dataset, schedule: list, device) -> None:
    """Run forward and backward of the micro-batches with the most tokens (for the blocks' memory)
    and the most response tokens (for the head's) on one rank, Adam's state in place, and forget the
    result: a run that does not fit fails now, with a note, and not hours later. Collective."""
    lengths = pair_lengths(pairs)
    pair_tokens, response_tokens = lengths.sum(axis=1), lengths[:, 1:].sum(axis=1)
    micro_batches = [shares for step in schedule for shares in step]

    def largest(tokens: np.ndarray) -> int:
        costs = [max(tokens[share].sum() for share in shares) for shares in micro_batches]
        return costs.index(max(costs))

    runtime.checkpoint_tensors(model, optimizer)  # for its side effect: Adam's state, as zeros
    if len(micro_batches) > len(schedule):  # there are gradients of earlier micro-batches
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
    try:
        for number in {largest(pair_tokens), largest(response_tokens)}:
            shares = micro_batches[number]
            model(pack_rows(pairs, shares[dist.get_rank()]).to(device)).sum().backward()
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error):
            tokens = max(pair_tokens[share].sum() for share in shares)
            error.add_note(
                f"The run's largest micro-batch, {tokens} tokens on a rank, needs too much memory: "
                f"lower --micro_batch_tokens (the longest pair has {pair_tokens.max()}), or set "
                "--activation_checkpointing true."
            )
        raise
    optimizer.zero_grad()


# ---- Metrics -------------------------------------------------------------------------------------


@torch.no_grad()
def pair_metrics(logps, losses, grads, batch: MicroBatch) -> dict[str, torch.Tensor]:
    """What is logged of each pair of a MicroBatch: {name: (pairs,)}. A new metric is one line here.

    logps: (R,) log-probs of the response tokens; losses: (pairs,); grads: (R,) ∂loss/∂logps.
    """
    mean_logps = sum_logps(logps.double(), batch.lengths) / batch.lengths
    chosen, rejected = mean_logps.unbind(dim=1)
    chosen_grad, rejected_grad = sum_logps(grads.double(), batch.lengths).unbind(dim=1)
    return {
        "loss": losses.detach(),
        "inverse_perplexity/chosen": chosen.exp(),
        "inverse_perplexity/rejected": rejected.exp(),
        "inverse_perplexity/margin": chosen.exp() - rejected.exp(),
        "logps/chosen": chosen,
        "logps/rejected": rejected,
        "accuracy": chosen > rejected,
        "length/chosen": batch.lengths[:, 0],
        "length/rejected": batch.lengths[:, 1],
        # How hard the loss raises the chosen and lowers the rejected response's mean log-prob:
        # −∂loss/∂m_w and ∂loss/∂m_l. Under SimPER these are the two inverse perplexities.
        "gradient_weight/chosen": -chosen_grad,
        "gradient_weight/rejected": rejected_grad,
    }


def mean_over_ranks(rows: list[dict[str, torch.Tensor]]) -> dict[str, float]:
    """pair_metrics of this rank's micro-batches → the means over the pairs of all ranks, which may
    have different numbers of them. Collective."""
    table = torch.stack([torch.cat([row[name] for row in rows]).double() for name in rows[0]])
    sums = torch.cat([table, torch.ones_like(table[:1])]).sum(dim=1)  # and the number of pairs
    dist.all_reduce(sums)
    *totals, count = sums.tolist()
    return {name: total / count for name, total in zip(rows[0], totals)}


@torch.no_grad()
def evaluate(model, loss_function: Callable, batches: list, device, sigterm) -> dict[str, float]:
    """{"eval/NAME": mean over the held-out pairs of all ranks}, or {} as soon as one rank has
    received SIGTERM. batches: this rank's MicroBatches, on CPU; sigterm: see runtime.watch_sigterm.
    Collective."""
    rows, stop = [], False
    for batch in batches:
        if stop := any(runtime.max_over_ranks(device, sigterm.is_set())):
            break
        batch = batch.to(device)
        logps = model(batch).requires_grad_()  # no gradient beyond them, which the metrics need
        with torch.enable_grad():
            losses = loss_function(logps, batch.lengths, *batch.reference)
            losses.sum().backward()
        rows.append(pair_metrics(logps, losses, logps.grad, batch))
    model.reshard()  # after forwards without a backward, whose parameters stay gathered
    return {} if stop else {f"eval/{name}": mean for name, mean in mean_over_ranks(rows).items()}


def parse_args(args: list[str]) -> Config:
    return runtime.parse_args(Config, args, description=__doc__)


if __name__ == "__main__":
    runtime.run_command(lambda: train(parse_args(sys.argv[1:])))
