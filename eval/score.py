"""Scores of answers, by a reward model or by a function of your own: what eval.on_policy chooses
pairs with, and what `eval.generate --score` judges models by.

A scorer is written as FILE.py:FUNCTION, or as the hub id or folder of a reward model.
"""

import importlib.util
import math
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoModelForSequenceClassification

from data import tokenize_text
from runtime.errors import InputError
from runtime.templates import as_messages, render
from runtime.weights import load_config, load_tokenizer

Scorer = Callable[[list[dict]], list[float]]


def load_scorer(name: str, batch_size: int = 8) -> Scorer:
    """A function [{"prompt": messages, "answer": text}] -> one finite float for each.

    name: "FILE.py:FUNCTION", a function of this form; or a reward model: the hub id or folder of a
        sequence classifier with one output, whose tokenizer has a chat template. Code that comes
        with a model is never run.
    batch_size: conversations that a reward model reads at once.

    A reward model's weights are loaded when it is first called. Raises InputError if there is no
    such scorer, and, when it is called, if its scores are not one finite number for each answer.
    """
    path, _, function = name.rpartition(":")
    score = load_function(path, function) if path.endswith(".py") else RewardModel(name, batch_size)

    def checked(answers: list[dict]) -> list[float]:
        try:
            scores = [float(value) for value in score(answers)]
        except (TypeError, ValueError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(
                f"{name}: fails, or does not return a list of numbers: {error}"
            ) from error
        if len(scores) != len(answers):
            raise InputError(f"{name}: returned {len(scores)} scores for {len(answers)} answers")
        for value, answer in zip(scores, answers):
            if not math.isfinite(value):
                prompt = answer["prompt"][-1]["content"]
                raise InputError(
                    f"{name}: the score of the answer {answer['answer']!r} to the prompt "
                    f"{prompt!r} is {value}; a score must be a finite number"
                )
        return scores

    return checked


def load_function(path: str, name: str) -> Scorer:
    """The function `name` of the Python file at `path`, which is run. Raises InputError if the file
    or the function is missing, or if a package that the file imports is."""
    if not Path(path).is_file():
        raise InputError(f"--score {path}:{name}: there is no file {path}")
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(spec.name, module)  # where dataclasses look for it
    try:
        spec.loader.exec_module(module)
    except ModuleNotFoundError as error:
        raise InputError(f"{path} needs a package: pip install {error.name}") from error
    if not callable(getattr(module, name, None)):
        raise InputError(f"--score {path}:{name}: {path} has no function {name}")
    return getattr(module, name)


class RewardModel:
    """A sequence classifier with one output, by its hub id or folder, as a scorer.

    Raises InputError if it cannot be loaded without code of its own, has more than one output, or
    no chat template.
    """

    def __init__(self, name: str, batch_size: int):
        self.name, self.batch_size, self.model = name, batch_size, None
        self.tokenizer = load_tokenizer(name)
        if not self.tokenizer.chat_template:
            raise InputError(f"{name}: has no chat template: call it in a FILE.py:FUNCTION instead")
        config = load_config(name)
        kinds = config.architectures or []
        if config.num_labels != 1 or not any("SequenceClassification" in kind for kind in kinds):
            raise InputError(
                f"{name}: is {', '.join(kinds)} with {config.num_labels} outputs; a reward model "
                "is a ForSequenceClassification with one"
            )
        self.context = getattr(config.get_text_config(), "max_position_embeddings", None) or 2**31

    @torch.inference_mode()
    def __call__(self, answers: list[dict]) -> list[float]:
        ids = []
        for answer in answers:
            last = {"role": "assistant", "content": answer["answer"]}
            text = render(self.tokenizer, [*answer["prompt"], last])
            ids.append(tokenize_text(self.tokenizer, text))
            if len(ids[-1]) > self.context:
                raise InputError(
                    f"{self.name}: the prompt {answer['prompt'][-1]['content'][:200]!r} has "
                    f"{len(ids[-1])} tokens with its answer, and the context is {self.context}: "
                    "leave it out"
                )
        if self.model is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
            dtype = torch.bfloat16 if device == "cuda" else torch.float32
            self.model = AutoModelForSequenceClassification.from_pretrained(
                self.name, trust_remote_code=False, dtype=dtype
            )
            self.model = self.model.to(device).eval()
            self.pad = self.model.config.get_text_config().pad_token_id
        scores, order = {}, sorted(range(len(ids)), key=lambda i: -len(ids[i]))
        for start in range(0, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            pad = self.pad
            if pad is None:
                # A decoder's score is read at the last token that is not padding. Without a padding
                # token of its own, one that no text of the batch contains.
                used = {token for i in batch for token in ids[i]}
                pad = next(token for token in range(len(used) + 1) if token not in used)
                self.model.config.get_text_config().pad_token_id = pad
            width = len(ids[batch[0]])
            padded = torch.tensor([ids[i] + [pad] * (width - len(ids[i])) for i in batch])
            mask = torch.tensor([[1] * len(ids[i]) + [0] * (width - len(ids[i])) for i in batch])
            device = self.model.device
            logits = self.model(padded.to(device), attention_mask=mask.to(device)).logits
            scores |= dict(zip(batch, logits[:, 0].float().tolist()))
        return [scores[i] for i in range(len(ids))]


def score_answers(scorer: Scorer, prompts: list, answers: list[tuple[str, bool]]) -> list[float]:
    """The scores of answers [(text, finished)] to `prompts`, each messages or text."""
    return scorer(
        [{"prompt": as_messages(p), "answer": text} for p, (text, _) in zip(prompts, answers)]
    )


def summary(
    answers: list[tuple[str, bool]], scores: list[float], threshold: float
) -> tuple[dict[str, float], dict[str, float]]:
    """Answers [(text, finished)] and their scores → what is reported of a model, and the standard
    errors of some of it.

    score: the mean; share: of the scores above `threshold`. Beside them, what shows whether the
    answers themselves changed: their words, the share that ended within --max_new_tokens, and the
    share of distinct answers.
    """
    columns = item_values(answers, scores, threshold)
    values = {name: statistics.mean(column) for name, column in columns.items()}
    values["share distinct"] = len({text for text, _ in answers}) / len(answers)
    errors = {}
    if len(scores) > 1:
        root = math.sqrt(len(scores))
        errors = {name: statistics.stdev(column) / root for name, column in columns.items()}
    return values | {"answers": len(answers)}, errors


def item_values(
    answers: list[tuple[str, bool]], scores: list[float], threshold: float
) -> dict[str, list[float]]:
    """The values whose means `summary` gives: {name: a value for each answer}."""
    return {
        "score": scores,
        f"share above {threshold:g}": [float(score > threshold) for score in scores],
        "words": [float(len(text.split())) for text, _ in answers],
        "share finished": [float(finished) for _, finished in answers],
    }
