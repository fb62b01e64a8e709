"""Generation: what is batched equals what is not, and the ids are those of training."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import CHATML, make_model, make_tokenizer

from eval.generate import generate

PROMPTS = ["hi", "what is two plus two?", "a", [{"role": "user", "content": "a small"}, {"role": "assistant", "content": "b"}]]
PROMPTS[3].append({"role": "user", "content": "and?"})


def greedy(model, tokenizer, text: str, ends: set, most: int) -> tuple[list[int], bool]:
    """One token after the other, the whole sequence anew each time, without cache, padding or batch."""
    ids, new = tokenizer(text, add_special_tokens=False).input_ids, []
    while len(new) < most:
        with torch.no_grad():
            token = model(torch.tensor([ids + new])).logits[0, -1].argmax().item()
        if token in ends:
            return new, True
        new.append(token)
    return new, False


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_greedy_equals_one_token_at_a_time(name, batch_size):
    model, tokenizer = make_model(name, seed=3), make_tokenizer()
    model.generation_config.eos_token_id = 200  # a token that ends some of the answers early
    answers = generate(model, tokenizer, PROMPTS, max_new_tokens=12, batch_size=batch_size)
    for prompt, (text, finished) in zip(PROMPTS, answers):
        messages = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
        whole = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        end_of_turn = tokenizer.convert_tokens_to_ids("<|im_end|>")
        expected, expected_end = greedy(model, tokenizer, whole, {200, end_of_turn}, 12)
        assert (text, finished) == (tokenizer.decode(expected, skip_special_tokens=True).strip(), expected_end)


def test_sampling_is_reproducible_and_bos_single():
    model, seen = make_model("llama"), []
    template = "{{ bos_token }}" + CHATML
    tokenizer = make_tokenizer(template, adds_bos=True)
    original = model.generate
    model.generate = lambda ids, **kwargs: seen.append(ids) or original(ids, **kwargs)
    settings = {"max_new_tokens": 10, "temperature": 1.0}
    first, again, other = (generate(model, tokenizer, PROMPTS, **settings, seed=seed) for seed in (0, 0, 1))
    assert first == again != other
    assert (seen[0] == tokenizer.bos_token_id).sum(dim=1).tolist() == [1] * 4


def test_command_prints_side_by_side(model_folder, tmp_path):
    rows = [{"prompt": f"question {n}", "chosen": "a", "rejected": "b"} for n in range(6)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--data", str(tmp_path / "rows.jsonl"), "--num_prompts", "3", "--max_new_tokens", "4"]
    command = [sys.executable, "-m", "eval.generate", "--models", str(model_folder), str(model_folder), *flags]
    done = subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stdout.splitlines() if line.startswith("user:")] == [
        "user: question 0", "user: question 2", "user: question 4",
    ]  # fmt: skip
    assert done.stdout.count("[cut at") == 6  # two columns of three answers
