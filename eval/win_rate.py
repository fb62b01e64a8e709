"""Win rate of a model's answers, by a judge: against another model's, or against the chosen
responses of preference data, as the DPO and SimPER papers evaluate Pythia-2.8B on Anthropic's HH.

    python -m eval.win_rate runs/simper/final runs/dpo/final --data prompts.jsonl
    python -m eval.win_rate runs/pythia-2.8b-hh/final --data Anthropic/hh-rlhf:test

The judge is shown both answers to a prompt as A and B, once in each order, and names the more
helpful one, or calls it a tie. A prompt's score is the mean of both verdicts, a tie half; the win
rate is the mean over prompts. Beside it stands the win rate that is controlled for length. Writes
OUTPUT_DIR/MODEL/win_rate.json, or win_rate_against_OTHER.json, and every model's answers and the
judgments to OUTPUT_DIR/MODEL/win_rate/; the same command continues after an interruption. The
judge: eval/judge.py.
"""

import hashlib
import json
import math
import re
import statistics
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from eval.generate import answer, load_engine, load_prompts, sampling_options, short_name
from eval.judge import Judge, ask_all, endpoint_name, judge_versions, open_judge
from eval.results import (
    AGAINST,
    GENERATION,
    JUDGE,
    SAMPLING,
    by_item,
    file_sha256,
    make_parser,
    read_records,
    say_repeated,
    write_result,
)
from runtime.command_line import run_command
from runtime.errors import InputError
from runtime.intervals import FEW, t_quantile
from runtime.rows import Dropped, draw, is_json, load_rows, parse_row, rename, split_share
from runtime.templates import as_messages

JUDGE_TOKENS = 512
ORDERS = ("A", "B")  # where our answer stands
# The criteria are those of the DPO paper (appendix C.2), the words are not.
INSTRUCTION = """\
Below is a conversation with an assistant, and two answers to its last message, A and B. Which \
answer helps the person more? Do not let the order or the length of the answers decide.

First compare them in one sentence. Then write, alone on the last line, A, B, or TIE if neither is \
more helpful.

[Conversation]
{conversation}

[Answer A]
{a}

[Answer B]
{b}
"""


def load_chosen(source: str, count: int, columns: str = "") -> list[tuple[list | str, str]]:
    """(prompt, chosen response) of `count` pairs spread over a source of preference data, or of all
    with 0. Raises InputError, naming the source and the row, for a row that is no pair."""
    source, share = split_share(source)
    rows, pairs = load_rows(source), []
    for index in draw(source, len(rows), share).tolist():
        try:
            prompt, (chosen, *_) = parse_row(rename(rows[index], columns), is_json(rows))
        except Dropped:
            continue
        except InputError as error:
            raise InputError(f"{source}, row {index}: {error}") from None
        if chosen.strip():
            pairs.append((prompt, chosen))
    if not pairs:
        raise InputError(
            f"{source}: none of its {len(rows)} rows has a prompt and a chosen response"
        )
    count = min(count or len(pairs), len(pairs))
    return [pairs[i * len(pairs) // count] for i in range(count)]


def judge_prompt(prompt: list | str, ours: str, other: str, place: str) -> str:
    """What the judge reads. place: "A" or "B", where our answer stands."""
    text = prompt
    if not isinstance(prompt, str):
        text = "\n\n".join(f"{m['role']}: {m['content']}" for m in as_messages(prompt))
    first, second = (ours, other) if place == "A" else (other, ours)
    return INSTRUCTION.format(conversation=text.strip(), a=first.strip(), b=second.strip())


def parse_verdict(judgment: str) -> str:
    """The verdict in the last line, alone or in a sentence as below: "A", "B" or "TIE"; "" if there
    is none, or if it names both.

    >>> [parse_verdict(line) for line in ("**A**", "Answer: B", "It is a tie.", "A > B")]
    ['A', 'B', 'TIE', '']
    """
    lines = judgment.strip().splitlines() or [""]
    match = re.fullmatch(r"(?:.*\b(?i:answer|verdict|is|a)\b)?\W*(A|B|(?i:tie))\W*", lines[-1])
    both = {"A", "B"} <= {*re.findall(r"\w+", lines[-1])}
    return match[1].upper() if match and not both else ""


def judge_all(
    judge: Judge, pairs: list, answers: list[str], path: Path, workers: int
) -> list[list[dict]]:
    """The two judgments of every answer, one for each of ORDERS, kept in `path`: the "score" is 1
    where the judge prefers the answer to the other one of (prompt, other answer), 0.5 for a tie, 0
    where it prefers the other one, and None where its words are none of these.

    Raises InputError if `path` holds judgments of different answers, and as ask_all.
    """
    records = {
        (record["index"], record["ours"]): record
        for record in read_records(path, "index", "ours", "user_prompt", "judgment")
    }
    texts = {
        (index, place): judge_prompt(prompt, ours, other, place)
        for index, ((prompt, other), ours) in enumerate(zip(pairs, answers))
        for place in ORDERS
    }
    if any(texts.get(key) != record["user_prompt"] for key, record in records.items()):
        raise InputError(
            f"{path} judges different answers: remove it, or choose another --output_dir"
        )

    def record(key: tuple[int, str], judgment: str) -> dict:
        index, place = key
        verdict = parse_verdict(judgment)
        score = {"TIE": 0.5, place: 1.0, "": None}.get(verdict, 0.0)
        return {
            "index": index,
            "ours": place,
            "score": score,
            "judgment": judgment,
            "user_prompt": texts[key],
        }

    tasks = {
        key: [{"role": "user", "content": text}]
        for key, text in texts.items()
        if key not in records
    }
    records |= ask_all(judge, tasks, record, path, workers)
    # Read anew: an earlier version may have read the same words otherwise.
    keys = [[(index, place) for place in ORDERS] for index in range(len(pairs))]
    return [[records[k] | record(k, records[k]["judgment"]) for k in both] for both in keys]


def prompt_scores(judgments: list[list[dict]]) -> list[float | None]:
    """Of every prompt the mean of its two judgments' scores, None if one of them has none."""
    found = [[record["score"] for record in both] for both in judgments]
    return [None if None in both else statistics.mean(both) for both in found]


def length_controlled(
    scores: Sequence[float], lengths: Sequence[int], other_lengths: Sequence[int]
) -> tuple[float, float] | None:
    """The win rate at equal length and its standard error, in per cent; None where it cannot be
    estimated: of fewer than FEW prompts, where one model wins always, or where its answers are the
    longer, or the shorter, ones for more than nine in ten prompts.

    scores, lengths (in characters), other_lengths: (prompts,). As AlpacaEval's (Dubois et al. 2024,
    equation 2, without the difficulty of instructions, which takes many models to estimate):
    p(win) = σ(θ + φ tanh(d / std(d))), d the difference of the lengths. Fitted by maximum
    likelihood, scores between 0 and 1 included; the rate is σ(θ), its error by the sandwich
    formula, which holds whatever the scores' variance is (Papke & Wooldridge 1996). Its interval:
    odds_interval.
    """
    y, d = np.asarray(scores, dtype=float), np.subtract(lengths, other_lengths).astype(float)
    # Where nearly all differences have one sign, equal length is an extrapolation.
    beside = min((d >= 0).mean(), (d <= 0).mean())
    if len(y) < FEW or not 0 < y.mean() < 1 or beside < 0.1:
        return None
    x = np.ones((len(y), 1))
    if d.std() > 0:
        x = np.column_stack([x, np.tanh(d / d.std())])
    beta = np.zeros(x.shape[1])
    for _ in range(50):  # Newton's method; the likelihood is concave
        p = (1 + np.tanh(x @ beta / 2)) / 2  # σ, which does not overflow
        information = (x * (p * (1 - p))[:, None]).T @ x
        if np.linalg.cond(information) > 1e10:
            return None
        step = np.linalg.solve(information, x.T @ (y - p))
        beta += step
        if np.abs(step).max() < 1e-10:
            break
    else:
        return None
    if abs(beta[0]) > 10:  # one side wins always where lengths are equal
        return None
    inverse = np.linalg.inv(information)
    residuals = x * (y - p)[:, None]
    variance = inverse @ (residuals.T @ residuals) @ inverse
    rate = 1 / (1 + math.exp(-beta[0]))
    return 100 * rate, 100 * rate * (1 - rate) * math.sqrt(variance[0, 0])


def odds_interval(rate: float, error: float, count: int) -> tuple[float, float]:
    """The 95 % interval of a rate that was estimated as log odds, such as length_controlled's, in
    per cent, from `count` prompts: symmetric in the log odds, with count − 2 degrees of freedom.

    (Simulated with 12 to 100 prompts, it covers the rate in 90 to 96 of 100 cases; an interval that
    is symmetric in per cent in 75 to 95.)
    """
    log_odds = math.log(rate / (100 - rate))
    half = t_quantile(count - 2) * error * 100 / (rate * (100 - rate))
    low, high = (100 / (1 + math.exp(-log_odds - side * half)) for side in (-1, 1))
    return low, high


def main() -> None:
    parser = make_parser(__doc__, "model", *GENERATION, *SAMPLING, "--columns", *JUDGE, "--workers")
    parser.set_defaults(num_prompts=256, max_new_tokens=256, temperature=1.0)
    parser.add_argument(
        "other", nargs="?", metavar="OTHER", help="the model to win against; else chosen responses"
    )
    parser.add_argument(
        "--data", required=True, help="preference data, as for train.py; with OTHER also prompts"
    )
    args = parser.parse_args()

    name, against = short_name(args.model), short_name(args.other) if args.other else "chosen"
    if name == against:
        raise InputError(f"two models have the same name, {name}; results are kept by name")
    if args.other:
        prompts = load_prompts(args.data, args.num_prompts, args.columns)
    else:
        pairs = load_chosen(args.data, args.num_prompts, args.columns)
        prompts = [prompt for prompt, _ in pairs]
    if not args.generate_only:
        place, timeout = args.judge_base_url, args.judge_timeout
        judge = open_judge(args.judge, place, JUDGE_TOKENS, temperature=0, timeout=timeout)
    digest = hashlib.sha256(json.dumps(prompts).encode()).hexdigest()
    set_of_prompts = f"{Path(args.data).stem}-{digest[:8]}".replace(":", "-")

    def answers_of(model: str) -> tuple[Path, list[str], int]:
        """The file, the answers, and how many of them were cut."""
        file = Path(args.output_dir) / short_name(model) / "win_rate" / set_of_prompts
        file /= "answers.jsonl"
        found = answer(model, prompts, file, **sampling_options(args))
        # A model of dialogues in plain text may go on with the person's next message.
        texts = [text.partition("\n\nHuman:")[0] for text, _ in found]
        cut = sum(not finished for _, finished in found)
        print(f"{file}: {len(texts)} answers, {cut} of them cut at {args.max_new_tokens} tokens")
        return file, texts, cut

    file, texts, cut = answers_of(args.model)
    if args.other:
        if args.engine == "vllm" and load_engine.cache_info().currsize:
            raise InputError(
                "--engine vllm: there is no memory for a second model in the same process. The "
                "answers are kept: run the same command again"
            )
        _, others, other_cut = answers_of(args.other)
        pairs = list(zip(prompts, others))
    if args.generate_only:
        return
    place = endpoint_name(args.judge_base_url)
    path = file.with_name(f"judgments-{against}-{place}-{args.judge.replace('/', '_')}.jsonl")
    judgments = judge_all(judge, pairs, texts, path, args.workers)
    by_prompt = prompt_scores(judgments)
    counted = [score for score in by_prompt if score is not None]
    if len(counted) < 2:
        raise InputError(f"fewer than two prompts have a verdict in both orders: look at {path}")
    errors = {"win_rate": 100 * statistics.stdev(counted) / math.sqrt(len(counted))}
    scores = {"win_rate": 100 * statistics.mean(counted)}
    known = [i for i, score in enumerate(by_prompt) if score is not None]
    lengths = [len(texts[i]) for i in known], [len(pairs[i][1]) for i in known]
    if controlled := length_controlled(counted, *lengths):
        scores["length_controlled_winrate"], errors["length_controlled_winrate"] = controlled
    # The judge prefers the same place in both orders: half a win, and not a tie.
    contradicted = sum({r["score"] for r in judgments[i]} == {0.0, 1.0} for i in known)
    shares = {
        "wins": sum(score > 0.5 for score in counted),
        "ties": sum(score == 0.5 for score in counted) - contradicted,
        "losses": sum(score < 0.5 for score in counted),
        "contradicted": contradicted,
    }
    scores |= {key: 100 * count / len(counted) for key, count in shares.items()}
    scores |= {"judged": len(counted), "unparsable": len(judgments) - len(counted)}
    scores["words"] = statistics.mean(len(text.split()) for text in texts)
    scores[f"words/{against}"] = statistics.mean(len(other.split()) for _, other in pairs)
    settings = {
        **sampling_options(args),
        "against": args.other or "the chosen responses",
        "data": args.data,
        # Of all that is compared with: prompts, and the other model's answers or chosen ones.
        "data_sha256": hashlib.sha256(json.dumps(pairs).encode()).hexdigest(),
        "num_prompts": len(pairs),
        "judge": args.judge,
        "judge_version": judge_versions([record for both in judgments for record in both]),
        "judge_base_url": args.judge_base_url,
        "orders": len(ORDERS),
        "cut": cut,
    }
    settings |= {"cut_of_other": other_cut} if args.other else {}
    write_result(
        Path(args.output_dir) / name,
        f"{AGAINST}{against}" if args.other else "win_rate",
        args.model,
        scores,
        errors=errors,
        settings=settings,
        inputs={path.name: file_sha256(path)},
        packages=("openai",),
        wandb_mode=args.wandb,
        items=by_item(
            {"win_rate": [None if score is None else 100 * score for score in by_prompt]},
            settings["data_sha256"],
        ),
    )
    titles = {"win_rate": "win rate", "length_controlled_winrate": "controlled for length"}
    print(f"against {args.other or 'the chosen responses'}, {len(counted)} prompts in both orders")
    say_repeated([*map(json.dumps, prompts)])
    for key, title in titles.items():
        if key not in scores:
            print(
                f"{title:<24}not estimable: too few prompts, or one side is longer or wins always"
            )
            continue
        if len(counted) < FEW or not errors[key]:
            print(f"{title:<24}{scores[key]:.1f} %, no interval")
            continue
        if key == "win_rate":
            half = t_quantile(len(counted) - 1) * errors[key]
            low, high = max(0.0, scores[key] - half), min(100.0, scores[key] + half)
        else:
            low, high = odds_interval(scores[key], errors[key], len(counted))
        text = f"{title:<24}{scores[key]:.1f} % ± {errors[key]:.1f} (standard error)"
        print(f"{text}; 95 % interval: {low:.1f} to {high:.1f} %")
    counts = ", ".join(f"{key.replace('_', ' ')} {scores[key]:.1f} %" for key in shares)
    print(f"{counts}; {scores['unparsable']} of {len(judgments)} prompts lack a verdict")
    print(f"words: {scores['words']:.1f}, of the others {scores[f'words/{against}']:.1f}")


if __name__ == "__main__":
    run_command(main)
