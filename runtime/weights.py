"""A model between files and shards: where its files are, its tokenizer and config, reading weights
into a sharded model, and the export."""

import copy
import functools
import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import transformers
import yaml
from huggingface_hub import snapshot_download, split_torch_state_dict_into_shards
from safetensors import safe_open
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    AutoTokenizer,
    GenerationConfig,
)
from transformers.core_model_loading import revert_weight_conversion

from runtime.cache import asked_once, cache_folder, files_digest, locked, seal
from runtime.errors import InputError
from runtime.templates import end_of_turn

# Of a model: no weights. README.md names its licence.
SMALL_FILES = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "README.md")
# Of a tokenizer, and of a processor of images or sound.
TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*")
TOKENIZER_FILES += ("merges.txt", "*.model", "*.tiktoken", "chat_template*", "*processor*.json")
FINAL_DIGESTS = "final.json"  # beside final/: the digests of its files
FILE_BYTES = 2**30  # of an exported file, unless one tensor is larger


# ---- Where the files are -------------------------------------------------------------------------


def resolve_model(name: str) -> str:
    """The folder of a model: for a hub id, or one at a commit, tag or branch as `id@revision`, the
    one into which its files but the weights are fetched. Raises InputError as local_model, and if
    the hub does not give the files."""
    name = local_model(name)
    hub_id, _, revision = name.partition("@")
    if Path(hub_id).is_dir() and revision and not Path(name).is_dir():
        raise InputError(f"{name}: a folder has no revisions")
    return name if Path(name).is_dir() else fetch(hub_id, SMALL_FILES, revision or None)


def local_model(name: str) -> str:
    """A hub id or a folder as it is; for "demo" the folder of the demo's model. Raises InputError
    for a name that can only be a folder's, if there is none, and for the folder of a run, whose
    model is in its final/."""
    if name == "demo":
        from demo.smollm2 import demo_model

        return demo_model()
    path, hub_id = Path(name), name.partition("@")[0]
    local = hub_id.count("/") != 1 or name[0] in "/.~" or Path(hub_id).parent.is_dir()
    if "/" in name and local and not path.is_dir():  # no ORG/NAME of the hub
        raise InputError(f"{name}: there is no such folder")
    if (path / "final").is_dir() and not (path / "config.json").exists():
        raise InputError(f"{name}: the model of this run is in {path / 'final'}")
    return name


@functools.cache
def fetch(name: str, patterns: tuple[str, ...], revision: str | None = None) -> str:
    """The folder of a hub id, with the files of these patterns. Of the ranks that torchrun starts
    on a node, one asks the hub. Raises InputError if it cannot."""

    def ask() -> str:
        # Mistral's "consolidated" files are a second copy of the same weights.
        ignored = ["*/*", "consolidated*"]
        options = {"allow_patterns": [*patterns], "ignore_patterns": ignored}
        try:
            return snapshot_download(name, revision=revision, **options)
        except Exception as error:  # not there, a licence not accepted, no network
            raise InputError(f"{name}: the model cannot be fetched: {error}") from error

    return asked_once((name, patterns, revision), ask)


def hub_snapshot(folder: str) -> tuple[str, str] | None:
    """The hub id and the commit of a folder that fetch gave; None for any other folder."""
    path = Path(folder)  # as huggingface_hub names it
    if "/models--" in folder and path.parent.name == "snapshots":
        return path.parents[1].name.removeprefix("models--").replace("--", "/"), path.name
    return None


def load_config(name: str):
    """The config of a folder or hub id. Never runs code that comes with it. Raises InputError if
    transformers can make nothing of it."""
    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # not there, cut off, a kind of model that it does not know
        raise InputError(f"{name}: its config.json cannot be used: {error}") from error


def model_class(config):
    """The class of transformers that loads a config's model whole: with its parts for images or
    sound, if it has any."""
    # (Not a name of this module: the code's digest would import all kinds of this mapping.)
    multimodal = type(config) in transformers.MODEL_FOR_MULTIMODAL_LM_MAPPING
    return AutoModelForMultimodalLM if multimodal else AutoModelForCausalLM


def load_tokenizer(name: str, chat_template: str = "", template_args: str = ""):
    """The tokenizer of a hub id or local folder, with the chat template of the file chat_template
    in place of its own, whose variables are set by template_args (see set_variables), and as
    `stop_ids` the tokens at which the model's generation ends. Never runs code that comes with it.
    Raises InputError if one of them cannot be read."""
    try:
        # mistral_format: the tokenizer of mistral-common, where that is installed, has no template.
        options = {"trust_remote_code": False, "mistral_format": False}
        tokenizer = AutoTokenizer.from_pretrained(name, **options)
        beside = Path(name) / "chat_template.json"  # a multimodal model's, of its processor
        if not tokenizer.chat_template and beside.exists():
            tokenizer.chat_template = json.loads(beside.read_text())["chat_template"]
        if chat_template:
            tokenizer.chat_template = Path(chat_template).read_text()
        if template_args:
            tokenizer.chat_template = set_variables(tokenizer.chat_template or "", template_args)
        tokenizer.stop_ids = stop_ids(name)
        return tokenizer
    except InputError:
        raise
    except Exception as error:  # transformers raises KeyError, and tokenizers Exception itself
        raise InputError(f"no tokenizer can be loaded from {name}: {error}") from error


def set_variables(template: str, values: str) -> str:
    """A chat template in which variables are set, "enable_thinking=false" or several by commas: the
    exported model has it, and is used as it was trained. Raises InputError for one that the
    template does not read."""
    lines = ""
    for part in filter(None, values.replace(" ", "").split(",")):
        name, _, value = part.partition("=")
        if not re.search(rf"\b{re.escape(name)}\b", template) or not name.isidentifier():
            raise InputError(f"template_args: the chat template has no variable '{name}'")
        value = yaml.safe_load(value)
        if not isinstance(value, bool | int | float | str):
            raise InputError(f"template_args: {part} must be true, false, a number or a word")
        lines += f"{{% set {name} = {json.dumps(value)} +%}}"
    return lines + template


def stop_ids(name: str) -> list[int]:
    """The tokens at which the generation config of a hub id or local folder ends an answer."""
    try:
        ends = GenerationConfig.from_pretrained(name).eos_token_id
    except OSError:  # it has none
        return []
    return [token for token in (ends if isinstance(ends, list) else [ends]) if token is not None]


def tokenizer_digests(tokenizer) -> dict[str, str]:
    """SHA-256 of what tokenizes and of the chat template: the same for the same tokens."""
    if tokenizer.is_fast:
        vocabulary = tokenizer.backend_tokenizer.to_str()
    else:
        vocabulary = str(sorted(tokenizer.get_vocab().items()))
    parts = {"tokenizer": vocabulary + str(tokenizer.special_tokens_map)}
    parts["chat template"] = str(tokenizer.chat_template)
    return {name: hashlib.sha256(text.encode()).hexdigest() for name, text in parts.items()}


def fetch_weights(name: str) -> str:
    """The folder of resolve_model with the weight files; those of a hub id are fetched, in one
    format only. Raises InputError if there are none."""
    folder = Path(name)
    for kind in ("*.safetensors", "*.bin"):
        if snapshot := hub_snapshot(name):
            fetch(snapshot[0], (kind,), snapshot[1])
        if any(folder.glob(kind)):
            return name
    raise InputError(f"{name}: no weights (.safetensors or .bin) are there")


def model_fingerprint(name: str) -> str:
    """SHA-256 over the weight files and the config of a folder or hub id."""
    folder = Path(fetch_weights(name))
    weights = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    return files_digest([folder / "config.json", *weights])


def weights_folder(name: str, needed: dict[str, torch.Tensor]) -> str:
    """A folder that holds the tensors `needed` (see stored_tensors) of a folder or hub id as
    safetensors: the folder itself (a hub id's is fetched) or, where its files are of another kind
    or name their tensors otherwise, a copy in the cache, converted once for each version of
    transformers. Any number of processes may call this at a time; they wait at a file lock and not
    in a collective.

    Raises InputError if weights are quantized, missing, there twice, or do not fit the config.
    """
    folder, config = fetch_weights(name), load_config(name)
    # They may have a plain model's names and shapes: their 8-bit values would be read as weights.
    if getattr(config, "quantization_config", None):
        raise InputError(f"{name}: its weights are quantized; give the model before quantization")
    stored = in_files(folder)
    twice = [key for key in needed if key in stored and len(stored[key].chunks) > 1]
    if twice:
        raise InputError(f"{folder}: more than one .safetensors file holds {twice[0]}: remove one")
    if all(key in stored and stored[key].size == value.shape for key, value in needed.items()):
        return folder
    return converted_folder(name)


def in_files(folder: str) -> dict:
    """{name: metadata} of the tensors in a folder's safetensors, as DCP gives it; {} if there are
    none, or if they are broken."""
    try:
        return dcp.HuggingFaceStorageReader(folder).read_metadata().state_dict_metadata
    except Exception:  # transformers will say what is wrong with them
        return {}


def converted_folder(name: str) -> str:
    """The folder in the cache with the weights of a folder or hub id as transformers loads them.
    Raises InputError if they do not fit the config."""
    # Versions of transformers name tensors differently.
    converted = cache_folder("weights") / f"{model_fingerprint(name)}-{transformers.__version__}"
    with locked(converted) as intact:
        if not intact:
            try:
                whole, info = model_class(load_config(name)).from_pretrained(
                    name,
                    dtype=torch.float32,
                    output_loading_info=True,
                    ignore_mismatched_sizes=True,  # the error below names them
                    trust_remote_code=False,
                )
            except Exception as error:
                raise InputError(f"{name}: the weights cannot be used: {error}") from error
            if info["missing_keys"] or info["mismatched_keys"]:
                raise InputError(f"{name}: weights are missing or of the wrong shape: {info}")
            tensors = {key: value.contiguous() for key, value in stored_tensors(whole).items()}
            converted.mkdir()
            save_file(tensors, converted / "model.safetensors", metadata={"format": "pt"})
            seal(converted)
    return str(converted)


# ---- Files → shards ----------------------------------------------------------------------------


def stored_tensors(model) -> dict[str, torch.Tensor]:
    """The tensors of a transformers model that its files hold, by name; tied ones once."""
    names = model.state_dict().keys()
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in names}
    return dict(model.named_parameters()) | buffers


def other_parts(model) -> dict[str, torch.nn.Parameter]:
    """The parameters of a multimodal transformers model that text does not reach, by name: its
    parts for images and sound."""
    if model_class(model.config) is not AutoModelForMultimodalLM:
        return {}
    parts = (model.get_decoder(), model.get_input_embeddings(), model.get_output_embeddings())
    text = {parameter for part in parts if part is not None for parameter in part.parameters()}
    return {name: p for name, p in model.named_parameters() if p not in text}


def lost_in_loading(model) -> set[str]:
    """What a transformers model on "meta" has that loading gives it anew, or not at all: buffers,
    hooks and attributes of parameters, and parameters of two modules."""
    found, parameters = {f"the buffer {name}" for name, _ in model.named_buffers()}, set()
    for prefix, module in model.named_modules():
        for key, parameter in module.named_parameters(recurse=False):
            name = f"{prefix}.{key}".lstrip(".")
            if parameter in parameters:
                found.add(f"{name}, another module's parameter")
            parameters.add(parameter)
            found |= {f"the attribute {attribute} of {name}" for attribute in vars(parameter)}
            if parameter._backward_hooks or parameter._post_accumulate_grad_hooks:
                found.add(f"a hook of {name}")
    return found


def check_surgery(model, needed: dict[str, torch.Tensor], before: set[str]) -> None:
    """Raise InputError, naming it, for a tensor of the files that `surgery` has taken out, renamed
    or reshaped, for what it has added and loading loses, and if all is frozen.

    model: a transformers model after the surgery; needed, before: its stored_tensors and
    lost_in_loading before.
    """
    found, parameters = stored_tensors(model), dict(model.named_parameters())
    for name, tensor in needed.items():
        if name not in found or found[name].shape != tensor.shape:
            shape = [*tensor.shape]
            raise InputError(
                f"surgery() must leave {name}, of shape {shape}: it is read from files"
            )
    if lost := sorted(lost_in_loading(model) - before):
        problem = f"surgery() adds {lost[0]}, which loading would lose"
        raise InputError(f"{problem}: add parameters, frozen ones where they are constants")
    if not any(parameter.requires_grad for parameter in parameters.values()):
        raise InputError("nothing is trained: surgery() has frozen every parameter")


def first_values(model, needed: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Values of the parameters that `surgery` has added, which no file holds: the module that owns
    one gives it by its `reset_parameters`. Whole tensors on the CPU from torch's generator, so that
    they are the same for any number of ranks. Raises InputError for one without that method, and
    for one to which that method gives no values.

    model: a transformers model on "meta"; needed: what the files hold, by name.
    """
    values, added = {}, {name for name, _ in model.named_parameters()} - needed.keys()
    for prefix, module in model.named_modules():
        names = {n: f"{prefix}.{n}".lstrip(".") for n, _ in module.named_parameters(recurse=False)}
        mine = {n: name for n, name in names.items() if name in added}
        if mine and not hasattr(module, "reset_parameters"):
            problem = f"surgery() adds {[*mine.values()][0]}, and no file has its values"
            raise InputError(f"{problem}: its module needs a method reset_parameters")
        if mine:
            whole = copy.deepcopy(module).to_empty(device="cpu", recurse=False)
            for parameter in whole.parameters(recurse=False):
                if parameter.is_floating_point():
                    parameter.detach().fill_(math.nan)
            whole.reset_parameters()
            if left := [name for n, name in mine.items() if whole.get_parameter(n).isnan().any()]:
                problem = f"reset_parameters of its module gives {left[0]} no values"
                raise InputError(f"{problem}, or those of weights that are not read yet")
            values |= {name: whole.get_parameter(n).detach() for n, name in mine.items()}
    return values


def own_buffers(model) -> dict[str, torch.Tensor]:
    """The floating-point buffers, by name, of modules whose class is neither of transformers nor,
    as FSDP's are, derived from one: nothing but a file gives them their values."""
    return {
        f"{prefix}.{name}".lstrip("."): buffer
        for prefix, module in model.named_modules()
        if not any(kind.__module__.startswith("transformers.") for kind in type(module).__mro__)
        for name, buffer in module.named_buffers(recurse=False)
        if buffer.is_floating_point()
    }


@torch.no_grad()
def read_weights(model, folder: str, values: dict[str, torch.Tensor]) -> None:
    """Read a folder of weights_folder into a transformers model, every rank only its own shards,
    and set what no file holds: `values` of first_values, and buffers such as rotary frequencies.
    Collective.

    Raises InputError if the config ties weights that differ in the file, if one is not finite, if
    nothing gives a buffer of a fork's module its values, or if the model cannot be sharded.
    """
    for parameter in model.parameters():
        parameter._is_hf_initialized = True  # so that transformers only sets the buffers
    for buffer in own_buffers(model).values():
        buffer.fill_(math.nan)
    try:
        model.initialize_weights()
    except Exception as error:  # of a model whose own first values are not made for shards
        raise InputError(
            f"a {model.config.model_type} model cannot be sharded: {error!r}"
        ) from error
    read = functools.partial(dcp.HuggingFaceStorageReader, folder)
    stored, parameters = stored_tensors(model), dict(model.named_parameters())
    for name, value in values.items():
        parameter = stored.pop(name)
        value = value.to(parameter.device)
        if isinstance(parameter, DTensor):
            placed = (parameter.device_mesh, parameter.placements)
            value = distribute_tensor(value, *placed, src_data_rank=None)
        parameter.copy_(value)
    dcp.load(stored, storage_reader=read())
    for name, tensor in stored.items():
        total = tensor.sum()
        if total.isnan() or total.isinf() and name in parameters:  # a buffer may be a limit
            raise InputError(f"{folder}: {name} is not finite: its file is damaged")
    if left := [name for name, buffer in own_buffers(model).items() if buffer.isnan().any()]:
        raise InputError(f"nothing gives the buffer {left[0]} its values: make it a parameter")
    known = model.state_dict().keys() - stored.keys() - values.keys()
    for name in sorted(in_files(folder).keys() & known):
        parameter = model.get_parameter(name)  # tied to another one, and in the file, too
        other = torch.empty_like(parameter)
        dcp.load({name: other}, storage_reader=read())
        if not torch.equal(parameter, other):  # the whole tensors, also if they are sharded
            raise InputError(f"{folder}: the config ties {name}, the file holds another one")


# ---- Shards → files ----------------------------------------------------------------------------


def write_model(
    model,
    name: str,
    tokenizer,
    folder: Path,
    dtype: torch.dtype,
    card: str,
    read: Callable | None,
) -> None:
    """Write a transformers model, its tokenizer with chat template, and its generation config to
    `folder` in Hugging Face format, with the parameters in `dtype`; buffers and other_parts as in
    the folder `name`, from which the model was loaded. `card`
    is README.md, if any; `read` gives a tensor by its name, of a model on "meta". Collective; the
    folder appears whole. Raises FloatingPointError if a parameter is not finite.
    """
    scratch = folder.with_name(folder.name + ".part")
    tensors, parameters = stored_tensors(model), dict(model.named_parameters())
    text, source = parameters.keys() - other_parts(model).keys(), in_files(name)
    dtypes = {key: dtype if key in text else tensor.dtype for key, tensor in tensors.items()}
    ignored = not_loaded(model, source)
    with torch.device("meta"):
        shapes = {key: torch.empty(t.shape, dtype=dtypes[key]) for key, t in tensors.items()}
        shapes |= {key: torch.empty(t.size, dtype=t.properties.dtype) for key, t in ignored.items()}
    files = split_torch_state_dict_into_shards(shapes, max_shard_size=FILE_BYTES)
    if dist.get_rank() == 0:
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
    weight_map, size = {}, 0
    for file, names in files.filename_to_tensors.items():
        whole = {}
        for key in names:  # one tensor at a time is whole, and one file in rank 0's memory
            if key in ignored:
                continue
            tensor = read(key) if read else tensors[key].detach()
            tensor = tensor.to(dtypes[key])
            tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            if key in parameters and not tensor.isfinite().all():
                raise FloatingPointError(f"{key} is not finite: nothing is exported")
            whole |= {key: tensor.cpu().contiguous()} if dist.get_rank() == 0 else {}
        if dist.get_rank() == 0:
            kept = {key: whole.pop(key) for key in [*whole] if key not in text}
            # To the names of published files.
            whole, kept = (revert_weight_conversion(model, part) for part in (whole, kept))
            for key, tensor in kept.items():
                whole[key] = tensor.to(source[key].properties.dtype) if key in source else tensor
            whole |= read_as_stored(name, ignored.keys() & {*names})
            size += sum(tensor.nbytes for tensor in whole.values())
            save_file(whole, scratch / file, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(whole, file)
    if dist.get_rank() == 0:
        if files.is_sharded:
            index = {"metadata": {"total_size": size}, "weight_map": weight_map}
            (scratch / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
        write_config(model, name, scratch, dtype)
        for path in scratch.glob("*.safetensors"):  # safetensors makes them for their owner alone
            path.chmod((scratch / "config.json").stat().st_mode)
        write_tokenizer(tokenizer, name, scratch)
        if card:
            (scratch / "README.md").write_text(card)
        # As text: transformers refuses to save some of the generation configs that it loads.
        generation = generation_config(name, end_of_turn(tokenizer)[0])
        generation = json.dumps(generation, indent=2)
        (scratch / "generation_config.json").write_text(generation)
        seal(scratch, folder.with_name(f"{folder.name}.json"))
        os.sync()  # a run that has final/, be it empty after a power cut, is never continued
        os.rename(scratch, folder)
    dist.barrier()


def not_loaded(model, source: dict) -> dict:
    """Of the in_files of a transformers model, those that it does not load, as heads that draft
    several tokens: the export has them as they came, for the tools that use them."""

    def published(tensors: dict) -> set[str]:
        shapes = {name: torch.empty(t.shape, device="meta") for name, t in tensors.items()}
        return {*revert_weight_conversion(model, shapes)}

    if not published(stored_tensors(model)) <= source.keys():  # they name tensors otherwise
        return {}
    known = published(model.state_dict())  # with tied ones, whose old values must not be kept
    return {name: tensor for name, tensor in source.items() if name not in known}


def read_as_stored(folder: str, names: set[str]) -> dict[str, torch.Tensor]:
    """Tensors of a folder's safetensors."""
    found = {}
    for path in Path(folder).glob("*.safetensors") if names else ():
        with safe_open(path, "pt") as file:
            found |= {name: file.get_tensor(name) for name in names & {*file.keys()}}
    return found


def write_config(model, name: str, folder: Path, dtype: torch.dtype) -> None:
    """The config.json that came with the model, for its dtype, and without a reference to code:
    another version of transformers would write other keys, which older ones and other tools do not
    know."""
    config = json.loads((Path(name) / "config.json").read_text())
    written = str(dtype).removeprefix("torch.")
    config.pop("auto_map", None)
    config["architectures"] = [type(model).__name__]
    parts = [config, *(part for part in config.values() if isinstance(part, dict))]
    keys = [(part, key) for part in parts for key in ("dtype", "torch_dtype") if part.get(key)]
    for part, key in keys or [(config, "torch_dtype")]:  # the older name, which all versions read
        part[key] = written
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def write_tokenizer(tokenizer, name: str, folder: Path) -> None:
    """The files of tokenizer and processor that came with the model, with the tokenizer's chat
    template where they have theirs; new ones where it came with none."""
    source = Path(name)
    if not (source / "tokenizer_config.json").exists():
        tokenizer.save_pretrained(folder)
        return
    for file in sorted({file for pattern in TOKENIZER_FILES for file in source.glob(pattern)}):
        shutil.copyfile(file, folder / file.name)
    path, jinja = folder / "tokenizer_config.json", folder / "chat_template.jinja"
    config = json.loads(path.read_text())
    kept = {key: value for key, value in config.items() if key != "auto_map"}
    template = tokenizer.chat_template
    if template != load_tokenizer(name).chat_template:  # by flags: in one place only
        kept.pop("chat_template", None)
        (folder / "chat_template.json").unlink(missing_ok=True)
        if jinja.exists() or "chat_template" not in config:
            jinja.write_text(template)
        else:
            kept["chat_template"] = template
    if kept != config:
        path.write_text(json.dumps(kept, indent=2, ensure_ascii=False) + "\n")


def generation_config(name: str, end: int) -> dict:
    """The generation config that came with the model, made to stop also at the token `end`."""
    try:
        generation = GenerationConfig.from_pretrained(name)
    except OSError:  # it has none
        generation = GenerationConfig.from_model_config(load_config(name))
    ends = generation.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    ends = {token: None for token in (*ends, end) if token is not None}
    return generation.to_diff_dict() | {"eos_token_id": [*ends]}
