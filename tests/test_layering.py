"""Imports only go down: the method does not depend on files or runs, and there are no cycles."""
import ast
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# What the files of each folder may import. The top of the package is the paper's method.
BELOW = {
    "top": {"top"},
    "io": {"top", "io"},
    "evals": {"top", "io", "evals"},
    "runs": {"top", "io", "evals", "runs"},
    "paper": {"top", "io", "evals", "runs", "paper", "beyond"},
    "beyond": {"top", "io", "evals", "runs", "beyond"},
}
WORLD = {"argparse", "io", "json", "os", "pathlib", "pickle", "shutil", "socket", "subprocess",
         "tempfile", "threading", "urllib"}


def module_of(path):
    """lorasae/io/hub.py -> lorasae.io.hub; lorasae/io/__init__.py -> lorasae.io"""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


SOURCES = {module_of(path): path for path in sorted((ROOT / "lorasae").rglob("*.py"))}


def imports_of(path):
    """Every module that a file imports, at its top or inside a function."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports must be absolute"
            for alias in node.names:  # the package's module of that name, if it has one
                inside = f"{node.module}.{alias.name}"
                found.add(inside if inside in SOURCES else node.module)
    return found


IMPORTS = {module: imports_of(path) for module, path in SOURCES.items()}
OURS = {module: {name for name in names if name.split(".")[0] == "lorasae"}
        for module, names in IMPORTS.items()}


def layer(module):
    """A module's folder; "top" for the method's own files, "door" for lorasae/__init__.py."""
    folder = SOURCES[module].parent.name
    return folder if folder != "lorasae" else "door" if module == "lorasae" else "top"


def test_the_source_files_are_found():
    assert {layer(module) for module in SOURCES} == {*BELOW, "door", "top", "bench", "tiny"}
    # found through `from lorasae import topk`
    assert "lorasae.sae" in OURS["lorasae.model"] and "lorasae.topk" in OURS["lorasae.sae"]


@pytest.mark.parametrize("module", [module for module in SOURCES if layer(module) in BELOW])
def test_a_file_imports_only_its_own_folder_and_those_below(module):
    """It imports from the module itself: lorasae/__init__.py is for users."""
    for name in OURS[module]:
        assert name in SOURCES, f"{module} imports {name}, which is not a file"
        assert layer(name) in BELOW[layer(module)], f"{module} imports {name}"


@pytest.mark.parametrize("module", [module for module in SOURCES if layer(module) == "top"])
def test_the_method_uses_no_files_no_network_and_only_tensor_packages(module):
    outside = {name.split(".")[0] for name in IMPORTS[module]} - {"lorasae"}
    assert outside <= {"torch", "numpy", "einops"} | set(sys.stdlib_module_names), outside
    assert not outside & WORLD, outside & WORLD


def test_there_are_no_import_cycles_and_nothing_imports_the_commands():
    TopologicalSorter({module: names & SOURCES.keys() for module, names in OURS.items()}).prepare()
    assert not {"train", "eval"} & set().union(*IMPORTS.values())
