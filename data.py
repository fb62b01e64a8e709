"""Rows of preference data → token ids of a prompt and its responses → the rows of each step →
packed micro-batches.

Each row has a prompt and K responses, best first. A pair, which this code is mostly used with, has
K = 2: chosen and rejected. `python -m eval.show_pairs SOURCE --model MODEL` prints what will be
trained on, token by token.
"""

import bisect
import functools
import hashlib
import heapq
import math
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import datasets
import numpy as np
import torch
from jinja2 import TemplateError

from runtime.errors import InputError
from runtime.identity import code_digest
from runtime.rows import (
    DROPPED,
    Dropped,
    Missing,
    draw,
    is_json,
    load_rows,
    map_rows,
    parse_row,
    read_number,
    rename,
    split_share,
    split_sources,
    unread_columns,
)
from runtime.templates import (
    THINKING,
    End,
    as_messages,
    control_tokens,
    end_of_turn,
    prompt_text,
    render_row,
    without_end,
)
from runtime.weights import tokenizer_digests

# ---- Prompt and answers → token ids ------------------------------------------------------------


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
    tokenizer, prompt: list | str, answers: list[str], end: End, ended: bool = True
) -> list:
    """Token ids of the prompt and of every response: 1 + K lists. prompt, answers: see parse_row.
    Raises InputError as render_row.

    A response is what follows the prompt (see render_row), up to and including one end-of-turn
    token, or, without `ended`, up to the answer's own last token. Its ids are those that follow the
    prompt's in the whole text; where the tokenizer would merge the prompt's last characters with
    the answer's first ones, those that follow a line break, so that the prompt keeps its ids. An
    answer without any text gives [].
    """
    start, bodies = render_row(tokenizer, prompt, answers, end)
    prompt_ids, line_break_ids = (tokenize_text(tokenizer, text) for text in (start, "\n"))
    end_ids = [end.token] if ended else []

    def tokenize_body(body: str) -> list[int]:
        body += end.before if ended else ""
        for before, before_ids in ((start, prompt_ids), ("\n", line_break_ids)):
            ids = tokenize_text(tokenizer, before + body)
            if ids[: len(before_ids)] == before_ids:
                return [*ids[len(before_ids) :], *end_ids]
        return [*tokenizer(body, add_special_tokens=False).input_ids, *end_ids]

    return [prompt_ids, *(tokenize_body(body) if body else [] for body in bodies)]


def has_control_tokens(tokenizer, prompt: list | str, answers: list[str], stops: list[int]) -> bool:
    """Whether a text spells a control token. The tokenizer turns it into that token, here as at
    inference."""
    stop_texts = tokenizer.convert_ids_to_tokens(stops)
    texts = [message["content"] for message in as_messages(prompt)]
    texts += [without_end(answer, stop_texts) for answer in answers]
    return any(map(control_tokens(tokenizer).search, texts))


def truncate(ids: list[list], max_length: int, max_prompt_length: int) -> list[list]:
    """The authors' rule, on the token ids of a prompt and its responses. Only if prompt + longest
    response exceeds max_length is the prompt cut to its last max_prompt_length tokens; if still
    too long, responses are cut to their first max_length - max_prompt_length.

    >>> truncate([[1, 2, 3, 4], [5, 6, 7], [8]], max_length=5, max_prompt_length=3)
    [[2, 3, 4], [5, 6], [8]]
    """
    prompt, *responses = ids
    if row_length(ids) > max_length:
        prompt = prompt[-max_prompt_length:]
    if row_length([prompt, *responses]) > max_length:
        responses = [response[: max_length - max_prompt_length] for response in responses]
    return [prompt, *responses]


def fit(tokenize, prompt: list | str, max_length: int, max_prompt_length: int) -> list[list]:
    """What is left of a row that exceeds max_length: the prompt loses its oldest turns, and never
    its BOS or system message; if that is not enough, responses are cut to what the prompt leaves
    them. If one of them loses its end, all do: otherwise only the shorter ones would keep an end,
    and the model would learn to stop from where we cut. tokenize: (prompt, whether responses have
    their end) → the prompt's and the responses' token ids. Raises Dropped if the last question
    alone has more than max_prompt_length tokens."""
    prompts = [prompt]
    while shorter := without_oldest_turn(prompts[-1]):
        prompts.append(shorter)
    # The fewer turns, the fewer tokens: the first of these prompts that fits.
    kept = bisect.bisect_left(
        prompts, True, key=lambda prompt: row_length(tokenize(prompt, True)) <= max_length
    )
    if kept < len(prompts):
        return tokenize(prompts[kept], True)
    start, *responses = tokenize(prompts[-1], False)
    if len(start) > max_prompt_length:
        raise Dropped("too long")
    return [start, *(response[: max_length - len(start)] for response in responses)]


def row_length(ids: list[list]) -> int:
    """Tokens of a prompt and its longest response."""
    return len(ids[0]) + max(map(len, ids[1:]))


def without_oldest_turn(prompt: list | str) -> list | str | None:
    """The prompt without its first question and what answers it, or without what stands before the
    first question; with all of its system messages. None if it is one question."""
    if isinstance(prompt, str):
        start = prompt.find("\n\nHuman:", 1) if prompt.startswith("\n\nHuman:") else -1
        return prompt[start:] if start > 0 else None
    turns = [i for i, message in enumerate(prompt) if message["role"] != "system"]
    later = [i for i in turns[1:] if prompt[i]["role"] == "user"]
    if not later:
        return None
    system = [message for message in prompt[: later[0]] if message["role"] == "system"]
    first, *rest = [*system, *prompt[later[0] :]]
    tools = {name: value for name, value in prompt[0].items() if name == "tools"}
    return [first | tools, *rest]


def prepare_rows(batch: dict[str, list], indices: list[int], source: str, **how) -> dict[str, list]:
    """Rows of a source → the columns of a DataSet, and `status`: whole, truncated, or why a row
    is dropped. indices: of the rows; how: see prepare_row. Raises InputError, naming source and
    row."""
    prepared, place = [], f"{source}, rows {indices[0]} to {indices[-1]}"
    try:
        for index, values in zip(indices, zip(*batch.values())):
            place = f"{source}, row {index}"
            row = {name: value for name, value in zip(batch, values) if value is not Missing}
            prepared.append({"source": source, "row": index} | prepare_row(row, **how))
    except Exception as error:
        raise InputError(f"{place}: {error}") from None
    return {name: [row[name] for row in prepared] for name in prepared[0]}


def prepare_row(
    row: dict, names, columns: str, verbatim: bool, tokenizer, end: End, limits
) -> dict:
    """One row → its token ids, status, the numbers in its columns `names`, and `facts`, each 0 or
    1: whether a text contains a control token; whether the prompt has thinking switched off,
    although the template's default is on; whether truncation has taken the prompt's beginning, its
    BOS, and the end of each response. columns: see rename; verbatim: see parse_row; limits:
    truncation, max_length and max_prompt_length of Config."""
    ids, facts, (truncation, max_length, max_prompt_length) = [[]], [], limits
    row = rename(row, columns)
    numbers = [read_number(row, name) for name in names]

    def tokenize(prompt: list | str, ended: bool = True) -> list:
        return tokenize_row(tokenizer, prompt, answers, end, ended)

    try:
        prompt, answers = parse_row(row, verbatim)
        ids = whole = tokenize(prompt)
        status = "whole"
        if all(whole) and row_length(whole) > max_length:
            status = "truncated"
            if truncation == "drop":
                raise Dropped("too long")
            elif truncation == "paper":
                ids = truncate(whole, max_length, max_prompt_length)
            else:
                ids = fit(tokenize, prompt, max_length, max_prompt_length)
        if not all(ids):
            raise Dropped("empty")
        if any({*end.stops} & {*response[:-1]} for response in ids[1:]):
            raise Dropped("end of turn inside")
        if len({*map(tuple, ids[1:])}) < len(answers):  # no preference between two of them
            raise Dropped("identical")
        prompt_end, bos = tokenizer.decode(ids[0][-16:]), tokenizer.bos_token_id
        closed = any(closing in prompt_end for closing in THINKING.values())
        facts = [has_control_tokens(tokenizer, prompt, answers, end.stops)]
        facts += [closed and whole[0] != tokenize_text(tokenizer, prompt_text(tokenizer, prompt))]
        facts += [len(ids[0]) < len(whole[0]), whole[0][0] == bos != ids[0][0]]
        facts += [response[-1] != end.token for response in ids[1:]]
    except Dropped as reason:
        status = str(reason)
    except TemplateError:
        # In a few of HH's dialogues one side speaks twice; Gemma's and Mistral's templates want
        # the roles to alternate.
        if not str(prompt).startswith("\n\nHuman:"):
            raise
        status = "refused by template"
    tokens = {"prompt": ids[0], "responses": ids[1:], "lengths": [len(part) for part in ids]}
    tokens["hashes"] = [hash(tuple(part)) for part in ids]
    return tokens | {"columns": numbers, "status": status, "facts": [*map(int, facts)]}


# ---- Data sets -----------------------------------------------------------------------------------


@dataclass
class DataSet:
    """Tokenized rows, and the order in which a run reads them.

    rows: columns prompt (list of int32 token ids), responses (K such lists), lengths (1 + K of
        them: tokens of the prompt and of every response), hashes (1 + K, likewise), columns
        (float64, one number for each of `names`), source and row (where the row comes from, counted
        from 0)
    names: the columns that the loss asks for
    schedule: schedule[step][m][rank] are the indices of the rows in the rank's micro-batch m
    reference: (rows, K) float32, summed log-probs of the responses under the starting model, for a
        loss that asks for them; else None
    report: a sentence on what was dropped and truncated
    separate: whether the model computes every response in a row of its own, with its prompt, padded
        to the longest (PackedModel.separate_logps)
    first: pair_metrics of the rank's pairs, {name: (pairs,)}, by the first evaluate
    """

    rows: datasets.Dataset
    names: Sequence[str] = ()
    schedule: Sequence[list[list[list[int]]]] = ()
    reference: torch.Tensor | None = None
    report: str = ""
    separate: bool = False
    first: dict[str, torch.Tensor] | None = None

    def __setattr__(self, name: str, value) -> None:
        if name == "rows":  # what was computed from the former rows does not hold
            vars(self).update(reference=None, first=None)
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

    @functools.cached_property
    def spans(self) -> np.ndarray:
        """(rows,) int64: tokens of every row's prompt and longest response."""
        return self.lengths[:, 0] + self.lengths[:, 1:].max(axis=1)

    def cost(self, indices) -> int:
        """Tokens that a forward of the rows at `indices` computes: each prompt once, or, if
        `separate`, K times and with padding."""
        costs = self.costs[indices]
        return int(len(costs) * costs.max() if self.separate else costs.sum())

    @property
    def costs(self) -> np.ndarray:
        """(rows,) int64: cost of every row alone."""
        return self.responses * self.spans if self.separate else self.tokens

    def spread(self, indices: Sequence[int], ranks: int, micro_batch_tokens: int) -> list:
        """spread_rows of these rows, by what they cost."""
        return spread_rows(indices, self.costs, ranks, micro_batch_tokens, self.separate)

    @property
    def responses(self) -> int:
        """K."""
        return self.lengths.shape[1] - 1

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt + response."""
        return int(self.spans.max())

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
        """Of a step's rows, those of all ranks together."""
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
    truncation: str = "fit",
) -> DataSet:
    """The tokenized rows of the comma-separated sources, in order; of `source:0.5`, the half that
    `draw` takes. numbers: the columns of numbers that a loss asks for; columns: see rename;
    truncation: what becomes of rows that exceed max_length, "paper" (see truncate), "fit" (see fit)
    or "drop".

    Cached on disk. Any number of processes may call this: one tokenizes while the others wait at a
    file lock, not in a collective, whose timeout a large data set would exceed.
    Raises InputError, naming source and row, for a row in no accepted format, without a number that
    is asked for, or that the chat template does not render; and if K is not the same in all rows.
    """
    if not 0 < max_prompt_length < max_length:
        problem = f"max_prompt_length ({max_prompt_length}) must be positive and below"
        raise InputError(f"{problem} max_length ({max_length})")
    if truncation not in ("paper", "fit", "drop"):
        raise InputError(f"truncation must be paper, fit or drop, not '{truncation}'")
    integers, text = datasets.List(datasets.Value("int32")), datasets.Value("string")
    features = {"prompt": integers, "responses": datasets.List(integers), "lengths": integers}
    features |= {"columns": datasets.List(datasets.Value("float64")), "source": text}
    features |= {"row": datasets.Value("int64"), "hashes": datasets.List(datasets.Value("int64"))}
    features |= {"status": text, "facts": integers}
    how = {"names": [*numbers], "columns": columns, "end": end_of_turn(tokenizer)}
    how |= {"limits": (truncation, max_length, max_prompt_length)}
    # With the code: a fork that edits it never meets a stale cache.
    what = (tokenizer_digests(tokenizer), how, code_digest(sys.modules[__name__]))
    parts, unread = [], {}
    for source, share in map(split_share, split_sources(sources)):
        given = load_rows(source)
        more = {"tokenizer": tokenizer, "source": source, "verbatim": is_json(given)}
        key = hashlib.sha256(repr((given._fingerprint, source, *what)).encode()).hexdigest()[:32]
        part = map_rows(given, prepare_rows, how | more, datasets.Features(features), key)
        unread |= dict.fromkeys(unread_columns(rename(given[0], columns), how["names"]))
        if share < 1:
            part = part.select(draw(source, len(part), share))
        parts.append(part)
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
    rows = rows.select(kept)
    facts = flat_column(rows.select_columns("facts").with_format("arrow")[:], "facts")
    data = DataSet(rows.remove_columns(["status", "facts"]), how["names"], report=report)
    lengths = rows.select_columns("lengths").with_format("arrow")[:]["lengths"].combine_chunks()
    counts = lengths.value_lengths().to_numpy() - 1
    if others := np.flatnonzero(counts != counts[0]).tolist():
        problem = f"{data.place(others[0])}: {counts[others[0]]} responses"
        raise InputError(f"{problem}, but {counts[0]} in the first row: K must be the same in all")
    control, thought, cut, bos, *ends = facts.reshape(len(rows), -1).sum(axis=0)
    if truncated:
        data.report += f": {cut} prompts lost their beginning ({bos} of them BOS), and "
        data.report += f"{', '.join(map(str, ends))} responses their end (best response first)"
    if unread:
        data.report += f"; columns that training does not read: {', '.join(unread)}"
    if control:
        data.report += f"; the texts of {control} contain control tokens, such as <s>"
    if thought:
        data.report += f"; {thought} prompts end with an empty thinking block, as at inference with"
        data.report += " enable_thinking=false: --template_args sets it for the exported model, too"
    return data


def overlaps(data: DataSet, heldout: DataSet | None) -> str:
    """A sentence on rows that are there twice, on pairs that contradict each other, and on held-out
    prompts that are also in training, or there twice."""
    rows = Counter(map(tuple, data.rows["hashes"][:]))
    twice = sum(rows.values()) - len(rows)
    exchanged = sum((p, *r[::-1]) in rows for p, *r in rows) // 2 if data.responses == 2 else 0
    text = f"{twice} rows are repeated, {exchanged} pairs are also there the other way round"
    if heldout:
        prompts = {prompt for prompt, *_ in rows}
        own = [prompt for prompt, *_ in heldout.rows["hashes"][:]]
        shared = sum(prompt in prompts for prompt in own)
        text += f"; {shared} of {len(own)} held-out prompts are also in training"
        if again := len(own) - len({*own}):
            text += f", {again} repeat another one: intervals, which count all, are too narrow"
    return text


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
    for: there may be any number of them. costs: (rows,), DataSet.costs; separate: DataSet.separate.

    Raises InputError, before training, if a step cannot be spread over the ranks.
    """

    def __init__(self, costs: np.ndarray, config, ranks: int, separate: bool = False):
        self.costs, self.config, self.ranks, self.separate = costs, config, ranks, separate
        count, size, longest = len(costs), config.batch_size, costs.max()
        if count < size:
            raise InputError(f"{count} pairs do not fill one batch: lower batch_size={size}")
        self.steps = config.max_steps or config.num_epochs * (count // size)
        # If the longest row fits (two of them, where the ranks do not divide the batch), every step
        # can be spread. Otherwise all are tried now.
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
        indices = step_indices(len(self.costs), size, seed, step)
        budget = self.config.micro_batch_tokens
        return spread_rows(indices, self.costs, self.ranks, budget, self.separate)


def spread_rows(
    indices: Sequence[int],
    costs: Sequence[int],
    ranks: int,
    micro_batch_tokens: int,
    separate: bool = False,
) -> list[list[list[int]]]:
    """Spread rows over micro-batches × ranks: result[m][r] are the indices of the rows in rank
    r's micro-batch m. No micro-batch is empty or holds more than micro_batch_tokens, they are few,
    and their costs are balanced (longest row first, each to the micro-batch with the fewest
    tokens).

    indices: of the rows to spread; costs: DataSet.costs, by index; separate: whether every row of a
    micro-batch takes as many tokens as its longest.
    Raises InputError if the rows cannot be spread so.

    >>> spread_rows([7, 0, 3], {0: 3, 3: 4, 7: 5}, ranks=2, micro_batch_tokens=8)
    [[[0, 3], [7]]]
    """
    longest_first = sorted(((int(costs[i]), i) for i in indices), key=lambda row: -row[0])
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
        bins = [(0, number) for number in range(count * ranks)]  # a heap of (cost, number)
        members = [[] for _ in bins]
        for size, i in longest_first:
            cost, number = bins[0]
            # Separate, a row takes as much as the first of its bin, which is the longest.
            cost += int(costs[members[number][0]]) if separate and members[number] else size
            if cost > micro_batch_tokens:
                break
            members[number].append(i)
            heapq.heapreplace(bins, (cost, number))
        else:
            # Bins of similar cost run side by side, since ranks wait for the slowest.
            bins.sort(key=lambda pair: (-pair[0], pair[1]))
            shares = [sorted(members[number]) for _, number in bins]
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

        def move(tensor: torch.Tensor) -> torch.Tensor:
            # A copy from memory that is not pinned would wait for the GPU.
            pinned = tensor.pin_memory() if torch.device(device).type == "cuda" else tensor
            return pinned.to(device, non_blocking=True)

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
