"""Any number K of responses to a prompt, and numbers that a loss asks for by the names of columns:
against plain transformers forwards in float64, autograd on formulas, and literal tokens."""

import copy
import csv
import json
import math
import random
import re
from pathlib import Path

import datasets
import pytest
import torch
from conftest import (
    ROOT,
    gradients,
    make_model,
    make_tokenizer,
    relative_difference,
    run,
    timeless,
)
from conftest import run_ranks as run_on_ranks
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from data import DataSet, load_data, pack
from loss import LOSSES
from model import build_model, load_model
from runtime import checks
from runtime.checks import check_forward, masked_attention
from runtime.errors import InputError
from runtime.processes import start_group

CPU, CHAT = torch.device("cpu"), make_tokenizer()
ARCHITECTURES = ["llama", "mistral-sliding-window", "gpt_neox", "gemma3_text"]
METRICS = ("inverse_perplexity", "logps", "length", "gradient_weight")

# ---- Losses of forks -----------------------------------------------------------------------------

# They stand in a text so that a script of their own, which torchrun starts, can have them, too.
CODE = '''
import torch
from loss import LOSSES, sum_logps


def plackett_luce_loss(token_logps, lengths):
    """−log of the probability that the responses, drawn one after the other without replacement by
    their inverse perplexities as scores, come in the order given."""
    scores = (sum_logps(token_logps, lengths) / lengths).exp()
    return (scores.flip(1).logcumsumexp(1).flip(1) - scores)[:, :-1].sum(dim=1)


def relative_loss(token_logps, lengths, reference):
    """The same, of the sums over those of the starting model."""
    scores = sum_logps(token_logps, lengths) - reference
    return (scores.flip(1).logcumsumexp(1).flip(1) - scores)[:, :-1].sum(dim=1)


def margin_loss(token_logps, lengths, margin, scale=1.0):
    """SimPER's loss, times a number of the row."""
    chosen, rejected = (sum_logps(token_logps, lengths) / lengths).exp().unbind(dim=1)
    return scale * margin * (rejected - chosen)


def weighted_loss(token_logps, lengths, weight, reference, margin):
    """With two columns and the reference between them."""
    scores = (sum_logps(token_logps, lengths) - reference) / lengths
    return weight * (scores[:, 1] - scores[:, 0] + margin).exp()


LOSSES |= {k.removesuffix("_loss"): v for k, v in globals().items() if k.endswith("_loss")}
'''
SCRIPT = f"""
import sys

sys.path.insert(0, {str(ROOT)!r})
{CODE}
from runtime.command_line import run_command
from train import parse_args, train

run_command(lambda: train(parse_args(sys.argv[1:])))
"""


@pytest.fixture(autouse=True)
def losses(monkeypatch):
    """loss.LOSSES with those of CODE."""
    before = dict(LOSSES)
    exec(CODE, {})
    yield
    LOSSES.clear()
    LOSSES.update(before)


def run_ranks(values: dict, output: Path, ranks: int = 2) -> list[dict]:
    """Train with the losses of CODE through torchrun."""
    script = output.with_name(f"{output.name}.py")
    script.write_text(SCRIPT)
    return run_on_ranks(values, output, ranks, script)


# ---- Rows, and a plain model ---------------------------------------------------------------------


def message(role: str, text: str) -> dict:
    return {"role": role, "content": text}


def make_rows(count: int, responses: int, seed: int = 0) -> list[dict]:
    """Conversations with answers of very different lengths, all of them different."""
    draw = random.Random(seed)
    text = lambda letters, most: "".join(draw.choice(letters) for _ in range(draw.randint(1, most)))  # noqa: E731
    return [
        {
            "prompt": [message("user", text("what is two plus ", 40))],
            "responses": [f"{number}{text('abcde01234', 25)}" for number in range(responses)],
        }
        for _ in range(count)
    ]


def write(path: Path, rows: list[dict]) -> str:
    """Rows → a file of the type that its name says."""
    table = lambda: datasets.Dataset.from_list(rows)  # noqa: E731
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".parquet":
        table().to_parquet(path)
    else:
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, rows[0].keys())
            writer.writeheader()
            writer.writerows(rows)
    return str(path)


def tokens(source: str) -> list[list[list[int]]]:
    """[prompt, response, ...] of every row. (That these are right: the first tests.)"""
    rows = load_data(source, CHAT, 96, 60).rows
    return [[row["prompt"], *row["responses"]] for row in rows]


def plain_logps(model, prompt: list[int], response: list[int]) -> torch.Tensor:
    """Log-probs of a response's tokens by a plain forward of prompt + response alone."""
    ids = torch.tensor([prompt + response])
    logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(dim=-1).gather(1, ids[0, len(prompt) :, None])[:, 0]


def read_model(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)


def means_of(model, row: list[list[int]]) -> torch.Tensor:
    """(K,) mean log-probs of a row's responses."""
    return torch.stack([plain_logps(model, row[0], part).mean() for part in row[1:]])


def plackett_luce(means: torch.Tensor) -> torch.Tensor:
    """Of one row, from mean log-probs: term by term."""
    scores, total = means.exp(), 0
    for place in range(len(scores) - 1):
        total = total - (scores[place].exp() / scores[place:].exp().sum()).log()
    return total


def negative_mean(means: torch.Tensor) -> torch.Tensor:
    return -means[0]


def plain_gradients(model, losses: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Of the mean loss, by the parameters' names."""
    model.zero_grad()
    torch.stack(losses).mean().backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def expected_metrics(model, rows: list[list[list[int]]], loss) -> dict[str, float]:
    """What is logged, by hand: means over the rows; of all responses but the first, the mean."""
    table = []
    for row in rows:
        means = means_of(model, row).detach().requires_grad_()
        value = loss(means)
        value.backward()
        first, *others = zip(
            means.exp().tolist(), means.tolist(), map(len, row[1:]), means.grad.tolist()
        )
        found = {"loss": value.item()}
        found |= {f"{name}/chosen": value for name, value in zip(METRICS, first)}
        found["gradient_weight/chosen"] *= -1
        if others:
            means_of_others = [sum(values) / len(others) for values in zip(*others)]
            found |= {f"{name}/rejected": value for name, value in zip(METRICS, means_of_others)}
            found["inverse_perplexity/margin"] = first[0] - means_of_others[0]
            found["accuracy"] = sum(first[1] > other[1] for other in others) / len(others)
        table.append(found)
    return {name: sum(row[name] for row in table) / len(table) for name in table[0]}


@pytest.fixture
def four(base, tmp_path) -> dict:
    """A run of one step with eight rows of four responses; nine are held out."""
    values = {"train_data": write(tmp_path / "four.jsonl", make_rows(8, 4))}
    values |= {"eval_data": write(tmp_path / "held.jsonl", make_rows(9, 4, seed=1))}
    return base | values | {"loss": "plackett_luce", "save_every": 1, "warmup_ratio": 0.0}


# ---- Reading -------------------------------------------------------------------------------------

WORDS = ["plus", "what", "two", "is"]
QUESTION = [message("user", "what is two?")]
HH = "\n\nHuman: what is two?\n\nAssistant:"
FORMS = {
    "text": lambda words: {"prompt": "what is two?", "responses": words},
    "messages, text": lambda words: {"prompt": QUESTION, "responses": words},
    "messages, messages": lambda words: {
        "prompt": QUESTION,
        "responses": [[message("assistant", word)] for word in words],
    },
    "conversations": lambda words: {
        "responses": [[*QUESTION, message("assistant", word)] for word in words]
    },
    "HH dialogues": lambda words: {"responses": [f"{HH} {word}" for word in words]},
    "beside null columns": lambda words: {
        "prompt": "what is two?",
        "chosen": None,
        "rejected": None,
        "responses": words,
    },
}


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize("count", [1, 3, 4])
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_responses_are_read_best_first(form, count, suffix, tmp_path):
    source = write(tmp_path / f"rows{suffix}", [form(WORDS[:count]), form(WORDS[::-1][:count])])
    expected = CHAT("<|im_start|>user\nwhat is two?<|im_end|>\n<|im_start|>assistant\n").input_ids
    for found, words in zip(tokens(source), (WORDS, WORDS[::-1]), strict=True):
        prompt, *responses = found
        assert prompt == expected
        assert [*map(CHAT.decode, responses)] == [f"{word}<|im_end|>" for word in words[:count]]
    assert load_data(source, CHAT, 96, 60).responses == count


def test_a_pair_is_a_row_of_two_responses(tmp_path):
    pair = {"prompt": "what is two?", "chosen": "plus", "rejected": "what"}
    source = write(tmp_path / "pair.jsonl", [pair])
    other = write(tmp_path / "two.jsonl", [FORMS["text"](WORDS[:2])])
    assert tokens(source) == tokens(other)
    assert load_data(source, CHAT, 96, 60).fingerprint == load_data(other, CHAT, 96, 60).fingerprint


@pytest.mark.parametrize(
    "responses, reason",
    [
        (["plus", "what", "plus"], "1 identical"),
        (["plus", "what", "what<|im_end|>"], "1 identical"),
        (["a" * 90 + "b", "c", "a" * 90 + "d"], "1 identical"),  # once they are truncated
        (["plus", "", "what"], "1 empty"),
        (["plus", "what", " \n"], "1 empty"),
        ([], "1 empty"),
        (["plus", "a<|im_end|>b", "what"], "1 end of turn inside"),
        ([f"{HH} a", f"{HH} b", HH.replace("two", "four") + " c"], "1 different prompts"),
        ([f"{HH} a", f"{HH} b", f"{HH} c\n\nHuman: d"], "1 different prompts"),
        (
            [
                [*QUESTION, message("assistant", "a")],
                [*QUESTION, message("assistant", "b")],
                [message("user", "what is four?"), message("assistant", "c")],
            ],
            "1 different prompts",
        ),
    ],
)
def test_rows_without_a_preference_are_dropped_and_counted(responses, reason, tmp_path):
    good = {"prompt": "what is two?", "responses": WORDS[:3]}
    sources = [
        write(tmp_path / f"{name}.jsonl", [row])
        for name, row in (("a", good), ("b", {"prompt": "?", "responses": responses}), ("c", good))
    ]
    found = load_data(",".join(sources), CHAT, 70, 20)
    assert "1 of 3 rows dropped" in found.report and reason in found.report
    assert list(found.rows["source"]) == sources[::2] and found.responses == 3


BAD = {
    "a number": ["plus", 4],
    "text and messages": ["plus", [message("assistant", "what")]],
    "messages that do not end with an answer": [QUESTION, QUESTION],
    "an object": {"a": "plus"},
}


@pytest.mark.parametrize("responses", BAD.values(), ids=BAD)
def test_other_responses_are_an_error_that_names_file_and_row(responses, tmp_path):
    rows = [{"prompt": "what is two?", "responses": responses}]
    source = write(tmp_path / "rows.jsonl", rows)
    with pytest.raises(InputError, match="in none of the accepted formats") as error:
        load_data(source, CHAT, 96, 60)
    assert f"{source}, row 0" in str(error.value)


def test_another_number_of_responses_is_an_error_that_names_source_and_row(tmp_path):
    first = write(tmp_path / "first.jsonl", make_rows(3, 4))
    second = write(tmp_path / "second.jsonl", [*make_rows(2, 4), *make_rows(1, 3)])
    assert load_data(first, CHAT, 96, 60).responses == 4
    for sources in (second, f"{first},{second}"):
        with pytest.raises(InputError, match=r"second\.jsonl.* row 2.*\b3 responses.*\b4\b"):
            load_data(sources, CHAT, 96, 60)


def test_other_numbers_in_training_and_held_out_rows_are_an_error(four, tmp_path, monkeypatch):
    monkeypatch.setattr("train.load_model", lambda *_, **__: pytest.fail("loads a model"))
    held = write(tmp_path / "three.jsonl", make_rows(9, 3))
    with pytest.raises(InputError, match="train_data has 4 responses a row, eval_data 3"):
        run(four | {"eval_data": held}, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("count", [1, 3, 4])
@pytest.mark.parametrize("loss", ["simper", "dpo", "kto", "orpo"])
def test_a_loss_of_two_refuses_others_before_a_model_is_loaded(
    loss, count, four, tmp_path, monkeypatch
):
    monkeypatch.setattr("train.load_model", lambda *_, **__: pytest.fail("loads a model"))
    rows = write(tmp_path / "rows.jsonl", make_rows(8, count))
    values = four | {"train_data": rows, "eval_data": "", "loss": loss}
    with pytest.raises(InputError, match=f"the loss does not take {count} responses to a prompt"):
        run(values, tmp_path / "run")
    assert not (tmp_path / "run").exists()


# ---- The packed forward --------------------------------------------------------------------------


def random_rows(count: int, *, vocabulary: int = 320) -> list[list[list[int]]]:
    """Rows of random tokens; some responses are longer than a sliding window of 6."""
    draw = random.Random(count)
    sizes = [(draw.randint(1, 12), *(draw.randint(1, 14) for _ in range(count))) for _ in range(4)]
    return [[[draw.randrange(vocabulary) for _ in range(n)] for n in row] for row in sizes]


@pytest.mark.parametrize("count", [1, 3, 4])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_log_probs_are_those_of_plain_forwards(name, count):
    reference, rows = make_model(name), random_rows(count)
    packed = build_model(reference.config)
    packed.model.load_state_dict(reference.state_dict())
    with torch.no_grad():
        found = packed(pack(rows))
        plain = reference.double()
        expected = [plain_logps(plain, row[0], part) for row in rows for part in row[1:]]
    sizes = [len(part) for row in rows for part in row[1:]]
    assert pack(rows).lengths.flatten().tolist() == sizes
    for ours, exact in zip(found.split(sizes), expected, strict=True):
        assert (ours - exact).abs().max() < 2e-5


@pytest.mark.parametrize("position", [0, 1, 2, 3])
def test_a_response_changes_no_other_responses_log_probs(position):
    model, rows = build_model(make_model("llama").config), random_rows(4)
    model.model.load_state_dict(make_model("llama").state_dict())
    other = copy.deepcopy(rows)
    other[1][1 + position] = [(token + 1) % 320 for token in other[1][1 + position]]
    sizes = [len(part) for row in rows for part in row[1:]]
    with torch.no_grad():
        before, after = (model(pack(r)).split(sizes) for r in (rows, other))
    changed = [not torch.allclose(x, y, rtol=0, atol=1e-5) for x, y in zip(before, after)]
    assert changed == [number == 4 + position for number in range(16)]


def above_the_limit(error) -> set[str]:
    """The names of the figures that check_forward does not accept, by its message."""
    figures = re.findall(r"(\w+) (\S+) \((\S+)\)", str(error.value))
    return {name for name, found, accepted in figures if not float(found) <= float(accepted)}


def rows_of(count: int) -> DataSet:
    rows = random_rows(count)
    columns = {"prompt": [row[0] for row in rows], "responses": [row[1:] for row in rows]}
    columns |= {"lengths": [[*map(len, row)] for row in rows]}
    return DataSet(datasets.Dataset.from_dict(columns))


def misses_a_token(module, query, key, value, mask, scaling, window, micro_batch, **_):
    """Attention in which the last response of a row does not see the prompt's last token."""
    shifted, start = copy.copy(micro_batch), 0
    shifted.position_ids = micro_batch.position_ids.clone()
    for sizes in micro_batch.segments:
        start += sum(sizes)
        shifted.position_ids[start - sizes[-1] : start] -= 2
    return masked_attention(module, query, key, value, mask, scaling, window, shifted)


def sees_the_response_before(module, query, key, value, mask, scaling, window, micro_batch, **_):
    """Attention in which the last response of a row sees the one before it."""
    joined = copy.copy(micro_batch)
    joined.segments = [(*s[:-2], s[-2] + s[-1], 0) for s in micro_batch.segments]
    return masked_attention(module, query, key, value, mask, scaling, window, joined)


@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_start_checks_the_forward_with_as_many_responses(name, count, tmp_path, monkeypatch):
    make_model(name).save_pretrained(tmp_path)
    start_group(CPU)
    try:
        model, data = load_model(str(tmp_path), CPU, torch.float32), rows_of(count)
        packed = []
        note = lambda rows: packed.extend(rows) or pack(rows)  # noqa: E731
        monkeypatch.setattr(checks, "pack", note)
        check_forward(model, data, None)
        assert {len(row) - 1 for row in packed} == {count}
        for wrong in (misses_a_token, sees_the_response_before)[: min(count, 2)]:
            monkeypatch.setattr(checks, "packed_attention", wrong)
            with pytest.raises(InputError, match="cannot be trained packed") as error:
                check_forward(model, data, None)
            assert above_the_limit(error) == {"attention"}
    finally:
        torch.distributed.destroy_process_group()


# ---- Training ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_gradients_of_a_listwise_loss_are_those_of_plain_forwards(name, four, tmp_path):
    make_model(name).save_pretrained(tmp_path / "model")
    CHAT.save_pretrained(tmp_path / "model")
    run(four | {"model": str(tmp_path / "model")}, tmp_path / "run")
    model = read_model(tmp_path / "model")
    losses = [plackett_luce(means_of(model, row)) for row in tokens(four["train_data"])]
    assert len(losses) == 8
    expected = plain_gradients(model, losses)
    found = gradients(tmp_path / "run")
    assert relative_difference({k: v.double() for k, v in found.items()}, expected) < 1e-5


LOGGED = {4: ("plackett_luce", plackett_luce), 1: ("sft", negative_mean)}


@pytest.mark.parametrize("count", LOGGED)
def test_metrics_are_those_of_arithmetic_by_hand(count, four, tmp_path):
    name, loss = LOGGED[count]
    sources = {"train_data": write(tmp_path / "rows.jsonl", make_rows(8, count))}
    sources |= {"eval_data": write(tmp_path / "held_out.jsonl", make_rows(9, count, seed=1))}
    lines = run(four | sources | {"loss": name}, tmp_path / "run")
    before, step, after = lines
    models = {"before": read_model(four["model"]), "after": read_model(tmp_path / "run" / "final")}
    held, training = (tokens(sources[key]) for key in ("eval_data", "train_data"))
    for line, model, rows, prefix in (
        (before, models["before"], held, "eval/"),
        (step, models["before"], training, ""),
        (after, models["after"], held, "eval/"),
    ):
        expected = {prefix + k: v for k, v in expected_metrics(model, rows, loss).items()}
        found = {k: v for k, v in line.items() if k in expected}
        assert found == pytest.approx(expected, rel=1e-5, abs=1e-7)
        others = [k for k in line if "rejected" in k or "accuracy" in k or "margin" in k]
        assert bool(others) == (count > 1)
    if count == 4:  # some rows are neither right nor wrong, which no pair is
        with torch.no_grad():
            means = [means_of(models["before"], row) for row in held]
        assert any(m[1:].min() < m[0] <= m[1:].max() for m in means)


def test_two_ranks_and_other_micro_batches_change_nothing(four, tmp_path):
    values = four | {"loss": "relative", "max_steps": 2}
    expected = timeless(run(values, tmp_path / "one"))
    small = values | {"micro_batch_tokens": 300}
    runs = {"small": run(small, tmp_path / "small"), "two": run_ranks(small, tmp_path / "two")}
    for name, lines in runs.items():
        assert len(lines) == len(expected) == 4
        for line, other in zip(timeless(lines), expected):
            assert line == pytest.approx(other, rel=2e-4, abs=1e-6)
        folders = (tmp_path / name, tmp_path / "one")
        final, other = (load_file(folder / "final" / "model.safetensors") for folder in folders)
        assert relative_difference(final, other) < 1e-5
    start = load_file(Path(four["model"]) / "model.safetensors")
    assert relative_difference(other, start) > 1e-3  # the run has done something


def test_the_reference_is_of_every_response(four, tmp_path):
    run(four | {"loss": "relative"}, tmp_path / "run")
    kept = load_file(tmp_path / "run" / "reference.safetensors")
    model = read_model(four["model"])
    for name in ("train_data", "eval_data"):
        with torch.no_grad():
            expected = [
                [plain_logps(model, row[0], part).sum() for part in row[1:]]
                for row in tokens(four[name])
            ]
        assert kept[name].shape == (len(expected), 4)
        assert (kept[name] - torch.tensor(expected)).abs().max() < 1e-4


# ---- Columns that a loss asks for ----------------------------------------------------------------

MARGINS = [0.1, -2.0, 3.0, 0.0, 1e-3, 7.25, 0.5, 40.0]


def make_pairs(count: int, seed: int = 0) -> list[dict]:
    """Pairs as text, for files of every type."""
    return [
        {
            "prompt": row["prompt"][0]["content"].strip() or "what?",
            "chosen": row["responses"][0],
            "rejected": row["responses"][1],
        }
        for row in make_rows(count, 2, seed)
    ]


def with_margins(margins: list, name: str = "margin") -> list[dict]:
    return [row | {name: margin} for row, margin in zip(make_pairs(len(margins)), margins)]


@pytest.fixture
def margins(base, tmp_path) -> dict:
    """A run of one step with eight pairs that have margins."""
    values = {"train_data": write(tmp_path / "margins.jsonl", with_margins(MARGINS))}
    return base | values | {"eval_data": "", "loss": "margin", "save_every": 1, "warmup_ratio": 0.0}


def margin_gradients(values: dict, scale: float = 1.0) -> dict[str, torch.Tensor]:
    """By plain forwards of pairs in the order of the file."""
    model, losses = read_model(values["model"]), []
    for row, margin in zip(tokens(values["train_data"]), MARGINS, strict=True):
        chosen, rejected = means_of(model, row).exp()
        losses.append(scale * margin * (rejected - chosen))
    return plain_gradients(model, losses)


def assert_gradients(folder: Path, expected: dict[str, torch.Tensor]) -> None:
    found = {name: tensor.double() for name, tensor in gradients(folder).items()}
    assert relative_difference(found, expected) < 1e-5


FILES = {
    "margins.jsonl": MARGINS,
    "margins.parquet": MARGINS,
    "margins.csv": MARGINS,
    "text.csv": [f" {margin} " for margin in MARGINS[:-1]] + ["4e1"],
    "text.jsonl": [str(margin) for margin in MARGINS],
}


@pytest.mark.parametrize("name", FILES)
def test_a_number_reaches_the_loss_of_its_own_pair(name, margins, tmp_path):
    values = margins | {"train_data": write(tmp_path / name, with_margins(FILES[name]))}
    run(values, tmp_path / "run")
    assert_gradients(tmp_path / "run", margin_gradients(values))


def test_whole_numbers_of_a_file_are_numbers(margins, tmp_path):
    whole = [3, 1, 2, 5, 8, 13, 21, 0]
    folders = [tmp_path / "whole", tmp_path / "float"]
    for folder, numbers in zip(folders, (whole, [float(number) for number in whole])):
        source = write(tmp_path / f"{folder.name}.parquet", with_margins(numbers))
        run(margins | {"train_data": source}, folder)
    assert relative_difference(*map(gradients, folders)) == 0


@pytest.mark.parametrize("ranks, budget", [(1, 150), (1, 300), (1, 5000), (2, 300)])
def test_no_split_of_a_batch_moves_a_number_to_another_pair(ranks, budget, margins, tmp_path):
    values = margins | {"micro_batch_tokens": budget}
    train = run if ranks == 1 else run_ranks
    train(values, tmp_path / "run")
    assert_gradients(tmp_path / "run", margin_gradients(values))


def test_held_out_pairs_have_numbers_of_their_own(margins, tmp_path):
    numbers = [2.0, -1.0, 0.25, 9.0]
    held = write(tmp_path / "held.jsonl", with_margins(numbers))
    before, *_ = run(margins | {"eval_data": held}, tmp_path / "run")
    model, losses = read_model(margins["model"]), []
    with torch.no_grad():
        for row, margin in zip(tokens(held), numbers):
            chosen, rejected = means_of(model, row).exp()
            losses.append(margin * (rejected - chosen).item())
    assert before["eval/loss"] == pytest.approx(sum(losses) / 4, abs=1e-7)


def test_several_columns_and_the_reference_go_by_name(margins, tmp_path):
    """Two numbers of each row that are not in the order of the loss's parameters."""
    rows = [
        {"margin": margin / 10, "other": 5} | row | {"weight": weight}
        for row, margin, weight in zip(make_pairs(8), MARGINS, range(1, 9))
    ]
    values = margins | {"train_data": write(tmp_path / "both.jsonl", rows), "loss": "weighted"}
    run(values, tmp_path / "run")
    model, losses = read_model(margins["model"]), []
    for ids, row in zip(tokens(values["train_data"]), rows):
        means = means_of(model, ids)
        chosen, rejected = means - means.detach()
        losses.append(row["weight"] * (rejected - chosen + row["margin"]).exp())
    assert_gradients(tmp_path / "run", plain_gradients(model, losses))


def test_a_parameter_with_a_default_is_set_by_loss_args(margins, tmp_path):
    run(margins | {"loss_args": "scale=2.5"}, tmp_path / "run")
    assert_gradients(tmp_path / "run", margin_gradients(margins, scale=2.5))
    with pytest.raises(InputError, match="'margin=1' does not fit the loss margin, which has scal"):
        run(margins | {"loss_args": "margin=1"}, tmp_path / "other")


# The third number of a file, and the type of the file.
WRONG = {
    "text": ("much", ".jsonl", "'much'"),
    "text in CSV": ("much", ".csv", "'much'"),
    "no number in CSV": ("", ".csv", "''"),
    "a null": (None, ".jsonl", "None"),
    "a null in parquet": (None, ".parquet", "None"),
    "NaN": (math.nan, ".parquet", "nan"),
    "NaN as text": ("nan", ".jsonl", "'nan'"),
    "infinity": (math.inf, ".parquet", "inf"),
    "a list": ([0.5], ".jsonl", "[0.5]"),
}


@pytest.mark.parametrize("wrong, suffix, said", WRONG.values(), ids=WRONG)
def test_what_is_no_number_is_an_error_that_names_file_row_and_column(
    wrong, suffix, said, margins, tmp_path, monkeypatch
):
    monkeypatch.setattr("train.load_model", lambda *_, **__: pytest.fail("loads a model"))
    good = [1.0, 2.0] if isinstance(wrong, float | None) else ["1.0", "2.0"]
    good = [[1.0], [2.0]] if isinstance(wrong, list) else good
    if isinstance(wrong, list):  # as a column has one type, the first row has it, too
        rows, place = with_margins([wrong, *good]), 0
    else:
        rows, place = with_margins([*good, wrong, good[0]]), 2
    source = write(tmp_path / f"wrong{suffix}", rows)
    for name in ("train_data", "eval_data"):
        with pytest.raises(InputError) as error:
            run(margins | {name: source}, tmp_path / "run")
        assert f"{source}, row {place}: " in str(error.value)
        assert "'margin'" in str(error.value) and said in str(error.value)


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet", ".csv"])
def test_a_truth_value_is_no_number(suffix, margins, tmp_path):
    """A column of labels is not a column of margins."""
    source = write(tmp_path / f"wrong{suffix}", with_margins([True, False] * 4))
    with pytest.raises(InputError) as error:
        run(margins | {"train_data": source}, tmp_path / "run")
    assert f"{source}, row 0: " in str(error.value)
    assert "'margin'" in str(error.value) and "True" in str(error.value)


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet", ".csv"])
def test_a_missing_column_is_an_error_that_names_it(suffix, margins, tmp_path):
    source = write(tmp_path / f"missing{suffix}", make_pairs(8))
    for name in ("train_data", "eval_data"):
        with pytest.raises(InputError, match="'margin', which is not there") as error:
            run(margins | {name: source}, tmp_path / "run")
        assert f"{source}, row 0: " in str(error.value)


def test_a_row_that_is_dropped_takes_its_number_with_it(margins, tmp_path):
    rows = with_margins([5.0, *MARGINS])
    rows[0]["rejected"] = rows[0]["chosen"]
    good = [row | {"margin": margin} for row, margin in zip(rows[1:], MARGINS)]
    values = margins | {"train_data": write(tmp_path / "dropped.jsonl", [rows[0], *good])}
    run(values, tmp_path / "run")
    assert_gradients(tmp_path / "run", margin_gradients(values))


def test_changed_numbers_in_the_same_file_refuse_a_resume(margins, tmp_path):
    lines = run(margins, tmp_path / "run")
    (tmp_path / "run" / "final" / "config.json").parent.rename(tmp_path / "final")
    assert timeless(run(margins, tmp_path / "run")) == timeless(lines)  # the same file goes on
    (tmp_path / "run" / "final").rename(tmp_path / "again")
    write(Path(margins["train_data"]), with_margins([*MARGINS[:-1], 41.0]))
    with pytest.raises(InputError, match=r"step_1 is of another run: other training tokens\. "):
        run(margins, tmp_path / "run")


def test_another_loss_does_not_ask_for_the_column(margins, tmp_path):
    """Numbers that no loss asks for are not read, so that they may be missing or anything."""
    run(margins | {"loss": "simper"}, tmp_path / "with")
    source = write(tmp_path / "without.jsonl", make_pairs(8))
    run(margins | {"loss": "simper", "train_data": source}, tmp_path / "without")
    folders = (tmp_path / "with", tmp_path / "without")
    assert relative_difference(*map(gradients, folders)) == 0
