"""The ten Open LLM Leaderboard benchmarks of the paper, by lm-evaluation-harness.

    python -m eval.leaderboard runs/llama-3-8b-instruct/final
    python -m eval.leaderboard M --benchmarks GSM8K ARC-Challenge --limit 20              # a quick look: no result for a table

Writes OUTPUT_DIR/MODEL/leaderboard.json with every benchmark's score in per cent, raw and, where version 2 of the leaderboard
has one, normalized (0 is guessing), and the harness's own results and samples to OUTPUT_DIR/MODEL/leaderboard/. Needs lm_eval
(eval/requirements.txt). The data sets come from the hub (GPQA's asks for a login), from its cache (HF_HUB_OFFLINE=1), or from
folders of the same names in the working directory, such as openai/gsm8k.
"""

import argparse
import math
import random
import sys
from pathlib import Path

import torch
import yaml

from data import InputError
from eval.generate import short_name
from eval.report import write_result
from model import resolve_model

# {benchmark: (the harness's task or group, shots, metrics whose mean is the score)}
BENCHMARKS = {
    "MMLU-Pro": ("leaderboard_mmlu_pro", 5, ("acc,none",)),
    "IFEval": ("leaderboard_ifeval", 0, ("prompt_level_strict_acc,none", "inst_level_strict_acc,none")),
    "BBH": ("leaderboard_bbh", 3, ("acc_norm,none",)),
    "GPQA": ("leaderboard_gpqa", 0, ("acc_norm,none",)),
    "MuSR": ("leaderboard_musr", 0, ("acc_norm,none",)),
    "MATH": ("leaderboard_math_hard", 4, ("exact_match,none",)),
    "GSM8K": ("gsm8k", 5, ("exact_match,strict-match",)),
    "ARC-Challenge": ("arc_challenge", 25, ("acc_norm,none",)),
    "TruthfulQA": ("truthfulqa_mc2", 0, ("acc,none",)),
    "Winogrande": ("winogrande", 5, ("acc,none",)),
}
IN_YAML = ("gsm8k", "arc_challenge", "truthfulqa_mc2", "winogrande")  # whose shots are not those of the harness's own files
# The score of guessing in version 2 of the leaderboard. BBH's is one over the number of choices of each of its subtasks.
GUESSING = {"leaderboard_mmlu_pro": 1 / 10, "leaderboard_ifeval": 0.0, "leaderboard_math": 0.0, "leaderboard_gpqa": 1 / 4}
GUESSING |= {"leaderboard_musr_murder_mysteries": 1 / 2, "leaderboard_musr_object_placements": 1 / 5}
GUESSING |= {"leaderboard_musr_team_allocation": 1 / 3}
GROUP = "simper_leaderboard"


def write_group(folder: Path, benchmarks: list[str]) -> None:
    """Write the group of tasks as the harness reads it: one YAML file, GROUP.yaml."""
    folder.mkdir(parents=True, exist_ok=True)
    tasks = [BENCHMARKS[benchmark][:2] for benchmark in benchmarks]
    entries = [{"task": task, "num_fewshot": shots} if task in IN_YAML else task for task, shots in tasks]
    (folder / f"{GROUP}.yaml").write_text(yaml.safe_dump({"group": GROUP, "task": entries}))


def collect(results: dict, benchmarks: list[str]) -> tuple[dict[str, float], dict[str, float]]:
    """The harness's results → scores and standard errors in per cent, the normalized ones as "normalized/BENCHMARK".

    Normalized is the mean over subtasks of max(0, (x − g) / (1 − g)), g the score of guessing, and its error that of the mean
    without the maximum; the raw score of a group weighs its subtasks by their size. Raises InputError if the harness used
    other shots than the benchmark's.
    """
    scores, errors = {}, {}
    for benchmark in benchmarks:
        name, shots, metrics = BENCHMARKS[benchmark]
        subtasks = results.get("group_subtasks", {}).get(name) or [name]
        used = {results["n-shot"][task] for task in subtasks}
        if used != {shots}:
            raise InputError(f"{benchmark}: the harness used {sorted(used)} shots instead of {shots}")
        found = results["results"][name]
        scores[benchmark] = 100 * sum(found[metric] for metric in metrics) / len(metrics)
        error = [found.get(metric.replace(",", "_stderr,")) for metric in metrics]
        if len(error) == 1 and isinstance(error[0], float):  # IFEval's is a mean of two that are not independent
            errors[benchmark] = 100 * error[0]
        normalized, variances = [], []
        for task in subtasks:
            guess = next((value for start, value in GUESSING.items() if task.startswith(start)), None)
            if task.startswith("leaderboard_bbh_"):
                guess = 1 / len(results["configs"][task]["doc_to_choice"])
            if guess is not None:
                value = sum(results["results"][task][metric] for metric in metrics) / len(metrics)
                normalized.append(max(0.0, (value - guess) / (1 - guess)))
                if benchmark in errors:
                    error = results["results"][task][metrics[0].replace(",", "_stderr,")]
                    variances.append((error / (1 - guess) / len(subtasks)) ** 2)
        if normalized:
            scores[f"normalized/{benchmark}"] = 100 * sum(normalized) / len(normalized)
        if variances:
            errors[f"normalized/{benchmark}"] = 100 * math.sqrt(sum(variances))
    return scores, errors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL", help="folder or hub id")
    parser.add_argument("--benchmarks", nargs="+", choices=BENCHMARKS, default=list(BENCHMARKS))
    parser.add_argument(
        "--apply_chat_template", choices=["true", "false"], default="false", help="ask in the model's chat format"
    )
    parser.add_argument("--limit", type=int, default=0, help="questions of each task; 0: all")
    parser.add_argument("--batch_size", default="auto")
    parser.add_argument("--output_dir", default="results")
    parser.add_argument("--wandb", choices=["off", "online", "offline"], default="off")
    args = parser.parse_args()

    try:
        import lm_eval
        from lm_eval.loggers import EvaluationTracker
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
        from lm_eval.utils import make_table
    except ImportError as error:
        raise InputError(f"the harness is missing ({error}): pip install -r eval/requirements.txt") from error
    folder = Path(args.output_dir) / short_name(args.model) / "leaderboard"
    write_group(folder / "tasks", args.benchmarks)
    manager = TaskManager(include_path=str(folder / "tasks"))
    for benchmark in args.benchmarks:  # fetches every data set before the model is loaded
        # GPQA's choices are shuffled by the first load and kept in the cache: seeded as by `lm_eval --tasks leaderboard_gpqa`.
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
    print(f"chat template: {'applied, few-shot examples as turns' if chat else 'not applied'} (--apply_chat_template)")
    for name, value in scores.items():
        print(f"{name:<28}{value:>8.2f} %" + (f" ± {errors[name]:.2f}" if name in errors else ""))
    if args.limit:
        print(f"--limit {args.limit}: a quick look; no leaderboard.json is written")
        return
    settings = {
        "apply_chat_template": chat,
        "batch_size": str(batch_size),
        "shots": {b: BENCHMARKS[b][1] for b in args.benchmarks},
    }
    hashes = results["task_hashes"]  # of all questions, prompts and targets; set by the tracker
    write_result(folder.parent, "leaderboard", args.model, scores, errors, settings, hashes, ("lm_eval",), args.wandb)


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"error: {error}")
