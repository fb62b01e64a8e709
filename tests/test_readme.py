"""The README is true: its flags exist, its files are there, its code is the code, its patches apply
and train."""

import importlib
import json
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import make_model, make_tokenizer, read_metrics, run_python, write_pairs
from transformers import LlamaConfig

from benchmarks import plan
from data import load_data
from runtime.rows import split_share
from train import LOSSES, Config, parse_args

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PAGES = {"README.md": README} | {
    str(path.relative_to(ROOT)): path.read_text() for path in sorted((ROOT / "docs").rglob("*.md"))
}
FORKING = (ROOT / "docs" / "forking.md").read_text()
FORK = README.split("## How to fork it")[1].split("\n## ")[0] + FORKING
PATCHES = re.findall(
    r"\*\*([^*]+)\*\*[^*]*?```diff\n@@ ([\w/]+\.py) @@\n(.*?)```", FORK, flags=re.DOTALL
)


@pytest.mark.repo
@pytest.mark.parametrize("page", ["README.md", "docs/training.md", "docs/forking.md"])
def test_flags_exist(page):
    text, trls, rest = PAGES[page].partition("## Coming from TRL")
    text += re.sub(r"^\|[^|]*\|", "|", trls + rest, flags=re.MULTILINE)  # without TRL's names
    for command in re.findall(r"train\.py [^`]*?(?=`|\n\n|\Z)", text.replace("\\\n", " ")):
        for line in command.splitlines()[:1]:
            assert {*re.findall(r"--(\w+)", line)} <= {*Config.__dataclass_fields__, "help"}, line
    others = {"simper_loss", "loss_function", "save_to_disk", "gamma_beta_ratio", *LOSSES}
    others |= {"adam_epsilon", "accuracy_implicit"}
    for flag in re.findall(r"`(?:--)?(\w+_\w+)`", text):
        assert flag in Config.__dataclass_fields__ or flag in others, flag


@pytest.mark.repo
@pytest.mark.parametrize("page", [*PAGES])
def test_flags_of_the_other_commands_exist(page, capsys, monkeypatch):
    text = PAGES[page].replace("\\\n", " ")
    commands = re.findall(r"python (?:-m )?((?:eval|benchmarks)[./]\w+)(?:\.py)?([^\n#`|]*)", text)
    assert commands or page not in ("README.md", "docs/evaluation.md", "docs/training.md")
    monkeypatch.setattr(sys, "argv", ["command", "--help"])
    for module, rest in commands:
        with pytest.raises(SystemExit):
            importlib.import_module(module.replace("/", ".")).main()
        known = {*re.findall(r"--(\w+)", capsys.readouterr().out)}
        passes_on = ("plan", "fake_gpu", "roofline", "gpu_check", "reproduce")
        passes_on = re.split(r"[./]", module)[-1] in passes_on
        known |= {*Config.__dataclass_fields__} if passes_on else set()
        known |= {"help"}
        assert {*re.findall(r"--(\w+)", rest)} <= known, (module, rest)


@pytest.mark.repo
@pytest.mark.parametrize("page", [*PAGES])
def test_files_exist(page):
    text = PAGES[page]
    for name in re.findall(r"\]\((?!http|#)([^)#]+)", text):
        assert ((ROOT / page).parent / name).exists(), name


@pytest.mark.repo
def test_the_recipe_of_ones_own_is_one(tmp_path):
    (text,) = re.findall(r"```yaml\n(.*?)```", PAGES["docs/training.md"], re.DOTALL)
    (tmp_path / "mine.yaml").write_text(text)
    config = parse_args([str(tmp_path / "mine.yaml")])
    assert (config.batch_size, config.learning_rate) == (32, 7e-6)
    assert [split_share(s)[1] for s in (config.train_data, config.eval_data)] == [0.9, -0.1]


@pytest.mark.repo
def test_the_loss_is_that_of_the_code():
    quoted = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert "return rejected - chosen" in quoted[0] and quoted[0] in (ROOT / "loss.py").read_text()


def test_the_loss_in_another_trainer():
    """docs/forking.md's lines, on padded logits, against the equation by hand."""
    (code,) = [c for c in re.findall(r"```python\n(.*?)```", FORKING, re.DOTALL) if "def " in c]
    exec(code, names := {})
    torch.manual_seed(0)
    logits = torch.randn(6, 9, 11, requires_grad=True)
    labels = torch.full((6, 9), -100)
    for row, (prompt, end) in enumerate([(2, 5), (3, 9), (1, 4), (2, 6), (3, 5), (1, 9)]):
        labels[row, prompt:end] = torch.arange(prompt, end)
    expected = []
    for row in range(6):
        places = [n for n in range(9) if labels[row, n] != -100]
        logps = [logits[row, n - 1].log_softmax(-1)[labels[row, n]] for n in places]
        expected.append(torch.stack(logps).mean().exp())
    losses = names["simper_of_logits"](logits, labels)
    by_hand = [(expected[n + 3] - expected[n]).item() for n in range(3)]
    assert losses.tolist() == pytest.approx(by_hand, rel=1e-4)


# Llama 3's shapes, by billions of parameters: layers, width, of the feed-forward part, heads.
SHAPES = {"1 B": (16, 2048, 8192, 32), "3 B": (28, 3072, 8192, 24), "8 B": (32, 4096, 14336, 32)}
CARDS = {"24 GB": (1, "4090"), "48 GB": (1, "l40s"), "80 GB": (1, "h100"), "141 GB": (1, "h200")}
CARDS |= {"8 × 80 GB": (8, "h100")}


@pytest.mark.repo
@pytest.mark.parametrize("size", SHAPES)
def test_what_fits_is_planned_so(size, monkeypatch):
    """What the table says fits, does, and what it says needs the host's memory or adapters."""
    monkeypatch.setattr(plan, "STEPS", 1)
    layers, width, inner, heads = SHAPES[size]
    config = LlamaConfig(
        vocab_size=128_256,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        head_dim=128 if size != "1 B" else 64,
        tie_word_embeddings=size != "8 B",
    )
    (header,) = re.findall(r"^\| +\| (.*24 GB.*) \|$", README, re.MULTILINE)
    (line,) = re.findall(rf"^\| {size}.*? \| (.*) \|$", README, re.MULTILINE)
    cells = dict(zip(header.split(" | "), line.split(" | "), strict=True))
    recipe = parse_args([plan.PAPER])

    def fits(column: str, streamed: bool) -> bool:
        gpus, card = next(CARDS[name] for name in reversed(CARDS) if name in column)
        kept = {"activation_checkpointing": "true", "stream_optimizer": streamed}
        where = (config, gpus, plan.GPUS[card], "ultrafeedback", 60_000)
        return plan.plan(replace(recipe, **kept), *where, only_fits=True)["fits"]

    # Of cards with the same verdict, the largest that is too small, the smallest that is enough.
    if adapters := [column for column, cell in cells.items() if "adapters" in cell]:
        assert not fits(adapters[-1], streamed=True)
    host = [column for column, cell in cells.items() if "host" in cell]
    assert fits(host[0], streamed=True)
    rest = [column for column in cells if column not in (*adapters, *host)]
    assert fits(rest[0], streamed=False)


@pytest.fixture
def patched(tmp_path):
    """A copy of the code, to which `apply` applies a patch of the README by its name."""
    for file in ("train.py", "data.py", "loss.py", "model.py"):
        shutil.copy(ROOT / file, tmp_path)
    shutil.copytree(ROOT / "runtime", tmp_path / "runtime")
    make_model("llama").save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")

    def apply(name: str) -> None:
        ((file, body),) = [(file, body) for title, file, body in PATCHES if title == name]
        lines = body.splitlines(keepends=True)
        old, new = ("".join(line[1:] for line in lines if line[0] in kept) for kept in (" -", " +"))
        text = (tmp_path / file).read_text()
        # A patch for reading has no line numbers: the place that it names must be the only one.
        assert text.count(old) == 1
        (tmp_path / file).write_text(text.replace(old, new))

    return apply


def train(folder: Path, *flags: str) -> list[dict]:
    """Two steps of 4 pairs by the code in `folder`."""
    command = ["train.py", "recipe.yaml", "--model", "model", "--output_dir", "run"]
    command += ["--train_data", "pairs.jsonl", "--wandb", "off", "--learning_rate", "1e-3", *flags]
    recipe = "batch_size: 4\nmax_length: 96\nmax_prompt_length: 60\nmicro_batch_tokens: 600\n"
    (folder / "recipe.yaml").write_text(recipe)
    done = run_python(*command, cwd=folder)
    assert done.returncode == 0, done.stderr[-2000:]
    return read_metrics(folder / "run")


@pytest.mark.repo
def test_the_patches_are_all_tested():
    names = [name for name, _, _ in PATCHES]
    assert names == ["Another loss", "Another normalization", "Another metric"] + [
        "Another row format",
        "The assistant's header scored",
    ]


def test_patch_another_loss(patched, tmp_path):
    patched("Another loss")
    write_pairs(tmp_path / "pairs.jsonl", 8)
    first, second = train(tmp_path, "--loss", "hinge", "--loss_args", "margin=0.6")
    margin = first["inverse_perplexity/margin"]
    assert first["loss"] == pytest.approx(0.6 - margin, abs=1e-6)  # below 0.6 in an untrained model


def test_patch_another_normalization(patched, tmp_path):
    patched("Another normalization")
    write_pairs(tmp_path / "pairs.jsonl", 8)
    first, second = train(tmp_path)
    # exp(sum / √n) is far below exp(sum / n), which the metrics still report.
    assert 0 < abs(first["loss"]) < 0.5 * abs(first["inverse_perplexity/margin"])


def test_patch_another_row_format(patched, tmp_path):
    patched("Another row format")
    lines = Path(write_pairs(tmp_path / "pairs.jsonl", 8)).read_text().splitlines()
    expected, _ = train(tmp_path)
    with open(tmp_path / "pairs.jsonl", "w") as file:
        for better, row in enumerate(map(json.loads, lines)):
            row |= {"better_response_id": better % 2, f"response_{better % 2}": row.pop("chosen")}
            print(json.dumps(row | {f"response_{1 - better % 2}": row.pop("rejected")}), file=file)
    shutil.rmtree(tmp_path / "run")
    first, _ = train(tmp_path)
    assert first["loss"] == expected["loss"]


def test_patch_another_metric(patched, tmp_path):
    patched("Another metric")
    write_pairs(tmp_path / "pairs.jsonl", 8)
    lines = train(tmp_path, "--eval_data", "pairs.jsonl")
    assert ["accuracy/sum" in line for line in lines] == [False, True, True, False]
    assert all(0 <= line["eval/accuracy/sum"] <= 1 for line in (lines[0], lines[-1]))
    data = load_data(str(tmp_path / "pairs.jsonl"), make_tokenizer(), 96, 60)
    model, likelier = make_model("llama"), []
    for pair in data.rows:
        sums = []
        for response in pair["responses"]:
            ids = torch.tensor([pair["prompt"] + response])
            with torch.no_grad():
                logps = model(ids).logits[0, :-1].log_softmax(dim=-1)
            logps = logps.gather(1, ids[0, 1:, None])[len(pair["prompt"]) - 1 :]
            sums.append(logps.sum().item())
        likelier.append(sums[0] > sums[1])
    assert lines[0]["eval/accuracy/sum"] == pytest.approx(sum(likelier) / 8)


def test_patch_the_header_scored(patched, tmp_path):
    write_pairs(tmp_path / "pairs.jsonl", 8)
    without = train(tmp_path)
    shutil.rmtree(tmp_path / "run")
    patched("The assistant's header scored")
    header = len(make_tokenizer()("<|im_start|>assistant\n", add_special_tokens=False).input_ids)
    for line, scored in zip(without, train(tmp_path), strict=True):
        for side in ("chosen", "rejected"):
            longer = scored[f"length/{side}"] - line[f"length/{side}"]
            assert longer == pytest.approx(header)
