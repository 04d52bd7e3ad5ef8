"""Imports point one way, as the map in CONTRIBUTING.md says: to the mathematics, never back."""

import ast
import functools
import itertools
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "amp_hf"
MEASURING = {"flatness", "loss_function", "metrics", "pictures"}
TASKS = {"images", "text"}  # which share the job, and know nothing of each other
ABOVE = TASKS | {"job"}
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
        own = ABOVE & {module.parts[0]}
        allowed = own | MEASURING if own or module.stem in MEASURING else set()
        if own & TASKS:
            allowed |= {"job"}
        against[str(module)] = imported(module) & (ABOVE | MEASURING) - allowed
    assert {module: names for module, names in against.items() if names} == {}


def below(name):
    """All that the module or package of that name imports, also by way of others."""
    graph = imports_by_name()
    found, left = set(), [name]
    while left:
        new = graph[left.pop()] - found
        found |= new
        left += new
    return found


@functools.cache
def imports_by_name():
    graph = {}
    for module in MODULES:
        if module.parts[0] != "__init__":
            graph.setdefault(module.parts[0], set()).update(imported(module))
    return {name: (names - {name}) & graph.keys() for name, names in graph.items()}


def test_no_module_imports_itself_by_way_of_others():
    order = list(TopologicalSorter(imports_by_name()).static_order())  # an error for a cycle
    assert {"config", "trainer", "images"} <= set(order)


@pytest.mark.parametrize(
    "arrows",
    [
        ["images", "job", "trainer", "step", "engine", "perturbation", "blocks"],
        ["step", "parameters", "preserve"],
        ["perturbation", "config"],
        ["trainer", "card", "record"],
        ["text", "job", "flatness"],
        ["job", "pictures"],
    ],
    ids=" -> ".join,
)
def test_the_arrows_of_the_map_are_there(arrows):
    for above, name in itertools.pairwise(arrows):
        assert name in below(above)
        assert above not in below(name)


def test_the_mathematics_and_the_card_know_nothing_of_the_trainer():
    assert below("perturbation") == {"blocks", "compat", "config"}
    assert below("config") == below("blocks") == below("compat") == set()
    assert below("card") & {"trainer", "step", "engine"} == set()
    assert below("trainer") & (ABOVE | MEASURING) == set()


@pytest.mark.slow
def test_importing_the_config_loads_no_torch_and_what_is_below_loads_nothing_from_above():
    """One process, in which each import finds what those before it have left."""
    steps = [
        ("import amp_hf.config", ["torch", "transformers"]),
        ("from amp_hf import AMPConfig", ["torch", "transformers"]),
        ("import amp_hf.perturbation", ["transformers", "accelerate"]),
        (
            "from amp_hf import AMPTrainer",
            [f"amp_hf.{name}" for name in sorted(ABOVE | MEASURING)] + ["timm", "matplotlib"],
        ),
    ]
    script = "import sys\n" + "\n".join(
        f"{statement}\nprint([name for name in {absent} if name in sys.modules])"
        for statement, absent in steps
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "[]\n" * len(steps), "")


def test_the_networks_that_travel_with_their_weights_import_nothing_of_amp_hf():
    assert imported(Path("images/models")) == set()
