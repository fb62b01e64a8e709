"""Rows are trained on as their files say, in the forms that public data have; what would be left
out of a prompt is an error."""

import bz2
import gzip
import json
import lzma
import os
from pathlib import Path

import datasets
import pytest
from conftest import CHATML, make_tokenizer, run
from transformers import AutoTokenizer

from data import load_data, overlaps
from runtime.errors import InputError
from runtime.rows import load_rows
from runtime.weights import load_tokenizer, resolve_model

CHAT = make_tokenizer()
TEXT = {"prompt": "2+2?", "chosen": "4", "rejected": "5"}
ASK = [{"role": "user", "content": "2+2?"}]
TALK = {
    "prompt": ASK,
    "chosen": [{"role": "assistant", "content": "4"}],
    "rejected": [{"role": "assistant", "content": "5"}],
}


def load(source, tokenizer=CHAT, columns: str = "") -> list[list[str]]:
    """[[prompt, chosen, rejected]] as text, the last two without the end of turn."""
    rows = load_data(str(source), tokenizer, 2000, 1000, columns=columns).rows
    found = []
    for row in rows:
        texts = [tokenizer.decode(ids) for ids in (row["prompt"], *row["responses"])]
        assert all(text.endswith("<|im_end|>") for text in texts[1:])
        found.append([texts[0], *(text.removesuffix("<|im_end|>") for text in texts[1:])])
    return found


def chatml(*turns: str) -> str:
    """The prompt of user and assistant in turn, the first of them a system's if it is marked so."""
    text, roles = "", ["user", "assistant"]
    for number, turn in enumerate(turns):
        role = "system" if turn.startswith("SYSTEM ") else roles[number % 2]
        if role == "system":
            roles.reverse()
        text += f"<|im_start|>{role}\n{turn.removeprefix('SYSTEM ')}<|im_end|>\n"
    return text + "<|im_start|>assistant\n"


def write(path: Path, rows: list) -> Path:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n")
    return path


# ---- JSON: each row is what it says --------------------------------------------------------------

ANSWERS = [
    '"Paris"',
    "line\\nbreak",
    "4",
    "null",
    "true",
    '{"a": 1}',
    "[1, 2]",
    "2024-01-01",
    "1e5",
]
ANSWERS += ['[{"role": "assistant", "content": "Hi"}]', "2024-01-02 10:00:00", " ", "\u2028"]


@pytest.mark.parametrize("form", [".jsonl", ".json", ".jsonl.gz", ".json.gz"])
def test_text_that_looks_like_something_else(tmp_path, form):
    """Beside rows of messages, in every order, and in each form of JSON."""
    answers = [answer for answer in ANSWERS if answer.strip()]
    rows = [TEXT | {"chosen": answer} for answer in answers]
    rows = [TALK, *rows[:4], TALK | {"score": 1}, *rows[4:], TALK | {"score": "good", "x": [{}]}]
    text = "\n".join(map(json.dumps, rows))
    if ".jsonl" not in form:
        text = json.dumps(rows, indent=1)
    path = tmp_path / f"rows{form}"
    path.write_bytes(gzip.compress(text.encode()) if form.endswith(".gz") else text.encode())
    found = load(path)
    assert [row[1] for row in found if row[1] != "4"] == [a for a in answers if a != "4"]
    assert {(row[0], row[2]) for row in found} == {(chatml("2+2?"), "5")}
    assert len(found) == len(rows)
    assert load_rows(str(path))[5] == TALK | {"score": 1}  # and no key of another row


def test_a_form_that_comes_late(tmp_path):
    """After more than the 10 MiB from which datasets guesses its types."""
    rows = [TEXT | {"note": "x" * 2**20}] * 12 + [TALK | {"note": None}, TEXT | {"chosen": "04"}]
    assert [row[1] for row in load(write(tmp_path / "rows.jsonl", rows))] == ["4"] * 13 + ["04"]


BAD_JSON = {
    "a list": ("[1]", "line 3 is not a JSON object"),
    "a key twice": ('{"prompt": "a", "prompt": "b"}', "line 3 .*the key 'prompt' is there twice"),
    "deep in it": ('{"chosen": [{"role": 1, "role": 2}]}', "line 3 .* 'role' is there twice"),
    "half of a pair": ('{"prompt": "\\ud83d"}', "line 3 is not valid JSON .*surrogates"),
    "two objects": ("{} {}", "line 3 is"),
    "an object and more": ('{"a": 1} x', "line 3 is not valid JSON .Extra data"),
    "nothing in it": ("{}", "line 3 is an empty object"),
    "cut off": ('{"prompt": "a', "line 3 is not valid JSON"),
    "a nest": ('{"a":' * 100_000, "line 3 is not valid JSON"),
}


@pytest.mark.parametrize("name", BAD_JSON)
def test_bad_json_is_an_error_that_names_the_line(tmp_path, name):
    text, message = BAD_JSON[name]
    path = write(tmp_path / "rows.jsonl", [TEXT, "", text, TEXT])
    with pytest.raises(InputError, match=f"rows.jsonl: cannot be read: {message}"):
        load_rows(str(path))


@pytest.mark.parametrize(
    "text, message",
    [
        ('[{"a": 1}\n {"a": 2}]', "line 2 is not valid JSON .Expecting ',' delimiter"),
        ('[{"a": 1},\n\n,{"a": 2}]', "line 3 is not valid JSON"),
        ('[\n{"a": 1},\n{"a": }]', "line 3 is not valid JSON"),
        ('[{"a": 1}', "line 1 is not valid JSON"),
        ('[{"a": 1},]', "line 1 is not valid JSON"),
        ("[]", "has no rows"),
        (
            '[{"a": 1},\n{"a": 1, "a": 2}]',
            "the list is not valid JSON .the key 'a' is there twice.$",
        ),
        ('[{"a": "\\ud800"}]', "the list is not valid JSON "),
        ('[{"a": 1}, 5]', "entry 1 is not a JSON object"),
    ],
)
def test_a_bad_array_is_an_error(tmp_path, text, message):
    (tmp_path / "rows.json").write_text(text)
    with pytest.raises(InputError, match=message):
        load_rows(str(tmp_path / "rows.json"))
    (tmp_path / "rows.json").write_text(json.dumps([TEXT]))  # nothing is left of it
    assert len(load_rows(str(tmp_path / "rows.json"))) == 1


# ---- Tables --------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix, separator", [(".csv", ","), (".tsv", "\t"), (".csv.gz", ",")])
def test_cells_are_text(tmp_path, suffix, separator):
    rows = [["", "prompt", "chosen", "rejected", "score"]]
    rows += [["0", "2+2?", "04", "None", "1"], ["1", "2+2?", "4.0", "nan", ""]]
    text = "\n".join(map(separator.join, rows)) + "\n"
    path = tmp_path / f"rows{suffix}"
    path.write_bytes(gzip.compress(text.encode()) if suffix.endswith(".gz") else text.encode())
    prompt = chatml("2+2?")
    assert load(path) == [[prompt, "04", "None"], [prompt, "4.0", "nan"]]
    assert [row["score"] for row in load_rows(str(path))] == ["1", ""]


@pytest.mark.parametrize(
    "lines, said",
    [
        (["q,a, and c,b"], "line 2: 4 cells, but 3 columns; separate cells by ',', and quote"),
        (["q,a,b", "q,a,b,"], "line 3: 4 cells, but 3 columns"),
        (["q,a,b", "", '"q\n?",a,b', "q,a"], "line 6: 2 cells, but 3 columns"),
        (["q,a,b", 'q,"a \\"b\\", c",d'], "line 3: ',' expected after '\"'"),
        (['q,"a,b'], "line 2: unexpected end of data"),
        (["q,a\rb,c"], "line 2: new-line character seen in unquoted field"),
    ],
)
def test_cells_that_are_not_where_they_should_be_are_an_error(tmp_path, lines, said):
    path = tmp_path / "rows.csv"
    path.write_bytes("\n".join(["prompt,chosen,rejected", *lines]).encode())
    with pytest.raises(InputError) as error:
        load(path)
    assert f"{path}: cannot be read: {said}" in str(error.value)


def test_a_table_may_have_quotes_blank_lines_and_long_cells(tmp_path):
    path, long = tmp_path / "rows.csv", "a" * 200_000
    text = f'\ufeffprompt,chosen,rejected\r\n"q ""x"", y\nz",{long},b\r\n\r\n   \r\nq,c,d'
    path.write_bytes(text.encode())
    rows = [*load_rows(str(path))]
    assert rows == [
        {"prompt": 'q "x", y\nz', "chosen": long, "rejected": "b"},
        {"prompt": "q", "chosen": "c", "rejected": "d"},
    ]
    path.write_text("prompt,chosen,rejected,chosen\nq,a,b,c\n")
    with pytest.raises(InputError, match="line 1: the column 'chosen' is there twice"):
        load_rows(str(path))


def test_blanks_around_the_names_of_columns_are_none(tmp_path):
    (tmp_path / "rows.csv").write_text("prompt, chosen ,rejected\n2+2?,4,5\n")
    assert load(tmp_path / "rows.csv") == [[chatml("2+2?"), "4", "5"]]


def test_an_array_may_begin_on_a_later_line(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text("\n \n" + json.dumps([TEXT, TEXT], indent=1))
    assert len(load(path)) == 2
    path.write_text(json.dumps({"data": [TEXT]}, indent=1))
    with pytest.raises(InputError, match="line 1 is not .*: write one object a line, or one list"):
        load(path)


@pytest.mark.parametrize("after", ['[{"prompt": "q"}]', '{"prompt": "q"}', "}", "x"])
def test_nothing_after_a_list_is_left_unread(tmp_path, after):
    path = tmp_path / "rows.json"
    path.write_text(f"[{json.dumps(TEXT)}]\n{after}\n")
    with pytest.raises(InputError, match="line 2 is not valid JSON .Extra data"):
        load_rows(str(path))


def test_files_that_hold_no_rows_are_named(tmp_path):
    pointer, empty = tmp_path / "rows.jsonl", tmp_path / "rows.parquet"
    pointer.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 1\n")
    with pytest.raises(InputError, match="Git LFS's pointer"):
        load_rows(str(pointer))
    datasets.Dataset.from_dict({"prompt": [], "chosen": []}).to_parquet(str(empty))
    with pytest.raises(InputError, match="has no rows"):
        load_rows(str(empty))


@pytest.mark.parametrize("share", ["1.5", "0", "0.0", "-1.5", "50%"])
def test_a_share_that_is_none_is_an_error(tmp_path, share):
    path = write(tmp_path / "rows.jsonl", [TEXT] * 4)
    with pytest.raises(InputError, match=f"a share is above 0 and at most 1, .*, not {share}"):
        load_data(f"{path}:{share}", CHAT, 200, 100)
    assert len(load_data(f"{path}:1.0", CHAT, 200, 100).rows) == 4


@pytest.mark.parametrize("write_it", [json.dumps, repr])
@pytest.mark.parametrize("messages", [TALK["chosen"], TALK["chosen"][0]])
@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_a_conversation_in_a_cell_is_an_error(tmp_path, suffix, messages, write_it):
    text = write_it(messages)
    for column in ("chosen", "prompt"):
        rows = datasets.Dataset.from_list([TEXT, TEXT | {column: text}])
        path = str(tmp_path / f"{column}{suffix}")
        rows.to_csv(path) if suffix == ".csv" else rows.to_parquet(path)
        is_refused(path)


@pytest.mark.parametrize(
    "cells",
    [
        {"prompt": '["Is it?", "And then?"]'},
        {"prompt": "['Is it?' 'And then?']"},
        {"prompt": '["Is it?", null]'},
        {"chosen": '[{"index": 0, "role": "assistant", "content": "a"}]'},
        {"system": '[{"role": "system", "content": "a"}]'},
    ],
)
def test_a_list_in_a_cell_is_an_error(tmp_path, cells):
    (column,) = cells
    rows = [TEXT | {column: TEXT.get(column, "")}, TEXT | cells]
    datasets.Dataset.from_list(rows).to_csv(tmp_path / "rows.csv")
    is_refused(str(tmp_path / "rows.csv"))
    harmless = [TEXT | {"prompt": '["a", "b"] How many? [c]', "chosen": '["4"]'}]
    harmless += [TEXT | {"chosen": '{"name": "Bob", "role": "engineer"}'}]
    datasets.Dataset.from_list(harmless).to_csv(tmp_path / "texts.csv")
    assert len(load(str(tmp_path / "texts.csv"))) == 2


def is_refused(path: str) -> None:
    with pytest.raises(
        InputError, match="row 1: it has conversations that have been written as text"
    ):
        load(path)


# ---- Messages ------------------------------------------------------------------------------------

PARTS = [{"type": "text", "text": "2+"}, {"type": "text", "text": "2?"}]
FORMS = {
    "text parts": TALK | {"prompt": [{"role": "user", "content": PARTS}]},
    "ShareGPT": {
        "conversations": [{"from": "human", "value": "2+2?"}],
        "chosen": {"from": "gpt", "value": "4"},
        "rejected": {"from": "gpt", "value": "5"},
    },
    "ShareGPT's conversations": {
        side: [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": answer}]
        for side, answer in (("chosen", "4"), ("rejected", "5"))
    },
    "one message": TEXT | {"chosen": TALK["chosen"][0], "rejected": TALK["rejected"][0]},
    "a struct of lists": TALK | {"prompt": {"role": ["user"], "content": ["2+2?"]}},
    "a prompt that is repeated": TALK
    | {"chosen": ASK + TALK["chosen"], "rejected": ASK + TALK["rejected"]},
    "a text that is repeated": {
        "prompt": " 2+2?\n",
        "chosen": ASK + TALK["chosen"],
        "rejected": ASK + TALK["rejected"],
    },
}


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize("name", FORMS)
def test_the_forms_of_messages(tmp_path, name, suffix):
    path = write(tmp_path / "rows.jsonl", [FORMS[name]])
    if suffix == ".parquet":
        path = tmp_path / "rows.parquet"
        datasets.Dataset.from_list([FORMS[name]]).to_parquet(path)
    assert load(path) == [[chatml("2+2?"), "4", "5"]]


def test_an_image_in_a_message_is_an_error(tmp_path):
    parts = [{"type": "image"}, *PARTS]
    row = TALK | {"prompt": [{"role": "user", "content": parts}]}
    with pytest.raises(InputError, match="in none of the accepted formats"):
        load(write(tmp_path / "rows.jsonl", [row]))


NULLS = [TEXT | {"chosen": None}, TEXT | {"prompt": None}, TEXT | {"rejected": ""}]
NULLS += [TALK | {"chosen": []}, TEXT | {"chosen": None, "rejected": None}]


@pytest.mark.parametrize(
    "row",
    [
        TEXT | {"prompt": [{"role": "user", "content": " "}]},
        TEXT | {"prompt": [{"role": "user", "content": None}]},
        TALK | {"chosen": [*ASK, {"role": "assistant", "content": None}]},
        {side: f"\n\nHuman: \n\nAssistant: {side}" for side in ("chosen", "rejected")},
    ],
)
def test_an_empty_or_null_content_is_an_empty_row(tmp_path, row):
    path = str(write(tmp_path / "rows.jsonl", [TEXT, row]))
    assert "1 of 2 rows dropped (1 empty" in load_data(path, CHAT, 200, 100).report


def test_nulls_are_dropped_and_counted(tmp_path):
    for suffix in (".jsonl", ".parquet"):
        rows, path = [*NULLS[:3], NULLS[4], TEXT], str(tmp_path / f"rows{suffix}")
        if suffix == ".jsonl":
            rows.append(NULLS[3])
            write(Path(path), rows)
        else:
            datasets.Dataset.from_list(rows).to_parquet(path)
        data = load_data(path, CHAT, 200, 100)
        dropped = len(rows) - 1
        assert f"{dropped} of {len(rows)} rows dropped ({dropped} empty" in data.report
    with pytest.raises(InputError, match="row 0: in none of the accepted formats"):
        load(write(tmp_path / "none.jsonl", [{"prompt": "a", "chosen": "b"}]))


# ---- Columns -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "more",
    [
        {"input": "bonjour"},
        {"context": "Anna did it."},
        {"functions": [{"name": "f"}]},
        {"chat_history": [{"role": "user", "content": "Before that?"}]},
        {"messages": [*ASK, {"role": "assistant", "content": "Hi"}, *ASK]},
        # Quoted in an answer, or a part of a word of the prompt, it is not in the prompt.
        {"input": "4"},
        {"context": "2"} | {"prompt": "What is 22?"},
        {"messages": [{"role": "user", "content": "2"}]},
        {"schema": "CREATE TABLE t"},
        {"conversation": [{"role": "user", "content": "Before that?"}]},
        {"messages": [*ASK, {"role": "assistant", "content": None}]},
    ],
)
def test_what_other_code_would_put_into_the_prompt_is_an_error(tmp_path, more):
    name = next(iter(more))
    path = str(write(tmp_path / "rows.jsonl", [TEXT | more]))
    with pytest.raises(
        InputError, match=f"column '{name}' is not used: .*; --columns {name}= leaves"
    ):
        load(path)
    for harmless in (
        {name: None},
        {name: ""},
        {name: " "},
        {name: TEXT["prompt"]} if name == "input" else {},
    ):
        assert load(write(tmp_path / "rows.jsonl", [TEXT | harmless])) == load(
            write(tmp_path / "text.jsonl", [TEXT])
        )


LABELED = {"prompt": "2+2?", "a": "4", "b": "5", "label": 0}  # as in SHP, PKU, the arenas


def test_a_label_beside_answers_that_are_named_is_an_error(tmp_path):
    """Or half of the pairs would be the wrong way round."""
    path = str(write(tmp_path / "rows.jsonl", [LABELED]))
    with pytest.raises(
        InputError, match="row 0: its column 'label' may say which answer is better"
    ):
        load(path, columns="chosen=a,rejected=b")
    assert load(path, columns="chosen=a,rejected=b,label=") == [[chatml("2+2?"), "4", "5"]]
    for more, columns in (({"label": 0}, "chosen=chosen"), ({"Winner": ""}, "rejected=other")):
        row = TEXT | {"other": "5"} | more
        named = str(write(tmp_path / "named.jsonl", [row]))
        assert load(named, columns=columns) == [[chatml("2+2?"), "4", "5"]]
    with pytest.raises(InputError, match="its column 'Winner' may say"):
        load(write(tmp_path / "w.jsonl", [LABELED | {"Winner": 1}]), columns="chosen=a,label=")


def test_responses_that_are_not_in_the_order_of_their_scores_are_an_error(tmp_path):
    row = {"prompt": "2+2?", "responses": ["4", "5"]}
    for scores in ([3.0, -1.0], [1, 1], None, [1.0, None], ["b", "a"], []):
        path = write(tmp_path / "rows.jsonl", [row | {"rewards": scores, "ratings": [1, 2, 3]}])
        assert load(path) == [[chatml("2+2?"), "4", "5"]]
    write(path, [row | {"rewards": [-1.0, 3.0]}])
    with pytest.raises(InputError, match="best first, are not in the order of their scores"):
        load(path)


def test_columns_that_are_not_read_are_named(tmp_path):
    first = str(write(tmp_path / "a.jsonl", [TEXT | {"score": 1, "margin": 2, "sql": "x"}]))
    second = str(write(tmp_path / "b.jsonl", [TEXT | {"score": 1, "code": ""}]))
    report = load_data(f"{first},{second}", CHAT, 200, 100, columns="sql=").report
    assert report.endswith("; columns that training does not read: score, margin, code")
    report = load_data(first, CHAT, 200, 100, numbers=["margin"]).report
    assert report.endswith("; columns that training does not read: score, sql")
    assert (
        "does not read"
        not in load_data(str(write(tmp_path / "c.jsonl", [TEXT])), CHAT, 200, 100).report
    )


def test_columns_can_be_exchanged(tmp_path):
    path = str(write(tmp_path / "rows.jsonl", [TEXT]))
    swapped = load_data(path, CHAT, 200, 100, columns="chosen=rejected,rejected=chosen")
    (row,), (other,) = load_data(path, CHAT, 200, 100).rows, swapped.rows
    assert row["responses"] == other["responses"][::-1] and row["prompt"] == other["prompt"]
    with pytest.raises(InputError, match="--columns: 'chosen' is there twice"):
        load_data(path, CHAT, 200, 100, columns="chosen=rejected,chosen=prompt")


FRENCH = "SYSTEM Answer in French."
SYSTEMS = {
    "beside text": TEXT | {"system": "Answer in French."},
    "by another name": TEXT | {"system_prompt": "Answer in French."},
    "beside messages": TALK | {"system": "Answer in French."},
    "as a list": TALK | {"system": [{"role": "system", "content": "Answer in French."}]},
    "there already": TALK
    | {"prompt": [{"role": "system", "content": "Answer in French."}, *ASK]}
    | {"system": " Answer in French.\n"},
}


def test_what_is_in_the_prompt_already_is_no_error(tmp_path):
    rows = [
        TEXT | {"input": "2+2"},
        {"prompt": "What  is\n2+2?", "question": "what is 2+2?", "chosen": "4", "rejected": "5"},
        TEXT | {"question": 12, "schema": 1.5},
        TEXT | {"messages": [*ASK, {"role": "assistant", "content": "4"}]},
        TEXT | {"prompt": "", "conversations": [{"from": "human", "value": "2+2?"}]},
    ]
    prompts = ["2+2?", "What  is\n2+2?", *["2+2?"] * 3]
    assert load(write(tmp_path / "rows.jsonl", rows)) == [[chatml(p), "4", "5"] for p in prompts]


def test_names_of_columns_may_have_spaces(tmp_path):
    row = {"The Prompt": "2+2?", "Good Answer": "4", "bad": "5"}
    columns = "prompt = The Prompt, chosen=Good Answer,rejected=bad"
    path = str(write(tmp_path / "rows.jsonl", [row]))
    assert len(load_data(path, CHAT, 200, 100, columns=columns).rows) == 1


def test_a_source_that_is_no_name_is_one_line(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        load("x" * 300)


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_system_prompt_is_a_message(tmp_path, name):
    found = load(write(tmp_path / "rows.jsonl", [SYSTEMS[name]]))
    assert found == [[chatml(FRENCH, "2+2?"), "4", "5"]]


def test_an_empty_system_prompt_is_none(tmp_path):
    for system in ("", None, [], " \n"):
        assert load(write(tmp_path / "rows.jsonl", [TEXT | {"system": system}])) == [
            [chatml("2+2?"), "4", "5"]
        ]


HH = {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"}
REFUSED = {
    name: (
        TEXT | {name: ["a"]},
        f"its column '{name}' is not used: .*; --columns {name}= leaves it out",
    )
    for name in ("images", "history", "documents", "videos", "chat_template_kwargs")
}
REFUSED |= {
    "another system": (
        TALK | {"system": "a", "prompt": [{"role": "system", "content": "b"}, *ASK]},
        "the system prompt of its column and that of its messages differ",
    ),
    "a system in HH": (HH | {"system": "a"}, "a system prompt or tools, beside a dialogue"),
    "a list of texts as system": (
        TEXT | {"system": ["In French."]},
        "its system prompt is no text",
    ),
    "two messages as system": (TEXT | {"system": [*ASK, *ASK]}, "its system prompt is no text"),
    "a number as system": (TEXT | {"system": 5}, "its system prompt is no text"),
    "calls of tools in a message": (
        TALK | {"prompt": [{**ASK[0], "function_calls": "f()"}]},
        "in none of the accepted formats.* and prompt\\[0\\] is ",
    ),
    "an answer that is begun, in HH": (
        TEXT | {"prompt": "\n\nHuman: a\n\nAssistant: Sure,"},
        "a prompt in HH's form .* nothing follows its last 'Assistant:'",
    ),
    "HH without its line breaks": (
        TEXT | {"prompt": "Human: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"},
        "a prompt in HH's form begins with two line breaks",
    ),
    "an answer that is begun": (
        TEXT | {"prompt": [*ASK, {"role": "assistant", "content": "Sure,"}]},
        "in none of the accepted formats.* its prompt ends with the assistant's message",
    ),
    "a text that is not repeated": (
        FORMS["a text that is repeated"] | {"prompt": "3+3?"},
        "its column 'prompt' is not used: .*; --columns prompt= leaves it out",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_nothing_of_a_prompt_is_left_out(tmp_path, name):
    """Unless it is wanted."""
    row, message = REFUSED[name]
    path = write(tmp_path / "rows.jsonl", [TEXT, row])
    with pytest.raises(InputError, match=f"rows.jsonl, row 1: {message}"):
        load(path)
    column = "system" if "system" in name else name
    if column in row:
        assert len(load(path, columns=f"{column}=")) == 2


TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
WITH_TOOLS = (
    "{% if tools %}[{% for t in tools %}{{ t.function.name }}{% endfor %}]{% endif %}" + CHATML
)


@pytest.mark.parametrize("row", [TEXT, TALK], ids=["text", "messages"])
def test_tools_reach_the_template(tmp_path, row):
    path = write(tmp_path / "rows.jsonl", [row, row | {"tools": TOOLS}])
    as_json = write(
        tmp_path / "json.jsonl", [row | {"tools": ""}, row | {"tools": json.dumps(TOOLS)}]
    )
    tokenizer, prompt = make_tokenizer(WITH_TOOLS), chatml("2+2?")
    assert load(path, tokenizer) == [[prompt, "4", "5"], [f"[add]{prompt}", "4", "5"]]
    with pytest.raises(InputError, match="row 1: the template does not show its tools: --columns"):
        load(path)
    assert load(path, columns="tools=") == [[prompt, "4", "5"]] * 2
    assert load(as_json, tokenizer) == load(path, tokenizer)


def test_columns_of_other_names(tmp_path):
    row = {"question": "2+2?", "good": "4", "bad": "5", "prompt": "ignored", "history": ["a"]}
    path = write(tmp_path / "rows.jsonl", [row])
    names = "prompt=question, chosen=good, rejected=bad, history="
    assert load(path, columns=names) == [[chatml("2+2?"), "4", "5"]]
    with pytest.raises(
        InputError, match="row 0: there is no column 'better'; the columns are question, good"
    ):
        load(path, columns=names.replace("good", "better"))
    with pytest.raises(InputError, match="--columns: 'chosen' is not of the form NAME=COLUMN"):
        load(path, columns="chosen")


THINKS = "{% if enable_thinking is not defined or enable_thinking %}Think!{% endif %}" + CHATML


def test_a_variable_of_the_template(base, model_folder, tmp_path):
    """It reaches training, and the exported template has it."""
    (tmp_path / "template.jinja").write_text(THINKS)
    template, path = str(tmp_path / "template.jinja"), write(tmp_path / "rows.jsonl", [TEXT])
    start = load_tokenizer(str(model_folder), template)
    off = load_tokenizer(str(model_folder), template, "enable_thinking=false")
    assert load(path, start)[0][0] == f"Think!{chatml('2+2?')}"
    assert load(path, off)[0][0] == chatml("2+2?")
    values = base | {"max_steps": 1, "chat_template": template, "eval_data": ""}
    run(values | {"template_args": "enable_thinking=false"}, tmp_path / "run")
    final = AutoTokenizer.from_pretrained(tmp_path / "run" / "final")
    rendered = final.apply_chat_template(ASK, tokenize=False, add_generation_prompt=True)
    assert rendered == chatml("2+2?")
    for wrong, said in (
        ("enable_thnking=true", "has no variable"),
        ("enable_thinking=", "must be"),
    ):
        with pytest.raises(InputError, match=f"template_args: .*{said}"):
            load_tokenizer(str(model_folder), template, wrong)


# ---- Sources -------------------------------------------------------------------------------------


def test_a_pattern_is_its_files_by_name(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for number in (2, 1, 3):
        write(tmp_path / f"part{number}.jsonl", [TEXT | {"chosen": f"0{number}"}])
    for source in (f"{tmp_path}/part*.jsonl", "~/part*.jsonl", "~/part1.jsonl,~/part[23].jsonl"):
        assert [row[1] for row in load(source)] == ["01", "02", "03"]
    with pytest.raises(InputError, match="no file matches"):
        load(f"{tmp_path}/none*.jsonl")


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_a_clone_of_a_data_set_of_the_hub(tmp_path, form):
    """Whose JSON is read as any other."""
    rows = [TALK, TEXT | {"chosen": '"4"'}] if form == "jsonl" else [TALK]
    for split, count in (("train", len(rows)), ("test", 1)):
        path = tmp_path / "data" / f"{split}-00000-of-00001.{form}"
        path.parent.mkdir(exist_ok=True)
        if form == "jsonl":
            write(path, rows[-count:])
        else:
            datasets.Dataset.from_list(rows).to_parquet(path)
    (tmp_path / "dataset_infos.json").write_text("{}")  # as older ones have
    answers = ["4", '"4"'] if form == "jsonl" else ["4"]
    assert [row[1] for row in load(tmp_path)] == answers
    assert [row[1] for row in load(f"{tmp_path}:test")] == answers[-1:]
    with pytest.raises(InputError, match="cannot be read: .*dev"):
        load(f"{tmp_path}:dev")


SUFFIXES = [".jsonl.gz", ".csv.gz", ".jsonl.xz", ".csv.bz2", ".jsonl", ".parquet"]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_folder_whose_file_changes_is_read_anew(tmp_path, suffix):
    """Of the same size and time; datasets keeps what it unpacks by the path alone."""
    path = tmp_path / "pairs" / f"train{suffix}"
    path.parent.mkdir()
    for answer in "46":
        row = TEXT | {"chosen": answer}
        text = json.dumps(row) + "\n"
        if "csv" in suffix:
            text = ",".join(row) + "\n" + ",".join(row.values()) + "\n"
        if suffix == ".parquet":
            path.unlink(missing_ok=True)
            datasets.Dataset.from_list([row]).to_parquet(str(path))
        else:
            pack = {"gz": gzip, "xz": lzma, "z2": bz2}.get(suffix[-2:])
            path.write_bytes(pack.compress(text.encode()) if pack else text.encode())
        os.utime(path, (10**9, 10**9))
        for source in (path.parent, f"{path.parent}:train"):
            assert load(source) == [[chatml("2+2?"), answer, "5"]]


def test_a_folder_whose_splits_are_exchanged_is_read_anew(tmp_path):
    """The files are the same."""
    for name in "46":
        rows = datasets.Dataset.from_list([TEXT | {"chosen": name}])
        rows.to_parquet(str(tmp_path / f"{name}.parquet"))
    for train, test in ("46", "64", "46"):
        splits = {"train": f"{train}.parquet", "test": f"{test}.parquet"}
        files = [{"split": split, "path": path} for split, path in splits.items()]
        configs = {"configs": [{"config_name": "default", "data_files": files}]}
        (tmp_path / "README.md").write_text(f"---\n{json.dumps(configs)}\n---\n")
        assert [load(tmp_path)[0][1], load(f"{tmp_path}:test")[0][1]] == [train, test]


def test_another_packing_is_named(tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(b"\x28\xb5\x2f\xfd" + bytes(20))
    with pytest.raises(InputError, match="rows.jsonl is packed by zip, zstd or lz4: unpack it"):
        load(tmp_path / "rows.jsonl")


def test_a_folder_of_several_configs_says_how_to_choose(tmp_path):
    for name in ("one", "two"):
        write(tmp_path / f"{name}.jsonl", [TEXT])
    configs = "".join(f"- config_name: {n}\n  data_files: {n}.jsonl\n" for n in ("one", "two"))
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    with pytest.raises(InputError, match=f"'two'.*: write {tmp_path}:CONFIG:SPLIT"):
        load(tmp_path)
    assert len(load(f"{tmp_path}:two:train")) == 1


def test_what_is_no_source(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "ok.jsonl", [TEXT])
    with pytest.raises(InputError, match="a file has no splits: leave out ':train'"):
        load("ok.jsonl:train")
    for name in ("json", "csv", "text", "parquet"):  # would read all files that are here
        with pytest.raises(InputError, match=f"{name}: cannot be read: this is a file format"):
            load(name)


# ---- The end of an answer, and rows that are there twice -----------------------------------------


def test_every_token_that_ends_an_answer_is_one(tmp_path, model_folder):
    """Of the model's generation config, too: one within an answer drops the row, one at its end is
    not followed by another."""
    rows = [TEXT | {"chosen": answer} for answer in ("a</s> b", "a</s>", "b<|im_end|></s>\n")]
    path = write(tmp_path / "rows.jsonl", rows)
    data = load_data(str(path), load_tokenizer(str(model_folder)), 200, 100)
    assert "1 end of turn inside" in data.report and list(data.rows["row"]) == [1, 2]
    assert [row["responses"][0][-1] for row in data.rows] == [3, 3]
    assert all(1 not in row["responses"][0] for row in data.rows)


def test_overlaps_by_hand(tmp_path):
    rows = [TEXT, TEXT | {"chosen": "5", "rejected": "4"}, TEXT, TEXT | {"prompt": "a"}, TALK]
    train = load_data(str(write(tmp_path / "train.jsonl", rows)), CHAT, 200, 100)
    others = [TEXT | {"chosen": "6"}, TEXT | {"prompt": "new"}]
    heldout = load_data(str(write(tmp_path / "heldout.jsonl", others)), CHAT, 200, 100)
    said = "2 rows are repeated, 1 pairs are also there the other way round"
    assert overlaps(train, None) == said
    assert overlaps(train, heldout) == f"{said}; 1 of 2 held-out prompts are also in training"
    heldout.rows = datasets.concatenate_datasets([heldout.rows, heldout.rows])
    again = "2 of 4 held-out prompts are also in training, 2 repeat another one: intervals, which"
    assert f"{said}; {again} count all, are too narrow" == overlaps(train, heldout)


# ---- What a second reader found ------------------------------------------------------------------


def test_a_dialogue_beside_a_plain_answer_is_dropped(tmp_path):
    """Whichever of the two it is."""
    for row in (HH | {"rejected": "c"}, HH | {"chosen": "c"}):
        path = str(write(tmp_path / "rows.jsonl", [TEXT, {"prompt": "a"} | row]))
        report = load_data(path, CHAT, 200, 100, columns="").report
        assert "1 of 2 rows dropped" in report and "1 different prompts" in report


def test_a_prompt_beside_dialogues_that_do_not_have_it_is_an_error(tmp_path):
    sides = {side: f"\n\nHuman: x\n\nAssistant: {side}" for side in ("chosen", "rejected")}
    for prompt in ("You are a pirate.", "\n\nHuman: k\n\nAssistant:", ASK):
        path = str(write(tmp_path / "rows.jsonl", [sides | {"prompt": prompt}]))
        with pytest.raises(InputError, match="its column 'prompt' is not used"):
            load(path)
    for prompt in ("x", "\n\nHuman: x\n\nAssistant:", None):
        assert load(write(tmp_path / "rows.jsonl", [sides | {"prompt": prompt}]))


def test_responses_that_are_named_are_taken(tmp_path):
    path = str(write(tmp_path / "rows.jsonl", [TEXT | {"gens": ["r1", "r2", "r3"]}]))
    (row,) = load_data(path, CHAT, 200, 100, columns="responses=gens").rows
    assert [CHAT.decode(ids) for ids in row["responses"]] == [f"r{n}<|im_end|>" for n in (1, 2, 3)]


def test_a_folder_has_no_revisions(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pairs").mkdir()
    write(tmp_path / "pairs" / "train.jsonl", [TEXT])
    assert len(load("pairs")) == 1
    write(tmp_path / "pairs" / "train.jsonl", [TEXT, TEXT])
    assert len(load("pairs")) == 2  # not what it was
    for name in ("pairs@main", "pairs@0123:train"):
        with pytest.raises(InputError, match="pairs is a folder, which has no revisions"):
            load(name)
    with pytest.raises(InputError, match="a folder has no revisions"):
        resolve_model("pairs@main")


def test_cells_in_a_folder_are_text_too(tmp_path):
    (tmp_path / "pairs").mkdir()
    text = "prompt,chosen,rejected\nq,None,007\n"
    (tmp_path / "pairs" / "train.csv").write_text(text)
    (tmp_path / "pairs.csv").write_text(text)
    assert load(tmp_path / "pairs") == load(tmp_path / "pairs.csv") != []
    with pytest.raises(InputError, match="it has no split 'test': train"):
        load(f"{tmp_path / 'pairs'}:test")


def test_system_prompts_by_any_name(tmp_path):
    for name in ("system", "system_prompt", "system_message"):
        (row,) = load(write(tmp_path / "rows.jsonl", [TEXT | {name: "Be brief."}]))
        assert "Be brief." in row[0]
    both = TEXT | {"system": "Be brief.", "system_message": "Be long."}
    with pytest.raises(InputError, match="two of its columns have different system prompts"):
        load(write(tmp_path / "rows.jsonl", [both]))


def test_a_column_that_repeats_the_row_is_no_error(tmp_path):
    more = [{"role": "user", "content": TEXT["prompt"]}]
    more += [{"role": "assistant", "content": TEXT["chosen"]}]
    for name, value in (("messages", more), ("context", more[:1]), ("images", [None])):
        assert load(write(tmp_path / "rows.jsonl", [TEXT | {name: value}]))
