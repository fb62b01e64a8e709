"""The patches of forks/ apply to the code, train, and do what they say: against plain float64
forwards of transformers, in closed form, on two ranks, and across a resume.

Each patch is applied to a copy of the code, and its own command is run there, with a tiny model.
"""

import math
import os
import random
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import datasets
import pytest
import torch
from conftest import (
    GQA,
    ROOT,
    TINY,
    gradients,
    make_model,
    make_tokenizer,
    read_checkpoint,
    read_metrics,
    relative_difference,
    run_python,
    timeless,
)
from safetensors.torch import load_file
from torch.func import functional_call
from transformers import AutoConfig, AutoModelForCausalLM

FORKS = ROOT / "forks"
PATCHES = {path.stem: path.read_text() for path in sorted(FORKS.glob("*.patch"))}


def command(text: str) -> str:
    """The command of a patch, on one line: what is indented above the diff."""
    head = text.partition("diff --git")[0].replace("\\\n", " ")
    (line,) = re.findall(r"^    (\S.*)$", head, flags=re.MULTILINE)
    return " ".join(line.split())


def files(text: str) -> list[str]:
    return re.findall(r"^\+\+\+ b/(\S+)$", text, flags=re.MULTILINE)


def changed_lines(text: str) -> int:
    """Added and removed lines of a patch."""
    diff = text.partition("diff --git")[2]
    return len(re.findall(r"^[+-](?!\+\+ b/|-- a/)", diff, flags=re.MULTILINE))


def copy_code(folder: Path) -> Path:
    """The code alone, in a folder that is in no repository."""
    ignored = shutil.ignore_patterns("__pycache__", "*.jsonl")
    for name in ("runtime", "demo", "recipes"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    for path in ROOT.glob("*.py"):
        shutil.copy(path, folder)
    return folder


def apply(name: str, folder: Path) -> subprocess.CompletedProcess:
    environment = os.environ | {"GIT_CEILING_DIRECTORIES": str(folder.parent)}
    done = ["git", "apply", str(FORKS / f"{name}.patch")]
    return subprocess.run(done, cwd=folder, env=environment, capture_output=True, text=True)


# ---- Patches and page ----------------------------------------------------------------------------


@pytest.mark.repo
@pytest.mark.parametrize("name", PATCHES)
def test_the_patch_is_short_applies_cleanly_and_keeps_the_style(name, tmp_path):
    text, folder = PATCHES[name], copy_code(tmp_path / "code")
    assert changed_lines(text) <= 45 and len(files(text)) <= 2
    assert all(len(line) <= 100 for line in text.partition("diff --git")[0].splitlines())
    done = apply(name, folder)
    assert (done.returncode, done.stderr) == (0, "")
    assert all((folder / f).read_text() != (ROOT / f).read_text() for f in files(text))
    if not (ruff := shutil.which("ruff")):
        pytest.skip("ruff is not installed")
    for check in (["format", "--check"], ["check"]):
        options = ["--no-cache", "--config", ROOT / "pyproject.toml", *files(text)]
        done = subprocess.run([ruff, *check, *options], cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.repo
def test_the_page_lists_every_patch_with_its_true_numbers():
    page = (FORKS / "README.md").read_text()
    pattern = r"^\| .+ \| \[(\w+)\]\((\w+)\.patch\) \| (\d+) \| (.+) \| `(.+)` \|$"
    rows = re.findall(pattern, page, flags=re.MULTILINE)
    assert sorted(row[0] for row in rows) == [*PATCHES]
    for name, target, lines, places, shown in rows:
        text = PATCHES[name]
        expected = (name, changed_lines(text), ", ".join(files(text)), command(text))
        assert (target, int(lines), places, shown) == expected


# ---- Runs ----------------------------------------------------------------------------------------


def launch(code: Path, args: list[str], ranks: int = 1) -> None:
    """`python train.py ARGS` in the folder `code`. Raises RuntimeError with what it prints if it
    fails."""
    done = run_python("train.py", *args, cwd=code, ranks=ranks if ranks > 1 else 0)
    if done.returncode:
        raise RuntimeError(done.stdout[-1000:] + done.stderr[-3000:])


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> dict[str, str]:
    """What every run reads: a tiny model of three blocks; 8 rows in three formats, of four answers
    each, of which the first two are a pair. All of them are one batch."""
    folder, draw = tmp_path_factory.mktemp("forks"), random.Random(0)
    MODEL.float().save_pretrained(folder / "model")
    MODEL.double()
    TOKENIZER.save_pretrained(folder / "model")
    for row in ROWS:
        better, pair = draw.randrange(2), row["answers"][:2]
        row["pair"] = {"prompt": row["prompt"], "chosen": pair[0], "rejected": pair[1]}
        row["pair"]["margin"] = row["margin"]
        row["list"] = {"prompt": row["prompt"], "responses": row["answers"]}
        row["numbered"] = {"prompt": row["prompt"], "better_response_id": better}
        row["numbered"] |= {f"response_{better}": pair[0], f"response_{1 - better}": pair[1]}
    for name in ("pair", "list", "numbered"):
        rows = datasets.Dataset.from_list([row[name] for row in ROWS])
        rows.to_json(folder / f"{name}.jsonl")
    return {path.stem: str(path) for path in folder.iterdir()}


@pytest.fixture(scope="module")
def run_fork(inputs, tmp_path_factory) -> Callable:
    """run_fork(NAME, rows=..., ranks=..., **values): the command of a patch, in a copy of the code
    with that patch, on a tiny model; values: flags that differ. Returns the output folder."""
    copies = {}

    def run(name: str, rows: str = "pair", ranks: int = 1, output: str = "", **values) -> Path:
        if name not in copies:
            copies[name] = copy_code(tmp_path_factory.mktemp(name) / "code")
            if apply(name, copies[name]).returncode:
                pytest.skip(f"{name}.patch does not apply to this code")  # a fork's: see above
        output = copies[name] / (output or f"run{ranks}")
        values = {"model": inputs["model"], "output_dir": output, "learning_rate": 1e-3} | values
        values |= {"train_data": inputs[rows], "eval_data": inputs[rows], "batch_size": len(ROWS)}
        values |= {"warmup_ratio": 0, "max_length": 128, "max_prompt_length": 64, "wandb": "off"}
        values |= {"micro_batch_tokens": 400, "save_every": 1, "keep_checkpoints": 0}
        values = {"max_steps": 1, "max_grad_norm": 1e9} | values
        python, script, *args = shlex.split(command(PATCHES[name]))
        assert (python, script) == ("python", "train.py")
        launch(copies[name], args + [f"--{key}={value}" for key, value in values.items()], ranks)
        return output

    return run


def resumed(run_fork: Callable, output: Path, name: str, **values) -> Path:
    """A copy of a run of three steps without the third, that goes on."""
    again = output.with_name("resumed")
    shutil.copytree(output, again)
    shutil.rmtree(again / "final")
    shutil.rmtree(again / "checkpoints" / "step_3")
    run_fork(name, output="resumed", **values)
    return again


def same(folder: Path, other: Path) -> bool:
    """Whether two runs are the same to the last bit: their lines, and the models."""
    a, b = (load_file(f / "final" / "model.safetensors") for f in (folder, other))
    lines = [timeless(read_metrics(f)) for f in (folder, other)]
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a) and lines[0] == lines[1]


# ---- Plain forwards ------------------------------------------------------------------------------


def make_rows() -> list[dict]:
    draw, rows = random.Random(7), []  # of whose pairs sums and means rank some differently
    text = lambda letters, most: "".join(draw.choice(letters) for _ in range(draw.randint(1, most)))  # noqa: E731
    for number in range(8):
        answers = [f"{number}" + text("abcde01234", 20) for _ in range(4)]
        rows.append({"prompt": "what " + text("istwoplus", 30), "answers": answers})
        rows[-1]["margin"] = draw.uniform(0, 2)
    return rows


ROWS = make_rows()
TOKENIZER = make_tokenizer()
MODEL = make_model("llama", num_hidden_layers=3).double()


def weights_of(folder: str | Path) -> dict[str, torch.Tensor]:
    return {k: v.double() for k, v in load_file(Path(folder) / "model.safetensors").items()}


def log_prob(weights: dict, prompt: str, answer: str, header: bool) -> tuple[torch.Tensor, int]:
    """Of an answer in float64, by transformers alone, and its number of tokens. header: whether the
    assistant's header belongs to the answer."""
    parts = [f"<|im_start|>user\n{prompt}<|im_end|>\n", "<|im_start|>assistant\n", answer]
    ids = [TOKENIZER(part, add_special_tokens=False).input_ids for part in parts]
    ids[2].append(TOKENIZER.convert_tokens_to_ids("<|im_end|>"))
    whole = torch.tensor([sum(ids, [])])
    logits = functional_call(MODEL, weights, (whole,)).logits
    logps = logits[0, :-1].log_softmax(dim=-1).gather(1, whole[0, 1:, None])[:, 0]
    length = sum(map(len, ids[1 if header else 2 :]))
    return logps[-length:].sum(), length


def plain_sums(weights: dict, count: int = 2, header: bool = False) -> list[tuple]:
    """For every row: its summed log-probs (K,), its lengths (K,)."""
    table = []
    for row in ROWS:
        found = [log_prob(weights, row["prompt"], a, header) for a in row["answers"][:count]]
        sums, lengths = zip(*found)
        table.append((torch.stack(sums), torch.tensor(lengths)))
    return table


def simper(s, n, row):
    return (s[1] / n[1]).exp() - (s[0] / n[0]).exp()


def plain_gradient(weights: dict, objective=simper, leaves=None, **how) -> tuple[list, dict]:
    """The losses, and the gradient of their mean with respect to `leaves`, by default `weights`."""
    leaves = {k: v.requires_grad_() for k, v in weights.items()} if leaves is None else leaves
    losses = [objective(*row, ROWS[i]) for i, row in enumerate(plain_sums(weights, **how))]
    grads = torch.autograd.grad(torch.stack(losses).mean(), [*leaves.values()])
    return [loss.item() for loss in losses], dict(zip(leaves, grads))


def check_step(output: Path, losses: list, grads: dict) -> None:
    """The first evaluation, the first step's loss, and its gradient."""
    first, second = read_metrics(output)[:2]
    mean = sum(losses) / len(losses)
    assert first["eval/loss"] == pytest.approx(mean, rel=1e-4, abs=1e-8)
    assert second["loss"] == pytest.approx(mean, rel=1e-4, abs=1e-8)
    assert relative_difference(gradients(output), grads) < 1e-5


# ---- Losses and rows -----------------------------------------------------------------------------


def margin(s, n, row):
    m = s / n
    return torch.log(1 + torch.exp(row["margin"] - 3 * (m[0] - m[1])))


def listwise(s, n, row):
    p, likelihood = (s / n).exp(), 1.0
    for k in range(4):  # each choice is among those that are left
        likelihood *= torch.exp(2 * p[k]) / sum(torch.exp(2 * p[j]) for j in range(k, 4))
    return -torch.log(likelihood)


def nll_anchor(s, n, row):
    return simper(s, n, row) - 0.3 * s[0] / n[0]


def hinge(s, n, row):
    loss = 0.0003 + simper(s, n, row)
    return loss if loss > 0 else 0 * loss


def sqrt_length(s, n, row):
    return torch.exp(s[1] / math.sqrt(n[1])) - torch.exp(s[0] / math.sqrt(n[0]))


@pytest.mark.parametrize(
    "name, objective, values",
    [
        ("margin", margin, {"loss_args": "beta=3"}),
        ("nll_anchor", nll_anchor, {"loss_args": "lambda_=0.3"}),
        ("hinge_loss", hinge, {"loss_args": "margin=0.0003"}),
        ("sqrt_length", sqrt_length, {}),
        ("row_format", simper, {"rows": "numbered"}),
    ],
)
def test_a_loss_or_row_format_equals_plain_forwards(run_fork, inputs, name, objective, values):
    output = run_fork(name, **values)
    losses, grads = plain_gradient(weights_of(inputs["model"]), objective)
    check_step(output, losses, grads)
    if name == "hinge_loss":  # both sides of it are there
        assert 0 < losses.count(0) < len(losses)


def router_losses(model, weights: dict, layers: int = 2) -> list[torch.Tensor]:
    """Of every row in float64, by transformers alone: experts · Σ f · P over its tokens, the prompt
    once, averaged over layers."""
    losses = []
    for row in ROWS:
        head = f"<|im_start|>user\n{row['prompt']}<|im_end|>\n<|im_start|>assistant\n"
        prompt, seen = TOKENIZER(head, add_special_tokens=False).input_ids, [[], []]
        for number, answer in enumerate(row["answers"][:2]):
            ids = TOKENIZER(answer + "<|im_end|>", add_special_tokens=False).input_ids
            ids = (torch.tensor([prompt + ids]),)
            output = functional_call(model, weights, ids, {"output_router_logits": True})
            for layer in range(layers):
                kept = 0 if number == 0 else len(prompt)
                seen[layer].append(output.router_logits[layer].view(-1, 4)[kept:])
        loss = 0.0
        for logits in seen:
            shares = torch.cat(logits).softmax(dim=1)
            ranks = shares.argsort(dim=1, descending=True).argsort(dim=1)
            loss = loss + 4 * ((ranks < 2).double().mean(0) * shares.mean(0)).sum() / layers
        losses.append(loss)
    return losses


def test_the_routers_loss_equals_plain_forwards_on_any_number_of_ranks(run_fork, tmp_path):
    sizes = TINY | GQA | {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2}
    torch.manual_seed(0)
    config = AutoConfig.for_model("qwen3_moe", **sizes)
    model = AutoModelForCausalLM.from_config(config, experts_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    model.save_pretrained(tmp_path / "experts")
    TOKENIZER.save_pretrained(tmp_path / "experts")
    model = model.double()
    weights = {name: value.detach().requires_grad_() for name, value in model.named_parameters()}
    simper, total = [], []
    for row, balance in zip(ROWS, router_losses(model, weights)):
        head = f"<|im_start|>user\n{row['prompt']}<|im_end|>\n<|im_start|>assistant\n"
        prompt, means = TOKENIZER(head, add_special_tokens=False).input_ids, []
        for answer in row["answers"][:2]:
            ids = TOKENIZER(answer + "<|im_end|>", add_special_tokens=False).input_ids
            logits = functional_call(model, weights, (torch.tensor([prompt + ids]),)).logits[0]
            logps = logits.log_softmax(-1)[len(prompt) - 1 : -1]
            means.append(logps.gather(1, torch.tensor(ids)[:, None]).mean())
        simper.append(means[1].exp() - means[0].exp())
        total.append(simper[-1] + 0.001 * balance)
    grads = dict(zip(weights, torch.autograd.grad(torch.stack(total).mean(), [*weights.values()])))
    for ranks in (1, 2):
        output = run_fork("router_loss", ranks=ranks, model=tmp_path / "experts")
        found = gradients(output)
        assert read_metrics(output)[1]["loss"] == pytest.approx(sum(simper).item() / 8, rel=1e-4)
        assert relative_difference(found, {name: grads[name] for name in found}) < 1e-5


def test_a_row_without_a_margin_is_refused(run_fork):
    with pytest.raises(RuntimeError, match="row 0: the loss asks for the column 'margin'"):
        run_fork("margin", rows="list", output="refused")


def test_the_list_of_four_equals_plain_forwards_on_any_number_of_ranks(run_fork, inputs):
    losses, grads = plain_gradient(weights_of(inputs["model"]), listwise, count=4)
    for ranks in (1, 2):
        output = run_fork("listwise", rows="list", ranks=ranks, loss_args="beta=2")
        check_step(output, losses, grads)


def test_the_header_is_scored(run_fork, inputs):
    output, weights = run_fork("score_header"), weights_of(inputs["model"])
    check_step(output, *plain_gradient(weights, header=True))
    lengths = torch.stack([n for _, n in plain_sums(weights, header=True)]).double().mean(dim=0)
    line = read_metrics(output)[1]
    assert [line["length/chosen"], line["length/rejected"]] == lengths.tolist()


# ---- Metrics -------------------------------------------------------------------------------------


def test_the_accuracy_of_sums_equals_that_of_plain_forwards(run_fork, inputs):
    lines = read_metrics(run_fork("sum_accuracy"))
    table = plain_sums(weights_of(inputs["model"]))
    by_sum = sum((s[0] > s[1]).item() for s, _ in table) / len(table)
    by_mean = sum((s[0] / n[0] > s[1] / n[1]).item() for s, n in table) / len(table)
    assert by_sum != by_mean
    assert (lines[0]["eval/accuracy/sum"], lines[1]["accuracy/sum"]) == (by_sum, by_sum)
    assert (lines[0]["eval/accuracy"], lines[1]["accuracy"]) == (by_mean, by_mean)


def test_the_norm_of_every_block_equals_that_of_plain_gradients(run_fork, inputs):
    _, grads = plain_gradient(weights_of(inputs["model"]))
    for ranks in (1, 2):
        line = read_metrics(run_fork("layer_grad_norms", ranks=ranks))[1]
        assert {k for k in line if "block" in k} == {f"grad_norm/block_{n}" for n in range(3)}
        for number in range(3):
            parts = [g for name, g in grads.items() if f".layers.{number}." in name]
            norm = torch.cat([part.flatten() for part in parts]).norm().item()
            assert line[f"grad_norm/block_{number}"] == pytest.approx(norm, rel=1e-5)
    masters = run_fork("layer_grad_norms", dtype="bfloat16", output="masters")
    for name, norm in line.items():
        if name.startswith("grad_norm"):
            assert read_metrics(masters)[1][name] == pytest.approx(norm, rel=0.05)


# ---- What is trained -----------------------------------------------------------------------------


def test_only_the_last_blocks_are_trained(run_fork, inputs):
    output, before = run_fork("freeze", max_steps=3), weights_of(inputs["model"])
    trained = {name for name in before if ".layers.1." in name or ".layers.2." in name}
    losses, grads = plain_gradient(before)
    check_step(output, losses, {name: grads[name] for name in trained})
    after = weights_of(output / "final")
    assert {name for name in after if not torch.equal(after[name], before[name])} == trained
    saved = {name.partition("model.")[2] for name in read_checkpoint(output / "checkpoints/step_3")}
    assert saved == trained
    assert same(output, resumed(run_fork, output, "freeze", max_steps=3))


LORA = {"max_steps": 3, "learning_rate": 1e-2}


def adapters(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    """{"exp_avg" or "": {name of lora_a or lora_b: tensor}} of a checkpoint."""
    tensors, parts = read_checkpoint(folder), {"": {}, "exp_avg": {}, "exp_avg_sq": {}}
    for name, tensor in tensors.items():
        key, _, rest = name.partition("model.")
        parts[key.rstrip(".")][rest] = tensor.double()
    return parts


def merged(weights: dict, parts: dict) -> dict[str, torch.Tensor]:
    """W + alpha / rank · B A, of rank 16 with alpha 32."""
    found = dict(weights)
    for name in (name for name in parts if name.endswith("lora_a")):
        layer = name.removesuffix("lora_a")
        found[f"{layer}weight"] = (
            weights[f"{layer}weight"] + 2 * parts[f"{layer}lora_b"] @ parts[name]
        )
    return found


def test_adapters_have_the_gradient_of_plain_forwards_and_are_merged(run_fork, inputs):
    output, weights = run_fork("lora", **LORA), weights_of(inputs["model"])
    linear = {n for n, w in weights.items() if ".layers." in n and w.ndim == 2}
    states = [adapters(output / "checkpoints" / f"step_{step}") for step in (1, 2, 3)]
    kinds = {f"{n.removesuffix('weight')}{kind}" for n in linear for kind in ("lora_a", "lora_b")}
    assert all({*part} == kinds for state in states for part in state.values())

    # Step 1, from B = 0: A has no gradient yet, and is as it was made.
    first = {n: torch.zeros_like(t) if "lora_b" in n else t for n, t in states[0][""].items()}
    # Step 2, from both: its gradient is what the moment gained.
    for begin, before, after in (
        (first, None, states[0]["exp_avg"]),
        (states[0][""], states[0]["exp_avg"], states[1]["exp_avg"]),
    ):
        leaves = {name: tensor.clone().requires_grad_() for name, tensor in begin.items()}
        losses, grads = plain_gradient(merged(weights, leaves), leaves=leaves)
        found = {n: 10 * (t - 0.9 * before[n] if before else t) for n, t in after.items()}
        assert relative_difference(found, grads) < 1e-5
        line = read_metrics(output)[1 if before is None else 2]
        assert line["loss"] == pytest.approx(sum(losses) / len(losses), abs=1e-6)
    assert all(grads[name].abs().max() > 1e-6 for name in kinds)  # in step 2, of A, too

    final, expected = weights_of(output / "final"), merged(weights, states[2][""])
    assert final.keys() == weights.keys()
    assert {n for n in weights if not torch.equal(final[n], weights[n])} == linear
    assert all((final[n] - expected[n]).abs().max() < 1e-6 for n in weights)
    losses, _ = plain_gradient(final)  # the last evaluation was by the adapted model
    assert read_metrics(output)[-1]["eval/loss"] == pytest.approx(sum(losses) / 8, abs=1e-5)
    assert same(output, resumed(run_fork, output, "lora", **LORA))

    both = run_fork("lora", ranks=2, **LORA)
    twos = [adapters(both / "checkpoints" / f"step_{step}") for step in (1, 3)]
    for two, one, limit in zip(twos, (states[0], states[2]), (1e-6, 1e-4)):
        assert relative_difference(two["exp_avg"], one["exp_avg"]) < limit
    assert relative_difference(weights_of(both / "final"), final) < 1e-5


# ---- The optimizer -------------------------------------------------------------------------------


def orthogonal(matrix: torch.Tensor) -> torch.Tensor:
    """Five Newton-Schulz iterations, with the coefficients of Jordan's post."""
    x = matrix / matrix.norm()
    for _ in range(5):
        square = x @ x.T
        x = 3.4445 * x - 4.7750 * square @ x + 2.0315 * square @ square @ x
    return x


def test_muon_moves_the_matrices_of_the_blocks_and_adamw_the_rest(run_fork, inputs):
    values, weights = {"max_steps": 3}, weights_of(inputs["model"])
    output, found = run_fork("optimizer", **values), {}
    for step in (1, 2):
        for name, tensor in read_checkpoint(output / f"checkpoints/step_{step}").items():
            key, _, rest = name.partition("model.")
            found[step, key.rstrip("."), rest] = tensor.double()
    matrices = {n for n, w in weights.items() if ".layers." in n and w.ndim == 2}
    for key, expected in (("momentum_buffer", matrices), ("exp_avg", {*weights} - matrices)):
        assert {name for _, k, name in found if k == key} == expected
    before, momentum = weights, dict.fromkeys(weights, 0.0)
    for step, rate in ((1, 1e-3), (2, 0.75e-3)):  # a cosine over three steps
        _, grads = plain_gradient({n: w.detach() for n, w in before.items()})
        moved, exact = {}, {}
        for name in matrices:
            momentum[name] = 0.95 * momentum[name] + 0.05 * grads[name]
            step_of = orthogonal(0.95 * momentum[name] + 0.05 * grads[name])
            exact[name] = -rate * 0.2 * math.sqrt(max(grads[name].shape)) * step_of
            moved[name] = found[step, "", name] - before[name]
        buffers = {name: found[step, "momentum_buffer", name] for name in matrices}
        assert relative_difference(buffers, {n: momentum[n] for n in matrices}) < 1e-5
        assert relative_difference(moved, exact) < 0.06  # measured: 0.03, of bfloat16
        if step == 1:
            averages = {n: 10 * found[1, "exp_avg", n] for n in {*weights} - matrices}
            assert relative_difference(averages, {n: grads[n] for n in averages}) < 1e-5
        before = {name: found[step, "", name] for name in weights}
    assert same(output, resumed(run_fork, output, "optimizer", **values))

    masters = run_fork("optimizer", dtype="bfloat16", output="masters", max_steps=1)
    saved = read_checkpoint(masters / "checkpoints/step_1")
    assert matrices == {n.split(".model.", 1)[1] for n in saved if n.startswith("momentum_buffer")}
    both = run_fork("optimizer", ranks=2, **values)
    for step, limit in ((1, 1e-6), (3, 1e-2)):
        one, two = (read_checkpoint(o / f"checkpoints/step_{step}") for o in (output, both))
        buffers = [{n: t[f"momentum_buffer.model.{n}"] for n in matrices} for t in (two, one)]
        assert relative_difference(*buffers) < limit
        moves = [{n: t[f"model.{n}"].double() - weights[n] for n in matrices} for t in (two, one)]
        assert relative_difference(*moves) < 0.05  # measured: 0.02; 1e-5 with float32 iterations
