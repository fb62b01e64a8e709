"""A prompt and its answers → texts, by the model's chat template: the prompt as inference shows
it, and what follows it as the model would write it."""

import contextlib
import functools
import re
from typing import NamedTuple

from runtime.errors import InputError

# Put before a chat template, it makes today 26 July 2024, which is Llama-3.1's own default: the
# real date would change the tokens from day to day. (+: the template's first line break stays.)
DATE = "{% macro strftime_now(f) %}{{ f | replace('%d', '26') | replace('%m', '07')"
DATE += " | replace('%b', 'Jul') | replace('%B', 'July') | replace('%y', '24')"
DATE += " | replace('%Y', '2024') }}{% endmacro +%}"
# What opens a block of thinking, and what closes it; and the variables with which chat templates
# begin an answer without one.
THINKING = {"<think>": "</think>", "<thinking>": "</thinking>", "<seed:think>": "</seed:think>"}
THINKING |= {"[THINK]": "[/THINK]", "<|START_THINKING|>": "<|END_THINKING|>"}
THINKING |= {"<|channel>thought": "<channel|>"}
THINKING |= {"Here are my reasoning steps:": "[BEGIN FINAL RESPONSE]"}  # of Apriel
NO_THOUGHT = re.compile(
    "|".join(rf"\s*({re.escape(a)})?\s*{re.escape(b)}\s*" for a, b in THINKING.items())
)
NO_THINKING = {"enable_thinking": False, "thinking": False}


def render(tokenizer, messages: list[dict], **options) -> str:
    """The conversation by the chat template, with DATE for today and the tools that its first
    message names. Raises InputError if the template does not show them."""
    how = options | {"chat_template": DATE + tokenizer.get_chat_template(), "tokenize": False}
    if takes_parts(tokenizer, how["chat_template"]):
        messages = [m | {"content": [{"type": "text", "text": m["content"]}]} for m in messages]
    if not (tools := messages[0].get("tools") if messages else None):
        return tokenizer.apply_chat_template(messages, **how)
    messages = [{k: v for k, v in messages[0].items() if k != "tools"}, *messages[1:]]
    text = tokenizer.apply_chat_template(messages, tools=tools, **how)
    if text == tokenizer.apply_chat_template(messages, **how):
        raise InputError("the template does not show its tools: --columns tools= leaves them out")
    return text


@functools.lru_cache(maxsize=8)
def takes_parts(tokenizer, template: str) -> bool:
    """Whether a chat template shows contents that are lists of texts and images, as LLaVA's, and no
    others."""
    for content in ("QUESTION", [{"type": "text", "text": "QUESTION"}]):
        with contextlib.suppress(Exception):  # each template has its own
            messages = [{"role": "user", "content": content}]
            how = {"chat_template": template, "tokenize": False}
            if "QUESTION" in tokenizer.apply_chat_template(messages, **how):
                return content != "QUESTION"
    return False


def as_messages(prompt: list | str) -> list[dict]:
    """A prompt as messages: HH's dialogue text is split into its turns, any other text is one user
    message."""
    if not isinstance(prompt, str):
        return prompt
    if not prompt.startswith("\n\nHuman:"):
        return [{"role": "user", "content": prompt}]
    messages = []
    for turn in prompt.rstrip().removesuffix("\n\nAssistant:").split("\n\nHuman:")[1:]:
        user, *answers = turn.split("\n\nAssistant:")
        messages.append({"role": "user", "content": user.strip()})
        messages.extend({"role": "assistant", "content": answer.strip()} for answer in answers)
    return messages


def prompt_text(tokenizer, prompt: list | str, header: bool = True) -> str:
    """The prompt as the model sees it at inference: the chat template, ending with the assistant's
    header (or, without `header`, before it).

    Without a chat template, text stays as it is and messages become a dialogue in HH's form.
    Raises InputError if the template does not show the system message.
    """
    if tokenizer.chat_template:
        messages = as_messages(prompt)
        text = render(tokenizer, messages, add_generation_prompt=header)
        if messages[0]["role"] == "system" and messages[0]["content"].strip():
            others = [messages[0] | {"content": ""}, *messages[1:]]
            if text == render(tokenizer, others, add_generation_prompt=header):
                raise InputError("the chat template does not show the system message")
        return text
    if isinstance(prompt, str):
        return prompt
    if prompt[0].get("tools"):
        raise InputError(
            "without a template, tools are not shown: --columns tools= leaves them out"
        )
    names = {"system": "", "user": "\n\nHuman: ", "assistant": "\n\nAssistant: "}
    turns = [names[message["role"]] + message["content"] for message in prompt]
    return "".join(turns) + "\n\nAssistant:"


class End(NamedTuple):
    """How an assistant's turn ends, by end_of_turn."""

    token: int  # its id
    before: str  # what the chat template writes between an answer and this token
    tail: str  # all that it writes after an answer
    lead: str  # what it writes before an answer, and the prompt does not have
    stops: list[int]  # this token, and the special ones at which the model's generation stops


def end_of_turn(tokenizer) -> End:
    """The end of an assistant's turn.

    The token is the first after the answer at which the model's generation stops, or else the
    first special one. Where the template writes none, as GLM's, it is the one with which the next
    question begins, if generation stops at it; otherwise the tokenizer's EOS. Raises InputError if
    there is no such token at all, or if the template fails on a question and an answer, or leaves
    out the answer.
    """
    lead = tail = following = ""
    if tokenizer.chat_template:
        messages = [{"role": "user", "content": "question"}]
        try:
            start = render(tokenizer, messages, add_generation_prompt=True)
            dialogue = [*messages, {"role": "assistant", "content": "ANSWER"}]
            text = render(tokenizer, dialogue)
        except Exception as error:
            raise InputError(f"the chat template fails on a short dialogue: {error}") from error
        with contextlib.suppress(Exception):  # a template of single questions may refuse another
            following = render(tokenizer, [*dialogue, *messages]).rpartition("ANSWER")[2]
        if "ANSWER" not in text:
            raise InputError(f"the chat template leaves out the answer; it renders {text!r}")
        before, _, tail = text.rpartition("ANSWER")
        lead = before.removeprefix(start)
        if lead == before:  # it does not begin with the prompt: what its tokens have in common
            ids = [tokenizer(part, add_special_tokens=False).input_ids for part in (before, start)]
            same = [one == other for one, other in zip(*ids)] + [False]
            lead = tokenizer.decode(ids[0][same.index(False) :])
        for closing in THINKING.values():
            lead = lead.rpartition(closing)[2].lstrip() if closing in lead else lead
    special, stops = special_ids(tokenizer), getattr(tokenizer, "stop_ids", [])
    ids = tokenizer(tail, add_special_tokens=False).input_ids
    ends = [i for i in ids if i in stops] or [i for i in ids if i in special]
    if not ends:
        ids = tokenizer(following, add_special_tokens=False).input_ids
        ends = [i for i in ids[:1] if i in stops]
    if not ends and tokenizer.eos_token_id is None:
        raise InputError("the tokenizer has neither an EOS token nor a template that ends turns")
    end = ends[0] if ends else tokenizer.eos_token_id
    before = tail.partition(tokenizer.convert_ids_to_tokens(end))[0]
    return End(end, before, tail, lead, sorted({end} | {*special} & {*stops}))


def special_ids(tokenizer) -> list[int]:
    """The ids of the tokenizer's special tokens."""
    added = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return sorted(added | {*tokenizer.all_special_ids})


@functools.lru_cache(maxsize=1)
def control_tokens(tokenizer) -> re.Pattern:
    """Finds what the tokenizer takes for a control token, as `<s>` in HTML."""
    return re.compile(
        "|".join(map(re.escape, tokenizer.convert_ids_to_tokens(special_ids(tokenizer))))
    )


def render_row(
    tokenizer, prompt: list | str, answers: list[str], end: End
) -> tuple[str, list[str]]:
    """The text of the prompt and, for each answer, what follows it, without its end. An answer
    without any text gives "".

    The prompt is the one of inference. Where the template writes an empty thinking block before
    every answer, it is the one of inference without thinking, which has this block: it is not
    scored. An answer is what the template writes after the prompt. Some templates render a
    conversation otherwise than the prompt and what the model then writes: they leave out earlier
    thinking, or show a system message only before the last question. Then the answer itself follows
    the prompt, as it does at inference. Ends and headers that the data has already are not written
    twice.

    Raises InputError if the template leaves out a part of an answer, if the prompt opens a thinking
    block that an answer does not close, or an answer one that it leaves open, and if an answer
    thinks after a prompt that ends without thinking.
    """
    ends = tokenizer.convert_ids_to_tokens(end.stops) + [end.tail.strip()] * bool(end.tail.strip())
    answers = [without_end(answer, ends, end.before) for answer in answers]
    start = prompt_text(tokenizer, prompt)
    if not tokenizer.chat_template:
        space = "" if isinstance(prompt, str) else " "
        return start, [space + answer if answer.strip() else "" for answer in answers]
    answers = [without_header(tokenizer, answer, start, end.lead) for answer in answers]
    if isinstance(prompt, str) and prompt.startswith("\n\nHuman:"):
        answers = [answer.strip() for answer in answers]  # as as_messages does with earlier turns
    messages = as_messages(prompt)
    choices = [answers]
    if any(map(NO_THOUGHT.match, answers)):
        # Blocks that are empty in the data may be those that the prompt has.
        empty = [NO_THOUGHT.match(answer) for answer in answers]
        bare = [a[block.end() :] if block else a for a, block in zip(answers, empty)]
        choices.insert(0, bare)
    for choice in choices:
        texts = {}
        for answer in filter(str.strip, choice):
            texts[answer] = render(tokenizer, [*messages, {"role": "assistant", "content": answer}])
        shown, before = without_thinking(tokenizer, messages, start, texts)
        if ends_with(shown, THINKING.values()):
            break

    for answer in texts:
        opened = begins_with(answer, THINKING)
        if opened and THINKING[opened] not in answer and opened in tokenizer.chat_template:
            raise InputError(f"the answer {answer!r} begins to think, and does not end it")
    how = (shown, before, end.tail, end.lead)
    return shown, [answer_text(a, texts[a], *how) if a in texts else "" for a in choice]


def without_thinking(
    tokenizer, messages: list[dict], start: str, texts: dict[str, str]
) -> tuple[str, str]:
    """(the prompt, with what the texts begin up to the answer). start: the prompt of inference;
    texts: by answer, the conversation. They are the same but where the template writes an empty
    thinking block before every answer: then the prompt is that of inference without thinking."""
    if "thinking" not in tokenizer.chat_template or any(map(has_thought, texts)):
        return start, start
    off = render(tokenizer, messages, add_generation_prompt=True, **NO_THINKING)
    block = NO_THOUGHT.match(next(iter(texts.values()), "").removeprefix(start))
    block = block[0] if block else ""
    while not off.endswith(block):
        block = block[:-1]
    closed = any(closing in block for closing in THINKING.values())
    if closed and all(text.startswith(start + block) for text in texts.values()):
        return off, start + block
    return start, start


def answer_text(answer: str, text: str, prompt: str, before: str, tail: str, lead: str) -> str:
    """What follows the prompt. text: the conversation; before: with what it begins up to the
    answer. Raises InputError: see render_row."""
    opening = ends_with(prompt, THINKING)
    closed = {mark: end for mark, end in THINKING.items() if ends_with(prompt, [end])}
    written = None
    if text.startswith(before) and text.endswith(tail):
        written = text[len(before) : len(text) - len(tail)]
        empty = NO_THOUGHT.match(written)
        if empty and has_thought(answer):
            # The template has put an empty block before the answer's own.
            if not opening and not begins_with(answer, THINKING):
                raise InputError(f"the answer {answer!r} ends a thinking block that nothing begins")
            written = None
    thought = next((end for mark, end in closed.items() if thinks(answer, mark, end)), None)
    if thought and not (written and NO_THOUGHT.match(answer)):
        raise InputError(
            f"the prompt ends without thinking, but the answer {answer!r} thinks: set the "
            "template's variable for it (for example, --template_args enable_thinking=true)"
        )
    after = answer.strip().removeprefix(opening or "")  # what the prompt has not opened already
    if written is not None and squeeze(after) not in squeeze(written):
        if not opening:
            raise InputError(f"the chat template leaves out a part of the answer {answer!r}")
        written = None
    if written is None and opening:
        written = after.removeprefix("\n") if prompt.endswith("\n") else after
    elif written is None:
        written = lead + (answer if answer in text else answer.strip())
    if opening and THINKING[opening] not in written:
        raise InputError(
            f"the prompt ends with {opening}, and the answer {answer!r} does not close it with "
            f"{THINKING[opening]}: to train without thinking, set the template's variable for "
            "it (for example, --template_args enable_thinking=false)"
        )
    if opening and opening in written.partition(THINKING[opening])[0]:
        raise InputError(f"the prompt ends with {opening}, and the answer {answer!r} opens another")
    return written


def thinks(answer: str, mark: str, end: str) -> bool:
    """Whether an answer begins with a thinking block, or with a thought that ends a block which
    the prompt has opened."""
    return (
        answer.lstrip().startswith(mark) or end in answer and mark not in answer.partition(end)[0]
    )


def has_thought(answer: str) -> bool:
    """Whether it thinks, by any marks."""
    return any(thinks(answer, mark, end) for mark, end in THINKING.items())


def begins_with(text: str, marks) -> str | None:
    """The first of the marks with which a text begins, white space aside."""
    return next((mark for mark in marks if text.lstrip().startswith(mark)), None)


def ends_with(text: str, marks) -> str | None:
    """The first of the marks with which a text ends, white space aside."""
    return next((mark for mark in marks if text.rstrip().endswith(mark)), None)


def squeeze(text: str) -> str:
    """The text without white space."""
    return "".join(text.split())


def without_end(answer: str, ends: list[str], before_end: str = "") -> str:
    """An answer without the ends of turn that the data wrote after it already. before_end: what the
    template writes before them."""
    while found := [text for text in ends if answer.rstrip().endswith(text)]:
        answer = answer.rstrip().removesuffix(found[0]).removesuffix(before_end)
    return answer


def without_header(tokenizer, answer: str, start: str, lead: str) -> str:
    """An answer without what the data wrote before it already: the lead of end_of_turn, or the
    control token with which the prompt ends."""
    bare, control = answer.lstrip(), control_tokens(tokenizer)
    if lead and bare.startswith(lead.strip()) and control.search(lead):
        return bare.removeprefix(lead.strip())
    first = control.match(bare)
    if first and start.rstrip().endswith(first[0]):
        return bare.removeprefix(first[0])
    return answer
