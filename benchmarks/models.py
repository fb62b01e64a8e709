"""Every kind of language model in transformers, tiny, with random weights: whether this code
computes what transformers computes, and exports what it has read.

    python -m benchmarks.models                         # all, and the table of its page
    python -m benchmarks.models gemma2 qwen3_5          # some; no table
    python -m benchmarks.models gemma2 qwen3_5 --train  # and two steps of train.py, 1 and 2 ranks

Log-probs and gradients of SimPER's loss are compared with those of the plain model in float64 with
eager attention, one sequence at a time. The export is loaded again: it must give the same logits,
and hold the tensors that were read, under their names, bit for bit. --train compares the weights
after two steps with those of a plain loop of AdamW in float64.
"""

import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import datasets
import torch
import torch.distributed as dist
import transformers
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
)

from data import DataSet, pack
from eval.results import make_parser
from loss import simper_loss
from model import export, load_model
from runtime.checks import choose_forward
from runtime.errors import InputError
from runtime.weights import model_class, other_parts

PAGE = Path(__file__).parent.parent / "docs" / "notes" / "every-kind.md"
SECONDS = 120  # for one kind
VOCABULARY, WIDTH, LAYERS = 320, 64, 4
# (prompt, chosen, rejected) tokens; sliding windows are 6 wide.
LENGTHS = [(3, 4, 2), (9, 5, 12), (1, 8, 3), (7, 1, 15), (20, 12, 10)]

# What a config takes of these by name, it gets.
SIZES = {
    VOCABULARY: "vocab_size vocab_size_per_layer_input",
    WIDTH: "hidden_size n_embd d_model dim emb_dim embedding_size conv_dim block_dim lru_width "
    "attention_hidden_size",
    96: "intermediate_size ffn_dim n_inner dim_feedforward dim_ff ffn_hidden_size encoder_ffn_dim "
    "decoder_ffn_dim d_ff intermediate_size_mlp block_ff_dim",
    LAYERS: "num_hidden_layers n_layer n_layers num_layers decoder_layers num_attention_heads "
    "n_head n_heads num_heads decoder_attention_heads encoder_attention_heads attention_heads "
    "num_experts num_local_experts n_routed_experts moe_num_experts linear_num_value_heads",
    2: "encoder_layers num_key_value_heads num_experts_per_tok num_experts_per_token moe_k "
    "moe_topk top_k_experts index_n_heads o_groups n_mamba_heads linear_num_key_heads "
    "linear_key_value_heads num_kv_shared_layers altup_num_inputs pad_token_id mlp_ratio",
    1: "n_group topk_group n_shared_experts num_shared_experts first_k_dense_replace "
    "moe_layer_start_index mamba_n_groups n_groups mamba_ngroups num_memory_blocks eos_token_id",
    16: "head_dim d_kv d_head dim_head kv_channels kv_lora_rank v_head_dim qk_head_dim "
    "index_head_dim o_lora_rank mamba_d_head mamba_head_dim hidden_size_per_layer_input "
    "linear_key_head_dim linear_value_head_dim attention_chunk_size linear_head_dim",
    32: "moe_intermediate_size expert_intermediate_size shared_expert_intermediate_size "
    "moe_shared_expert_intermediate_size shared_intermediate_size expert_ffn_hidden_size",
    8: "rotary_dim qk_rope_head_dim qk_nope_head_dim index_topk state_size mamba_d_state "
    "mamba_n_heads mamba_num_heads ssm_state_size mamba_chunk_size chunk_size laurel_rank "
    "time_step_rank block_size adapter_rank",
    24: "q_lora_rank",
    128: "mamba_d_ssm",
    6: "sliding_window attention_window_size window_size",
    256: "max_position_embeddings n_positions max_seq_len max_sequence_length",
    0: "bos_token_id",
    310: "image_token_id image_token_index",
    311: "video_token_id",
    312: "audio_token_id",
    313: "boi_token_id vision_start_token_id",
    314: "eoi_token_id vision_end_token_id",
    315: "boa_token_id",
    316: "eoa_token_id eoa_token_index",
}
SIZES = {name: size for size, names in SIZES.items() for name in names.split()}
TOKENS = {name: size for name, size in SIZES.items() if re.search("_token_(id|index)$", name)}
# Of the parts for images and sound.
OTHER_SIZES = {
    32: "hidden_size embed_dim d_model vocab_size",
    48: "intermediate_size",
    1: "num_hidden_layers depth encoder_layers decoder_layers",
    2: "num_attention_heads num_heads",
    28: "image_size",
    14: "patch_size",
    16: "head_dim num_position_embeddings",
    WIDTH: "out_hidden_size projection_dim vision_output_dim projector_input_dim "
    "projector_output_dim text_hidden_size",
}
OTHER_SIZES = {name: size for size, names in OTHER_SIZES.items() for name in names.split()}
OTHER_SIZES |= {"deepstack_visual_indexes": [0], "fullatt_block_indexes": [0]}
MIXED = ["sliding_attention", "full_attention"] * 2
MROPE = {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3]}}
MROPE["rope_parameters"]["rope_theta"] = 10000.0
OWN = object()  # the config's own value
# What some kinds need besides, or instead; of a multimodal one, its text part.
SPECIAL = {
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "ministral": {"head_dim": 16},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "kimi_linear": {"linear_num_heads": 2},
    "zamba": {
        "layers_block_type": ["mamba", "mamba", "hybrid", "mamba", "hybrid"],
        "num_hidden_layers": 5,
    },
    "zamba2": {"layers_block_type": ["mamba", "hybrid"] * 2, "num_mem_blocks": 1},
    "zaya": {"num_experts_per_tok": 1, "num_experts_per_token": OWN},
    "xlstm": {"v_head_dim": OWN, "qk_head_dim": OWN, "num_heads": 2, "head_dim": OWN},
    "xlnet": {"max_position_embeddings": OWN},
    "reformer": {"is_decoder": True},
    "prophetnet": {"num_hidden_layers": OWN, "num_encoder_layers": 2, "num_decoder_layers": 2},
    "inkling2_text": {"unpadded_vocab_size": 310},
    "inkling2_loop_text": {"unpadded_vocab_size": 310},
    "falcon": {"head_dim": OWN},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "dots3_note_text": {"num_key_value_heads": 4},
    "gemma3n_text": {"layer_types": MIXED, "activation_sparsity_pattern": [0.95, 0.95, 0.0, 0.0]},
    "gemma4_text": {"layer_types": MIXED, "final_logit_softcapping": 30.0},
    "gemma4_unified_text": {
        "layer_types": MIXED,
        "num_kv_shared_layers": 0,
        "hidden_size_per_layer_input": 0,
        "final_logit_softcapping": 30.0,
    },
    "cohere2": {"layer_types": MIXED, "logit_scale": 0.25},
    "granite": {"logits_scaling": 8.0, "embedding_multiplier": 12.0, "residual_multiplier": 0.22},
    "granitemoe": {"logits_scaling": 6.0, "residual_multiplier": 0.22},
    "falcon_h1": {"lm_head_multiplier": 0.0195, "embedding_multiplier": 5.6},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {
            "ffn_hidden_size": 96,
            "moe_num_experts": 4,
            "moe_top_k": 2,
            "moe_loss_weight": 0.0,
            "hidden_size": WIDTH,
        },
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "llama4_text": {
        "moe_layers": OWN,
        "interleave_moe_layer_step": 2,
        "no_rope_layer_interval": 2,
    },
    "glm4v_text": MROPE,
    "glm4v_moe_text": MROPE,
    "glm46v_text": MROPE,
    "glm_ocr_text": MROPE,
    "paddleocr_vl_text": MROPE,
    "qwen2_vl_text": MROPE,
    "qwen2_5_vl_text": MROPE,
    "qwen2_5_omni_text": MROPE,
    "qwen3_omni_moe_text": MROPE,
}
TRAINED = "llama gemma2 gemma3 gemma3n_text gpt_oss qwen3 qwen3_moe qwen3_5 qwen3_vl mistral3 "
TRAINED += "cohere2 granite mamba2 falcon_h1 nemotron_h"  # those of --train, if none are named


# ---- A tiny model --------------------------------------------------------------------------------


def sizes_of(config_class, sizes: dict) -> dict:
    """Those of `sizes` that a config takes, under its own names."""
    default = config_class()
    names, known = getattr(config_class, "attribute_map", {}), default.to_dict()
    taken = {names.get(key, key): sizes[key] for key in sizes if key in known or key in names}
    for key in ("sliding_window", "head_dim", "q_lora_rank", "n_inner"):
        if known.get(key, 0) is None:  # it does without, or computes it
            taken.pop(key, None)
    if "qk_rope_head_dim" in known and config_class.model_type != "minicpm3":
        taken.pop("head_dim", None)
    if "kv_lora_rank" in known and "num_key_value_heads" in taken:
        taken["num_key_value_heads"] = LAYERS
    return taken


def special_sizes(config_class) -> dict:
    """sizes_of the SIZES, with what is SPECIAL."""
    given = sizes_of(config_class, SIZES) | SPECIAL.get(config_class.model_type, {})
    return {key: value for key, value in given.items() if value is not OWN}


def tiny_config(kind: str):
    """A transformers config of this kind with small sizes, the text part's and the others'."""
    config_class = CONFIG_MAPPING[kind]
    parts = dict(getattr(config_class, "sub_configs", None) or {})
    if "text_config" not in parts:
        return config_class(**special_sizes(config_class))
    default, given = config_class(), sizes_of(config_class, TOKENS)
    for name, part in parts.items():
        value = getattr(default, name, None)
        if part is AutoConfig or not hasattr(part, "model_type"):
            part = type(value)
        if part in (type(None), dict):
            continue
        small = special_sizes(part) if name == "text_config" else sizes_of(part, OTHER_SIZES)
        given[name] = part(**small).to_dict()
    return config_class(**given)


def tiny_model(kind: str, folder: Path, std: float) -> None:
    """Write a model with random values of standard deviation `std`, so large that everything
    matters (0: as at initialization), and a tokenizer of bytes."""
    torch.manual_seed(0)
    config = tiny_config(kind)
    model = model_class(config).from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in filter(lambda p: p.is_floating_point(), model.parameters() if std else ()):
            if parameter.ndim > 1:
                parameter.normal_(std=std)
            else:
                parameter.add_(0.2 * torch.randn_like(parameter))
        # Some classes set the padding token's row to 0 whenever they load a file.
        embeddings = model.get_input_embeddings()
        if getattr(embeddings, "padding_idx", None) is not None:
            embeddings.weight[embeddings.padding_idx] = 0
    model.save_pretrained(folder)
    vocabulary = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    vocabulary = {token: number for number, token in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    ends = {"bos_token": "<s>", "eos_token": "</s>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **ends).save_pretrained(folder)


def plain_model(folder: Path, **options):
    """The model by nothing but transformers, with eager attention where it has that."""
    kind = model_class(AutoConfig.from_pretrained(folder))
    try:
        return kind.from_pretrained(folder, attn_implementation="eager", **options).eval()
    except ValueError:
        return kind.from_pretrained(folder, **options).eval()


def plain_logps(model, rows: list) -> list[torch.Tensor]:
    """Log-probs of every response, one sequence at a time."""
    logps = []
    for prompt, *responses in rows:
        for response in responses:
            ids = torch.tensor([prompt + response])
            logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
            logps.append(logits.log_softmax(-1).gather(1, torch.tensor(response)[:, None])[:, 0])
    return logps


def plain_loss(logps: list[torch.Tensor]) -> torch.Tensor:
    """SimPER's loss of pairs, summed (the paper's equation 4)."""
    likelihoods = [response.mean().exp() for response in logps]
    return sum(likelihoods[1::2]) - sum(likelihoods[::2])


# ---- The comparisons -----------------------------------------------------------------------------


def load_tiny(base: Path, dtype: torch.dtype) -> tuple:
    """(the PackedModel of a folder, whose forward is chosen; rows of random tokens). Collective.
    Raises InputError if it is refused."""
    random = torch.Generator().manual_seed(0)
    rows = [
        [torch.randint(3, 250, (n,), generator=random).tolist() for n in row] for row in LENGTHS
    ]
    columns = {"prompt": [row[0] for row in rows], "responses": [row[1:] for row in rows]}
    columns |= {"lengths": LENGTHS, "columns": [[]] * len(rows)}
    data = DataSet(datasets.Dataset.from_dict(columns))
    model = load_model(str(base), torch.device("cpu"), dtype)
    choose_forward(model, data, None)
    return model, rows


def forward_of(model) -> str:
    """How a PackedModel computes."""
    how = "packed" if model.packed else "padded rows"
    return how + ", all logits" * model.own_logits


def choose(kind: str, folder: Path) -> str:
    """forward_of a tiny model of this kind. Raises InputError if it is refused."""
    tiny_model(kind, folder, 0.15)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        return forward_of(load_tiny(folder, torch.float32)[0])
    finally:
        dist.destroy_process_group()


def compare(kind: str, dtype: torch.dtype, std: float, folder: Path) -> dict:
    """What was found of a kind: "how" it is computed, or why it was "refused", and differences."""
    base = folder / "base"
    tiny_model(kind, base, std)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model, rows = load_tiny(base, dtype)
    except InputError as error:
        return {"refused": str(error)}
    found, batch = {"how": forward_of(model)}, pack(rows)
    logps = model(batch)
    simper_loss(logps, batch.lengths).sum().backward()
    gradients = {key.removeprefix("model."): p.grad for key, p in model.optimized().items()}
    gradients = {key: gradient for key, gradient in gradients.items() if gradient is not None}
    model.free_gathered()

    plain = plain_model(base, dtype=torch.float64)
    try:
        expected = plain_logps(plain, rows)
    except RuntimeError:  # kernels of experts that do not take float64
        plain = plain_model(base, dtype=torch.float64, experts_implementation="eager")
        expected = plain_logps(plain, rows)
    plain_loss(expected).backward()
    rounded = plain_model(base, dtype=dtype)
    with torch.no_grad():
        noise = torch.cat(plain_logps(rounded, rows)).double() - torch.cat(expected)
    found["log-probs"] = (logps.detach().double() - torch.cat(expected)).abs().max().item()
    found["own rounding"] = noise.abs().max().item()
    # Marian's and Pegasus's positions, which are no parameters to train, are so once loaded.
    built = model_class(plain.config).from_config(plain.config)
    fixed = {key for key, parameter in built.named_parameters() if not parameter.requires_grad}
    wanted = {key: p.grad for key, p in plain.named_parameters() if p.grad is not None}
    wanted = {key: gradient for key, gradient in wanted.items() if key not in fixed}
    largest = max(gradient.abs().max() for gradient in wanted.values())
    zero = torch.zeros(())
    found["gradients"] = max(
        ((gradients.get(key, zero) - g).abs().max() / max(g.abs().max(), 0.01 * largest)).item()
        for key, g in wanted.items()
    )
    found["other parts"] = len(other_parts(model.model))
    if dtype == torch.float32:
        found |= compare_export(model, base, folder / "final", rounded, rows[0][0])
    return found


def compare_export(model, base: Path, final: Path, plain, ids: list[int]) -> dict:
    """Differences of the export's logits, names and bytes from what was read."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    export(model, str(base), tokenizer, final)
    again, report = model_class(model.model.config).from_pretrained(
        final,
        dtype=torch.float32,
        attn_implementation=plain.config._attn_implementation,
        output_loading_info=True,
    )
    with torch.no_grad():
        ids = torch.tensor([ids])
        logits = [m.eval()(input_ids=ids, use_cache=False).logits for m in (plain, again)]
    before, after = tensors(base), tensors(final)
    changed = [
        key for key in before if key not in after or not torch.equal(before[key], after[key])
    ]
    strange = sorted(before.keys() ^ after.keys()) + changed
    strange += [*map(str, (*report["missing_keys"], *report["unexpected_keys"]))]
    return {"export": (logits[0] - logits[1]).abs().max().item(), "strange": strange}


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor in a folder's safetensors."""
    return {k: v for path in folder.glob("*.safetensors") for k, v in load_file(path).items()}


def verdict(found: dict, dtype: torch.dtype) -> str:
    """ "right", "WRONG", "refused", or "not tried": no tiny model could be made, or transformers'
    own attentions disagree."""
    if "how" not in found:
        return "refused" if "refused" in found else "not tried"
    if dtype == torch.float32 and found["own rounding"] > 0.1:
        found["error"] = f"its own two attentions differ by {found['own rounding']:.1f}"
        return "not tried"
    exact = dtype == torch.float32
    limit = max(1e-3 if exact else 0.02, 3 * found["own rounding"])
    right = found["log-probs"] < limit and (not exact or found["gradients"] < 1e-2)
    if exact and (found["export"] > 0 or found["strange"]):
        right = False
    return "right" if right else "WRONG"


# ---- Two steps of train.py -----------------------------------------------------------------------


def compare_training(folder: Path) -> dict[str, float]:
    """How far the exported weights are from those of a plain loop in float64 after two steps of
    train.py on the tiny model in folder/base, relative to how far they moved, by number of ranks;
    and how far those of the plain loop in float32 are."""
    base, letters = folder / "base", "abcdefghijklmnopqrstuvwxyz"
    texts = [["".join(letters[(7 * i + n) % 26] for i in range(n)) for n in row] for row in LENGTHS]
    names = ("prompt", "chosen", "rejected")
    lines = [json.dumps(dict(zip(names, row))) for row in texts]
    (folder / "pairs.jsonl").write_text("\n".join(lines))
    trained = plain_training(base, texts, folder / "plain", torch.float64)
    rounded = plain_training(base, texts, folder / "rounded", torch.float32)
    moved = difference(tensors(base), trained)
    recipe = {"model": base, "train_data": folder / "pairs.jsonl", "batch_size": len(texts)}
    recipe |= {"num_epochs": 2, "learning_rate": 1e-2, "warmup_ratio": 0.0, "max_length": 100}
    recipe |= {"max_prompt_length": 50, "save_every": 0, "wandb": "off"}
    found = {"plain float32": difference(rounded, trained) / moved}
    for ranks in (1, 2):
        run = folder / f"run-{ranks}"
        values = "".join(
            f"{key}: {value}\n" for key, value in (recipe | {"output_dir": run}).items()
        )
        (folder / "recipe.yaml").write_text(values)
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        command = [sys.executable, *(launch if ranks > 1 else ()), "train.py"]
        done = subprocess.run([*command, folder / "recipe.yaml"], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stderr[-400:])
        found[f"{ranks} ranks"] = difference(tensors(run / "final"), trained) / moved
    return found


def plain_training(base: Path, texts: list, output: Path, dtype) -> dict[str, torch.Tensor]:
    """The weights after two steps of AdamW in `dtype` on all pairs, with a cosine schedule."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    rows = [[tokenizer(text).input_ids for text in row] for row in texts]
    rows = [[prompt, *(r + [tokenizer.eos_token_id] for r in rest)] for prompt, *rest in rows]
    model = plain_model(base, dtype=dtype, experts_implementation="eager")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    schedule = transformers.get_cosine_schedule_with_warmup(optimizer, 0, 2)
    for _ in range(2):
        (plain_loss(plain_logps(model, rows)) / len(rows)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.float().save_pretrained(output)
    return tensors(output)


def difference(some: dict, others: dict) -> float:
    """The norm of the difference of two sets of tensors of the same names."""
    if some.keys() != others.keys():
        raise RuntimeError(f"not the same tensors: {sorted(some.keys() ^ others.keys())}")
    return (
        sum((some[key].double() - others[key].double()).norm() ** 2 for key in some).sqrt().item()
    )


# ---- The table -----------------------------------------------------------------------------------


def examine(kind: str, args, folder: Path, results) -> None:
    """Put what was found of a kind into the queue `results`."""
    os.environ["SIMPER_CACHE"] = str(folder / "cache")
    try:
        found = compare(kind, getattr(torch, args.dtype), args.std, folder)
        if args.train and "how" in found:
            found |= compare_training(folder)
    except Exception as error:  # one of transformers' own classes, mostly about sizes
        found = {"error": f"{type(error).__name__}: {error}"}
    results.put(found)


def examine_apart(kind: str, args) -> dict:
    """What `examine` finds in a process of its own."""
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    folder = Path(tempfile.mkdtemp(prefix=f"models-{kind}-"))
    process = context.Process(target=examine, args=(kind, args, folder, results))
    process.start()
    try:
        return results.get(timeout=SECONDS)
    except Exception:  # queue.Empty
        return {"error": f"not done in {SECONDS} s"}
    finally:
        process.kill()
        process.join()
        shutil.rmtree(folder, ignore_errors=True)  # of a large one, gigabytes


def line(kind: str, found: dict, dtype: torch.dtype) -> str:
    """A line of the table."""
    said = verdict(found, dtype)
    if said in ("refused", "not tried"):
        reason = found.get("refused") or found["error"]
        reason = re.sub(r"\S*/models-\S*", "the model", " ".join(reason.split()))
        reason = reason.partition(" Found,")[0].replace("|", "¦")[:160]
        return f"| `{kind}` | {said} | {reason} | | |"
    parts = f"{found['other parts']} tensors kept" if found["other parts"] else ""
    how = found["how"] if said == "right" else f"**{said}** ({found['how']})"
    gradients = f"{found['gradients']:.0e}"
    return f"| `{kind}` | {how} | {parts} | {found['log-probs']:.0e} | {gradients} |"


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("kinds", nargs="*", help="model_type of a config; none: all")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--std", type=float, default=0.15, help="of the weights; 0: transformers'")
    parser.add_argument("--train", action="store_true", help="two steps of train.py as well")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    every = sorted({**MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, **MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES})
    lines = []
    for kind in args.kinds or (TRAINED.split() if args.train else every):
        found = examine_apart(kind, args)
        lines.append(line(kind, found, getattr(torch, args.dtype)))
        print(lines[-1], json.dumps(found), flush=True)
    if not (args.kinds or args.train or args.std != 0.15 or args.dtype != "float32"):
        before, mark, _ = PAGE.read_text().partition("| kind |")
        table = [mark + " computed | or the reason; other parts | log-probs | gradients |"]
        PAGE.write_text(before + "\n".join([*table, "|---|---|---|---|---|", *lines]) + "\n")


if __name__ == "__main__":
    main()
