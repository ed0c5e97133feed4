"""The site: what the notebooks say and store, nothing executed, and no page asks another host for anything (make docs)."""

import json
import re
import sys
from pathlib import Path

from docutils import nodes

ROOT, HERE = Path(__file__).resolve().parents[2], Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
import api
from formulas import mathml

SOURCE = ROOT / "_docs/source"  # laid like the project, so that the notebooks' links lead where they should
COLAB = re.compile(r"\[!\[Open In Colab\]\([^)]*\)\]")

# ---- pages: the landing page, every notebook, and one for each module ----


def page_of(notebook):
    """A notebook without its first code cell, which prepares Colab, without nbdev's directives, and without a badge from another host."""
    book = json.loads(notebook.read_text(encoding="utf-8"))
    first = next(i for i, c in enumerate(book["cells"]) if c["cell_type"] == "code")
    cells = book["cells"][:first] + book["cells"][first + 1 :]
    for cell in cells:
        source = COLAB.sub("[Open in Colab]", "".join(cell["source"]))
        alts = [
            *(o.get("metadata", {}).get("image/png", {}).get("alt") for o in cell.get("outputs", [])),
            cell["metadata"].get("alt"),
        ]
        if alt := next(filter(None, alts), None):
            cell["metadata"]["mystnb"] = {"image": {"alt": alt}}
        cell["source"] = (
            re.sub(r"^#\s*\|.*\n?", "", source, flags=re.M) if cell["cell_type"] == "code" else source
        )
    return {**book, "cells": [c for c in cells if c["cell_type"] != "code" or c["source"].strip()]}


def modules():
    """Every module of the library with the notebook that makes it, in reading order."""
    made = [
        (re.search(r"default_exp\s+(\w+)", f.read_text(encoding="utf-8")), f)
        for f in sorted((ROOT / "nbs").glob("*.ipynb"))
    ]
    return [(found[1], f) for found, f in made if found]


def pages():
    """Path -> content of every page and figure of the site."""
    course = [
        f"nbs/course/{path.stem}"
        for path in sorted((ROOT / "nbs/course").glob("*.ipynb"))
        if path.stem != "syllabus"
    ]
    yield (
        "index.md",
        (HERE / "index.md")
        .read_text(encoding="utf-8")
        .replace("nbs/course/others", "\n".join(course))
        .encode(),
    )
    for figure in (ROOT / "figures").glob("*.*"):
        yield f"figures/{figure.name}", figure.read_bytes()
    for notebook in [*(ROOT / "nbs").glob("*.ipynb"), *(ROOT / "nbs/course").glob("*.ipynb")]:
        yield notebook.relative_to(ROOT).as_posix(), json.dumps(page_of(notebook)).encode()
    lines = [
        "# API reference",
        "",
        "What the library offers, a page for each module, in the order in which the modules build on each other.",
        "",
        "| module | what it is for |",
        "|---|---|",
    ]
    for name, notebook in modules():
        page = api.page(name, (ROOT / f"icu_nb/{name}.py").read_text(encoding="utf-8"), notebook)
        lines.append(f"| [{name}](api/{name}.md) | {page.splitlines()[2]} |")
        yield f"api/{name}.md", page.encode()
    tree = ["```{toctree}", ":hidden:", *(f"api/{name}" for name, _ in modules()), "```"]
    yield "api.md", "\n".join([*lines, "", *tree]).encode()


def write_pages():
    """What has not changed is left alone, so that Sphinx need not read it again."""
    wanted = {SOURCE / name: content for name, content in pages()}
    for stale in {path for path in SOURCE.rglob("*.*") if path.is_file()} - wanted.keys():
        stale.unlink()
    for path, content in wanted.items():
        if not path.exists() or path.read_bytes() != content:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)


write_pages()

# ---- formulas ----


def formula(display):
    def visit(self, node):
        self.body.append(mathml(node.astext(), display))
        raise nodes.SkipNode

    return visit


def setup(app):
    app.add_html_math_renderer("mathml", (formula(False), None), (formula(True), None))


# ---- settings ----

project = author = "icu_nb"
copyright = "the icu_nb authors, Apache-2.0"
extensions = ["myst_nb", "sphinx_copybutton"]
nb_execution_mode = "off"
myst_enable_extensions = ["dollarmath", "amsmath"]
myst_heading_anchors = 3
html_math_renderer = "mathml"
html_theme = "furo"
html_title = "icu_nb"
html_static_path = [str(HERE / "static")]
html_favicon = str(HERE / "static/icon.svg")  # without one, browsers ask for it all the same
html_css_files = ["site.css"]
html_copy_source = False
html_extra_path = [str(ROOT / "_docs/slides")]
