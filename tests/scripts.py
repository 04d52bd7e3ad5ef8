"""Recipes and measuring scripts, run in this process; pyproject.toml puts them on the path."""

import runpy
import sys
from pathlib import Path

import pytest

RECIPES = Path(__file__).parent.parent / "recipes"


def run_here(script, monkeypatch, *words):
    """Runs the file `script` as a process of its own would, without starting one."""
    monkeypatch.setattr(sys, "argv", list(map(str, [script, *words])))
    runpy.run_path(str(script), run_name="__main__")


def main_of(script, monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", [script.__name__, *map(str, words)])
    script.main()


def error_of(script, monkeypatch, *words):
    """The one line that a script ends with, after its name."""
    with pytest.raises(SystemExit) as exit:
        main_of(script, monkeypatch, *words)
    (line,) = str(exit.value.code).splitlines()  # printed by Python, which then exits with 1
    name, error, said = line.partition(": error: ")
    assert (name, error) == (f"{script.__name__}.py", ": error: ")
    return said
