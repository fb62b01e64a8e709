"""A checkpoint as a model in Hugging Face format, also while its run goes on.

    python -m eval.export runs/demo/checkpoints/step_60 --output runs/demo-60
    python -m eval.generate --models demo runs/demo-60

With `train.py --keep_checkpoints 0`, all checkpoints stay, and the best can be kept instead of the
last. One process without FSDP, on the CPU; `surgery` and `merge` of model.py are those of the run.
A tensor at a time is read, and a file of the export is in memory; with adapters, which `merge` has
to take out, the whole model is, in float32.
"""

from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from eval.results import make_parser
from model import export, load_model, merge, operate
from runtime.cache import file_digest
from runtime.card import model_card
from runtime.checkpoints import read_state
from runtime.command_line import run_command
from runtime.errors import InputError
from runtime.weights import (
    load_config,
    load_tokenizer,
    model_fingerprint,
    resolve_model,
    stored_tensors,
    weights_folder,
)


def export_checkpoint(checkpoint: Path, output: Path) -> None:
    """Write the model of a checkpoint to a new folder, as the run itself would as its final/.
    Raises InputError if the checkpoint is damaged or of another model, or if the folder is there.
    """
    if output.exists():
        raise InputError(f"{output} is there already")
    try:
        saved = read_state(checkpoint)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{checkpoint} is no checkpoint: {error}") from None
    for name, (_, digest) in saved["files"].items():
        if file_digest(checkpoint / name) != digest:
            raise InputError(f"{checkpoint / name} is damaged")
    config = SimpleNamespace(**saved["config"])
    source = resolve_model(config.model)
    if model_fingerprint(source) != saved["made_of"]["model files"]:
        raise InputError(f"{config.model} is not the model that the run began with: it has changed")
    tokenizer = load_tokenizer(source, config.chat_template, config.template_args)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    model, needed = operate(load_config(source))
    trained = model.optimized()
    if others := sorted(trained.keys() ^ saved["optimizer"].keys()):
        problem = f"{checkpoint} and {config.model} do not both have {others[0]} to optimize"
        raise InputError(f"{problem}: another model, or another surgery() in model.py?")
    folder = weights_folder(source, needed)

    tensors = stored_tensors(model.model)

    def read(name: str) -> torch.Tensor:
        """A tensor of the transformers model: from the checkpoint, or as the run began."""
        whole = f"model.{name}"
        place, key = (checkpoint, whole) if whole in trained else (folder, name)
        values = {key: torch.empty_like(tensors[name], device="cpu")}
        dcp.load(values, storage_reader=dcp.HuggingFaceStorageReader(str(place)))
        return values[key]

    def versions() -> list[tuple[int, int]]:
        return [(id(tensor), tensor._version) for tensor in stored_tensors(model.model).values()]

    before = versions()
    with torch.device("meta"):
        merge(model.model)
    if versions() != before:
        # merge() needs the values.
        torch.manual_seed(config.seed % 2**63)  # as train(): for what surgery() adds and freezes
        model, read = load_model(source, torch.device("cpu"), torch.float32), None
        dcp.load(model.optimized(), storage_reader=dcp.HuggingFaceStorageReader(str(checkpoint)))
    model.dtype = getattr(torch, saved["made_of"]["dtype in use"])
    run, card = checkpoint.resolve().parents[1], ""
    if (run / "config.yaml").exists():  # else the checkpoint alone was copied
        card = model_card(run, source, bool(tokenizer.chat_template), saved["step"])
    export(model, source, tokenizer, output, card, read)


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("checkpoint", help="a run's checkpoints/step_N")
    parser.add_argument("--output", required=True, metavar="FOLDER", help="a new folder")
    args = parser.parse_args()
    export_checkpoint(Path(args.checkpoint), Path(args.output))
    print(f"The model of {args.checkpoint} is in {args.output}")


if __name__ == "__main__":
    run_command(main)
