"""The steps that benchmarks/throughput.py measures train.py against, on the same pairs in the same order.

    python benchmarks/baselines.py textbook RECIPE [--name value ...]      # flags as for train.py
    python benchmarks/baselines.py trl RECIPE [--name value ...]

`textbook` is the step that SimPO's code, the authors' SimPER and TRL share: chosen and rejected responses, each after its
prompt, padded to the longest and concatenated into one batch; the logits of all positions; log_softmax; gather. `trl` is
TRL's CPOTrainer with loss_type="simpo" and cpo_alpha=0, the same computation (TRL has no SimPER).

Each writes metrics.jsonl into its output_dir as train.py does, with the same names. Every step must fit one micro-batch a rank
(micro_batch_tokens), which is how throughput.py runs train.py, too; more ranks run as DistributedDataParallel. On CPU only.
"""

import json
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, TrainerCallback

from data import load_pairs, load_tokenizer
from model import resolve_model
from train import METRICS, learning_rate, make_schedule, parse_args, peak_memory, reduce, start_group


def write(config, metrics: dict) -> None:
    with open(Path(config.output_dir) / "metrics.jsonl", "a") as file:
        print(json.dumps(metrics), file=file)


def prepare(config):
    """→ rank, ranks, tokenizer, pairs, and for every step the indices of its pairs on each rank: [step][rank]."""
    # Not by start_process, whose settings of the memory allocator are train.py's own.
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    tokenizer = load_tokenizer(resolve_model(config.model))
    pairs, _ = load_pairs(config.train_data, tokenizer, config.max_length, config.max_prompt_length)
    tokens = [sum(lengths) for lengths in pairs["lengths"]]
    steps = []
    for indices, micro_batches in make_schedule(config, tokens, ranks):
        (shares,) = micro_batches
        steps.append([[indices[position] for position in share] for share in shares])
    Path(config.output_dir).mkdir(parents=True, exist_ok=True)
    return rank, ranks, tokenizer, pairs, steps


def padded_logps(model, rows: dict) -> torch.Tensor:
    """Mean log-prob of every response, (2, pairs): chosen, then rejected. The textbook's forward."""
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


def textbook(config) -> None:
    rank, ranks, _, pairs, steps = prepare(config)
    start_group(torch.device("cpu"))
    model = AutoModelForCausalLM.from_pretrained(resolve_model(config.model), dtype=torch.float32).train()
    if config.activation_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if ranks > 1:
        model = torch.nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.999), weight_decay=0.0, fused=True)
    for step, shares in enumerate(steps):
        began = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, len(steps), config)
        chosen, rejected = padded_logps(model, pairs[shares[rank]])
        losses = rejected.exp() - chosen.exp()
        (losses.sum() * ranks / config.batch_size).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm).item()
        optimizer.step()
        optimizer.zero_grad()
        seconds = time.perf_counter() - began
        known = {"loss": losses, "logps/chosen": chosen, "logps/rejected": rejected}
        sums = torch.tensor([known[name].sum().item() if name in known else 0.0 for name in METRICS], dtype=torch.float64)
        means, memory = reduce(sums, config.batch_size)
        if rank == 0:
            means = {name: means[name] for name in known}
            means |= {"grad_norm": norm, "pairs_per_second": config.batch_size / seconds, "peak_memory_gb": memory}
            write(config, {"step": step + 1, **means})


class Timer(TrainerCallback):
    """Times the steps of transformers' Trainer and writes them as train.py does."""

    def __init__(self, config, rank: int):
        self.config, self.rank = config, rank

    def on_step_begin(self, args, state, control, **kwargs):
        self.began = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        self.pairs_per_second = self.config.batch_size / (time.perf_counter() - self.began)

    def on_log(self, args, state, control, logs, **kwargs):
        if self.rank == 0 and "loss" in logs:
            line = {"step": state.global_step, "pairs_per_second": self.pairs_per_second}
            line |= {"grad_norm": logs["grad_norm"], "logps/chosen": logs["logps/chosen"]}
            write(self.config, line | {"peak_memory_gb": peak_memory(torch.device("cpu"))})


def trl(config) -> None:
    import datasets
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    class Trainer(CPOTrainer):
        def tokenize_row(self, feature, model=None):
            return feature  # the pairs arrive as train.py's tokens

        def _get_train_sampler(self, *args):
            return None if self.train_dataset is None else torch.utils.data.SequentialSampler(self.train_dataset)

    rank, ranks, tokenizer, pairs, steps = prepare(config)
    rows = []
    # With more ranks, Trainer deals its batches out in turn: rank 0 takes the first, rank 1 the second.
    for index in [i for shares in steps for share in shares for i in share]:
        row = pairs[index]
        features = {"prompt_input_ids": row["prompt"], "prompt_attention_mask": [1] * len(row["prompt"])}
        for side in ("chosen", "rejected"):
            features[f"{side}_input_ids"] = row["prompt"] + row[side]
            features[f"{side}_attention_mask"] = [1] * len(features[f"{side}_input_ids"])
            features[f"{side}_labels"] = [-100] * len(row["prompt"]) + row[side]
        rows.append(features)
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
        model=AutoModelForCausalLM.from_pretrained(resolve_model(config.model), dtype=torch.float32),
        args=options,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer,
        callbacks=[Timer(config, rank)],
    )
    trainer.train()


if __name__ == "__main__":
    {"textbook": textbook, "trl": trl}[sys.argv[1]](parse_args(sys.argv[2:]))
    if dist.is_initialized():
        dist.destroy_process_group()
