"""Sources (files, folders, the hub) → rows → a prompt and its answers."""

import glob
import gzip
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import datasets

from runtime.cache import CacheError, cache_folder, files_digest, locked, seal
from runtime.errors import InputError
from runtime.identity import ROOT

FILE_TYPES = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
TEXT_COLUMNS = ("prompt", "chosen", "rejected")
DROPPED = ("empty", "identical", "different prompts", "end of turn inside", "refused by template")
UNREAD = ("tool_calls", "reasoning_content", "reasoning", "thinking")  # a message's other parts
FORMATS = """Accepted rows (further columns are ignored, but a system prompt must be a message):
  {"prompt": text, "chosen": text, "rejected": text}
  {"prompt": [messages], "chosen": text or [one assistant message], "rejected": likewise}
  {"chosen": [messages], "rejected": [messages]}  equal up to the last message, an assistant's
  {"chosen": "\\n\\nHuman: ...\\n\\nAssistant: ...", "rejected": ...}    a dialogue as in HH-RLHF
  {"prompt": as above, "responses": [any number of answers like chosen, best first]}
A message is {"role": "system" or "user" or "assistant", "content": text}; the content holds all of
it: calls of tools, or reasoning, in keys of their own are not read."""


# ---- Sources → rows ------------------------------------------------------------------------------


def load_rows(source: str) -> datasets.Dataset:
    """The rows of one source: a file (.jsonl .json .csv, also .gz, or .parquet), a folder written
    by datasets' `save_to_disk` (`folder` or `folder:split`), or a hub id (`name`, `name:split`,
    `name:config:split`; default: train).

    Raises InputError, naming the source and, for JSON lines, the line, when it cannot be read.
    """
    if source.startswith("demo/") and not Path(source).exists():
        source = str(ROOT / source)  # the demo works in any directory
    kind = FILE_TYPES.get(Path(source.lower().removesuffix(".gz")).suffix)
    try:
        if not source:
            raise InputError("a source is empty: give a file, a folder or a hub id")
        if Path(source.partition(":")[0]).is_dir():
            rows = load_folder(*source.partition(":")[::2])
        elif kind or Path(source).is_file():
            rows = load_file(source, kind)
        else:
            name, *config, split = source.split(":") if ":" in source else (source, "train")
            rows = datasets.load_dataset(name, *config, split=split)
    except CacheError:
        raise
    except Exception as error:
        reason = error if isinstance(error, InputError) else error.__cause__ or error
        raise InputError(f"{source}: cannot be read: {reason}") from error
    if len(rows) == 0:
        raise InputError(f"{source}: has no rows")
    return rows


def load_folder(path: str, split: str) -> datasets.Dataset:
    """The rows of a folder written by `save_to_disk`; split: "" is train, or all that there is.
    Raises InputError if there is no such split."""
    rows, split = datasets.load_from_disk(path), split or "train"
    splits = rows if isinstance(rows, datasets.DatasetDict) else {"train": rows}
    if split not in splits:
        choice = f"write {path}:SPLIT with one of the splits {', '.join(splits)}"
        raise InputError(f"it has no split '{split}': {choice}")
    rows = splits[split].with_format(None)
    # datasets names a folder's rows by how they were made, not by what they are.
    rows._fingerprint = split + files_digest(sorted(Path(path).rglob("*.arrow")))
    return rows


def load_file(path: str, kind: str | None) -> datasets.Dataset:
    """The rows of one local file; kind: of FILE_TYPES, or None for another. Raises InputError if
    it is missing, of another type, malformed or without rows."""
    if not Path(path).is_file():
        raise InputError(f"no such file (working directory: {os.getcwd()})")
    if kind is None or path.lower().endswith(".parquet.gz"):
        raise InputError("its type is not .jsonl, .json, .csv (also .gz) or .parquet")
    content = Path(path).read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    if kind != "parquet" and not path.lower().endswith(".gz"):
        try:
            content.decode()
        except UnicodeDecodeError as error:
            line = content.count(b"\n", 0, error.start) + 1
            raise InputError(f"line {line} is not UTF-8: {error}") from None
    options = {}
    if kind == "csv":  # "4" and "None" are answers, too
        options = {"converters": dict.fromkeys(TEXT_COLUMNS, str), "keep_default_na": False}
    # datasets knows a file by path and time, which a copy can leave unchanged: each content has a
    # cache of its own.
    folder = cache_folder("rows") / digest[:32]
    options |= {"data_files": glob.escape(path), "cache_dir": str(folder)}
    with locked(folder) as intact:
        try:
            rows = datasets.load_dataset(kind, split="train", **options)
        except Exception as error:
            raise_by_line(path, content, error)
        if not intact:
            seal(folder)
    rows._fingerprint = digest  # the key of what is cached downstream
    return rows


def map_rows(
    rows: datasets.Dataset, function: Callable, options: dict, features: datasets.Features, key: str
) -> datasets.Dataset:
    """function(batch of rows, their indices, **options) of all rows. Kept in the cache as `key`: of
    several processes, one works while the others wait."""
    folder = cache_folder("tokenized") / key
    with locked(folder) as intact:
        folder.mkdir(exist_ok=True)
        mapped = rows.map(
            function,
            batched=True,
            with_indices=True,
            fn_kwargs=options,
            features=features,
            remove_columns=rows.column_names,
            num_proc=min(os.cpu_count() or 1, 16) if len(rows) > 5000 else None,
            cache_file_name=str(folder / "rows.arrow"),
            new_fingerprint=key,
            desc="tokenizing",
        )
        if not intact:
            seal(folder)
        return mapped


def raise_by_line(path: str, content: bytes, error: Exception) -> None:
    """Raise InputError with the line at fault, which the reader's own message does not name, or
    `error` again."""
    if content.startswith(b"\x1f\x8b"):
        content = gzip.decompress(content)
    if not content.strip() or "no data" in str(error):
        raise InputError("has no rows") from error
    lines = content.decode("utf-8-sig", "replace").split("\n") if ".jsonl" in path else []
    for number, line in enumerate(lines, 1):
        try:
            if line.strip() and not isinstance(json.loads(line), dict):
                raise InputError(f"line {number} is not a JSON object") from error
        except json.JSONDecodeError as reason:
            raise InputError(f"line {number} is not valid JSON ({reason})") from error
    raise error


# ---- Rows → prompt and answers -------------------------------------------------------------------


def parse_rows(
    batch: dict[str, list], indices: list[int], source: str, columns: list[str]
) -> list[tuple]:
    """Rows of a source → for each (its place, the numbers that a loss asks for in `columns`,
    prompt, answers), the last two by parse_row; for a row that is dropped, None and the reason.
    Raises InputError, naming source and row."""
    parsed = []
    try:
        rows = [*zip(*batch.values())]
    except UnicodeDecodeError as error:
        raise InputError(f"{source}, rows {indices[0]} to {indices[-1]}: {error}") from None
    for index, values in zip(indices, rows):
        row, place = dict(zip(batch, values)), f"{source}, row {index}"
        try:
            numbers = [read_number(row, column) for column in columns]
            parsed.append((place, numbers, *parse_row(row)))
        except Dropped as reason:
            parsed.append((place, numbers, None, str(reason)))
        except InputError as error:
            raise InputError(f"{place}: {error}") from None
    return parsed


def read_number(row: dict, column: str) -> float:
    """The number that a loss asks for by the name of its column; a CSV file has it as text."""
    try:
        # As float32, in which a loss gets it.
        if not isinstance(row[column], bool) and abs(number := float(row[column])) < 3.4e38:
            return number
    except KeyError:
        raise InputError(f"the loss asks for the column '{column}', which is not there") from None
    except (TypeError, ValueError):
        pass
    raise InputError(f"the loss asks for a number in '{column}', which is {row[column]!r}")


class Dropped(Exception):
    """A row that is left out and counted, by the reason, one of DROPPED."""


def parse_row(row: dict) -> tuple[list | str, list[str]]:
    """One row in any of FORMATS → (prompt, answers, best first).

    The prompt is a list of messages, or text where the row has text. Only the last assistant turn
    is the answer. Raises Dropped if the answers do not answer the same prompt, or if an empty value
    keeps the row from every format; and InputError for a row in none of the formats.
    """
    prompt, answers = row.get("prompt"), [row.get("chosen"), row.get("rejected")]
    if answers == [None, None] and isinstance(row.get("responses"), list):
        answers = row["responses"]
    if answers and all(map(is_conversation, answers)):
        context, answers = split_conversations(answers)
        if context and (not is_conversation(prompt) or plain(prompt) == context):
            return context, answers  # a prompt column as text is redundant here
        prompt = [] if context else prompt
    if answers and all(isinstance(answer, str) for answer in answers):
        if answers[0].startswith("\n\nHuman:") and "\n\nAssistant:" in answers[0]:
            return split_dialogues(answers)
        if isinstance(prompt, str) and prompt.strip() and not row.get("system"):
            return prompt, answers
        if is_conversation(prompt) and prompt[-1]["role"] != "assistant":
            return plain(prompt), answers
    blank = [v == [] or isinstance(v, str) and not v.strip() for v in (row.get("prompt"), *answers)]
    known = all(isinstance(answer, str) or is_conversation(answer) for answer in answers)
    if not answers or any(blank[1:]) or blank[0] and known:
        raise Dropped("empty")
    kinds = {column: type(value).__name__ for column, value in row.items()}
    raise InputError(f"in none of the accepted formats; its columns are {kinds}.\n{FORMATS}")


def split_conversations(answers: list[list[dict]]) -> tuple[list[dict], list]:
    """Conversations → what they have in common, all but the last message, and the last messages'
    texts; without a change if one does not end with the assistant's. Raises Dropped if they differ
    before."""
    if any(answer[-1]["role"] != "assistant" for answer in answers):
        return [], answers
    context, *others = (plain(answer[:-1]) for answer in answers)
    if any(other != context for other in others):
        raise Dropped("different prompts")
    return context, [answer[-1]["content"] for answer in answers]


def split_dialogues(answers: list[str]) -> tuple[str, list[str]]:
    """HH's dialogues → what they have in common, up to the last assistant's header, and what
    follows. Raises Dropped if they differ before."""
    marker = "\n\nAssistant:"
    contexts, _, answers = zip(*(answer.rpartition(marker) for answer in answers))
    if len({*contexts}) > 1 or any("\n\nHuman:" in answer for answer in answers):
        raise Dropped("different prompts")
    return contexts[0] + marker, [*answers]


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


def plain(messages: list[dict]) -> list[dict]:
    """Messages without further keys."""
    return [{"role": message["role"], "content": message["content"]} for message in messages]
