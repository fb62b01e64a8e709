"""MT-Bench: two-turn answers in FastChat's format, judged with the official prompts, by OpenAI or any compatible endpoint.

    python -m eval.mt_bench runs/llama-3-8b-instruct/final --data DIR --judge gpt-4-1106-preview --engine vllm
    python -m eval.mt_bench M --data DIR --generate_only                                  # no judge, nothing to pay
    python -m eval.mt_bench M --data DIR --judge my-judge --judge_base_url http://localhost:8000/v1 --reference gpt-4

DIR holds the official question.jsonl and judge_prompts.jsonl (lm-sys/FastChat, fastchat/llm_judge/data) and the reference
answers, JUDGE.jsonl, to the questions of math, reasoning and coding: for gpt-4 from there (mt_bench/reference_answer), for
gpt-4-1106-preview, the paper's judge, from princeton-nlp/SimPO (eval/mt-bench).

Writes OUTPUT_DIR/MODEL/mt_bench/model_answer/MODEL.jsonl and model_judgment/JUDGE_single.jsonl, which FastChat reads, and
OUTPUT_DIR/MODEL/mt_bench.json with the score, by turn and by category, and a radar figure. Judging takes 160 calls. A run that
was stopped goes on. Needs openai (eval/requirements.txt) and OPENAI_API_KEY in the environment, which also goes to
--judge_base_url; judgments of such an endpoint are kept apart, in model_judgment-HOST.
"""

import argparse
import json
import os
import re
import statistics
import sys
import time
import uuid
from concurrent.futures import CancelledError, ThreadPoolExecutor, as_completed
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
from tqdm import tqdm

from data import InputError
from eval.generate import answer, short_name
from eval.report import file_sha256, write_result

# FastChat's temperatures (llm_judge/common.py); all other settings as there.
TEMPERATURES = {"writing": 0.7, "roleplay": 0.7, "extraction": 0.0, "math": 0.0, "coding": 0.0, "reasoning": 0.0}
TEMPERATURES |= {"stem": 0.1, "humanities": 0.1}
WITH_REFERENCE = ("math", "reasoning", "coding")
NEW_TOKENS = 1024
JUDGE_TOKENS = 2048
PROMPTS = {  # (with reference, second turn): name of the judge's prompt
    (False, False): "single-v1",
    (True, False): "single-math-v1",
    (False, True): "single-v1-multi-turn",
    (True, True): "single-math-v1-multi-turn",
}


def read_lines(path: Path) -> list[dict]:
    try:
        return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    except FileNotFoundError:
        raise InputError(f"{path} is missing: see the top of eval/mt_bench.py for where it comes from") from None
    except json.JSONDecodeError as error:
        raise InputError(f"{path}: a line is not valid JSON: {error}") from error


def load_questions(folder: Path) -> list[dict]:
    """The questions: {"question_id", "category", "turns": [first, second]}. Raises InputError unless they are 81 to 160."""
    questions = read_lines(folder / "question.jsonl")
    if [question.get("question_id") for question in questions] != [*range(81, 161)]:
        raise InputError(f"{folder / 'question.jsonl'}: must hold MT-Bench's 80 questions, 81 to 160, in order")
    for question in questions:
        if question.get("category") not in TEMPERATURES or len(question.get("turns", [])) != 2:
            raise InputError(f"{folder / 'question.jsonl'}: question {question['question_id']} lacks its category or two turns")
    return questions


def load_judge(folder: Path, reference: str, questions: list[dict]) -> tuple[dict[str, dict], dict[int, list[str]]]:
    """(the judge's prompts by name, {question_id: both turns of its reference answer}). Raises InputError if one is missing."""
    prompts = {prompt["name"]: prompt for prompt in read_lines(folder / "judge_prompts.jsonl")}
    missing = [name for name in PROMPTS.values() if name not in prompts]
    answers = {line["question_id"]: line["choices"][0]["turns"] for line in read_lines(folder / f"{reference}.jsonl")}
    missing += [
        f"question {q['question_id']}" for q in questions if q["category"] in WITH_REFERENCE and q["question_id"] not in answers
    ]
    if missing:
        raise InputError(f"{folder}: the judge's prompts or reference answers are incomplete: {', '.join(missing)}")
    return prompts, answers


def generate_answers(model: str, questions: list[dict], folder: Path, options: dict) -> list[dict]:
    """Answers of both turns in FastChat's format, in the order of the questions. Kept turn by turn, so that nothing is
    generated twice."""
    turns: dict[int, list[str]] = {question["question_id"]: [] for question in questions}
    for turn in (0, 1):
        for temperature in sorted(set(TEMPERATURES.values())):
            group = [question for question in questions if TEMPERATURES[question["category"]] == temperature]
            prompts = []
            for question in group:
                messages = []
                for text, reply in zip(question["turns"], [*turns[question["question_id"]], None]):
                    messages.append({"role": "user", "content": text})
                    if reply is not None:
                        messages.append({"role": "assistant", "content": reply})
                prompts.append(messages)
            path = folder / "answers" / f"turn-{turn + 1}-temperature-{temperature}.jsonl"
            texts = answer(model, prompts, path, max_new_tokens=NEW_TOKENS, temperature=temperature, **options)
            for question, (text, _) in zip(group, texts):
                turns[question["question_id"]].append(text)
    name = short_name(model)
    return [
        {
            "question_id": question["question_id"],
            "answer_id": uuid.uuid4().hex,
            "model_id": name,
            "choices": [{"index": 0, "turns": turns[question["question_id"]]}],
            "tstamp": time.time(),
        }
        for question in questions
    ]


def parse_score(judgment: str) -> float:
    """FastChat's rule: the first [[x]], otherwise the first [x], otherwise −1 (not counted).

    >>> parse_score("Rating: [[7]]"), parse_score("I give it a [8.5]."), parse_score("seven")
    (7.0, 8.5, -1.0)
    """
    found = re.search(r"\[\[(\d+\.?\d*)\]\]", judgment) or re.search(r"\[(\d+\.?\d*)\]", judgment)
    return float(found[1]) if found else -1.0


def judge_all(
    client, judge: str, questions: list, answers: list, prompts: dict, references: dict, path: Path, workers: int
) -> list:
    """Judge both turns of every answer; append FastChat's records to `path`, go on after those that it has, and return all, in
    the order of the questions. Raises InputError if `path` holds judgments of other answers, and if a call of the judge fails,
    after those under way have been kept."""
    done = {}
    if path.exists():
        content = path.read_text()
        if not content.endswith("\n"):  # a line was being written
            content = content[: content.rfind("\n") + 1]
            path.write_text(content)
        done = {(record["question_id"], record["turn"]): record for record in map(json.loads, content.splitlines())}
    name = answers[0]["model_id"]
    tasks = []
    for question, given in zip(questions, answers):
        first, second = given["choices"][0]["turns"]
        reference = references.get(question["question_id"]) if question["category"] in WITH_REFERENCE else None
        for turn in (1, 2):
            template = prompts[PROMPTS[reference is not None, turn == 2]]
            fields = {"question": question["turns"][0], "answer": first, "answer_1": first, "answer_2": second}
            fields |= {f"question_{number}": text for number, text in enumerate(question["turns"], 1)}
            fields |= {f"ref_answer_{number}": text for number, text in enumerate(reference or [], 1)}
            text = template["prompt_template"].format(**fields)
            if (question["question_id"], turn) not in done:
                tasks.append((question["question_id"], turn, template, text))
            elif done[question["question_id"], turn]["user_prompt"] != text:
                raise InputError(f"{path} judges other answers: remove it, or write to another --output_dir")

    from openai import OpenAIError

    def ask(task: tuple) -> dict:
        question_id, turn, template, text = task
        messages = [{"role": "system", "content": template["system_prompt"]}, {"role": "user", "content": text}]
        reply = client.chat.completions.create(model=judge, messages=messages, temperature=0, max_tokens=JUDGE_TOKENS)
        judgment = reply.choices[0].message.content or ""
        record = {"question_id": question_id, "model": name, "judge": [judge, template["name"]], "user_prompt": text}
        return record | {"judgment": judgment, "score": parse_score(judgment), "turn": turn, "tstamp": time.time()}

    path.parent.mkdir(parents=True, exist_ok=True)
    failure = None
    with ThreadPoolExecutor(workers) as pool, open(path, "a") as file:
        futures = [pool.submit(ask, task) for task in tasks]
        for future in tqdm(as_completed(futures), total=len(tasks), desc=judge, unit="judgment", dynamic_ncols=True):
            try:
                record = future.result()
            except (OpenAIError, CancelledError) as error:  # keep what the other calls give, make no further ones
                failure = failure or error
                pool.shutdown(wait=False, cancel_futures=True)
                continue
            print(json.dumps(record), file=file, flush=True)
            done[record["question_id"], record["turn"]] = record
    if failure:
        raise InputError(f"the judge {judge} failed: {failure!r}. Its other judgments are kept in {path}: run again to go on")
    return [done[question["question_id"], turn] for question in questions for turn in (1, 2)]


def score(records: list[dict], questions: list[dict]) -> dict[str, float]:
    """Mean scores of the records that have one: over all (as FastChat's show_result), by turn, by category; and their number
    without one, "unparsable"."""
    category = {question["question_id"]: question["category"] for question in questions}
    known = [record for record in records if record["score"] != -1]
    groups = {"score": known} | {f"turn {turn}": [r for r in known if r["turn"] == turn] for turn in (1, 2)}
    groups |= {name: [r for r in known if category[r["question_id"]] == name] for name in TEMPERATURES}
    scores = {name: statistics.mean(r["score"] for r in group) for name, group in groups.items() if group}
    return scores | {"unparsable": len(records) - len(known)}


def radar_figure(scores: dict[str, dict[str, float]], path: Path) -> None:
    """The mean score in each category, a line for each model."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(TEMPERATURES)
    angles = np.linspace(0, 2 * np.pi, len(names), endpoint=False)
    figure, axis = pyplot.subplots(figsize=(5, 5), subplot_kw={"projection": "polar"}, layout="constrained")
    for model, values in scores.items():
        line = [values.get(name, np.nan) for name in names]
        axis.plot([*angles, angles[0]], [*line, line[0]], label=model)
    axis.set_xticks(angles, names)
    axis.set_ylim(0, 10)
    axis.legend(loc="lower center", bbox_to_anchor=(0.5, -0.2), frameon=False)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL", help="folder or hub id")
    parser.add_argument("--data", required=True, help="folder with question.jsonl, judge_prompts.jsonl and JUDGE.jsonl")
    parser.add_argument("--judge", default="gpt-4-1106-preview", help="the judge's name at its endpoint")
    parser.add_argument("--reference", default="", help="whose reference answers to use; empty: the judge's own")
    parser.add_argument("--judge_base_url", default="", help="an OpenAI-compatible endpoint instead of OpenAI's")
    parser.add_argument("--repeats", type=int, default=1, help="judge everything so many times, for the spread")
    parser.add_argument("--workers", type=int, default=8, help="calls of the judge at a time")
    parser.add_argument("--engine", choices=["transformers", "vllm"], default="transformers")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--generate_only", action="store_true", help="stop before the judge")
    parser.add_argument("--limit", type=int, default=0, help="only the first N questions: a quick look, no result for a table")
    parser.add_argument("--output_dir", default="results")
    parser.add_argument("--wandb", choices=["off", "online", "offline"], default="off")
    args = parser.parse_args()

    data, name = Path(args.data), short_name(args.model)
    folder = Path(args.output_dir) / name / "mt_bench"
    questions = load_questions(data)
    if args.limit:
        questions, folder = questions[: args.limit], folder / f"limit-{args.limit}"
    client, reference = None, args.reference or args.judge
    if args.repeats < 1:
        raise InputError(f"--repeats must be at least 1, not {args.repeats}")
    if not args.generate_only:
        prompts, references = load_judge(data, reference, questions)
        if not (os.environ.get("OPENAI_API_KEY") or args.judge_base_url):
            raise InputError(
                "the judge needs OPENAI_API_KEY in the environment, or an endpoint of your own: --judge_base_url URL"
            )
        try:
            from openai import OpenAI
        except ImportError:
            raise InputError("the judge needs openai: pip install -r eval/requirements.txt") from None
        client = OpenAI(api_key=os.environ.get("OPENAI_API_KEY") or "none", base_url=args.judge_base_url or None, max_retries=8)
    options = {"engine": args.engine, "batch_size": args.batch_size, "seed": args.seed}
    answers = generate_answers(args.model, questions, folder, options)
    path = folder / "model_answer" / f"{name}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    if not (path.exists() and [line["choices"] for line in read_lines(path)] == [line["choices"] for line in answers]):
        path.write_text("".join(json.dumps(line) + "\n" for line in answers))
    print(f"{path}: {len(answers)} answers of two turns")
    if args.generate_only:
        return
    runs = []
    for repeat in range(args.repeats):
        file = f"{args.judge.replace('/', '_')}_single{f'-{repeat + 1}' if repeat else ''}.jsonl"
        host = f"-{urlsplit(args.judge_base_url).netloc.replace(':', '_')}" if args.judge_base_url else ""
        target = folder / f"model_judgment{host}" / file
        records = judge_all(client, args.judge, questions, answers, prompts, references, target, args.workers)
        runs.append(score(records, questions))
    if not all("score" in run for run in runs):
        raise InputError(f"none of the judgments holds a score: look at {folder / 'model_judgment'}")
    scores = {key: statistics.mean(run[key] for run in runs if key in run) for key in runs[0]}
    found = {key: [run[key] for run in runs if key in run] for key in scores}
    spread = {key: statistics.stdev(values) for key, values in found.items() if len(values) > 1}
    settings = {"judge": args.judge, "reference": reference, "judge_base_url": args.judge_base_url, "repeats": args.repeats}
    settings |= options | {"temperatures": TEMPERATURES, "max_new_tokens": NEW_TOKENS, "spread_over_repeats": spread}
    files = [data / "question.jsonl", data / "judge_prompts.jsonl", data / f"{reference}.jsonl", path]
    hashes = {file.name: file_sha256(file) for file in files}
    if args.limit:
        print(f"--limit {args.limit}: a quick look; no mt_bench.json is written")
    else:
        write_result(folder.parent, "mt_bench", args.model, scores, {}, settings, hashes, ("openai",), args.wandb)
    for key, value in scores.items():
        text = f"{value:.2f}" if key != "unparsable" else f"{value:g} of {2 * len(questions)} judgments"
        print(f"{key:<14}{text:>8}" + (f" ± {spread[key]:.2f}" if key in spread else ""))
    try:
        radar_figure({name: scores}, folder / "radar.png")
    except ImportError:
        print("no figure: matplotlib is not installed (pip install -r eval/requirements.txt)")


def run() -> None:
    try:
        main()
    except InputError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    run()
