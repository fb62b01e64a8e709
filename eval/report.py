"""Results of the evaluations: how they are written, and the paper's kind of table over any number
of them.

    python -m eval.report results/*                          # prints the tables
    python -m eval.report results/* --output report          # and writes report.md and report.csv
    python -m eval.report results/* --by_start_model         # tables for each of several set-ups

Every benchmark of eval/ writes one JSON file, OUTPUT_DIR/MODEL/BENCHMARK.json. A table has a row
for each model and a column for each score, with its standard error where that is known. A column
whose scores were obtained under different conditions (judge, template, decoding, data) gets a
footnote that names them. Bold is a score that is resolved: better than every other of its column,
by more than chance gives once in twenty such tables (Bonferroni). Standard errors are taken as
those of independent items, which is too careful where models have answered the same ones:
eval.preference and eval.generate compare these item by item.
"""

import argparse
import csv
import hashlib
import importlib.metadata
import json
import math
import os
import statistics
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import yaml

from eval.judge import TIMEOUT, URL
from runtime.cache import file_digest
from runtime.command_line import run_command
from runtime.errors import InputError
from runtime.log import read_config, write_whole
from runtime.weights import local_model, model_fingerprint, resolve_model


def at_least(minimum: float, kind: type = int) -> Callable[[str], float]:
    """A type for argparse: a number of `kind` that is not below `minimum`."""

    def parse(text: str) -> float:
        value = kind(text)
        if not value >= minimum:
            raise argparse.ArgumentTypeError(f"must be at least {minimum}, not {text}")
        return value

    parse.__name__ = kind.__name__  # what argparse calls it where the text is no number
    return parse


def endpoint(url: str) -> str:
    """A type for argparse: a URL that may be printed and written to results."""
    if "@" in urlsplit(url).netloc:
        raise argparse.ArgumentTypeError("must hold no password; a key is given as OPENAI_API_KEY")
    return url


# Arguments that several commands have, as argparse's add_argument takes them.
SHARED_ARGUMENTS = {
    "model": {"metavar": "MODEL", "help": "folder or hub id"},
    "--engine": {
        "choices": ["transformers", "vllm"],
        "default": "transformers",
        "help": "what generates",
    },
    "--engine_args": {
        "default": "",
        "metavar": "NAME=VALUE,...",
        "help": "of the engine, as in tensor_parallel_size=8,max_model_len=8192 for vllm",
    },
    "--batch_size": {"type": at_least(1), "default": 8, "help": "prompts at once; vllm: not used"},
    "--template_args": {"default": "", "metavar": "NAME=VALUE,...", "help": "as for train.py"},
    "--seed": {"type": at_least(0), "default": 0, "help": "of sampling"},
    "--columns": {"default": "", "metavar": "NAME=COLUMN,...", "help": "as for train.py"},
    "--generate_only": {"action": "store_true", "help": "stop before the judge"},
    "--judge_base_url": {
        "type": endpoint,
        "default": URL,
        "metavar": "URL",
        "help": "an OpenAI-compatible endpoint",
    },
    "--judge_timeout": {
        "type": at_least(1, float),
        "default": TIMEOUT,
        "metavar": "SECONDS",
        "help": "that a reply may take",
    },
    "--output_dir": {"default": "results", "help": "folder of all models' results"},
    "--wandb": {"choices": ["off", "online", "offline"], "default": "off", "help": "log scores"},
}
JUDGE = ("--judge_base_url", "--judge_timeout")
GENERATION = ("--engine", "--engine_args", "--batch_size", "--seed", "--template_args")
LEADERBOARD = (
    "MMLU-Pro", "IFEval", "BBH", "GPQA", "MuSR", "MATH", "GSM8K", "ARC-Challenge", "TruthfulQA",
    "Winogrande",
)  # fmt: skip
# Tables: {title: {(benchmark, score): column}}
TABLES = {
    "Open LLM Leaderboard": {("leaderboard", name): name for name in LEADERBOARD},
    "Open LLM Leaderboard 2, normalized": {
        ("leaderboard", f"normalized/{name}"): name for name in LEADERBOARD[:6]
    },
    "Instruction following": {
        ("alpaca_eval2", "length_controlled_winrate"): "AlpacaEval 2 LC %",
        ("alpaca_eval2", "win_rate"): "AlpacaEval 2 WR %",
        ("mt_bench", "score"): "MT-Bench",
        ("win_rate", "win_rate"): "win rate against chosen %",
    },
    "Held-out preferences": {
        ("preference", "accuracy"): "accuracy",
        ("preference", "accuracy_sum"): "accuracy (sums)",
        ("preference", "inverse_perplexity/margin"): "margin",
    },
}


# The settings that must be equal for scores to be compared.
DECODING = ("temperature", "top_p", "max_new_tokens")
CONDITIONS = {
    "alpaca_eval2": ("annotator", "judge_model", "judge_version", "reference_sha256", *DECODING),
    "mt_bench": ("judge", "judge_version", "reference", "repeats"),
    "win_rate": ("judge", "judge_version", "data_sha256", "num_prompts", *DECODING),
    "preference": ("data", "max_length", "max_prompt_length", "truncation"),
}


# ---- What the commands of eval/ share ------------------------------------------------------------


class HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """With the defaults, where there are any."""

    def _get_help_string(self, action):
        none = action.default in (None, "") or action.default is False
        return action.help if none else super()._get_help_string(action)


def make_parser(description: str | None, *shared: str) -> argparse.ArgumentParser:
    """A parser whose --help prints `description` as it is, and the defaults, with the named
    SHARED_ARGUMENTS."""
    parser = argparse.ArgumentParser(description=description, formatter_class=HelpFormatter)
    for name in shared:
        parser.add_argument(name, **SHARED_ARGUMENTS[name])
    return parser


def parse_engine_args(text: str) -> dict:
    """--engine_args → {name: value}. Raises InputError if it is not of the form name=value,..."""
    values = {}
    for part in filter(None, text.split(",")):
        name, equals, value = part.partition("=")
        if not (name.strip().isidentifier() and equals):
            raise InputError(f"--engine_args {text}: {part!r} is not of the form name=value")
        try:
            values[name.strip()] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise InputError(f"--engine_args {text}: {value!r} cannot be read") from error
    return values


def file_sha256(path: str | Path) -> str:
    return file_digest(Path(path), hashlib.sha256)


def read_records(path: Path, *keys: str) -> list[dict]:
    """The JSON objects of a file of answers or judgments, if there is one. A last line whose
    writing was interrupted is removed. Raises InputError, naming the line, for one that is no JSON
    object, or is without one of the keys."""
    content = path.read_bytes() if path.exists() else b""
    whole = content[: content.rfind(b"\n") + 1]
    if whole != content:
        os.truncate(path, len(whole))  # not written anew: that could fail, and lose all
    records = []
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            records.append(json.loads(line))
            if not isinstance(records[-1], dict):
                raise ValueError("no JSON object")
            if lacking := [key for key in keys if key not in records[-1]]:
                raise ValueError(f"it has no {lacking[0]}")
        except (ValueError, RecursionError) as error:  # UnicodeDecodeError, JSONDecodeError, too
            advice = "remove the line, and what it held is made again"
            raise InputError(f"{path}: line {number} is damaged ({error}): {advice}") from None
    return records


def run_config(model: str) -> dict:
    """read_config of the run whose final/ `model` is; {} for any other model."""
    final = Path(local_model(model)).resolve()
    return read_config(final.parent) if final.name == "final" else {}


def start_model(model: str) -> str:
    """The model that training started from, by the config.yaml of the run whose final/ `model` is;
    of any other model the model itself."""
    return run_config(model).get("model", model)


def made_by(model: str) -> dict[str, str]:
    """The digest of the code and the commit of the run whose final/ `model` is; {} for any other
    model."""
    config = run_config(model)
    return {name: config[name] for name in ("code", "commit") if name in config}


def threshold(comparisons: int) -> float:
    """How many standard errors a difference must have to be resolved at 5 %, of so many that are
    looked at (Bonferroni; normal approximation). One comparison: 1.96."""
    return statistics.NormalDist().inv_cdf(1 - 0.025 / max(1, comparisons))


def paired_differences(
    values: dict[str, np.ndarray], first: dict[str, np.ndarray]
) -> dict[str, tuple[float, float]]:
    """{score: (mean difference to the first model, its standard error)}, item by item, of the
    scores that both have. values, first: {score: (items,)}, the same items in the same order."""
    found = {}
    for name in values.keys() & first.keys():
        difference = np.asarray(values[name], dtype=float) - np.asarray(first[name], dtype=float)
        error = difference.std(ddof=1) / math.sqrt(len(difference)) if len(difference) > 1 else 0.0
        found[name] = (float(difference.mean()), float(error))
    return found


def print_scores(
    columns: list[tuple[str, dict[str, float], dict[str, float]]],
    items: list[dict[str, np.ndarray]] | None = None,
) -> None:
    """Print [(model, scores, standard errors)] side by side, with a row for each score; "–" for one
    that a model does not have, or that is None. items: of each model, {score: a value for each
    item}, if all have the same items: then a column after each model but the first has its
    difference to the first with the 95 % interval, and a star where that is resolved."""
    names = list(dict.fromkeys(name for _, scores, _ in columns for name in scores))
    width = max(map(len, names)) + 2
    header, differences = " " * width, []
    for number, (model, _, _) in enumerate(columns):
        header += f"{model[-26:]:>28}"
        differences.append(paired_differences(items[number], items[0]) if items and number else {})
        header += f"{'− first [95 %]':>32}" if differences[number] else ""
    least = threshold(sum(error > 0 for found in differences for _, error in found.values()))
    print(header)
    for name in names:
        line = f"{name:<{width}}"
        for (_, scores, errors), found in zip(columns, differences):
            cell = "–" if scores.get(name) is None else f"{scores[name]:.4f}"
            line += f"{cell + (f' ± {errors[name]:.4f}' if name in errors else ''):>28}"
            if found:
                line += f"{difference_text(*found.get(name, (0, 0)), least):>32}"
        print(line.rstrip())
    if any(differences):
        print(f"* resolved at 5 %, of all differences in this table ({least:.2f} standard errors)")


def difference_text(mean: float, error: float, least: float) -> str:
    """A difference with its 95 % interval, and a star if it is resolved; "" if there is none."""
    if not error:
        return f"{mean:+.4f} in each" if mean else ""
    low, high = mean - 1.96 * error, mean + 1.96 * error
    return f"{mean:+.4f} [{low:+.4f}, {high:+.4f}]{'*' if abs(mean) > least * error else ' '}"


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
) -> None:
    """Write folder/BENCHMARK.json, which names the run that made the model, if one did.

    model: folder or hub id; scores: numbers by name; errors: standard errors of some of them;
    settings: decoding and all else that decides the scores; inputs: SHA-256 of what was read, by
    file or task; packages: names of packages whose versions matter, besides the usual ones;
    wandb_mode: off, or online or offline for a wandb run with the scores as a table.
    """
    folder.mkdir(parents=True, exist_ok=True)
    packages = ("torch", "transformers", "datasets", *packages)
    result = {
        "benchmark": benchmark,
        "model": model,
        "start_model": start_model(model),
        "scores": scores,
        "standard_errors": errors or {},
        "settings": settings or {},
        "inputs_sha256": inputs or {},
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "model_sha256": model_fingerprint(resolve_model(model)),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    result |= {"run": run} if (run := made_by(model)) else {}
    write_whole(folder / f"{benchmark}.json", json.dumps(result, indent=1) + "\n")
    if wandb_mode == "off":
        return
    import wandb

    with wandb.init(
        project="simper",
        job_type="eval",
        name=f"{folder.name} {benchmark}",
        mode=wandb_mode,
        dir=folder,
        config=result,
    ) as run:
        table = wandb.Table(columns=["model", "score", "value", "standard error"])
        for name, value in scores.items():
            table.add_data(folder.name, name, value, result["standard_errors"].get(name))
        run.log({benchmark: table})
        run.summary.update(scores)


# ---- The tables ----------------------------------------------------------------------------------


def read_results(folders: list[str]) -> dict[str, dict[str, dict]]:
    """{model: {benchmark: result}} of folders that write_result wrote to. Files among `folders` are
    ignored; folders without a result are reported on stderr. Raises InputError for two folders of
    one name, and for a folder with results of different models."""
    results = {}
    for folder in map(Path, folders):
        if folder.is_file():  # such as preference.png, in results/*
            continue
        of_model = {}
        for path in sorted(folder.glob("*.json")):
            try:
                content = json.loads(path.read_text())
            except (ValueError, RecursionError) as error:
                raise InputError(f"{path} is damaged ({error}): evaluate again") from None
            if isinstance(content, dict) and "benchmark" in content:
                check_result(path, content)
                of_model[content["benchmark"]] = content
        if not of_model:
            print(
                f"{folder}: holds no result of an evaluation (a quick look writes none)",
                file=sys.stderr,
            )
            continue
        if folder.name in results:
            raise InputError(
                f"{folder}: there is another folder of that name; a table has one row for each name"
            )
        if len({result["model_sha256"] for result in of_model.values()}) > 1:
            raise InputError(
                f"{folder}: {', '.join(of_model)} are results of different models (weights or "
                "config); evaluate them again"
            )
        results[folder.name] = of_model
    return results


def check_result(path: Path, content: dict) -> None:
    """Raise InputError if a file is no result of write_result, or a score is no finite number."""
    kinds = {"scores": dict, "standard_errors": dict, "settings": dict, "inputs_sha256": dict}
    for key, kind in (kinds | {"benchmark": str, "model_sha256": str}).items():
        if not isinstance(content.get(key), kind):
            raise InputError(f"{path} is no whole result, without {key}: evaluate again")
    for name, score in content["scores"].items():
        if not isinstance(score, int | float) or not abs(score) < 1e300:
            raise InputError(f"{path}: {name} is {score}, no number to rank: evaluate again")


def resolved(column: list[tuple[float, float | None] | None], comparisons: int) -> int | None:
    """The index of a column's best (score, standard error), if it is above every other by
    `threshold` standard errors of their difference; None if it is not, if an error is not known, or
    if there is nothing to compare.

    >>> resolved([(60.0, 1.0), (50.0, 1.0), None], 1), resolved([(60.0, 1.0), (58.0, 1.0)], 1)
    (0, None)
    """
    known = [(score, error, index) for index, (score, error) in enumerate_known(column)]
    if len(known) < 2 or any(error is None for _, error, _ in known):
        return None
    (best, error, index), *others = sorted(known, reverse=True)
    least = threshold(comparisons)
    clear = (best - score > least * math.hypot(error, its) for score, its, _ in others)
    return index if all(clear) else None


def enumerate_known(column: list) -> list[tuple[int, tuple[float, float | None]]]:
    """Index and value of what is not None."""
    return [(index, value) for index, value in enumerate(column) if value is not None]


def conditions(result: dict, score: str) -> dict:
    """What a score was obtained under, as far as it decides whether it can be compared."""
    settings = result["settings"]
    if result["benchmark"] == "leaderboard":  # each benchmark has its own
        own = settings.get(score.removeprefix("normalized/"), {})
        return {name: own.get(name) for name in ("apply_chat_template", "shots", "lm_eval")}
    found = {name: settings.get(name) for name in CONDITIONS[result["benchmark"]]}
    if result["benchmark"] in ("preference", "mt_bench"):
        files = {k: v for k, v in result["inputs_sha256"].items() if k != "answers"}
        found["files"] = sorted(digest[:12] for digest in files.values())
        found["pairs"] = result["scores"].get("pairs")  # a tokenizer may have led to drop some
    return found


def footnote(by_model: dict[str, dict]) -> str:
    """{model: conditions} -> what differs among them, or an empty text."""
    names = list(dict.fromkeys(name for found in by_model.values() for name in found))
    differ = [n for n in names if len({repr(c.get(n)) for c in by_model.values()}) > 1]
    models = {}
    for model, found in by_model.items():
        text = ", ".join(f"{name} {found.get(name)}" for name in differ)
        models.setdefault(text, []).append(model)
    return "; ".join(f"{', '.join(m)}: {text}" for text, m in models.items()) if differ else ""


def tables(results: dict[str, dict[str, dict]]) -> list[tuple[str, list[str], list[list], list]]:
    """[(title, columns, rows, footnotes)]: one row for each model that has any of the table's
    scores, its name first; scores as (value, standard error or None), or None where there is none.
    footnotes: one for each score's column, empty if its scores can be compared. Columns that no
    model has and tables without rows are left out."""
    nonempty = []
    for title, columns in TABLES.items():
        rows, header, footnotes = {}, [], []
        for (benchmark, name), column in columns.items():
            having = {
                model: of_model[benchmark]
                for model, of_model in results.items()
                if name in of_model.get(benchmark, {"scores": {}})["scores"]
            }
            if not having:
                continue
            for model, result in having.items():
                value = result["scores"][name], result["standard_errors"].get(name)
                rows.setdefault(model, {})[column] = value
            header.append(column)
            footnotes.append(footnote({m: conditions(r, name) for m, r in having.items()}))
        lines = [[model, *map(row.get, header)] for model, row in rows.items()]
        if lines:
            nonempty.append((title, ["model", *header], lines, footnotes))
    return nonempty


def markdown(title: str, columns: list[str], rows: list[list], footnotes: list[str]) -> str:
    """One table in Markdown. A score that is `resolved` among all comparisons of the table is
    bold."""
    cells, notes, header = [[row[0] for row in rows]], [], [columns[0]]
    comparable = [len(enumerate_known(c)) for c, n in zip(list(zip(*rows))[1:], footnotes) if not n]
    comparisons = sum(count - 1 for count in comparable)
    for column, values, note in zip(columns[1:], list(zip(*rows))[1:], footnotes):
        # Percentages and ratings with two digits; shares and differences with four.
        digits = 4 if title.startswith("Held-out") else 2
        best = None if note else resolved(values, comparisons)
        texts = []
        for index, (value, error) in enumerate(value or (None, None) for value in values):
            text = "–" if value is None else f"{value:.{digits}f}"
            text = f"**{text}**" if index == best else text
            texts.append(text + (f" ± {error:.{digits}f}" if error is not None else ""))
        cells.append(texts)
        if note:
            notes.append(f"{column}: not comparable. {note}")
        header.append(f"{column} ({len(notes)})" if note else column)
    lines = [f"**{title}**\n", f"| {' | '.join(header)} |"]
    lines.append("|---" * len(columns) + "|")
    lines += [f"| {' | '.join(line)} |" for line in zip(*cells)]
    lines += [f"\n({number}) {note}" for number, note in enumerate(notes, 1)]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("folders", nargs="+", metavar="FOLDER", help="of one model's results each")
    parser.add_argument("--output", default="", help="also write OUTPUT.md and OUTPUT.csv")
    parser.add_argument(
        "--by_start_model", action="store_true", help="tables for each model that runs started from"
    )
    args = parser.parse_args()
    results, groups = read_results(args.folders), {}
    for name, of_model in results.items():
        start = next(iter(of_model.values())).get("start_model", "") if args.by_start_model else ""
        groups.setdefault(start, {})[name] = of_model
    nonempty = [
        (f"{title}, from {start}" if start else title, *table)
        for start, group in sorted(groups.items())
        for title, *table in tables(group)
    ]
    if not nonempty:
        raise InputError("none of the results has a score that a table shows")
    text = "\n".join(markdown(*table) for table in nonempty)
    print(text, end="")
    if args.output:
        Path(args.output).parent.mkdir(parents=True, exist_ok=True)
        Path(f"{args.output}.md").write_text(text)
        with open(f"{args.output}.csv", "w", newline="") as file:
            writer = csv.writer(file)
            for title, (first, *scores), rows, footnotes in nonempty:
                header = [c for score in scores for c in (score, f"{score} standard error")]
                writer.writerows([[title], [first, *header]])
                for model, *values in rows:
                    pairs = (value or (None, None) for value in values)
                    writer.writerow([model, *(x for pair in pairs for x in pair)])
                writer.writerows([[score, note] for score, note in zip(scores, footnotes) if note])
                writer.writerow([])


if __name__ == "__main__":
    run_command(main, shows=True)
