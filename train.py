"""Train a language model on preference pairs with SimPER.

    python train.py                                  # the demo: a small model, on a laptop
    torchrun --nproc_per_node 2 train.py             # the same with two processes
    torchrun --nproc_per_node 8 train.py recipes/llama-3-8b-instruct.yaml  # a set-up of the paper
    python train.py recipes/demo.yaml --learning_rate 1e-5 --output_dir runs/demo-1e-5

Every field of Config is a flag. A value that is not on the command line comes from the recipe, then
from Config's defaults. With no recipe, no --model and no --train_data, the demo's recipe is used.
"""

import functools
import math
import signal
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from data import DataSet, MicroBatch, Schedule, load_data, overlaps
from loss import LOSSES, sum_logps
from model import PackedModel, compile_blocks, export, load_model
from runtime import command_line, processes
from runtime.card import model_card
from runtime.checkpoints import Start, TrainerState, find_start, read_state
from runtime.checks import check_loss, check_trainable, choose_forward, commits, digests
from runtime.command_line import choose_loss
from runtime.errors import InputError
from runtime.intervals import FEW
from runtime.log import Logger
from runtime.processes import Stopped, say
from runtime.reference import add_reference
from runtime.rehearsal import gathered_fits, rehearse, tokens_that_fit
from runtime.streaming import stream
from runtime.weights import load_tokenizer, resolve_model


def option(default, help: str):
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class Config:
    model: str = option("", "folder or hub ID[@REVISION] to start from; 'demo' is the demo's model")
    chat_template: str = option("", "file of a chat template in place of the tokenizer's own")
    template_args: str = option("", "variables of the chat template, as in enable_thinking=false")
    train_data: str = option(
        "",
        "FILE, FOLDER or hub ID[@REVISION][[:CONFIG]:SPLIT], each with [:SHARE]; or several, "
        "with commas",
    )
    eval_data: str = option("", "the same for the held-out pairs; empty: no evaluation")
    columns: str = option(
        "", "other names, as in prompt=question,chosen=good; NAME= leaves one out"
    )
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
    max_prompt_length: int = option(1800, "most tokens of a prompt in such a pair")
    truncation: str = option("fit", "fit: oldest turns, then both ends; paper: its rule; or drop")
    micro_batch_tokens: int = option(
        0, "most tokens per forward, each prompt once; 0: what fits the GPU, 8192 on CPUs"
    )
    seed: int = option(42, "decides the order of the pairs")
    dtype: str = option("auto", "float32, bfloat16, or auto: bfloat16 on GPUs, float32 on CPU")
    activation_checkpointing: str = option(
        "false", "recompute in backward: true (blocks), selective (not their products), or false"
    )
    compile: bool = option(False, "torch.compile every transformer block")
    stream_optimizer: bool = option(
        False,
        "float32 weights and moments in host memory: one GPU keeps 6 of 18 bytes per parameter",
    )
    replicas: int = option(1, "copies of the sharded model (HSDP); must divide the ranks")
    eval_every: int = option(100, "steps between evaluations; 0: only before and after training")
    save_every: int = option(100, "steps between checkpoints; 0: only when a signal stops the run")
    keep_checkpoints: int = option(1, "newest checkpoints to keep; 0: all")
    log_every: int = option(1, "steps per line of metrics; saves and evaluations also end a line")
    resume: str = option("auto", "auto: newest checkpoint; anyway: despite changes; or never")
    wandb: str = option(
        "auto", "online, offline, off, trackio, or auto: online if logged in, or off"
    )


def train(config: Config) -> None:
    """One run, from the data to the exported model. Collective: every rank calls it."""
    rank, ranks, device = processes.start_process()

    # ---- Data and files. Whatever is wrong with them is found before a model is loaded.
    loss_function, asked = choose_loss(config.loss, config.loss_args)  # simper_loss, by default
    source = resolve_model(config.model)
    tokenizer = load_tokenizer(source, config.chat_template, config.template_args)
    data, heldout = load_data_sets(config, tokenizer, loss_function, asked, ranks)
    dtype = processes.choose_dtype(config.dtype, device)
    made_of = digests(config, source, tokenizer, dtype, data, heldout)

    # ---- Model and optimizer
    processes.start_group(device)
    start = find_start(config, made_of, len(data.schedule))
    if start.finished:
        dist.destroy_process_group()
        return
    log = Logger(config, start, made_of | commits(config, source))
    torch.manual_seed(config.seed % 2**63)  # for the first values of what surgery() adds
    how = (config.replicas, config.activation_checkpointing, config.stream_optimizer)
    model = load_model(source, device, dtype, *how)
    weights = model.optimized().values()
    optimizer = torch.optim.AdamW(weights, lr=config.learning_rate, weight_decay=0.0, fused=True)
    if config.stream_optimizer:
        stream(optimizer)
    check_trainable(model, optimizer, source)
    config = prepare(config, start, log, model, data, heldout)
    if "reference" in asked:  # the model is still the one that training starts from
        add_reference(model, data, heldout, config, made_of)
    state = TrainerState(config, made_of, model, optimizer, start)

    # ---- Training
    last, stop = len(data.schedule), 0
    due = functools.partial(evaluation_is_due, config, start, last)
    meter, signals = None, processes.watch_signals()
    batches = data.batches(start.step, rank)
    try:
        for step in log.steps(start.step, last):  # step: how many have been taken
            if stop:
                raise Stopped(stop)
            if due(step):
                log.write(*evaluate(model, loss_function, heldout, step, device, signals))
            if step == last:
                break
            meter = meter or Meter()
            set_learning_rate(optimizer, share_of_peak(step, last, config.warmup_ratio))
            # A pair's weight in the step's mean. FSDP averages over ranks, so times their number.
            pair_weight = ranks / len(data.indices(step))
            for batch in batches:
                model.begin_micro_batch(last=batch is batches[-1])
                batch = batch.to(device)
                logps = model(batch)  # (R,) float32: the log-prob of each of R response tokens
                logps.retain_grad()  # for the metrics
                losses = loss_function(logps, batch.lengths, **batch.columns)  # (pairs,)
                (losses.sum() * pair_weight).backward()
                meter.rows.append(pair_metrics(logps, losses, logps.grad / pair_weight, batch))
            metrics = gradient_metrics(model)
            clip_grads_with_norm_(weights, config.max_grad_norm, metrics["grad_norm"])
            batches = data.batches(step + 1, rank)  # before the host waits for the GPU
            metrics |= {"stop": signals()} | processes.peak_memory(device)
            sums = sums_over_ranks(meter.rows)
            # The step's one wait for the GPU.
            most, sums = processes.max_over_ranks(device, *metrics.values(), beside=sums)
            metrics = dict(zip(metrics, most))
            stop = metrics.pop("stop")
            check_finite(metrics["grad_norm"], step, data)
            optimizer.step()
            optimizer.zero_grad()
            model.refresh()
            if step == start.step:
                state.entries()  # whatever could not be saved is refused now
            done = step + 1
            saves = config.save_every and (done == last or done % config.save_every == 0)
            # A line also ends before a checkpoint or an evaluation: a run resumed there begins one.
            ends = stop or saves or done == last or due(done)
            if ends:  # the optimizer's work counts as this step's time, what follows does not
                processes.wait_for(device)
            meter.tokens += int(data.tokens[data.indices(step)].sum())
            if ends or done % config.log_every == 0:
                line = {"step": done, "epoch": done / (len(data.rows) // config.batch_size)}
                line["learning_rate"] = optimizer.param_groups[0]["lr"]
                log.write(line | means_of(meter.rows[0], sums) | metrics | meter.speed(sums[-1]))
                meter = None
            if saves:
                state.save(done)
        card = model_card(Path(config.output_dir), source, bool(tokenizer.chat_template), last)
        export(model, source, tokenizer, Path(config.output_dir) / "final", card)
    except Stopped as reason:
        state.save(step)
        stop = int(*reason.args)
    table = log.close()
    dist.destroy_process_group()
    if stop:
        say(f"stopped by {signal.Signals(stop).name} after step {step}; rerun to resume there")
        sys.exit(128 + stop)  # for torchrun and schedulers: this was not the end
    say(f"{table}The trained model is in {Path(config.output_dir) / 'final'}")


def load_data_sets(
    config: Config, tokenizer, loss_function: Callable, asked: list[str], ranks: int
) -> tuple[DataSet, DataSet | None]:
    """The training and, if there is eval_data, the held-out pairs, with their schedules. asked: see
    choose_loss. Raises InputError if rows are wrong, do not fit the loss, or cannot be spread over
    the ranks."""
    numbers = [name for name in asked if name != "reference"]
    how = (tokenizer, config.max_length, config.max_prompt_length, numbers, config.columns)
    how += (config.truncation,)
    data, heldout = load_data(config.train_data, *how), None
    say(f"training: {data.report}")
    if config.eval_data:
        heldout = load_data(config.eval_data, *how)
        say(f"held out: {heldout.report}")
    make_schedules(config, data, heldout, ranks)
    steps, left_out = len(data.schedule), len(data.rows) % config.batch_size
    say(f"{steps} steps; {left_out} pairs per epoch fill no batch and are left out")
    say(overlaps(data, heldout))
    check_loss(loss_function, asked, data, heldout)
    if steps == 1 and share_of_peak(0, 1, config.warmup_ratio) == 0:  # it warms up
        raise InputError("the learning rate of the only step is 0: set warmup_ratio=0")
    return data, heldout


def prepare(
    config: Config, start: Start, log: Logger, model: PackedModel, data: DataSet, heldout
) -> Config:
    """Choose how rows are computed, spread them over micro-batches, compile, and rehearse: whatever
    does not fit or does not work is found before the first step. Collective.

    Returns the config with the micro_batch_tokens in use, if it has none: those of the resumed
    run, so that it stays bitwise identical, or as many as fit.
    """
    device = next(model.parameters()).device
    choose_forward(model, data, heldout)
    if model.masters is not None:
        masters = "on the host" if config.stream_optimizer else "in place of FSDP"
        log.note("weights", f"one process, float32 masters {masters}")
    if not config.micro_batch_tokens:
        if gathered_fits(model, device):
            model.keep_gathered()
            log.note("weights", "gathered once a step")
        if start.checkpoint and not start.other:
            tokens = read_state(start.checkpoint)["config"]["micro_batch_tokens"]
        else:
            tokens = tokens_that_fit(model, data, device, config.batch_size)
        tokens = max(tokens, int(heldout.costs.max()) if heldout else 0)
        log.note("micro_batch_tokens in use", tokens)
        config = replace(config, micro_batch_tokens=tokens)
    make_schedules(config, data, heldout, dist.get_world_size())
    if config.compile:
        compile_blocks(model)
    rehearse(model, data, device)
    return config


def make_schedules(config: Config, data: DataSet, heldout: DataSet | None, ranks: int) -> None:
    """Spread the rows of every step of training, and all held-out ones; while micro_batch_tokens is
    still to be chosen, by a provisional size. Raises InputError if they cannot be spread over the
    ranks."""
    longest = max(rows.costs.max() for rows in (data, heldout) if rows)
    tokens = config.micro_batch_tokens or max(8192, int(longest))
    config = replace(config, micro_batch_tokens=tokens)
    data.schedule = Schedule(data.costs, config, ranks, data.separate)
    if heldout:
        everything = range(len(heldout.rows))
        try:
            heldout.schedule = [heldout.spread(everything, ranks, config.micro_batch_tokens)]
        except InputError as error:
            raise InputError(f"eval_data: {error}") from None


def check_finite(norm: float, step: int, data: DataSet) -> None:
    """Raises FloatingPointError, naming the step's pairs, if its gradient's norm is not finite."""
    if not math.isfinite(norm):
        places = ", ".join(map(data.place, data.indices(step)))
        raise FloatingPointError(f"step {step + 1}: gradient norm {norm}. Pairs: {places}")


def evaluation_is_due(config: Config, start: Start, last: int, step: int) -> bool:
    """Whether held-out pairs, if there are any, are evaluated after `step` of the `last` steps.
    Changed curves begin with an evaluation, and one that metrics.jsonl has is not made again."""
    if not config.eval_data:
        return False
    if step == start.step and (start.changed or start.evaluated):
        return start.changed
    return step == last or step % (config.eval_every or last) == 0


def share_of_peak(step: int, last: int, warmup_ratio: float) -> float:
    """The learning rate of `step` (counted from 0) of `last` steps, as a share of its peak: linear
    warm-up from 0, then half a cosine to 0, as transformers' get_cosine_schedule_with_warmup, which
    the authors use."""
    warmup = math.ceil(last * warmup_ratio)
    if step < warmup:
        return step / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, last - warmup)))


def set_learning_rate(optimizer, share: float) -> None:
    """Set the rate of every group of parameters to `share` of the one that it was made with."""
    for group in optimizer.param_groups:
        group["lr"] = share * group.setdefault("initial_lr", group["lr"])


# ---- Metrics -------------------------------------------------------------------------------------


@torch.no_grad()
def pair_metrics(logps, losses, grads, batch: MicroBatch) -> dict[str, torch.Tensor]:
    """What is logged of each pair of a MicroBatch: {name: (pairs,)}. A new metric is one line here.

    logps: (R,) log-probs of the response tokens; losses: (pairs,); grads: (R,) ∂loss/∂logps. Of
    K responses, chosen is the first, and rejected the mean of the others.
    """
    sums = sum_logps(logps.double(), batch.lengths)  # (pairs, K)
    mean_logps = sums / batch.lengths
    chosen, rejected = mean_logps[:, 0], mean_logps[:, 1:]  # (pairs,), (pairs, K - 1)
    # How hard the loss raises the chosen and lowers the rejected response's mean log-prob:
    # −∂loss/∂m_w and ∂loss/∂m_l. Under SimPER these are the two inverse perplexities.
    weights = sum_logps(grads.double(), batch.lengths)
    metrics = {
        "loss": losses.detach(),
        "inverse_perplexity/chosen": chosen.exp(),
        "logps/chosen": chosen,
        "length/chosen": batch.lengths[:, 0],
        "gradient_weight/chosen": -weights[:, 0],
    }
    if rejected.shape[1] > 0:
        metrics |= {
            "inverse_perplexity/rejected": rejected.exp().mean(dim=1),
            "inverse_perplexity/margin": chosen.exp() - rejected.exp().mean(dim=1),
            "logps/rejected": rejected.mean(dim=1),
            "logps/margin": chosen - rejected.mean(dim=1),
            "accuracy": (chosen[:, None] > rejected).double().mean(dim=1),
            "length/rejected": batch.lengths[:, 1:].double().mean(dim=1),
            "gradient_weight/rejected": weights[:, 1:].mean(dim=1),
        }
    return metrics


def gradient_metrics(model: PackedModel) -> dict[str, torch.Tensor]:
    """What is logged of a step's gradient, before it is clipped: {name: () tensor}, the same on
    every rank. A new metric is one line here. Collective."""
    return {"grad_norm": total_norm(model.optimized().values())}


def total_norm(parameters) -> torch.Tensor:
    """The norm of the gradients of parameters of model.optimized(), over all ranks. Collective.
    Raises ValueError if none of them has a gradient."""
    parameters = [*parameters]
    gradients = [p.grad for p in parameters if p.grad is not None]
    if parameters and not gradients:
        raise ValueError("parameters without a gradient: take those of model.optimized()")
    norm = get_total_norm(gradients)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def sums_over_ranks(rows: list[dict[str, torch.Tensor]]) -> torch.Tensor:
    """pair_metrics of this rank's micro-batches → (metrics + 1,) float64: the sums over the pairs
    of all ranks, which may have different numbers of them, and their number. Collective."""
    table = torch.stack([torch.cat([row[name] for row in rows]).double() for name in rows[0]])
    sums = torch.cat([table, torch.ones_like(table[:1])]).sum(dim=1)
    dist.all_reduce(sums)
    return sums


def means_of(names: Iterable[str], sums: list[float]) -> dict[str, float]:
    """{name: mean} of sums_over_ranks. Raises FloatingPointError if one is not finite."""
    *totals, count = sums
    means = {name: total / count for name, total in zip(names, totals, strict=True)}
    if strange := [name for name, mean in means.items() if not math.isfinite(mean)]:
        raise FloatingPointError(f"the mean of {strange[0]} is {means[strange[0]]}")
    return means


@dataclass
class Meter:
    """What has been measured since the last line of metrics. (Neither an evaluation nor a
    checkpoint lies between: a line ends before each.)"""

    rows: list[dict[str, torch.Tensor]] = field(default_factory=list)  # of pair_metrics
    tokens: int = 0
    began: float = field(default_factory=lambda: time.perf_counter())

    def speed(self, pairs: float) -> dict[str, float]:
        seconds = time.perf_counter() - self.began
        return {"pairs_per_second": pairs / seconds, "tokens_per_second": self.tokens / seconds}


@torch.no_grad()
def evaluate(
    model, loss_function: Callable, heldout: DataSet, step: int, device: torch.device, signals
) -> tuple[dict[str, float], dict[str, float]]:
    """The line after `step` steps: {"eval/NAME": mean over the held-out pairs of all ranks}, their
    number, and of FEW pairs or more {"standard_error/NAME": that of the mean}; and {NAME: the
    standard error of the pairs' changes since this process's first evaluation}. Standard errors
    that are 0 are left out. signals: see watch_signals. Raises Stopped on all ranks as soon as one
    has received a signal. Collective."""
    rows = []
    model.eval()
    try:
        for batch in heldout.batches(0, dist.get_rank()):
            (stop,) = processes.max_over_ranks(device, signals())
            if stop:
                raise Stopped(stop)
            batch = batch.to(device)
            logps = model(batch).requires_grad_()  # no gradient beyond them: for the metrics
            with torch.enable_grad():
                losses = loss_function(logps, batch.lengths, **batch.columns)
                losses.sum().backward()
            rows.append(pair_metrics(logps, losses, logps.grad, batch))
    finally:
        model.train().free_gathered()  # after forwards without a backward
    found = {name: torch.cat([row[name] for row in rows]).double() for name in rows[0]}
    heldout.first = heldout.first or found
    changes = {f"change/{name}": found[name] - heldout.first[name] for name in found}
    values = found | changes
    squares = {f"square/{name}": value**2 for name, value in values.items()}
    *sums, pairs = sums_over_ranks([values | squares]).tolist()
    means = means_of([*values, *squares], [*sums, pairs])
    variances = {n: means[f"square/{n}"] - means[n] ** 2 for n in values}
    errors = {n: math.sqrt(v / (pairs - 1)) for n, v in variances.items() if v > 0 and pairs >= FEW}
    line = {"step": step, "eval/pairs": int(pairs)}
    line |= {f"eval/{name}": means[name] for name in found}
    line |= {f"standard_error/{name}": errors[name] for name in found if name in errors}
    return line, {name: errors[f"change/{name}"] for name in found if f"change/{name}" in errors}


def parse_args(args: list[str]) -> Config:
    return command_line.parse_args(Config, args, description=__doc__)


if __name__ == "__main__":
    command_line.run_command(lambda: train(parse_args(sys.argv[1:])))
