"""What a run leaves: a folder that plain transformers loads and that tells no text; rows for a tracker."""

import hashlib
import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import yaml
from accelerate import PartialState
from accelerate.tracking import get_available_trackers
from transformers import AutoModelForCausalLM, AutoTokenizer

from icu_nb.errors import InputError
from icu_nb.iur import Thresholds
from icu_nb.models.loading import add_lora
from icu_nb.result import before_and_after
from icu_nb.unlearn import unlearn


def run(tiny, model=None, **options):
    return unlearn(
        model or tiny.copy(),
        tiny.tokenizer,
        tiny.forget,
        tiny.retain,
        tiny.config(learning_rate=1e-3),
        thresholds=Thresholds(ma=0.0, el=0.0),
        **options,
    )


@pytest.fixture(scope="module")
def result(tiny):
    return run(tiny)


@pytest.fixture(scope="module")
def saved(result, tmp_path_factory):
    return result.save_pretrained(tmp_path_factory.mktemp("saved") / "model")


def logits(model, tiny):
    with torch.no_grad():
        return model(tiny.sequences.input_ids).logits


def words(folder):
    """All that can be read in a folder; the tokenizer's own files learned from the texts before."""
    return "\n".join(
        path.read_text()
        for path in folder.iterdir()
        if path.suffix in (".md", ".json") and not path.name.startswith("tokenizer")
    )


def test_plain_transformers_loads_it(result, saved, tiny):
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(saved), tiny), logits(result.model, tiny))
    assert (
        AutoTokenizer.from_pretrained(saved)(tiny.forget)["input_ids"]
        == tiny.tokenizer(tiny.forget)["input_ids"]
    )


def test_an_adapter_is_merged_and_stays(tiny, tmp_path):
    torch.manual_seed(0)
    adapted = run(tiny, add_lora(tiny.copy(), 4))
    said, weights = logits(adapted.model, tiny), tiny.weights(adapted.model)
    adapted.save_pretrained(tmp_path / "model")
    code = (
        "import sys; sys.modules['peft'] = None\n"  # as where peft is not installed
        "import torch; from transformers import AutoModelForCausalLM\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(tmp_path / 'model')!r})\n"
        f"torch.save(model(torch.load({str(tmp_path / 'ids.pt')!r})).logits, {str(tmp_path / 'logits.pt')!r})"
    )
    torch.save(tiny.sequences.input_ids, tmp_path / "ids.pt")
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "USE_PEFT": "0"})
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), said, rtol=0, atol=1e-5)
    assert tiny.same(adapted.model, weights) and hasattr(adapted.model, "disable_adapter")


def test_no_text_is_told(saved, result, tiny):
    said = words(saved)
    assert all(hashlib.sha256(text.encode()).hexdigest() in said for text in tiny.forget)
    for text in [*tiny.forget, *tiny.retain, *result.samples.continuation]:
        pieces = [" ".join(text.split()[k : k + 3]) for k in range(len(text.split()) - 2)]
        assert not [piece for piece in pieces if piece in said]


def test_card_and_facts_agree_with_the_run(saved, result):
    card, facts = (saved / "README.md").read_text(), json.loads((saved / "icu_result.json").read_text())
    head = yaml.safe_load(card.split("---")[1])
    assert (
        head["library_name"] == "transformers" and "unlearning" in head["tags"] and "base_model" not in head
    )  # no name on the Hub
    table = before_and_after(result.history, result.thresholds)
    assert all(f"{value:.4f}" in card for value in table[["before", "after"]].to_numpy().ravel())
    assert (
        len(facts["history"]) == len(result.history)
        and facts["history"][-1]["ma"] == result.history.ma.iloc[-1]
        and facts["config"]["learning_rate"] == 1e-3
    )
    assert facts["stop_reason"] == "max_epochs" and "no proof of erasure" in card


def test_the_card_names_the_original_where_the_hub_has_it(tiny):
    model = tiny.copy()
    model.config._name_or_path, model.config._commit_hash = (
        "EleutherAI/gpt-neo-125m",
        "21def0189f5705e2521767faed922f1f15e7d7db",
    )
    card = run(tiny, model).card()
    assert (
        yaml.safe_load(card.split("---")[1])["base_model"] == "EleutherAI/gpt-neo-125m"
        and "21def0189f5705e2521767faed922f1f15e7d7db" in card
    )


def test_no_folder_of_this_machine_is_told(tiny, tmp_path):
    tiny.model.save_pretrained(tmp_path / "my model")
    result = run(tiny, AutoModelForCausalLM.from_pretrained(tmp_path / "my model"))
    assert (
        str(tmp_path) not in words(result.save_pretrained(tmp_path / "out")) and "`my model`" in result.card()
    )


def test_a_folder_with_something_in_it_is_left_alone(result, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match="not empty"):
        result.save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("a bug")])
def test_nothing_half_written_is_left(result, tmp_path, monkeypatch, error):
    def fails(*args):
        raise error

    monkeypatch.setattr(type(result.tokenizer), "save_pretrained", fails)
    with pytest.raises(InputError if isinstance(error, OSError) else RuntimeError):
        result.save_pretrained(tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_made(result, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        result.save_pretrained(tmp_path / "file" / "model")


# ---- trackers ----


def test_tensorboard_gets_a_row_per_epoch(tiny, tmp_path, monkeypatch):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.chdir(tmp_path)
    history = run(tiny, report_to="tensorboard").history
    (events,) = (
        path.parent
        for path in (tmp_path / "runs").rglob("events.out.*")
        if "ma" in str(path.read_bytes()) and path.parent.name == "icu_nb"
    )
    written = accumulator.EventAccumulator(str(events))
    written.Reload()
    assert [(event.step, round(event.value, 5)) for event in written.Scalars("ma")] == [
        (epoch, round(ma, 5)) for epoch, ma in zip(history.epoch, history.ma, strict=False)
    ]
    assert [event.step for event in written.Scalars("l_fgt")] == [1, 2]


@pytest.mark.parametrize(
    "name, words",
    [
        ("abacus", "is not known. Known: .*tensorboard.*wandb"),
        ("wandb", "is not installed.*pip install wandb"),
    ],
)
def test_trackers_that_are_not_there(tiny, name, words):
    if name in [kind.value for kind in get_available_trackers()]:
        pytest.skip(f"{name} is installed")
    model = tiny.copy()
    weights = tiny.weights(model)
    with pytest.raises(InputError, match=f"`report_to`: '{name}' {words}"):
        run(tiny, model, report_to=name)
    assert tiny.same(model, weights)


def test_nothing_is_saved_before_the_first_check(result, tmp_path):
    unknown = replace(result, history=result.history.iloc[:0])
    with pytest.raises(InputError, match="before its first check"):
        unknown.save_pretrained(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_printing_a_result_shows_no_text(result):
    assert "samples" not in repr(result) and not any(
        text and text in repr(result) for text in result.samples.continuation
    )


def test_another_process_leaves_the_writing_to_the_first(result, tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "of the first").touch()
    monkeypatch.setattr(type(PartialState()), "is_main_process", False)
    assert (
        result.save_pretrained(tmp_path / "model") == tmp_path / "model"
        and len(list((tmp_path / "model").iterdir())) == 1
    )
