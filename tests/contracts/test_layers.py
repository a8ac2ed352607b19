"""The plan of the house, checked: imports go one way, every module imports, and every method is described."""

import ast
import dataclasses
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import nmprune
from nmprune import methods

SRC = Path(nmprune.__file__).parent
ROOT = SRC.parents[1]

# Row of every room; a module imports lower rows and its own room. Change it together with the table in the docs.
ROWS = [
    ["pattern", "ranking", "errors", "results", "threads", "heap", "version"],
    ["masks", "sampling", "stats", "least_squares", "distributed", "architectures"],
    ["methods", "calibration", "checkpoint", "packed", "kernels"],
    ["refine"],
    ["stream", "train"],
    ["prepare"],
    ["evaluate", "export", "runtime", "report"],
    ["run"],
    ["cli"],
]
ROW_OF = {room: row for row, rooms in enumerate(ROWS) for room in rooms}
FOR_EVERYONE = {"errors", "version"}  # the floor of row 0
ONLY_TORCH = {*ROWS[0], *ROWS[1], "methods", "refine"}  # rooms that import torch and the standard library alone
DOORS = {"", "__main__"}  # nmprune/__init__.py and __main__.py: public names, no room of their own
LAZY = {"cli", ""}  # may import inside functions, to start quickly
FORBIDDEN = {"utils", "util", "helpers", "helper", "common", "core", "manager", "misc"}

FILES = sorted(SRC.rglob("*.py"))


def dotted(file):
    """The module name below nmprune: "" for nmprune itself, "methods.wanda"."""
    return ".".join(file.relative_to(SRC).with_suffix("").parts).removesuffix("__init__").removesuffix(".")


def room_of(module):
    return module.split(".")[0]


MODULES = {dotted(file): file for file in FILES}


def modules(chosen):
    return pytest.mark.parametrize("module", [m for m in MODULES if chosen(room_of(m))])


def imported(node, module, is_package):
    """Absolute dotted names that one import statement reaches."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if not node.level:
        origin = node.module
    else:
        parts = ["nmprune", *filter(None, module.split("."))]
        parts = parts[: len(parts) - node.level + is_package]
        origin = ".".join([*parts, *([node.module] if node.module else [])])
    # "from nmprune import masks" reaches the room masks
    return [f"nmprune.{alias.name}" for alias in node.names] if origin == "nmprune" else [origin]


def imports(module):
    """(statement, dotted name, is it inside a function) for every import of a module."""
    file = MODULES[module]
    tree = ast.parse(file.read_text())
    functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)]
    inside = {id(child) for function in functions for child in ast.walk(function)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            for name in imported(node, module, file.name == "__init__.py"):
                yield node, name, id(node) in inside


def test_the_walk_sees_the_package():
    assert {"masks", "methods", "methods.wanda"} <= set(MODULES)
    assert "nmprune.masks" in {name for _, name, _ in imports("methods.wanda")}


def test_every_module_lives_in_a_room_of_the_plan():
    unknown = {room_of(m) for m in MODULES} - set(ROW_OF) - DOORS
    assert not unknown, f"{unknown} not in the table; if a room is missing, name it in architecture and here"


@modules(lambda room: room not in DOORS)
def test_imports_go_one_way(module):
    room = room_of(module)
    for node, name, _ in imports(module):
        if name.split(".")[0] != "nmprune":
            continue
        target = name.removeprefix("nmprune").removeprefix(".").split(".")[0]
        where = f"{MODULES[module].relative_to(ROOT)}:{node.lineno} imports {name}"
        assert target in ROW_OF, f"{where}, which is no room"
        if target == room or target in FOR_EVERYONE:
            continue
        assert ROW_OF[target] < ROW_OF[room], f"{where}: row {ROW_OF[room]} may import only rows below it"


@modules(lambda room: room in ONLY_TORCH)
def test_low_rooms_import_torch_and_the_standard_library_alone(module):
    allowed = {*sys.stdlib_module_names, "torch", "nmprune"}
    foreign = {name for _, name, _ in imports(module) if name.split(".")[0] not in allowed}
    assert not foreign


@modules(lambda room: room not in LAZY)
def test_no_internal_import_hides_in_a_function(module):
    hidden = [
        f"line {n.lineno}: {name}" for n, name, inside in imports(module) if inside and name.startswith("nmprune")
    ]
    assert not hidden


def test_no_names_that_say_nothing():
    words = {word for path in (*FILES, *(f.parent for f in FILES)) for word in path.stem.split("_")}
    assert not words & FORBIDDEN


@modules(lambda room: room != "__main__")
def test_every_module_imports(module):
    importlib.import_module(f"nmprune.{module}".removesuffix("."))


def test_import_nmprune_is_light():
    heavy = ["transformers", "accelerate", "datasets", "typer", "rich", "pyarrow", "yaml"]
    program = f"import sys, nmprune; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("name", methods.METHODS)
def test_every_method_is_described(name):
    method = methods.METHODS[name]
    assert method.name == name
    assert method.__module__ == f"nmprune.methods.{name}", "one paper = one file, named as the method"
    assert 20 <= len(method.summary) <= 100 and method.summary.endswith(".")
    assert any(word in method.paper for word in ("arXiv", "doi", "OpenReview", "ours: "))
    page = (ROOT / "docs" / "methods" / f"{name}.md").read_text()
    assert page.startswith(f"# {name}\n")
    if not method.paper.startswith("ours: "):
        sites = {"arXiv": "arxiv.org/abs/", "doi": "doi.org/", "OpenReview": "openreview.net/forum?id="}
        site = next(site for word, site in sites.items() if word in method.paper)
        assert f"{site}{method.paper.split()[-1]}" in page
    for field in dataclasses.fields(method):
        help_text = field.metadata.get("help", "")
        assert len(help_text) > 10, f"{name}.{field.name} has no help"
        assert f"| `{field.name}` | {field.default} | {help_text} |" in page, (
            f"{name}.{field.name}: page and help differ"
        )


def test_no_page_without_a_method():
    pages = {page.stem for page in (ROOT / "docs" / "methods").glob("*.md")} - {"README", "index"}
    assert pages <= set(methods.METHODS)
