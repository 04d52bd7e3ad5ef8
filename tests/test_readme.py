"""What the Markdown files say: links, code, settings, and the first table's numbers."""

import dataclasses
import json
import re
import statistics
import subprocess
from pathlib import Path
from urllib.parse import unquote

import pytest

from amp_hf import AMPConfig

ROOT = Path(__file__).parent.parent
PAGES = subprocess.run(
    ["git", "ls-files", "*.md"], cwd=ROOT, capture_output=True, text=True, check=True
).stdout.split()
PAGES = [page for page in PAGES if "template" not in page]


def anchors(text):
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_somewhere(page):
    text = re.sub(r"```.*?```", "", (ROOT / page).read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = unquote(target).partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        assert file.exists(), target
        if anchor:
            assert anchor in anchors(file.read_text()), target


@pytest.mark.parametrize("page", PAGES)
def test_every_block_of_python_compiles(page):
    for block in re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL):
        compile(block, page, "exec")


def test_the_table_of_settings_has_every_field_and_its_default():
    text = (ROOT / "amp_hf/README.md").read_text()
    table = text.partition("## Settings")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)` \| `(.+?)` \|", table, re.MULTILINE)
    fields = dataclasses.fields(AMPConfig)
    assert rows == [(field.name, repr(field.default).replace("'", '"')) for field in fields]


# The settings of the lines of the first table. Those of the short schedule are in two files.
ON_A_GPU = ["gtsrb recipe", "cifar10 recipe"]
LINES = [
    *ON_A_GPU,
    "cifar10 test_resnet full",
    "cifar10 test_resnet",
    "gtsrb test_resnet",
    "gtsrb resnet18",
    "cifar10 test_vit",
    "gtsrb test_vit",
    "gtsrb test_resnet short",
]
SHORT = {"setting": "gtsrb test_resnet short", "row": "AMP"}


def measured(file):
    return json.loads((ROOT / f"recipes/measurements/{file}.json").read_text())["runs"]


@pytest.mark.parametrize("number", range(len(LINES)))
def test_the_first_table_has_the_measured_numbers(number):
    on_a_gpu = LINES[number] in ON_A_GPU
    found = measured("erm_comparison_gpu" if on_a_gpu else "erm_comparison")
    digits = 2 if on_a_gpu else 1
    found += [
        run | SHORT
        for run in measured("frontier")
        if (run["setting"], run["row"]) == ("gtsrb_short", "AMP, ε 0.1")
    ]
    table = re.search(r"\| time \|.*?\n\n", (ROOT / "README.md").read_text(), re.DOTALL)[0]
    _, *lines = table.strip().splitlines()
    cells = [cell.strip() for cell in lines[number].strip("|").split(" | ")][1:]
    for row, cell in zip(("ERM", "AMP()", "AMP", "ERM, 2 × the epochs"), cells, strict=True):
        runs = [run for run in found if (run["setting"], run["row"]) == (LINES[number], row)]
        if not runs:
            assert cell == "not run"
            continue
        accuracies, losses = ([run[key] for run in runs] for key in ("accuracy", "nll"))
        if len(runs) == 1:
            assert cell == f"{100 * accuracies[0]:.1f}<br>{losses[0]:.3f} (n = 1)"
            continue
        accuracies = [100 * accuracy for accuracy in accuracies]
        count = "" if len(runs) == 3 else f" (n = {len(runs)})"
        assert cell == (
            f"{statistics.mean(accuracies):.{digits}f} ± "
            f"{statistics.stdev(accuracies):.{digits}f}<br>"
            f"{statistics.mean(losses):.3f} ± {statistics.stdev(losses):.3f}{count}"
        )
