"""The tiny model of the tests: two layers of width 32 that have memorized eight records."""

import copy
from dataclasses import dataclass

import pytest
import torch
from hypothesis import settings
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from icu_nb.config import ICUConfig
from icu_nb.data.people import people
from icu_nb.models.tiny import memorize, tiny_gpt_neo, train_tokenizer
from icu_nb.text import Sequences, tokenize

settings.register_profile(
    "icu_nb", deadline=None
)  # how long a case takes depends on what else the machine does
settings.load_profile("icu_nb")

MAX_LENGTH = 48
torch.set_num_threads(1)  # models this small gain nothing from more, and lose much on a busy machine


@dataclass(frozen=True)
class Tiny:
    "A memorizing model with everything that `unlearn` wants."

    model: torch.nn.Module  # never train it: take a copy
    tokenizer: object
    forget: list[str]
    retain: list[str]
    heldout: list[str]

    def copy(self):
        return copy.deepcopy(self.model)

    def config(self, **changes) -> ICUConfig:
        "Settings that suit it."
        return ICUConfig(
            **dict(
                {
                    "learning_rate": 2e-3,
                    "batch_size": 4,
                    "max_epochs": 2,
                    "max_length": MAX_LENGTH,
                    "num_beams": 1,
                    "check": "full",
                },
                **changes,
            )
        )

    @property
    def sequences(self) -> Sequences:
        return tokenize(self.forget, self.tokenizer, MAX_LENGTH)

    @staticmethod
    def weights(model) -> dict[str, torch.Tensor]:
        "A copy of all weights, on the CPU."
        return {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}

    @staticmethod
    def same(model, weights) -> bool:
        "Whether the model's weights are still bit for bit those."
        return all(torch.equal(tensor.cpu(), weights[name]) for name, tensor in model.state_dict().items())


@pytest.fixture(scope="session")
def tiny():
    records = people(40, seed=3)
    tokenizer = train_tokenizer(records, 300)
    forget, retain, heldout = records[:8], records[8:32], records[32:]
    # Second halves too, so that the model also goes on from a prompt taken out of the middle.
    halves = [
        tokenizer.decode(tokens[MAX_LENGTH // 2 : MAX_LENGTH]) for tokens in tokenizer(forget)["input_ids"]
    ]
    model = tiny_gpt_neo(len(tokenizer), max_length=64, n_layers=2, hidden_size=32, n_heads=2)
    memorize(
        model,
        tokenizer,
        forget + halves,
        [],
        repeats=10,
        epochs=20,
        learning_rate=1e-2,
        max_length=MAX_LENGTH,
    )
    return Tiny(model, tokenizer, forget, retain, heldout)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    "An empty cache, an empty working folder, and no local data folder."
    monkeypatch.setenv("ICU_NB_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("ICU_NB_DATA", raising=False)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path


@pytest.fixture(scope="session")
def bos_tokenizer(tiny):
    "A tokenizer that puts a beginning-of-sequence token in front, as OPT's and Llama's do."
    own = Tokenizer.from_str(tiny.tokenizer.backend_tokenizer.to_str())
    own.add_special_tokens(["<s>"])
    own.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", own.token_to_id("<s>"))])
    return PreTrainedTokenizerFast(
        tokenizer_object=own, bos_token="<s>", eos_token="<|endoftext|>", pad_token="<|pad|>"
    )
