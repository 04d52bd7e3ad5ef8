"""Imports point one way: from the images to the core, never back."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "amp_hf"
MEASURING = {"flatness", "metrics", "pictures"}
TASKS = {"images", "text"}
MODULES = sorted(path.relative_to(PACKAGE).with_suffix("") for path in PACKAGE.rglob("*.py"))


def imported(module):
    """The modules and packages right below amp_hf that `module` imports, wherever in its code.

    What it imports for type checkers alone does not count.
    """
    tree = ast.parse((PACKAGE / module).with_suffix(".py").read_text())
    for_types = {
        node
        for branch in ast.walk(tree)
        if isinstance(branch, ast.If) and ast.unparse(branch.test) == "TYPE_CHECKING"
        for child in branch.body
        for node in ast.walk(child)
    }
    found = set()
    for node in ast.walk(tree):
        if node in for_types:
            continue
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            package = ["amp_hf", *module.parts[:-1]]
            start = package[: len(package) + 1 - node.level] if node.level else []
            start += node.module.split(".") if node.module else []
            names = [".".join([*start, alias.name]) for alias in node.names]
        else:
            continue
        found |= {name.split(".")[1] for name in names if name.startswith("amp_hf.")}
    return found


def test_imports_point_one_way():
    against = {}
    for module in MODULES:
        task = TASKS & {module.parts[0]}
        allowed = task | MEASURING if task or module.stem in MEASURING else set()
        against[str(module)] = imported(module) & (TASKS | MEASURING) - allowed
    assert {module: names for module, names in against.items() if names} == {}


def test_the_search_finds_every_form_of_import():
    assert "trainer" in imported(Path("__init__"))  # from . import …, in a function
    assert {"trainer", "images"} <= imported(Path("images/building"))  # from ..x and from .x


def test_the_networks_that_travel_with_their_weights_import_nothing_of_amp_hf():
    assert imported(Path("images/models")) == set()
