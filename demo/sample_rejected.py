"""Make demo/train.jsonl and demo/heldout.jsonl from demo/answers.jsonl: the rejected answers are sampled from the
demo's model itself, so that the pairs are on-policy.

    python -m demo.sample_rejected

demo/answers.jsonl holds a category, a prompt (messages) and the chosen answer, written for this project. Each prompt is
answered until the model ends its answer itself, by the TRIES below: a cut answer would teach when to stop rather than what
to say. At temperature 0.9 the model finds most of its own answers likelier than the chosen ones, but not so much that
pushing them down is all that there is to learn. Prompts without a whole answer are left out.
"""

import json
from collections import Counter
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from data import load_tokenizer
from demo.smollm2 import demo_model
from eval.generate import generate

TRIES = [(0.9, 80)] * 5 + [(0.7, 128)] * 8  # temperature, most tokens of an answer
ENOUGH = 260
HELDOUT_EVERY = 5  # of each category the 1st, 6th, 11th ... pair is held out


def main() -> None:
    folder = Path(__file__).parent
    rows = [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
    tokenizer = load_tokenizer(demo_model())
    model = AutoModelForCausalLM.from_pretrained(demo_model(), dtype=torch.float32).eval()
    for seed, (temperature, limit) in enumerate(TRIES):
        todo = [row for row in rows if "rejected" not in row]
        if len(rows) - len(todo) >= ENOUGH:
            break
        prompts = [row["prompt"] for row in todo]
        settings = {"max_new_tokens": limit, "temperature": temperature, "batch_size": 112, "seed": seed}
        for row, (text, finished) in zip(todo, generate(model, tokenizer, prompts, **settings)):
            if finished and text and text != row["chosen"]:
                row["rejected"] = text
        print(f"try {seed}: {sum('rejected' in row for row in rows)} of {len(rows)} prompts have an answer", flush=True)
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
