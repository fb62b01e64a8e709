"""AdamW whose masters and moments are on the host: the same bits as without."""

import copy
import gc
import json

import pytest
import torch
from conftest import interrupt, read_checkpoint, run, timeless
from safetensors.torch import load_file

from model import load_model
from runtime import streaming
from runtime.errors import InputError
from runtime.masters import check_memory, renew
from runtime.streaming import HostMaster, check_host, free_memory, stream

CPU = torch.device("cpu")


def master_of(values: torch.Tensor) -> HostMaster:
    master = HostMaster(values.clone())
    master.weight = torch.nn.Parameter(values.bfloat16())
    master.weight.total = torch.zeros_like(values)
    return master


@pytest.mark.parametrize("slices", [64, 10**6])
def test_a_streamed_step_is_that_of_adamw(slices, monkeypatch):
    """Two groups, a rate that changes, shapes that no slice divides."""
    monkeypatch.setattr(streaming, "SLICE", slices)
    torch.manual_seed(0)
    values = [torch.randn(shape) for shape in ((40, 50), (7,), (3, 5, 11), (1,))]
    plain = [torch.nn.Parameter(value.clone()) for value in values]
    masters = [master_of(value) for value in values]

    def optimizer(parameters: list):
        groups = [{"params": parameters[:2]}, {"params": parameters[2:], "weight_decay": 0.0}]
        return torch.optim.AdamW(groups, lr=0.01, betas=(0.8, 0.95), eps=1e-6, fused=True)

    expected, streamed = optimizer(plain), optimizer(masters)
    stream(streamed)
    for step in range(4):
        for parameter, master in zip(plain, masters):
            gradient = torch.randn(parameter.shape)
            parameter.grad = gradient.clone()
            master.grad.copy_(gradient)
        for of in (expected, streamed):
            of.param_groups[0]["lr"] = 0.01 / (step + 1)
            of.step()
            of.zero_grad()
        renew(dict(enumerate(masters)))
        for parameter, master in zip(plain, masters):
            assert torch.equal(parameter, master)
            assert torch.equal(master.weight, parameter.bfloat16())
            assert not master.grad.any()
            for name, value in expected.state[parameter].items():
                assert torch.equal(streamed.state[master][name], value)


def test_a_master_on_the_host_has_its_weights_gradient():
    master = master_of(torch.ones(3))
    assert master.grad is master.weight.total
    master.grad = None  # as zero_grad does: it is set to 0 with the sums
    assert master.grad is master.weight.total
    with pytest.raises(ValueError, match="change that"):
        master.grad = torch.ones(3)


def test_large_tensors_are_pinned_where_they_are(monkeypatch):
    """And small ones, and those that CUDA does not take, are copied. (pin_memory alone would round
    up to a power of two.)"""
    calls, answer = [], 0

    class Runtime:
        def cudaHostRegister(self, place, size, flags):
            calls.append(("in", place, size))
            return answer

        def cudaHostUnregister(self, place):
            calls.append(("out", place))

    monkeypatch.setattr(torch.cuda, "cudart", Runtime)
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda tensor: False)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor.detach().clone())
    cuda, large, small = torch.device("cuda", 0), HostMaster(torch.ones(2**18)), torch.ones(9)
    place = large.data_ptr()
    assert streaming.pinned(large, cuda) is large and calls == [("in", place, 2**20)]
    assert streaming.pinned(small, cuda) is not small and len(calls) == 1
    assert streaming.pinned(small, CPU) is small
    del large
    gc.collect()
    assert calls[1:] == [("out", place)]
    answer = 712
    large = HostMaster(torch.ones(2**18))
    copy = streaming.pinned(large, cuda)
    assert copy is not large and isinstance(copy, HostMaster) and torch.equal(copy, large)


def test_a_streamed_run_is_that_without_and_goes_on_in_the_other_way(base, tmp_path):
    """Metrics, checkpoints, optimizer's state and exported files, bit for bit; also after a change
    at the first step, and back at the second."""
    values = base | {"dtype": "bfloat16", "save_every": 1, "keep_checkpoints": 0}
    lines = {}
    for streamed in (True, False):
        name = f"run-{streamed}"
        lines[streamed] = run(values | {"stream_optimizer": streamed}, tmp_path / name)
        head = (tmp_path / name / "config.yaml").read_text()
        assert ("masters on the host" in head) == streamed
    assert timeless(lines[True]) == timeless(lines[False])
    last = [tmp_path / f"run-{s}" / "checkpoints" / "step_3" for s in (True, False)]
    one, other = map(read_checkpoint, last)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    one, other = (json.loads((folder / "trainer.json").read_text()) for folder in last)
    assert one["optimizer"] == other["optimizer"] and one["groups"] == other["groups"]
    weights = [load_file(tmp_path / f"run-{s}" / "final" / "model.safetensors") for s in lines]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    for first in (True, False):
        again = tmp_path / f"again-{first}"
        interrupt(tmp_path / f"run-{first}", again)  # after a step
        resumed = run(values | {"stream_optimizer": not first}, again)
        assert timeless(resumed) == timeless(lines[first])


def test_adapters_are_merged(model_folder, group, monkeypatch):
    """merge() finds all parameters on the device: those that it adds, and frozen ones."""
    from model import export
    from runtime.weights import load_tokenizer

    def surgery(model):
        model.requires_grad_(False)
        model.model.layers[0].mlp.down_proj.weight.requires_grad_(True)

    monkeypatch.setattr("model.surgery", surgery)
    model = load_model(str(model_folder), CPU, torch.bfloat16, stream_optimizer=True)
    (master,) = model.optimized().values()
    assert isinstance(master, HostMaster)
    seen = []
    monkeypatch.setattr("model.merge", lambda inner: seen.extend(inner.parameters()))
    folder = model_folder.parent / "merged"
    export(model, str(model_folder), load_tokenizer(str(model_folder)), folder)
    assert not any(isinstance(parameter, HostMaster) for parameter in seen)
    (trained,) = [parameter for parameter in seen if parameter.dtype == torch.float32]
    assert torch.equal(trained, master)


@pytest.mark.parametrize(
    "optimizer, name",
    [
        (torch.optim.SGD, "SGD"),
        (torch.optim.Adam, "Adam"),
        (lambda p: torch.optim.AdamW(p, amsgrad=True), "AMSGrad"),
    ],
)
def test_another_optimizer_is_refused_by_name(optimizer, name):
    with pytest.raises(InputError, match=f"is for AdamW: it cannot be used with {name}$"):
        stream(optimizer([master_of(torch.ones(2))]))


def test_float32_is_refused_and_so_is_a_host_without_memory(model_folder, group, monkeypatch):
    """Before any weight is read."""
    monkeypatch.setattr("model.read_weights", lambda *args: 1 / 0)
    with pytest.raises(InputError, match="for one process that computes in bfloat16"):
        load_model(str(model_folder), CPU, torch.float32, stream_optimizer=True)
    monkeypatch.setattr(streaming, "free_memory", lambda: 10**5)
    with pytest.raises(InputError, match="keeps 0.0 GB on the host, which has 0.0 GB left"):
        load_model(str(model_folder), CPU, torch.bfloat16, stream_optimizer=True)


def test_free_memory_is_that_of_the_container(tmp_path, monkeypatch):
    machine = free_memory()
    assert machine > 10**8
    monkeypatch.setattr(streaming, "CGROUPS", tmp_path)
    (tmp_path / "memory.max").write_text("5000000\n")
    (tmp_path / "memory.current").write_text("3000000\n")
    (tmp_path / "memory.stat").write_text("anon 1\nactive_file 400000\ninactive_file 600000\n")
    assert free_memory() == 3_000_000
    (tmp_path / "memory.max").write_text("max\n")
    assert free_memory() > 10**8
    (tmp_path / "memory").mkdir()  # version 1
    (tmp_path / "memory" / "memory.limit_in_bytes").write_text("900\n")
    (tmp_path / "memory" / "memory.usage_in_bytes").write_text("500\n")
    (tmp_path / "memory" / "memory.stat").write_text("cache 1\n")
    assert free_memory() == 400
    with torch.device("meta"):
        model = torch.nn.Linear(10, 10, bias=False)
    with pytest.raises(InputError):
        check_host(model)
    check_host(copy.deepcopy(model).requires_grad_(False))


def test_what_no_gpu_can_hold_is_refused_before_it_is_loaded(gpu_of):
    gpu_of(80 * 10**9)
    with torch.device("meta"):
        model = torch.nn.Linear(10**5, 8 * 10**4, bias=False)  # 8 B
    cuda = torch.device("cuda", 0)
    message = "8.0 billion parameters take 128 GB of each GPU, which has 80: more GPUs, or --stream"
    with pytest.raises(InputError, match=message):
        check_memory(model, cuda, 1, streamed=False)
    for ranks, streamed in ((1, True), (2, False)):
        check_memory(model, cuda, ranks, streamed)
    check_memory(model, CPU, 1, streamed=False)
    check_memory(model.requires_grad_(False), cuda, 1, streamed=False)
