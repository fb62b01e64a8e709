"""A model of the hub, of which a server on this machine is a stub."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import datasets
import pytest
from conftest import ROOT, as_flags, read_metrics, run, timeless

from eval import generate
from runtime import cache, weights
from runtime.errors import InputError
from runtime.rows import load_rows

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub(model_folder, tmp_path):
    """(its address, the requests so far as "METHOD path", the folder whose files it serves as those
    of someone/model). Those of someone/data are in its folder `data`."""
    served, asked = shutil.copytree(model_folder, tmp_path / "served"), []
    (served / "data").mkdir()
    (served / "data" / "README.md").write_text("# Pairs\n")

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            path = self.path.partition("?")[0]
            asked.append(f"{self.command} {path}")
            kind = "data" if "someone/data" in path else "model"
            folder = served / "data" if kind == "data" else served
            file = folder / path.rpartition("/")[2]
            content, status = b"{}", 404
            if path.startswith("/api/") and f"/someone/{kind}" in path:
                paths = sorted(filter(Path.is_file, folder.iterdir()))
                files = [(path.name, path.stat().st_size) for path in paths]
                answer = {"id": f"someone/{kind}", "sha": COMMIT}
                answer["siblings"] = [{"rfilename": name} for name, _ in files]
                if "/tree/" in path:
                    answer = [
                        {"type": "file", "path": name, "size": size, "oid": name}
                        for name, size in files
                    ]
                content, status = json.dumps(answer).encode(), 200
            elif "/resolve/" in path and file.is_file():
                content, status = file.read_bytes(), 200
            self.send_response(status)
            self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
            self.send_header("X-Repo-Commit", COMMIT)
            if status == 404:
                self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        do_HEAD = do_GET

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("localhost", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://localhost:{server.server_port}", asked, served
    server.shutdown()


def test_a_node_asks_the_hub_once(hub, base, tmp_path):
    """However many ranks it has, and the weights in one format only, although both are there."""
    address, asked, served = hub
    (served / "pytorch_model.bin").write_bytes(b"not to be fetched")
    for name in ("train", "test"):
        file = base["train_data" if name == "train" else "eval_data"]
        rows = datasets.load_dataset("json", data_files=file)
        rows["train"].to_parquet(served / "data" / f"{name}.parquet")
    values, counts = base | {"model": "someone/model@v1", "max_steps": 2}, []
    values |= {"train_data": "someone/data@v1", "eval_data": "someone/data@v1:test"}
    for ranks in (1, 2):
        settings = {"HF_ENDPOINT": address, "HF_HUB_OFFLINE": "0"}
        folders = ("HF_HOME", "HF_DATASETS_CACHE", "SIMPER_CACHE")
        settings |= {name: str(tmp_path / f"{name}{ranks}") for name in folders}
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        launch += ["--nproc_per_node", str(ranks), "train.py"]
        command = [*launch, *as_flags(values, tmp_path / str(ranks))]
        environment = os.environ | settings
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        counts.append(Counter(asked))
        asked.clear()
    # A request that took too long, on a busy machine, is made again: not a rank's own requests.
    assert counts[1].keys() == counts[0].keys()
    assert sum(counts[1].values()) < 1.5 * sum(counts[0].values())
    assert not any("pytorch_model.bin" in request for request in counts[0])
    weights = f"GET /someone/model/resolve/{COMMIT}/model.safetensors"
    assert counts[0][weights] >= 1
    lines = timeless(run(base | {"max_steps": 2}, tmp_path / "of a folder"))
    assert timeless(read_metrics(tmp_path / "1")) == lines
    for ranks in ("1", "2"):
        head = (tmp_path / ranks / "config.yaml").read_text()
        for name in ("someone/model@v1", "someone/data@v1", "someone/data@v1:test"):
            assert f"# commit of {name}: {COMMIT}\n" in head
    config = (tmp_path / "1" / "final" / "config.json").read_text()
    assert str(tmp_path) not in config


def test_answers_of_a_model_of_the_hub(model_folder, tmp_path, monkeypatch):
    """Its small files come first, and its weights before they are read."""
    snapshot, patterns = tmp_path / "models--someone--else" / "snapshots" / COMMIT, []
    snapshot.mkdir(parents=True)

    def download(name, revision, allow_patterns, ignore_patterns):
        assert name == "someone/else" and revision == (COMMIT if patterns else None)
        patterns.append(allow_patterns)
        for file in model_folder.iterdir():
            if any(file.match(pattern) for pattern in allow_patterns):
                shutil.copy(file, snapshot)
        return str(snapshot)

    monkeypatch.setattr(weights, "snapshot_download", download)
    options = {"prompts": ["what?"], "max_new_tokens": 4}
    expected = generate.answer(str(model_folder), **options)
    assert generate.answer("someone/else", path=tmp_path / "answers", **options) == expected
    assert [kind in ("*.safetensors", "*.json") for (kind, *_) in patterns] == [True, True]
    assert generate.short_name("someone/else") == "else"


def test_what_the_hub_does_not_have_is_said(monkeypatch, tmp_path):
    def download(name, **options):
        (tmp_path / "empty").mkdir(exist_ok=True)
        if "license" in name:
            raise OSError("access is restricted")
        return str(tmp_path / "empty")

    monkeypatch.setattr(weights, "snapshot_download", download)
    with pytest.raises(InputError, match="someone/license: the model cannot be fetched: access is"):
        weights.resolve_model("someone/license")
    with pytest.raises(InputError, match="no weights"):
        weights.model_fingerprint(weights.resolve_model("someone/empty"))


def test_a_folder_that_is_not_there_is_not_asked_of_the_hub(monkeypatch, tmp_path):
    """Where the first part of a name is a folder here."""
    monkeypatch.setattr(weights, "snapshot_download", lambda *_, **__: pytest.fail("asks the hub"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    for name in ("runs/no-such", "./none", "/none/at/all", "~/none"):
        with pytest.raises(InputError, match=f"{name}: there is no such folder"):
            weights.resolve_model(name)


def test_the_demos_data_are_found_from_any_directory(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert len(load_rows("demo/heldout.jsonl")) > 0
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "heldout.jsonl").write_text('{"prompt": "a"}\n')
    assert len(load_rows("demo/heldout.jsonl")) == 1  # where there is one


def test_a_digest_is_kept_until_the_file_changes(tmp_path, monkeypatch):
    file, read = tmp_path / "weights", []
    digest = cache.file_digest
    monkeypatch.setattr(cache, "file_digest", lambda *args: read.append(args) or digest(*args))
    for content in (b"one", b"one", b"two"):
        if not file.exists() or file.read_bytes() != content:
            file.write_bytes(content)
            os.utime(file, ns=(0, 0))  # as `cp -p` keeps it
            time.sleep(0.01)
        expected = hashlib.sha256(hashlib.sha256(content).digest()).hexdigest()
        assert cache.files_digest([Path(file)]) == expected
    # (The rest are of the cache itself.)
    assert sum(args[1:] == (hashlib.sha256,) for args in read) == 2
