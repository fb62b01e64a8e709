"""The rooms: who imports whom. The method is four files; what a run needs stands beside it."""

import ast
import subprocess
import sys

import pytest
from conftest import ROOT

METHOD = ("train", "loss", "data", "model")
FILES = {name: ROOT / f"{name}.py" for name in METHOD}
FILES |= {f"runtime.{path.stem}": path for path in (ROOT / "runtime").glob("[a-z]*.py")}
ELSEWHERE = ("demo", "eval", "benchmarks", "forks", "tests")


def imports(path) -> set[str]:
    """The modules that a file imports when it is imported."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("name", FILES)
def test_the_core_imports_nothing_of_other_rooms(name):
    found = imports(FILES[name])
    assert not {part for module in found for part in [module.split(".")[0]]} & {*ELSEWHERE}
    assert name == "train" or "train" not in found


def test_no_two_files_need_each_other():
    needs = {name: imports(path) & FILES.keys() for name, path in FILES.items()}
    assert needs["model"] >= {"data"} and needs["loss"] == set()
    while needs:
        free = [name for name in needs if not needs[name] & needs.keys()]
        assert free, f"a circle among {sorted(needs)}"
        for name in free:
            del needs[name]


def test_each_file_can_be_imported_alone():
    code = "import importlib, sys; importlib.import_module(sys.argv[1])"
    for name in ("loss", "runtime.errors", "runtime.rows", "data"):
        done = subprocess.run([sys.executable, "-c", code, name], cwd=ROOT, capture_output=True)
        assert done.returncode == 0, done.stderr
