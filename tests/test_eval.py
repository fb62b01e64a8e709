"""The evaluations: scores against plain forwards and arithmetic by hand, official formats, and the tables."""

import csv
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_model, make_tokenizer
from test_train import write_pairs

from data import InputError, load_pairs
from eval import report
from eval.preference import score

ROOT = Path(__file__).parent.parent


def command(module: str, *args, **environment) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", f"eval.{module}", *map(str, args)], cwd=ROOT, capture_output=True, text=True,
        env=os.environ | environment,
    )  # fmt: skip


@pytest.fixture(scope="module")
def other_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "other" / "final"
    make_model("llama", seed=1).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


# ---- Preference -----------------------------------------------------------------------------------------------------


def test_preference_equals_plain_forwards(model_folder, other_folder, tmp_path):
    data = Path(write_pairs(tmp_path / "pairs.jsonl", 9))
    rows = [json.loads(line) | {"category": "odd" if i % 2 else "even"} for i, line in enumerate(data.read_text().splitlines())]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--data", data, "--output_dir", tmp_path / "results", "--max_length", 96, "--max_prompt_length", 60]
    done = command("preference", model_folder, other_folder, *flags, "--micro_batch_tokens", 250)
    assert done.returncode == 0, done.stderr[-3000:]
    pairs = load_pairs(str(data), make_tokenizer(), 96, 60)[0]
    for name, seed in (("tiny", 0), ("other", 1)):
        model, sums = make_model("llama", seed=seed).double(), []
        for pair in pairs:
            for side in ("chosen", "rejected"):
                ids = torch.tensor([pair["prompt"] + pair[side]])
                with torch.no_grad():
                    logps = model(ids).logits[0, :-1].log_softmax(dim=-1).gather(1, ids[0, 1:, None])[:, 0]
                sums.append(logps[len(pair["prompt"]) - 1 :].sum().item())
        sums = np.array(sums).reshape(-1, 2)
        means = sums / np.array(pairs["lengths"])[:, 1:]
        result = json.loads((tmp_path / "results" / name / "preference.json").read_text())
        correct = means[:, 0] > means[:, 1]
        expected = {
            "accuracy": correct.mean(),
            "accuracy_sum": (sums[:, 0] > sums[:, 1]).mean(),
            "accuracy/even": correct[::2].mean(),
            "accuracy/odd": correct[1::2].mean(),
            "inverse_perplexity/chosen": np.exp(means[:, 0]).mean(),
            "inverse_perplexity/rejected": np.exp(means[:, 1]).mean(),
            "inverse_perplexity/margin": (np.exp(means[:, 0]) - np.exp(means[:, 1])).mean(),
            "logps/chosen": means[:, 0].mean(),
            "logps/rejected": means[:, 1].mean(),
            "logps/margin": (means[:, 0] - means[:, 1]).mean(),
            "length/chosen": np.array(pairs["lengths"])[:, 1].mean(),
            "length/rejected": np.array(pairs["lengths"])[:, 2].mean(),
            "pairs": 9,
        }
        assert result["scores"] == pytest.approx(expected, rel=1e-5)
        assert result["inputs_sha256"] == {str(data): report.file_sha256(data)} and "torch" in result["versions"]
        kept = [json.loads(line) for line in (tmp_path / "results" / name / "preference_pairs.jsonl").read_text().splitlines()]
        assert np.allclose([line["logps"] for line in kept], sums, rtol=1e-5) and [line["row"] for line in kept] == [*range(9)]
    assert (tmp_path / "results" / "preference.png").stat().st_size > 10_000
    assert "tiny" in done.stdout and "other" in done.stdout and "accuracy/even" in done.stdout


def test_preference_scores_by_hand():
    # two pairs: probabilities per token 1/2 and 1/4; 1/8 and 1/4
    sums = np.log([[1 / 4, 1 / 64], [1 / 8, 1 / 16]])
    scores, errors = score(sums, np.array([[2, 3], [1, 2]]))
    assert scores["accuracy"] == 0.5 and scores["accuracy_sum"] == 1.0 and scores["pairs"] == 2
    assert scores["inverse_perplexity/chosen"] == pytest.approx(5 / 16)
    assert scores["inverse_perplexity/margin"] == pytest.approx((1 / 4 - 1 / 8) / 2)
    assert errors["accuracy"] == pytest.approx(math.sqrt(0.5) / math.sqrt(2))  # 1 and 0: sample deviation √½, over √2


def test_preference_refuses_two_models_of_one_name(model_folder):
    done = command("preference", model_folder, model_folder)
    assert done.returncode and "error: two models have the same name" in done.stderr


# ---- Report ---------------------------------------------------------------------------------------------------------


def write(folder: Path, model_folder: Path, benchmark: str, scores: dict) -> None:
    report.write_result(folder, benchmark, str(model_folder), scores)


def test_average_ranks_by_hand():
    # first column: 1st, 2nd and 3rd; second: two share 1st and 2nd; the last row lacks a value and takes no rank away
    assert report.average_ranks([[3, 5], [2, 5], [1, 0], [9, None]]) == [1.25, 1.75, 3.0, None]
    assert report.average_ranks([[1, 1], [1, 1]]) == [1.5, 1.5]
    assert report.average_ranks([[None]]) == [None]


def test_report(model_folder, other_folder, tmp_path):
    for name, folder, values in (("a", model_folder, (60.0, 0.5)), ("b", other_folder, (50.0, None))):
        write(tmp_path / name, folder, "leaderboard", {"GSM8K": values[0]} | ({"BBH": values[1]} if values[1] else {}))
    write(tmp_path / "a", model_folder, "mt_bench", {"score": 7.125, "turn 1": 8.0})
    done = command("report", tmp_path / "a", tmp_path / "b", "--output", tmp_path / "report")
    assert done.returncode == 0, done.stderr
    assert done.stdout == (tmp_path / "report.md").read_text()
    assert "| model | BBH | GSM8K | average rank |" in done.stdout
    assert "| a | 0.5000 | **60.00** | 1.00 |" in done.stdout and "| b | – | 50.00 | – |" in done.stdout
    assert "| model | MT-Bench | average rank |" in done.stdout and "7.12" in done.stdout
    rows = list(csv.reader(open(tmp_path / "report.csv")))
    assert rows[:4] == [
        ["Open LLM Leaderboard"], ["model", "BBH", "GSM8K", "average rank"], ["a", "0.5", "60.0", "1.0"], ["b", "", "50.0", ""],
    ]  # fmt: skip


def test_report_refuses_what_it_cannot_compare(model_folder, other_folder, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds no result"):
        report.read_results([str(tmp_path / "empty")])
    write(tmp_path / "a", model_folder, "leaderboard", {"GSM8K": 1.0})
    write(tmp_path / "a", other_folder, "mt_bench", {"score": 1.0})
    with pytest.raises(InputError, match="different weights"):
        report.read_results([str(tmp_path / "a")])
    write(tmp_path / "x" / "b", model_folder, "leaderboard", {"GSM8K": 1.0})
    write(tmp_path / "y" / "b", model_folder, "leaderboard", {"GSM8K": 2.0})
    with pytest.raises(InputError, match="another folder of that name"):
        report.read_results([str(tmp_path / "x" / "b"), str(tmp_path / "y" / "b")])


def test_results_go_to_wandb(model_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_SILENT", "true")
    report.write_result(tmp_path / "a", "mt_bench", str(model_folder), {"score": 5.0}, {"score": 0.5}, wandb_mode="offline")
    assert list((tmp_path / "a" / "wandb").glob("offline-run-*"))
