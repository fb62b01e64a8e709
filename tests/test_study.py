"""The study of all losses, with a tiny model; its committed tables; and the figures of any runs."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import make_model, make_tokenizer
from test_train import read_metrics, write_pairs

from benchmarks import study
from data import InputError, load_rows
from eval import plots
from loss import LOSSES, simper_loss

ROOT = Path(__file__).parent.parent
RATES = study.LEARNING_RATES


@pytest.fixture(scope="module")
def tiny_study(tmp_path_factory):
    """A study of two losses with one seed, then continued with a second one: (folder, the text of
    its results after the first seed, its results)."""
    folder = tmp_path_factory.mktemp("study")
    make_model("llama").save_pretrained(folder / "model")
    make_tokenizer().save_pretrained(folder / "model")
    page, results = folder / "study.md", folder / "study.jsonl"
    page.write_text(f"# Study\n\nWords.\n\n{study.BEGIN}\nold\n{study.END}\n\nMore words.\n")
    changes = {"model": str(folder / "model"), "batch_size": 4, "max_steps": 3}
    command = ["study.py", "--data", write_pairs(folder / "pairs.jsonl", 40)]
    command += ["--results", str(results), "--page", str(page)]
    command += ["--output_dir", str(folder / "runs"), "--jobs", "2"]
    command += ["--losses", "simper", "simper_log"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study, "FLAGS", study.FLAGS | changes)
        patch.setattr(study, "LIMITS", {"prompt": 80, "response": 40, "heldout": 6})
        patch.setattr(study, "PROMPTS", 4)
        patch.setattr(study, "LEARNING_RATES", (3e-5,))
        patch.setattr(sys, "argv", [*command, "--seeds", "1"])
        study.main()
        first = results.read_text()
        patch.setattr(sys, "argv", [*command, "--seeds", "2"])
        study.main()
        yield folder, first, study.read_results(results)


def test_study_continues_after_finished_runs(tiny_study):
    folder, first, results = tiny_study
    assert (folder / "study.jsonl").read_text().startswith(first)
    done = [(r["loss"], r["learning_rate"], r["seed"]) for r in results]
    settings = {study.START, ("simper", 3e-5), ("simper_log", 3e-5)}
    assert len(done) == 6 and set(done) == {(*entry, seed) for entry in settings for seed in (0, 1)}
    assert not list((folder / "runs").glob("*/final"))  # the models are not kept


def test_study_logs_what_the_runs_logged(tiny_study):
    folder, _, results = tiny_study
    for result in results:
        name = f"{result['loss']}-{result['learning_rate']:g}-{result['seed']}"
        lines = read_metrics(folder / "runs" / name)
        before, after = result["before"], result["after"]
        accuracy, logp = lines[0]["eval/accuracy"], lines[-1]["eval/logps/chosen"]
        assert before["eval/accuracy"] == pytest.approx(accuracy, rel=1e-4)
        assert after["eval/logps/chosen"] == pytest.approx(logp, rel=1e-4)
        assert [line["step"] for line in result["steps"]] == [1, 2, 3]
        assert result["answer_tokens"] >= 0 and 0 <= result["finished"] <= 1
        if (result["loss"], result["learning_rate"]) == study.START:
            assert after == before | {"step": 3}


def test_training_and_held_out_pairs_share_no_prompt(tiny_study):
    folder, _, _ = tiny_study
    train, heldout = (
        [json.dumps(row["prompt"]) for row in load_rows(str(folder / "runs" / f"{name}.jsonl"))]
        for name in ("train", "heldout")
    )
    assert len(heldout) == 6 and len(train) > 20
    assert not {*train} & {*heldout}


def test_tables_are_those_of_the_results(tiny_study):
    folder, _, results = tiny_study
    page = (folder / "study.md").read_text()
    assert page.startswith("# Study\n\nWords.\n") and page.endswith("\n\nMore words.\n")
    assert study.tables(results) in page and "old" not in page
    figures = {path.name for path in folder.glob("*.png")}
    assert figures == {f"study-{name}.png" for name in ("rivals", "ablations", "weights")}


def result(loss: str, rate: float, seed: int, accuracy: float, chosen: float = 0.2) -> dict:
    sides = {"eval/inverse_perplexity/chosen": chosen, "eval/inverse_perplexity/rejected": 0.1}
    sides |= {"eval/logps/chosen": -2.0, "eval/logps/rejected": -3.0}
    line = {"step": 1, "pairs_per_second": 4.0, "peak_memory_gb": 3.0}
    flags = {"batch_size": 8, "max_steps": 1}
    return {
        "loss": loss,
        "learning_rate": rate,
        "seed": seed,
        "setting": {"pairs": "few", "versions": "new", "flags": flags},
        "before": sides | {"eval/accuracy": 0.5, "eval/logps/chosen": -2.5},
        "after": sides | {"eval/accuracy": accuracy},
        "steps": [line],
        "answer_tokens": 10,
        "finished": 1.0,
    }


def test_table_by_hand():
    runs = [result("dpo", 1e-5, 0, 0.5), result("dpo", 1e-5, 1, 0.7)]
    _, _, row = study.table([("dpo", 1e-5, runs)]).splitlines()
    cells = row.removeprefix("| ").removesuffix(" |").split(" | ")
    assert cells[:3] == ["dpo", "1e-05", "2"]
    assert cells[3] == "0.600 ± 0.141"  # the sample standard deviation of 0.5 and 0.7 is 0.2/√2
    assert cells[4:7] == ["0.2000 ± 0.0000", "0.1000 ± 0.0000", "0.1000 ± 0.0000"]
    assert cells[7:9] == ["0.500 ± 0.000", "0.000 ± 0.000"]
    assert cells[10:] == ["2.0 ± 0.0", "3.0 ± 0.0"]  # 8 pairs at 4 pairs/s


def test_every_loss_has_its_better_rate():
    low, high = 1e-5, 3e-5
    results = [result("simper", high, 0, 0.5), result("simper", low, 0, 0.9)]
    results += [result("dpo", low, 0, 0.7), result("dpo", high, 0, 0.6)]
    results += [result("ipo", low, 0, 0.6), result("ipo", high, 0, 0.6, chosen=0.3)]
    results += [result(*study.START, 0, 1.0)]
    results += [{"loss": "sft", "learning_rate": low, "seed": 0, "error": "diverged"}]
    rates = study.best_rates(study.group_runs(results))
    assert rates == {"simper": low, "dpo": low, "ipo": high}
    assert "sft at 1e-05, seed 0: diverged" in study.tables(results)


def test_other_settings_are_not_mixed(tiny_study, monkeypatch):
    folder, _, _ = tiny_study
    monkeypatch.setattr(study, "FLAGS", study.FLAGS | {"max_steps": 4})
    with pytest.raises(InputError, match="holds runs of another setting"):
        study.main()


def test_committed_tables_are_those_of_the_committed_results(monkeypatch):
    monkeypatch.setattr(study, "LEARNING_RATES", RATES)
    page = (ROOT / "docs" / "study.md").read_text()
    results = study.read_results(ROOT / "docs" / "study.jsonl")
    assert f"{study.BEGIN}\n\n{study.tables(results)}\n\n{study.END}" in page
    lines = [line for result in results for line in result.get("steps", [])]
    assert all(math.isfinite(value) for line in lines for value in line.values())
    assert {r["loss"] for r in results} <= set(LOSSES) and simper_loss is LOSSES["simper"]


# ---- Figures of any runs -------------------------------------------------------------------------


def test_plots_command(tiny_study, tmp_path):
    folder, _, _ = tiny_study
    runs = [str(folder / "runs" / name) for name in ("simper-3e-05-0", "simper_log-3e-05-0")]
    figure = tmp_path / "figure.png"
    for flags in ([], ["--heldout"]):
        command = [sys.executable, "-m", "eval.plots", *runs, "--output", str(figure), *flags]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert figure.stat().st_size > 10_000
        figure.unlink()


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
    with pytest.raises(InputError, match="the runs of x .*the same steps"):
        plots.plot({"x": [first, second[:1]]}, figure, panels)


def test_plots_of_nothing(tmp_path):
    with pytest.raises(InputError, match="there is no such file"):
        plots.read_run(str(tmp_path / "nowhere"))
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "epoch": 0.5, "loss": 1.0}\n')
    assert plots.read_run(str(tmp_path)) == [{"step": 1, "epoch": 0.5, "loss": 1.0}]
    with pytest.raises(InputError, match="no metrics of evaluations"):
        plots.read_run(str(tmp_path), heldout=True)


def test_matplotlib_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(InputError, match="eval/requirements.txt"):
        plots.plot({}, str(tmp_path / "figure.png"))
