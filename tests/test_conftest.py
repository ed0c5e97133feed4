"""conftest.py lets nbval run cleaned notebooks and still catches what is wrong in them."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("nbval")
import nbformat
from nbformat.v4 import new_code_cell, new_notebook, new_output

ROOT = Path(__file__).resolve().parents[1]


def printed(text):
    return [new_output("stream", name="stdout", text=text)]


# name -> (source, stored outputs, tags, verdict in lax mode); without execution counts, as after nbdev_clean
CELLS = {
    "eval false is skipped": ("#| eval: false\n1 / 0", [], [], "SKIPPED"),
    "eval false under other directives is skipped": ("#| hide\n#|eval: false\n1 / 0", [], [], "SKIPPED"),
    "eval true is run": ("#| eval: true\nx = 1", [], [], "PASSED"),
    "eval false in a string is run": ("note = '''\n#| eval: false\n'''\nassert x == 1", [], [], "PASSED"),
    "stored output, same": ("print(x)", printed("1\n"), [], "PASSED"),
    "stored output, other, not checked": ("print(x)", printed("2\n"), [], "PASSED"),
    "stored output, same, checked": ("print(x)", printed("1\n"), ["nbval-check-output"], "PASSED"),
    "stored output, other, checked": ("print(x)", printed("2\n"), ["nbval-check-output"], "FAILED"),
    "address and duration are masked": (
        "print(object(), 'in 3.1 s')",
        printed("<object object> in 12.7 s\n"),
        ["nbval-check-output"],
        "PASSED",
    ),
    "an error fails": ("1 / 0", [], [], "FAILED"),
    "a stored error fails": (
        "1 / 0",
        [new_output("error", ename="ZeroDivisionError", evalue="")],
        [],
        "FAILED",
    ),
    "an expected error passes": ("1 / 0", [], ["raises-exception"], "PASSED"),
}


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory):
    """Run all cells in one notebook, so in one kernel: a failed cell does not stop nbval."""
    folder = tmp_path_factory.mktemp("nbval")
    cells = [
        new_code_cell(src, outputs=outs, metadata={"tags": tags}) for src, outs, tags, _ in CELLS.values()
    ]
    nbformat.write(new_notebook(cells=cells), folder / "toy.ipynb")
    shutil.copy(ROOT / "conftest.py", folder)
    (folder / "pytest.ini").write_text("[pytest]\n")
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "toy.ipynb",
            "-v",
            "--color=no",
            "-p",
            "no:cacheprovider",
            "--nbval-lax",
            "--nbval-current-env",
            "--nbval-sanitize-with",
            str(ROOT / "tests" / "nbval_sanitize.cfg"),
        ],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
    )
    found = dict(re.findall(r"^toy\W+ipynb::Cell (\d+) (\w+)", done.stdout, re.MULTILINE))
    assert len(found) == len(CELLS), done.stdout + done.stderr
    return {name: found[str(i)] for i, name in enumerate(CELLS)}


@pytest.mark.parametrize("name", CELLS)
def test_cell(verdicts, name):
    assert verdicts[name] == CELLS[name][-1]
