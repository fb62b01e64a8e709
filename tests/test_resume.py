"""Checkpoints, and going on from them: bit for bit, with any optimizer, on any number of ranks.
What may change, what a run directory holds, and what a run knows of its own code."""

import dataclasses
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import FunctionType

import pytest
import torch
import transformers
import yaml
from conftest import (
    CHATML,
    ROOT,
    interrupt,
    make_model,
    make_tokenizer,
    read_checkpoint,
    read_metrics,
    run,
    run_python,
    run_ranks,
    run_several,
    same_weights,
    timeless,
    write_pairs,
)
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor, Replicate

import loss
import model
import train
from runtime import checkpoints, checks, identity, log
from runtime.errors import InputError
from runtime.log import SHOWN
from train import Config, parse_args


def kinds(lines: list[dict]) -> list[tuple[int, bool]]:
    """(step, whether it is an evaluation) of every line."""
    return [(line["step"], "eval/loss" in line) for line in lines]


def finish_again(values: dict, folder: Path) -> tuple[list[dict], list[dict]]:
    """Run twice, the second time from the checkpoint before the last: the lines of both. The
    weights at the end are equal."""
    lines = timeless(run(values | {"keep_checkpoints": 0}, folder / "whole"))
    interrupt(folder / "whole", folder / "run")
    again = timeless(run(values, folder / "run"))
    assert same_weights(folder / "whole", folder / "run")
    return lines, again


def without_end(three_steps, folder: Path, *steps: int) -> Path:
    """A copy of the run in one process, without final/ and the checkpoints of some steps."""
    shutil.copytree(three_steps["one"][0], folder, ignore=shutil.ignore_patterns("final"))
    for step in steps:
        shutil.rmtree(folder / "checkpoints" / f"step_{step}")
    return folder


# ---- Bit for bit ---------------------------------------------------------------------------------


def test_a_checkpoint_beyond_the_last_step_is_not_trained_on(base, three_steps, tmp_path):
    """Its model would be called one of fewer steps. Nothing is moved before that is said."""
    output = tmp_path / "run"
    without_end(three_steps, output)
    before = (output / "metrics.jsonl").read_bytes()
    changes = {"max_steps": 2, "save_every": 1, "keep_checkpoints": 0, "resume": "anyway"}
    with pytest.raises(InputError, match="step_3 has more steps than the 2 .* eval.export writes"):
        run(base | changes, output)
    assert (output / "metrics.jsonl").read_bytes() == before and not (output / "final").exists()


def test_a_damaged_config_of_a_finished_run_is_said(base, three_steps, tmp_path):
    output = tmp_path / "run"
    shutil.copytree(three_steps["one"][0], output)
    for damage in (": : [", "a: 2024-13-45", ""):
        (output / "config.yaml").write_text(damage)
        with pytest.raises(
            InputError, match="holds a finished run, and its config.yaml is damaged"
        ):
            run(base | {"max_steps": 3, "save_every": 1, "keep_checkpoints": 0}, output)


def test_resume_is_bitwise(base, three_steps, tmp_path):
    whole, lines = three_steps["one"]
    output = without_end(three_steps, tmp_path / "run", 3)
    resumed = run(base | {"max_steps": 3, "save_every": 1}, output)
    assert timeless(resumed) == timeless(lines)
    assert same_weights(output, whole)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["simper", "dpo"])
def test_resume_is_bitwise_also_sharded(base, tmp_path, name, dtype):
    """In bfloat16 also a single process is sharded. The reference is computed again, before the
    checkpoint is read; and evaluations come between training and checkpoints."""
    values = base | {"loss": name, "dtype": dtype, "max_steps": 4, "save_every": 2}
    values |= {"eval_every": 1, "keep_checkpoints": 0}
    lines = timeless(run(values, tmp_path / "whole"))
    interrupt(tmp_path / "whole", tmp_path / "run")
    (tmp_path / "run" / "reference.safetensors").unlink(missing_ok=True)
    assert timeless(run(values, tmp_path / "run")) == lines
    assert same_weights(tmp_path / "whole", tmp_path / "run")


def test_a_checkpoint_of_many_files_resumes_bitwise(base, tmp_path, monkeypatch):
    """The embedding is larger than what is asked of a file."""
    monkeypatch.setattr(checkpoints, "FILE_BYTES", 30_000)
    lines, again = finish_again(base | {"max_steps": 3, "save_every": 1, "eval_data": ""}, tmp_path)
    assert again == lines
    assert len([*(tmp_path / "whole").glob("checkpoints/step_2/*.safetensors")]) > 4


@pytest.mark.parametrize("started, resume", [("ranks", run), ("one", run_ranks)])
def test_another_number_of_ranks_resumes(base, three_steps, tmp_path, started, resume):
    """One process, which is not sharded, what two ranks began, and they what it began."""
    folder, lines = three_steps[started]
    output = tmp_path / "run"
    shutil.copytree(folder, output, ignore=shutil.ignore_patterns("final", "step_2", "step_3"))
    # An interrupted save is not a checkpoint, however much of it was written.
    shutil.copytree(output / "checkpoints" / "step_1", output / "checkpoints" / "step_3.part")
    resumed = timeless(resume(base | {"max_steps": 3, "save_every": 0}, output))
    # It finds step_1 by itself, and what it repeats is not logged twice.
    assert [line["step"] for line in resumed] == [0, 1, 2, 3, 3]
    assert resumed[:2] == timeless(lines)[:2]
    for mine, its in zip(resumed, timeless(lines)):
        assert mine == pytest.approx(its, rel=1e-5, abs=1e-6)


# ---- Any optimizer -------------------------------------------------------------------------------


class EachParameter(torch.optim.Optimizer):
    """An optimizer whose `move` takes one parameter's step."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for parameter in group["params"]:
                self.move(parameter, self.state[parameter], group["lr"])


class Rounded(EachParameter):
    """Momentum that is kept in bfloat16, with the number of steps as a Python number."""

    def move(self, parameter, state, rate):
        if not state:
            state |= {"steps": 0, "momentum": torch.zeros_like(parameter, dtype=torch.bfloat16)}
        state["steps"] += 1
        state["momentum"].mul_(0.9).add_(parameter.grad.to(torch.bfloat16))
        parameter.sub_(state["momentum"].to(parameter.dtype), alpha=rate / state["steps"])


def placements(tensor: torch.Tensor):
    """How a tensor lies on the ranks."""
    return getattr(tensor, "placements", None)


class Factored(EachParameter):
    """Keeps of a matrix the mean square of every row, which is sharded as the rows are, and of
    every column, which each rank has as a whole. (On two ranks torch's Adafactor cannot take a
    step.)"""

    def move(self, parameter, state, rate):
        squares = parameter.grad.square() + 1e-12
        means = {"row": squares.mean(dim=-1), "column": squares.mean(dim=0)}
        if parameter.ndim == 1:
            means = {"square": squares}
        elif isinstance(parameter, DTensor):
            whole = [Replicate()] * parameter.device_mesh.ndim
            means["column"] = means["column"].redistribute(placements=whole)
        for key, mean in means.items():
            assert key not in state or placements(state[key]) == placements(mean), key
            state[key] = 0.9 * state[key] + 0.1 * mean if key in state else mean
        if parameter.ndim == 1:
            scale = state["square"]
        else:
            scale = (state["row"][:, None] * state["column"]).sqrt()
        parameter.sub_(parameter.grad / (scale + 1e-3), alpha=rate)


class Counting(torch.optim.SGD):
    """Its steps get smaller by a number that it counts in its groups."""

    first = 0

    def __init__(self, params, lr):
        super().__init__(params, lr)
        self.seen = []
        for group in self.param_groups:
            group["k"] = self.first

    def step(self):
        for group in self.param_groups:
            group["k"] += 1
            self.seen.append(int(group["k"]))
            group["lr"] /= int(group["k"])
        super().step()


class CountingTensor(Counting):
    """The same with a tensor, which += changes in place."""

    @property
    def first(self):
        return torch.tensor(0)


ADAMW = torch.optim.AdamW  # tests put others in its place


def two_groups(params, lr: float):
    """AdamW, with a tenth of the rate for the second half of the parameters."""
    params = [*params]
    half = len(params) // 2
    groups = [{"params": params[:half]}, {"params": params[half:], "lr": lr / 10}]
    return ADAMW(groups, lr=lr, weight_decay=0.0)


# By name: the optimizer, and the keys of the state that it keeps of a matrix.
OPTIMIZERS = {
    "SGD": lambda params, lr: torch.optim.SGD(params, lr, momentum=0.9),
    "NAdam": torch.optim.NAdam,
    "Adafactor": torch.optim.Adafactor,
    "RMSprop": lambda params, lr: torch.optim.RMSprop(params, lr / 10, momentum=0.9, centered=True),
    "Adamax": torch.optim.Adamax,
    "Rounded": Rounded,
    "Factored": Factored,
    "Muon": torch.optim.Muon,
    "Counting": Counting,
    "two groups": two_groups,
    "AdamW": ADAMW,
}
KEYS = {
    "SGD": {"momentum_buffer"},
    "NAdam": {"step", "mu_product", "exp_avg", "exp_avg_sq"},
    "Adafactor": {"step", "row_var", "col_var"},
    "RMSprop": {"step", "square_avg", "momentum_buffer", "grad_avg"},
    "Adamax": {"step", "exp_avg", "exp_inf"},
    "Rounded": {"steps", "momentum"},
    "Factored": {"row", "column"},
    "Muon": {"momentum_buffer"},
}


@pytest.fixture
def optimizer_is(monkeypatch):
    """A function that puts an optimizer in AdamW's place; it returns a list, to which each run adds
    its own."""

    def put(make) -> list:
        made = []
        put = lambda params, lr, **_: made.append(make(params, lr)) or made[-1]  # noqa: E731
        monkeypatch.setattr(train.torch.optim, "AdamW", put)
        return made

    return put


@pytest.fixture
def surgery_is(monkeypatch):
    """A function that puts another in the place of model.surgery."""

    def put(function) -> None:
        monkeypatch.setattr(model, "surgery", function)
        monkeypatch.setattr(checks, "surgery", function)

    return put


def freeze_vectors(model) -> None:
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.ndim == 2)


def freeze_embedding(model) -> None:
    model.get_input_embeddings().requires_grad_(False)


FOUR_STEPS = {"max_steps": 4, "save_every": 2, "keep_checkpoints": 0, "eval_data": ""}


@pytest.mark.parametrize("name", KEYS)
def test_any_optimizer_resumes_bitwise(base, tmp_path, optimizer_is, surgery_is, name):
    optimizer_is(OPTIMIZERS[name])
    if name == "Muon":  # it takes matrices only
        surgery_is(freeze_vectors)
    lines, again = finish_again(base | FOUR_STEPS, tmp_path)
    assert again == lines and [line["step"] for line in lines] == [1, 2, 3, 4]
    assert len({line["loss"] for line in lines}) == 4  # the first rate is 0, but pairs are others
    state = json.loads((tmp_path / "run" / "checkpoints" / "step_4" / "trainer.json").read_text())
    assert {*state["optimizer"]["model.lm_head.weight"]} == KEYS[name]
    vectors = [key for key in state["optimizer"] if "norm" in key]
    assert bool(vectors) == (name != "Muon")


RANKS = ("SGD", "Factored", "frozen")
CODE = """
import torch
import model
from runtime import checks
from test_resume import OPTIMIZERS, RANKS, freeze_embedding

def optimizer(params, lr, **_):
    return OPTIMIZERS.get(RANKS[number // 2], OPTIMIZERS["AdamW"])(params, lr)

def surgery(model):
    if RANKS[number // 2] == "frozen":
        freeze_embedding(model)

torch.optim.AdamW, model.surgery, checks.surgery = optimizer, surgery, surgery
"""


@pytest.fixture(scope="module")
def on_two_ranks(base, tmp_path_factory) -> Path:
    """NAME/whole and NAME/run, which is continued from the middle, of each of RANKS."""
    folder, runs = tmp_path_factory.mktemp("two_ranks"), []
    for name in RANKS:
        whole, output = folder / name / "whole", folder / name / "run"
        runs += [(base | FOUR_STEPS, whole), (base | FOUR_STEPS, output, whole)]
    run_several(runs, folder, code=CODE)
    return folder


@pytest.mark.parametrize("name", RANKS)
def test_two_ranks_resume_bitwise(on_two_ranks, name):
    whole, output = (on_two_ranks / name / part for part in ("whole", "run"))
    assert timeless(read_metrics(output)) == timeless(read_metrics(whole))
    assert [line["step"] for line in read_metrics(whole)] == [1, 2, 3, 4]
    assert same_weights(output, whole)


@pytest.mark.parametrize("name", ["SGD", "Factored"])
def test_an_optimizer_on_two_ranks_is_the_one_of_a_single_process(
    base, on_two_ranks, tmp_path, optimizer_is, name
):
    optimizer_is(OPTIMIZERS[name])
    lines = timeless(run(base | FOUR_STEPS, tmp_path / "run"))
    for mine, its in zip(timeless(read_metrics(on_two_ranks / name / "run")), lines, strict=True):
        assert mine == pytest.approx(its, rel=1e-4, abs=1e-5)
    some, other = (
        read_checkpoint(folder / "checkpoints" / "step_4")
        for folder in (on_two_ranks / name / "run", tmp_path / "run")
    )
    assert some.keys() == other.keys()
    for key in some:
        torch.testing.assert_close(some[key], other[key], rtol=1e-3, atol=1e-5)


def check_frozen(base: dict, output: Path) -> None:
    """The embedding, which was frozen, has not moved and is in no checkpoint; the rest has."""
    before = load_file(Path(base["model"]) / "model.safetensors")
    after = load_file(output / "final" / "model.safetensors")
    stayed = {name for name in before if torch.equal(before[name], after[name])}
    assert before.keys() == after.keys() and stayed == {"model.embed_tokens.weight"}
    checkpoint = output / "checkpoints" / "step_2"
    state = json.loads((checkpoint / "trainer.json").read_text())
    names = {*read_checkpoint(checkpoint), *state["optimizer"]}
    assert len(names) > 3 and not [name for name in names if "embed" in name]


def test_a_frozen_embedding_has_no_moments_and_does_not_move(base, tmp_path, surgery_is):
    surgery_is(freeze_embedding)
    lines, again = finish_again(base | FOUR_STEPS, tmp_path)
    assert again == lines
    check_frozen(base, tmp_path / "run")


def test_a_frozen_embedding_on_two_ranks(base, on_two_ranks):
    check_frozen(base, on_two_ranks / "frozen" / "run")


def test_every_group_follows_the_schedule(base, tmp_path, optimizer_is):
    """A second group has a tenth of the rate; also after a resume."""
    rates = []

    def watch(params, lr):
        optimizer, seen = two_groups(params, lr), []
        rates.append(seen)
        look = lambda *_: seen.append([group["lr"] for group in optimizer.param_groups])  # noqa: E731
        optimizer.register_step_pre_hook(look)
        return optimizer

    optimizer_is(watch)
    lines, again = finish_again(base | FOUR_STEPS, tmp_path)
    assert again == lines
    parameters = [torch.zeros(1, requires_grad=True) for _ in range(2)]
    textbook = torch.optim.SGD([{"params": p, "lr": lr} for p, lr in zip(parameters, (1e-3, 1e-4))])
    schedule, expected = transformers.get_cosine_schedule_with_warmup(textbook, 1, 4), []
    for _ in range(4):
        expected.append(schedule.get_last_lr())
        textbook.step()
        schedule.step()
    whole, resumed = rates
    assert whole == [pytest.approx(step, rel=1e-12) for step in expected]
    assert resumed == whole[2:]
    assert [line["learning_rate"] for line in lines] == [first for first, _ in whole]


@pytest.mark.parametrize("kind", [Counting, CountingTensor])
def test_an_optimizer_finds_the_numbers_of_its_groups_again(base, tmp_path, optimizer_is, kind):
    made = optimizer_is(kind)
    lines, again = finish_again(base | FOUR_STEPS, tmp_path)
    assert [optimizer.seen for optimizer in made] == [[1, 2, 3, 4], [3, 4]]
    assert again == lines


class Keeping(torch.optim.SGD):
    """Keeps something in the state of its first parameter, or beside that of all parameters."""

    def __init__(self, params, lr, kept, beside: bool = False):
        super().__init__(params, lr, momentum=0.9)
        self.kept, self.beside = kept, beside

    def step(self):
        super().step()
        key = "all" if self.beside else self.param_groups[0]["params"][0]
        self.state[key]["history"] = self.kept


@pytest.mark.parametrize(
    "kept, beside, said",
    [
        ([torch.zeros(2)], False, "history of model.model.embed_tokens.weight is a list"),
        (object(), False, "history of model.model.embed_tokens.weight is a object"),
        (torch.zeros(2), True, "all"),
    ],
    ids=["list", "object", "beside"],
)
def test_a_state_that_cannot_be_saved_is_refused_after_the_first_step(
    base, tmp_path, optimizer_is, kept, beside, said
):
    optimizer_is(lambda params, lr: Keeping(params, lr, kept, beside))
    with pytest.raises(InputError, match=f"the optimizer's state cannot be saved: .*{said}"):
        run(base | {"max_steps": 3, "save_every": 0, "eval_data": ""}, tmp_path / "run")
    assert read_metrics(tmp_path / "run") == [] and not (tmp_path / "run" / "final").exists()


def test_a_tensor_that_one_rank_alone_has_is_refused(base, tmp_path, optimizer_is, monkeypatch):
    """A single process is sharded if there is no memory for masters."""
    monkeypatch.setattr("model.masters_fit", lambda model, device: False)

    class Local(torch.optim.SGD):
        def step(self):
            super().step()
            for parameter in self.param_groups[0]["params"]:
                self.state[parameter]["square"] = parameter.to_local() ** 2

    optimizer_is(Local)
    said = "square of model.model.embed_tokens.weight is a Tensor, which this rank alone has"
    with pytest.raises(InputError, match=said):
        run(base | {"max_steps": 2, "eval_data": "", "dtype": "bfloat16"}, tmp_path / "run")


# ---- What may change -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, message",
    [
        ({"learning_rate": 2e-3}, "learning_rate was 0.001, is 0.002"),
        ({"seed": 1}, "seed was 42, is 1"),
        ({"loss": "sft"}, "loss was simper, is sft"),
        ({"max_length": 97}, "max_length was 96, is 97"),
        ({"batch_size": 4}, "batch_size was 8, is 4"),
    ],
)
def test_resume_of_another_run_is_refused(base, three_steps, tmp_path, change, message):
    output = without_end(three_steps, tmp_path / "run")
    with pytest.raises(InputError, match=f"step_3 is of another run: {message}"):
        run(base | {"max_steps": 3} | change, output)


def test_a_setting_that_a_checkpoint_does_not_have_is_another_one(base, three_steps, tmp_path):
    """As one that the code has since then."""
    output = without_end(three_steps, tmp_path / "run")
    checkpoint = output / "checkpoints" / "step_3"
    state = checkpoints.read_state(checkpoint)
    del state["config"]["truncation"]
    checkpoints.write_state(checkpoint, state)
    with pytest.raises(InputError, match="another run: truncation was None, is fit"):
        run(base | {"max_steps": 3}, output)


def test_resume_with_another_model_or_template_says_so(base, three_steps, model_folder, tmp_path):
    output = without_end(three_steps, tmp_path / "run")
    shutil.copytree(model_folder, tmp_path / "model")
    checkpoint = output / "checkpoints" / "step_3"
    state = checkpoints.read_state(checkpoint)
    state["config"]["model"] = str(tmp_path / "model")
    checkpoints.write_state(checkpoint, state)
    text = (output / "config.yaml").read_text().replace(base["model"], str(tmp_path / "model"))
    (output / "config.yaml").write_text(text)
    values = base | {"max_steps": 3, "model": str(tmp_path / "model")}
    make_model("llama", seed=1).save_pretrained(tmp_path / "model")
    with pytest.raises(InputError, match="another run: other model files. Use"):
        run(values, output)
    make_model("llama").save_pretrained(tmp_path / "model")
    config = (tmp_path / "model" / "config.json").read_text()
    assert "rope_theta" in config
    changed = config.replace('"rope_theta": 1', '"rope_theta": 9')
    (tmp_path / "model" / "config.json").write_text(changed)
    with pytest.raises(InputError, match="another run: other model files. Use"):
        run(values, output)
    (tmp_path / "model" / "config.json").write_text(config)
    tokenizer = make_tokenizer(CHATML.replace("{% for", "{{ 'Be kind.' }}{% for", 1))
    tokenizer.save_pretrained(tmp_path / "model")
    message = "other chat template; other training tokens; other held-out tokens. Use"
    with pytest.raises(InputError, match=f"another run: {message}"):
        run(values, output)
    make_tokenizer().save_pretrained(tmp_path / "model")
    assert run(values, output) == three_steps["one"][1]  # everything is as it was


MADE_OF = ("tokenizer", "chat template", "training tokens", "held-out tokens", "model files")
MADE_OF += ("code", "dtype in use")
FREE = "micro_batch_tokens activation_checkpointing compile replicas wandb eval_data eval_every "
FREE += "save_every keep_checkpoints log_every chat_template template_args stream_optimizer"


def write_state(folder: Path, config: Config, made_of: dict, **changes) -> Path:
    """A checkpoint without tensors."""
    checkpoint = folder / "checkpoints" / "step_1"
    checkpoint.mkdir(parents=True)
    state = {"format": 2, "step": 1, "config": dataclasses.asdict(config), "made_of": made_of}
    state |= {"versions": identity.VERSIONS, "files": {}, "optimizer": {}, "groups": []}
    checkpoints.write_state(checkpoint, state | changes)
    return checkpoint


@pytest.mark.parametrize("name", sorted({*Config.__dataclass_fields__} - {"output_dir", "resume"}))
def test_what_may_change_when_a_run_is_resumed(name, tmp_path):
    made_of = dict.fromkeys(MADE_OF, "a")
    config = Config(model="m", train_data="d", output_dir=str(tmp_path))
    checkpoint, value = write_state(tmp_path, config, made_of), getattr(config, name)
    other = f"{value}x" if isinstance(value, str) else value * 2 + 1
    other = not value if isinstance(value, bool) else other
    changed = dataclasses.replace(config, **{name: other})
    if name in FREE.split():
        start = checkpoints.choose_start(changed, made_of)
        assert start == checkpoints.Start(checkpoint, 1, changed=False, evaluated=False)
    else:
        said = f"step_1 is of another run: {name} was {value}, is {other}"
        with pytest.raises(InputError, match=said):
            checkpoints.choose_start(changed, made_of)


@pytest.mark.parametrize("name", MADE_OF)
def test_what_a_resumed_run_is_made_of(name, tmp_path, capsys):
    made_of = dict.fromkeys(MADE_OF, "a")
    config = Config(model="m", train_data="d", output_dir=str(tmp_path))
    checkpoint = write_state(tmp_path, config, made_of)
    other = made_of | {name: "b"}
    with pytest.raises(InputError, match=f"another run: other {name}. Use"):
        checkpoints.choose_start(config, other)
    anyway = dataclasses.replace(config, resume="anyway")
    start = checkpoints.choose_start(anyway, other)
    assert start == checkpoints.Start(checkpoint, 1, changed=True, other=True, evaluated=False)
    # Without it again, the checkpoint is this run's; the lines of metrics.jsonl are the other's.
    lines = [*yaml.safe_dump(dataclasses.asdict(config)).splitlines(), f"# {name}: b"]
    (tmp_path / "config.yaml").write_text("\n".join(lines))
    os.close(start.lock)
    start = checkpoints.choose_start(config, made_of)
    assert start == checkpoints.Start(checkpoint, 1, changed=True, other=False, evaluated=False)
    assert f"going on, but {checkpoint} is of another run: other {name}" in capsys.readouterr().err


def test_a_checkpoint_of_the_format_before_is_refused_in_one_line(base, three_steps, tmp_path):
    output = without_end(three_steps, tmp_path / "run")
    path = output / "checkpoints" / "step_3" / "trainer.json"
    state = json.loads(path.read_text())
    old = {"step": 3, "evaluated": True, "comparable_from": 0, "in_output_dir": False}
    old |= {"config": state["config"], "digests": state["made_of"], "sizes": {}}
    path.write_text(json.dumps(old))
    for resume in ("auto", "anyway"):
        with pytest.raises(InputError, match="step_3 is of another version of this code") as caught:
            run(base | {"max_steps": 3, "resume": resume}, output)
        assert "\n" not in str(caught.value) and "--resume never" in str(caught.value)
    assert read_metrics(output) == three_steps["one"][1]
    assert run(base | {"max_steps": 1, "resume": "never"}, output)[-1]["step"] == 1


def test_other_versions_of_libraries_are_said_and_no_reason_to_stop(tmp_path, capsys):
    config = Config(model="m", train_data="d", output_dir=str(tmp_path))
    made_of = dict.fromkeys(MADE_OF, "a")
    others = identity.VERSIONS | {"torch": "1.13.1", "datasets": "0.1"}
    checkpoint = write_state(tmp_path, config, made_of, versions=others)
    start = checkpoints.choose_start(config, made_of)
    assert start == checkpoints.Start(checkpoint, 1, changed=False, evaluated=False)
    (line,) = capsys.readouterr().err.strip().splitlines()
    torch_is, datasets_is = (identity.VERSIONS[name] for name in ("torch", "datasets"))
    assert f"torch was 1.13.1, is {torch_is}" in line
    assert f"datasets was 0.1, is {datasets_is}" in line and "transformers" not in line


# ---- Going on despite changes --------------------------------------------------------------------


@pytest.mark.parametrize("change", ["training pairs", "loss", "held-out pairs"])
def test_a_run_that_goes_on_despite_a_change_begins_new_curves(
    base, three_steps, tmp_path, capsys, change
):
    """The lines until then keep a file of their own, also if the run crashes before its next
    checkpoint and is continued again."""
    output = without_end(three_steps, tmp_path / "run", 3)
    old = (output / "metrics.jsonl").read_text()
    other = write_pairs(tmp_path / "other.jsonl", 26, seed=7)
    changes = {"training pairs": {"train_data": other}, "loss": {"loss": "sft"}}
    changes["held-out pairs"] = {"eval_data": other}
    values = base | {"max_steps": 3, "save_every": 0} | changes[change]
    with pytest.raises(InputError, match="step_2 is of another run"):
        run(values, output)
    assert (output / "metrics.jsonl").read_text() == old  # a refusal changes nothing
    values["resume"] = "anyway"
    (output / "final.part").touch()  # where the export wants a folder
    with pytest.raises(OSError):
        run(values, output)
    crashed, again = read_metrics(output), tmp_path / "again"  # the lock goes with the process
    shutil.copytree(output, again, ignore=shutil.ignore_patterns("final.part"))
    capsys.readouterr()
    lines = run(values, again)
    assert timeless(lines) == timeless(crashed)  # from step 2 again
    assert kinds(lines) == [(2, True), (3, False), (3, True)]
    assert (again / "metrics-until-step_2.jsonl").read_text() == old
    said = capsys.readouterr()
    before, after = lines[0]["eval/accuracy"], lines[-1]["eval/accuracy"]
    row = rf"\d+ held-out pairs +step 2 .*\naccuracy +{before:.4f}  → +{after:.4f}"
    assert re.search(row, said.out)
    assert said.err.count("going on, but") == 1


def test_lines_of_an_older_run_in_the_folder_do_not_stand_in_the_way(base, three_steps, tmp_path):
    output = without_end(three_steps, tmp_path / "run", 3)
    old = (output / "metrics.jsonl").read_text()
    (output / "metrics-until-step_2.jsonl").write_text("of an older run\n")
    run(base | {"max_steps": 3, "seed": 1, "resume": "anyway", "eval_data": ""}, output)
    kept = [path.read_text() for path in output.glob("metrics-until-*")]
    assert [line["step"] for line in read_metrics(output)] == [3] and old in kept


def test_the_new_curves_go_on_when_they_are_resumed(base, three_steps, tmp_path, capsys):
    """Without a further change, a resume is one like any other."""
    output = without_end(three_steps, tmp_path / "run", 3)
    other = write_pairs(tmp_path / "other.jsonl", 9, seed=7)
    values = base | {"max_steps": 4, "save_every": 1, "eval_data": other, "resume": "anyway"}
    lines = run(values, output)
    old = (output / "metrics-until-step_2.jsonl").read_bytes()
    shutil.rmtree(output / "final")
    capsys.readouterr()
    assert run(values | {"resume": "auto"}, output) == lines
    said = capsys.readouterr()
    assert re.search(rf"step 2 .*\naccuracy +{lines[0]['eval/accuracy']:.4f} ", said.out)
    assert "going on" not in said.err
    assert (output / "metrics-until-step_2.jsonl").read_bytes() == old


def test_other_content_of_the_same_file_is_a_change(base, three_steps, tmp_path, capsys):
    output = without_end(three_steps, tmp_path / "run")
    path = Path(base["train_data"])
    original = path.read_text()
    try:
        path.write_text(original.replace("a", "e", 1))
        with pytest.raises(InputError, match="run: other training tokens. Use"):
            run(base | {"max_steps": 3}, output)
        lines = run(base | {"max_steps": 4, "resume": "anyway"}, output)
    finally:
        path.write_text(original)
    assert kinds(lines) == [(3, True), (4, False), (4, True)]
    error = capsys.readouterr().err
    assert "going on, but" in error and "max_steps was 3, is 4; other training tokens" in error


@pytest.mark.parametrize("missing", [True, False])
def test_an_evaluation_is_made_if_its_line_is_missing(base, three_steps, tmp_path, capsys, missing):
    """Of a run that was killed between the checkpoint and the evaluation of a step, or after it."""
    output, lines = without_end(three_steps, tmp_path / "run"), three_steps["one"][1]
    kept = lines[:-1] if missing else lines
    (output / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))
    assert timeless(run(base | {"max_steps": 3}, output)) == timeless(lines)
    assert capsys.readouterr().err.count("held-out pairs after step") == missing


# ---- Checkpoints on disk -------------------------------------------------------------------------


def test_damaged_checkpoint_is_passed_over(base, three_steps, tmp_path, sigterm_after, capsys):
    output = without_end(three_steps, tmp_path / "run", 3)
    shard = next((output / "checkpoints" / "step_2").glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1])
    values = base | {"max_steps": 3, "save_every": 2, "keep_checkpoints": 1}
    sigterm_after(0)
    (output / "checkpoints" / "step_9").mkdir()  # damaged, too, and the one with the most steps
    with pytest.raises(SystemExit):
        run(values, output)
    assert f"resuming from {output / 'checkpoints' / 'step_1'}" in capsys.readouterr().out
    # What is damaged does not count as kept.
    assert [path.name for path in (output / "checkpoints").iterdir()] == ["step_2"]


def test_torn_files_block_no_restart(base, three_steps, tmp_path):
    output = without_end(three_steps, tmp_path / "run")
    (output / "checkpoints" / "step_3" / "trainer.json").write_text("")
    (output / "checkpoints" / "step_2" / "trainer.json").write_text('{"step": 2, "siz')
    text = (output / "metrics.jsonl").read_text()
    (output / "metrics.jsonl").write_text(text[:-20])
    lines = run(base | {"max_steps": 3, "save_every": 1}, output)  # from step 1
    assert timeless(lines) == timeless(three_steps["one"][1])


def test_the_newest_checkpoint_has_the_most_steps(base, three_steps, tmp_path, capsys):
    output = without_end(three_steps, tmp_path / "run")
    os.utime(output / "checkpoints" / "step_1")  # as a plain copy may order them
    run(base | {"max_steps": 3}, output)
    assert f"resuming from {output / 'checkpoints' / 'step_3'}" in capsys.readouterr().out


def test_checkpoints_are_ordered_by_number(tmp_path):
    for name in ("step_9", "step_10", "step_100", "step_20.part"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    names = [path.name for path in checkpoints.checkpoints(tmp_path)]
    assert names == ["step_100", "step_10", "step_9"]


def test_an_older_checkpoint_that_cannot_go_stops_no_run(base, tmp_path):
    """As a link to another disk, to which it was moved."""
    values = base | {"max_steps": 2, "save_every": 1, "eval_data": "", "keep_checkpoints": 0}
    run(values, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "final")
    folder = tmp_path / "run" / "checkpoints"
    shutil.rmtree(folder / "step_2")
    (folder / "step_1").rename(tmp_path / "step_1")
    (folder / "step_1").symlink_to(tmp_path / "step_1")
    lines = run(values | {"keep_checkpoints": 1}, tmp_path / "run")
    assert [line["step"] for line in lines] == [1, 2]
    assert {path.name for path in folder.iterdir()} == {"step_1", "step_2"}


def test_a_checkpoint_is_on_disk_before_it_has_its_name(base, tmp_path, monkeypatch):
    synced, named, sync, rename = set(), [], checkpoints.sync, os.rename

    def watch(source, target):
        if Path(target).name == "step_1":
            assert {Path(source), *Path(source).iterdir()} <= synced
            named.append(target)
        rename(source, target)

    monkeypatch.setattr(checkpoints, "sync", lambda path: synced.add(path) or sync(path))
    monkeypatch.setattr(os, "rename", watch)
    run(base | {"max_steps": 1, "eval_data": ""}, tmp_path / "run")
    assert named and tmp_path / "run" / "checkpoints" in synced


def test_an_exported_model_is_on_disk_before_it_has_its_name(base, tmp_path, monkeypatch):
    calls, rename = [], os.rename
    monkeypatch.setattr(os, "sync", lambda: calls.append("sync"))
    monkeypatch.setattr(os, "rename", lambda *a: calls.append(Path(a[1]).name) or rename(*a))
    run(base | {"max_steps": 1, "eval_data": "", "save_every": 0}, tmp_path / "run")
    assert calls == ["sync", "final"]


def test_a_file_is_replaced_only_when_the_new_one_is_on_disk(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_text("old")

    def full(path):
        raise OSError("No space left on device")

    monkeypatch.setattr(log, "sync", full)
    with pytest.raises(OSError):
        log.write_whole(path, "new")
    assert path.read_text() == "old"


def test_a_line_of_metrics_that_is_not_whole_costs_that_line(tmp_path):
    for damage in ('{"st', "7", "[1]", '{"loss": 1}', '{"step": null}'):
        (tmp_path / "m.jsonl").write_text(f'{{"step": 1}}\n{damage}\n{{"step": 2}}\n')
        assert log.read_lines(tmp_path / "m.jsonl") == [{"step": 1}, {"step": 2}]


# ---- The run directory ---------------------------------------------------------------------------


def test_run_directory(three_steps):
    folder, lines = three_steps["ranks"]
    found = {path.name for path in folder.iterdir()} - {"code.diff"}
    names = {".lock", "config.yaml", "metrics.jsonl", "checkpoints", "final", "final.json"}
    assert found == names
    text = (folder / "config.yaml").read_text()
    for name, version in identity.VERSIONS.items():
        assert f"# {name}: {version}\n" in text
    assert {*identity.VERSIONS} == {"torch", "transformers", "datasets"} and "# ranks: 2\n" in text
    assert set(yaml.safe_load(text)) == set(Config.__dataclass_fields__)
    assert parse_args([str(folder / "config.yaml")]).batch_size == 8  # a run's config is a recipe
    names = {"epoch", "step", "loss", "accuracy", "grad_norm", "learning_rate"}
    names |= {"pairs_per_second", "tokens_per_second", "peak_memory_gb"}
    groups = ("inverse_perplexity", "logps", "length", "gradient_weight")
    names |= {f"{group}/{side}" for group in groups for side in ("chosen", "rejected")}
    assert set(lines[1]) == names | {"inverse_perplexity/margin", "logps/margin"}
    final = transformers.AutoModelForCausalLM.from_pretrained(folder / "final")
    trained = read_checkpoint(folder / "checkpoints" / "step_2")
    # Step 3 has moved it.
    assert not torch.equal(final.lm_head.weight, trained["model.lm_head.weight"])


def test_a_checkpoint_holds_nothing_that_is_unpickled(three_steps):
    files = [path.name for path in (three_steps["ranks"][0] / "checkpoints" / "step_3").iterdir()]
    endings = {name.rpartition(".")[2] for name in files}
    assert endings == {"json", "safetensors"} and "trainer.json" in files


def test_the_table_is_of_this_run(base, tmp_path, capsys):
    """Lines of another run without a checkpoint, also cut-off ones, are not taken for its own."""
    output = tmp_path / "run"
    output.mkdir()
    line = {"step": 0} | {f"eval/{name}": 0.123 for name in SHOWN}
    (output / "metrics.jsonl").write_text(json.dumps(line) + '\n{"step": 0, "eval')
    lines = run(base | {"max_steps": 1}, output)
    assert [line["step"] for line in lines] == [0, 1, 1]
    assert f"{lines[0]['eval/loss']:.4f}" in capsys.readouterr().out


def test_resume_never_sets_the_old_run_aside(base, tmp_path):
    run(base | {"max_steps": 1}, tmp_path / "run")
    run(base | {"max_steps": 1, "resume": "never"}, tmp_path / "run")
    (old,) = (path for path in tmp_path.iterdir() if path.name.startswith("run."))
    assert (old / "final" / "model.safetensors").exists() and (tmp_path / "run" / "final").exists()


def test_a_linked_output_dir_stays_where_it_points_to(base, tmp_path):
    (tmp_path / "scratch" / "run").mkdir(parents=True)
    (tmp_path / "run").symlink_to(tmp_path / "scratch" / "run")
    run(base | {"max_steps": 1}, tmp_path / "run")
    run(base | {"max_steps": 1, "resume": "never"}, tmp_path / "run")
    assert (tmp_path / "run").is_symlink() and (tmp_path / "scratch" / "run" / "final").exists()
    assert len([*(tmp_path / "scratch").iterdir()]) == 2  # the old one set aside


# ---- The run knows its own code ------------------------------------------------------------------


def test_config_yaml_names_what_the_run_is_made_of(base, three_steps):
    folder, _ = three_steps["one"]
    digest = hashlib.sha256()
    for name in ("config.json", "model.safetensors"):
        digest.update(hashlib.sha256((Path(base["model"]) / name).read_bytes()).digest())
    text = (folder / "config.yaml").read_text()
    assert f"# model files: {digest.hexdigest()}\n" in text and "# training tokens: " in text
    assert "# dtype in use: float32\n" in text
    assert f"# code: {identity.code_digest()}\n" in text
    assert f"# commit: {identity.git_state()[0]}\n" in text


def git(folder: Path, *command: str) -> str:
    name = ["-c", "user.name=a", "-c", "user.email=a@b"]
    done = subprocess.run(["git", *name, *command], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_code_diff_makes_the_code_of_its_commit_that_of_the_run(base, tmp_path, monkeypatch):
    """And there is none of a clean checkout."""
    checkout = tmp_path / "checkout"
    (checkout / "folder").mkdir(parents=True)
    git(checkout, "init", "--quiet")
    before = {"loss.py": "a = 1\nb = 2\n", "folder/data.py": "c = 3\n", "old.py": "d = 4\n"}
    for name, text in before.items():
        (checkout / name).write_text(text)
    git(checkout, "add", "--all")
    git(checkout, "commit", "--quiet", "--message", "first")
    commit = git(checkout, "rev-parse", "HEAD")
    monkeypatch.setattr(log, "git_state", lambda: git_state(checkout))
    values = base | {"max_steps": 1, "eval_data": "", "resume": "never"}
    run(values, tmp_path / "run")
    assert f"# commit: {commit}\n" in (tmp_path / "run" / "config.yaml").read_text()
    assert not (tmp_path / "run" / "code.diff").exists()
    (checkout / "loss.py").write_text("a = 1\nb = 5\n")
    (checkout / "old.py").unlink()
    (checkout / "folder" / "new.py").write_text("e = 6\n")  # not added
    git(checkout, "rm", "--quiet", "--cached", "old.py")
    run(values, tmp_path / "run")
    assert f"# commit: {commit}\n" in (tmp_path / "run" / "config.yaml").read_text()
    git(tmp_path, "clone", "--quiet", str(checkout), "clone")
    git(tmp_path / "clone", "apply", str(tmp_path / "run" / "code.diff"))
    found = {str(p.relative_to(tmp_path / "clone")): p for p in (tmp_path / "clone").rglob("*.py")}
    assert {name: path.read_text() for name, path in found.items()} == {
        "loss.py": "a = 1\nb = 5\n",
        "folder/data.py": "c = 3\n",
        "folder/new.py": "e = 6\n",
    }


def git_state(root: Path) -> tuple[str, str]:
    """identity.git_state of another checkout."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(identity, "ROOT", root)
        return identity.git_state()


def test_outside_a_checkout_there_is_no_commit(tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert git_state(tmp_path) == ("", "")


def test_another_loss_under_the_same_name_is_other_code(base, three_steps, tmp_path, monkeypatch):
    output, before = without_end(three_steps, tmp_path / "run", 3), identity.code_digest()

    def other(token_logps, lengths):
        return -(sum_logps(token_logps, lengths) / lengths).exp()[:, 0]  # noqa: F821

    edited = FunctionType(other.__code__, vars(loss), "simper_loss")
    monkeypatch.setattr(loss, "simper_loss", edited)
    monkeypatch.setitem(loss.LOSSES, "simper", edited)
    assert identity.code_digest() != before
    with pytest.raises(InputError, match="step_2 is of another run: other code. Use --resume"):
        run(base | {"max_steps": 3}, output)
    line = run(base | {"max_steps": 3, "resume": "anyway"}, output)[-1]
    assert line["eval/loss"] == pytest.approx(-line["eval/inverse_perplexity/chosen"], abs=1e-7)
    monkeypatch.undo()
    assert identity.code_digest() == before


SOURCE = '''"""A module."""
import functools
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy
import torch

FACTOR = 2
NAMES = {"a": (1, 2), "b": {3}}


def scaled(times):
    def scale(x):
        return x * times

    return scale


scale = scaled(times=11)
bound = functools.partial(max, 12)
space = SimpleNamespace(value=13)
space.itself = space
tensor, array = torch.tensor([14.0]), numpy.array([15.0])
path = Path("a/file-16")


def outer(x, y=1, *, z=2):
    """What it does."""

    def inner(u):
        """What this does."""
        return u + 3

    return [inner(v) * FACTOR for v in x]


def plain(x):
    return x - 4


@functools.lru_cache
def cached(x):
    return x + 5


@dataclass
class Box:
    """A box."""

    size: int = 6

    def grow(self):
        """Grow."""
        self.size += 7

    @property
    def half(self):
        return self.size / 8

    @functools.cached_property
    def twice(self):
        return self.size * 9

    @staticmethod
    def make():
        return Box(10)


box = Box(17)
'''
SAME = {
    "a comment": ("    return x - 4", "    # Less.\n    return x - 4  # less"),
    "lines above": ("FACTOR = 2", "\n\n\nFACTOR = 2"),
    "the module's docstring": ('"""A module."""', '"""Another text."""'),
    "a function's docstring": ("What it does.", "What it does not do."),
    "an inner function's docstring": ("What this does.", "What that does."),
    "a new docstring": ("def plain(x):\n", 'def plain(x):\n    """Now it has one."""\n'),
    "a class's docstring": ("A box.", "Not a box."),
    "a method's docstring": ("Grow.", "Shrink."),
}
OTHER = {
    "a constant": ("FACTOR = 2", "FACTOR = 3"),
    "a constant within": ("(1, 2)", "(1, 3)"),
    "a set": ("{3}", "{4}"),
    "a default": ("y=1", "y=2"),
    "a keyword's default": ("z=2", "z=3"),
    "an operator": ("x - 4", "x + 4"),
    "a number": ("x - 4", "x - 5"),
    "an inner function": ("u + 3", "u + 4"),
    "a name": ("* FACTOR", "* NAMES"),
    "a cached function": ("x + 5", "x + 6"),
    "a field": ("size: int = 6", "size: int = 7"),
    "a method": ("self.size += 7", "self.size += 8"),
    "a property": ("self.size / 8", "self.size / 9"),
    "a cached property": ("self.size * 9", "self.size * 8"),
    "a static method": ("Box(10)", "Box(11)"),
    "a closure": ("times=11", "times=12"),
    "a bound argument": ("max, 12", "max, 13"),
    "an object": ("value=13", "value=14"),
    "a tensor": ("14.0", "14.5"),
    "an array": ("15.0", "15.5"),
    "a path": ("file-16", "file-17"),
    "an object of a class": ("Box(17)", "Box(18)"),
}


def digest_of(text: str, folder: Path) -> str:
    """code_digest of a module with this text."""
    path = folder / "written.py"
    path.write_text(text)
    spec = importlib.util.spec_from_file_location("written", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["written"] = module
    spec.loader.exec_module(module)
    del sys.modules["written"]
    return identity.code_digest(module)


@pytest.mark.parametrize("edit", [*SAME, *OTHER])
def test_what_counts_as_other_code(tmp_path, monkeypatch, edit):
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # which would be taken for the next text
    old, new = (SAME | OTHER)[edit]
    assert SOURCE.count(old) == 1
    first, second = (digest_of(text, tmp_path) for text in (SOURCE, SOURCE.replace(old, new)))
    assert (first == second) == (edit in SAME)


def test_the_code_is_the_same_in_every_process_and_after_a_run(three_steps):
    """As a script and imported, with other seeds of Python's hashes, and when runs were made."""
    code = "from runtime import identity; import train; print(identity.code_digest())"
    environment = os.environ | {"PYTHONHASHSEED": "1"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    (as_script,) = re.findall("# code: (.+)", (three_steps["ranks"][0] / "config.yaml").read_text())
    assert done.stdout.strip() == identity.code_digest() == as_script


# ---- A checkpoint as a model ---------------------------------------------------------------------


def test_a_checkpoint_is_exported_as_the_run_would(base, tmp_path):
    values = base | {"max_steps": 3, "save_every": 1, "keep_checkpoints": 0, "eval_data": ""}
    run_ranks(values | {"dtype": "bfloat16"}, tmp_path / "run")
    checkpoints = tmp_path / "run" / "checkpoints"
    command = ["-m", "eval.export", checkpoints / "step_3", "--output", tmp_path / "three"]
    done = run_python(*command)
    assert done.returncode == 0, done.stderr
    final = {path.name: path.read_bytes() for path in (tmp_path / "run" / "final").iterdir()}
    assert final == {path.name: path.read_bytes() for path in (tmp_path / "three").iterdir()}
    assert (tmp_path / "three.json").exists()
    # Not over another one, not from a damaged one, and not from what is none.
    (file,) = [*(checkpoints / "step_2").glob("shard-00001-*")]
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    for checkpoint, output, problem in (
        (checkpoints / "step_3", tmp_path / "three", "three is there already"),
        (checkpoints / "step_2", tmp_path / "two", f"{file} is damaged"),
        (tmp_path / "run" / "final", tmp_path / "two", "is no checkpoint"),
    ):
        done = run_python("-m", "eval.export", checkpoint, "--output", output)
        assert done.returncode == 1 and problem in done.stderr
        assert "Traceback" not in done.stderr and not (tmp_path / "two").exists()
