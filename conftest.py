"""Lets nbval run notebooks that nbdev_clean has cleaned, and finds the real data for tests."""

import os
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent
collect_ignore_glob = [
    "nbs/course/exercises_*.ipynb"
]  # meant to be filled in; tests/test_exercises.py runs the solutions
# A directive counts only at the top of its cell, where nothing but comments and blank lines stand above it.
EVAL_FALSE = re.compile(r"(?:[ \t]*(?:#.*)?\n)*[ \t]*#[ \t]*\|[ \t]*eval:[ \t]*false\b", re.IGNORECASE)


def pytest_collection_modifyitems(items):
    """Skip cells marked `#| eval: false`, and give cells with stored outputs a count again.

    nbdev_clean nulls every execution count; nbval fails a cell that has outputs but no count
    ("Unrun reference cell"), even where the outputs are not compared.
    """
    for item in items:
        cell = getattr(item, "cell", None)  # only nbval's items have one
        if cell is None:
            continue
        if EVAL_FALSE.match(cell.source):
            item.options["skip"] = True
        if cell.outputs and cell.execution_count is None:
            cell.execution_count = 1


@pytest.fixture(scope="session")
def shared_data():
    """The folder with the real data: ICU_NB_DATA, or shared/data beside this checkout."""
    folder = Path(os.environ.get("ICU_NB_DATA") or ROOT.parent / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"no real data: {folder} is no folder; name one in ICU_NB_DATA")
    return folder
