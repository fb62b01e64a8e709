"""Make demo/train.jsonl and demo/heldout.jsonl from demo/answers.jsonl. The rejected answers are
sampled from the demo's model, so that the pairs are on-policy.

    python -m demo.sample_rejected

demo/answers.jsonl holds a category, a prompt (messages) and the chosen answer, written for this
project. Each prompt is answered until the model ends an answer, with the settings in TRIES: an
answer that is cut would teach when to stop rather than what to say. At temperature 0.9 the model
finds most of its own answers likelier than the chosen ones, but not so much likelier that pushing
them down is all that there is to learn. Prompts without a finished answer are left out.
"""

import json
from collections import Counter
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from data import load_tokenizer
from demo.smollm2 import demo_model
from eval.generate import generate
from runtime import run_command

TRIES = [(0.9, 80)] * 5 + [(0.7, 128)] * 8  # temperature, most tokens of an answer
ENOUGH = 260
HELDOUT_EVERY = 5  # of each category the 1st, 6th, 11th ... pair is held out


def main() -> None:
    folder = Path(__file__).parent
    rows = [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
    tokenizer = load_tokenizer(demo_model())
    model = AutoModelForCausalLM.from_pretrained(demo_model(), dtype=torch.float32).eval()
    for seed, (temperature, max_new_tokens) in enumerate(TRIES):
        unanswered = [row for row in rows if "rejected" not in row]
        if len(rows) - len(unanswered) >= ENOUGH:
            break
        answers = generate(
            model,
            tokenizer,
            [row["prompt"] for row in unanswered],
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            batch_size=112,
            seed=seed,
        )
        for row, (text, finished) in zip(unanswered, answers):
            if finished and text and text != row["chosen"]:
                row["rejected"] = text
        answered = sum("rejected" in row for row in rows)
        print(f"try {seed}: {answered} of {len(rows)} prompts have an answer", flush=True)
    pairs_in = Counter()
    with open(folder / "train.jsonl", "w") as train, open(folder / "heldout.jsonl", "w") as heldout:
        for row in rows:
            if "rejected" not in row:
                continue
            pairs_in[row["category"]] += 1
            pair = {
                "prompt": row["prompt"],
                "chosen": [{"role": "assistant", "content": row["chosen"]}],
                "rejected": [{"role": "assistant", "content": row["rejected"]}],
                "category": row["category"],
            }
            file = heldout if pairs_in[row["category"]] % HELDOUT_EVERY == 1 else train
            print(json.dumps(pair, ensure_ascii=False), file=file)


if __name__ == "__main__":
    run_command(main)
