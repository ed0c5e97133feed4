"""The site: what the notebooks say and store, nothing executed; no page asks another host (make docs)."""

import json
import re
import sys
from pathlib import Path

from docutils import nodes

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
NBS = ROOT / "nbs"
sys.path.insert(0, str(HERE))
import api
from formulas import mathml

SOURCE = ROOT / "_docs/source"  # laid like the project, so that the notebooks' links lead where they should
COLAB = re.compile(r"\[!\[Open In Colab\]\([^)]*\)\]")

# ---- pages: the landing page, every notebook, and one for each module ----


def page_of(notebook):
    """A notebook without Colab's cell, without nbdev's directives, and without a badge from another host."""
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


def notebooks(folder="."):
    """Every notebook below a folder of nbs."""
    found = sorted((NBS / folder).rglob("*.ipynb"))
    return [path for path in found if ".ipynb_checkpoints" not in path.parts]


def modules():
    """Every module of the library with the notebook that makes it: the core first, then wing by wing."""
    made = []
    for path in notebooks():
        found = re.search(r"default_exp\s+([\w.]+)", path.read_text(encoding="utf-8"))
        if found:
            made.append((found[1], path))
    return sorted(made, key=lambda one: ("." in one[0], one[0]))


def api_pages():
    """The API reference: a page for each module, and one that lists them."""
    lines = [
        "# API reference",
        "",
        "What the library offers, a page for each module: the core first, then each wing.",
        "",
        "| module | what it is for |",
        "|---|---|",
    ]
    for name, notebook in modules():
        source = (ROOT / f"icu_nb/{name.replace('.', '/')}.py").read_text(encoding="utf-8")
        page = api.page(name, source, notebook.relative_to(NBS))
        lines.append(f"| [{name}](api/{name}.md) | {page.splitlines()[2]} |")
        yield f"api/{name}.md", page
    tree = ["```{toctree}", ":hidden:", *(f"api/{name}" for name, _ in modules()), "```"]
    yield "api.md", "\n".join([*lines, "", *tree])


def front_page():
    """The landing page, with the notebooks of library and course in its menus."""
    page = (HERE / "index.md").read_text(encoding="utf-8")
    for folder in ("library", "course"):
        names = [path.relative_to(ROOT).with_suffix("").as_posix() for path in notebooks(folder)]
        others = [name for name in names if not name.endswith("/syllabus")]
        page = page.replace(f"nbs/{folder}/others", "\n".join(others))
    return page


def pages():
    """Path -> content of every page and figure of the site."""
    yield "index.md", front_page().encode()
    for name in ("results", "notebooks"):
        yield f"docs/{name}.md", (HERE / f"{name}.md").read_bytes()
    for figure in (ROOT / "figures").glob("*.*"):
        yield f"figures/{figure.name}", figure.read_bytes()
    for notebook in notebooks():
        yield notebook.relative_to(ROOT).as_posix(), json.dumps(page_of(notebook)).encode()
    for name, page in api_pages():
        yield name, page.encode()


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
