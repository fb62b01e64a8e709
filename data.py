"""Rows of preference data → pairs of token ids → the pairs of each step → packed micro-batches.

`python -m eval.show_pairs SOURCE --model MODEL` prints what will be trained on, token by token.
"""

import functools
import glob
import gzip
import hashlib
import heapq
import inspect
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import datasets
import numpy as np
import torch
from filelock import FileLock
from jinja2 import TemplateError
from transformers import AutoTokenizer

if sys.version_info < (3, 11):  # noqa: UP036
    sys.exit("SimPER needs Python 3.11 or newer; this is " + sys.version.split()[0])
CACHE_DIR = Path(os.environ.get("SIMPER_CACHE", "~/.cache/simper")).expanduser()


class InputError(ValueError):
    """The user's input is at fault: the message says what is wrong, where, and what to do."""


# Put before a chat template, it makes today 26 July 2024, which is Llama-3.1's own default: the
# real date would change the tokens from day to day. (+: the template's first line break stays.)
DATE = "{% macro strftime_now(f) %}{{ f | replace('%d', '26') | replace('%m', '07')"
DATE += " | replace('%b', 'Jul') | replace('%B', 'July') | replace('%y', '24')"
DATE += " | replace('%Y', '2024') }}{% endmacro +%}"
DROPPED = ("empty", "identical", "different prompts", "end of turn inside", "refused by template")
COLUMNS = ("prompt", "chosen", "rejected")
UNREAD = ("tool_calls", "reasoning_content", "reasoning", "thinking")  # a message's other parts
FILE_TYPES = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
FORMATS = """Accepted rows (further columns are ignored, but a system prompt must be a message):
  {"prompt": text, "chosen": text, "rejected": text}
  {"prompt": [messages], "chosen": text or [one assistant message], "rejected": likewise}
  {"chosen": [messages], "rejected": [messages]}  equal up to the last message, an assistant's
  {"chosen": "\\n\\nHuman: ...\\n\\nAssistant: ...", "rejected": ...}    a dialogue as in HH-RLHF
A message is {"role": "system" or "user" or "assistant", "content": text}; the content holds all of
it: calls of tools, or reasoning, in keys of their own are not read."""


# ---- Sources and rows ----------------------------------------------------------------------------


def load_rows(source: str) -> datasets.Dataset:
    """The rows of one source: a file (.jsonl .json .csv, also .gz, or .parquet), a folder written
    by datasets' `save_to_disk` (`folder` or `folder:split`), or a hub id (`name`, `name:split`,
    `name:config:split`; default: train).

    Raises InputError, naming the source and, for JSON lines, the line, when it cannot be read.
    """
    path, _, name = source.partition(":")
    kind = FILE_TYPES.get(Path(source.lower().removesuffix(".gz")).suffix)
    try:
        if not source:
            raise InputError("a source is empty: give a file, a folder or a hub id")
        if Path(path).is_dir():
            rows, name = datasets.load_from_disk(path), name or "train"
            splits = rows if isinstance(rows, datasets.DatasetDict) else {"train": rows}
            if name not in splits:
                choice = f"write {path}:SPLIT with one of the splits {', '.join(splits)}"
                raise InputError(f"it has no split '{name}': {choice}")
            rows = splits[name].with_format(None)
            # datasets names a folder's rows by how they were made, not by what they are.
            rows._fingerprint = name + files_digest(sorted(Path(path).rglob("*.arrow")))
        elif kind or Path(source).is_file():
            rows = load_file(source, kind)
        else:
            name, *config, split = source.split(":") if ":" in source else (source, "train")
            rows = datasets.load_dataset(name, *config, split=split)
    except Exception as error:
        reason = error if isinstance(error, InputError) else error.__cause__ or error
        raise InputError(f"{source}: cannot be read: {reason}") from error
    if len(rows) == 0:
        raise InputError(f"{source}: has no rows")
    return rows


def files_digest(paths: list[Path]) -> str:
    """SHA-256 over the contents of files."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(file_digest(path, path.stat().st_size, path.stat().st_mtime_ns))
    return digest.hexdigest()


@functools.cache
def file_digest(path: Path, size: int, time: int) -> bytes:
    """SHA-256 of a file, read again only if its size or its time in ns changes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def load_file(path: str, kind: str | None) -> datasets.Dataset:
    """The rows of one local file; kind: of FILE_TYPES, or None for another. Raises InputError if
    it is missing, of another type, malformed or without rows."""
    if not Path(path).is_file():
        raise InputError(f"no such file (working directory: {os.getcwd()})")
    if kind is None or path.lower().endswith(".parquet.gz"):
        raise InputError("its type is not .jsonl, .json, .csv (also .gz) or .parquet")
    content = Path(path).read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    options = {}
    if kind == "csv":  # "4" and "None" are answers, too
        options = {"converters": dict.fromkeys(COLUMNS, str), "keep_default_na": False}
    try:
        # datasets knows a file by path and time, which a copy can leave unchanged: each content has
        # a cache of its own.
        options["cache_dir"] = str(CACHE_DIR / "rows" / digest[:32])
        rows = datasets.load_dataset(kind, data_files=glob.escape(path), split="train", **options)
    except Exception as error:
        if content.startswith(b"\x1f\x8b"):
            content = gzip.decompress(content)
        if not content.strip() or "no data" in str(error):
            raise InputError("has no rows") from error
        # The reader's own message does not name the line.
        lines = content.decode("utf-8-sig", "replace").split("\n") if ".jsonl" in path else []
        for number, line in enumerate(lines, 1):
            try:
                if line.strip() and not isinstance(json.loads(line), dict):
                    raise InputError(f"line {number} is not a JSON object") from error
            except json.JSONDecodeError as reason:
                raise InputError(f"line {number} is not valid JSON ({reason})") from error
        raise
    rows._fingerprint = digest  # the key of what is cached downstream
    return rows


def parse_row(row: dict) -> tuple[list | str, str, str] | None:
    """One row in any of FORMATS → (prompt, chosen answer, rejected answer), or None if the two do
    not answer the same prompt, or ([], "", "") if an empty value keeps it from every format.

    The prompt is a list of messages, or text where the row has text. Only the last assistant turn
    is the answer. Raises InputError for a row in none of the formats.
    """
    context = []
    prompt, chosen, rejected = (row.get(column) for column in COLUMNS)
    if is_conversation(chosen) and is_conversation(rejected):
        (*context, last), (*other, other_last) = as_messages(chosen), as_messages(rejected)
        if last["role"] == other_last["role"] == "assistant":
            if context != other:
                return None
            chosen, rejected = last["content"], other_last["content"]
            if context and (not is_conversation(prompt) or as_messages(prompt) == context):
                return context, chosen, rejected  # a prompt column as text is redundant here
    if not context and isinstance(chosen, str) and isinstance(rejected, str):
        if chosen.startswith("\n\nHuman:"):
            marker = "\n\nAssistant:"
            context, found, chosen = chosen.rpartition(marker)
            other, _, rejected = rejected.rpartition(marker)
            if found:
                comparable = context == other and "\n\nHuman:" not in chosen + rejected
                return (context + marker, chosen, rejected) if comparable else None
        elif isinstance(prompt, str) and prompt.strip() and not row.get("system"):
            return prompt, chosen, rejected
        elif is_conversation(prompt) and prompt[-1]["role"] != "assistant":
            return as_messages(prompt), chosen, rejected
    blank = [v == [] or isinstance(v, str) and not v.strip() for v in (prompt, chosen, rejected)]
    answers = all(isinstance(v, str) or is_conversation(v) for v in (chosen, rejected))
    if any(blank[1:]) or blank[0] and answers:
        return [], "", ""
    kinds = {column: type(value).__name__ for column, value in row.items()}
    raise InputError(f"in none of the accepted formats; its columns are {kinds}.\n{FORMATS}")


def is_conversation(value) -> bool:
    """Whether value is a non-empty list of messages with a known role, text as content, and nothing
    in keys that are UNREAD."""
    return (
        isinstance(value, list)
        and len(value) > 0
        and all(isinstance(m, dict) and isinstance(m.get("content"), str) for m in value)
        and all(m.get("role") in ("system", "user", "assistant") for m in value)
        and not any(m.get(key) for m in value for key in UNREAD)
    )


def as_messages(prompt: list | str) -> list[dict]:
    """A prompt as messages: HH's dialogue text is split into its turns, any other text is one user
    message."""
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


# ---- Tokens --------------------------------------------------------------------------------------


def load_tokenizer(name: str, chat_template: str = ""):
    """The tokenizer of a hub id or local folder, with the chat template of the file chat_template
    in place of its own. Never runs code that comes with it. Raises InputError if one of them cannot
    be read."""
    try:
        # mistral_format: the tokenizer of mistral-common, where that is installed, has no template.
        options = {"trust_remote_code": False, "mistral_format": False}
        tokenizer = AutoTokenizer.from_pretrained(name, **options)
        if chat_template:
            tokenizer.chat_template = Path(chat_template).read_text()
        return tokenizer
    except Exception as error:  # transformers raises KeyError, and tokenizers Exception itself
        raise InputError(f"no tokenizer can be loaded from {name}: {error}") from error


def tokenizer_digests(tokenizer) -> dict[str, str]:
    """SHA-256 of what tokenizes and of the chat template: the same for the same tokens."""
    if tokenizer.is_fast:
        vocabulary = tokenizer.backend_tokenizer.to_str()
    else:
        vocabulary = str(sorted(tokenizer.get_vocab().items()))
    parts = {"tokenizer": vocabulary + str(tokenizer.special_tokens_map)}
    parts["chat template"] = str(tokenizer.chat_template)
    return {name: hashlib.sha256(text.encode()).hexdigest() for name, text in parts.items()}


def render(tokenizer, messages: list[dict], **options) -> str:
    """The conversation by the chat template, with DATE for today."""
    dated = DATE + tokenizer.get_chat_template()
    return tokenizer.apply_chat_template(messages, chat_template=dated, tokenize=False, **options)


def prompt_text(tokenizer, prompt: list | str, header: bool = True) -> str:
    """The prompt as the model sees it at inference: the chat template, ending with the assistant's
    header (or, without `header`, before it).

    Without a chat template, text stays as it is and messages become a dialogue in HH's form.
    """
    if tokenizer.chat_template:
        return render(tokenizer, as_messages(prompt), add_generation_prompt=header)
    if isinstance(prompt, str):
        return prompt
    names = {"system": "", "user": "\n\nHuman: ", "assistant": "\n\nAssistant: "}
    turns = [names[message["role"]] + message["content"] for message in prompt]
    return "".join(turns) + "\n\nAssistant:"


def end_of_turn(tokenizer) -> tuple[int, str]:
    """(id of the token that ends an assistant's turn, the text that the chat template writes after
    the answer).

    The token is the first special token after the answer; the tokenizer's EOS if there is none, or
    no template. Raises InputError if there is no such token at all, or if the template fails on a
    question and an answer, or leaves out the answer.
    """
    tail = ""
    if tokenizer.chat_template:
        messages = [{"role": "user", "content": "question"}]
        messages += [{"role": "assistant", "content": "ANSWER"}]
        try:
            text = render(tokenizer, messages)
        except Exception as error:
            raise InputError(f"the chat template fails on a short dialogue: {error}") from error
        if "ANSWER" not in text:
            raise InputError(f"the chat template leaves out the answer; it renders {text!r}")
        tail = text.rpartition("ANSWER")[2]
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    special |= set(tokenizer.all_special_ids)
    ids = [i for i in tokenizer(tail, add_special_tokens=False).input_ids if i in special]
    if not ids and tokenizer.eos_token_id is None:
        raise InputError("the tokenizer has neither an EOS token nor a template that ends turns")
    return (ids[0] if ids else tokenizer.eos_token_id), tail


def tokenize_text(tokenizer, text: str) -> list[int]:
    """Token ids of a prompt, or of a prompt with an answer. A chat template writes its own BOS;
    plain text gets the one that the tokenizer adds. Never two of them, and never an EOS at the end.
    """
    ids = tokenizer(text, add_special_tokens=not tokenizer.chat_template).input_ids
    if not tokenizer.chat_template and ids and ids[-1] == tokenizer.eos_token_id:
        ids = ids[:-1]
    while len(ids) > 1 and ids[0] == ids[1] == tokenizer.bos_token_id:
        ids = ids[1:]
    return ids


def tokenize_pair(tokenizer, prompt: list | str, answers: list[str], end: tuple[int, str]) -> tuple:
    """Token ids of the prompt and of both responses, three lists. prompt, answers: see parse_row;
    end: see end_of_turn. Raises InputError if the chat template obscures where the answer begins.

    A response is what the chat template writes after the prompt, up to and including one
    end-of-turn token. Its ids are those that follow the prompt's in the whole text; where the
    tokenizer would merge the prompt's last characters with the answer's first ones, those that
    follow a line break, so that the prompt keeps its ids. An answer without any text gives [].
    """
    end_id, tail = end
    end_text = tokenizer.convert_ids_to_tokens(end_id)
    start = prompt_text(tokenizer, prompt)
    prompt_ids, line_break_ids = (tokenize_text(tokenizer, text) for text in (start, "\n"))

    def tokenize_answer(answer: str) -> list[int]:
        while answer.rstrip().endswith(end_text):  # the data wrote it already
            answer = answer.rstrip().removesuffix(end_text)
        body = answer if isinstance(prompt, str) else " " + answer
        if tokenizer.chat_template and answer.strip():
            if isinstance(prompt, str) and prompt.startswith("\n\nHuman:"):
                answer = answer.strip()  # as as_messages does with the dialogue's earlier turns
            messages = [*as_messages(prompt), {"role": "assistant", "content": answer}]
            text = render(tokenizer, messages)
            if not text.startswith(start) or not text.endswith(tail):
                raise InputError(
                    "the chat template does not render this conversation as the prompt followed by "
                    "the answer, so the answer's tokens cannot be told from the prompt's: give one "
                    "that does with --chat_template FILE"
                )
            if "".join(answer.split()) not in "".join(text.split()):  # such as its reasoning
                raise InputError(f"the chat template leaves out a part of the answer {answer!r}")
            body = text[len(start) : len(text) - len(tail)]
        if not body.strip():
            return []
        body += tail.partition(end_text)[0]  # what the template writes before the end of the turn
        for before, before_ids in ((start, prompt_ids), ("\n", line_break_ids)):
            ids = tokenize_text(tokenizer, before + body)
            if ids[: len(before_ids)] == before_ids:
                return [*ids[len(before_ids) :], end_id]
        return [*tokenizer(body, add_special_tokens=False).input_ids, end_id]

    return prompt_ids, *map(tokenize_answer, answers)


def truncate(prompt: list, chosen: list, rejected: list, max_length: int, max_prompt_length: int):
    """The authors' rule, on token ids: (prompt, chosen, rejected), cut. Only if prompt + longer
    response exceeds max_length is the prompt cut to its last max_prompt_length tokens; if still
    too long, responses are cut to their first max_length - max_prompt_length.

    >>> truncate([1, 2, 3, 4], [5, 6, 7], [8], max_length=5, max_prompt_length=3)
    ([2, 3, 4], [5, 6], [8])
    """
    longer = max(len(chosen), len(rejected))
    if len(prompt) + longer > max_length:
        prompt = prompt[-max_prompt_length:]
    if len(prompt) + longer > max_length:
        chosen, rejected = (ids[: max_length - max_prompt_length] for ids in (chosen, rejected))
    return prompt, chosen, rejected


def load_pairs(
    sources: str, tokenizer, max_length: int, max_prompt_length: int
) -> tuple[datasets.Dataset, str]:
    """Tokenized pairs of the comma-separated sources, in order, and a sentence on what was dropped
    and truncated.

    Columns: prompt, chosen, rejected (lists of int32 token ids); lengths [prompt, chosen,
    rejected]; source, row (where the pair comes from). Cached on disk. Any number of processes may
    call this: one tokenizes while the others wait at a file lock, not in a collective, whose
    timeout a large data set would exceed.
    Raises InputError, naming source and row, for a row in no accepted format or that the chat
    template does not render.
    """
    if not 0 < max_prompt_length < max_length:
        raise InputError(
            f"max_prompt_length ({max_prompt_length}) must be positive and below max_length "
            f"({max_length})"
        )
    integers, text = datasets.List(datasets.Value("int32")), datasets.Value("string")
    features = {"prompt": integers, "chosen": integers, "rejected": integers, "lengths": integers}
    features |= {"source": text, "row": datasets.Value("int64"), "status": text}
    limits = {"max_length": max_length, "max_prompt_length": max_prompt_length}
    shared = limits | {"tokenizer": tokenizer, "end": end_of_turn(tokenizer)}
    # With the code: a fork that edits this file never meets a stale cache.
    what = (tokenizer_digests(tokenizer), limits, inspect.getsource(sys.modules[__name__]))
    cache, parts = CACHE_DIR / "tokenized", []
    cache.mkdir(parents=True, exist_ok=True)
    for source in map(str.strip, sources.strip(" ,").split(",")):
        rows = load_rows(source)
        key = hashlib.sha256(repr((rows._fingerprint, source, *what)).encode()).hexdigest()[:32]
        folder = cache / key
        with FileLock(f"{folder}.lock"):
            folder.mkdir(exist_ok=True)
            for torn in folder.glob("tmp*"):  # of a process that was killed
                torn.unlink()
            part = rows.map(
                tokenize_row,
                with_indices=True,
                fn_kwargs={"source": source} | shared,
                features=datasets.Features(features),
                remove_columns=rows.column_names,
                num_proc=min(os.cpu_count() or 1, 16) if len(rows) > 5000 else None,
                cache_file_name=str(folder / "pairs.arrow"),
                new_fingerprint=key,
                desc=f"tokenizing {source}",
            )
        parts.append(part)
    pairs = datasets.concatenate_datasets(parts)
    status = np.array(pairs["status"])
    kept = np.flatnonzero(np.isin(status, ["whole", "truncated"]))
    dropped = ", ".join(f"{np.sum(status == reason)} {reason}" for reason in DROPPED)
    truncated = np.sum(status == "truncated") / max(len(kept), 1)
    report = (
        f"{len(kept)} pairs from {sources}: {len(pairs) - len(kept)} of {len(pairs)} rows dropped "
        f"({dropped}), {truncated:.1%} of the pairs truncated"
    )
    if len(kept) == 0:
        raise InputError(f"no pairs are left: {report}")
    return pairs.select(kept).remove_columns("status"), report


def tokenize_row(
    row: dict, index: int, source: str, tokenizer, end, max_length: int, max_prompt_length: int
) -> dict:
    """One row → token ids of prompt, chosen and rejected, and their status: whole, truncated, or
    why it is dropped."""
    prompt, chosen, rejected, status = [], [], [], "different prompts"
    try:
        parsed = parse_row(row)
        if parsed:
            context, *answers = parsed  # [] for an empty row
            whole = tokenize_pair(tokenizer, context, answers, end) if context else ([], [], [])
            prompt, chosen, rejected = truncate(*whole, max_length, max_prompt_length)
            status = "whole" if (prompt, chosen, rejected) == whole else "truncated"
            if not (prompt and chosen and rejected):
                status = "empty"
            elif end[0] in chosen[:-1] + rejected[:-1]:
                status = "end of turn inside"
            elif chosen == rejected:  # no preference is left: the two sides' gradients cancel
                status = "identical"
    except Exception as error:
        # In a few of HH's dialogues one side speaks twice; Gemma's and Mistral's templates want
        # the roles to alternate.
        if not (isinstance(error, TemplateError) and str(parsed[0]).startswith("\n\nHuman:")):
            raise InputError(f"{source}, row {index}: {error}") from None
        status = "refused by template"
    lengths = [len(prompt), len(chosen), len(rejected)]
    ids = {"prompt": prompt, "chosen": chosen, "rejected": rejected, "lengths": lengths}
    return ids | {"source": source, "row": index, "status": status}


def pair_lengths(pairs: datasets.Dataset) -> np.ndarray:
    """Tokens of prompt, chosen and rejected of every pair of load_pairs: (pairs, 3) int64."""
    table = pairs.select_columns("lengths").with_format("arrow")[:]
    return flat_column(table, "lengths").reshape(-1, 3).astype(np.int64)


def longest_sequence(pairs: datasets.Dataset) -> int:
    """Tokens of the longest prompt + response of load_pairs."""
    lengths = pair_lengths(pairs)
    return int((lengths[:, 0] + lengths[:, 1:].max(axis=1)).max())


def highest_token(pairs: datasets.Dataset) -> int:
    """The largest token id in the pairs of load_pairs."""
    tables = pairs.with_format("arrow").iter(batch_size=10_000)
    return max(int(flat_column(table, name).max()) for table in tables for name in COLUMNS)


def fingerprint(pairs: datasets.Dataset) -> str:
    """SHA-256 over the token ids of all pairs in order: equal if and only if two runs train on the
    same tokens."""
    digest = hashlib.sha256()
    for table in pairs.with_format("arrow").iter(batch_size=1000):
        for column in ("lengths", "prompt", "chosen", "rejected"):
            digest.update(flat_column(table, column).tobytes())
    return digest.hexdigest()


def flat_column(table, name: str) -> np.ndarray:
    """All values of an Arrow table's column of lists, one list after the other."""
    return table[name].combine_chunks().flatten().to_numpy(zero_copy_only=False)


# ---- Batches -------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1)
def epoch_order(num_pairs: int, seed: int, epoch: int) -> np.ndarray:
    """The order of the pairs in an epoch: (num_pairs,) int64."""
    return np.random.default_rng([seed, epoch]).permutation(num_pairs)


def step_indices(num_pairs: int, batch_size: int, seed: int, step: int) -> list[int]:
    """Which pairs are in `step` (counted from 0): they depend on the seed and the step alone.

    Each epoch is a new permutation of all pairs. Its last num_pairs % batch_size pairs, too few for
    a batch, are left out, so that every step is over exactly batch_size pairs.
    """
    epoch, position = divmod(step, num_pairs // batch_size)
    order = epoch_order(num_pairs, seed, epoch)
    return order[position * batch_size : (position + 1) * batch_size].tolist()


def spread_pairs(
    indices: Sequence[int], pair_tokens: Sequence[int], ranks: int, micro_batch_tokens: int
) -> list[list[list[int]]]:
    """Spread pairs over micro-batches × ranks: result[m][r] are the indices of the pairs in rank
    r's micro-batch m. No micro-batch is empty or holds more than micro_batch_tokens, their number
    is the least that the method finds, and their costs are balanced (longest pair first, each to
    the micro-batch with the fewest tokens).

    indices: of the pairs to spread; pair_tokens: of every pair, by index, its prompt once.
    Raises InputError if the pairs cannot be spread so.

    >>> spread_pairs([7, 0, 3], {0: 3, 3: 4, 7: 5}, ranks=2, micro_batch_tokens=8)
    [[[0, 3], [7]]]
    """
    longest_first = sorted(indices, key=lambda i: -pair_tokens[i])
    total, longest = sum(pair_tokens[i] for i in indices), pair_tokens[longest_first[0]]
    if longest > micro_batch_tokens:
        raise InputError(
            f"a pair of {longest} tokens (prompt + chosen + rejected) is longer than "
            f"micro_batch_tokens={micro_batch_tokens}: raise it, or lower max_length"
        )
    for count in range(-(-total // (ranks * micro_batch_tokens)), len(indices) // ranks + 1):
        bins = [(0, number, []) for number in range(count * ranks)]
        for i in longest_first:
            load, number, members = bins[0]
            heapq.heapreplace(bins, (load + pair_tokens[i], number, members + [i]))
        if max(bins)[0] <= micro_batch_tokens:
            # Bins of similar cost run side by side, since ranks wait for the slowest.
            bins.sort(key=lambda b: (-b[0], b[1]))
            members = [sorted(members) for _, _, members in bins]
            return [members[m * ranks : (m + 1) * ranks] for m in range(count)]
    raise InputError(
        f"{len(indices)} pairs cannot be spread over {ranks} ranks in micro-batches of at most "
        f"micro_batch_tokens={micro_batch_tokens} tokens: raise it, use fewer ranks, or make the "
        "number of pairs (in training, batch_size) a multiple of them"
    )


@dataclass
class MicroBatch:
    """Pairs packed into one row of T tokens, each prompt once, without padding; R response
    tokens in all.

    The pair with prompt ids [1, 2], chosen [3, 4] and rejected [5], alone, is:

        input_ids    [1, 2, 3, 4, 5]  (T,) int64
        position_ids [0, 1, 2, 3, 2]  (T,) int64; rejected continues from the prompt's end
        predictors   [1, 2, 1]        (R,) int64; the index in input_ids whose hidden state predicts
                                      each response token: the prompt's last token predicts the
                                      first token of both responses
        targets      [3, 4, 5]        (R,) int64; response tokens: chosen, rejected, pair after pair
        lengths      [[2, 1]]         (pairs, 2) int64; response tokens of chosen and rejected
        segments     [(2, 2, 1)]      tokens of prompt, chosen and rejected of each pair, as Python
                                      integers
        keys         [0, 1, 2, 3, 0, 1, 4]
                                      (K,) int64; for attention, the indices of each pair's prompt
                                      and chosen, then of its prompt (again) and rejected tokens
        key_starts   [0, 4, 7]        (2 pairs + 1,) int32; where each of these sequences begins in
                                      keys, and the end
        query_starts [0, 4, 5]        the same for its queries: the tokens in their order, no prompt
                                      twice
        reference    ()               or, for a loss with a reference model, one tensor: its summed
                                      log-probs of chosen and rejected, (pairs, 2) float32
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    predictors: torch.Tensor
    targets: torch.Tensor
    lengths: torch.Tensor
    segments: list[tuple[int, int, int]]
    keys: torch.Tensor
    key_starts: torch.Tensor
    query_starts: torch.Tensor
    reference: tuple[torch.Tensor, ...] = ()

    def to(self, device) -> "MicroBatch":
        """The same on `device`."""
        move = functools.partial(torch.Tensor.to, device=device, non_blocking=True)
        moved = {k: move(v) for k, v in vars(self).items() if isinstance(v, torch.Tensor)}
        return replace(self, **moved, reference=tuple(map(move, self.reference)))


def pack(pairs: list[tuple[list[int], list[int], list[int]]]) -> MicroBatch:
    """Lay out pairs (prompt ids, chosen ids, rejected ids) as one MicroBatch: see its example."""
    input_ids, position_ids, predictors, targets, segments = [], [], [], [], []
    keys, key_starts, query_starts = [], [0], [0]
    for prompt, chosen, rejected in pairs:
        p, c, r, start = len(prompt), len(chosen), len(rejected), len(input_ids)
        middle, end = start + p + c, start + p + c + r
        input_ids += [*prompt, *chosen, *rejected]
        position_ids += [*range(p + c), *range(p, p + r)]
        predictors += [*range(start + p - 1, middle - 1), start + p - 1, *range(middle, end - 1)]
        targets += [*chosen, *rejected]
        segments.append((p, c, r))
        keys += [*range(start, middle), *range(start, start + p), *range(middle, end)]
        key_starts += [len(keys) - p - r, len(keys)]
        query_starts += [middle, end]
    return MicroBatch(
        input_ids=torch.tensor(input_ids),
        position_ids=torch.tensor(position_ids),
        predictors=torch.tensor(predictors),
        targets=torch.tensor(targets),
        lengths=torch.tensor([[c, r] for _, c, r in segments]),
        segments=segments,
        keys=torch.tensor(keys),
        key_starts=torch.tensor(key_starts, dtype=torch.int32),
        query_starts=torch.tensor(query_starts, dtype=torch.int32),
    )


def pack_rows(
    pairs: datasets.Dataset, indices: list[int], reference: torch.Tensor | None = None
) -> MicroBatch:
    """The pairs at `indices` of load_pairs, packed; reference: (len(pairs), 2) float32 or None."""
    rows = pairs[indices]
    batch = pack(list(zip(rows["prompt"], rows["chosen"], rows["rejected"])))
    return batch if reference is None else replace(batch, reference=(reference[indices],))
