"""The paper's kind of table over the results of any number of models.

    python -m eval.report results/*                          # prints the tables
    python -m eval.report results/* --output report          # and writes report.md and report.csv
    python -m eval.report results/dpo --label SimPER='results/simper-*'   # several runs, one method
    python -m eval.report results/* --by_start_model         # tables for each of several set-ups

A table has a row for each model, or for each method of several runs, in the order in which they are
given, and a column for each score, "±" its standard error. Where the first model and another have
answered the same items, a column has their difference with its 95 % interval, item by item; a star
says that it is significant at 5 % among all comparisons of the table (Bonferroni), bold that a
score differs so from every other of its column. The intervals are Student's. The error of a method
is over items and runs. A column whose scores were obtained under different conditions (judge,
template, decoding, data) gets a footnote that names them, and neither differences nor bold. n is
the number of items.
"""

import csv
import json
import math
import statistics
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from eval.leaderboard import BENCHMARKS
from eval.results import (
    AGAINST,
    Difference,
    make_parser,
    matching,
    paired_difference,
    read_items,
)
from runtime.command_line import run_command
from runtime.errors import InputError
from runtime.intervals import FEW

LEADERBOARD = [*BENCHMARKS]
HEAD_TO_HEAD = "Win rate against another model's answers"
NO_RESULT = {"scores": {}}
RUNS = 5  # of a method, of which fewer tell no interval: it would have to be several times as wide
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
        ("win_rate", "length_controlled_winrate"): "win rate against chosen, LC %",
    },
    HEAD_TO_HEAD: {},  # a column for each opponent
    "Held-out preferences": {
        ("preference", "accuracy"): "accuracy",
        ("preference", "accuracy_sum"): "accuracy (sums)",
        ("preference", "inverse_perplexity/margin"): "margin",
    },
}


# The settings that must be equal for scores to be compared.
DECODING = ("temperature", "top_p", "max_new_tokens", "template_args")
CONDITIONS = {
    "alpaca_eval2": ("annotator", "judge", "judge_version", "reference_sha256", *DECODING),
    "mt_bench": ("judge", "judge_version", "reference", "repeats", "template_args"),
    "win_rate": ("judge", "judge_version", "orders", "data_sha256", "num_prompts", *DECODING),
    "preference": ("data", "columns", "max_length", "max_prompt_length", "truncation", "dtype"),
}


@dataclass(frozen=True)
class Score:
    """A score of a model or of a method: its mean over `runs`, and its standard error (None: not
    known) with the degrees of freedom, over items and, of several runs, over these, too. items:
    (n,), the mean over the runs of each item's value, NaN where one has none; None if they are not
    known. of: which items."""

    value: float
    error: float | None
    runs: tuple[float, ...]
    items: np.ndarray | None = None
    of: str = ""
    freedom: float = math.inf

    def over_runs(self) -> tuple[float | None, float]:
        """The standard error over runs and its degrees of freedom: 0 of a single one, not known of
        fewer than RUNS."""
        count = len(self.runs)
        if count == 1:
            return 0.0, math.inf
        if count < RUNS:
            return None, math.nan
        return statistics.stdev(self.runs) / math.sqrt(count), count - 1

    def error_alone(self) -> float | None:
        """The error; None if there are too few items. (0 also means too few, not certainty.)"""
        few = self.items is not None and np.sum(~np.isnan(self.items)) < FEW
        return None if few else self.error or None

    def paired(self, other: "Score") -> bool:
        """Whether both have the same items."""
        return self.items is not None and other.items is not None and self.of == other.of

    def minus(self, other: "Score") -> Difference:
        """Item by item if both have the same items, else as of independent scores."""
        if self.paired(other):
            items = paired_difference(self.items, other.items)
            errors = ((items.error, items.freedom), self.over_runs(), other.over_runs())
            return Difference(items.mean, *together(*errors))
        errors = ((score.error_alone(), score.freedom) for score in (self, other))
        return Difference(self.value - other.value, *together(*errors))


def together(*errors: tuple[float | None, float]) -> tuple[float | None, float]:
    """Standard errors of independent means, each with its degrees of freedom → those of their sum
    (Welch–Satterthwaite); None if one of them is not known."""
    if any(error is None for error, _ in errors):
        return None, math.nan
    variance = sum(error**2 for error, _ in errors)
    spread = sum(error**4 / freedom for error, freedom in errors)
    return math.sqrt(variance), variance**2 / spread if spread else math.inf


def score_of(results: list[dict], name: str) -> Score:
    """A score of one or several runs' results of a benchmark. An error over items is not smaller
    for several runs, which answer the same ones, unless each item's values are known."""
    runs = tuple(result["scores"][name] for result in results)
    errors = [result["standard_errors"].get(name) for result in results]
    error = None if None in errors else math.sqrt(statistics.mean(e**2 for e in errors))
    found = [result["items"].get(name) for result in results]
    items, of, freedom = None, "", math.inf
    if all(found) and len({item["of"] for item in found}) == 1:
        items = np.array([item["values"] for item in found], dtype=float).mean(axis=0)
        of = found[0]["of"]
        if (known := items[~np.isnan(items)]).size > 1:
            freedom = known.size - 1
            if len(runs) > 1:
                error = float(known.std(ddof=1)) / math.sqrt(known.size)
    score = Score(statistics.mean(runs), error, runs, items, of)
    error, freedom = together((error, freedom), score.over_runs())
    return replace(score, error=error, freedom=freedom)


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
                content["items"] = read_items(folder, content)
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
        error = content["standard_errors"].get(name, 0.0)
        for value in (score, error):
            if not isinstance(value, int | float) or not abs(value) < 1e300:
                raise InputError(f"{path}: {name} is {value}, no number to rank: evaluate again")


def resolved(column: list[Score | None], comparisons: int) -> int | None:
    """The index of a column's best score, if it differs significantly from every other; None if
    it does not, or if there is nothing to compare.

    >>> column = [Score(60.0, 1.0, (60.0,)), Score(50.0, 1.0, (50.0,)), None]
    >>> resolved(column, 1), resolved([column[0], Score(58.0, 1.0, (58.0,))], 1)
    (0, None)
    """
    known = [(score.value, index) for index, score in enumerate(column) if score]
    if len(known) < 2:
        return None
    best = max(known)[1]
    differences = [column[best].minus(column[index]) for _, index in known if index != best]
    above = all(d.mean > 0 and d.resolved(comparisons) for d in differences)
    return best if above else None


def conditions(result: dict, score: str) -> dict:
    """What a score was obtained under, as far as it decides whether it can be compared."""
    settings = result["settings"]
    if result["benchmark"] == "leaderboard":  # each benchmark has its own
        benchmark = score.removeprefix("normalized/")
        own = settings.get(benchmark, {})
        found = {name: own.get(name) for name in ("apply_chat_template", "shots", "lm_eval")}
        return found | {"questions": result["items"].get(benchmark, {}).get("of", "")[:12]}
    benchmark = "win_rate" if result["benchmark"].startswith(AGAINST) else result["benchmark"]
    found = {name: settings.get(name) for name in CONDITIONS[benchmark]}
    if result["benchmark"] in ("preference", "mt_bench"):
        files = {k: v for k, v in result["inputs_sha256"].items() if k != "answers"}
        found["files"] = sorted(digest[-12:] for digest in files.values())
        found["pairs"] = result["scores"].get("pairs")  # a tokenizer may have led to drop some
    if result["benchmark"] == "preference" and "accuracy" not in score:  # by token
        found["tokens"] = settings.get("tokens_sha256", "")[:12]
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


def columns_of(title: str, methods: dict[str, list[dict]]) -> dict[tuple[str, str], str]:
    """{(benchmark, score): column} of a table; of HEAD_TO_HEAD, of the opponents that there are."""
    if title != HEAD_TO_HEAD:
        return TABLES[title]
    benchmarks = {name: None for runs in methods.values() for run in runs for name in run}
    columns = {}
    for benchmark in benchmarks:
        if benchmark.startswith(AGAINST):
            opponent = benchmark.removeprefix(AGAINST)
            columns[benchmark, "win_rate"] = f"against {opponent} %"
            columns[benchmark, "length_controlled_winrate"] = f"against {opponent}, LC %"
    return columns


def tables(methods: dict[str, list[dict]]) -> list[tuple[str, list[str], list[list], list]]:
    """[(title, columns, rows, footnotes)]: one row for each method that has any of the table's
    scores, its name first, then a Score, or None where there is none. footnotes: one for each
    score's column, empty if its scores can be compared. Columns that no method has and tables
    without rows are left out.

    methods: {name: its runs, each {benchmark: result}}, mostly one run. Raises InputError if a
    benchmark lacks in some of a method's runs, or was run under different conditions.
    """
    nonempty = []
    for title in TABLES:
        rows, header, footnotes = {}, [], []
        for (benchmark, name), column in columns_of(title, methods).items():
            having = {}
            for method, runs in methods.items():
                found = [
                    run[benchmark]
                    for run in runs
                    if name in run.get(benchmark, NO_RESULT)["scores"]
                ]
                if found and len(found) < len(runs):
                    lacking = f"{len(runs) - len(found)} of {len(runs)} runs"
                    raise InputError(f"{method}: {lacking} have no {name} of {benchmark}")
                if found:
                    having[method] = found
                    rows.setdefault(method, {})[column] = score_of(found, name)
            if not having:
                continue
            under = {m: [conditions(r, name) for r in found] for m, found in having.items()}
            for method, found in under.items():
                if text := footnote({f"run {n}": each for n, each in enumerate(found, 1)}):
                    raise InputError(f"{method}: its runs differ in how {name} came about: {text}")
            header.append(column)
            footnotes.append(footnote({method: found[0] for method, found in under.items()}))
        lines = [[method, *map(row.get, header)] for method, row in rows.items()]
        if lines:
            nonempty.append((title, ["model", *header], lines, footnotes))
    return nonempty


def digits(title: str) -> int:
    """Percentages and ratings have two digits, shares and differences four."""
    return 4 if title.startswith("Held-out") else 2


def markdown(title: str, columns: list[str], rows: list[list], footnotes: list[str]) -> str:
    """One table in Markdown."""
    scores = list(zip(*rows))[1:]
    known = [sum(s is not None for s in column) for column in scores]
    comparisons = sum(max(0, n - 1) for n, note in zip(known, footnotes) if not note)
    cells, notes, header = [[row[0] for row in rows]], [], [columns[0]]
    starred = False
    for name, column, note in zip(columns[1:], scores, footnotes):
        best = None if note else resolved(column, comparisons)
        cells.append([score_text(s, digits(title), i == best) for i, s in enumerate(column)])
        sizes = {int((~np.isnan(s.items)).sum()) for s in column if s and s.items is not None}
        name += f", n = {'–'.join(map(str, sorted({min(sizes), max(sizes)})))}" if sizes else ""
        if note:
            notes.append(f"{name}: not comparable. {note}")
        header.append(f"{name} ({len(notes)})" if note else name)
        if not note and any(paired := paired_with_first(column)):
            texts = [d.text(comparisons, digits(title)).strip() if d else "" for d in paired]
            starred |= any("*" in text for text in texts)
            cells.append([text.replace("*", "\\*") for text in texts])
            header.append(f"− {rows[0][0]} [95 %]")
    lines = [f"**{title}**\n", f"| {' | '.join(header)} |"]
    lines.append("|---" * len(header) + "|")
    lines += [f"| {' | '.join(line)} |" for line in zip(*cells)]
    if starred:
        lines.append(f"\n\\* significant at 5 % among {comparisons} comparisons")
    lines += [f"\n({number}) {note}" for number, note in enumerate(notes, 1)]
    return "\n".join(lines) + "\n"


def paired_with_first(column: list[Score | None]) -> list[Difference | None]:
    """Of every score but the first: its difference to the first, if it is paired; else None."""
    first = column[0]
    paired = [None]
    for score in column[1:]:
        paired.append(score.minus(first) if first and score and score.paired(first) else None)
    return paired


def score_text(score: Score | None, digits: int, bold: bool) -> str:
    if score is None:
        return "–"
    text = f"**{score.value:.{digits}f}**" if bold else f"{score.value:.{digits}f}"
    text += f" ± {score.error:.{digits}f}" if score.error is not None else ""
    if len(score.runs) > 1:
        low, high = min(score.runs), max(score.runs)
        text += f" ({low:.{digits}f} to {high:.{digits}f}, {len(score.runs)} runs)"
    return text


def read_methods(folders: list[str], labels: list[str]) -> dict[str, list[dict]]:
    """The methods of a table, {name: its runs}: each of `folders` by itself, and for each label,
    NAME=PATTERN, the folders that match. Raises InputError, besides read_results', for a label of
    another form or without folders, and for a folder that two of them have."""
    methods = {name: [of_model] for name, of_model in read_results(folders).items()}
    seen = {Path(folder).resolve() for folder in folders}
    for name, matches in matching(labels).items():
        own = {Path(folder).resolve() for folder in matches}
        again, seen = own & seen, own | seen
        if again or name in methods:
            raise InputError(f"--label {name}: {next(iter(again), name)} is there twice")
        matches = [match for match in matches if not Path(match).is_file()]  # as results/*.png
        methods[name] = [*read_results(matches).values()]
        if len(methods[name]) < len(matches):
            raise InputError(f"--label {name}: not all of {', '.join(matches)} hold results")
        if again := copies(methods[name]):
            raise InputError(f"--label {name}: {again} of its runs repeat another, with its scores")
    return methods


def copies(runs: list[dict]) -> int:
    """How many runs, {benchmark: result} each, are of the model of another one, with its scores."""
    seen = {repr([(r["model_sha256"], r["scores"]) for r in run.values()]) for run in runs}
    return len(runs) - len(seen)


def main() -> None:
    parser = make_parser(__doc__, "--label")
    parser.add_argument("folders", nargs="*", metavar="FOLDER", help="of one model's results each")
    parser.add_argument("--output", default="", help="also write OUTPUT.md and OUTPUT.csv")
    parser.add_argument(
        "--by_start_model", action="store_true", help="tables for each model that runs started from"
    )
    args = parser.parse_args()
    groups = {}
    for name, runs in read_methods(args.folders, args.label).items():
        starts = {next(iter(run.values())).get("start_model", "") for run in runs}
        if len(starts) > 1:
            raise InputError(f"--label {name}: its runs started from {', '.join(sorted(starts))}")
        groups.setdefault(starts.pop() if args.by_start_model else "", {})[name] = runs
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
        write_csv(Path(f"{args.output}.csv"), nonempty)


def write_csv(path: Path, nonempty: list[tuple]) -> None:
    """The tables, their numbers in full; the difference to the first model where it is paired."""
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        for title, (first, *names), rows, footnotes in nonempty:
            parts = ("", " standard error", " − first", " − first, standard error")
            writer.writerows([[title], [first, *(n + part for n in names for part in parts)]])
            columns = [*zip(*rows)][1:]
            pairs = [
                paired_with_first(c) if not n else [None] * len(c)
                for c, n in zip(columns, footnotes)
            ]
            for index, (method, *scores) in enumerate(rows):
                line = [method]
                for score, paired in zip(scores, pairs):
                    line += [score.value, score.error] if score else [None, None]
                    line += [paired[index].mean, paired[index].error] if paired[index] else [""] * 2
                writer.writerow(line)
            writer.writerows([[name, note] for name, note in zip(names, footnotes) if note])
            writer.writerow([])


if __name__ == "__main__":
    run_command(main, shows=True)
