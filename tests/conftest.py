"""What the tests share: a tokenizer trained here, tiny random models, and a process group of
one."""

import os

os.environ.setdefault(
    "CUDA_VISIBLE_DEVICES", ""
)  # the tests are about the CPU path, also on a machine with GPUs
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import datasets
import pytest
import torch
import torch.distributed as dist
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{{ message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEXT = [
    "Human: Assistant: system user assistant",
    "a small tokenizer for tests, trained on this text",
    "what is two plus two?",
]


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    """Tests neither read nor fill the user's caches, ours and that of the datasets library."""
    import data
    import model
    from demo import smollm2

    data.CACHE_DIR = model.CACHE_DIR = smollm2.CACHE_DIR = tmp_path_factory.mktemp("cache")
    os.environ["SIMPER_CACHE"] = str(data.CACHE_DIR)
    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("datasets")
    os.environ["HF_DATASETS_CACHE"] = str(datasets.config.HF_DATASETS_CACHE)


def make_tokenizer(
    chat_template: str | None = CHATML, adds_bos: bool = False
) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of about 300 tokens: <s>, </s>, <|im_start|>, <|im_end|>, bytes, a
    few merges."""
    special = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 0)]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = chat_template
    return tokenizer


TINY = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
TINY |= {"max_position_embeddings": 256, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
GQA = {"num_key_value_heads": 2, "head_dim": 8}
ARCHITECTURES = {
    "llama": TINY | GQA | {"tie_word_embeddings": False},
    "llama-tied": TINY | GQA | {"tie_word_embeddings": True},
    "mistral": TINY | GQA | {"sliding_window": None},
    "mistral-sliding-window": TINY | GQA | {"sliding_window": 6},
    "gpt_neox": TINY,
    "qwen2": TINY | {"num_key_value_heads": 2},
    "qwen3": TINY | GQA,
    "gemma3_text": TINY | GQA | {"sliding_window": 6, "tie_word_embeddings": True},
    "gpt2": {
        "vocab_size": 320,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 256,
        "tie_word_embeddings": True,
    },
    "phi3": TINY | {"num_key_value_heads": 2},
    "olmo2": TINY | {"num_key_value_heads": 2},
}


def make_config(name: str = "llama"):
    """A tiny transformers config, by a name of ARCHITECTURES."""
    kind = "llama" if name == "llama-tied" else name.removesuffix("-sliding-window")
    return AutoConfig.for_model(kind, **ARCHITECTURES[name])


def make_model(name: str = "llama", seed: int = 0, **changes):
    """A tiny random transformers model in float32. Larger initial weights than usual, so that
    attention matters."""
    config = make_config(name)
    for key, value in changes.items():
        setattr(config, key, value)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.15)
    return model.eval()


@pytest.fixture
def group():
    """A process group of one, as train.py makes it without torchrun."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """A tiny Llama with its tokenizer, saved as a Hugging Face folder."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    make_model("llama").save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


transformers.utils.logging.disable_progress_bar()
torch.set_num_threads(1)  # several threads slow tiny models down
