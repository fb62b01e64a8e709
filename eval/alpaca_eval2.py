"""AlpacaEval 2: the answers of a model to the 805 instructions in the official format, judged by
the official tool.

    python -m eval.alpaca_eval2 runs/llama-3-8b-instruct/final --decoding llama-3-8b-instruct \\
        --engine vllm
    python -m eval.alpaca_eval2 M --decoding mistral-7b-base --generate_only   # no judge, no cost
    python -m eval.alpaca_eval2 M --judge_base_url http://HOST:8000/v1 --judge my-judge

Writes OUTPUT_DIR/MODEL/alpaca_eval2/outputs.json, the judge's annotations beside it, and
OUTPUT_DIR/MODEL/alpaca_eval2.json with the length-controlled win rate, the win rate, their standard
errors and the mean length in characters. Judging takes 805 calls of one output token each;
everything that the official tool needs is looked for before the first answer, and the judge is
asked once. Needs alpaca_eval (eval/requirements.txt). The judge: eval/judge.py.
"""

import hashlib
import json
import logging
import math
import os
from pathlib import Path

import yaml
from huggingface_hub import hf_hub_download

from eval.generate import answer, engine_options, short_name
from eval.judge import REFUSALS, REFUSED, Judge, api_key, open_judge
from eval.results import (
    GENERATION,
    JUDGE,
    by_item,
    file_sha256,
    make_parser,
    start_model,
    write_result,
)
from runtime.command_line import run_command
from runtime.errors import InputError
from runtime.log import lock_folder, write_whole

# The authors' settings by recipe (the configs for alpaca_eval of SimPO and SimPER).
DECODING = {
    "llama-3-8b-base": {"temperature": 0.9, "top_p": 1.0, "max_new_tokens": 4096},
    "llama-3-8b-instruct": {"temperature": 0.9, "top_p": 1.0, "max_new_tokens": 4096},
    "mistral-7b-base": {"temperature": 0.7, "top_p": 1.0, "max_new_tokens": 2048},
    "mistral-7b-instruct": {"temperature": 0.5, "top_p": 1.0, "max_new_tokens": 2048},
    "greedy": {"temperature": 0.0, "top_p": 1.0, "max_new_tokens": 2048},
}
RECIPES = Path(__file__).resolve().parent.parent / "recipes"
HUB = "tatsu-lab/alpaca_eval"
# The outputs of gpt4_1106_preview, with the instructions in the official order.
REFERENCE = "alpaca_eval_gpt4_baseline.json"
# The length-controlled win rate joins each answer with the difficulty of its instruction by
# position, without looking at the instruction: different rows, or a different order, give a wrong
# rate and no error. SHA-256 of the JSON list of the 805 instructions:
INSTRUCTIONS_SHA256 = "c5770d532bf3f697768ed9a57a05d8b58b2617321ca65070620f059676e7c99a"
ANNOTATOR = "weighted_alpaca_eval_gpt4_turbo"  # the paper's; its judge is replaced by --judge


def recipe_of(model: str) -> str:
    """The name of the recipe in DECODING that starts from the same model as the run whose final/
    `model` is; "greedy" if there is none."""
    start = start_model(model)
    for name in DECODING.keys() - {"greedy"}:
        if yaml.safe_load((RECIPES / f"{name}.yaml").read_text())["model"] == start:
            return name
    return "greedy"


def hub_file(name: str, cache_dir: str | None = None, advice: str = "") -> str:
    """The local path of a file of HUB. Raises InputError, ending with `advice`, if it cannot be
    fetched."""
    try:
        return hf_hub_download(HUB, name, repo_type="dataset", cache_dir=cache_dir)
    except Exception as error:
        raise InputError(f"{name} of {HUB} cannot be fetched ({error}){advice}") from error


def load_outputs(path: str) -> list[dict]:
    """Rows of a file of outputs in AlpacaEval's format. Raises InputError unless they are the 805
    instructions in order."""
    try:
        rows = json.loads(Path(path).read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from error
    keys = ("instruction", "output", "generator")
    if not isinstance(rows, list):
        raise InputError(f"{path}: must be a JSON list of objects with {', '.join(keys)}")
    for number, row in enumerate(rows):
        if not (isinstance(row, dict) and all(isinstance(row.get(key), str) for key in keys)):
            raise InputError(f"{path}: entry {number} must have {', '.join(keys)} as text")
    generators = {row["generator"] for row in rows}
    if len(generators) != 1:
        raise InputError(f"{path}: must have one generator, not {sorted(generators)}")
    instructions = json.dumps([row["instruction"] for row in rows])
    if hashlib.sha256(instructions.encode()).hexdigest() != INSTRUCTIONS_SHA256:
        raise InputError(
            f"{path}: its {len(rows)} instructions are not the 805 of AlpacaEval in the official "
            "order, without which the length-controlled win rate is wrong"
        )
    return rows


def prepare_judge(model: str, base_url: str, folder: Path, timeout: float):
    """Import alpaca_eval and configure its judge's endpoint, in `folder`. → alpaca_eval and the
    Judge.

    Raises InputError if the tool or a file from the hub is missing, which the tool would report
    only after the judge has been paid, or if the judge does not answer.
    """
    os.environ["OPENAI_API_KEY"] = api_key()  # the key is written to no file
    client = folder / "client.yaml"
    os.environ["OPENAI_CLIENT_CONFIG_PATH"] = str(client)  # read when alpaca_eval is imported
    try:
        import alpaca_eval
    except ImportError as error:
        raise InputError(
            f"alpaca_eval is not installed ({error}): pip install -r eval/requirements.txt"
        ) from error
    cache = alpaca_eval.constants.DEFAULT_CACHE_DIR
    hub_file("df_gamed.csv", cache_dir=cache)  # for the length control
    judge = open_judge(model, base_url, max_tokens=1, temperature=1, logprobs=True, timeout=timeout)
    folder.mkdir(parents=True, exist_ok=True)
    lock_folder(folder)  # until this process ends: another one would pay for the same judgments
    client.write_text(yaml.safe_dump({"default": [{"base_url": base_url, "timeout": timeout}]}))
    return alpaca_eval, judge


def run_judge(
    alpaca_eval, judge: Judge, outputs: Path, reference: str, folder: Path, base_url: str
) -> tuple[dict[str, float], list[float | None], str]:
    """Run the official evaluation. → its metrics for these outputs, each output's win rate in per
    cent (None: unjudged), and the judge's versions.

    What the judge refuses counts as "unjudged". Raises InputError if a call fails, or REFUSALS are
    refused in a row.
    """
    from alpaca_eval.decoders import openai as decoder
    from openai import APIStatusError

    official = Path(alpaca_eval.constants.EVALUATORS_CONFIG_DIR)
    config = yaml.safe_load((official / ANNOTATOR / "configs.yaml").read_text())[ANNOTATOR]
    config["prompt_template"] = str(official / config["prompt_template"])
    name = f"{ANNOTATOR}_{judge.model}".replace("/", "_")
    # requires_chatml: a model with "instruct" in its name would get a plain completion request.
    config["completions_kwargs"] |= {"model_name": judge.model, "requires_chatml": True}
    if "max_completion_tokens" in judge.options:  # the tool sends it on, and no max_tokens of None
        config["completions_kwargs"] |= {"max_tokens": None, "max_completion_tokens": 1}
    (folder / name).mkdir(exist_ok=True)
    (folder / name / "configs.yaml").write_text(yaml.safe_dump({name: config}))
    # After an interruption, what this judge has judged is not paid for again; judgments that are
    # missing (null or −1) are requested again.
    place = hashlib.sha256(f"{base_url} {judge.model}".encode()).hexdigest()[:8]
    cache = folder / f"judgments-{place}.json"
    if cache.exists():
        text = cache.read_text()
        try:
            lines = json.loads(text)
        except json.JSONDecodeError:  # the tool was killed while it wrote: the whole ones
            end = text.rfind("\n  },")
            lines = json.loads(text[:end] + "\n  }]") if end >= 0 else []
        judged = [line for line in lines if line["preference"] not in (None, -1)]
        write_whole(cache, json.dumps(judged, indent=2))
    # Which versions of the judge wrote it.
    file = cache.with_suffix(".versions")
    versions = set()
    if cache.exists():
        versions = {*file.read_text().splitlines()} if file.exists() else {"unknown"}
    ask, refused = decoder._openai_completion_helper, []  # refused: reasons, since the last answer

    def ask_or_leave_out(*args, **kwargs) -> list[dict]:
        try:
            answers = ask(*args, **kwargs)
        except APIStatusError as error:
            refused.append(str(error))
            if error.status_code not in REFUSED or len(refused) >= REFUSALS:
                raise
            return [{"text": "", "total_tokens": 0}]  # as the tool does for a filter of OpenAI's
        refused.clear()
        if judge.version not in versions:
            versions.add(judge.version)
            file.write_text("\n".join(versions))  # the tool's threads may do so at the same time
        return answers

    decoder._openai_completion_helper = ask_or_leave_out
    # It logs thousands of lines; its errors are raised, too.
    logging.disable(logging.ERROR)
    try:
        table, annotations = alpaca_eval.evaluate(
            model_outputs=str(outputs),
            reference_outputs=reference,
            # (A relative one is looked for among the tool's own.)
            annotators_config=str((folder / name).resolve()),
            output_path=str(folder),
            precomputed_leaderboard=None,
            is_return_instead_of_print=True,
            is_overwrite_leaderboard=True,
            metric_kwargs={"save_weights_dir": str(folder / "weights")},
            caching_path=str(cache),
            annotation_kwargs={"chunksize": 32},  # judgments between two writes of the cache
        )
    except Exception as error:
        raise InputError(
            f"alpaca_eval with the judge {judge.model} failed: {error!r}. Its judgments so far are "
            f"kept in {cache}: run the command again to continue"
        ) from error
    finally:
        logging.disable(logging.NOTSET)
        decoder._openai_completion_helper = ask
    row = table.iloc[0].to_dict()
    metrics = {key: value for key, value in row.items() if isinstance(value, (int, float))}
    rates = dict.fromkeys(row["instruction"] for row in json.loads(outputs.read_text()))
    for line in annotations:  # from 1, the reference's output, to 2, the model's
        if line["preference"] is not None and not math.isnan(line["preference"]):
            rates[line["instruction"]] = 100 * (line["preference"] - 1)
    metrics["unjudged"] = [*rates.values()].count(None)
    return metrics, [*rates.values()], ", ".join(sorted(versions))


def main() -> None:
    parser = make_parser(__doc__, "model", *GENERATION, *JUDGE, "--limit")
    parser.add_argument(
        "--decoding",
        choices=DECODING,
        help="the authors' settings for a recipe, or greedy; by default those of the recipe whose "
        "model the run started from, otherwise greedy",
    )
    parser.add_argument(
        "--reference", default="", help=f"the reference's outputs; empty: {REFERENCE} of {HUB}"
    )
    args = parser.parse_args()

    reference_file = args.reference or hub_file(REFERENCE, advice="; give --reference FILE")
    reference = load_outputs(reference_file)
    name = short_name(args.model)
    folder = Path(args.output_dir) / name / "alpaca_eval2"
    alpaca_eval = None
    if args.limit:
        reference, folder = reference[: args.limit], folder / f"limit-{args.limit}"
    elif not args.generate_only:
        alpaca_eval, judge = prepare_judge(
            args.judge, args.judge_base_url, folder, args.judge_timeout
        )
    recipe = args.decoding or recipe_of(args.model)
    decoding = DECODING[recipe]
    options = engine_options(args)
    prompts = [row["instruction"] for row in reference]
    answers = answer(args.model, prompts, folder / "answers.jsonl", **decoding, **options)
    rows = [
        {
            "dataset": row.get("dataset", ""),
            "instruction": row["instruction"],
            "output": text.strip(),
            "generator": name,
        }
        for row, (text, _) in zip(reference, answers)
    ]
    outputs = folder / "outputs.json"
    outputs.write_text(json.dumps(rows, indent=1, ensure_ascii=False))
    cut, empty = sum(not finished for _, finished in answers), sum(not text for text, _ in answers)
    print(
        f"{outputs}: {len(rows)} outputs; {cut} were cut at {decoding['max_new_tokens']} tokens, "
        f"{empty} are empty; decoding of {recipe}: {decoding}"
    )
    if alpaca_eval is None:
        return
    metrics, rates, versions = run_judge(
        alpaca_eval, judge, outputs, reference_file, folder, args.judge_base_url
    )
    errors = {
        "win_rate": metrics.pop("standard_error"),
        "length_controlled_winrate": metrics.pop("lc_standard_error"),
    }
    settings = {
        **decoding,
        **options,
        "decoding": recipe,
        "annotator": ANNOTATOR,
        "judge_base_url": args.judge_base_url,
        "judge": args.judge,
        "judge_version": versions,
        "reference_sha256": file_sha256(reference_file),
        "cut": cut,
        "empty": empty,
    }
    write_result(
        folder.parent,
        "alpaca_eval2",
        args.model,
        metrics,
        errors=errors,
        settings=settings,
        inputs={"outputs": file_sha256(outputs), "reference": file_sha256(reference_file)},
        packages=("alpaca_eval", "openai"),
        wandb_mode=args.wandb,
        items=by_item({"win_rate": rates}, prompts),
    )
    for key, title in (
        ("length_controlled_winrate", "length-controlled win rate"),
        ("win_rate", "win rate"),
    ):
        print(f"{title:<28}{metrics[key]:>8.2f} % ± {errors[key]:.2f}")
    print(f"{'mean length (characters)':<28}{metrics['avg_length']:>8.0f}")
    if metrics["unjudged"]:
        print(
            f"{metrics['unjudged']} of {len(prompts)} got no readable judgment and do not count; "
            "the same command asks for them again"
        )


if __name__ == "__main__":
    run_command(main)
