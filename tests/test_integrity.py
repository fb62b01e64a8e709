"""What is on disk is what was written: checkpoints, caches, finished runs. Damage is found, said
and never trained on."""

import json
import os
import pwd
import random
import re
import shutil
import stat
import tempfile
from pathlib import Path

import pytest
import torch
from conftest import read_metrics, run, timeless
from safetensors.torch import load_file, save_file

from runtime import cache, checkpoints
from runtime.cache import cache_folder
from runtime.errors import InputError


@pytest.fixture(scope="module")
def saved(base, tmp_path_factory) -> tuple[dict, Path]:
    """A run of four steps that has kept its checkpoints after 2 and 4, and no final/."""
    output = tmp_path_factory.mktemp("saved") / "run"
    values = base | {"max_steps": 4, "save_every": 2, "keep_checkpoints": 0, "eval_data": ""}
    run(values, output)
    shutil.rmtree(output / "final")
    return values, output


def flip(path: Path, place: int) -> None:
    """Flip one bit of a file; its time stays."""
    before, content = path.stat(), bytearray(path.read_bytes())
    content[place // 8 % len(content)] ^= 1 << place % 8
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))


def test_no_flipped_bit_of_a_checkpoint_is_trained_on(saved, tmp_path, capsys):
    """At random places of both files: the run goes on from the one before, or ends with a line that
    names the file."""
    values, output = saved
    draw = random.Random(0)
    for trial in range(12):
        copy = tmp_path / str(trial)
        shutil.copytree(output, copy)
        folder = copy / "checkpoints" / "step_4"
        file = draw.choice(sorted(folder.iterdir()))
        flip(file, draw.randrange(10**6))
        try:
            lines = run(values, copy)
            said = capsys.readouterr().out
            assert f"{folder} is damaged: it is passed over" in said, file
            assert timeless(lines) == timeless(read_metrics(output))
        except InputError as error:
            assert re.search(rf"{re.escape(str(file))} is damaged: move", str(error)), file


@pytest.mark.parametrize("change", ["one more", "one less", "shorter"])
def test_a_checkpoint_has_just_the_files_that_were_saved(saved, tmp_path, capsys, change):
    values, output = saved
    shutil.copytree(output, tmp_path / "run")
    newest, older = (tmp_path / "run" / "checkpoints" / f"step_{n}" for n in (4, 2))
    (file,) = newest.glob("*.safetensors")
    if change == "one more":
        shutil.copy(next(older.glob("*.safetensors")), newest / "zz.safetensors")
    elif change == "one less":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-1])
    lines = run(values, tmp_path / "run")
    assert f"{newest} is damaged: it is passed over" in capsys.readouterr().out
    assert timeless(lines) == timeless(read_metrics(output))


def test_the_step_is_the_name_of_the_folder(saved, tmp_path):
    """Nothing in trainer.json can make step 2's weights those of step 4."""
    values, output = saved
    shutil.copytree(output, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_4")
    folder = tmp_path / "run" / "checkpoints" / "step_2"
    checkpoints.write_state(folder, checkpoints.read_state(folder) | {"step": 99})
    assert timeless(run(values, tmp_path / "run")) == timeless(read_metrics(output))


def test_what_is_not_finite_is_neither_saved_nor_exported(base, tmp_path):
    """A rate at which the first step that counts, the last, gives infinite weights."""
    values = base | {"learning_rate": 1e39, "max_steps": 2, "eval_data": "", "warmup_ratio": 0.5}
    for save_every, said in ((0, "is not finite: nothing is exported"), (1, "after step 2: not")):
        output = tmp_path / str(save_every)
        with pytest.raises(FloatingPointError, match=said):
            run(values | {"save_every": save_every}, output)
        assert not (output / "final").exists()
        assert not (output / "checkpoints" / "step_2").exists()


def test_metrics_that_are_not_finite_end_the_run(base, tmp_path):
    values = base | {"learning_rate": 1e39, "max_steps": 2, "warmup_ratio": 0.5, "save_every": 0}
    with pytest.raises(FloatingPointError, match="the mean of .* is nan"):
        run(values, tmp_path / "run")
    assert not (tmp_path / "run" / "final").exists()
    assert "NaN" not in (tmp_path / "run" / "metrics.jsonl").read_text()


def arrow_files(folder: str) -> list[Path]:
    return sorted(cache_folder(folder).rglob("*.arrow"))


@pytest.mark.parametrize("folder", ["tokenized", "json"])
@pytest.mark.parametrize("damage", ["a bit", "half", "nothing left"])
def test_a_damaged_cache_of_rows_is_made_anew(base, tmp_path, monkeypatch, capsys, folder, damage):
    monkeypatch.setenv("SIMPER_CACHE", str(tmp_path / "cache"))
    values = base | {"max_steps": 2, "eval_data": ""}
    lines = run(values, tmp_path / "whole")
    (file,) = arrow_files(folder)
    content = file.read_bytes()
    if damage == "a bit":
        flip(file, 8 * (len(content) // 2))
    else:
        file.write_bytes(content[: len(content) // 2] if damage == "half" else b"")
    if folder == "json":  # which is read again only for tokens that are not there
        shutil.rmtree(tmp_path / "cache" / "tokenized")
    capsys.readouterr()
    assert timeless(run(values, tmp_path / "again")) == timeless(lines)
    assert "is damaged or was not finished: it is made anew" in capsys.readouterr().out
    assert arrow_files(folder)[0].stat().st_size == len(content)


def test_a_cache_that_was_not_finished_is_made_anew(base, tmp_path, monkeypatch, capsys):
    """As a kill leaves it: the file has its name, and nothing says that it is whole."""
    monkeypatch.setenv("SIMPER_CACHE", str(tmp_path / "cache"))
    values = base | {"max_steps": 2, "eval_data": ""}
    lines = run(values, tmp_path / "whole")
    (seal,) = (tmp_path / "cache" / "tokenized").rglob("digests.json")
    seal.unlink()
    assert timeless(run(values, tmp_path / "again")) == timeless(lines)
    assert "was not finished: it is made anew" in capsys.readouterr().out


def test_damaged_converted_weights_are_made_anew(base, tmp_path, monkeypatch, capsys):
    """A file with other names is converted once; a bit of the copy flips."""
    monkeypatch.setenv("SIMPER_CACHE", str(tmp_path / "cache"))
    shutil.copytree(base["model"], tmp_path / "model")
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    (tmp_path / "model" / "model.safetensors").unlink()
    torch.save(tensors, tmp_path / "model" / "pytorch_model.bin")
    values = base | {"max_steps": 2, "eval_data": "", "model": str(tmp_path / "model")}
    lines = run(values, tmp_path / "whole")
    (file,) = (tmp_path / "cache" / "weights").rglob("*.safetensors")
    flip(file, 8 * (file.stat().st_size - 100))
    assert timeless(run(values, tmp_path / "again")) == timeless(lines)
    assert "is damaged or was not finished: it is made anew" in capsys.readouterr().out


def test_a_finished_run_is_not_taken_for_another_one(base, tmp_path, capsys):
    values = base | {"max_steps": 2, "eval_data": ""}
    lines = run(values, tmp_path / "run")
    config = (tmp_path / "run" / "config.yaml").read_text()
    assert run(values, tmp_path / "run") == lines  # the same command: nothing to do
    assert "holds this run, finished" in capsys.readouterr().out
    for change, said in (
        ({"loss": "dpo"}, "loss was simper, is dpo"),
        ({"learning_rate": 2e-3}, "learning_rate was 0.001, is 0.002"),
        ({"max_steps": 3}, "max_steps was 2, is 3"),
        ({"eval_data": base["eval_data"]}, "other held-out tokens"),
    ):
        for resume in ("auto", "anyway"):
            with pytest.raises(InputError, match=f"finished run, which is another one: {said}"):
                run(values | change | {"resume": resume}, tmp_path / "run")
    assert read_metrics(tmp_path / "run") == lines
    assert (tmp_path / "run" / "config.yaml").read_text() == config
    # What changes no step may change.
    run(values | {"micro_batch_tokens": 300, "log_every": 2}, tmp_path / "run")


def test_an_empty_final_is_no_finished_run(base, tmp_path):
    (tmp_path / "run" / "final").mkdir(parents=True)
    assert len(run(base | {"max_steps": 2, "eval_data": ""}, tmp_path / "run")) == 2
    assert (tmp_path / "run" / "final" / "model.safetensors").exists()


def test_a_second_start_that_waited_changes_nothing_of_a_finished_run(base, tmp_path, monkeypatch):
    """It looks for final/ only when it holds the lock: here the first run ends while the second
    reads its data."""
    import train

    values = base | {"max_steps": 2, "eval_data": ""}
    other, digests = base | {"max_steps": 2, "eval_data": "", "learning_rate": 5e-3}, train.digests

    def slowly(*args):
        monkeypatch.setattr(train, "digests", digests)
        run(values, tmp_path / "run")
        return digests(*args)

    monkeypatch.setattr(train, "digests", slowly)
    with pytest.raises(InputError, match="learning_rate was 0.001, is 0.005"):
        run(other, tmp_path / "run")
    assert "learning_rate: 0.001\n" in (tmp_path / "run" / "config.yaml").read_text()
    assert len(read_metrics(tmp_path / "run")) == 2


def test_a_bad_line_of_metrics_costs_that_line(saved, tmp_path):
    values, output = saved
    shutil.copytree(output, tmp_path / "run")
    path = tmp_path / "run" / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[:2], "<<<<<<< HEAD\n", *lines[2:]]))
    assert timeless(run(values, tmp_path / "run")) == timeless(read_metrics(output))


def test_resume_never_sets_aside_runs_only(base, tmp_path, monkeypatch):
    values = base | {"max_steps": 2, "eval_data": "", "resume": "never"}
    project = tmp_path / "project"
    project.mkdir()
    (project / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="sets aside the folder of a run; .*: it has no config"):
        run(values, project)
    (tmp_path / "run").mkdir()
    run(values, tmp_path / "run")  # an empty folder
    monkeypatch.chdir(tmp_path / "run")
    for output in (Path("."), tmp_path / "run"):
        with pytest.raises(InputError, match="it is the working directory"):
            run(values, output)
    assert {path.name for path in tmp_path.iterdir()} == {"project", "run"}
    assert [path.name for path in project.iterdir() if path.name != ".lock"] == ["notes.txt"]


def test_exported_files_have_the_rights_of_their_siblings(base, tmp_path):
    mask = os.umask(0o027)
    try:
        run(base | {"max_steps": 2, "eval_data": ""}, tmp_path / "run")
    finally:
        os.umask(mask)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "run" / "final").iterdir()}
    assert modes == {0o640}


def test_a_run_of_other_code_does_not_read_the_other_tokens(base, tmp_path, monkeypatch):
    """The key of the cache is of the code in memory, whatever its file has become."""
    import data

    monkeypatch.setenv("SIMPER_CACHE", str(tmp_path / "cache"))
    values = base | {"max_steps": 2, "eval_data": ""}
    run(values, tmp_path / "one")
    (before,) = arrow_files("tokenized")
    original = data.tokenize_text
    monkeypatch.setattr(data, "tokenize_text", lambda tokenizer, text: original(tokenizer, text)[:])
    monkeypatch.setattr(data.tokenize_text, "__module__", "data")
    run(values, tmp_path / "two")
    assert len(arrow_files("tokenized")) == 2 and before in arrow_files("tokenized")


def test_other_bits_of_a_weight_file_are_another_model(base, tmp_path):
    """All files of the weights are hashed, not the first alone."""
    from runtime.weights import model_fingerprint

    shutil.copytree(base["model"], tmp_path / "model")
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    (tmp_path / "model" / "model.safetensors").unlink()
    names, digests = sorted(tensors), set()
    for number, part in enumerate((names[:3], names[3:]), 1):
        some = {name: tensors[name] for name in part}
        save_file(some, tmp_path / "model" / f"model-0000{number}-of-00002.safetensors")
    for file in (None, *sorted((tmp_path / "model").glob("*.safetensors"))):
        if file:
            flip(file, 8 * (file.stat().st_size - 8))
        digests.add(model_fingerprint(str(tmp_path / "model")))
    assert len(digests) == 3


def test_trainer_json_says_what_it_holds(saved):
    _, output = saved
    state = json.loads((output / "checkpoints" / "step_2" / "trainer.json").read_text())
    assert state["format"] == checkpoints.FORMAT and state["versions"]["torch"]
    (name,) = state["files"]
    file = output / "checkpoints" / "step_2" / name
    assert state["files"][name][0] == file.stat().st_size


def test_a_loss_that_depends_on_other_pairs_is_refused(base, tmp_path, monkeypatch):
    """Its gradient would depend on how a batch is split."""
    import loss

    def centered_loss(token_logps, lengths):
        losses = loss.simper_loss(token_logps, lengths)
        return losses - losses.mean()

    def mean_length_loss(token_logps, lengths):
        chosen, rejected = loss.sum_logps(token_logps, lengths).unbind(dim=1)
        return (rejected - chosen) / lengths.float().mean()

    for function in (centered_loss, mean_length_loss):
        monkeypatch.setitem(loss.LOSSES, "simper", function)
        with pytest.raises(InputError, match="a pair's loss depends on the other pairs"):
            run(base | {"max_steps": 2}, tmp_path / "run")


def test_a_loss_that_is_another_one_the_next_time_is_refused(base, tmp_path, monkeypatch):
    """As one that counts its calls, which a resume would not know."""
    import loss

    calls = []

    def counting_loss(token_logps, lengths):
        calls.append(1)
        return loss.simper_loss(token_logps, lengths) * (1 + 1e-6 * len(calls))

    monkeypatch.setitem(loss.LOSSES, "simper", counting_loss)
    with pytest.raises(InputError, match="the loss is not deterministic"):
        run(base | {"max_steps": 2}, tmp_path / "run")


def test_dropout_is_refused(base, tmp_path, monkeypatch):
    """Also where the forward at the start does not show it, as behind LoRA's B = 0."""
    import model
    from runtime import checks

    def surgery(of):
        of.model.layers[1].adapter = torch.nn.Dropout(0.1)

    def merge(of):
        if hasattr(of.model.layers[1], "adapter"):
            del of.model.layers[1].adapter

    for place in (model, checks):
        monkeypatch.setattr(place, "surgery", surgery)
        monkeypatch.setattr(place, "merge", merge)
    with pytest.raises(InputError, match="layers.1.adapter drops values at random"):
        run(base | {"max_steps": 2}, tmp_path / "run")


def test_lines_of_another_run_are_not_taken_for_its_own(saved, tmp_path):
    """A start with --resume anyway that ended before its first checkpoint has left an evaluation
    after step 2; the run then goes on with its own settings."""
    values, output = saved
    shutil.copytree(output, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_4")
    other = values | {"loss": "sft", "eval_data": values["train_data"], "resume": "anyway"}
    run(other | {"save_every": 0}, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "final")
    lines = run(values, tmp_path / "run")
    assert [(line["step"], "eval/loss" in line) for line in lines] == [(3, False), (4, False)]


def test_the_code_of_tokens_includes_what_it_imports(monkeypatch):
    """A parser in a file of its own at the top level, and a compiled pattern."""
    import re as regex
    import sys as system
    from types import ModuleType

    from conftest import ROOT

    import data
    from runtime import rows
    from runtime.identity import code_digest

    other = ModuleType("my_format")
    other.__file__, digests = str(ROOT / "my_format.py"), set()
    monkeypatch.setitem(system.modules, "my_format", other)
    for body in ("return row['a']", "return row['b']"):
        exec(f"def parse(row): {body}", vars(other))
        monkeypatch.setattr(rows, "parse", other.parse, raising=False)
        for pattern in ("a+", "a*"):
            monkeypatch.setattr(rows, "PATTERN", regex.compile(pattern), raising=False)
            digests.add(code_digest(data, rows))
    assert len(digests) == 4


# ---- What a person moved, or a disk lost ---------------------------------------------------------


def test_a_checkpoint_of_another_name_is_passed_over(saved, tmp_path, capsys):
    """Its step is written in it."""
    values, output = saved
    shutil.copytree(output, tmp_path / "run")
    folder = tmp_path / "run" / "checkpoints"
    (folder / "step_4").rename(folder / "step_9")
    run(values, tmp_path / "run")
    said = capsys.readouterr().out
    assert "step_9 is damaged: it is passed over" in said and "resuming from" in said
    assert "step_2" in said.partition("resuming from")[2].splitlines()[0]


FINAL = {
    "a weight cut off": lambda final: os.truncate(final / "model.safetensors", 1000),
    "a bit": lambda final: flip(final / "model.safetensors", 12345),
    "no config": lambda final: (final / "config.json").unlink(),
    "no weights": lambda final: (final / "model.safetensors").unlink(),
}


@pytest.mark.parametrize("name", FINAL)
def test_a_damaged_export_is_not_a_finished_run(base, tmp_path, name):
    """And once it is moved away, it is exported again."""
    values, final = (
        base | {"max_steps": 2, "save_every": 1, "eval_data": ""},
        tmp_path / "run/final",
    )
    run(values, tmp_path / "run")
    whole = (final / "model.safetensors").read_bytes()
    FINAL[name](final)
    with pytest.raises(InputError, match=f"{final} is damaged: move it away"):
        run(values, tmp_path / "run")
    final.rename(tmp_path / "away")
    run(values, tmp_path / "run")
    assert (final / "model.safetensors").read_bytes() == whole


def test_lines_of_another_run_without_checkpoints_are_kept(base, tmp_path):
    values = base | {"max_steps": 2, "save_every": 0}
    lines = run(values, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "final")  # as if it had been killed
    run(values | {"learning_rate": 2e-3}, tmp_path / "run")
    kept = (tmp_path / "run" / "metrics-until-step_0.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in kept] == lines


def test_damaged_lines_are_said(saved, tmp_path, capsys):
    values, output = saved
    shutil.copytree(output, tmp_path / "run")
    path = tmp_path / "run" / "metrics.jsonl"
    path.write_text("\0\0\n" + path.read_text() + '{"step": "3"}\n')
    run(values, tmp_path / "run")
    assert f"{path}: 2 damaged lines are left out" in capsys.readouterr().err


@pytest.mark.parametrize("damage", [b"", b"12", b"\xff\xfe", b"z"])
@pytest.mark.parametrize("name", ["sha256", "digests.json"])
def test_a_damaged_digest_is_made_anew(tmp_path, monkeypatch, name, damage):
    """Of all bytes of its record, one is enough."""
    monkeypatch.setenv("SIMPER_CACHE", str(tmp_path / "cache"))
    (tmp_path / "weights").write_bytes(b"content")
    expected = cache.files_digest([tmp_path / "weights"])
    (record,) = (tmp_path / "cache" / "digests").glob(f"*/{name}")
    whole = record.read_bytes()
    for text in (damage, whole[:-20] + damage + whole[-20 + len(damage) :]):
        if text != whole:
            record.write_bytes(text)
        assert cache.files_digest([tmp_path / "weights"]) == expected
        assert record.read_bytes() == whole


# ---- The cache's place ---------------------------------------------------------------------------


def test_a_cache_for_a_user_without_a_home(monkeypatch):
    """As in a container with any user id."""
    monkeypatch.delenv("SIMPER_CACHE")
    monkeypatch.delenv("HOME")

    def unknown(uid):
        raise KeyError(uid)

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    assert cache.cache_path() == Path(tempfile.gettempdir()) / f"simper-{os.getuid()}"


def test_a_cache_of_another_user_is_not_taken_for_a_bad_file(base, tmp_path, monkeypatch):
    monkeypatch.setenv("SIMPER_CACHE", str(tmp_path / "cache"))

    def denied(lock, **_):
        raise PermissionError(13, "Permission denied", lock.lock_file)

    monkeypatch.setattr(cache.FileLock, "acquire", denied)
    with pytest.raises(InputError) as error:
        run(base, tmp_path / "run")
    said = str(error.value)
    assert str(tmp_path / "cache" / "json") in said and "train.jsonl" not in said
    assert said.endswith("Set SIMPER_CACHE to a folder of your own")


def test_who_waits_at_a_lock_says_so(tmp_path, monkeypatch, capsys):
    """With the file, and then goes on."""
    acquire, waited = cache.FileLock.acquire, []

    def slow(lock, timeout=None):
        waited.append(timeout)
        if timeout:
            raise cache.Timeout(lock.lock_file)
        return acquire(lock)

    monkeypatch.setattr(cache.FileLock, "acquire", slow)
    with cache.hold(tmp_path / "work"):
        pass
    expected = f"waiting for another process, which holds {tmp_path / 'work'}.lock"
    assert waited == [5, None] and expected in capsys.readouterr().out
