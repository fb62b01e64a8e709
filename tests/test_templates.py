"""Chat templates: what is trained is the prompt of inference, and what the model writes after it.

    python tests/test_templates.py FOLDER

prints what becomes of a pair by every template of a folder (NAME.jinja); docs/notes/rows.md has the
table. The templates of most models are long, for their tools. What is written here renders a plain
conversation as they do; the command above says so if a file of the same name does otherwise.
"""

import json
import re
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pytest
from jinja2 import TemplateError
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

import data
from runtime import templates
from runtime.errors import InputError
from runtime.weights import load_tokenizer, set_variables

CONTROL = re.compile(
    r"<[|｜][^<>{}'\"\s]+[|｜]>|</?\|?[a-z_]+\|?>|<(?:start|end)_of_turn>|<seed:[a-z]+>"
    r"|\[/?(?:INST|SYSTEM_PROMPT|MODEL_SETTINGS)\]"
)
USER = {"role": "user", "content": "What is it?"}
SYSTEM = {"role": "system", "content": "Be brief."}
EARLIER = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
CHOSEN, REJECTED = "It is fine.", "No idea"
THOUGHT = "<think>\nIs it?\n</think>\n\n"


CONVERSATIONS = [[USER], [SYSTEM, *EARLIER, USER]]
CONVERSATIONS += [[*c, {"role": "assistant", "content": CHOSEN}] for c in CONVERSATIONS]
CONVERSATIONS += [[USER, {"role": "assistant", "content": THOUGHT + CHOSEN}]]


# ---- The templates -------------------------------------------------------------------------------


def chat(user: str, answer: str, header: str, system: str = "", start: str = "") -> str:
    """A template: what it writes at the start, for a message of each role, whose content is c, and
    at last before an answer."""
    system = system or "{{ raise_exception('System role not supported') }}"
    roles = f"{{% if m.role == 'system' %}}{system}{{% elif m.role == 'user' %}}{user}"
    loop = f"{{% for m in messages %}}{{% set c = m.content %}}{roles}{{% else %}}{answer}"
    header = f"{{% if add_generation_prompt %}}{header}{{% endif %}}"
    return f"{start}{loop}{{% endif %}}{{% endfor %}}{header}"


def first_system(text: str, default: str = "") -> str:
    """What writes the system message at the start, and `default` where there is none."""
    test = "{% if messages[0].role == 'system' %}{% set c = messages[0].content %}"
    otherwise = (
        f"{{% else %}}{{% set c = {default!r} %}}" if default else "{% else %}{% set c = '' %}"
    )
    return f"{test}{otherwise}{{% endif %}}{text}"


NOTHING = "{{ '' }}"  # for a system message that stands elsewhere
OFF = "enable_thinking is defined and not enable_thinking"
ON = "thinking is defined and thinking"
THINKS = "enable_thinking is defined and enable_thinking"
# An answer's own thought, and the rest.
SPLIT = "{% set thought = '' %}{% if '</think>' in c %}"
SPLIT += "{% set thought = c.split('</think>')[0].split('<think>')[-1].strip() %}"
SPLIT += "{% set c = c.split('</think>')[-1].lstrip() %}{% endif %}"
LAST = "{{ c.split('</think>')[-1].lstrip() if '</think>' in c else c }}"

IM = {"user": "<|im_start|>user\n{{ c }}<|im_end|>\n"}
IM |= {"system": "<|im_start|>system\n{{ c }}<|im_end|>\n", "header": "<|im_start|>assistant\n"}
IM_ANSWER = "<|im_start|>assistant\n{{ c }}<|im_end|>\n"
LLAMA = {"user": "<|start_header_id|>user<|end_header_id|>\n\n{{ c | trim }}<|eot_id|>"}
LLAMA |= {"answer": "<|start_header_id|>assistant<|end_header_id|>\n\n{{ c | trim }}<|eot_id|>"}
LLAMA |= {"header": "<|start_header_id|>assistant<|end_header_id|>\n\n"}
GEMMA = {"user": "<start_of_turn>user\n{{ c | trim }}<end_of_turn>\n"}
GEMMA |= {"answer": "<start_of_turn>model\n{{ c | trim }}<end_of_turn>\n"}
GEMMA |= {"header": "<start_of_turn>model\n", "start": "{{ bos_token }}"}
DEEPSEEK = {"user": "<｜User｜>{{ c }}", "system": NOTHING}
DEEPSEEK |= {"start": first_system("{{ bos_token }}{{ c }}")}
SENTENCE = "<｜end▁of▁sentence｜>"
COHERE = "<|START_OF_TURN_TOKEN|><|{}_TOKEN|>"
GPT_OSS = """<|start|>system<|message|>You are ChatGPT, a large language model trained by OpenAI.
Knowledge cutoff: 2024-06
Current date: {{ strftime_now('%Y-%m-%d') }}

Reasoning: medium

# Valid channels: analysis, commentary, final. Channel must be included for every message.<|end|>"""

EFFORT = "Reasoning effort is set to xhigh. Please think carefully through the task, validate key "
EFFORT += (
    "assumptions, consider plausible alternatives, and prioritize correctness, consistency, and "
)
EFFORT += "clarity in the final answer."

TEMPLATES = {
    "zephyr": chat(
        "<|user|>\n{{ c }}</s>\n",
        "<|assistant|>\n{{ c }}</s>\n",
        "<|assistant|>\n",
        "<|system|>\n{{ c }}</s>\n",
    ),
    "llama3": chat(
        **LLAMA,
        system="<|start_header_id|>system<|end_header_id|>\n\n{{ c | trim }}<|eot_id|>",
        start="{{ bos_token }}",
    ),
    "llama3_2": chat(
        **LLAMA,
        system=NOTHING,
        start=first_system(
            "{{ bos_token }}<|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: "
            "December 2023\nToday Date: {{ strftime_now('%d %b %Y') }}\n\n{{ c }}<|eot_id|>"
        ),
    ),
    "gemma": chat(**GEMMA),
    "gemma3": chat(
        "<start_of_turn>user\n{% if loop.index0 == 1 and messages[0].role == 'system' %}"
        "{{ messages[0].content + '\n\n' }}{% endif %}{{ c | trim }}<end_of_turn>\n",
        GEMMA["answer"],
        GEMMA["header"],
        NOTHING,
        GEMMA["start"],
    ),
    "gemma4_31b": chat(
        "<|turn>user\n{{ c | trim }}<turn|>\n",
        "<|turn>model\n{{ c | trim }}<turn|>\n",
        f"<|turn>model\n{{{{ '' if {THINKS} else '<|channel>thought\n<channel|>' }}}}",
        NOTHING,
        "{{ bos_token }}{% if messages[0].role == 'system' or "
        f"({THINKS}) %}}<|turn>system\n{{{{ '<|think|>\n' if {THINKS} }}}}"
        "{{ messages[0].content if messages[0].role == 'system' }}<turn|>\n{% endif %}",
    ),
    "phi3_5": chat(
        "<|user|>\n{{ c }}<|end|>\n",
        "<|assistant|>\n{{ c }}<|end|>\n",
        "<|assistant|>\n{% else %}{{ eos_token }}",
        "<|system|>\n{{ c }}<|end|>\n",
    ),
    "apriel_1.5": chat(
        "<|user|>\n{{ c }}\n<|end|>\n",
        "<|assistant|>\n{{ c }}\n<|end|>\n",
        "<|assistant|>\n",
        "<|system|>\n{{ c }}\n<|end|>\n",
    ),
    "phi4": chat(
        "<|im_start|>user<|im_sep|>{{ c }}<|im_end|>",
        "<|im_start|>assistant<|im_sep|>{{ c }}<|im_end|>",
        "<|im_start|>assistant<|im_sep|>",
        "<|im_start|>system<|im_sep|>{{ c }}<|im_end|>",
    ),
    "mistral_nemo": chat(
        "[INST]{% if loop.last and messages[0].role == 'system' %}"
        "{{ messages[0].content + '\n\n' }}{% endif %}{{ c }}[/INST]",
        "{{ c + eos_token }}",
        "",
        NOTHING,
        "{{ bos_token }}",
    ),
    "qwen2_5": chat(
        IM["user"],
        IM_ANSWER,
        IM["header"],
        NOTHING,
        first_system(
            IM["system"],
            "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.",
        ),
    ),
    "qwen3": chat(
        IM["user"],
        f"{SPLIT}<|im_start|>assistant\n{{% if loop.last %}}"
        "{{ '<think>\n' + thought + '\n</think>\n\n' }}{% endif %}{{ c }}<|im_end|>\n",
        f"<|im_start|>assistant\n{{% if {OFF} %}}{{{{ '<think>\n\n</think>\n\n' }}}}{{% endif %}}",
        IM["system"],
    ),
    "qwen3_5_think": chat(
        IM["user"],
        f"{SPLIT}<|im_start|>assistant\n{{% if loop.last %}}"
        "{{ '<think>\n' + thought + '\n</think>\n\n' }}{% endif %}{{ c }}<|im_end|>\n",
        f"<|im_start|>assistant\n<think>{{{{ '\n\n</think>\n\n' if {OFF} else '\n' }}}}",
        IM["system"],
    ),
    "qwen3_8": chat(  # does not look for a thought in an answer's text
        IM["user"],
        "<|im_start|>assistant\n{{ '<think>\n\n</think>\n\n' }}{{ c }}<|im_end|>\n",
        f"<|im_start|>assistant\n<think>{{{{ '\n\n</think>\n\n' if {OFF} else '\n' }}}}",
        NOTHING,
        f"{{% set thinks = not ({OFF}) %}}{{% if thinks or messages[0].role == 'system' %}}"
        "<|im_start|>system\n{{ EFFORT if thinks }}{% if messages[0].role == 'system' %}"
        "{{ '\n\n' if thinks }}{{ messages[0].content }}{% endif %}<|im_end|>\n{% endif %}",
    ).replace("EFFORT", repr(EFFORT)),
    "qwq": chat(
        IM["user"],
        f"<|im_start|>assistant\n{LAST}<|im_end|>\n",
        "<|im_start|>assistant\n<think>\n{{ '' }}",
        IM["system"],
    ),
    "deepseekv3": chat(  # DeepSeek-R1
        answer=f"<｜Assistant｜>{{{{ c.split('</think>')[-1] }}}}{SENTENCE}",
        header="<｜Assistant｜><think>\n{{ '' }}",
        **DEEPSEEK,
    ),
    "deepseek_v3.1": chat(
        answer=f"<｜Assistant｜><think></think>{{{{ c.split('</think>')[-1] }}}}{SENTENCE}",
        header=f"<｜Assistant｜><think>{{{{ '' if {ON} else '</think>' }}}}",
        **DEEPSEEK,
    ),
    "deepseek_v3.2": chat(
        answer=f"<｜Assistant｜>{{{{ '<think>' if loop.last and {ON} }}}}</think>{{{{ c }}}}"
        + SENTENCE,
        header=f"<｜Assistant｜><think>{{{{ '' if {ON} else '</think>' }}}}",
        **DEEPSEEK,
    ),
    "glm4moe": chat(
        f"<|user|>\n{{{{ c }}}}{{{{ '/nothink' if {OFF} }}}}",
        f"{SPLIT}<|assistant|>\n<think>{{{{ thought }}}}</think>\n{{{{ c }}}}",
        f"<|assistant|>{{{{ '\n<think></think>' if {OFF} }}}}",
        "<|system|>\n{{ c }}",
        "[gMASK]<sop>",
    ),
    "glm4.7_flash": chat(
        "<|user|>{{ c }}",
        f"{SPLIT}<|assistant|>{{{{ '<think>' + thought if thought }}}}</think>{{{{ c }}}}",
        f"<|assistant|>{{{{ '</think>' if {OFF} else '<think>' }}}}",
        "<|system|>{{ c }}",
        "[gMASK]<sop>",
    ),
    "nemotron_3_nano": chat(
        IM["user"],
        f"{SPLIT}<|im_start|>assistant\n<think>{{{{ '\n' + thought + '\n' if thought }}}}</think>"
        "{{ '\n\n' if thought }}{{ c }}<|im_end|>\n",
        f"<|im_start|>assistant\n<think>{{{{ '</think>' if {OFF} else '\n' }}}}",
        NOTHING,
        first_system(IM["system"]),
    ),
    "command_r7b": chat(
        COHERE.format("USER") + "{{ c }}<|END_OF_TURN_TOKEN|>",
        COHERE.format("CHATBOT") + "<|START_RESPONSE|>{{ c }}<|END_RESPONSE|><|END_OF_TURN_TOKEN|>",
        COHERE.format("CHATBOT") + "<|START_THINKING|><|END_THINKING|>",
        COHERE.format("SYSTEM") + "{{ c }}<|END_OF_TURN_TOKEN|>",
        "{{ bos_token }}",
    ),
    "gptoss": chat(
        "<|start|>user<|message|>{{ c }}<|end|>",
        "<|start|>assistant<|channel|>final<|message|>{{ c }}"
        "{{ '<|return|>' if loop.last and not add_generation_prompt else '<|end|>' }}",
        "<|start|>assistant",
        "<|start|>developer<|message|># Instructions\n\n{{ c }}\n\n<|end|>",
        GPT_OSS,
    ),
    "kimi_k2_thinking": chat(
        "<|im_user|>user<|im_middle|>{{ c }}<|im_end|>",
        "<|im_assistant|>assistant<|im_middle|><think></think>{{ c }}<|im_end|>",
        "<|im_assistant|>assistant<|im_middle|>",
        NOTHING,
        first_system(
            "<|im_system|>system<|im_middle|>{{ c }}<|im_end|>",
            "You are Kimi, an AI assistant created by Moonshot AI.",
        ),
    ),
}


def tokenizer_for(template: str, stops: tuple[str, ...] = ()) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer in which the control tokens of a template are one token each, and so
    are line breaks that follow one another."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=260, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(["\n\n", "\n\n\n\n", "It is"] * 3, trainer)
    found = sorted({*CONTROL.findall(template), "<s>", "</s>", *stops})
    # Thinking is no control token: it is text that a reader may want to see.
    tokenizer.add_tokens([AddedToken(t, special="think" not in t.lower()) for t in found])
    end = next((t for t in found if "end" in t and "sentence" in t), "</s>")
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token=end)
    wrapped.chat_template = template
    wrapped.stop_ids = wrapped.convert_tokens_to_ids([*stops])
    return wrapped


def trained(tokenizer, prompt: list[dict], answers: list[str]) -> tuple[list[int], list[str]]:
    """What becomes of a row: the ids of its prompt, and the texts that are scored."""
    end = templates.end_of_turn(tokenizer)
    prompt_ids, *responses = data.tokenize_row(tokenizer, prompt, answers, end)
    return prompt_ids, [tokenizer.decode(ids) for ids in responses]


def at_inference(tokenizer, prompt: list[dict], **variables) -> list[int]:
    """The ids of a prompt at inference, on the day that training assumes."""
    template = templates.DATE + tokenizer.chat_template
    options = {"add_generation_prompt": True, "chat_template": template, "return_dict": False}
    return tokenizer.apply_chat_template(prompt, **options, **variables)


ERRORS = {"does not close it": "the prompt thinks, the answer does not"}
ERRORS |= {"ends without thinking": "the answer thinks, the prompt does not"}
ERRORS |= {"leaves out a part": "left out", "System role": "no system messages"}


def result(tokenizer, prompt: list[dict], answers: list[str]) -> str:
    """One cell of the table: what is scored after the prompt of inference, or the error."""
    try:
        ids, (scored, _) = trained(tokenizer, prompt, answers)
    except Exception as error:
        kinds = [kind for part, kind in ERRORS.items() if part in str(error)]
        return f"error: {kinds[0] if kinds else 'the template fails'}"
    scored = f"`{scored!r}`".replace("'", "").replace("|", "\\|")
    for name, variables in (("", {}), ("without thinking: ", templates.NO_THINKING)):
        try:
            if ids == at_inference(tokenizer, prompt, **variables):
                return name + scored
        except Exception:
            pass
    return f"another prompt: {scored}"


def differs(file: Path) -> None:
    """Say so if what TEMPLATES has of this name does not render as the file does."""
    for conversation in CONVERSATIONS:
        for variables in ({}, templates.NO_THINKING, {"enable_thinking": True, "thinking": True}):
            if file.stem in TEMPLATES:
                texts = []
                for template in (file.read_text(), TEMPLATES[file.stem]):
                    asks = conversation[-1]["role"] == "user"
                    how = {"add_generation_prompt": asks} | variables
                    try:
                        texts.append(templates.render(tokenizer_for(template), conversation, **how))
                    except Exception as error:
                        texts.append(str(error))
                if texts[0] != texts[1]:
                    print(f"{file.stem}: {texts[0]!r}, here {texts[1]!r}", file=sys.stderr)


def table(folder: Path) -> None:
    print("| template | “It is fine.” | after a system message | with its thought |")
    print("|---|---|---|---|")
    for file in sorted(folder.glob("*.jinja")):
        tokenizer = tokenizer_for(file.read_text())
        differs(file)
        cells = [
            result(tokenizer, [USER], [CHOSEN, REJECTED]),
            result(tokenizer, [SYSTEM, *EARLIER, USER], [CHOSEN, REJECTED]),
            result(tokenizer, [USER], [THOUGHT + CHOSEN, THOUGHT + REJECTED]),
        ]
        if cells[1] == cells[0]:
            cells[1] = "same"
        print(f"| {file.stem} | {' | '.join(cells)} |")


# ---- Tests ---------------------------------------------------------------------------------------

UNCLOSED, THINKS_ANYWAY = "does not close it", "ends without thinking"
# By hand: the variables with which inference has the prompt that is trained; what is scored of
# CHOSEN; and of THOUGHT + CHOSEN: what comes before what is scored of CHOSEN, or the error.
PLAIN = ({}, "It is fine.{}", THOUGHT)
OFF_BY_ITSELF = (templates.NO_THINKING, "It is fine.{}", THOUGHT)
EXPECTED = {
    "zephyr": ("</s>", *PLAIN),
    "llama3": ("<|eot_id|>", *PLAIN),
    "llama3_2": ("<|eot_id|>", *PLAIN),
    "gemma": ("<end_of_turn>", *PLAIN),
    "gemma3": ("<end_of_turn>", *PLAIN),
    "gemma4_31b": ("<turn|>", *PLAIN),  # after the closed block, which the rendered answer lacks
    "phi3_5": ("<|end|>", *PLAIN),
    "apriel_1.5": ("<|end|>", {}, "It is fine.\n{}", THOUGHT),
    "phi4": ("<|im_end|>", *PLAIN),
    "mistral_nemo": ("</s>", *PLAIN),
    "qwen2_5": ("<|im_end|>", *PLAIN),
    "qwen3": ("<|im_end|>", *OFF_BY_ITSELF),
    "qwen3_5_think": ("<|im_end|>", *OFF_BY_ITSELF[:2], "Is it?\n</think>\n\n"),
    "qwen3_8": ("<|im_end|>", *OFF_BY_ITSELF[:2], "Is it?\n</think>\n\n"),
    "qwq": ("<|im_end|>", {}, UNCLOSED, "Is it?\n</think>\n\n"),
    "deepseekv3": (SENTENCE, {}, UNCLOSED, "Is it?\n</think>\n\n"),
    "deepseek_v3.1": (SENTENCE, *PLAIN[:2], THINKS_ANYWAY),
    "deepseek_v3.2": (SENTENCE, *PLAIN[:2], THINKS_ANYWAY),
    "glm4moe": ("<|user|>", templates.NO_THINKING, "\nIt is fine.{}", "\n<think>Is it?</think>"),
    "glm4.7_flash": ("<|user|>", {}, UNCLOSED, "Is it?</think>"),
    "nemotron_3_nano": ("<|im_end|>", {}, UNCLOSED, "Is it?\n</think>\n\n"),
    "command_r7b": (
        "<|END_OF_TURN_TOKEN|>",
        {},
        "<|START_RESPONSE|>It is fine.<|END_RESPONSE|>{}",
        None,
    ),
    "gptoss": ("<|return|>", {}, "<|channel|>final<|message|>It is fine.{}", None),
    "kimi_k2_thinking": ("<|im_end|>", {}, "<think></think>It is fine.{}", None),
}


@pytest.mark.parametrize("name", EXPECTED)
@pytest.mark.parametrize("prompt", CONVERSATIONS[:2], ids=["plain", "system, turns"])
def test_a_plain_answer_follows_the_prompt_of_inference(name, prompt):
    end, variables, scored, _ = EXPECTED[name]
    tokenizer = tokenizer_for(TEMPLATES[name], (end,))
    if name == "gemma" and prompt[0] == SYSTEM:
        with pytest.raises(TemplateError, match="System role not supported"):
            trained(tokenizer, prompt, [CHOSEN, REJECTED])
    elif scored == UNCLOSED:
        with pytest.raises(InputError, match="'It is fine.' does not close it with </think>"):
            trained(tokenizer, prompt, [CHOSEN, REJECTED])
    else:
        ids, texts = trained(tokenizer, prompt, [CHOSEN, REJECTED])
        assert ids == at_inference(tokenizer, prompt, **variables)
        assert texts == [scored.format(end), scored.format(end).replace(CHOSEN, REJECTED)]


@pytest.mark.parametrize("name", [n for n, (*_, thought) in EXPECTED.items() if thought])
def test_an_answer_with_its_thought_is_scored_as_a_whole(name):
    end, _, scored, thought = EXPECTED[name]
    tokenizer = tokenizer_for(TEMPLATES[name], (end,))
    answers = [THOUGHT + CHOSEN, THOUGHT + REJECTED]
    if thought == THINKS_ANYWAY:
        with pytest.raises(InputError, match="prompt ends without thinking, but the answer"):
            trained(tokenizer, [USER], answers)
        tokenizer.chat_template = set_variables(tokenizer.chat_template, "thinking=true")
        thought = "\nIs it?\n</think>\n\n"
    ids, texts = trained(tokenizer, [USER], answers)
    assert ids == at_inference(tokenizer, [USER])
    scored = "It is fine.{}" if scored == UNCLOSED else scored
    assert texts[0] == thought + scored.format(end)
    # Of two answers of which one thinks, both are scored after the same prompt.
    if name in ("qwen3", "qwen3_5_think"):
        ids, texts = trained(tokenizer, [USER], [THOUGHT + CHOSEN, REJECTED])
        assert ids == at_inference(tokenizer, [USER]) and texts[0] == thought + CHOSEN + end
        assert "</think>\n\nNo idea" in texts[1]


EMPTY, QUOTE = "<think>\n\n</think>\n\n", "It is <think>x</think> fine."
WRITTEN_BEFORE = "<|START_RESPONSE|>It is fine.<|END_RESPONSE|><|END_OF_TURN_TOKEN|>"


@pytest.mark.parametrize(
    "name, question, answers, expected",
    [
        # What the template drops of an answer is missed, also if the prompt has the same words.
        ("qwen3", f"Say {QUOTE}", [QUOTE, "b"], "leaves out a part of the answer"),
        ("qwen3", "?", [f"assistant\n{EMPTY}a", "b"], "leaves out a part of the answer"),
        # To mention a mark is not to think.
        ("qwen3", "?", ["Use the <think> tag.", "b"], ["Use the <think> tag.{}", "b{}"]),
        ("deepseek_v3.1", "?", ["Use the <think> tag.", "b"], ["Use the <think> tag.{}", "b{}"]),
        # Empty blocks in the data are the prompt's, whatever their white space is.
        ("qwen3", "?", [f"{EMPTY}a", "<think></think>b"], ["a{}", "b{}"]),
        ("qwen3_8", "?", [f"{EMPTY}a", "<think></think>b"], ["a{}", "b{}"]),
        ("deepseek_v3.2", "?", [f"{EMPTY}a", "<think></think>b"], ["a{}", "b{}"]),
        ("gemma4_31b", "?", ["<|channel>thought\n<channel|>a", "b"], ["a{}", "b{}"]),
        ("zephyr", "?", [f"{EMPTY}a", f"{EMPTY}b"], [EMPTY + "a{}", EMPTY + "b{}"]),
        # An answer may begin after the mark with which the prompt ends; otherwise it needs its own.
        (
            "qwen3_8",
            "?",
            ["x\n</think>\n\na", f"{THOUGHT}b"],
            ["x\n</think>\n\na{}", "Is it?\n</think>\n\nb{}"],
        ),
        (
            "qwen3_8",
            "?",
            [f"{EMPTY}a", f"{THOUGHT}b"],
            ["\n</think>\n\na{}", "Is it?\n</think>\n\nb{}"],
        ),
        ("kimi_k2_thinking", "?", ["x\n</think>\n\na", "b"], "ends a thinking block that nothing"),
        # But not where another answer thinks.
        ("qwen3", "?", [f"{EMPTY}a", f"{THOUGHT}b"], [EMPTY + "a{}", THOUGHT + "b{}"]),
        ("qwen3", "?", ["<think>\na", f"{THOUGHT}b"], "begins to think, and does not end it"),
        ("deepseekv3", "?", [QUOTE, f"{THOUGHT}b"], "opens another"),
        # Nothing that the template writes is there twice.
        ("command_r7b", "?", [WRITTEN_BEFORE, CHOSEN], [WRITTEN_BEFORE] * 2),
        ("phi3_5", "?", ["a<|end|>\n</s>", "b<|end|>"], ["a{}", "b{}"]),
        ("apriel_1.5", "?", ["a\n<|end|>", "b"], ["a\n{}", "b\n{}"]),
        # To a template that knows no thinking, its marks are text.
        ("zephyr", "?", ["<think>a", "b"], ["<think>a{}", "b{}"]),
    ],
)
def test_an_answer_is_neither_cut_nor_doubled(name, question, answers, expected):
    end = EXPECTED[name][0]
    tokenizer = tokenizer_for(TEMPLATES[name], (end,))
    prompt = [{"role": "user", "content": question}]
    if isinstance(expected, str):
        with pytest.raises(InputError, match=expected):
            trained(tokenizer, prompt, answers)
    else:
        ids, texts = trained(tokenizer, prompt, answers)
        assert texts == [text.format(end) for text in expected]
        off = at_inference(tokenizer, prompt, **templates.NO_THINKING)
        assert ids in (at_inference(tokenizer, prompt), off)


def test_a_response_that_is_cut_leaves_the_other_no_piece_of_the_end(tmp_path):
    tokenizer = tokenizer_for(TEMPLATES["command_r7b"], ("<|END_OF_TURN_TOKEN|>",))
    source = tmp_path / "rows.jsonl"
    source.write_text(json.dumps({"prompt": "?", "chosen": "a", "rejected": "x" * 300}))
    (row,) = data.load_data(str(source), tokenizer, 100, 50).rows
    chosen, rejected = map(tokenizer.decode, row["responses"])
    assert chosen == "<|START_RESPONSE|>a"
    assert rejected == "<|START_RESPONSE|>" + "x" * (99 - len(row["prompt"]))


@pytest.mark.parametrize("name", ["nemotron_3_nano", "glm4.7_flash", "qwen3", "qwen3_5_think"])
def test_template_args_switch_thinking_off(name):
    end = EXPECTED[name][0]
    tokenizer = tokenizer_for(TEMPLATES[name], (end,))
    off = at_inference(tokenizer, [USER], **templates.NO_THINKING)
    tokenizer.chat_template = set_variables(tokenizer.chat_template, "enable_thinking=false")
    ids, texts = trained(tokenizer, [USER], [CHOSEN, REJECTED])
    assert ids == at_inference(tokenizer, [USER]) == off
    assert texts == [CHOSEN + end, REJECTED + end]
    with pytest.raises(InputError, match="ends without thinking"):
        trained(tokenizer, [USER], [THOUGHT + CHOSEN, REJECTED])


def test_the_ids_of_the_seam_are_those_of_the_whole_text():
    # Qwen3.5's prompt ends with <think>\n: two line breaks are one token in the whole text.
    tokenizer = tokenizer_for(TEMPLATES["qwen3_5_think"])
    ids, _ = trained(tokenizer, [USER], [CHOSEN, REJECTED])
    assert [tokenizer.decode(i) for i in ids[-4:]] == ["<think>", "\n\n", "</think>", "\n\n"]


# Contents are lists of images and texts, here and in Idefics3's and SmolVLM's.
LLAVA = """{% for m in messages %}{{ m['role'] | upper + ': ' }}{% for part in m['content'] |
selectattr('type', 'equalto', 'text') %}{{ part['text'] + ' ' }}{% endfor %}
{%- endfor %}{% if add_generation_prompt %}ASSISTANT: {% endif %}"""
SMOL_VLM = """{% for m in messages %}{{ m['role'] | capitalize }}
{%- if m['content'][0]['type'] == 'image'
%}{{':'}}{% else %}{{': '}}{% endif %}{% for line in m['content'] %}{% if line['type'] == 'text' %}
{{- line['text'] }}{% endif %}{% endfor %}<end_of_utterance>
{% endfor %}{% if add_generation_prompt %}Assistant: {% endif %}"""


@pytest.mark.parametrize(
    "template, prompt, answer",
    [
        (LLAVA, "SYSTEM: Be brief. USER: What is it? ASSISTANT: ", "It is fine."),
        (SMOL_VLM, "System: Be brief.<end_of_utterance>\nUser: What is it?<end_of_utterance>\n"
         "Assistant: ", "It is fine."),
    ],
    ids=["llava", "smolvlm"],
)  # fmt: skip
def test_a_template_of_lists_of_texts_and_images_shows_a_text(template, prompt, answer, tmp_path):
    tokenizer = tokenizer_for(template, ("<end_of_utterance>",))
    end = templates.end_of_turn(tokenizer)
    row = templates.render_row(tokenizer, [SYSTEM, USER], [answer, "No"], end)
    assert row == (prompt, [answer, "No"])
    # The file of a processor, where the tokenizer has no template.
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    assert load_tokenizer(str(tmp_path)).chat_template == template


def test_a_template_that_hides_the_system_message_is_an_error():
    tokenizer = tokenizer_for(TEMPLATES["zephyr"].replace("<|system|>\n{{ c }}</s>\n", NOTHING))
    with pytest.raises(InputError, match="does not show the system message"):
        trained(tokenizer, [SYSTEM, USER], [CHOSEN, REJECTED])


def test_the_report_counts_prompts_that_end_with_an_empty_thinking_block(tmp_path):
    source = tmp_path / "rows.jsonl"
    rows = [{"prompt": "a", "chosen": c, "rejected": "b"} for c in ("c", f"{THOUGHT}c")]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, count in (("qwen3", 1), ("zephyr", 0)):
        report = data.load_data(str(source), tokenizer_for(TEMPLATES[name]), 200, 100).report
        sentence = "; 1 prompts end with an empty thinking block, as at inference with "
        assert (sentence in report) == bool(count)
    tokenizer = tokenizer_for(TEMPLATES["qwen3"])
    tokenizer.chat_template = set_variables(tokenizer.chat_template, "enable_thinking=false")
    source.write_text(json.dumps(rows[0]))
    assert "thinking" not in data.load_data(str(source), tokenizer, 200, 100).report


if __name__ == "__main__":
    for name in sys.argv[1:]:
        table(Path(name))
