"""What the library computed before it was rebuilt (commit fa020b6), it computes now.

tests/data/old_commit holds a small model that has memorized twelve invented people, its tokenizer, and the
numbers of the old code: MA, EL, perplexity, neighbors, thresholds, every objective's terms, one step and
two runs.
"""

import copy
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerFast

from icu_nb import (
    ICUConfig,
    Thresholds,
    calibrate_thresholds,
    extraction_likelihood,
    memorization_accuracy,
    perplexity,
    select_icu,
    select_published_rule,
    unlearn,
)
from icu_nb.cle import kl_loss, pair_learning_loss
from icu_nb.kui import unlearning_loss
from icu_nb.methods.registry import get_method
from icu_nb.models.tiny import tiny_gpt_neo
from icu_nb.pairs import prepare_task
from icu_nb.reference import OriginalModel
from icu_nb.text import tokenize

FOLDER = Path(__file__).parent / "data" / "old_commit"
OLD = json.loads((FOLDER / "numbers.json").read_text())
CONFIG = ICUConfig(max_length=72, learning_rate=5e-4, max_epochs=8, check="full")


@pytest.fixture(scope="module")
def tokenizer():
    return PreTrainedTokenizerFast(
        tokenizer_file=str(FOLDER / "tokenizer.json"),
        eos_token="<|endoftext|>",
        bos_token="<|endoftext|>",
        pad_token="<|pad|>",
    )


@pytest.fixture(scope="module")
def stored():
    model = tiny_gpt_neo(512, max_length=96, n_layers=2, hidden_size=48, n_heads=4)
    missing, unexpected = model.load_state_dict(load_file(FOLDER / "model.safetensors"), strict=False)
    assert set(missing) <= {"lm_head.weight"} and not unexpected
    model.tie_weights()
    return model


@pytest.fixture
def model(stored):
    return copy.deepcopy(stored)


@pytest.fixture(scope="module")
def shaken(stored):
    """The model with a little noise that every machine makes alike."""
    other = copy.deepcopy(stored)
    with torch.no_grad():
        for parameter in other.parameters():
            noise = torch.sin(1.7 * torch.arange(parameter.numel(), dtype=torch.float64))
            parameter.add_(0.03 * noise.view_as(parameter).float())
    return other


def texts(name):
    return OLD["texts"][name]


def task_of(model, tokenizer, alternatives=None):
    return prepare_task(model, tokenizer, texts("forget"), texts("retain"), CONFIG, None, alternatives)


@pytest.mark.parametrize("name", ["forget", "heldout"])
def test_ma_and_el_exactly(stored, tokenizer, name):
    sequences = tokenize(texts(name), tokenizer, 72)
    ids, mask = sequences.input_ids, sequences.attention_mask
    assert memorization_accuracy(stored, ids, mask).tolist() == OLD[f"ma_{name}"]
    assert extraction_likelihood(stored, ids, mask).tolist() == OLD[f"el_{name}"]
    assert extraction_likelihood(stored, ids, mask, n=5, start=1).tolist() == OLD[f"el5_start1_{name}"]


def test_perplexity_neighbors_and_thresholds(stored, tokenizer):
    assert perplexity(stored, tokenizer, texts("heldout"), max_length=72) == pytest.approx(
        OLD["perplexity"], rel=1e-6
    )
    assert task_of(stored, tokenizer).pairs.tolist() == OLD["pairs"]
    thresholds = calibrate_thresholds(stored, tokenizer, texts("heldout"), max_length=72)
    assert [thresholds.ma, thresholds.el] == OLD["thresholds"]


def test_the_three_losses(stored, shaken, tokenizer):
    forget, neighbors = tokenize(texts("forget"), tokenizer, 72), task_of(stored, tokenizer).neighbors
    with torch.no_grad():
        of_forget, of_neighbors = shaken(**forget.inputs).logits, shaken(**neighbors.inputs).logits
        original = stored(**neighbors.inputs).logits
    found = {
        "unlearning": unlearning_loss(of_forget, forget.input_ids, forget.attention_mask).item(),
        "pair": pair_learning_loss(of_neighbors, neighbors.input_ids, neighbors.attention_mask).item(),
        "kl": kl_loss(of_neighbors, original, neighbors.attention_mask).item(),
    }
    assert found == pytest.approx(OLD["losses"], rel=1e-6)


# RMU's means are over texts by now; test_methods.py and test_newer_methods.py compute it.
@pytest.mark.parametrize("name", [name for name in OLD["terms"] if name != "rmu"])
def test_the_terms_of_every_objective(stored, shaken, tokenizer, name):
    heldout = texts("heldout")
    task = task_of(stored, tokenizer, [*heldout, *heldout][:12])
    parts = {"forget": task.forget, "neighbor": task.neighbors, "alternative": task.alternatives}
    objective = get_method(name).objective()
    reference = OriginalModel(stored, parts, anything="anything" in objective.needs_reference)
    terms = objective(shaken, task.batch(torch.arange(8), "cpu"), reference)
    old = dict(OLD["terms"][name])
    if name == "dpo":  # its factor 2/beta was missing
        old["l_fgt"] *= 2 / objective.beta
    assert {term: value.item() for term, value in terms.items()} == pytest.approx(old, rel=1e-6)


def run(model, tokenizer, config, refinement):
    thresholds = Thresholds(ma=OLD["thresholds"][0], el=OLD["thresholds"][1])
    forget, retain = texts("forget"), texts("retain")
    return unlearn(model, tokenizer, forget, retain, config, thresholds=thresholds, refinement=refinement)


def test_one_step(model, tokenizer):
    config = ICUConfig(max_length=72, learning_rate=5e-4, max_epochs=1, check="full")
    history, old = run(model, tokenizer, config, None).history, pd.DataFrame(OLD["step"]["history"])
    assert history.ma.tolist() == old.ma.tolist() and history.el.tolist() == old.el.tolist()
    losses = ["loss", "l_fgt", "l_lrn", "l_kl"]
    np.testing.assert_allclose(history.loc[1:, losses], old.loc[1:, losses], rtol=1e-6, atol=1e-6)
    sums = {name: tensor.abs().double().sum().item() for name, tensor in model.state_dict().items()}
    assert sums == pytest.approx(OLD["step"]["sum_abs"], rel=1e-6)


@pytest.mark.parametrize(("name", "refinement"), [("icu", select_icu), ("published", select_published_rule)])
def test_whole_runs(model, tokenizer, name, refinement):
    """Eight epochs add up the rounding of other processors, so the tolerance is wider here."""
    result, old = run(model, tokenizer, CONFIG, refinement), OLD[f"run_{name}"]
    history, before = result.history, pd.DataFrame(old["history"])
    assert result.stop_reason == old["reason"] and history.active.tolist() == before.active.tolist()
    losses = ["loss", "l_fgt", "l_lrn", "l_kl"]
    np.testing.assert_allclose(history.loc[1:, losses], before.loc[1:, losses], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(history.ma, before.ma, atol=0.01)
