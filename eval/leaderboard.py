"""The ten Open LLM Leaderboard benchmarks of the paper, by lm-evaluation-harness.

    python -m eval.leaderboard runs/llama-3-8b-instruct/final
    python -m eval.leaderboard M --benchmarks GSM8K ARC-Challenge --limit 20      # a quick look

Writes OUTPUT_DIR/MODEL/leaderboard.json with every benchmark's score in per cent, raw and, where
version 2 of the leaderboard has one, normalized (0 is guessing), and the harness's own results and
samples to OUTPUT_DIR/MODEL/leaderboard/. A quick look writes no leaderboard.json. Needs lm_eval
(eval/requirements.txt). The data sets come from the hub (GPQA's requires a login), from its cache
(HF_HUB_OFFLINE=1), or from folders of the same names in the working directory, such as
openai/gsm8k.
"""

import math
import random
from pathlib import Path

import torch
import yaml

from data import InputError
from demo.smollm2 import resolve_model
from eval.generate import short_name
from eval.report import make_parser, write_result
from runtime import run_command

# {benchmark: (the harness's task or group, shots, metrics whose mean is the score)}
IFEVAL_METRICS = ("prompt_level_strict_acc,none", "inst_level_strict_acc,none")
BENCHMARKS = {
    "MMLU-Pro": ("leaderboard_mmlu_pro", 5, ("acc,none",)),
    "IFEval": ("leaderboard_ifeval", 0, IFEVAL_METRICS),
    "BBH": ("leaderboard_bbh", 3, ("acc_norm,none",)),
    "GPQA": ("leaderboard_gpqa", 0, ("acc_norm,none",)),
    "MuSR": ("leaderboard_musr", 0, ("acc_norm,none",)),
    "MATH": ("leaderboard_math_hard", 4, ("exact_match,none",)),
    "GSM8K": ("gsm8k", 5, ("exact_match,strict-match",)),
    "ARC-Challenge": ("arc_challenge", 25, ("acc_norm,none",)),
    "TruthfulQA": ("truthfulqa_mc2", 0, ("acc,none",)),
    "Winogrande": ("winogrande", 5, ("acc,none",)),
}
# Tasks whose number of shots is set here: that in the harness's own files is a different one.
SET_SHOTS = ("gsm8k", "arc_challenge", "truthfulqa_mc2", "winogrande")
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
GROUP = "simper_leaderboard"


def write_group(folder: Path, benchmarks: list[str]) -> None:
    """Write the group of tasks as the harness reads it: one YAML file, GROUP.yaml."""
    folder.mkdir(parents=True, exist_ok=True)
    tasks = []
    for task, shots, _ in map(BENCHMARKS.get, benchmarks):
        tasks.append({"task": task, "num_fewshot": shots} if task in SET_SHOTS else task)
    (folder / f"{GROUP}.yaml").write_text(yaml.safe_dump({"group": GROUP, "task": tasks}))


def task_score(values: dict, metrics: tuple[str, ...]) -> tuple[float, float | None]:
    """(score, standard error) from the harness's values of one task or group. The error is None if
    the harness has none, and for a mean of two metrics, which are not independent."""
    error = values.get(metrics[0].replace(",", "_stderr,")) if len(metrics) == 1 else None
    score = sum(values[metric] for metric in metrics) / len(metrics)
    return score, error if isinstance(error, float) else None


def guessing_score(task: str, configs: dict) -> float | None:
    """The score of guessing in a task, or None for a task without a normalized score. configs: the
    harness's, by task."""
    if task.startswith("leaderboard_bbh_"):
        return 1 / len(configs[task]["doc_to_choice"])
    return next((score for start, score in GUESSING.items() if task.startswith(start)), None)


def collect(results: dict, benchmarks: list[str]) -> tuple[dict[str, float], dict[str, float]]:
    """The harness's results → scores and standard errors in per cent, the normalized ones as
    "normalized/BENCHMARK".

    Normalized is the mean over subtasks of max(0, (x − g) / (1 − g)), g the score of guessing, and
    its error that of the mean without the maximum. The raw score of a group weighs its subtasks by
    their size. Raises InputError if the harness used a different number of shots than the
    benchmark's.
    """
    scores, errors = {}, {}
    for benchmark in benchmarks:
        name, shots, metrics = BENCHMARKS[benchmark]
        subtasks = results.get("group_subtasks", {}).get(name) or [name]
        used = {results["n-shot"][task] for task in subtasks}
        if used != {shots}:
            raise InputError(
                f"{benchmark}: the harness used {sorted(used)} shots instead of {shots}"
            )
        score, error = task_score(results["results"][name], metrics)
        scores[benchmark] = 100 * score
        if error is not None:
            errors[benchmark] = 100 * error
        normalized, variance = [], 0.0
        for task in subtasks:
            guess = guessing_score(task, results["configs"])
            if guess is None:
                continue
            score, error = task_score(results["results"][task], metrics)
            normalized.append(max(0.0, (score - guess) / (1 - guess)))
            if benchmark in errors:
                variance += (error / (1 - guess) / len(subtasks)) ** 2
        if normalized:
            scores[f"normalized/{benchmark}"] = 100 * sum(normalized) / len(normalized)
            if benchmark in errors:
                errors[f"normalized/{benchmark}"] = 100 * math.sqrt(variance)
    return scores, errors


def main() -> None:
    parser = make_parser(__doc__, "model", "--output_dir", "--wandb")
    parser.add_argument("--benchmarks", nargs="+", choices=BENCHMARKS, default=list(BENCHMARKS))
    parser.add_argument(
        "--apply_chat_template",
        choices=["true", "false"],
        default="false",
        help="ask in the model's chat format",
    )
    parser.add_argument("--limit", type=int, default=0, help="questions of each task; 0: all")
    parser.add_argument("--batch_size", default="auto")
    args = parser.parse_args()

    try:
        import lm_eval
        from lm_eval.loggers import EvaluationTracker
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
        from lm_eval.utils import make_table
    except ImportError as error:
        raise InputError(
            f"lm_eval is not installed ({error}): pip install -r eval/requirements.txt"
        ) from error
    folder = Path(args.output_dir) / short_name(args.model) / "leaderboard"
    write_group(folder / "tasks", args.benchmarks)
    manager = TaskManager(include_path=str(folder / "tasks"))
    for benchmark in args.benchmarks:  # fetches every data set before the model is loaded
        # GPQA's choices are shuffled by the first load and kept in the cache: seeded as by
        # `lm_eval --tasks leaderboard_gpqa`.
        random.seed(0)
        try:
            manager.load([BENCHMARKS[benchmark][0]])
        except Exception as error:
            raise InputError(f"the data of {benchmark} cannot be loaded: {error!r}") from error
    device = "cuda" if torch.cuda.is_available() else "cpu"
    batch_size = args.batch_size if device == "cuda" or args.batch_size != "auto" else 1
    model = HFLM(pretrained=resolve_model(args.model), device=device, batch_size=batch_size)
    chat = args.apply_chat_template == "true"
    results = lm_eval.simple_evaluate(
        model=model,
        tasks=[GROUP],
        task_manager=manager,
        limit=args.limit or None,
        apply_chat_template=chat,
        fewshot_as_multiturn=chat,
        log_samples=True,
    )
    samples = results.pop("samples")
    tracker = EvaluationTracker(output_path=str(folder))
    tracker.general_config_tracker.model_name_sanitized = short_name(args.model)
    tracker.save_results_aggregated(results=results, samples=samples)
    for task in results["configs"]:
        tracker.save_results_samples(task_name=task, samples=samples[task])
    print(make_table(results))
    scores, errors = collect(results, args.benchmarks)
    applied = "applied, few-shot examples as turns" if chat else "not applied"
    print(f"chat template: {applied} (--apply_chat_template)")
    for name, value in scores.items():
        print(f"{name:<28}{value:>8.2f} %" + (f" ± {errors[name]:.2f}" if name in errors else ""))
    if args.limit:
        print(f"--limit {args.limit}: a quick look; no leaderboard.json is written")
        return
    settings = {
        "apply_chat_template": chat,
        "batch_size": str(batch_size),
        "shots": {benchmark: BENCHMARKS[benchmark][1] for benchmark in args.benchmarks},
    }
    write_result(
        folder.parent,
        "leaderboard",
        args.model,
        scores,
        errors=errors,
        settings=settings,
        inputs=results["task_hashes"],  # of all questions, prompts and targets; from the tracker
        packages=("lm_eval",),
        wandb_mode=args.wandb,
    )


if __name__ == "__main__":
    run_command(main)
