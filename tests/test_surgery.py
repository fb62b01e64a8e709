"""The contract of surgery() and merge(), the functions of model.py in which a fork changes the
model: what is trained, saved and exported is what it seems, or the run is refused by name."""

import shutil
from pathlib import Path

import pytest
import torch
from conftest import ROOT, as_flags, read_checkpoint, read_metrics, run, run_python
from safetensors.torch import load_file

import model as model_module
import train
from eval import export as eval_export
from runtime import checks
from runtime.errors import InputError

# Surgeries of forks: in a text, so that a copy of the code and a script for torchrun can have them.
CODE = '''
import torch


class Adapted(torch.nn.Linear):
    """A linear layer with an adapter of rank 3, which no two ranks can share evenly."""

    def reset_parameters(self):
        torch.nn.init.uniform_(self.lora_a, -1, 1)
        torch.nn.init.zeros_(self.lora_b)

    def forward(self, x):
        return super().forward(x) + x @ self.lora_a.T @ self.lora_b.T


def lora(model):
    model.requires_grad_(False)
    for block in model.model.layers:
        layer = block.self_attn.q_proj
        layer.__class__ = Adapted
        layer.lora_a = torch.nn.Parameter(torch.empty(3, layer.in_features))
        layer.lora_b = torch.nn.Parameter(torch.empty(layer.out_features, 3))


@torch.no_grad()
def merge_lora(model):
    for module in model.modules():
        if isinstance(module, Adapted):
            module.weight += module.lora_b @ module.lora_a
            del module.lora_a, module.lora_b


def plain_head(loaded):
    """The head's parameter anew, as a plain one."""
    weight = loaded.model.lm_head.weight
    whole = weight.full_tensor() if hasattr(weight, "full_tensor") else weight
    loaded.model.lm_head.weight = torch.nn.Parameter(whole.detach().clone())
'''
FORK = {}
exec(CODE, FORK)
SCRIPT = f"""
import sys

sys.path.insert(0, {str(ROOT)!r})
{CODE}
import model
import train
from eval import export as eval_export
from runtime import checks
from runtime.command_line import run_command

SETUP
run_command(lambda: train.train(train.parse_args(sys.argv[1:])))
"""
LORA = "model.surgery = checks.surgery = lora\nmodel.merge = checks.merge = merge_lora"
PLAIN_HEAD = """
load_model = train.load_model


def and_plain_head(*args):
    loaded = load_model(*args)
    plain_head(loaded)
    return loaded


train.load_model = and_plain_head
"""
Q = "model.layers.{}.self_attn.q_proj"


@pytest.fixture
def operate(monkeypatch):
    """Give model.py another surgery() and merge()."""

    def operate(surgery=None, merge=None) -> None:
        for module in (model_module, checks, eval_export):
            if surgery and module is not eval_export:
                monkeypatch.setattr(module, "surgery", surgery)
            if merge:
                monkeypatch.setattr(module, "merge", merge)

    return operate


@pytest.fixture
def no_step(monkeypatch):
    """No step is taken."""
    fail = lambda *_, **__: pytest.fail("takes a step")  # noqa: E731
    monkeypatch.setattr("torch.optim.AdamW.step", fail)


@pytest.fixture
def short(base) -> dict:
    """Three steps, of which the first has a learning rate of 0, and each leaves a checkpoint."""
    return base | {"eval_data": "", "save_every": 1, "keep_checkpoints": 0, "learning_rate": 1e-2}


def run_script(setup: str, values: dict, output: Path, ranks: int = 2):
    """Train after `setup` through torchrun."""
    script = output.with_name(f"{output.name}.py")
    script.write_text(SCRIPT.replace("SETUP", setup))
    return run_python(script, *as_flags(values, output), ranks=ranks)


def refuses(values: dict, output: Path, *said: str) -> None:
    """A run is refused before its first step, with all that is said, and leaves no model."""
    with pytest.raises(InputError) as error:
        run(values, output)
    for fragment in said:
        assert fragment in str(error.value)
    assert not (output / "final").exists() and not (output / "checkpoints").exists()


def start_of(values: dict) -> dict[str, torch.Tensor]:
    return load_file(Path(values["model"]) / "model.safetensors")


def final_of(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / "final" / "model.safetensors")


# ---- What is exported ----------------------------------------------------------------------------


def test_adapters_that_are_not_merged_are_refused_by_name(short, tmp_path, operate, no_step):
    operate(FORK["lora"])
    refuses(short, tmp_path / "run", f"{Q.format(0)}.lora_", "merge() in model.py must undo")


def test_an_edit_of_model_py_is_enough(short, tmp_path):
    """As a user makes it: in a copy of the code, and started from the command line."""
    ignored = shutil.ignore_patterns("__pycache__", ".git", "tests", "docs")
    code = shutil.copytree(ROOT, tmp_path / "code", ignore=ignored)
    text = (code / "model.py").read_text()
    end = "\n\n# Under torch.compile, blocks are compiled around this function."
    assert text.count(end) == 1
    text = text.replace(end, f"\n{CODE}\n\nsurgery = lora{end}")
    (code / "model.py").write_text(text)
    done = run_python("train.py", *as_flags(short, tmp_path / "run"), cwd=code)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert f"error: final/ would have {Q.format(0)}.lora_" in done.stderr


def test_a_merge_that_forgets_one_is_refused_by_name(short, tmp_path, operate, no_step):
    def merge(model):
        del model.model.layers[0].self_attn.q_proj.lora_a
        del model.model.layers[0].self_attn.q_proj.lora_b

    operate(FORK["lora"], merge)
    refuses(short, tmp_path / "run", f"{Q.format(1)}.lora_", "merge() in model.py must undo")


def test_a_merge_that_takes_out_too_much_is_refused_by_name(short, tmp_path, operate, no_step):
    def merge(model):
        FORK["merge_lora"](model)
        del model.lm_head.weight

    operate(FORK["lora"], merge)
    refuses(short, tmp_path / "run", "final/ would have lm_head.weight as None")


def test_a_model_without_one_of_its_blocks_is_refused_by_name(short, tmp_path, operate, no_step):
    def surgery(model):
        del model.model.layers[1]

    operate(surgery)
    refuses(short, tmp_path / "run", "model.layers.1.")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_merged_adapters_are_in_the_exported_weights(dtype, short, tmp_path, operate):
    operate(FORK["lora"], FORK["merge_lora"])
    run(short | {"dtype": dtype}, tmp_path / "run")
    assert_merged(short, tmp_path / "run", getattr(torch, dtype))


def assert_merged(values: dict, output: Path, dtype=torch.float32) -> None:
    """final/ holds W + B A, with the newest checkpoint's A and B, and W as it was at the start."""
    start, final = start_of(values), final_of(output)
    last = read_checkpoint(output / "checkpoints" / "step_3")
    assert final.keys() == start.keys()
    for name, tensor in final.items():
        expected, layer = start[name].double(), f"model.{name.removesuffix('.weight')}"
        if f"{layer}.lora_a" in last:
            b, a = (last[f"{layer}.lora_{part}"].double() for part in "ba")
            expected = expected + b @ a
            assert (expected - start[name]).abs().max() > 1e-3  # it has been trained
            off = (tensor.double() - expected).abs().max()
            # A frozen weight is rounded when it is read, and the sum again.
            assert off <= (1e-6 if dtype == torch.float32 else 1 / 128) * expected.abs().max()
        else:
            assert torch.equal(tensor, start[name].to(dtype))
    assert sum(name.endswith("lora_a") and "exp" not in name for name in last) == 2


@torch.no_grad()
def scale_norms(model) -> None:
    """A merge that changes values and no names."""
    model.model.norm.weight.mul_(2.0)


@pytest.mark.parametrize(
    "surgery, merge",
    [
        (FORK["lora"], FORK["merge_lora"]),
        (lambda model: model.model.layers[0].requires_grad_(False), None),
        (None, scale_norms),
    ],
    ids=["lora", "frozen", "values"],
)
def test_a_checkpoint_is_exported_as_the_run_does(surgery, merge, short, tmp_path, operate):
    operate(surgery, merge)
    run(short, tmp_path / "run")
    try:
        checkpoint = tmp_path / "run" / "checkpoints" / "step_3"
        eval_export.export_checkpoint(checkpoint, tmp_path / "again")
    finally:
        torch.distributed.destroy_process_group()
    final, again = (
        {path.name: path.read_bytes() for path in folder.iterdir()}
        for folder in (tmp_path / "run" / "final", tmp_path / "again")
    )
    assert final == again


# ---- What is trained -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_frozen_block_stays_as_it_is(dtype, short, tmp_path, operate):
    operate(lambda model: model.model.layers[0].requires_grad_(False))
    run(short | {"dtype": dtype}, tmp_path / "run")
    start, final = start_of(short), final_of(tmp_path / "run")
    same = {
        name for name in start if torch.equal(final[name], start[name].to(getattr(torch, dtype)))
    }
    frozen = {name for name in start if name.startswith("model.layers.0.")}
    assert same == frozen and 5 < len(frozen) < len(start)
    saved = {name for name in read_checkpoint(tmp_path / "run" / "checkpoints" / "step_1")}
    assert {name for name in saved if "layers.0." in name} == set()
    assert {f"model.{name}" for name in start} - saved == {f"model.{name}" for name in frozen}


def test_nothing_to_train_is_refused(short, tmp_path, operate, no_step):
    operate(lambda model: model.requires_grad_(False))
    refuses(short, tmp_path / "run", "surgery() has frozen every parameter")


def test_an_adapter_that_is_added_too_late_is_refused_by_name(
    short, tmp_path, monkeypatch, no_step
):
    load_model = train.load_model

    def and_adapters(*args):
        loaded = load_model(*args)
        layer = loaded.model.model.layers[1].self_attn.q_proj
        layer.lora_a = torch.nn.Parameter(torch.zeros(3, 32))
        return loaded

    monkeypatch.setattr(train, "load_model", and_adapters)
    refuses(short, tmp_path / "run", f"{Q.format(1)}.lora_a", "do it in surgery(), in model.py")


def without_last_block(model) -> None:
    model.model.layers = model.model.layers[:1]


def with_tied_head(model) -> None:
    model.lm_head.weight = model.model.embed_tokens.weight


def with_buffer(model) -> None:
    model.register_buffer("scale", torch.ones(1))


@pytest.mark.parametrize(
    "change, name",
    [
        (without_last_block, "model.layers.1."),
        (with_tied_head, "lm_head.weight"),
        (with_buffer, "scale"),
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_changed_after_the_loading_is_refused_by_name(
    short, tmp_path, monkeypatch, no_step, change, name, dtype
):
    """The export would add what is missing as it was, or leave it out."""
    load_model = train.load_model

    def and_change(*args):
        loaded = load_model(*args)
        change(loaded.model)
        return loaded

    monkeypatch.setattr(train, "load_model", and_change)
    refuses(short | {"dtype": dtype}, tmp_path / "run", name, "do it in surgery(), in model.py")


def test_what_is_frozen_during_training_is_refused_by_name(short, tmp_path, monkeypatch):
    """A checkpoint would lack its moments, and in bfloat16 it would go on moving."""
    gradient_metrics = train.gradient_metrics

    def and_freeze(model):
        metrics = gradient_metrics(model)
        model.model.lm_head.requires_grad_(False)
        return metrics

    monkeypatch.setattr(train, "gradient_metrics", and_freeze)
    said = "lm_head.weight was frozen after load_model"
    for dtype in ("float32", "bfloat16"):
        refuses(short | {"dtype": dtype}, tmp_path / dtype, said)

    def and_freeze_what_is_optimized(model):
        metrics = gradient_metrics(model)
        model.optimized()["model.lm_head.weight"].requires_grad_(False)
        return metrics

    monkeypatch.setattr(train, "gradient_metrics", and_freeze_what_is_optimized)
    refuses(short | {"dtype": "bfloat16"}, tmp_path / "masters", said)


def test_a_parameter_beside_the_transformers_model_is_refused_by_name(
    short, tmp_path, monkeypatch, no_step
):
    """It would have no first value."""
    init = model_module.PackedModel.__init__

    def and_temperature(self, *args):
        init(self, *args)
        self.temperature = torch.nn.Parameter(torch.zeros(1))

    monkeypatch.setattr(model_module.PackedModel, "__init__", and_temperature)
    refuses(short, tmp_path / "run", "temperature was added", "outside of surgery()")


def test_what_is_unfrozen_too_late_is_refused_by_name(short, tmp_path, monkeypatch, operate):
    operate(lambda model: model.lm_head.requires_grad_(False))
    load_model = train.load_model

    def and_unfreeze(*args):
        loaded = load_model(*args)
        loaded.model.lm_head.requires_grad_(True)
        return loaded

    monkeypatch.setattr(train, "load_model", and_unfreeze)
    said = ("lm_head.weight was unfrozen after load_model", "do it in surgery()")
    refuses(short | {"dtype": "bfloat16"}, tmp_path / "run", *said)


def optimizer_of(monkeypatch, change) -> None:
    """Another choice of parameters in train.py: change(list of them)."""
    original = torch.optim.AdamW

    def make(parameters, **options):
        return original(change([*parameters]), **options)

    monkeypatch.setattr(train.torch.optim, "AdamW", make)


def test_an_optimizer_that_lacks_a_parameter_is_refused_by_name(short, tmp_path, monkeypatch):
    optimizer_of(monkeypatch, lambda parameters: parameters[:-1])
    refuses(short, tmp_path / "run", "lm_head.weight", "the optimizer does not have")


def test_an_optimizer_with_a_foreign_parameter_is_refused(short, tmp_path, monkeypatch):
    foreign = torch.nn.Parameter(torch.zeros(5, 7))
    optimizer_of(monkeypatch, lambda parameters: [*parameters, foreign])
    refuses(short, tmp_path / "run", "the optimizer has a parameter of shape [5, 7]")


@pytest.mark.parametrize(
    "dtype, trained, said",
    [
        ("float32", False, ["the optimizer has", "[320, 32]", "frozen"]),
        ("bfloat16", True, ["the optimizer has a parameter", "take those of model.optimized()"]),
    ],
)
def test_an_optimizer_of_all_the_modules_parameters_is_refused(
    short, tmp_path, monkeypatch, operate, dtype, trained, said
):
    """In place of those of model.optimized(): one is frozen, or there are masters."""
    operate(lambda model: model.lm_head.requires_grad_(trained))
    kept, load_model = [], train.load_model

    def noted(*args):
        kept.append(load_model(*args))
        return kept[0]

    monkeypatch.setattr(train, "load_model", noted)
    optimizer_of(monkeypatch, lambda parameters: [*kept[0].parameters()])
    refuses(short | {"dtype": dtype}, tmp_path / "run", *said)


# ---- First values --------------------------------------------------------------------------------


def test_a_new_parameter_without_first_values_is_refused_by_name(short, tmp_path, operate, no_step):
    def surgery(model):
        norm = model.model.layers[1].input_layernorm
        assert not hasattr(norm, "reset_parameters")
        norm.shift = torch.nn.Parameter(torch.zeros(32))

    def merge(model):
        del model.model.layers[1].input_layernorm.shift

    operate(surgery, merge)
    refuses(short, tmp_path / "run", "model.layers.1.input_layernorm.shift", "reset_parameters")


class Scaled(torch.nn.Linear):
    """Whose reset_parameters, the linear layer's, does not know the scale."""


def with_scale(model) -> None:
    layer = model.model.layers[1].mlp.down_proj
    layer.__class__, layer.scale = Scaled, torch.nn.Parameter(torch.ones(32))


def test_first_values_that_are_not_given_are_refused_by_name(short, tmp_path, operate, no_step):
    def merge(model):
        del model.model.layers[1].mlp.down_proj.scale

    operate(with_scale, merge)
    said = "reset_parameters of its module gives model.layers.1.mlp.down_proj.scale no values"
    refuses(short, tmp_path / "run", said)


LOST = {
    "the buffer model.norm.shift": lambda m: m.model.norm.register_buffer("shift", torch.zeros(32)),
    "the buffer model.norm.gain": lambda m: m.model.norm.register_buffer(
        "gain", torch.ones(32), persistent=False
    ),
    "a hook of lm_head.weight": lambda m: m.lm_head.weight.register_hook(lambda g: 0 * g),
    "a hook of model.norm.weight": lambda m: m.model.norm.weight.register_post_accumulate_grad_hook(
        print
    ),
    "the attribute scale of lm_head.weight": lambda m: setattr(m.lm_head.weight, "scale", 0.1),
    "model.norm.shared, another module's parameter": lambda m: m.model.norm.register_parameter(
        "shared", m.model.layers[0].input_layernorm.weight
    ),
}


@pytest.mark.parametrize("hook", ["register_hook", "register_post_accumulate_grad_hook"])
def test_a_hook_that_is_added_later_is_refused_by_name(short, tmp_path, monkeypatch, hook, no_step):
    """Two ranks, or bfloat16, would not call it."""
    load_model = train.load_model

    def and_hook(*args):
        loaded = load_model(*args)
        getattr(loaded.model.lm_head.weight, hook)(lambda _: None)
        return loaded

    monkeypatch.setattr(train, "load_model", and_hook)
    for dtype in ("float32", "bfloat16"):
        refuses(short | {"dtype": dtype}, tmp_path / dtype, "lm_head.weight has a hook")


class Places(torch.nn.Module):
    """Constant indices, and a module that several layers share."""

    def __init__(self):
        super().__init__()
        self.places = torch.nn.Parameter(torch.empty(300, dtype=torch.long), requires_grad=False)
        self.scale = torch.nn.Parameter(torch.empty(32))

    def reset_parameters(self):
        self.places.data.copy_(torch.arange(300))
        self.scale.data.fill_(1.0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_whole_numbers_and_shared_modules_keep_their_values(short, tmp_path, operate, dtype):
    kept = []

    def surgery(model):
        module = Places()
        for layer in model.model.layers:
            layer.places = module
        layer.mlp.down_proj.register_forward_hook(lambda m, _, out: out * module.scale)
        kept.append(module)

    def merge(model):
        for layer in model.model.layers:
            del layer.places

    operate(surgery, merge)
    run(short | {"dtype": dtype, "max_steps": 1}, tmp_path / "run")
    (loaded,) = (module for module in kept if not module.places.is_meta)
    assert torch.equal(loaded.places, torch.arange(300))


class Rotary(torch.nn.Module):
    """In place of the model's, with its own frequencies in a buffer, which no file has."""

    def __init__(self):
        super().__init__()
        self.register_buffer("inv_freq", torch.ones(4), persistent=False)

    def forward(self, x, position_ids):
        angles = (position_ids[..., None] * self.inv_freq).repeat(1, 1, 2)
        return angles.cos(), angles.sin()


def test_a_buffer_that_nothing_gives_its_values_is_refused_by_name(
    short, tmp_path, operate, no_step
):
    operate(lambda model: setattr(model.model, "rotary_emb", Rotary()))
    said = "nothing gives the buffer model.rotary_emb.inv_freq its values"
    refuses(short, tmp_path / "run", said)


@pytest.mark.parametrize("name", LOST)
def test_what_loading_would_lose_is_refused_by_name(short, tmp_path, operate, no_step, name):
    operate(LOST[name])
    refuses(short, tmp_path / "run", f"surgery() adds {name}, which loading would lose")


class Wrapper(torch.nn.Module):
    """A layer within another one, whose weight thereby has another name."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)


def test_a_weight_under_another_name_is_refused_by_name(short, tmp_path, operate, no_step):
    """Its values would not be read from the file."""

    def surgery(model):
        attention = model.model.layers[1].self_attn
        attention.q_proj = Wrapper(attention.q_proj)

    def merge(model):
        attention = model.model.layers[1].self_attn
        attention.q_proj = attention.q_proj.layer

    operate(surgery, merge)
    refuses(short, tmp_path / "run", f"{Q.format(1)}.")


def test_a_weight_of_another_shape_is_refused_by_name(short, tmp_path, operate, no_step):
    def surgery(model):
        model.lm_head = torch.nn.Linear(32, 400, bias=False)

    operate(surgery)
    refuses(short, tmp_path / "run", "lm_head.weight")


@pytest.fixture(scope="module")
def adapted(base, tmp_path_factory) -> dict[str, Path]:
    """Runs with adapters: on one rank, on two, and with another seed."""
    folder = tmp_path_factory.mktemp("adapted")
    values = base | {"eval_data": "", "save_every": 1, "keep_checkpoints": 0}
    values |= {"learning_rate": 1e-2, "seed": 5}
    done = run_script(LORA, values, folder / "two")
    assert done.returncode == 0, done.stderr[-3000:]
    with pytest.MonkeyPatch.context() as patch:
        for module in (model_module, checks):
            patch.setattr(module, "surgery", FORK["lora"])
            patch.setattr(module, "merge", FORK["merge_lora"])
        run(values, folder / "one")
        run(values | {"seed": 6}, folder / "other seed")
    return {name: folder / name for name in ("one", "two", "other seed")}


def first_values(output: Path) -> dict[str, torch.Tensor]:
    """The adapters after the first step, whose learning rate is 0."""
    assert read_metrics(output)[0]["learning_rate"] == 0
    tensors = read_checkpoint(output / "checkpoints" / "step_1")
    return {name: t for name, t in tensors.items() if "lora" in name and "exp_avg" not in name}


def test_first_values_are_the_same_on_any_number_of_ranks(adapted):
    one, two = (first_values(adapted[name]) for name in ("one", "two"))
    assert one.keys() == two.keys() and len(one) == 4
    assert all(torch.equal(two[name], tensor) for name, tensor in one.items())


def test_first_values_follow_the_seed_and_reset_parameters(adapted):
    one, other = (first_values(adapted[name]) for name in ("one", "other seed"))
    for name, tensor in one.items():
        if name.endswith("lora_b"):
            assert not tensor.any() and not other[name].any()
        else:  # uniform in (−1, 1)
            assert tensor.shape == (3, 32) and 0.8 < tensor.abs().max() <= 1
            assert not torch.equal(tensor, other[name])
            assert abs(tensor.mean()) < 0.25 and 0.45 < tensor.std() < 0.7
    first, second = (one[f"model.{Q.format(layer)}.lora_a"] for layer in (0, 1))
    assert not torch.equal(first, second)


def test_adapters_on_two_ranks_are_those_of_one(adapted, base):
    one, two = (final_of(adapted[name]) for name in ("one", "two"))
    for name, tensor in one.items():
        assert (two[name] - tensor).abs().max() < 1e-5
    assert_merged(base, adapted["two"])


# ---- Sharded models, and resumed runs ------------------------------------------------------------


def test_a_plain_parameter_in_a_sharded_model_is_refused_by_name(
    short, tmp_path, monkeypatch, no_step
):
    """A single process that computes in bfloat16 has a sharded model, too."""
    load_model = train.load_model

    def and_plain_head(*args):
        loaded = load_model(*args)
        FORK["plain_head"](loaded)
        return loaded

    monkeypatch.setattr(train, "load_model", and_plain_head)
    said = ("lm_head.weight", "do it in surgery(), in model.py")
    refuses(short | {"dtype": "bfloat16"}, tmp_path / "run", *said)


def test_a_plain_parameter_on_two_ranks_is_refused_by_name(short, tmp_path):
    done = run_script(PLAIN_HEAD, short, tmp_path / "run")
    assert done.returncode != 0 and "lm_head.weight" in done.stderr
    assert "do it in surgery(), in model.py" in done.stderr
    assert not (tmp_path / "run" / "final").exists()


def test_a_run_does_not_go_on_with_another_surgery(short, tmp_path, operate, monkeypatch):
    output = tmp_path / "run"
    with monkeypatch.context() as patch:
        for module in (model_module, checks):
            frozen = lambda model: model.lm_head.requires_grad_(False)  # noqa: E731
            patch.setattr(module, "surgery", frozen)
        run(short, output)
    shutil.rmtree(output / "final")
    with pytest.raises(InputError, match="step_3 is of another run: other code"):
        run(short, output)
    with pytest.raises(InputError, match=r"model\.lm_head\.weight is trained in.*--resume never"):
        run(short | {"resume": "anyway"}, output)


def test_a_run_with_adapters_goes_on_where_it_was(short, tmp_path, operate):
    operate(FORK["lora"], FORK["merge_lora"])
    run(short, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    for name in ("final", "checkpoints/step_3", "checkpoints/step_2"):
        shutil.rmtree(tmp_path / "cut" / name)
    run(short, tmp_path / "cut")
    whole, again = final_of(tmp_path / "whole"), final_of(tmp_path / "cut")
    assert all(torch.equal(again[name], tensor) for name, tensor in whole.items())
