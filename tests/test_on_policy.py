"""Pairs of a model's own answers, and the scorers that choose them: against values by hand, plain
transformers and the scorer itself."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from conftest import TINY, make_tokenizer
from transformers import AutoConfig, AutoModelForSequenceClassification

import eval.generate as generate_module
from eval import on_policy
from eval.generate import load_prompts
from eval.on_policy import choose_pair
from eval.score import load_scorer, summary
from runtime.errors import InputError

DEMO = Path(__file__).parent.parent / "demo"
ROWS = {
    name: [json.loads(line) for line in (DEMO / f"{name}.jsonl").open()]
    for name in ("train", "heldout", "prompts", "new_prompts")
}
ANSWERS = [
    {"prompt": [{"role": "user", "content": question}], "answer": answer}
    for question, answer in [("hi", "a"), ("two plus two?", "four, I think"), ("you", "ab")]
]


# ---- The choice of pairs -------------------------------------------------------------------------


def test_best_and_worst():
    answers = [("b", True), ("cut", False), ("d", True), ("", True), ("f", True), ("g", True)]
    row = choose_pair("p", answers, [0.2, 9.0, 0.5, -9.0, 0.5, 0.2])
    assert (row["prompt"], row["chosen"], row["rejected"]) == ("p", "d", "b")  # the first of equals
    assert (row["chosen_score"], row["rejected_score"]) == (0.5, 0.2)
    assert row["samples"] == ["b", "cut", "d", "", "f", "g"]
    assert row["scores"] == [0.2, 9.0, 0.5, -9.0, 0.5, 0.2]
    assert row["finished"] == [True, False, True, True, True, True]


def test_ties_and_unfinished_answers():
    two = [("a", True), ("b", True)]
    assert choose_pair("p", two, [1.0, 1.0]) == "tie"
    assert choose_pair("p", two, [1.0, 0.75], min_gap=0.3) == "tie"
    assert choose_pair("p", two, [1.0, 0.75], min_gap=0.25)["chosen"] == "a"
    assert choose_pair("p", [("a", True), ("b", False)], [1.0, 0.0]) == "unfinished"


@pytest.fixture
def run(model_folder, tmp_path, monkeypatch, capsys):
    """The command on a tiny model, six prompts and a scorer in a file: run(output, flags)."""
    rows = [{"prompt": f"question {n}" + " more" * (n % 3)} for n in range(6)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "scorer.py").write_text(
        "def score(answers):\n    return [len(a['answer']) for a in answers]\n"
        "def nan(answers):\n    return [float('nan')] * len(answers)\n"
        "def few(answers):\n    return [1.0]\n"
    )
    # A random model rarely ends an answer itself: one that is cut counts as finished.
    load_engine = generate_module.load_engine

    def load_finishing(*args):
        engine = load_engine(*args)
        return lambda *a, **k: [(text, True) for text, _ in engine(*a, **k)]

    load_finishing.cache_clear = load_engine.cache_clear
    monkeypatch.setattr(generate_module, "load_engine", load_finishing)

    def command(output: str, function: str = "score", flags: tuple = ()) -> str:
        argv = ["on_policy", str(model_folder), "--data", str(tmp_path / "prompts.jsonl")]
        argv += ["--samples", "3", "--score", f"{tmp_path / 'scorer.py'}:{function}"]
        argv += ["--output", str(tmp_path / output), "--max_new_tokens", "6", "--batch_size", "4"]
        monkeypatch.setattr(sys, "argv", [*argv, *flags])
        on_policy.main()
        return capsys.readouterr().out

    return command


def test_command(run, tmp_path):
    printed = run("pairs.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "pairs.jsonl").open()]
    assert 0 < len(rows) <= 6 and f"{len(rows)} pairs of 6 prompts with 3 answers each" in printed
    assert f"dropped: {6 - len(rows)} with equal scores" in printed
    for row in rows:
        assert row["scores"] == [len(text) for text in row["samples"]]
        assert row["chosen_score"] == max(row["scores"]) > min(row["scores"])
        assert row["chosen"] in row["samples"] and len(row["rejected"]) == row["rejected_score"]
    assert len({text for row in rows for text in row["samples"]}) > len(rows)  # samples differ


def test_an_interrupted_sampling_goes_on_to_the_same_pairs(run, tmp_path, monkeypatch):
    run("whole.jsonl")
    finishing, calls = generate_module.load_engine, []

    def load_stopping(*args):
        engine = finishing(*args)

        def stop(*a, **k):
            calls.append(a)
            if len(calls) == 3:
                raise KeyboardInterrupt
            return engine(*a, **k)

        return stop

    load_stopping.cache_clear = finishing.cache_clear
    monkeypatch.setattr(generate_module, "load_engine", load_stopping)
    with pytest.raises(KeyboardInterrupt):
        run("stopped.jsonl")
    kept = (tmp_path / "stopped.answers.jsonl").read_text().splitlines()
    assert len(kept) == 1 + 8 and not (tmp_path / "stopped.jsonl").exists()
    run("stopped.jsonl")
    assert len(calls) == 3 + 3  # 18 answers in batches of 4: two before, three after
    for name in ("{}.jsonl", "{}.answers.jsonl"):
        whole, stopped = ((tmp_path / name.format(n)).read_text() for n in ("whole", "stopped"))
        assert whole == stopped


@pytest.mark.parametrize(
    "function, flags, message",
    [
        ("nan", (), "to the prompt 'question 0' is nan; a score must be a finite number"),
        ("few", (), "returned 1 scores for 18 answers"),
        ("other", (), "has no function other"),
        ("score", ("--min_gap", "1e9"), "6 have equal scores or less than --min_gap apart (raise"),
        ("score", ("--samples", "1"), "--samples of at least 2"),
        ("score", ("--temperature", "0"), "--temperature above 0"),
        ("score", ("--output", "pairs.csv"), "must end with .jsonl"),
        ("score", ("--score", "absent.py:score"), "there is no file absent.py"),
    ],
)
def test_errors(run, function, flags, message):
    with pytest.raises(InputError, match=re.escape(message)):
        run("pairs.jsonl", function, flags)


def test_prompts(tmp_path):
    path = tmp_path / "rows.jsonl"
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    pair = {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"}
    for rows, prompts in [
        ([{"prompt": "one"}, {"prompt": "two"}], ["one", "two"]),
        ([{"prompt": messages}], [messages]),
        ([pair], ["\n\nHuman: q\n\nAssistant:"]),
        ([{"prompt": "one", "responses": ["a", "b", "c"]}], ["one"]),
        ([{"responses": [[*messages, {"role": "assistant", "content": "a"}]]}], [messages]),
    ]:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        assert load_prompts(str(path)) == prompts
    path.write_text("".join(json.dumps({"prompt": str(n)}) + "\n" for n in range(6)))
    assert load_prompts(str(path), 3) == ["0", "2", "4"]
    for rows in ([{"prompt": "one"}, {"prompt": " "}], [{"prompt": "one"}, {"question": "two"}]):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        with pytest.raises(
            InputError, match=r"rows.jsonl, row 1: .*\{\"prompt\": text or messages"
        ):
            load_prompts(str(path))
    other = json.dumps(pair | {"rejected": "\n\nHuman: other\n\nAssistant: b"}) + "\n"
    path.write_text(other + json.dumps(pair) + "\n")
    assert load_prompts(str(path)) == ["\n\nHuman: q\n\nAssistant:"]
    path.write_text(other)
    with pytest.raises(InputError, match="answers in every row are to different prompts"):
        load_prompts(str(path))
    path.write_text(json.dumps({"prompt": " ", "chosen": "a", "rejected": "b"}) + "\n")
    with pytest.raises(InputError, match="rows.jsonl, row 0: an empty prompt or answer"):
        load_prompts(str(path))


# ---- Scorers -------------------------------------------------------------------------------------


def save_classifier(folder: Path, **changes) -> None:
    """A tiny random Llama with a head of one output and its tokenizer."""
    values = TINY | {"num_labels": 1, "num_key_value_heads": 2} | changes
    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", **values)
    model = AutoModelForSequenceClassification.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)


@pytest.mark.parametrize("pad", [1, None])
def test_reward_model(tmp_path, pad):
    """Scores in batches are those of a plain forward, one conversation at a time."""
    save_classifier(tmp_path, pad_token_id=pad)
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    tokenizer, expected = make_tokenizer(), []
    for answer in ANSWERS:
        messages = [*answer["prompt"], {"role": "assistant", "content": answer["answer"]}]
        ids = tokenizer.apply_chat_template(messages, return_tensors="pt", return_dict=False)
        with torch.no_grad():
            expected.append(plain(ids).logits.item())
    assert load_scorer(str(tmp_path), 2)(ANSWERS) == pytest.approx(expected, abs=1e-5)
    assert load_scorer(str(tmp_path), 1)(ANSWERS) == pytest.approx(expected, abs=1e-5)
    assert len({round(value, 3) for value in expected}) == 3


def test_reward_models_that_are_none(tmp_path, model_folder):
    with pytest.raises(InputError, match="a reward model is a ForSequenceClassification with one"):
        load_scorer(str(model_folder))
    save_classifier(tmp_path / "two", num_labels=2)
    with pytest.raises(InputError, match="with 2 outputs"):
        load_scorer(str(tmp_path / "two"))
    save_classifier(tmp_path / "one", max_position_embeddings=20)
    with pytest.raises(InputError, match=r"the prompt 'two plus two\?' has \d+ tokens"):
        load_scorer(str(tmp_path / "one"))(ANSWERS)
    make_tokenizer(chat_template=None).save_pretrained(tmp_path / "one")
    (tmp_path / "one" / "chat_template.jinja").unlink(missing_ok=True)
    with pytest.raises(InputError, match="no chat template"):
        load_scorer(str(tmp_path / "one"))


def test_a_package_that_is_missing(tmp_path):
    (tmp_path / "scorer.py").write_text("import no_such_package\n")
    with pytest.raises(InputError, match="pip install no_such_package"):
        load_scorer(f"{tmp_path}/scorer.py:score")


def test_a_scorer_may_have_dataclasses(tmp_path):
    (tmp_path / "lengths.py").write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\n\n"
        "@dataclass\nclass Rule:\n    factor: float\n\n"
        "def score(answers):\n    return [Rule(2).factor * len(a['answer']) for a in answers]\n"
    )
    assert load_scorer(f"{tmp_path}/lengths.py:score")([{"answer": "abc"}]) == [6.0]


def test_summary():
    answers = [("a b", True), ("a b", True), ("c", False), ("d e f", True)]
    scores, errors = summary(answers, [0.0, 1.0, 0.5, 0.5], 0.3)
    assert scores == {"score": 0.5, "share above 0.3": 0.75, "words": 2.0, "answers": 4} | {
        "share finished": 0.75,
        "share distinct": 0.75,
    }
    # Sample variance 0.5 / 3, over four answers.
    assert errors["score"] == pytest.approx((0.5 / 3 / 4) ** 0.5)


# ---- The demo's prompts and reward ---------------------------------------------------------------


def words(text: str) -> str:
    return re.sub(r"[^a-z0-9 ]", "", text.lower())


def test_the_demos_prompts():
    """No prompt twice, none in both files, and no word of a subject in both: a word counts as
    phrasing if at least ten prompts of either file have it."""
    train, new = ([words(row["prompt"]) for row in ROWS[n]] for n in ("prompts", "new_prompts"))
    assert len(train) >= 400 and len(new) >= 300
    assert len({*train, *new}) == len(train) + len(new)
    sets = [[{*prompt.split()} for prompt in prompts] for prompts in (train, new)]
    common = {w for part in sets for s in part for w in s if sum(w in t for t in part) >= 10}
    short = {"a", "an", "at", "by", "for", "from", "on", "to", "with"}
    both = {w for s in sets[0] for w in s} & {w for s in sets[1] for w in s}
    assert both - common - short == set()


def test_the_demos_reward():
    """The values that vaderSentiment's own documentation gives."""
    texts = ["VADER is smart, handsome, and funny.", "The book was good.", "Today sux!", "A table."]
    scores = load_scorer(f"{DEMO / 'sentiment.py'}:score")([{"answer": text} for text in texts])
    assert scores == pytest.approx([0.8316, 0.4404, -0.4199, 0.0], abs=1e-4)


def test_the_demos_pairs():
    """They are what their own samples say, by the scorer; no held-out prompt is trained on."""
    scorer = load_scorer(f"{DEMO / 'sentiment.py'}:score")
    prompts = [row["prompt"] for name in ("train", "heldout") for row in ROWS[name]]
    assert len({*prompts}) == len(prompts) and {*prompts} <= {r["prompt"] for r in ROWS["prompts"]}
    assert (len(ROWS["train"]), len(ROWS["heldout"])) == (320, 43)
    for row in ROWS["train"] + ROWS["heldout"]:
        scores = scorer([{"prompt": [], "answer": text} for text in row["samples"]])
        assert scores == pytest.approx(row["scores"], abs=1e-9)
        answers = list(zip(row["samples"], row["finished"], strict=True))
        assert choose_pair(row["prompt"], answers, scores, 0.3) == row
        assert row["chosen_score"] >= row["rejected_score"] + 0.3
