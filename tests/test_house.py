"""The house keeps its form: wings depend downwards, few names are public, chapters are short, links hold."""

import ast
import json
import re
import subprocess
import sys
import tomllib
import zipfile
from functools import cache

import numpy as np
import pytest
from packaging.requirements import Requirement
from test_install import build_wheel
from test_project import CHAPTERS, NBS, NOTEBOOKS, ROOT, cells, each_notebook, prose, text

MODULES = sorted(path for path in (ROOT / "icu_nb").rglob("*.py") if path.name != "_modidx.py")
each_module = pytest.mark.parametrize(
    "path", MODULES, ids=lambda path: path.relative_to(ROOT / "icu_nb").as_posix()
)
WIDTH = 110


@cache
def tree(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def public_names(path):
    for node in tree(path).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return ast.literal_eval(node.value)
    return []


def python(cell):
    """A cell's source without what only IPython understands."""
    return re.sub(r"^(\s*)(?:[%!]|\w+ = [!%]).*$", r"\1pass", text(cell["source"]), flags=re.M)


# ---- wings ----


def test_wings_depend_downwards_only():
    """The contract stands in pyproject.toml; import-linter holds it."""
    pytest.importorskip("importlinter")
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as lint; lint()"]
    done = subprocess.run([*command, "--no-cache"], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


def imports(path):
    """Every `from ... import` of the library inside it: the module it names in full, and the names."""
    package = ["icu_nb", *path.relative_to(ROOT / "icu_nb").parent.parts]
    for node in ast.walk(tree(path)):
        if not isinstance(node, ast.ImportFrom):
            continue
        module = node.module or ""
        if node.level:
            base = package[: len(package) - node.level + 1]
            module = ".".join([*base, *filter(None, [node.module])])
        if module.split(".")[0] == "icu_nb":
            yield module, [alias.name for alias in node.names]


@each_module
def test_imports_no_private_name_of_another_module(path):
    private = [(module, name) for module, names in imports(path) for name in names if name.startswith("_")]
    assert not private


@each_module
def test_imports_nothing_from_the_package_itself(path):
    """It would close circles, and import-linter would report chains that are none."""
    if path.parent == ROOT / "icu_nb" and path.name == "__init__.py":
        return
    assert not [names for module, names in imports(path) if module == "icu_nb"]


IMPORT_CORE = """
import sys
import icu_nb
assert "torch" not in sys.modules, "the front door is lazy"
import icu_nb.cli
import icu_nb.unlearn
loaded = [name for name in ("matplotlib", "seaborn", "faker", "lm_eval") if name in sys.modules]
assert not loaded, loaded
"""


def test_core_loads_no_plots_no_people_and_no_benchmarks():
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_CORE], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr


# ---- names and lines ----


def test_few_names_are_public():
    names = {path.relative_to(ROOT).as_posix(): public_names(path) for path in MODULES}
    assert len(names["icu_nb/__init__.py"]) <= 40
    modules = {path: len(found) for path, found in names.items() if path != "icu_nb/__init__.py"}
    assert sum(modules.values()) <= 300, modules


def test_no_line_of_code_is_long():
    long = []
    for path in NOTEBOOKS:
        for cell in cells(path, "code"):
            long += [
                f"{path.name}: {line}" for line in text(cell["source"]).splitlines() if len(line) > WIDTH
            ]
    for folder in ("tests", "tools", "docs"):
        for path in (ROOT / folder).glob("*.py"):
            lines = path.read_text(encoding="utf-8").splitlines()
            long += [f"{path.name}: {line}" for line in lines if len(line) > WIDTH]
    assert not long, f"{len(long)} lines, the first: {long[:5]}"


def named_lambdas(source):
    found = [node for node in ast.walk(ast.parse(source)) if isinstance(node, (ast.Assign, ast.AnnAssign))]
    return [ast.unparse(node) for node in found if isinstance(node.value, ast.Lambda)]


def test_no_lambda_has_a_name():
    found = []
    for path in NOTEBOOKS:
        for cell in cells(path, "code"):
            found += [f"{path.name}: {one}" for one in named_lambdas(python(cell))]
    for path in MODULES:
        found += [f"{path.name}: {one}" for one in named_lambdas(path.read_text(encoding="utf-8"))]
    assert not found, f"{len(found)}, the first: {found[:5]}"


# ---- chapters ----


def signature_lines(source):
    """The lines of functions' signatures, with their docments."""
    lines = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            lines |= set(range(node.lineno, node.body[0].lineno))
    return lines


def length(cell):
    """Lines of code in a cell; signatures, comments and blank lines are not counted."""
    source = python(cell)
    skipped = signature_lines(source)
    return sum(
        bool(line.strip()) and not line.lstrip().startswith("#")
        for number, line in enumerate(source.splitlines(), 1)
        if number not in skipped
    )


def test_lengths_are_counted_as_described():
    function = "def f(\n    x: int,  # a number\n) -> int:\n    'Twice.'\n\n    return 2 * x\n"
    cell = {"source": f"#| export\n{function}%time f(1)"}
    assert length(cell) == 3


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.name)
def test_a_chapter_has_few_and_short_cells(path):
    code = cells(path, "code")
    assert len(code) <= 40
    long = {cell["id"]: length(cell) for cell in code if length(cell) > 25}
    assert not long


def test_most_cells_of_the_chapters_are_short():
    lengths = [length(cell) for path in CHAPTERS for cell in cells(path, "code")]
    assert np.percentile(lengths, 90) <= 18


def test_the_loop_is_short():
    """What the chapter of the loop teaches fits on a page: signature and docstring are not counted."""
    (loop,) = [
        node
        for node in tree(ROOT / "icu_nb/unlearn.py").body
        if isinstance(node, ast.FunctionDef) and node.name == "unlearn"
    ]
    source = (ROOT / "icu_nb/unlearn.py").read_text(encoding="utf-8").splitlines()
    body = source[loop.body[1].lineno - 1 : loop.end_lineno]
    assert sum(bool(line.strip()) and not line.lstrip().startswith("#") for line in body) <= 25


# ---- dependencies and the wheel ----


def project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_base_dependencies_are_few():
    assert len(project()["dependencies"]) <= 10


WITHOUT_EXTRAS = """
import importlib, pathlib, sys
for name in {missing}:
    sys.modules[name] = None  # as if it were not installed
silent = []
for path in sorted(pathlib.Path("icu_nb").rglob("*.py")):
    module = ".".join(path.with_suffix("").parts).removesuffix(".__init__")
    if path.stem == "_modidx":
        continue
    try:
        importlib.import_module(module)
    except Exception as error:
        wing = module.split(".")[1]
        clear = "pip install" in str(error) and "icu_nb[" in str(error)
        if not clear or wing not in ("paper", "course", "data", "evals"):
            silent.append(f"{{module}}: {{type(error).__name__}}: {{error}}")
print("\\n".join(silent))
"""
# How the packages of the extras are imported, where that is not their name.
IMPORTED_AS = {"Faker": "faker", "sentence-transformers": "sentence_transformers"}


def test_without_extras_the_library_says_what_to_install():
    """The core needs none of them; what does says so in one line that names the extra."""
    extras = project()["optional-dependencies"]
    needs = [
        Requirement(line).name
        for name in ("data", "figures", "lora", "evals", "real")
        for line in extras[name]
    ]
    missing = [IMPORTED_AS.get(name, name) for name in [*needs, "psutil"]]
    code = WITHOUT_EXTRAS.format(missing=missing)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and not done.stdout.strip(), done.stdout + done.stderr


def test_wheel_holds_every_subpackage(tmp_path):
    """A package that is not listed is silently left out of a wheel."""
    with zipfile.ZipFile(build_wheel(tmp_path)) as wheel:
        inside = {name for name in wheel.namelist() if name.startswith("icu_nb/")}
    here = {path.relative_to(ROOT).as_posix() for path in (ROOT / "icu_nb").rglob("*.py")}
    assert inside == here | {"icu_nb/py.typed"}


# ---- links ----

LINK = re.compile(r"\]\(((?!https?://|mailto:|#)[^)\s]+)\)|(?:href|src)=\"((?!https?://|data:|#)[^\"]+)\"")


def broken_links(page, folder):
    """Relative links that lead nowhere; an anchor behind a path is not looked at."""
    targets = [first or second for first, second in LINK.findall(page)]
    return [target for target in targets if not (folder / target.partition("#")[0]).exists()]


@each_notebook
def test_links_of_a_notebook_lead_somewhere(path):
    assert not broken_links(prose(path), path.parent)


@pytest.mark.parametrize(
    "name", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/results.md", "docs/notebooks.md"]
)
def test_links_of_a_page_lead_somewhere(name):
    assert not broken_links((ROOT / name).read_text(encoding="utf-8"), (ROOT / name).parent)


def test_links_of_the_site_and_its_slides_lead_somewhere():
    """The landing page lies at the root of the site, beside nbs; api.md and the slides are made there."""
    page = (ROOT / "docs/index.md").read_text(encoding="utf-8")
    made = ("api.md", "session_")
    assert not [link for link in broken_links(page, ROOT) if not link.startswith(made)]
    for line in re.findall(r"^nbs/\S+$", page, re.M):
        assert list(ROOT.glob(f"{line}.ipynb")), line
    slides = (ROOT / "docs/slides.py").read_text(encoding="utf-8")
    sessions = re.search(r"^SESSIONS = (\{.*?^\})", slides, re.M | re.S)[1]
    for notebooks in ast.literal_eval(sessions).values():
        assert not [name for name in notebooks if not (NBS / f"{name}.ipynb").exists()]


def test_badges_name_the_notebooks_of_this_repository():
    """Badges anywhere (README, prose) lead to notebooks that exist here."""
    pages = [(ROOT / "README.md").read_text(encoding="utf-8"), *map(prose, NOTEBOOKS)]
    badges = {one for page in pages for one in re.findall(r"/blob/main/(nbs/[^\s)\"']+\.ipynb)", page)}
    assert badges and not [badge for badge in badges if not (ROOT / badge).exists()]


def test_makefile_runs_notebooks_that_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    named = re.findall(r"nbs/[\w/]+\.ipynb", makefile)
    assert named and not [name for name in named if not (ROOT / name).exists()]


def test_outputs_name_no_notebook_that_is_gone():
    """What a cell printed may name a notebook by its path."""
    gone = []
    for path in NOTEBOOKS:
        stored = json.dumps([cell["outputs"] for cell in cells(path, "code")])
        gone += [name for name in re.findall(r"nbs/[\w/]+\.ipynb", stored) if not (ROOT / name).exists()]
    assert not gone
