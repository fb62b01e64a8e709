"""The packed, sharded model against plain transformers forwards of an independent model with the same weights."""

import json
import resource
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from conftest import ARCHITECTURES, CHATML, GQA, TINY, make_model, make_tokenizer
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import model as model_module
from data import InputError, pack
from loss import simper_loss
from model import PackedModel, build_model, export, load_model, token_logps

TOLERANCE = 1e-5  # of float32 results, relative to the largest value
REFUSED = {  # models that packing gets wrong, and why
    "granite": TINY | {"num_key_value_heads": 2, "logits_scaling": 1.05},  # divides its logits after the head
    "cohere": TINY | {"num_key_value_heads": 2, "logit_scale": 0.5},  # multiplies them
    "mamba": {"vocab_size": 320, "hidden_size": 32, "state_size": 8, "num_hidden_layers": 2},  # recurrent
    "bloom": {"vocab_size": 320, "hidden_size": 32, "n_layer": 2, "n_head": 4},  # position bias instead of position ids
    "gemma2": TINY | GQA,  # soft-caps its attention scores
    "gptj": {"vocab_size": 320, "n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 8},  # knows no other attention
}


def make_pairs(*lengths: tuple[int, int, int], seed: int = 0) -> list[tuple[list[int], ...]]:
    """Pairs of random tokens with these numbers of tokens in prompt, chosen and rejected."""
    generator = torch.Generator().manual_seed(seed)
    return [tuple(torch.randint(320, (n,), generator=generator).tolist() for n in pair) for pair in lengths]


PAIRS = make_pairs((3, 4, 2), (9, 5, 12), (1, 8, 3), (7, 1, 15))  # some longer than the sliding window of 6


def make_reference(name: str, **changes):
    """A plain transformers model; biases and norm weights are random too, so that leaving one out is noticed."""
    model = make_model(name, **changes)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def make_packed(reference) -> PackedModel:
    """The packed model with the same weights, not sharded."""
    model = build_model(reference.config)
    model.model.load_state_dict(reference.state_dict())
    return model.train()


def plain_logps(model, pairs) -> list[torch.Tensor]:
    """Log-probs of every response's tokens, chosen and rejected, pair after pair: one plain forward for each response."""
    logps = []
    for prompt, *responses in pairs:
        for response in responses:
            ids = torch.tensor(prompt + response)
            logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1]
            logps.append(logits.log_softmax(dim=-1).gather(1, ids[1:, None])[len(prompt) - 1 :, 0])
    return logps


def plain_results(model, pairs=PAIRS) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """(log-probs, gradients of the mean loss by parameter name), without pack, PackedModel and simper_loss."""
    logps = plain_logps(model, pairs)
    inverse_perplexities = [response.mean().exp() for response in logps]
    model.zero_grad()
    (sum(inverse_perplexities[1::2]) - sum(inverse_perplexities[::2])).div(len(pairs)).backward()
    return torch.cat(logps).detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


def packed_results(model: PackedModel, pairs=PAIRS, scale: float | None = None) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The same by the packed model; `scale` of the summed loss instead of 1 / pairs."""
    batch = pack(pairs)
    model.zero_grad()
    logps = model(batch)
    (simper_loss(logps, batch.lengths).sum() * (scale or 1 / len(pairs))).backward()
    return logps.detach(), {name.removeprefix("model."): whole(p.grad).clone() for name, p in model.named_parameters()}


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def assert_near(actual, expected, tolerance: float = TOLERANCE) -> None:
    """Tensors, or dictionaries of them, differ by at most `tolerance` of their largest value (or 1 % of the largest of all:
    some gradients are zero but for rounding)."""
    if isinstance(expected, torch.Tensor):
        actual, expected = {"": actual}, {"": expected}
    assert actual.keys() == expected.keys()
    largest = max(value.abs().max().item() for value in expected.values())
    assert largest > 0
    for name, value in expected.items():
        assert actual[name].shape == value.shape and actual[name].dtype == torch.float32
        difference = (actual[name] - value).abs().max().item()
        assert difference <= tolerance * max(value.abs().max().item(), 0.01 * largest), f"{name}: {difference}"


# ---- The packed forward ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_packed_equals_plain(name, monkeypatch):
    monkeypatch.setitem(model_module.LOGITS_BYTES, "cpu", 4 * 320 * 7)  # 7 of the 50 response tokens at a time
    reference = make_reference(name)
    (logps, gradients), (expected, expected_gradients) = packed_results(make_packed(reference)), plain_results(reference)
    assert_near(logps, expected)
    assert_near(gradients, expected_gradients)


@pytest.mark.parametrize("name", ["llama", "mistral-sliding-window", "gpt2"])
@torch.no_grad()
def test_pairs_and_responses_do_not_see_each_other(name):
    model = make_packed(make_reference(name))
    logps = model(pack(PAIRS))
    alone = torch.cat([model(pack([pair])) for pair in PAIRS])
    assert_near(logps, alone)
    (prompt, chosen, rejected), others = PAIRS[1], [PAIRS[0], *PAIRS[2:]]
    start, c = 6, len(chosen)  # PAIRS[1] comes after 6 response tokens
    changed = model(pack([others[0], (prompt, [(token + 1) % 320 for token in chosen], rejected), *others[1:]]))
    mine = torch.zeros_like(logps, dtype=torch.bool)
    mine[start : start + c] = True
    assert (changed[mine] != logps[mine]).all()
    assert_near(changed[~mine], logps[~mine], 1e-6)
    changed = model(pack([others[0], (prompt, chosen[:2], rejected[:-1] + [7]), *others[1:]]))  # nor the future
    assert_near(changed[start : start + 2], logps[start : start + 2], 1e-6)
    assert_near(changed[start + 2 :][: len(rejected) - 1], logps[start + c :][: len(rejected) - 1], 1e-6)


ROPE = {"rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "partial_rotary_factor": 1.0}
ROPES = {  # rotary frequencies that depend on the length of the sequence, here from 32 tokens on
    "phi3": {"original_max_position_embeddings": 32, "rope_parameters": ROPE | {"rope_type": "longrope"}},
    "llama": {
        "max_position_embeddings": 32,
        "rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4},
    },
}


@pytest.mark.parametrize("name", ROPES)
def test_a_long_neighbour_does_not_change_the_rotary_frequencies(name, group, tmp_path):
    config = AutoConfig.for_model(name, **(TINY | {"num_key_value_heads": 2} | ROPES[name]))
    torch.manual_seed(0)
    reference = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    reference.save_pretrained(tmp_path)
    pairs = make_pairs((7, 5, 9), (40, 30, 20))
    try:
        model = load_model(str(tmp_path), "cpu", torch.float32)
    except InputError:
        return  # refused, which is as good
    with torch.no_grad():
        assert_near(model(pack(pairs)), torch.cat(plain_logps(reference, pairs)))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [1, 3, 20, 100])
def test_token_logps_in_chunks(bias, rows, monkeypatch):
    monkeypatch.setitem(model_module.LOGITS_BYTES, "cpu", 4 * 50 * rows + 3)  # `rows` of the 20 tokens at a time
    generator = torch.Generator().manual_seed(0)
    shapes = [(20, 8), (50, 8), (50,)] if bias else [(20, 8), (50, 8)]
    inputs = [torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True) for shape in shapes]
    targets = torch.randint(50, (20,), generator=generator)
    expected = F.linear(*inputs).log_softmax(dim=1)[torch.arange(20), targets]
    weights = torch.randn(20, generator=generator, dtype=torch.float64)
    expected_gradients = torch.autograd.grad(expected @ weights, inputs)
    for dtype, tolerance in [(torch.float64, 1e-13), (torch.float32, 1e-5), (torch.bfloat16, 0.05)]:
        cast = [tensor.detach().to(dtype).requires_grad_() for tensor in inputs]
        logps = token_logps(cast[0], cast[1], cast[2] if bias else None, targets)
        assert logps.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        torch.testing.assert_close(logps.double(), expected, rtol=tolerance, atol=tolerance)
        gradients = torch.autograd.grad(logps @ weights.to(logps.dtype), cast)
        for actual, gradient in zip(gradients, expected_gradients):
            assert (actual - gradient).abs().max() <= tolerance * gradient.abs().max()
        if dtype == torch.bfloat16:
            assert (logps != logps.bfloat16().float()).sum() > 15  # not a rounded bfloat16


@pytest.mark.parametrize(
    "name, names", [("gpt2", ("attn_pdrop", "embd_pdrop", "resid_pdrop")), ("llama", ("attention_dropout",))]
)
@torch.no_grad()
def test_no_dropout_in_training(name, names):
    reference = make_model(name, **dict.fromkeys(names, 0.1)).train()
    ids = torch.tensor([PAIRS[1][0]])
    assert not torch.equal(reference(ids).logits, reference(ids).logits)  # with dropout, they differ
    model = make_packed(reference)
    assert model.training and torch.equal(model(pack(PAIRS)), model(pack(PAIRS)))
    assert all(getattr(reference.config, name) == 0.1 for name in names)  # the caller's config is as it was


# ---- Loading --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "llama-tied", "mistral-sliding-window", "gemma3_text", "gpt2"])
def test_load_model(name, dtype, group, tmp_path):
    make_reference(name).to(dtype).save_pretrained(tmp_path)
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    model = load_model(str(tmp_path), "cpu", torch.float32)
    assert model.training
    expected = dict(reference.named_parameters())
    assert [key for key, _ in model.named_parameters()] == [f"model.{key}" for key in expected]
    for key, parameter in model.named_parameters():
        assert isinstance(parameter, DTensor) and parameter.dtype == torch.float32 and parameter.requires_grad
        assert torch.equal(parameter.full_tensor(), expected[key.removeprefix("model.")])
    tied = model.model.get_input_embeddings().weight is model.model.get_output_embeddings().weight
    assert tied == ARCHITECTURES[name].get("tie_word_embeddings", False)
    for key, buffer in model.named_buffers():
        torch.testing.assert_close(buffer, reference.get_buffer(key.removeprefix("model.")), rtol=1e-6, atol=0)
    (logps, gradients), (expected, expected_gradients) = packed_results(model), plain_results(reference)
    assert_near(logps, expected)
    assert_near(gradients, expected_gradients)


@pytest.mark.parametrize("name", ["llama-tied", "gpt2"])
def test_activation_checkpointing_changes_nothing(name, group, tmp_path, monkeypatch):
    make_reference(name).save_pretrained(tmp_path)
    calls, original = [], model_module.packed_attention
    attention = lambda *args, **kwargs: calls.append(1) or original(*args, **kwargs)  # noqa: E731
    monkeypatch.setitem(model_module.AttentionInterface._global_mapping, "packed", attention)
    results, counts = [], []
    for on in (False, True):
        model = load_model(str(tmp_path), "cpu", torch.float32, activation_checkpointing=on)
        calls.clear()
        results.append(packed_results(model))
        counts.append(len(calls))
    assert counts == [2, 4]  # two layers; the backward runs them once more
    for plain, checkpointed in zip(*results):
        assert_near(checkpointed, plain, 1e-6)


@pytest.mark.parametrize("fault", ["missing", "shape", "untied", "layer"])
def test_wrong_weights_are_an_error(fault, group, tmp_path):
    make_model("llama-tied" if fault == "untied" else "llama").save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    key = "model.layers.1.mlp.up_proj.weight"
    if fault == "missing":
        del state[key]
    elif fault == "shape":
        state[key] = torch.zeros(40, 32)
    elif fault == "untied":  # transformers unties such a model: tying it would train another one
        state["lm_head.weight"] = torch.randn(320, 32)
    else:  # more layers than the config says
        state |= {name.replace("layers.1", "layers.2"): state[name].clone() for name in state if "layers.1" in name}
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError):
        load_model(str(tmp_path), "cpu", torch.float32)


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_models_that_packing_gets_wrong_are_refused(kind, dtype, group, tmp_path):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **REFUSED[kind]), dtype=torch.float32)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    model.save_pretrained(tmp_path)
    with pytest.raises(InputError):
        load_model(str(tmp_path), "cpu", dtype)


# ---- Export ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "llama-tied", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_export(name, dtype, group, tmp_path):
    source, folder, tokenizer = tmp_path / "source", tmp_path / "run" / "final", make_tokenizer()
    dropout = "resid_pdrop" if name == "gpt2" else "attention_dropout"
    make_reference(name, **{dropout: 0.1}).save_pretrained(source)
    (source / "generation_config.json").write_text(json.dumps({"eos_token_id": 1, "temperature": 0.6}))
    model = load_model(str(source), "cpu", torch.float32)
    packed_results(model)
    torch.optim.SGD(model.parameters(), lr=10.0).step()
    export(model, str(source), tokenizer, folder, dtype)

    files = {path.name for path in folder.iterdir()}
    assert list(folder.parent.iterdir()) == [folder] and not any(name.endswith((".bin", ".pt", ".pth")) for name in files)
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= files
    state = load_file(folder / "model.safetensors")
    assert {value.dtype for value in state.values()} == {dtype}
    assert state.keys() == load_file(source / "model.safetensors").keys()  # tied weights once
    for key, parameter in model.named_parameters():
        if (key := key.removeprefix("model.")) in state:
            assert torch.equal(state[key], parameter.full_tensor().to(dtype))
    before, after = (json.loads((path / "config.json").read_text()) for path in (source, folder))
    assert after == before | {"dtype": str(dtype).removeprefix("torch.")} and after[dropout] == 0.1

    exported = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert exported.config._attn_implementation == "sdpa"
    with torch.no_grad():
        expected = torch.cat(plain_logps(exported, PAIRS))
        assert (expected - torch.cat(plain_logps(AutoModelForCausalLM.from_pretrained(source), PAIRS))).abs().max() > 0.01
        assert_near(model(pack(PAIRS)), expected, TOLERANCE if dtype == torch.float32 else 0.05)
        ids = torch.tensor(PAIRS[1][0] + PAIRS[1][1])
        start, stop = len(PAIRS[1][0]) - 1, len(ids) - 1
        assert_near(
            model.plain_logps(ids)[start:stop], expected[6 : 6 + stop - start], TOLERANCE if dtype == torch.float32 else 0.05
        )
    reloaded = AutoTokenizer.from_pretrained(folder)
    assert reloaded.chat_template == CHATML and reloaded.special_tokens_map == tokenizer.special_tokens_map
    assert reloaded("<|im_start|>user\nhello<|im_end|>").input_ids == tokenizer("<|im_start|>user\nhello<|im_end|>").input_ids
    generation = GenerationConfig.from_pretrained(folder)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert generation.eos_token_id == [1, end] and generation.temperature == 0.6


GENERATION = [
    {},
    {"top_k": 20},
    {"min_p": 0.1},
    {"do_sample": False, "temperature": 0.6},
    {"do_sample": True, "temperature": 0.6},
]


@pytest.mark.parametrize("generation", GENERATION)
def test_export_accepts_published_generation_configs(generation, group, tmp_path):
    make_model("llama").save_pretrained(tmp_path / "source")
    model = load_model(str(tmp_path / "source"), "cpu", torch.float32)
    (tmp_path / "source" / "generation_config.json").write_text(json.dumps(generation))
    export(model, str(tmp_path / "source"), make_tokenizer(), tmp_path / "final", torch.float32)
    saved = json.loads((tmp_path / "final" / "generation_config.json").read_text())
    assert saved["eos_token_id"] in (3, [3])
    assert saved.get("do_sample") == generation.get("do_sample") or "do_sample" not in generation


def test_an_interrupted_export_leaves_no_folder(model_folder, group, tmp_path, monkeypatch):
    model, tokenizer = load_model(str(model_folder), "cpu", torch.float32), make_tokenizer()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(type(tokenizer), "save_pretrained", lambda *args, **kwargs: (_ for _ in ()).throw(KeyboardInterrupt))
        export(model, str(model_folder), tokenizer, tmp_path / "final", torch.float32)
    assert not (tmp_path / "final").exists()
    export(model, str(model_folder), tokenizer, tmp_path / "final", torch.float32)  # what was left is no obstacle
    assert [path.name for path in tmp_path.iterdir()] == ["final"]


# ---- Two ranks, and memory, in new processes --------------------------------------------------------------------------


def measure_memory() -> float:
    """MiB that the peak memory grows by in forward and backward of token_logps whose full logits would take 1 GiB."""
    hidden, weight = torch.randn(4096, 64, requires_grad=True), torch.randn(65536, 64, requires_grad=True)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    token_logps(hidden, weight, None, torch.arange(4096)).sum().backward()
    assert hidden.grad.abs().sum() > 0 and weight.grad.abs().sum() > 0
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def work(rank: int, folder) -> None:
    """What each of two ranks does with the model in folder / source."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    results = {"MiB": measure_memory() if rank == 0 else None}
    if rank == 1:
        model_module.read_weights = None  # only rank 0 may read
    source = str(folder / "source")
    with pytest.raises(InputError, match="replicas"):
        load_model(source, "cpu", torch.float32, 3)
    for replicas in (1, 2):
        model = load_model(source, "cpu", torch.float32, replicas)
        local = [parameter.to_local().shape for parameter in model.parameters()]
        results[replicas] = (*packed_results(model, PAIRS[rank::2], scale=2 / len(PAIRS)), dict(model.named_buffers()), local)
    export(model, source, make_tokenizer(), folder / "final", torch.float32)
    assert (folder / "final" / "model.safetensors").is_file()  # on every rank, once export returns
    torch.save(results, folder / f"rank{rank}")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """(the plain model, its folder, what `work` found on rank 0 and 1). 321 words: not the same number on both ranks."""
    folder, reference = tmp_path_factory.mktemp("two_ranks"), make_reference("gemma3_text", vocab_size=321)
    reference.save_pretrained(folder / "source")
    torch.multiprocessing.spawn(work, (folder,), nprocs=2)
    return reference, folder, [torch.load(folder / f"rank{rank}", weights_only=False) for rank in (0, 1)]


@pytest.mark.parametrize("replicas", [1, 2])
def test_two_ranks_equal_one(replicas, two_ranks):
    reference, _, results = two_ranks
    logps, gradients = plain_results(reference)
    for rank, (mine, my_gradients, buffers, local) in enumerate(result[replicas] for result in results):
        assert_near(mine, torch.cat(plain_logps(reference, PAIRS[rank::2])).detach())
        assert_near(my_gradients, gradients)
        assert {key.removeprefix("model.") for key in buffers} == dict(reference.named_buffers()).keys() != set()
        for key, buffer in buffers.items():
            assert torch.equal(buffer, reference.get_buffer(key.removeprefix("model.")))
        rows = [shape[0] for shape in local]
        full = [parameter.shape[0] for parameter in reference.parameters()]
        assert rows == (full if replicas == 2 else [n - n // 2 if rank == 0 else n // 2 for n in full])


def test_two_ranks_export(two_ranks):
    reference, folder, _ = two_ranks
    exported = AutoModelForCausalLM.from_pretrained(folder / "final")
    assert all(torch.equal(value, exported.state_dict()[key]) for key, value in reference.state_dict().items())


def test_memory_stays_far_below_the_full_logits(two_ranks):
    assert two_ranks[2][0]["MiB"] < 500
