"""What ends a run, or does not let it begin: signals, faults, full disks, restarts; another run in
its folder, and ranks that do not belong together."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import (
    ROOT,
    as_flags,
    command,
    make_tokenizer,
    read_checkpoint,
    read_metrics,
    run,
    run_python,
    run_several,
    start_two,
    timeless,
    write_pairs,
)

import train
from runtime import checkpoints, log
from runtime.errors import InputError
from runtime.identity import VERSIONS
from train import Config

PATIENCE = 180  # seconds, after which a test takes something that does not happen for lost


# ---- SIGTERM and restarts ------------------------------------------------------------------------


def test_torchrun_heals_and_sigterm_saves_and_the_same_command_goes_on(base, tmp_path):
    values = base | {"max_steps": 100, "save_every": 0, "eval_every": 0}
    metrics = tmp_path / "run" / "metrics.jsonl"
    launch = command(values, tmp_path / "run", 2)
    launch[3:3] = ["--max-restarts", "1"]
    process = subprocess.Popen(launch, cwd=ROOT, stdout=subprocess.PIPE, text=True)

    def wait_for_lines(other_than: int = 0) -> int:
        deadline = time.monotonic() + PATIENCE
        while (
            not metrics.exists()
            or metrics.stat().st_ino == other_than
            or len(log.read_lines(metrics)) < 4
        ):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        return metrics.stat().st_ino

    try:
        first = wait_for_lines()
        with pytest.raises(InputError, match="run: another run is writing to it"):
            log.lock_folder(tmp_path / "run")
        ranks = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(ranks[-1]), signal.SIGKILL)
        wait_for_lines(other_than=first)  # begun again: there was no checkpoint yet
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=PATIENCE)
    finally:
        process.kill()
    assert process.returncode != 0 and "stopped by SIGTERM after step" in output
    (checkpoint,) = (tmp_path / "run" / "checkpoints").iterdir()
    reached = int(checkpoint.name.removeprefix("step_"))
    assert 3 <= reached < 100 and not (tmp_path / "run" / "final").exists()
    lines = run(values, tmp_path / "run")
    assert [line["step"] for line in lines] == [0, *range(1, 101), 100]
    run(values, tmp_path / "run")  # and once more is no harm: it says that the run is finished
    assert read_metrics(tmp_path / "run") == lines


@pytest.mark.parametrize("name", ["SIGINT", "SIGHUP", "SIGUSR1"])
@pytest.mark.parametrize("ranks", [0, 2])
def test_every_signal_that_stops_a_run_saves(base, tmp_path, name, ranks):
    """Without a checkpoint set, in one line; and the same command goes on."""
    values = base | {"max_steps": 5_000, "save_every": 0, "eval_every": 0}
    flags = as_flags(values, tmp_path / "run")
    stop = lambda processes: send(processes[-1:], name, tmp_path / "run", lines=4)  # noqa: E731
    done = run_python("train.py", *flags, ranks=ranks, meanwhile=stop)
    assert done.returncode == 128 + signal.Signals[name] and "Traceback" not in done.stderr
    (checkpoint,) = (tmp_path / "run" / "checkpoints").iterdir()
    step = int(checkpoint.name.removeprefix("step_"))
    assert 3 <= step < 5_000 and not (tmp_path / "run" / "final").exists()
    assert f"stopped by {name} after step {step}; rerun to resume there" in done.stdout


def send(processes, name: str, output: Path, lines: int) -> None:
    """A signal to processes that train, when there are so many lines of metrics."""
    deadline, metrics = time.monotonic() + PATIENCE, output / "metrics.jsonl"
    while len(log.read_lines(metrics)) < lines:
        assert processes[0].is_alive() and time.monotonic() < deadline
        time.sleep(0.02)
    for process in processes:
        os.kill(process.pid, signal.Signals[name])


IGNORING = "import signal, train; signal.signal(signal.SIGHUP, signal.SIG_IGN); "
IGNORING += "import sys; train.train(train.parse_args(sys.argv[1:]))"


def test_a_signal_that_is_ignored_from_the_start_stays_so(base, tmp_path):
    """As nohup starts a run."""
    values = base | {"max_steps": 30, "eval_every": 0}
    flags = as_flags(values, tmp_path / "run")
    hang_up = lambda processes: send(processes, "SIGHUP", tmp_path / "run", lines=2)  # noqa: E731
    done = run_python("-c", IGNORING, *flags, meanwhile=hang_up)
    assert done.returncode == 0 and (tmp_path / "run" / "final").exists()


SLOW_TO_SAVE = """
import signal, sys, time, train

def save(state, step):
    print("saves", flush=True)
    time.sleep(60)

train.TrainerState.save = save
train.train(train.parse_args(sys.argv[1:]))
"""


def test_a_second_ctrl_c_ends_at_once(base, tmp_path):
    values = base | {"max_steps": 5_000, "save_every": 0, "eval_every": 0}
    began = []

    def press_twice(processes):
        send(processes, "SIGINT", tmp_path / "run", lines=2)
        began.append(time.monotonic())
        while processes[0].is_alive() and time.monotonic() < began[0] + 50:
            with contextlib.suppress(ProcessLookupError):
                os.kill(processes[0].pid, signal.SIGINT)
            time.sleep(1)

    flags = as_flags(values, tmp_path / "run")
    done = run_python("-c", SLOW_TO_SAVE, *flags, meanwhile=press_twice)
    assert done.returncode == 130 and done.stderr.endswith("ended by SIGINT\n")
    assert "Traceback" not in done.stderr and time.monotonic() - began[0] < 50


def test_ranks_do_not_outlive_torchrun(base, tmp_path):
    """Which dies of SIGUSR1 and does not pass it on."""
    values = base | {"max_steps": 5_000, "save_every": 0, "eval_every": 0}
    process = subprocess.Popen(command(values, tmp_path / "run", 2), cwd=ROOT)
    process.is_alive = lambda: process.poll() is None
    try:
        send([process], "SIGUSR1", tmp_path / "run", lines=3)
        assert process.wait(timeout=PATIENCE) == -signal.SIGUSR1
    finally:
        process.kill()
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            os.close(log.lock_folder(tmp_path / "run"))  # rank 0 has ended
            break
        except InputError:
            assert time.monotonic() < deadline
            time.sleep(0.1)
    assert [path.name[:5] for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step_"]


def test_sigterm_while_the_data_is_tokenized_leaves_no_worker_behind(base, tmp_path):
    row = Path(base["train_data"]).read_text().splitlines()[0]
    (tmp_path / "many.jsonl").write_text(f"{row}\n" * 40_000)
    values = base | {"train_data": str(tmp_path / "many.jsonl"), "eval_data": ""}
    launch = [sys.executable, "train.py", *as_flags(values, tmp_path / "run")]
    process = subprocess.Popen(launch, cwd=ROOT)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    deadline, workers = time.monotonic() + PATIENCE, []
    # Those that tokenize, and one that holds their queue.
    while len(workers) < 1 + min(os.cpu_count(), 2):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
        workers = children.read_text().split()
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=PATIENCE) == 143

    def alive(worker: str) -> bool:
        try:
            return Path(f"/proc/{worker}/cmdline").read_bytes() != b""  # a dead one that waits
        except OSError:
            return False

    while any(map(alive, workers)):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_sigterm_at_any_moment_loses_no_line(base, tmp_path, sigterm_after):
    """Stopped at every place that asks for the signal, a step or an evaluation's micro-batch: the
    lines are in the end those of a run that was not stopped."""
    values = base | {"max_steps": 2, "save_every": 0, "eval_every": 1}
    whole, stops = timeless(run(values, tmp_path / "whole")), 0
    for stops in range(1000):
        output = tmp_path / str(stops)
        sigterm_after(stops)
        try:
            run(values, output)
            break  # there is no other place
        except SystemExit as error:
            assert error.code == 143 and not (output / "final").exists()
        sigterm_after(1000)
        assert timeless(run(values, output)) == whole
    evaluation_batches = 2
    assert stops == 2 + 3 * evaluation_batches


def test_a_checkpoint_of_an_evaluation_that_sigterm_stopped_is_that_of_its_step(
    base, tmp_path, sigterm_after
):
    """In bfloat16 the model is sharded also on one rank, and a forward without a backward leaves
    the root's parameters gathered, as copies in bfloat16."""
    values = base | {"dtype": "bfloat16", "max_steps": 2, "save_every": 1, "eval_every": 1}
    run(values | {"keep_checkpoints": 0}, tmp_path / "whole")
    # Asked once a step and once a held-out micro-batch: before the second one after step 1. What is
    # saved at the end of the step goes, so that it is saved when the evaluation has been stopped.
    sigterm_after(4)
    with pytest.raises(SystemExit):
        run(values | {"save_every": 0}, tmp_path / "run")
    expected, found = (
        read_checkpoint(tmp_path / name / "checkpoints" / "step_1") for name in ("whole", "run")
    )
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensor, found[name]), name


def test_an_evaluation_that_is_made_again_is_logged_once(base, tmp_path, sigterm_after):
    """Stopped in the evaluation after step 1; continued, and killed when it had been made."""
    values = base | {"max_steps": 2, "save_every": 0, "eval_every": 1}
    sigterm_after(4)
    with pytest.raises(SystemExit):
        run(values, tmp_path / "run")
    sigterm_after(1000)
    run(values, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "final")  # as if killed before it was written
    lines = run(values, tmp_path / "run")
    assert timeless(lines) == timeless(run(values, tmp_path / "whole"))


SIGTERM_OF_ONE_RANK = """
from types import ModuleType

class Signal:
    asked = 0

    def __call__(self):
        self.asked += 1
        return 15 * (os.environ["RANK"] == "1" and self.asked >= (2, 1)[number])

patched = ModuleType("processes")
vars(patched).update(vars(train.processes), watch_signals=Signal)
train.processes = patched
finish = train.train

def stopped(config):
    try:
        finish(config)
    except SystemExit as error:
        assert error.code == 143

train.train = stopped
"""


def test_sigterm_of_one_rank_stops_all(base, tmp_path):
    """In step 2, and in the evaluation before training."""
    values = base | {"max_steps": 4, "save_every": 0}
    runs = [(values | {"eval_data": ""}, tmp_path / "step"), (values, tmp_path / "evaluation")]
    said = run_several(runs, tmp_path, code=SIGTERM_OF_ONE_RANK)
    assert re.findall(r"stopped by SIGTERM after step (\d+);", said) == ["2", "0"]
    assert [path.name for path in (tmp_path / "step" / "checkpoints").iterdir()] == ["step_2"]
    assert not (tmp_path / "evaluation" / "checkpoints").exists()


def test_log_every_with_a_stop_in_between_reports_every_step_once(base, tmp_path, sigterm_after):
    values = base | {"max_steps": 6, "log_every": 4, "eval_data": ""}
    each = run(values | {"log_every": 1}, tmp_path / "each")
    sigterm_after(2)
    with pytest.raises(SystemExit):
        run(values, tmp_path / "run")
    sigterm_after(1000)
    lines = run(values, tmp_path / "run")
    assert [line["step"] for line in lines] == [3, 4, 6]
    for line, steps in zip(lines, (each[:3], each[3:4], each[4:])):
        assert line["loss"] == pytest.approx(sum(s["loss"] for s in steps) / len(steps), abs=1e-9)


def test_a_slow_checkpoint_warns_of_torchruns_patience(base, tmp_path, monkeypatch, capsys):
    clock = iter(range(0, 10**6, 20))
    monkeypatch.setattr(checkpoints.time, "perf_counter", lambda: next(clock))
    for place, expected in (("TORCHELASTIC_RUN_ID", True), ("OTHER", False)):
        monkeypatch.setenv(place, "1")
        run(base | {"max_steps": 1, "eval_data": ""}, tmp_path / place)
        warned = "torchrun kills a run 30 s after SIGTERM" in capsys.readouterr().err
        assert warned == expected
        monkeypatch.delenv(place)


# ---- Faults and full disks -----------------------------------------------------------------------


def test_a_run_that_fails_at_the_export_continues_from_its_end(base, tmp_path):
    """No step is taken again. (In a copy of its folder, which is locked until its process ends.)"""
    values, output = base | {"max_steps": 3, "save_every": 2}, tmp_path / "run"
    output.mkdir()
    (output / "final.part").touch()  # where the export wants a folder
    with pytest.raises(OSError):
        run(values, output)
    lines = read_metrics(output)
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 3]
    shutil.copytree(output, tmp_path / "copy", ignore=shutil.ignore_patterns("final.part"))
    assert run(values, tmp_path / "copy") == lines
    assert (tmp_path / "copy" / "final" / "model.safetensors").exists()


LIMITED = """
import json, resource, sys
import torch
import train
from runtime import command_line, log

log.git_state = lambda: ("", "")  # whose difference may be larger than what a file may have
said = []
for limit, flags in json.loads(sys.argv[1]):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        command_line.run_command(lambda: train.train(train.parse_args(flags)))
        said.append("nothing")
    except SystemExit as end:
        said.append(str(end))
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
print(json.dumps(said))
"""
# What cannot be written: the most bytes that a file may have, settings, the lines that were logged.
FULL = {
    "tokenized rows": (9_000, {}, None),
    "metrics.jsonl": (4_500, {}, 4),
    "checkpoint": (40_000, {"save_every": 1}, 2),
    "export": (40_000, {"save_every": 0}, 5),
}


@pytest.fixture(scope="module")
def full_disks(base, tmp_path_factory) -> dict[str, tuple[dict, Path, str]]:
    """Runs that could not write one file: {FULL: (values, output, what they said)}."""
    folder, cases, given = tmp_path_factory.mktemp("full"), {}, []
    new = write_pairs(folder / "train.jsonl", 26, seed=3)  # which are not cached
    run(base | {"max_steps": 1}, folder / "cached")
    for name, (limit, changes, _) in FULL.items():
        values, output = base | {"max_steps": 2, "eval_every": 1} | changes, folder / name
        values |= {"train_data": new} if limit == 9_000 else {}
        cases[name] = values, output
        given.append((limit, as_flags(values, output)))
    process = [sys.executable, "-c", LIMITED, json.dumps(given)]
    done = subprocess.run(process, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    said = json.loads(done.stdout.splitlines()[-1])
    return {name: (*cases[name], text) for name, text in zip(cases, said, strict=True)}


@pytest.mark.parametrize("name", FULL)
def test_a_file_that_cannot_be_written_is_one_line(full_disks, name):
    """The limit on the size of a file stands for a full disk. Without it, the run goes on."""
    values, output, said = full_disks[name]
    assert re.match(r"error: .*(File too large|\(os error 27\))", said), said
    assert ". A run writes to its output_dir and to SIMPER_CACHE, " in said and "\n" not in said
    path, lines = output / "metrics.jsonl", FULL[name][2]
    assert (len(log.read_lines(path)) == lines) if lines else not output.exists()
    assert not (output / "final").exists() and not [*output.glob("checkpoints/step_?")]
    assert [line["step"] for line in run(values, output)] == [0, 1, 1, 2, 2]


def test_held_out_tokens_need_an_embedding(base, tmp_path, model_folder, monkeypatch):
    """Which is found out before a model is loaded."""
    shutil.copytree(model_folder, tmp_path / "model")
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([f"w{n}" for n in range(320 - len(tokenizer) + 1)])
    tokenizer.save_pretrained(tmp_path / "model")
    row = {"prompt": "what?", "chosen": tokenizer.convert_ids_to_tokens(320), "rejected": "a"}
    (tmp_path / "heldout.jsonl").write_text(json.dumps(row))
    monkeypatch.setattr(train, "load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    names = {"model": tmp_path / "model", "eval_data": tmp_path / "heldout.jsonl"}
    with pytest.raises(InputError, match="gives token 320, the model has 320"):
        run(base | {name: str(path) for name, path in names.items()}, tmp_path / "run")


# ---- Locks, and ranks that do not belong together ------------------------------------------------


def test_two_runs_in_one_folder(base, tmp_path):
    """The second is refused before it changes a file."""
    values, output = base | {"max_steps": 1}, tmp_path / "run"
    output.mkdir()
    (output / "config.yaml").write_text("output_dir: of the first")
    lock = log.lock_folder(output)
    try:
        for resume in ("auto", "never"):
            with pytest.raises(InputError, match="run: another run is writing to it"):
                run(values | {"resume": resume}, output)
        assert [path.name for path in tmp_path.iterdir()] == ["run"]
        assert {path.name for path in output.iterdir()} == {".lock", "config.yaml"}
        assert (output / "config.yaml").read_text() == "output_dir: of the first"
    finally:
        os.close(lock)
    assert len(run(values, output)) == 3


def ranks_that_differ(rank: int, folder: Path) -> None:
    store = torch.distributed.FileStore(str(folder / "store"), 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    config = Config(model="m", train_data="d", output_dir=str(folder / "run"))
    same = {"training tokens": "", "model files": "", "code": ""}
    for name in same:
        with pytest.raises(InputError, match=f"rank 1 and rank 0 do not have the same {name}: "):
            checkpoints.find_start(config, same | {name: f"hash {rank}"})
    VERSIONS["torch"], version = f"2.{rank}", VERSIONS["torch"]
    with pytest.raises(InputError, match="rank 1 and rank 0 do not have the same torch: "):
        checkpoints.find_start(config, same)
    VERSIONS["torch"] = version
    assert not (folder / "run").exists()
    # On two machines without a common file system, each would write its half of a checkpoint to a
    # folder of its own, and none could be read.
    (folder / str(rank)).mkdir()
    os.chdir(folder / str(rank))
    checkpoints.time.sleep = lambda seconds: None
    own = Config(model="m", train_data="d", output_dir="run")
    with pytest.raises(InputError, match="run of rank 1 is not that of rank 0: it must be on a"):
        checkpoints.find_start(own, same)
    assert checkpoints.find_start(config, same) == checkpoints.Start()
    torch.distributed.destroy_process_group()


def test_ranks_with_other_data_code_versions_or_folders_are_refused(tmp_path):
    start_two(ranks_that_differ, tmp_path)
    for folder in (tmp_path / "run", tmp_path / "0" / "run"):
        assert [path.name for path in folder.iterdir()] == [".lock"]
