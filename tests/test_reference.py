"""Losses with a reference: the log-probs of the model that training starts from, and the file that
keeps them."""

import math
import os
import shutil
from pathlib import Path

import pytest
import torch
from conftest import (
    interrupt,
    make_model,
    make_tokenizer,
    plain_logps,
    run,
    run_ranks,
    timeless,
)
from safetensors.torch import load_file

import train
from data import load_data
from runtime import reference

FILE = "reference.safetensors"


@pytest.fixture
def made(monkeypatch) -> list:
    """Every result of response_logps that this process makes."""
    results, response_logps = [], reference.response_logps
    keep = lambda *args: results.append(response_logps(*args)) or results[-1]  # noqa: E731
    monkeypatch.setattr(reference, "response_logps", keep)
    return results


def test_reference_is_the_starting_model(base, tmp_path):
    """Its log-probs, from plain float64 forwards; the loss before the first update; and the
    gradient weights."""
    values = base | {"loss": "dpo", "loss_args": "beta=0.5", "micro_batch_tokens": 200}
    lines = run(values | {"max_steps": 2}, tmp_path / "run")
    model, kept = make_model("llama").double(), load_file(tmp_path / "run" / FILE)
    assert kept.keys() == {"train_data", "eval_data"}
    for source, found in kept.items():
        rows = load_data(base[source], make_tokenizer(), 96, 60).rows
        for row, both in zip(rows, found.tolist(), strict=True):
            for ids, value in zip(row["responses"], both, strict=True):
                with torch.no_grad():
                    expected = plain_logps(model, row["prompt"], ids).sum().item()
                assert value == pytest.approx(expected, rel=1e-5)
    assert lines[0]["eval/loss"] == pytest.approx(math.log(2), abs=1e-6)
    for side in ("chosen", "rejected"):  # ∂/∂m = |y| ∂/∂s = |y| β σ(0)
        weight = 0.25 * lines[0][f"eval/length/{side}"]
        assert lines[0][f"eval/gradient_weight/{side}"] == pytest.approx(weight, rel=1e-5)
    assert lines[-1]["eval/loss"] != pytest.approx(math.log(2), abs=1e-3)


def test_reference_is_computed_once_and_resumed_with(base, tmp_path, capsys):
    """Two ranks write it; one rank reads it on resuming, with a model whose weights have moved, and
    goes on as they would."""
    values = base | {"loss": "kto", "max_steps": 3, "save_every": 2, "eval_data": ""}
    whole = timeless(run_ranks(values | {"keep_checkpoints": 0}, tmp_path / "two"))
    interrupt(tmp_path / "two", tmp_path / "run")
    written = (tmp_path / "run" / FILE).read_bytes()
    capsys.readouterr()
    lines = timeless(run(values, tmp_path / "run"))
    assert (tmp_path / "run" / FILE).read_bytes() == written
    assert "log-probs" not in capsys.readouterr().err  # the progress of their computation
    assert [line["step"] for line in lines] == [1, 2, 3] and lines[:2] == whole[:2]
    assert lines[2] == pytest.approx(whole[2], rel=1e-5, abs=1e-6)
    alone = timeless(run(values, tmp_path / "alone"))  # the same from the start, by one rank
    assert "log-probs" in capsys.readouterr().err
    for mine, its in zip(alone, whole, strict=True):
        assert mine == pytest.approx(its, rel=1e-5, abs=1e-6)


def test_a_damaged_reference_is_computed_again(base, tmp_path, made):
    values = base | {"loss": "dpo", "max_steps": 2, "save_every": 1, "keep_checkpoints": 0}
    lines = timeless(run(values, tmp_path / "whole"))
    file = tmp_path / "whole" / FILE
    whole, size = load_file(file), file.stat().st_size
    for kept in (0, 40, size - 1):
        output = tmp_path / str(kept)
        interrupt(tmp_path / "whole", output)
        os.truncate(output / FILE, kept)
        made.clear()
        assert timeless(run(values, output)) == lines
        found = load_file(output / FILE)
        assert len(made) == 2 and found.keys() == whole.keys()
        assert all(torch.equal(found[name], whole[name]) for name in whole)
        assert not [*output.glob("*.part")]


def other_weights(folder: Path) -> None:
    """In a file of the same size and time."""
    before = (folder / "model.safetensors").stat()
    make_model("llama", seed=1).save_pretrained(folder)
    os.utime(folder / "model.safetensors", ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (folder / "model.safetensors").stat().st_size == before.st_size


def other_config(folder: Path) -> None:
    """Which decides, too, what the weights compute."""
    config = (folder / "config.json").read_text()
    assert '"rope_theta": 1' in config
    (folder / "config.json").write_text(config.replace('"rope_theta": 1', '"rope_theta": 9'))


@pytest.mark.parametrize(
    "change", [other_weights, other_config, "pairs", "code", "dtype", "setting"]
)
def test_what_is_computed_otherwise_has_another_reference(
    base, tmp_path, model_folder, monkeypatch, made, change
):
    """Than what a run without a checkpoint has left in the folder. The loss before the first update
    is that of no difference."""
    values = base | {"loss": "dpo", "max_steps": 1, "save_every": 0, "eval_data": ""}
    output = tmp_path / "run"
    for _ in range(2):
        run(values, output)
        shutil.rmtree(output / "final")
    assert len(made) == 1  # the second run is made of the same
    old = load_file(output / FILE)["train_data"]
    if change == "pairs":
        rows = Path(base["train_data"]).read_text().splitlines()
        (tmp_path / "pairs.jsonl").write_text("\n".join(reversed(rows)))
        values["train_data"] = str(tmp_path / "pairs.jsonl")
    elif change == "code":
        monkeypatch.setattr(train, "NEW", 1, raising=False)
    elif change == "dtype":
        values["dtype"] = "bfloat16"
    elif change == "setting":  # by which a fork may choose the reference
        values["loss_args"] = "beta=0.05"
    else:
        shutil.copytree(model_folder, tmp_path / "model")
        change(tmp_path / "model")
        values["model"] = str(tmp_path / "model")
    (line,) = run(values, output)
    assert line["loss"] == pytest.approx(math.log(2), abs=1e-6) and len(made) == 2
    new = load_file(output / FILE)["train_data"]
    assert torch.equal(new, made[-1]) and torch.equal(new, old) == (change in ("code", "setting"))


def test_a_reference_that_is_asked_for_again_is_of_the_model_as_it_is(base, tmp_path, made):
    """As in TR-DPO, whose reference follows the model."""
    values = base | {"loss": "dpo", "max_steps": 2, "save_every": 0, "eval_data": ""}
    values |= {"learning_rate": 1e-2, "warmup_ratio": 0.0}
    kept = {}

    def noted(*args):
        kept["reference"] = args
        add_reference(*args)

    add_reference = train.add_reference
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "add_reference", noted)
        run(values, tmp_path / "run")
    model, data, *rest = kept["reference"]
    before = data.reference.clone()
    group = torch.distributed.init_process_group
    group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        add_reference(model, data, *rest)
    finally:
        torch.distributed.destroy_process_group()
    assert len(made) == 2 and not torch.equal(data.reference, before)
    # A rerun begins with that of the start.
    assert torch.equal(load_file(tmp_path / "run" / FILE)["train_data"].float(), before)


@pytest.mark.parametrize("name", train.LOSSES)
def test_every_loss_trains(base, tmp_path, name):
    lines = run(base | {"loss": name, "max_steps": 2, "eval_data": ""}, tmp_path / "run")
    assert len(lines) == 2
    assert all(math.isfinite(value) for line in lines for value in line.values())
    assert lines[0]["grad_norm"] > 0 and lines[0]["gradient_weight/chosen"] > 0
