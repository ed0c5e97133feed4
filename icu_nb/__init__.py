"""Make a language model forget given texts and keep its abilities (ICU, arXiv 2407.20271)."""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

__version__ = "0.1.0"

_HOME = {  # what is offered here, and the module in which it stands
    "unlearn": "unlearn",
    "load_model": "models.loading",
    "ICUConfig": "config",
    "ICU": "objective",
    "ICUPlus": "objective",
    "get_method": "methods.registry",
    "calibrate_thresholds": "iur",
    "Thresholds": "iur",
    "select_icu": "iur",
    "select_published_rule": "iur",
    "UnlearnResult": "result",
    "audit": "evals.audit",
    "evaluate_utility": "evals.utility",
    "memorization_accuracy": "metrics",
    "extraction_likelihood": "metrics",
    "perplexity": "metrics",
    "nearest_neighbors": "cle",
    "sentence_embedder": "embedding",
    "read_texts": "text",
    "sample_pool": "sampled_pool",
    "add_lora": "models.loading",
    "merge_lora": "models.loading",
    "estimate_memory": "models.memory",
}

__all__ = [
    "ICU",
    "ICUConfig",
    "ICUPlus",
    "Thresholds",
    "UnlearnResult",
    "add_lora",
    "audit",
    "calibrate_thresholds",
    "estimate_memory",
    "evaluate_utility",
    "extraction_likelihood",
    "get_method",
    "load_model",
    "memorization_accuracy",
    "merge_lora",
    "nearest_neighbors",
    "perplexity",
    "read_texts",
    "sample_pool",
    "select_icu",
    "select_published_rule",
    "sentence_embedder",
    "unlearn",
]

if TYPE_CHECKING:
    from .cle import nearest_neighbors
    from .config import ICUConfig
    from .embedding import sentence_embedder
    from .evals.audit import audit
    from .evals.utility import evaluate_utility
    from .iur import Thresholds, calibrate_thresholds, select_icu, select_published_rule
    from .methods.registry import get_method
    from .metrics import extraction_likelihood, memorization_accuracy, perplexity
    from .models.loading import add_lora, load_model, merge_lora
    from .models.memory import estimate_memory
    from .objective import ICU, ICUPlus
    from .result import UnlearnResult
    from .sampled_pool import sample_pool
    from .text import read_texts
    from .unlearn import unlearn


class _FrontDoor(ModuleType):
    "The package, whose names are imported when they are first used: torch alone takes seconds."

    def __getattr__(self, name: str):
        if name not in _HOME:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        value = getattr(import_module(f"{self.__name__}.{_HOME[name]}"), name)
        setattr(self, name, value)
        return value

    def __setattr__(self, name: str, value) -> None:
        # Importing `icu_nb.unlearn` would put the module in the function's place.
        if not (name in _HOME and isinstance(value, ModuleType)):
            super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted([*super().__dir__(), *__all__])


sys.modules[__name__].__class__ = _FrontDoor
