"""The steps that benchmarks/throughput.py compares with train.py, on the same pairs in the same
order.

    python benchmarks/baselines.py textbook RECIPE [--pairs_a_forward N] [flags of train.py]
    python benchmarks/baselines.py trl RECIPE [--pairs_a_forward N] [flags of train.py]
    python benchmarks/baselines.py padded RECIPE [flags of train.py]

`textbook` is the step that SimPO's code, the authors' SimPER and TRL have in common: chosen and
rejected responses, each after its prompt, padded to the longest and concatenated into one batch;
the logits of all positions; log_softmax; gather. `trl` is TRL's CPOTrainer with loss_type="simpo"
and cpo_alpha=0, the same computation (TRL has no SimPER); with `--loss alphapo`, of which SimPER is
a corner, it is the same loss. `padded` is train.py as it treats a model
that cannot be packed.

Each writes metrics.jsonl into its output_dir as train.py does, with the same names. Each rank
computes its pairs of a step in one forward; a single process can take --pairs_a_forward of them at
a time. On CPUs in float32, with DistributedDataParallel for several ranks. On GPUs in bfloat16 with
float32 parameters: `textbook` under FSDP2, as train.py, and `trl` by Trainer's bf16 (a single
process takes all GPUs that it sees).
"""

import argparse
import inspect
import json
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.distributed as dist
from datasets import Dataset
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, TrainerCallback

import model
from data import Schedule, load_data
from model import blocks, build_model
from runtime.command_line import choose_loss, run_command
from runtime.errors import InputError
from runtime.processes import max_over_ranks, peak_memory, start_group
from runtime.weights import fetch_weights, load_tokenizer, resolve_model
from train import Config, means_of, parse_args, share_of_peak, sums_over_ranks, train

DEVICE = torch.device("cpu")
if torch.cuda.is_available():
    DEVICE = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))


def write_metrics(config: Config, metrics: dict) -> None:
    with open(Path(config.output_dir) / "metrics.jsonl", "a") as file:
        print(json.dumps(metrics), file=file)


def prepare(config: Config):
    """→ rank, ranks, tokenizer, the rows of the pairs, and for every step the indices of its pairs
    on each rank: [step][rank]."""
    # Not by start_process, whose settings of the memory allocator are train.py's own.
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if DEVICE.type == "cuda":
        torch.cuda.set_device(DEVICE)
        torch.backends.cuda.enable_cudnn_sdp(False)  # as start_process, and for its reason
    tokenizer = load_tokenizer(resolve_model(config.model))
    limits = {"max_length": config.max_length, "max_prompt_length": config.max_prompt_length}
    data = load_data(config.train_data, tokenizer, **limits, truncation=config.truncation)
    schedule = Schedule(data.tokens, config, ranks)
    Path(config.output_dir).mkdir(parents=True, exist_ok=True)
    steps = [[sum(shares, []) for shares in zip(*step)] for step in schedule]
    return rank, ranks, tokenizer, data.rows, steps


def plain_model(config: Config):
    return AutoModelForCausalLM.from_pretrained(
        fetch_weights(resolve_model(config.model)), dtype=torch.float32, trust_remote_code=False
    )


def shard_plain(model, mesh) -> None:
    """FSDP2 of a transformers model, in train.py's units and with its precision on GPUs."""
    precision = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for module in (*blocks(model), model):
        fully_shard(module, mesh=mesh, mp_policy=precision)


def padded_logps(model, rows: dict) -> torch.Tensor:
    """The textbook's forward pass: the mean log-prob of every response, (2, pairs), chosen and then
    rejected."""
    responses = [answer for side in zip(*rows["responses"]) for answer in side]
    prompts = rows["prompt"] * 2
    longest = max(len(prompt) + len(response) for prompt, response in zip(prompts, responses))
    ids = torch.zeros(len(prompts), longest, dtype=torch.long)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for i, (prompt, response) in enumerate(zip(prompts, responses)):
        end = len(prompt) + len(response)
        ids[i, :end] = torch.tensor(prompt + response)
        mask[i, :end] = 1
        labels[i, len(prompt) : end] = torch.tensor(response)
    ids, mask, labels = (x.to(DEVICE, non_blocking=True) for x in (ids, mask, labels))
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1].float()
    labels = labels[:, 1:]
    scored = labels != -100
    logps = logits.log_softmax(dim=-1).gather(2, labels.clamp(min=0)[:, :, None])[:, :, 0]
    return ((logps * scored).sum(dim=1) / scored.sum(dim=1)).view(2, -1)


def seconds_since(began: float) -> float:
    """Seconds since `began`, once the GPU has finished what it was given."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def textbook(config: Config, pairs_a_forward: int) -> None:
    rank, ranks, _, pairs, steps = prepare(config)
    start_group(DEVICE)
    model = plain_model(config).to(DEVICE).train()
    if config.activation_checkpointing == "true":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if DEVICE.type == "cuda":
        shard_plain(model, init_device_mesh("cuda", (ranks,)))
    elif ranks > 1:
        model = torch.nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(
        model.parameters(), betas=(0.9, 0.999), weight_decay=0.0, fused=True
    )
    for step, shares in enumerate(steps):
        began = time.perf_counter()
        share = share_of_peak(step, len(steps), config.warmup_ratio)
        optimizer.param_groups[0]["lr"] = config.learning_rate * share
        mine, metrics = shares[rank], []
        size = pairs_a_forward or len(mine)
        for first in range(0, len(mine), size):
            chosen, rejected = padded_logps(model, pairs[mine[first : first + size]])
            losses = rejected.exp() - chosen.exp()
            (losses.sum() * ranks / config.batch_size).backward()
            values = {"loss": losses, "logps/chosen": chosen, "logps/rejected": rejected}
            metrics.append({name: value.detach() for name, value in values.items()})
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        norm = (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()
        optimizer.step()
        optimizer.zero_grad()
        seconds = seconds_since(began)
        means = means_of(metrics[0], sums_over_ranks(metrics).tolist())
        means |= {"grad_norm": norm, "pairs_per_second": config.batch_size / seconds}
        memory = peak_memory(DEVICE)
        means |= dict(zip(memory, max_over_ranks(DEVICE, *memory.values())))
        if rank == 0:
            write_metrics(config, {"step": step + 1, **means})


class Timer(TrainerCallback):
    """Times the steps of transformers' Trainer and writes them as train.py does."""

    def __init__(self, config: Config, rank: int):
        self.config, self.rank = config, rank

    def on_step_begin(self, args, state, control, **kwargs):
        self.began = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        self.pairs_per_second = self.config.batch_size / seconds_since(self.began)

    def on_log(self, args, state, control, logs, **kwargs):
        if self.rank == 0 and "loss" in logs:
            line = {"step": state.global_step, "pairs_per_second": self.pairs_per_second}
            line |= {name: logs[name] for name in ("loss", "grad_norm", "logps/chosen")}
            write_metrics(self.config, line | peak_memory(DEVICE))


def trl(config: Config, pairs_a_forward: int) -> None:
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    class Trainer(CPOTrainer):
        def tokenize_row(self, feature, model=None):
            return feature  # the pairs arrive as the token ids that train.py has

        def _get_train_sampler(self, *args):
            return torch.utils.data.SequentialSampler(self.train_dataset)

    rank, ranks, tokenizer, pairs, steps = prepare(config)
    rows = []
    # With several ranks, Trainer gives them its batches in turn: the first to rank 0, and so on.
    # A single process takes the pairs of a step in this order, too, a few at a time.
    for index in [i for shares in steps for share in shares for i in share]:
        pair = pairs[index]
        prompt = pair["prompt"]
        row = {"prompt_input_ids": prompt, "prompt_attention_mask": [1] * len(prompt)}
        for side, response in zip(("chosen", "rejected"), pair["responses"]):
            row[f"{side}_input_ids"] = prompt + response
            row[f"{side}_attention_mask"] = [1] * len(prompt + response)
            row[f"{side}_labels"] = [-100] * len(prompt) + response
        rows.append(row)
    share = config.batch_size // ranks
    shape = {}
    if config.loss == "alphapo":
        loss, _ = choose_loss(config.loss, config.loss_args)
        shape = {k: p.default for k, p in inspect.signature(loss).parameters.items()}
        shape = {"alpha": shape["alpha"], "beta": shape["beta"], "simpo_gamma": shape["gamma"]}
    options = CPOConfig(
        output_dir=config.output_dir,
        loss_type="simpo",
        cpo_alpha=0.0,
        **shape,
        per_device_train_batch_size=pairs_a_forward or share,
        gradient_accumulation_steps=share // (pairs_a_forward or share),
        learning_rate=config.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=config.warmup_ratio,
        max_steps=len(steps),
        max_length=config.max_length,
        max_grad_norm=config.max_grad_norm,
        gradient_checkpointing=config.activation_checkpointing == "true",
        optim="adamw_torch_fused",
        weight_decay=0.0,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        bf16=DEVICE.type == "cuda",
        use_cpu=DEVICE.type == "cpu",
    )
    trainer = Trainer(
        model=plain_model(config),
        args=options,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        callbacks=[Timer(config, rank)],
    )
    trainer.train()


def padded(config: Config, pairs_a_forward: int) -> None:
    """train.py with every response in a padded row of its own."""

    def build(model_config):
        built = build_model(model_config)
        built.packed = False
        built.set_attention()
        return built

    model.build_model = build
    train(config)


def main() -> None:
    step = {"textbook": textbook, "trl": trl, "padded": padded}.get("".join(sys.argv[1:2]))
    if step is None:
        sys.exit(__doc__)
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--pairs_a_forward", type=int, default=0)
    own, flags = parser.parse_known_args(sys.argv[2:])
    config = parse_args(flags)
    size = own.pairs_a_forward
    # Ranks with different numbers of forwards would wait for each other; TRL drops a remainder.
    if size < 0 or size and ("RANK" in os.environ or config.batch_size % size):
        raise InputError("--pairs_a_forward is for one process, and must divide batch_size")
    step(config, size)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    run_command(main)
