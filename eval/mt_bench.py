"""MT-Bench: two-turn answers in FastChat's format, judged with the official prompts, by OpenAI or
any compatible endpoint.

    python -m eval.mt_bench runs/llama-3-8b-instruct/final --data DIR --engine vllm
    python -m eval.mt_bench M --data DIR --generate_only                       # no judge, no cost
    python -m eval.mt_bench M --data DIR --judge my-judge --judge_base_url http://HOST:8000/v1

DIR holds the official question.jsonl and judge_prompts.jsonl (lm-sys/FastChat,
fastchat/llm_judge/data) and reference answers to the questions of math, reasoning and coding,
gpt-4.jsonl from there (mt_bench/reference_answer) or another's, NAME.jsonl for --reference NAME.

Writes OUTPUT_DIR/MODEL/mt_bench/model_answer/MODEL.jsonl, model_judgment-HOST/JUDGE_single.jsonl,
which FastChat reads, and OUTPUT_DIR/MODEL/mt_bench.json with the score, by turn and by category.
Judging takes 160 calls, after one that shows whether the judge answers. The same command continues
after an interruption. The judge: eval/judge.py.
"""

import itertools
import json
import math
import re
import statistics
import time
import uuid
from collections import defaultdict
from pathlib import Path

from eval.generate import answer, engine_options, own_sampling, short_name
from eval.judge import Judge, ask_all, endpoint_name, judge_versions, open_judge
from eval.results import (
    GENERATION,
    JUDGE,
    at_least,
    by_item,
    file_sha256,
    make_parser,
    read_records,
    write_result,
)
from runtime.command_line import run_command
from runtime.errors import InputError
from runtime.log import write_whole

# FastChat's temperatures (llm_judge/common.py); all other settings are FastChat's, too.
TEMPERATURES = {
    "writing": 0.7,
    "roleplay": 0.7,
    "extraction": 0.0,
    "math": 0.0,
    "coding": 0.0,
    "reasoning": 0.0,
    "stem": 0.1,
    "humanities": 0.1,
}
WITH_REFERENCE = ("math", "reasoning", "coding")
NEW_TOKENS = 1024
JUDGE_TOKENS = 2048
PROMPTS = {  # (with reference, turn): name of the judge's prompt
    (False, 1): "single-v1",
    (True, 1): "single-math-v1",
    (False, 2): "single-v1-multi-turn",
    (True, 2): "single-math-v1-multi-turn",
}


def read_lines(path: Path) -> list[dict]:
    try:
        return [json.loads(line) for line in path.read_text().split("\n") if line.strip()]
    except FileNotFoundError:
        raise InputError(
            f"{path} is missing: see the top of eval/mt_bench.py for where it comes from"
        ) from None
    except json.JSONDecodeError as error:
        raise InputError(f"{path}: a line is not valid JSON: {error}") from error


def load_questions(folder: Path) -> list[dict]:
    """The questions: {"question_id", "category", "turns": [first, second]}. Raises InputError
    unless they are 81 to 160."""
    path = folder / "question.jsonl"
    questions = read_lines(path)
    if [question.get("question_id") for question in questions] != [*range(81, 161)]:
        raise InputError(f"{path}: must hold MT-Bench's 80 questions, 81 to 160, in order")
    for question in questions:
        if question.get("category") not in TEMPERATURES or len(question.get("turns", [])) != 2:
            number = question["question_id"]
            raise InputError(f"{path}: question {number} must have a category and two turns")
    return questions


def load_judge(
    folder: Path, reference: str, questions: list[dict]
) -> tuple[dict[str, dict], dict[int, list[str]]]:
    """(the judge's prompts by name, {question_id: both turns of its reference answer} for the
    categories in WITH_REFERENCE). Raises InputError if one is missing."""
    prompts = {prompt["name"]: prompt for prompt in read_lines(folder / "judge_prompts.jsonl")}
    lines = read_lines(folder / f"{reference}.jsonl")
    answers = {line["question_id"]: line["choices"][0]["turns"] for line in lines}
    needed = [q["question_id"] for q in questions if q["category"] in WITH_REFERENCE]
    missing = [name for name in PROMPTS.values() if name not in prompts]
    missing += [f"question {number}" for number in needed if number not in answers]
    if missing:
        raise InputError(
            f"{folder}: the judge's prompts or reference answers are incomplete: "
            f"{', '.join(missing)}"
        )
    return prompts, {number: answers[number] for number in needed}


def generate_answers(model: str, questions: list[dict], folder: Path, options: dict) -> list[dict]:
    """Answers of both turns in FastChat's format, in the order of the questions. They are kept turn
    by turn, so that nothing is generated twice. options: further arguments of `answer`."""
    turns: dict[int, list[str]] = {question["question_id"]: [] for question in questions}
    for turn in (1, 2):
        for temperature in sorted(set(TEMPERATURES.values())):
            group = [q for q in questions if TEMPERATURES[q["category"]] == temperature]
            prompts = []
            for question in group:
                messages = [{"role": "user", "content": question["turns"][0]}]
                for reply in turns[question["question_id"]]:
                    messages.append({"role": "assistant", "content": reply})
                    messages.append({"role": "user", "content": question["turns"][1]})
                prompts.append(messages)
            texts = answer(
                model,
                prompts,
                folder / "answers" / f"turn-{turn}-temperature-{temperature}.jsonl",
                max_new_tokens=NEW_TOKENS,
                temperature=temperature,
                **options,
            )
            for question, (text, _) in zip(group, texts):
                turns[question["question_id"]].append(text)
    return [
        {
            "question_id": number,
            "answer_id": uuid.uuid4().hex,
            "model_id": short_name(model),
            "choices": [{"index": 0, "turns": texts}],
            "tstamp": time.time(),
        }
        for number, texts in turns.items()
    ]


def parse_score(judgment: str) -> float:
    """FastChat's rule: the first [[x]], otherwise the first [x], otherwise −1 (not counted).

    >>> parse_score("Rating: [[7]]"), parse_score("I give it a [8.5]."), parse_score("seven")
    (7.0, 8.5, -1.0)
    """
    match = re.search(r"\[\[(\d+\.?\d*)\]\]", judgment) or re.search(r"\[(\d+\.?\d*)\]", judgment)
    return float(match[1]) if match else -1.0


def judge_prompt(
    template: str, questions: list[str], answers: list[str], reference: list[str]
) -> str:
    """FastChat's prompt for the judge, with both turns of a question, of its answer, and of the
    reference answer ([] without one)."""
    fields = {"question": questions[0], "answer": answers[0]}
    fields |= {f"question_{number}": text for number, text in enumerate(questions, 1)}
    fields |= {f"answer_{number}": text for number, text in enumerate(answers, 1)}
    fields |= {f"ref_answer_{number}": text for number, text in enumerate(reference, 1)}
    return template.format(**fields)


def judge_all(
    judge: Judge,
    questions: list[dict],
    answers: list[dict],
    prompts: dict[str, dict],
    references: dict[int, list[str]],
    path: Path,
    workers: int,
) -> list[dict]:
    """Judge both turns of every answer that `path` has no judgment of, append FastChat's records to
    it, and return all records, in the order of the questions.

    workers: calls at a time. Raises InputError if `path` holds judgments of different answers or
    with other prompts, and as ask_all.
    """
    found = read_records(path, "question_id", "turn", "judgment")
    records = {(r["question_id"], r["turn"]): r for r in found}
    tasks, names, texts, systems = {}, {}, {}, {}
    for question, given in zip(questions, answers):
        number = question["question_id"]
        for turn in (1, 2):
            template = prompts[PROMPTS[number in references, turn]]
            text = judge_prompt(
                template["prompt_template"],
                question["turns"],
                given["choices"][0]["turns"],
                references.get(number, []),
            )
            names[number, turn], texts[number, turn] = template["name"], text
            systems[number, turn] = system = template["system_prompt"]
            if (number, turn) not in records:
                tasks[number, turn] = [
                    {"role": "system", "content": system},
                    {"role": "user", "content": text},
                ]
                continue
            kept = records[number, turn]
            if (text, system) != (kept["user_prompt"], kept.get("system_prompt", system)):
                raise InputError(
                    f"{path} judges different answers, or with other prompts: remove it, or choose "
                    "another --output_dir"
                )

    def record(key: tuple[int, int], judgment: str) -> dict:
        return {
            "question_id": key[0],
            "model": answers[0]["model_id"],
            "judge": [judge.model, names[key]],
            "system_prompt": systems[key],
            "user_prompt": texts[key],
            "judgment": judgment,
            "score": parse_score(judgment),
            "turn": key[1],
            "tstamp": time.time(),
        }

    records |= ask_all(judge, tasks, record, path, workers)
    return [records[question["question_id"], turn] for question in questions for turn in (1, 2)]


def score(records: list[dict], questions: list[dict]) -> dict[str, float]:
    """Mean scores of the records that have one: over all (as FastChat's show_result), by turn, by
    category; and the number of records without one, "unparsable"."""
    category = {question["question_id"]: question["category"] for question in questions}
    groups = {"score": [], "turn 1": [], "turn 2": []} | {name: [] for name in TEMPERATURES}
    for record in records:
        if record["score"] != -1:
            for name in ("score", f"turn {record['turn']}", category[record["question_id"]]):
                groups[name].append(record["score"])
    scores = {name: statistics.mean(values) for name, values in groups.items() if values}
    return scores | {"unparsable": sum(record["score"] == -1 for record in records)}


def question_scores(runs: list[list[dict]], questions: list[dict]) -> list[float | None]:
    """Of every question the mean of its judgments in all runs, None if none has a score."""
    by_question = defaultdict(list)
    for record in itertools.chain(*runs):
        if record["score"] != -1:
            by_question[record["question_id"]].append(record["score"])
    found = [by_question[question["question_id"]] for question in questions]
    return [statistics.mean(values) if values else None for values in found]


def standard_error(by_question: list[float | None]) -> float | None:
    """The standard error of "score", by question_scores: of the mean over questions. None for fewer
    than two questions."""
    means = [value for value in by_question if value is not None]
    return statistics.stdev(means) / math.sqrt(len(means)) if len(means) > 1 else None


def main() -> None:
    parser = make_parser(__doc__, "model", *GENERATION, *JUDGE, "--workers", "--limit")
    parser.add_argument(
        "--data",
        required=True,
        help="folder with question.jsonl, judge_prompts.jsonl and gpt-4.jsonl",
    )
    parser.add_argument(
        "--reference", default="gpt-4", help="whose reference answers to use, NAME.jsonl in --data"
    )
    parser.add_argument(
        "--repeats", type=at_least(1), default=1, help="times to judge everything, for the spread"
    )
    args = parser.parse_args()

    data, name = Path(args.data), short_name(args.model)
    folder = Path(args.output_dir) / name / "mt_bench"
    questions = load_questions(data)
    if args.limit:
        questions, folder = questions[: args.limit], folder / f"limit-{args.limit}"
    if not args.generate_only:
        prompts, references = load_judge(data, args.reference, questions)
        place, timeout = args.judge_base_url, args.judge_timeout
        judge = open_judge(args.judge, place, JUDGE_TOKENS, temperature=0, timeout=timeout)
    options = engine_options(args) | own_sampling(args.model)  # FastChat sets the temperature alone
    answers = generate_answers(args.model, questions, folder, options)
    path = folder / "model_answer" / f"{name}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    written = read_lines(path) if path.exists() else []
    if [line["choices"] for line in written] != [line["choices"] for line in answers]:
        write_whole(path, "".join(json.dumps(line) + "\n" for line in answers))
    print(f"{path}: {len(answers)} answers of two turns")
    if args.generate_only:
        return
    judgments = folder / f"model_judgment-{endpoint_name(args.judge_base_url)}"
    judged = []
    for repeat in range(1, args.repeats + 1):
        suffix = f"-{repeat}" if repeat > 1 else ""
        records = judge_all(
            judge,
            questions,
            answers,
            prompts,
            references,
            path=judgments / f"{args.judge.replace('/', '_')}_single{suffix}.jsonl",
            workers=args.workers,
        )
        judged.append(records)
    runs = [score(records, questions) for records in judged]
    if not all("score" in run for run in runs):
        raise InputError(f"none of the judgments holds a score: look at {judgments}")
    values = {key: [run[key] for run in runs if key in run] for key in runs[0]}
    scores = {key: statistics.mean(of_runs) for key, of_runs in values.items()}
    spread = {key: statistics.stdev(of_runs) for key, of_runs in values.items() if len(of_runs) > 1}
    by_question = question_scores(judged, questions)
    error = standard_error(by_question)
    errors = {} if error is None else {"score": error}
    settings = {
        "judge": args.judge,
        "judge_version": judge_versions([*itertools.chain(*judged)]),
        "judge_options": judge.options,
        "reference": args.reference,
        "judge_base_url": args.judge_base_url,
        "repeats": args.repeats,
        **options,
        "temperatures": TEMPERATURES,
        "max_new_tokens": NEW_TOKENS,
        "spread_over_repeats": spread,
    }
    if args.limit:
        print(f"--limit {args.limit}: a quick look; no mt_bench.json is written")
    else:
        names = ("question.jsonl", "judge_prompts.jsonl", f"{args.reference}.jsonl")
        write_result(
            folder.parent,
            "mt_bench",
            args.model,
            scores,
            errors=errors,
            settings=settings,
            inputs={file: file_sha256(data / file) for file in names}
            | {"answers": file_sha256(path)},
            packages=("openai",),
            wandb_mode=args.wandb,
            items=by_item({"score": by_question}, [q["question_id"] for q in questions]),
        )
    for key, value in scores.items():
        text = f"{value:.2f}"
        if key == "unparsable":
            text = f"{value:g} of {2 * len(questions)} judgments"
        line = f"{key:<14}{text:>8}" + (f" ± {errors[key]:.2f}" if key in errors else "")
        print(line + (f" (over repeats: ± {spread[key]:.2f})" if key in spread else ""))


if __name__ == "__main__":
    run_command(main)
