"""The recipes, at full size on the meta device, sharded for eight simulated ranks."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import make_tokenizer
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoConfig

from data import tokenize_row
from model import blocks, build_model, shard
from runtime.templates import end_of_turn
from runtime.weights import load_tokenizer
from train import parse_args

RECIPES = sorted(Path(__file__).parent.parent.glob("recipes/*.yaml"))

# The published architectures, and their numbers of parameters by their model cards or papers.
LLAMA3 = {"vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336}
LLAMA3 |= {"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8}
LLAMA3 |= {"max_position_embeddings": 8192, "rope_theta": 500000.0}
MISTRAL = LLAMA3 | {"vocab_size": 32000, "max_position_embeddings": 32768, "rope_theta": 1e4}
MISTRAL |= {"sliding_window": 4096}
PYTHIA = {"vocab_size": 50304, "hidden_size": 2560, "intermediate_size": 10240}
PYTHIA |= {"num_hidden_layers": 32, "num_attention_heads": 32, "rotary_pct": 0.25}
PYTHIA |= {"max_position_embeddings": 2048}
SMOLLM2 = {"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536}
SMOLLM2 |= {"num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3}
SMOLLM2 |= {"max_position_embeddings": 8192, "tie_word_embeddings": True}
FULL_ATTENTION = MISTRAL | {"sliding_window": None}
MODELS = {
    "alignment-handbook/zephyr-7b-sft-full": ("mistral", MISTRAL, 7_241_732_096),
    "mistralai/Mistral-7B-Instruct-v0.2": ("mistral", FULL_ATTENTION, 7_241_732_096),
    "princeton-nlp/Llama-3-Base-8B-SFT": ("llama", LLAMA3, 8_030_261_248),
    "meta-llama/Meta-Llama-3-8B-Instruct": ("llama", LLAMA3, 8_030_261_248),
    "lomahony/eleuther-pythia2.8b-hh-sft": ("gpt_neox", PYTHIA, 2_775_208_960),
    "demo": ("llama", SMOLLM2, 134_515_008),
}
# learning rate, max_length, max_prompt_length: the table of the authors' set-ups
PAPER = {
    "mistral-7b-base": (3e-7, 1024, 512),
    "mistral-7b-instruct": (5e-7, 2048, 1800),
    "llama-3-8b-base": (6e-7, 2048, 1800),
    "llama-3-8b-instruct": (1e-6, 2048, 1800),
    "pythia-2.8b-hh": (1e-6, 512, 256),
}


def test_the_five_setups_of_the_paper():
    assert {path.stem for path in RECIPES} == {*PAPER, "demo"}
    for name, values in PAPER.items():
        config = parse_args([str(Path(__file__).parent.parent / "recipes" / f"{name}.yaml")])
        assert (config.learning_rate, config.max_length, config.max_prompt_length) == values
        assert config.batch_size == 128 and config.num_epochs == 1
        assert config.warmup_ratio == 0.1 and config.max_grad_norm == 1.0
        assert config.seed == 42 and config.output_dir == f"runs/{name}"


# What the authors' run_simper.py makes of these conversations, with BOS as their trainer adds it.
# The responses are ours: without the header in front of them and what follows the end of the turn.
QUESTION = [{"role": "user", "content": " Two plus two? "}]
SECOND = [*QUESTION, {"role": "assistant", "content": "4"}, {"role": "user", "content": "Sure?"}]
SYSTEM = [{"role": "system", "content": "Be brief."}, *QUESTION]
AUTHORS = {
    "base": (
        "<s><|system|>\n</s>\n<|user|>\n Two plus two? </s>\n<|assistant|>\n",
        "<s><|system|>\n</s>\n<|user|>\n Two plus two? </s>\n<|assistant|>\n4</s>\n"
        "<|user|>\nSure?</s>\n<|assistant|>\n",
        "<s><|system|>\nBe brief.</s>\n<|user|>\n Two plus two? </s>\n<|assistant|>\n",
        "Yes.</s>",
    ),
    "instruct": (
        "<s>[INST] Two plus two? [/INST]",
        "<s>[INST] Two plus two? [/INST] 4 </s>[INST] Sure? [/INST]",
        "<s>[INST] Be brief.\n\n Two plus two? [/INST]",
        " Yes. </s>",
    ),
}


@pytest.mark.parametrize("name", AUTHORS)
def test_the_mistral_recipes_prompts_are_the_authors(name, tmp_path):
    make_tokenizer(adds_bos=True).save_pretrained(tmp_path)
    root = Path(__file__).parent.parent
    config = parse_args([str(root / "recipes" / f"mistral-7b-{name}.yaml")])
    tokenizer = load_tokenizer(str(tmp_path), str(root / config.chat_template))
    *prompts, response = AUTHORS[name]
    for messages, text in zip((QUESTION, SECOND, SYSTEM), prompts):
        ids = tokenize_row(tokenizer, messages, ["Yes.", "No."], end_of_turn(tokenizer))
        assert ids[0] == tokenizer(text, add_special_tokens=False).input_ids
        assert tokenizer.decode(ids[1]) == response


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_shards_over_eight_ranks(path, capsys):
    config = parse_args([str(path)])
    kind, values, parameters = MODELS[config.model]
    assert config.max_length <= values["max_position_embeddings"]
    assert config.micro_batch_tokens == (2048 if path.stem == "demo" else 0)  # 0: as many as fit
    dist.init_process_group("fake", rank=0, world_size=8, store=FakeStore())
    try:
        with torch.device("meta"):
            model = build_model(AutoConfig.for_model(kind, **values))
        assert sum(p.numel() for p in model.parameters()) == parameters
        shard(model, "cpu", torch.bfloat16, config.replicas)
        assert len(blocks(model)) == values["num_hidden_layers"]
        assert all(isinstance(p, DTensor) and p.dtype == torch.float32 for p in model.parameters())
        local = sum(p.to_local().numel() for p in model.parameters())
    finally:
        dist.destroy_process_group()
    assert parameters / 8 <= local < 1.01 * parameters / 8
    gb = 4 * local / 1e9
    sizes = f"parameters {gb:.2f} GB, gradients {gb:.2f} GB, Adam {2 * gb:.2f} GB"
    billions = f"{parameters / 1e9:.2f} B parameters"
    with capsys.disabled():
        print(f"\n{path.stem}, {billions}, each of 8 ranks, float32: {sizes}")
