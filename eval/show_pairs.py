"""What will be trained on, token by token.

    python -m eval.show_pairs demo/train.jsonl
    python -m eval.show_pairs Anthropic/hh-rlhf:test --model EleutherAI/pythia-2.8b --num_pairs 5

Prints the first pairs, how many rows are dropped or truncated, and how long the pairs are.
"""

import numpy as np

from data import load_pairs, load_tokenizer, pair_lengths
from demo.smollm2 import resolve_model
from eval.report import make_parser
from runtime import run_command


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("data", help="sources as for --train_data")
    parser.add_argument("--model", default="demo", help="hub id or folder whose tokenizer to use")
    parser.add_argument("--chat_template", default="", help="as for train.py")
    parser.add_argument("--num_pairs", type=int, default=2, help="pairs to print")
    parser.add_argument("--max_length", type=int, default=2048)
    parser.add_argument("--max_prompt_length", type=int, default=1800)
    args = parser.parse_args()

    tokenizer = load_tokenizer(resolve_model(args.model), args.chat_template)
    pairs, report = load_pairs(args.data, tokenizer, args.max_length, args.max_prompt_length)
    for pair in pairs.select(range(min(args.num_pairs, len(pairs)))):
        print(f"{pair['source']}, row {pair['row']}")
        for part in ("prompt", "chosen", "rejected"):
            role = "context" if part == "prompt" else "scored"
            tokens = "|".join(repr(tokenizer.decode([i]))[1:-1] for i in pair[part])
            print(f"  {part} ({len(pair[part])} tokens, {role}): {tokens}")
    lengths = pair_lengths(pairs)
    print(f"{report}\n{'tokens':<10}{'mean':>8}{'median':>8}{'95 %':>8}{'max':>8}")
    columns = (*lengths.T, lengths.sum(axis=1))
    for name, column in zip(("prompt", "chosen", "rejected", "pair"), columns):
        numbers = (column.mean(), np.median(column), np.percentile(column, 95), column.max())
        print(f"{name:<10}" + "".join(f"{number:>8.0f}" for number in numbers))


if __name__ == "__main__":
    run_command(main)
