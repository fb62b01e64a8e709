"""Results of the evaluations: how they are written, and the paper's kind of table over any number of them.

    python -m eval.report results/*                          # prints the tables
    python -m eval.report results/* --output report          # and writes report.md and report.csv

Every tool of eval/ writes one JSON file, OUTPUT_DIR/MODEL/BENCHMARK.json. A table has a row for each model and a column for
each score; its last column is the average rank over the others, ties averaged, and blank for a model that lacks a score.
"""

import argparse
import csv
import hashlib
import importlib.metadata
import json
import sys
from datetime import UTC, datetime
from pathlib import Path

from data import InputError
from model import resolve_model, weights_fingerprint

# Tables: {title: {(benchmark, score): column}}
TABLES = {
    "Open LLM Leaderboard": {
        ("leaderboard", name): name
        for name in (
            "MMLU-Pro", "IFEval", "BBH", "GPQA", "MuSR", "MATH", "GSM8K", "ARC-Challenge", "TruthfulQA", "Winogrande",
        )
    },
    "Instruction following": {
        ("alpaca_eval2", "length_controlled_winrate"): "AlpacaEval 2 LC %",
        ("alpaca_eval2", "win_rate"): "AlpacaEval 2 WR %",
        ("mt_bench", "score"): "MT-Bench",
    },
    "Held-out preferences": {
        ("preference", "accuracy"): "accuracy",
        ("preference", "accuracy_sum"): "accuracy (sums)",
        ("preference", "inverse_perplexity/margin"): "margin",
    },
}  # fmt: skip


def file_sha256(path: str | Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_result(
    folder: Path,
    benchmark: str,
    model: str,
    scores: dict[str, float],
    errors: dict[str, float] | None = None,
    settings: dict | None = None,
    inputs: dict[str, str] | None = None,
    packages: tuple[str, ...] = (),
    wandb_mode: str = "off",
) -> dict:
    """Write folder/BENCHMARK.json and return what it holds.

    model: folder or hub id; scores: numbers by name; errors: standard errors of some of them; settings: decoding and all else
    that decides the scores; inputs: SHA-256 of what was read, by file or task; packages: names whose versions matter;
    wandb_mode: off, or online or offline for a wandb run with the scores as a table.
    """
    folder.mkdir(parents=True, exist_ok=True)
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "datasets", *packages)}
    result = {"benchmark": benchmark, "model": model, "scores": scores, "standard_errors": errors or {}}
    result |= {"settings": settings or {}, "inputs_sha256": inputs or {}, "versions": versions}
    result |= {
        "weights_sha256": weights_fingerprint(resolve_model(model)),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    (folder / f"{benchmark}.json").write_text(json.dumps(result, indent=1) + "\n")
    if wandb_mode != "off":
        import wandb

        with wandb.init(
            project="simper", job_type="eval", name=f"{folder.name} {benchmark}", mode=wandb_mode, dir=folder, config=result
        ) as run:
            rows = [[folder.name, name, value, result["standard_errors"].get(name)] for name, value in scores.items()]
            run.log({benchmark: wandb.Table(columns=["model", "score", "value", "standard error"], data=rows)})
            run.summary.update(scores)
    return result


def read_results(folders: list[str]) -> dict[str, dict[str, dict]]:
    """{model: {benchmark: result}} of folders that write_result wrote to; files among them are passed over, and
    folders without a result named. Raises InputError for results of different weights under one name."""
    found = {}
    for folder in map(Path, folders):
        if folder.is_file():  # such as preference.png, in results/*
            continue
        results = {}
        for path in sorted(folder.glob("*.json")):
            content = json.loads(path.read_text())
            if isinstance(content, dict) and {"benchmark", "scores", "weights_sha256"} <= content.keys():
                results[content["benchmark"]] = content
        if not results:
            print(f"{folder}: holds no result of an evaluation (a quick look writes none)", file=sys.stderr)
            continue
        if folder.name in found:
            raise InputError(f"{folder}: there is another folder of that name; a table has one row for each name")
        weights = {benchmark: result["weights_sha256"] for benchmark, result in results.items()}
        if len(set(weights.values())) > 1:
            raise InputError(f"{folder}: {', '.join(weights)} are results of different weights; evaluate them again")
        found[folder.name] = results
    return found


def average_ranks(rows: list[list[float | None]]) -> list[float | None]:
    """The mean over columns of each row's rank (1 is the largest value; equal values share the mean of their ranks); None for a
    row that lacks a value, which no column ranks.

    >>> average_ranks([[3.0, 5.0], [1.0, 5.0], [9.0, None]])
    [1.25, 1.75, None]
    """
    whole = [row for row in rows if None not in row]
    ranks = []
    for row in rows:
        if None in row or not row:
            ranks.append(None)
            continue
        places = [
            sum(other[c] > value for other in whole) + (sum(other[c] == value for other in whole) + 1) / 2
            for c, value in enumerate(row)
        ]
        ranks.append(sum(places) / len(places))
    return ranks


def tables(results: dict[str, dict[str, dict]]) -> list[tuple[str, list[str], list[list]]]:
    """[(title, columns, rows)]: one row for each model that has any of the table's scores, its name first and its average rank
    last; scores as numbers, None where there is none. Columns that no model has are left out."""
    found = []
    for title, columns in TABLES.items():
        cells = {
            name: [result.get(benchmark, {}).get("scores", {}).get(score) for benchmark, score in columns]
            for name, result in results.items()
        }
        kept = [c for c in range(len(columns)) if any(row[c] is not None for row in cells.values())]
        rows = [[name, *(row[c] for c in kept)] for name, row in cells.items() if any(value is not None for value in row)]
        if rows:
            for row, rank in zip(rows, average_ranks([row[1:] for row in rows])):
                row.append(rank)
            found.append((title, ["model", *(list(columns.values())[c] for c in kept), "average rank"], rows))
    return found


def markdown(title: str, columns: list[str], rows: list[list]) -> str:
    """One table in Markdown; the best value of every column is bold."""
    lines = [f"**{title}**\n", "| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    best = [None]
    for c in range(1, len(columns)):
        values = [row[c] for row in rows if row[c] is not None]
        best.append((min if columns[c] == "average rank" else max)(values) if len(values) > 1 else None)
    for row in rows:
        cells = [row[0]]
        for value, top in zip(row[1:], best[1:]):
            text = "–" if value is None else f"{value:.2f}" if abs(value) >= 1 else f"{value:.4f}"
            cells.append(f"**{text}**" if value is not None and value == top else text)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", metavar="FOLDER", help="of one model's results each")
    parser.add_argument("--output", default="", help="also write NAME.md and NAME.csv")
    args = parser.parse_args()
    found = tables(read_results(args.folders))
    if not found:
        raise InputError("none of the results has a score that a table shows")
    text = "\n".join(markdown(*table) for table in found)
    print(text, end="")
    if args.output:
        Path(f"{args.output}.md").write_text(text)
        with open(f"{args.output}.csv", "w", newline="") as file:
            writer = csv.writer(file)
            for title, columns, rows in found:
                writer.writerows([[title], columns, *rows, []])


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"error: {error}")
