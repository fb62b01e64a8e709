"""What training computes: one gradient under any split, exact metrics, whole trajectories against
the plain implementation, learning, the schedule, and the rehearsal before it."""

import copy
import gc
import inspect
import itertools
import json
import math
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from conftest import (
    GQA,
    ROOT,
    TINY,
    as_flags,
    gradients,
    interrupt,
    make_model,
    make_tokenizer,
    plain_logps,
    relative_difference,
    run,
    run_python,
    run_ranks,
    timeless,
)
from safetensors.torch import load_file

import data
import train
from data import DataSet, load_data, step_indices
from model import blocks
from runtime import checks, processes
from runtime.errors import InputError


def load(values: dict, name: str = "train_data") -> DataSet:
    lengths = values["max_length"], values["max_prompt_length"]
    return load_data(values[name], make_tokenizer(), *lengths)


# ---- One gradient --------------------------------------------------------------------------------


def plain_gradient(values: dict, indices: list[int]) -> tuple[dict, list[float]]:
    """Gradient and per-pair losses of a batch in float64, from separate plain forwards: written
    from the paper."""
    model, losses = make_model("llama").double(), []
    for row in load(values).rows.select(indices):
        responses = row["responses"]
        chosen, rejected = (plain_logps(model, row["prompt"], ids) for ids in responses)
        losses.append(torch.exp(rejected.mean()) - torch.exp(chosen.mean()))
    (sum(losses) / len(losses)).backward()
    return {name: p.grad for name, p in model.named_parameters()}, [loss.item() for loss in losses]


def test_gradient_equals_plain_float64_forwards(base, three_steps):
    folder, lines = three_steps["one"]
    expected, losses = plain_gradient(base, step_indices(26, 8, seed=42, step=0))
    found = gradients(folder)
    assert relative_difference(found, expected) < 1e-5
    first = next(line for line in lines if line["step"] == 1)
    assert first["loss"] == pytest.approx(sum(losses) / 8, abs=1e-6)
    norm = sum(tensor.square().sum() for tensor in expected.values()).sqrt().item()
    assert first["grad_norm"] == pytest.approx(norm, rel=1e-5)


def test_a_step_of_fewer_rows_is_their_mean(base, tmp_path, monkeypatch):
    """As where a fork keeps the last rows of an epoch: by plain float64 forwards."""
    monkeypatch.setattr(data, "step_indices", lambda count, size, seed, step: [3, 5, 7])
    (line,) = run(base | {"eval_data": "", "max_steps": 1}, tmp_path / "run")
    expected, losses = plain_gradient(base, [3, 5, 7])
    norm = sum(tensor.square().sum() for tensor in expected.values()).sqrt().item()
    assert line["grad_norm"] == pytest.approx(norm, rel=1e-5)
    assert line["loss"] == pytest.approx(sum(losses) / 3, abs=1e-6)


def test_evaluations_are_not_in_training_mode(base, tmp_path, monkeypatch):
    """Nor is the reference: what a fork does in training alone is not in final/."""
    modes, forward = [], train.PackedModel.forward

    def noted(self, batch):
        modes.append((torch.is_grad_enabled(), self.training))
        return forward(self, batch)

    monkeypatch.setattr(train.PackedModel, "forward", noted)
    run(base | {"max_steps": 2, "loss": "dpo"}, tmp_path / "run")
    last = modes[modes.index((False, False)) :]  # after the checks at the start
    assert {*last} == {(False, False), (True, True)} and last[-1] == (False, False)


def test_metrics_may_be_sharded_tensors(group):
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    shards = torch.distributed.tensor.distribute_tensor(
        torch.tensor([3.0, 4.0]), mesh, [torch.distributed.tensor.Shard(0)]
    )
    found = processes.max_over_ranks(torch.device("cpu"), shards.norm(), 2.0)
    assert found == [5.0, 2.0]


@pytest.mark.parametrize("other", ["split", "ranks", "replicas"])
def test_gradient_is_the_same_for_any_split(three_steps, other):
    found, expected = (gradients(three_steps[name][0]) for name in (other, "one"))
    assert relative_difference(found, expected) < 1e-6


@pytest.mark.parametrize("other", ["split", "ranks", "replicas"])
def test_metrics_are_the_same_for_any_split(three_steps, other):
    ours, theirs = (timeless(three_steps[name][1]) for name in ("one", other))
    assert [line["step"] for line in ours] == [0, 1, 2, 3, 3]  # evaluated before and after
    assert len(ours) == len(theirs)
    for mine, its in zip(ours, theirs):
        assert mine == pytest.approx(its, rel=1e-5, abs=1e-6)


def test_small_learning_rate_moves_float32_weights(base, tmp_path):
    run(base | {"learning_rate": 5e-7, "max_steps": 3}, tmp_path / "run")
    before = load_file(Path(base["model"]) / "model.safetensors")
    after = load_file(tmp_path / "run" / "final" / "model.safetensors")
    for name in before:
        moved = (after[name] != before[name]).float().mean()
        # Many tokens of the vocabulary do not occur.
        assert moved > (0.1 if "embed" in name else 0.5), name


def test_the_model_has_the_dtype_of_the_run(base, tmp_path):
    losses = {}
    for dtype in ("float32", "bfloat16"):
        line, *_ = run(base | {"max_steps": 1, "eval_data": "", "dtype": dtype}, tmp_path / dtype)
        losses[dtype] = line["loss"]
        tensors = load_file(tmp_path / dtype / "final" / "model.safetensors")
        assert {tensor.dtype for tensor in tensors.values()} == {getattr(torch, dtype)}
    assert losses["bfloat16"] != losses["float32"] == pytest.approx(losses["bfloat16"], abs=0.01)


def test_flags_reach_the_model(base, tmp_path, monkeypatch):
    """And the check of its forward sees the longest sequence, which here is a held-out one."""
    seen, packed, load_model, pack = [], [], train.load_model, checks.pack

    def load_and_keep(*args, **options):
        seen.append(load_model(*args, **options))
        given = inspect.signature(load_model).bind(*args, **options).arguments
        assert given["replicas"] == 1 and given["dtype"] == torch.bfloat16
        return seen[0]

    def compiled(model):
        assert model is seen[0]
        raise InputError("compiled")

    monkeypatch.setattr(train, "load_model", load_and_keep)
    monkeypatch.setattr(train, "compile_blocks", compiled)
    monkeypatch.setattr(checks, "pack", lambda rows: packed.extend(rows) or pack(rows))
    heldout = tmp_path / "heldout.jsonl"
    heldout.write_text(json.dumps({"prompt": "a", "chosen": "b", "rejected": "0123" * 50}))
    flags = {
        "max_length": 240,
        "dtype": "bfloat16",
        "activation_checkpointing": "true",
        "compile": True,
    }
    values = base | flags | {"eval_data": str(heldout)}
    with pytest.raises(InputError, match="compiled"):
        run(values, tmp_path / "run")
    (model,) = seen
    assert model.dtype == torch.bfloat16
    assert all(block.gradient_checkpointing for block in blocks(model))
    ((prompt, rejected),) = [
        (row["prompt"], row["responses"][1]) for row in load(values, "eval_data").rows
    ]
    checked = max(len(prompt) + max(map(len, responses)) for prompt, *responses in packed)
    assert load(values).longest + 5 < checked
    assert len(prompt) + len(rejected) - 5 <= checked <= len(prompt) + len(rejected)


def test_nonfinite_gradient_stops_before_the_optimizer_moves(base, tmp_path, monkeypatch):
    rows, check_forward = step_indices(26, 8, seed=42, step=0), train.choose_forward

    def check_and_break(model, *data_sets):
        check_forward(model, *data_sets)
        with torch.no_grad():  # a token of one pair only
            embedding = model.model.get_input_embeddings().weight
            embedding[make_tokenizer()("|").input_ids] = float("nan")

    monkeypatch.setattr(train, "choose_forward", check_and_break)
    lines = [json.loads(line) for line in Path(base["train_data"]).read_text().splitlines()]
    lines[rows[3]]["rejected"] = "a|b"
    source = tmp_path / "train.jsonl"
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    values = base | {"train_data": str(source), "eval_data": "", "save_every": 1}
    with pytest.raises(FloatingPointError, match=rf"step 1: .* row {rows[3]}\b"):
        run(values, tmp_path / "run")
    output = tmp_path / "run"
    assert not (output / "checkpoints").exists() and not (output / "final").exists()


# ---- Exact metrics -------------------------------------------------------------------------------


def test_metrics_are_exact_means(base, three_steps):
    """Every held-out metric of the untrained model, from plain forwards."""
    model, rows = make_model("llama"), load(base, "eval_data").rows
    means = []
    with torch.no_grad():
        for row in rows:
            both = [plain_logps(model, row["prompt"], ids) for ids in row["responses"]]
            means.append([logps.double().mean() for logps in both])
    chosen, rejected = torch.tensor(means).unbind(dim=1)
    lengths = torch.tensor([[len(ids) for ids in row["responses"]] for row in rows]).double()
    values = {
        "loss": rejected.exp() - chosen.exp(),
        "inverse_perplexity/chosen": chosen.exp(),
        "inverse_perplexity/rejected": rejected.exp(),
        "inverse_perplexity/margin": chosen.exp() - rejected.exp(),
        "logps/chosen": chosen,
        "logps/rejected": rejected,
        "logps/margin": chosen - rejected,
        "accuracy": (chosen > rejected).double(),
        "length/chosen": lengths[:, 0],
        "length/rejected": lengths[:, 1],
        # SimPER's weights are the inverse perplexities.
        "gradient_weight/chosen": chosen.exp(),
        "gradient_weight/rejected": rejected.exp(),
    }
    expected = {"step": 0, "eval/pairs": 11}
    for name, of_pairs in values.items():
        expected[f"eval/{name}"] = of_pairs.mean().item()
        expected[f"standard_error/{name}"] = of_pairs.std().item() / math.sqrt(11)
    assert three_steps["one"][1][0] == pytest.approx(expected, abs=1e-6)
    assert 0 < expected["eval/accuracy"] < 1  # the case tells something


def test_a_line_of_training(base, tmp_path, monkeypatch):
    """Of two steps, the last of one: epoch, rates, and the gradient weights that SimPER has by its
    closed form. Every look at the clock is 20 s later. Where something follows that is not the
    step's (here the end), the GPU is waited for, 20 s, while it does the optimizer's work."""
    clock = itertools.count(0, 20)
    monkeypatch.setattr(processes, "wait_for", lambda device: next(clock))
    monkeypatch.setattr(train, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    values = base | {"max_steps": 7, "log_every": 2, "eval_data": "", "micro_batch_tokens": 250}
    lines = run(values, tmp_path / "run")
    lengths = load(base).rows["lengths"]
    assert [line["step"] for line in lines] == [2, 4, 6, 7]
    for line, steps in zip(lines, ([0, 1], [2, 3], [4, 5], [6])):
        assert line["epoch"] == line["step"] / 3  # 26 pairs fill 3 batches of 8
        rate = 1e-3 * 0.5 * (1 + math.cos(math.pi * (steps[-1] - 1) / 6))  # after one of warm-up
        assert line["learning_rate"] == pytest.approx(rate, rel=1e-12)
        for side in ("chosen", "rejected"):
            weight = line[f"inverse_perplexity/{side}"]
            assert line[f"gradient_weight/{side}"] == pytest.approx(weight, rel=1e-5)
        indices = [i for step in steps for i in step_indices(26, 8, 42, step)]
        seconds = 20 + 20 * (6 in steps)
        assert line["pairs_per_second"] == pytest.approx(8 * len(steps) / seconds)
        tokens = sum(sum(lengths[i]) for i in indices)
        assert line["tokens_per_second"] == pytest.approx(tokens / seconds)


def test_a_tie_is_no_accuracy():
    logps, losses = torch.tensor([-1.0, -1.0]), torch.zeros(1)
    metrics = train.pair_metrics(logps, losses, logps, data.pack([([1], [2], [3])]))
    assert metrics["accuracy"].tolist() == [False]


def test_metrics_of_several_responses_and_of_one():
    """Of two rows: chosen is the first response, rejected the mean of the others."""
    batch = data.pack([([1], [2], [3, 4], [5]), ([1, 2], [3, 4], [5], [6])])
    logps = torch.tensor([-2.0, -1.0, -2.0, -4.0, -1.0, -2.0, -0.5, -3.0])
    grads = torch.arange(8.0)
    metrics = train.pair_metrics(logps, torch.tensor([0.25, 0.5]), grads, batch)
    e = math.exp
    expected = {
        "loss": [0.25, 0.5],
        "logps/chosen": [-2.0, -1.5],
        "logps/rejected": [-2.75, -1.75],
        "logps/margin": [0.75, 0.25],
        "inverse_perplexity/chosen": [e(-2), e(-1.5)],
        "inverse_perplexity/rejected": [(e(-1.5) + e(-4)) / 2, (e(-0.5) + e(-3)) / 2],
        "accuracy": [0.5, 0.5],
        "length/chosen": [1, 2],
        "length/rejected": [1.5, 1],
        "gradient_weight/chosen": [0, -9],
        "gradient_weight/rejected": [3, 6.5],
    }
    expected["inverse_perplexity/margin"] = [
        expected["inverse_perplexity/chosen"][row] - expected["inverse_perplexity/rejected"][row]
        for row in range(2)
    ]
    assert metrics.keys() == expected.keys()
    for name, values in expected.items():
        assert metrics[name].tolist() == pytest.approx(values), name
    alone = train.pair_metrics(
        torch.tensor([-2.0, -1.0]), torch.zeros(1), torch.ones(2), data.pack([([1], [2, 3])])
    )
    assert {name: values.tolist() for name, values in alone.items()} == {
        "loss": [0],
        "logps/chosen": [-1.5],
        "inverse_perplexity/chosen": [pytest.approx(e(-1.5))],
        "length/chosen": [2],
        "gradient_weight/chosen": [-2],
    }


@pytest.mark.parametrize(
    "changes, trained, evaluated",
    [
        ({"save_every": 2, "eval_every": 3}, [2, 3, 4, 6, 7], [0, 3, 6, 7]),
        ({"save_every": 0, "eval_every": 3}, [3, 6, 7], [0, 3, 6, 7]),
        ({"save_every": 2, "eval_data": ""}, [2, 4, 6, 7], []),
        ({"save_every": 0, "eval_data": ""}, [7], []),
    ],
)
def test_lines_end_before_a_save_and_an_evaluation(base, tmp_path, changes, trained, evaluated):
    lines = run(base | {"max_steps": 7, "log_every": 10} | changes, tmp_path / "run")
    assert [line["step"] for line in lines if "loss" in line] == trained
    assert [line["step"] for line in lines if "eval/loss" in line] == evaluated


def test_the_change_is_paired_over_all_ranks(base, tmp_path, capsys):
    """The interval of each change in the last table: of two processes that have six and five of the
    11 held-out pairs, against plain float64 forwards of the models before and after. One pair fewer
    than ten has none."""
    values = base | {"max_steps": 3, "save_every": 0}
    done = run_python(ROOT / "train.py", *as_flags(values, tmp_path / "run"), ranks=2)
    assert done.returncode == 0, done.stderr[-3000:]
    found, rows = {}, load(values, "eval_data").rows
    folders = {"before": Path(base["model"]), "after": tmp_path / "run" / "final"}
    for when, folder in folders.items():
        model = transformers.AutoModelForCausalLM.from_pretrained(folder).double()
        means = [
            [plain_logps(model, row["prompt"], ids).mean().item() for ids in row["responses"]]
            for row in rows
        ]
        chosen, rejected = torch.tensor(means, dtype=torch.float64).unbind(dim=1)
        found[when] = {
            "accuracy": (chosen > rejected).double(),
            "inverse_perplexity/chosen": chosen.exp(),
            "inverse_perplexity/rejected": rejected.exp(),
            "loss": rejected.exp() - chosen.exp(),
        }
    number = r"([-+]?\d+\.\d+)"
    table = done.stdout[done.stdout.index("11 held-out pairs") :]
    assert table.splitlines()[0].endswith("change [95 %]")
    for name, before in found["before"].items():
        change = found["after"][name] - before
        expected = [before.mean(), found["after"][name].mean(), change.mean()]
        error = 2.2281 * change.std() / math.sqrt(11)  # Student's t, ten degrees of freedom
        interval = rf"   {number} \[{number}, {number}\]" if error > 0 else ""
        line = rf"^{name} +{number}  → +{number}{interval}$"
        shown = [float(x) for x in re.search(line, table, re.MULTILINE).groups()]
        expected = [*expected, change.mean() - error, change.mean() + error][: len(shown)]
        assert shown == pytest.approx([float(x) for x in expected], abs=6e-5), name
    assert "[" in table
    few = tmp_path / "nine.jsonl"
    few.write_text("".join(Path(values["eval_data"]).open().readlines()[:9]))
    lines = run(values | {"eval_data": str(few), "max_steps": 1}, tmp_path / "few")
    assert "9 held-out pairs" in (said := capsys.readouterr().out) and "95 %" not in said
    assert [line["eval/pairs"] for line in lines if "eval/loss" in line] == [9, 9]


def test_log_every_reports_means_of_all_its_steps(base, three_steps, tmp_path):
    each = [line for line in three_steps["one"][1] if "loss" in line]
    lines = run(base | {"max_steps": 3, "log_every": 3}, tmp_path / "run")
    (line,) = (line for line in lines if "loss" in line)
    means = {name for name in line if "/" in name} | {"loss", "accuracy"}
    assert len(means) == 12
    for name in means:
        assert line[name] == pytest.approx(sum(other[name] for other in each) / 3, rel=1e-9)


def test_metrics_wait_for_their_line_without_the_graph_of_their_step(base, tmp_path, monkeypatch):
    rows, sums_over_ranks = [], train.sums_over_ranks
    monkeypatch.setattr(train, "sums_over_ranks", lambda r: rows.extend(r) or sums_over_ranks(r))
    run(base | {"max_steps": 1, "log_every": 1}, tmp_path / "run")
    assert rows and not any(values.requires_grad for row in rows for values in row.values())


def test_peak_memory_is_of_this_process_alone():
    """The kernel's ru_maxrss counts the process that started it, too."""
    block = bytearray(2**31)
    del block
    code = "import torch\nfrom runtime import processes\nones = torch.ones(2**26)  # 0.27 GB\n"
    code += "print(processes.peak_memory(torch.device('cpu'))['peak_memory_gb'])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert 0.27 < float(done.stdout) < 2


def test_peak_memory_of_a_gpu_is_what_is_allocated_and_what_is_reserved(monkeypatch):
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 3 * 10**9)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: 4 * 10**9)
    found = processes.peak_memory(torch.device("cuda", 0))
    assert found == {"peak_memory_gb": 3, "peak_reserved_gb": 4}


def test_memory_is_the_most_of_any_rank(base, tmp_path, monkeypatch):
    most = lambda _, *values, beside: ([*map(float, values[:2]), 7.0], beside.tolist())  # noqa: E731
    monkeypatch.setattr(processes, "max_over_ranks", most)
    (line,) = run(base | {"max_steps": 1, "eval_data": ""}, tmp_path / "run")
    assert line["peak_memory_gb"] == 7


# ---- Whole trajectories against the textbook's step ----------------------------------------------


def plain_objective(name: str, m: torch.Tensor, s: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
    """Written from the papers: m mean and s summed log-probs, r the reference's sums, each (2,
    pairs), chosen and rejected."""
    if name == "simper":
        return -torch.exp(m[0]) + torch.exp(m[1])
    if name == "dpo":
        return torch.log1p(torch.exp(-0.1 * ((s[0] - r[0]) - (s[1] - r[1]))))
    if name == "simpo":
        return torch.log1p(torch.exp(-(2.5 * m[0] - 2.5 * m[1] - 0.5)))
    raise ValueError(name)


def padded_logps(model, rows: dict[str, list]) -> tuple[torch.Tensor, torch.Tensor]:
    """(mean, summed) log-probs of the responses, each (2, pairs), from one padded batch."""
    sequences = [(p, ys[k]) for k in (0, 1) for p, ys in zip(rows["prompt"], rows["responses"])]
    longest = max(len(p) + len(y) for p, y in sequences)
    ids, labels, mask = (torch.zeros(len(sequences), longest, dtype=torch.long) for _ in range(3))
    for row, (p, y) in enumerate(sequences):
        ids[row, : len(p) + len(y)] = torch.tensor(p + y)
        mask[row, : len(p) + len(y)] = 1
        labels[row, len(p) : len(p) + len(y)] = 1
    logits = model(ids, attention_mask=mask).logits[:, :-1]
    logps = logits.log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
    sums, counts = (logps * labels[:, 1:]).sum(1), labels.sum(1)
    return (sums / counts).view(2, -1), sums.view(2, -1)


def plain_trajectory(
    values: dict, name: str, steps: int, micro_batch: int = 4, model=None
) -> tuple[list[float], dict]:
    """Losses of every step, and the last weights, of the step that the authors' code takes, in
    float64: chosen and rejected padded into one batch, log_softmax, gather, AdamW, cosine schedule
    with warm-up, clipping, accumulation."""
    model, pairs = (model or make_model("llama")).double(), load(values).rows
    start = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=values["learning_rate"], betas=(0.9, 0.999), weight_decay=0.0
    )
    warmup = math.ceil(steps / 10)
    schedule = transformers.get_cosine_schedule_with_warmup(optimizer, warmup, steps)
    losses = []
    for step in range(steps):
        indices, total = step_indices(len(pairs), values["batch_size"], 42, step), 0.0
        for begin in range(0, len(indices), micro_batch):
            rows = pairs[indices[begin : begin + micro_batch]]
            with torch.no_grad():
                _, reference = padded_logps(start, rows)
            means = plain_objective(name, *padded_logps(model, rows), reference).mean()
            loss = means * micro_batch / len(indices)
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), values["max_grad_norm"])
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses, model.state_dict()


@pytest.mark.parametrize(
    "name, arguments", [("simper", ""), ("dpo", ""), ("simpo", "beta=2.5, gamma=0.5")]
)
def test_twenty_steps_equal_the_plain_implementation(base, tmp_path, name, arguments):
    values = base | {"max_steps": 20, "max_grad_norm": 0.02, "micro_batch_tokens": 250}
    values |= {"eval_data": "", "save_every": 0}
    lines = run(values | {"loss": name, "loss_args": arguments}, tmp_path / "run")
    losses, weights = plain_trajectory(values, name, steps=20)
    assert [line["loss"] for line in lines] == pytest.approx(losses, abs=1e-5)
    assert max(losses) - min(losses) > 0.01  # the model has moved
    assert any(line["grad_norm"] > 0.02 for line in lines)  # and gradients were clipped
    trained = load_file(tmp_path / "run" / "final" / "model.safetensors")
    start = make_model("llama").state_dict()
    moved = relative_difference({k: start[k] for k in trained}, trained)
    assert relative_difference(trained, {k: weights[k].float() for k in trained}) < 1e-3 * moved


def test_a_model_that_cannot_be_packed(base, tmp_path):
    """Gemma 2 caps its attention's scores. Ten steps equal the plain implementation, in few
    micro-batches and in many, on two ranks, and across a resume."""
    config = transformers.AutoConfig.for_model("gemma2", **TINY | GQA)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.15)
    folder = tmp_path / "gemma2"
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    values = base | {"model": str(folder), "max_steps": 10, "save_every": 1, "keep_checkpoints": 0}
    values |= {"eval_data": base["eval_data"], "eval_every": 5}
    one = run(values | {"micro_batch_tokens": 2000}, tmp_path / "one")
    split = run(values | {"micro_batch_tokens": 200}, tmp_path / "split")
    interrupt(tmp_path / "one", tmp_path / "resumed")
    resumed = run(values | {"micro_batch_tokens": 2000}, tmp_path / "resumed")
    ranks = run_ranks(values | {"micro_batch_tokens": 300}, tmp_path / "ranks")
    losses, weights = plain_trajectory(values, "simper", 10, model=model.eval())
    trained = load_file(tmp_path / "one" / "final" / "model.safetensors")
    expected = {name: weights[name].float() for name in trained}
    assert relative_difference(trained, expected) < 1e-5
    for lines in (one, split, ranks, resumed):
        trained_lines = [line for line in lines if "learning_rate" in line]
        assert [line["loss"] for line in trained_lines] == pytest.approx(losses, abs=1e-5)
        for line, other in zip(lines, one, strict=True):
            assert timeless([line])[0] == pytest.approx(timeless([other])[0], rel=1e-4, abs=1e-6)
    for other in ("split", "ranks"):
        found, first = gradients(tmp_path / other), gradients(tmp_path / "one")
        assert relative_difference(found, first) < 1e-6


def test_a_tiny_model_learns_its_pairs(base, tmp_path):
    values = base | {"eval_data": base["train_data"], "num_epochs": 20, "learning_rate": 3e-3}
    values |= {"max_grad_norm": 1.0, "log_every": 60, "eval_every": 0}
    first, last = (line for line in run(values, tmp_path / "run") if "eval/loss" in line)
    perplexity = "eval/inverse_perplexity"
    assert first["eval/accuracy"] < 0.8 and last["eval/accuracy"] > 0.95
    assert last[f"{perplexity}/chosen"] > 2 * first[f"{perplexity}/chosen"]
    assert last[f"{perplexity}/rejected"] < 0.5 * first[f"{perplexity}/rejected"]


@pytest.mark.parametrize("steps, warmup", [(27, 3), (24, 3), (20, 2), (3, 1)])
def test_learning_rate_is_transformers_cosine_schedule(steps, warmup):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    schedule = transformers.get_cosine_schedule_with_warmup(optimizer, warmup, steps)
    for step in range(steps):
        expected = schedule.get_last_lr()[0]
        assert train.share_of_peak(step, steps, 0.1) == pytest.approx(expected, abs=1e-12)
        optimizer.step()
        schedule.step()


# ---- The rehearsal -------------------------------------------------------------------------------


def test_the_costliest_micro_batches_come_first(base, tmp_path, monkeypatch):
    """With a pair of a long prompt, and one of fewer tokens but longer responses, whose log-probs
    take more memory."""
    rows = [{"prompt": "a" * n, "chosen": "b" * n, "rejected": "c" * n} for n in (4, 5, 6, 7)]
    rows += [{"prompt": "a" * 90, "chosen": "b", "rejected": "c"}]
    rows += [{"prompt": "a", "chosen": "b" * 30, "rejected": "c" * 29}]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = base | {"train_data": str(tmp_path / "pairs.jsonl"), "eval_data": ""}
    values |= {"batch_size": 6, "num_epochs": 2, "max_length": 120, "max_prompt_length": 100}
    values["micro_batch_tokens"] = 105
    seen, pack = [], data.pack

    def watch(rows):
        batch = pack(rows)
        seen.append((len(batch.input_ids), len(batch.targets)))
        return batch

    monkeypatch.setattr(data, "pack", watch)
    lines = run(values, tmp_path / "run")
    rehearsed, steps = seen[:2], seen[2:]
    assert {max(steps), max(steps, key=lambda size: size[1])} == {*rehearsed}
    assert len({*rehearsed}) == 2 and len(steps) > 4
    # The first step's learning rate is 0: had the rehearsal left a gradient behind, the norm would
    # be another.
    plain = run(values | {"micro_batch_tokens": 2000}, tmp_path / "plain")
    assert lines[0]["grad_norm"] == pytest.approx(plain[0]["grad_norm"], rel=1e-5)


@pytest.mark.parametrize("tokens, gradients", [(2000, False), (200, True)])
def test_the_rehearsal_has_in_place_what_a_step_has(base, tmp_path, monkeypatch, tokens, gradients):
    """As much as Adam's two moments and, where a step has several micro-batches, the gradients of
    earlier ones."""
    seen, rehearse = [], train.rehearse

    def others(model) -> dict[int, int]:
        """The memory of all tensors that are neither parameters nor gradients: {address: bytes}."""
        own = [t for p in model.parameters() for t in (p, p.grad) if t is not None]
        found = [t for t in gc.get_objects() if type(t) is torch.Tensor and t.device.type == "cpu"]
        sizes = {t.data_ptr(): t.untyped_storage().nbytes() for t in found}
        return {key: size for key, size in sizes.items() if key not in {t.data_ptr() for t in own}}

    def watch(model, *rest):
        def look(*_):
            parameters = [*model.parameters()]
            new = sum(size for key, size in others(model).items() if key not in before)
            moments = new >= 8 * sum(p.numel() for p in parameters)
            seen.append((moments, all(p.grad is not None for p in parameters)))

        before, hook = others(model), model.register_forward_pre_hook(look)
        rehearse(model, *rest)
        hook.remove()

    monkeypatch.setattr(train, "rehearse", watch)
    run(base | {"max_steps": 1, "eval_data": "", "micro_batch_tokens": tokens}, tmp_path / "run")
    assert seen[0] == (True, gradients)


def cuda_out_of_memory():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


@pytest.mark.parametrize(
    "fail", [cuda_out_of_memory, lambda: torch.empty(2**60)], ids=["cuda", "cpu"]
)
def test_too_little_memory_says_what_to_lower(base, tmp_path, monkeypatch, fail):
    monkeypatch.setattr(data, "pack", lambda rows: fail())
    with pytest.raises(RuntimeError) as caught:
        run(base | {"eval_data": ""}, tmp_path / "run")
    (note,) = caught.value.__notes__
    assert re.search(
        r"largest micro-batch, \d+ tokens on a rank, .* "
        r"lower --micro_batch_tokens \(the longest pair has \d+\)",
        note,
    )
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == ""
