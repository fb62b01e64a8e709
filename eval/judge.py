"""The judge of AlpacaEval 2, MT-Bench and win rates: a chat model behind OpenAI's API or one like
it.

The paper's judges, gpt-4-1106-preview and gpt-4, are served no longer. The default here is a model
with open weights, which stays what it is and which you serve yourself:

    vllm serve meta-llama/Llama-3.3-70B-Instruct --tensor-parallel-size 4

Another one is `--judge_base_url URL` and its name there. OPENAI_API_KEY is sent to that URL if it
is set; it is written to no file.
"""

import json
import os
import threading
from collections.abc import Callable, Hashable
from concurrent.futures import CancelledError, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from data import InputError

MODEL = "meta-llama/Llama-3.3-70B-Instruct"
URL = "http://localhost:8000/v1"
ADVICE = "see the top of eval/judge.py for a judge of your own, or choose --generate_only"


@dataclass
class Judge:
    """client: an openai.OpenAI; model: the judge's name there; options: arguments of
    client.chat.completions.create that it accepts; version: what it says that it is."""

    client: object
    model: str
    options: dict
    version: str


def api_key() -> str:
    """OPENAI_API_KEY; "none" where it is not set, for endpoints that need no key."""
    return os.environ.get("OPENAI_API_KEY") or "none"


def open_judge(model: str, url: str, max_tokens: int, temperature: float, logprobs=False) -> Judge:
    """The judge, after one call that shows whether it answers as it must: before an answer is
    generated, and before it is paid for more.

    Models that refuse max_tokens are asked for max_completion_tokens, and models that take their
    own temperature only are given none. Raises InputError, in one line, if openai is not installed,
    if the endpoint, the key or the model is not there, and if log-probs are asked for and do not
    come.
    """
    try:
        from openai import BadRequestError, OpenAI, OpenAIError
    except ImportError:
        raise InputError("openai is not installed: pip install -r eval/requirements.txt") from None
    client = OpenAI(api_key=api_key(), base_url=url, max_retries=8)
    create = client.with_options(max_retries=1).chat.completions.create
    messages = [{"role": "user", "content": "Answer with one letter: m"}]
    options = {"max_tokens": max_tokens, "temperature": temperature}
    if logprobs:
        options |= {"logprobs": True, "top_logprobs": 5}
    reply = None
    while reply is None:
        try:
            reply = create(model=model, messages=messages, **options)
        except BadRequestError as error:
            text = str(error)
            if "max_tokens" in options and "max_completion_tokens" in text:
                options["max_completion_tokens"] = options.pop("max_tokens")
            elif "temperature" in options and "temperature" in text:
                del options["temperature"]
            else:
                raise InputError(f"the judge {model} at {url}: {text}; {ADVICE}") from error
        except OpenAIError as error:
            raise InputError(f"the judge {model} at {url}: {error}; {ADVICE}") from error
    if logprobs and not getattr(reply.choices[0].logprobs, "content", None):
        raise InputError(
            f"the judge {model} at {url} gives no log-probs, by which AlpacaEval 2 weighs its "
            f"answers; {ADVICE}"
        )
    version = " ".join(filter(None, (reply.model, getattr(reply, "system_fingerprint", None))))
    return Judge(client, model, options, version)


def ask_all(
    judge: Judge,
    tasks: dict[Hashable, list[dict]],
    record: Callable[[Hashable, str], dict],
    path: Path,
    workers: int,
) -> dict[Hashable, dict]:
    """Ask the judge for every task {key: messages} → {key: record(key, the judge's text)}. The
    records are appended to `path` as they come.

    workers: calls at a time. Raises InputError if a call fails, after the results of the calls that
    are running are written.
    """
    from openai import OpenAIError

    failed = threading.Event()

    def ask(messages: list[dict]) -> str:
        if failed.is_set():
            raise CancelledError
        reply = judge.client.chat.completions.create(
            model=judge.model, messages=messages, **judge.options
        )
        return reply.choices[0].message.content or ""

    path.parent.mkdir(parents=True, exist_ok=True)
    records, failure = {}, None
    with ThreadPoolExecutor(workers) as pool, open(path, "a") as file:
        futures = {pool.submit(ask, messages): key for key, messages in tasks.items()}
        progress = {"desc": judge.model, "unit": "judgment", "dynamic_ncols": True}
        for future in tqdm(as_completed(futures), total=len(tasks), **progress):
            try:
                text = future.result()
            except CancelledError:
                continue
            except OpenAIError as error:
                failure = failure or error
                failed.set()  # no further calls; what the running ones bring is still written
                continue
            key = futures[future]
            records[key] = record(key, text)
            print(json.dumps(records[key]), file=file, flush=True)
    if failure:
        raise InputError(
            f"the judge {judge.model} failed: {failure!r}. Its other judgments are kept in {path}: "
            "run the command again to continue"
        )
    return records
