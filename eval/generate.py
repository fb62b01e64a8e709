"""Answers of one or several exported models, side by side.

    python -m eval.generate --models demo runs/demo/final          # a few held-out prompts of the demo
    python -m eval.generate --models M --data my.jsonl --num_prompts 20 --temperature 0.7
    python -m eval.generate --models M --data my.jsonl --num_prompts 0 --output_dir answers --engine vllm

With --output_dir every model's answers are kept in a file, and the same command goes on where it was stopped. Generation never
runs under FSDP: it reads models in Hugging Face format, such as the `final/` folder of a run. alpaca_eval2.py and mt_bench.py
build on `answer`.
"""

import argparse
import functools
import hashlib
import json
import shutil
import sys
import textwrap
from itertools import zip_longest
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from data import InputError, as_messages, end_of_turn, load_rows, load_tokenizer, parse_row, prompt_text, tokenize_text
from model import resolve_model, weights_fingerprint


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
    temperature: 0 is greedy, whatever the model's generation config says; otherwise tokens are sampled at this temperature
        from the top_p nucleus, reproducibly for one `seed` and `batch_size`.
    finished: whether the model ended its answer itself, within max_new_tokens and the model's context.
    Raises InputError for a prompt that fills the model's context.
    """
    torch.manual_seed(seed)
    ids = [tokenize_text(tokenizer, prompt_text(tokenizer, prompt)) for prompt in prompts]
    ends = stop_tokens(model.generation_config, tokenizer)
    pad = min(ends)  # masked, so any id serves
    # All that decides is said: what is left out, transformers fills from the model's own generation config.
    sampling = {"do_sample": temperature > 0, "repetition_penalty": 1.0}
    if temperature > 0:
        sampling |= {"temperature": temperature, "top_p": top_p, "top_k": 0}
    answers, context = {}, context_length(model.config)
    check_prompts(ids, context)
    # Longest first: similar lengths share a batch, and one that is too large for the memory fails at once.
    order = sorted(range(len(prompts)), key=lambda i: -len(ids[i]))
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        width = len(ids[batch[0]])
        room = min(max_new_tokens, context - width)
        config = GenerationConfig(max_new_tokens=room, eos_token_id=sorted(ends), pad_token_id=pad, **sampling)
        padded = torch.tensor([[pad] * (width - len(ids[i])) + ids[i] for i in batch], device=model.device)
        mask = torch.tensor([[0] * (width - len(ids[i])) + [1] * len(ids[i]) for i in batch], device=model.device)
        output = model.generate(padded, attention_mask=mask, generation_config=config)[:, width:].tolist()
        for i, new in zip(batch, output):
            length = next((n for n, token in enumerate(new) if token in ends), len(new))
            answers[i] = (tokenizer.decode(new[:length], skip_special_tokens=True).strip(), length < len(new))
    return [answers[i] for i in range(len(prompts))]


def stop_tokens(generation_config: GenerationConfig, tokenizer) -> set[int]:
    """Every token that ends an answer: those of the model's generation config, and the chat template's end of a turn."""
    ends = generation_config.eos_token_id
    return {*([ends] if isinstance(ends, int) else ends or []), end_of_turn(tokenizer)[0]}


def context_length(config) -> int:
    """Most tokens of prompt and answer together."""
    return getattr(config.get_text_config(), "max_position_embeddings", None) or 2**31


def check_prompts(ids: list[list[int]], context: int) -> None:
    """Raise InputError for a prompt that leaves no room for an answer."""
    for number, prompt in enumerate(ids):
        if len(prompt) >= context:
            raise InputError(f"prompt {number} has {len(prompt)} tokens and the model a context of {context}: leave it out")


@functools.lru_cache(maxsize=1)  # several files of answers by one model take one load
def load_engine(engine: str, folder: str, seed: int):
    """(answers of a list of prompts, its most prompts at once or None for --batch_size): a function (prompts, max_new_tokens,
    temperature, top_p, seed) -> [(text, finished)] by "transformers" or by "vllm". Raises InputError if vLLM is missing."""
    tokenizer = load_tokenizer(folder)
    if engine == "transformers":
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model = AutoModelForCausalLM.from_pretrained(folder).to(device).eval()

        def by_transformers(prompts, max_new_tokens, temperature, top_p, seed):
            return generate(model, tokenizer, prompts, max_new_tokens, temperature, top_p, len(prompts), seed)

        return by_transformers, None
    try:
        from vllm import LLM, SamplingParams
    except ImportError:
        raise InputError("--engine vllm needs vLLM, which is not installed: pip install vllm") from None
    model = LLM(model=folder, seed=seed)
    ends = stop_tokens(GenerationConfig.from_pretrained(folder), tokenizer)

    def by_vllm(prompts, max_new_tokens, temperature, top_p, seed):
        ids = [tokenize_text(tokenizer, prompt_text(tokenizer, prompt)) for prompt in prompts]
        context = model.llm_engine.model_config.max_model_len
        check_prompts(ids, context)
        requests, options = [{"prompt_token_ids": prompt} for prompt in ids], []
        for number, prompt in enumerate(ids):
            room = min(max_new_tokens, context - len(prompt))
            options.append(
                SamplingParams(
                    temperature=temperature, top_p=top_p, max_tokens=room, seed=seed + number, stop_token_ids=sorted(ends)
                )
            )
        outputs = [request.outputs[0] for request in model.generate(requests, options)]
        texts = [[token for token in output.token_ids if token not in ends] for output in outputs]
        decoded = [tokenizer.decode(tokens, skip_special_tokens=True).strip() for tokens in texts]
        return [(text, output.finish_reason == "stop") for text, output in zip(decoded, outputs)]

    return by_vllm, 512


def answer(
    name: str,
    prompts: list,
    path: Path | None = None,
    engine: str = "transformers",
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    batch_size: int = 8,
    seed: int = 0,
) -> list[tuple[str, bool]]:
    """Answer every prompt with the model in a folder or of a hub id, as `generate` does, and keep the answers in `path`.

    The file holds one JSON object a line: the settings, then {"index", "output", "finished"}. Batches and their seeds depend
    on the prompts and settings alone, so a run that was stopped goes on with the first batch that is missing and ends with the
    same answers. Raises InputError if the file holds answers of other prompts, weights or settings, and for a prompt that
    fills the model's context.
    """
    folder = resolve_model(name)
    tokenizer = load_tokenizer(folder)
    settings = {"model": name, "weights_sha256": weights_fingerprint(folder), "engine": engine, "temperature": temperature}
    settings |= {"top_p": top_p, "max_new_tokens": max_new_tokens, "batch_size": batch_size, "seed": seed}
    settings["prompts_sha256"] = hashlib.sha256(json.dumps(prompts).encode()).hexdigest()
    known = {key: value for key, value in settings.items() if key != "model"}  # a folder has many names, its weights one hash
    done = {}
    if path and path.exists():
        content = path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]  # a line that was being written when the run was stopped is dropped
        first, *lines = map(json.loads, whole.splitlines() or [json.dumps(settings)])
        changed = [f"{key} was {first.get(key)}, is {value}" for key, value in known.items() if first.get(key) != value]
        if changed:
            raise InputError(f"{path} holds other answers ({'; '.join(changed)}): remove it, or write to another place")
        done = {line["index"]: (line["output"], line["finished"]) for line in lines}
        if whole != content:
            path.write_bytes(whole)
    if path and not (path.exists() and path.stat().st_size):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(settings) + "\n")
    if len(done) == len(prompts):
        return [done[i] for i in range(len(prompts))]
    ids = [tokenize_text(tokenizer, prompt_text(tokenizer, prompt)) for prompt in prompts]
    check_prompts(ids, context_length(AutoConfig.from_pretrained(folder)))
    run, size = load_engine(engine, folder, seed)
    order = sorted(range(len(prompts)), key=lambda i: -len(ids[i]))  # longest first, as in generate
    size = size or batch_size
    progress = tqdm(total=len(prompts), initial=len(done), desc=Path(name).name, unit="answer", dynamic_ncols=True)
    for start in range(0, len(order), size):
        batch = order[start : start + size]
        if all(i in done for i in batch):
            continue
        answers = run([prompts[i] for i in batch], max_new_tokens, temperature, top_p, seed + start)
        new = {i: pair for i, pair in zip(batch, answers) if i not in done}
        if path:
            lines = [json.dumps({"index": i, "output": text, "finished": end}) for i, (text, end) in new.items()]
            with open(path, "a") as file:
                file.write("".join(line + "\n" for line in lines))
        done |= new
        progress.update(len(new))
    progress.close()
    return [done[i] for i in range(len(prompts))]


def short_name(name: str) -> str:
    """What a model is called in files and tables: the last part of its id or folder; of a run's `final` folder, the run."""
    path = Path(resolve_model(name)) if name == "demo" else Path(name)
    path = path.resolve() if path.exists() else path
    return path.parent.name if path.name == "final" else path.name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", required=True, help="folders or hub ids; 'demo' is the demo's base model")
    parser.add_argument("--data", default="demo/heldout.jsonl", help="preference data whose prompts to answer")
    parser.add_argument("--num_prompts", type=int, default=4, help="spread over the data; 0: all")
    parser.add_argument("--max_new_tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    parser.add_argument("--top_p", type=float, default=1.0)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--engine", choices=["transformers", "vllm"], default="transformers")
    parser.add_argument("--output_dir", default="", help="folder for the answers, one .jsonl for each model; empty: not kept")
    args = parser.parse_args()

    if args.engine == "vllm" and len(args.models) > 1:
        raise InputError("--engine vllm takes one model: a second one in the same process finds no memory left")
    rows = load_rows(args.data)
    count = min(args.num_prompts or len(rows), len(rows))
    # Spread over the data, which is often sorted by topic.
    picked = [rows[i * len(rows) // count] for i in range(count)]
    prompts = [parsed[0] for parsed in map(parse_row, picked) if parsed]
    columns = []
    for name in args.models:
        path = Path(args.output_dir) / f"{short_name(name)}.jsonl" if args.output_dir else None
        decoding = (args.max_new_tokens, args.temperature, args.top_p, args.batch_size, args.seed)
        columns.append(answer(name, prompts, path, args.engine, *decoding))
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
