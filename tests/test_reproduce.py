"""eval/reproduce.py, every stage, with small models, made-up instructions, and a stand-in for the
vLLM that serves the judge."""

import hashlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Thread

import pytest
import yaml
from conftest import make_model, make_tokenizer, run_python, write_pairs

from eval import alpaca_eval2, reproduce
from eval.reproduce import Stage
from runtime.errors import InputError

# Prefers the longer answer. While a file "broken" is beside it, it refuses all but 26 requests.
SERVER = """#!{python}
import http.server, json, re, sys
from pathlib import Path

here = Path(__file__).parent
(here / "started").open("a").write(" ".join(sys.argv[1:]) + "\\n")
asked = 0


class Judge(http.server.BaseHTTPRequestHandler):
    def answer(self, content):
        body = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        self.answer({{"data": []}})

    def do_POST(self):
        global asked
        asked += 1
        if asked > 26 and (here / "broken").exists():
            return self.send_error(401)
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text = request["messages"][-1]["content"]
        found = re.search(r"\\[Answer A\\]\\n(.*)\\n\\n\\[Answer B\\]\\n(.*)", text, re.S)
        a, b = map(len, map(str.strip, found.groups() if found else ("", "")))
        verdict = "TIE" if a == b else "A" if a > b else "B"
        message = {{"role": "assistant", "content": f"Compared.\\n{{verdict}}"}}
        choice = {{"index": 0, "finish_reason": "stop", "message": message}}
        kind = {{"object": "chat.completion", "created": 0, "model": request["model"]}}
        self.answer({{"id": "x", **kind, "choices": [choice]}})


http.server.HTTPServer(("localhost", {port}), Judge).serve_forever()
"""


@pytest.fixture
def setting(tmp_path, monkeypatch, model_folder):
    """Flags of a reproduction with two published models, and a function that runs it; what it needs
    is predicted in a dry run alone, since that takes seconds."""
    rival = tmp_path / "rival"
    make_model("llama", seed=1).save_pretrained(rival)
    make_tokenizer().save_pretrained(rival)
    rows = [
        {"instruction": f"instruction {n}", "output": "gold " * (n % 5), "generator": "gpt"}
        for n in range(12)
    ]
    for row in rows:
        row["output"] += "end"
    (tmp_path / "reference.json").write_text(json.dumps(rows))
    digest = hashlib.sha256(json.dumps([row["instruction"] for row in rows]).encode()).hexdigest()
    monkeypatch.setattr(alpaca_eval2, "INSTRUCTIONS_SHA256", digest)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        monkeypatch.setattr(reproduce, "PORT", free.getsockname()[1])
    vllm = tmp_path / "bin" / "vllm"
    vllm.parent.mkdir()
    vllm.write_text(SERVER.format(python=sys.executable, port=reproduce.PORT))
    vllm.chmod(0o755)

    monkeypatch.setattr(reproduce, "subprocess", Subprocess())
    flags = ["llama-3-8b-base", "--models", f"{model_folder},{rival}", "--rates", "1e-3"]
    flags += ["--gpus", 0, "--engine", "transformers", "--vllm_python", vllm.with_name("python")]
    flags += ["--reference", tmp_path / "reference.json", "--limit", 10, "--max_new_tokens", 8]
    flags += ["--judge", model_folder, "--workers", 1, "--output_dir", tmp_path / "out"]
    flags += ["--train_data", write_pairs(tmp_path / "train.jsonl", 26), "--eval_data", ""]
    flags += ["--batch_size", 8, "--max_steps", 2, "--wandb", "off"]
    flags += ["--max_length", 96, "--max_prompt_length", 60]

    needs = reproduce.needs

    def start(*more):
        predicted = needs if "--dry_run" in more else lambda *args: ("", 10)
        monkeypatch.setattr(reproduce, "needs", predicted)
        monkeypatch.setattr(sys, "argv", ["reproduce", *map(str, [*flags, *more])])
        reproduce.main()

    return start, tmp_path


class Subprocess:
    """The module, whose Popen makes a fork of a stage's python."""

    def __getattr__(self, name: str):
        return getattr(subprocess, name)

    def Popen(self, command, **options):
        return (Fork if command[0] == sys.executable else subprocess.Popen)(command, **options)


class Fork:
    """A process of run_python, which has ended when it is made."""

    def __init__(self, command, cwd, env, stdout, stderr):
        own = {name: env[name] for name in ("PYTHONPATH", "CUDA_VISIBLE_DEVICES") if name in env}
        self.done = run_python(*command[1:], cwd=cwd, **own)
        print(self.done.stdout, self.done.stderr, file=stdout, flush=True)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def wait(self) -> int:
        return self.done.returncode


def test_a_reproduction_from_the_first_stage_to_the_last(setting, capsys):
    """The judge fails in the middle: everything until then is kept, and the same command continues
    with what is missing. The tables are those of the judgments."""
    start, folder = setting
    output, server = folder / "out", folder / "bin"
    (server / "broken").touch()
    with pytest.raises(InputError, match="(?s)judge-rival failed .*Run the same command again"):
        start()
    said = capsys.readouterr().out
    order = [line.split(":")[0] for line in said.splitlines() if line.endswith(" min")]
    assert order[:4] == ["train-simper-0.001", "answer-tiny", "answer-rival", "answer-simper-0.001"]
    metrics = output / "runs" / "simper-0.001" / "metrics.jsonl"
    trained = metrics.read_bytes()
    judged = {p: p.read_text() for p in output.rglob("judgments-*.jsonl")}
    assert sum(text.count("\n") for text in judged.values()) >= 24
    (server / "broken").unlink()
    start()
    said = capsys.readouterr().out
    assert "train-simper-0.001: done before" in said and "answer-rival: done before" in said
    assert "answer-simper-0.001: done before" in said  # its weights came after it was planned
    assert metrics.read_bytes() == trained
    assert all(path.read_text().startswith(text) for path, text in judged.items())
    # Judge and tables: three models against the reference, ours against both others.
    found = {p.parent.name + "/" + p.stem: p for p in output.glob("results/*/win_rate*.json")}
    found = {name: json.loads(p.read_text()) for name, p in found.items() if ".items" not in p.name}
    ours = "simper-0.001/win_rate"
    against = [f"{ours}_against_tiny", f"{ours}_against_rival"]
    assert found.keys() == {"tiny/win_rate", "rival/win_rate", ours, *against}
    for result in found.values():
        assert result["scores"]["judged"] == 10 and result["settings"]["orders"] == 2
        assert result["settings"]["temperature"] == 0.9  # the authors'
    (path,) = output.glob("results/tiny/win_rate/*/answers.jsonl")
    answers = {line["index"]: line["output"].strip() for line in read_lines_of(path)[1:]}
    gold = [row["responses"][0] for row in read_lines_of(output / "alpaca_eval.jsonl")]
    scores = [0.5 + 0.5 * ((a > b) - (a < b)) for a, b in zip_lengths(answers, gold)]
    expected = 100 * sum(scores) / 10
    assert found["tiny/win_rate"]["scores"]["win_rate"] == pytest.approx(expected)
    report = (output / "report.md").read_text()
    assert f"| tiny | {expected:.2f} ±" in report and report in said
    header = next(line for line in report.splitlines() if "against chosen %" in line)
    assert "n = 10" in header and "− simper-0.001 [95 %]" in header
    assert "against rival %" in report
    with tarfile.open(output / "out.tar.gz") as archive:
        names = archive.getnames()
    assert "out/report.md" in names and "out/runs/simper-0.001/config.yaml" in names
    assert any(name.endswith("answers.jsonl") for name in names)
    assert not any("safetensors" in name or "checkpoints" in name for name in names)
    # The server of the judge was started twice, and is gone.
    lines = (server / "started").read_text().splitlines()
    assert len(lines) == 2 and all("--tensor-parallel-size 1" in line for line in lines)
    assert not reproduce.is_served(f"http://localhost:{reproduce.PORT}/v1")
    start()
    assert capsys.readouterr().out.count("done before") == 1 + 3 + 5
    assert len((server / "started").read_text().splitlines()) == 2  # no judge is needed
    # If a model's files have changed, every stage that wrote or reads them runs again.
    final = output / "runs" / "simper-0.001" / "final"
    (final / "config.json").touch()
    (final / "model.safetensors").touch()
    start()
    again = [line for line in capsys.readouterr().out.splitlines() if line.endswith(" min")]
    assert [line.split("-")[0] for line in again[:5]] == ["train", "answer", *["judge"] * 3]
    shutil.rmtree(output / "results" / "rival")  # and if a result is gone
    start()
    again = [line for line in capsys.readouterr().out.splitlines() if line.endswith(" min")]
    again = [line.split(":")[0] for line in again[:-1]]
    assert again == ["answer-rival", "judge-rival", "judge-simper-0.001-against-rival"]
    assert "| rival |" in (output / "report.md").read_text()
    start("--limit", 12)  # other instructions: nothing of it is done
    assert "n = 12" in (output / "report.md").read_text()
    assert capsys.readouterr().out.count("done before") == 1
    assert len((server / "started").read_text().splitlines()) == 5


def read_lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def zip_lengths(answers: dict[int, str], others: list[str]) -> list[tuple[int, int]]:
    return [(len(answers[index]), len(other)) for index, other in enumerate(others)]


def test_a_dry_run_writes_nothing(setting, capsys, monkeypatch):
    """Every command of eight GPUs, the answers on a GPU each of those that may be used, disk and
    hours; nothing is made."""
    start, folder = setting
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "8,9,10,11,12,13,14,15")
    start("--dry_run", "--gpus", 8, "--rates", "1e-3,2e-3")
    said = capsys.readouterr().out
    assert not (folder / "out").exists()
    assert "predicted for 8 × h100:" in said and re.search(r"together +\d+\.\d GB, \d", said)
    lines = dict(line.split(": ", 1) for line in said.splitlines() if ": " in line)
    assert "--seconds 0" in lines["check-gpus"]
    assert "torch.distributed.run --standalone --nproc_per_node 8" in lines["train-simper-0.002"]
    for number, name in enumerate(("tiny", "rival", "simper-0.001", "simper-0.002")):
        assert lines[f"answer-{name}"].startswith(f"CUDA_VISIBLE_DEVICES={8 + number} ")
    judgings = [name for name in lines if name.startswith("judge-")]
    assert len(judgings) == 4 + 2 * 2 and "judge-simper-0.002-against-rival" in judgings


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--rates", "fast"], "--rates fast: must be numbers"),
        (["--rates", "1e-3,0.001"], "two models have the same name: .*simper-0.001"),
        (["--models", "nowhere/at/all"], "there is no such folder"),
        (["--gpus", "4"], "--gpus 4, and torch sees 0"),
        (["--vllm_python", "/nowhere/python"], "/nowhere/vllm is not there: --vllm_python"),
        (["--rates", "1e-3,-5"], "must be between 0 and 1"),
        (["--learning_rate", "1e-3"], "--learning_rate is set by this command"),
        (["--gpu", "h200x"], "--gpu h200x: must be one of 4090"),
    ],
)
def test_what_is_missing_is_named(setting, monkeypatch, flags, message):
    start, folder = setting
    monkeypatch.setattr(reproduce.Stage, "run", lambda stage, output: None)
    with pytest.raises(InputError, match=message):
        start(*flags)


def test_a_disk_that_is_too_small_is_refused(setting, monkeypatch):
    start, folder = setting
    monkeypatch.setattr(reproduce.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 9}))
    with pytest.raises(InputError, match="training writes 0 GB, 0 are free"):
        start()
    assert not (folder / "out" / "runs").exists()


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP"])
def test_a_signal_ends_what_runs(tmp_path, name, count):
    """Stages, side by side or alone, each of which writes what a checkpoint would be."""
    number = signal.Signals[name]
    code = """
import pathlib, signal, sys, time
def end(*_):
    time.sleep(0.2)
    pathlib.Path(sys.argv[1]).write_text("saved")
    sys.exit(1)
signal.signal(signal.SIGTERM, end)
pathlib.Path(sys.argv[1]).write_text("started")
time.sleep(60)
"""
    files = [tmp_path / name for name in "ab"[:count]]
    stages = [Stage(f.name, [sys.executable, "-c", code, str(f)]) for f in files]

    def when_all_run() -> None:
        while not all(f.exists() and f.read_text() == "started" for f in files):
            time.sleep(0.05)
        os.kill(os.getpid(), number)

    before = signal.signal(number, reproduce.end_stages)
    Thread(target=when_all_run, daemon=True).start()
    try:
        with pytest.raises(SystemExit) as ended:
            if count == 1:
                stages[0].run(tmp_path)
            with ThreadPoolExecutor(count) as pool:
                list(pool.map(lambda stage: stage.run(tmp_path), stages))
    finally:
        signal.signal(number, before)
    assert ended.value.code == 128 + number
    assert {f.read_text() for f in files} == {"saved"}
    assert not any(stage.is_done(tmp_path) for stage in stages)


def test_the_setups_are_those_of_the_recipes():
    """The first rate and the start are the recipe's; a second rate is named in it."""
    for setup, (rates, start, *_) in reproduce.SETUPS.items():
        text = (reproduce.RECIPES / f"{setup}.yaml").read_text()
        values = yaml.safe_load(text)
        assert (float(values["learning_rate"]), values["model"]) == (rates[0], start)
        for rate in rates[1:]:
            assert f"has {rate:g}".replace("e-0", "e-") in text
