"""What holds for any pairs, lengths, settings and input, not only for the other tests' examples:
cases that hypothesis draws, the same ones every time."""

import copy
import dataclasses
import math

import pytest
import torch
import yaml
from conftest import make_model
from hypothesis import given, settings
from hypothesis import strategies as st

from data import pack, spread_rows, truncate
from loss import LOSSES, simper_loss, sum_logps
from model import PackedModel
from runtime.command_line import check_config
from runtime.errors import InputError
from runtime.rows import DROPPED, Dropped, parse_row
from train import Config, parse_args


def examples(count: int):
    return settings(derandomize=True, deadline=None, max_examples=count, database=None)


def ids(most: int):
    return st.lists(st.integers(0, 319), min_size=1, max_size=most)


# A prompt and as many responses in every row, from one to four.
ROWS = st.integers(1, 4).flatmap(
    lambda count: st.lists(st.tuples(ids(24), *[ids(12)] * count), min_size=1, max_size=9)
)


@pytest.fixture(scope="module")
def models():
    """A packed model, and the same one as transformers has it."""
    model = make_model("llama")
    packed = copy.deepcopy(model)
    packed.set_attn_implementation("packed")
    return PackedModel(packed), model


@torch.no_grad()
def plain_logps(model, prompt: list[int], response: list[int]) -> torch.Tensor:
    row = torch.tensor([prompt + response])
    logps = model(row).logits[0, :-1].log_softmax(dim=-1).gather(1, row[0, 1:, None])[:, 0]
    return logps[len(prompt) - 1 :]


@examples(40)
@given(rows=ROWS, room=st.integers(0, 60))
def test_any_rows_are_packed_whole_and_give_the_log_probs_of_plain_forwards(models, rows, room):
    packed, plain = models
    tokens = [sum(map(len, row)) for row in rows]
    budget, seen = max(tokens) + room, []
    for (share,) in spread_rows(range(len(rows)), tokens, 1, budget):
        batch = pack([rows[i] for i in share])
        assert len(batch.input_ids) <= budget
        assert batch.input_ids.tolist() == [t for i in share for part in rows[i] for t in part]
        assert batch.targets.tolist() == [t for i in share for part in rows[i][1:] for t in part]
        assert batch.lengths.tolist() == [[*map(len, rows[i][1:])] for i in share]
        expected = [plain_logps(plain, rows[i][0], part) for i in share for part in rows[i][1:]]
        with torch.no_grad():
            assert torch.allclose(packed(batch), torch.cat(expected), rtol=0, atol=1e-5)
        seen += share
    assert sorted(seen) == list(range(len(rows)))


@examples(300)
@given(
    tokens=st.lists(st.integers(1, 400), min_size=1, max_size=60),
    ranks=st.integers(1, 8),
    budget=st.integers(1, 1200),
)
def test_any_spread_is_complete_within_the_budget_and_balanced(tokens, ranks, budget):
    """Balanced: no two micro-batches differ by more than the longest pair.

    Proof. Take the fullest and the emptiest micro-batch at the end, with loads M and m, and the
    pair, of t tokens, that went into the fullest one last. It went to the micro-batch with the
    fewest tokens at that time, so that M − t was at most the load of the other then, which has only
    grown since: M − t <= m, and M − m <= t <= the longest pair. (Longest first is not needed for
    this; it also makes t the shortest pair of its micro-batch.) None is empty: there are at least
    as many pairs as micro-batches, each of at least one token, and a pair goes to an empty one as
    long as there is one.
    """
    try:
        batches = spread_rows(range(len(tokens)), tokens, ranks, budget)
    except InputError:
        # Pairs that are a multiple of the ranks fit one a micro-batch. Otherwise, in the most
        # micro-batches that are tried, one holds a single pair (there are less than two pairs for
        # each), and by the proof none holds more than it by more than the longest pair.
        fits = len(tokens) >= ranks and max(tokens) <= budget
        assert not fits or len(tokens) % ranks and max(tokens) * 2 > budget
        return
    shares = [share for batch in batches for share in batch]
    assert all(len(batch) == ranks for batch in batches)
    assert sorted(i for share in shares for i in share) == list(range(len(tokens)))
    loads = [sum(tokens[i] for i in share) for share in shares]
    assert min(loads) > 0 and max(loads) <= budget
    assert max(loads) - min(loads) <= max(tokens)
    for share, load in zip(shares, loads):
        assert load - min(loads) <= min(tokens[i] for i in share)


def values(field: dataclasses.Field):
    """Values of a flag, valid or not."""
    return {
        str: st.text(max_size=20),
        bool: st.booleans(),
        int: st.integers(-2, 10**9),
        float: st.floats(0, 1),
    }[field.type]


CHOICES = {"dtype": ("auto", "float32", "bfloat16"), "wandb": ("auto", "online", "offline", "off")}
CHOICES |= {"loss": (*LOSSES,), "resume": ("auto", "never", "anyway")}
CONFIGS = {f.name: values(f) for f in dataclasses.fields(Config)}
CONFIGS |= {name: st.sampled_from(words) for name, words in CHOICES.items()}
AWKWARD = [
    "off",
    "null",
    "~",
    "1e3",
    "010",
    "1:30",
    " a ",
    "a: b #c",
    "é\n\t\x85'\"",
    "- x",
    "=",
    "\0",
]


@examples(150)
@given(changes=st.fixed_dictionaries({}, optional=CONFIGS), text=st.sampled_from(AWKWARD))
def test_any_valid_config_is_its_own_recipe(tmp_path_factory, changes, text):
    path = tmp_path_factory.getbasetemp() / "config.yaml"
    config = Config(**{"model": text, "train_data": text, "output_dir": text} | changes)
    try:
        check_config(config)
    except InputError:
        return
    path.write_text("# versions\n" + yaml.safe_dump(dataclasses.asdict(config), sort_keys=False))
    assert parse_args([str(path)]) == config


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "content", "a"]), inner, max_size=3)
    ),
    max_leaves=6,
)
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["system", "user", "assistant", "tool"]), "content": st.text()}
    ),
    max_size=4,
)
HH = st.lists(st.sampled_from(["\n\nHuman:", "\n\nAssistant:", "a", " "]), max_size=5).map("".join)
CELLS = JSON | MESSAGES | HH
COLUMNS = {"prompt": CELLS, "chosen": CELLS, "rejected": CELLS, "other": JSON}
COLUMNS |= {"responses": st.lists(CELLS, max_size=4) | JSON}


@examples(400)
@given(row=st.fixed_dictionaries({}, optional=COLUMNS))
def test_any_row_is_parsed_or_an_input_error(row):
    try:
        prompt, answers = parse_row(row)
    except InputError as error:
        assert "in none of the accepted formats" in str(error)
        return
    except Dropped as reason:
        assert str(reason) in DROPPED
        return
    assert prompt and answers and all(isinstance(answer, str) for answer in answers)
    given = [row[name] for name in ("chosen", "rejected") if row.get(name) is not None]
    assert len(answers) == len(given or row["responses"])
    if not isinstance(prompt, str):
        assert all(set(m) == {"role", "content"} for m in prompt)
        assert all(isinstance(text, str) for m in prompt for text in m.values())


LINES = st.tuples(st.sampled_from(["seed", "model", "learning rate", "=", "", "-", "help"]), JSON)


@examples(200)
@given(
    text=st.text(max_size=60) | st.lists(LINES, max_size=3).map(lambda p: yaml.safe_dump(dict(p)))
)
def test_any_recipe_is_read_or_an_input_error_that_names_it(tmp_path_factory, text):
    path = tmp_path_factory.getbasetemp() / "recipe.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    try:
        parse_args([str(path), "--model=m", "--train_data=d", "--output_dir=o"])
    except InputError as error:
        assert str(path) in str(error) or "seed must" in str(error)


@examples(300)
@given(
    p=st.integers(0, 30),
    sizes=st.lists(st.integers(0, 30), min_size=1, max_size=4),
    limits=st.tuples(st.integers(1, 20), st.integers(1, 20)),
)
def test_any_row_is_truncated_by_the_stated_rule(p, sizes, limits):
    """Only if prompt + longest response exceeds max_length is the prompt cut to its last
    max_prompt_length tokens; if it is still too long, responses are cut to their first max_length −
    max_prompt_length."""
    max_prompt_length, more = limits
    max_length = max_prompt_length + more
    whole = [[*range(100 * k, 100 * k + n)] for k, n in enumerate((p, *sizes))]
    prompt, *responses = truncate(whole, max_length, max_prompt_length)
    too_long = p + max(sizes) > max_length
    kept = min(p, max_prompt_length) if too_long else p
    still = kept + max(sizes) > max_length
    assert prompt == [*range(p - kept, p)]
    for k, (response, n) in enumerate(zip(responses, sizes, strict=True), 1):
        assert response == [*range(100 * k, 100 * k + (min(n, more) if still else n))]
    assert len(prompt) + max(map(len, responses)) <= max_length


@examples(200)
@given(
    sizes=st.lists(st.integers(1, 50), min_size=1, max_size=30),
    ranks=st.integers(1, 3),
    budget=st.integers(50, 200),
)
def test_no_padded_micro_batch_is_larger_than_its_budget(sizes, ranks, budget):
    try:
        micro_batches = spread_rows(range(len(sizes)), sizes, ranks, budget, separate=True)
    except InputError:
        assert len(sizes) < ranks or len(sizes) % ranks or max(sizes) > budget
        return
    shares = [share for shares in micro_batches for share in shares]
    assert sorted(i for share in shares for i in share) == [*range(len(sizes))]
    assert all(len(shares) == ranks for shares in micro_batches)
    assert all(share and len(share) * max(sizes[i] for i in share) <= budget for share in shares)


@examples(200)
@given(
    sides=st.lists(
        st.tuples(*[st.lists(st.floats(-30, 0, width=32), min_size=1, max_size=40)] * 2),
        min_size=1,
        max_size=6,
    )
)
def test_the_loss_of_any_pairs_is_that_of_float64_arithmetic(sides):
    logps = torch.tensor([x for pair in sides for side in pair for x in side])
    lengths = torch.tensor([[len(c), len(r)] for c, r in sides])
    expected = [math.exp(math.fsum(r) / len(r)) - math.exp(math.fsum(c) / len(c)) for c, r in sides]
    found = simper_loss(logps, lengths)
    assert found.tolist() == pytest.approx(expected, abs=2e-5)
    assert simper_loss(logps.double(), lengths).tolist() == pytest.approx(expected, abs=1e-12)


@examples(100)
@given(
    rows=st.integers(1, 5).flatmap(
        lambda count: st.lists(
            st.tuples(*[st.lists(st.floats(-30, 0, width=32), min_size=1, max_size=20)] * count),
            min_size=1,
            max_size=6,
        )
    )
)
def test_the_log_probs_of_any_responses_are_summed_each_by_itself(rows):
    logps = torch.tensor([x for row in rows for response in row for x in response]).double()
    lengths = torch.tensor([[*map(len, row)] for row in rows])
    expected = [[math.fsum(response) for response in row] for row in rows]
    assert sum_logps(logps, lengths).tolist() == [pytest.approx(row, abs=1e-9) for row in expected]
