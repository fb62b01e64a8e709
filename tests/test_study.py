"""The study of all losses, with a tiny model; its committed tables; and the figures of any runs."""

import itertools
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import make_model, make_tokenizer, read_metrics, run_python, write_pairs

from benchmarks import study
from eval import plots
from eval.preference import distribution_figure
from eval.results import read_records
from runtime.errors import InputError

ROOT = Path(__file__).parent.parent
WHOLE = {name: getattr(study, name) for name in ("ARMS", "LEARNING_RATES", "SEEDS")}


def forked(command, env, **_) -> subprocess.CompletedProcess:
    """subprocess.run of a python, as a fork."""
    return run_python(*command[1:], **env)


@pytest.fixture(scope="module")
def tiny_study(tmp_path_factory):
    """A study of one loss with one seed, then continued with a second one: (folder, the text of its
    results after the first seed, its results)."""
    folder = tmp_path_factory.mktemp("study")
    make_model("llama").save_pretrained(folder / "model")
    make_tokenizer().save_pretrained(folder / "model")
    pairs = write_pairs(folder / "pairs.jsonl", 12)
    recipe = {"model": str(folder / "model"), "train_data": pairs, "eval_data": pairs}
    recipe |= {"batch_size": 4, "max_length": 200, "max_prompt_length": 100}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    page, results = folder / "study.md", folder / "study.jsonl"
    page.write_text(f"# Study\n\nWords.\n\n{study.BEGIN}\nold\n{study.END}\n\nMore words.\n")
    command = ["study.py", "--results", str(results), "--page", str(page)]
    command += ["--output_dir", str(folder / "runs"), "--jobs", "2"]
    arms = {"simpo x": {"loss": "simpo", "loss_args": "beta=1"}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study.subprocess, "run", forked)
        patch.setattr(study, "RECIPE", folder / "recipe.yaml")
        patch.setattr(study, "demo_model", lambda: str(folder / "model"))
        patch.setattr(study, "ARMS", arms)
        patch.setattr(study, "FLAGS", study.FLAGS | {"max_steps": 3})
        patch.setattr(study, "PROMPTS", 4)
        patch.setattr(study, "NEW_TOKENS", 6)
        patch.setattr(study, "LEARNING_RATES", (3e-3,))
        patch.setattr(sys, "argv", command)
        patch.setattr(study, "SEEDS", 1)
        study.main()
        first = results.read_text()
        results.write_text(first + '{"arm": "simp')  # its writing was interrupted
        patch.setattr(study, "SEEDS", 2)
        study.main()
        yield folder, first, read_records(results)


def test_study_continues_after_finished_runs(tiny_study):
    folder, first, (_, *results) = tiny_study
    assert (folder / "study.jsonl").read_text().startswith(first)
    done = [(r["arm"], r["learning_rate"], r["seed"]) for r in results]
    settings = {("start", 1e-12), ("simpo x", 3e-3)}
    assert len(done) == 4 and set(done) == {(*entry, seed) for entry in settings for seed in (0, 1)}
    assert not list((folder / "runs").glob("*/final"))  # the models are not kept


def test_study_keeps_what_the_runs_logged(tiny_study):
    folder, _, (_, *results) = tiny_study
    for result in results:
        name = f"{result['arm']}-{result['learning_rate']:g}-{result['seed']}".replace(" ", "-")
        lines = read_metrics(folder / "runs" / name)
        before, after = result["before"], result["after"]
        assert before["eval/accuracy"] == pytest.approx(lines[0]["eval/accuracy"], rel=1e-4)
        assert after["eval/logps/chosen"] == pytest.approx(lines[-1]["eval/logps/chosen"], rel=1e-4)
        assert [line["step"] for line in result["steps"]] == [1, 2, 3]
        assert {len(result[key]) for key in ("reward", "words", "finished")} == {4}
        assert len(result["kl"]) == len(range(result["seed"], 4, 3))
        assert all(-1 <= reward <= 1 for reward in result["reward"])
        if result["arm"] == "start":
            assert after["eval/logps/chosen"] == before["eval/logps/chosen"]
            assert max(map(abs, result["kl"])) < 1e-5
        else:
            assert min(result["kl"]) > 1e-4
    configs = map(yaml.safe_load, (p.read_text() for p in folder.glob("runs/*/config.yaml")))
    losses = {(config["loss"], config["loss_args"]) for config in configs}
    assert losses == {("simper", ""), ("simpo", "beta=1")}


def test_lines_of_two_processes_are_refused(tmp_path, monkeypatch):
    def train(command, **_):
        (tmp_path / "run").mkdir()
        lines = [{"step": 0, "eval/accuracy": 0.5}, {"step": 3, "eval/accuracy": 0.5}]
        lines[1:1] = [{"step": step, "accuracy": 0.5} for step in (1, 2, 2, 3)]
        (tmp_path / "run" / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(study.subprocess, "run", train)
    monkeypatch.setattr(study, "FLAGS", {"max_steps": 3})
    with pytest.raises(RuntimeError, match="run: 4 lines of 3 steps"):
        study.make_run("simper", 1e-5, 0, tmp_path / "run", threads=1)


def test_a_run_that_diverges_is_a_result(tmp_path, monkeypatch):
    """By train.py itself, at an absurd learning rate; any other failure is none."""
    make_model("llama").save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    flags = {"model": tmp_path / "model", "train_data": write_pairs(tmp_path / "pairs.jsonl", 26)}
    flags |= {"eval_data": "", "batch_size": 4, "max_steps": 4, "max_grad_norm": 1e30}
    flags |= {"max_length": 200, "max_prompt_length": 100}
    monkeypatch.setattr(study, "FLAGS", flags | {"warmup_ratio": 0, "wandb": "off"})
    monkeypatch.setattr(study.subprocess, "run", forked)
    found = study.make_run("simper", 1e30, 0, tmp_path / "run", threads=1)
    assert re.match(r"step \d: gradient norm (nan|inf)", found["error"])
    monkeypatch.setitem(study.FLAGS, "batch_size", 40)
    with pytest.raises(RuntimeError, match="do not fill one batch"):
        study.make_run("simper", 1e-5, 0, tmp_path / "other", threads=1)


def test_divergence_equals_one_position_at_a_time():
    """Against a forward of every prefix alone and torch's own divergence of distributions."""
    model, start = make_model("llama", seed=1), make_model("llama", seed=2)
    prompts, answers = [[5, 6, 7], [8], [9, 10]], [[11], [12, 13, 14, 15], [16, 17]]
    for prompt, answer, found in zip(
        prompts, answers, study.divergences(model, start, prompts, answers), strict=True
    ):
        expected = 0.0
        for n in range(len(answer)):
            ids = torch.tensor([prompt + answer[:n]])
            p, q = (
                torch.distributions.Categorical(logits=m(ids).logits[0, -1].double())
                for m in (model, start)
            )
            expected += torch.distributions.kl_divergence(p, q).item()
        assert found == pytest.approx(expected, rel=1e-4)


def test_tables_are_those_of_the_results(tiny_study):
    folder, _, (setting, *results) = tiny_study
    page = (folder / "study.md").read_text()
    assert page.startswith("# Study\n\nWords.\n") and page.endswith("\n\nMore words.\n")
    assert study.tables(setting, results) in page and "old" not in page
    figures = {path.name for path in folder.glob("*.png")}
    names = ("differences", "frontier", "five", "rates", "dynamics")
    assert figures == {f"study-{name}.png" for name in names}


def test_other_settings_are_not_mixed(tiny_study, monkeypatch):
    monkeypatch.setattr(study, "PROMPTS", 5)
    with pytest.raises(InputError, match="holds runs of another setting"):
        study.main()


def test_runs_without_the_start_of_their_seed(tmp_path, monkeypatch):
    """Their changes since the start cannot be reported."""
    monkeypatch.setattr(
        sys, "argv", ["study.py", "--report", "--results", str(tmp_path / "r.jsonl")]
    )
    for lines in ([{}], [{}, START, result("dpo", 1e-5, 1, [0.5])]):
        (tmp_path / "r.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        with pytest.raises(InputError, match="r.jsonl does not hold the runs of the start"):
            study.main()


# ---- The statistics ------------------------------------------------------------------------------


def result(arm: str, rate: float, seed: int, rewards: list[float]) -> dict:
    return {
        "arm": arm,
        "learning_rate": rate,
        "seed": seed,
        "before": {"eval/logps/chosen": -2.5, "eval/logps/rejected": -3.0},
        "after": {"eval/logps/chosen": -2.0, "eval/logps/rejected": -3.25, "eval/accuracy": 0.75},
        "steps": [],
        "reward": rewards,
        "kl": [2.0 * rate] * len(rewards),
        "words": [20] * len(rewards),
        "finished": [True, False] * (len(rewards) // 2),
        "distinct": 0.5,
    }


def test_interval_by_hand():
    """One seed: the bootstrap of a mean has the sample's standard error, and 1.96 of it to each
    side. Two seeds that differ by 1: a quarter of their resamples is of either one alone."""
    rewards = np.linspace(-1, 1, 400)[None]
    mean, low, high = study.interval(rewards)
    error = (rewards**2).mean() ** 0.5 / 400**0.5
    assert mean == pytest.approx(0) and (high - low) == pytest.approx(2 * 1.96 * error, rel=0.05)
    _, low, high = study.interval(rewards, 99.7)
    assert (high - low) == pytest.approx(2 * 2.97 * error, rel=0.05)
    seeds = np.array([[0.0] * 10, [1.0] * 10])
    assert study.interval(seeds) == pytest.approx((0.5, 0, 1))
    assert study.interval(seeds, 45) == pytest.approx((0.5, 0.5, 0.5))


@pytest.fixture
def at_root_8(monkeypatch):
    """KL is 2 and 4 nats at the two rates: on a scale of logarithms, √8 is in the middle."""
    changed = {"LEARNING_RATES": (1.0, 2.0), "EQUAL_KL": math.sqrt(8), "OTHER_KL": (3.0,)}
    for name, value in (WHOLE | changed | {"SEEDS": 1}).items():
        monkeypatch.setattr(study, name, value)


START = result("start", 1e-12, 0, [0.0, 0.0])


def test_tables_by_hand(at_root_8):
    results = [START]
    results += [result("simper", 1.0, 0, [0.5, 0.5]), result("simper", 2.0, 0, [0.2, 0.2])]
    results += [result("dpo", 1.0, 0, [0.1, 0.1]), result("dpo", 2.0, 0, [0.4, 0.4])]
    results += [result("ipo", 1.0, 0, [0.2, 0.6]), result("ipo", 2.0, 0, [0.1, 0.7])]
    results += [result("kto", 2.0, 0, [0.2, 0.8])]
    results += [{"arm": "sft", "learning_rate": 1.0, "seed": 0, "error": "diverged"}]
    text = study.tables({"versions": "torch 9"}, results)
    assert "9 of 37 runs; torch 9. Diverged: sft at 1." in text
    same = "20.0 | 0.50 | 0.50 | +0.50 | -0.25"
    for row in (
        f"| before training | 0.000 [0.000, 0.000] | – | {same} |",
        f"| simper | 0.350 [0.350, 0.350] | – | {same} |",
        f"| dpo | 0.250 [0.250, 0.250] | **-0.100** [-0.100, -0.100], 0 of 1 | {same} |",
        f"| ipo | 0.400 [0.150, 0.650] | +0.050 [-0.200, +0.300], 1 of 1 | {same} |",
        "| kto | – | – | – | – | – | – | – |",  # does not pass √8
        # At 3 nats, log 1.5 / log 2 = 0.585 of the way: SimPER has 0.325 there, DPO 0.275.
        "| dpo | **-0.049** [-0.049, -0.049], 0 of 1 | 0.100 (2.0, 20) | 0.400 (4.0, 20) |",
        "| ipo | +0.075 [-0.183, +0.334], 1 of 1 | 0.400 (2.0, 20) | 0.400 (4.0, 20) |",
        "| simper | – | 0.500 (2.0, 20) | 0.200 (4.0, 20) |",
        "| kto | – |  | 0.500 (4.0, 20) |",
    ):
        assert row in text.splitlines()


def test_too_few_seeds_have_no_interval(at_root_8, monkeypatch):
    monkeypatch.setattr(study, "SEEDS", 2)
    results = [START]
    for arm, reward in (("simper", 0.5), ("dpo", 0.4)):
        results += [result(arm, rate, 0, [reward, reward]) for rate in (1.0, 2.0)]
    rows = study.tables({"versions": ""}, results).splitlines()
    assert "| dpo | 0.400 | -0.100, 0 of 1 | 20.0 | 0.50 | 0.50 | +0.50 | -0.25 |" in rows
    assert "| dpo | -0.100, 0 of 1 | 0.400 (2.0, 20), 1 | 0.400 (4.0, 20), 1 |" in rows


def test_log_probs_are_on_a_line_over_kl(at_root_8):
    """Of 2 to 4 nats, √8 is 0.414 of the way; the chosen mean log-prob rises by 0.5 and by 1.5."""
    second = result("simper", 2.0, 0, [0.0, 0.0])
    second["after"]["eval/logps/chosen"] = -1.0
    text = study.tables({"versions": ""}, [START, result("simper", 1.0, 0, [0.0, 0.0]), second])
    (row,) = (line for line in text.splitlines() if line.startswith("| simper | 0.000 ["))
    assert row.endswith("| +0.91 | -0.25 |")


def test_every_seed_has_its_own_place(at_root_8, monkeypatch):
    """Seeds that differ in KL: each is read where its own runs pass √8 nats. A seed whose rates lie
    on one side of it does not count, and losses are compared over the seeds that both have."""
    monkeypatch.setattr(study, "SEEDS", 2)
    results = [START, START | {"seed": 1}]
    results += [result("simper", 1.0, 0, [0.5, 0.5]), result("simper", 2.0, 0, [0.2, 0.2])]
    # Seed 1: KL √2 and just above √8.
    results += [
        result("simper", rate, 1, [rate, rate]) | {"kl": [rate * 2.0000001**0.5]} for rate in (1, 2)
    ]
    results += [result("ipo", 1.0, 0, [0.6, 0.6]), result("ipo", 2.0, 0, [0.3, 0.3])]
    results += [result("ipo", rate, 1, [9.0, 9.0]) | {"kl": [rate]} for rate in (1.0, 2.0)]
    rows = study.tables({"versions": ""}, results).splitlines()
    # 0.35 and 2.
    (simper,) = (row for row in rows if row.startswith("| simper | 1.1"))
    assert simper.startswith("| simper | 1.175 [0.350, 2.000] | – |")
    assert any(row.startswith("| ipo | 0.450 | +0.100, 1 of 1 |") for row in rows)


def test_differences_are_paired(at_root_8, monkeypatch):
    """An arm whose answer to every prompt is better by 0.1 is better by that, without any spread,
    however much the prompts and the seeds differ."""
    monkeypatch.setattr(study, "SEEDS", 2)
    results = [START, START | {"seed": 1}]
    for seed, rate in itertools.product((1, 0), (1.0, 2.0)):
        rewards = [seed, 0.5, -rate, 7.0]
        results.append(result("simper", rate, seed, rewards))
        results.insert(1, result("dpo", rate, seed, [reward + 0.1 for reward in rewards]))
    text = study.tables({"versions": ""}, results)
    assert "| **+0.100** [+0.100, +0.100], 2 of 2 |" in text


def test_figures_show_the_runs(at_root_8, monkeypatch, tmp_path):
    """Only learning rates with all seeds; the steps' log-probs since the start, the weights' share
    by hand; a difference of 0.1 with every seed as a bar at 0.1."""
    from matplotlib import pyplot

    monkeypatch.setattr(study, "SEEDS", 2)
    monkeypatch.setattr(study, "DYNAMICS_RATE", 2.0)
    step = {"step": 1, "gradient_weight/chosen": 1.0, "gradient_weight/rejected": 3.0}
    before = step | {"logps/chosen": -2.0, "logps/rejected": -1.0}
    after = step | {"logps/chosen": -2.5, "logps/rejected": -3.0}
    results = [START | {"seed": seed, "steps": [before]} for seed in (0, 1)]
    for rate, seed in ((2.0, 1), (1.0, 0), (2.0, 0)):
        results.append(result("simper", rate, seed, [seed, seed]) | {"steps": [after]})
    drawn, axes = [], []
    monkeypatch.setattr(study, "plot", lambda *args, **x: drawn.append(args))
    monkeypatch.setattr(pyplot, "close", lambda figure: axes.append(figure.axes))
    study.figures(results, tmp_path)
    (by_rate, _, of_rate), (by_step, _, of_step) = drawn
    assert [[run["learning_rate"] for run in seed] for seed in by_rate["SimPER"]] == [[2.0], [2.0]]
    shown = [[metric(run) for metric in of_rate.values()] for (run,) in by_rate["SimPER"]]
    assert shown == [[0, 0.5, 0.75], [1, 0.5, 0.75]]
    (runs,) = by_step.values()
    assert [[metric(run[0]) for metric in of_step.values()] for run in runs] == [
        [-0.5, -2, 1.5]
    ] * 2
    results.append(result("simper", 1.0, 1, [1.0, 1.0]) | {"steps": [after]})
    for rate, seed in itertools.product((1.0, 2.0), (0, 1)):
        results.append(result("dpo", rate, seed, [seed + 0.1] * 2) | {"steps": [after]})
    study.figures(results, tmp_path)
    differences = axes[3][0]  # of the second call's figures, the first
    assert [label.get_text() for label in differences.get_yticklabels()] == ["dpo"]
    (bar,) = differences.containers
    assert bar.lines[0].get_xydata()[0] == pytest.approx((0.1, 0))


def test_committed_tables_are_those_of_the_committed_results(monkeypatch):
    for name, value in WHOLE.items():
        monkeypatch.setattr(study, name, value)
    page = (ROOT / "docs" / "study.md").read_text()
    setting, *results = read_records(ROOT / "docs" / "study.jsonl")
    assert f"{study.BEGIN}\n\n{study.tables(setting, results)}\n\n{study.END}" in page
    lines = [line for result in results for line in result.get("steps", [])]
    assert all(math.isfinite(value) for line in lines for value in line.values())
    assert {r["arm"] for r in results} <= {"start", *study.ARMS}


def test_what_the_page_says_of_the_highest_rate():
    """Its figures, computed here from the committed results."""
    page = " ".join((ROOT / "docs" / "study.md").read_text().split())
    _, *results = read_records(ROOT / "docs" / "study.jsonl")

    def runs(arm, rate):
        return [r for r in results if r["arm"] == arm and r["learning_rate"] == rate]

    def mean(arm, key, rate=1e-4):
        return np.mean([np.mean(run[key]) for run in runs(arm, rate)])

    def share(arm, rate=1e-4):
        return f"{100 * mean(arm, 'finished', rate):.0f}"

    def reward_at(arm, kl):
        (kl_1, kl_2), (low, high) = (
            [mean(arm, key, rate) for rate in (3e-5, 1e-4)] for key in ("kl", "reward")
        )
        return low + (high - low) * math.log(kl / kl_1) / math.log(kl_2 / kl_1)

    def rejected_share(arm):
        shares = []
        for run in runs(arm, 1e-4):
            chosen, rejected = (
                sum(step[f"gradient_weight/{side}"] for step in run["steps"][10:])
                for side in ("chosen", "rejected")
            )
            shares.append(100 * rejected / (chosen + rejected))
        return f"{np.mean(shares):.0f}"

    arms = ("simper", "kto", "dpo", "simpo", "simper_log", "ipo", "dpo beta=1")
    kl, reward, words = ({a: mean(a, k) for a in arms} for k in ("kl", "reward", "words"))
    for text in (
        f"less**: {reward['simper']:.3f} at {kl['simper']:.0f} nats and {reward['kto']:.3f} at "
        f"{kl['kto']:.0f}; DPO has {reward['dpo']:.3f} at {kl['dpo']:.0f}, SimPO "
        f"{reward['simpo']:.3f} at {kl['simpo']:.0f}.",
        f"DPO has {reward_at('dpo', kl['simper']):.3f} at SimPER's KL, "
        f"SimPO {reward_at('simpo', kl['simper']):.3f}.",
        f"({words['simper']:.0f} and {words['kto']:.0f} words; {words['dpo']:.0f} and "
        f"{words['simpo']:.0f})",
        f"({share('simper')} and {share('kto')} %; {share('dpo')} and {share('simpo')} %)",
        f"the rejected ones have {rejected_share('simper')} % (KTO {rejected_share('kto')} %, "
        f"DPO {rejected_share('dpo')} %)",
        *(
            f"{arm}: {reward[arm]:.3f}, {kl[arm]:.0f} nats, {share(arm)} %"
            for arm in ("simper", "simper_log")
        ),
        f"SFT on the chosen responses, {share('sft')} %)",
        f"SLiC-HF has {rejected_share('slic_hf')} %, and {share('slic_hf')} % of its answers end",
        f"have {rejected_share('ipo')} and {rejected_share('dpo beta=1')} %, but move "
        f"{kl['ipo']:.0f} and {kl['dpo beta=1']:.0f} nats",
        f"{share('simper', 3e-5)} % of SimPER's answers end and {share('dpo', 3e-5)} % of DPO's",
    ):
        assert text in page


# ---- Figures of any runs -------------------------------------------------------------------------


def test_plots_command(tiny_study, tmp_path, monkeypatch):
    folder, _, _ = tiny_study
    runs = [str(folder / "runs" / name) for name in ("start-1e-12-0", "simpo-x-0.003-1")]
    figure = tmp_path / "new" / "figure.png"
    for flags in (runs, [*runs, "--heldout"]):
        monkeypatch.setattr(sys, "argv", ["plots", *flags, "--output", str(figure)])
        plots.main()
        assert figure.stat().st_size > 10_000
        figure.unlink()
    monkeypatch.setattr(sys, "argv", ["plots", *runs, "--label", f"{runs[0]}={runs[1]}"])
    with pytest.raises(InputError, match=f"--label {runs[0]}: a run has that name, too"):
        plots.main()


def test_heldout_points_have_intervals(tmp_path, monkeypatch):
    """Of eleven pairs: 2.2281 standard errors to each side, by Student's t."""
    from matplotlib import pyplot

    drawn = {}
    monkeypatch.setattr(pyplot, "close", lambda figure: drawn.update(figure=figure))
    line = {f"eval/{name}": 0.5 for name in plots.METRICS.values()} | {"eval/pairs": 11}
    line |= {"standard_error/accuracy": 0.1, "eval/loss": -0.1}
    lines = [line | {"step": step} for step in (0, 4)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines))
    flags = [str(tmp_path), "--heldout", "--output", str(tmp_path / "x.svg")]
    monkeypatch.setattr(sys, "argv", ["plots", *flags])
    plots.main()
    *_, axis = drawn["figure"].axes
    (bars,) = (c for c in axis.collections if len(c.get_segments()) == 2)
    assert bars.get_segments()[1][:, 1] == pytest.approx([0.5 - 0.22281, 0.5 + 0.22281], abs=1e-4)


def test_plotted_lines_are_the_metrics(tmp_path, monkeypatch):
    """Mean and range over the runs of a label, read from the axes themselves."""
    from matplotlib import pyplot

    drawn = {}
    monkeypatch.setattr(pyplot, "close", lambda figure: drawn.update(figure=figure))
    figure, panels = str(tmp_path / "figure.svg"), {"twice a": lambda line: 2 * line["a"]}
    first = [{"step": 1, "a": 1.0}, {"step": 2, "a": 5.0}]
    second = [{"step": 1, "a": 3.0}, {"step": 2, "a": 4.0}]
    plots.plot({"x": [first, second]}, figure, panels)
    (axis,) = drawn["figure"].axes
    assert axis.lines[0].get_xydata().tolist() == [[1, 4], [2, 9]]
    band = axis.collections[0].get_paths()[0].vertices[:, 1]
    assert (band.min(), band.max()) == (2, 10)
    run = [{"step": step, "a": a, "b": 9.0} for step, a in enumerate([1.0, 4.0, 1.0, 1.0])]
    panels = {"x, a": lambda line: line["a"], "x, b": lambda line: line["b"]}
    plots.plot({"x": [run]}, figure, panels, window=3)
    first, second = drawn["figure"].axes
    assert first.lines[0].get_ydata().tolist() == [2.5, 2, 2, 1]
    assert first.lines[1].get_ydata().tolist() == [1, 4, 1, 1]  # pale, behind
    assert (
        first.get_ylim() == second.get_ylim() and first.get_ylim()[0] < 1 < 9 < first.get_ylim()[1]
    )
    with pytest.raises(InputError, match="the runs of x .*the same values of step"):
        plots.plot({"x": [run, run[:1]]}, figure, panels)
    by_rate = {"x": [[{"learning_rate": 0.1, "a": 1.0}, {"learning_rate": 1.0, "a": 2.0}]]}
    by_rate["y"] = [[{"learning_rate": 0.5, "a": 1.0}]]
    plots.plot(by_rate, figure, {"a": lambda line: line["a"]}, x="learning_rate")
    (axis,) = drawn["figure"].axes
    assert [label.get_text() for label in axis.get_xticklabels()] == ["0.1", "0.5", "1"]
    assert axis.lines[0].get_xydata().tolist() == [[0.1, 1], [1, 2]]
    assert (axis.get_xlabel(), axis.get_xscale()) == ("learning rate", "log")


def test_names_stay_in_their_figure(tmp_path, monkeypatch):
    """Nine in a legend; up to eight beside the lines, in the order of their ends, each in the color
    of its line and clear of the others, also where all lines end in one point."""
    from matplotlib import pyplot

    drawn = []
    monkeypatch.setattr(pyplot, "close", drawn.append)
    run = [{"step": step, "a": 1.0} for step in (1, 2)]
    curves = {f"runs/llama-3-8b-instruct-{n}": [run] for n in range(9)}
    plots.plot(curves, str(tmp_path / "figure.png"), {"a": lambda line: line["a"]})
    (legend,) = drawn[0].legends
    box = legend.get_window_extent()
    assert drawn[0].bbox.x0 <= box.x0 < box.x1 <= drawn[0].bbox.x1
    assert (tmp_path / "figure.pdf").stat().st_size > 1_000
    for ends in (range(8), [3] * 8):
        curves = {
            f"name-{n}": [[{"step": 1, "a": 0.0}, {"step": 2, "a": y}]] for n, y in enumerate(ends)
        }
        plots.plot(curves, str(tmp_path / "direct.png"), {"a": lambda line: line["a"]})
        figure = drawn[-1]
        assert not figure.legends
        (axis,) = figure.axes
        boxes = [text.get_window_extent() for text in axis.texts]
        assert [text.get_text() for text in axis.texts] == [f"name-{n}" for n in range(8)]
        colors = {text.get_text(): text.get_color() for text in axis.texts}
        assert [*colors.values()] == [line.get_color() for line in axis.lines[:8]]
        for low, high in zip(boxes, boxes[1:]):
            assert low.y1 <= high.y0 + 1
        assert all(figure.bbox.x1 >= box.x1 and figure.bbox.y1 >= box.y1 > 0 for box in boxes)


def test_a_loss_has_one_color():
    labels = ["runs/simper-1e-5", "DPO β=1", "dpo", "simper_log", "mine", "ours"]
    styles = plots.line_styles(labels, pale=["ours"])
    colors = [styles[label]["color"] for label in labels]
    simper, dpo = (plots.COLORS[loss] for loss in ("simper", "dpo"))
    assert colors[:3] == [simper, dpo, dpo] and colors[-1] == plots.PALE
    assert styles["DPO β=1"]["linestyle"] != styles["dpo"]["linestyle"]
    assert len({*colors}) == 5 and simper not in colors[3:]
    widest = max(labels, key=lambda label: styles[label]["linewidth"])
    assert widest == labels[0] == max(labels, key=lambda label: styles[label]["zorder"])


@pytest.mark.parametrize("count", [1, 2, 6])
def test_distributions_of_models(count, tmp_path, monkeypatch):
    """A row for each model, the median at the point; one of a single value has no density."""
    from matplotlib import pyplot

    drawn = []
    monkeypatch.setattr(pyplot, "close", drawn.append)
    pairs = np.random.default_rng(0).random((count, 40, 2))
    pairs[-1] = 0.25
    distribution_figure({f"m{n}": of for n, of in enumerate(pairs)}, tmp_path / "preference.png")
    chosen, rejected, margin = drawn[0].axes
    assert [t.get_text() for t in chosen.get_yticklabels()] == [f"m{n}" for n in range(count)]
    medians = [line.get_xdata()[0] for line in chosen.lines if len(line.get_xdata()) == 1]
    assert medians == pytest.approx(np.median(pairs[:, :, 0], axis=1))
    assert len(chosen.collections) == count - 1 and chosen.get_xlim() == rejected.get_xlim()
    medians = [line.get_xdata()[0] for line in margin.lines if len(line.get_xdata()) == 1]
    assert medians == pytest.approx(np.median(pairs[:, :, 0] - pairs[:, :, 1], axis=1))


def test_runs_of_one_label_are_one_line(tmp_path, monkeypatch):
    for seed in (0, 1):
        line = {"step": 1, "epoch": 1.0, "logps/chosen": -1.0, "logps/rejected": -2.0}
        line |= {"gradient_weight/chosen": 1, "gradient_weight/rejected": 1, "accuracy": seed}
        line["logps/margin"] = 1.0
        (tmp_path / f"simper-{seed}").mkdir()
        text = "".join(json.dumps(line | {"step": step}) + "\n" for step in (1, 2))
        (tmp_path / f"simper-{seed}" / "metrics.jsonl").write_text(text)
    drawn = []
    monkeypatch.setattr(plots, "plot", lambda curves, *args, **more: drawn.append(curves))
    flags = ["--label", f"SimPER={tmp_path}/simper-*", str(tmp_path / "simper-0")]
    monkeypatch.setattr(sys, "argv", ["plots", *flags, "--output", str(tmp_path / "x.png")])
    plots.main()
    assert {label: len(runs) for label, runs in drawn[0].items()} == {
        str(tmp_path / "simper-0"): 1,
        "SimPER": 2,
    }
    monkeypatch.setattr(sys, "argv", ["plots", "--output", str(tmp_path / "x.png")])
    with pytest.raises(InputError, match="give the folders of runs"):
        plots.main()


def test_runs_of_one_response_have_the_panels_that_they_can(tmp_path, monkeypatch, capsys):
    line = {"epoch": 1.0, "logps/chosen": -1.0, "gradient_weight/chosen": 1.0}
    text = "".join(json.dumps(line | {"step": step}) + "\n" for step in (1, 2))
    (tmp_path / "metrics.jsonl").write_text(text)
    drawn = []
    monkeypatch.setattr(plots, "plot", lambda curves, path, panels, **_: drawn.append([*panels]))
    monkeypatch.setattr(sys, "argv", ["plots", str(tmp_path), "--output", str(tmp_path / "x.png")])
    plots.main()
    assert drawn == [["mean log-prob (nats), chosen", "gradient weight, chosen"]]
    assert "left out: logps/rejected, logps/margin" in capsys.readouterr().out


def test_plots_of_nothing(tmp_path):
    with pytest.raises(InputError, match="there is no such file"):
        plots.read_run(str(tmp_path / "nowhere"))
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "epoch": 0.5, "loss": 1.0}\n')
    assert plots.read_run(str(tmp_path)) == [{"step": 1, "epoch": 0.5, "loss": 1.0}]
    with pytest.raises(InputError, match="no metrics of evaluations"):
        plots.read_run(str(tmp_path), heldout=True)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--output", "x.foo"], "x.foo: its name must end with .png, .svg or .pdf"),
        (["--smooth", "-3"], "argument --smooth: must be at least 1, not -3"),
    ],
)
def test_wrong_arguments_of_plots(monkeypatch, capsys, flags, message):
    monkeypatch.setattr(sys, "argv", ["plots", "runs/nowhere", *flags])
    with pytest.raises((InputError, SystemExit)) as error:
        plots.main()
    assert message in str(error.value) + capsys.readouterr().err


def test_matplotlib_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(InputError, match="eval/requirements.txt"):
        plots.plot({}, str(tmp_path / "figure.png"))
