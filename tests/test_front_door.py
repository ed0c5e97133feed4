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


CONTRACT = {  # what other people's code calls: its parameters; behind * those by keyword
    "icu_nb.metrics.memorization_accuracy": "model input_ids attention_mask * batch_size",
    "icu_nb.metrics.extraction_likelihood": "model input_ids attention_mask * n start batch_size",
    "icu_nb.metrics.perplexity": "model tokenizer texts * max_length batch_size",
    "icu_nb.kui.unlearning_loss": "logits input_ids attention_mask",
    "icu_nb.cle.pair_learning_loss": "logits input_ids attention_mask",
    "icu_nb.cle.kl_loss": "logits ref_logits attention_mask",
    "icu_nb.cle.nearest_neighbors": "forget retain * embedder k max_overlap",
    "icu_nb.iur.calibrate_thresholds": "model tokenizer heldout",
    "icu_nb.iur.Thresholds": "bleu bert_f1 rule ma el",
    "icu_nb.unlearn.unlearn": "model tokenizer forget retain config * heldout thresholds objective "
    "refinement neighbors callback",
    "icu_nb.text.read_texts": "source",
    "icu_nb.result.UnlearnResult.save_pretrained": "self folder",
}


@pytest.mark.parametrize("path", CONTRACT)
def test_the_contract_of_names(path):
    module, *names = path.removeprefix("icu_nb.").split(".")
    thing = importlib.import_module(f"icu_nb.{module}")
    for name in names:
        thing = getattr(thing, name)
    parameters = inspect.signature(thing).parameters.values()
    by_keyword = {parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY}
    in_order = [parameter.name for parameter in parameters if parameter.kind is not parameter.KEYWORD_ONLY]
    promised, _, promised_by_keyword = CONTRACT[path].partition(" * ")
    assert in_order[: len(promised.split())] == promised.split()
    assert set(promised_by_keyword.split()) <= by_keyword
