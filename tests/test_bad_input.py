"""Whatever a user gets wrong ends with one message that says what is wrong, where, and what to do;
or the row is dropped and counted. Never NaN, a hang, a bare traceback or silence."""

import codecs
import errno
import gzip
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
import torch
import torch.distributed as dist
import yaml
from conftest import CHATML, TINY, make_model, make_tokenizer
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

import train
from data import load_data
from runtime import checkpoints, log
from runtime.command_line import run_command
from runtime.errors import InputError
from train import parse_args

ROOT = Path(__file__).parent.parent
TEXT = {"prompt": "what is two?", "chosen": "plus", "rejected": "what"}
GOOD = json.dumps(TEXT)


def message(role, content, **more):
    return {"role": role, "content": content} | more


Q, PLUS, WHAT = message("user", "what?"), message("assistant", "plus"), message("assistant", "what")
TURNS = [Q, message("assistant", "two"), Q]

# ---- Rows: (name, the third row of a file, what the message says) ----

FORMATS = ["rows.jsonl, row 2: ", "in none of the accepted formats", '{"prompt": text, "chosen": t']
ROWS = [
    ("other columns", {"question": "?", "answer": "2"}, ["'question': 'str', 'answer': 'str'"]),
    ("numbers", TEXT | {"chosen": 2, "rejected": 3}, ["'chosen': 'int', 'rejected': 'int'"]),
    ("truth values", TEXT | {"chosen": True, "rejected": False}, ["'chosen': 'bool'"]),
    ("one side only", {"prompt": "?", "chosen": "two"}, ["'prompt': 'str', 'chosen': 'str'}"]),
    ("no prompt", {"chosen": "plus", "rejected": "two"}, ["{'chosen': 'str', 'rejected': 'str'}"]),
    ("a nested answer", TEXT | {"chosen": {"text": "plus"}}, ["'chosen': 'dict'"]),
    ("a number as prompt", TEXT | {"prompt": 4}, ["'prompt': 'int'"]),
    ("lists of strings", {"chosen": ["?", "a"], "rejected": ["?", "b"]}, ["'chosen': 'list'"]),
    ("a list of strings as prompt", TEXT | {"prompt": ["?"]}, ["'prompt': 'list'"]),
    ("messages that are lists", {"chosen": [["user", "?"]], "rejected": [["user", "!"]]}, []),
    ("text on one side only", {"prompt": "?", "chosen": [PLUS], "rejected": "b"}, ["'list'"]),
    ("a prompt that ends with an answer", TEXT | {"prompt": [Q, PLUS]}, ["'prompt': 'list'"]),
    ("conversations that end with the user", {"chosen": TURNS, "rejected": TURNS}, ["'list'"]),
    ("answers without any prompt", {"chosen": [PLUS], "rejected": [WHAT]}, ["'chosen': 'list'"]),
    ("an unknown role", {"chosen": [message("human", "?"), PLUS], "rejected": [Q, WHAT]}, []),
    ("a role that is a number", {"chosen": [message(1, "?"), PLUS], "rejected": [Q, WHAT]}, []),
    ("a null role", {"chosen": [message(None, "?"), PLUS], "rejected": [Q, WHAT]}, []),
    (
        "a role that is not known",
        {"chosen": [Q, message("bot", "?")], "rejected": [Q, WHAT]},
        ["chosen[1] is {'role': 'bot'"],
    ),
    (
        "a call of a function, by its older name",
        {"prompt": "?", "chosen": [PLUS | {"function_call": {"name": "f"}}], "rejected": [WHAT]},
        ["chosen[0] is {'role': 'assistant'"],
    ),
    ("no role", {"chosen": [{"content": "?"}, PLUS], "rejected": [Q, WHAT]}, []),
    ("other keys", {"chosen": [{"from": "gpt", "value": "a"}], "rejected": [{"from": "b"}]}, []),
    (
        "contents that are lists, as for images",
        {"prompt": [message("user", [{"type": "text", "text": "?"}])], "chosen": "a"},
        ["'prompt': 'list'"],
    ),
    (
        "a tool's message",
        {"chosen": [Q, message("tool", "4"), PLUS], "rejected": [Q, WHAT]},
        ['"system" or "user" or "assistant"'],
    ),
    (
        "a call of a tool",
        {"chosen": [Q, message("assistant", None, tool_calls=[{"id": 1}])], "rejected": [Q, WHAT]},
        ["'chosen': 'list'"],
    ),
    (
        "a call of a tool beside text",
        {"chosen": [Q, PLUS | {"tool_calls": [{"id": "1"}]}], "rejected": [Q, WHAT]},
        ["'chosen': 'list'", "calls of tools, or reasoning, in keys of their own are not"],
    ),
    (
        "a blank prompt, and answers of unknown roles",
        {"prompt": "", "chosen": [message("gpt", "a")], "rejected": [message("gpt", "b")]},
        ["'chosen': 'list'"],
    ),
    (
        "half a dialogue",
        {"chosen": "\n\nHuman: a", "rejected": "\n\nHuman: b"},
        ["{'chosen': 'str'"],
    ),
]
ROWS += [
    (f"{key} beside the answer", TEXT | {"chosen": [PLUS | {key: "a"}]}, ["'chosen': 'list'"])
    for key in ("reasoning", "reasoning_content", "thinking")
]
HH, ON = "\n\nHuman: a?\n\nAssistant: ", "\n\nHuman: c"
DROPS = [
    ("an empty answer", TEXT | {"chosen": ""}, ["1 empty, "]),
    ("a blank prompt", TEXT | {"prompt": " \n"}, ["1 empty, "]),
    ("no messages", TEXT | {"prompt": []}, ["1 empty, "]),
    ("a null prompt", TEXT | {"prompt": None}, ["1 empty, "]),
    ("a null answer", TEXT | {"rejected": None}, ["1 empty, "]),
    ("the same answers", TEXT | {"chosen": "what"}, ["1 identical"]),
    ("two prompts", {"chosen": [Q, PLUS], "rejected": [Q, *TURNS, WHAT]}, ["1 different prompts"]),
    ("an end of turn inside", TEXT | {"chosen": "a<|im_end|>b"}, ["1 end of turn inside"]),
    ("one inside the other", TEXT | {"rejected": "a<|im_end|>b"}, ["1 end of turn inside"]),
    ("a dialogue on", {"chosen": f"{HH}b{ON}", "rejected": f"{HH}d"}, ["1 different prompts"]),
    ("the other on", {"chosen": f"{HH}b", "rejected": f"{HH}d{ON}"}, ["1 different prompts"]),
]

# ---- Files: (name, file, its bytes or a function that makes it, what the message says) ----

LINES = f"{GOOD}\n{GOOD}\n"
JSON_LINES = (LINES * 40).encode()


def save_parquet(path: Path) -> bytes:
    datasets.Dataset.from_list([TEXT] * 50).to_parquet(path)
    return path.read_bytes()[:-20]


FILES = [
    ("missing", "nowhere.jsonl", None, ["no such file (working directory: "]),
    ("of another type", "rows.txt", LINES.encode(), ["its type is not .jsonl, .json, .csv"]),
    ("empty", "empty.jsonl", b"", ["has no rows"]),
    ("blank", "blank.jsonl", b"\n\n", ["has no rows"]),
    ("empty, compressed", "empty.jsonl.gz", gzip.compress(b""), ["has no rows"]),
    ("an empty list", "rows.json", b"[]", ["has no rows"]),
    ("a head without rows", "head.csv", b"prompt,chosen,rejected\n", ["has no rows"]),
    ("a broken line", "b.jsonl", f"{GOOD}\n\n{{'a':}}\n{GOOD}".encode(), ["line 3 is not valid"]),
    ("a line cut off", "b.jsonl", f'{LINES}{{"prompt": "wh'.encode(), ["line 3 is not valid"]),
    ("a line that is a list", "b.jsonl", f"{LINES}[1]\n".encode(), ["line 3 is not a JSON object"]),
    ("a line that is null", "b.jsonl", f"{LINES}null\n".encode(), ["line 3 is not a JSON object"]),
    ("an empty object", "b.jsonl", f"{LINES}{{}}\n".encode(), ["line 3 is an empty object"]),
    (
        "a bad line after U+2028, which ends no line",
        "b.jsonl",
        f"{GOOD.replace('what', chr(0x2028))}\n{GOOD}\n{{bad\n".encode(),
        ["line 3 is not valid"],
    ),
    (
        "a bad line after a byte order mark",
        "b.jsonl",
        codecs.BOM_UTF8 + f"{LINES}{{bad\n".encode(),
        ["line 3 is not valid"],
    ),
    (
        "a bad line, compressed",
        "b.jsonl.gz",
        gzip.compress(f"{LINES}{{bad\n".encode()),
        ["line 3 is not valid"],
    ),
    (
        "in Latin-1",
        "rows.jsonl",
        LINES.encode() + b'{"prompt": "gr\xfc\xdfe"}\n',
        ["line 3 is not UTF-8"],
    ),
    ("in Latin-1", "rows.csv", b"prompt,chosen,rejected\ngr\xfc\xdfe,a,b\n", ["utf-8"]),
    ("binary", "rows.jsonl", bytes(range(256)) * 9, ["line 1 is not valid JSON"]),
    ("an array of no objects", "rows.json", b"[1, 2]", ["entry 0 is not a JSON object"]),
    ("a single number", "rows.json", b"5", ["rows.json: cannot be read"]),
    ("broken", "rows.json", b'[{"prompt": "a"', ["line 1 is not valid JSON (Expecting"]),
    ("cut off, compressed", "rows.jsonl.gz", gzip.compress(JSON_LINES)[:-30], ["ended before"]),
    ("of random bytes, compressed", "rows.jsonl.gz", b"\x1f\x8b" + bytes(30), ["method"]),
    ("without a head", "rows.csv", b"what?,a,b\nwhat?,c,d\n", ["row 0: ", "'what?': 'str'"]),
    ("with a row too long", "rows.csv", b"prompt,chosen,rejected\n1,2,3\n1,2,3,4\n", ["line 3"]),
    ("cut off", "rows.parquet", save_parquet, ["arquet"]),
    ("compressed twice", "rows.parquet.gz", b"PAR1", ["its type is not"]),
    (
        "a folder of something else",
        "folder",
        lambda path: path.mkdir(),
        ["doesn't contain any data"],
    ),
]
SOURCES = [
    ("nothing", "", ["a source is empty: give a file, a folder or a hub id"]),
    ("a comma", ",", ["a source is empty: give a file, a folder or a hub id"]),
    (
        "two commas",
        "rows.jsonl,,rows.jsonl",
        ["a source is empty: give a file, a folder or a hub id"],
    ),
    ("a hub id", "no-such-user/no-such-data", ["no-such-user/no-such-data: cannot be read: "]),
    ("a hub id's split", "no-such-user/no-such-data:config:test", ["data:config:test: cannot be "]),
    (
        "a folder's split",
        "both:dev",
        ["both:dev: cannot be read: ", "the splits train, test_prefs"],
    ),
    # Held-out data must not turn out to be all of the data.
    ("a folder without splits", "one:dev", ["no split 'dev'", "one of the splits train"]),
]

# ---- Tokenizers and chat templates ----

RAISES = "{% if messages | length > 2 %}{{ raise_exception('roles must alternate') }}{% endif %}"
TEMPLATES = [
    ("a syntax error", "{% for m in messages %}", ["chat template fails", "endfor"]),
    ("an error for every dialogue", "{{ raise_exception('no') }}", ["chat template fails", "no"]),
    ("an error for some", RAISES + CHATML, ["rows.jsonl, row 1: ", "roles must alternate"]),
    (
        "one that drops answers",
        "Question: {{ messages[0].content }}",
        ["the chat template leaves out the answer", "Question"],
    ),
    ("one that is always the same", "Hello", ["the chat template leaves out the answer", "Hello"]),
    ("none, and no EOS token", None, ["neither an EOS token nor a template"]),
]

# ---- The command line ----

POSITIVE = ("batch_size", "num_epochs", "log_every", "replicas")
FLAGS = [
    ("unknown", "--learning_rat 1", ["no option 'learning_rat'; did you mean 'learning_rate'?"]),
    (
        "unknown, far from any",
        "--zzz 1",
        ["the command line: there is no option 'zzz'; see --help"],
    ),
    ("with the spelling of others", "--learning-rate 1", ["did you mean 'learning_rate'?"]),
    ("without a value", "--seed", ["--seed: expected one argument"]),
    ("words as a number", "--batch_size many", ["--batch_size: invalid int value: 'many'"]),
    ("a fraction as an integer", "--batch_size 1.5", ["--batch_size: invalid int value: '1.5'"]),
    ("a word as truth", "--compile perhaps", ["--compile: 'perhaps' is not true or false"]),
    ("a number as truth", "--compile 1", ["--compile: '1' is not true or false"]),
    ("another dtype", "--dtype float16", ["dtype must be one of auto, float32, bfloat16, not flo"]),
    (
        "another wandb",
        "--wandb maybe",
        ["wandb must be one of auto, online, offline, off, trackio, not may"],
    ),
    (
        "a folder as resume",
        "--resume run/checkpoints/step_1",
        ["resume must be one of auto, never, anyway, not run/checkpoints/step_1"],
    ),
    ("no model", "--model=", ["model is needed: give --model"]),
    ("no data", "--model=m --train_data=", ["train_data is needed: give --train_data"]),
    ("no output", "--output_dir=", ["output_dir is needed: give --output_dir"]),
    ("a negative seed", "--seed -1", ["seed must not be negative, not -1"]),
    ("a share above 1", "--warmup_ratio 1.1", ["warmup_ratio must be between 0 and 1, not 1.1"]),
    ("a negative share", "--warmup_ratio -0.1", ["warmup_ratio must be between 0 and 1, not -0.1"]),
    (
        "no recipe",
        "nowhere.yaml",
        ["no recipe nowhere.yaml; those that come with the code are in "],
    ),
    ("a folder as recipe", "recipes", ["no recipe recipes"]),
    ("two recipes", "recipes/demo.yaml recipes/demo.yaml", ["no option 'recipes/demo.yaml'"]),
]
FLAGS += [(f"{n} 0", f"--{n} 0", [f"{n} must be a positive number, not 0"]) for n in POSITIVE]
FLAGS += [
    (f"{name} {value}", f"--{name}={value}", [f"{name} must be", f"not {float(value)}"])
    for name in ("learning_rate", "max_grad_norm", "warmup_ratio")
    for value in ("nan", "inf", "-inf", "-1")
]
FLAGS += [(f"{n} 0", f"--{n} 0", [f"{n} must be", "0"]) for n in ("learning_rate", "max_grad_norm")]
FLAGS += [
    (f"a negative {name}", f"--{name} -1", [f"{name} must not be negative, not -1"])
    for name in ("max_steps", "eval_every", "save_every", "keep_checkpoints")
]
RECIPES = [
    ("with an unknown name", "model: m\nbeta: 2.0\n", ["there is no option 'beta'"]),
    (
        "with a space in a name",
        "learning rate: 1\n",
        ["no option 'learning rate'", "learning_rate"],
    ),
    ("with a name that is a flag", "seed=1: 2\n", ["there is no option 'seed=1'"]),
    ("with a name twice", "seed: 1\nmodel: m\nseed: 2\n", ["seed is there twice"]),
    ("with a wrong value", "batch_size: many\n", ["--batch_size: invalid int value: 'many'"]),
    ("with a list", "train_data: [a.jsonl, b.jsonl]\n", ["train_data must have a single value"]),
    ("with a mapping", "loss_args: {beta: 1}\n", ["loss_args must have a single value"]),
    ("without a mapping", "just text\n", ["must hold `name: value` lines"]),
    ("with a list of names", "- model: m\n", ["must hold `name: value` lines"]),
    ("with a syntax error", "model: m\n  seed: 1\n", ["line 2"]),
    ("with a tab", "model:\n\t- m\n", ["line 2"]),
    ("with two documents", "seed: 1\n---\nseed: 2\n", ["line 2"]),
    (
        "with Python in it",
        "seed: !!python/object/apply:os.getcwd []\n",
        ["seed must have a single value"],
    ),
    ("of bytes", b"\x80\x81\xff", ["utf-8"]),
    ("of zeros", bytes(20), ["unacceptable character"]),
]

# ---- Runs: (name, a function of `place` → flags, what the message says) ----


def nothing(folder: Path) -> None:
    """No change of the folder."""


def model_with(change=nothing, **changes):
    """A copy of the tiny model; change: of its folder; changes: of its config.json."""

    def setup(place) -> dict:
        shutil.copytree(place.model, place.folder / "model")
        file = place.folder / "model" / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))
        change(place.folder / "model")
        return {"model": place.folder / "model"}

    return setup


def held_out(row: dict, **flags):
    def setup(place) -> dict:
        (place.folder / "held.jsonl").write_text(json.dumps(row))
        return flags | {"eval_data": place.folder / "held.jsonl"}

    return setup


def other_model(kind: str, **options):
    """A tiny random model of another kind, with the same tokenizer."""

    def change(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        automatic = AutoModel if kind == "t5" else AutoModelForCausalLM
        automatic.from_config(AutoConfig.for_model(kind, **options)).save_pretrained(folder)

    return model_with(change)


def weights_with(name: str, change):
    def edit(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        tensors[name] = change(tensors[name])
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return model_with(edit)


def nan_at(row: int, value: float = math.nan):
    def change(tensor):
        tensor[row, 0] = value
        return tensor

    return change


def cut(name: str, size: int):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:size])


def write(name: str, text: str):
    return lambda folder: (folder / name).write_text(text)


def give(**flags):
    return lambda place: {k: str(v).format(folder=place.folder) for k, v in flags.items()}


def smaller_vocabulary(folder: Path) -> None:
    make_model("llama", vocab_size=200).save_pretrained(folder)


def checkpoint_with(change, **flags):
    """Go on from a whole checkpoint after `change` of its folder."""

    def setup(place) -> dict:
        folder = place.folder / "run" / "checkpoints" / "step_1"
        shutil.copytree(place.checkpoint, folder)
        change(folder)
        return flags

    return setup


def trainer_with(**changes):
    def change(folder: Path) -> None:
        checkpoints.write_state(folder, checkpoints.read_state(folder) | changes)

    return change


def scribble(folder: Path) -> None:
    """Other bytes, of the same size."""
    for file in folder.glob("*.safetensors"):
        file.write_bytes(b"?" * file.stat().st_size)


BERT = {k: v for k, v in TINY.items() if "token_id" not in k}
T5 = {"vocab_size": 320, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
CODE = {
    "model_type": "mine",
    "auto_map": {"AutoConfig": "mine.C", "AutoModelForCausalLM": "mine.M"},
}
LONG = TEXT | {"chosen": "a b c d " * 30}
# Before the data are read:
LOSSES = [
    ("an unknown loss", give(loss="dop"), ["loss must be one of simper, sft,", "not dop"]),
    (
        "another loss's argument",
        give(loss="dpo", loss_args="gamma=1"),
        ["loss_args: 'gamma=1' does not fit the loss dpo, which has beta=0.1"],
    ),
    (
        "an argument that is none",
        give(loss="dpo", loss_args="reference=1"),
        ["'reference=1' does"],
    ),
    (
        "an argument of SimPER",
        give(loss_args="beta=1"),
        ["'beta=1' does not fit the loss simper, which has no arguments"],
    ),
    (
        "an argument without a value",
        give(loss="simpo", loss_args="beta=2,gamma"),
        ["loss_args: 'gamma' does not fit the loss simpo, which has beta=2.0, gamma=1.0"],
    ),
    ("an infinite argument", give(loss="simpo", loss_args="beta=inf"), ["'beta=inf' does not fit"]),
    ("a NaN argument", give(loss="simpo", loss_args="beta=nan"), ["'beta=nan' does not fit"]),
]
# Before the model is loaded:
INPUTS = [
    # Data and batches
    (
        "data that is not there",
        give(train_data="nowhere.jsonl"),
        ["nowhere.jsonl: cannot be read: "],
    ),
    (
        "no held-out source",
        give(eval_data=","),
        ["a source is empty: give a file, a folder or a hub id"],
    ),
    (
        "a prompt as long",
        give(max_prompt_length=96),
        ["max_prompt_length (96) must be positive and below max_length (96)"],
    ),
    ("a rate of 0", give(warmup_ratio=0.1), ["the learning rate of the only step is 0: set"]),
    ("too few pairs", give(batch_size=27), ["4 pairs do not fill one batch: lower batch_size=27"]),
    (
        "too small a micro-batch",
        give(micro_batch_tokens=16),
        ["a pair of ", "is longer than micro_batch_tokens=16: raise it, or lower max_length"],
    ),
    (
        "too long a held-out pair",
        held_out(LONG, micro_batch_tokens=40),
        ["eval_data: a pair of ", "is longer than micro_batch_tokens=40: raise it"],
    ),
    # Tokenizer and model
    (
        "no such folder",
        give(model="{folder}/nowhere"),
        ["nowhere: there is no such folder"],
    ),
    (
        "no such hub id",
        give(model="no-such/model"),
        ["no-such/model: the model cannot be fetched: "],
    ),
    (
        "another model's tokenizer",
        model_with(smaller_vocabulary),
        ["gives token ", ", the model has 200: they do not belong together"],
    ),
    ("a broken tokenizer", model_with(cut("tokenizer.json", 99)), ["no tokenizer can be loaded"]),
    (
        "a tokenizer of something else",
        model_with(write("tokenizer.json", "{}")),
        ["no tokenizer can be loaded"],
    ),
    (
        "more tokens than positions",
        give(max_length=300),
        ["max_length=300 exceeds the model's 256 positions"],
    ),
    ("a broken config", model_with(cut("config.json", 99)), ["config.json"]),
    ("no config", model_with(lambda folder: (folder / "config.json").unlink()), ["config.json"]),
    ("a config that is a list", model_with(write("config.json", "[]")), ["/model"]),
    ("an unknown kind of model", model_with(model_type="lama"), ["lama"]),
    (
        "a model with code of its own",
        model_with(write("mine.py", "1 / 0"), **CODE),
        ["config.json cannot be used", "custom code"],
    ),
    (
        "a config of impossible sizes",
        model_with(num_attention_heads=0),
        ["can be loaded from", "/model"],
    ),
    ("an encoder and decoder", other_model("t5", **T5), ["a t5 model cannot be trained"]),
    # Weights
    (
        "no weights",
        model_with(lambda folder: (folder / "model.safetensors").unlink()),
        ["model: no weights (.safetensors or .bin) are there"],
    ),
    ("weights cut off", model_with(cut("model.safetensors", -99)), ["weights cannot be used"]),
    (
        "weights cut in the head",
        model_with(cut("model.safetensors", 99)),
        ["weights cannot be used"],
    ),
    ("weights of no bytes", model_with(cut("model.safetensors", 0)), ["weights cannot be used"]),
    (
        "weights of another shape",
        weights_with("model.norm.weight", lambda tensor: torch.ones(16)),
        ["model.norm.weight"],
    ),
    (
        "quantized weights",
        model_with(quantization_config={"quant_method": "fp8", "activation_scheme": "dynamic"}),
        ["/model: its weights are quantized; give the model before quantization"],
    ),
    (
        "weights that are there twice",
        model_with(lambda f: shutil.copy(f / "model.safetensors", f / "model.fp16.safetensors")),
        ["/model: more than one .safetensors file holds model.embed_tokens.weight: remove one"],
    ),
    (
        "weights that are missing",
        model_with(num_hidden_layers=3),
        ["weights are missing", "model.layers.2"],
    ),
]
# Before the first step:
MODELS_AND_CHECKPOINTS = [
    (
        "more replicas than ranks",
        give(replicas=3),
        ["replicas=3 does not divide the number of ranks"],
    ),
    ("an encoder", other_model("bert", **BERT), ["trained with padded rows", "ahead"]),
    (
        "a NaN among the weights",
        weights_with("model.layers.1.mlp.up_proj.weight", nan_at(0)),
        ["model.layers.1.mlp.up_proj.weight", "not finite"],
    ),
    (
        "an infinity that few tokens meet",
        weights_with("model.embed_tokens.weight", nan_at(319, math.inf)),
        ["model.embed_tokens.weight", "not finite"],
    ),
    (
        "a NaN that few tokens meet",
        weights_with("model.embed_tokens.weight", nan_at(319)),
        ["model.embed_tokens.weight", "not finite"],
    ),
    # Checkpoints
    ("other bytes of the same size", checkpoint_with(scribble), ["step_1", "is damaged: move"]),
    (
        "a checkpoint of another format",
        checkpoint_with(trainer_with(format=1)),
        ["step_1 is of another version of this code: ", "--resume never"],
    ),
    (
        "a checkpoint of other settings",
        checkpoint_with(nothing, seed=7),
        ["step_1 is of another run: seed was 42, is 7. Use --resume never or anyway"],
    ),
    (
        "a checkpoint of more groups",
        checkpoint_with(trainer_with(groups=[{}, {}])),
        ["step_1 has 2 groups of parameters"],
    ),
]
# Folders that are no whole checkpoints:
DAMAGES = {
    "a file missing": lambda folder: next(folder.glob("*.safetensors")).unlink(),
    "a file cut off": lambda folder: cut(next(folder.glob("*.safetensors")).name, -9)(folder),
    "trainer.json missing": lambda folder: (folder / "trainer.json").unlink(),
    "trainer.json cut off": cut("trainer.json", 99),
    "a list for trainer.json": write("trainer.json", "[1]"),
    "null for trainer.json": write("trainer.json", "null"),
    "files that are a list": trainer_with(files=[1]),
    "other content of trainer.json": lambda folder: write(
        "trainer.json", (folder / "trainer.json").read_text().replace('"seed": 42', '"seed": 43')
    )(folder),
}
# What is not reached, and the cases. (A patched function of train.py itself would be other code,
# which refuses a checkpoint.)
FIRST_STEP = "torch.optim.AdamW.step"
STAGES = {"train.load_data": LOSSES, "train.load_model": INPUTS}
STAGES |= {FIRST_STEP: MODELS_AND_CHECKPOINTS}
RUNS = [(name, stage, *case) for stage, cases in STAGES.items() for name, *case in cases]

DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)

# ---- The test ----


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, model_folder) -> Path:
    """A run of one step with four pairs."""
    folder = tmp_path_factory.mktemp("run")
    rows = [TEXT | {"chosen": "plus " * n} for n in (1, 2, 3, 4)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = {"model": str(model_folder), "train_data": str(folder / "train.jsonl"), "wandb": "off"}
    values |= {"max_length": 96, "max_prompt_length": 60, "batch_size": 4, "save_every": 1}
    values |= {"warmup_ratio": 0.0}
    (folder / "recipe.yaml").write_text(
        yaml.safe_dump(values | {"output_dir": str(folder / "out")})
    )
    return folder / "recipe.yaml"


@pytest.fixture(scope="module")
def checkpoint(recipe) -> Path:
    """The recipe's, and that the recipe is right."""
    run(recipe, {})
    return recipe.parent / "out" / "checkpoints" / "step_1"


@pytest.fixture
def place(tmp_path, model_folder, checkpoint):
    return SimpleNamespace(folder=tmp_path, model=model_folder, checkpoint=checkpoint)


def run(recipe: Path, flags: dict) -> None:
    try:
        train.train(parse_args([str(recipe), *(f"--{k}={v}" for k, v in flags.items())]))
    finally:
        if dist.is_initialized():  # it has failed
            dist.destroy_process_group()


def load(source, tokenizer=None):
    return load_data(str(source), tokenizer or make_tokenizer(), 200, 100)


def table(cases: list, columns: str = "given, said"):
    """A test's cases; their first column are the ids."""
    return pytest.mark.parametrize(columns, [c[1:] for c in cases], ids=[c[0] for c in cases])


def refused(call, said: list[str], *places: str) -> None:
    """call raises InputError, whose message has all of `said` and all places."""
    with pytest.raises(InputError) as caught:
        call()
    for fragment in (*said, *places):
        assert fragment in str(caught.value)


@table(ROWS)
def test_a_bad_row_is_an_error_that_names_file_row_columns_and_formats(tmp_path, given, said):
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{LINES}{json.dumps(given)}\n")
    refused(lambda: load(path), said, f"{path}, row 2: ", *FORMATS)


@pytest.mark.parametrize("before", [True, False])
def test_where_a_template_renders_an_answered_prompt_otherwise_the_answer_follows_it(
    tmp_path, before
):
    other = "{% if messages | length == 4 %}four{% endif %}"
    rows = [{"chosen": [*t, PLUS], "rejected": [*t, WHAT]} for t in ([Q], TURNS)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = load(path, make_tokenizer(other + CHATML if before else CHATML + other))
    assert list(found.rows) == list(load(path, make_tokenizer(CHATML)).rows)


@table(DROPS)
def test_a_row_without_a_preference_is_dropped_and_counted(tmp_path, given, said):
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{LINES}{json.dumps(given)}\n")
    found = load(path)
    assert len(found.rows) == 2
    assert "1 of 3 rows dropped" in found.report and said[0] in found.report
    path.write_text(json.dumps(given))
    refused(lambda: load(path), said, "no pairs are left: 0 pairs from ", "1 of 1 rows dropped")


@table(FILES, "name, content, said")
def test_a_bad_file_is_an_error_that_names_it(tmp_path, name, content, said):
    path = tmp_path / name
    content = content(path) if callable(content) else content
    if content is not None:
        path.write_bytes(content)
    refused(lambda: load(path), said, f"{path}")


@table(SOURCES)
def test_a_bad_source_is_an_error_that_names_it(tmp_path, monkeypatch, given, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text(LINES)
    one = datasets.Dataset.from_list([TEXT])
    one.save_to_disk("one")
    datasets.DatasetDict({"train": one, "test_prefs": one}).save_to_disk("both")
    refused(lambda: load(given), said)


@table(TEMPLATES)
def test_a_bad_chat_template_is_an_error(tmp_path, given, said):
    tokenizer = make_tokenizer(given)
    if given is None:
        tokenizer.eos_token = None
    rows = [{"chosen": [Q, PLUS], "rejected": [Q, WHAT]}]
    rows.append({"chosen": [*TURNS, PLUS], "rejected": [*TURNS, WHAT]})
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    refused(lambda: load(tmp_path / "rows.jsonl", tokenizer), said)


@table(FLAGS)
def test_a_bad_flag_is_an_error_that_names_it(given, said):
    refused(lambda: parse_args(given.split()), said)


@table(RECIPES)
def test_a_bad_recipe_is_an_error_that_names_it(tmp_path, given, said):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(given if isinstance(given, bytes) else given.encode())
    refused(lambda: parse_args([str(path)]), said, f"{path}")


@table(RUNS, "stage, given, said")
def test_a_bad_run_is_an_error_in_time(place, recipe, monkeypatch, stage, given, said):
    monkeypatch.setattr(stage, lambda *_, **__: pytest.fail(f"{stage} was reached"))
    flags = {"output_dir": place.folder / "run"} | given(place)
    refused(lambda: run(recipe, flags), said)
    assert stage == FIRST_STEP or not (place.folder / "run").exists()


@pytest.mark.parametrize("change", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_checkpoint_is_as_if_it_were_not_there(place, recipe, change):
    folder = place.folder / "run"
    run(recipe, {"output_dir": folder} | checkpoint_with(change)(place))
    steps = [json.loads(line)["step"] for line in open(folder / "metrics.jsonl")]
    assert steps == [1] and (folder / "final").exists()
    saved, expected = (
        load_file(next(run.glob("checkpoints/step_1/*.safetensors")))
        for run in (folder, recipe.parent / "out")
    )
    assert saved.keys() == expected.keys()
    assert all(torch.equal(saved[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("model", ["demo", "model"])
def test_a_cache_that_cannot_be_written_is_an_error(recipe, tmp_path, monkeypatch, model):
    monkeypatch.setenv("SIMPER_CACHE", __file__)
    flags = {"output_dir": tmp_path / "run"} | ({"model": "demo"} if model == "demo" else {})
    with pytest.raises(SystemExit) as ended:
        run_command(lambda: run(recipe, flags))
    said = str(ended.value)
    assert "File exists" in said or "Not a directory" in said
    assert __file__ in said and "SIMPER_CACHE" in said


@pytest.mark.parametrize("output_dir", [__file__, f"{__file__}/run"])
def test_a_file_as_output_dir_is_an_error(recipe, output_dir):
    error = f"(File exists|Not a directory): '{__file__}.*writes to its output_dir"
    with pytest.raises(SystemExit, match=error):
        run_command(lambda: run(recipe, {"output_dir": output_dir}))


@pytest.mark.parametrize("number", DISK, ids=errno.errorcode.get)
def test_a_disk_that_takes_no_file_is_one_line(number, tmp_path, monkeypatch):
    def fail(path):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(log, "sync", fail)
    said = rf"^error: .*{os.strerror(number)}\. A run writes to its output_dir and to SIMPER_CACHE"
    with pytest.raises(SystemExit, match=said):
        run_command(lambda: log.write_whole(tmp_path / "file", "text"))


@pytest.mark.parametrize("text", ["ibv_reg_mr failed: Permission denied", "File exists already"])
def test_an_error_that_only_sounds_like_a_disk_keeps_its_traceback(text):
    def fail():
        raise RuntimeError(text)

    with pytest.raises(RuntimeError, match=text):
        run_command(fail)


def test_an_error_ends_all_ranks_with_one_message(recipe, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node", "2", "train.py", str(recipe), "--batch_size", "1"]
    command += ["--output_dir", str(tmp_path / "run")]
    # Far below the half hour after which ranks give up waiting for each other.
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode != 0
    # By one rank: rank 0, or another one if rank 0 comes seconds later, which torchrun then ends.
    assert done.stderr.count("1 pairs cannot be spread over 2 ranks") == 1
    assert 'train.py", line' not in done.stderr
