"""The evaluations: scores compared with plain forwards and with arithmetic by hand, the official
formats, and the tables."""

import csv
import fcntl
import hashlib
import importlib.util
import itertools
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
import yaml
from conftest import CHATML, make_model, make_tokenizer, run, run_python, write_pairs
from scipy import stats

from data import load_data
from eval import alpaca_eval2 as alpaca_eval2_module
from eval import judge as judge_module
from eval import leaderboard, preference, report, results, show_pairs, win_rate
from eval import mt_bench as mt_bench_module
from eval.judge import Judge, open_judge
from runtime.errors import InputError
from runtime.intervals import t_quantile
from runtime.log import lock_folder
from runtime.weights import tokenizer_digests

ROOT = Path(__file__).parent.parent


def command(module: str, *args, **options) -> subprocess.CompletedProcess:
    return run_python("-m", f"eval.{module}", *args, **options)


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def other_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "other" / "final"
    make_model("llama", seed=1).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


# ---- Preference ----------------------------------------------------------------------------------


def test_preference_equals_plain_forwards(model_folder, other_folder, tmp_path):
    data = Path(write_pairs(tmp_path / "pairs.jsonl", 9))
    rows = [
        row | ({"subset": "odd"} if i % 2 else {"category": "even"})
        for i, row in enumerate(read_lines(data))
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--data", data, "--output_dir", tmp_path / "results", "--micro_batch_tokens", 250]
    flags += ["--max_length", 96, "--max_prompt_length", 60, "--reference", other_folder]
    done = command("preference", model_folder, other_folder, *flags)
    assert done.returncode == 0, done.stderr[-3000:]
    pairs = load_data(str(data), make_tokenizer(), 96, 60)
    lengths = pairs.lengths
    of_models = {}
    for name, seed in (("other", 1), ("tiny", 0)):
        model, sums = make_model("llama", seed=seed).double(), []
        for pair in pairs.rows:
            for response in pair["responses"]:
                ids = torch.tensor([pair["prompt"] + response])
                with torch.no_grad():
                    logps = model(ids).logits[0, :-1].log_softmax(dim=-1)
                logps = logps.gather(1, ids[0, 1:, None])[:, 0]
                sums.append(logps[len(pair["prompt"]) - 1 :].sum().item())
        of_models[name] = sums = np.array(sums).reshape(-1, 2)
        rewards = sums - of_models["other"]
        means = sums / lengths[:, 1:]
        result = json.loads((tmp_path / "results" / name / "preference.json").read_text())
        correct = means[:, 0] > means[:, 1]
        expected = {
            "accuracy": correct.mean(),
            "accuracy_sum": (sums[:, 0] > sums[:, 1]).mean(),
            "accuracy_implicit": (rewards[:, 0] > rewards[:, 1]).mean(),
            "implicit_reward/margin": (rewards[:, 0] - rewards[:, 1]).mean(),
            "accuracy/even": correct[::2].mean(),
            "accuracy/odd": correct[1::2].mean(),
            "accuracy_implicit/even": (rewards[:, 0] > rewards[:, 1])[::2].mean(),
            "accuracy_implicit/odd": (rewards[:, 0] > rewards[:, 1])[1::2].mean(),
            "inverse_perplexity/chosen": np.exp(means[:, 0]).mean(),
            "inverse_perplexity/rejected": np.exp(means[:, 1]).mean(),
            "inverse_perplexity/margin": (np.exp(means[:, 0]) - np.exp(means[:, 1])).mean(),
            "logps/chosen": means[:, 0].mean(),
            "logps/rejected": means[:, 1].mean(),
            "logps/margin": (means[:, 0] - means[:, 1]).mean(),
            "length/chosen": lengths[:, 1].mean(),
            "length/rejected": lengths[:, 2].mean(),
            "pairs": 9,
        }
        if name == "other":  # against itself, a model has no implicit reward
            expected = {name: value for name, value in expected.items() if "implicit" not in name}
        assert result["scores"] == pytest.approx(expected, rel=1e-5)
        error = correct[::2].std(ddof=1) / math.sqrt(5)
        assert result["standard_errors"]["accuracy/even"] == pytest.approx(error)
        assert result["inputs_sha256"] == {str(data): results.file_sha256(data)}
        assert result["settings"]["tokens_sha256"] == pairs.fingerprint
        assert result["settings"]["dtype"] == "float32" and result["settings"]["columns"] == ""
        assert "torch" in result["versions"]
        lines = read_lines(tmp_path / "results" / name / "preference_pairs.jsonl")
        assert np.allclose([line["logps"] for line in lines], sums, rtol=1e-5)
        assert [line["row"] for line in lines] == [*range(9)]
    assert (tmp_path / "results" / "preference.png").stat().st_size > 10_000
    assert "tiny" in done.stdout and "other" in done.stdout and "accuracy/even" in done.stdout
    (implicit,) = re.findall(r"^accuracy_implicit .*$", done.stdout, re.MULTILINE)
    assert re.search(r" 0\.\d{4} ± 0\.\d{4} +–$", implicit)


def test_preference_scores_by_hand():
    # two pairs: probabilities per token 1/2 and 1/4; 1/8 and 1/4
    sums = np.log([[1 / 4, 1 / 64], [1 / 8, 1 / 16]])
    scores, errors = preference.score(sums, np.array([[2, 3], [1, 2]]))
    assert scores["accuracy"] == 0.5 and scores["accuracy_sum"] == 1.0 and scores["pairs"] == 2
    assert scores["inverse_perplexity/chosen"] == pytest.approx(5 / 16)
    assert scores["inverse_perplexity/margin"] == pytest.approx((1 / 4 - 1 / 8) / 2)
    assert "accuracy_implicit" not in scores
    # Under a reference, ln 2 less and more likely, then three times as likely and as before.
    reference = sums + np.log([[2, 1 / 2], [1 / 3, 1]])
    implicit, _ = preference.score(sums, np.array([[2, 3], [1, 2]]), reference)
    assert implicit["accuracy_implicit"] == 0.5
    assert implicit["implicit_reward/margin"] == pytest.approx((np.log(3) - 2 * np.log(2)) / 2)
    # The values 1 and 0 have the sample deviation √½; over √2.
    assert errors["accuracy"] == pytest.approx(math.sqrt(0.5) / math.sqrt(2))


def test_preference_refuses_rows_that_are_no_pairs(model_folder, tmp_path, monkeypatch):
    path = tmp_path / "rows.jsonl"
    monkeypatch.setattr(sys, "argv", ["preference", str(model_folder), "--data", str(path)])
    for count in (1, 3):
        path.write_text(json.dumps({"prompt": "one", "responses": ["a", "b", "c"][:count]}) + "\n")
        message = f"rows.jsonl: {count} responses to a prompt; pairs have two"
        with pytest.raises(InputError, match=message):
            preference.main()


def test_show_pairs_numbers_the_responses_unless_they_are_two(
    model_folder, tmp_path, monkeypatch, capsys
):
    path = tmp_path / "rows.jsonl"
    monkeypatch.setattr(sys, "argv", ["show", str(path), "--model", str(model_folder)])
    for answers, names in (
        (["ab", "cd", "a"], ["prompt", "response 1", "response 2", "response 3", "together"]),
        (["ab", "cd"], ["prompt", "chosen", "rejected", "pair"]),
        (["ab"], ["prompt", "response 1", "together"]),
    ):
        path.write_text(json.dumps({"prompt": "one", "responses": answers}) + "\n")
        show_pairs.main()
        shown = capsys.readouterr().out
        assert re.findall(r"^  (.+) \(\d+ tokens", shown, re.MULTILINE) == names[:-1]
        counted = re.findall(r"^(\w+(?: \d)?)  +\d+ +\d+ +\d+ +\d+$", shown, re.MULTILINE)
        assert counted == names
        assert f"  {names[1]} (3 tokens, scored): a|b|<|im_end|>\n" in shown


def test_preference_compares_what_is_comparable(model_folder, tmp_path, monkeypatch, capsys):
    """Models that read other tokens by their accuracies alone; the content of a folder and the
    names of columns are part of a result; repeated prompts are counted."""
    other = tmp_path / "other"
    make_model("llama", seed=1).save_pretrained(other)
    make_tokenizer(CHATML.replace("assistant", "two")).save_pretrained(other)
    path = write_pairs(tmp_path / "pairs.jsonl", 11)
    rows = [json.loads(line) for line in Path(path).read_text().splitlines()]

    def evaluate(*flags) -> str:
        datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "rows")
        flags = ["--data", tmp_path / "rows", "--output_dir", tmp_path / "results", *flags]
        models = model_folder, other
        monkeypatch.setattr(sys, "argv", ["preference", *map(str, [*models, *flags])])
        preference.main()
        return capsys.readouterr().out

    said = evaluate()
    assert "other reads other tokens than tiny: only accuracies are compared" in said
    compared = re.findall(r"^(\S+) .*(?:\]|in each)", said, re.MULTILINE)
    assert {*compared} == {"accuracy"} and "prompts repeat" not in said
    first = report.read_methods([str(tmp_path / "results" / "tiny")], [])["tiny"][0]["preference"]
    rows[0], rows[1] = rows[0] | {"prompt": rows[2]["prompt"]}, rows[1] | {"chosen": "another"}
    assert "1 of 11 prompts repeat another one: errors are too small" in evaluate()
    second = report.read_methods([str(tmp_path / "results" / "tiny")], [])["tiny"][0]["preference"]
    evaluate("--columns", "chosen=rejected,rejected=chosen")
    third = report.read_methods([str(tmp_path / "results" / "tiny")], [])["tiny"][0]["preference"]
    items = [result["items"]["accuracy"]["of"] for result in (first, second, third)]
    assert len({*items}) == 3
    conditions = [report.conditions(result, "accuracy") for result in (first, second, third)]
    assert conditions[0]["files"] != conditions[1]["files"] == conditions[2]["files"]
    assert conditions[1]["columns"] == "" and "chosen=" in conditions[2]["columns"]


def test_preference_refuses_two_models_of_one_name(model_folder, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["preference", str(model_folder), str(model_folder)])
    with pytest.raises(InputError, match="two models have the same name"):
        preference.main()


# ---- Report --------------------------------------------------------------------------------------


def write(folder: Path, model_folder: Path, benchmark: str, scores: dict, **more) -> None:
    results.write_result(folder, benchmark, str(model_folder), scores, **more)


def score(value: float, error: float | None, items=None, of: str = "") -> report.Score:
    return report.Score(value, error, (value,), items, of)


def test_only_what_is_resolved_is_bold():
    """By hand: of one comparison, 10 is 2.0 of the errors of the difference of 0 and 10, √(3² + 4²)
    = 5, and significant (1.96); of two comparisons it is not (2.24); nor without an error. Item by
    item, the same two differ by 10 everywhere but in one of ten: resolved, whatever their own
    errors."""
    column = [score(0.0, 3.0), None, score(10.0, 4.0)]
    assert report.resolved(column, 1) == 2 and report.resolved(column, 2) is None
    assert report.resolved([*column, score(9.0, 1.0)], 1) is None
    assert report.resolved([score(0.0, 3.0), score(10.0, None)], 1) is None
    assert report.resolved([score(10.0, 1.0), None], 1) is None
    values = np.arange(10.0) * 100
    column = [score(0.0, 99.0, values, "a"), score(9.0, 99.0, values + [*[10.0] * 9, 0.0], "a")]
    assert report.resolved(column, 1) == 1
    assert report.resolved([column[0], score(9.0, 99.0, column[1].items, "b")], 1) is None
    # Of independent scores of three items, no difference is told.
    three = [
        score(x, 0.05, np.array([x - 0.1, x, x + 0.1]), of) for x, of in ((0.2, "a"), (0.7, "b"))
    ]
    assert report.resolved(three, 1) is None
    # Nine items tell no interval.
    few = [score(s.value, s.error, s.items[:9], "a") for s in column]
    assert report.resolved(few, 1) is None


def test_intervals_are_students():
    """Against scipy: the quantile, the interval of paired items, that of independent scores
    (Welch), and that of five runs of two methods, whose items are the same in each."""
    for freedom, close in ((4, 0.015), (9, 1e-3), (42, 1e-5), (1e6, 1e-6), (math.inf, 1e-9)):
        for comparisons in (1, 3, 50):
            exact = stats.t.ppf(1 - 0.025 / comparisons, freedom)
            assert t_quantile(freedom, comparisons) == pytest.approx(exact, rel=close)
    generator = np.random.default_rng(0)
    first, other = generator.normal(0, 1, 10), generator.normal(0.7, 2, 10)

    def shown(difference):
        return [float(n) for n in re.findall(r"[-+][\d.]+", difference.text(1))]

    exact = stats.ttest_rel(other, first).confidence_interval()
    expected = pytest.approx([(other - first).mean(), *exact], abs=1e-4)
    assert shown(results.paired_difference(other, first)) == expected
    one, two = (
        report.score_of([result_of(values, of)], "a") for values, of in ((first, "a"), (other, "b"))
    )
    exact = stats.ttest_ind(other, first, equal_var=False).confidence_interval()
    expected = pytest.approx([other.mean() - first.mean(), *exact], abs=1e-3)
    assert shown(two.minus(one)) == expected
    # Nothing but the runs differs: the interval is that of two samples of five means each.
    runs = generator.normal(0, 1, (2, 5))
    methods = [
        report.score_of([result_of(first + shift, "a") for shift in shifts], "a") for shifts in runs
    ]
    exact = stats.ttest_ind(runs[1], runs[0], equal_var=False).confidence_interval()
    expected = pytest.approx([runs[1].mean() - runs[0].mean(), *exact], abs=3e-3)
    assert shown(methods[1].minus(methods[0])) == expected


def result_of(values, of):
    """A result with one score, "a", a mean over items."""
    error = float(np.std(values, ddof=1)) / math.sqrt(len(values))
    items = {"a": {"of": of, "values": [float(value) for value in values]}}
    means = {"scores": {"a": float(np.mean(values))}, "standard_errors": {"a": error}}
    return means | {"items": items}


def test_differences_are_paired(capsys):
    """Against values worked out by hand: the items differ by 0.1, 0.3, 0.2 and 0.2, three times
    over, while they themselves vary by much more; their mean is 0.2, its standard error
    √(0.06 / 11 / 12). An item that one of them lacks does not count."""
    first = {"a": np.array([0.0, 1.0, 5.0, 9.0] * 3), "b": np.array([1.0, 2.0] * 6)}
    other = {"a": first["a"] + [0.1, 0.3, 0.2, 0.2] * 3, "b": first["b"][::-1], "c": np.zeros(12)}
    lacking = [*other["a"], 7.0], [*first["a"], math.nan]
    for pair in ((other["a"], first["a"]), lacking):
        found = results.paired_difference(*pair)
        assert (found.mean, found.error) == pytest.approx((0.2, (0.06 / 11 / 12) ** 0.5))
        assert found.freedom == 11
    few = results.paired_difference(other["a"][:4], first["a"][:4])
    assert few.mean == pytest.approx(0.2) and few.error is None
    columns = [("m", {"a": 3.75, "b": 1.5}, {}), ("n", {"a": 3.95, "b": 1.5}, {})]
    results.print_scores(columns, [first, other])
    header, a, b, note = capsys.readouterr().out.splitlines()
    # ± 2.201 · 0.02132: Student's t with 11 degrees of freedom, from a table.
    assert header.endswith("− first [95 %]") and "+0.2000 [+0.1531, +0.2469]*" in a
    assert not b.endswith("*") and "2 differences" in note
    results.print_scores(columns)
    assert "first" not in capsys.readouterr().out


def test_several_runs_are_one_method(model_folder, tmp_path, monkeypatch, capsys):
    """Five seeds against a model of one run, by hand. The seeds' means are 0.5 to 0.7, of the
    variance 0.00625; their means of each item are 0.2 above the other model's in every item but
    two. What the runs of one method do not share is refused. Four are too few for an interval."""
    base = np.array([0.0, 1.0, 0.2, 0.8, 0.4, 0.4, 0.6, 0.2, 0.2, 0.2])
    gain = np.array([0.2] * 8 + [0.0, 0.4])
    values = {"other": base} | {f"s-{n}": base + gain + 0.05 * (n - 2) for n in range(5)}
    for name, column in values.items():
        items = results.by_item({"accuracy": column}, ["the", "same", "items"])
        scores, errors = {"accuracy": column.mean()}, {"accuracy": column.std(ddof=1) / 10**0.5}
        more = {"errors": errors, "items": items, "settings": {"data": "d"}}
        write(tmp_path / name, model_folder, "preference", scores, **more)
    label = f"--label=S={tmp_path}/s-*"
    flags = [str(tmp_path / "other"), label, "--output", str(tmp_path / "report")]
    monkeypatch.setattr(sys, "argv", ["report", *flags])
    report.main()
    of_items = gain.std(ddof=1) / 10**0.5
    error = math.hypot(of_items, (0.00625 / 5) ** 0.5)
    own = math.hypot((base + gain).std(ddof=1) / 10**0.5, (0.00625 / 5) ** 0.5)
    header, _, other, method, *_ = capsys.readouterr().out.splitlines()[2:]
    assert header == "| model | accuracy, n = 10 | − other [95 %] |"
    assert other == f"| other | 0.4000 ± {base.std(ddof=1) / 10**0.5:.4f} |  |"
    shown = f"0.6000** ± {own:.4f} (0.5000 to 0.7000, 5 runs)"
    # Welch–Satterthwaite: nine degrees of freedom of the items, four of the runs.
    freedom = error**4 / (of_items**4 / 9 + (0.00625 / 5) ** 2 / 4)
    low, high = (0.2 + side * stats.t.ppf(0.975, freedom) * error for side in (-1, 1))
    assert method == f"| S | **{shown} | +0.2000 [{low:+.4f}, {high:+.4f}]\\* |"
    line = [*csv.reader(open(tmp_path / "report.csv"))][3]
    assert [float(x) for x in line[1:]] == pytest.approx([0.6, own, 0.2, error], abs=1e-6)

    (tmp_path / "s-4").rename(tmp_path / "t-4")
    report.main()
    said = capsys.readouterr().out
    assert "4 runs" in said and "+0.1750 |" in said
    assert "**0." not in said and "significant" not in said
    copy = shutil.copytree(tmp_path / "s-2", tmp_path / "s-9")
    with pytest.raises(
        InputError, match="--label S: 1 of its runs repeat another, with its scores"
    ):
        report.main()
    shutil.rmtree(copy)
    write(tmp_path / "s-2", model_folder, "preference", {"accuracy": 0.4}, settings={"data": "e"})
    with pytest.raises(InputError, match="S: its runs differ in how accuracy came about: run 1"):
        report.main()
    write(tmp_path / "s-2", model_folder, "preference", {"logps/margin": 0.5})
    with pytest.raises(InputError, match="S: 1 of 4 runs have no accuracy of preference"):
        report.main()
    for wrong, reason in {
        "S": "must be NAME=PATTERN",
        "S=nowhere/*": "nothing matches nowhere",
        f"S={tmp_path}/other": "is there twice",
        f"other={tmp_path}/s-0": "other is there twice",
    }.items():
        with pytest.raises(InputError, match=reason):
            report.read_methods([str(tmp_path / "other")], [wrong])
    with pytest.raises(InputError, match="--label B: .*s-0 is there twice"):
        report.read_methods([], [f"A={tmp_path}/s-*", f"B={tmp_path}/s-0"])
    (tmp_path / "s-0" / "preference.items.json").write_text("{}")
    with pytest.raises(InputError, match="of another evaluation: evaluate again"):
        report.read_results([str(tmp_path / "s-0")])


def test_report(model_folder, other_folder, tmp_path):
    write(tmp_path / "a", model_folder, "leaderboard", {"GSM8K": 60.0, "BBH": 0.5})
    write(tmp_path / "b", other_folder, "leaderboard", {"GSM8K": 50.0})
    write(tmp_path / "a", model_folder, "mt_bench", {"score": 7.125, "turn 1": 8.0})
    (tmp_path / "preference.png").touch()
    done = command("report", *sorted(tmp_path.iterdir()), "--output", tmp_path / "report")
    assert done.returncode == 0, done.stderr
    assert done.stdout == (tmp_path / "report.md").read_text()
    assert "| model | BBH | GSM8K |\n" in done.stdout
    assert "| a | 0.50 | 60.00 |\n" in done.stdout  # nobody knows the error
    assert "| b | – | 50.00 |\n" in done.stdout
    assert "| model | MT-Bench |\n" in done.stdout and "7.12" in done.stdout
    rows = list(csv.reader(open(tmp_path / "report.csv")))
    parts = ("", " standard error", " − first", " − first, standard error")
    header = ["model", *(name + part for name in ("BBH", "GSM8K") for part in parts)]
    assert rows[:2] == [["Open LLM Leaderboard"], header]
    a, b = ["a", "0.5", *[""] * 3, "60.0", *[""] * 3], ["b", *[""] * 4, "50.0", *[""] * 3]
    assert rows[2:4] == [a, b]


DAMAGED = {
    "cut off": '{"benchmark": "preference", "scores": {"accu',
    "empty": "",
    "zeros": "\0\0\0",
    "a NaN": '{"accuracy": NaN}',
    "a text for a score": '{"accuracy": "high"}',
    "no standard errors": None,
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_result_is_named(model_folder, tmp_path, damage):
    write(tmp_path / "a", model_folder, "preference", {"accuracy": 0.5})
    path, text = tmp_path / "a" / "preference.json", DAMAGED[damage]
    result = json.loads(path.read_text())
    if text is None:
        del result["standard_errors"]
    elif text.startswith('{"accuracy"'):
        result["scores"] = json.loads(text)
    whole = text is None or text.startswith('{"accuracy"')
    path.write_text(json.dumps(result) if whole else text)
    with pytest.raises(InputError, match=f"{path}.*: evaluate again"):
        report.read_results([str(tmp_path / "a")])


def test_an_error_that_is_no_number_is_named(model_folder, tmp_path):
    more = {"errors": {"accuracy": math.nan}}
    write(tmp_path / "a", model_folder, "preference", {"accuracy": 0.5}, **more)
    with pytest.raises(InputError, match="accuracy is nan, no number to rank"):
        report.read_results([str(tmp_path / "a")])


def test_other_variables_of_the_template_are_not_compared(model_folder, tmp_path):
    for name, rate in (("a", 50.0), ("b", 60.0)):
        settings = {"template_args": f"enable_thinking={name == 'b'}"}
        more = {"settings": settings, "errors": {"win_rate": 1.0}}
        write(tmp_path / name, model_folder, "win_rate", {"win_rate": rate}, **more)
    methods = report.read_methods([str(tmp_path / name) for name in ("a", "b")], [])
    text = report.markdown(*report.tables(methods)[0])
    assert "not comparable. a: template_args enable_thinking=False; b:" in text
    assert "**60.00**" not in text


def test_a_score_of_zero_per_cent_has_two_digits(model_folder, tmp_path):
    write(tmp_path / "a", model_folder, "leaderboard", {"GSM8K": 0.0})
    (table,) = report.tables(report.read_methods([str(tmp_path / "a")], []))
    assert "| a | 0.00 |" in report.markdown(*table)


def test_help_shows_the_defaults(capsys):
    parser = results.make_parser("A text.", "model", *results.GENERATION, "--output_dir")
    parser.print_help()
    said = " ".join(capsys.readouterr().out.split())
    assert "(default: 8)" in said and "(default: results)" in said and "(default: 0)" in said
    assert "(default: )" not in said and "(default: None)" not in said


def test_report_footnotes_what_it_cannot_compare(model_folder, tmp_path):
    """Two judges, and two chat templates in one of two benchmarks: these columns are not ranked."""
    judges, shots = {"a": "new", "b": "old", "c": "new"}, {"shots": 5, "lm_eval": "0.4"}
    for number, (name, judge) in enumerate(judges.items()):
        settings = {"judge": judge, "judge_version": "1", "reference": "gpt-4", "repeats": 1}
        more = {"settings": settings, "errors": {"score": 0.25}}
        write(tmp_path / name, model_folder, "mt_bench", {"score": 7.0 + number}, **more)
        settings = {"GSM8K": shots | {"apply_chat_template": name == "b"}}
        settings |= {"ARC-Challenge": shots | {"apply_chat_template": False}}
        scores = {"GSM8K": 60.0 + number, "ARC-Challenge": 0.5 + number}
        more = {"settings": settings, "errors": {"ARC-Challenge": 0.125}}
        write(tmp_path / name, model_folder, "leaderboard", scores, **more)
    methods = report.read_methods(sorted(str(path) for path in tmp_path.iterdir()), [])
    board, chat = (report.markdown(*table) for table in report.tables(methods))
    assert board.splitlines()[2:] == [
        "| model | GSM8K (1) | ARC-Challenge |",
        "|---|---|---|",
        "| a | 60.00 | 0.50 ± 0.12 |",
        "| b | 61.00 | 1.50 ± 0.12 |",
        "| c | 62.00 | **2.50** ± 0.12 |",
        "",
        "(1) GSM8K: not comparable. a, c: apply_chat_template False; b: apply_chat_template True",
    ]
    assert "| b | 8.00 ± 0.25 |" in chat and "a, c: judge new; b: judge old" in chat


def test_report_knows_the_files_that_scores_depend_on(model_folder, tmp_path):
    """AlpacaEval against two references, MT-Bench with two files of questions, win rates on two
    states of a file, and accuracies on the pairs that two tokenizers have left are not compared;
    the answers differ anyway. Normalized scores have the settings of their benchmark."""
    shots = {"GPQA": {"shots": 0, "lm_eval": "0.4", "apply_chat_template": False}}
    for name in ("a", "b"):
        settings = {"reference_sha256": f"reference of {name}", "temperature": 0.5}
        scores = {"length_controlled_winrate": 50.0}
        write(tmp_path / name, model_folder, "alpaca_eval2", scores, settings=settings)
        inputs = {"question.jsonl": f"{name}1", "gpt-4.jsonl": "2", "answers": f"{name}3"}
        more = {"inputs": inputs, "settings": {"template_args": f"system={name}"}}
        write(tmp_path / name, model_folder, "mt_bench", {"score": 7.0}, **more)
        scores = {"GPQA": 30.0, "normalized/GPQA": 6.7, "GSM8K": 5.0}
        more = {"settings": shots, "items": results.by_item({"GSM8K": [0.0, 10.0]}, name)}
        write(tmp_path / name, model_folder, "leaderboard", scores, **more)
        settings = {"data": "my.jsonl", "data_sha256": f"data of {name}"}
        write(tmp_path / name, model_folder, "win_rate", {"win_rate": 50.0}, settings=settings)
        scores = {"accuracy": 0.6, "pairs": 43 if name == "a" else 20}
        scores["inverse_perplexity/margin"] = 0.1
        settings = {"columns": f"chosen={name}", "dtype": "float32", "tokens_sha256": f"T{name}"}
        write(tmp_path / name, model_folder, "preference", scores, settings=settings)
    methods = report.read_methods([str(tmp_path / name) for name in ("a", "b")], [])
    raw, normalized, chat, pairs = report.tables(methods)
    differ = "columns chosen=a, pairs 43", "columns chosen=b, pairs 20"
    assert pairs[3][0] == "a: {}; b: {}".format(*differ)
    assert pairs[3][1] == "a: {}, tokens Ta; b: {}, tokens Tb".format(*differ)
    assert raw[1] == ["model", "GPQA", "GSM8K"] and raw[3][0] == ""
    assert re.fullmatch(r"a: questions \w{12}; b: questions \w{12}", raw[3][1])
    assert normalized[:2] == (
        "Open LLM Leaderboard 2, normalized",
        ["model", "GPQA"],
    )
    assert normalized[3] == [""]
    references, files, data = chat[3]
    assert data == "a: data_sha256 data of a; b: data_sha256 data of b"
    assert references == "a: reference_sha256 reference of a; b: reference_sha256 reference of b"
    assert files == (
        "a: template_args system=a, files ['2', 'a1']; b: template_args system=b, files ['2', 'b1']"
    )


def test_report_by_start_model(model_folder, tmp_path, monkeypatch, capsys):
    """Results of two set-ups in one folder: each model beside the one that it was trained from."""
    for name, start in (("one", "org/base"), ("two", "org/base"), ("three", "org/other")):
        final = tmp_path / name / "final"
        shutil.copytree(model_folder, final)
        (tmp_path / name / "config.yaml").write_text(f"model: {start}\n")
        write(tmp_path / "results" / name, final, "mt_bench", {"score": 7.0})
    (tmp_path / "results" / "hub").mkdir()
    result = json.loads((tmp_path / "results" / "one" / "mt_bench.json").read_text())
    base = json.dumps(result | {"model": "org/base", "start_model": "org/base"})
    (tmp_path / "results" / "hub" / "mt_bench.json").write_text(base)
    folders = sorted(map(str, (tmp_path / "results").iterdir()))
    printed = []
    for flags in (["--by_start_model"], []):
        monkeypatch.setattr(sys, "argv", ["report", *folders, *flags])
        report.main()
        printed.append(capsys.readouterr().out)
    titles = re.findall(r"\*\*(Instruction.*)\*\*|^\| (\w+) \| \W*7", printed[0], re.MULTILINE)
    assert [a or b for a, b in titles] == [
        "Instruction following, from org/base",
        *("hub", "one", "two"),
        "Instruction following, from org/other",
        "three",
    ]
    assert printed[1].count("Instruction following") == 1
    assert results.start_model("org/base") == "org/base"
    (tmp_path / "one" / "config.yaml").write_text("- a list\n")
    assert results.start_model(str(tmp_path / "one" / "final")) == str(tmp_path / "one" / "final")


def test_a_result_names_the_run_that_made_the_model(model_folder, base, tmp_path):
    """By a real run's config.yaml; a model that is no run's final/ has none, whatever is beside
    it."""
    run(base | {"eval_data": "", "max_steps": 1}, tmp_path / "run")
    shutil.copytree(tmp_path / "run" / "final", tmp_path / "run" / "copy")
    results = []
    for model in (tmp_path / "run" / "final", tmp_path / "run" / "copy", model_folder):
        write(tmp_path / "result", model, "mt_bench", {"score": 7.0})
        results.append(json.loads((tmp_path / "result" / "mt_bench.json").read_text()))
    head = (tmp_path / "run" / "config.yaml").read_text()
    assert results[0]["run"] == dict(re.findall(r"^# (code|commit): (.*)$", head, re.MULTILINE))
    assert results[0]["run"].keys() == {"code", "commit"}
    assert len(results[0]["run"]["code"]) == 64 and results[0]["start_model"] == str(model_folder)
    assert ["run" in result for result in results] == [True, False, False]


def test_report_refuses_what_it_cannot_compare(model_folder, other_folder, tmp_path):
    (tmp_path / "empty").mkdir()
    assert report.read_results([str(tmp_path / "empty")]) == {}
    write(tmp_path / "a", model_folder, "leaderboard", {"GSM8K": 1.0})
    write(tmp_path / "a", other_folder, "mt_bench", {"score": 1.0})
    with pytest.raises(InputError, match="different models"):
        report.read_results([str(tmp_path / "a")])
    write(tmp_path / "x" / "b", model_folder, "leaderboard", {"GSM8K": 1.0})
    write(tmp_path / "y" / "b", model_folder, "leaderboard", {"GSM8K": 2.0})
    with pytest.raises(InputError, match="another folder of that name"):
        report.read_results([str(tmp_path / "x" / "b"), str(tmp_path / "y" / "b")])


def test_results_go_to_wandb(model_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_SILENT", "true")
    results.write_result(
        tmp_path / "a",
        "mt_bench",
        str(model_folder),
        {"score": 5.0},
        errors={"score": 0.5},
        wandb_mode="offline",
    )
    assert list((tmp_path / "a" / "wandb").glob("offline-run-*"))


# ---- AlpacaEval 2 --------------------------------------------------------------------------------


@contextmanager
def judge_server(reply, asks_probes: bool = False):
    """An OpenAI-compatible server on the loopback address: reply(request) -> a chat completion's
    choice, (HTTP status, message, code) of an error, or None, which drops the connection. Yields
    (its URL, the requests that it has received but for the one that only shows that it is there,
    which `reply` is asked for if asks_probes)."""
    requests = []
    probe_reply = {"message": {"role": "assistant", "content": "m"}}
    probe_reply["logprobs"] = {"content": [{"token": "m", "logprob": 0.0, "top_logprobs": []}]}

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            probe = request["messages"][-1]["content"].startswith("Answer with one letter")
            if not probe:
                requests.append(request)
            answer = reply(request) if asks_probes or not probe else probe_reply
            if answer is None:  # the connection is dropped
                self.close_connection = True
                return
            status = 200
            body = {
                "id": "1",
                "object": "chat.completion",
                "created": 0,
                "model": request["model"],
                "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2},
            }
            if isinstance(answer, str) or "choices" in answer:
                body = answer
            elif isinstance(answer, tuple):
                status, message, error = answer
                body = {"error": {"message": message, "code": error, "type": error}}
            else:
                body["choices"] = [{"index": 0, "finish_reason": "stop"} | answer]
            content = body.encode() if isinstance(body, str) else json.dumps(body).encode()
            self.send_response(status)
            kind = "text/html" if isinstance(body, str) and body[0] == "<" else "application/json"
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1", requests
    server.shutdown()


def refuse(status: int, message: str, code: str, name: str = ""):
    """A judge that refuses requests with the option `name`, or all."""

    def reply(request: dict):
        if not name or name in request:
            return status, message, code
        return {"message": {"role": "assistant", "content": "m"}}

    return reply


@pytest.mark.parametrize(
    "reply, message",
    [
        (refuse(404, "The model has been deprecated", "model_not_found"), "404.*deprecated"),
        (refuse(401, "Incorrect API key provided", "invalid_api_key"), "401.*Incorrect API key"),
        (refuse(429, "You exceeded your current quota", "insufficient_quota"), "429.*your current"),
        (refuse(500, "The server had an error", "server_error"), "500.*server had an error"),
        (refuse(400, "logprobs are not supported", "unsupported", "logprobs"), "400.*logprobs are"),
        (refuse(0, "", "", "nothing"), "gives no log-probs, by which AlpacaEval 2 weighs"),
        (lambda request: "<html>Sign in</html>", "no chat completion: '<html>Sign in</html>'"),
        (lambda request: "not JSON", "Expecting value"),
        (lambda request: {"choices": None}, "no chat completion: 'ChatCompletion"),
    ],
)
def test_a_judge_that_cannot_judge_is_one_line(reply, message):
    with judge_server(reply, True) as (url, _), pytest.raises(InputError) as error:
        open_judge("mock", url, max_tokens=1, temperature=1, logprobs=True)
    text = str(error.value)
    assert re.search(f"the judge mock at {url}.*{message}", text) and "\n" not in text
    assert "eval/judge.py" in text


def test_a_judge_is_asked_as_its_endpoint_wants_it():
    """As OpenAI's newer models: they name the argument that they want in place of max_tokens, and
    take no temperature but their own."""
    use = "Unsupported parameter: 'max_tokens' is not supported with this model. Use "
    use += "'max_completion_tokens' instead."
    temperature = "Unsupported value: 'temperature' does not support 0 with this model."

    def reply(request: dict):
        if "max_tokens" in request:
            return 400, use, "unsupported_parameter"
        if "temperature" in request:
            return 400, temperature, "unsupported_value"
        return {"message": {"role": "assistant", "content": "m"}}

    with judge_server(reply, True) as (url, _):
        judge = open_judge("new", url, max_tokens=2048, temperature=0)
    assert judge.options == {"max_completion_tokens": 2048} and judge.version == "new"
    with judge_server(lambda request: {"message": {"role": "assistant"}}, True) as (url, _):
        with pytest.raises(InputError, match="new at .* with no text within 2048 tokens"):
            open_judge("new", url, max_tokens=2048, temperature=0)
    with judge_server(choose) as (url, _):
        judge = open_judge("old", url, max_tokens=1, temperature=1, logprobs=True)
    assert judge.options["max_tokens"] == 1 and judge.options["temperature"] == 1


INSTRUCTIONS = 205  # of the 805, whose digest the tests replace


def preference_of(i: int) -> float:
    """The probability, by the judge of these tests, that answer i is better than the
    reference's."""
    return (i * 37 % 100 + 0.5) / 100


def choose(request: dict) -> dict:
    """A judge of AlpacaEval: reads from the prompt the number of the instruction, and which of m
    and M is the reference."""
    text = request["messages"][-1]["content"]
    p = preference_of(int(re.search(r"instruction number (\d+)", text)[1]))
    m_first = text.index("reference answer") < text.index('"model_identifier": "M"')
    reference, ours = ("m", "M") if m_first else ("M", "m")
    chances = sorted([(p, ours), (1 - p, reference)], reverse=True)
    top = [{"token": token, "logprob": math.log(x), "bytes": None} for x, token in chances]
    logprobs = {"content": [top[0] | {"top_logprobs": top}], "refusal": None}
    return {"message": {"role": "assistant", "content": top[0]["token"]}, "logprobs": logprobs}


@pytest.fixture(scope="module")
def alpaca(tmp_path_factory) -> Path:
    """A folder with a reference of INSTRUCTIONS, and the hub's df_gamed.csv in a cache, both in
    the official schema."""
    folder = tmp_path_factory.mktemp("alpaca")
    rows = [
        {
            "dataset": "fake",
            "instruction": f"instruction number {i}",
            "output": "reference answer" + " x" * (i % 7),
            "generator": "r",
        }
        for i in range(INSTRUCTIONS)
    ]
    (folder / "reference.json").write_text(json.dumps(rows))
    cache = folder / "hub" / "datasets--tatsu-lab--alpaca_eval"
    (cache / "snapshots" / "0").mkdir(parents=True)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("0")
    header = "model index preference std_delta_len instruction_difficulty not_gamed_baseline"
    with open(cache / "snapshots" / "0" / "df_gamed.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header.split())
        for model, sign in (("concise", -1), ("verbose", 1)):
            for i in range(INSTRUCTIONS):
                preference, longer = 0.5 + 0.2 * sign, sign * (0.5 + i % 3)
                writer.writerow([model, i, preference, longer, (i % 11 - 5) / 5, False])
    return folder


def alpaca_eval2(
    alpaca: Path, model: Path, output: Path, *flags, **environment
) -> subprocess.CompletedProcess:
    """The command, with these tests' instructions for the official ones, and short answers."""
    code = f"""
import eval.alpaca_eval2 as a
from runtime.command_line import run_command
a.INSTRUCTIONS_SHA256 = "{instructions_sha256(alpaca)}"
a.DECODING["greedy"]["max_new_tokens"] = 5
run_command(a.main)
"""
    flags = ["--reference", alpaca / "reference.json", "--output_dir", output, *flags]
    environment = {"HF_HUB_CACHE": str(alpaca / "hub"), "OPENAI_API_KEY": ""} | environment
    return run_python("-c", code, model, "--batch_size", 256, *flags, **environment)


def instructions_sha256(alpaca: Path) -> str:
    rows = json.loads((alpaca / "reference.json").read_text())
    return hashlib.sha256(json.dumps([row["instruction"] for row in rows]).encode()).hexdigest()


def test_alpaca_eval_with_the_official_tool(alpaca, model_folder, tmp_path):
    """The judge drops a connection, and its quota is spent after 100 judgments. When there is a new
    one, the same command asks for the judgments that are missing. One prompt is always refused."""
    failing, output = True, os.path.relpath(tmp_path, ROOT)  # as the default is: relative
    asked_at_all = {"message": {"role": "assistant", "content": "m"}, "logprobs": {"content": [{}]}}

    def reply(request: dict):
        if not failing and "max_tokens" in request:  # as another version of its endpoint
            return 400, "Use 'max_completion_tokens' instead.", "unsupported_parameter"
        if "Answer with one letter" in request["messages"][-1]["content"]:
            return asked_at_all
        if failing and len(requests) == 40:
            return None
        if failing and len(requests) > 101:
            return 429, "You exceeded your current quota", "insufficient_quota"
        if "instruction number 200" in request["messages"][-1]["content"]:
            return 403, "It is against our policy.", "content_policy"
        return choose(request)

    with judge_server(reply, True) as (url, requests):
        flags = ("--judge_base_url", url, "--judge", "mock")
        spent = alpaca_eval2(alpaca, model_folder, output, *flags, OPENAI_API_KEY="sk-secret")
        (line,) = (line for line in spent.stderr.splitlines() if line.startswith("error: "))
        assert spent.returncode == 1 and "You exceeded your current quota" in line
        assert "Its judgments so far are kept in" in line and "Traceback" not in spent.stderr
        (kept,) = (tmp_path / "tiny" / "alpaca_eval2").glob("judgments-*.json")
        of_judge = hashlib.sha256(f"{url} mock".encode()).hexdigest()[:8]
        assert kept.name == f"judgments-{of_judge}.json"  # another judge's are in another file
        text = kept.read_text()
        assert len(json.loads(text)) == 96  # written after every 32
        kept.write_text(text[: len(text) // 2])  # killed while it wrote
        whole = kept.read_text().count("\n  },")
        assert 40 < whole < 96
        failing, asked = False, len(requests)
        done = alpaca_eval2(alpaca, model_folder, output, *flags, OPENAI_API_KEY="sk-secret")
        assert done.returncode == 0, done.stderr[-3000:]
        assert len(requests) - asked == INSTRUCTIONS - whole
    keys = ("model", "max_tokens", "max_completion_tokens", "top_logprobs", "logprobs")
    asked = {tuple(map(request.get, keys)) for request in requests}
    assert asked == {("mock", 1, None, 5, True), ("mock", None, 1, 5, True)}
    result = json.loads((tmp_path / "tiny" / "alpaca_eval2.json").read_text())
    scores = result["scores"]
    preferences = [preference_of(i) for i in range(INSTRUCTIONS) if i != 200]
    assert scores["win_rate"] == pytest.approx(100 * np.mean(preferences), abs=1e-3)
    items = results.read_items(tmp_path / "tiny", result)["win_rate"]["values"]
    assert items.pop(200) is None  # the judge refused it
    assert items == pytest.approx(100 * np.array(preferences), abs=1e-3)
    error = 100 * np.std(preferences, ddof=1) / math.sqrt(INSTRUCTIONS - 1)
    assert result["standard_errors"]["win_rate"] == pytest.approx(error, abs=1e-3)
    official = (tmp_path / "tiny" / "alpaca_eval2").rglob("leaderboard.csv")
    official = next(csv.DictReader(next(official).read_text().splitlines()))
    error = float(official["lc_standard_error"])
    assert result["standard_errors"]["length_controlled_winrate"] == pytest.approx(error, abs=0.01)
    assert result["settings"]["judge_version"] == "mock"
    outputs = json.loads((tmp_path / "tiny" / "alpaca_eval2" / "outputs.json").read_text())
    instructions = [row["instruction"] for row in outputs]
    assert instructions == [f"instruction number {i}" for i in range(INSTRUCTIONS)]
    assert {tuple(row) for row in outputs} == {("dataset", "instruction", "output", "generator")}
    assert scores["avg_length"] == int(np.mean([len(row["output"]) for row in outputs]))
    assert 0 < scores["length_controlled_winrate"] < 100 and scores["unjudged"] == 1
    assert f"1 of {INSTRUCTIONS} got no readable judgment" in done.stdout
    assert re.search(rf"^win rate +{scores['win_rate']:.2f} % ±", done.stdout, re.MULTILINE)
    assert result["settings"]["judge"] == "mock" and "alpaca_eval" in result["versions"]
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert all(b"sk-secret" not in path.read_bytes() for path in files)


def test_alpaca_eval_reports_what_is_missing_before_it_starts(alpaca, model_folder, tmp_path):
    with judge_server(choose) as (url, requests):
        judge, no_cache = ["--judge_base_url", url], {"HF_HUB_CACHE": str(tmp_path / "none")}
        for environment, flags, message in (
            ({}, ["--judge_base_url", "http://127.0.0.1:9/v1"], "the judge meta-llama/Llama-3.3"),
            (no_cache, judge, "df_gamed.csv of tatsu-lab/alpaca_eval"),
        ):
            done = alpaca_eval2(alpaca, model_folder, tmp_path, *flags, **environment)
            assert done.returncode and re.search(f"error: {message}", done.stderr)
            assert not (tmp_path / "tiny").exists()  # nor is any answer generated
    assert not requests


def test_two_processes_do_not_pay_alpaca_evals_judge(alpaca, model_folder, tmp_path):
    folder = tmp_path / "tiny" / "alpaca_eval2"
    folder.mkdir(parents=True)
    lock = lock_folder(folder)  # as the first does
    with judge_server(choose) as (url, requests):
        flags = ("--judge_base_url", url, "--judge", "mock")
        done = alpaca_eval2(alpaca, model_folder, tmp_path, *flags)
    os.close(lock)
    assert done.returncode == 1 and "another run is writing to it" in done.stderr
    assert not requests and [path.name for path in folder.iterdir()] == [".lock"]


def test_decoding_is_that_of_the_recipe_whose_model_the_run_started_from(tmp_path):
    (tmp_path / "run" / "final").mkdir(parents=True)
    final, config = str(tmp_path / "run" / "final"), tmp_path / "run" / "config.yaml"
    assert alpaca_eval2_module.recipe_of(final) == "greedy"
    config.write_text("# torch 2.13\nmodel: demo\n")
    assert alpaca_eval2_module.recipe_of(final) == "greedy"
    config.write_text("# torch 2.13\nmodel: mistralai/Mistral-7B-Instruct-v0.2\nseed: 1\n")
    assert alpaca_eval2_module.recipe_of(final) == "mistral-7b-instruct"
    assert {*alpaca_eval2_module.DECODING} - {"greedy"} <= {
        path.stem for path in (ROOT / "recipes").glob("*.yaml")
    }


def test_alpaca_eval_refuses_other_rows(alpaca, tmp_path, monkeypatch):
    rows = json.loads((alpaca / "reference.json").read_text())
    digest = instructions_sha256(alpaca)
    monkeypatch.setattr(alpaca_eval2_module, "INSTRUCTIONS_SHA256", digest)
    path = tmp_path / "outputs.json"
    swapped = [rows[1], rows[0], *rows[2:]]
    for wrong, message in (
        (swapped, "its 205 instructions are not the 805"),
        (rows[:-1], "its 204 instructions are not the 805"),
        ([{**rows[0], "generator": "other"}, *rows[1:]], "must have one generator"),
        ([{"instruction": "a", "generator": "b"}], "entry 0 must have instruction, output"),
        ({"rows": rows}, "must be a JSON list"),
    ):
        path.write_text(json.dumps(wrong))
        with pytest.raises(InputError, match=message):
            alpaca_eval2_module.load_outputs(str(path))
    path.write_text(json.dumps(rows))
    assert alpaca_eval2_module.load_outputs(str(path)) == rows


def test_the_official_instructions_have_the_pinned_fingerprint():
    path = ROOT.parent / "shared" / "data" / "alpaca_eval" / "gpt4_1106_preview_model_outputs.json"
    if path.exists():  # not in a user's clone
        assert len(alpaca_eval2_module.load_outputs(str(path))) == 805


# ---- MT-Bench ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mt_bench_data(tmp_path_factory) -> Path:
    """A folder with questions, judge prompts and reference answers in the official schema."""
    folder = tmp_path_factory.mktemp("mt_bench")
    categories = "writing roleplay reasoning math coding extraction stem humanities".split()
    questions, references, prompts = [], [], []
    for number in range(81, 161):
        category = categories[(number - 81) // 10]
        turns = [f"ask {number} a", f"ask {number} b"]
        questions.append({"question_id": number, "category": category, "turns": turns})
        if category in ("reasoning", "math", "coding"):
            choices = [{"index": 0, "turns": [f"truth {number} a", f"truth {number} b"]}]
            references.append({"question_id": number, "model_id": "mock", "choices": choices})
    one = "Q: {question}\nA: {answer}"
    two = "Q1: {question_1}\nA1: {answer_1}\nQ2: {question_2}\nA2: {answer_2}"
    for name, template in (
        ("single-v1", one),
        ("single-math-v1", "R1: {ref_answer_1}\n" + one),
        ("single-v1-multi-turn", two),
        ("single-math-v1-multi-turn", "R1: {ref_answer_1}\nR2: {ref_answer_2}\n" + two),
    ):
        prompt = {
            "name": name,
            "type": "single",
            "system_prompt": f"system of {name}",
            "prompt_template": template,
            "description": "",
            "category": "general",
            "output_format": "[[rating]]",
        }
        prompts.append(prompt)
    for name, lines in (
        ("question", questions),
        ("mock", references),
        ("judge_prompts", prompts),
    ):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    return folder


def rate(request: dict) -> dict:
    """A judge of MT-Bench: the first turn gets 1 to 7 by the number of the question, the second
    turn 5, and question 90 no readable rating."""
    text = request["messages"][1]["content"]
    number, second = int(re.search(r"ask (\d+) a", text)[1]), "Q2:" in text
    rating = "no rating" if number == 90 else f"Rating: [[{5 if second else number % 7 + 1}]]"
    return {"message": {"role": "assistant", "content": rating}}


def mt_bench(model, data: Path, output: Path, *flags, **environment) -> subprocess.CompletedProcess:
    code = "import eval.mt_bench as m; from runtime.command_line import run_command; "
    code += "m.NEW_TOKENS = 4; run_command(m.main)"
    flags = ["--output_dir", output, "--judge", "mock", "--batch_size", 40, *flags]
    flags += ["--reference", "mock"]
    environment = {"OPENAI_API_KEY": ""} | environment
    return run_python("-c", code, model, "--data", data, *flags, **environment)


def test_mt_bench(mt_bench_data, model_folder, tmp_path):
    folder = tmp_path / "tiny" / "mt_bench"
    with judge_server(rate) as (url, requests):
        flags = ["--judge_base_url", url]
        done = mt_bench(model_folder, mt_bench_data, tmp_path, *flags)
        assert done.returncode == 0, done.stderr[-3000:]
        assert len(requests) == 160
        host = url.removeprefix("http://").removesuffix("/v1").replace(":", "_")
        judgments = folder / f"model_judgment-{host}" / "mock_single.jsonl"
        whole = judgments.read_text()
        judgments.write_text(whole[: len(whole) // 2])  # as after an interruption
        kept = len(judgments.read_text().splitlines()) - 1
        again = mt_bench(model_folder, mt_bench_data, tmp_path, *flags, "--repeats", 2)
        assert again.returncode == 0, again.stderr[-3000:]
        assert len(requests) == 160 + (160 - kept) + 160
    # The answers, field by field as FastChat reads them
    answers = read_lines(folder / "model_answer" / "tiny.jsonl")
    assert [line["question_id"] for line in answers] == [*range(81, 161)]
    for line in answers:
        assert set(line) == {"question_id", "answer_id", "model_id", "choices", "tstamp"}
        assert line["model_id"] == "tiny"
        (choice,) = line["choices"]
        assert choice["index"] == 0 and list(map(type, choice["turns"])) == [str, str]
    assert len({line["answer_id"] for line in answers}) == 80
    # The judgments
    records = read_lines(judgments)
    assert len(records) == len({(r["question_id"], r["turn"]) for r in records}) == 160
    given = {line["question_id"]: line["choices"][0]["turns"] for line in answers}
    for record in records:
        number, (first, second) = record["question_id"], given[record["question_id"]]
        math_like = 101 <= number <= 130
        truth = f"R1: truth {number} a\n" if math_like else ""
        expected = f"{truth}Q: ask {number} a\nA: {first}"
        if record["turn"] == 2:
            truth += f"R2: truth {number} b\n" if math_like else ""
            expected = f"{truth}Q1: ask {number} a\nA1: {first}\nQ2: ask {number} b\nA2: {second}"
        assert record["user_prompt"] == expected
        name = "single-math-v1" if math_like else "single-v1"
        name += "-multi-turn" if record["turn"] == 2 else ""
        assert record["judge"] == ["mock", name] and record["model"] == "tiny"
        rating = -1 if number == 90 else 5 if record["turn"] == 2 else number % 7 + 1
        assert record["score"] == rating
        assert isinstance(record["judgment"], str) and isinstance(record["tstamp"], float)
    systems = {(r["messages"][0]["role"], r["messages"][0]["content"]) for r in requests}
    assert ("system", "system of single-math-v1-multi-turn") in systems and len(systems) == 4
    assert all((r["temperature"], r["max_tokens"]) == (0, 2048) for r in requests)
    # The scores, by hand
    result = json.loads((tmp_path / "tiny" / "mt_bench.json").read_text())
    scores = result["scores"]
    first = [number % 7 + 1 for number in range(81, 161) if number != 90]
    assert scores["turn 1"] == pytest.approx(sum(first) / 79) and scores["turn 2"] == 5
    assert scores["score"] == pytest.approx((sum(first) + 79 * 5) / 158)
    # Of questions: the mean of the two turns each, whose difference is that of the first turns.
    error = np.std(first, ddof=1) / 2 / math.sqrt(79)
    assert result["standard_errors"] == {"score": pytest.approx(error)}
    writing = [number % 7 + 1 for number in range(81, 90)] + [5] * 9
    assert scores["writing"] == pytest.approx(sum(writing) / 18)
    assert result["settings"]["top_k"] == 50  # transformers' own: the model has none
    assert {read_lines(path)[0]["top_k"] for path in folder.glob("answers/*.jsonl")} == {50}
    assert scores["unparsable"] == 2 and result["settings"]["spread_over_repeats"]["score"] == 0
    assert "2 of 160 judgments" in again.stdout
    fastchat = importlib.util.find_spec("fastchat")
    if fastchat:
        script = Path(fastchat.origin).parent / "llm_judge" / "show_result.py"
        shown = run_python(script, "--input-file", judgments)
        official = float(shown.stdout.split()[-1])
        assert official == pytest.approx(scores["score"], abs=1e-5), shown.stderr


def test_a_failing_judge_loses_no_judgment(mt_bench_data, tmp_path):
    """The first call fails, late: the judgments of the other calls are kept, and the next run makes
    the remaining calls only."""
    from openai import OpenAIError

    questions = mt_bench_module.load_questions(mt_bench_data)[:6]
    prompts, references = mt_bench_module.load_judge(mt_bench_data, "mock", questions)
    choices = [{"index": 0, "turns": ["one", "two"]}]
    answers = [
        {"question_id": q["question_id"], "model_id": "m", "choices": choices} for q in questions
    ]
    calls, enough_calls = [], Event()

    def create(model, messages, temperature, max_tokens):
        calls.append(messages)
        text = messages[1]["content"]
        if failing and "ask 81 a" in text and "Q2" not in text:
            enough_calls.wait(10)
            raise OpenAIError("no credit")
        if len(calls) >= 4:
            enough_calls.set()
        return SimpleNamespace(choices=[SimpleNamespace(message=SimpleNamespace(content="[[05]]"))])

    client = SimpleNamespace(chat=SimpleNamespace(completions=SimpleNamespace(create=create)))
    judge = Judge(client, "mock", {"temperature": 0, "max_tokens": 2048}, version="mock 1")
    path = tmp_path / "judgments" / "mock_single.jsonl"

    def judge_all() -> list[dict]:
        return mt_bench_module.judge_all(
            judge, questions, answers, prompts, references, path, workers=2
        )

    failing = True
    with pytest.raises(InputError, match="no credit.*are kept in"):
        judge_all()
    kept = len(path.read_text().splitlines())
    assert kept >= 3 and kept >= len(calls) - 3
    failing, before = False, len(calls)
    records = judge_all()
    assert len(records) == 12 and len(calls) - before == 12 - kept
    assert {record["score"] for record in records} == {5}
    prompts["single-v1"]["system_prompt"] += " Be strict."
    with pytest.raises(InputError, match="judges different answers, or with other prompts"):
        judge_all()


class MockJudge:
    """A Judge whose answer to a task is `reply(its number)`: a text, None, or an error to raise."""

    def __init__(self, reply):
        self.calls, self.reply = [], reply
        self.client = SimpleNamespace(chat=SimpleNamespace(completions=self))
        self.model, self.options, self.version, self.timeout = "mock", {}, "mock 1", 60

    def create(self, model, messages):
        self.calls.append(messages)
        answer = self.reply(messages)
        if isinstance(answer, Exception):
            raise answer
        message = SimpleNamespace(content=answer)
        return SimpleNamespace(choices=answer != "" and [SimpleNamespace(message=message)])


def ask(judge, numbers, path: Path, workers: int = 1) -> dict:
    def record(number: int, text: str) -> dict:
        return {"index": number, "judgment": text, "score": 1 if text == "A" else None}

    return judge_module.ask_all(judge, {n: n for n in numbers}, record, path, workers)


def test_a_judge_without_a_verdict_is_not_paid_for_all(tmp_path):
    """Unless there are few to judge, or one of the first has a verdict."""
    judge = MockJudge(lambda n: "I like both")
    with pytest.raises(InputError, match="none of its first 20 judgments holds a verdict.*kept in"):
        ask(judge, range(100), tmp_path / "judgments.jsonl", workers=4)
    assert len(judge.calls) <= 20 + 2 * 4
    assert len(ask(judge, range(19), tmp_path / "few.jsonl")) == 19
    once = MockJudge(lambda n: "A" if n == 5 else "I like both")
    assert len(ask(once, range(60), tmp_path / "once.jsonl")) == 60


def refusal(status: int = 400) -> Exception:
    import httpx
    from openai import APIStatusError

    response = httpx.Response(status, request=httpx.Request("POST", "http://judge"))
    return APIStatusError("too long", response=response, body=None)


def test_what_the_judge_refuses_is_a_record(tmp_path):
    """Two prompts that are refused, and one whose answer is empty, among others: they are recorded
    with the reason, and everything ends. A judge that refuses all of them is at fault."""
    path = tmp_path / "judgments.jsonl"
    answers = {3: refusal(), 4: refusal(403), 9: None}
    records = ask(MockJudge(lambda n: answers.get(n, "A")), range(10), path)
    assert [n for n in range(10) if records[n]["judgment"] == "A"] == [0, 1, 2, 5, 6, 7, 8]
    assert {n: records[n]["refused"] for n in answers} == {
        3: "too long",
        4: "too long",
        9: "it answers with no text",
    }
    kept = sorted(results.read_records(path), key=lambda r: r["index"])
    assert kept == [records[number] for number in range(10)]
    judge = MockJudge(lambda n: refusal())
    with pytest.raises(
        InputError, match="5 refusals in a row, the last: too long.*continues after them"
    ):
        ask(judge, range(100), tmp_path / "none.jsonl", workers=4)
    assert len(judge.calls) < 5 + 2 * 4 and results.read_records(tmp_path / "none.jsonl") == []
    expired = MockJudge(lambda n: refusal(401) if n == 3 else "A")
    with pytest.raises(InputError, match="the judge mock failed: .*too long"):
        ask(expired, range(10), tmp_path / "none.jsonl")


def test_judgments_keep_the_version_of_their_judge(tmp_path):
    judge = MockJudge(lambda n: "A")
    records = ask(judge, range(3), tmp_path / "judgments.jsonl")
    judge.version = "mock 2"
    records |= ask(judge, range(3, 5), tmp_path / "judgments.jsonl")
    kept = results.read_records(tmp_path / "judgments.jsonl")
    assert [record["judge_version"] for record in kept] == ["mock 1"] * 3 + ["mock 2"] * 2
    assert judge_module.judge_versions(kept) == "mock 1, mock 2"
    assert judge_module.judge_versions([*records.values(), {}]) == "mock 1, mock 2, unknown"


def test_a_torn_line_is_cut_off_and_nothing_is_written_anew(tmp_path):
    path = tmp_path / "records.jsonl"
    path.write_text('{"a": "ä\u2028"}\n{"a": 2}\n{"a": "ä')
    path.chmod(0o600)
    before = path.stat().st_ino
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "write_text", lambda *args: pytest.fail("a full disk"))
        assert results.read_records(path) == [{"a": "ä\u2028"}, {"a": 2}]
    assert path.stat().st_ino == before and path.read_text() == '{"a": "ä\u2028"}\n{"a": 2}\n'


def test_two_processes_do_not_pay_for_the_same_judgments(tmp_path):
    with open(tmp_path / "judgments.jsonl", "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # as the first does
        judge = MockJudge(lambda n: "A")
        with pytest.raises(InputError, match="another process is writing to it"):
            ask(judge, range(3), tmp_path / "judgments.jsonl")
    assert judge.calls == [] and len(ask(judge, range(3), tmp_path / "judgments.jsonl")) == 3


def test_endpoints_have_names_of_their_own():
    names = {
        "http://localhost:8000/v1": "localhost_8000",
        "https://api.openai.com/v1/": "api.openai.com",
        "https://gateway/openai/v1": "gateway_openai",
        "https://gateway/bedrock/v1": "gateway_bedrock",
        "http://me:secret@host:8000/v1": "host_8000",
    }
    assert {url: judge_module.endpoint_name(url) for url in names} == names


def test_every_judgment_that_was_paid_is_kept(tmp_path, monkeypatch):
    """When the user interrupts: no further call begins."""

    def interrupted(tasks, **options):
        for number, task in enumerate(tasks):
            if number == 5:
                raise KeyboardInterrupt
            yield task

    def reply(n):
        time.sleep(0.002)
        return "A"

    monkeypatch.setattr(judge_module, "tqdm", interrupted)
    judge, path = MockJudge(reply), tmp_path / "judgments.jsonl"
    with pytest.raises(KeyboardInterrupt):
        ask(judge, range(500), path, workers=4)
    kept = len(results.read_records(path))
    assert kept == len(judge.calls) and kept < 500


SHAPES = {
    "no choices": {},
    "null for a choice": {"choices": [None]},
    "no message": {"choices": [{"finish_reason": "stop"}]},
    "null for a message": {"choices": [{"message": None}]},
    "a number": {"choices": [{"message": {"content": 7}}]},
    "a part without text": {"choices": [{"message": {"content": [{"type": "image"}]}}]},
    "a list": [1, 2],
    "a text": "no",
}


@pytest.fixture
def endpoint():
    """(its URL, its list of functions of a request handler, by which it answers one after the
    other, the last for good)."""
    replies = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            (replies.pop(0) if len(replies) > 1 else replies[0])(self)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("localhost", 0), Handler)
    server.daemon_threads = True
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://localhost:{server.server_port}/v1", replies
    server.shutdown()


def send_json(content) -> Callable:
    def send(handler) -> None:
        body = json.dumps(content).encode()
        handler.send_response(200)
        handler.send_header("Content-Type", "application/json")
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body)

    return send


def completion(content) -> Callable:
    message = {"role": "assistant", "content": content}
    return send_json({"model": "m", "choices": [{"message": message}]})


def test_a_reply_of_any_shape_is_a_record(endpoint, tmp_path):
    """Through the client of openai; a content of several parts is a text."""
    url, replies = endpoint
    replies += [completion("B")]
    judge = open_judge("m", url, max_tokens=1, temperature=0)
    parts = [{"type": "text", "text": "A"}, {"type": "text", "text": "B"}]
    shapes = [thing for shape in SHAPES.values() for thing in (send_json(shape), completion("C"))]
    replies[:] = [completion(parts), *shapes, completion("D")]
    records = ask(judge, range(2 * len(SHAPES) + 2), tmp_path / "judgments.jsonl")
    texts = [record["judgment"] for record in records.values()]
    assert sorted(texts) == sorted(["AB", "D"] + ["", "C"] * len(SHAPES))
    refused = [record["refused"] for record in records.values() if "refused" in record]
    assert len(refused) == len(SHAPES) and all("no chat completion" in r for r in refused)


@pytest.mark.parametrize("kind", ["silence", "drip"])
def test_a_reply_that_does_not_end_is_an_error_in_time(endpoint, tmp_path, kind):
    """At the first question, and when it happens later."""
    url, replies = endpoint
    open_for_long = Event()

    def hang(handler) -> None:
        if kind == "drip":
            handler.send_response(200)
            handler.send_header("Content-Length", "1000")
            handler.end_headers()
        while not open_for_long.wait(0.1):
            if kind == "drip":
                with suppress(OSError):
                    handler.wfile.write(b" ")

    replies += [hang]
    with pytest.raises(InputError, match=f"the judge m at {url}: .*(timed out|no whole reply)"):
        open_judge("m", url, max_tokens=1, temperature=0, timeout=0.5)
    replies[:] = [completion("A")]
    judge = open_judge("m", url, max_tokens=1, temperature=0, timeout=0.5)
    replies[:] = [completion("A"), completion("A"), hang]
    with pytest.raises(InputError, match="the judge m failed: .*no reply within 0.5 s, 3 times"):
        ask(judge, range(10), tmp_path / "judgments.jsonl")
    assert len(results.read_records(tmp_path / "judgments.jsonl")) == 2
    open_for_long.set()


def test_an_endpoint_with_a_password_is_refused(capsys):
    """It would be in results, in wandb and in errors."""
    parser = results.make_parser("", *results.JUDGE)
    with pytest.raises(SystemExit):
        parser.parse_args(["--judge_base_url", "http://me:secret@host:8000/v1"])
    said = capsys.readouterr().err
    assert "must hold no password" in said and "secret" not in said
    assert parser.parse_args([]).judge_base_url == judge_module.URL


def test_what_a_judge_commands_a_terminal_is_shown():
    from runtime.command_line import printable

    text = "a\x1b[31m\x1b]0;owned\x07 \x9b2J\u2028\x00é→\n\tend\r"
    assert printable(text) == "a\\x1b[31m\\x1b]0;owned\\x07 \\x9b2J\\u2028\\x00é→\n\tend\\r"


def test_mt_bench_temperatures_and_second_turns(mt_bench_data, model_folder, tmp_path, monkeypatch):
    """The model is called with FastChat's temperatures, and in the second turn with its own first
    answer."""
    calls = []  # (first message, all messages, temperature)

    def fake_answer(name, prompts, path, max_new_tokens, temperature, **options):
        assert max_new_tokens == 1024
        calls.extend((prompt[0]["content"], prompt, temperature) for prompt in prompts)
        return [(f"answer {len(prompt)}", True) for prompt in prompts]

    monkeypatch.setattr(mt_bench_module, "answer", fake_answer)
    questions = mt_bench_module.load_questions(mt_bench_data)
    mt_bench_module.generate_answers(str(model_folder), questions, tmp_path, {})
    temperatures = {first: temperature for first, _, temperature in calls}
    assert len(calls) == 160 and len(temperatures) == 80
    # The first questions of the categories, in the order of mt_bench_data
    expected = [0.7, 0.7, 0.0, 0.0, 0.0, 0.0, 0.1, 0.1]
    assert [temperatures[f"ask {number} a"] for number in range(81, 161, 10)] == expected
    _, second_turn = [prompt for first, prompt, _ in calls if first == "ask 100 a"]
    assert second_turn == [
        {"role": "user", "content": "ask 100 a"},
        {"role": "assistant", "content": "answer 1"},
        {"role": "user", "content": "ask 100 b"},
    ]


def test_mt_bench_reports_what_is_missing_first(mt_bench_data, model_folder, tmp_path, monkeypatch):
    incomplete = tmp_path / "data"
    shutil.copytree(mt_bench_data, incomplete)
    lines = (incomplete / "mock.jsonl").read_text().splitlines()
    (incomplete / "mock.jsonl").write_text("\n".join(lines[1:]) + "\n")
    monkeypatch.setenv("OPENAI_API_KEY", "")
    for data, reference, message in (
        (tmp_path / "none", "mock", "question.jsonl is missing"),
        (incomplete, "mock", "incomplete: question 101"),
        (mt_bench_data, "gpt-4", "gpt-4.jsonl is missing"),
        (mt_bench_data, "mock", "the judge meta-llama/.* at http://127.0.0.1:9/v1: Connection"),
    ):
        args = [model_folder, "--data", data, "--reference", reference]
        args += ["--judge_base_url", "http://127.0.0.1:9/v1", "--output_dir", tmp_path / "results"]
        monkeypatch.setattr(sys, "argv", ["mt_bench", *map(str, args)])
        with pytest.raises(InputError, match=message):
            mt_bench_module.main()
        assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(
    "text, expected",
    [
        ("[[7]]", 7),
        ("a [[7.5]] b [[2]]", 7.5),
        ("so [3]", 3),
        ("[1] but [[4]]", 4),
        ("10", -1),
        ("[[ten]]", -1),
        ("", -1),
    ],
)
def test_scores_are_read_as_fastchat_does(text, expected):
    assert mt_bench_module.parse_score(text) == expected


# ---- Win rate against the chosen responses -------------------------------------------------------


@pytest.mark.parametrize(
    "line, verdict",
    [
        *(("A", "A"), ("**B**", "B"), ("TIE", "TIE"), ("Tie.", "TIE"), ("Answer: A", "A")),
        *(("The better answer is **B**.", "B"), ("It is a tie.", "TIE"), ("Verdict: TIE", "TIE")),
        *(("A or B", ""), ("Neither is a", ""), ("Both. A", ""), ("", "")),
        *(("A > B", ""), ("A/B", ""), ("Answer A is better than Answer B.", ""), ("A = B", "")),
    ],
)
def test_verdicts(line, verdict):
    assert win_rate.parse_verdict(f"A and B differ.\n{line}\n") == verdict


def test_chosen_is_the_first_answer_of_the_rows_that_have_one(tmp_path):
    """Of two, or of any number; rows without a prompt or an answer, and rows whose answers are to
    different prompts, are left out."""
    dialogue = "\n\nHuman: {}\n\nAssistant: {}"
    rows = [
        {"prompt": "p", "chosen": "a", "rejected": "b"},
        {"prompt": "q", "responses": ["best", "second", "third"]},
        {"prompt": "p", "chosen": " ", "rejected": "b"},
        {"prompt": " ", "chosen": "a", "rejected": "b"},
        {"chosen": dialogue.format("p", "a"), "rejected": dialogue.format("q", "b")},
    ]
    found = []
    for row in rows:
        (tmp_path / "rows.jsonl").write_text(f"{json.dumps(rows[0])}\n{json.dumps(row)}\n")
        found.append(win_rate.load_chosen(str(tmp_path / "rows.jsonl"), 0)[1:])
    assert found == [[("p", "a")], [("q", "best")], [], [], []]


def test_win_rate(model_folder, tmp_path):
    """A judge that finds a tie in every third conversation, prefers the chosen response in the next
    and the model's in the third, in the next nine whatever stands first, and names none in the
    last. Its key expires at first."""
    rows = [
        {
            "chosen": f"\n\nHuman: q {n}\n\nAssistant: gold",
            "rejected": f"\n\nHuman: q {n}\n\nAssistant: x",
        }
        for n in range(31)
    ]
    (tmp_path / "hh.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    failing = True

    def reply(request: dict):
        if failing and len(requests) == 5:
            return 429, "Rate limit reached", "rate_limit_exceeded"  # and asked again
        if failing and len(requests) > 12:
            return 401, "The API key has expired", "invalid_api_key"
        text = request["messages"][-1]["content"]
        number = int(re.search(r"q (\d+)", text)[1])
        gold = "A" if re.search(r"\[Answer A\]\ngold\n", text) else "B"
        ours = "B" if gold == "A" else "A"
        verdict = "A" if number >= 21 else ("TIE", gold, ours)[number % 3]
        verdict = "both" if number == 30 and ours == "A" else verdict
        return {"message": {"role": "assistant", "content": f"Compared.\n{verdict}"}}

    with judge_server(reply) as (url, requests):
        flags = ["--data", tmp_path / "hh.jsonl", "--judge", "mock", "--judge_base_url", url]
        flags += ["--max_new_tokens", 5, "--workers", 1, "--output_dir", tmp_path / "results"]
        spent = command("win_rate", model_folder, *flags)
        assert spent.returncode == 1 and "key has expired" in spent.stderr.splitlines()[-1]
        failing, asked = False, len(requests)
        done = command("win_rate", model_folder, *flags)
        assert done.returncode == 0, done.stderr[-3000:]
        assert len(requests) - asked == 62 - 11
    folder = tmp_path / "results" / "tiny"
    result = json.loads((folder / "win_rate.json").read_text())
    # Seven wins, seven losses, and a half for seven ties and the nine of which each side has one.
    expected = {"win_rate": 50, "wins": 700 / 30, "ties": 700 / 30, "losses": 700 / 30}
    expected |= {"judged": 30, "unparsable": 1, "words/chosen": 1, "contradicted": 900 / 30}
    assert {name: result["scores"][name] for name in expected} == pytest.approx(expected)
    error = 100 * math.sqrt(14 * 0.25 / 29 / 30)
    assert result["standard_errors"]["win_rate"] == pytest.approx(error)
    assert f"{'win rate':<24}50.0 % ± 6.3 (standard error)" in done.stdout
    items = results.read_items(folder, result)["win_rate"]["values"]
    assert Counter(items) == {0: 7, 50: 16, 100: 7, None: 1} and items[30] is None
    (path,) = folder.glob("win_rate/hh-*/judgments-chosen-*.jsonl")
    # An earlier version may have read the same words otherwise, or judged more answers.
    judged = path.read_text()
    path.write_text(judged.replace('"score": 0.5', '"score": 1'))
    pairs = win_rate.load_chosen(str(tmp_path / "hh.jsonl"), 0)
    read = read_lines(path.with_name("answers.jsonl"))[1:]
    texts = [line["output"] for line in sorted(read, key=lambda line: line["index"])]
    options = {"path": path, "workers": 1}
    judged_again = win_rate.judge_all(MockJudge(None), pairs, texts, **options)
    by_prompt = win_rate.prompt_scores(judged_again)
    assert [None if s is None else 100 * s for s in by_prompt] == items
    versions = {record["judge_version"] for both in judged_again for record in both}
    assert versions == {result["settings"]["judge_version"]}
    with pytest.raises(InputError, match="judges different answers"):
        win_rate.judge_all(MockJudge(None), pairs[:-1], texts[:-1], **options)
    path.write_text(judged)
    places = [record["ours"] for record in read_lines(path)]
    assert places.count("A") == places.count("B") == 31


def test_win_rate_of_two_models(model_folder, other_folder, tmp_path):
    """A judge that prefers the first model's answers in three of four prompts, in both orders; of
    two equal answers, the one that stands first. The result is the first model's, against the
    second; the other way round it is its complement, and no answer is made twice. The table has
    both."""
    (tmp_path / "asked.jsonl").write_text(
        "".join(json.dumps({"prompt": f"question {n}"}) + "\n" for n in range(12))
    )

    def reply(request: dict):
        text = request["messages"][-1]["content"]
        a, b = (re.search(rf"\[Answer {x}\]\n(.*?)\n*(\[|$)", text, re.S)[1] for x in "AB")
        number = int(re.search(r"question (\d+)", text)[1])
        first = answers[number, "tiny"].strip()
        assert {a.strip(), b.strip()} == {first, answers[number, "other"].strip()}
        mine = "A" if a.strip() == first else "B"
        other = "B" if mine == "A" else "A"
        return {"message": {"role": "assistant", "content": other if number % 4 == 3 else mine}}

    folders = [model_folder, other_folder]
    names = ["tiny", "other"]
    flags = ["--data", tmp_path / "asked.jsonl", "--num_prompts", 0, "--max_new_tokens", 12]
    flags += ["--output_dir", tmp_path / "results", "--judge", "mock"]
    done = command("win_rate", *folders, *flags, "--generate_only")
    assert done.returncode == 0, done.stderr[-3000:]
    answers = {}
    for name in names:
        (file,) = (tmp_path / "results" / name).glob("win_rate/asked-*/answers.jsonl")
        for line in read_lines(file)[1:]:
            answers[line["index"], name] = line["output"]
    written = {path: path.read_bytes() for path in (tmp_path / "results").rglob("answers.jsonl")}
    with judge_server(reply) as (url, requests):
        for pair in (folders, folders[::-1]):
            done = command("win_rate", *pair, *flags, "--judge_base_url", url)
            assert done.returncode == 0, done.stderr[-3000:]
    assert len(requests) == 2 * 24 and written == {p: p.read_bytes() for p in written}
    found = []
    for name, against in (names, names[::-1]):
        path = tmp_path / "results" / name / f"win_rate_against_{against}.json"
        found.append(json.loads(path.read_text())["scores"])
    equal = [n for n in range(12) if len({answers[n, name].strip() for name in names}) == 1]
    rate = 100 * sum(0.5 if n in equal else n % 4 != 3 for n in range(12)) / 12
    assert len(equal) < 4
    assert [scores["win_rate"] for scores in found] == pytest.approx([rate, 100 - rate])
    both = [scores["length_controlled_winrate"] for scores in found]
    assert sum(both) == pytest.approx(100)
    table = command("report", *(tmp_path / "results" / name for name in names)).stdout
    assert "**Win rate against another model's answers**" in table
    assert f"against {names[1]} %, n = 12" in table and f"against {names[0]}, LC %" in table
    with pytest.raises(InputError, match="same name"):
        sys.argv = ["win_rate", str(model_folder), str(model_folder), *map(str, flags)]
        win_rate.main()


def test_the_length_controlled_win_rate():
    """Against scikit-learn's logistic regression, in which a score of 0.5 is half a win and half a
    loss; its error against the spread over samples drawn with replacement. A judge that looks at
    the length alone gives 50 % to answers of another length."""
    from sklearn.linear_model import LogisticRegression

    rng = np.random.default_rng(0)
    lengths, others = rng.integers(200, 2000, 400), rng.integers(100, 1500, 400)
    d = np.tanh((lengths - others) / (lengths - others).std())
    scores = rng.choice([0, 0.5, 1], 400) * 0.4 + 0.6 * (rng.random(400) < 1 / (1 + np.exp(-d)))

    def fit(rows) -> float:
        x = np.tile((lengths[rows] - others[rows]), 2)[:, None].astype(float)
        x = np.tanh(x / x.std())
        y, weight = np.repeat([1, 0], len(rows)), np.concatenate([scores[rows], 1 - scores[rows]])
        model = LogisticRegression(C=np.inf, tol=1e-10).fit(x, y, sample_weight=weight)
        return 100 / (1 + math.exp(-model.intercept_[0]))

    rate, error = win_rate.length_controlled(scores, lengths, others)
    assert rate == pytest.approx(fit(np.arange(400)), abs=1e-4)
    drawn = [fit(rng.integers(0, 400, 400)) for _ in range(300)]
    assert error == pytest.approx(np.std(drawn), rel=0.15)
    biased = (rng.random(400) < 1 / (1 + np.exp(-3 * d))).astype(float)
    rate, error = win_rate.length_controlled(biased, lengths, others)
    assert biased.mean() > 0.6 and abs(rate - 50) < 2 * error
    # By hand: t is 2.2281, and ± 0.44562 in log odds is 39.04 to 60.96 per cent.
    assert win_rate.odds_interval(50.0, 5.0, 12) == pytest.approx((39.04, 60.96), abs=0.01)
    # Twenty prompts, whose lengths differ to one side: it holds the true rate as often as it says.
    held = []
    while len(held) < 300:
        d = rng.normal(1, 1, 20)
        wins = rng.random(20) < 1 / (1 + np.exp(-1 - np.tanh(d / d.std())))
        if found := win_rate.length_controlled(wins, d, np.zeros(20)):
            low, high = win_rate.odds_interval(*found, 20)
            held.append(low < 100 / (1 + math.exp(-1)) < high)
    assert 0.92 < np.mean(held) < 0.98
    # Of equal lengths it is the win rate; where one side always wins, there is none.
    equal = win_rate.length_controlled([1, 0.5, 0, 1] * 3, range(12), range(12))
    assert equal[0] == pytest.approx(62.5)
    # Too few prompts, or lengths that nearly always differ to one side, tell nothing of equal ones.
    assert win_rate.length_controlled([1, 0.5, 0, 1], [7, 8, 9, 9], [7, 8, 9, 9]) is None
    assert win_rate.length_controlled(scores, lengths + 2000, others) is None
    assert win_rate.length_controlled([1.0] * 9, range(9), range(9)[::-1]) is None
    longer = [float(a > b) for a, b in zip(lengths, others)]
    assert win_rate.length_controlled(longer, lengths, others) is None


# ---- Open LLM Leaderboard ------------------------------------------------------------------------


def write_datasets(folder: Path) -> None:
    """The ten benchmarks' data sets, a few questions each, in folders that the harness finds by
    their hub names."""
    from lm_eval.tasks import TaskManager

    def write(name: str, configs: dict[str, dict[str, list[dict]]]) -> None:
        entries = []
        for config, splits in configs.items():
            for split, rows in splits.items():
                path = folder / name / f"{config}-{split}.jsonl"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text("".join(json.dumps(row) + "\n" for row in rows))
            files = [{"split": split, "path": f"{config}-{split}.jsonl"} for split in splits]
            entries.append({"config_name": config, "data_files": files})
        (folder / name / "README.md").write_text(
            f"---\n{yaml.safe_dump({'configs': entries})}---\n"
        )

    ask = [f"{i} plus 1?" for i in range(32)]
    pro = [
        {"question": ask[i], "options": [f"{i + j}" for j in range(10)], "answer": "B"}
        for i in range(9)
    ]
    write("TIGER-Lab/MMLU-Pro", {"default": {"test": pro[:4], "validation": pro[4:]}})
    no_comma = {"instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}], "key": 1}
    ifeval = [no_comma | {"prompt": "Say nothing."}]
    write("wis-k/instruction-following-eval", {"default": {"train": ifeval}})
    index = TaskManager().task_index
    bbh = {}
    # Of different sizes, which are the weights in the raw score
    for size, name in enumerate(read_task(index["leaderboard_bbh"].yaml_path)["task"], 2):
        task = read_task(index[name].yaml_path)
        targets = itertools.islice(itertools.cycle(task["doc_to_choice"]), size % 4 + 2)
        rows = [{"input": question, "target": target} for question, target in zip(ask, targets)]
        bbh[task["dataset_name"]] = {"test": rows}
    write("SaylorTwift/bbh", bbh)
    wrong = [{f"Incorrect Answer {j}": f"{i + 10 * j}" for j in (1, 2, 3)} for i in range(4)]
    gpqa = [{"Question": ask[i], "Correct Answer": f"{i + 1}"} | wrong[i] for i in range(4)]
    configs = ("gpqa_diamond", "gpqa_extended", "gpqa_main")
    write("Idavidrein/gpqa", {config: {"train": gpqa} for config in configs})
    people = ["Ann", "Bob", "Cid", "Dan", "Eve"]
    sizes = {"murder_mysteries": 2, "object_placements": 5, "team_allocation": 3}
    story = {"narrative": "All of them ran.", "question": "Who was first?"}
    musr = {
        n: [story | {"choices": str(people[:k]), "answer_choice": people[i]} for i in range(k)]
        for n, k in sizes.items()
    }
    write("TAUR-Lab/MuSR", {"default": musr})
    math_rows = [
        {"problem": ask[i], "solution": f"$\\boxed{{{i + 1}}}$", "level": f"Level {i}", "type": "x"}
        for i in (4, 5)
    ]
    subjects = "algebra counting_and_probability geometry intermediate_algebra number_theory"
    subjects = [*subjects.split(), "prealgebra", "precalculus"]
    math_splits = {"train": math_rows, "test": math_rows}
    write("DigitalLearningGmbH/MATH-lighteval", dict.fromkeys(subjects, math_splits))
    gsm8k = [{"question": text, "answer": f"#### {i + 1}"} for i, text in enumerate(ask)]
    write("openai/gsm8k", {"main": {"train": gsm8k[4:], "test": gsm8k[:4]}})
    choices = [{"text": [f"{i}", f"{i + 1}"], "label": ["A", "B"]} for i in range(32)]
    arc = [{"question": q, "choices": c, "answerKey": "B"} for q, c in zip(ask, choices)]
    arc_splits = {"train": arc[4:], "validation": arc[4:], "test": arc[:4]}
    write("allenai/ai2_arc", {"ARC-Challenge": arc_splits})
    answers = [{"choices": [f"{i + 1}", f"{i}", "no"], "labels": [1, 0, 0]} for i in range(4)]
    truthful = [
        {"question": ask[i], "mc1_targets": answers[i], "mc2_targets": answers[i]} for i in range(4)
    ]
    write("truthfulqa/truthful_qa", {"multiple_choice": {"validation": truthful}})
    names = {"option1": "Ann", "option2": "Bob"}
    winogrande = [
        names | {"sentence": f"Ann saw Bob and _ ran {i}.", "answer": f"{1 + i % 2}"}
        for i in range(12)
    ]
    winogrande_splits = {"train": winogrande[3:], "validation": winogrande[:3]}
    write("allenai/winogrande", {"winogrande_xl": winogrande_splits})


LEADERBOARD_RUNS = """
import json, os, sys
from pathlib import Path
from lm_eval import evaluator, tasks
from lm_eval.models.huggingface import HFLM
from eval import leaderboard
from runtime.errors import InputError
from runtime.intervals import t_quantile

def stop(*args, **options):
    raise KeyboardInterrupt

# The files of all tasks, and a list of the installed packages for each benchmark, take seconds.
names = ("leaderboard", "gsm8k", "arc", "truthfulqa", "winogrande")
folders = [str(Path(tasks.__file__).parent / name) for name in names]
manager = tasks.TaskManager(include_path=folders, include_defaults=False)
tasks.TaskManager = lambda: manager
evaluator.add_env_info = lambda storage: None

def run(flags):
    sys.argv = ["leaderboard", "tiny/final", *flags.split()]
    leaderboard.main()
"""


def test_leaderboard_with_the_harness(tmp_path):
    """All ten benchmarks through the real lm_eval, every one of its subtasks, on a few questions
    each."""
    write_datasets(tmp_path)
    model = make_model("llama", seed=1, max_position_embeddings=4096)
    with torch.no_grad():  # a model that ends each of its answers at once
        model.model.embed_tokens.weight += 1
        model.lm_head.weight[1] += 1
    model.save_pretrained(tmp_path / "tiny" / "final")
    today = "{{ strftime_now('%d %b %Y') }}"
    make_tokenizer(today + CHATML).save_pretrained(tmp_path / "tiny" / "final")
    gpqa = {f"leaderboard_gpqa_{name}": 4 for name in ("diamond", "extended", "main")}
    folder = tmp_path / "results" / "tiny"

    (tmp_path / "nltk_data" / "tokenizers" / "punkt_tab").mkdir(parents=True)

    def run(code: str, cache: str) -> subprocess.CompletedProcess:
        environment = {"PYTHONPATH": str(ROOT), "HF_HOME": str(tmp_path / cache)}
        environment |= {"NLTK_DATA": str(tmp_path / "nltk_data")}
        return run_python("-c", LEADERBOARD_RUNS + code, cwd=tmp_path, **environment)

    flags = "--benchmarks GSM8K GPQA Winogrande --apply_chat_template leaderboard --limit 1"
    quick = run(f"run('{flags}')", cache="one cache")
    assert quick.returncode == 0, quick.stderr[-3000:]
    assert "GSM8K: chat template not applied" in quick.stdout
    assert "GPQA: chat template applied" in quick.stdout
    assert "no leaderboard.json is written" in quick.stdout
    assert not (folder / "leaderboard.json").exists()
    for task, turns in (("gsm8k", 0), ("leaderboard_gpqa_main", 1)):
        prompt = samples_of(folder, task)[0]["arguments"]["gen_args_0"]["arg_0"]
        assert prompt.count("<|im_start|>user") == turns
        assert prompt.startswith("26 Jul 2024<|im_start|>") == (turns > 0)  # as in training
    # The harness shuffles GPQA's choices when it loads them, and the cache keeps their order: a run
    # with a different cache has the same order.
    shuffled = {task: samples_of(folder, task)[0]["doc"] for task in gpqa}
    shutil.rmtree(folder)

    done = run(
        """
collect, generate = leaderboard.collect, HFLM.generate_until
flags = "--benchmarks GSM8K --apply_chat_template true"
path = "results/tiny/leaderboard.json"

def meanwhile(results, benchmark):  # another run has written its benchmark
    result = json.load(open(path))
    result["scores"]["other"] = 1.0
    json.dump(result, open(path, "w"))
    return collect(results, benchmark)

leaderboard.collect = stop
try:
    run(flags)  # everything is answered, nothing is written
except KeyboardInterrupt:
    print("interrupted:", not os.path.exists(path))
leaderboard.collect = collect
run("--benchmarks Winogrande --limit 1")
HFLM.generate_until = stop
run(flags)  # nothing is asked again
cache = os.listdir("results/tiny/leaderboard/cache")
print("cache:", {name.split("_")[0] for name in cache})
HFLM.generate_until = generate
try:
    run("")
except InputError as error:
    print("refused:", error)
leaderboard.collect = meanwhile
names = [name for name in leaderboard.BENCHMARKS if name != "GSM8K"]
run(f"--benchmarks {' '.join(names)}")
run("--benchmarks IFEval --apply_chat_template true --limit 1")  # writes nothing: not refused
run(flags)
""",
        cache="another cache",
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "interrupted: True" in done.stdout and "cache: {'Winogrande'}" in done.stdout
    assert "refused: results/tiny/leaderboard.json: holds results of GSM8K with" in done.stdout
    assert done.stdout.rstrip().endswith("GSM8K: is in results/tiny/leaderboard.json")
    assert "Winogrande: chat template not applied" in done.stdout
    result = json.loads((folder / "leaderboard.json").read_text())
    assert result["scores"].pop("other") == 1.0
    chat = {name: values["apply_chat_template"] for name, values in result["settings"].items()}
    assert chat == dict.fromkeys(leaderboard.BENCHMARKS, False) | {"GSM8K": True}
    assert result["settings"]["ARC-Challenge"]["shots"] == 25
    items = results.read_items(folder, result)
    assert items.keys() == leaderboard.BENCHMARKS.keys() - {"IFEval"}
    for name, found in items.items():
        assert np.mean(found["values"]) == pytest.approx(result["scores"][name], abs=1e-4), name
    digests = tokenizer_digests(make_tokenizer(today + CHATML))
    assert result["settings"]["GSM8K"].items() >= digests.items()
    prompt = samples_of(folder, "gsm8k")[0]["arguments"]["gen_args_0"]["arg_0"]
    assert prompt.count("<|im_start|>user") == 6  # five shots and the question

    def mean(task: str, metric: str = "acc_norm") -> float:
        return np.mean([sample[metric] for sample in samples_of(folder, task)])

    def normalized(choices: dict[str, int], metric: str = "acc_norm") -> float:
        """Of {task: its number of choices}."""
        above = [(mean(task, metric) - 1 / k) / (1 - 1 / k) for task, k in choices.items()]
        return 100 * np.mean(np.maximum(0, above))

    def weighted(tasks) -> float:
        samples = [sample for task in tasks for sample in samples_of(folder, task)]
        return 100 * np.mean([sample["acc_norm"] for sample in samples])

    names = [path.name.removeprefix("samples_") for path in folder.rglob("samples_*")]
    tasks = {name.rsplit("_20", 1)[0] for name in names}
    bbh = [task for task in tasks if task.startswith("leaderboard_bbh_")]
    # A task has as many choices as the harness made requests for a question, one for each choice.
    bbh = {task: len(samples_of(folder, task)[0]["arguments"]) for task in bbh}
    names = {"murder_mysteries": 2, "object_placements": 5, "team_allocation": 3}
    musr = {f"leaderboard_musr_{name}": size for name, size in names.items()}
    assert len(bbh) == 24 and sum(len(samples_of(folder, task)) for task in bbh) > 2 * 24
    expected = {
        "MMLU-Pro": 100 * mean("leaderboard_mmlu_pro", "acc"),
        "normalized/MMLU-Pro": normalized({"leaderboard_mmlu_pro": 10}, "acc"),
        "IFEval": 0,  # an empty answer follows no instruction
        "normalized/IFEval": 0,
        "BBH": weighted(bbh),
        "normalized/BBH": normalized(bbh),
        "GPQA": weighted(gpqa),
        "normalized/GPQA": max(0, (weighted(gpqa) - 25) / 0.75),  # as a whole
        "MuSR": weighted(musr),
        "normalized/MuSR": normalized(musr),
        "MATH": 0,
        "MATH (Math-Verify)": 0,
        "normalized/MATH": 0,
        "GSM8K": 0,
        "ARC-Challenge": 100 * mean("arc_challenge"),
        "TruthfulQA": 100 * mean("truthfulqa_mc2", "acc"),
        "Winogrande": 100 * mean("winogrande", "acc"),
    }
    assert result["scores"] == pytest.approx(expected)
    assert 0 < expected["BBH"] < 100
    assert abs(expected["BBH"] - 100 * np.mean([mean(task) for task in bbh])) > 0.1
    without_error = set(expected) - set(result["standard_errors"])
    assert {name.removeprefix("normalized/")[:4] for name in without_error} == {"IFEv", "MATH"}
    assert set(result["inputs_sha256"]) == tasks
    for task, text, shots in (("arc_challenge", "Question:", 25), ("winogrande", "Ann saw", 5)):
        prompt = samples_of(folder, task)[0]["arguments"]["gen_args_0"]["arg_0"]
        assert prompt.count(text) == shots + 1
    assert shuffled == {task: samples_of(folder, task)[0]["doc"] for task in gpqa}


def samples_of(folder: Path, task: str) -> list[dict]:
    """The harness's newest samples of a task, in the order of the questions."""
    path = max(folder.rglob(f"samples_{task}_20*.jsonl"))
    return sorted(read_lines(path), key=lambda sample: sample["doc_id"])


@pytest.mark.parametrize(
    "template, adds_bos", [(CHATML, False), ("{{ bos_token }}" + CHATML, True), (None, True)]
)
def test_the_harness_sees_the_tokens_of_training(tmp_path, template, adds_bos):
    """lm_eval's log-likelihood of a response after its prompt is the sum of our token log-probs."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from loss import sum_logps
    from model import PackedModel, build_model
    from runtime.templates import end_of_turn, prompt_text

    tokenizer, plain = make_tokenizer(template, adds_bos), make_model("llama")
    rows = [{"prompt": "what is two?", "chosen": " two.", "rejected": " a small one"}]
    rows += [{"prompt": "a", "chosen": " b", "rejected": " c d"}]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pairs = load_data(str(tmp_path / "pairs.jsonl"), tokenizer, 200, 100)
    packed = build_model(plain.config).model
    packed.load_state_dict(plain.state_dict())
    batch = pairs.pack([0, 1])
    with torch.no_grad():
        ours = sum_logps(PackedModel(packed)(batch).double(), batch.lengths)
    harness = HFLM(pretrained=plain, tokenizer=tokenizer, batch_size=1, device="cpu")
    end = tokenizer.decode([end_of_turn(tokenizer)[0]])
    requests = []
    for row in rows:
        for side in ("chosen", "rejected"):
            text = prompt_text(tokenizer, row["prompt"])
            requests.append(Instance("loglikelihood", {}, (text, row[side] + end), len(requests)))
    theirs = [value for value, _ in harness.loglikelihood(requests, disable_tqdm=True)]
    expected = ours.flatten().tolist()
    if template:
        # The harness counts white space at the prompt's end, here a line break, as part of the
        # response.
        for number, request in enumerate(requests):
            ids = torch.tensor([tokenizer(request.args[0], add_special_tokens=False).input_ids])
            with torch.no_grad():
                expected[number] += plain(ids).logits[0, -2].log_softmax(dim=-1)[ids[0, -1]].item()
    assert theirs == pytest.approx(expected, abs=1e-4)


def harness_results(**groups) -> dict:
    """What lm_eval returns, of {group or task: {subtask: (value, shots, choices)}}."""
    results = {"results": {}, "n-shot": {}, "configs": {}, "group_subtasks": {}}
    for group, subtasks in groups.items():
        metric = "acc" if group == "leaderboard_mmlu_pro" else "acc_norm"
        for name, (value, shots, choices) in subtasks.items():
            results["results"][name] = {f"{metric},none": value, f"{metric}_stderr,none": 0.125}
            results["n-shot"][name] = shots
            results["configs"][name] = {"doc_to_choice": ["x"] * choices}
        if group not in subtasks:
            mean = sum(value for value, _, _ in subtasks.values()) / len(subtasks)
            results["results"][group] = {f"{metric},none": mean, f"{metric}_stderr,none": 0.25}
            results["group_subtasks"][group] = list(subtasks)
    return results


def test_scores_and_their_normalization_by_hand():
    bbh = {
        "leaderboard_bbh_snarks": (0.75, 3, 2),
        "leaderboard_bbh_navigate": (0.25, 3, 2),
        "leaderboard_bbh_x": (0.4, 3, 5),
    }
    pro = {"leaderboard_mmlu_pro": (0.325, 5, 0)}
    musr = {
        "leaderboard_musr_object_placements": (0.6, 0, 0),
        "leaderboard_musr_murder_mysteries": (0.5, 0, 0),
    }
    results = harness_results(leaderboard_bbh=bbh, leaderboard_mmlu_pro=pro, leaderboard_musr=musr)
    scores, errors = {}, {}
    for benchmark in ("BBH", "MMLU-Pro", "MuSR"):
        for found, new in zip((scores, errors), leaderboard.collect(results, benchmark)):
            found |= new
    assert scores == pytest.approx(
        {
            "BBH": 100 * 1.4 / 3,
            "normalized/BBH": 100 * (0.5 + 0 + 0.25) / 3,  # below guessing is 0
            "MMLU-Pro": 32.5,
            "normalized/MMLU-Pro": 25.0,  # (0.325 − 0.1) / 0.9
            "MuSR": 55.0,
            "normalized/MuSR": 25.0,  # (0.6 − 0.2) / 0.8, and 0
        }
    )
    expected = {"BBH": 25.0, "MMLU-Pro": 12.5, "MuSR": 25.0, "normalized/MMLU-Pro": 12.5 / 0.9}
    # Each subtask's 12.5 over 1 − 1/2, 1 − 1/2, 1 − 1/5
    expected["normalized/BBH"] = 12.5 / 3 * math.sqrt(2 * 2**2 + 1.25**2)
    expected["normalized/MuSR"] = 12.5 / 2 * math.sqrt(1.25**2 + 2**2)
    assert errors == pytest.approx(expected)
    results["n-shot"]["leaderboard_mmlu_pro"] = 0
    with pytest.raises(InputError, match=r"MMLU-Pro: the harness used \[0\] shots instead of 5"):
        leaderboard.collect(results, "MMLU-Pro")


def test_math_and_gpqa_are_normalized_as_a_whole():
    """Two subtasks of 10 and 30 questions, in the two ways of counting in MATH; GPQA's raw value is
    the harness's."""
    results = {"group_subtasks": {"leaderboard_math_hard": ["a", "b"], "leaderboard_gpqa": ["c"]}}
    results["n-samples"] = {"a": {"effective": 10}, "b": {"effective": 30}}
    results |= {"n-shot": {"a": 4, "b": 4, "c": 0}, "configs": {}}
    ways = ("exact_match_original", "exact_match")
    values = {"a": (0.5, 0.04), "b": (0.1, 0.02)}
    results["results"] = {
        task: {f"{way},none": x for way in ways} | {f"{way}_stderr,none": error for way in ways}
        for task, (x, error) in values.items()
    }
    group = {"exact_match,none": 0.3, "exact_match_stderr,none": 0.05}
    results["results"] |= {"leaderboard_math_hard": group}
    results["results"]["leaderboard_gpqa"] = {"acc_norm,none": 0.4, "acc_norm_stderr,none": 0.03}
    scores, errors = leaderboard.collect(results, "MATH")
    error = 100 * math.sqrt((10 * 0.04) ** 2 + (30 * 0.02) ** 2) / 40
    expected = {"MATH": 20.0, "normalized/MATH": 20.0, "MATH (Math-Verify)": 30.0}
    assert scores == pytest.approx(expected)
    expected = {"MATH": error, "normalized/MATH": error, "MATH (Math-Verify)": 5.0}
    assert errors == pytest.approx(expected)
    scores, errors = leaderboard.collect(results, "GPQA")
    assert scores == pytest.approx({"GPQA": 40, "normalized/GPQA": 20})  # (0.4 − 0.25) / 0.75
    assert errors == pytest.approx({"GPQA": 3, "normalized/GPQA": 4})


def test_a_question_that_gpqa_asks_several_times_is_one():
    """Three questions in five places, by hand: 100, 100, 0, 0, 100 in per cent, of which the second
    part repeats the first question and the third all of them but one."""
    parts = {"diamond": [("a", 1)], "main": [("a", 1), ("b", 0)], "extended": [("a", 0), ("c", 1)]}
    samples = {
        name: [
            {"doc_id": n, "filter": "none", "acc_norm": x, "doc": {"Question": q}, "doc_hash": name}
            for n, (q, x) in enumerate(asked)
        ]
        for name, asked in parts.items()
    }
    found = {"group_subtasks": {"leaderboard_gpqa": [*parts]}}
    items, error = leaderboard.question_scores(samples, found, "GPQA")
    values = items["GPQA"]["values"]
    assert values == pytest.approx([100 * 2 * 3 / 5, 0, 100 * 3 / 5])  # a, b, c; their mean is 60
    residuals = [200 - 3 * 60, 0 - 60, 100 - 60]  # of the sums of each question
    assert sum(residuals) == 0
    expected = math.sqrt(3 / 2 * sum(r**2 for r in residuals)) / 5
    assert error == pytest.approx(expected)
    # Each asked once, it is the standard error of the mean.
    samples = {"all": [samples["diamond"][0], samples["main"][1]]}
    found = {"group_subtasks": {"leaderboard_gpqa": ["all"]}}
    items, error = leaderboard.question_scores(samples, found, "GPQA")
    assert items["GPQA"]["values"] == [100, 0]
    assert error == pytest.approx(np.std([100, 0], ddof=1) / math.sqrt(2))


def test_ifeval_is_the_mean_of_two():
    values = {"prompt_level_strict_acc,none": 0.5, "inst_level_strict_acc,none": 0.7}
    results = {"results": {"leaderboard_ifeval": values}, "n-shot": {"leaderboard_ifeval": 0}}
    results["configs"] = {}
    scores, errors = leaderboard.collect(results, "IFEval")
    assert scores == pytest.approx({"IFEval": 60, "normalized/IFEval": 60}) and errors == {}


def read_task(path: str) -> dict:
    """A YAML file of the harness, with the files that it includes; functions are left out."""

    class Loader(yaml.SafeLoader):
        pass

    Loader.add_multi_constructor("!", lambda *_: None)
    config = yaml.load(Path(path).read_text(), Loader)
    if "include" in config:
        config = read_task(Path(path).parent / config["include"]) | config
    return config


def test_the_harness_has_every_task_and_metric():
    """Names, metrics and shots of the benchmarks against the installed harness's own files."""
    from lm_eval.tasks import TaskManager

    index = TaskManager().task_index
    for task, shots, metrics in leaderboard.BENCHMARKS.values():
        config = read_task(index[task].yaml_path)
        listed = config.get("metric_list", config.get("aggregate_metric_list"))
        names = {metric["metric"] for metric in listed}
        if task == "leaderboard_math_hard":  # the paper's metric is only that of the subtasks
            names |= {
                m["metric"] for m in read_task(index[config["task"][0]].yaml_path)["metric_list"]
            }
        assert {metric.split(",")[0] for metric in metrics} <= names, task
        if task in leaderboard.SET_SHOTS:
            continue
        for subtask in config["task"] if isinstance(config["task"], list) else [task]:
            assert read_task(index[subtask].yaml_path).get("num_fewshot", 0) == shots, subtask
            has_guess = subtask.startswith(tuple(leaderboard.GUESSING))
            assert has_guess != subtask.startswith("leaderboard_bbh_"), subtask
    bbh = read_task(index["leaderboard_bbh"].yaml_path)["task"]
    choices = {task: len(read_task(index[task].yaml_path)["doc_to_choice"]) for task in bbh}
    assert len(choices) == 24 and min(choices.values()) == 2
    assert choices["leaderboard_bbh_object_counting"] == 19


def test_ifeval_without_its_tokenizer_is_found_out_first(tmp_path, monkeypatch):
    import nltk

    monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])
    manager = SimpleNamespace(load=lambda tasks: None)
    leaderboard.check_data(manager, ["GSM8K"])
    with pytest.raises(InputError, match="IFEval needs nltk's punkt_tab"):
        leaderboard.check_data(manager, ["GSM8K", "IFEval"])


def test_a_leaderboard_of_other_weights_is_refused(model_folder, other_folder, tmp_path):
    path, model = tmp_path / "leaderboard.json", str(model_folder)
    settings = {"GSM8K": {"shots": 5, "apply_chat_template": False}}
    assert leaderboard.read_finished(path, model, settings)["scores"] == {}
    write(tmp_path, model_folder, "leaderboard", {"GSM8K": 1.0}, settings=settings)
    assert leaderboard.read_finished(path, model, settings)["scores"] == {"GSM8K": 1.0}
    with pytest.raises(InputError, match="holds results of another model"):
        leaderboard.read_finished(path, str(other_folder), settings)
    other = {"GSM8K": settings["GSM8K"] | {"apply_chat_template": True}}
    with pytest.raises(InputError, match="GSM8K with .*False.*True.*another --output_dir"):
        leaderboard.read_finished(path, model, other)
    assert leaderboard.read_finished(path, model, {"BBH": {}})["scores"] == {"GSM8K": 1.0}
    digests = {"GSM8K": settings["GSM8K"] | {"chat template": "0"}}
    with pytest.raises(InputError, match="GSM8K with .*'chat template': '0'"):
        leaderboard.read_finished(path, model, digests)


def test_the_date_reaches_the_vllm_of_the_harness(tmp_path, monkeypatch):
    """lm_eval's vLLM applies the template that it found when it was made, and not its tokenizer's
    of now."""
    import lm_eval.api.registry

    source = Path(lm_eval.__file__).parent / "models" / "vllm_causallms.py"  # needs vllm
    assert "chat_template=self.hf_chat_template" in source.read_text()
    today = make_tokenizer("{{ strftime_now('%d %b %Y') }}" + CHATML)
    make_model("llama").save_pretrained(tmp_path / "dated")
    today.save_pretrained(tmp_path / "dated")
    fake = SimpleNamespace(tokenizer=today, hf_chat_template=today.chat_template)
    monkeypatch.setattr(lm_eval.api.registry, "get_model", lambda name: lambda **options: fake)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(leaderboard, "check_data", lambda *args: None)
    monkeypatch.setattr(lm_eval, "simple_evaluate", lambda **options: None)
    flags = ["--engine", "vllm", "--benchmarks", "GSM8K", "--output_dir", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["leaderboard", str(tmp_path / "dated"), *flags])
    leaderboard.main()
    options = {"chat_template": fake.hf_chat_template, "tokenize": False}
    text = today.apply_chat_template([{"role": "user", "content": "hi"}], **options)
    assert text.startswith("26 Jul 2024<|im_start|>user\nhi")


def test_leaderboard_without_vllm_or_a_template(tmp_path, monkeypatch):
    make_model("llama").save_pretrained(tmp_path / "plain")
    make_tokenizer(chat_template=None).save_pretrained(tmp_path / "plain")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for flags, message in (
        (["--engine", "vllm"], "vLLM is not installed. It needs an environment of its own"),
        (["--apply_chat_template", "true"], "plain has no chat template"),
    ):
        args = [str(tmp_path / "plain"), "--output_dir", str(tmp_path / "results"), *flags]
        monkeypatch.setattr(sys, "argv", ["leaderboard", *args])
        with pytest.raises(InputError, match=message):
            leaderboard.main()


def test_leaderboard_without_its_data(model_folder, tmp_path, monkeypatch):
    args = [str(model_folder), "--output_dir", str(tmp_path), "--benchmarks", "GSM8K"]
    monkeypatch.setattr(sys, "argv", ["leaderboard", *args])
    with pytest.raises(InputError, match="the data of GSM8K cannot be loaded"):  # without a hub
        leaderboard.main()
