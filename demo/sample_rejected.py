"""Make demo/train.jsonl and demo/heldout.jsonl from demo/answers.jsonl: the rejected answers are sampled from the
demo's model itself, so that the pairs are on-policy.

    python -m demo.sample_rejected

demo/answers.jsonl holds a category, a prompt (messages) and the chosen answer, written for this project. A prompt is
answered at temperature 0.7 until the model ends its answer within 80 tokens (8 tries, the seeds 0 to 7) or 128 tokens (4
more): a cut answer would teach when to stop rather than what to say. Prompts that get no such answer are left out.
"""

import json
from collections import Counter
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from data import load_tokenizer
from demo.smollm2 import demo_model
from eval.generate import generate

HELDOUT_EVERY = 5  # of each category the 1st, 6th, 11th ... pair is held out


def main() -> None:
    folder = Path(__file__).parent
    rows = [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
    tokenizer = load_tokenizer(demo_model())
    model = AutoModelForCausalLM.from_pretrained(demo_model(), dtype=torch.float32).eval()
    for seed in range(12):
        todo = [row for row in rows if "rejected" not in row]
        prompts = [row["prompt"] for row in todo]
        limit = 80 if seed < 8 else 128
        answers = generate(model, tokenizer, prompts, max_new_tokens=limit, temperature=0.7, batch_size=28, seed=seed)
        for row, (text, finished) in zip(todo, answers):
            if finished and text and text != row["chosen"]:
                row["rejected"] = text
        print(f"seed {seed}: {sum('rejected' in row for row in rows)} of {len(rows)} prompts have an answer", flush=True)
    seen = Counter()
    with open(folder / "train.jsonl", "w") as train, open(folder / "heldout.jsonl", "w") as heldout:
        for row in rows:
            if "rejected" in row:
                seen[row["category"]] += 1
                messages = {side: [{"role": "assistant", "content": row[side]}] for side in ("chosen", "rejected")}
                line = json.dumps({"prompt": row["prompt"], **messages, "category": row["category"]}, ensure_ascii=False)
                print(line, file=heldout if seen[row["category"]] % HELDOUT_EVERY == 1 else train)


if __name__ == "__main__":
    main()
