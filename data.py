"""Rows of preference data → token ids of a prompt and its responses → the rows of each step →
packed micro-batches.

Each row has a prompt and K responses, best first. A pair, which this code is mostly used with, has
K = 2: chosen and rejected. `python -m eval.show_pairs SOURCE --model MODEL` prints what will be
trained on, token by token.
"""

import functools
import hashlib
import heapq
import itertools
import math
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import datasets
import numpy as np
import torch
from jinja2 import TemplateError

from runtime.errors import InputError
from runtime.identity import code_digest
from runtime.rows import DROPPED, is_json, load_rows, map_rows, parse_rows, split_sources
from runtime.weights import tokenizer_digests

# Put before a chat template, it makes today 26 July 2024, which is Llama-3.1's own default: the
# real date would change the tokens from day to day. (+: the template's first line break stays.)
DATE = "{% macro strftime_now(f) %}{{ f | replace('%d', '26') | replace('%m', '07')"
DATE += " | replace('%b', 'Jul') | replace('%B', 'July') | replace('%y', '24')"
DATE += " | replace('%Y', '2024') }}{% endmacro +%}"


# ---- Prompt and answers → token ids --------------------------------------------------------------


def render(tokenizer, messages: list[dict], **options) -> str:
    """The conversation by the chat template, with DATE for today and the tools that its first
    message names. Raises InputError if the template does not show them."""
    how = options | {"chat_template": DATE + tokenizer.get_chat_template(), "tokenize": False}
    if not (tools := messages[0].get("tools") if messages else None):
        return tokenizer.apply_chat_template(messages, **how)
    messages = [{k: v for k, v in messages[0].items() if k != "tools"}, *messages[1:]]
    text = tokenizer.apply_chat_template(messages, tools=tools, **how)
    if text == tokenizer.apply_chat_template(messages, **how):
        raise InputError("the template does not show its tools: --columns tools= leaves them out")
    return text


def as_messages(prompt: list | str) -> list[dict]:
    """A prompt as messages: HH's dialogue text is split into its turns, any other text is one user
    message."""
    if not isinstance(prompt, str):
        return prompt
    if not prompt.startswith("\n\nHuman:"):
        return [{"role": "user", "content": prompt}]
    messages = []
    for turn in prompt.rstrip().removesuffix("\n\nAssistant:").split("\n\nHuman:")[1:]:
        user, *answers = turn.split("\n\nAssistant:")
        messages.append({"role": "user", "content": user.strip()})
        messages.extend({"role": "assistant", "content": answer.strip()} for answer in answers)
    return messages


def prompt_text(tokenizer, prompt: list | str, header: bool = True) -> str:
    """The prompt as the model sees it at inference: the chat template, ending with the assistant's
    header (or, without `header`, before it).

    Without a chat template, text stays as it is and messages become a dialogue in HH's form.
    """
    if tokenizer.chat_template:
        return render(tokenizer, as_messages(prompt), add_generation_prompt=header)
    if isinstance(prompt, str):
        return prompt
    if prompt[0].get("tools"):
        raise InputError(
            "without a template, tools are not shown: --columns tools= leaves them out"
        )
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
    special = special_ids(tokenizer)
    ids = [i for i in tokenizer(tail, add_special_tokens=False).input_ids if i in special]
    if not ids and tokenizer.eos_token_id is None:
        raise InputError("the tokenizer has neither an EOS token nor a template that ends turns")
    return (ids[0] if ids else tokenizer.eos_token_id), tail


def special_ids(tokenizer) -> set[int]:
    """The ids of the tokenizer's special tokens."""
    added = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return added | {*tokenizer.all_special_ids}


def end_tokens(tokenizer) -> list[int]:
    """The special tokens that end an answer: the end of a turn, and those at which the model's
    generation stops (see load_tokenizer)."""
    others = special_ids(tokenizer) & {*getattr(tokenizer, "stop_ids", [])}
    return sorted({end_of_turn(tokenizer)[0], *others})


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


def tokenize_row(
    tokenizer, prompt: list | str, answers: list[str], end: tuple[int, str], stops: list[int]
) -> list:
    """Token ids of the prompt and of every response: 1 + K lists. prompt, answers: see parse_row;
    end: see end_of_turn; stops: see end_tokens. Raises InputError if the chat template obscures
    where the answer begins.

    A response is what the chat template writes after the prompt, up to and including one
    end-of-turn token. Its ids are those that follow the prompt's in the whole text; where the
    tokenizer would merge the prompt's last characters with the answer's first ones, those that
    follow a line break, so that the prompt keeps its ids. An answer without any text gives [].
    """
    end_id, tail = end
    end_text = tokenizer.convert_ids_to_tokens(end_id)
    stop_texts = tokenizer.convert_ids_to_tokens(stops)
    start = prompt_text(tokenizer, prompt)
    prompt_ids, line_break_ids = (tokenize_text(tokenizer, text) for text in (start, "\n"))

    def tokenize_answer(answer: str) -> list[int]:
        while ended := [text for text in stop_texts if answer.rstrip().endswith(text)]:
            answer = answer.rstrip().removesuffix(ended[0])  # the data wrote it already
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

    return [prompt_ids, *map(tokenize_answer, answers)]


def truncate(ids: list[list], max_length: int, max_prompt_length: int) -> list[list]:
    """The authors' rule, on the token ids of a prompt and its responses. Only if prompt + longest
    response exceeds max_length is the prompt cut to its last max_prompt_length tokens; if still
    too long, responses are cut to their first max_length - max_prompt_length.

    >>> truncate([[1, 2, 3, 4], [5, 6, 7], [8]], max_length=5, max_prompt_length=3)
    [[2, 3, 4], [5, 6], [8]]
    """
    prompt, *responses = ids
    longest = max(map(len, responses))
    if len(prompt) + longest > max_length:
        prompt = prompt[-max_prompt_length:]
    if len(prompt) + longest > max_length:
        responses = [response[: max_length - max_prompt_length] for response in responses]
    return [prompt, *responses]


def prepare_rows(
    batch: dict[str, list], indices: list[int], source: str, how: dict, **more
) -> dict[str, list]:
    """Rows of a source → the columns of a DataSet, and `status`: whole, truncated, or why a row is
    dropped. indices: of the rows; how: see parse_rows; more: see prepare_row. Raises InputError,
    naming source and row."""
    prepared = []
    for index, parsed in zip(indices, parse_rows(batch, indices, source, **how)):
        prepared.append({"source": source, "row": index} | prepare_row(*parsed, **more))
    return {name: [row[name] for row in prepared] for name in prepared[0]}


def prepare_row(
    place: str, numbers: list[float], prompt, answers, tokenizer, end, stops, limits
) -> dict:
    """What parse_rows gives of a row → its token ids and status. end, stops: see tokenize_row;
    limits: max_length and max_prompt_length."""
    ids, status = [[]], "refused by template"
    try:
        if isinstance(answers, str):  # the reason why the row is dropped
            status = answers
        else:
            whole = tokenize_row(tokenizer, prompt, answers, end, stops)
            ids = truncate(whole, *limits)
            status = "whole" if ids == whole else "truncated"
            if not all(ids):
                status = "empty"
            elif any({*stops} & {*response[:-1]} for response in ids[1:]):
                status = "end of turn inside"
            elif len({*map(tuple, ids[1:])}) < len(answers):  # no preference between two of them
                status = "identical"
    except Exception as error:
        # In a few of HH's dialogues one side speaks twice; Gemma's and Mistral's templates want
        # the roles to alternate.
        if not (isinstance(error, TemplateError) and str(prompt).startswith("\n\nHuman:")):
            raise InputError(f"{place}: {error}") from None
    tokens = {"prompt": ids[0], "responses": ids[1:], "lengths": [len(part) for part in ids]}
    return tokens | {"columns": numbers, "status": status}


# ---- Data sets -----------------------------------------------------------------------------------


@dataclass
class DataSet:
    """Tokenized rows, and the order in which a run reads them.

    rows: columns prompt (list of int32 token ids), responses (K such lists), lengths (1 + K of
        them: tokens of the prompt and of every response), columns (float64, one number for each of
        `names`), source and row (where the row comes from, counted from 0)
    names: the columns that the loss asks for
    schedule: schedule[step][m][rank] are the indices of the rows in the rank's micro-batch m
    reference: (rows, K) float32, summed log-probs of the responses under the starting model, for a
        loss that asks for them; else None
    report: a sentence on what was dropped and truncated
    """

    rows: datasets.Dataset
    names: Sequence[str] = ()
    schedule: Sequence[list[list[list[int]]]] = ()
    reference: torch.Tensor | None = None
    report: str = ""

    def __setattr__(self, name: str, value) -> None:
        if name == "rows":  # what has been derived from others is theirs
            for member, kind in vars(type(self)).items():
                if isinstance(kind, functools.cached_property):
                    vars(self).pop(member, None)
        super().__setattr__(name, value)

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        """(rows, 1 + K) int64: tokens of the prompt and of every response."""
        table = self.rows.select_columns("lengths").with_format("arrow")[:]
        return flat_column(table, "lengths").reshape(len(self.rows), -1).astype(np.int64)

    @functools.cached_property
    def tokens(self) -> np.ndarray:
        """(rows,) int64: tokens of every row, its prompt counted once."""
        return self.lengths.sum(axis=1)

    @property
    def responses(self) -> int:
        """K."""
        return self.lengths.shape[1] - 1

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt + response."""
        return int((self.lengths[:, 0] + self.lengths[:, 1:].max(axis=1)).max())

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 over all that a step reads of the rows: equal if and only if two runs train on
        the same."""
        digest = hashlib.sha256(repr([*self.names, self.responses]).encode())
        for table in self.rows.with_format("arrow").iter(batch_size=1000):
            for column in ("prompt", "responses", "lengths", "columns"):
                digest.update(flat_column(table, column).tobytes())
        return digest.hexdigest()

    @functools.cached_property
    def highest_token(self) -> int:
        """The largest token id."""
        tables = self.rows.with_format("arrow").iter(batch_size=1000)
        parts = (flat_column(table, name) for table in tables for name in ("prompt", "responses"))
        return max(int(part.max()) for part in parts)

    def pack(self, indices: list[int]) -> "MicroBatch":
        """The rows at `indices`, packed."""
        rows = self.rows[indices]
        batch = pack([[p, *responses] for p, responses in zip(rows["prompt"], rows["responses"])])
        numbers = torch.tensor(rows["columns"], dtype=torch.float32).unbind(dim=1)
        columns = dict(zip(self.names, numbers))
        if self.reference is not None:
            columns["reference"] = self.reference[indices]
        return replace(batch, columns=columns)

    def indices(self, step: int) -> list[int]:
        """Of the rows of a step, on all ranks."""
        return [i for shares in self.schedule[step] for share in shares for i in share]

    def place(self, index: int) -> str:
        """Where a row comes from."""
        return "{source} row {row}".format(**self.rows[index])

    def batches(self, step: int, rank: int) -> list["MicroBatch"]:
        """The rank's micro-batches of a step, on the CPU; none after the last."""
        micro_batches = self.schedule[step] if step < len(self.schedule) else []
        return [self.pack(shares[rank]) for shares in micro_batches]


def load_data(
    sources: str,
    tokenizer,
    max_length: int,
    max_prompt_length: int,
    numbers: Iterable[str] = (),
    columns: str = "",
) -> DataSet:
    """The tokenized rows of the comma-separated sources, in order. numbers: the columns of numbers
    that a loss asks for; columns: see rename.

    Cached on disk. Any number of processes may call this: one tokenizes while the others wait at a
    file lock, not in a collective, whose timeout a large data set would exceed.
    Raises InputError, naming source and row, for a row in no accepted format, without a number that
    is asked for, or that the chat template does not render; and if K is not the same in all rows.
    """
    if not 0 < max_prompt_length < max_length:
        problem = f"max_prompt_length ({max_prompt_length}) must be positive and below"
        raise InputError(f"{problem} max_length ({max_length})")
    integers, text = datasets.List(datasets.Value("int32")), datasets.Value("string")
    features = {"prompt": integers, "responses": datasets.List(integers), "lengths": integers}
    features |= {"columns": datasets.List(datasets.Value("float64")), "source": text}
    features |= {"row": datasets.Value("int64"), "status": text}
    parsing = {"numbers": [*numbers], "columns": columns}
    tokenizing = {"end": end_of_turn(tokenizer), "stops": end_tokens(tokenizer)}
    tokenizing |= {"limits": (max_length, max_prompt_length)}
    # With the code: a fork that edits it never meets a stale cache.
    code = code_digest(sys.modules[__name__])
    what = (tokenizer_digests(tokenizer), parsing, tokenizing, code)
    parts = []
    for source in split_sources(sources):
        given = load_rows(source)
        how = tokenizing | {"tokenizer": tokenizer, "source": source}
        how["how"] = parsing | {"verbatim": is_json(given)}
        key = hashlib.sha256(repr((given._fingerprint, source, *what)).encode()).hexdigest()[:32]
        parts.append(map_rows(given, prepare_rows, how, datasets.Features(features), key))
    rows = datasets.concatenate_datasets(parts)
    status = np.array(rows["status"])
    kept = np.flatnonzero(np.isin(status, ["whole", "truncated"]))
    dropped = ", ".join(f"{np.sum(status == reason)} {reason}" for reason in DROPPED)
    truncated = np.sum(status == "truncated") / max(len(kept), 1)
    report = (
        f"{len(kept)} pairs from {sources}: {len(rows) - len(kept)} of {len(rows)} rows dropped "
        f"({dropped}), {truncated:.1%} of the pairs truncated"
    )
    if len(kept) == 0:
        raise InputError(f"no pairs are left: {report}")
    rows = rows.select(kept).remove_columns("status")
    data = DataSet(rows, parsing["numbers"], report=report)
    lengths = rows.select_columns("lengths").with_format("arrow")[:]["lengths"].combine_chunks()
    counts = lengths.value_lengths().to_numpy() - 1
    if others := np.flatnonzero(counts != counts[0]).tolist():
        problem = f"{data.place(others[0])}: {counts[others[0]]} responses"
        raise InputError(f"{problem}, but {counts[0]} in the first row: K must be the same in all")
    return data


def overlaps(data: DataSet, heldout: DataSet | None) -> str:
    """A sentence on rows that are there twice, on pairs that contradict each other, and on prompts
    that the held-out rows share with those of training."""
    prompts, rows = set(), Counter()
    for prompt, responses in row_keys(data):
        prompts.add(prompt)
        rows[prompt, responses] += 1
    twice = sum(rows.values()) - len(rows)
    exchanged = sum((p, r[::-1]) in rows for p, r in rows) // 2 if data.responses == 2 else 0
    text = f"{twice} rows are repeated, {exchanged} pairs are also there the other way round"
    if heldout:
        shared = sum(prompt in prompts for prompt, _ in row_keys(heldout))
        text += f"; {shared} of {len(heldout.rows)} held-out prompts are also in training"
    return text


def row_keys(data: DataSet) -> Iterator[tuple[int, tuple[int, ...]]]:
    """Of every row, the hashes of its prompt's and of its responses' token ids."""
    sizes = iter(data.lengths)
    for table in data.rows.with_format("arrow").iter(batch_size=1000):
        values = flat_column(table, "prompt"), flat_column(table, "responses")
        places = [0, 0]
        for lengths in itertools.islice(sizes, len(table)):
            parts = []
            for number, length in enumerate(lengths):
                kind = min(number, 1)
                part = values[kind][places[kind] : places[kind] + length]
                parts.append(hash(part.tobytes()))
                places[kind] += length
            yield parts[0], tuple(parts[1:])


def flat_column(table, name: str) -> np.ndarray:
    """All values of an Arrow table's column of lists, or of lists of lists, one after the other."""
    values = table[name].combine_chunks()
    while values.type.num_fields:  # a list's type has one, a number's none
        values = values.flatten()
    return values.to_numpy(zero_copy_only=False)


# ---- Batches -------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1)
def epoch_order(count: int, seed: int, epoch: int) -> np.ndarray:
    """The order of the rows in an epoch: (count,) int64."""
    return np.random.default_rng([seed, epoch]).permutation(count)


def step_indices(count: int, batch_size: int, seed: int, step: int) -> list[int]:
    """Which of `count` rows are in `step`: they depend on the seed and the step alone.

    Each epoch is a new permutation of all rows. Its last count % batch_size rows, too few for
    a batch, are left out, so that every step is over exactly batch_size rows.
    """
    epoch, position = divmod(step, count // batch_size)
    order = epoch_order(count, seed, epoch)
    return order[position * batch_size : (position + 1) * batch_size].tolist()


class Schedule(Sequence):
    """A DataSet's schedule of the training that config describes. A step is made when it is asked
    for: there may be any number of them. tokens: (rows,) of a DataSet.

    Raises InputError, before training, if a step cannot be spread over the ranks.
    """

    def __init__(self, tokens: np.ndarray, config, ranks: int):
        self.tokens, self.config, self.ranks = tokens, config, ranks
        count, size, longest = len(tokens), config.batch_size, tokens.max()
        if count < size:
            raise InputError(f"{count} pairs do not fill one batch: lower batch_size={size}")
        self.steps = config.max_steps or config.num_epochs * (count // size)
        if self.steps > sys.maxsize:
            raise InputError(f"{self.steps} steps are too many: lower num_epochs or max_steps")
        # Micro-batches of one row, or, where the ranks do not divide the batch, of one or two: if
        # they are small enough, every step can be spread. Otherwise all are tried.
        rows = 2 if size % ranks else 1
        if rows * longest > config.micro_batch_tokens or size < ranks:
            for step in range(self.steps):
                self[step]

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> list[list[list[int]]]:
        if not 0 <= step < self.steps:
            raise IndexError(step)
        size, seed = self.config.batch_size, self.config.seed
        indices = step_indices(len(self.tokens), size, seed, step)
        return spread_rows(indices, self.tokens, self.ranks, self.config.micro_batch_tokens)


def spread_rows(
    indices: Sequence[int], tokens: Sequence[int], ranks: int, micro_batch_tokens: int
) -> list[list[list[int]]]:
    """Spread rows over micro-batches × ranks: result[m][r] are the indices of the rows in rank
    r's micro-batch m. No micro-batch is empty or holds more than micro_batch_tokens, they are few,
    and their costs are balanced (longest row first, each to the micro-batch with the fewest
    tokens).

    indices: of the rows to spread; tokens: of every row, by index, its prompt once.
    Raises InputError if the rows cannot be spread so.

    >>> spread_rows([7, 0, 3], {0: 3, 3: 4, 7: 5}, ranks=2, micro_batch_tokens=8)
    [[[0, 3], [7]]]
    """
    longest_first = sorted(((int(tokens[i]), i) for i in indices), key=lambda row: -row[0])
    sizes = [size for size, _ in longest_first]
    if sizes[0] > micro_batch_tokens:
        raise InputError(
            f"a pair of {sizes[0]} tokens (its prompt and all responses) is longer than "
            f"micro_batch_tokens={micro_batch_tokens}: raise it, or lower max_length"
        )
    # Of rows that take more than half of the budget, no two share a micro-batch.
    needed = max(sum(sizes) / micro_batch_tokens, sum(2 * n > micro_batch_tokens for n in sizes))
    least, most = math.ceil(needed / ranks), len(sizes) // ranks
    count = least
    while count <= most:
        bins = [*range(count * ranks)]  # a heap of load · 2³² + number
        chosen = []  # the number of each row's bin
        for size in sizes:
            if (bins[0] >> 32) + size > micro_batch_tokens:
                break
            chosen.append(bins[0] & 0xFFFFFFFF)
            heapq.heapreplace(bins, bins[0] + (size << 32))
        else:
            members = {number: [] for number in range(count * ranks)}
            for number, (_, i) in zip(chosen, longest_first):
                members[number].append(i)
            # Bins of similar cost run side by side, since ranks wait for the slowest.
            bins.sort(key=lambda b: (-(b >> 32), b))
            shares = [sorted(members[b & 0xFFFFFFFF]) for b in bins]
            return [shares[m * ranks : (m + 1) * ranks] for m in range(count)]
        # One more at a time, so that a step's number is the least. A whole data set may need many.
        further = count + max(1, count // 1000, (count - least) // 8)
        count = most if count < most < further else further
    raise InputError(
        f"{len(indices)} pairs cannot be spread over {ranks} ranks in micro-batches of at most "
        f"micro_batch_tokens={micro_batch_tokens} tokens: raise it, use fewer ranks, or make the "
        "number of pairs (in training, batch_size) a multiple of them"
    )


@dataclass
class MicroBatch:
    """Rows of a DataSet, N of them, packed into one row of T tokens, each prompt once, without
    padding; R response tokens in all.

    A prompt with ids [1, 2] and its responses [3, 4] and [5], alone, are:

        input_ids    [1, 2, 3, 4, 5]  (T,) int64
        position_ids [0, 1, 2, 3, 2]  (T,) int64; every response continues from the prompt's end
        predictors   [1, 2, 1]        (R,) int64; the index in input_ids whose hidden state predicts
                                      each response token: the prompt's last token predicts the
                                      first token of every response
        targets      [3, 4, 5]        (R,) int64; response tokens, one response after the other
        lengths      [[2, 1]]         (N, K) int64; tokens of every response
        segments     [(2, 2, 1)]      tokens of prompt and responses, as Python integers
        columns      {}               by name, what a loss asks for: (N,) float32 numbers of the
                                      rows, or `reference`, (N, K) float32

    and, for attention on GPUs, where queries are the tokens in their order:

        keys         [0, 1, 2, 3, 0, 1, 4]  int64; for each response, the indices of its prompt's
                                            tokens and of its own
        key_starts   [0, 4, 7]        (N K + 1,) int32; where each of these sequences begins in
                                      keys, and the end
        query_starts [0, 4, 5]        the same for its queries: no prompt twice
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    predictors: torch.Tensor
    targets: torch.Tensor
    lengths: torch.Tensor
    segments: list[tuple[int, ...]]
    keys: torch.Tensor
    key_starts: torch.Tensor
    query_starts: torch.Tensor
    columns: dict[str, torch.Tensor] = field(default_factory=dict)

    def to(self, device) -> "MicroBatch":
        """The same on `device`."""
        move = functools.partial(torch.Tensor.to, device=device, non_blocking=True)
        moved = {k: move(v) for k, v in vars(self).items() if isinstance(v, torch.Tensor)}
        return replace(self, **moved, columns={k: move(v) for k, v in self.columns.items()})


def pack(rows: list[list[list[int]]]) -> MicroBatch:
    """Lay out rows, each [prompt ids, response ids, ...], as one MicroBatch: see its example."""
    input_ids, position_ids, predictors, targets, segments = [], [], [], [], []
    keys, key_starts, query_starts = [], [0], [0]
    for prompt, *responses in rows:
        p, start = len(prompt), len(input_ids)
        input_ids += prompt
        position_ids += range(p)
        for response in responses:
            n, here = len(response), len(input_ids)
            input_ids += response
            position_ids += range(p, p + n)
            predictors += [start + p - 1, *range(here, here + n - 1)]
            targets += response
            keys += [*range(start, start + p), *range(here, here + n)]
            key_starts.append(len(keys))
            query_starts.append(here + n)
        segments.append((p, *map(len, responses)))
    return MicroBatch(
        input_ids=torch.tensor(input_ids),
        position_ids=torch.tensor(position_ids),
        predictors=torch.tensor(predictors),
        targets=torch.tensor(targets),
        lengths=torch.tensor([sizes for _, *sizes in segments]),
        segments=segments,
        keys=torch.tensor(keys),
        key_starts=torch.tensor(key_starts, dtype=torch.int32),
        query_starts=torch.tensor(query_starts, dtype=torch.int32),
    )
