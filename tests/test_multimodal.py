"""Checkpoints with parts for images or sound: their text is trained, the rest stays as it is."""

import json

import pytest
import torch
import transformers
from conftest import GQA, TINY, make_tokenizer, run, run_ranks
from safetensors.torch import load_file, save_file

from data import load_data, pack
from eval.generate import answer
from eval.preference import pair_logps
from model import build_model, load_model
from runtime.weights import other_parts

IMAGES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "patch_size": 14}
IMAGES |= {"num_attention_heads": 2, "image_size": 28}
# Heads that draft further tokens: transformers does not load them.
DRAFT = "mtp.fc.weight"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A tiny Mistral 3 with a vision tower, whose values in the file are float16."""
    folder = tmp_path_factory.mktemp("mistral3")
    images = IMAGES | {"model_type": "pixtral"}
    text = TINY | GQA | {"model_type": "mistral", "sliding_window": None}
    config = transformers.AutoConfig.for_model(
        "mistral3", text_config=text, vision_config=images, image_token_index=310
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForImageTextToText.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.15)
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    (folder / "processor_config.json").write_text('{"processor_class": "PixtralProcessor"}')
    tensors = load_file(folder / "model.safetensors")
    tensors = {k: v if is_text(k) else v.half() for k, v in tensors.items()}
    tensors[DRAFT] = torch.randn(3, 4, dtype=torch.float16)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def is_text(name: str) -> bool:
    return "language_model" in name or "lm_head" in name


@pytest.mark.parametrize("dtype, ranks", [("bfloat16", 1), ("float32", 2)])
def test_only_the_text_part_is_trained(checkpoint, base, tmp_path, dtype, ranks):
    values = base | {"model": str(checkpoint), "dtype": dtype, "eval_data": "", "max_steps": 2}
    (run if ranks == 1 else run_ranks)(values, tmp_path / "run")
    final = tmp_path / "run" / "final"
    before, after = (load_file(f / "model.safetensors") for f in (checkpoint, final))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        if is_text(name):
            assert after[name].dtype == getattr(torch, dtype)
            assert not torch.equal(after[name], tensor.to(after[name].dtype)), name
        else:
            assert after[name].dtype == torch.float16
            assert torch.equal(after[name], tensor), name
    assert (
        final / "processor_config.json"
    ).read_bytes() == b'{"processor_class": "PixtralProcessor"}'
    kept, config = (json.loads((f / "config.json").read_text()) for f in (checkpoint, final))
    assert config["vision_config"] == kept["vision_config"]
    _, info = transformers.AutoModelForImageTextToText.from_pretrained(
        final, output_loading_info=True
    )
    assert not info["missing_keys"] and {*info["unexpected_keys"]} == {DRAFT}


def test_it_computes_what_transformers_computes(checkpoint, group):
    model = load_model(str(checkpoint), torch.device("cpu"), torch.float32)
    rows = [[[5, 6, 7], [8, 9], [10, 11, 12]], [[20], [21, 22], [23]]]
    plain = transformers.AutoModelForImageTextToText.from_pretrained(
        checkpoint, dtype=torch.float64, attn_implementation="eager"
    )
    expected = []
    for prompt, *responses in rows:
        for response in responses:
            logits = plain(input_ids=torch.tensor([prompt + response])).logits[0]
            logps = logits.log_softmax(-1)[len(prompt) - 1 : -1]
            expected.append(logps.gather(1, torch.tensor(response)[:, None])[:, 0])
    torch.testing.assert_close(model(pack(rows)).double(), torch.cat(expected), rtol=0, atol=1e-5)
    frozen = {name for name, p in model.model.named_parameters() if not p.requires_grad}
    assert frozen == {*other_parts(model.model)}
    assert frozen and not any(map(is_text, frozen))


def test_eval_reads_it(checkpoint, base, group):
    (text, _), *_ = answer(str(checkpoint), ["What is two plus two?"], max_new_tokens=4)
    assert isinstance(text, str)
    data = load_data(base["eval_data"], make_tokenizer(), 96, 60)
    assert (pair_logps(str(checkpoint), data, 600) < 0).all()


def test_a_part_for_sound_keeps_its_own_attention():
    """Gemma 4's has no other than the eager one."""
    text = TINY | {"num_key_value_heads": 2, "head_dim": 8, "global_head_dim": 8}
    text |= {"layer_types": ["sliding_attention", "full_attention"], "num_kv_shared_layers": 0}
    text |= {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 320}
    sound = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.AutoConfig.for_model(
        "gemma4", text_config=text, vision_config=None, audio_config=sound
    )
    with torch.device("meta"):
        model = build_model(config)
    parts = model.model.config
    own = parts.audio_config._attn_implementation
    assert parts.text_config._attn_implementation == "packed" and own != "packed"
    model.set_attention(model.stock_attention)
    assert parts.text_config._attn_implementation == model.stock_attention
    model.set_attention()
    assert parts.text_config._attn_implementation == "packed"
    assert parts.audio_config._attn_implementation == own


def test_dropout_of_the_text_part_is_none():
    config = transformers.AutoConfig.for_model(
        "mistral3",
        text_config=TINY | GQA | {"model_type": "mistral", "attention_dropout": 0.5},
        vision_config=IMAGES | {"model_type": "pixtral"},
    )
    with torch.device("meta"):
        model = build_model(config).model
    assert {layer.self_attn.attention_dropout for layer in model.get_decoder().layers} == {0.0}
