"""Sources (files, folders, the hub) → rows → a prompt and its answers."""

import bz2
import csv
import functools
import glob
import gzip
import hashlib
import itertools
import json
import lzma
import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
from datasets import packaged_modules
from datasets.packaged_modules.csv.csv import Csv
from datasets.packaged_modules.json.json import Json

from runtime.cache import CacheError, asked_once, cache_folder, files_digest, locked, seal
from runtime.errors import InputError
from runtime.identity import ROOT
from runtime.templates import as_messages

FILE_TYPES = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}
FILE_TYPES |= {".csv": "csv", ".tsv": "csv"}
DROPPED = ("empty", "identical", "different prompts", "end of turn inside", "too long")
DROPPED += ("refused by template",)
# Keys that would be lost: a message with one of them is refused.
UNREAD = ("tool_calls", "function_call", "function_calls", "functions", "tool_plan")
UNREAD += ("reasoning_content", "reasoning", "thinking")
ROLES = {"human": "user", "gpt": "assistant"}  # of ShareGPT, which says from and value
# Columns that other code puts into the prompt (TRL, LLaMA-Factory, ms-swift, axolotl). Here they
# are an error, unless the prompt has their text, or prompt and answers have their messages.
FOREIGN = ("images", "image", "videos", "video", "audios", "audio", "history", "documents")
FOREIGN += ("chat_template_kwargs", "functions", "chat_history", "conversation_history")
FOREIGN += ("instruction", "instructions", "input", "query", "context", "passage", "document")
FOREIGN += ("dialogue", "initial_reason_steps", "prompt", "conversations", "schema", "question")
FOREIGN += ("passages", "contexts", "retrieved_context", "background", "knowledge", "article")
FOREIGN += ("post", "dialog", "system_instruction", "custom_system_prompt", "sys_prompt")
# Columns that say which of two answers is better.
LABELS = ("label", "labels", "winner", "winner_model_a", "better_response_id", "choice")
LABELS += ("preference", "preference_strength", "overall_preference", "orig_preference")
LABELS += ("preferred", "human_preference", "chosen_index", "majority_vote", "verdict")
SCORES = ("scores", "rewards", "ratings", "all_rm_scores")  # one for each of K responses
SYSTEM = ("system", "system_prompt", "system_message")
READ = ("prompt", "conversations", "chosen", "rejected", "responses", "tools", *SYSTEM)
# In a cell: messages, as JSON, or as Python or numpy print them; and a list of texts.
WRITTEN_CONVERSATION = re.compile(
    r"""\s*\[?\s*\{\s*(['"](role|content|from|value)['"]|"""
    r"""[^{}]{0,200}['"](role|from)['"]\s*:\s*['"](system|user|assistant|human|gpt)['"])"""
)
QUOTED = r"""(?:"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*'|null|None)"""
WRITTEN_LIST = re.compile(rf"\s*\[\s*{QUOTED}(?:(?:\s*,\s*|\s+){QUOTED})*\s*\]\s*", re.DOTALL)
FORMATS = """Accepted rows (their other columns are not read):
  {"prompt": text, "chosen": text, "rejected": text}
  {"prompt": [messages], "chosen": text or [one assistant message], "rejected": likewise}
  {"chosen": [messages], "rejected": [messages]}  equal up to the last message, an assistant's
  {"chosen": "\\n\\nHuman: ...\\n\\nAssistant: ...", "rejected": ...}    a dialogue as in HH-RLHF
  {"prompt": as above, "responses": [any number of answers like chosen, best first]}
  ... with "system": text, and "tools": [functions] for the chat template
A message is {"role": "system" or "user" or "assistant", "content": text}, or ShareGPT's {"from",
"value"}; the content holds all of it: calls of tools, or reasoning, in keys of their own are not
read. Columns of other names: --columns prompt=question,chosen=good,rejected=bad"""


# ---- Sources → rows ----------------------------------------------------------------------------


def split_sources(sources: str) -> list[str]:
    """The comma-separated sources, in order; a pattern as `data/*.jsonl` is the files that it
    matches, by name. Raises InputError for one that matches none."""
    found = []
    for source in map(str.strip, sources.strip(" ,").split(",")):
        source = os.path.expanduser(source)
        pattern = split_share(source)[0]
        if not glob.has_magic(pattern) or os.path.exists(pattern):
            found.append(source)
        elif files := sorted(glob.glob(pattern, recursive=True)):
            found += [file + source.removeprefix(pattern) for file in files]
        else:
            raise InputError(f"{source}: no file matches (working directory: {os.getcwd()})")
    return found


def split_share(source: str) -> tuple[str, float]:
    """`source:0.9` → the source and the share of its rows, `source:-0.1` the rest; 1.0 for one
    without a share. Raises InputError for 0 and for one above 1."""
    name, _, share = source.rpartition(":")
    number = re.fullmatch(r"(-?\d*\.\d+|-?\d+)(%?)", share)
    # A data set of the hub may have a split of such a name.
    if not number or os.path.exists(source) or not ("." in share or file_type(name)):
        return source, 1.0
    if number[2] or not 0 < abs(float(share)) <= 1:
        problem = f"{source}: a share is above 0 and at most 1, or -0.1 for the rest of 0.9"
        raise InputError(f"{problem}, not {share}")
    return name, float(share)


def draw(source: str, count: int, share: float) -> np.ndarray:
    """The numbers of the rows that a share of the source's `count` rows takes, in order. They are
    always the same: runs with other seeds hold out the same rows, and the commands of eval/ find
    them. Raises InputError if there are none."""
    order = np.random.default_rng(42).permutation(count)
    # (Rounded: 1 - 0.9 is not 0.1, and a row would be in both parts.)
    first = round(round(share if share > 0 else 1 + share, 9) * count)
    drawn = np.sort(order[:first] if share > 0 else order[first:])
    if len(drawn) == 0:
        raise InputError(f"{source}:{share:g} takes no row: the source has {count}")
    return drawn


def load_rows(source: str) -> datasets.Dataset:
    """The rows of one source: a file (.jsonl .json .csv .tsv, also .gz, or .parquet), a folder
    written by datasets' `save_to_disk` or a clone of a data set of the hub (`folder` or
    `folder:split`), or a hub id (`name`, `name:split`, `name:config:split`; default: train;
    `name@revision` for a commit, tag or branch). A row of JSON is parsed by itself, whatever the
    other rows are; cells of CSV are text.

    Raises InputError, naming the source and, for JSON lines, the line, when it cannot be read.
    """
    if source.startswith("demo/") and not os.path.exists(source):
        source = str(ROOT / source)  # the demo works in any directory
    # (os.path.exists, since Path's raises for a name that is too long.)
    path, *names = [source] if os.path.exists(source) else source.split(":")
    kind = file_type(path)
    try:
        if not source:
            raise InputError("a source is empty: give a file, a folder or a hub id")
        saved = [Path(path) / name for name in ("state.json", "dataset_dict.json")]
        if any(file.exists() for file in saved):
            rows = load_folder(path, ":".join(names))
        elif Path(path).is_dir():
            rows = load_builder(str(Path(path).absolute()), names)
        elif kind or Path(path).is_file():
            if names:
                raise InputError(f"a file has no splits: leave out ':{':'.join(names)}'")
            rows = load_file(path, kind)
        elif path in packaged_modules._PACKAGED_DATASETS_MODULES:
            raise InputError("this is a file format: give a file, a folder or a hub id")
        else:
            rows = load_builder(path, names)
    except CacheError:
        raise
    except Exception as error:
        reason = error if isinstance(error, InputError) else error.__cause__ or error
        raise InputError(f"{source}: cannot be read: {reason}") from error
    if len(rows) == 0:
        raise InputError(f"{source}: has no rows")
    return rows


def file_type(path: str) -> str | None:
    """Of FILE_TYPES, by the file's name; None for another, and for what is no file's name."""
    return FILE_TYPES.get(Path(path.lower().removesuffix(".gz")).suffix)


def load_builder(name: str, names: list[str]) -> datasets.Dataset:
    """The rows of a data set of the hub, or of a clone of one; names: [config and] split."""
    find = find_builder if Path(name).is_dir() else hub_builder
    found = find(name, *(names or ["train"]))
    if not found["fingerprint"]:  # JSON or CSV
        files = [load_texts(file, found["separator"]) for file in found["files"]]
        return datasets.concatenate_datasets(files)
    rows = datasets.concatenate_datasets([*map(datasets.Dataset.from_file, found["files"])])
    rows._fingerprint = found["fingerprint"]
    return rows


def find_builder(name: str, *names: str) -> dict:
    """Where the rows of a data set of the hub are, or of a clone of one: its `files`, the
    `separator` of those of CSV, the `fingerprint` of those of Arrow, and the `commit` of the hub;
    "" where there is none. names: [config and] split. Raises InputError for a split that is not
    there."""
    (*config, split), local = names, Path(name).is_dir()
    path, revision = (name, "") if local else name.partition("@")[::2]
    if revision and Path(path).exists():
        raise InputError(f"{path} is a folder, which has no revisions")
    try:
        builder = datasets.load_dataset_builder(path, *config, revision=revision or None)
    except ValueError as error:
        reason, *example = str(error).split("\nExample of usage")
        raise InputError(reason + f": write {name}:CONFIG:SPLIT" * len(example)) from error
    sources, fingerprint = builder.config.data_files, ""
    if isinstance(builder, Json) or isinstance(builder, Csv) and not builder.config.names:
        if split not in sources:
            raise InputError(f"it has no split '{split}': {', '.join(map(str, sources))}")
        # (What datasets unpacks, it would keep by its path, whatever the file holds later.)
        files = datasets.DownloadManager().download([*sources[split]])
    else:
        if local:  # as in load_file
            parts = {key: files_digest([*map(Path, part)]) for key, part in (sources or {}).items()}
            digest = hashlib.sha256(repr(parts).encode()).hexdigest()[:32]
            folder = str(cache_folder("rows") / digest)
            builder = datasets.load_dataset_builder(path, *config, cache_dir=folder)
        builder.download_and_prepare()
        rows = builder.as_dataset(split=split)
        files = [file["filename"] for file in rows.cache_files]
        fingerprint = f"{names}{digest}" if local else rows._fingerprint
    commit = re.search("@([0-9a-f]{40})/", str(sources))
    found = {"files": files, "separator": getattr(builder.config, "sep", "")}
    return found | {"fingerprint": fingerprint, "commit": commit[1] if commit else ""}


@functools.cache
def hub_builder(name: str, *names: str) -> dict:
    """find_builder, asked by one of the ranks of a node."""
    return json.loads(asked_once((name, names), lambda: json.dumps(find_builder(name, *names))))


def hub_commits(sources: str) -> dict[str, str]:
    """By source, the commits of the hub's data sets among them."""
    found = {}
    for source, _ in map(split_share, split_sources(sources)):
        if on_hub(source):
            name, *names = source.split(":")
            found[source] = hub_builder(name, *(names or ["train"]))["commit"]
    return found


def on_hub(source: str) -> bool:
    """Whether a source without share is a data set of the hub, and no file or folder."""
    name = source.partition(":")[0]
    return not (file_type(name) or os.path.exists(source) or os.path.exists(name))


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
    it is missing, of another type or malformed."""
    if not Path(path).is_file():
        raise InputError(f"no such file (working directory: {os.getcwd()})")
    if kind is None or path.lower().endswith(".parquet.gz"):
        raise InputError("its type is not .jsonl, .json, .csv, .tsv (also .gz) or .parquet")
    with open_unpacked(path) as file:
        if file.read(24) == b"version https://git-lfs.":
            raise InputError("is Git LFS's pointer to the file: fetch it with git lfs pull")
    if kind == "json":
        return load_texts(path)
    if kind == "csv":
        return load_texts(path, "\t" if ".tsv" in Path(path.lower()).suffixes else ",")
    if parquet.read_metadata(path).num_rows == 0:
        raise InputError("has no rows")
    # datasets knows a file by path and time, which a copy can leave unchanged: each content has a
    # cache of its own.
    digest = content_digest(path)
    folder = cache_folder("rows") / digest[:32]
    options = {"data_files": glob.escape(path), "cache_dir": str(folder)}
    with locked(folder) as intact:
        rows = datasets.load_dataset(kind, split="train", **options)
        if not intact:
            seal(folder)
    rows._fingerprint = digest  # the key of what is cached downstream
    return rows


def load_texts(path: str, separator: str = "") -> datasets.Dataset:
    """The rows of a file of JSON or, with a separator, of CSV. In the cache, each is a JSON text:
    to hold them as columns, datasets would make their types alike, and change what they say."""
    # The same content may be read in two ways: once renamed from .csv to .tsv, for example.
    folder = cache_folder("json") / (content_digest(path)[:32] + separator.encode().hex())
    schema = pa.schema({"cells" if separator else "json": pa.large_binary()})
    with locked(folder) as intact:
        if not intact:
            folder.mkdir()
            with (
                open_unpacked(path) as file,
                pa.OSFile(str(folder / "rows.arrow"), "wb") as sink,
                pa.ipc.new_stream(sink, schema) as writer,
            ):
                texts = csv_texts(file, separator) if separator else json_texts(file)
                while batch := [*itertools.islice(texts, 10_000)]:
                    writer.write_batch(pa.record_batch([pa.array(batch, schema[0].type)], schema))
            seal(folder)
    rows = datasets.Dataset.from_file(str(folder / "rows.arrow")).with_transform(parse_texts)
    rows._fingerprint = folder.name
    return rows


def content_digest(path: str) -> str:
    """SHA-256 of a file, whatever its name and time are."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def open_unpacked(path: str):
    """A file, open for bytes; it may be compressed by gzip, bzip2 or xz, whatever its name is.
    Raises InputError for another packing."""
    with open(path, "rb") as file:
        begin = file.read(4)
    if begin in (b"PK\x03\x04", b"\x28\xb5\x2f\xfd", b"\x04\x22\x4d\x18"):
        raise InputError(f"{path} is packed by zip, zstd or lz4: unpack it")
    packings = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zX": lzma.open}
    found = [unpack for magic, unpack in packings.items() if begin.startswith(magic)]
    return (found or [open])[0](path, "rb")


def decode(line: bytes, number: int) -> str:
    """The text of a line. Raises InputError with its number if it is not UTF-8."""
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        raise InputError(f"line {number} is not UTF-8: {error}") from None


def json_texts(file) -> Iterator[bytes]:
    """The text of every row of JSON lines or of one JSON array. Raises InputError, naming the line
    (of an array, the entry or "the list"), for what is no JSON object, and for one that says
    something twice or is no text."""

    def unique(pairs: list[tuple]) -> dict:
        found = {}
        for name, value in pairs:
            if name in found:
                raise ValueError(f"the key '{name}' is there twice")
            found[name] = value
        return found

    def parse(text: str, number: int, whole: str):
        """The value of a text that begins on line `number`. whole: what to call it."""
        try:
            value = json.loads(text, object_pairs_hook=unique)
            if "\\u" in text:
                json.dumps(value, ensure_ascii=False).encode()  # of a half of a pair: no text
            return value
        except (ValueError, RecursionError) as reason:  # of json, unique and encode
            syntax = isinstance(reason, json.JSONDecodeError)
            place = f"line {number + reason.lineno - 1}" if syntax else whole
            how = ": write one object a line, or one list of them" if syntax else ""
            reason = getattr(reason, "msg", reason)
            raise InputError(f"{place} is not valid JSON ({reason}){how}") from None

    def check(row, place: str) -> None:
        if not isinstance(row, dict):
            raise InputError(f"{place} is not a JSON object")
        if not row:
            raise InputError(f"{place} is an empty object")

    begun = False
    for number, line in enumerate(file, 1):
        text = decode(line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line, number)
        if text.lstrip().startswith("[") and not begun:
            break
        if text := text.strip():
            begun = True
            check(parse(text, number, f"line {number}"), f"line {number}")
            yield text.encode()
    else:
        return
    for place, row in enumerate(parse(text + decode(file.read(), number), number, "the list")):
        check(row, f"entry {place}")
        yield json.dumps(row, ensure_ascii=False).encode()


def csv_texts(file, separator: str) -> Iterator[bytes]:
    """Of every row of CSV, its cells as JSON. Raises InputError, naming the line, for one that does
    not have a cell for each column of the header, or whose quotes are wrong."""
    csv.field_size_limit(2**31 - 1)
    lines = (decode(line, number) for number, line in enumerate(file, 1))
    lines = itertools.chain([next(lines, "").removeprefix("\ufeff")], lines)
    reader, header, begin = csv.reader(lines, delimiter=separator, strict=True), None, 1
    try:
        for cells in reader:
            if header is None and not "".join(cells).strip():
                pass
            elif header is None:
                header = [*map(str.strip, cells)]
                if twice := [name for name in header if name and header.count(name) > 1]:
                    raise InputError(f"line 1: the column '{twice[0]}' is there twice")
            elif len(cells) > 1 or "".join(cells).strip():
                if len(cells) != len(header):
                    problem = f"line {begin}: {len(cells)} cells, but {len(header)} columns"
                    how = f"separate cells by {separator!r}, and quote those that contain it"
                    raise InputError(f"{problem}; {how}")
                yield json.dumps(dict(zip(header, cells)), ensure_ascii=False).encode()
            begin = reader.line_num + 1
    except csv.Error as error:
        raise InputError(f"line {begin}: {error}") from None


def is_json(rows: datasets.Dataset) -> bool:
    """Whether the rows are those of JSON, in which a text is what it says."""
    return rows.column_names == ["json"]


class Missing:
    """In place of the value of a key that a row of JSON does not have."""


def parse_texts(batch: dict[str, list[bytes]]) -> dict[str, list]:
    """Rows of load_texts → their values by key."""
    (texts,) = batch.values()
    rows = [*map(json.loads, texts)]
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name, Missing) for row in rows] for name in names}


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
        ).with_format(None)
        if not intact:
            seal(folder)
        return mapped


# ---- Rows → prompt and answers -----------------------------------------------------------------


def rename(row: dict, columns: str) -> dict:
    """The row with other names of its columns: `columns` is "prompt=question,history=", the wanted
    names and those that the row has; a column without a new name is left out. Raises InputError for
    one that is not there, and if `columns` names answers and a column of LABELS is there, which may
    say that another one is better."""
    renamed, given, answers = dict(row), {}, False
    for part in filter(None, columns.split(",")):
        name, equals, own = map(str.strip, part.partition("="))
        if not equals:
            raise InputError(f"--columns: '{part}' is not of the form NAME=COLUMN")
        if own and own not in row:
            raise InputError(f"there is no column '{own}'; the columns are {', '.join(row)}")
        if name in given:
            raise InputError(f"--columns: '{name}' is there twice")
        renamed.pop(own, None)
        renamed.pop(name, None)
        given[name] = row[own] if own else Missing
        answers |= own not in ("", name) and name in ("chosen", "rejected", "responses")
    labels = [n for n, v in renamed.items() if n.lower() in LABELS and not is_blank(v)]
    if labels and answers:
        problem = f"its column '{labels[0]}' may say which answer is better: order them by it"
        raise InputError(f"{problem}, or leave it out with --columns {labels[0]}=")
    if "responses" in given:  # instead of what the row has
        renamed = {name: v for name, v in renamed.items() if name not in ("chosen", "rejected")}
    return renamed | {name: value for name, value in given.items() if value is not Missing}


def unread_columns(row: dict, numbers: Iterable[str]) -> list[str]:
    """The columns of a row that nothing reads. numbers: those that a loss asks for."""
    known = {*READ, *FOREIGN, *numbers, *(SCORES if row.get("responses") else ())}
    return [name for name in row if name not in known]


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


def parse_row(row: dict, verbatim: bool = False) -> tuple[list | str, list[str]]:
    """One row in any of FORMATS → (prompt, answers, best first).

    The prompt is a list of messages, or text where the row has text and neither a system prompt nor
    tools; these stand in the first message as its "tools". Only the last assistant turn is the
    answer. verbatim: whether a text is what it says, as in JSON; in a cell of a table, a
    conversation may have been written as text. Raises Dropped if the answers do not answer the same
    prompt, or if an empty value keeps the row from every format; and InputError for a row in none
    of the formats, and for columns that would be left out in silence.
    """
    prompt, answers = parse_format(row, verbatim)
    if not as_messages(prompt)[-1]["content"].strip():
        raise Dropped("empty")
    return complete_prompt(row, prompt, answers), answers


def complete_prompt(row: dict, prompt: list | str, answers: Iterable[str] = ()) -> list | str:
    """The prompt with the system prompt and the tools of the row's other columns. Raises InputError
    if they cannot be added, and for FOREIGN columns whose texts are not there already."""
    for name in FOREIGN + ("messages", "conversation") * isinstance(prompt, str):
        value = row.get(name)
        value = any(value) and value if isinstance(value, list) else value
        if not value or is_blank(value) or isinstance(value, int | float):  # a number is no text
            continue
        if not is_there(value, prompt, answers):
            problem = f"its column '{name}' is not used: if it belongs to the prompt or the answers"
            raise InputError(f"{problem}, write it into them; --columns {name}= leaves it out")
    systems = [value for value in map(row.get, SYSTEM) if not is_blank(value)]
    system, tools = systems[0] if systems else None, row.get("tools")
    if any(other != system for other in systems):
        raise InputError("two of its columns have different system prompts")
    if messages := as_conversation(system):
        system = messages[0]["content"] if len(messages) == 1 else messages
    if system and not isinstance(system, str):
        raise InputError("its system prompt is no text")
    if isinstance(tools, str) and tools.strip():  # TRL's data sets have them as JSON
        try:
            tools = json.loads(tools)
        except ValueError as error:
            raise InputError(f"its column 'tools' is no JSON: {error}") from None
    if not system and not tools:
        return prompt
    if isinstance(prompt, str):
        if prompt.startswith("\n\nHuman:"):
            raise InputError("a system prompt or tools, beside a dialogue in HH's form")
        prompt = [{"role": "user", "content": prompt}]
    if system and prompt[0]["role"] != "system":
        prompt = [{"role": "system", "content": system}, *prompt]
    elif system and prompt[0]["content"].strip() != system.strip():
        raise InputError("the system prompt of its column and that of its messages differ")
    return [prompt[0] | {"tools": tools}, *prompt[1:]] if tools else prompt


def is_there(value, prompt: list | str, answers: Iterable[str]) -> bool:
    """Whether prompt and answers have each message of a conversation, or the prompt has a text, as
    words."""
    try:
        messages = as_conversation(value)
    except Dropped:  # one without content
        return False
    if messages:
        whole = {text.strip() for text in (*(m["content"] for m in as_messages(prompt)), *answers)}
        return all(message["content"].strip() in whole for message in messages)
    if not isinstance(value, str):
        return False
    shown = prompt if isinstance(prompt, str) else "\n".join(m["content"] for m in prompt)
    value, shown = (" ".join(text.split()).casefold() for text in (value, shown))
    return re.search(rf"(?<!\w){re.escape(value)}(?!\w)", shown) is not None


def parse_format(row: dict, verbatim: bool) -> tuple[list | str, list[str]]:
    """parse_row, of the prompt and the answers alone."""
    prompt = row.get("prompt", Missing)
    if prompt in (None, Missing, "", []):
        prompt = row.get("conversations", prompt)  # ShareGPT's name
    answers = [row.get("chosen", Missing), row.get("rejected", Missing)]
    if all(answer in (None, Missing) for answer in answers) and isinstance(
        row.get("responses"), list
    ):
        answers = row["responses"]
        if any(rises(row.get(name), len(answers)) for name in SCORES):
            raise InputError("its responses, best first, are not in the order of their scores")
    blank = [*map(is_blank, (prompt, *answers))]
    conversations, messages = [*map(as_conversation, answers)], as_conversation(prompt)
    known = all(isinstance(a, str) or c for a, c in zip(answers, conversations))
    if answers and all(conversations):
        context, answers = split_conversations(conversations)
        if context:
            return context, answers
    if answers and all(isinstance(answer, str) for answer in answers):
        texts = [v for v in (prompt, *map(row.get, SYSTEM), *answers) if isinstance(v, str)]
        written = any(map(WRITTEN_CONVERSATION.match, texts))
        if not verbatim and (written or isinstance(prompt, str) and WRITTEN_LIST.fullmatch(prompt)):
            problem = "it has conversations that have been written as text"
            raise InputError(f"{problem}: write the file as JSON lines, or keep the last message")
        if any(a.startswith("\n\nHuman:") and "\n\nAssistant:" in a for a in answers):
            return split_dialogues(answers)
        if isinstance(prompt, str) and not blank[0]:
            turns, header, begun = prompt.rpartition("\n\nAssistant:")
            form = r"\n\nHuman:" if begun.strip() else r"\n?Human:"
            if header and "\n\nHuman:" not in begun and re.match(form, turns):
                problem = "a prompt in HH's form begins with two line breaks and 'Human:'"
                raise InputError(f"{problem}, and nothing follows its last 'Assistant:'")
            return prompt, answers
        if messages and messages[-1]["role"] != "assistant":
            return messages, answers
    if not answers or any(blank[1:]) or blank[0] and known:
        raise Dropped("empty")
    kinds = {column: type(value).__name__ for column, value in row.items()}
    problem = f"in none of the accepted formats; its columns are {kinds}"
    if messages and messages[-1]["role"] == "assistant":
        problem += ", and its prompt ends with the assistant's message"
    for name in READ:
        value = row.get(name)
        for place, message in enumerate(value if isinstance(value, list) else []):
            if isinstance(message, dict) and not as_message(message):
                raise InputError(f"{problem}, and {name}[{place}] is {message!r:.200}.\n{FORMATS}")
    raise InputError(f"{problem}.\n{FORMATS}")


def rises(scores, count: int) -> bool:
    """Whether they are a list of so many numbers, one of which is above the one before."""
    numbers = isinstance(scores, list) and all(isinstance(v, int | float) for v in scores)
    return numbers and len(scores) == count and any(a < b for a, b in zip(scores, scores[1:]))


def is_blank(value) -> bool:
    """Whether a value says nothing."""
    return value is None or value == [] or isinstance(value, str) and not value.strip()


def split_conversations(answers: list[list[dict]]) -> tuple[list[dict], list]:
    """Conversations → what they have in common, all but the last message, and the last messages'
    texts; without a change if one does not end with the assistant's. Raises Dropped if they differ
    before."""
    if any(answer[-1]["role"] != "assistant" for answer in answers):
        return [], answers
    context, *others = (answer[:-1] for answer in answers)
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


def as_conversation(value) -> list[dict] | None:
    """A list of messages, one message, or their keys with a list for each (as older versions of
    datasets have it) → messages of role and content alone; None for anything else."""
    if isinstance(value, dict):
        lists = value and all(isinstance(part, list) for part in value.values())
        value = [dict(zip(value, m)) for m in zip(*value.values())] if lists else [value]
    messages = [*map(as_message, value)] if isinstance(value, list) else []
    return messages if messages and all(messages) else None


def as_message(value) -> dict | None:
    """A message with a known role and text, or parts that are text, and nothing in keys that are
    UNREAD → its role and content; else None. Raises Dropped if its content is null."""
    if not isinstance(value, dict) or any(value.get(key) for key in UNREAD):
        return None
    role, content = value.get("role"), value.get("content")
    if role is None and content is None:
        role, content = ROLES.get(value.get("from"), value.get("from")), value.get("value")
    known = role in ("system", "user", "assistant")
    if known and content is None and {"content", "value"} & {*value}:
        raise Dropped("empty")
    if isinstance(content, list):
        parts = [
            p.get("text") if isinstance(p, dict) and p.get("type") == "text" else p for p in content
        ]
        content = "".join(parts) if all(isinstance(part, str) for part in parts) else None
    if not known or not isinstance(content, str):
        return None
    return {"role": role, "content": content}
