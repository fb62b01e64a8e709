"""Answers of one or several exported models, side by side.

    python -m eval.generate --models demo runs/demo/final          # a few held-out prompts of the demo
    python -m eval.generate --models M --data my.jsonl --num_prompts 20 --temperature 0.7

Generation never runs under FSDP: it reads models in Hugging Face format, such as the `final/` folder of a run.
"""

import argparse
import shutil
import sys
import textwrap
from itertools import zip_longest

import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from data import InputError, as_messages, end_of_turn, load_rows, load_tokenizer, parse_row, prompt_text, tokenize_text
from model import resolve_model


@torch.inference_mode()
def generate(
    model,
    tokenizer,
    prompts: list,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    batch_size: int = 8,
    seed: int = 0,
) -> list[tuple[str, bool]]:
    """Answer every prompt: [(text, finished)], in the order of `prompts`.

    prompts: each a list of messages (`[{"role": ..., "content": ...}]`, the last not the assistant's) or plain text;
        their token ids are the ones that training uses (data.py): the chat template, at most one BOS.
    temperature: 0 is greedy; otherwise tokens are sampled at this temperature from the top_p nucleus, reproducibly for
        one `seed` and `batch_size`.
    finished: whether the model ended its answer itself, within max_new_tokens.
    """
    torch.manual_seed(seed)
    ids = [tokenize_text(tokenizer, prompt_text(tokenizer, prompt)) for prompt in prompts]
    ends = model.generation_config.eos_token_id
    ends = {*([ends] if isinstance(ends, int) else ends or []), end_of_turn(tokenizer)[0]}
    pad = min(ends)  # masked, so any id serves
    sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0} if temperature > 0 else {}
    config = GenerationConfig(max_new_tokens=max_new_tokens, eos_token_id=sorted(ends), pad_token_id=pad, **sampling)
    answers = {}
    # Longest first: similar lengths share a batch, and one that is too large for the memory fails at once.
    order = sorted(range(len(prompts)), key=lambda i: -len(ids[i]))
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        width = len(ids[batch[0]])
        padded = torch.tensor([[pad] * (width - len(ids[i])) + ids[i] for i in batch], device=model.device)
        mask = torch.tensor([[0] * (width - len(ids[i])) + [1] * len(ids[i]) for i in batch], device=model.device)
        output = model.generate(padded, attention_mask=mask, generation_config=config)[:, width:].tolist()
        for i, new in zip(batch, output):
            length = next((n for n, token in enumerate(new) if token in ends), len(new))
            answers[i] = (tokenizer.decode(new[:length], skip_special_tokens=True).strip(), length < len(new))
    return [answers[i] for i in range(len(prompts))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", required=True, help="folders or hub ids; 'demo' is the demo's base model")
    parser.add_argument("--data", default="demo/heldout.jsonl", help="preference data whose prompts to answer")
    parser.add_argument("--num_prompts", type=int, default=4)
    parser.add_argument("--max_new_tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    rows = load_rows(args.data)
    # Spread over the data, which is often sorted by topic.
    picked = [rows[i * len(rows) // args.num_prompts] for i in range(min(args.num_prompts, len(rows)))]
    prompts = [parsed[0] for parsed in map(parse_row, picked) if parsed]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    columns = []
    for name in args.models:
        folder = resolve_model(name)
        tokenizer = load_tokenizer(folder)
        model = AutoModelForCausalLM.from_pretrained(folder).to(device).eval()
        columns.append(generate(model, tokenizer, prompts, args.max_new_tokens, args.temperature, seed=args.seed))
    width = shutil.get_terminal_size((120, 24)).columns // len(args.models) - 3
    for prompt, *answers in zip(prompts, *columns):
        print("=" * (width + 3) * len(args.models))
        for message in as_messages(prompt):
            print(textwrap.fill(f"{message['role']}: {message['content']}", (width + 3) * len(args.models)))
        texts = [text + ("" if finished else " [cut at --max_new_tokens]") for text, finished in answers]
        wrapped = [[line for part in text.splitlines() for line in textwrap.wrap(part, width) or [""]] for text in texts]
        for line in ([name[-width:] for name in args.models], ["-" * width] * len(texts), *zip_longest(*wrapped, fillvalue="")):
            print("   ".join(f"{cell:<{width}}" for cell in line).rstrip())


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"error: {error}")
