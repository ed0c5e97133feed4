"""What is trained is trained once, and never mistaken for something else."""

from unittest.mock import Mock

import pytest
import torch

import icu_nb.models.tiny
from icu_nb.data.people import people
from icu_nb.models.tiny import memorize, random_starts, tiny_gpt_neo, train_tokenizer


@pytest.fixture(scope="module")
def texts():
    return people(6, seed=5)


@pytest.fixture(scope="module")
def tokenizer(texts):
    return train_tokenizer(texts, 300)


@pytest.fixture
def epochs_trained(texts, tokenizer, cache):
    """Memorize with a fresh model; returns how many epochs were really trained."""

    def call(seed=0, **changes):
        watched = Mock()
        model = tiny_gpt_neo(len(tokenizer), max_length=32, n_layers=2, hidden_size=16, n_heads=2, seed=seed)
        memorize(
            model,
            tokenizer,
            texts,
            [],
            **{**{"repeats": 1, "epochs": 2, "max_length": 24, "callback": watched}, **changes},
        )
        return watched.call_count

    return call


def test_the_second_time_comes_from_the_cache(epochs_trained):
    assert (epochs_trained(), epochs_trained()) == (2, 0)


@pytest.mark.parametrize("change", [{"repeats": 2}, {"learning_rate": 1e-3}, {"max_length": 23}, {"seed": 1}])
def test_another_recipe_is_trained(epochs_trained, change):
    assert (epochs_trained(), epochs_trained(**change)) == (2, 2)


def test_another_training_code_is_trained(epochs_trained, monkeypatch):
    assert epochs_trained() == 2
    monkeypatch.setattr(icu_nb.models.tiny, "random_starts", lambda tokens, generator: tokens)
    assert epochs_trained() == 2


def test_cache_can_be_left_alone(epochs_trained, cache):
    assert (epochs_trained(cache=False), epochs_trained(cache=False)) == (2, 2)
    assert not (cache / "cache").exists()


def test_late_starts_cut_only_beginnings():
    rows = [list(range(n)) for n in (1, 2, 40, 100)] * 50
    started = random_starts(rows, torch.Generator().manual_seed(0))
    assert all(
        short == whole[len(whole) - len(short) :] and len(short) >= 0.75 * len(whole)
        for short, whole in zip(started, rows, strict=False)
    )
    assert 0.1 < sum(len(s) < len(w) for s, w in zip(started, rows, strict=False) if len(w) > 2) / 100 < 0.4
