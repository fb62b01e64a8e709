"""Answers of one or several exported models, side by side.

    python -m eval.generate --models demo runs/demo/final     # a few held-out prompts of the demo
    python -m eval.generate --models M --data my.jsonl --num_prompts 20 --temperature 0.7
    python -m eval.generate --models M runs/mine/final --data my.jsonl --num_prompts 0 \\
        --score SCORER --show 3
    python -m eval.generate --models M --data my.jsonl --num_prompts 0 --output_dir answers \\
        --engine vllm

With --output_dir, every model's answers are kept in a file, and the same command continues after an
interruption. Generation never runs under FSDP: it reads models in Hugging Face format, such as the
`final/` folder of a run. With --score, a scorer (score.py) judges the answers of all models.
alpaca_eval2.py, mt_bench.py and on_policy.py build on `answer`.
"""

import contextlib
import functools
import hashlib
import json
import shutil
import textwrap
from itertools import zip_longest
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import GenerationConfig

from data import tokenize_text
from eval.results import (
    GENERATION,
    SAMPLING,
    at_least,
    make_parser,
    parse_engine_args,
    print_scores,
    read_records,
    say_repeated,
)
from eval.score import item_values, load_scorer, score_answers, summary
from runtime.command_line import printable, run_command
from runtime.errors import InputError
from runtime.log import open_alone
from runtime.rows import (
    Dropped,
    as_conversation,
    complete_prompt,
    draw,
    is_json,
    load_rows,
    parse_row,
    rename,
    split_share,
)
from runtime.templates import as_messages, end_of_turn, prompt_text
from runtime.weights import (
    generation_config,
    load_config,
    load_tokenizer,
    local_model,
    model_class,
    model_fingerprint,
    resolve_model,
    tokenizer_digests,
)

VLLM_BATCH = 512  # prompts in one call of vLLM, which forms its own batches
SEEDS_APART = 10**9  # more than there are prompts: no batch has the seed of a run with another seed
NO_VLLM = "--engine vllm: vLLM is not installed. It needs an environment of its own: "
NO_VLLM += "pip install -r requirements.txt -r eval/requirements.txt vllm"


def generate(model, tokenizer, prompts: list, **options) -> list[tuple[str, bool]]:
    """Answer every prompt: [(text, finished)], in the order of `prompts`. finished: whether the
    model ended the answer within max_new_tokens and its context. Arguments: of generate_tokens."""
    stop_ids = stop_tokens(model.generation_config, tokenizer)
    answers = []
    for prompt, ids in zip(prompts, generate_tokens(model, tokenizer, prompts, **options)):
        finished = bool(ids) and ids[-1] in stop_ids
        answers.append((decode(tokenizer, prompt, ids[:-1] if finished else ids), finished))
    return answers


def decode(tokenizer, prompt: list | str, ids: list[int]) -> str:
    """The text of an answer, which tokenize_row takes to the same ids: where no chat template
    comes between a text and its answer, the answer's first space belongs to it."""
    text = tokenizer.decode(ids, skip_special_tokens=True)
    plain = isinstance(prompt, str) and not tokenizer.chat_template
    return text.rstrip() if plain else text.strip()


@torch.inference_mode()
def generate_tokens(
    model,
    tokenizer,
    prompts: list,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    repetition_penalty: float = 1.0,
    batch_size: int = 8,
    seed: int = 0,
) -> list[list[int]]:
    """The token ids of an answer to every prompt, in the order of `prompts`; the last is a stop
    token if the model ended the answer within max_new_tokens and its context.

    prompts: each a list of messages (`[{"role": ..., "content": ...}]`, the last not the
        assistant's) or plain text. Their token ids are those that training uses (data.py): the
        chat template, at most one BOS.
    temperature: 0 is greedy, whatever the model's generation config says; otherwise tokens are
        sampled at this temperature from the top_p nucleus of the top_k likeliest (0: of all),
        reproducibly for one `seed` and `batch_size`.
    Raises InputError for a prompt that fills the model's context.
    """
    torch.manual_seed(seed)
    context = context_length(model.config)
    ids = prompt_ids(tokenizer, prompts, context)
    stop_ids = stop_tokens(model.generation_config, tokenizer)
    pad = min(stop_ids)  # any id serves: the padding is masked
    # What is not set here, transformers takes from the model's own generation config.
    sampling = {"do_sample": temperature > 0, "repetition_penalty": repetition_penalty}
    if temperature > 0:
        sampling |= {"temperature": temperature, "top_p": top_p, "top_k": top_k}
    answers, order = {}, longest_first(ids)
    # A prompt that leaves less room than max_new_tokens is alone: it would shorten other answers.
    crowded = sum(len(prompt) + max_new_tokens > context for prompt in ids)
    starts = [*range(crowded), *range(crowded, len(order), batch_size)]
    for start, end in zip(starts, [*starts[1:], len(order)]):
        batch = order[start:end]
        width = len(ids[batch[0]])
        padding = [width - len(ids[i]) for i in batch]
        padded = torch.tensor([[pad] * n + ids[i] for n, i in zip(padding, batch)])
        mask = torch.tensor([[0] * n + [1] * (width - n) for n in padding])
        config = GenerationConfig(
            max_new_tokens=min(max_new_tokens, context - width),
            eos_token_id=sorted(stop_ids),
            pad_token_id=pad,
            **sampling,
        )
        output = model.generate(
            padded.to(model.device),
            attention_mask=mask.to(model.device),
            generation_config=config,
        )
        for i, new in zip(batch, output[:, width:].tolist()):
            length = next((n for n, token in enumerate(new, 1) if token in stop_ids), len(new))
            answers[i] = new[:length]
    return [answers[i] for i in range(len(prompts))]


def generate_with_vllm(
    model,
    tokenizer,
    stop_ids: set[int],
    prompts: list,
    max_new_tokens: int,
    seed: int,
    **sampling,
) -> list[tuple[str, bool]]:
    """`generate` with a vllm.LLM; prompt i has the seed `seed` + i. sampling: temperature, top_p,
    top_k and repetition_penalty, which vLLM calls the same."""
    from vllm import SamplingParams

    context = model.llm_engine.model_config.max_model_len
    ids = prompt_ids(tokenizer, prompts, context)
    options = [
        SamplingParams(
            **sampling,
            max_tokens=min(max_new_tokens, context - len(prompt)),
            seed=seed + number,
            stop_token_ids=sorted(stop_ids),
        )
        for number, prompt in enumerate(ids)
    ]
    answers = []
    requests = model.generate([{"prompt_token_ids": prompt} for prompt in ids], options)
    for prompt, request in zip(prompts, requests):
        output = request.outputs[0]
        kept = [token for token in output.token_ids if token not in stop_ids]
        answers.append((decode(tokenizer, prompt, kept), output.finish_reason == "stop"))
    return answers


def prompt_ids(tokenizer, prompts: list, context: int) -> list[list[int]]:
    """The token ids of every prompt. Raises InputError for a prompt that leaves no room for an
    answer in a context of `context` tokens."""
    ids = [tokenize_text(tokenizer, prompt_text(tokenizer, prompt)) for prompt in prompts]
    for number, prompt in enumerate(ids):
        if len(prompt) >= context:
            raise InputError(
                f"prompt {number} has {len(prompt)} tokens and the model a context of {context}: "
                "leave it out, or raise max_model_len if --engine_args sets it"
            )
    return ids


def longest_first(ids: list[list[int]]) -> list[int]:
    """The prompts' indices, longest prompt first: similar lengths share a batch, and a batch that
    does not fit in memory fails at the start."""
    return sorted(range(len(ids)), key=lambda i: -len(ids[i]))


def stop_tokens(generation_config: GenerationConfig, tokenizer) -> set[int]:
    """Every token that ends an answer: those of the model's generation config, and the chat
    template's end of a turn."""
    ends = generation_config.eos_token_id
    return {*([ends] if isinstance(ends, int) else ends or []), end_of_turn(tokenizer)[0]}


def own_sampling(name: str) -> dict:
    """top_p, top_k and repetition_penalty of a model's own generation config, with transformers'
    values for what it does not set: the sampling of a bare model.generate(temperature=...)."""
    folder = resolve_model(name)
    end = end_of_turn(load_tokenizer(folder))[0]
    own = generation_config(folder, end)
    values = {"top_p": 1.0, "top_k": 50, "repetition_penalty": 1.0}
    return {key: own.get(key, value) for key, value in values.items()}


def context_length(config) -> int:
    """Most tokens of prompt and answer together."""
    return getattr(config.get_text_config(), "max_position_embeddings", None) or 2**31


@functools.lru_cache(maxsize=1)  # mt_bench.py calls `answer` several times with one model
def load_engine(
    engine: str,
    folder: str,
    batch_size: int,
    seed: int,
    engine_args: str = "",
    template_args: str = "",
):
    """A function (prompts, max_new_tokens=, seed=, **sampling) -> [(text, finished)], by
    "transformers" or "vllm"; sampling: the other arguments of generate_tokens but batch_size.
    Raises InputError if vLLM is not installed."""
    tokenizer = load_tokenizer(folder, template_args=template_args)
    more = parse_engine_args(engine_args)
    if engine == "transformers":
        device = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            kind = model_class(load_config(folder))
            model = kind.from_pretrained(folder, trust_remote_code=False, **more)
        except (TypeError, AttributeError) as error:  # as of vLLM's arguments
            reason = f"--engine_args {engine_args}: transformers does not take them: {error}"
            raise InputError(reason) from error
        model = model.to(device).eval()
        return functools.partial(generate, model, tokenizer, batch_size=batch_size)
    try:
        from vllm import LLM
    except ImportError:
        raise InputError(NO_VLLM) from None
    end = end_of_turn(tokenizer)[0]
    stop_ids = {*generation_config(folder, end)["eos_token_id"]}
    model = LLM(model=folder, seed=seed, **more)
    return functools.partial(generate_with_vllm, model, tokenizer, stop_ids)


def answer(
    name: str,
    prompts: list,
    path: Path | None = None,
    engine: str = "transformers",
    engine_args: str = "",
    max_new_tokens: int = 256,
    batch_size: int = 8,
    seed: int = 0,
    template_args: str = "",
    **sampling,
) -> list[tuple[str, bool]]:
    """Answer every prompt with the model in a folder or of a hub id, as `generate` does, and keep
    the answers in `path`. template_args: see set_variables; sampling: further arguments of
    generate_tokens.

    The file holds one JSON object a line: the settings, then {"index", "output", "finished"}.
    Batches and their seeds depend on the prompts and settings alone, so an interrupted run that is
    started again continues with the first unfinished batch and ends with the same answers. Raises
    InputError if the file holds answers for different prompts, models or settings, and for a
    prompt that fills the model's context.
    """
    folder = resolve_model(name)
    tokenizer = load_tokenizer(folder, template_args=template_args)
    size = VLLM_BATCH if engine == "vllm" else batch_size
    own = generation_config(folder, end_of_turn(tokenizer)[0])
    sampling = {"temperature": 0.0, "top_p": 1.0} | sampling
    settings = {
        "model": name,
        "model_sha256": model_fingerprint(folder),
        **tokenizer_digests(tokenizer),
        "generation_config": {k: v for k, v in own.items() if k != "transformers_version"},
        "engine": engine,
        **sampling,
        "max_new_tokens": max_new_tokens,
        "batch_size": size,
        "seed": seed,
        "engine_args": engine_args,
        "prompts_sha256": hashlib.sha256(json.dumps(prompts).encode()).hexdigest(),
    }
    with open_alone(path) if path else contextlib.nullcontext() as file:
        answers = read_answers(path, settings, len(prompts)) if path else {}
        if len(answers) == len(prompts):
            return [answers[i] for i in range(len(prompts))]
        context = context_length(load_config(folder))
        limit = parse_engine_args(engine_args).get("max_model_len")
        context = min(context, limit) if isinstance(limit, int) else context
        order = longest_first(prompt_ids(tokenizer, prompts, context))
        run = load_engine(engine, folder, batch_size, seed, engine_args, template_args)
        progress = tqdm(
            desc=short_name(name),
            total=len(prompts),
            initial=len(answers),
            unit="answer",
            dynamic_ncols=True,
        )
        for start in range(0, len(order), size):
            batch = order[start : start + size]
            missing = [i for i in batch if i not in answers]
            if not missing:
                continue
            # Always the whole batch: the sampled tokens depend on all of its prompts.
            new = run(
                [prompts[i] for i in batch],
                max_new_tokens=max_new_tokens,
                seed=seed * SEEDS_APART + start,
                **sampling,
            )
            answers |= {i: pair for i, pair in zip(batch, new) if i in missing}
            if file:
                lines = [
                    {"index": i, "output": answers[i][0], "finished": answers[i][1]}
                    for i in missing
                ]
                file.write("".join(json.dumps(line) + "\n" for line in lines))
                file.flush()
            progress.update(len(missing))
        progress.close()
        return [answers[i] for i in range(len(prompts))]


def read_answers(path: Path, settings: dict, count: int) -> dict[int, tuple[str, bool]]:
    """The answers in `path` to `count` prompts, {index: (text, finished)}; a new file is started
    with the settings. Raises InputError if the file was written with different settings, or has a
    line that is no answer to one of the prompts."""
    records = read_records(path)
    if not records:
        path.write_text(json.dumps(settings) + "\n")
        return {}
    written, *lines = records
    # The model's name may differ: what its files hold is compared.
    changed = [
        f"{key} was {written.get(key)}, is {value}"
        for key, value in settings.items()
        if key != "model" and written.get(key) != value
    ]
    if changed:
        raise InputError(
            f"{path} holds different answers ({'; '.join(changed)}): remove it, or choose another "
            "output"
        )
    answers = {}
    for number, line in enumerate(lines, 2):
        index, text = line.get("index"), line.get("output")
        if index not in range(count) or not isinstance(text, str) or "finished" not in line:
            advice = "remove the line, and the answer is made again"
            raise InputError(f"{path}: line {number} is no answer to a prompt: {advice}")
        answers[index] = text, line["finished"]
    return answers


def load_prompts(source: str, count: int = 0, columns: str = "") -> list:
    """`count` prompts, spread over the rows of a source, or with 0 all: each a list of messages or
    text. columns: see rename.

    A row is {"prompt": text or messages} or a row in any form that training takes, of which those
    with different prompts are left out. Raises InputError, naming the source and the row, for any
    other, and for an empty prompt.
    """
    source, share = split_share(source)
    rows = load_rows(source)
    drawn = draw(source, len(rows), share).tolist()
    verbatim = is_json(rows)
    count = min(count or len(drawn), len(drawn))
    prompts = []
    # Spread over the data, which is often sorted by topic.
    for index in (drawn[i * len(drawn) // count] for i in range(count)):
        row = rows[index]
        try:
            row = rename(row, columns)
            if any(map(row.get, ("chosen", "rejected", "responses"))):
                prompts.append(parse_row(row, verbatim)[0])
            else:
                prompt = row.get("prompt")
                messages = as_conversation(prompt)
                if not (messages or isinstance(prompt, str) and prompt.strip()):
                    raise InputError('without answers, it must be {"prompt": text or messages}')
                if messages and messages[-1]["role"] == "assistant":
                    raise InputError("its prompt ends with an answer")
                prompts.append(complete_prompt(row, messages or prompt))
        except Dropped as reason:
            if str(reason) == "empty":
                raise InputError(f"{source}, row {index}: an empty prompt or answer") from None
        except InputError as error:
            raise InputError(f"{source}, row {index}: {error}") from None
    if not prompts:
        raise InputError(f"{source}: the answers in every row are to different prompts")
    return prompts


def engine_options(args) -> dict:
    """The arguments of `answer` that are flags of every command that generates."""
    names = ("engine", "engine_args", "batch_size", "seed", "template_args")
    return {name: getattr(args, name) for name in names}


def sampling_options(args) -> dict:
    """The arguments of `answer` of a command whose decoding is given by flags."""
    names = ("max_new_tokens", "temperature", "top_p")
    return engine_options(args) | {name: getattr(args, name) for name in names}


def short_name(name: str) -> str:
    """What a model is called in files and tables: the last part of its id or folder, or for the
    `final` folder of a run the name of the run."""
    path = Path(local_model(name))
    path = path.resolve() if path.exists() else path
    return path.parent.name if path.name == "final" else path.name


def print_side_by_side(names: list[str], prompts: list, columns: list[list]) -> None:
    """Print every prompt, and under it the answers [(text, finished)] of all models, a column for
    each."""
    width = shutil.get_terminal_size((120, 24)).columns // len(names) - 3
    page = (width + 3) * len(names)
    for prompt, *answers in zip(prompts, *columns):
        print("=" * page)
        for message in as_messages(prompt):
            text = printable(f"{message['role']}: {message['content']}")
            print(textwrap.fill(text, page))
        cells = []
        for name, (text, finished) in zip(names, answers):
            text += "" if finished else " [cut at --max_new_tokens]"
            lines = [name[-width:], "-" * width]
            for part in printable(text).splitlines():
                lines += textwrap.wrap(part, width) or [""]
            cells.append(lines)
        for line in zip_longest(*cells, fillvalue=""):
            print("   ".join(f"{cell:<{width}}" for cell in line).rstrip())


def main() -> None:
    parser = make_parser(__doc__, *GENERATION, *SAMPLING, "--columns")
    parser.set_defaults(num_prompts=4, max_new_tokens=128, temperature=0.0)
    parser.add_argument(
        "--models",
        nargs="+",
        required=True,
        help="folders or hub ids; 'demo' is the demo's base model",
    )
    parser.add_argument(
        "--data",
        default="demo/heldout.jsonl",
        help="rows with a prompt, or preference data whose prompts to answer",
    )
    parser.add_argument(
        "--output_dir", default="", help="folder for a file of answers per model; empty: not kept"
    )
    parser.add_argument(
        "--score", default="", metavar="SCORER", help="a reward model, or FILE.py:FUNCTION"
    )
    parser.add_argument(
        "--threshold", type=float, default=0.0, help="report the share of scores above it"
    )
    parser.add_argument("--show", type=at_least(0), help="prompts to print; by default all")
    args = parser.parse_args()

    if args.engine == "vllm" and len(args.models) > 1:
        raise InputError(
            "--engine vllm takes one model: there is no memory for a second one in the same process"
        )
    scorer = load_scorer(args.score, args.batch_size) if args.score else None
    prompts = load_prompts(args.data, args.num_prompts, args.columns)
    for name in args.models:  # before the first one is run
        folder = resolve_model(name)
        load_tokenizer(folder, template_args=args.template_args), load_config(folder)
    names = {short_name(name) for name in args.models}
    if args.output_dir and len(names) < len({*map(resolve_model, args.models)}):
        raise InputError("two of the models have the same short name, that of their answers' file")
    columns = []
    for name in args.models:
        answers = answer(
            name,
            prompts,
            Path(args.output_dir) / f"{short_name(name)}.jsonl" if args.output_dir else None,
            **sampling_options(args),
        )
        columns.append(answers)
    print_side_by_side(args.models, prompts[: args.show], columns)
    if scorer:
        print(f"\n{len(prompts)} prompts, scored by {args.score}")
        say_repeated([*map(json.dumps, prompts)])
        load_engine.cache_clear()  # makes room for a reward model
        scored = [(answers, score_answers(scorer, prompts, answers)) for answers in columns]
        columns = [(n, *summary(*s, args.threshold)) for n, s in zip(args.models, scored)]
        print_scores(columns, [item_values(*s, args.threshold) for s in scored])


if __name__ == "__main__":
    run_command(main, shows=True)
