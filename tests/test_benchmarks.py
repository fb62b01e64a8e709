"""The counts that benchmarks/ reports, against torch's own counters and values worked out by
hand."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import make_config, make_model, run_python, write_pairs
from test_recipes import MODELS, RECIPES
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks import gpu_check
from benchmarks import plan as plan_module
from benchmarks.baselines import main as baselines_main
from benchmarks.models import tiny_config
from benchmarks.plan import (
    GPUS,
    Setting,
    cheapest,
    count,
    flops,
    fsdp_traffic,
    plan,
    sample_lengths,
)
from benchmarks.plan import main as plan_main
from benchmarks.study import main as study_main
from benchmarks.throughput import check_agreement, random_config
from benchmarks.throughput import main as throughput_main
from data import Schedule, pack, truncate
from model import PackedModel, blocks, build_model, shard
from runtime.errors import InputError
from train import Config, parse_args

ROOT = Path(__file__).parent.parent
SEGMENTS = [(7, 5, 9), (4, 8, 3)]
ROWS = [[[1] * p, [2] * c, [3] * r] for p, c, r in SEGMENTS]


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "qwen3"])
def test_flops_are_those_that_torch_counts(name):
    """The plain model on every token once: torch counts its matrix products; the operations of
    attention and of the head are worked out by hand."""
    model = make_model(name)
    ids = torch.randint(320, (1, 24))
    with FlopCounterMode(display=False) as counter:
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        hidden.sum().backward()
    counted = counter.get_flop_counts()["Global"]
    products = sum(
        count for op, count in counted.items() if "mm" in str(op) and "bmm" not in str(op)
    )
    # What is left of the blocks without attention is the products with their weights.
    body, head = flops(PackedModel(model), [(24, 0, 0)])
    width = 4 * 8  # heads × head size
    assert body - 12 * width * 2 * (24 * 25 / 2) == products
    assert head == 0
    assert flops(PackedModel(model), [(24, 3, 4)])[1] == 6 * 320 * 32 * 7


def test_attention_operations_of_a_pair():
    """By hand: the tokens that each token attends to, for a prompt of 2, a chosen response of 2 and
    a rejected one of 1."""
    # Prompt: itself. Chosen: the prompt and the response so far. Rejected: the prompt and itself.
    attended = 1 + 2 + 3 + 4 + 3
    model = PackedModel(make_model("llama"))
    weights = flops(model, [(1, 0, 0)])[0] - 12 * 32 * 2  # of one token, without attention
    assert flops(model, [(2, 2, 1)])[0] == 5 * weights + 12 * 32 * 2 * attended


@pytest.mark.parametrize("checkpointing", ["false", "selective", "true"])
def test_a_count_of_few_blocks_is_extended_to_all(checkpointing, monkeypatch):
    config = llama3(num_hidden_layers=6)[0]
    setting, segments = Setting("packed", checkpointing), ((100, 400, 300),)
    extended = count(config, setting, segments, 80e9)
    monkeypatch.setattr(plan_module, "alike", lambda config: False)
    assert vars(extended) == pytest.approx(vars(count(config, setting, segments, 80e9)), rel=1e-6)


class Collectives(TorchDispatchMode):
    """Records the bytes of the whole tensors of the gathers and reductions that run under it."""

    def __init__(self):
        super().__init__()
        self.gathers, self.reductions = [], []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if "_allgather_base_" in str(function):
            self.gathers.append(args[0].untyped_storage().nbytes())
        if "_reduce_scatter_base_" in str(function):
            self.reductions.append(args[1].untyped_storage().nbytes())
        return function(*args, **(kwargs or {}))


def test_traffic_is_what_fsdp_moves():
    """Number and bytes of the collectives of a real forward and backward."""
    dist.init_process_group("fake", rank=0, world_size=4, store=FakeStore())
    try:
        model = build_model(make_config("llama"))
        inside = sum(p.numel() for block in blocks(model) for p in block.parameters())
        whole = sum(p.numel() for p in model.parameters())
        gathers, gathered, reductions, reduced = fsdp_traffic(len(blocks(model)), inside, whole)
        shard(model, "cpu", torch.bfloat16)
        with Collectives() as recorded:
            model(pack(ROWS)).sum().backward()
        assert (len(recorded.gathers), sum(recorded.gathers)) == (gathers, gathered)
        assert (len(recorded.reductions), sum(recorded.reductions)) == (reductions, reduced)
    finally:
        dist.destroy_process_group()


def test_throughput_measures_the_same_computation(model_folder, tmp_path):
    """The whole benchmark on a tiny model: train.py's steps and the textbook's. It stops if a
    figure differs."""
    data, log = write_pairs(tmp_path / "pairs.jsonl", 20), tmp_path / "log.jsonl"
    flags = ["--model", model_folder, "--data", data, "--pairs", "4", "--max_length", "96"]
    flags += ["--repeats", "1", "--log", log, "--arms", "simper", "textbook,pairs_a_forward=2"]
    flags += ["simper,ranks=2,micro_batch_tokens=150"]
    done = run_python("benchmarks/throughput.py", *flags)
    assert done.returncode == 0, done.stderr[-3000:]
    assert re.search(r"^\| textbook,pairs_a_forward=2 \| \d", done.stdout, re.MULTILINE)
    simper, textbook, ranks = map(json.loads, log.read_text().splitlines())
    assert len(simper["steps"]) == len(textbook["steps"]) == len(ranks["steps"]) == 3
    assert simper["steps"][2]["loss"] == pytest.approx(textbook["steps"][2]["loss"], rel=1e-4)
    textbook["steps"][2]["grad_norm"] *= 1.01
    with pytest.raises(ValueError, match="step 3: grad_norm"):
        check_agreement({"simper": simper, "textbook": textbook})


def test_the_random_model_has_the_shape_of_llama_3_8b():
    config = random_config("llama-3-8b:32")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert sum(p.numel() for p in model.parameters()) == 8_030_261_248  # as published
    assert config.dtype == torch.bfloat16
    for name in ("llama-3-8b:32k", "random-32"):
        with pytest.raises(InputError, match=f"{name} is neither llama-3-8b:N nor random-Nk"):
            random_config(name)


@pytest.mark.parametrize("size", ["3", "-1"])
def test_pairs_a_forward_must_divide_a_step(size, monkeypatch):
    flags = ["textbook", str(ROOT / "recipes" / "demo.yaml"), "--pairs_a_forward", size]
    monkeypatch.setattr(sys, "argv", ["baselines.py", *flags])
    with pytest.raises(InputError, match="must divide batch_size"):
        baselines_main()


@pytest.mark.parametrize("arm", ["simpo", "simper,compile", "simper ,ranks=2"])
def test_throughput_refuses_an_unknown_arm(arm, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["throughput.py", "--arms", "simper", arm])
    with pytest.raises(SystemExit):
        throughput_main()
    assert f"arm {arm} is not one of simper, textbook, trl" in capsys.readouterr().err


def llama3(**changes):
    kind, values, parameters = MODELS["meta-llama/Meta-Llama-3-8B-Instruct"]
    return AutoConfig.for_model(kind, **values | changes), parameters


@pytest.mark.parametrize(
    "main, flags, message",
    [
        (plan_main, ["recipes/demo.yaml", "--gpus", "0"], "--gpus: must be at least 1, not 0"),
        (throughput_main, ["--steps", "1"], "--steps: must be at least 2, not 1"),
        (throughput_main, ["--repeats", "0"], "--repeats: must be at least 1, not 0"),
        (study_main, ["--jobs", "0"], "--jobs: must be at least 1, not 0"),
        (baselines_main, ["dpo"], "benchmarks/baselines.py textbook RECIPE"),
        (baselines_main, [], "benchmarks/baselines.py textbook RECIPE"),
    ],
)
def test_wrong_arguments_are_no_traceback(main, flags, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["command", *flags])
    with pytest.raises(SystemExit) as error:
        main()
    assert message in f"{error.value}" + capsys.readouterr().err


def test_the_check_of_a_cpu_does_not_train_on_a_gpu(monkeypatch):
    """Nor does it hide the GPUs when it is they that are checked."""
    seen = []

    def run(command, env, **options):
        seen.append(env.get("CUDA_VISIBLE_DEVICES"))
        return SimpleNamespace(returncode=1, stderr="error: stop")

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    for device in ("cpu", "cuda"):
        args = SimpleNamespace(device=device, model="m", train_data="x.jsonl", flags=[])
        with pytest.raises(RuntimeError, match="error: stop"):
            gpu_check.run_training(args, 1)
    assert seen == ["", "3"]


@pytest.mark.parametrize("choice", ["FSDP, transformers' norms, 4,096 tokens", "AdamW on the host"])
def test_the_speed_of_a_choice_is_that_of_the_loop(choice, monkeypatch):
    """With a tiny random model on the CPU: seconds, tokens and operations of train.train itself."""
    monkeypatch.setattr(gpu_check, "random_config", lambda name: make_config("llama"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    found = gpu_check.speed(0, 2, choice, 3, "bfloat16")
    assert found["tokens"] == (4096 if "FSDP" in choice else 8192)
    assert found["pairs_per_second"] == 2 / found["seconds"] and found["peak_gb"] > 0
    rows = sample_lengths("ultrafeedback", 2).tolist()
    cut = [tuple(map(len, truncate([[0] * n for n in row], 2048, 1800))) for row in rows]
    assert found["needed"] == sum(flops(build(make_config("llama")), cut))
    assert not dist.is_initialized()


def test_plan_of_an_8b_model():
    config, parameters = llama3()
    workload = {"gpus": 8, "gpu": GPUS["a100"], "lengths": "ultrafeedback", "pairs": 60_000}
    recipe = Config(batch_size=128, micro_batch_tokens=8192)
    result = plan(replace(recipe, activation_checkpointing="true"), config, **workload)
    memory = result["memory"]
    assert memory["parameters"] == pytest.approx(4 * parameters / 8, rel=1e-3)
    assert memory["parameters"] == memory["gradients"] == memory["Adam"] / 2
    assert result["fits"] and result["bound"] == "computation"
    # At most MATMUL, less the waiting for the slowest rank, and without what is computed again.
    assert 0.2 < result["model_flops"] < 0.5
    assert result["epoch"] == result["step"] * 468
    without = plan(recipe, config, **workload)
    assert without["peak"] > 3 * result["peak"]
    assert without["compute"] < result["compute"]
    # As many tokens as leave a tenth free.
    found = plan(replace(recipe, micro_batch_tokens=0), config, **workload)
    assert 0.7 * 78e9 < sum(found["memory"].values()) < 0.9 * 78e9


def test_the_cheapest_plan_is_the_fastest_that_fits(monkeypatch):
    """One GPU may also keep AdamW on the host. If none fits, the smallest; a setting that a model
    does not take is passed by."""
    gigabytes = {"false": 90, "selective": 70, "true": 50}
    seconds = {"false": 1, "selective": 2, "true": 3}

    def planned(recipe, config, gpus, gpu, **rest):
        value, streamed = recipe.activation_checkpointing, recipe.stream_optimizer
        if value == refused:
            raise InputError("changes a product")
        size = gigabytes[value] - 30 * streamed
        found = {"memory": {"all": size}, "fits": size <= gpu.memory}
        return found | {"step": seconds[value] + 1.5 * streamed, "setting": (value, streamed)}

    def chosen(memory: float, gpus: int = 1) -> tuple:
        card = replace(GPUS["h100"], memory=memory)
        return cheapest(Config(), None, gpus, card)["setting"]

    monkeypatch.setattr(plan_module, "plan", planned)
    refused = ""
    assert chosen(100) == ("false", False) and chosen(75) == ("selective", False)
    assert chosen(65) == ("false", True) and chosen(65, gpus=2) == ("true", False)
    assert chosen(45) == ("selective", True) and chosen(45, gpus=2) == ("true", False)
    assert chosen(5) == ("true", True)
    refused = "selective"
    assert chosen(75, gpus=2) == ("true", False)


def test_plan_of_one_gpu():
    """8B does not fit, whatever is computed again; 18 bytes a parameter of 8 layers do."""
    config, parameters = llama3()
    workload = {"gpus": 1, "gpu": GPUS["h100"], "lengths": "hh", "pairs": 1600}
    result = plan(Config(batch_size=16, activation_checkpointing="true"), config, **workload)
    assert not result["fits"] and result["way"] == "FSDP"
    assert result["memory"]["parameters"] == pytest.approx(4 * parameters, rel=1e-3)
    recipe = Config(batch_size=16, stream_optimizer=True)  # but with AdamW on the host
    result = plan(recipe, config, **workload)
    assert result["way"] == "streamed" and result["fits"]
    assert result["host_memory"] == pytest.approx(12 * parameters, rel=1e-3)
    few, _ = llama3(num_hidden_layers=8)
    result = plan(Config(batch_size=16), few, **workload)
    assert result["fits"] and result["way"] == "alone"
    size = sum(p.numel() for p in build(few).parameters())
    parts = {"weights": 2, "masters": 4, "gradients": 4, "Adam": 8}
    assert all(result["memory"][name] == each * size for name, each in parts.items())


def build(config) -> PackedModel:
    with torch.device("meta"):
        return build_model(config)


@pytest.mark.parametrize("kind, how", [("gemma2", "padded rows"), ("llama", "packed")])
def test_counted_products_are_those_that_torch_counts(kind, how):
    """Of the plain model, without its head, which is worked out by hand."""
    config, segments = tiny_config(kind), ((100, 40, 30), (90, 20, 10))
    setting = Setting(how, fused=False)
    counts = count(config, setting, segments, 80e9)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    tokens = (1, sum(map(sum, segments))) if how == "packed" else (4, 140)
    with FlopCounterMode(display=False) as counter:
        ids = torch.zeros(tokens, dtype=torch.long)
        model.base_model(input_ids=ids, use_cache=False).last_hidden_state.sum().backward()
    products = counter.get_flop_counts()["Global"]
    products = {str(operator): number for operator, number in products.items()}
    expected = sum(number for operator, number in products.items() if "bmm" not in operator)
    head = (6 if how == "packed" else 8) * 320 * 64 * 100  # capped logits are computed again
    if how == "packed":  # attention's own products are counted apart
        assert counts.products == expected + head
        looks = sum((p + c) * (p + c + 1) / 2 + r * p + r * (r + 1) / 2 for p, c, r in segments)
        assert counts.attention == 3.5 * 4 * looks * 64 * 4
    else:
        assert counts.products == sum(products.values()) + head


def test_plan_of_a_model_on_a_card_that_is_too_small(tmp_path, capsys, monkeypatch):
    make_config("llama").save_pretrained(tmp_path)
    card = ["--gpu_memory", "0.01", "--tflops", "150", "--bandwidth", "0.77"]
    command = ["plan.py", str(tmp_path), "--batch_size", "2", "--activation_checkpointing", "true"]
    monkeypatch.setattr(sys, "argv", [*command, *card])
    plan_main()
    shown = capsys.readouterr().out
    assert "GB of 0: DOES NOT FIT\nwhat fits: " in shown and "a step" not in shown


def test_what_is_not_trained_stays_in_float32():
    """The parts of a multimodal model that are not for text."""
    config = tiny_config("qwen2_vl")
    result = plan(Config(batch_size=4), config, 1, GPUS["4090"], "hh", 16)
    model = build(config)
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    assert result["memory"]["other parts"] == 4 * frozen > 0


def test_plan_refuses_more_gpus_than_pairs():
    config, _ = llama3(num_hidden_layers=1)
    recipe = Config(batch_size=128, micro_batch_tokens=4096)
    with pytest.raises(InputError, match="128 pairs cannot be spread over 512 ranks"):
        plan(recipe, config, 512, GPUS["h100"], "ultrafeedback", 60_000)


def test_sampled_lengths_have_the_stated_means():
    assert sample_lengths("hh", 100_000).mean(axis=0) == pytest.approx([125, 40, 50], rel=0.02)


PLAN_PAGE = (ROOT / "docs" / "plan.md").read_text()
PUBLISHED = [
    (replace(GPUS["h100"], bandwidth=2.4e12), 1, 5762),
    (replace(GPUS["h100"], bandwidth=2.4e12), plan_module.COMPILED, 6667),
    (GPUS["a100"], 1, 2904),
    (GPUS["a100"], 1, 2973),
]


@pytest.mark.parametrize("gpu, compiled, tokens_per_second", PUBLISHED)
def test_plan_agrees_with_torchtitan(gpu, compiled, tokens_per_second):
    """Tokens/s a GPU of Llama-3-8B with two sequences of 8,192: figures of pytorch/torchtitan, of
    its benchmarks/llama3_h100_202412_torchtitan.md (whose cards have 2.4 TB/s) and
    docs/performance.md. Two responses of 4,094 to a prompt of 4 tokens have half of such a
    sequence's attention."""
    config, parameters = llama3()
    rows = ((4, 4094, 4094),) * 2
    counts = count(config, Setting("packed", "selective"), rows, gpu.memory)
    looks = 8192**2 / 2 / plan_module.attended(rows[:1]).sum()
    shards, gathered = plan_module.SHARD_BYTES, plan_module.GATHERED_BYTES
    copied = (shards / 8 + gathered + 40 / 8) * parameters  # 40: AdamW's
    slower = plan_module.SEVERAL.get(gpu.name, plan_module.SEVERAL_OTHERS)
    seconds = plan_module.seconds(counts, 1, looks, copied, gpu) * slower / compiled
    assert 2 * 8192 / seconds == pytest.approx(tokens_per_second, rel=0.15)


# docs/notes/speed.md and docs/notes/gpu.md: one GPU with FSDP and transformers' norms, 32 pairs of
# UltraFeedback's lengths in micro-batches of 4,096 tokens; AdamW's time included.
RUNS = [("h100", 8, "false", 32 / 33.9 + 0.03, 57.3), ("h200", 8, "false", 32 / 39.9 + 0.03, 57.3)]
RUNS += [("h200", 32, "true", 3.4, 137.0)]


@pytest.mark.parametrize("gpu, layers, checkpointing, step, gigabytes", RUNS)
def test_plan_agrees_with_runs(gpu, layers, checkpointing, step, gigabytes):
    config, _ = llama3(num_hidden_layers=layers)
    recipe = Config(batch_size=32, micro_batch_tokens=4096, activation_checkpointing=checkpointing)
    workload = {"gpus": 1, "gpu": GPUS[gpu], "lengths": "ultrafeedback", "pairs": 60_000}
    result = plan(recipe, config, **workload, fused=False, way="FSDP")
    assert result["step"] == pytest.approx(step, rel=0.15)
    assert sum(result["memory"].values()) / 1e9 == pytest.approx(gigabytes, rel=0.05)


GPU_PAGE = (ROOT / "docs" / "notes" / "gpu.md").read_text()
MEASURED = re.findall(
    r"^\| ([\w.-]+) \| (train.py.*?) \| [\d.]+ \| ([\d.]+) \|", GPU_PAGE, re.MULTILINE
)


@pytest.mark.parametrize("recipe, arm, gigabytes", MEASURED)
def test_plan_agrees_with_fake_cuda(recipe, arm, gigabytes, monkeypatch):
    """Memory of a GPU, in the same step."""
    monkeypatch.setattr(plan_module, "STEPS", 1)
    flags = ["--activation_checkpointing", "true"] if "checkpointing" in arm else []
    by_memory = "by memory" in arm
    flags += [] if by_memory else ["--micro_batch_tokens", "4096"]
    config = parse_args([str(ROOT / "recipes" / f"{recipe}.yaml"), *flags])
    kind, values, _ = MODELS[config.model]
    lengths = "hh" if recipe == "pythia-2.8b-hh" else "ultrafeedback"
    shape = AutoConfig.for_model(kind, **values)
    memory = plan(config, shape, 8, GPUS["a100"], lengths, 60_000)["memory"]
    assert not by_memory or memory["gathered"] > 2 * 8.03e9  # weights stay so for a step
    assert sum(memory.values()) / 1e9 == pytest.approx(float(gigabytes), rel=0.05)


def test_every_recipe_has_its_row():
    assert {recipe for recipe, _, _ in MEASURED} == {path.stem for path in RECIPES} - {"demo"}
    assert len(MEASURED) == 11


@pytest.mark.skipif(not torch.version.cuda, reason="needs a CUDA build of torch")
@pytest.mark.parametrize("arm", ["simper", "textbook"])
def test_a_step_on_fake_cuda(arm, tmp_path):
    """The operations of rank 0's pairs, worked out by hand, and the host's waits."""
    if arm == "textbook" and torch.__version__ < "2.13":
        pytest.skip("this torch does not count attention with fewer key-value heads")
    make_config("llama").save_pretrained(tmp_path)
    recipe = str(ROOT / "recipes" / "llama-3-8b-instruct.yaml")
    command = [sys.executable, str(ROOT / "benchmarks" / "fake_gpu.py"), recipe, "--arm", arm]
    command += ["--ranks", "4", "--model", str(tmp_path), "--micro_batch_tokens", "4096"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    figures = re.search(r"([\d.e+-]+) Tflop, .*, (\d+) host waits", done.stdout)
    config = parse_args([recipe, "--max_steps", "2", "--micro_batch_tokens", "4096"])
    rows = sample_lengths("ultrafeedback", 128).tolist()
    pairs = [tuple(map(len, truncate([[0] * n for n in row], 2048, 1800))) for row in rows]
    weights, head, width, layers = (
        2 * (32 * 32 * 2 + 2 * 32 * 16 + 3 * 32 * 48),
        320 * 32,
        32,
        2,
    )
    if arm == "simper":
        _, second = Schedule(np.array(pairs).sum(axis=1), config, 4)
        mine = [pairs[i] for shares in second for i in shares[0]]
        tokens, responses = sum(map(sum, mine)), sum(c + r for _, c, r in mine)
        attended = sum((p + c) ** 2 + r * (p + r) for p, c, r in mine)
        expected = 6 * (weights * tokens + head * responses)
        expected += (1 + 2.5) * 4 * attended * width * layers
    else:  # 2 pairs a forward, padded; the blocks' forward runs twice, but for its last product
        batches = [pairs[i : i + 2] for i in range(0, 32, 2)]
        longest = [max(p + max(c, r) for p, c, r in batch) for batch in batches]
        again = weights - layers * 32 * 48
        expected = sum(4 * n * (6 * weights + 2 * again + 6 * head) for n in longest)
        expected += sum((2 + 2.5) * 4 * 4 * n * n * width * layers for n in longest)
    assert float(figures[1]) * 1e12 == pytest.approx(expected, rel=1e-3)
    assert int(figures[2]) == (1 if arm == "simper" else 0)


PLANNED = re.findall(r"^\| ([\w.-]+) \| `(.*?)` \| (.*) \|$", PLAN_PAGE, re.MULTILINE)


@pytest.mark.parametrize(
    "recipe, flags, cells", PLANNED, ids=lambda value: value if " | " not in value else ""
)
def test_plan_of_the_docs(recipe, flags, cells, tmp_path, capsys, monkeypatch):
    path = str(ROOT / "recipes" / f"{recipe}.yaml")
    kind, values, _ = MODELS[parse_args([path]).model]
    AutoConfig.for_model(kind, **values).save_pretrained(tmp_path)
    arguments = [path, *flags.split(), "--model", str(tmp_path), "--row"]
    arguments += ["--lengths", "hh", "--pairs", "160000"] if recipe == "pythia-2.8b-hh" else []
    monkeypatch.setattr(sys, "argv", ["plan.py", *arguments])
    plan_main()
    assert capsys.readouterr().out.strip() == cells


def test_the_docs_plan_every_recipe():
    assert {recipe for recipe, _, _ in PLANNED} == {path.stem for path in RECIPES} - {"demo"}
    assert len(PLANNED) == 7
