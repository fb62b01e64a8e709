"""What will be trained on, token by token.

    python -m eval.show_pairs demo/train.jsonl
    python -m eval.show_pairs Anthropic/hh-rlhf:test --model EleutherAI/pythia-2.8b --num_pairs 5

Prints the first rows, how many are dropped or truncated, and how long their parts are. Of K
responses to a prompt, the first is the best.
"""

import numpy as np

from data import load_data, overlaps
from eval.results import make_parser
from runtime.command_line import run_command
from runtime.weights import load_tokenizer, resolve_model


def main() -> None:
    parser = make_parser(__doc__, "--columns", "--template_args")
    parser.add_argument("data", help="sources as for --train_data")
    parser.add_argument("--model", default="demo", help="hub id or folder whose tokenizer to use")
    parser.add_argument("--chat_template", default="", help="as for train.py")
    parser.add_argument("--num_pairs", type=int, default=2, help="rows to print")
    parser.add_argument("--max_length", type=int, default=2048, help="as for train.py")
    parser.add_argument("--max_prompt_length", type=int, default=1800, help="as for train.py")
    parser.add_argument("--truncation", default="fit", help="as for train.py")
    args = parser.parse_args()

    folder = resolve_model(args.model)
    tokenizer = load_tokenizer(folder, args.chat_template, args.template_args)
    how = {"columns": args.columns, "truncation": args.truncation}
    data = load_data(args.data, tokenizer, args.max_length, args.max_prompt_length, **how)
    sides, whole = [f"response {n}" for n in range(1, data.responses + 1)], "together"
    if data.responses == 2:
        sides, whole = ["chosen", "rejected"], "pair"
    for row in data.rows.select(range(min(args.num_pairs, len(data.rows)))):
        print(f"{row['source']}, row {row['row']}")
        for name, ids in zip(("prompt", *sides), (row["prompt"], *row["responses"])):
            role = "context" if name == "prompt" else "scored"
            tokens = "|".join(repr(tokenizer.decode([i]))[1:-1] for i in ids)
            print(f"  {name} ({len(ids)} tokens, {role}): {tokens}")
    names = ("prompt", *sides, whole)
    width = max(map(len, names)) + 2
    print(f"{data.report}\n{overlaps(data, None)}")
    print(f"{'tokens':<{width}}{'mean':>8}{'median':>8}{'95 %':>8}{'max':>8}")
    for name, column in zip(names, (*data.lengths.T, data.tokens)):
        numbers = (column.mean(), np.median(column), np.percentile(column, 95), column.max())
        print(f"{name:<{width}}" + "".join(f"{number:>8.0f}" for number in numbers))


if __name__ == "__main__":
    run_command(main, shows=True)
