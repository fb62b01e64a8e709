"""Generation: batched answers equal unbatched ones, and the ids are those of training."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import CHATML, make_model, make_tokenizer
from transformers import GenerationConfig

import data
from eval import generate as generate_module
from eval import win_rate
from eval.generate import (
    answer,
    generate,
    generate_tokens,
    load_prompts,
    own_sampling,
    short_name,
)
from eval.results import parse_engine_args
from runtime import templates
from runtime.errors import InputError
from runtime.log import open_alone

ROOT = Path(__file__).parent.parent
CHATML_OF = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
CONVERSATION = [
    {"role": "user", "content": "a small"},
    {"role": "assistant", "content": "b"},
    {"role": "user", "content": "and?"},
]
PROMPTS = ["hi", "what is two plus two?", "a", CONVERSATION]


def greedy(model, tokenizer, text: str, stop_ids: set, most: int) -> tuple[list[int], bool]:
    """One token after the other, each by a forward of the whole sequence, without cache, padding or
    batch."""
    ids, new = tokenizer(text, add_special_tokens=False).input_ids, []
    while len(new) < most:
        with torch.no_grad():
            token = model(torch.tensor([ids + new])).logits[0, -1].argmax().item()
        if token in stop_ids:
            return new, True
        new.append(token)
    return new, False


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_greedy_equals_one_token_at_a_time(name, batch_size):
    model, tokenizer = make_model(name, seed=3), make_tokenizer()
    model.generation_config.eos_token_id = 200  # a token that ends some of the answers early
    answers = generate(model, tokenizer, PROMPTS, max_new_tokens=12, batch_size=batch_size)
    for prompt, (text, finished) in zip(PROMPTS, answers):
        messages = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
        whole = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        end_of_turn = tokenizer.convert_tokens_to_ids("<|im_end|>")
        expected, ended = greedy(model, tokenizer, whole, {200, end_of_turn}, 12)
        expected = tokenizer.decode(expected, skip_special_tokens=True).strip()
        assert (text, finished) == (expected, ended)


def test_a_long_prompt_shortens_no_other_answer():
    model, tokenizer = make_model("llama", seed=3), make_tokenizer()
    prompts = ["two", "what is two plus two? " * 5, "hi"]
    length = max(len(ids) for ids in generate_module.prompt_ids(tokenizer, prompts, 10**6))
    model.config.max_position_embeddings = length + 4
    answers = [generate_tokens(model, tokenizer, [p], max_new_tokens=12) for p in prompts]
    assert [len(*answer) for answer in answers] == [12, 4, 12]
    together = generate_tokens(model, tokenizer, prompts, max_new_tokens=12, batch_size=3)
    assert together == [*map(sum, answers, [[]] * 3)]


@pytest.mark.parametrize("template", [CHATML, None])
@pytest.mark.parametrize(
    "prompt", ["\n\nHuman: hi\n\nAssistant:", [{"role": "user", "content": "hi"}]]
)
def test_answers_are_tokenized_as_they_were_generated(template, prompt):
    """With a template the answer follows a line break, without one it begins with a space."""
    tokenizer = make_tokenizer(template)
    ids = tokenizer("two plus" if template else " two plus", add_special_tokens=False).input_ids
    text = generate_module.decode(tokenizer, prompt, ids)
    end = templates.end_of_turn(tokenizer)
    _, trained = data.tokenize_row(tokenizer, prompt, [text], end)
    assert trained == [*ids, end[0]]


def test_sampling_is_reproducible_and_bos_single():
    model, seen = make_model("llama"), []
    template = "{{ bos_token }}" + CHATML
    tokenizer = make_tokenizer(template, adds_bos=True)
    original = model.generate
    model.generate = lambda ids, **kwargs: seen.append(ids) or original(ids, **kwargs)
    settings = {"max_new_tokens": 10, "temperature": 1.0}
    first, again, other = (
        generate(model, tokenizer, PROMPTS, **settings, seed=seed) for seed in (0, 0, 1)
    )
    assert first == again != other
    assert (seen[0] == tokenizer.bos_token_id).sum(dim=1).tolist() == [1] * 4


def test_own_sampling_is_that_of_a_bare_call(model_folder, tmp_path):
    """Against the call in FastChat's gen_model_answer.py, by which MT-Bench's answers are made."""
    model, tokenizer = make_model("llama", seed=3), make_tokenizer()
    assert own_sampling(str(model_folder))["top_k"] == 50  # transformers', where the model has none
    model.generation_config.update(do_sample=True, top_k=4, top_p=0.8, repetition_penalty=1.5)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    own = own_sampling(str(tmp_path))
    assert own == {"top_p": 0.8, "top_k": 4, "repetition_penalty": 1.5}
    (tmp_path / "generation_config.json").unlink()
    assert own_sampling(str(tmp_path)) == own_sampling(str(model_folder))
    ids = torch.tensor([tokenizer(CHATML_OF.format("hi"), add_special_tokens=False).input_ids])
    for temperature in (0.0, 0.7):
        options = {"max_new_tokens": 12, "temperature": temperature}
        found = generate_tokens(model, tokenizer, ["hi"], seed=5, **options, **own)
        torch.manual_seed(5)
        sampled = {"temperature": temperature} if temperature else {}
        bare = model.generate(
            ids,
            do_sample=temperature > 0,
            max_new_tokens=12,
            eos_token_id=tokenizer.convert_tokens_to_ids("<|im_end|>"),
            **sampled,
        )
        assert found == [bare[0, ids.shape[1] :].tolist()]
        assert found != generate_tokens(model, tokenizer, ["hi"], seed=5, **options)


def test_shares_of_prompts_are_those_of_training(tmp_path):
    rows = [{"prompt": f"p {n}", "chosen": f"c {n}", "rejected": "r"} for n in range(15)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for share, rest in (("0.9", "-0.1"), ("0.1", "-0.9")):
        trained = data.load_data(f"{tmp_path}/rows.jsonl:{share}", make_tokenizer(), 200, 100)
        others = [n for n in range(15) if n not in {*trained.rows["row"]}]
        source = f"{tmp_path}/rows.jsonl:{rest}"
        assert load_prompts(source) == [f"p {n}" for n in others] != []
        assert win_rate.load_chosen(source, 0) == [(f"p {n}", f"c {n}") for n in others]


def test_command_prints_side_by_side(model_folder, tmp_path):
    rows = [{"prompt": f"question {n}", "chosen": "a", "rejected": "b"} for n in range(6)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--data", str(tmp_path / "rows.jsonl"), "--num_prompts", "3", "--max_new_tokens", "4"]
    flags += ["--models", str(model_folder), str(model_folder)]
    command = [sys.executable, "-m", "eval.generate", *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    questions = [line for line in done.stdout.splitlines() if line.startswith("user:")]
    assert questions == ["user: question 0", "user: question 2", "user: question 4"]
    assert done.stdout.count("[cut at") == 6  # two columns of three answers


# ---- Answers in a file ---------------------------------------------------------------------------

SETTINGS = {"max_new_tokens": 6, "temperature": 1.0, "batch_size": 2, "seed": 7}
MANY = [*PROMPTS, "one", "two three", "four five six"]


def test_an_interrupted_run_continues_to_the_same_answers(model_folder, tmp_path, monkeypatch):
    whole = answer(str(model_folder), MANY, tmp_path / "whole.jsonl", **SETTINGS)
    assert answer(str(model_folder), MANY, None, **SETTINGS) == whole  # kept or not
    generated, load_engine = [], generate_module.load_engine

    def load_counting(*args):
        run = load_engine(*args)

        def count(prompts, **settings):
            if len(generated) == 2 and not resumed:
                raise KeyboardInterrupt
            generated.append(prompts)
            return run(prompts, **settings)

        return count

    monkeypatch.setattr(generate_module, "load_engine", load_counting)
    path, resumed = tmp_path / "stopped.jsonl", False
    with pytest.raises(KeyboardInterrupt):
        answer(str(model_folder), MANY, path, **SETTINGS)
    content = path.read_text()
    assert len(content.splitlines()) == 1 + 4
    path.write_text(content + '{"index": 3, "outp')  # interrupted while it was written
    resumed = True
    assert answer(str(model_folder), MANY, path, **SETTINGS) == whole
    assert sorted(map(len, generated)) == [1, 2, 2, 2]  # nothing is generated twice
    settings, *lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert settings["temperature"] == 1.0
    assert sorted(line["index"] for line in lines) == list(range(len(MANY)))

    def load_again(*_):
        pytest.fail("the model was loaded, but all answers are there")

    monkeypatch.setattr(generate_module, "load_engine", load_again)
    assert answer(str(model_folder), MANY, path, **SETTINGS) == whole


DAMAGED = {
    "zeros": "\0\0\0",
    "a list": "[1, 2]",
    "another index": '{"index": 999, "output": "a", "finished": true}',
    "no text": '{"index": 1, "output": null, "finished": true}',
    "no index": '{"output": "a", "finished": true}',
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_answer_is_named_by_its_line(model_folder, tmp_path, damage):
    path = tmp_path / "answers.jsonl"
    whole = answer(str(model_folder), MANY, path, **SETTINGS)
    lines = path.read_text().splitlines()
    lines[2] = DAMAGED[damage]
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(InputError, match=f"{path}: line 3 is .*: remove the line, and "):
        answer(str(model_folder), MANY, path, **SETTINGS)
    path.write_text("\n".join(lines[:2] + lines[3:]) + "\n")
    assert answer(str(model_folder), MANY, path, **SETTINGS) == whole


def test_two_processes_do_not_generate_the_same_answers(model_folder, tmp_path):
    with open_alone(tmp_path / "answers.jsonl"):
        with pytest.raises(InputError, match="answers.jsonl: another process is writing to it"):
            answer(str(model_folder), MANY, tmp_path / "answers.jsonl", **SETTINGS)
    assert len(answer(str(model_folder), MANY, tmp_path / "answers.jsonl", **SETTINGS)) == len(MANY)


@pytest.mark.parametrize(
    "change",
    [{"temperature": 0.5}, {"seed": 8}, {"prompts": MANY[1:]}, {"engine_args": "use_cache=false"}],
)
def test_answers_of_other_settings_are_not_mixed(model_folder, tmp_path, change):
    answer(str(model_folder), MANY, tmp_path / "answers.jsonl", **SETTINGS)
    settings = {"prompts": MANY} | SETTINGS | change
    (name,) = change
    with pytest.raises(InputError, match=f"{name.replace('prompts', 'prompts_sha256')} was"):
        answer(str(model_folder), path=tmp_path / "answers.jsonl", **settings)
    answer(str(model_folder), path=tmp_path / "changed.jsonl", **settings)
    with pytest.raises(InputError, match=f"{name.replace('prompts', 'prompts_sha256')} was"):
        answer(str(model_folder), MANY, path=tmp_path / "changed.jsonl", **SETTINGS)


def test_answers_of_another_template_or_stop_are_not_mixed(model_folder, tmp_path):
    """The weights and the config of all three are the same."""
    folder, path = tmp_path / "tiny", tmp_path / "answers.jsonl"
    shutil.copytree(model_folder, folder)
    answer(str(folder), MANY, path, **SETTINGS)
    template = CHATML.replace("assistant", "model")
    make_tokenizer(template).save_pretrained(folder)
    with pytest.raises(InputError, match="chat template was"):
        answer(str(folder), MANY, path, **SETTINGS)
    make_tokenizer().save_pretrained(folder)
    answer(str(folder), MANY, path, **SETTINGS)
    (folder / "generation_config.json").write_text('{"eos_token_id": 200}')
    with pytest.raises(InputError, match="generation_config was"):
        answer(str(folder), MANY, path, **SETTINGS)


def test_template_args_reach_the_prompt_and_are_recorded(model_folder, tmp_path):
    folder, path = tmp_path / "tiny", tmp_path / "answers.jsonl"
    shutil.copytree(model_folder, folder)
    block = "{% if thinking is defined and not thinking %}{{ 'plus plus' }}{% endif %}"
    make_tokenizer(CHATML + block).save_pretrained(folder)
    expected = []
    for name, template in (("plain", CHATML), ("set", CHATML + "plus plus")):
        shutil.copytree(folder, tmp_path / name)
        make_tokenizer(template).save_pretrained(tmp_path / name)
        expected.append(answer(str(tmp_path / name), MANY, **SETTINGS))
    settings = SETTINGS | {"template_args": "thinking=false"}
    assert answer(str(folder), MANY, **SETTINGS) == expected[0] != expected[1]
    assert answer(str(folder), MANY, path, **settings) == expected[1]
    with pytest.raises(InputError, match="chat template was"):
        answer(str(folder), MANY, path, **SETTINGS)


def test_a_prompt_that_fills_the_context(model_folder):
    limit = {"engine": "vllm", "engine_args": "max_model_len=20"}
    with pytest.raises(
        InputError, match=r"prompt 2 has \d+ tokens .* context of 20: .*max_model_l"
    ):
        answer(str(model_folder), ["a", "b", "c " * 30], **limit)
    with pytest.raises(InputError, match=r"prompt 1 has \d+ tokens and the model a context of 256"):
        answer(str(model_folder), ["a", "b " * 300])
    calls, plain = [], make_model("llama")
    original = plain.generate

    def record(ids, generation_config, **kwargs):
        calls.append((ids, generation_config))
        return original(ids, generation_config=generation_config, **kwargs)

    plain.generate = record
    generate(plain, make_tokenizer(), ["b " * 100], max_new_tokens=1000)
    ((ids, config),) = calls
    assert 0 < config.max_new_tokens == 256 - ids.shape[1]  # as much as there is room for


def test_vllm_gets_the_same_requests(model_folder, tmp_path, monkeypatch):
    """vLLM needs a GPU: a stand-in with its interface records what it is given and returns what
    vLLM's results look like."""
    seen = {}

    class LLM:
        def __init__(self, model, seed, **more):
            seen.update(model=model, more=more)
            self.llm_engine = SimpleNamespace(model_config=SimpleNamespace(max_model_len=256))

        def generate(self, requests, options):
            seen.update(requests=requests, options=options)
            end = options[0].stop_token_ids[-1]
            first = SimpleNamespace(
                token_ids=tokenizer("ab").input_ids + [end], finish_reason="stop"
            )
            second = SimpleNamespace(token_ids=tokenizer("cd").input_ids, finish_reason="length")
            return [SimpleNamespace(outputs=[first]), SimpleNamespace(outputs=[second])]

    tokenizer = make_tokenizer()
    fake = SimpleNamespace(LLM=LLM, SamplingParams=lambda **options: SimpleNamespace(**options))
    monkeypatch.setitem(sys.modules, "vllm", fake)
    prompts, settings = ["hi", "you"], {"temperature": 0.9, "max_new_tokens": 300}
    engine_args = "tensor_parallel_size=8,gpu_memory_utilization=0.5,dtype=auto,enforce_eager=true"
    settings |= {"engine_args": engine_args, "top_k": 20, "repetition_penalty": 1.1}
    answers = answer(str(model_folder), prompts, engine="vllm", seed=3, **settings)
    assert [options.seed for options in seen["options"]] == [3 * 10**9, 3 * 10**9 + 1]
    numbers = {"tensor_parallel_size": 8, "gpu_memory_utilization": 0.5}
    assert seen["more"] == numbers | {"dtype": "auto", "enforce_eager": True}
    for wrong in ("tensor_parallel_size", "=8", "8=8", "a=1,b"):
        with pytest.raises(InputError, match="not of the form name=value"):
            parse_engine_args(wrong)
    assert answers == [("cd", False), ("ab", True)]  # "you" is the longer one and was asked first
    for batch_size in (8, 2):  # which only a reward model uses
        settings["batch_size"] = batch_size
        path = tmp_path / "answers.jsonl"
        assert answer(str(model_folder), prompts, path, engine="vllm", **settings) == answers
    texts = [CHATML_OF.format(prompt) for prompt in prompts]
    ids = [tokenizer(text, add_special_tokens=False).input_ids for text in texts]
    assert sorted(request["prompt_token_ids"] for request in seen["requests"]) == sorted(ids)
    first = seen["options"][0]
    assert (first.temperature, first.top_p) == (0.9, 1.0)
    assert (first.top_k, first.repetition_penalty) == (20, 1.1)
    assert first.max_tokens == 256 - len(seen["requests"][0]["prompt_token_ids"])
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") in first.stop_token_ids
    monkeypatch.setitem(sys.modules, "vllm", None)
    generate_module.load_engine.cache_clear()
    with pytest.raises(InputError, match="pip install .* vllm"):
        answer(str(model_folder), ["hi"], engine="vllm")


@pytest.mark.parametrize("batch_size", [1, 2])
def test_another_seed_repeats_no_sample(model_folder, batch_size):
    """Four answers to one prompt: no two batches have the same random numbers, nor do two seeds."""
    options = {"temperature": 1.0, "max_new_tokens": 12, "batch_size": batch_size}
    answers = [
        text
        for seed in (0, 1, 2)
        for text, _ in answer(str(model_folder), ["what is two"] * 4, seed=seed, **options)
    ]
    assert len({*answers}) == 12


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--batch_size", "0"], "argument --batch_size: must be at least 1, not 0"),
        (["--num_prompts", "-1"], "argument --num_prompts: must be at least 0, not -1"),
        (["--num_prompts", "all"], "argument --num_prompts: invalid int value: 'all'"),
        (["--temperature", "nan"], "argument --temperature: must be at least 0, not nan"),
        (["--engine_args", "tensor_parallel_size=8"], "transformers does not take them"),
        (["--engine_args", "dtype=bf16"], "--engine_args dtype=bf16: transformers does not take"),
        (["--engine_args", "a={"], "--engine_args a={: '{' cannot be read"),
        (["--models", "MODEL", "nowhere/x"], "nowhere/x: "),
        (["--models", "MODEL", "COPY", "--output_dir", "OUT"], "have the same short name"),
    ],
)
def test_a_wrong_argument_is_one_line_before_anything_is_generated(
    model_folder, tmp_path, monkeypatch, capsys, flags, message
):
    copy = shutil.copytree(model_folder, tmp_path / Path(model_folder).name)
    places = {"MODEL": str(model_folder), "COPY": str(copy), "OUT": str(tmp_path / "out")}
    flags = ["--models", str(model_folder), *(places.get(flag, flag) for flag in flags)]
    monkeypatch.setattr(sys, "argv", ["generate", *flags])
    monkeypatch.setattr(generate_module, "generate", lambda *args, **options: pytest.fail("late"))
    with pytest.raises((InputError, SystemExit)) as error:
        generate_module.main()
    assert message in str(error.value) + capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_names_of_models(tmp_path):
    (tmp_path / "mine" / "final").mkdir(parents=True)
    for folder in ("mine/final", "mine/final/"):
        assert short_name(f"{tmp_path}/{folder}") == "mine"
    with pytest.raises(InputError, match="mine: the model of this run is in .*mine/final"):
        short_name(f"{tmp_path}/mine")
    assert short_name("meta-llama/Meta-Llama-3-8B") == "Meta-Llama-3-8B"


def test_the_decoding_is_the_requested_one():
    """A generation config that samples or penalizes repetitions, as published models have, changes
    nothing."""
    tokenizer = make_tokenizer()
    plain, other = make_model("llama", seed=3), make_model("llama", seed=3)
    other.generation_config = GenerationConfig(
        do_sample=True, temperature=0.6, top_p=0.5, top_k=3, repetition_penalty=2.0
    )
    for settings in ({}, {"temperature": 1.0, "seed": 5}):
        first = generate(plain, tokenizer, PROMPTS, max_new_tokens=12, **settings)
        assert generate(other, tokenizer, PROMPTS, max_new_tokens=12, **settings) == first
    greedy = [
        generate(other, tokenizer, PROMPTS, max_new_tokens=12, seed=seed) for seed in range(3)
    ]
    assert greedy[0] == greedy[1] == greedy[2]
