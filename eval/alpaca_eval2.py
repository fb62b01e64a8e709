"""AlpacaEval 2: the answers of a model to the 805 instructions in the official format, judged by the official tool.

    python -m eval.alpaca_eval2 runs/llama-3-8b-instruct/final --decoding llama-3-8b-instruct --engine vllm
    python -m eval.alpaca_eval2 M --decoding mistral-7b-base --generate_only                # no judge, nothing to pay
    python -m eval.alpaca_eval2 M --judge_base_url http://localhost:8000/v1 --judge_model my-judge

Writes OUTPUT_DIR/MODEL/alpaca_eval2/outputs.json, the judge's annotations beside it, and OUTPUT_DIR/MODEL/alpaca_eval2.json
with the length-controlled win rate, the win rate, their standard errors and the mean length in characters. Judging takes 805
calls of one output token each, after everything that the official tool needs has been found to be there. Needs alpaca_eval
(eval/requirements.txt) and, for its judge, OPENAI_API_KEY in the environment, which also goes to --judge_base_url.
"""

import argparse
import hashlib
import json
import math
import os
import sys
from pathlib import Path

import yaml

from data import InputError
from eval.generate import answer, short_name
from eval.report import file_sha256, write_result

# temperature, top_p, most new tokens: the authors' (SimPO's and SimPER's configs of alpaca_eval), by recipe.
DECODING = {
    "llama-3-8b-base": (0.9, 1.0, 4096),
    "llama-3-8b-instruct": (0.9, 1.0, 4096),
    "mistral-7b-base": (0.7, 1.0, 2048),
    "mistral-7b-instruct": (0.5, 1.0, 2048),
    "greedy": (0.0, 1.0, 2048),
}
HUB = "tatsu-lab/alpaca_eval"
REFERENCE = "alpaca_eval_gpt4_baseline.json"  # outputs of gpt4_1106_preview, with the instructions in the official order
# The length-controlled rate joins each answer with the difficulty of its instruction by position, without looking at the
# instruction: other rows, or another order, give a wrong rate and no error. SHA-256 of the JSON list of the 805 instructions:
INSTRUCTIONS_SHA256 = "c5770d532bf3f697768ed9a57a05d8b58b2617321ca65070620f059676e7c99a"
ANNOTATOR = "weighted_alpaca_eval_gpt4_turbo"


def load_reference(path: str) -> tuple[list[dict], str]:
    """(the reference's rows, their file); an empty path is the file on the hub. Raises InputError if they cannot be had."""
    if not path:
        from huggingface_hub import hf_hub_download

        try:
            path = hf_hub_download(HUB, REFERENCE, repo_type="dataset")
        except Exception as error:
            raise InputError(f"{HUB} {REFERENCE} cannot be fetched ({error}); give --reference FILE") from error
    return load_outputs(path), path


def load_outputs(path: str) -> list[dict]:
    """Rows of a file of outputs in AlpacaEval's format. Raises InputError unless they are the 805 instructions in order."""
    try:
        rows = json.loads(Path(path).read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from error
    if not isinstance(rows, list):
        raise InputError(f"{path}: must be a JSON list of objects with instruction, output and generator")
    for number, row in enumerate(rows):
        if not isinstance(row, dict) or not all(
            isinstance(row.get(key), str) for key in ("instruction", "output", "generator")
        ):
            raise InputError(f"{path}: entry {number} lacks instruction, output or generator as text")
    generators = {row["generator"] for row in rows}
    if len(generators) != 1:
        raise InputError(f"{path}: must have one generator, not {sorted(generators)}")
    instructions = json.dumps([row["instruction"] for row in rows])
    if hashlib.sha256(instructions.encode()).hexdigest() != INSTRUCTIONS_SHA256:
        raise InputError(
            f"{path}: its {len(rows)} instructions are not the 805 of AlpacaEval in the official order, "
            "without which the length-controlled win rate is wrong"
        )
    return rows


def check_judge(annotator: str, base_url: str, client: Path):
    """alpaca_eval, imported so that it will read its endpoint and key from the file `client`. Raises InputError if it, the key,
    the annotator or a file that it will fetch is missing: it would notice the last only after the judge has been paid."""
    if not (os.environ.get("OPENAI_API_KEY") or base_url):
        raise InputError("the judge needs OPENAI_API_KEY in the environment, or an endpoint of your own: --judge_base_url URL")
    os.environ["OPENAI_CLIENT_CONFIG_PATH"] = str(client)
    try:
        import alpaca_eval
        from alpaca_eval import constants
    except ImportError as error:
        raise InputError(f"AlpacaEval's own tool is missing ({error}): pip install -r eval/requirements.txt") from error
    # Those that weigh the judge's two answers by their probabilities, as the paper's; all of them ask an OpenAI endpoint.
    known = sorted(path.parent.name for path in Path(constants.EVALUATORS_CONFIG_DIR).glob("weighted_*/configs.yaml"))
    if annotator not in known:
        raise InputError(f"there is no annotator {annotator}; those that can be used are {', '.join(known)}")
    from huggingface_hub import hf_hub_download

    try:
        hf_hub_download(HUB, "df_gamed.csv", repo_type="dataset", cache_dir=constants.DEFAULT_CACHE_DIR)
    except Exception as error:
        raise InputError(f"df_gamed.csv of {HUB}, for the length-controlled rate, cannot be fetched: {error}") from error
    return alpaca_eval


def judge(
    alpaca_eval, outputs: Path, reference: str, folder: Path, annotator: str, judge_model: str, base_url: str, client: Path
) -> dict[str, float]:
    """Run the official evaluation and return its metrics for these outputs."""
    official = Path(alpaca_eval.constants.EVALUATORS_CONFIG_DIR)
    config = yaml.safe_load((official / annotator / "configs.yaml").read_text())[annotator]
    config["prompt_template"] = str(official / config["prompt_template"])
    name = f"{annotator}_{judge_model}".replace("/", "_") if judge_model else annotator
    if judge_model:  # requires_chatml: otherwise a model with "instruct" in its name is asked for a plain completion
        config["completions_kwargs"] |= {"model_name": judge_model, "requires_chatml": True}
    (folder / name).mkdir(exist_ok=True)
    (folder / name / "configs.yaml").write_text(yaml.safe_dump({name: config}))
    # The key stays in the environment, from where the client takes it.
    key = {} if os.environ.get("OPENAI_API_KEY") else {"api_key": "none"}
    client.write_text(yaml.safe_dump({"default": [key | ({"base_url": base_url} if base_url else {})]}))
    # A run that was stopped does not pay again for what this endpoint has judged. Missing judgments, −1, are asked for again.
    cache = folder / f"judgments-{hashlib.sha256(base_url.encode()).hexdigest()[:8]}.json"
    if cache.exists():
        judged = json.loads(cache.read_text())
        cache.write_text(json.dumps([line for line in judged if line["preference"] not in (None, -1)]))
    table, annotations = alpaca_eval.evaluate(
        model_outputs=str(outputs),
        reference_outputs=reference,
        annotators_config=str(folder / name),
        output_path=str(folder),
        precomputed_leaderboard=None,
        is_return_instead_of_print=True,
        is_overwrite_leaderboard=True,
        metric_kwargs={"save_weights_dir": str(folder / "weights")},
        caching_path=str(cache),
        annotation_kwargs={"chunksize": 32},  # judgments between two writes of the cache
    )
    metrics = {key: value for key, value in table.iloc[0].to_dict().items() if isinstance(value, (int, float))}
    preferences = [annotation["preference"] for annotation in annotations]
    return metrics | {"unjudged": sum(p is None or math.isnan(p) for p in preferences)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL", help="folder or hub id")
    parser.add_argument("--decoding", choices=DECODING, default="greedy", help="the authors' settings for a recipe, or greedy")
    parser.add_argument("--reference", default="", help=f"the reference's outputs; empty: {REFERENCE} of {HUB} on the hub")
    parser.add_argument("--engine", choices=["transformers", "vllm"], default="transformers")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--generate_only", action="store_true", help="stop before the judge")
    parser.add_argument("--limit", type=int, default=0, help="answer only the first N instructions, without the judge")
    parser.add_argument("--annotator", default=ANNOTATOR, help="name of one of alpaca_eval's annotators")
    parser.add_argument("--judge_model", default="", help="another judge than the annotator's (gpt-4-1106-preview)")
    parser.add_argument("--judge_base_url", default="", help="an OpenAI-compatible endpoint instead of OpenAI's")
    parser.add_argument("--output_dir", default="results")
    parser.add_argument("--wandb", choices=["off", "online", "offline"], default="off")
    args = parser.parse_args()

    reference, reference_file = load_reference(args.reference)
    name = short_name(args.model)
    folder = Path(args.output_dir) / name / "alpaca_eval2"
    client = folder / "client.yaml"
    alpaca_eval = None if args.generate_only or args.limit else check_judge(args.annotator, args.judge_base_url, client)
    temperature, top_p, max_new_tokens = DECODING[args.decoding]
    decoding = {"temperature": temperature, "top_p": top_p, "max_new_tokens": max_new_tokens}
    if args.limit:
        reference, folder = reference[: args.limit], folder / f"limit-{args.limit}"
    prompts = [row["instruction"] for row in reference]
    options = {"engine": args.engine, "batch_size": args.batch_size, "seed": args.seed}
    answers = answer(args.model, prompts, folder / "answers.jsonl", **decoding, **options)
    outputs = folder / "outputs.json"
    rows = [
        {"dataset": row.get("dataset", ""), "instruction": row["instruction"], "output": text, "generator": name}
        for row, (text, _) in zip(reference, answers)
    ]
    outputs.write_text(json.dumps(rows, indent=1, ensure_ascii=False))
    cut, empty = sum(not finished for _, finished in answers), sum(not text for text, _ in answers)
    print(f"{outputs}: {len(rows)} outputs; {cut} were cut at {max_new_tokens} tokens, {empty} are empty; {decoding}")
    if alpaca_eval is None:
        return
    load_outputs(str(outputs))
    judged_by = (args.annotator, args.judge_model, args.judge_base_url)
    metrics = judge(alpaca_eval, outputs, reference_file, folder, *judged_by, client)
    errors = {"win_rate": metrics.pop("standard_error"), "length_controlled_winrate": metrics.pop("lc_standard_error")}
    settings = (
        decoding | options | {"decoding": args.decoding, "annotator": args.annotator, "judge_base_url": args.judge_base_url}
    )
    settings |= {"judge_model": args.judge_model or "the annotator's", "cut": cut, "empty": empty}
    hashes = {"outputs.json": file_sha256(outputs), Path(reference_file).name: file_sha256(reference_file)}
    target = (folder.parent, "alpaca_eval2", args.model)
    write_result(*target, metrics, errors, settings, hashes, ("alpaca_eval", "openai"), args.wandb)
    for key, title in (("length_controlled_winrate", "length-controlled win rate"), ("win_rate", "win rate")):
        print(f"{title:<28}{metrics[key]:>8.2f} % ± {errors[key]:.2f}")
    print(f"{'mean length (characters)':<28}{metrics['avg_length']:>8.0f}")
    if metrics["unjudged"]:
        print(f"{metrics['unjudged']} of 805 got no readable judgment and do not count")


def run() -> None:
    try:
        main()
    except InputError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    run()
