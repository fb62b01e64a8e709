"""Preference pairs of a model's own answers: the best against the worst of several samples.

    python -m eval.on_policy MODEL --data PROMPTS --score SCORER --output pairs.jsonl
    python -m eval.on_policy demo --data demo/prompts.jsonl --score demo/sentiment.py:score \\
        --output pairs.jsonl --max_new_tokens 48 --batch_size 64

PROMPTS are rows {"prompt": text or messages}, or preference data, of which the prompts are taken.
SCORER is a reward model (hub id or folder of a sequence classifier with a chat template) or
FILE.py:FUNCTION, given [{"prompt": messages, "answer": text}] and returning a number for each.

The answers are kept in OUTPUT's name with .answers.jsonl, and the same command continues after an
interruption. Only answers that the model ended itself become chosen or rejected: a cut one would
teach where to stop. Each row of OUTPUT also holds all samples, their scores, which were finished.
"""

import gc
import json
import statistics
from collections import Counter
from pathlib import Path

import torch

from eval.generate import answer, load_engine, load_prompts, sampling_options
from eval.results import GENERATION, SAMPLING, make_parser
from eval.score import load_scorer, score_answers
from runtime.command_line import run_command
from runtime.errors import InputError
from runtime.log import write_whole


def choose_pair(
    prompt: list | str, answers: list[tuple[str, bool]], scores: list[float], min_gap: float = 0.0
) -> dict | str:
    """Answers [(text, finished)] to one prompt and their scores → a row of preference data, or why
    there is none: "unfinished" (fewer than two answers are finished and not empty) or "tie".

    Chosen is the finished answer with the highest score, rejected the one with the lowest; of equal
    scores, the first. It is a tie if they are equal or less than `min_gap` apart.
    """
    candidates = [i for i, (text, finished) in enumerate(answers) if finished and text.strip()]
    if len(candidates) < 2:
        return "unfinished"
    best, worst = max(candidates, key=scores.__getitem__), min(candidates, key=scores.__getitem__)
    if scores[best] == scores[worst] or scores[best] - scores[worst] < min_gap:
        return "tie"
    return {
        "prompt": prompt,
        "chosen": answers[best][0],
        "rejected": answers[worst][0],
        "chosen_score": scores[best],
        "rejected_score": scores[worst],
        "samples": [text for text, _ in answers],
        "scores": scores,
        "finished": [finished for _, finished in answers],
    }


def main() -> None:
    parser = make_parser(__doc__, "model", *GENERATION, *SAMPLING, "--columns")
    parser.set_defaults(num_prompts=0, max_new_tokens=512, temperature=1.0)
    parser.add_argument("--data", required=True, metavar="PROMPTS", help="file, folder or hub id")
    parser.add_argument("--samples", type=int, default=4, help="answers to each prompt")
    parser.add_argument(
        "--score", required=True, metavar="SCORER", help="a reward model, or FILE.py:FUNCTION"
    )
    parser.add_argument("--output", required=True, metavar="FILE.jsonl", help="the pairs")
    parser.add_argument(
        "--min_gap", type=float, default=0.0, help="least difference of a pair's scores"
    )
    args = parser.parse_args()
    output = Path(args.output)
    if output.suffix != ".jsonl":
        raise InputError(f"--output {output}: its name must end with .jsonl")
    if args.samples < 2 or args.temperature <= 0:
        raise InputError("a pair needs --samples of at least 2 and a --temperature above 0")

    prompts = load_prompts(args.data, args.num_prompts, args.columns)
    scorer = load_scorer(args.score, args.batch_size)
    repeated = [prompt for prompt in prompts for _ in range(args.samples)]
    path = output.with_suffix(".answers.jsonl")
    answers = answer(args.model, repeated, path, **sampling_options(args))
    load_engine.cache_clear()  # makes room for a reward model
    gc.collect()
    torch.cuda.empty_cache()
    scores = score_answers(scorer, repeated, answers)
    chosen = []
    for number, prompt in enumerate(prompts):
        own = slice(number * args.samples, (number + 1) * args.samples)
        chosen.append(choose_pair(prompt, answers[own], scores[own], args.min_gap))
    rows = [row for row in chosen if isinstance(row, dict)]
    dropped = Counter(row for row in chosen if isinstance(row, str))
    if not rows:
        why = f"{dropped['unfinished']} prompts have fewer than two finished answers (raise "
        why += f"--max_new_tokens), {dropped['tie']} have equal scores or less than --min_gap apart"
        raise InputError(f"no pairs: {why} (raise --samples or --temperature)")
    write_whole(output, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    print(
        f"{len(rows)} pairs of {len(prompts)} prompts with {args.samples} answers each: {output}\n"
        f"dropped: {dropped['tie']} with equal scores or less than {args.min_gap:g} apart, "
        f"{dropped['unfinished']} with fewer than two finished answers"
    )
    print(f"all answers: mean score {statistics.mean(scores):.4f}")
    for side in ("chosen", "rejected"):
        score = statistics.mean(row[f"{side}_score"] for row in rows)
        words = statistics.mean(len(row[side].split()) for row in rows)
        print(f"{side}: mean score {score:.4f}, {words:.1f} words")


if __name__ == "__main__":
    run_command(main)
