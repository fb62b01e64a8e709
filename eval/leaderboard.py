"""The ten Open LLM Leaderboard benchmarks of the paper, by lm-evaluation-harness.

    python -m eval.leaderboard runs/llama-3-8b-instruct/final
    python -m eval.leaderboard M --engine vllm --engine_args tensor_parallel_size=8
    torchrun --nproc_per_node 8 -m eval.leaderboard M       # a copy of the model on each GPU
    python -m eval.leaderboard M --benchmarks GSM8K ARC-Challenge --limit 20      # a quick look

Writes OUTPUT_DIR/MODEL/leaderboard.json with every benchmark's score in per cent, raw and, where
version 2 of the leaderboard has one, normalized (0 is guessing), and the harness's own results and
samples to OUTPUT_DIR/MODEL/leaderboard/. A benchmark is written when it ends, beside those that are
there: the same command continues after an interruption, also inside a benchmark. A quick look
writes no leaderboard.json. Needs lm_eval (eval/requirements.txt). The data sets come from the hub
(GPQA's requires a login), from its cache (HF_HUB_OFFLINE=1), or from folders of the same names in
the working directory, such as openai/gsm8k.
"""

import hashlib
import importlib.util
import json
import math
import random
import statistics
from collections import defaultdict
from pathlib import Path

import torch
from filelock import FileLock

from eval.generate import NO_VLLM, short_name
from eval.results import by_item, make_parser, parse_engine_args, read_items, write_result
from runtime.command_line import run_command
from runtime.errors import InputError
from runtime.templates import DATE
from runtime.weights import load_tokenizer, model_fingerprint, resolve_model, tokenizer_digests

# {benchmark: (the harness's task or group, shots, metrics whose mean is the score)}
IFEVAL_METRICS = ("prompt_level_strict_acc,none", "inst_level_strict_acc,none")
BENCHMARKS = {
    "MMLU-Pro": ("leaderboard_mmlu_pro", 5, ("acc,none",)),
    "IFEval": ("leaderboard_ifeval", 0, IFEVAL_METRICS),
    "BBH": ("leaderboard_bbh", 3, ("acc_norm,none",)),
    "GPQA": ("leaderboard_gpqa", 0, ("acc_norm,none",)),
    "MuSR": ("leaderboard_musr", 0, ("acc_norm,none",)),
    # As in the paper, where the answer's text is compared; beside it, what the harness counts since
    # March 2025.
    "MATH": ("leaderboard_math_hard", 4, ("exact_match_original,none",)),
    "GSM8K": ("gsm8k", 5, ("exact_match,strict-match",)),
    "ARC-Challenge": ("arc_challenge", 25, ("acc_norm,none",)),
    "TruthfulQA": ("truthfulqa_mc2", 0, ("acc,none",)),
    "Winogrande": ("winogrande", 5, ("acc,none",)),
}
# Tasks whose number of shots is set here: that in the harness's own files is a different one.
SET_SHOTS = ("gsm8k", "arc_challenge", "truthfulqa_mc2", "winogrande")
# Groups that version 2 of the leaderboard normalizes subtask by subtask; the others as a whole.
BY_SUBTASK = ("leaderboard_bbh", "leaderboard_musr")
# {start of a task's name: the score of guessing}, for the tasks that version 2 of the leaderboard
# normalizes. In a subtask of BBH it is one over the number of choices.
GUESSING = {
    "leaderboard_mmlu_pro": 1 / 10,
    "leaderboard_ifeval": 0.0,
    "leaderboard_math": 0.0,
    "leaderboard_gpqa": 1 / 4,
    "leaderboard_musr_murder_mysteries": 1 / 2,
    "leaderboard_musr_object_placements": 1 / 5,
    "leaderboard_musr_team_allocation": 1 / 3,
}


def task_score(results: dict, task: str, metrics: tuple[str, ...]) -> tuple[float, float | None]:
    """(score, standard error) of a task or group in the harness's results. The error is None if the
    harness has none, and for a mean of two metrics, which are not independent. A group without the
    metric has the mean of its subtasks, weighed by their sizes."""
    values = results["results"][task]
    if metrics[0] in values:
        error = values.get(metrics[0].replace(",", "_stderr,")) if len(metrics) == 1 else None
        score = sum(values[metric] for metric in metrics) / len(metrics)
        return score, error if isinstance(error, float) else None
    subtasks = results["group_subtasks"][task]
    sizes = [results["n-samples"][subtask]["effective"] for subtask in subtasks]
    shares = [size / sum(sizes) for size in sizes]
    scores, errors = zip(*(task_score(results, subtask, metrics) for subtask in subtasks))
    error = None if None in errors else math.hypot(*(s * e for s, e in zip(shares, errors)))
    return sum(share * score for share, score in zip(shares, scores)), error


def guessing_score(task: str, configs: dict) -> float | None:
    """The score of guessing in a task, or None for a task without a normalized score. configs: the
    harness's, by task."""
    if task.startswith("leaderboard_bbh_"):
        return 1 / len(configs[task]["doc_to_choice"])
    return next((score for start, score in GUESSING.items() if task.startswith(start)), None)


def collect(results: dict, benchmark: str) -> tuple[dict[str, float], dict[str, float]]:
    """The harness's results of a benchmark → scores and standard errors in per cent, the normalized
    ones as "normalized/BENCHMARK".

    Normalized is max(0, (x − g) / (1 − g)), g the score of guessing: of the whole benchmark or, for
    BBH and MuSR, the mean of its subtasks', whose error is that of the mean without the maximum.
    The raw score of a group weighs its subtasks by their size. Raises InputError if the harness did
    not use the benchmark's number of shots.
    """
    name, shots, metrics = BENCHMARKS[benchmark]
    subtasks = results.get("group_subtasks", {}).get(name) or [name]
    used = {results["n-shot"][task] for task in subtasks}
    if used != {shots}:
        raise InputError(f"{benchmark}: the harness used {sorted(used)} shots instead of {shots}")
    found = {benchmark: task_score(results, name, metrics)}
    if benchmark == "MATH":
        found["MATH (Math-Verify)"] = task_score(results, name, ("exact_match,none",))
    parts = subtasks if name in BY_SUBTASK else [name]
    guesses = [guessing_score(task, results["configs"]) for task in parts]
    if None not in guesses:
        normalized, errors = [], []
        for task, guess in zip(parts, guesses):
            score, error = task_score(results, task, metrics)
            normalized.append(max(0.0, (score - guess) / (1 - guess)) / len(parts))
            errors.append(None if error is None else error / (1 - guess) / len(parts))
        error = None if None in errors else math.hypot(*errors)
        found[f"normalized/{benchmark}"] = (sum(normalized), error)
    scores = {name: 100 * score for name, (score, _) in found.items()}
    return scores, {name: 100 * e for name, (_, e) in found.items() if e is not None}


def question_scores(
    samples: dict[str, list[dict]], results: dict, benchmark: str
) -> tuple[dict, float | None]:
    """by_item's entry for a benchmark: each question's score in per cent, of which the raw score is
    the mean; and the standard error of this mean, None where the harness's holds. {} for IFEval,
    whose second metric counts instructions and not questions.

    GPQA's three parts share questions. Of Q questions in N places, one that is asked n times has
    the value n · Q / N times its mean score; the error is that of a ratio over the Q questions.
    """
    name, _, metrics = BENCHMARKS[benchmark]
    if len(metrics) > 1:
        return {}, None
    metric, chosen = metrics[0].split(",")
    tasks = results.get("group_subtasks", {}).get(name) or [name]
    questions = [
        (task, sample)
        for task in tasks
        for sample in sorted(samples[task], key=lambda sample: sample["doc_id"])
        if sample["filter"] == chosen
    ]
    values = [100 * float(sample[metric]) for _, sample in questions]
    if benchmark != "GPQA":
        return by_item({benchmark: values}, [(task, s["doc_hash"]) for task, s in questions]), None
    by_question = defaultdict(list)
    for value, (_, sample) in zip(values, questions):
        by_question[sample["doc"]["Question"]].append(value)
    share, mean = len(by_question) / len(values), statistics.mean(values)
    shares = [share * sum(same) for same in by_question.values()]
    residuals = [share * sum(value - mean for value in same) for same in by_question.values()]
    root = math.sqrt(len(residuals) * (len(residuals) - 1) or math.inf)
    return by_item({benchmark: shares}, [*by_question]), math.hypot(*residuals) / root


def read_finished(path: Path, model: str, settings: dict[str, dict]) -> dict:
    """The result that a leaderboard.json holds, or one without scores. Raises InputError if it is
    of another model, or if one of the benchmarks in `settings` is there with others."""
    if not path.exists():
        return {"scores": {}, "standard_errors": {}, "settings": {}, "inputs_sha256": {}}
    result, problem = json.loads(path.read_text()), ""
    if result.get("model_sha256") != model_fingerprint(resolve_model(model)):
        problem = "another model"
    for benchmark in settings.keys() & result["settings"].keys():
        if result["settings"][benchmark] != settings[benchmark]:
            problem = f"{benchmark} with {result['settings'][benchmark]}, not {settings[benchmark]}"
    if problem:
        raise InputError(f"{path}: holds results of {problem}. Choose another --output_dir")
    return result


def check_data(manager, benchmarks: list[str]) -> None:
    """Fetch every data set before the model is loaded. Raises InputError if one is missing."""
    for benchmark in benchmarks:
        # GPQA's choices are shuffled by the first load and kept in the cache: seeded as by
        # `lm_eval --tasks leaderboard_gpqa`.
        random.seed(0)
        try:
            manager.load([BENCHMARKS[benchmark][0]])
        except Exception as error:
            raise InputError(
                f"the data of {benchmark} cannot be loaded: {error!r}. Without network access, see "
                "docs/evaluation.md"
            ) from error
    if "IFEval" in benchmarks:
        import nltk

        try:
            nltk.data.find("tokenizers/punkt_tab")
        except LookupError:
            raise InputError(
                "IFEval needs nltk's punkt_tab, which could not be fetched. On a machine with "
                "network: python -m nltk.downloader punkt_tab; then copy the folder nltk_data"
            ) from None


def main() -> None:
    shared = ("--engine", "--engine_args", "--limit", "--output_dir", "--wandb")
    parser = make_parser(__doc__, "model", *shared)
    parser.add_argument(
        "--benchmarks",
        nargs="+",
        choices=BENCHMARKS,
        default=list(BENCHMARKS),
        help="which of the ten",
    )
    parser.add_argument(
        "--apply_chat_template",
        choices=["true", "false", "leaderboard"],
        default="false",
        help="ask in the model's chat format; leaderboard: as it does, for chat models in the six "
        "benchmarks of its version 2",
    )
    parser.add_argument("--batch_size", default="auto", help="of the harness")
    args = parser.parse_args()

    try:
        import lm_eval
        from lm_eval.api.registry import get_model
        from lm_eval.loggers import EvaluationTracker
        from lm_eval.tasks import TaskManager
        from lm_eval.utils import make_table
    except ImportError as error:
        raise InputError(
            f"lm_eval is not installed ({error}): pip install -r eval/requirements.txt"
        ) from error
    if args.engine == "vllm" and not importlib.util.find_spec("vllm"):
        raise InputError(NO_VLLM)
    source = resolve_model(args.model)
    tokenizer = load_tokenizer(source)
    template, digests = tokenizer.chat_template, tokenizer_digests(tokenizer)
    if args.apply_chat_template == "true" and not template:
        raise InputError(f"--apply_chat_template true: {args.model} has no chat template")
    chat = {benchmark: args.apply_chat_template == "true" for benchmark in args.benchmarks}
    if args.apply_chat_template == "leaderboard" and template:
        chat = {b: BENCHMARKS[b][0].startswith("leaderboard_") for b in args.benchmarks}
    settings = {
        benchmark: {
            "apply_chat_template": chat[benchmark],
            "shots": BENCHMARKS[benchmark][1],
            "engine": args.engine,
            "lm_eval": lm_eval.__version__,
            **digests,
            **({"engine_args": args.engine_args} if args.engine_args else {}),
        }
        for benchmark in args.benchmarks
    }
    folder = Path(args.output_dir) / short_name(args.model) / "leaderboard"
    path, cache = folder.with_name("leaderboard.json"), folder / "cache"
    done = {} if args.limit else read_finished(path, args.model, settings)["settings"]
    missing = [benchmark for benchmark in args.benchmarks if benchmark not in done]
    for benchmark in args.benchmarks:
        if benchmark not in missing:
            print(f"{benchmark}: is in {path}")
    manager = TaskManager()
    check_data(manager, missing)
    if missing:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        options = parse_engine_args(args.engine_args) | {"batch_size": args.batch_size}
        if args.engine == "transformers":
            size = args.batch_size if device == "cuda" or args.batch_size != "auto" else 1
            options |= {"device": device, "batch_size": size}
        model = get_model(args.engine.replace("transformers", "hf"))(pretrained=source, **options)
        if template:
            # Today is as in training. lm_eval's vLLM reads the second.
            model.tokenizer.chat_template = model.hf_chat_template = DATE + template
    engine = f"{model_fingerprint(source)} {digests} {args.engine} {args.engine_args}"
    of_model = hashlib.sha256(engine.encode()).hexdigest()[:16]
    for benchmark in missing:
        task, shots, _ = BENCHMARKS[benchmark]
        results = lm_eval.simple_evaluate(
            model=model,
            tasks=[task],
            num_fewshot=shots if task in SET_SHOTS else None,
            task_manager=manager,
            limit=args.limit or None,
            apply_chat_template=chat[benchmark],
            fewshot_as_multiturn=chat[benchmark],
            log_samples=True,
            # Answers so far, by their prompt. Not of another model or engine.
            use_cache=str(cache / f"{benchmark}_{of_model}"),
        )
        if results is None:  # the first process of several has them all
            continue
        samples = results.pop("samples")
        tracker = EvaluationTracker(output_path=str(folder))
        tracker.general_config_tracker.model_name_sanitized = short_name(args.model)
        tracker.save_results_aggregated(results=results, samples=samples)
        for task in results["configs"]:
            tracker.save_results_samples(task_name=task, samples=samples[task])
        print(make_table(results))
        scores, errors = collect(results, benchmark)
        of_questions, error = question_scores(samples, results, benchmark)
        if error is not None and errors.get(benchmark):
            errors = {name: own * error / errors[benchmark] for name, own in errors.items()}
        applied = "applied, few-shot examples as turns" if chat[benchmark] else "not applied"
        print(f"{benchmark}: chat template {applied} (--apply_chat_template)")
        for name, value in scores.items():
            error = f" ± {errors[name]:.2f}" if name in errors else ""
            print(f"{name:<28}{value:>8.2f} %{error}", flush=True)
        if args.limit:
            continue
        with FileLock(f"{path}.lock"):  # another run may add another benchmark meanwhile
            result = read_finished(path, args.model, settings)
            items = read_items(folder.parent, result) if result["scores"] else {}
            write_result(
                folder.parent,
                "leaderboard",
                args.model,
                result["scores"] | scores,
                errors=result["standard_errors"] | errors,
                settings=result["settings"] | {benchmark: settings[benchmark]},
                # Of all questions, prompts and targets; from the tracker.
                inputs=result["inputs_sha256"] | results["task_hashes"],
                packages=("lm_eval",),
                wandb_mode=args.wandb if benchmark == missing[-1] else "off",
                items=items | of_questions,
            )
        for file in cache.glob(f"{benchmark}_*"):
            file.unlink()
    if args.limit:
        print(f"--limit {args.limit}: a quick look; no leaderboard.json is written")


if __name__ == "__main__":
    run_command(main)
