"""The steps that benchmarks/throughput.py compares with train.py, on the same pairs in the same
order.

    python benchmarks/baselines.py textbook RECIPE [--name value ...]      # flags as for train.py
    python benchmarks/baselines.py trl RECIPE [--name value ...]

`textbook` is the step that SimPO's code, the authors' SimPER and TRL have in common: chosen and
rejected responses, each after its prompt, padded to the longest and concatenated into one batch;
the logits of all positions; log_softmax; gather. `trl` is TRL's CPOTrainer with loss_type="simpo"
and cpo_alpha=0, the same computation (TRL has no SimPER).

Each writes metrics.jsonl into its output_dir as train.py does, with the same names. On every rank,
the pairs of a step must fit into one micro-batch (micro_batch_tokens), which is also how
throughput.py runs train.py. Several ranks use DistributedDataParallel. On CPU only.
"""

import json
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.distributed as dist
from datasets import Dataset
from transformers import AutoModelForCausalLM, TrainerCallback

from data import load_pairs, load_tokenizer, pair_lengths
from demo.smollm2 import resolve_model
from runtime import max_over_ranks, peak_memory, run_command, start_group
from train import Config, learning_rate, make_schedule, mean_over_ranks, parse_args

CPU = torch.device("cpu")


def write_metrics(config: Config, metrics: dict) -> None:
    with open(Path(config.output_dir) / "metrics.jsonl", "a") as file:
        print(json.dumps(metrics), file=file)


def prepare(config: Config):
    """→ rank, ranks, tokenizer, pairs, and for every step the indices of its pairs on each rank:
    [step][rank]."""
    # Not by start_process, whose settings of the memory allocator are train.py's own.
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    tokenizer = load_tokenizer(resolve_model(config.model))
    pairs, _ = load_pairs(config.train_data, tokenizer, config.max_length, config.max_prompt_length)
    schedule = make_schedule(config, pair_lengths(pairs).sum(axis=1), ranks)
    Path(config.output_dir).mkdir(parents=True, exist_ok=True)
    return rank, ranks, tokenizer, pairs, [shares for (shares,) in schedule]


def plain_model(config: Config):
    return AutoModelForCausalLM.from_pretrained(
        resolve_model(config.model), dtype=torch.float32, trust_remote_code=False
    )


def padded_logps(model, rows: dict) -> torch.Tensor:
    """The textbook's forward pass: the mean log-prob of every response, (2, pairs), chosen and then
    rejected."""
    responses = rows["chosen"] + rows["rejected"]
    prompts = rows["prompt"] * 2
    longest = max(len(prompt) + len(response) for prompt, response in zip(prompts, responses))
    ids = torch.zeros(len(prompts), longest, dtype=torch.long)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for i, (prompt, response) in enumerate(zip(prompts, responses)):
        end = len(prompt) + len(response)
        ids[i, :end] = torch.tensor(prompt + response)
        mask[i, :end] = 1
        labels[i, len(prompt) : end] = torch.tensor(response)
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
    labels = labels[:, 1:]
    scored = labels != -100
    logps = logits.log_softmax(dim=-1).gather(2, labels.clamp(min=0)[:, :, None])[:, :, 0]
    return ((logps * scored).sum(dim=1) / scored.sum(dim=1)).view(2, -1)


def textbook(config: Config) -> None:
    rank, ranks, _, pairs, steps = prepare(config)
    start_group(CPU)
    model = plain_model(config).train()
    if config.activation_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if ranks > 1:
        model = torch.nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(
        model.parameters(), betas=(0.9, 0.999), weight_decay=0.0, fused=True
    )
    for step, shares in enumerate(steps):
        began = time.perf_counter()
        optimizer.param_groups[0]["lr"] = learning_rate(step, len(steps), config)
        chosen, rejected = padded_logps(model, pairs[shares[rank]])
        losses = rejected.exp() - chosen.exp()
        (losses.sum() * ranks / config.batch_size).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm).item()
        optimizer.step()
        optimizer.zero_grad()
        seconds = time.perf_counter() - began
        metrics = {"loss": losses, "logps/chosen": chosen, "logps/rejected": rejected}
        means = mean_over_ranks([{name: values.detach() for name, values in metrics.items()}])
        means |= {"grad_norm": norm, "pairs_per_second": config.batch_size / seconds}
        (means["peak_memory_gb"],) = max_over_ranks(CPU, peak_memory(CPU))
        if rank == 0:
            write_metrics(config, {"step": step + 1, **means})


class Timer(TrainerCallback):
    """Times the steps of transformers' Trainer and writes them as train.py does."""

    def __init__(self, config: Config, rank: int):
        self.config, self.rank = config, rank

    def on_step_begin(self, args, state, control, **kwargs):
        self.began = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        self.pairs_per_second = self.config.batch_size / (time.perf_counter() - self.began)

    def on_log(self, args, state, control, logs, **kwargs):
        if self.rank == 0 and "loss" in logs:
            line = {"step": state.global_step, "pairs_per_second": self.pairs_per_second}
            line |= {"grad_norm": logs["grad_norm"], "logps/chosen": logs["logps/chosen"]}
            write_metrics(self.config, line | {"peak_memory_gb": peak_memory(CPU)})


def trl(config: Config) -> None:
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    class Trainer(CPOTrainer):
        def tokenize_row(self, feature, model=None):
            return feature  # the pairs arrive as the token ids that train.py has

        def _get_train_sampler(self, *args):
            return torch.utils.data.SequentialSampler(self.train_dataset)

    rank, ranks, tokenizer, pairs, steps = prepare(config)
    rows = []
    # With several ranks, Trainer gives them its batches in turn: the first to rank 0, and so on.
    for index in [i for shares in steps for share in shares for i in share]:
        pair = pairs[index]
        prompt = pair["prompt"]
        row = {"prompt_input_ids": prompt, "prompt_attention_mask": [1] * len(prompt)}
        for side in ("chosen", "rejected"):
            row[f"{side}_input_ids"] = prompt + pair[side]
            row[f"{side}_attention_mask"] = [1] * len(prompt + pair[side])
            row[f"{side}_labels"] = [-100] * len(prompt) + pair[side]
        rows.append(row)
    options = CPOConfig(
        output_dir=config.output_dir,
        loss_type="simpo",
        cpo_alpha=0.0,
        per_device_train_batch_size=config.batch_size // ranks,
        learning_rate=config.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=config.warmup_ratio,
        max_steps=len(steps),
        max_length=config.max_length,
        max_grad_norm=config.max_grad_norm,
        gradient_checkpointing=config.activation_checkpointing,
        optim="adamw_torch_fused",
        weight_decay=0.0,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        bf16=False,
        use_cpu=True,
    )
    trainer = Trainer(
        model=plain_model(config),
        args=options,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        callbacks=[Timer(config, rank)],
    )
    trainer.train()


def main() -> None:
    step = {"textbook": textbook, "trl": trl}.get("".join(sys.argv[1:2]))
    if step is None:
        sys.exit(__doc__)
    step(parse_args(sys.argv[2:]))
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    run_command(main)
