"""What the commands of eval/ share: arguments, the file of a result, comparisons that are paired.

Every benchmark writes one JSON file, OUTPUT_DIR/MODEL/BENCHMARK.json (write_result), and beside it,
where a score is a mean over items, the value of each item: so models that have answered the same
items are compared item by item.
"""

import argparse
import glob
import hashlib
import importlib.metadata
import json
import math
import os
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import yaml

from eval.judge import MODEL, TIMEOUT, URL
from runtime.cache import file_digest
from runtime.errors import InputError
from runtime.intervals import FEW, t_quantile
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
    "--num_prompts": {"type": at_least(0), "help": "spread over the data; 0: all"},
    "--max_new_tokens": {"type": at_least(1), "help": "longest answer"},
    "--temperature": {"type": at_least(0, float), "help": "0 is greedy"},
    "--top_p": {"type": float, "default": 1.0, "help": "share of the probability to sample from"},
    "--limit": {"type": at_least(0), "default": 0, "help": "a quick look at the first N; 0: all"},
    "--columns": {"default": "", "metavar": "NAME=COLUMN,...", "help": "as for train.py"},
    "--generate_only": {"action": "store_true", "help": "stop before the judge"},
    "--judge": {"default": MODEL, "help": "the judge's name at its endpoint"},
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
    "--workers": {"type": at_least(1), "default": 8, "help": "calls of the judge at a time"},
    "--output_dir": {"default": "results", "help": "folder of all models' results"},
    "--label": {
        "action": "append",
        "default": [],
        "metavar": "NAME=PATTERN",
        "help": "all folders that match as one method, such as its seeds; may be repeated",
    },
    "--wandb": {"choices": ["off", "online", "offline"], "default": "off", "help": "log scores"},
}
JUDGE = ("--judge", "--judge_base_url", "--judge_timeout", "--generate_only")
JUDGE += ("--output_dir", "--wandb")  # of every command that asks a judge
AGAINST = "win_rate_against_"  # the benchmark is this and the other model's name
GENERATION = ("--engine", "--engine_args", "--batch_size", "--seed", "--template_args")
# Whose defaults each command sets, but for that of --top_p.
SAMPLING = ("--num_prompts", "--max_new_tokens", "--temperature", "--top_p")


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


def matching(labels: list[str]) -> dict[str, list[str]]:
    """NAME=PATTERN of each label → {NAME: the paths that match, sorted}. Raises InputError for a
    label of another form, for one that is given twice, and for one that nothing matches."""
    found = {}
    for label in labels:
        name, equals, pattern = label.partition("=")
        if not (name and equals and pattern) or name in found:
            raise InputError(f"--label {label}: must be NAME=PATTERN, and each NAME once")
        found[name] = sorted(glob.glob(pattern))
        if not found[name]:
            raise InputError(f"--label {label}: nothing matches {pattern}")
    return found


@dataclass(frozen=True)
class Difference:
    """Of two means: its standard error, None if it is not known, and the degrees of freedom."""

    mean: float
    error: float | None
    freedom: float = math.inf

    def resolved(self, comparisons: int) -> bool:
        """Whether it is significant at 5 % as one of so many comparisons (Bonferroni)."""
        if self.error is None:
            return False
        return abs(self.mean) > t_quantile(self.freedom, comparisons) * self.error

    def text(self, comparisons: int, digits: int = 4) -> str:
        """With the 95 % interval, and a star if significant; no interval if the error is not known;
        "" if there is no difference."""
        if math.isnan(self.mean):  # no item that both have
            return ""
        if self.error is None:
            return f"{self.mean:+.{digits}f}"
        if self.error <= 1e-9 * abs(self.mean):  # equal but for rounding
            return f"{self.mean:+.{digits}f} in each" if self.mean else ""
        half = t_quantile(self.freedom) * self.error
        low, high = (f"{self.mean + side * half:+.{digits}f}" for side in (-1, 1))
        star = "*" if self.resolved(comparisons) else " "
        return f"{self.mean:+.{digits}f} [{low}, {high}]{star}"


def paired_difference(values: Sequence, first: Sequence) -> Difference:
    """values − first, item by item, over those that both have.

    values, first: (items,), the same items in the same order; NaN where one has no value. The
    error is not known for fewer than FEW items.
    """
    differences = np.asarray(values, dtype=float) - np.asarray(first, dtype=float)
    differences = differences[~np.isnan(differences)]
    count = len(differences)
    if count < FEW:
        return Difference(float(differences.mean()) if count else math.nan, None)
    error = float(differences.std(ddof=1)) / math.sqrt(count)
    return Difference(float(differences.mean()), error, count - 1)


def print_scores(
    columns: list[tuple[str, dict[str, float], dict[str, float]]],
    items: list[dict[str, np.ndarray]] | None = None,
) -> None:
    """Print [(model, scores, standard errors)] side by side, with a row for each score; "–" for one
    that a model does not have, or that is None. items: of each model, {score: a value for each
    item}, if all have the same items: then a column after each model but the first has its
    difference to the first with the 95 % interval, and a star if significant."""
    names = list(dict.fromkeys(name for _, scores, _ in columns for name in scores))
    width = max(map(len, names)) + 2
    header, differences = " " * width, []
    for number, (model, _, _) in enumerate(columns):
        header += f"{model[-26:]:>28}"
        both = items[number].keys() & items[0].keys() if items and number else ()
        found = {name: paired_difference(items[number][name], items[0][name]) for name in both}
        differences.append(found)
        header += f"{'− first [95 %]':>32}" if found else ""
    comparisons = sum(bool(d.error) for found in differences for d in found.values())
    print(header)
    for name in names:
        line = f"{name:<{width}}"
        for (_, scores, errors), found in zip(columns, differences):
            cell = "–" if scores.get(name) is None else f"{scores[name]:.4f}"
            line += f"{cell + (f' ± {errors[name]:.4f}' if name in errors else ''):>28}"
            if found:
                line += f"{found[name].text(comparisons) if name in found else '':>32}"
        print(line.rstrip())
    if comparisons:
        print(f"* significant at 5 % among the {comparisons} differences of this table")


def say_repeated(prompts: Sequence[Hashable]) -> None:
    """Print how many prompts there are more than once, if any."""
    if again := len(prompts) - len({*prompts}):
        problem = f"{again} of {len(prompts)} prompts repeat another one"
        print(f"{problem}: errors are too small and intervals too narrow, since both count all")


def by_item(values: dict[str, Sequence], of) -> dict[str, dict]:
    """{score: the value of each item, None or NaN where it has none} → what write_result keeps of
    them. of: JSON that says which items they are: equal if, and only if, they are the same."""
    digest = hashlib.sha256(json.dumps(of).encode()).hexdigest()
    return {
        name: {
            "of": digest,
            "values": [None if v is None or math.isnan(v) else round(float(v), 6) for v in column],
        }
        for name, column in values.items()
    }


def read_items(folder: Path, result: dict) -> dict[str, dict]:
    """by_item's scores that were written with a result; {} if there are none. Raises InputError if
    the file is not the one that was written then."""
    if "items_sha256" not in result:
        return {}
    path = folder / f"{result['benchmark']}.items.json"
    if not path.is_file() or file_sha256(path) != result["items_sha256"]:
        raise InputError(f"{path} is missing, or of another evaluation: evaluate again")
    return json.loads(path.read_text())


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
    items: dict[str, dict] | None = None,
) -> None:
    """Write folder/BENCHMARK.json, which names the run that made the model, if one did, and beside
    it BENCHMARK.items.json.

    model: folder or hub id; scores: numbers by name; errors: standard errors of some of them;
    settings: decoding and all else that decides the scores; inputs: SHA-256 of what was read, by
    file or task; packages: names of packages whose versions matter, besides the usual ones;
    wandb_mode: off, or online or offline for a wandb run with the scores as a table; items: of
    by_item.
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
    config = run_config(model)
    if run := {name: config[name] for name in ("code", "commit") if name in config}:
        result["run"] = run
    if items:
        path = folder / f"{benchmark}.items.json"
        write_whole(path, json.dumps(items) + "\n")
        result["items_sha256"] = file_sha256(path)
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
