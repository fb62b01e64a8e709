"""The demo's reward: how positive an answer is, by the lexicon of vaderSentiment.

Pairs of the demo's model by this reward (those in demo/train.jsonl are not made so):

    python -m eval.on_policy demo --data demo/prompts.jsonl --score demo/sentiment.py:score \\
        --output pairs.jsonl --min_gap 0.3 --max_new_tokens 48 --batch_size 64
"""

from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

ANALYZER = SentimentIntensityAnalyzer()


def score(answers: list[dict]) -> list[float]:
    """From -1, the most negative, over 0, neutral, to 1 for each {"prompt": ..., "answer": text}:
    the lexicon's compound score. The prompt is not read."""
    return [ANALYZER.polarity_scores(answer["answer"])["compound"] for answer in answers]
