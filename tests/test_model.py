"""The packed, sharded model against plain transformers forwards of an independent model with the
same weights."""

import copy
import functools
import json
import re
import shutil
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from conftest import ARCHITECTURES, CHATML, GQA, TINY, make_model, make_tokenizer, start_two
from datasets import Dataset
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
)

import model as model_module
from data import DataSet, pack
from loss import simper_loss
from model import PackedModel, TokenLogps, build_model, compile_blocks, export, load_model
from runtime import checks, weights
from runtime.checks import check_forward, choose_forward, masked_attention
from runtime.errors import InputError

CPU = torch.device("cpu")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """On models this small, threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make_pairs(*lengths: tuple[int, int, int]) -> list[tuple[list[int], ...]]:
    """Pairs of random tokens with these numbers of tokens in prompt, chosen and rejected."""
    generator = torch.Generator().manual_seed(0)
    return [
        tuple(torch.randint(320, (n,), generator=generator).tolist() for n in pair)
        for pair in lengths
    ]


PAIRS = make_pairs(
    (3, 4, 2), (9, 5, 12), (1, 8, 3), (7, 1, 15)
)  # some longer than the sliding window of 6


def make_reference(name: str, **changes):
    """A plain transformers model; biases and norm weights are random too, so that leaving one out
    is noticed."""
    model = make_model(name, **changes)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def make_other(kind: str, options: dict):
    """A plain model that is not one of ARCHITECTURES, with all parameters random."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(kind, **options), dtype=torch.float32
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(mean=float(parameter.ndim == 1), std=0.15)
    return model.eval()


def make_data(*rows: list[list[int]]) -> DataSet:
    """A data set of rows of token ids, each of a prompt and its responses."""
    columns = {"prompt": [p for p, *_ in rows], "responses": [r for _, *r in rows]}
    columns |= {"lengths": [[*map(len, row)] for row in rows], "columns": [[] for _ in rows]}
    return DataSet(Dataset.from_dict(columns))


def refused_for(model: PackedModel, data: DataSet, heldout=None) -> set[str]:
    """The names of the figures for which check_forward refuses a model, by its message."""
    with pytest.raises(InputError, match="cannot be trained packed") as error:
        check_forward(model, data, heldout)
    figures = re.findall(r"(\w+) (\S+) \((\S+)\)", str(error.value))
    return {name for name, found, accepted in figures if not float(found) <= float(accepted)}


def make_packed(reference) -> PackedModel:
    """The packed model with the same weights, not sharded."""
    model = build_model(reference.config)
    model.model.load_state_dict(reference.state_dict())
    return model.train()


def plain_logps(model, pairs) -> list[torch.Tensor]:
    """Log-probs of every response's tokens, chosen and rejected, pair after pair: one plain forward
    for each response."""
    logps = []
    for prompt, *responses in pairs:
        for response in responses:
            ids = torch.tensor(prompt + response)
            logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1]
            logps.append(logits.log_softmax(dim=-1).gather(1, ids[1:, None])[len(prompt) - 1 :, 0])
    return logps


def plain_results(model) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """(log-probs of PAIRS, gradients of their mean loss by name) by nothing of this repository."""
    logps = plain_logps(model, PAIRS)
    inverse_perplexities = [response.mean().exp() for response in logps]
    (sum(inverse_perplexities[1::2]) - sum(inverse_perplexities[::2])).div(len(PAIRS)).backward()
    return torch.cat(logps).detach(), {
        name: parameter.grad for name, parameter in model.named_parameters()
    }


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of all ranks together, where it is sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def packed_results(
    model: PackedModel, pairs=PAIRS, scale=0.25
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The same by the packed model: of other pairs, with `scale` in place of 1 / 4."""
    logps, lengths = model(pack(pairs)), pack(pairs).lengths
    (simper_loss(logps, lengths).sum() * scale).backward()
    return logps.detach(), {
        name.removeprefix("model."): whole(p.grad) for name, p in model.optimized().items()
    }


def assert_near(actual, expected, tolerance: float = 1e-5) -> None:
    """float32 tensors, or dictionaries of them, differ by at most `tolerance` of their largest
    value (gradients that are
    zero but for rounding: of 1 % of the largest of all)."""
    if isinstance(expected, torch.Tensor):
        actual, expected = {"": actual}, {"": expected}
    assert actual.keys() == expected.keys()
    floor = 0.01 * max(value.abs().max().item() for value in expected.values())
    assert floor > 0
    for name, value in expected.items():
        assert actual[name].shape == value.shape and actual[name].dtype == torch.float32
        difference = (actual[name] - value).abs().max().item()
        assert difference <= tolerance * max(value.abs().max().item(), floor), (
            f"{name}: {difference}"
        )


# ---- The packed forward --------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*ARCHITECTURES, "phi"])  # phi's head has a bias
def test_packed_equals_plain(name, monkeypatch):
    monkeypatch.setattr(
        model_module, "LOGITS_BYTES", 4 * 320 * 7
    )  # 7 of the 50 response tokens at a time
    reference = make_reference(name) if name in ARCHITECTURES else make_other(name, TINY)
    for actual, expected in zip(packed_results(make_packed(reference)), plain_results(reference)):
        assert_near(actual, expected)


@pytest.mark.parametrize("name", ["llama", "mistral-sliding-window", "gpt2"])
@torch.no_grad()
def test_pairs_and_responses_do_not_see_each_other(name):
    model = make_packed(make_reference(name))
    logps = model(pack(PAIRS))
    assert_near(logps, torch.cat([model(pack([pair])) for pair in PAIRS]))
    prompt, chosen, rejected = PAIRS[
        1
    ]  # after 6 response tokens: 6 to 10 are its chosen ones, 11 to 22 its rejected ones
    with_pair = lambda *pair: model(pack([PAIRS[0], pair, *PAIRS[2:]]))  # noqa: E731
    changed = with_pair(prompt, [(token + 1) % 320 for token in chosen], rejected)
    assert (changed[6:11] != logps[6:11]).all()
    assert_near(torch.cat([changed[:6], changed[11:]]), torch.cat([logps[:6], logps[11:]]), 1e-6)
    changed = with_pair(prompt, chosen[:2], [*rejected[:-1], 7])  # nor do tokens see later ones
    assert_near(changed[6:8], logps[6:8], 1e-6)
    assert_near(changed[8:19], logps[11:22], 1e-6)


def plain_varlen_attn(q, k, v, q_starts, k_starts, max_q, max_k, window_size, scale, enable_gqa):
    """What torch documents of varlen_attn with FlashAttention, in plain torch: every sequence of
    queries attends to its sequence of keys; the last query is level with the last key."""
    assert enable_gqa == (q.shape[1] != k.shape[1])
    outputs = []
    for n in range(len(q_starts) - 1):
        queries, keys, values = (
            x[starts[n] : starts[n + 1]].transpose(0, 1)
            for x, starts in ((q, q_starts), (k, k_starts), (v, k_starts))
        )
        assert queries.shape[1] <= max_q and keys.shape[1] <= max_k
        keys, values = (x.repeat_interleave(q.shape[1] // k.shape[1], 0) for x in (keys, values))
        row = torch.arange(queries.shape[1])[:, None] + keys.shape[1] - queries.shape[1]
        column = torch.arange(keys.shape[1])
        left, right = window_size
        visible = column <= row + right
        visible &= (column >= row - left) if left >= 0 else True
        scores = (queries @ keys.mT * (scale or q.shape[-1] ** -0.5)).masked_fill(
            ~visible, -torch.inf
        )
        outputs.append((scores.softmax(-1) @ values).transpose(0, 1))
    return torch.cat(outputs)


@pytest.mark.parametrize("window", [None, 1, 6, 100])
@pytest.mark.parametrize("heads", [(4, 4), (6, 2)])
def test_one_kernel_call_is_the_packed_attention(heads, window, monkeypatch):
    """The layout for GPUs, in float64: against the loop over pairs and against one dense mask."""
    monkeypatch.setattr(model_module, "varlen_attn", plain_varlen_attn)
    batch, (many, few) = pack(PAIRS), heads
    torch.manual_seed(0)
    shapes = [(1, n, len(batch.input_ids), 8) for n in (many, few, few)]
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    direction = torch.randn(1, len(batch.input_ids), many, 8, dtype=torch.float64)
    options = {"scale": 0.3, "enable_gqa": many != few}
    results = [
        model_module.varlen_attention(*inputs, window, batch, options),
        model_module.packed_attention(None, *inputs, None, 0.3, window, batch)[0],
        masked_attention(None, *inputs, None, 0.3, window, batch)[0],
    ]
    results = [(out, *torch.autograd.grad(out, inputs, direction)) for out in results]
    for ours, exact in zip(results[0] + results[1], results[2] + results[2]):
        assert ours.shape == exact.shape and (ours - exact).abs().max() < 1e-13


def top_left(module, query, key, value, mask, scaling, window, micro_batch, **_):
    """Attention whose rejected responses are aligned with the prompt's first tokens."""
    shifted = copy.copy(micro_batch)
    start = sum(micro_batch.segments[0][:2])
    shifted.position_ids = micro_batch.position_ids.clone()
    shifted.position_ids[start : sum(micro_batch.segments[0])] -= micro_batch.segments[0][0]
    return masked_attention(module, query, key, value, mask, scaling, window, shifted)


def no_window(module, query, key, value, mask, scaling, window, micro_batch, **_):
    return masked_attention(module, query, key, value, mask, scaling, None, micro_batch)


def sees_the_chosen_response(module, query, key, value, mask, scaling, window, micro_batch, **_):
    joined = copy.copy(micro_batch)
    joined.segments = [(p + c, r, 0) for p, c, r in micro_batch.segments]
    return masked_attention(module, query, key, value, mask, scaling, window, joined)


def attention_error(dtype: torch.dtype) -> float:
    """Of PAIRS with random queries, keys and values, and a window."""
    torch.manual_seed(0)
    batch = pack(PAIRS)
    shapes = [(1, n, len(batch.input_ids), 8) for n in (4, 2, 2)]
    inputs = [torch.randn(shape).to(dtype) for shape in shapes]
    return checks.attention_error(*inputs, None, 5, batch).item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("wrong", [top_left, no_window, sees_the_chosen_response])
def test_wrong_attention_is_refused(wrong, dtype, group, model_folder, monkeypatch):
    model, data = load_model(str(model_folder), CPU, dtype), make_data(*PAIRS)
    check_forward(model, data, None)
    assert attention_error(dtype) < (1e-5 if dtype == torch.float32 else 0.03)
    monkeypatch.setattr(checks, "packed_attention", wrong)
    assert attention_error(dtype) > 0.3
    assert refused_for(model, data) == {"attention"}
    with pytest.raises(InputError, match="cannot be trained packed"):
        choose_forward(model, data, None)  # an edited attention is not passed by


# What a forward does depends on how long the sequence is, here from 20 or 32 tokens on.
LENGTH_DEPENDENT = {
    "phi3": TINY
    | {
        "original_max_position_embeddings": 32,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 1e4,
            "short_factor": [1.0] * 4,
            "long_factor": [4.0] * 4,
        },
    },
    "llama": TINY
    | {
        "max_position_embeddings": 32,
        "rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4},
    },
    "qwen2_moe": TINY
    | {
        "use_sliding_window": True,
        "sliding_window": 20,
        "max_window_layers": 2,
        "num_experts": 4,
        "num_experts_per_tok": 2,
    }
    | {
        "num_key_value_heads": 2,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
    },
}


SIZES = (3, 4, 5), (40, 4, 30)  # the longest sequence has 8 tokens, or 70


@pytest.mark.parametrize("kind", LENGTH_DEPENDENT)
def test_length_dependent_models_are_refused(kind, group, tmp_path):
    make_other(kind, LENGTH_DEPENDENT[kind]).save_pretrained(tmp_path)
    model, (short, long) = load_model(str(tmp_path), CPU, torch.float32), make_pairs(*SIZES)
    check_forward(model, make_data(short), None)
    for data, heldout in ((make_data(long), None), (make_data(short), make_data(long))):
        assert refused_for(model, data, heldout) == {"relative", "absolute"}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [1, 3, 20, 100])
def test_token_logps_in_chunks(bias, rows, monkeypatch):
    monkeypatch.setattr(
        model_module, "LOGITS_BYTES", 4 * 50 * rows + 3
    )  # `rows` of the 20 tokens at a time
    generator = torch.Generator().manual_seed(0)
    shapes = [(20, 8), (50, 8), (50,)] if bias else [(20, 8), (50, 8)]
    inputs = [
        torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)
        for shape in shapes
    ]
    targets, weights = (
        torch.randint(50, (20,), generator=generator),
        torch.randn(20, generator=generator),
    )
    expected = F.linear(*inputs).log_softmax(dim=1)[torch.arange(20), targets]
    expected_gradients = torch.autograd.grad(expected @ weights.double(), inputs)
    for dtype, tolerance in [(torch.float64, 1e-13), (torch.float32, 1e-5), (torch.bfloat16, 0.05)]:
        cast = [tensor.detach().to(dtype).requires_grad_() for tensor in inputs]
        logps = TokenLogps.apply(cast[0], cast[1], cast[2] if bias else None, targets)
        assert logps.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        torch.testing.assert_close(logps.double(), expected, rtol=tolerance, atol=tolerance)
        for _ in range(2):  # the second backward has no chunk left over from the forward
            gradients = torch.autograd.grad(
                logps @ weights.to(logps.dtype), cast, retain_graph=True
            )
            for actual, gradient in zip(gradients, expected_gradients):
                assert (actual - gradient).abs().max() <= tolerance * gradient.abs().max()
    assert (
        logps != logps.bfloat16().float()
    ).sum() > 15  # those of bfloat16 inputs are not rounded to bfloat16


@pytest.mark.parametrize(
    "scale, cap", [(0.5, None), (3.0, None), (1.0, 2.0), (0.7, 0.5), (1, 300.0)]
)
@pytest.mark.parametrize("rows", [3, 20])
def test_logits_that_are_scaled_and_capped(scale, cap, rows, monkeypatch):
    monkeypatch.setattr(model_module, "LOGITS_BYTES", 4 * 50 * rows)
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(n, 8, generator=generator, dtype=torch.float64) for n in (20, 50)]
    inputs = [x.requires_grad_() for x in inputs]
    targets = torch.randint(50, (20,), generator=generator)
    logits = scale * (inputs[0] @ inputs[1].T)
    logits = logits if cap is None else cap * torch.tanh(logits / cap)
    expected = logits.log_softmax(dim=1)[torch.arange(20), targets]
    gradients = torch.autograd.grad(expected.sum(), inputs)
    for dtype, tolerance in ((torch.float64, 1e-13), (torch.float32, 1e-5)):
        cast = [tensor.detach().to(dtype).requires_grad_() for tensor in inputs]
        logps = TokenLogps.apply(*cast, None, targets, scale, cap)
        torch.testing.assert_close(logps.double(), expected, rtol=tolerance, atol=tolerance)
        for found, exact in zip(torch.autograd.grad(logps.sum(), cast), gradients):
            assert (found - exact).abs().max() <= tolerance * exact.abs().max()


@pytest.mark.parametrize("rows", [3, 20])
def test_large_logits_do_not_overflow(rows, monkeypatch):
    """Of 800 and more: e^800 is beyond float64. In several chunks and in one."""
    monkeypatch.setattr(model_module, "LOGITS_BYTES", 4 * 50 * rows)
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 8, generator=generator, dtype=torch.float64) for n in (20, 50))
    targets = torch.randint(50, (20,), generator=generator)
    inputs = [(100 * hidden).requires_grad_(), weight.requires_grad_()]
    expected = F.linear(*inputs).log_softmax(dim=1)[torch.arange(20), targets]
    assert F.linear(*inputs).max() > 800
    gradients = torch.autograd.grad(expected.sum(), inputs)
    for dtype, tolerance in ((torch.float64, 1e-11), (torch.float32, 1e-4)):
        cast = [tensor.detach().to(dtype).requires_grad_() for tensor in inputs]
        logps = TokenLogps.apply(*cast, None, targets)
        torch.testing.assert_close(logps.double(), expected, rtol=tolerance, atol=tolerance)
        for found, exact in zip(torch.autograd.grad(logps.sum(), cast), gradients):
            assert (found - exact).abs().max() <= 10 * tolerance * exact.abs().max()


def test_the_heads_bfloat16_gradient_is_not_rounded_with_every_chunk(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 16, generator=generator).bfloat16() for n in (640, 50))
    targets = torch.randint(50, (640,), generator=generator)
    exact = weight.double().requires_grad_()
    F.linear(hidden.double(), exact).log_softmax(dim=1)[torch.arange(640), targets].sum().backward()
    for rows in (640, 20):  # in one chunk, and in 32
        monkeypatch.setattr(model_module, "LOGITS_BYTES", 4 * 50 * rows)
        leaf = weight.clone().requires_grad_()
        TokenLogps.apply(hidden, leaf, None, targets).sum().backward()
        # bfloat16 has 8 bits: a result that is rounded once, as its factors are, is off by 0.2 %.
        assert leaf.grad.dtype == torch.bfloat16
        assert (leaf.grad - exact.grad).norm() < 0.004 * exact.grad.norm()


MIXTRAL = TINY | {"num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}


@pytest.mark.parametrize(
    "name, options",
    [
        ("gpt2", ("attn_pdrop", "embd_pdrop", "resid_pdrop")),
        ("llama", ("attention_dropout",)),
        ("mixtral", ("router_jitter_noise",)),
    ],
)
@torch.no_grad()
def test_no_dropout_and_no_jitter_in_training(name, options):
    changes = dict.fromkeys(options, 0.1)
    if name == "mixtral":
        reference = make_other(name, MIXTRAL | changes).train()
    else:
        reference = make_model(name, **changes).train()
    ids = torch.tensor([PAIRS[1][0]])
    # As they are, two forwards differ.
    assert not torch.equal(reference(ids).logits, reference(ids).logits)
    model = make_packed(reference)
    assert model.training and torch.equal(model(pack(PAIRS)), model(pack(PAIRS)))
    # The caller's config is as it was.
    assert all(getattr(reference.config, option) == 0.1 for option in options)


# ---- Loading -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "name", ["llama", "llama-tied", "mistral-sliding-window", "gemma3_text", "gpt2"]
)
def test_load_model(name, dtype, group, tmp_path):
    make_reference(name).to(dtype).save_pretrained(tmp_path)
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    model = load_model(str(tmp_path), CPU, torch.float32)
    assert model.training
    expected = {f"model.{key}": parameter for key, parameter in reference.named_parameters()}
    assert dict(model.named_parameters()).keys() == expected.keys()
    for key, parameter in model.named_parameters():
        assert parameter.dtype == torch.float32 and parameter.requires_grad
        assert torch.equal(parameter, expected[key])
    tied = model.model.get_input_embeddings().weight is model.model.get_output_embeddings().weight
    assert tied == ARCHITECTURES[name].get("tie_word_embeddings", False)
    for key, buffer in model.named_buffers():
        torch.testing.assert_close(
            buffer, reference.get_buffer(key.removeprefix("model.")), rtol=1e-6, atol=0
        )
    for actual, expected in zip(packed_results(model), plain_results(reference)):
        assert_near(actual, expected)


@pytest.mark.parametrize("masters", [True, False])
def test_a_single_process_computes_in_bfloat16_on_float32_weights(
    masters, group, tmp_path, monkeypatch
):
    monkeypatch.setattr("model.masters_fit", lambda model, device: masters)
    reference = make_reference("llama-tied")
    reference.save_pretrained(tmp_path)
    model = load_model(str(tmp_path), CPU, torch.bfloat16)
    (logps, gradients), (expected, expected_gradients) = (
        packed_results(model),
        plain_results(reference),
    )
    assert 1e-4 < (logps - expected).abs().max() < 0.05  # rounded, but not much
    assert_near(gradients, expected_gradients, 0.1)
    assert (model.masters is None) != masters
    for parameter in model.optimized().values():
        assert isinstance(parameter, DTensor) != masters and parameter.dtype == torch.float32


@pytest.mark.parametrize("name", ["llama-tied", "gpt2"])
def test_activation_checkpointing_changes_nothing(name, group, tmp_path, monkeypatch):
    make_reference(name).save_pretrained(tmp_path)
    results, counts, calls, attention = [], [], [], model_module.packed_attention
    count = lambda *args, **kwargs: calls.append(1) or attention(*args, **kwargs)  # noqa: E731
    monkeypatch.setitem(AttentionInterface._global_mapping, "packed", count)
    products = []
    for how in ("false", "true", "selective"):
        model = load_model(str(tmp_path), CPU, torch.float32, activation_checkpointing=how)
        calls.clear()
        with FlopCounterMode(display=False) as counter:
            results.append(packed_results(model))
        counts.append(len(calls))
        products.append(counter.get_total_flops())
    assert counts == [2, 4, 4]  # two layers; the backward runs them once more
    assert products[0] == products[2] < products[1]  # products are not made again
    for other in results[1:]:
        for name, value in results[0][1].items():
            assert torch.equal(other[1][name], value), name


@pytest.mark.parametrize("checkpointing", ["false", "true"])
def test_compiled_blocks_are_compiled_once(checkpointing, group, tmp_path, monkeypatch):
    """Micro-batches of other numbers of pairs and tokens have the same log-probs as without
    --compile, by the same graphs."""
    make_reference("llama").save_pretrained(tmp_path)
    plain = load_model(str(tmp_path), CPU, torch.float32)
    eager = functools.partialmethod(
        torch.nn.Module.compile, backend="eager"
    )  # graphs are found, but not made into code
    monkeypatch.setattr(torch.nn.Module, "compile", eager)
    compiled = load_model(str(tmp_path), CPU, torch.float32, activation_checkpointing=checkpointing)
    compile_blocks(compiled)
    torch._dynamo.reset()
    graphs = torch._dynamo.utils.counters["stats"]
    graphs.clear()
    generator, found = torch.Generator().manual_seed(0), []
    for count in (3, 1, 2, 4, 2, 5, 1):
        shapes = torch.randint(2, 30, (count, 3), generator=generator).tolist()
        batch = pack(
            [
                tuple(torch.randint(320, (n,), generator=generator).tolist() for n in shape)
                for shape in shapes
            ]
        )
        for model in (plain, compiled):
            model(batch).sum().backward()
        for expected, actual in zip(plain.parameters(), compiled.parameters()):
            assert_near(actual.grad, expected.grad, 1e-6)
        plain.zero_grad(), compiled.zero_grad()
        with torch.no_grad():  # as evaluate
            assert_near(compiled(batch), plain(batch), 1e-6)
            plain.free_gathered(), compiled.free_gathered()
        found.append(graphs["unique_graphs"])
    assert found[0] > 0 and found == found[:1] * len(found)


def test_replicas_that_do_not_divide_the_ranks_are_an_error(group, model_folder, monkeypatch):
    monkeypatch.setattr(model_module, "read_weights", None)  # found before the weights are read
    with pytest.raises(InputError, match="replicas=2 does not divide the number of ranks, 1"):
        load_model(str(model_folder), CPU, torch.float32, replicas=2)


@pytest.mark.parametrize("fault", ["missing", "shape", "untied"])
def test_wrong_weights_are_an_error(fault, group, tmp_path):
    make_model("llama-tied" if fault == "untied" else "llama").save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    if fault == "missing":
        del state["model.layers.1.mlp.up_proj.weight"]
    elif fault == "shape":
        state["model.layers.1.mlp.up_proj.weight"] = torch.zeros(40, 32)
    else:  # the config ties the head, the file holds another one
        state["lm_head.weight"] = torch.randn(320, 32)
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError):
        load_model(str(tmp_path), CPU, torch.float32)


def test_weights_of_the_same_name_are_converted_anew(group, tmp_path):
    for seed in (0, 1):
        reference = make_model("gpt2", seed=seed)
        reference.save_pretrained(tmp_path)
        state = load_file(tmp_path / "model.safetensors")
        state = {key.removeprefix("transformer."): value for key, value in state.items()}
        save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
        model = load_model(str(tmp_path), CPU, torch.float32)
        for key, parameter in reference.named_parameters():
            assert torch.equal(model.model.get_parameter(key), parameter)


@pytest.mark.parametrize("place", [0, 1, 2])  # prompt, chosen, rejected
def test_every_token_needs_an_embedding(model_folder, place):
    name, tokenizer = str(model_folder), make_tokenizer()

    def made_of(token: int, max_length: int = 256):
        row = [[1], [2], [3]]
        row[place] = [token]
        data, other = make_data([[1], [2], [3]]), make_data(row)
        for training, heldout in ((data, other), (other, data), (other, None)):
            config = SimpleNamespace(max_length=max_length)
            checks.digests(config, name, tokenizer, torch.float32, training, heldout)

    made_of(319)
    with pytest.raises(InputError, match="gives token 320, the model has 320"):
        made_of(320)
    with pytest.raises(InputError, match="max_length=257 exceeds the model's 256 positions"):
        made_of(319, 257)


MOE = TINY | {"num_key_value_heads": 2, "num_experts": 4, "num_experts_per_tok": 2}
MOE |= {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}


@pytest.mark.parametrize("kind", ["prefix", "bin", "experts", "head twice"])
def test_files_that_name_their_tensors_otherwise(kind, group, tmp_path):
    """They are converted once, and exported with the names that they had (a prefix apart)."""
    name = {"prefix": "gpt2", "bin": "llama", "head twice": "llama-tied"}.get(kind)
    reference = make_reference(name) if name else make_other("qwen2_moe", MOE)
    reference.save_pretrained(tmp_path / "source")
    make_tokenizer().save_pretrained(tmp_path / "source")
    file = tmp_path / "source" / "model.safetensors"
    state = load_file(file)
    if kind == "prefix":  # as the hub's GPT-2
        state = {key.removeprefix("transformer."): value for key, value in state.items()}
    elif kind == "bin":
        torch.save(state, tmp_path / "source" / "pytorch_model.bin")
        file.unlink()
    elif kind == "experts":
        assert any("experts.3.up_proj" in key for key in state)
    else:
        state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    if kind in ("prefix", "head twice"):
        save_file(state, file, metadata={"format": "pt"})
    for _ in range(2):  # the second time, what was converted is there
        model = load_model(str(tmp_path / "source"), CPU, torch.float32)
        for key, parameter in reference.named_parameters():
            assert torch.equal(model.model.get_parameter(key), parameter)
    source = str(tmp_path / "source")
    export(model, source, make_tokenizer(), tmp_path / "final")
    exported = load_file(tmp_path / "final" / "model.safetensors")
    prefix = "transformer." if kind == "prefix" else ""
    expected = {
        prefix + key: value
        for key, value in state.items()
        if (kind, key) != ("head twice", "lm_head.weight")
    }
    assert exported.keys() == expected.keys()
    assert all(torch.equal(exported[key], value) for key, value in expected.items())
    AutoModelForCausalLM.from_pretrained(tmp_path / "final")


def test_a_large_export_is_split_into_files(group, model_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "FILE_BYTES", 50_000)
    model = load_model(str(model_folder), CPU, torch.float32)
    export(model, str(model_folder), make_tokenizer(), tmp_path / "final")
    files = sorted(path.name for path in (tmp_path / "final").glob("*.safetensors"))
    index = json.loads((tmp_path / "final" / "model.safetensors.index.json").read_text())
    assert len(files) > 2 and set(index["weight_map"].values()) == set(files)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "final", dtype=torch.float32)
    for key, parameter in model.model.named_parameters():
        assert torch.equal(again.get_parameter(key), parameter)


DEEPSEEK = TINY | {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,  # half the width of its queries and keys
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}


def test_deepseek_trains_packed_and_keeps_its_float32_biases(group, tmp_path):
    """Values of another width than keys, and a buffer that decides which experts are chosen."""
    reference = make_other("deepseek_v3", DEEPSEEK)
    biases = {k: b for k, b in reference.named_buffers() if "e_score_correction_bias" in k}
    for bias in biases.values():
        bias.copy_(5 + torch.arange(4) / 1024)  # equal in bfloat16
    reference.save_pretrained(tmp_path / "source")
    model = load_model(str(tmp_path / "source"), CPU, torch.float32)
    for actual, expected in zip(packed_results(model), plain_results(reference)):
        assert_near(actual, expected)
    model.dtype = torch.bfloat16
    export(model, str(tmp_path / "source"), make_tokenizer(), tmp_path / "final")
    exported = load_file(tmp_path / "final" / "model.safetensors")
    assert biases and all(torch.equal(exported[k], bias) for k, bias in biases.items())
    assert exported["model.norm.weight"].dtype == torch.bfloat16


WRONG = {  # models that packing gets wrong, and why
    "mamba": {
        "vocab_size": 320,
        "hidden_size": 32,
        "state_size": 8,
        "num_hidden_layers": 2,
    },  # recurrent
    "bloom": {
        "vocab_size": 320,
        "hidden_size": 32,
        "n_layer": 2,
        "n_head": 4,
    },  # position bias instead of position ids
    "gemma2": TINY | GQA,  # soft-caps its attention scores
}
REASONS = dict.fromkeys(("mamba", "bloom"), "do not use transformers' attention interface")
REASONS |= {"gemma2": "softcap"}


@pytest.mark.parametrize(
    "kind, dtype",
    [(kind, torch.float32) for kind in WRONG] + [("bloom", torch.bfloat16)],
)
def test_models_that_packing_gets_wrong_are_refused(kind, dtype, group, tmp_path):
    make_other(kind, WRONG[kind]).save_pretrained(tmp_path)
    model = load_model(str(tmp_path), CPU, dtype)
    with pytest.raises(InputError, match=f"cannot be trained packed.*{REASONS[kind]}"):
        check_forward(model, make_data(*PAIRS), None)


SEPARATE = {  # models that cannot be packed, and whether the head is another than a linear layer
    "gemma2": (TINY | GQA, False),
    "bloom": (WRONG["bloom"], False),
    "mamba": (WRONG["mamba"], False),
    "falcon_h1": (
        TINY
        | {"num_key_value_heads": 2, "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8}
        | {"mamba_d_state": 8, "mamba_chunk_size": 16},
        False,
    ),
    "gpt_oss": (
        TINY
        | {"num_local_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 2}
        | {"head_dim": 8, "sliding_window": 6}
        | {"layer_types": ["sliding_attention", "full_attention"]},
        False,
    ),
    "recurrent_gemma": (TINY, True),
}


@pytest.mark.parametrize("kind", SEPARATE)
def test_what_cannot_be_packed_runs_in_padded_rows(kind, group, tmp_path, capsys):
    values, other_head = SEPARATE[kind]
    reference = make_other(kind, values)
    reference.save_pretrained(tmp_path)
    model, heldout = load_model(str(tmp_path), CPU, torch.float32), make_data(*PAIRS)
    data = make_data(*PAIRS)
    choose_forward(model, data, heldout)
    assert not model.packed and model.own_logits == other_head
    assert data.separate and heldout.separate
    said = capsys.readouterr().out
    assert "Every response is computed with its prompt, in a padded row: 1.7 times the" in said
    assert ("all logits exist at a time" in said) == other_head
    for actual, expected in zip(packed_results(model), plain_results(reference)):
        assert_near(actual, expected)


def test_what_can_be_packed_stays_packed(group, model_folder, capsys):
    model, data = load_model(str(model_folder), CPU, torch.float32), make_data(*PAIRS)
    choose_forward(model, data, None)
    assert model.packed and not data.separate and not capsys.readouterr().out


def test_a_model_that_is_right_in_neither_way_is_refused(group, model_folder, monkeypatch):
    model, data = load_model(str(model_folder), CPU, torch.float32), make_data(*PAIRS)
    noise = lambda module, inputs, out: out + 0.05 * torch.randn_like(out)  # noqa: E731
    model.model.model.norm.register_forward_hook(noise)
    with pytest.raises(InputError, match="cannot be trained packed: .* with padded rows: "):
        choose_forward(model, data, None)
    assert not data.separate


SHAPED = {  # models that scale or cap their logits
    "granite": {"logits_scaling": 1.05},  # divides them after the head
    "minicpm3": {"dim_model_base": 8},  # divides what enters the head by 32 / 8
    "hyperclovax": {"logits_scaling": 0.3},  # multiplies
    "cohere": {"logit_scale": 0.5},
    "cohere2": {"logit_scale": 0.5, "sliding_window": 6},
    "nanochat": {"final_logit_softcapping": 3.0},
    "gemma3_text": GQA | {"final_logit_softcapping": 2.0},
}


@pytest.mark.parametrize("kind", SHAPED)
def test_logits_are_scaled_and_capped_as_the_model_does(kind, group, tmp_path):
    latent = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "v_head_dim": 8}
    latent |= {"qk_rope_head_dim": 4, "num_key_value_heads": 4}
    values = TINY | {"num_key_value_heads": 2} | (latent if kind == "minicpm3" else {})
    reference = make_other(kind, values | SHAPED[kind])
    reference.save_pretrained(tmp_path)
    for dtype in (torch.bfloat16, torch.float32):
        model = load_model(str(tmp_path), CPU, dtype)
        check_forward(model, make_data(*PAIRS), None)
    for actual, expected in zip(packed_results(model), plain_results(reference)):
        assert_near(actual, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["granite", "nanochat"])
def test_a_scale_or_cap_that_is_not_known_is_refused(kind, dtype, group, tmp_path):
    make_other(kind, TINY | {"num_key_value_heads": 2} | SHAPED[kind]).save_pretrained(tmp_path)
    model = load_model(str(tmp_path), CPU, dtype)
    model.logit_scale, model.logit_cap = 1.0, None
    assert refused_for(model, make_data(*PAIRS)) == {"head"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1.0, 1e-4])
def test_a_leak_is_seen_at_any_scale_of_the_log_probs(scale, dtype, group, tmp_path, monkeypatch):
    """Those of small heads are near uniform, and no leak moves them by much."""
    reference = make_reference("llama")
    with torch.no_grad():
        reference.lm_head.weight *= scale
    reference.save_pretrained(tmp_path)
    model, data = load_model(str(tmp_path), CPU, dtype), make_data(*PAIRS)
    check_forward(model, data, None)
    interface = AttentionInterface._global_mapping
    monkeypatch.setitem(interface, "packed", sees_the_chosen_response_alone)
    found = refused_for(model, data)
    assert found >= {"leaking"} and ("absolute" in found) == (scale == 1)


def test_a_small_leak_is_a_leak(group, model_folder, monkeypatch):
    """It moves log-probs by less than a thousandth of what a prompt does."""
    model, data = load_model(str(model_folder), CPU, torch.float32), make_data(*PAIRS)

    def leaks(module, query, key, value, mask, **options):
        right, _ = model_module.packed_attention(module, query, key, value, mask, **options)
        wrong, _ = sees_the_chosen_response_alone(module, query, key, value, mask, **options)
        return right + 3e-4 * (wrong - right), None

    monkeypatch.setitem(AttentionInterface._global_mapping, "packed", leaks)
    assert refused_for(model, data) == {"leaking"}


def test_a_head_with_a_forward_of_its_own_is_not_passed_by(group, tmp_path):
    """Its output is the model's logits; but training would take its weight."""

    class Doubled(torch.nn.Linear):
        def forward(self, hidden):
            return 2 * super().forward(hidden)

    reference = make_reference("llama")
    reference.save_pretrained(tmp_path)
    model, data = load_model(str(tmp_path), CPU, torch.float32), make_data(*PAIRS)
    reference.lm_head.__class__ = model.model.lm_head.__class__ = Doubled
    with pytest.raises(InputError, match="its head, a Doubled, has a forward of its own"):
        check_forward(model, data, None)
    choose_forward(model, data, None)
    assert not model.packed and model.own_logits
    for actual, expected in zip(packed_results(model), plain_results(reference)):
        assert_near(actual, expected)


def sees_the_chosen_response_alone(module, query, key, value, mask, **options):
    options["window"] = options.pop("sliding_window", None)
    return sees_the_chosen_response(module, query, key, value, mask, **options)


@pytest.mark.parametrize("factor, accepted", [(4, True), (8, False)])
def test_the_tolerance_is_five_times_the_models_own(factor, accepted, group, tmp_path, monkeypatch):
    """Of log-probs that differ by as much between two of its own attentions. (They are large, so
    that relative to them the difference is small.)"""
    reference = make_reference("llama")
    with torch.no_grad():
        reference.lm_head.weight *= 100
    reference.save_pretrained(tmp_path)
    model, own, plain = load_model(str(tmp_path), CPU, torch.float32), 0.01, checks.plain_logps
    monkeypatch.setattr(checks, "plain_logps", lambda *args: plain(*args) + factor * own)
    monkeypatch.setattr(checks, "own_difference", lambda *args: own)
    if accepted:
        check_forward(model, make_data(*PAIRS), None)
    else:
        assert refused_for(model, make_data(*PAIRS)) == {"absolute"}


def test_a_model_that_is_too_uniform_to_tell_is_refused(group, tmp_path):
    reference = make_reference("llama")
    with torch.no_grad():
        reference.lm_head.weight.zero_()
    reference.save_pretrained(tmp_path)
    model = load_model(str(tmp_path), CPU, torch.float32)
    assert refused_for(model, make_data(*PAIRS)) >= {"relative", "repeated"}


def test_a_forward_that_is_random_is_refused(group, model_folder):
    model = load_model(str(model_folder), CPU, torch.float32)
    noise = lambda module, inputs, out: out + 0.05 * torch.randn_like(out)  # noqa: E731
    hook = model.model.model.norm.register_forward_hook(noise)
    assert "repeated" in refused_for(model, make_data(*PAIRS))
    hook.remove()
    check_forward(model, make_data(*PAIRS), None)


# ---- Export --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "llama-tied", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_export(name, dtype, group, tmp_path):
    source, folder, tokenizer = tmp_path / "source", tmp_path / "run" / "final", make_tokenizer()
    dropout = "resid_pdrop" if name == "gpt2" else "attention_dropout"
    make_reference(name, **{dropout: 0.1}).save_pretrained(source)
    (source / "generation_config.json").write_text(
        json.dumps({"eos_token_id": 1, "temperature": 0.6})
    )
    model = load_model(str(source), CPU, dtype)
    before, _ = packed_results(model)
    torch.optim.SGD(model.optimized().values(), lr=10.0).step()
    model.refresh()
    export(model, str(source), tokenizer, folder)

    files = {path.name for path in folder.iterdir()}
    assert {path.name for path in folder.parent.iterdir()} == {"final", "final.json"}  # no .part
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= files
    assert not any(file.endswith((".bin", ".pt", ".pth", ".pkl")) for file in files)
    config, expected = (json.loads((path / "config.json").read_text()) for path in (folder, source))
    assert (
        config == expected | {"dtype": str(dtype).removeprefix("torch.")} and config[dropout] == 0.1
    )
    reloaded, text = AutoTokenizer.from_pretrained(folder), "<|im_start|>user\nhello<|im_end|>"
    assert (
        reloaded.chat_template == CHATML
        and reloaded.special_tokens_map == tokenizer.special_tokens_map
    )
    assert reloaded(text).input_ids == tokenizer(text).input_ids
    generation = GenerationConfig.from_pretrained(folder)
    assert (
        generation.eos_token_id == [1, tokenizer.convert_tokens_to_ids("<|im_end|>")]
        and generation.temperature == 0.6
    )

    exported = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tied = exported.get_input_embeddings().weight is exported.get_output_embeddings().weight
    assert tied == (name != "llama") and exported.config._attn_implementation == "sdpa"
    for key, parameter in model.named_parameters():
        expected = whole(parameter).to(dtype).float()
        assert torch.equal(exported.get_parameter(key.removeprefix("model.")), expected)
    with torch.no_grad():
        logps, expected = model(pack(PAIRS)), torch.cat(plain_logps(exported, PAIRS))
        assert_near(logps, expected, 1e-5 if dtype == torch.float32 else 0.02)
        assert (logps - before).abs().max() > 0.1  # the trained weights, not the first ones
        found = model.call(checks.plain_logps, PAIRS, model.stock_attention)
        assert_near(found, logps, 1e-5 if dtype == torch.float32 else 0.02)
    state = load_file(folder / "model.safetensors")
    assert {value.dtype for value in state.values()} == {dtype}
    assert state.keys() == load_file(source / "model.safetensors").keys()  # tied weights once


@pytest.mark.parametrize(
    "given", [{"top_k": 20}, {"do_sample": False, "temperature": 0.6}, {"eos_token_id": [3, 1]}]
)
def test_export_takes_any_generation_config(given, group, tmp_path):
    make_model("llama").save_pretrained(tmp_path / "source")
    (tmp_path / "source" / "generation_config.json").write_text(json.dumps(given))
    model = load_model(str(tmp_path / "source"), CPU, torch.float32)
    export(model, str(tmp_path / "source"), make_tokenizer(), tmp_path / "final")
    generation = GenerationConfig.from_pretrained(tmp_path / "final")
    assert generation.eos_token_id in (3, given.get("eos_token_id", [3]))
    assert generation.do_sample == given.get("do_sample") or "do_sample" not in given


def test_a_model_without_a_generation_config_gets_one(group, tmp_path):
    source = tmp_path / "source"
    make_model("llama").save_pretrained(source)
    (source / "generation_config.json").unlink()
    model = load_model(str(source), CPU, torch.float32)
    export(model, str(source), make_tokenizer(), tmp_path / "final")
    generation = GenerationConfig.from_pretrained(tmp_path / "final")
    assert generation.eos_token_id == [1, 3] and generation.bos_token_id == 0


def test_an_interrupted_export_leaves_no_folder(model_folder, group, tmp_path, monkeypatch):
    class Interrupted(Exception):
        pass

    def interrupted(*args):
        raise Interrupted

    model, tokenizer = load_model(str(model_folder), CPU, torch.float32), make_tokenizer()
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(weights, "write_tokenizer", interrupted)
        export(model, str(model_folder), tokenizer, tmp_path / "final")
    assert not (tmp_path / "final").exists()
    # What was left is no obstacle.
    export(model, str(model_folder), tokenizer, tmp_path / "final")
    assert {path.name for path in tmp_path.iterdir()} == {"final", "final.json"}


def test_the_files_of_the_base_are_exported_as_they_came(model_folder, group, tmp_path):
    """Written by an older transformers: another version would write keys that it does not know."""
    base, final = tmp_path / "base", tmp_path / "final"
    shutil.copytree(model_folder, base)
    older = {"torch_dtype": "float32", "auto_map": {"AutoModel": "code.Model"}, "rope_theta": 5e5}
    older |= {"rope_scaling": {"rope_type": "linear", "factor": 2.0}, "of_another_tool": [1, None]}
    config = json.loads((base / "config.json").read_text())
    del config["dtype"], config["rope_parameters"], config["architectures"]
    (base / "config.json").write_text(json.dumps(config | older))
    settings = json.loads((base / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": "PreTrainedTokenizerFast", "auto_map": {"AutoTokenizer": "c.T"}}
    (base / "tokenizer_config.json").write_text(json.dumps(settings))
    (base / "preprocessor_config.json").write_text('{ "size": 2 }')
    (base / "trainer_state.json").write_text("{}")
    model = load_model(str(base), CPU, torch.bfloat16)
    export(model, str(base), weights.load_tokenizer(str(base)), final)
    del older["auto_map"], settings["auto_map"]
    exported = json.loads((final / "config.json").read_text())
    written = {"torch_dtype": "bfloat16", "architectures": ["LlamaForCausalLM"]}
    assert exported == config | older | written
    assert json.loads((final / "tokenizer_config.json").read_text()) == settings
    for name in ("tokenizer.json", "chat_template.jinja", "preprocessor_config.json"):
        assert (final / name).read_bytes() == (base / name).read_bytes()
    assert not (final / "trainer_state.json").exists()
    loaded = AutoModelForCausalLM.from_pretrained(final)
    assert loaded.config.rope_parameters["rope_theta"] == 5e5


@pytest.mark.parametrize("place", ["chat_template.jinja", "tokenizer_config.json"])
def test_a_changed_template_is_exported_where_the_base_has_its_own(
    place, model_folder, group, tmp_path
):
    base, final = tmp_path / "base", tmp_path / "final"
    shutil.copytree(model_folder, base)
    (base / "chat_template.jinja").unlink()
    template = CHATML + "{# thinking #}"
    settings = json.loads((base / "tokenizer_config.json").read_text())
    if place == "chat_template.jinja":
        (base / place).write_text(template)
    else:
        (base / place).write_text(json.dumps(settings | {"chat_template": template}))
    tokenizer = weights.load_tokenizer(str(base), template_args="thinking=false")
    export(load_model(str(base), CPU, torch.float32), str(base), tokenizer, final)
    found = json.loads((final / "tokenizer_config.json").read_text()).get("chat_template")
    assert (found is None) == (final / "chat_template.jinja").exists()
    assert weights.load_tokenizer(str(final)).chat_template == tokenizer.chat_template
    assert "{% set thinking = false +%}" in tokenizer.chat_template


# ---- Two ranks, and memory, in new processes -----------------------------------------------------


def measure_memory() -> float:
    """MiB that the peak memory grows by in forward and backward of TokenLogps whose full logits
    would take 1 GiB."""
    hidden, weight = (
        torch.randn(1024, 16, requires_grad=True),
        torch.randn(256_000, 16, requires_grad=True),
    )

    def peak() -> int:  # in KiB; the kernel's ru_maxrss counts the process that started this one
        status = Path("/proc/self/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0])

    before = peak()
    TokenLogps.apply(hidden, weight, None, torch.arange(1024)).sum().backward()
    assert hidden.grad.any() and weight.grad.any()
    return (peak() - before) / 1024


def work(rank: int, folder) -> None:
    """What each of two ranks does with the model in folder / source."""
    torch.set_num_threads(1)
    results, source = {"MiB": measure_memory() if rank == 0 else None}, str(folder / "source")
    store = dist.FileStore(str(folder / "store"), 2)
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    with pytest.raises(InputError, match="replicas"):
        load_model(source, CPU, torch.float32, 3)
    AutoModelForCausalLM.from_pretrained = None  # no rank reads the whole model
    load_model(str(folder / "head twice"), CPU, torch.float32)
    with pytest.raises(InputError, match="the config ties lm_head.weight, the file holds another"):
        load_model(str(folder / "another head"), CPU, torch.float32)
    for replicas in (1, 2):
        model = load_model(source, CPU, torch.float32, replicas)
        rows = [parameter.to_local().shape[0] for parameter in model.parameters()]
        results[replicas] = (
            *packed_results(model, PAIRS[rank::2], 2 / len(PAIRS)),
            dict(model.named_buffers()),
            rows,
        )
    export(model, source, make_tokenizer(), folder / "final")
    assert (folder / "final" / "model.safetensors").is_file()  # on every rank, once export returns
    torch.save(results, folder / f"rank{rank}")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """(the plain model, its folder, what `work` found on ranks 0 and 1). 321 words: they hold
    different numbers of rows."""
    folder, reference = (
        tmp_path_factory.mktemp("two_ranks"),
        make_reference("gemma3_text", vocab_size=321),
    )
    reference.save_pretrained(folder / "source")
    for name in ("head twice", "another head"):
        shutil.copytree(folder / "source", folder / name)
        state = load_file(folder / name / "model.safetensors")
        state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
        state["lm_head.weight"][-1, -1] += float(name == "another head")
        save_file(state, folder / name / "model.safetensors", metadata={"format": "pt"})
    start_two(work, folder)
    return reference, folder, [torch.load(folder / f"rank{rank}") for rank in (0, 1)]


@pytest.mark.parametrize("replicas", [1, 2])
def test_two_ranks_equal_one(replicas, two_ranks):
    reference, _, results = two_ranks
    reference.zero_grad()
    _, expected_gradients = plain_results(reference)
    expected_buffers = {f"model.{key}": buffer for key, buffer in reference.named_buffers()}
    for rank in (0, 1):
        logps, gradients, buffers, rows = results[rank][replicas]
        assert_near(logps, torch.cat(plain_logps(reference, PAIRS[rank::2])).detach())
        assert_near(gradients, expected_gradients)
        assert buffers.keys() == expected_buffers.keys() != set()
        assert all(torch.equal(buffer, expected_buffers[key]) for key, buffer in buffers.items())
        full = [parameter.shape[0] for parameter in reference.parameters()]
        assert rows == (full if replicas == 2 else [(n + 1 - rank) // 2 for n in full])


def bfloat16_gradients(rank: int, folder) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), 2)
    timeout = timedelta(seconds=60)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timeout)
    model = load_model(str(folder / "source"), CPU, torch.bfloat16)
    _, gradients = packed_results(model, PAIRS[rank::2], 2 / len(PAIRS))
    rounded = [name for name, g in gradients.items() if torch.equal(g, g.bfloat16().float())]
    assert rounded == []
    dist.destroy_process_group()


def test_two_ranks_sum_bfloat16_gradients_in_float32(tmp_path):
    make_model("llama").save_pretrained(tmp_path / "source")
    start_two(bfloat16_gradients, tmp_path)


def test_two_ranks_export(two_ranks):
    reference, folder, _ = two_ranks
    exported = AutoModelForCausalLM.from_pretrained(folder / "final").state_dict()
    assert all(torch.equal(value, exported[key]) for key, value in reference.state_dict().items())


def test_memory_stays_far_below_the_full_logits(two_ranks):
    assert two_ranks[2][0]["MiB"] < 300
