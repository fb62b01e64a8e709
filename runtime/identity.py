"""What a run is made of: its code, and the versions and the commit that the code belongs to."""

import hashlib
import inspect
import re
import subprocess
import sys
from pathlib import Path
from types import CodeType, FunctionType, ModuleType

import datasets
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
    files = {file: Path(file).resolve() for file in sorted(found) if Path(file).is_absolute()}
    core = [found[f] for f, path in files.items() if path.parent in (ROOT, ROOT / "runtime")]
    wanted = [*modules] or core
    for module in wanted:  # which grows
        used = [*vars(module).values()]
        names = {getattr(value, "__module__", None) for value in used}
        used += [other for other in core if other.__name__ in names]
        wanted += [other for other in core if other in used and other not in wanted]
    parts = []
    for module in sorted(wanted, key=lambda module: str(module.__file__)):
        for name, value in sorted(vars(module).items()):
            if name.startswith("__") or isinstance(value, ModuleType):
                continue
            if isinstance(value, type) and value.__module__ == module.__name__:
                members = vars(value).items()
                members = [(k, v) for k, v in sorted(members) if callable(v) or k[:2] != "__"]
                parts += [f"{name}.{key} {describe(member)}" for key, member in members]
            elif not callable(value) or getattr(value, "__module__", "") == module.__name__:
                parts.append(f"{name} {describe(value)}")
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def describe(value) -> str:
    """What a function does, or a constant is, as text that is the same in every process."""
    for inner in ("__func__", "fget", "func", "__wrapped__"):  # of methods, properties, wrappers
        value = getattr(value, inner, value)
    if isinstance(value, FunctionType):
        defaults = describe(value.__defaults__) + describe(value.__kwdefaults__)
        return describe(value.__code__) + defaults
    if isinstance(value, CodeType):
        names = (value.co_names, value.co_varnames, value.co_freevars, value.co_cellvars)
        constants = [*value.co_consts]
        documented = sys.version_info < (3, 13) or value.co_flags & 0x4000000  # CO_HAS_DOCSTRING
        if documented and value.co_flags & inspect.CO_OPTIMIZED and value.co_name[0] != "<":
            # The first constant of a function is its docstring, or, before 3.13, None.
            constants[0] = None if isinstance(constants[0], str) else constants[0]
        return f"{value.co_code.hex()}{names}{describe(constants)}"
    if isinstance(value, dict):
        return "{" + ",".join(f"{k!r}:{describe(v)}" for k, v in value.items()) + "}"
    if isinstance(value, set | frozenset):
        return "{" + ",".join(sorted(map(describe, value))) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(describe, value)) + "]"
    if isinstance(value, re.Pattern):
        return describe((value.pattern, value.flags))
    return repr(value) if isinstance(value, str | bytes | int | float | None) else ""


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
