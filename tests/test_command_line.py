"""The command line (recipes, flags, errors), wandb, and the processes of a run."""

import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import transformers
import yaml
from conftest import CHATML, ROOT, as_flags, run, run_python, timeless

import data
from loss import LOSSES
from runtime import processes
from runtime.command_line import choose_loss
from runtime.errors import InputError
from runtime.log import start_trackio
from train import Config, parse_args

# ---- Recipes and flags ---------------------------------------------------------------------------


def test_whole_numbers_stay_whole_where_the_default_is(monkeypatch):
    """For a loss that counts, such as one of the k worst tokens; its other values stay numbers."""

    def worst_loss(token_logps, lengths, k=2, beta=1):
        return k, beta

    monkeypatch.setitem(LOSSES, "worst", worst_loss)
    loss, asked = choose_loss("worst", "k=3,beta=0.5")
    assert (loss(0, 0), asked) == ((3, 0.5), []) and isinstance(loss(0, 0)[0], int)
    assert choose_loss("worst", "k=3.0")[0].keywords == {"k": 3}
    assert choose_loss("dpo", "beta=1")[0].keywords == {"beta": 1.0}


def test_recipe_and_command_line_precedence(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "model: m\ntrain_data: d\noutput_dir: o\nlearning_rate: 3e-7\nbatch_size: 64\n"
    )
    config = parse_args([str(recipe), "--batch_size=32", "--compile", "true"])
    found = (config.learning_rate, config.batch_size, config.compile, config.max_length)
    assert found == (3e-7, 32, True, 2048)
    recipe.write_text("model: m\nbeta: 2.0\n")
    with pytest.raises(InputError, match=f"{recipe}: there is no option 'beta'"):
        parse_args([str(recipe)])


def test_the_demos_recipe_is_for_its_own_model_and_pairs():
    """Its learning rate, lengths and held-out pairs would be wrong for others."""
    demo = parse_args(["recipes/demo.yaml"])
    assert parse_args([]) == demo and demo.learning_rate == 2e-5
    assert parse_args(["--loss", "sft"]) == replace(demo, loss="sft")
    own = ["--model=m", "--train_data=d", "--output_dir=o"]
    assert parse_args(own) == Config(model="m", train_data="d", output_dir="o")
    for lacking, name in ((own[:2], "output_dir"), (own[1:], "model"), (own[::2], "train_data")):
        with pytest.raises(InputError, match=f"{name} is needed: give --{name}"):
            parse_args(lacking)


@pytest.mark.parametrize("given", ["runs/a/checkpoints/step_1", "always"])
def test_resume_is_auto_anyway_or_never(given):
    with pytest.raises(InputError, match=f"resume must be one of .*anyway.*, not {given}"):
        parse_args(["--resume", given])


def test_help_names_every_option():
    command = [sys.executable, "train.py", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    names = Config.__dataclass_fields__
    assert done.returncode == 0 and all(f"--{name} " in done.stdout for name in names)


def test_bare_command(base, tmp_path):
    """The demo's recipe, with its own data and a tiny model, by plain python."""
    flags = ["recipes/demo.yaml", "--model", base["model"], "--max_steps", "2", "--wandb", "off"]
    flags += ["--output_dir", str(tmp_path / "run")]
    flags += ["--max_length", "200", "--max_prompt_length", "100"]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("WANDB")}
    done = subprocess.run(
        [sys.executable, "train.py", *flags],
        cwd=ROOT,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "before" in done.stdout and "after" in done.stdout
    assert f"is in {tmp_path / 'run' / 'final'}" in done.stdout
    assert "inverse_perplexity/chosen" in done.stdout and "accuracy" in done.stderr
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert config["train_data"] == "demo/train.jsonl"
    assert config["eval_data"] == "demo/heldout.jsonl"


def test_a_chat_template_of_a_file_is_trained_and_exported(base, tmp_path, monkeypatch):
    template = CHATML.replace("<|im_start|>", "<s>")
    (tmp_path / "template.jinja").write_text(template)
    seen, pack = [], data.pack
    monkeypatch.setattr(data, "pack", lambda rows: seen.append(pack(rows)) or seen[-1])
    values = base | {"max_steps": 1, "chat_template": str(tmp_path / "template.jinja")}
    run(values, tmp_path / "run")
    final = transformers.AutoTokenizer.from_pretrained(tmp_path / "run" / "final")
    assert final.chat_template == template
    assert final.decode(seen[0].input_ids).startswith("<s>user\n")
    with pytest.raises(InputError, match="No such file or directory: 'nowhere.jinja'"):
        run(base | {"chat_template": "nowhere.jinja"}, tmp_path / "other")


@pytest.mark.parametrize("rank", ["0", "1"])
def test_an_error_that_only_one_rank_meets_is_printed_by_it(rank):
    code = "from runtime import command_line\nfrom runtime.errors import InputError\n"
    code += "def main(): raise InputError('too small')\n"
    code += "command_line.time.sleep = lambda seconds: None\n"
    command = [sys.executable, "-c", code + "command_line.run_command(main)"]
    environment = os.environ | {"RANK": rank}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    said = "error: too small" if rank == "0" else "error on rank 1: too small"
    assert (done.returncode, done.stderr.strip()) == (1, said)


PRINTS_NOWHERE = """
import os, sys, train
from runtime.command_line import run_command

read, closed = os.pipe()
os.close(read)
full = os.open("/dev/full", os.O_WRONLY)
for number, (place, encoding) in enumerate(((closed, "utf-8"), (full, "utf-8"), (1, "ascii"))):
    out = [os.dup(place), os.dup(place)]
    sys.stdout, sys.stderr = (open(n, "w", encoding=encoding) for n in out)
    args = [*sys.argv[2:], f"--output_dir={sys.argv[1]}{number}"]
    run_command(lambda: train.train(train.parse_args(args)))
    sys.stdout.flush(), sys.stderr.flush()
"""


def test_what_cannot_be_printed_ends_no_run(base, tmp_path):
    """The reader of a pipe is gone, the disk of a log is full, a terminal knows ASCII alone."""
    flags = as_flags(base | {"max_steps": 2}, tmp_path)[:-1]
    done = run_python("-c", PRINTS_NOWHERE, tmp_path / "run", *flags)
    assert done.returncode == 0, done.stderr[-3000:]
    for number in range(3):
        assert (tmp_path / f"run{number}" / "final" / "model.safetensors").exists()
    assert "\\u2192" in done.stdout  # the arrow of the table
    assert "Traceback" not in done.stdout + done.stderr


def test_a_table_that_cannot_be_printed_is_an_error():
    code = "import os, sys\nsys.stdout = open(os.open('/dev/full', os.O_WRONLY), 'w')\n"
    code += "from runtime.command_line import run_command\n"
    code += "run_command(lambda: print('a table'), shows=True)\n"
    done = run_python("-c", code)
    assert done.returncode == 1
    assert re.fullmatch("error: the output cannot be written: .*No space left.*\n", done.stderr)


# ---- Processes -----------------------------------------------------------------------------------


def test_a_gpu_that_torch_cannot_use_is_an_error(base, tmp_path, monkeypatch):
    """Unless it is hidden on purpose: the run would take the CPU without a word."""
    (tmp_path / "version").write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  470.82.01\n")
    monkeypatch.setattr(processes, "NVIDIA_DRIVER", tmp_path / "version")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for build, said in ((None, "another CUDA (none)"), ("13.0", "another CUDA (13.0)")):
        monkeypatch.setattr(torch.version, "cuda", build)
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
        with pytest.raises(InputError, match=re.escape(said)) as caught:
            run(base, tmp_path / "run")
        assert f"GPUs that torch {torch.__version__} cannot use" in str(caught.value)
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert len(run(base | {"max_steps": 1}, tmp_path / "run")) == 3


def test_more_processes_than_gpus_is_an_error(monkeypatch):
    """Of the ranks that find no GPU."""
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    taken = []
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    for rank in range(8):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        if rank < 4:
            assert processes.start_process() == (rank, 8, torch.device("cuda", rank))
            continue
        with pytest.raises(InputError, match="8 processes for 4 GPUs: lower --nproc_per_node"):
            processes.start_process()
    assert taken == [0, 1, 2, 3]


def test_a_run_without_a_gpu_says_so_first(base, tmp_path, capsys):
    run(base | {"max_steps": 1}, tmp_path / "run")
    assert capsys.readouterr().out.startswith("no GPU: 1 process(es) on the CPU\n")


# ---- wandb ---------------------------------------------------------------------------------------


def test_wandb_never_asks(base, tmp_path, monkeypatch):
    """Without a login, `auto` is off, `online` an error and `offline` writes a run to disk."""
    for name in [name for name in os.environ if name.startswith("WANDB")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked for input"))
    assert len(run(base | {"max_steps": 1, "wandb": "auto"}, tmp_path / "auto")) == 3
    assert not (tmp_path / "auto" / "wandb").exists()
    with pytest.raises(InputError, match="nobody is logged in"):
        run(base | {"max_steps": 1, "wandb": "online"}, tmp_path / "online")
    run(base | {"max_steps": 1, "wandb": "offline"}, tmp_path / "offline")
    assert list((tmp_path / "offline" / "wandb").glob("offline-run-*"))


@pytest.mark.parametrize("fails", ["login", "init"])
def test_wandb_never_stops_a_run(base, tmp_path, monkeypatch, fails):
    import wandb

    monkeypatch.setenv("WANDB_SILENT", "true")
    start = wandb.init

    def unreachable(*args, mode="online", **kwargs):
        if mode == "online":
            raise wandb.errors.CommError("the server cannot be reached")
        return start(*args, mode=mode, **kwargs)

    monkeypatch.setattr(wandb, "init", unreachable)
    monkeypatch.setattr(wandb, "login", unreachable if fails == "login" else lambda **_: True)
    assert len(run(base | {"max_steps": 1, "wandb": "auto"}, tmp_path / "run")) == 3
    offline = list((tmp_path / "run").glob("wandb/offline-run-*"))
    assert len(offline) == (fails == "init")


def test_a_run_goes_on_when_the_process_of_wandb_is_gone(
    base, tmp_path, monkeypatch, capsys, sigterm_after
):
    """Slurm sends SIGTERM to it, too; what comes after the line is the checkpoint."""
    import wandb

    def gone(*args, **options):
        raise ConnectionResetError("Connection lost")

    fake = SimpleNamespace(log=gone, finish=gone, define_metric=lambda *args, **options: None)
    monkeypatch.setattr(wandb, "init", lambda **settings: fake)
    sigterm_after(0)
    values = base | {"max_steps": 3, "wandb": "offline", "eval_data": "", "save_every": 0}
    with pytest.raises(SystemExit):
        run(values, tmp_path / "run")
    assert (tmp_path / "run" / "checkpoints" / "step_1" / "trainer.json").exists()
    assert capsys.readouterr().err.count("wandb ends here: ConnectionResetError") == 1


def test_trackio_gets_what_wandb_gets(base, tmp_path, monkeypatch):
    """And is asked for by name if it is not installed."""
    seen = []

    class Run:
        def log(self, metrics: dict, step: int) -> None:
            seen.append((step, metrics))

        def finish(self) -> None:
            seen.append("finish")

    def init(project: str, name: str, config: dict, resume: str) -> Run:
        seen.append((project, name, config["batch_size"], resume))
        return Run()

    values = base | {"max_steps": 1, "wandb": "trackio"}
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(InputError, match="wandb=trackio, which is not installed"):
        start_trackio(Config(), resumed=False)
    monkeypatch.setitem(sys.modules, "trackio", SimpleNamespace(init=init))
    lines = run(values, tmp_path / "run")
    first, *logged, end = seen
    assert first == ("simper", "run", 8, "never") and end == "finish"
    assert [metrics for _, metrics in logged] == lines
    assert [step for step, _ in logged] == [1, 2, 3]


def test_wandb_holds_every_line_once_in_a_run_that_is_stopped_and_killed(
    base, tmp_path, monkeypatch, sigterm_after
):
    """wandb, also when it resumes a run, takes only steps above the last one that it has."""
    import wandb

    rows, ids = {}, set()

    class Run:
        def __init__(self, id, **settings):
            ids.add(id)
            self.start = max(rows, default=-1) + 1

        def log(self, metrics, step):
            if step >= max(self.start, max(rows, default=0)):
                rows.setdefault(step, {}).update(metrics)

        def define_metric(self, *args, **kwargs):
            pass

        def finish(self):
            pass

    monkeypatch.setattr(wandb, "login", lambda **_: True)
    monkeypatch.setattr(wandb, "init", lambda **settings: Run(**settings))
    values = base | {"max_steps": 4, "save_every": 3, "eval_every": 1, "wandb": "online"}
    values["keep_checkpoints"] = 2
    output = tmp_path / "run"
    for quiet in (6, 6):  # SIGTERM in the evaluation after step 2, then after step 4
        sigterm_after(quiet)
        with pytest.raises(SystemExit):
            run(values, output)
    shutil.rmtree(output / "checkpoints" / "step_4")  # as if killed before it was written
    sigterm_after(1000)
    lines = run(values, output)
    assert len(ids) == 1 and timeless(rows.values()) == timeless(lines)
    assert [line["step"] for line in lines] == [0, 1, 1, 2, 2, 3, 3, 4, 4]
    # A run from the start in the same folder is another one: wandb would drop its steps.
    for name in ("checkpoints", "final"):
        shutil.rmtree(output / name)
    rows.clear()
    lines = run(values | {"learning_rate": 2e-3}, output)
    assert len(ids) == 2 and timeless(rows.values()) == timeless(lines)
    # And so is one that goes on with other settings: of the two curves, wandb would keep the old.
    shutil.rmtree(output / "final")
    rows.clear()
    lines = run(values | {"learning_rate": 1e-3, "max_steps": 5, "resume": "anyway"}, output)
    assert len(ids) == 3 and timeless(rows.values()) == timeless(lines)
    assert {*rows} == {9, 10, 11}
