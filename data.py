"""Rows of preference data → pairs of token ids → the batch of each step → packed micro-batches.

See what will be trained on, token by token:

    python data.py demo/train.jsonl --model demo
    python data.py HuggingFaceH4/ultrafeedback_binarized:test_prefs --model Qwen/Qwen2.5-0.5B-Instruct
"""

import argparse
import glob
import gzip
import hashlib
import heapq
import inspect
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import torch
from filelock import FileLock
from transformers import AutoTokenizer

CACHE_DIR = Path(os.environ.get("SIMPER_CACHE", "~/.cache/simper")).expanduser()


class InputError(ValueError):
    """The user's input is at fault: the message says what is wrong, where, and what to do."""


DROPPED = ("empty", "identical", "different prompts", "end of turn inside")
COLUMNS = ("prompt", "chosen", "rejected")
FILE_TYPES = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
FORMATS = """Accepted rows (further columns are ignored):
  {"prompt": text, "chosen": text, "rejected": text}
  {"prompt": [messages], "chosen": text or [one assistant message], "rejected": likewise}
  {"chosen": [messages], "rejected": [messages]}       the same messages up to the last, which is the assistant's
  {"chosen": "\\n\\nHuman: ...\\n\\nAssistant: ...", "rejected": ...}              a dialogue as in Anthropic's HH
A message is {"role": "system" or "user" or "assistant", "content": text}."""


# ---- Sources and rows -----------------------------------------------------------------------------------------------


def load_rows(source: str) -> datasets.Dataset:
    """The rows of one source: a file (.jsonl .json .csv, also .gz, or .parquet), a folder written by datasets'
    `save_to_disk` (`folder` or `folder:split`), or a hub id (`name`, `name:split`, `name:config:split`; default: train).

    Raises InputError, naming the source and, for JSON lines, the line, when it cannot be read.
    """
    path, _, split = source.partition(":")
    try:
        if Path(path).is_dir():
            rows = datasets.load_from_disk(path)
            splits = rows if isinstance(rows, datasets.DatasetDict) else {"train": rows}
            if (split or "train") not in splits:
                raise InputError(
                    f"it has no split '{split or 'train'}', only the splits {', '.join(splits)}: write {path}:SPLIT"
                )
            rows = splits[split or "train"].with_format(None)
        elif Path(path).is_file() or Path(source.lower().removesuffix(".gz")).suffix in FILE_TYPES:
            rows = load_file(source)
        else:
            name, *config, split = source.split(":") if ":" in source else (source, "train")
            rows = datasets.load_dataset(name, *config, split=split)
    except Exception as error:
        reason = error if isinstance(error, InputError) else error.__cause__ or error
        raise InputError(f"{source}: cannot be read: {reason}") from error
    if len(rows) == 0:
        raise InputError(f"{source}: has no rows")
    return rows


def load_file(path: str) -> datasets.Dataset:
    """The rows of one local file. Raises InputError if it is missing, of an unknown type, malformed or without rows."""
    if not Path(path).is_file():
        raise InputError(f"no such file (working directory: {os.getcwd()})")
    kind = FILE_TYPES.get(Path(path.lower().removesuffix(".gz")).suffix)
    if kind is None or path.lower().endswith(".parquet.gz"):
        raise InputError("its type is not .jsonl, .json, .csv (also .gz) or .parquet")
    content = Path(path).read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    # "4" and "None" are answers, too.
    text = {"converters": dict.fromkeys(COLUMNS, str), "keep_default_na": False} if kind == "csv" else {}
    try:
        # A cache of its own for each content: datasets knows a file by path and time, which a copy can leave unchanged.
        cache = str(CACHE_DIR / "rows" / digest[:32])
        rows = datasets.load_dataset(kind, data_files=glob.escape(path), split="train", cache_dir=cache, **text)
    except Exception as error:
        if content.startswith(b"\x1f\x8b"):
            content = gzip.decompress(content)
        if not content.strip() or "no data" in str(error):
            raise InputError("has no rows") from error
        # The reader's own message does not name the line.
        for number, line in enumerate(content.decode("utf-8-sig", "replace").split("\n") if ".jsonl" in path else (), 1):
            try:
                if line.strip() and not isinstance(json.loads(line), dict):
                    raise InputError(f"line {number} is not a JSON object") from error
            except json.JSONDecodeError as reason:
                raise InputError(f"line {number} is not valid JSON ({reason})") from error
        raise
    rows._fingerprint = digest  # the key of what is cached downstream
    return rows


def parse_row(row: dict) -> tuple[list | str, str, str] | None:
    """One row in any of FORMATS → (prompt, chosen answer, rejected answer), or None if the two do not answer the same
    prompt, or ([], "", "") if prompt, chosen or rejected is empty.

    The prompt is a list of messages, or text where the row has text. Only the last assistant turn is the answer.
    Raises InputError for a row in none of the formats.
    """
    prompt, chosen, rejected = (row.get(column) for column in COLUMNS)
    if isinstance(chosen, str) and isinstance(rejected, str):
        if chosen.startswith("\n\nHuman:"):
            marker = "\n\nAssistant:"
            (context, found, chosen), (other, _, rejected) = (text.rpartition(marker) for text in (chosen, rejected))
            if found:
                comparable = context == other and "\n\nHuman:" not in chosen + rejected
                return (context + marker, chosen, rejected) if comparable else None
        elif isinstance(prompt, str) and prompt.strip():
            return prompt, chosen, rejected
        elif is_conversation(prompt) and prompt[-1]["role"] != "assistant":
            return as_messages(prompt), chosen, rejected
    elif is_conversation(chosen) and is_conversation(rejected):
        (*context, chosen), (*other, rejected) = as_messages(chosen), as_messages(rejected)
        if chosen["role"] == rejected["role"] == "assistant":
            if context != other:
                return None
            if context and (not is_conversation(prompt) or as_messages(prompt) == context):
                return context, chosen["content"], rejected["content"]  # a prompt column as text is redundant here
            if not context and isinstance(prompt, str) and prompt.strip():
                return prompt, chosen["content"], rejected["content"]
            if not context and is_conversation(prompt) and prompt[-1]["role"] != "assistant":
                return as_messages(prompt), chosen["content"], rejected["content"]
    if any(row.get(column) in ("", []) for column in COLUMNS):
        return [], "", ""
    kinds = {column: type(value).__name__ for column, value in row.items()}
    raise InputError(f"in none of the accepted formats; its columns are {kinds}.\n{FORMATS}")


def is_conversation(value) -> bool:
    """Whether value is a non-empty list of messages with a known role and text as content."""
    return (
        isinstance(value, list)
        and len(value) > 0
        and all(isinstance(message, dict) and isinstance(message.get("content"), str) for message in value)
        and all(message.get("role") in ("system", "user", "assistant") for message in value)
    )


def as_messages(prompt: list | str) -> list[dict]:
    """A prompt as messages: HH's dialogue text is split into its turns, any other text is one user message."""
    if not isinstance(prompt, str):
        return [{"role": message["role"], "content": message["content"]} for message in prompt]
    if not prompt.startswith("\n\nHuman:"):
        return [{"role": "user", "content": prompt}]
    messages = []
    for turn in prompt.rstrip().removesuffix("\n\nAssistant:").split("\n\nHuman:")[1:]:
        user, *answers = turn.split("\n\nAssistant:")
        messages.append({"role": "user", "content": user.strip()})
        messages.extend({"role": "assistant", "content": answer.strip()} for answer in answers)
    return messages


# ---- Tokens ---------------------------------------------------------------------------------------------------------


def load_tokenizer(name: str):
    """The tokenizer of a hub id or local folder. Never runs code that comes with it. Raises InputError if there is none."""
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise InputError(f"no tokenizer can be loaded from {name}: {error}") from error


def prompt_text(tokenizer, prompt: list | str) -> str:
    """The prompt as the model sees it at inference: the chat template, ending with the assistant's header.

    Without a chat template, text stays as it is and messages are written as a dialogue in HH's form.
    """
    if tokenizer.chat_template:
        return tokenizer.apply_chat_template(as_messages(prompt), tokenize=False, add_generation_prompt=True)
    if isinstance(prompt, str):
        return prompt
    names = {"system": "", "user": "\n\nHuman: ", "assistant": "\n\nAssistant: "}
    return "".join(names[message["role"]] + message["content"] for message in prompt) + "\n\nAssistant:"


def end_of_turn(tokenizer) -> tuple[int, str]:
    """(id of the token that ends an assistant's turn, the text that the chat template writes after the answer).

    The token is the first special token after the answer; the tokenizer's EOS if there is none, or no template.
    Raises InputError if there is no such token at all, or if the template fails on a question and an answer.
    """
    tail = ""
    if tokenizer.chat_template:
        probe = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "ANSWER"}]
        try:
            tail = tokenizer.apply_chat_template(probe, tokenize=False).rpartition("ANSWER")[2]
        except Exception as error:
            raise InputError(f"the tokenizer's chat template fails on a question and an answer: {error}") from error
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special} | set(tokenizer.all_special_ids)
    ids = [i for i in tokenizer(tail, add_special_tokens=False).input_ids if i in special]
    if not ids and tokenizer.eos_token_id is None:
        raise InputError("the tokenizer has neither an EOS token nor a chat template that ends the assistant's turn")
    return (ids[0] if ids else tokenizer.eos_token_id), tail


def tokenize_text(tokenizer, text: str) -> list[int]:
    """Token ids of a prompt, or of a prompt with an answer. A chat template writes its own BOS; plain text gets the
    one that the tokenizer adds. Never two of them, and never an EOS at the end."""
    ids = tokenizer(text, add_special_tokens=not tokenizer.chat_template).input_ids
    if not tokenizer.chat_template and ids and ids[-1] == tokenizer.eos_token_id:
        ids = ids[:-1]
    while len(ids) > 1 and ids[0] == ids[1] == tokenizer.bos_token_id:
        ids = ids[1:]
    return ids


def tokenize_answer(tokenizer, prompt: list | str, prompt_ids: list[int], answer: str, end: tuple[int, str]) -> list[int]:
    """Ids of the response: what the chat template writes after the prompt, up to and including one end-of-turn token.

    They are the ids that follow the prompt's in the whole text; where the tokenizer would merge the prompt's last
    characters with the answer's first ones, those that follow a line break, so that the prompt keeps its ids.
    An answer without any text gives [].
    """
    start = prompt_text(tokenizer, prompt)
    end_id, tail = end
    end_text = tokenizer.convert_ids_to_tokens(end_id)
    if tokenizer.chat_template:
        if isinstance(prompt, str) and prompt.startswith("\n\nHuman:"):
            answer = answer.strip()  # as as_messages does with the dialogue's earlier turns
        messages = [*as_messages(prompt), {"role": "assistant", "content": answer}]
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        if not text.startswith(start) or not text.endswith(tail):
            raise InputError(
                "the chat template does not render this conversation as the prompt followed by the answer, "
                "so the answer's tokens cannot be told from the prompt's"
            )
        body = text[len(start) : len(text) - len(tail)]
    else:
        body = answer if isinstance(prompt, str) else " " + answer
    while body.rstrip().endswith(end_text):  # the data wrote it already
        body = body.rstrip().removesuffix(end_text)
    if not body.strip():
        return []
    body += tail.partition(end_text)[0]  # what the template writes between the answer and the end of the turn
    for before, before_ids in ((start, prompt_ids), ("\n", tokenize_text(tokenizer, "\n"))):
        ids = tokenize_text(tokenizer, before + body)
        if ids[: len(before_ids)] == before_ids:
            return [*ids[len(before_ids) :], end_id]
    return [*tokenizer(body, add_special_tokens=False).input_ids, end_id]


def truncate(prompt: list, chosen: list, rejected: list, max_length: int, max_prompt_length: int) -> tuple[list, list, list]:
    """The authors' rule, on token ids. Only if prompt + longer response exceeds max_length is the prompt cut to its
    last max_prompt_length tokens; if it still does, responses are cut to their first max_length - max_prompt_length.

    >>> truncate([1, 2, 3, 4], [5, 6, 7], [8], max_length=5, max_prompt_length=3)
    ([2, 3, 4], [5, 6], [8])
    """
    longer = max(len(chosen), len(rejected))
    if len(prompt) + longer > max_length:
        prompt = prompt[-max_prompt_length:]
    if len(prompt) + longer > max_length:
        chosen, rejected = (ids[: max_length - max_prompt_length] for ids in (chosen, rejected))
    return prompt, chosen, rejected


def load_pairs(sources: str, tokenizer, max_length: int, max_prompt_length: int) -> tuple[datasets.Dataset, str]:
    """Tokenized pairs of the comma-separated sources, in order, and a sentence on what was dropped and truncated.

    Columns: prompt, chosen, rejected (lists of int32 token ids); lengths [prompt, chosen, rejected]; source, row (where
    the pair comes from). Cached on disk. Any number of processes may call this: one tokenizes while the others wait at
    a file lock, not in a collective, whose timeout a large data set would exceed.
    Raises InputError, naming source and row, for a row in no accepted format.
    """
    if not 0 < max_prompt_length < max_length:
        raise InputError(f"max_prompt_length ({max_prompt_length}) must be positive and below max_length ({max_length})")
    integers, text = datasets.List(datasets.Value("int32")), datasets.Value("string")
    features = {"prompt": integers, "chosen": integers, "rejected": integers, "lengths": integers}
    features = datasets.Features(features | {"source": text, "row": datasets.Value("int64"), "status": text})
    parts = []
    for source in map(str.strip, sources.strip(" ,").split(",")):
        rows = load_rows(source)
        backend = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else str(sorted(tokenizer.get_vocab().items()))
        what = (rows._fingerprint, source, backend, tokenizer.chat_template, str(tokenizer.special_tokens_map))
        code = inspect.getsource(sys.modules[__name__])  # a fork that edits this file never meets a stale cache
        key = hashlib.sha256(repr((*what, max_length, max_prompt_length, code)).encode()).hexdigest()[:32]
        (CACHE_DIR / "tokenized").mkdir(parents=True, exist_ok=True)
        with FileLock(CACHE_DIR / "tokenized" / f"{key}.lock"):
            parts.append(
                rows.map(
                    tokenize_row,
                    with_indices=True,
                    fn_kwargs={
                        "source": source,
                        "tokenizer": tokenizer,
                        "end": end_of_turn(tokenizer),
                        "max_length": max_length,
                        "max_prompt_length": max_prompt_length,
                    },
                    features=features,
                    remove_columns=rows.column_names,
                    num_proc=min(os.cpu_count() or 1, 16) if len(rows) > 5000 else None,
                    cache_file_name=str(CACHE_DIR / "tokenized" / f"{key}.arrow"),
                    new_fingerprint=key,
                    desc=f"tokenizing {source}",
                )
            )
    pairs = datasets.concatenate_datasets(parts)
    status = np.array(pairs["status"])
    kept = np.flatnonzero(np.isin(status, ["whole", "truncated"]))
    dropped = ", ".join(f"{np.sum(status == reason)} {reason}" for reason in DROPPED)
    report = (
        f"{len(kept)} pairs from {sources}: {len(pairs) - len(kept)} of {len(pairs)} rows dropped ({dropped}), "
        f"{np.sum(status == 'truncated') / max(len(kept), 1):.1%} of the pairs truncated"
    )
    if len(kept) == 0:
        raise InputError(f"no pairs are left: {report}")
    return pairs.select(kept).remove_columns("status"), report


def tokenize_row(row: dict, index: int, source: str, tokenizer, end, max_length: int, max_prompt_length: int) -> dict:
    """One row → token ids of prompt, chosen and rejected, and their status: whole, truncated, or why it is dropped."""
    try:
        parsed = parse_row(row)
        prompt, chosen, rejected, status = [], [], [], "different prompts"
        if parsed:
            prompt_ids = tokenize_text(tokenizer, prompt_text(tokenizer, parsed[0])) if parsed[0] else []
            answers = (tokenize_answer(tokenizer, parsed[0], prompt_ids, text, end) for text in parsed[1:])
            whole = (prompt_ids, *answers) if prompt_ids else ([], [], [])
            prompt, chosen, rejected = truncate(*whole, max_length, max_prompt_length)
            status = "whole" if (prompt, chosen, rejected) == whole else "truncated"
            if not (prompt and chosen and rejected):
                status = "empty"
            elif end[0] in chosen[:-1] + rejected[:-1]:
                status = "end of turn inside"
            elif chosen == rejected:  # no preference is left: the two sides' gradients cancel
                status = "identical"
    except Exception as error:
        raise InputError(f"{source}, row {index}: {error}") from None
    lengths = [len(prompt), len(chosen), len(rejected)]
    ids = {"prompt": prompt, "chosen": chosen, "rejected": rejected, "lengths": lengths}
    return ids | {"source": source, "row": index, "status": status}


def fingerprint(pairs: datasets.Dataset) -> str:
    """SHA-256 over the token ids of all pairs in order: equal if and only if two runs train on the same tokens."""
    digest = hashlib.sha256()
    for table in pairs.with_format("arrow").iter(batch_size=1000):
        for column in ("lengths", "prompt", "chosen", "rejected"):
            digest.update(table[column].combine_chunks().flatten().to_numpy(zero_copy_only=False).tobytes())
    return digest.hexdigest()


# ---- Batches --------------------------------------------------------------------------------------------------------


def step_indices(num_pairs: int, batch_size: int, seed: int, step: int) -> list[int]:
    """Which pairs are in `step` (counted from 0): they depend on the seed and the step alone.

    Each epoch is a new permutation of all pairs. Its last num_pairs % batch_size pairs, too few for a batch, are left
    out, so that every step is over exactly batch_size pairs.
    """
    epoch, position = divmod(step, num_pairs // batch_size)
    order = np.random.default_rng([seed, epoch]).permutation(num_pairs)
    return order[position * batch_size : (position + 1) * batch_size].tolist()


def split(tokens: list[int], ranks: int, micro_batch_tokens: int) -> list[list[list[int]]]:
    """Spread pairs over micro-batches × ranks: result[m][r] lists the positions in `tokens` that rank r takes in its
    micro-batch m. No micro-batch is empty or holds more than micro_batch_tokens, their number is the least that the
    method finds, and their costs are balanced (longest pair first, each to the least loaded micro-batch).

    tokens: the distinct tokens of each pair. Raises InputError if the pairs cannot be spread so.

    >>> split([5, 3, 4, 4], ranks=2, micro_batch_tokens=8)
    [[[0, 1], [2, 3]]]
    """
    if len(tokens) < ranks:
        raise InputError(f"{len(tokens)} pairs cannot be spread over {ranks} ranks: every rank needs at least one")
    if max(tokens) > micro_batch_tokens:
        raise InputError(
            f"a pair of {max(tokens)} tokens (prompt + chosen + rejected) is longer than "
            f"micro_batch_tokens={micro_batch_tokens}: raise it, or lower max_length"
        )
    longest_first = sorted(range(len(tokens)), key=lambda i: -tokens[i])
    for count in range(-(-sum(tokens) // (ranks * micro_batch_tokens)), len(tokens) // ranks + 1):
        bins = [(0, number, []) for number in range(count * ranks)]
        for i in longest_first:
            load, number, members = bins[0]
            heapq.heapreplace(bins, (load + tokens[i], number, members + [i]))
        if max(bins)[0] <= micro_batch_tokens:
            # Bins of similar cost run side by side: in each of them the ranks wait for the slowest.
            members = [sorted(members) for _, _, members in sorted(bins, key=lambda b: (-b[0], b[1]))]
            return [members[m * ranks : (m + 1) * ranks] for m in range(count)]
    raise InputError(
        f"{len(tokens)} pairs cannot be spread over {ranks} ranks in micro-batches of at most "
        f"micro_batch_tokens={micro_batch_tokens} tokens: raise it, or make the number of pairs a multiple of the ranks'"
    )


@dataclass
class MicroBatch:
    """Pairs packed into one row of T distinct tokens, each prompt once, without padding; R response tokens in all.

    The pair with prompt ids [1, 2], chosen [3, 4] and rejected [5], alone, is:

        input_ids    [1, 2, 3, 4, 5]    (T,) int64
        position_ids [0, 1, 2, 3, 2]    (T,) int64; the rejected response continues from the prompt's end
        predictors   [1, 2, 1]          (R,) int64; the position whose hidden state predicts each response token: the
                                        prompt's last token predicts the first token of both responses
        targets      [3, 4, 5]          (R,) int64; the response tokens: chosen, then rejected, pair after pair
        lengths      [[2, 1]]           (pairs, 2) int64; response tokens of chosen and rejected
        segments     [(2, 2, 1)]        tokens of prompt, chosen and rejected of each pair, as Python integers
        reference    None               or, for a loss with a reference model, (pairs, 2) float32: the summed log-probs of
                                        chosen and rejected under it
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    predictors: torch.Tensor
    targets: torch.Tensor
    lengths: torch.Tensor
    segments: list[tuple[int, int, int]]
    reference: torch.Tensor | None = None

    def to(self, device) -> "MicroBatch":
        """The same on `device`."""
        tensors = (self.input_ids, self.position_ids, self.predictors, self.targets, self.lengths)
        reference = None if self.reference is None else self.reference.to(device, non_blocking=True)
        return MicroBatch(*(tensor.to(device, non_blocking=True) for tensor in tensors), self.segments, reference)


def pack(pairs: list[tuple[list[int], list[int], list[int]]]) -> MicroBatch:
    """Lay out pairs (prompt ids, chosen ids, rejected ids) as one MicroBatch: see its example."""
    input_ids, position_ids, predictors, targets, segments = [], [], [], [], []
    for prompt, chosen, rejected in pairs:
        p, c, r, start = len(prompt), len(chosen), len(rejected), len(input_ids)
        input_ids += [*prompt, *chosen, *rejected]
        position_ids += [*range(p + c), *range(p, p + r)]
        predictors += [*range(start + p - 1, start + p + c - 1)]
        predictors += [start + p - 1, *range(start + p + c, start + p + c + r - 1)]
        targets += [*chosen, *rejected]
        segments.append((p, c, r))
    arrays = (input_ids, position_ids, predictors, targets, [[c, r] for _, c, r in segments])
    return MicroBatch(*(torch.tensor(array) for array in arrays), segments)


def pack_rows(pairs: datasets.Dataset, indices: list[int], reference: torch.Tensor | None = None) -> MicroBatch:
    """The pairs at `indices` of a data set made by load_pairs, packed; `reference`: (len(pairs), 2) or None."""
    rows = pairs[indices]
    batch = pack(list(zip(rows["prompt"], rows["chosen"], rows["rejected"])))
    batch.reference = None if reference is None else reference[indices]
    return batch


# ---- Looking at the data --------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="sources as for --train_data")
    parser.add_argument("--model", default="demo", help="hub id or folder whose tokenizer to use")
    parser.add_argument("--num_pairs", type=int, default=2, help="pairs to print")
    parser.add_argument("--max_length", type=int, default=2048)
    parser.add_argument("--max_prompt_length", type=int, default=1800)
    args = parser.parse_args()

    from model import resolve_model

    tokenizer = load_tokenizer(resolve_model(args.model))
    pairs, report = load_pairs(args.data, tokenizer, args.max_length, args.max_prompt_length)
    for pair in pairs.select(range(min(args.num_pairs, len(pairs)))):
        print(f"{pair['source']}, row {pair['row']}")
        for part in ("prompt", "chosen", "rejected"):
            tokens = "|".join(repr(tokenizer.decode([i]))[1:-1] for i in pair[part])
            print(f"  {part} ({len(pair[part])} tokens, {'context' if part == 'prompt' else 'scored'}): {tokens}")
    lengths = np.array(pairs["lengths"])
    print(f"{report}\n{'tokens':<10}{'mean':>8}{'median':>8}{'95 %':>8}{'max':>8}")
    for name, column in zip(("prompt", "chosen", "rejected", "pair"), (*lengths.T, lengths.sum(axis=1))):
        figures = (column.mean(), np.median(column), np.percentile(column, 95), column.max())
        print(f"{name:<10}" + "".join(f"{figure:>8.0f}" for figure in figures))


if __name__ == "__main__":
    from data import InputError, main  # one class InputError, also for what model.py raises

    try:
        main()
    except InputError as error:
        sys.exit(f"error: {error}")
