"""Audit: quantization, relearning, and the audit that runs every attack and changes no model."""

import copy

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from icu_nb.data.people import people
from icu_nb.errors import InputError
from icu_nb.evals.audit import (
    _ATTACKS,
    _mean_row,
    audit,
    memorization_measures,
    quantize,
    relearn,
    round_to_nearest,
)
from icu_nb.evals.extraction import extraction_strength, secret_prompts
from icu_nb.evals.people_questions import personal_facts
from icu_nb.metrics import extraction_likelihood, memorization_accuracy
from icu_nb.models.loading import add_lora, merge_lora
from icu_nb.models.tiny import tiny_gpt_neo
from icu_nb.paper.audit_figures import audit_table, plot_audit
from icu_nb.text import tokenize

COLUMNS = ["attack", "metric", "value", "low", "high", "n"]


def test_rounding_a_hand_made_matrix():
    weight = torch.tensor([[0.7, -0.32, 0.1, 0.04], [7.0, 3.4, -3.6, 0.0], [0.0] * 4])
    assert torch.allclose(
        round_to_nearest(weight, 4), torch.tensor([[0.7, -0.3, 0.1, 0.0], [7.0, 3.0, -4.0, 0.0], [0.0] * 4])
    )
    assert torch.allclose(
        round_to_nearest(torch.tensor([[127.0, 0.4, -126.6]]), 8), torch.tensor([[127.0, 0.0, -127.0]])
    )


@pytest.mark.parametrize("bits", [8, 4])
def test_rounded_weights_have_few_levels_and_small_errors(bits):
    weight = torch.randn(5, 200, generator=torch.Generator().manual_seed(0))
    rounded, steps = round_to_nearest(weight, bits), 2 ** (bits - 1) - 1
    for row, old in zip(rounded, weight, strict=False):
        scale = old.abs().max() / steps
        assert len(row.unique()) <= 2 * steps + 1 and (row - old).abs().max() <= scale / 2 * (1 + 1e-4)
    assert torch.allclose(round_to_nearest(rounded, bits), rounded, atol=1e-6)  # once is enough


@pytest.mark.parametrize("bits", [1, 32, 4.0, "int8"])
def test_impossible_bits_are_refused(bits):
    with pytest.raises(InputError, match="`bits`"):
        round_to_nearest(torch.ones(1, 1), bits)


def test_quantize_rounds_every_matrix_embeddings_and_head_too(tiny):
    before = tiny.weights(tiny.model)
    model = quantize(tiny.model, 4)
    assert tiny.same(tiny.model, before)
    matrices = {name for name, tensor in before.items() if tensor.ndim == 2}
    assert {"transformer.wte.weight", "transformer.wpe.weight", "lm_head.weight"} < matrices
    assert len(matrices) == 12 + 3
    for name, tensor in model.state_dict().items():
        expected = round_to_nearest(before[name], 4) if name in matrices else before[name]
        assert torch.equal(tensor, expected), name
    assert model.lm_head.weight is model.transformer.wte.weight  # tied, and rounded once


def test_gpt2_is_rounded_per_output_channel():
    """GPT-2 keeps its matrices the other way round."""
    model = GPT2LMHeadModel(GPT2Config(vocab_size=20, n_positions=8, n_embd=8, n_layer=1, n_head=2))
    old = model.transformer.h[0].mlp.c_fc.weight  # [in, out]
    new = quantize(model, 4).transformer.h[0].mlp.c_fc.weight
    assert torch.equal(new, round_to_nearest(old.T, 4).T) and not torch.equal(new, round_to_nearest(old, 4))


def test_an_adapter_is_merged_before_rounding(tiny):
    adapted = add_lora(tiny.copy())
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.05)
    before = tiny.weights(adapted)
    merged, rounded = merge_lora(copy.deepcopy(adapted)), quantize(adapted, 8)
    assert tiny.same(adapted, before)
    assert all(
        torch.equal(a, b)
        for a, b in zip(quantize(merged, 8).parameters(), rounded.parameters(), strict=False)
    )


def test_memorization_measures_are_the_three_measures(tiny):
    scores, sequences = memorization_measures(tiny.model, tiny.sequences), tiny.sequences
    for name, measure in {
        "MA": memorization_accuracy,
        "EL": extraction_likelihood,
        "ES": extraction_strength,
    }.items():
        assert np.allclose(scores[name], measure(tiny.model, **sequences.inputs))


def test_relearning_learns_what_is_shown_and_changes_a_copy(tiny):
    stranger = tiny_gpt_neo(len(tiny.tokenizer), max_length=64, n_layers=2, hidden_size=32, n_heads=2)
    before = tiny.weights(stranger)
    table = relearn(
        stranger,
        tiny.tokenizer,
        tiny.forget[:4],
        tiny.forget[:4],
        measure_at=(0, 20, 60),
        learning_rate=1e-2,
        max_length=48,
    )
    assert tiny.same(stranger, before) and not stranger.training
    assert list(table) == ["step", "id", "MA", "ES"] and table.groupby("step").size().to_dict() == {
        0: 4,
        20: 4,
        60: 4,
    }
    assert table.groupby("step").MA.mean().is_monotonic_increasing
    start = memorization_measures(stranger, tokenize(tiny.forget[:4], tiny.tokenizer, 48))
    assert np.allclose(table[table.step == 0].MA, start["MA"])
    again = relearn(
        stranger,
        tiny.tokenizer,
        tiny.forget[:4],
        tiny.forget[:4],
        measure_at=(0, 20, 60),
        learning_rate=1e-2,
        max_length=48,
    )
    pd.testing.assert_frame_equal(table, again)


@pytest.mark.parametrize("measure_at", [(), (-1, 4)])
def test_measuring_without_a_step_are_refused(tiny, measure_at):
    with pytest.raises(InputError, match="`measure_at`"):
        relearn(tiny.model, tiny.tokenizer, tiny.forget, tiny.forget, measure_at=measure_at)


def test_the_interval_of_a_share_does_not_collapse():
    """The rule of three: 0 of 64 is compatible with about 3.7/64 (two-sided)."""
    row = _mean_row("a", "b", [0] * 64)
    assert list(row) == COLUMNS and row["low"] == 0 and row["high"] == pytest.approx(1 - 0.025 ** (1 / 64))
    values = np.random.default_rng(0).random(200)
    row = _mean_row("a", "b", values)
    assert row["high"] - row["low"] == pytest.approx(2 * 1.96 * values.std() / 200**0.5, rel=0.15)


@pytest.fixture(scope="module")
def texts():
    return people(24, seed=8)


def test_relearning_trains_all_weights_whatever_was_frozen(tiny):
    frozen = tiny.copy().requires_grad_(False)
    adapted = add_lora(tiny.copy())
    tables = [
        relearn(
            model,
            tiny.tokenizer,
            tiny.heldout,
            tiny.forget,
            measure_at=(0, 3),
            learning_rate=3e-2,
            max_length=48,
        )
        for model in (tiny.model, frozen, adapted)
    ]
    assert tables[0].MA[tables[0].step == 3].mean() != tables[0].MA[tables[0].step == 0].mean()
    for table in tables[1:]:  # a fresh adapter changes nothing, and is merged
        pd.testing.assert_frame_equal(table, tables[0])
    assert not any(weight.requires_grad for weight in frozen.parameters())
    assert any("lora" in name for name, _ in adapted.named_parameters())


def turned(module, inputs, output):
    "A hook that leaves a block's states, but for their places."
    return (output[0].roll(1, -1), *output[1:]) if isinstance(output, tuple) else output.roll(1, -1)


def of_depth(tiny, forget):
    "What the audit needs for the depth, with secrets of the people in its texts."
    control = tiny.retain[:4]
    return {
        "memorized": tiny.model,
        "secrets": [own[:1] for own in personal_facts(forget)],
        "control": (control, [own[:1] for own in personal_facts(control)]),
    }


@pytest.mark.parametrize("kind", ["plain", "adapter", "hook"])
def test_audit_runs_every_attack_and_changes_nothing(tiny, texts, kind):
    forget, heldout = tiny.forget + texts[:4], texts[4:16]
    retrained = tiny_gpt_neo(len(tiny.tokenizer), max_length=64, n_layers=2, hidden_size=32, n_heads=2)
    model = tiny.copy()
    if kind == "adapter":
        model = add_lora(model)
    if kind == "hook":
        model.transformer.h[0].register_forward_hook(turned)
    before = tiny.weights(model)
    table = audit(
        model,
        tiny.tokenizer,
        forget,
        heldout,
        retrained,
        **of_depth(tiny, forget),
        unrelated=texts[16:],
        secret_prompts=secret_prompts(forget),
        max_length=48,
    )
    assert tiny.same(model, before) and all(p.grad is None for p in retrained.parameters())
    assert list(table) == COLUMNS and list(dict.fromkeys(table.attack)) == list(_ATTACKS)
    assert not table.duplicated(["attack", "metric"]).any() and table.value.notna().all()
    bounded = table.dropna(subset=["low"])
    assert ((bounded.low <= bounded.value + 1e-9) & (bounded.value <= bounded.high + 1e-9)).all()
    shares = bounded[bounded.metric != "PrivLeak"]
    assert shares.low.ge(0).all() and shares.high.le(1).all() and len(shares) == len(bounded) - 1
    value = table.set_index("metric").value
    assert value["MA"] == pytest.approx(
        memorization_accuracy(model, tokenize(forget, tiny.tokenizer, 48)).mean().item()
    )
    if kind == "hook":
        assert value["UDS above control"] > 0 and value["MA"] < 0.7
    else:
        assert value["MA"] > 0.7 and value["AUC loss"] > 0.6 and value["PrivLeak"] < 0
        assert value["UDS above control"] == 0
    assert any("other words" in metric for metric in table.metric)
    sources = ["the same texts", "some forget texts", "held-out texts", "unrelated text"]
    steps = ["MA at step 4", "MA at step 8", "MA at step 16", "MA"]
    assert {f"{source}: {step}" for source in sources for step in steps} < set(table.metric)


def test_the_depth_without_its_models_is_left_out_or_refused_before_anything_runs(tiny, texts):
    needed = {"retrained": tiny.model, **of_depth(tiny, tiny.forget + texts[:4])}
    for missing in ("memorized", "retrained", "secrets"):
        own = {**needed, missing: None}
        with pytest.raises(InputError, match=f"`{missing}`: the depth cannot be measured without it"):
            audit(None, None, tiny.forget + texts[:4], texts[4:16], attacks=["depth"], **own)


def test_the_texts_of_the_depth_are_checked_before_other_attacks_run(tiny, texts, monkeypatch):
    monkeypatch.setitem(_ATTACKS, "memorization", None)
    forget = tiny.forget + texts[:4]
    own = {**of_depth(tiny, forget), "secrets": [["nowhere"]] * len(forget)}
    with pytest.raises(InputError, match="`secrets`: text 0 does not hold"):
        audit(tiny.model, tiny.tokenizer, forget, texts[4:16], tiny.model, **own)


def test_what_is_not_at_hand_is_left_out(tiny, texts):
    table = audit(
        tiny.model,
        tiny.tokenizer,
        texts[:10],
        texts[10:20],
        attacks=["membership", "forget quality"],
        max_length=24,
    )
    assert (
        set(table.attack) == {"membership"}
        and "PrivLeak" not in set(table.metric)
        and "AUC reference" not in set(table.metric)
    )


def test_a_model_against_itself_has_no_leak(tiny, texts):
    table = audit(
        tiny.model,
        tiny.tokenizer,
        texts[:10],
        texts[10:20],
        tiny.model,
        attacks=["membership", "forget quality"],
        max_length=24,
    ).set_index("metric")
    assert (
        table.value["PrivLeak"] == 0
        and table.value["KS p-value"] == 1
        and table.value["AUC reference"] == 0.5
    )


def test_unknown_attacks_and_small_sets_are_refused_before_anything_runs(tiny, texts):
    known = "memorization, extraction, sampling, membership, forget quality, relearning, quantization, depth"
    with pytest.raises(InputError, match=rf"\['bribery'\] are not known.*{known}"):
        audit(None, None, texts[:10], texts[10:20], attacks=["bribery"])
    with pytest.raises(InputError, match="`forget`: 9 texts are too few"):
        audit(None, None, texts[:9], texts[10:20])
    with pytest.raises(InputError, match="`heldout`: 3 texts are too few"):
        audit(None, None, texts[:10], texts[10:13])


def rows_of(values):
    "Made-up rows of `audit`: model -> metric -> a value per seed."
    attacks = {"MA": "memorization", "PrivLeak": "membership", "KS gap": "forget quality", "UDS": "depth"}
    rows = []
    for model, metrics in values.items():
        for metric, of_seeds in metrics.items():
            attack = attacks.get(metric, "membership" if metric.startswith("AUC") else "extraction")
            for seed, value in enumerate(of_seeds):
                rows.append(
                    {"model": model, "seed": seed, "attack": attack, "metric": metric, "value": value}
                )
    return pd.DataFrame(rows)


ORIGINAL = {"verbatim": (1, 0.8), "window": (0.3, 0.1), "AUC loss": (1, 1), "UDS": (0, 0), "MA": (1, 1)}
NPO = {"verbatim": (0, 0.2), "window": (1, 1), "AUC loss": (0.1, 0.2), "UDS": (0.7, 0.9), "MA": (1, 1)}
ICU = {"verbatim": (0.5, 0.4), "AUC loss": (0.7, 0.5), "UDS": (0.9, 0.7), "MA": (0, 0)}
RETRAINED = {"verbatim": (0.2, 0), "window": (0.1, 0.1), "AUC loss": (0.5, 0.6), "UDS": (1, 1), "MA": (0, 0)}
OF_MODELS = {"original": ORIGINAL, "NPO": NPO, "ICU": ICU, "retrained": RETRAINED | {"KS gap": (1, 1)}}


def test_the_table_names_the_strongest_attack_of_each_model():
    """Shares by hand; what hardly tells the two ends apart, and what is no attack, does not count."""
    table = audit_table(rows_of(OF_MODELS))
    assert list(table.index) == list(OF_MODELS)
    assert list(table) == ["extraction", "membership", "depth", "strongest"]
    shares = table.drop(columns="strongest").astype(float)
    assert shares.loc["original"].tolist() == [1, 1, 1] and shares.loc["retrained"].tolist() == [0, 0, 0]
    by_hand = {
        "ICU": [(0.3 / 0.8 + 0.4 / 0.8) / 2, (0.4 + 0) / 2, (0.1 + 0.3) / 2],
        "NPO": [(0 + 0.2 / 0.8) / 2, (0.8 + (0.6 - 0.2) / 0.8) / 2, (0.3 + 0.1) / 2],
    }
    for model, expected in by_hand.items():
        assert shares.loc[model].tolist() == pytest.approx(expected)
    assert table.strongest.tolist()[1:] == ["AUC loss", "verbatim", "none"]


def test_one_seed_needs_no_column_and_both_ends_are_needed():
    rows = rows_of(OF_MODELS)
    one = rows[rows.seed == 0]
    pd.testing.assert_frame_equal(audit_table(one), audit_table(one.drop(columns="seed")))
    with pytest.raises(InputError, match=r"`retrained`: there are no rows of 'fresh'.*original, NPO"):
        audit_table(one, retrained="fresh")


def test_the_picture_of_the_audit_fits_a_column():
    fig = plot_audit(rows_of(OF_MODELS))
    assert fig.get_size_inches()[0] <= 8
    (ax,) = fig.axes
    assert [label.get_text() for label in ax.get_yticklabels()] == list(OF_MODELS)
    texts = {text.get_text() for text in ax.texts}
    assert {"AUC loss", "verbatim", "none", "strongest attack"} <= texts
    dots = [line for line in ax.lines if line.get_marker() not in ("None", None)]
    assert len(dots) == 4 * 3 and all(0 <= line.get_xdata()[0] <= 1 for line in dots)
    plt.close(fig)
