"""`from icu_nb import ...`: what is offered, that nothing heavy is imported for it; types are shipped."""

import ast
import dataclasses
import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import icu_nb

FOLDER = Path(icu_nb.__file__).parent


def modules_after(code: str) -> set[str]:
    """The modules that are loaded after `code` ran in a fresh interpreter."""
    script = f"import sys\n{code}\nprint(*sys.modules)"
    return set(
        subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, check=True
        ).stdout.split()
    )


@pytest.mark.parametrize("name", icu_nb.__all__)
def test_every_name_leads_somewhere(name):
    assert getattr(icu_nb, name).__name__ == name


def test_the_list_is_whole_and_short():
    assert len(icu_nb.__all__) <= 40 and set(icu_nb.__all__) <= set(dir(icu_nb))
    tree = ast.parse((FOLDER / "__init__.py").read_text())
    typed = {
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.level
        for alias in node.names
    }
    assert typed == set(icu_nb.__all__), "what a type checker sees"


def test_the_module_never_takes_the_place_of_the_function():
    module = importlib.import_module("icu_nb.unlearn")
    from icu_nb import unlearn

    assert callable(unlearn) and module.unlearn is unlearn
    with pytest.raises(AttributeError, match="no attribute 'unlern'"):
        icu_nb.unlern  # noqa: B018


def test_the_package_alone_imports_nothing_heavy():
    heavy = {"torch", "transformers", "datasets", "pandas", "matplotlib", "faker", "scipy"}
    assert not heavy & modules_after("import icu_nb")
    assert not heavy & modules_after("import icu_nb.config")


def test_the_core_imports_no_plotting_no_corpus_and_no_evaluation():
    loaded = modules_after("from icu_nb import unlearn, load_model")
    assert not {"matplotlib", "seaborn", "faker", "lm_eval", "torchmetrics", "sentence_transformers"} & loaded
    assert not {name for name in loaded if name.startswith(("icu_nb.paper", "icu_nb.evals", "icu_nb.course"))}


def test_types_are_shipped():
    assert (FOLDER / "py.typed").exists()


def test_the_settings_stand_in_the_signature():
    shown = inspect.signature(icu_nb.ICUConfig).parameters
    assert list(shown) == [field.name for field in dataclasses.fields(icu_nb.ICUConfig)]
