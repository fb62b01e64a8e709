"""The private interfaces of other packages that this code touches: the one list of them, and that
each is as the code expects. A failure says which package has changed, and where to look."""

import importlib
import importlib.metadata
import inspect
import re
from pathlib import Path

import datasets
import pytest
import torch
from conftest import ROOT, make_model

# {package: {interface: (the file that uses it, what must be true)}}
INTERFACES = {
    "torch": {
        "torch.nn.attention.varlen.varlen_attn(..., window_size, scale)": (
            "model.py",
            lambda: takes("torch.nn.attention.varlen.varlen_attn", "window_size", "scale"),
        ),
        "HuggingFaceStorageWriter(fqn_to_index_mapping, save_distributed)": (
            "runtime/checkpoints.py",
            lambda: takes(
                "torch.distributed.checkpoint.HuggingFaceStorageWriter",
                "fqn_to_index_mapping",
                "save_distributed",
            ),
        ),
        "CheckpointException.failures, of a BaseException": (
            "runtime/command_line.py",
            lambda: hasattr(found("torch.distributed.checkpoint.CheckpointException"), "failures"),
        ),
        "register_fsdp_forward_method(module, name)": (
            "model.py",
            lambda: takes("torch.distributed.fsdp.register_fsdp_forward_method", "method_name"),
        ),
        "FSDPModule.set_requires_all_reduce, .reshard, .set_reshard_after_...": (
            "model.py",
            lambda: all(
                hasattr(found("torch.distributed.fsdp.FSDPModule"), name)
                for name in (
                    "set_requires_all_reduce",
                    "reshard",
                    "set_reshard_after_forward",
                    "set_reshard_after_backward",
                )
            ),
        ),
        "torch.ops.torch_attn._varlen_attn": (
            "model.py",
            lambda: (
                found("torch.nn.attention.varlen.varlen_attn")
                and torch.ops.torch_attn._varlen_attn.default
            ),
        ),
        "Tensor._backward_hooks, _post_accumulate_grad_hooks": (
            "runtime/weights.py",
            lambda: all(
                hasattr(torch.zeros(1, device="meta"), name)
                for name in ("_backward_hooks", "_post_accumulate_grad_hooks")
            ),
        ),
        "Module._parameters": (
            "runtime/masters.py",
            lambda: list(torch.nn.Linear(1, 1)._parameters) == ["weight", "bias"],
        ),
        "Tensor._version, which a change in place raises": (
            "eval/export.py",
            lambda: torch.zeros(1, device="meta").add_(1)._version == 1,
        ),
        "torch._subclasses.fake_tensor.FakeTensorMode": (
            "benchmarks/plan.py",
            lambda: found("torch._subclasses.fake_tensor.FakeTensorMode"),
        ),
        "torch.testing._internal.distributed.fake_pg.FakeStore": (
            "benchmarks/plan.py",
            lambda: found("torch.testing._internal.distributed.fake_pg.FakeStore"),
        ),
        "ShardingPropagator._propagate_tensor_meta_non_cached": (
            "benchmarks/fake_gpu.py",
            lambda: found(
                "torch.distributed.tensor._sharding_prop.ShardingPropagator"
                "._propagate_tensor_meta_non_cached"
            ),
        ),
        "torch.distributed._tools.common_utils.get_untyped_storages": (
            "benchmarks/fake_gpu.py",
            lambda: found("torch.distributed._tools.common_utils.get_untyped_storages"),
        ),
    },
    "transformers": {
        "a block is a GradientCheckpointingLayer with .gradient_checkpointing": (
            "model.py",
            lambda: any(
                isinstance(m, found("transformers.modeling_layers.GradientCheckpointingLayer"))
                and m.gradient_checkpointing is False
                for m in make_model().modules()
            ),
        ),
        "config._attn_implementation after set_attn_implementation": (
            "model.py",
            lambda: make_model().config._attn_implementation == "sdpa",
        ),
        "parameter._is_hf_initialized keeps initialize_weights from it": (
            "runtime/weights.py",
            lambda: keeps_initialized(make_model()),
        ),
        "core_model_loading.revert_weight_conversion(model, tensors)": (
            "runtime/weights.py",
            lambda: takes(
                "transformers.core_model_loading.revert_weight_conversion", "model", "state_dict"
            ),
        ),
    },
    "datasets": {
        "Dataset._fingerprint, and map(new_fingerprint=)": (
            "runtime/rows.py",
            lambda: (
                isinstance(datasets.Dataset.from_dict({"a": [1]})._fingerprint, str)
                and takes("datasets.Dataset.map", "new_fingerprint", "cache_file_name")
            ),
        ),
    },
    "multiprocess": {
        "active_children are the workers of datasets' map, and parent_process": (
            "runtime/processes.py",
            lambda: (
                "multiprocess" in vars(found("datasets.arrow_dataset"))["mp"].__name__
                and found("multiprocess.active_children")
                and found("multiprocess.parent_process")() is None
            ),
        ),
    },
    "huggingface_hub": {
        "a snapshot lies in models--ORG--NAME/snapshots/COMMIT": (
            "runtime/weights.py",
            lambda: (
                found("huggingface_hub.file_download.repo_folder_name")(
                    repo_id="org/name", repo_type="model"
                )
                == "models--org--name"
            ),
        ),
    },
    "alpaca_eval": {
        "decoders.openai._openai_completion_helper": (
            "eval/alpaca_eval2.py",
            lambda: found("alpaca_eval.decoders.openai._openai_completion_helper"),
        ),
    },
}


def found(path: str):
    """The object of a dotted path; raises ImportError or AttributeError without it."""
    parts = path.split(".")
    for count in range(len(parts) - 1, 0, -1):
        try:
            value = importlib.import_module(".".join(parts[:count]))
        except ModuleNotFoundError:
            continue
        for name in parts[count:]:
            value = getattr(value, name)
        return value
    raise ImportError(path)


def takes(path: str, *names: str) -> bool:
    return {*names} <= inspect.signature(found(path)).parameters.keys()


def keeps_initialized(model) -> bool:
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter._is_hf_initialized = True
    model.initialize_weights()
    return all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.repo
@pytest.mark.parametrize(
    "package, interface", [(p, name) for p, names in INTERFACES.items() for name in names]
)
def test_a_private_interface_is_as_expected(package, interface):
    try:
        version = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"{package} is not installed")
    file, check = INTERFACES[package][interface]
    try:
        held, reason = bool(check()), "it is another one"
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        held, reason = False, repr(error)
    assert held, f"{package} {version} has changed: {interface}, which {file} uses: {reason}"


@pytest.mark.repo
def test_the_list_of_private_interfaces_is_whole():
    """Every attribute or module with an underscore that is not the code's own."""
    listed = " ".join(name for names in INTERFACES.values() for name in names)
    allowed = {"_exit", "_get_help_string", "_cdata"}  # of Python's os and argparse; of a storage
    allowed |= {"_python_dispatch", "_pytree", "_scaled_dot_product_flash_attention"}  # of aten
    files = [*ROOT.glob("*.py"), *(p for f in ("runtime", "eval") for p in (ROOT / f).glob("*.py"))]
    files += [ROOT / "benchmarks" / name for name in ("plan.py", "fake_gpu.py", "throughput.py")]
    missing = set()
    for path in files:
        for name in re.findall(r"(?<!self)\.(_[a-z]\w*)", without_strings(path)):
            known = name in allowed or re.search(rf"(?<!\w){name}(?!\w)", listed)
            missing |= set() if known else {f"{path.name}: {name}"}
    tools = {
        "fake_gpu.py: _tools",
        "fake_gpu.py: _fully_shard",
        "fake_gpu.py: _fsdp_param_group",
        "fake_gpu.py: _sharding_prop",
        "fake_gpu.py: _internal",
        "plan.py: _internal",
    }
    assert missing <= tools


def without_strings(path: Path) -> str:
    return re.sub(r'"[^"\n]*"', "", path.read_text())


@pytest.mark.repo
def test_constraints_hold_the_versions_that_requirements_ask_for():
    from packaging.requirements import Requirement

    pins = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.M))
    pins = {name.lower().replace("_", "-"): version for name, version in pins.items()}
    for file in ("requirements.txt", "requirements-dev.txt", "eval/requirements.txt"):
        for line in (ROOT / file).read_text().splitlines():
            text = line.partition("#")[0].strip()
            if text and not text.startswith("-r"):
                asked = Requirement(text)
                version = pins[asked.name.lower().replace("_", "-")]
                assert asked.specifier.contains(version), f"{asked}: {version}"
    assert "-c constraints.txt" in (ROOT / "README.md").read_text()
