"""Checks at the start: that model, data and loss fit together, that the packed forward equals the
model's own, and that what is trained can be exported."""

from collections.abc import Callable

import numpy as np
import torch
from transformers import AttentionInterface

from data import DataSet, MicroBatch, pack
from model import PackedModel, build_model, merge, packed_attention, shape_logits, surgery
from runtime.errors import InputError
from runtime.identity import code_digest
from runtime.norms import own_norms
from runtime.processes import max_over_ranks, say
from runtime.rows import hub_commits
from runtime.weights import (
    hub_snapshot,
    load_config,
    model_fingerprint,
    stored_tensors,
    tokenizer_digests,
    weights_folder,
)


def digests(
    config, source: str, tokenizer, dtype: torch.dtype, data: DataSet, heldout: DataSet | None
) -> dict[str, str]:
    """SHA-256 of what a run is made of, by name, and the dtype that it computes in. To be called by
    every rank, while none waits for another: it fetches the weights of `source`, a folder or hub
    id, and reads all files, which can take longer than a collective may.

    Raises InputError if weights are missing, if the model has fewer than max_length positions, or
    no embedding for a token of the data sets.
    """
    model_config = load_config(source)
    text = model_config.get_text_config()
    positions = getattr(text, "max_position_embeddings", config.max_length)
    if config.max_length > positions:
        raise InputError(
            f"max_length={config.max_length} exceeds the model's {positions} positions"
        )
    highest = max(data.highest_token, heldout.highest_token if heldout else 0)
    if highest >= text.vocab_size:
        problem = f"the tokenizer gives token {highest}, the model has {text.vocab_size}"
        raise InputError(f"{source}: {problem}: they do not belong together")
    with torch.device("meta"):
        needed = stored_tensors(build_model(model_config).model)
    weights_folder(source, needed)
    found = tokenizer_digests(tokenizer) | {"training tokens": data.fingerprint}
    found |= {"held-out tokens": heldout.fingerprint if heldout else ""}
    found |= {"model files": model_fingerprint(source), "code": code_digest()}
    return found | {"dtype in use": str(dtype).removeprefix("torch.")}


def commits(config, source: str) -> dict[str, str]:
    """The commits of the hub from which a run has its model, whose folder is `source`, and its
    data, by name."""
    snapshot = hub_snapshot(source)
    found = {config.model: snapshot[1]} if snapshot else {}
    found |= hub_commits(",".join(filter(None, [config.train_data, config.eval_data])))
    return {f"commit of {name}": commit for name, commit in found.items() if commit}


def check_loss(
    loss_function: Callable, asked: list[str], data: DataSet, heldout: DataSet | None
) -> None:
    """Raise InputError if the rows have different numbers of responses, if the loss does not take
    as many, or if it is not of each pair alone. asked: see choose_loss."""
    count = data.responses
    if heldout and heldout.responses != count:
        raise InputError(f"train_data has {count} responses a row, eval_data {heldout.responses}")
    # Two pairs with nothing in common: if one affects the other's loss, it shows.
    lengths = torch.arange(1, 2 * count + 1).view(2, count)
    logps = torch.arange(-1.0 * lengths.sum(), 0).mul(0.1).split(lengths.sum(dim=1).tolist())
    columns = {name: torch.tensor([1.0, 2.0]) for name in asked}
    if "reference" in asked:
        columns["reference"] = -torch.ones(2, count)

    def losses(*pairs: int) -> torch.Tensor:
        given = {name: values[[*pairs]] for name, values in columns.items()}
        return loss_function(torch.cat([logps[i] for i in pairs]), lengths[[*pairs]], **given)

    try:
        both, again, alone = losses(0, 1), losses(0, 1), torch.cat([losses(0), losses(1)])
    except (ValueError, IndexError, RuntimeError, TypeError) as error:
        raise InputError(f"the loss does not take {count} responses to a prompt: {error}") from None
    if both.shape != (2,):
        raise InputError(
            f"a loss must be one number for each pair; of 2 pairs it has {[*both.shape]}"
        )
    if not torch.equal(both, again):
        raise InputError(
            "the loss is not deterministic: computed again for the same pairs, it differs"
        )
    if not torch.allclose(both, alone, rtol=1e-4, equal_nan=True):
        problem = "a pair's loss depends on the other pairs of its micro-batch"
        raise InputError(f"{problem}: another split of the batch would give another gradient")


def check_trainable(model: PackedModel, optimizer, name: str) -> None:
    """Raise InputError, naming a parameter, if training the model would not be what it seems: if
    its export would not have the names and shapes of the model that it was loaded from, which
    `name` is; if a tensor has been added or taken out outside of surgery(), where ranks would
    diverge; if a parameter has a hook; if it has dropout; or if the optimizer has other parameters
    than those that require a gradient."""
    with torch.device("meta"):
        config = load_config(name)
        rebuilt = build_model(config).model
        expected = {key: value.shape for key, value in stored_tensors(rebuilt).items()}
        surgery(rebuilt)
        made = stored_tensors(rebuilt).keys()
        merge(rebuilt)
        exported = {key: value.shape for key, value in stored_tensors(rebuilt).items()}
    for key in {**expected, **exported}:
        if expected.get(key) != exported.get(key):
            problem = f"final/ would have {key} as {exported.get(key)}, not {expected.get(key)}"
            raise InputError(f"{problem}: merge() in model.py must undo what surgery() changes")
    changed = made ^ stored_tensors(model.model).keys()
    for key, parameter in model.named_parameters():
        if parameter not in model.loaded or not key.startswith("model."):  # it has no first values
            changed.add(key)
    if changed:
        problem = f"{min(changed)} was added or taken out outside of surgery()"
        raise InputError(f"{problem}: do it in surgery(), in model.py")
    for key, parameter in model.named_parameters():
        hooks = len(parameter._post_accumulate_grad_hooks or ()) - hasattr(parameter, "total")
        if parameter._backward_hooks or hooks > 0:
            problem = f"{key} has a hook, which not every kind of run calls: change the gradients"
            raise InputError(f"{problem} of model.optimized() before gradient_metrics()")
    for key, module in model.named_modules():
        if isinstance(module, torch.nn.Dropout) and module.p > 0:
            problem = (
                f"{key} drops values at random: a gradient would depend on how a batch is split"
            )
            raise InputError(f"{problem}, and on a resume. Take it out in surgery(), in model.py")
    text = config.get_text_config()
    experts = getattr(text, "num_local_experts", 0) or getattr(text, "num_experts", 0)
    if hasattr(text, "router_aux_loss_coef") and experts:
        say("The experts' routers have no balancing loss here: forks/router_loss.patch adds it.")
    names = {parameter: key for key, parameter in model.optimized().items()}
    moved = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if strange := [parameter for parameter in moved if parameter not in names]:
        problem = f"the optimizer has a parameter of shape {[*strange[0].shape]}"
        if model.loaded.get(strange[0]):
            raise InputError(f"{problem} of the modules: take those of model.optimized()")
        problem += " that the model does not have, or has frozen"
        raise InputError(f"{problem}: add or unfreeze it in surgery(), in model.py")
    if left := names.keys() - {*moved}:
        problem = f"{names[left.pop()]} requires a gradient, but the optimizer does not have it"
        raise InputError(f"{problem}: freeze it in surgery(), in model.py")


class AttentionError(InputError):
    """packed_attention itself is wrong, whatever the model: padded rows would hide it."""


def choose_forward(model: PackedModel, data: DataSet, heldout: DataSet | None) -> None:
    """Leave the model packed if check_forward accepts that. Otherwise let it and the data sets
    compute responses separately, and say so. Collective. Raises InputError if check_forward does
    not accept that either, or if packed_attention itself is wrong."""
    device, problem = next(model.parameters()).device, None
    if model.packed:
        try:
            check_forward(model, data, heldout)
        except AttentionError:
            raise
        except InputError as error:
            problem = error
        (failed,) = max_over_ranks(device, problem is not None)
        if not failed:
            return
    model.packed = False
    model.set_attention()
    try:
        check_forward(model, data, heldout)
    except InputError as error:
        raise InputError(f"{problem} {error}" if problem else str(error)) from None
    for rows in filter(None, (data, heldout)):
        rows.separate = True
    work = f"{data.costs.sum() / data.tokens.sum():.1f} times the tokens"
    work += ", and all logits exist at a time" * model.own_logits
    reason = str(problem or "Its attention is not transformers' interface.").partition(" Found,")[0]
    say(f"{reason}\nEvery response is computed with its prompt, in a padded row: {work}.")


@torch.no_grad()
def check_forward(model: PackedModel, data: DataSet, heldout: DataSet | None) -> None:
    """Compare the packed forward with the model's own on random tokens: two short prompts, and one
    with which a sequence is as long as the longest in the data, which shows sliding windows and
    rotary embeddings that change with the length. Each has as many responses as the data's rows.
    Collective. Raises InputError, with all figures, unless

    - log-probs are the same when they are computed again, and do not move when another response
      changes, nor, if nothing is packed, with a later token, all relative to how they move with the
      prompts, which holds at any scale. A model whose log-probs hardly depend on the prompt is
      refused: no difference could show;
    - they equal those of the model's own forward, to the rounding that this forward itself has;
    - the head is a linear layer of the last hidden states, and the model's logits are its output,
      scaled and capped as TokenLogps does;
    - attention and its gradients equal one masked attention in float32.

    Of a model that computes responses separately, the last is not asked; and if its head is another
    one, it is set to use its own logits.
    """
    name, device = type(model.model).__name__, next(model.parameters()).device
    how = "packed" if model.packed else "with padded rows"
    vocab_size, count = model.model.get_input_embeddings().weight.shape[0], data.responses
    longest, random = max(data.longest, heldout.longest if heldout else 0), np.random.default_rng(0)

    def tokens(size: int) -> list[int]:
        return random.integers(vocab_size, size=size).tolist()

    sizes = [(n, *random.integers(3, 9, size=count)) for n in (7, 4, max(2, longest - 8))]
    rows = [[*map(tokens, row)] for row in sizes]
    others = [[tokens(len(prompt)), *responses] for prompt, *responses in rows]
    first = sizes[0][1]  # tokens of the response that is changed
    leaky = [[rows[0][0], tokens(first), *rows[0][2:]], *rows[1:]]
    long = [tokens(100), *(tokens(60 - 20 * (number % 2)) for number in range(count))]
    exact = model.dtype == torch.float32
    limits = {"repeated": 1e-3, "leaking": 1e-4, "ahead": 1e-4, "relative": 0.01 if exact else 0.3}
    limits |= {
        "absolute": 1e-3 if exact else 0.05,
        "head": 1e-5 if exact else 0.01,
        "attention": 0.1,
    }
    ids = torch.tensor(rows[0][0], device=device)
    try:
        if not model.packed:
            (other,) = max_over_ranks(device, not has_plain_head(model, ids, limits["head"]))
            model.own_logits = bool(other)
        logps = [model(pack(given).to(device)) for given in (rows, rows, others, leaky)]
        packed, again, moved, leaked = logps
        with own_norms(model):
            plain = model.call(plain_logps, rows, model.stock_attention)
        effect, difference = (packed - moved).abs().max(), (packed - plain).abs().max()
        found = {"repeated": (packed - again).abs().max() / effect}
        found["leaking"] = (packed - leaked)[first:].abs().max() / effect
        found |= {"relative": difference / effect, "absolute": difference}
        if not model.packed:  # packed attention is causal, as the model's own may not be
            other = [[p, *(r[:-1] + tokens(1) for r in responses)] for p, *responses in rows]
            earlier = torch.ones(len(packed), dtype=torch.bool, device=device)
            earlier[pack(rows).lengths.flatten().cumsum(0).to(device) - 1] = False
            found["ahead"] = (packed - model(pack(other).to(device)))[earlier].abs().max() / effect
        if model.packed:
            found["head"] = model.call(head_difference, ids)
            found["attention"] = attention_difference(model, pack([rows[0], long]).to(device))
        found = {key: value.nan_to_num(torch.inf).item() for key, value in found.items()}
        for key in ("leaking", "ahead"):
            limits[key] += 3 * found["repeated"]  # kernels of experts are not always bit-stable
        (above,) = max_over_ranks(device, found["absolute"] > limits["absolute"])
        if above:  # on one rank or more: what follows is collective
            limits["absolute"] = max(limits["absolute"], 5 * own_difference(model, rows))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise InputError(f"{name} cannot be trained {how}: {error!r}") from error
    model.free_gathered()
    if not all(found[key] <= limits[key] for key in found):
        figures = ", ".join(f"{key} {found[key]:.1e} ({limits[key]:.1e})" for key in found)
        kind = AttentionError if found.get("attention", 0) > limits["attention"] else InputError
        what = "those of one sequence at a time" if packed.isfinite().all() else "finite"
        figures = f"Found, and in brackets accepted: {figures}"
        raise kind(f"{name} cannot be trained {how}: its log-probs are not {what}. {figures}.")


def has_plain_head(model: PackedModel, ids: torch.Tensor, limit: float) -> bool:
    """Whether head_difference is at most `limit`. Llama 4's base_model has no hidden states."""
    try:
        return model.call(head_difference, ids).item() <= limit
    except (InputError, AttributeError):
        return False


def plain_logps(model: PackedModel, rows: list[list[list[int]]], attention: str) -> torch.Tensor:
    """Log-probs of the rows' response tokens by the model's own forward with this attention, one
    sequence at a time, nothing packed: (R,) float32, in the order of a MicroBatch's targets."""
    device, hidden, targets = next(model.parameters()).device, [], []
    model.set_attention(attention)
    for prompt, *responses in rows:
        for response in responses:
            ids = torch.tensor([prompt + response], device=device)
            if model.own_logits:
                states = model.model(input_ids=ids, use_cache=False).logits[0]
            else:
                states = model.model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0]
            hidden.append(states[len(prompt) - 1 : -1])
            targets.append(ids[0, len(prompt) :])
    model.set_attention()
    hidden, targets = torch.cat(hidden), torch.cat(targets)
    if model.own_logits:
        return hidden.float().log_softmax(dim=-1).gather(1, targets[:, None])[:, 0]
    return model.token_logps(hidden, targets)


def own_difference(model: PackedModel, rows: list[list[list[int]]]) -> float:
    """Largest difference of log-probs between the model's own attention implementation and the
    eager one, on the last 2,000 tokens of prompts: eager attention holds every score."""
    cut = [[prompt[-2000:], *responses] for prompt, *responses in rows]
    eager, own = (model.call(plain_logps, cut, a) for a in ("eager", model.stock_attention))
    return (eager - own).abs().max().item()


def head_difference(model: PackedModel, ids: torch.Tensor) -> torch.Tensor:
    """How far, in the model's own forward, its head's input is from the last hidden states, and its
    logits are from the head's output with the model's scale and cap, relative to them: only
    rounding. MiniCPM3's scale is that of the head's input instead. (n,) int64 → () tensor. Raises
    InputError if the head is not a plain linear layer, of which training uses the weight and the
    bias."""
    head, seen = model.model.get_output_embeddings(), {}
    if type(head).forward is not torch.nn.Linear.forward:
        raise InputError(f"its head, a {type(head).__name__}, has a forward of its own")
    watch = lambda module, args, output: seen.update(input=args[0], output=output)  # noqa: E731
    hook = head.register_forward_hook(watch)
    model.set_attention(model.stock_attention)
    hidden = model.model.base_model(input_ids=ids[None], use_cache=False).last_hidden_state
    logits = model.model(input_ids=ids[None], use_cache=False).logits.float()
    model.set_attention()
    hook.remove()
    scale, errors = model.logit_scale, []
    for before, after in ((1.0, scale), (scale, 1.0)):
        shaped = shape_logits(seen["output"].float().clone(), after, model.logit_cap)
        pairs = ((seen["input"].float(), hidden.float() * before), (logits, shaped))
        errors.append(torch.stack([(x - y).abs().max() / y.abs().max() for x, y in pairs]).max())
    return torch.stack(errors).min()


def attention_difference(model: PackedModel, batch: MicroBatch) -> torch.Tensor:
    """The largest attention_error of any layer, with the layer's own window and with one that
    shows. Raises InputError if layers do not use transformers' attention interface."""
    errors = []

    def checked(module, q, k, v, attention_mask, scaling=None, sliding_window=None, **kwargs):
        for window in (sliding_window, 5):
            errors.append(attention_error(q, k, v, scaling, window, batch))
        return packed_attention(module, q, k, v, None, scaling, sliding_window, **kwargs)

    AttentionInterface.register("checked", checked)
    model.set_attention("checked")
    model(batch)
    model.set_attention()
    if not errors:
        raise InputError("its layers do not use transformers' attention interface")
    return torch.stack(errors).max()


def attention_error(query, key, value, scaling, window, micro_batch: MicroBatch) -> torch.Tensor:
    """Of packed_attention and its gradients, in the dtype of its arguments, against
    masked_attention in float32: the largest difference relative to the largest value, () float32.
    """
    direction, results = torch.randn_like(query[..., : value.shape[-1]]).transpose(1, 2), []
    for attend, dtype in ((packed_attention, query.dtype), (masked_attention, torch.float32)):
        inputs = [x.detach().to(dtype).requires_grad_() for x in (query, key, value)]
        with torch.enable_grad():
            out, _ = attend(None, *inputs, None, scaling, window, micro_batch=micro_batch)
            results.append((out, *torch.autograd.grad(out, inputs, direction.to(dtype))))
    errors = [(ours - exact).abs().max() / exact.abs().max() for ours, exact in zip(*results)]
    return torch.stack(errors).max()


def masked_attention(module, query, key, value, attention_mask, scaling, window, micro_batch):
    """What packed_attention computes, by one dense mask over the whole row. Arguments and result
    are packed_attention's."""
    position = micro_batch.position_ids
    sizes = torch.tensor(micro_batch.segments, device=query.device)
    part = torch.arange(sizes.numel(), device=query.device)
    part = part.repeat_interleave(sizes.flatten(), output_size=len(position))
    row, part = part // sizes.shape[1], part % sizes.shape[1]  # part: 0 is the prompt
    visible = (row[:, None] == row) & ((part == 0) | (part[:, None] == part))
    distance = position[:, None] - position
    visible &= (distance >= 0) & (distance < (window or len(position)))
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    weights = scores.masked_fill(~visible, float("-inf")).softmax(dim=-1)
    return (weights @ value).transpose(1, 2), None
