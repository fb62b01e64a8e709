"""The model card of an exported model: what it was made of, and how to run it."""

import os
import re
from pathlib import Path

import yaml
from transformers import AutoModelForMultimodalLM

from runtime.log import SHOWN, read_lines
from runtime.rows import on_hub, split_share, split_sources
from runtime.weights import hub_snapshot, load_config, model_class

CARD = """\
---
{front}---

# {title}

{base}, trained with the loss `{loss}` of a reimplementation of
[SimPER](https://arxiv.org/abs/2502.00883): {steps} steps of {pairs} preference pairs.
{held_out}
## How to run it

```python
from transformers import pipeline

model = pipeline("{task}", "{title}")  # this folder, or its id on the hub
print(model({prompt}, max_new_tokens=256)[0]["generated_text"])
```

With vLLM: `vllm serve {title}`.

## How it was made

By `train.py RECIPE`, where RECIPE is

```yaml
{recipe}```

It was made of (digests are SHA-256)

```
{made_of}
```

## Citation

```bibtex
@inproceedings{{simper2025,
  title = {{{{SimPER}}: A Minimalist Approach to Preference Alignment without Hyperparameters}},
  author = {{Teng Xiao and Yige Yuan and Zhengyu Chen and Mingxiao Li and Shangsong Liang and
            Zhaochun Ren and Vasant G Honavar}},
  booktitle = {{International Conference on Learning Representations}},
  year = {{2025}}
}}
```
"""
PARTS = 'text=[{"role": "user", "content": [{"type": "text", "text": "Hello"}]}]'
CHAT = '[{"role": "user", "content": "Hello"}]'


def model_card(run: Path, source: str, chats: bool, step: int) -> str:
    """README.md of the model after `step` steps of the run in the folder `run`, by its config.yaml
    and metrics.jsonl; files and folders by their names alone. source: the folder of the model that
    the run began with; chats: whether the tokenizer has a chat template."""
    text, snapshot = (run / "config.yaml").read_text(), hub_snapshot(source)
    config, made_of = yaml.safe_load(text), re.findall("^# (.+?): (.*)$", text, re.M)
    names = {
        key: ",".join(map(public, split_sources(config[key]))) if config[key] else ""
        for key in ("train_data", "eval_data")
    }
    base = snapshot[0] if snapshot else Path(config["model"]).name
    names |= {"model": config["model"] if snapshot else base}
    names |= {key: Path(config[key]).name for key in ("chat_template", "output_dir")}
    front = front_matter(config, source)
    recipe = {key: value for key, value in (config | names).items() if value != ""}
    return CARD.format(
        front=yaml.safe_dump(front, sort_keys=False),
        title=Path(os.path.abspath(run)).name,
        base=f"[{base}](https://huggingface.co/{base})" if snapshot else base,
        loss=config["loss"],
        steps=step,
        pairs=config["batch_size"],
        held_out=held_out(run, step),
        task=front["pipeline_tag"],
        prompt=PARTS if "image" in front["pipeline_tag"] else CHAT if chats else '"Hello"',
        recipe=yaml.safe_dump(recipe, sort_keys=False),
        made_of="\n".join(f"{name}: {value}" for name, value in made_of),
    )


def front_matter(config: dict, source: str) -> dict:
    """What the hub reads of a card: the base model with its licence, and data sets, of the hub."""
    front = {"library_name": "transformers", "tags": ["simper", "alignment"]}
    multimodal = model_class(load_config(source)) is AutoModelForMultimodalLM
    front["pipeline_tag"] = "image-text-to-text" if multimodal else "text-generation"
    if snapshot := hub_snapshot(source):
        front["base_model"] = snapshot[0]
    sources = ",".join(filter(None, [config["train_data"], config["eval_data"]]))
    found = [name for name, _ in map(split_share, split_sources(sources)) if on_hub(name)]
    if found:
        front["datasets"] = sorted({re.split("[:@]", name)[0] for name in found})
    card = Path(source) / "README.md"
    parts = card.read_text(errors="replace").split("---\n") if card.exists() else []
    try:
        own = yaml.safe_load(parts[1]) if len(parts) > 2 and not parts[0] else {}
    except yaml.YAMLError:
        own = {}
    keys = ("license", "license_name", "license_link")
    return front | {key: own[key] for key in keys if isinstance(own, dict) and key in own}


def public(source: str) -> str:
    """A source of data without the folders in which a file lies."""
    name, _ = split_share(source)
    return source if on_hub(name) else Path(source).name


def held_out(run: Path, step: int) -> str:
    """The first and the last held-out metrics until `step` as a table, or "" for fewer than two."""
    lines = [x for x in read_lines(run / "metrics.jsonl") if "eval/loss" in x and x["step"] <= step]
    if len(lines) < 2:
        return ""
    first, last = lines[0], lines[-1]
    rows = [f"\n| held-out pairs | step {first['step']} | step {last['step']} |", "|---|---|---|"]
    rows += [
        f"| {n} | {first[f'eval/{n}']:.4f} | {last[f'eval/{n}']:.4f} |"
        for n in SHOWN
        if f"eval/{n}" in last
    ]
    return "\n".join(rows) + "\n"
