"""Models and data are read, never run; a run keeps secrets to itself; nothing is written elsewhere
than where it belongs. (That only the expected wheel is unpacked: test_demo.py.)"""

import gzip
import json
import pickle
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import make_tokenizer, run_python
from safetensors.torch import load_file

import train
from data import load_data
from demo import smollm2
from runtime.cache import file_digest
from runtime.checkpoints import read_state, write_state
from runtime.errors import InputError
from runtime.weights import load_tokenizer
from train import parse_args

ROOT = Path(__file__).parent.parent
TEXT = {"prompt": "what is two?", "chosen": "plus", "rejected": "what"}


class Payload:
    """When it is unpickled, it writes a file."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return Path.write_text, (self.marker, "run")


@pytest.fixture
def marker(tmp_path):
    """A file that only foreign code would write."""
    path = tmp_path / "marker"
    yield path
    assert not path.exists()


@pytest.fixture
def flags(tmp_path, model_folder):
    """A run of one step, whose model is a copy that the test may change."""
    shutil.copytree(model_folder, tmp_path / "model")
    rows = [TEXT | {"chosen": "plus " * n} for n in (1, 2, 3, 4)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = {"model": tmp_path / "model", "train_data": tmp_path / "train.jsonl"}
    values |= {"eval_data": "", "output_dir": tmp_path / "run", "wandb": "off", "batch_size": 4}
    values |= {"max_length": 96, "max_prompt_length": 60, "save_every": 1, "warmup_ratio": 0}
    return [f"--{name}={value}" for name, value in values.items()]


def run(flags: list[str]) -> None:
    try:
        train.train(parse_args(flags))
    finally:
        if dist.is_initialized():  # it has failed
            dist.destroy_process_group()


# ---- Nothing is unpickled ------------------------------------------------------------------------


def test_the_payload_is_one(tmp_path):
    pickle.loads(pickle.dumps(Payload(tmp_path / "marker")))
    assert (tmp_path / "marker").exists()


@pytest.mark.parametrize("saved", ["by torch", "by pickle"])
def test_weights_are_not_unpickled(flags, marker, tmp_path, saved):
    """Files that torch.save wrote are read, unless they hold more than tensors."""
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    (tmp_path / "model" / "model.safetensors").unlink()
    file = tmp_path / "model" / "pytorch_model.bin"
    if saved == "by torch":
        torch.save(tensors, file)
        run([*flags, f"--output_dir={tmp_path / 'harmless'}"])
    tensors["payload"] = Payload(marker)
    with open(file, "wb") as opened:
        (torch.save if saved == "by torch" else pickle.dump)(tensors, opened)
    with pytest.raises(InputError, match="the weights cannot be used"):
        run(flags)


def test_checkpoints_are_not_unpickled(flags, marker, tmp_path):
    run(flags)
    checkpoint = tmp_path / "run" / "checkpoints" / "step_1"
    for file in (*checkpoint.glob("*.safetensors"), checkpoint / ".metadata"):
        file.write_bytes(pickle.dumps(Payload(marker)))
    files = {path.name: path for path in checkpoint.glob("*.safetensors")}
    files = {name: [path.stat().st_size, file_digest(path)] for name, path in files.items()}
    write_state(checkpoint, read_state(checkpoint) | {"files": files})
    shutil.rmtree(tmp_path / "run" / "final")
    with pytest.raises(InputError, match="step_1 cannot be read"):
        run(flags)


def test_a_kept_reference_is_not_unpickled(flags, marker, tmp_path):
    run([*flags, "--loss=dpo"])
    file = tmp_path / "run" / "reference.safetensors"
    whole = {name: tensor.clone() for name, tensor in load_file(file).items()}
    file.write_bytes(pickle.dumps(Payload(marker)))
    for folder in ("final", "checkpoints"):
        shutil.rmtree(tmp_path / "run" / folder)
    run([*flags, "--loss=dpo"])
    again = load_file(file)  # it was computed again
    assert again.keys() == whole.keys() != set()
    assert all(torch.equal(again[name], tensor) for name, tensor in whole.items())


# ---- No code of others ---------------------------------------------------------------------------


def test_code_that_comes_with_a_model_is_not_run(flags, marker, tmp_path):
    """Neither the model's nor the tokenizer's: transformers' own classes are used."""
    code = f"import pathlib\npathlib.Path({str(marker)!r}).write_text('run')\n"
    for name, key in (("config.json", "AutoModelForCausalLM"), ("tokenizer_config.json", "")):
        path = tmp_path / "model" / name
        classes = {key: "mine.Mine", "AutoConfig": "mine.Mine"} if key else {}
        classes = classes or {"AutoTokenizer": ["mine.Mine", "mine.Mine"]}
        path.write_text(json.dumps(json.loads(path.read_text()) | {"auto_map": classes}))
        path.with_name("mine.py").write_text(code + "class Mine: pass\n")
    run(flags)
    assert (tmp_path / "run" / "final" / "model.safetensors").exists()
    assert not (tmp_path / "run" / "final" / "mine.py").exists()


def test_a_tokenizer_that_needs_its_own_code_is_refused(marker, tmp_path):
    code = f"import pathlib\npathlib.Path({str(marker)!r}).write_text('run')\n"
    (tmp_path / "mine.py").write_text(code)
    config = {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["mine.Mine", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="no tokenizer can be loaded"):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize("source", ["pairs", "pairs/pairs.py"])
def test_a_script_that_comes_with_data_is_not_run(marker, tmp_path, monkeypatch, source):
    monkeypatch.chdir(tmp_path)
    Path("pairs").mkdir()
    code = f"import pathlib\npathlib.Path({str(marker)!r}).write_text('run')\n"
    Path("pairs/pairs.py").write_text(code)
    Path("pairs/train.jsonl").write_text(json.dumps(TEXT))
    with pytest.raises(InputError, match=f"^{source}: cannot be read"):
        load_data(source, make_tokenizer(), 200, 100)


# ---- Secrets and places --------------------------------------------------------------------------


def test_no_secret_is_written_or_printed(flags, tmp_path):
    names = ("WANDB_API_KEY", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "OPENAI_API_KEY")
    secrets = {name: f"{number}" * 40 for number, name in enumerate(names, 5)}
    for wandb in ("off", "offline"):
        where = f"--output_dir={tmp_path / wandb}"
        done = run_python("train.py", *flags, f"--wandb={wandb}", where, **secrets)
        assert done.returncode == 0, done.stderr[-2000:]
        printed = done.stdout.encode(), done.stderr.encode()
        written = [path for path in (tmp_path / wandb).rglob("*") if path.is_file()]
        assert (tmp_path / wandb / "wandb").exists() == (wandb == "offline")
        for content in (*printed, *(path.read_bytes() for path in written)):
            assert not [name for name, secret in secrets.items() if secret.encode() in content]


def listing(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if path.is_file()}


def test_names_within_archives_lead_nowhere(tmp_path, monkeypatch):
    """Neither those in a wheel, of which one member is read, nor the one in a .gz file's head."""
    wheel, scratch = tmp_path / "a.whl", tmp_path / "cache" / "scratch"
    scratch.mkdir(parents=True)
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("../../escaped", "text")
        archive.writestr(smollm2.GGUF, "not a model")
    with open(tmp_path / "rows.jsonl.gz", "wb") as file:
        with gzip.GzipFile("../../escaped", "wb", fileobj=file) as compressed:
            compressed.write(json.dumps(TEXT).encode())
    before = listing(tmp_path)
    with pytest.raises(Exception):  # noqa: B017 it is no model
        smollm2.convert(wheel, scratch, tmp_path / "cache" / "folder")
    assert len(load_data(str(tmp_path / "rows.jsonl.gz"), make_tokenizer(), 200, 100).rows) == 1
    assert listing(tmp_path) - before <= {scratch / smollm2.GGUF}
    assert not list(tmp_path.parent.glob("escaped"))


def test_a_row_or_a_source_that_names_a_path_reads_and_writes_none(tmp_path, monkeypatch):
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    (tmp_path / "secret").write_text("a secret")
    row = TEXT | {"chosen": "../secret", "source": "../../secret", "file": "../secret"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    before, tokenizer = listing(tmp_path), make_tokenizer()
    found = load_data("../rows.jsonl", tokenizer, 200, 100).rows[0]
    assert tokenizer.decode(found["responses"][0]) == "../secret<|im_end|>"
    assert found["source"] == "../rows.jsonl"
    assert listing(tmp_path) == before
