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
import queue
import re
import threading
import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from tqdm import tqdm

from runtime.errors import InputError
from runtime.log import open_alone

MODEL = "meta-llama/Llama-3.3-70B-Instruct"
URL = "http://localhost:8000/v1"
TIMEOUT = 120  # seconds
RETRIES = 8  # of a call that fails, after longer and longer waits
REFUSALS = 5  # after so many in a row, the judge is at fault and not what it is asked
UNREADABLE = 20  # likewise, after so many judgments of which none holds a score
REFUSED = (400, 403, 413, 422)  # the HTTP status of what would be refused again
ADVICE = "see the top of eval/judge.py for a judge of your own, or choose --generate_only"


@dataclass
class Judge:
    """client: an openai.OpenAI; model: the judge's name there; options: arguments of
    client.chat.completions.create that it accepts; version: what it says that it is; timeout: see
    open_judge."""

    client: object
    model: str
    options: dict
    version: str
    timeout: float = TIMEOUT


def api_key() -> str:
    """OPENAI_API_KEY; "none" where it is not set, for endpoints that need no key."""
    return os.environ.get("OPENAI_API_KEY") or "none"


def open_judge(
    model: str,
    url: str,
    max_tokens: int,
    temperature: float,
    logprobs: bool = False,
    timeout: float = TIMEOUT,
) -> Judge:
    """The judge, after one call that shows whether it answers as it must: before an answer is
    generated, and before it is paid for more.

    Models that refuse max_tokens are asked for max_completion_tokens, and models that take their
    own temperature only are given none. timeout: seconds that a connection, and then a whole reply,
    may take. Raises InputError, in one line, if openai is not installed, if the endpoint, the key
    or the model is not there, and if log-probs, where they are asked for, or else a text does not
    come.
    """
    try:
        from openai import BadRequestError, OpenAI, OpenAIError
    except ImportError:
        raise InputError("openai is not installed: pip install -r eval/requirements.txt") from None
    client = OpenAI(api_key=api_key(), base_url=url, timeout=timeout, max_retries=RETRIES)
    create = client.with_options(max_retries=0).chat.completions.create
    messages = [{"role": "user", "content": "Answer with one letter: m"}]
    options = {"max_tokens": max_tokens, "temperature": temperature}
    if logprobs:
        options |= {"logprobs": True, "top_logprobs": 5}
    reply = None
    while reply is None:
        try:
            reply = within(timeout, create, model=model, messages=messages, **options)
        except BadRequestError as error:
            text = str(error)
            if "max_tokens" in options and "max_completion_tokens" in text:
                options["max_completion_tokens"] = options.pop("max_tokens")
            elif "temperature" in options and "temperature" in text:
                del options["temperature"]
            else:
                raise InputError(f"the judge {model} at {url}: {text}; {ADVICE}") from error
        except (OpenAIError, ValueError, TimeoutError, RecursionError) as error:  # of what came
            raise InputError(f"the judge {model} at {url}: {error}; {ADVICE}") from error
    try:
        text = first_text(reply)
    except InputError as error:
        raise InputError(f"the judge {model} at {url}: {error}; {ADVICE}") from error
    if not logprobs and not text:
        raise InputError(
            f"the judge {model} at {url} answers with no text within {max_tokens} tokens, as do "
            f"models that reason for longer; {ADVICE}"
        )
    if logprobs and not getattr(reply.choices[0].logprobs, "content", None):
        raise InputError(
            f"the judge {model} at {url} gives no log-probs, by which AlpacaEval 2 weighs its "
            f"answers; {ADVICE}"
        )
    version = " ".join(filter(None, (reply.model, getattr(reply, "system_fingerprint", None))))
    return Judge(client, model, options, version, timeout)


def within(seconds: float, function: Callable, **arguments):
    """function(**arguments). Raises TimeoutError if it takes longer; it is left behind, then. (The
    client's own limit is for each part of a reply, which may be a byte.)"""
    ended = queue.SimpleQueue()

    def call() -> None:
        try:
            ended.put((function(**arguments), None))
        except Exception as error:
            ended.put((None, error))

    threading.Thread(target=call, daemon=True).start()
    try:
        result, error = ended.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError(f"no whole reply within {seconds:g} s") from None
    if error:
        raise error
    return result


def endpoint_name(url: str) -> str:
    """An endpoint in the name of a file: host, port and path, without a password."""
    parts = urlsplit(url)
    place = parts.netloc.rpartition("@")[2] + parts.path.rstrip("/").removesuffix("/v1")
    return re.sub(r"[:/]", "_", place)


def ask_all(
    judge: Judge,
    tasks: dict[Hashable, list[dict]],
    record: Callable[[Hashable, str], dict],
    path: Path,
    workers: int,
) -> dict[Hashable, dict]:
    """Ask the judge for every task {key: messages} → {key: record(key, the judge's text)}, with its
    "judge_version". The records are appended to `path` as they come.

    workers: calls at a time. A task that the judge refuses (as too long, or by a filter) or answers
    with no text gets the record of an empty text and, as "refused", the reason: asked again, it
    would be refused again. Raises InputError if a call fails, if it and its repetitions take three
    times the judge's timeout, if REFUSALS are refused in a row, or if none of the first UNREADABLE
    records has a score; the calls that are running then, or when the user interrupts, are still
    recorded.
    """
    from openai import APIStatusError, OpenAIError

    records, refused = {}, {}  # refused: {key: reason}, since the last text
    lock, stop = threading.Lock(), threading.Event()

    def keep(key: Hashable, text: str, **more) -> None:
        records[key] = record(key, text) | {"judge_version": judge.version} | more
        print(json.dumps(records[key]), file=file, flush=True)
        if len(records) == UNREADABLE and not any(map(has_score, records.values())):
            stop.set()
            problem = f"none of its first {UNREADABLE} judgments holds a verdict"
            raise InputError(f"{problem}: remove the file, or they count as judged")

    def ask(key: Hashable) -> None:
        create = judge.client.chat.completions.create
        try:
            reply = create(model=judge.model, messages=tasks[key], **judge.options)
            text, reason = first_text(reply), "it answers with no text"
        except APIStatusError as error:
            if error.status_code not in REFUSED:
                raise
            text, reason = "", str(error)
        except (InputError, RecursionError) as error:  # it answers with something else
            text, reason = "", str(error)
        with lock:
            if text:
                keep(key, text)
            else:
                refused[key] = reason
            if len(refused) >= REFUSALS:
                stop.set()
                raise InputError(f"{REFUSALS} refusals in a row, the last: {reason}")
            if text or len(records) + len(refused) == len(tasks):
                for other, reason in refused.items():
                    keep(other, "", refused=reason)
                refused.clear()

    waiting, running, ended = [*reversed(tasks)], {}, queue.SimpleQueue()

    def work() -> None:
        while True:
            with lock:  # a call that has begun is known to be running
                if stop.is_set() or not waiting:
                    return
                key = waiting.pop()
                running[key] = time.monotonic()
            try:
                ask(key)
                ended.put(None)
            except Exception as error:
                ended.put(error)
            del running[key]

    def overdue() -> list[bool]:
        """Of every running call."""
        return [time.monotonic() - began > 3 * judge.timeout for began in [*running.values()]]

    def wait() -> None:
        """Wait until a task has ended; raises its error."""
        while True:
            try:
                if error := ended.get(timeout=1):
                    raise error
                return
            except queue.Empty:
                if any(overdue()):
                    raise TimeoutError(f"no reply within {judge.timeout:g} s, 3 times") from None

    with open_alone(path) as file:  # two processes would both pay
        # Daemons: the process can end while an endpoint does not answer.
        threads = [threading.Thread(target=work, daemon=True) for _ in range(workers)]
        for thread in threads:
            thread.start()
        progress = {"desc": judge.model, "unit": "judgment", "dynamic_ncols": True}
        try:
            for _ in tqdm(tasks, **progress):
                wait()
        except (OpenAIError, ValueError, TimeoutError) as error:
            raise InputError(
                f"the judge {judge.model} failed: {error!r}. Its other judgments are kept in "
                f"{path}: the same command continues after them"
            ) from error
        finally:
            with lock:
                stop.set()  # no further calls
            while not all(overdue()):
                time.sleep(0.05)
    return records


def has_score(record: dict) -> bool:
    """Whether the score of a judgment counts: FastChat's −1 and None stand for none."""
    return record["score"] not in (None, -1)


def judge_versions(records: list[dict]) -> str:
    """The versions of the judge that wrote these records of ask_all."""
    return ", ".join(sorted({record.get("judge_version", "unknown") for record in records}))


def first_text(reply) -> str:
    """The text of a chat completion, "" if it has none. Raises InputError for anything else that an
    endpoint answers with status 200."""
    try:
        content = reply.choices[0].message.content or ""
        if isinstance(content, list):  # of parts
            content = "".join(part["text"] for part in content)
        if not isinstance(content, str):
            raise TypeError
    except (AttributeError, LookupError, TypeError):
        raise InputError(f"its answer is no chat completion: {str(reply)[:200]!r}") from None
    return content
