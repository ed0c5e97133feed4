"""The site: what the notebooks say and store, nothing executed; no page asks another host (make docs)."""

import ast
import json
import re
import sys
from itertools import takewhile
from pathlib import Path

from docutils import nodes

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
NBS = ROOT / "nbs"
sys.path.insert(0, str(HERE))
import api
from formulas import mathml

SOURCE = ROOT / "_docs/source"  # laid like the project, so that the notebooks' links lead where they should
BADGE = re.compile(r"\[!\[Open In Colab\]\([^)]*\)\](\(\S+/blob/main/(nbs/\S+\.ipynb)\))")

# ---- pages: the landing page, every notebook, and one for each module ----


def folded(label):
    """The metadata of a cell that is folded under this label."""
    return {"tags": ["hide-input"], "mystnb": {"code_prompt_show": label, "code_prompt_hide": label}}


def imports(node):
    """True of an import, and of a block that only imports (`if TYPE_CHECKING`)."""
    return all(isinstance(one, ast.Import | ast.ImportFrom) for one in getattr(node, "body", [node]))


def code_cells(cell):
    """A code cell without nbdev's directives, in at most two parts: imports and mere assertions fold."""
    source = re.sub(r"^#\s*\|.*\n?", "", "".join(cell["source"]), flags=re.M)
    statements = ast.parse(source).body
    head = list(takewhile(imports, statements))
    end = head[-1].end_lineno if head else 0
    if end > 3 or len(head) == len(statements):  # a fold takes as much room as two or three lines
        lines = source.splitlines(keepends=True)
        imported = {**cell, "id": f"{cell['id']}-imports", "source": "".join(lines[:end]), "outputs": []}
        imported["metadata"] = folded("Imports")
        cells = [imported, {**cell, "source": "".join(lines[end:]).strip()}]
    elif all(isinstance(statement, ast.Assert) for statement in statements):
        cells = [{**cell, "source": source, "metadata": folded("Assertions")}]
    else:
        cells = [{**cell, "source": source}]
    return [one for one in cells if one["source"].strip()]


def page_of(notebook):
    """A notebook numbered as it is linked, with links to Colab and to its file, and without Colab's cell."""
    book = json.loads(notebook.read_text(encoding="utf-8"))
    first = next(i for i, c in enumerate(book["cells"]) if c["cell_type"] == "code")
    number = re.match(r"\d\d(?=_)", notebook.stem)
    cells = []
    for i, cell in enumerate(book["cells"]):
        alts = [
            *(o.get("metadata", {}).get("image/png", {}).get("alt") for o in cell.get("outputs", [])),
            cell["metadata"].get("alt"),
        ]
        if alt := next(filter(None, alts), None):
            cell["metadata"]["mystnb"] = {"image": {"alt": alt}}
        if cell["cell_type"] == "code":
            cells += code_cells(cell) if i != first else []
            continue
        text = BADGE.sub(r"[Open in Colab]\1 {download}`Download </../../\2>`", "".join(cell["source"]))
        if i == 0 and number:
            text = re.sub(r"^# (?!\d)", f"# {number[0]} · ", text)
        cells.append({**cell, "source": text})
    return {**book, "cells": cells}


def notebooks():
    """Every notebook of nbs."""
    return [path for path in sorted(NBS.rglob("*.ipynb")) if ".ipynb_checkpoints" not in path.parts]


def modules():
    """Every module of the library with the notebook that makes it: the core first, then wing by wing."""
    made = []
    for path in notebooks():
        found = re.search(r"default_exp\s+([\w.]+)", path.read_text(encoding="utf-8"))
        if found:
            made.append((found[1], path))
    return sorted(made, key=lambda one: ("." in one[0], one[0]))


def module_source(name):
    return (ROOT / f"icu_nb/{name.replace('.', '/')}.py").read_text(encoding="utf-8")


def api_pages():
    """The API reference: a page for each module, and one that lists the front door and the modules."""
    front = api.constant((ROOT / "icu_nb/__init__.py").read_text(encoding="utf-8"), "_HOME")
    lines = [
        "# API reference",
        "",
        "Import these from `icu_nb`:",
        "",
        "| name | what it is for |",
        "|---|---|",
    ]
    for name, home in front.items():
        lines.append(f"| [{name}](api/{home}.md#{name.lower()}) | {api.summary(module_source(home), name)} |")
    lines += ["", "## All modules", "", "The core first, then each wing.", ""]
    lines += ["| module | what it is for |", "|---|---|"]
    for name, notebook in modules():
        page = api.page(name, module_source(name), notebook.relative_to(NBS), first=front)
        lines.append(f"| [{name}](api/{name}.md) | {page.splitlines()[2]} |")
        yield f"api/{name}.md", page
    tree = ["```{toctree}", ":hidden:", *(f"api/{name}" for name, _ in modules()), "```"]
    yield "api.md", "\n".join([*lines, "", *tree])


def pages():
    """Path -> content of every page and figure of the site."""
    for name in ("index", "docs/results", "docs/notebooks"):
        yield f"{name}.md", (HERE / f"{Path(name).name}.md").read_bytes()
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
