"""What a run is made of: its code, and the versions and the commit that the code belongs to."""

import functools
import hashlib
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path
from types import CodeType, FunctionType, ModuleType

import datasets
import numpy as np
import torch
import transformers

ROOT = Path(__file__).resolve().parent.parent
VERSIONS = {m.__name__: m.__version__ for m in (torch, transformers, datasets)}


def code_digest(*modules: ModuleType) -> str:
    """SHA-256 over the functions and plain constants of the modules, and of those of the core that
    they import from, as they are in memory; by default of the whole core: this folder and the top
    level. Comments, docstrings and places in a file do not count. It is the same for the same code
    under one version of Python."""
    found = {str(getattr(m, "__file__", "")): m for m in list(sys.modules.values())}
    folders = {ROOT, ROOT / "runtime"}
    core = [found[file] for file in sorted(found) if folder_of(file) in folders]
    wanted = [*modules] or core
    for module in wanted:  # which grows
        used = {id(value) for value in vars(module).values()}
        names = {str(getattr(value, "__module__", "")) for value in vars(module).values()}
        new = [other for other in core if id(other) in used or other.__name__ in names]
        wanted += [other for other in new if other not in wanted]
    parts = []
    for module in sorted(wanted, key=lambda module: str(module.__file__)):
        for name, value in sorted(vars(module).items()):
            if name.startswith("__") or isinstance(value, ModuleType) or value is VERSIONS:
                continue
            imported = callable(value) and getattr(value, "__module__", "") != module.__name__
            if isinstance(value, type) and value.__module__ == module.__name__:
                members = vars(value).items()
                members = [(k, v) for k, v in sorted(members) if callable(v) or k[:2] != "__"]
                parts += [f"{name}.{key} {describe(member)}" for key, member in members]
            elif not imported or isinstance(value, functools.partial):
                parts.append(f"{name} {describe(value)}")
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


@functools.cache
def resolve(folder: str) -> Path:
    """A folder without symbolic links; looked up once, since a process has thousands of modules."""
    return Path(folder).resolve()


def folder_of(file: str) -> Path | None:
    """Where a module's file lies; None for one that is built in."""
    return resolve(os.path.dirname(file)) if os.path.isabs(file) else None


def describe(value, outer: tuple = ()) -> str:
    """What a function does, or a constant is, as text that is the same in every process. outer: the
    ids of what the value is a part of, for parts that hold the whole."""
    if id(value) in outer:
        return ""
    inner = functools.partial(describe, outer=(*outer, id(value)))
    if isinstance(value, functools.partial):
        return inner([value.func, value.args, value.keywords])
    for name in ("__func__", "fget", "func", "__wrapped__"):  # of methods, properties, wrappers
        value = getattr(value, name, value)
    if isinstance(value, FunctionType):
        cells = inspect.getclosurevars(value).nonlocals if value.__closure__ else {}
        return inner([value.__code__, value.__defaults__, value.__kwdefaults__, cells])
    if isinstance(value, CodeType):
        names = (value.co_names, value.co_varnames, value.co_freevars, value.co_cellvars)
        constants = [*value.co_consts]
        documented = sys.version_info < (3, 13) or value.co_flags & 0x4000000  # CO_HAS_DOCSTRING
        if documented and value.co_flags & inspect.CO_OPTIMIZED and value.co_name[0] != "<":
            # The first constant of a function is its docstring, or, before 3.13, None.
            constants[0] = None if isinstance(constants[0], str) else constants[0]
        return f"{value.co_code.hex()}{names}{inner(constants)}"
    if isinstance(value, dict):
        return "{" + ",".join(f"{k!r}:{inner(v)}" for k, v in value.items()) + "}"
    if isinstance(value, set | frozenset):
        return "{" + ",".join(sorted(map(inner, value))) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(inner, value)) + "]"
    if isinstance(value, re.Pattern):
        return inner([value.pattern, value.flags])
    if isinstance(value, torch.Tensor | np.ndarray):
        return f"{value.dtype}{value.tolist()}"
    if isinstance(value, Path):  # the code may lie anywhere
        return str(value.relative_to(ROOT) if value.is_relative_to(ROOT) else value)
    if isinstance(value, type | ModuleType):
        return value.__name__
    own = inner(vars(value)) if hasattr(value, "__dict__") else ""
    return re.sub(r" at 0x\w+", "", repr(value)) + own


def git_state() -> tuple[str, str]:
    """The commit of this checkout, and the difference of its files to that commit, untracked
    Python files included; ("", "") outside a checkout."""

    def git(*command: str) -> str:
        done = subprocess.run(["git", "-C", ROOT, *command], capture_output=True)
        return done.stdout.decode(errors="replace")

    try:
        commit = git("rev-parse", "--verify", "HEAD").strip()
        new = git("ls-files", "--others", "--exclude-standard", "*.py", "*.yaml").split("\n")
        files = [git("diff", "--no-index", "--", "/dev/null", file) for file in filter(None, new)]
        return (commit, git("diff", "HEAD") + "".join(files)) if commit else ("", "")
    except OSError:  # git is not installed
        return "", ""
