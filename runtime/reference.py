"""Log-probs of whole data sets, and those of the model that training starts from."""

from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file, safe_open, save_file
from tqdm import tqdm

from data import DataSet
from loss import sum_logps
from runtime.checkpoints import FREE_TO_CHANGE


@torch.no_grad()
def response_logps(model, data: DataSet, micro_batches: list) -> torch.Tensor:
    """log p(response | prompt) of every row: (rows, K) float64 on the model's device.
    micro_batches: see spread_rows. Collective."""
    rank, device = dist.get_rank(), next(model.parameters()).device
    model.eval()
    sums = torch.zeros(data.lengths[:, 1:].shape, dtype=torch.float64, device=device)
    for shares in tqdm(micro_batches, "log-probs", disable=rank > 0, dynamic_ncols=True):
        batch = data.pack(shares[rank]).to(device)
        sums[shares[rank]] = sum_logps(model(batch).double(), batch.lengths)
    model.train().free_gathered()
    dist.all_reduce(sums)  # every row is on one rank, and 0 on the others
    return sums


def add_reference(
    model, data: DataSet, heldout: DataSet | None, config, made_of: dict[str, str]
) -> None:
    """Give the data sets their `reference`: response_logps of the model as it is now. Rank 0 keeps
    them in the run's folder, as reference.safetensors, from which a run that is made of the same
    (see checks.digests) with the same settings takes them when it is resumed. If there is a
    reference already, it is computed again, of the model as it is, and not kept. Collective."""
    file, found = Path(config.output_dir) / "reference.safetensors", [{}]
    # With all settings that decide the gradient: a fork may make the reference by one of its own.
    own = {key: v for key, v in asdict(config).items() if key not in FREE_TO_CHANGE} | made_of
    own["training tokens"] = data.fingerprint  # which a fork may have replaced since
    key, ranks = repr(sorted(own.items())), dist.get_world_size()
    renews = data.reference is not None  # as a fork may; a resume would not know of which step
    if dist.get_rank() == 0 and file.exists() and not renews:
        try:
            with safe_open(file, "pt") as opened:
                same = opened.metadata()["key"] == key
            found = [load_file(file) if same else {}]
        except Exception:  # it was cut off
            pass
    dist.broadcast_object_list(found, src=0)
    sums = dict(found[0])
    for name, rows in {"train_data": data, "eval_data": heldout}.items():
        if rows and name not in sums:
            indices, budget = range(len(rows.rows)), config.micro_batch_tokens
            micro_batches = rows.spread(indices, ranks, budget)
            sums[name] = response_logps(model, rows, micro_batches).cpu()
        if rows:
            rows.reference = sums[name].float()
    if dist.get_rank() == 0 and not found[0] and not renews:
        scratch = file.with_name(f"{file.name}.part")
        save_file(sums, scratch, metadata={"key": key})
        scratch.replace(file)
