"""data.py against literal expectations: what is written here was worked out by hand, not by running
data.py."""

import dataclasses
import gzip
import heapq
import inspect
import json
import os
import pkgutil
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from conftest import CHATML, make_tokenizer, run_python
from filelock import FileLock
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
from transformers import PreTrainedTokenizerFast

import data
import runtime.rows
from data import (
    DataSet,
    Schedule,
    fit,
    load_data,
    pack,
    row_length,
    spread_rows,
    step_indices,
    truncate,
    without_oldest_turn,
)
from runtime.errors import InputError
from runtime.rows import load_rows
from runtime.weights import load_tokenizer, tokenizer_digests
from train import Config

CHAT, PLAIN = make_tokenizer(), make_tokenizer(None)
TEXT = {"prompt": "what is two?", "chosen": "plus", "rejected": "what"}
# Tokens are written with a dot between them.
USER, END, HEADER = "<|im_start|>·us·er·\n·", "·<|im_end|>·\n·", "<|im_start|>·assistant·\n"
QUESTION = "what· is· two·?"
PROMPT = USER + QUESTION + END + HEADER  # of 13 tokens


def message(role, text):
    return [{"role": role, "content": text}]


@pytest.fixture
def write(tmp_path):
    """Rows (or raw text) → the path of a file that holds them."""

    def write(rows, name="rows.jsonl"):
        text = rows if isinstance(rows, str) else "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / name).write_text(text, encoding="utf-8")
        return str(tmp_path / name)

    return write


def load(sources, tokenizer=CHAT, max_length=200, max_prompt_length=100):
    """The pairs as [prompt, chosen, rejected], each as its tokens with a dot between them."""
    rows = load_data(sources, tokenizer, max_length, max_prompt_length).rows
    return [
        ["·".join(map(tokenizer.decode, part)) for part in (row["prompt"], *row["responses"])]
        for row in rows
    ]


def make_rows(*rows: tuple) -> datasets.Dataset:
    """Rows of token ids, each of a prompt and its responses, as those of a DataSet."""
    return datasets.Dataset.from_list(
        [
            {"prompt": p, "responses": [*rest], "lengths": [*map(len, (p, *rest))], "columns": []}
            for p, *rest in rows
        ]
    )


# ---- Row formats ---------------------------------------------------------------------------------

HH = "\n\nHuman: what?\n\nAssistant: plus two\n\nHuman: what is two?\n\nAssistant:"
Q, PLUS, WHAT = (
    message("user", "what is two?"),
    message("assistant", "plus"),
    message("assistant", "what"),
)
TURNS = message("user", "what?") + message("assistant", "plus two") + Q
TURNS_PROMPT = USER + "what·?" + END + HEADER + "·plus· two" + END + PROMPT
SYSTEM, SYSTEM_PROMPT = (
    message("system", "what?") + Q,
    "<|im_start|>·s·yst·em·\n·what·?" + END + PROMPT,
)
IMPLICIT = {"chosen": Q + PLUS, "rejected": Q + WHAT}
EXTRA = {
    "prompt_id": "7f",
    "messages": Q + PLUS,
    "score_chosen": 8.5,
    "source": "a",
    "row": "b",
    "status": None,
}
ROWS = {
    "text": (TEXT, PROMPT),
    "messages, text answers": ({"prompt": Q, "chosen": "plus", "rejected": "what"}, PROMPT),
    "messages, message answers": ({"prompt": Q, "chosen": PLUS, "rejected": WHAT}, PROMPT),
    "implicit": (IMPLICIT, PROMPT),
    "implicit, prompt messages repeated": ({"prompt": Q} | IMPLICIT, PROMPT),
    "system": ({"chosen": SYSTEM + PLUS, "rejected": SYSTEM + WHAT}, SYSTEM_PROMPT),
    "as ultrafeedback": (
        {"prompt": "what is two?", "chosen": SYSTEM + PLUS, "rejected": SYSTEM + WHAT} | EXTRA,
        SYSTEM_PROMPT,
    ),
    "turns": ({"prompt": TURNS, "chosen": "plus", "rejected": "what"}, TURNS_PROMPT),
    "turns, implicit": ({"chosen": TURNS + PLUS, "rejected": TURNS + WHAT}, TURNS_PROMPT),
    "HH, text answers": ({"prompt": HH, "chosen": "plus", "rejected": "what"}, TURNS_PROMPT),
    # The space after "Assistant:" belongs to HH's notation: the earlier turns lose it, so must the
    # answer.
    "HH": ({"chosen": HH + " plus", "rejected": HH + " what"}, TURNS_PROMPT),
}


@pytest.mark.parametrize("row, prompt", ROWS.values(), ids=ROWS)
def test_row_formats_with_a_chat_template(write, row, prompt):
    assert load(write([row])) == [[prompt, "plus·<|im_end|>", "what·<|im_end|>"]]


def test_text_keeps_its_blanks(write):
    """Only HH's dialogues, in whose notation they stand, lose them."""
    row = {"prompt": " what?\n", "chosen": "\n plus", "rejected": "what "}
    prompt = USER + " ·what·?·\n" + END + HEADER
    assert load(write([row])) == [[prompt, "\n· plus·<|im_end|>", "what· ·<|im_end|>"]]


def test_null_keys_of_a_message_are_not_there(write):
    """As datasets writes them where only some messages of a file have calls of tools."""
    nulls = {"tool_calls": None, "reasoning_content": None, "name": None}
    row = {"chosen": Q + [PLUS[0] | nulls], "rejected": Q + [WHAT[0] | nulls]}
    assert load(write([row])) == [[PROMPT, "plus·<|im_end|>", "what·<|im_end|>"]]


HH_PROMPT = "\n·\n·Human·:· ·what·?·\n·\n·Assistant·:· plus· two·"
HH_PROMPT += "\n·\n·Human·:· ·what· is· two·?·\n·\n·Assistant·:"
PLAIN_ROWS = {
    "text": (TEXT, QUESTION, "plus·</s>"),
    "HH": ({"chosen": HH + " plus", "rejected": HH + " what"}, HH_PROMPT, " plus·</s>"),
    "messages become HH's form": (
        {"prompt": TURNS, "chosen": "plus", "rejected": "what"},
        HH_PROMPT,
        " plus·</s>",
    ),
}


@pytest.mark.parametrize("row, prompt, chosen", PLAIN_ROWS.values(), ids=PLAIN_ROWS)
def test_row_formats_without_a_chat_template(write, row, prompt, chosen):
    assert load(write([row]), PLAIN)[0][:2] == [prompt, chosen]


# ---- Sources -------------------------------------------------------------------------------------


@pytest.mark.parametrize("gz", ["", ".gz"])
@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_every_file_type(tmp_path, suffix, gz):
    rows, path = (
        datasets.Dataset.from_list([TEXT, TEXT | {"chosen": 'a, "b"\nGröße 日本'}]),
        tmp_path / f"rows{suffix}",
    )
    {".csv": rows.to_csv, ".parquet": rows.to_parquet}.get(suffix, rows.to_json)(path)
    if suffix == ".json":
        path.write_text(json.dumps(rows.to_list(), indent=1))
    if gz and suffix == ".parquet":  # compressed already
        with pytest.raises(InputError, match="its type is not"):
            path.rename(path.with_name(path.name + gz))
            load_rows(str(path) + gz)
        return
    if gz:
        path.with_name(path.name + gz).write_bytes(gzip.compress(path.read_bytes()))
    assert list(load_rows(str(path) + gz)) == [TEXT, TEXT | {"chosen": 'a, "b"\nGröße 日本'}]


LOOKALIKES = [
    ("numbers.csv", "prompt,chosen,rejected\nwhat?,4,5\n", ["4", "5"]),
    ("words.csv", "prompt,chosen,rejected\nwhat?,None,N/A\nwhat?,a,b\n", ["None", "N/A"]),
]


@pytest.mark.parametrize("name, text, answers", LOOKALIKES, ids=["numbers", "words"])
def test_answers_that_look_like_something_else_stay_text(write, name, text, answers):
    assert [part.replace("·", "") for part in load(write(text, name), PLAIN)[0][1:]] == [
        f"{answer}</s>" for answer in answers
    ]


FOLDERS = {"one": 1, "both": 1, "both:test_prefs": 2, "numpy": 1}


@pytest.mark.parametrize("name, expected", FOLDERS.items())
def test_folders_and_their_splits(tmp_path, monkeypatch, name, expected):
    monkeypatch.chdir(tmp_path)
    one = datasets.Dataset.from_list([IMPLICIT])
    one.save_to_disk("one")
    one.with_format("numpy").save_to_disk("numpy")
    datasets.DatasetDict(
        {"train": one, "test_prefs": datasets.concatenate_datasets([one, one])}
    ).save_to_disk("both")
    assert load(name) == [[PROMPT, "plus·<|im_end|>", "what·<|im_end|>"]] * expected


@pytest.mark.parametrize(
    "source, names, revision, split",
    [
        ("user/name", ("user/name",), None, "train"),
        ("user/name:test", ("user/name",), None, "test"),
        ("user/name:config:test", ("user/name", "config"), None, "test"),
        ("user/name@v1.0:config:test", ("user/name", "config"), "v1.0", "test"),
        ("user/name@refs/pr/3", ("user/name",), "refs/pr/3", "train"),
    ],
)
def test_a_hub_id_has_a_revision_a_config_and_a_split(
    monkeypatch, write, source, names, revision, split
):
    rows = datasets.load_dataset("json", data_files=write([TEXT]))["train"]
    asked, commit = [], "0123456789abcdef0123456789abcdef01234567"
    files = SimpleNamespace(data_files={"any": [f"hf://datasets/user/name@{commit}/a.csv"]})

    def load_dataset_builder(*args, revision):
        asked.extend([args, revision])
        prepare = SimpleNamespace(download_and_prepare=lambda: asked.append("prepared"))
        as_dataset = lambda split: asked.append(split) or rows  # noqa: E731
        return SimpleNamespace(config=files, as_dataset=as_dataset, **vars(prepare))

    monkeypatch.setattr(datasets, "load_dataset_builder", load_dataset_builder)
    runtime.rows.hub_builder.cache_clear()
    found = load_rows(source)
    assert list(found) == [TEXT] and found._fingerprint == rows._fingerprint
    assert asked == [names, revision, "prepared", split]
    assert runtime.rows.hub_commits(f"{source},{write([TEXT])},demo/a.jsonl") == {source: commit}
    assert len(asked) == 4


def test_rows_that_are_replaced_lose_what_was_the_old_ones():
    """A loss that asks for the reference would otherwise read another row's."""
    found = DataSet(make_rows(*PAIRS))
    found.reference, found.first = torch.zeros(len(found.rows), 2), {}
    before, longest = found.fingerprint, found.longest
    found.rows = found.rows.select([0])
    assert found.reference is None and found.first is None
    assert "reference" not in found.pack([0]).columns
    assert found.fingerprint != before and found.longest <= longest
    assert found.costs.shape == (1,)


def test_a_share_of_a_source_is_always_the_same_one(write, tmp_path):
    numbered = [TEXT | {"prompt": str(n)} for n in range(40)]
    source, other = write(numbered), write([TEXT], "other.jsonl")

    def drawn(sources):
        return [*load_data(sources, CHAT, 200, 100).rows["row"]]

    half = drawn(f"{source}:0.5")
    assert len(half) == 20 and half == sorted({*half}) != [*range(20)]
    assert drawn(f"{source}:0.5") == half  # as for every run and evaluation
    assert drawn(f"{source}:.05,{other}")[2:] == [0]
    for share, rest, count in (
        ("0.9", "-0.1", 36),
        ("0.0375", "-0.9625", 2),
        ("0.66", "-0.34", 26),
    ):
        first = drawn(f"{source}:{share}")
        assert len(first) == count
        assert sorted(first + drawn(f"{source}:{rest}")) == [*range(40)]
    report = load_data(f"{source}:0.25", CHAT, 200, 100).report
    assert "10 pairs from" in report and "0 of 10 rows dropped" in report
    for nothing in (f"{source}:0.001", f"{source}:0.5,{other}:0.5", f"{tmp_path}/*.jsonl:0.5"):
        with pytest.raises(InputError, match=r"jsonl:0\.\d+ takes no row: the source has"):
            drawn(nothing)


def test_a_file_type_in_capitals(write):
    assert list(load_rows(write([TEXT], "ROWS.JSONL"))) == [TEXT]


def test_a_comma_after_the_last_source(write):
    assert len(load(write([TEXT]) + ", ")) == 1


def test_several_sources_of_different_formats_in_order(write):
    first, second = write([TEXT, TEXT | {"chosen": ""}, TEXT]), write([IMPLICIT], "more.jsonl")
    found = load_data(f"{first}, {second}", CHAT, 200, 100)
    rows = found.rows
    assert (list(rows["source"]), list(rows["row"])) == ([first, first, second], [0, 2, 0])
    assert list(rows["lengths"]) == [[13, 2, 2]] * 3
    assert rows[0]["responses"] == rows[2]["responses"]
    assert found.place(2) == f"{second} row 0"
    assert found.report.startswith(
        f"3 pairs from {first}, {second}: 1 of 4 rows dropped (1 empty, "
    )


def test_files_of_the_same_content_keep_their_names(write):
    sources = [write([TEXT], name) for name in ("one.jsonl", "two.jsonl")]
    assert list(load_data(",".join(sources), CHAT, 200, 100).rows["source"]) == sources


def test_a_file_name_is_not_a_pattern(write):
    write([TEXT, TEXT], "a1.jsonl")
    assert len(load_rows(write([TEXT], "a[1].jsonl"))) == 1


# ---- Tokens --------------------------------------------------------------------------------------

TURN = "{% for m in messages %}{% if m.role == 'assistant' %}ANSWER{% else %}[{{ m.content }}]"
TURN += "{% endif %}{% endfor %}"
TEMPLATES = {
    "ChatML": (CHATML, "<|im_end|>"),
    "ChatML with BOS": ("{{ bos_token }}" + CHATML, "<|im_end|>"),
    "Mistral": (
        "{{ bos_token }}" + TURN.replace("ANSWER", " {{ m.content }}{{ eos_token }}"),
        "</s>",
    ),
    "Zephyr": (TURN.replace("ANSWER", "{{ m.content }}{{ eos_token }}\n"), "</s>"),
    "two ends": (TURN.replace("ANSWER", "{{ m.content | trim }}<|im_end|></s>"), "<|im_end|>"),
    "Llama 2": (
        "{{ bos_token }}" + TURN.replace("ANSWER", " {{ m.content | trim }} {{ eos_token }}"),
        "</s>",
    ),
    "Qwen 3": (
        TURN.replace("ANSWER", "<think>\n\n</think>\n\n{{ m.content }}<|im_end|>\n"),
        "<|im_end|>",
    ),
}


@pytest.mark.parametrize("adds_bos", [False, True])
@pytest.mark.parametrize("template, end", TEMPLATES.values(), ids=TEMPLATES)
def test_ids_are_those_of_the_chat_template(write, template, end, adds_bos):
    tokenizer = make_tokenizer(template, adds_bos)
    assert tokenizer.pad_token == tokenizer.eos_token == "</s>"
    context = (
        message("user", " what is\n\n two? ")
        + message("assistant", "Größe 日本")
        + message("user", "🙂")
    )
    conversation = context + message("assistant", " plus two\n")
    source = write([{"chosen": conversation, "rejected": context + WHAT}])
    row = load_data(source, tokenizer, 200, 100).rows[0]
    prompt = tokenizer.apply_chat_template(
        context, tokenize=True, return_dict=False, add_generation_prompt=True
    )
    whole = tokenizer.apply_chat_template(conversation, tokenize=True, return_dict=False)
    first_end = whole.index(tokenizer.convert_tokens_to_ids(end), len(prompt))
    assert row["prompt"] == prompt and row["responses"][0] == whole[len(prompt) : first_end + 1]


@pytest.mark.parametrize("ending", ["", "END", "END\n", "ENDEND", "END \n END "])
@pytest.mark.parametrize(
    "tokenizer, end", [(CHAT, "<|im_end|>"), (PLAIN, "</s>")], ids=["chat", "plain"]
)
def test_exactly_one_end_of_turn_whatever_the_data_ends_with(write, tokenizer, end, ending):
    assert (
        load(write([TEXT | {"chosen": "plus" + ending.replace("END", end)}]), tokenizer)[0][1]
        == f"plus·{end}"
    )


@pytest.mark.parametrize(
    "template, adds, prompt, expected",
    [
        ("{{ bos_token }}" + CHATML, "<s> $A", "what is two?", "<s>·" + PROMPT),
        (
            CHATML,
            "<s> $A",
            "what is two?",
            PROMPT,
        ),  # without, as the template writes it at inference
        (None, "<s> $A", "what?", "<s>·what·?"),
        (None, "<s> $A </s>", "what?", "<s>·what·?"),
        (None, "<s> $A", "<s>what?", "<s>·what·?"),
        (None, "$A", "<s>what?", "<s>·what·?"),
    ],
)
def test_at_most_one_bos(write, template, adds, prompt, expected):
    tokenizer = make_tokenizer(template)
    special = [("<s>", 0), ("</s>", 1)]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=adds, special_tokens=special
    )
    end = "<|im_end|>" if template else "</s>"
    assert load(write([TEXT | {"prompt": prompt}]), tokenizer) == [
        [expected, f"plus·{end}", f"what·{end}"]
    ]


def test_the_prompt_keeps_its_tokens_where_the_answer_would_merge_with_it(write):
    assert PLAIN.tokenize("Human:") == ["Human", ":"]
    assert load(write([TEXT | {"prompt": "Hu", "chosen": "man:"}]), PLAIN) == [
        ["Hu", "man·:·</s>", "what·</s>"]
    ]


def test_an_answer_that_would_merge_with_a_line_break_too_is_whole(write):
    vocab = {piece: i for i, piece in enumerate(["<unk>", "</s>", "q", "a", "b", "\n", "\n\n"])}
    backend = Tokenizer(models.BPE(vocab, [("\n", "\n")], unk_token="<unk>"))
    backend.add_special_tokens([AddedToken("</s>", special=True, normalized=False)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    row = {"prompt": "q\n", "chosen": "\na", "rejected": "b"}
    found = load_data(write([row]), tokenizer, 200, 100).rows[0]
    parts = [*map(tokenizer.convert_ids_to_tokens, (found["prompt"], *found["responses"]))]
    assert parts == [["q", "\n"], ["\n", "a", "</s>"], ["b", "</s>"]]


@pytest.mark.parametrize(
    "prompt, answer, token", [("2+2=", " 4", " 4"), ("2+2=", "4", "4"), ("2+2= ", "4", "4")]
)
def test_a_tokenizer_like_sentencepiece_adds_no_space_to_the_answer(write, prompt, answer, token):
    """As Llama 2's: a space is written ▁, one is put before every text, and "▁4" is a token."""
    vocab = {piece: i for i, piece in enumerate(["<unk>", "<s>", "</s>", *"▁+=245", "▁4"])}
    backend = Tokenizer(models.BPE(vocab, [("▁", "4")], unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    backend.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in ("<s>", "</s>")]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    prompt_tokens = " ·2·+·2·=" + ("· " if prompt.endswith(" ") else "")
    row = {"prompt": prompt, "chosen": answer, "rejected": "5"}
    assert load(write([row]), tokenizer) == [[prompt_tokens, token + "·</s>", "5·</s>"]]


def test_a_template_may_end_a_prompt_with_the_eos_token(write):
    template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    expected = [["<s>·what· is· two·?·</s>", "plus·</s>", "what·</s>"]]
    assert load(write([TEXT]), make_tokenizer(template)) == expected


def test_a_template_without_an_end_of_turn_token(write):
    """What it writes after an answer is trained, and the tokenizer's EOS."""
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    template += "{% if add_generation_prompt %}assistant: {% endif %}"
    pair = load(write([TEXT]), make_tokenizer(template))[0]
    assert pair[1:] == ["plus·\n·</s>", "what·\n·</s>"]


def test_a_blank_after_a_dialogues_last_header_is_no_text(write):
    row = {"prompt": HH + " ", "chosen": "plus", "rejected": "what"}
    assert load(write([row])) == [[TURNS_PROMPT, "plus·<|im_end|>", "what·<|im_end|>"]]


def test_a_system_message_without_a_chat_template_has_no_name(write):
    row = {"prompt": SYSTEM, "chosen": "plus", "rejected": "what"}
    prompt = "what·?·\n·\n·Human·:· ·what· is· two·?·\n·\n·Assistant·:"
    assert load(write([row]), PLAIN)[0][:2] == [prompt, " plus·</s>"]


# ---- Truncation and what is dropped --------------------------------------------------------------


@pytest.mark.parametrize(
    "pair, max_length, max_prompt_length, expected",
    [
        ([[1, 2, 3, 4], [5, 6, 7], [8]], 5, 3, [[2, 3, 4], [5, 6], [8]]),  # the docstring's
        (
            [[1, 2, 3], [4, 5], [6]],
            5,
            2,
            [[1, 2, 3], [4, 5], [6]],
        ),  # fits exactly, also with a prompt over its limit
        ([[1], [2, 3, 4], [5]], 4, 2, [[1], [2, 3, 4], [5]]),  # also with a response over its limit
        (
            [[1, 2, 3, 4, 5], [6, 7], [8]],
            5,
            3,
            [[3, 4, 5], [6, 7], [8]],
        ),  # cutting the prompt is enough
        (
            [[1, 2, 3, 4], [5], [6, 7, 8]],
            5,
            2,
            [[3, 4], [5], [6, 7, 8]],
        ),  # the rejected one is the longer
        (
            [[1, 2, 3, 4], [5, 6, 7], [8, 9, 10, 11]],
            5,
            3,
            [[2, 3, 4], [5, 6], [8, 9]],
        ),  # prompt and both responses
        (
            [[1], [2, 3, 4, 5, 6], [7]],
            4,
            2,
            [[1], [2, 3], [7]],
        ),  # a short prompt leaves no more room
        (
            [[1, 2, 3, 4], [5, 6], [7, 8]],
            4,
            3,
            [[2, 3, 4], [5], [7]],
        ),  # one response token survives
    ],
)
def test_truncate(pair, max_length, max_prompt_length, expected):
    assert truncate(pair, max_length, max_prompt_length) == expected


LONG = message("user", "what?") + message("assistant", "plus two") + message("user", "two?")
FIRST, LAST = USER + "what·?" + END + HEADER + "·plus· two" + END, USER + "t·wo·?" + END + HEADER
TALK = {"prompt": LONG, "chosen": "plus", "rejected": "what"}  # a prompt of 15 + 12 tokens
RULES = message("system", "plus")
RULED = "<|im_start|>·s·yst·em·\n·plus" + END  # 8 tokens
TALK_HH = "\n\nHuman: what?\n\nAssistant: plus two\n\nHuman: two?\n\nAssistant:"


@pytest.mark.parametrize(
    "row, lengths, expected",
    [
        # The oldest turn goes, and no more than that.
        (TALK, (28, 20), [LAST, "plus·<|im_end|>", "what·<|im_end|>"]),
        (
            TALK | {"prompt": RULES + LONG},
            (36, 20),
            [RULED + LAST, "plus·<|im_end|>", "what·<|im_end|>"],
        ),
        (TALK | {"prompt": TALK_HH}, (28, 20), [LAST, "plus·<|im_end|>", "what·<|im_end|>"]),
        (
            TALK | {"prompt": LONG + message("assistant", "plus") + message("user", "?")},
            (28, 20),  # of three questions, two fit
            [
                LAST + "·plus" + END + USER + "?" + END + HEADER,
                "plus·<|im_end|>",
                "what·<|im_end|>",
            ],
        ),
        # All system messages stay, and what stands before the first question goes alone.
        (
            TALK | {"prompt": RULES + LONG[:1] + message("system", "two?") + LONG[1:]},
            (44, 30),
            [
                RULED + "<|im_start|>·s·yst·em·\n·t·wo·?" + END + LAST,
                "plus·<|im_end|>",
                "what·<|im_end|>",
            ],
        ),
        (
            TALK | {"prompt": message("assistant", "plus two") + LONG},
            (35, 30),
            [FIRST + LAST, "plus·<|im_end|>", "what·<|im_end|>"],
        ),
        # Then the longer response; and since it loses its end, so does the other.
        (TALK | {"chosen": "plus two two two"}, (15, 13), [LAST, "plus· two· two", "what"]),
        (TALK | {"rejected": "what is two two"}, (15, 13), [LAST, "plus", "what· is· two"]),
        (TEXT | {"chosen": "plus two"}, (15, 13), [PROMPT, "plus· two", "what"]),
        # A last question that is too long by itself.
        (TEXT, (14, 12), "1 too long"),
        (TALK | {"prompt": RULES + LONG}, (19, 12), "1 too long"),
    ],
)
def test_fit_takes_no_more_than_it_must(write, row, lengths, expected):
    source = write([row, TEXT | {"prompt": "?"}])
    if isinstance(expected, list):
        assert load(source, CHAT, *lengths)[0] == expected
    else:
        assert expected in load_data(source, CHAT, *lengths).report
        assert len(load(source, CHAT, *lengths)) == 1


def test_fit_keeps_the_most_turns_that_fit():
    """As many as a search from the oldest on keeps, in fewer tokenizations."""
    turns = [m for n in range(40) for m in message("user", f"q{n}") + message("assistant", "a" * n)]
    prompt, calls = message("system", "s") + turns + message("user", "last"), []

    def tokenize(prompt, ended):
        calls.append(len(prompt))
        return [[*"".join(m["content"] for m in prompt)], [*"answer"]]

    for length in (15, 16, 100, 500, 900):
        calls.clear()
        ids = fit(tokenize, prompt, length, 10)
        assert len(calls) <= 8
        shorter = prompt
        while row_length(tokenize(shorter, True)) > length and without_oldest_turn(shorter):
            shorter = without_oldest_turn(shorter)
        start, answer = tokenize(shorter, True)
        assert ids == [start, answer[: length - len(start)]]


def test_fit_keeps_bos_and_tools(write):
    template = "<s>{{ tools or '' }}" + CHATML
    row = {"prompt": LONG, "tools": [{"two": 2}], "chosen": "plus", "rejected": "what"}
    prompt, *_ = load(write([row]), make_tokenizer(template), 40, 30)[0]
    assert prompt.replace("·", "").startswith("<s>[{'two': 2}]<|im_start|>")
    assert prompt.endswith(LAST) and "what" not in prompt
    # Without a template, the dialogue of HH keeps its form, and the tokenizer writes BOS.
    plain = make_tokenizer(None, adds_bos=True)
    prompt, *rest = load(write([TALK | {"prompt": TALK_HH}]), plain, 25, 22)[0]
    assert "".join(prompt.split("·")) == "<s>\n\nHuman: two?\n\nAssistant:"
    assert rest == ["plus·</s>", "what·</s>"]


def test_what_truncation_takes_is_counted(write):
    rows = [
        {"prompt": LONG, "chosen": "plus two two two two", "rejected": "what"},
        {"prompt": LONG, "chosen": "plus", "rejected": "two"},
        {"prompt": "?", "chosen": "plus", "rejected": "two"},
        {"prompt": "?", "chosen": "<s> two", "rejected": "two<|im_end|>"},
    ]
    source = write(rows)
    tokenizer = make_tokenizer("<s>" + CHATML)
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    cases = {
        "fit": "2 prompts lost their beginning (0 of them BOS), and 1, 1 responses their end",
        "paper": "2 prompts lost their beginning (2 of them BOS), and 1, 0 responses their end",
    }
    for truncation, expected in cases.items():
        found = load_data(source, tokenizer, 17, 13, truncation=truncation)
        assert expected in found.report and "50.0% of the pairs truncated" in found.report
        assert "; the texts of 1 contain control tokens" in found.report
    # Without BOS, none is lost.
    report = load_data(source, make_tokenizer(CHATML), 16, 12, truncation="paper").report
    assert "2 prompts lost their beginning (0 of them BOS)" in report
    found = load_data(source, tokenizer, 17, 13, truncation="drop")
    assert "2 too long" in found.report and found.report.endswith("such as <s>")
    assert len(found.rows) == 2 and "0.0% of the pairs truncated;" in found.report
    with pytest.raises(InputError, match="truncation must be paper, fit or drop, not 'left'"):
        load_data(source, tokenizer, 17, 13, truncation="left")


@pytest.mark.parametrize("max_prompt_length", [-1, 0, 8, 9])
def test_impossible_lengths_are_an_error(write, max_prompt_length):
    with pytest.raises(
        InputError, match=rf"max_prompt_length \({max_prompt_length}\) must be .* max_length \(8\)"
    ):
        load(write([TEXT]), CHAT, 8, max_prompt_length)


def test_dropped_and_truncated_rows_are_counted(write):
    rows = [
        TEXT,  # 13 + 2 tokens: fits
        TEXT | {"chosen": ""},
        TEXT | {"rejected": " \n\t\u00a0"},
        TEXT | {"rejected": " <|im_end|>\n<|im_end|> "},
        TEXT | {"rejected": "plus"},
        TEXT | {"chosen": "plus two?", "rejected": "plus two plus"},  # both are cut to "plus two"
        {
            "prompt": "",
            "chosen": "\n\nHuman: a?\n\nAssistant: b",
            "rejected": "\n\nHuman: c?\n\nAssistant: b",
        },
        TEXT | {"chosen": "plus two?"},
    ]
    source = write(rows)
    found = load_data(source, CHAT, 15, 13)
    assert found.report.startswith(f"2 pairs from {source}: 6 of 8 rows dropped (")
    lost = "0 prompts lost their beginning (0 of them BOS), and 1, 1 responses their end"
    assert f"), 50.0% of the pairs truncated: {lost}" in found.report
    counts = {reason: int(n) for n, reason in re.findall(r"(\d+) ([a-z ]+)[,)]", found.report)}
    assert {reason: n for reason, n in counts.items() if n} == {
        "empty": 3,
        "identical": 2,
        "different prompts": 1,
    }
    assert list(found.rows["row"]) == [0, 7] and found.lengths.tolist() == [[13, 2, 2], [13, 2, 1]]
    assert load(source, CHAT, 15, 13)[1] == [PROMPT, "plus· two", "what"]
    with pytest.raises(InputError, match="no pairs are left: 0 pairs from .*: 3 of 3 rows dropped"):
        load(write(rows[1:4]))


# ---- Cache and fingerprint -----------------------------------------------------------------------


def forbid_tokenizing(monkeypatch) -> None:
    """Rows that are not in the cache are an error."""
    original = datasets.Dataset.map

    def tokenizes(*args, **options):
        raise RuntimeError("tokenizes")

    patched = lambda rows, function, **options: original(rows, tokenizes, **options)  # noqa: E731
    monkeypatch.setattr(datasets.Dataset, "map", patched)


def test_the_cache_is_used_but_never_stale(write, monkeypatch):
    source, other_vocabulary = write([TEXT]), make_tokenizer()
    other_vocabulary.add_tokens("two?")
    first = load(source)
    forbid_tokenizing(monkeypatch)
    assert (
        first
        == load(source)
        == load(source, make_tokenizer())
        == [[PROMPT, "plus·<|im_end|>", "what·<|im_end|>"]]
    )
    for changed in [
        (CHAT, 199),
        (CHAT, 200, 99),
        (make_tokenizer(CHATML + " "),),
        (PLAIN,),
        (other_vocabulary,),
    ]:
        with pytest.raises(RuntimeError, match="tokenizes"):
            load(source, *changed)
    write([TEXT | {"chosen": "plux"}])  # the same file name, the same size
    with pytest.raises(RuntimeError, match="tokenizes"):
        load(source)


def edit(monkeypatch, function, old: str, new: str) -> None:
    """As if its file had `new` for `old` in the function's text."""
    text, module = inspect.getsource(function), sys.modules[function.__module__]
    assert text.count(old) == 1
    before = vars(module)[function.__name__]
    exec(compile(text.replace(old, new), module.__file__, "exec"), vars(module))
    after = vars(module)[function.__name__]
    setattr(module, function.__name__, before)
    monkeypatch.setattr(module, function.__name__, after)


@pytest.mark.parametrize(
    "function, old, new",
    [
        (truncate, "prompt[-max_prompt_length:]", "prompt[:max_prompt_length]"),
        (data.tokenize_text, "ids[0] == ids[1]", "ids[0] != ids[1]"),
        (runtime.rows.split_dialogues, '"\\n\\nAssistant:"', '"\\n\\nBot:"'),
        (runtime.rows.as_message, '"system", "user"', '"user"'),
    ],
)
def test_edited_code_tokenizes_anew(write, monkeypatch, function, old, new):
    """But not code with another comment or docstring."""
    source = write([TEXT])
    load(source)
    forbid_tokenizing(monkeypatch)
    load(source)
    with monkeypatch.context() as patch:
        edit(patch, function, '"""\n', '"""  # a comment\n\n\n')
        edit(patch, truncate, "The authors' rule", "A rule")
        load(source)
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="tokenizes"):
        edit(patch, function, old, new)
        load(source)
    load(source)


def test_another_end_token_tokenizes_anew(write):
    source, other = write([TEXT]), make_tokenizer(None)
    other.eos_token = "<|im_end|>"
    assert load(source, PLAIN)[0][1] == "plus·</s>"
    assert load(source, other)[0][1] == "plus·<|im_end|>"


def test_a_file_is_known_by_its_content(write):
    """Not by name, size and time, which a copy can leave unchanged."""
    path = write([TEXT])
    before = os.stat(path)
    assert load_rows(path)[0] == TEXT
    write([TEXT | {"chosen": "plux"}])
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert load_rows(path)[0]["chosen"] == "plux"


def test_a_slow_tokenizer_is_known_by_its_vocabulary():
    def digests(**vocabulary):
        tokenizer = SimpleNamespace(is_fast=False, get_vocab=lambda: vocabulary)
        tokenizer.special_tokens_map, tokenizer.chat_template = {}, None
        return tokenizer_digests(tokenizer)

    assert digests(a=0, b=1) == digests(b=1, a=0) != digests(a=1, b=0)


def test_the_longest_sequence_may_be_of_either_response():
    rows = [([1, 2], [3], [4, 5, 6]), ([7], [8, 9], [10])]
    found = [DataSet(make_rows(*r)).longest for r in (rows, rows[:1], rows[1:])]
    assert found == [5, 5, 3]


def test_what_a_killed_tokenization_left_is_removed(write, tmp_path, monkeypatch):
    monkeypatch.setenv("SIMPER_CACHE", str(tmp_path / "cache"))
    first = load(write([TEXT]))
    (rows,) = tmp_path.glob("cache/tokenized/*/rows.arrow")
    rows.rename(rows.with_name("tmp1234"))
    assert load(write([TEXT])) == first
    assert {path.name for path in rows.parent.iterdir()} == {"rows.arrow", "digests.json"}


def test_one_process_tokenizes_while_the_others_wait(write, tmp_path, monkeypatch):
    monkeypatch.setenv("SIMPER_CACHE", str(tmp_path / "cache"))
    source = write([TEXT])
    load(source)
    (lock,) = tmp_path.glob("cache/tokenized/*.lock")
    with FileLock(lock):
        thread = threading.Thread(target=load, args=[source], daemon=True)
        thread.start()
        thread.join(1)
        assert thread.is_alive()
    thread.join(60)
    assert not thread.is_alive()


def test_many_rows_are_tokenized_by_several_processes(write, monkeypatch):
    monkeypatch.setattr(runtime.rows.os, "cpu_count", lambda: 2)
    rows = [TEXT | {"chosen": f"{number}"} for number in range(5001)]
    found = load_data(write(rows), CHAT, 200, 100)
    assert found.report.startswith("5001 pairs") and list(found.rows["row"]) == [*range(5001)]
    for number in (0, 2500, 2501, 5000):
        assert CHAT.decode(found.rows[number]["responses"][0]) == f"{number}<|im_end|>"


def test_a_folder_is_known_by_its_content(tmp_path):
    """datasets names rows by how they were made: what that reads may have changed."""
    for answer in ("plus", "two"):
        rows = datasets.Dataset.from_list([TEXT | {"chosen": answer}])
        rows._fingerprint = "the same"
        rows.save_to_disk(tmp_path / "folder")
        _, chosen, _ = load(str(tmp_path / "folder"))[0]
        assert chosen.replace("·", "") == f"{answer}<|im_end|>"
        shutil.rmtree(tmp_path / "folder")


def test_a_template_that_writes_the_date_gives_the_same_tokens_every_day(write):
    dated = make_tokenizer("{{ strftime_now('%d %b %Y; %B; %d.%m.%y') }}\n" + CHATML)
    prompt, _, _ = load(write([TEXT]), dated)[0]
    expected = "26 Jul 2024; July; 26.07.24\n<|im_start|>user"
    assert prompt.replace("·", "").startswith(expected)


def test_blank_text_is_empty_text(write):
    rows = [
        TEXT | {column: blank} for column in ("prompt", "chosen") for blank in ("", " ", "\n\t")
    ]
    report = load_data(write([TEXT, *rows]), CHAT, 200, 100).report
    assert "6 of 7 rows dropped (6 empty, " in report


def test_fingerprint_is_of_the_tokens_and_their_order(write):
    def of(*rows):
        return DataSet(make_rows(*rows)).fingerprint

    one, two = ([1, 2], [3, 4], [5]), ([6], [7], [8, 9])
    hashes = [
        of(one, two),
        of(two, one),
        of(one),
        of(one, two, two),
        of(([1], [3, 4], [5]), ([2, 6], [7], [8, 9])),
    ]
    hashes += [
        of(one, ([0], [7], [8, 9])),
        of(one, ([6], [0], [8, 9])),
        of(one, ([6], [7], [8, 0])),
        of(one, ([6], [7, 8], [9])),
        of(([1, 2], [3, 4, 5]), ([6], [7, 8, 9])),
    ]
    assert len(set(hashes)) == 10 and all(re.fullmatch("[0-9a-f]{64}", h) for h in hashes)
    sources = (
        write([TEXT | {"chosen": ""}, TEXT]),
        write([IMPLICIT], "b.jsonl"),
        write([IMPLICIT, TEXT], "c.jsonl"),
    )
    same, equal, longer = (load_data(source, CHAT, 200, 100).fingerprint for source in sources)
    assert same == equal != longer


def test_a_template_that_leaves_out_a_part_of_the_answer_is_an_error(write):
    """As those of reasoning models do with what stands before </think>."""
    split = CHATML.replace("message['content']", "message['content'].split('</think>')[-1]")
    assert split != CHATML
    rows = [{"prompt": "what", "chosen": f"<think>{a}</think> plus", "rejected": a} for a in "ab"]
    with pytest.raises(InputError, match="row 0: the chat template leaves out a part of the answ"):
        load_data(write(rows), make_tokenizer(split), 100, 90)
    assert load_data(write(rows), make_tokenizer(CHATML), 100, 90).rows


def test_mistral_models_keep_their_chat_template(tmp_path, monkeypatch):
    """Where mistral-common is installed, their folders would get its tokenizer, which has none."""
    make_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "mistral"}')
    names = "transformers.models.auto.tokenization_auto.TOKENIZER_MAPPING_NAMES"
    monkeypatch.setitem(pkgutil.resolve_name(names), "mistral", "MistralCommonBackend")
    resolve = "transformers.integrations.mistral.tokenizer.resolve_mistral_format"
    monkeypatch.setattr(resolve, lambda *args, **kwargs: pytest.fail("asks for it"))
    assert load_tokenizer(str(tmp_path)).chat_template == make_tokenizer().chat_template


def test_dialogues_that_the_template_refuses_are_counted(write):
    """Some of HH have one side speak twice, which Gemma's and Mistral's templates do not render."""
    turns = "{% for m in messages %}{% if (m.role == 'user') != (loop.index % 2 == 1) %}"
    turns += "{{ raise_exception('roles must alternate') }}{% endif %}{% endfor %}"
    good = "\n\nHuman: a?\n\nAssistant: b\n\nHuman: c?\n\nAssistant:"
    rows = [
        {"chosen": p + " d", "rejected": p + " e"}
        for p in (good, good.replace("Human: c", "Assistant: c"))
    ]
    report = load_data(write(rows), make_tokenizer(turns + CHATML), 100, 90).report
    assert "1 of 2 rows dropped" in report and "1 refused by template" in report
    assert "0 of 2 rows dropped" in load_data(write(rows), make_tokenizer(), 100, 90).report


# ---- Batches -------------------------------------------------------------------------------------


def test_step_indices_are_pinned():  # every run ever made depends on them
    steps = [step_indices(10, 3, seed=42, step=step) for step in range(5)]
    assert steps == [[5, 6, 0], [7, 3, 2], [4, 9, 1], [0, 8, 7], [4, 3, 1]]


@pytest.mark.parametrize("num_pairs, batch_size", [(10, 3), (12, 4), (5, 5), (7, 1), (1000, 128)])
def test_step_indices_are_a_permutation_in_each_epoch(num_pairs, batch_size):
    steps = num_pairs // batch_size
    epochs = [
        [step_indices(num_pairs, batch_size, 1, epoch * steps + step) for step in range(steps)]
        for epoch in range(3)
    ]
    for epoch in epochs:
        assert all(len(step) == batch_size for step in epoch)
        seen = {i for step in epoch for i in step}
        assert len(seen) == steps * batch_size and seen <= set(range(num_pairs))
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert [step_indices(num_pairs, batch_size, 2, step) for step in range(steps)] != epochs[0]


@pytest.mark.parametrize(
    "tokens, ranks, budget, expected",
    [
        ([5, 3, 4, 4], 2, 8, [[[0, 1], [2, 3]]]),
        ([8, 1, 2, 7], 2, 8, [[[0], [3]], [[2], [1]]]),  # pairs of similar cost run side by side
        ([4, 4, 4], 1, 8, [[[0, 2]], [[1]]]),
        ([1, 1], 3, 10, "2 pairs cannot be spread over 3 ranks"),
        ([3, 11], 1, 10, "a pair of 11 tokens .* micro_batch_tokens=10"),
        ([6, 6, 6], 2, 10, "3 pairs cannot be spread over 2 ranks .* micro_batch_tokens=10"),
    ],
)
def test_spread_rows_literally(tokens, ranks, budget, expected):
    if isinstance(expected, str):
        with pytest.raises(InputError, match=expected):
            spread_rows(range(len(tokens)), tokens, ranks, budget)
    else:
        assert spread_rows(range(len(tokens)), tokens, ranks, budget) == expected
        shifted = [10 * i for i in range(len(tokens))]  # what is spread are indices, not positions
        by_index = dict(zip(shifted, tokens))
        expected = [[[10 * i for i in share] for share in shares] for shares in expected]
        assert spread_rows(shifted, by_index, ranks, budget) == expected


def test_a_whole_data_set_is_spread_in_few_tries_and_as_evenly(monkeypatch):
    """Rows of more than half the budget, and of more than a third, have micro-batches of one and
    two; each try is a pass over all rows."""
    tries, replace = [], heapq.heapreplace
    monkeypatch.setattr(data.heapq, "heapreplace", lambda *args: tries.append(1) or replace(*args))
    draw = np.random.default_rng(0)
    for low, high, least, passes in ((4100, 8000, 4000, 1), (2740, 4000, 2000, 40)):
        tokens = draw.integers(low, high, size=4000)
        spread = spread_rows(range(4000), tokens, 1, 8192)
        loads = [tokens[share].sum() for (share,) in spread]
        assert least <= len(spread) <= 1.02 * least and max(loads) <= 8192
        assert sorted(i for (share,) in spread for i in share) == [*range(4000)]
        assert len(tries) <= passes * 4000
        tries.clear()


def test_other_rows_have_other_lengths():
    """Also where a fork replaces the rows of a data set."""
    found = DataSet(make_rows(*PAIRS))
    before = found.tokens.tolist(), found.fingerprint, found.highest_token
    found.rows = found.rows.select([1])
    assert found.tokens.tolist() == before[0][1:] and found.longest == 3
    assert found.fingerprint != before[1] and found.highest_token == before[2]


def test_the_schedule_of_any_number_of_steps(monkeypatch):
    """Steps are made when they are asked for; one that cannot be spread is found before."""
    made = []
    monkeypatch.setattr(
        data, "spread_rows", lambda i, *rest: made.append(i) or spread_rows(i, *rest)
    )
    tokens = np.array([30, 40, 50, 60, 70, 80])
    config = Config(batch_size=2, num_epochs=10**9, micro_batch_tokens=150)
    schedule = Schedule(tokens, config, ranks=2)
    assert len(schedule) == 3 * 10**9 and made == []
    again = Schedule(tokens, dataclasses.replace(config, num_epochs=1), ranks=2)
    assert [*again] == [schedule[step] for step in range(3)]
    assert {i for (step,) in again for share in step for i in share} == {*range(6)}
    expected = step_indices(6, 2, config.seed, 2_999_999_999)
    assert sorted(sum(schedule[2_999_999_999][0], [])) == sorted(expected)
    with pytest.raises(IndexError):
        schedule[3 * 10**9]
    # A batch of 3 on 2 ranks: one of them has two rows, which may be too much.
    tokens = np.array([30, 40, 50, 55, 60, 60])
    for budget, tried in ((120, False), (119, True)):
        made.clear()
        config = Config(batch_size=3, max_steps=200, micro_batch_tokens=budget)
        Schedule(tokens, config, ranks=2)
        assert len(made) == 200 * tried
    with pytest.raises(InputError, match="3 pairs cannot be spread over 2 ranks"):
        Schedule(tokens, dataclasses.replace(config, micro_batch_tokens=100), ranks=2)
    with pytest.raises(InputError, match="a pair of 60 tokens"):
        Schedule(tokens, dataclasses.replace(config, micro_batch_tokens=59), ranks=2)


PAIRS = [([1, 2], [3, 4], [5]), ([6], [7], [8, 9])]
ONE = [[1, 2, 3, 4, 5], [0, 1, 2, 3, 2], [1, 2, 1], [3, 4, 5], [[2, 1]]]  # MicroBatch's docstring
BOTH = [
    [1, 2, 3, 4, 5, 6, 7, 8, 9],
    [0, 1, 2, 3, 2, 0, 1, 1, 2],
    [1, 2, 1, 5, 5, 7],
    [3, 4, 5, 7, 8, 9],
    [[2, 1], [1, 2]],
]


@pytest.mark.parametrize(
    "number, expected, segments", [(1, ONE, [(2, 2, 1)]), (2, BOTH, [(2, 2, 1), (1, 1, 2)])]
)
def test_pack(number, expected, segments):
    for batch in (
        pack(PAIRS[:number]),
        DataSet(make_rows(*PAIRS[::-1])).pack([1, 0][:number]),
        pack(PAIRS[:number]).to("cpu"),
    ):
        tensors = (
            batch.input_ids,
            batch.position_ids,
            batch.predictors,
            batch.targets,
            batch.lengths,
        )
        assert [tensor.tolist() for tensor in tensors] == expected and batch.segments == segments
        assert {str(tensor.dtype) for tensor in tensors} == {"torch.int64"}


def test_pack_lays_out_the_keys():
    batch = pack(PAIRS)
    tensors = (batch.keys, batch.key_starts, batch.query_starts)
    expected = [[0, 1, 2, 3, 0, 1, 4, 5, 6, 5, 7, 8], [0, 4, 7, 9, 12], [0, 4, 5, 7, 9]]
    assert [tensor.tolist() for tensor in tensors] == expected
    assert [tensor.dtype for tensor in tensors] == [torch.int64, torch.int32, torch.int32]


def test_a_micro_batch_moves_as_a_whole():
    columns = {"reference": torch.zeros(2, 2), "margin": torch.zeros(2)}
    batch = dataclasses.replace(pack(PAIRS), columns=columns)
    moved = batch.to("meta")
    tensors = [v for v in vars(moved).values() if isinstance(v, torch.Tensor)]
    assert len(tensors) == 8 and [*moved.columns] == ["reference", "margin"]
    assert all(tensor.is_meta for tensor in (*tensors, *moved.columns.values()))
    assert moved.segments == batch.segments


# ---- The command line ----------------------------------------------------------------------------


def test_the_command_line_shows_tokens_and_statistics_or_one_line_of_error(write, tmp_path):
    CHAT.save_pretrained(tmp_path / "tokenizer")
    source = write([TEXT, TEXT | {"chosen": "plus plus plus"}, TEXT | {"rejected": ""}])
    flags = ["--num_pairs", "1", "--model", tmp_path / "tokenizer"]
    shown, failed = (
        run_python("-m", "eval.show_pairs", *flags, argument)
        for argument in (source, "nowhere.jsonl")
    )
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.splitlines() == [
        f"{source}, row 0",
        r"  prompt (13 tokens, context): <|im_start|>|us|er|\n|what| is| two|?|<|im_end|>|\n|"
        r"<|im_start|>|assistant|\n",
        "  chosen (2 tokens, scored): plus|<|im_end|>",
        "  rejected (2 tokens, scored): what|<|im_end|>",
        load_data(source, CHAT, 2048, 1800).report,
        "0 rows are repeated, 0 pairs are also there the other way round",
        "tokens        mean  median    95 %     max",
        "prompt          13      13      13      13",
        "chosen           3       3       4       4",
        "rejected         2       2       2       2",
        "pair            18      18      19      19",
    ]
    assert (failed.returncode, failed.stdout) == (1, "") and "Traceback" not in failed.stderr
    assert failed.stderr.splitlines()[-1].startswith(
        "error: nowhere.jsonl: cannot be read: no such file"
    )


def test_an_older_python_is_told_which_one_is_needed():
    code = "import sys, datasets, filelock, torch\nfrom transformers import AutoTokenizer\n"
    code += "sys.version_info = (3, 10, 9)\nimport data"
    root = Path(data.__file__).parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.returncode == 1 and "SimPER needs Python 3.11 or newer" in done.stderr


def test_however_many_bos_a_text_begins_with():
    tokenizer = make_tokenizer(None, adds_bos=True)
    expected = data.tokenize_text(tokenizer, "what?")
    for count in range(4):
        assert data.tokenize_text(tokenizer, "<s>" * count + "what?") == expected
    assert expected.count(0) == 1
