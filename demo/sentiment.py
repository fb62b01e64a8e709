"""The demo's reward: how positive an answer is, by the lexicon of vaderSentiment. With it, the
demo's model made the demo's pairs of its own answers:

    python -m eval.on_policy demo --data demo/prompts.jsonl --score demo/sentiment.py:score \\
        --samples 5 --temperature 0.8 --min_gap 0.3 --max_new_tokens 48 --batch_size 64 \\
        --output pairs.jsonl
    head -n 320 pairs.jsonl > demo/train.jsonl
    tail -n 43 pairs.jsonl > demo/heldout.jsonl
"""

from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

ANALYZER = SentimentIntensityAnalyzer()


def score(answers: list[dict]) -> list[float]:
    """From -1, the most negative, over 0, neutral, to 1 for each {"prompt": ..., "answer": text}:
    the lexicon's compound score. The prompt is not read."""
    return [ANALYZER.polarity_scores(answer["answer"])["compound"] for answer in answers]
