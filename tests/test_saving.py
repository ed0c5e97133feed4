"""What a run leaves: a folder that plain transformers loads and that tells no text; rows for a tracker."""

import hashlib
import json
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from accelerate import PartialState
from accelerate.tracking import get_available_trackers
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from icu_nb.config import ICUConfig
from icu_nb.errors import InputError
from icu_nb.iur import Thresholds
from icu_nb.metrics import memorization_accuracy
from icu_nb.models.loading import add_lora, load_model, merge_lora
from icu_nb.objective import GradientAscent
from icu_nb.result import before_and_after
from icu_nb.unlearn import unlearn


def run(tiny, model=None, **options):
    settings = {name: options.pop(name) for name in list(options) if name in ICUConfig.__dataclass_fields__}
    return unlearn(
        model or tiny.copy(),
        tiny.tokenizer,
        tiny.forget,
        tiny.retain,
        tiny.config(**{"learning_rate": 1e-3, **settings}),
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


# ---- saved is what was unlearned ----


def adapted(tiny, **settings):
    from peft import LoraConfig

    torch.manual_seed(0)
    return add_lora(tiny.copy(), LoraConfig(r=4, lora_alpha=32, task_type="CAUSAL_LM", **settings))


TIED = {
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "embedding": {"target_modules": ["q_proj", "wte"]},
    "both": {"target_modules": ["wte", "lm_head"]},
    "head whole": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "embedding whole": {"target_modules": ["q_proj"], "modules_to_save": ["wte"]},
    "all linear": {"target_modules": "all-linear"},
    "dora": {"target_modules": ["lm_head"], "use_dora": True},
}


@pytest.mark.parametrize("kind", TIED)
def test_a_tied_head_with_an_adapter(tiny, tmp_path, kind, recwarn):
    """Head and embedding are one weight; an adapter at one of them is no adapter at the other."""
    result = run(tiny, adapted(tiny, **TIED[kind]))
    assert tiny.model.config.tie_word_embeddings
    said, weights = logits(result.model, tiny), tiny.weights(result.model)
    assert (said - logits(tiny.model, tiny)).abs().max() > 0.1
    result.save_pretrained(tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    torch.testing.assert_close(logits(loaded, tiny), said, rtol=0, atol=1e-4)
    assert loaded.config.tie_word_embeddings == (kind == "all linear")
    assert tiny.same(result.model, weights)  # the live model is as it was
    assert result.model.get_base_model().config.tie_word_embeddings
    assert not [warning for warning in recwarn.list if "tie" in str(warning.message)]


def test_the_untied_model_unlearns_again(tiny, tmp_path):
    first = run(tiny, adapted(tiny, **TIED["head"])).save_pretrained(tmp_path / "first")
    model = AutoModelForCausalLM.from_pretrained(first)
    loaded = AutoModelForCausalLM.from_pretrained(run(tiny, model).save_pretrained(tmp_path / "second"))
    assert torch.equal(logits(loaded, tiny), logits(model, tiny))


def test_an_adapter_that_cannot_be_saved_is_refused_first(tiny):
    """peft trains a bias beside a layer that has none, and cannot merge it."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, task_type="CAUSAL_LM", target_modules=["q_proj"], lora_bias=True)
    model = tiny.copy()
    weights = tiny.weights(model)
    with pytest.raises(InputError, match="`lora`: this adapter cannot be merged") as error:
        add_lora(model, config)
    assert "\n" not in str(error.value)
    assert tiny.same(model, weights) and model.state_dict().keys() == weights.keys()
    own = get_peft_model(tiny.copy(), config)
    weights = tiny.weights(own)
    with pytest.raises(InputError, match="`lora`: this adapter cannot be merged"):
        run(tiny, own)
    assert tiny.same(own, weights)


LLAMA = {
    **TIED,
    "embedding": {"target_modules": ["embed_tokens"]},
    "both": {"target_modules": ["embed_tokens", "lm_head"]},
}
LLAMA |= {
    "embedding whole": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "both whole, tied": {
        "target_modules": ["q_proj"],
        "modules_to_save": ["embed_tokens"],
        "ensure_weight_tying": True,
    },
    "single tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [1, 2]},
}


@pytest.mark.parametrize("kind", LLAMA)
def test_a_tied_llama_with_an_adapter(tiny, tmp_path, kind):
    from peft import LoraConfig

    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(tiny.tokenizer), tie_word_embeddings=True, **shape)
    model = add_lora(LlamaForCausalLM(config).eval(), LoraConfig(r=4, task_type="CAUSAL_LM", **LLAMA[kind]))
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.3 * torch.randn(p.shape))
    said = logits(model, tiny)
    merge_lora(model, copy_to="cpu").save_pretrained(tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    torch.testing.assert_close(logits(loaded, tiny), said, rtol=0, atol=1e-4)
    assert loaded.config.tie_word_embeddings == (kind in ("all linear", "both whole, tied", "single tokens"))
    assert torch.equal(logits(model, tiny), said)


def test_adapters_tied_to_each_other_are_refused(tiny):
    from peft import LoraConfig

    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=60, tie_word_embeddings=True, **shape))
    config = LoraConfig(target_modules=["q_proj", "embed_tokens"], ensure_weight_tying=True)
    with pytest.raises(InputError, match="`lora`: this adapter cannot be merged"):
        add_lora(model, config)


DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def dtypes_in(folder):
    return {tensor.dtype for tensor in load_file(folder / "model.safetensors").values()}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lora", [False, True])
def test_saved_like_given(tiny, tmp_path, dtype, lora):
    model = tiny.copy().to(dtype)
    if lora:
        torch.manual_seed(0)
        model = add_lora(model, 4)
    result = run(tiny, model)
    trained = {p.dtype for p in result.model.parameters() if p.requires_grad}
    assert trained == {torch.float32}
    folder = result.save_pretrained(tmp_path / "model")
    assert dtypes_in(folder) == {dtype}
    assert len(load_file(folder / "model.safetensors")) == len(list(tiny.model.parameters()))  # tied: once
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert loaded.dtype == dtype and loaded.config.tie_word_embeddings
    name = str(dtype).removeprefix("torch.")
    assert json.loads((folder / "config.json").read_text())["dtype"] == name
    assert json.loads((folder / "icu_result.json").read_text())["saved_as"] == name
    assert ("saved as" in (folder / "README.md").read_text()) == (dtype != torch.float32)
    sequences = tiny.sequences
    before, after = (
        memorization_accuracy(one.float(), sequences.input_ids, sequences.attention_mask).mean()
        for one in (result.model, loaded)
    )
    assert abs(before - after) < 0.02
    with torch.no_grad():
        scale = logits(result.model, tiny).abs().max()
        assert (logits(loaded, tiny) - logits(result.model, tiny)).abs().max() < 0.05 * scale


def test_weights_gathered_from_shards_like_given(result, tmp_path):
    """FSDP: the first process has all weights beside a model that holds shards; saving leaves them there."""
    weights = {name: tensor.clone() for name, tensor in result.model.state_dict().items()}
    dtypes = dict.fromkeys(weights, torch.bfloat16)
    gathered = replace(result, weights=weights, dtypes=dtypes)
    for name in ("first", "second"):
        folder = gathered.save_pretrained(tmp_path / name)
        assert dtypes_in(folder) == {torch.bfloat16}
        loaded = AutoModelForCausalLM.from_pretrained(folder)
        assert loaded.dtype == torch.bfloat16
        for part, tensor in loaded.state_dict().items():
            assert torch.equal(tensor, weights[part].bfloat16())


def test_each_weight_like_given(tiny, tmp_path):
    model = tiny.copy().bfloat16()
    for module in model.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.float()
    folder = run(tiny, model).save_pretrained(tmp_path / "model")
    for name, tensor in load_file(folder / "model.safetensors").items():
        assert tensor.dtype == (torch.float32 if "ln_" in name else torch.bfloat16), name


def test_a_whole_module_beside_an_adapter_like_given(tiny, tmp_path):
    from peft import LoraConfig

    config = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    folder = run(tiny, add_lora(tiny.copy().bfloat16(), config)).save_pretrained(tmp_path / "model")
    assert dtypes_in(folder) == {torch.bfloat16}


@pytest.mark.parametrize("lora", [None, 4])
def test_a_checkpoint_of_16_bits_is_saved_like_that(tiny, tmp_path, lora):
    tiny.copy().bfloat16().save_pretrained(tmp_path / "given")
    tiny.tokenizer.save_pretrained(tmp_path / "given")
    model, _ = load_model(tmp_path / "given", device="cpu", lora=lora)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    result = run(tiny, model)
    assert dtypes_in(result.save_pretrained(tmp_path / "saved")) == {torch.bfloat16}
    if lora is None:  # in fp32, who wants it so
        result.model.save_pretrained(tmp_path / "fp32")
        assert dtypes_in(tmp_path / "fp32") == {torch.float32}


# ---- a run that was cut short ----


def stop_in(epoch, step):
    """A refinement is asked at every check; the objective counts steps, and ends the run at this one."""
    seen = {"steps": 0}

    def objective(model, batch, reference):
        seen["steps"] += 1
        if seen["steps"] == 2 * (epoch - 1) + step:
            raise KeyboardInterrupt
        return GradientAscent()(model, batch, reference)

    return objective


@pytest.mark.parametrize("step, is_known", [(1, True), (2, False)])
def test_an_interrupted_run_shows_no_other_epochs_numbers(tiny, tmp_path, step, is_known):
    """Two steps an epoch: before the first one the model is still what the last check saw."""
    result = run(tiny, objective=stop_in(2, step))
    assert result.stop_reason == "interrupted" and result.history.epoch.max() == 1
    table = before_and_after(result.history, result.thresholds, result.went_on)
    assert table.after.notna().all() == is_known and table.loc["ma", "before"] > 0.9
    card = result.card()
    assert ("was not measured again" in card) != is_known
    assert ("| not measured |" in card) != is_known
    assert (f"{result.history.ma.iloc[-1]:.4f}" in card) or not is_known
    facts = json.loads((result.save_pretrained(tmp_path / "m") / "icu_result.json").read_text())
    assert facts["trained_after_last_row"] != is_known


def test_after_a_loss_that_is_no_number(tiny):
    def objective(model, batch, reference):
        terms = GradientAscent()(model, batch, reference)
        return {name: value * (float("nan") if len(seen) == 3 else 1.0) for name, value in terms.items()}

    seen = []

    def counted(model, batch, reference):
        seen.append(1)
        return objective(model, batch, reference)

    with pytest.warns(UserWarning, match="batch 1"):
        result = run(tiny, objective=counted)  # the first step of epoch 2: nothing has changed since
    assert result.stop_reason == "non_finite_loss" and not result.went_on
    assert "was not measured again" not in result.card()


def test_an_epoch_without_a_check_has_no_numbers(tiny):
    def stop(model, row):
        if row["epoch"] == 3:
            raise KeyboardInterrupt

    result = run(tiny, callback=stop, check_every=2, max_epochs=6)
    assert not result.went_on and result.history.epoch.max() == 3
    card = result.card()
    assert "that of epoch 2" in card and "It ended after epoch 3" in card and "| not measured |" in card
    assert before_and_after(result.history, result.thresholds).after.isna().all()


def test_a_callback_that_stops_comes_after_the_check(tiny):
    def stop(model, row):
        if row["epoch"] == 1:
            raise KeyboardInterrupt

    result = run(tiny, callback=stop)
    assert not result.went_on and "was not measured again" not in result.card()


def test_what_was_not_measured_says_so(result):
    """Far from its goal a run does not measure EL."""
    rows = {"epoch": [0, 1], "ma": [0.9, 0.1], "el": [float("nan"), 0.25], "bleu": [0.5, 0.5]}
    history = pd.DataFrame(rows).assign(bert_f1=float("nan"))
    table = before_and_after(history, result.thresholds)
    assert np.isnan(table.loc["el", "before"]) and table.loc["el", "after"] == 0.25
    assert list(table.index) == ["ma", "el", "bleu"]
    card = replace(result, history=history).card()
    assert "| extraction likelihood (EL) | not measured | 0.2500 | 0.0000 |" in card


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
