"""The README is true: its flags exist, its files are there, and its patches apply and train."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import make_model, make_tokenizer
from test_train import read_metrics, write_pairs

from train import LOSSES, Config

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PATCHES = re.findall(r"\*\*(.*?)\*\*[^\n]*\n.*?```diff\n(.*?)```", README.split("## How to fork it")[1], flags=re.DOTALL)


def test_flags_exist():
    for command in re.findall(r"train\.py [^`]*?(?=`|\n\n|\Z)", README.replace("\\\n", " ")):
        for line in command.splitlines()[:1]:
            assert {*re.findall(r"--(\w+)", line)} <= {*Config.__dataclass_fields__, "help"}, line
    for flag in re.findall(r"`(?:--)?(\w+_\w+)`", README):
        assert flag in Config.__dataclass_fields__ or flag in (
            "simper_loss",
            "save_to_disk",
            "from_pretrained",
            "gamma_beta_ratio",
            "alpaca_eval",
            "OPENAI_API_KEY",
            "generate_only",
            "judge_base_url",
            "judge_model",
            *LOSSES,
        )


def test_flags_of_the_other_commands_exist():
    found = re.findall(r"python (?:-m )?((?:eval|benchmarks)[./]\w+)(?:\.py)?([^\n#`]*)", README.replace("\\\n", " "))
    assert len(found) > 8
    for module, rest in found:
        source = (ROOT / f"{module.replace('.', '/')}.py").read_text()
        for flag in re.findall(r"--(\w+)", rest):
            assert f'"--{flag}"' in source or flag == "help", (module, flag)


def test_files_exist():
    for name in re.findall(r"\]\((?!http)([^)]+)\)", README):
        assert (ROOT / name).exists(), name


def test_there_are_three_patches():
    assert [name for name, _ in PATCHES] == ["Another loss.", "Another normalization.", "Other data."]


@pytest.mark.parametrize("name, patch", PATCHES, ids=lambda value: value if "\n" not in value else "")
def test_patch_applies_and_trains(name, patch, tmp_path):
    for file in ("train.py", "data.py", "loss.py", "model.py"):
        shutil.copy(ROOT / file, tmp_path)
    # A patch for reading has no line numbers: put in those of the place that it names, which must be the only one.
    file = patch.split("\n", 1)[0].removeprefix("--- a/")
    body = patch.split("@@\n", 1)[1]
    old = "".join(line[1:] for line in body.splitlines(keepends=True) if line[0] in " -")
    new = "".join(line[1:] for line in body.splitlines(keepends=True) if line[0] in " +")
    text = (tmp_path / file).read_text()
    assert text.count(old) == 1
    (tmp_path / file).write_text(text.replace(old, new))
    make_model("llama").save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    data = write_pairs(tmp_path / "pairs.jsonl", 8)
    if name == "Other data.":
        content = Path(data).read_text()
        for column, other in (("prompt", "question"), ("chosen", "better"), ("rejected", "worse")):
            content = content.replace(f'"{column}"', f'"{other}"')
        Path(data).write_text(content)
    (tmp_path / "recipe.yaml").write_text("batch_size: 4\nmax_length: 96\nmax_prompt_length: 60\nmicro_batch_tokens: 600\n")
    flags = ["--model", "model", "--train_data", data, "--output_dir", "run", "--wandb", "off", "--learning_rate", "1e-3"]
    if name == "Another loss.":
        flags += ["--loss", "hinge", "--loss_args", "margin=0.6"]
    done = subprocess.run([sys.executable, "train.py", "recipe.yaml", *flags], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    losses = [line["loss"] for line in read_metrics(tmp_path / "run")]
    assert len(losses) == 2
    assert (losses[0] > 0.4) == (name == "Another loss.")  # the margin, in an untrained model
