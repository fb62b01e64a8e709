"""One device in bfloat16 without FSDP: its gradient, its norms, and how much fits."""

import functools
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from conftest import (
    GQA,
    TINY,
    interrupt,
    make_model,
    read_checkpoint,
    read_metrics,
    run,
    run_several,
    same_weights,
    timeless,
)
from safetensors.torch import load_file

import train
from data import pack
from loss import simper_loss
from model import compile_blocks, load_model
from runtime import norms, rehearsal
from runtime.checkpoints import read_state
from runtime.errors import InputError
from runtime.masters import keep_masters, masters_fit
from runtime.rehearsal import tokens_that_fit

CPU = torch.device("cpu")


@pytest.fixture(params=["llama", "llama-tied", "gpt2", "qwen2"])
def folder(request, tmp_path):
    """A model with weights so large that everything matters; qwen2 has biases."""
    model = make_model(request.param)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1)
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def rows(count: int = 8) -> list:
    draw = torch.Generator().manual_seed(0)
    size = lambda: int(torch.randint(3, 20, (), generator=draw))  # noqa: E731
    text = lambda: torch.randint(4, 300, (size(),), generator=draw).tolist()  # noqa: E731
    return [[text(), text(), text()] for _ in range(count)]


def gradient(model, parts: int = 1) -> dict[str, torch.Tensor]:
    """Of the mean loss over rows, by so many micro-batches."""
    every = rows()
    for part in range(parts):
        batch = pack(every[part * len(every) // parts : (part + 1) * len(every) // parts])
        (simper_loss(model(batch), batch.lengths).sum() / len(every)).backward()
    found = {name: p.grad for name, p in model.optimized().items()}
    return {n: g.full_tensor() if hasattr(g, "full_tensor") else g for n, g in found.items()}


def distance(some: dict, others: dict) -> float:
    """Relative to the norm of the others."""
    norm = lambda tensors: sum(t.double().norm() ** 2 for t in tensors).sqrt().item()  # noqa: E731
    return norm([some[n].double() - others[n].double() for n in others]) / norm(others.values())


def test_in_float32_the_gradient_is_bit_for_bit_that_of_the_plain_model(folder, group):
    plain = load_model(str(folder), CPU, torch.float32)
    model = load_model(str(folder), CPU, torch.float32)
    model.masters = keep_masters(model, torch.float32, set())
    expected, found = gradient(plain), gradient(model)
    assert expected.keys() == found.keys()
    tied = plain.model.config.tie_word_embeddings
    for name, value in expected.items():
        if tied and "embed" in name or tied and "wte" in name:  # the sum of two, in another order
            assert distance({name: found[name]}, {name: value}) < 1e-6
        else:
            assert torch.equal(found[name], value), name


def test_the_gradient_is_as_near_to_float64_and_depends_less_on_the_split(
    folder, group, monkeypatch
):
    exact = load_model(str(folder), CPU, torch.float32).double()
    expected, found = gradient(exact), {}
    for masters in (True, False):
        monkeypatch.setattr("model.masters_fit", lambda model, device, masters=masters: masters)
        one, four = (
            gradient(load_model(str(folder), CPU, torch.bfloat16), parts) for parts in (1, 4)
        )
        found[masters] = distance(one, expected), distance(four, one)
    (error, split), (before, split_before) = found[True], found[False]
    assert error < 1.02 * before
    assert split < split_before


def test_sums_begin_anew_with_every_step(folder, group):
    model = load_model(str(folder), CPU, torch.bfloat16)
    optimizer = torch.optim.SGD(model.optimized().values(), lr=0.0)
    first = {name: value.clone() for name, value in gradient(model).items()}
    optimizer.step()
    optimizer.zero_grad()
    model.refresh()
    second = gradient(model)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_masters_that_change_are_made_known_by_refresh(model_folder, group):
    """As by a step of SAM, or a head that is set anew; else the forward would be the old one's."""
    model, batch = load_model(str(model_folder), CPU, torch.bfloat16), pack(rows())
    before = model(batch)
    with torch.no_grad():
        next(iter(model.optimized().values())).mul_(1.5)
    with pytest.raises(InputError, match="has changed, .*: after changing model.optimized.., "):
        model(batch)
    model.refresh()
    assert not torch.equal(model(batch), before)
    with torch.no_grad():
        model.model.lm_head.weight.zero_()  # which refresh would undo
    with pytest.raises(InputError, match="lm_head.weight has changed"):
        model(batch)


def test_a_gradient_that_zero_grad_has_taken_is_renewed_by_refresh(model_folder, group):
    model, batch = load_model(str(model_folder), CPU, torch.bfloat16), pack(rows())
    optimizer = torch.optim.SGD(model.optimized().values(), lr=0.0)
    model(batch).sum().backward()
    optimizer.zero_grad()
    with pytest.raises(InputError, match="or its gradient: after .* zero_grad.., then refresh"):
        model(batch)
    model.refresh()
    model(batch)


def test_what_is_frozen_for_one_forward_gets_no_gradient(model_folder, group):
    """As where an auxiliary loss must not reach a part; the sums are of the other forwards."""
    model, batch = load_model(str(model_folder), CPU, torch.bfloat16), pack(rows())
    parts = [model.model.lm_head.weight, model.model.model.layers[0].mlp.up_proj.weight]
    for part in parts:
        part.requires_grad_(False)
    logps = model(batch)
    for part in parts:
        part.requires_grad_(True)
    logps.sum().backward()
    found = {name: p.grad.norm() for name, p in model.optimized().items()}
    none = {"model.lm_head.weight", "model.model.layers.0.mlp.up_proj.weight"}
    assert {name for name, norm in found.items() if norm == 0} == none


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_second_derivatives_are_refused(model_folder, group, dtype):
    model, batch = load_model(str(model_folder), CPU, dtype), pack(rows())
    states = torch.randn(len(batch.targets), 32, dtype=dtype, requires_grad=True)
    logps = model.token_logps(states, batch.targets)
    with pytest.raises(NotImplementedError, match="no second derivatives"):
        torch.autograd.grad(logps.sum(), states, create_graph=True)
    if dtype == torch.bfloat16:
        layer = model.model.model.layers[0].mlp.up_proj
        with pytest.raises(NotImplementedError, match="no second derivatives"):
            torch.autograd.grad(layer(states).sum(), states, create_graph=True)


def test_the_weights_are_the_masters_rounded(base, tmp_path):
    run(base | {"dtype": "bfloat16", "save_every": 1, "keep_checkpoints": 0}, tmp_path / "run")
    assert "# weights: one process, float32" in (tmp_path / "run" / "config.yaml").read_text()
    final = load_file(tmp_path / "run" / "final" / "model.safetensors")
    last = read_checkpoint(tmp_path / "run" / "checkpoints" / "step_3")
    assert {f"model.{name}" for name in final} <= last.keys()
    for name, weight in final.items():
        master = last[f"model.{name}"]
        assert master.dtype == torch.float32 and torch.equal(master.bfloat16(), weight)
        assert not torch.equal(master, weight.float())


@pytest.mark.parametrize("more", [{}, {"activation_checkpointing": "selective"}])
def test_a_run_is_that_of_fsdp_and_goes_on_in_the_other_way(base, tmp_path, monkeypatch, more):
    values = base | {"dtype": "bfloat16", "save_every": 1, "keep_checkpoints": 0} | more
    lines = {}
    for masters in (True, False):
        monkeypatch.setattr("model.masters_fit", lambda model, device, masters=masters: masters)
        lines[masters] = run(values, tmp_path / f"masters-{masters}")
    monkeypatch.setattr("model.masters_fit", lambda model, device: True)
    again = tmp_path / "again"  # from FSDP's first step
    interrupt(tmp_path / "masters-False", again)
    resumed = run(values, again)
    trained = [
        [line["loss"] for line in found if "learning_rate" in line]
        for found in (lines[True], lines[False], resumed)
    ]
    assert trained[0] == pytest.approx(trained[1], rel=0.1, abs=2e-4)
    assert trained[2] == pytest.approx(trained[1], rel=0.1, abs=2e-4)


def test_compiled_blocks_sum_the_same(model_folder, group, monkeypatch):
    plain = gradient(load_model(str(model_folder), CPU, torch.bfloat16))
    eager = functools.partialmethod(torch.nn.Module.compile, backend="eager")
    monkeypatch.setattr(torch.nn.Module, "compile", eager)
    model = load_model(str(model_folder), CPU, torch.bfloat16)
    compile_blocks(model)
    found = gradient(model)
    assert distance(found, plain) < 1e-3


def test_a_forward_that_a_fork_has_given_a_module_is_kept(model_folder, group, monkeypatch):
    """A linear layer's, and a norm's."""
    monkeypatch.setattr(norms, "DEVICES", {"cpu"})
    seen = []

    def own(module):
        forward = type(module).forward
        module.forward = lambda x: seen.append(type(module)) or forward(module, x)

    def surgery(model):
        own(model.model.layers[0].mlp.down_proj)
        own(model.model.norm)

    monkeypatch.setattr("model.surgery", surgery)
    gradients = gradient(load_model(str(model_folder), CPU, torch.bfloat16))
    assert len({*seen}) == 2
    monkeypatch.setattr("model.surgery", lambda model: None)
    plain = gradient(load_model(str(model_folder), CPU, torch.bfloat16))
    assert distance(gradients, plain) < 0.02


def test_a_norm_of_parameters_without_gradients_is_an_error(model_folder, group):
    """A module's own: they have none."""
    model = load_model(str(model_folder), CPU, torch.bfloat16)
    gradient(model)
    block = model.model.model.layers[0]
    assert train.total_norm(model.optimized(block).values()) > 0
    with pytest.raises(ValueError, match="take those of model.optimized"):
        train.total_norm(block.parameters())


def test_frozen_weights_are_read_as_bfloat16(folder, group, monkeypatch):
    def freeze(model):
        model.requires_grad_(False)
        model.get_output_embeddings().weight.requires_grad_(True)

    monkeypatch.setattr("model.surgery", freeze)
    model = load_model(str(folder), CPU, torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    (master,) = model.optimized().values()
    assert master.dtype == torch.float32
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    for name, parameter in plain.named_parameters():
        assert torch.equal(model.model.get_parameter(name), parameter)


def test_what_fits_is_decided_by_memory(gpu_of):
    gpu_of(141 * 10**9)
    with torch.device("meta"):
        model = torch.nn.Linear(10**5, 8 * 10**4, bias=False)  # 8 B
    cuda = torch.device("cuda", 0)
    assert not masters_fit(model, cuda) and masters_fit(model, CPU)
    model.weight.requires_grad_(False)
    assert masters_fit(model, cuda)


# ---- Several ranks -------------------------------------------------------------------------------

KEEP_IN_SECOND = """
train.gathered_fits, train.tokens_that_fit = lambda *args: number % 2 == 1, lambda *args: 250
from torch.distributed.fsdp import FSDPModule
import model
begin = model.PackedModel.begin_micro_batch
def begin_micro_batch(self, last):
    gathered = [isinstance(p, torch.distributed.tensor.DTensor) for p in self.parameters()]
    seen.append(not any(gathered))
    begin(self, last)
import torch
seen = []
model.PackedModel.begin_micro_batch = begin_micro_batch
end = train.export
def export(*args):
    print(f"run {number}: {sum(seen)} of {len(seen)}", flush=True)
    seen.clear()
    end(*args)
train.export = export
"""


def test_weights_that_stay_gathered_change_no_bit(base, tmp_path):
    """Metrics, checkpoints and export, with evaluations between steps. All weights are gathered
    when a micro-batch begins that is not the first of its step, and are there to save. The third
    run has replicas, whose first step has nothing of the rehearsal's gradient."""
    values = base | {"micro_batch_tokens": 0, "save_every": 1, "eval_every": 1}
    values |= {"dtype": "bfloat16"}
    folders = [tmp_path / name for name in ("freed", "kept", "replicas")]
    runs = [(values | {"replicas": 1 + (f.name == "replicas")}, f) for f in folders]
    printed = run_several(runs, tmp_path, code=KEEP_IN_SECOND)
    freed, kept = re.findall(r"run \d: (\d+) of (\d+)", printed)[:2]
    assert freed[0] == "0" and 0 < int(kept[0]) < int(kept[1])
    one, other, replicas = map(read_metrics, folders)
    assert timeless(one) == timeless(other)
    for line, of_replicas in zip(one, replicas, strict=True):
        for name in {"logps/chosen", "grad_norm"} & line.keys():
            assert of_replicas[name] == pytest.approx(line[name], rel=0.02)
    assert "# weights: gathered once a step" in (folders[1] / "config.yaml").read_text()
    one, other = (read_checkpoint(folder / "checkpoints" / "step_3") for folder in folders[:2])
    assert all(torch.equal(one[name], other[name]) for name in {*one, *other})
    assert same_weights(*folders[:2])


def test_weights_stay_gathered_where_memory_is_left(group, monkeypatch, gpu_of):
    """8 B on 8 GPUs of 80 GB take 16 GB of shards and 16 GB more; on 2 GPUs 64 and 16; on 8 of
    which one has 40 GB, the same is too much for that one."""

    class Weight:
        def __init__(self, ranks: int):
            self.requires_grad, self.ranks = True, ranks

        def numel(self) -> int:
            return 8 * 10**9

        def to_local(self):
            return SimpleNamespace(numel=lambda: 8 * 10**9 // self.ranks)

    gpu_of(80 * 10**9)
    for ranks, other, fits in ((1, 0, False), (2, 0, False), (8, 0, True), (8, 0.8, False)):
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda ranks=ranks: ranks)
        most = lambda device, share, other=other: [max(share, other)]  # noqa: E731
        monkeypatch.setattr(rehearsal, "max_over_ranks", most)
        model = SimpleNamespace(
            parameters=lambda ranks=ranks: [Weight(ranks)], dtype=torch.bfloat16
        )
        assert rehearsal.gathered_fits(model, torch.device("cuda", 0)) == fits
        assert not rehearsal.gathered_fits(model, CPU)


# ---- Norms ---------------------------------------------------------------------------------------


def test_norms_are_fused_where_that_rounds_no_more(group, model_folder, monkeypatch):
    """Llama's are; Gemma's, whose weight is 1 + w in float32, are not; nor is one that takes a
    gate, or a layer norm. The plain forward of the check keeps transformers' own."""
    monkeypatch.setattr(norms, "DEVICES", {"cpu"})
    for dtype, limit in ((torch.float32, 1e-6), (torch.bfloat16, 0.02)):
        model = load_model(str(model_folder), CPU, dtype)
        layers = [m for m in model.modules() if type(m).__name__ == "LlamaRMSNorm"]
        assert len(layers) == 5
        assert all(layer.forward.__func__ is norms.rms_norm for layer in layers)
        x = torch.randn(9, 32).to(dtype)
        layer = layers[0]
        fused = layer(x)
        with norms.own_norms(model):
            assert all(layer.forward.__func__ is not norms.rms_norm for layer in layers)
            own = layer(x)
        assert (fused.double() - own.double()).abs().max() < limit * own.abs().max()
        assert all(layer.forward.__func__ is norms.rms_norm for layer in layers)
    others = {"gemma2": TINY | GQA, "qwen3_next": TINY | GQA, "gpt2": {}}
    for kind, sizes in others.items():
        config = transformers.AutoConfig.for_model(kind, **sizes)
        with torch.device("meta"):
            other = transformers.AutoModelForCausalLM.from_config(config)
        norms.fuse_norms(other, CPU, torch.bfloat16)
        assert not [m for m in other.modules() if "forward" in vars(m)]
    # Mamba 2's norm may be called with a gate or without.
    sizes = {"hidden_size": 32, "num_heads": 8, "head_dim": 8, "n_groups": 1, "state_size": 8}
    config = transformers.Mamba2Config(vocab_size=99, num_hidden_layers=1, **sizes)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    norms.fuse_norms(model, CPU, torch.bfloat16)
    fused = [type(m).__name__ for m in model.modules() if "forward" in vars(m)]
    assert fused == ["Mamba2RMSNorm"] * 2
    model(torch.tensor([[1, 2, 3]]))


def test_a_run_with_fused_norms_is_that_without(base, tmp_path, monkeypatch):
    plain = run(base, tmp_path / "plain")
    monkeypatch.setattr(norms, "DEVICES", {"cpu"})
    fused = run(base, tmp_path / "fused")
    for line, other in zip(plain, fused, strict=True):
        for name in line:
            if name == "loss" or name.startswith(("eval/", "grad_norm")):
                assert other[name] == pytest.approx(line[name], rel=1e-4, abs=1e-6)


# ---- How much fits -------------------------------------------------------------------------------


class Rows:
    """Stands for a DataSet whose micro-batches are their tokens."""

    def __init__(self, *costs: int):
        self.costs = np.array(costs)

    def cost(self, indices) -> int:
        return int(self.costs[indices].sum())

    def pack(self, indices):
        return SimpleNamespace(to=lambda device: self.cost(indices))


class Model:
    """Takes 100 bytes and 3 a token; `most` is the largest micro-batch that fits."""

    def __init__(self, most: int = 10**9):
        self.most, self.seen = most, []

    def optimized(self) -> dict:
        return {}

    def __call__(self, tokens: int) -> torch.Tensor:
        self.seen.append(tokens)
        if tokens > self.most:
            raise torch.OutOfMemoryError
        return torch.zeros(1, requires_grad=True)

    def begin_micro_batch(self, last: bool) -> None: ...
    def free_gathered(self) -> None: ...
    def zero_grad(self) -> None: ...
    def refresh(self) -> None: ...


@pytest.fixture
def card(monkeypatch):
    """Of 11,000 bytes, of which 1,000 are another process's."""
    model = Model()
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 100 + 3 * model.seen[-1])
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (9_000, 11_000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 1_000)
    monkeypatch.setattr(rehearsal, "max_over_ranks", lambda device, *values: values)
    return model


CUDA = SimpleNamespace(type="cuda")


def test_micro_batches_fill_nine_tenths_of_the_memory(card, group):
    """100 + 3 n = 9,000: n = 2,966, in multiples of 256."""
    rows = Rows(*range(100, 500))
    assert tokens_that_fit(card, rows, CUDA, 128) == 2816
    assert card.seen == [499, 997, 1990]  # at most twice as many tokens, until that is near


def test_what_does_not_grow_at_first_is_not_taken_for_free(card, group, monkeypatch):
    """A peak that is elsewhere hides what a token takes, up to 1,300 tokens."""
    peak = lambda: max(4_000, 100 + 3 * card.seen[-1])  # noqa: E731
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", peak)
    assert tokens_that_fit(card, Rows(*range(100, 500)), CUDA, 128) == 2816
    assert max(card.seen) < 2_967  # and none is tried that takes more than nine tenths


def test_micro_batches_are_no_larger_than_a_step_and_hold_the_longest_row(card, group):
    assert tokens_that_fit(card, Rows(10, 20, 30), CUDA, 2) == 50
    assert tokens_that_fit(card, Rows(3_000, 3_000), CUDA, 2) == 3_000
    card.most = 1_500
    assert tokens_that_fit(card, Rows(1_000, 1_000), CUDA, 2) == 1_000
    assert tokens_that_fit(card, Rows(9, 9), CPU, 2) == 8192
    assert tokens_that_fit(card, Rows(9_000, 9), CPU, 2) == 9_000


def test_a_row_that_does_not_fit_is_explained(card, group):
    card.most = 10
    with pytest.raises(torch.OutOfMemoryError) as caught:
        tokens_that_fit(card, Rows(20, 20), CUDA, 2)
    assert "--activation_checkpointing selective" in caught.value.__notes__[0]


def test_a_run_that_goes_on_keeps_its_micro_batches(base, tmp_path, monkeypatch):
    monkeypatch.setattr("train.tokens_that_fit", lambda *args: 250)
    values = base | {"micro_batch_tokens": 0, "save_every": 1, "keep_checkpoints": 0}
    lines = run(values, tmp_path / "run")
    state = read_state(tmp_path / "run" / "checkpoints" / "step_3")
    assert state["config"]["micro_batch_tokens"] == 250
    interrupt(tmp_path / "run", tmp_path / "again")
    monkeypatch.setattr("train.tokens_that_fit", lambda *args: 1 / 0)
    again = run(values, tmp_path / "again")
    assert timeless(again) == timeless(lines)
    for name in ("run", "again"):
        head = (tmp_path / name / "config.yaml").read_text()
        assert "# micro_batch_tokens in use: 250\n" in head and "# weights" not in head
