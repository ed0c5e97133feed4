"""`unlearn` keeps its contract: what it returns, why it stops, what it leaves alone."""

import copy
import importlib
import pickle
import warnings
from dataclasses import fields, replace

import datasets
import numpy as np
import pandas as pd
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import icu_nb.run
from icu_nb.config import ICUConfig
from icu_nb.errors import InputError
from icu_nb.iur import Thresholds, calibrate_thresholds, is_forgotten, select_published_rule
from icu_nb.metrics import memorization_scores
from icu_nb.objective import ICU, GradientAscent, Objective
from icu_nb.result import UnlearnResult
from icu_nb.text import prompt_suffix, tokenize
from icu_nb.text_scores import sentence_bleu
from icu_nb.unlearn import unlearn

HISTORY = [
    "epoch",
    "loss",
    "l_fgt",
    "l_lrn",
    "l_kl",
    "ma",
    "el",
    "bleu",
    "bert_f1",
    "active",
    "seconds_train",
    "seconds_check",
    "check",
    "arithmetic",
]
SAMPLES = ["epoch", "id", "ma", "el", "bleu", "bert_f1", "entropy", "distinct", "active", "continuation"]
NEVER = Thresholds(ma=0.0, el=0.0)  # a model that says one right token is over them


def run(
    tiny, model=None, *, thresholds=NEVER, forget=None, retain=None, tokenizer=None, objective=None, **rest
) -> UnlearnResult:
    """A run; settings of `ICUConfig` and arguments of `unlearn` alike."""
    arguments = {name: rest.pop(name) for name in ("refinement", "embedder", "encoder") if name in rest}
    return unlearn(
        model or tiny.copy(),
        tokenizer or tiny.tokenizer,
        forget or tiny.forget,
        retain or tiny.retain,
        tiny.config(**rest),
        thresholds=thresholds,
        objective=objective,
        **arguments,
    )


class Spy(Objective):
    """An objective that notes what it is asked, and may do something before it answers."""

    needs_reference = ("neighbor",)

    def __init__(self, inner=None, before=lambda model, call: None, change=lambda terms, call: terms):
        self.inner, self.before, self.change, self.batches = inner or ICU(), before, change, []

    def __call__(self, model, batch, reference):
        self.batches.append(batch)
        self.before(model, len(self.batches))
        return self.change(self.inner(model, batch, reference), len(self.batches))

    @property
    def rows(self):
        return [batch.forget.rows.tolist() for batch in self.batches]


def stop_at(call):
    def before(model, number):
        if number == call:
            raise KeyboardInterrupt

    return before


# ---- what comes back ----


@pytest.fixture(scope="module")
def three_epochs(tiny):
    model = tiny.copy()
    return model, run(tiny, model, max_epochs=3)


def test_the_model_is_changed_in_place(tiny, three_epochs):
    model, result = three_epochs
    assert result.model is model
    assert not tiny.same(model, tiny.weights(tiny.model))


def test_history_has_a_row_per_epoch(tiny, three_epochs):
    history = three_epochs[1].history
    assert history.columns.drop("bleu_undefined", errors="ignore").tolist() == HISTORY
    assert set(history["arithmetic"]) == {"fp32"} and history["epoch"].tolist() == [0, 1, 2, 3]
    losses = history[["loss", "l_fgt", "l_lrn", "l_kl"]]
    assert losses.iloc[0].isna().all() and losses.iloc[1:].notna().all(axis=None)
    assert np.allclose(
        losses["loss"], losses[["l_fgt", "l_lrn", "l_kl"]].sum(axis=1, skipna=False), equal_nan=True
    )
    assert (
        history["seconds_train"][0] == 0
        and (history["seconds_check"] > 0).all()
        and (history["seconds_train"][1:] > 0).all()
    )
    assert history["bert_f1"].isna().all(), "no encoder was given"


def test_samples_have_a_row_per_sequence_and_epoch(tiny, three_epochs):
    _, result = three_epochs
    samples = result.samples
    assert samples.columns.tolist() == SAMPLES and samples.index.tolist() == list(range(4 * len(tiny.forget)))
    assert samples[["epoch", "id"]].to_numpy().tolist() == [
        [epoch, i] for epoch in range(4) for i in range(len(tiny.forget))
    ]
    means = samples.groupby("epoch")[["ma", "el", "bleu"]].mean()
    assert np.allclose(means, result.history[["ma", "el", "bleu"]])
    assert samples.groupby("epoch")["active"].sum().tolist() == result.history["active"].tolist()
    assert all(isinstance(text, str) for text in samples["continuation"])


def test_the_first_and_the_last_row_are_the_model_before_and_after(tiny, three_epochs):
    model, result = three_epochs
    for epoch, scored in ((0, tiny.model), (3, model)):
        accuracy, likelihood = memorization_scores(scored, tiny.sequences)
        rows = result.samples[result.samples["epoch"] == epoch]
        assert rows["ma"].to_numpy() == pytest.approx(accuracy.numpy()) and rows[
            "el"
        ].to_numpy() == pytest.approx(likelihood.numpy())


def test_the_result_names_settings_and_pairs(tiny, three_epochs):
    _, result = three_epochs
    assert (
        result.config == tiny.config(max_epochs=3, bounded=False, neighbors="nearest", n_neighbors=1)
        and result.thresholds == NEVER
        and result.stop_reason in result.message.replace(" ", "_")
    )
    assert (
        result.pairs.shape == (len(tiny.forget), 1)
        and result.pairs.min() >= 0
        and result.pairs.max() < len(tiny.retain)
    )


def test_it_forgets_and_gradient_ascent_forgets_too(tiny):
    for objective in (None, GradientAscent()):
        result = run(
            tiny,
            objective=objective,
            learning_rate=1e-2,
            max_epochs=30,
            thresholds=Thresholds(ma=0.5, el=0.1),
        )
        assert result.stop_reason == "thresholds" and result.history["ma"].iloc[0] > 0.9
    assert result.history[["l_lrn", "l_kl"]].isna().all(axis=None), "gradient ascent has no such terms"


# ---- why it stops ----


def test_stops_at_the_thresholds(tiny):
    result = run(tiny, learning_rate=1e-2, max_epochs=30, thresholds=Thresholds(ma=0.6, el=0.3))
    met = (result.history["ma"] <= 0.6) & (result.history["el"] <= 0.3)
    assert result.stop_reason == "thresholds" and met.tolist() == [False] * (len(met) - 1) + [True]


@pytest.mark.parametrize(
    "settings",
    [
        {"thresholds": Thresholds(ma=1, el=1)},
        {"thresholds": Thresholds(ma=0, el=0, bleu=1, bert_f1=1), "stop": "all_forgotten"},
    ],
)
def test_nothing_to_forget(tiny, settings):
    """A model that meets the stop rule is not touched."""
    model = tiny.copy()
    if settings["thresholds"].ma == 0:  # so wrong that no continuation is the true one
        with torch.no_grad():
            model.transformer.wte.weight.copy_(
                torch.randn(model.transformer.wte.weight.shape, generator=torch.Generator().manual_seed(0))
            )
    before = tiny.weights(model)
    result = run(tiny, model, **settings)
    assert result.stop_reason == "nothing_to_forget" and result.history["epoch"].tolist() == [0]
    assert tiny.same(model, before)


def with_four_words(tiny):
    """The forget texts whose true continuations BLEU can compare."""
    truths = tiny.tokenizer.batch_decode(prompt_suffix(tiny.sequences)[1])
    return [text for text, bleu in zip(tiny.forget, sentence_bleu(truths, truths), strict=True) if bleu > 0]


def test_all_forgotten_is_the_authors_way(tiny):
    forget = with_four_words(tiny)
    result = run(
        tiny,
        forget=forget,
        learning_rate=1e-2,
        max_epochs=30,
        stop="all_forgotten",
        thresholds=Thresholds(ma=0, el=0, bleu=0.9),
    )
    assert result.stop_reason == "all_forgotten" and result.history["ma"].iloc[-1] > 0
    last = result.samples[result.samples["epoch"] == result.history["epoch"].iloc[-1]]
    assert (
        is_forgotten(last, result.thresholds).all()
        and not is_forgotten(result.samples[: len(forget)], result.thresholds).all()
    )


def test_a_refinement_that_picks_nobody_ends_the_run(tiny):
    """An epoch over no sequences would be a step on nothing."""
    spy, model = Spy(), tiny.copy()
    result = run(
        tiny, model, objective=spy, refinement=lambda scores, thresholds: np.full(len(scores), False)
    )
    assert not spy.batches and tiny.same(model, tiny.weights(tiny.model))
    assert result.stop_reason == "nothing_to_forget"


def test_max_epochs(tiny):
    result = run(tiny, max_epochs=2)
    assert result.stop_reason == "max_epochs" and result.history["epoch"].tolist() == [0, 1, 2]


@pytest.mark.parametrize("call, epochs", [(1, [0]), (4, [0, 1])])
def test_interrupted_returns_what_was_reached(tiny, call, epochs):
    model, spy = tiny.copy(), Spy(before=stop_at(call))
    result = run(tiny, model, objective=spy, refinement=None, max_epochs=5)  # two steps an epoch
    assert (
        result.stop_reason == "interrupted"
        and result.model is model
        and result.history["epoch"].tolist() == epochs
    )
    assert tiny.same(model, tiny.weights(tiny.model)) is (call == 1)


def test_interrupted_in_the_first_check(tiny, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(importlib.import_module("icu_nb.unlearn"), "check_all", interrupt)
    result = run(tiny)
    assert result.stop_reason == "interrupted" and len(result.history) == len(result.samples) == 0
    assert result.history.columns.tolist() == HISTORY and result.samples.columns.tolist() == SAMPLES


def poisoned(number, *, loss=None, gradient=False):
    """An objective whose loss, or gradient, goes bad at one call; it keeps the weights of then."""
    seen = {}

    def before(model, call):
        if call == number:
            seen.update({name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()})

    def change(terms, call):
        if call == number and gradient:
            zero = terms["l_fgt"] - terms["l_fgt"].detach()
            return {**terms, "bad": torch.sqrt(zero * 0)}  # 0 itself, its derivative infinite times zero
        return {**terms, "l_kl": terms["l_kl"] * loss} if call == number else terms

    return Spy(before=before, change=change), seen


@pytest.mark.parametrize("number, epoch, batch", [(1, 1, 1), (4, 2, 2)])
@pytest.mark.parametrize("bad", [{"loss": float("nan")}, {"gradient": True}], ids=["loss", "gradient"])
def test_non_finite_keeps_the_last_good_state(tiny, number, epoch, batch, bad):
    spy, good = poisoned(number, **bad)
    model = tiny.copy()
    with pytest.warns(UserWarning, match=f"epoch {epoch}: .* in batch {batch}"):
        result = run(tiny, model, objective=spy, refinement=None, max_epochs=5)
    assert result.stop_reason == "non_finite_loss" and f"epoch {epoch}" in result.message
    assert tiny.same(model, good) and all(weights.isfinite().all() for weights in model.parameters())
    assert result.history["epoch"].tolist() == list(range(epoch))


@pytest.mark.parametrize("batch_size", [4, 8])
def test_a_model_that_blew_up_is_not_called_forgetful(tiny, batch_size):
    """With eight a batch, no second batch of the epoch shows what the first step did."""
    model = tiny.copy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = run(
            tiny,
            model,
            learning_rate=1e30,
            batch_size=batch_size,
            refinement=None,
            thresholds=Thresholds(ma=0.5, el=0.5),
        )
    assert result.stop_reason == "non_finite_loss"


# ---- who trains, and on what ----


def test_only_the_active_train(tiny):
    """Every epoch trains on exactly those that the check before it left active."""
    spy, forget = Spy(), with_four_words(tiny) + tiny.retain[:4]
    how = {"refinement": select_published_rule, "max_epochs": 4, "learning_rate": 5e-3}
    result = run(tiny, objective=spy, forget=forget, retain=tiny.retain[4:], **how)
    left = list(spy.rows)
    for epoch in range(4):
        before = result.samples[result.samples["epoch"] == epoch]
        active = before["id"][before["active"]].tolist()
        trained = [row for _ in range(-(-len(active) // 4)) for row in left.pop(0)]
        assert sorted(trained) == active
    assert not left and result.history["active"][0] < len(forget), (
        "the first check finds some forgotten already"
    )


def test_without_refinement_all_train(tiny):
    spy = Spy()
    result = run(tiny, objective=spy, refinement=None, max_epochs=3)
    assert result.history["active"].tolist() == [8] * 4
    assert [sorted(a + b) for a, b in zip(spy.rows[::2], spy.rows[1::2], strict=False)] == [
        list(range(8))
    ] * 3
    assert spy.rows[:2] != spy.rows[2:4], "every epoch has an order of its own"


@pytest.mark.parametrize("k", [1, 2])
def test_batches_hold_each_texts_own_neighbors(tiny, k):
    spy = Spy()
    result = run(tiny, objective=spy, refinement=None, max_epochs=1, n_neighbors=k, batch_size=3)
    assert result.pairs.shape == (8, k) and [len(rows) for rows in spy.rows] == [3, 3, 2]
    forget, retain = tiny.sequences.tokens(), tokenize(tiny.retain, tiny.tokenizer, 48).tokens()
    for batch in spy.batches:
        for part, expected in (
            (batch.forget, [forget[i] for i in batch.forget.rows]),
            (batch.neighbor, [retain[j] for i in batch.forget.rows for j in result.pairs[i]]),
        ):
            assert [
                row[real.bool()].tolist()
                for row, real in zip(part.input_ids, part.attention_mask, strict=False)
            ] == expected


def test_a_custom_objective_gets_the_original_it_asked_for(tiny):
    """It says which parts it wants remembered, and its terms become columns."""
    seen = []

    class Distance(Objective):
        needs_reference = ("forget",)

        def __call__(self, model, batch, reference):
            seen.append({*reference.parts})
            now = model(input_ids=batch.forget.input_ids, attention_mask=batch.forget.attention_mask).logits
            with torch.no_grad():
                then = original(
                    input_ids=batch.forget.input_ids, attention_mask=batch.forget.attention_mask
                ).logits
            assert torch.allclose(reference.logits("forget", batch.forget.rows), then, atol=1e-5)
            return {"l_fgt": -(now - then).abs().mean(), "l_new": (now**2).mean() * 1e-3}

    original = tiny.copy()
    result = run(tiny, objective=Distance(), max_epochs=2)
    assert seen and all(parts == {"forget"} for parts in seen)
    assert (
        result.history.columns.tolist() == [*HISTORY, "l_new"] and result.history["l_new"][1:].notna().all()
    )


def test_an_objective_that_asks_for_nothing_special_gets_both_parts(tiny):
    parts = []

    def objective(model, batch, reference):
        parts.append({*reference.parts})
        return GradientAscent()(model, batch, reference)

    run(tiny, objective=objective, max_epochs=1)
    assert parts[0] == {"forget", "neighbor"}


def test_check_steps_stops_within_an_epoch(tiny):
    settings = {
        "learning_rate": 5e-2,
        "batch_size": 1,
        "refinement": None,
        "max_epochs": 3,
        "thresholds": Thresholds(ma=0.9, el=0.99),
    }
    often, seldom = Spy(), Spy()
    results = run(tiny, objective=often, check_steps=1, **settings), run(tiny, objective=seldom, **settings)
    assert [result.stop_reason for result in results] == ["thresholds"] * 2
    assert len(often.rows) < 8 and len(seldom.rows) == 8, "one row a step, eight a whole epoch"
    assert results[0].history["ma"].iloc[-1] > results[1].history["ma"].iloc[-1], (
        "it stopped nearer to the threshold"
    )


@pytest.mark.parametrize("ma", [0.1, 0.5, 0.9])
def test_whether_it_is_enough_is_asked_of_no_more_sequences_than_needed(tiny, monkeypatch, ma):
    looks, memorization_accuracy = [], icu_nb.run.memorization_accuracy
    monkeypatch.setattr(
        icu_nb.run,
        "memorization_accuracy",
        lambda model, batch: looks.append(memorization_accuracy(model, batch)) or looks[-1],
    )
    run(
        tiny,
        learning_rate=1e-12,
        batch_size=8,
        refinement=None,
        max_epochs=1,
        check_steps=1,
        eval_batch_size=4,
        thresholds=Thresholds(ma=ma, el=1.0),
    )
    so_far = torch.cumsum(torch.cat(looks), 0)
    assert all(so_far[:-1] <= 8 * ma) and so_far[-1] > 8 * ma, (
        "it goes on while the answer is open, and then stops"
    )


def test_alpha_and_beta_weigh_their_terms(tiny):
    first = {
        settings: run(
            tiny,
            refinement=None,
            batch_size=8,
            learning_rate=1e-3,
            max_epochs=1,
            alpha=settings[0],
            beta=settings[1],
        ).history.iloc[1]
        for settings in [(0.5, 1.0), (1.0, 1.0), (0.0, 0.0)]
    }
    assert first[1.0, 1.0]["l_lrn"] == pytest.approx(2 * first[0.5, 1.0]["l_lrn"], rel=1e-4)
    assert (
        first[0.0, 0.0]["l_lrn"] == first[0.0, 0.0]["l_kl"] == 0
        and first[0.0, 0.0]["loss"] == first[0.0, 0.0]["l_fgt"] < 0
    )


# ---- thresholds, pairs and a callback ----


def test_heldout_texts_give_the_thresholds(tiny):
    result = unlearn(
        tiny.copy(), tiny.tokenizer, tiny.forget, tiny.retain, tiny.config(), heldout=tiny.heldout
    )
    expected = calibrate_thresholds(
        tiny.model, tiny.tokenizer, tiny.heldout, max_length=48, el_floor=0.0499, batch_size=64
    )
    assert result.thresholds == expected != Thresholds()


def test_without_thresholds_one_warning_says_which_are_used(tiny):
    with pytest.warns(UserWarning, match=r"MA 0.2994, EL 0.0499.*`heldout`") as caught:
        result = unlearn(tiny.copy(), tiny.tokenizer, tiny.forget, tiny.retain, tiny.config(max_epochs=1))
    assert len(caught) == 1 and caught[0].filename == __file__ and result.thresholds == Thresholds()


@pytest.mark.parametrize("form", [np.array, torch.tensor, list])
def test_ready_pairs_are_used(tiny, form):
    given = [[(i + 3) % 24, i] for i in range(8)]
    spy = Spy()
    result = unlearn(
        tiny.copy(),
        tiny.tokenizer,
        tiny.forget,
        tiny.retain,
        tiny.config(max_epochs=1),
        thresholds=NEVER,
        neighbors=form(given),
        objective=spy,
    )
    assert result.pairs.tolist() == given
    retain = tokenize(tiny.retain, tiny.tokenizer, 48).tokens()
    first = spy.batches[0]
    expected = [retain[j] for i in first.forget.rows.tolist() for j in given[i]]
    trained = first.neighbor.sequences.tokens()
    assert trained == expected


def test_the_pairs_of_a_run_give_the_same_run(tiny):
    found = run(tiny)
    again = unlearn(
        tiny.copy(),
        tiny.tokenizer,
        tiny.forget,
        tiny.retain,
        tiny.config(),
        thresholds=NEVER,
        neighbors=found.pairs,
    )
    assert_same(found, again)


def test_the_callback_sees_every_row_and_may_add_to_it(tiny):
    model, seen = tiny.copy(), []

    def callback(given, row):
        assert given is model and not model.training
        seen.append(dict(row))
        return {"norm": float(row["epoch"])} if row["epoch"] else None

    result = unlearn(
        model,
        tiny.tokenizer,
        tiny.forget,
        tiny.retain,
        tiny.config(max_epochs=3, check_every=2),
        thresholds=NEVER,
        callback=callback,
    )
    assert [row["epoch"] for row in seen] == [0, 1, 2, 3] and "ma" not in seen[1]
    assert result.history["norm"].tolist()[1:] == [1.0, 2.0, 3.0] and np.isnan(result.history["norm"][0])


@pytest.mark.parametrize(
    "old, new",
    [
        ("lr", "learning_rate"),
        ("seq_len", "max_length"),
        ("n", "el_n"),
        ("start", "el_start"),
        ("tracker", "report_to"),
        ("resume", "resume_from_checkpoint"),
    ],
)
def test_an_old_name_says_the_new_one(tiny, old, new):
    for call in (ICUConfig, lambda **old: unlearn(tiny.model, tiny.tokenizer, ["a"], ["b"], **old)):
        with pytest.raises(InputError) as error:
            call(**{old: 3})
        assert str(error.value) == f"`{old}`: this name is not used any more. Say {new}."


def test_a_name_that_never_was_is_pythons_own_error(tiny):
    with pytest.raises(TypeError, match="unexpected keyword argument 'learing_rate'"):
        ICUConfig(learing_rate=1e-4)
    with pytest.raises(TypeError, match="unexpected keyword argument 'treshold'"):
        unlearn(tiny.model, tiny.tokenizer, ["a"], ["b"], treshold=0.1)


def test_the_papers_settings():
    paper = ICUConfig.paper()
    assert (paper.alpha, paper.beta, paper.learning_rate, paper.batch_size) == (0.5, 1.0, 5e-6, 8)
    assert (paper.max_length, paper.n_neighbors, paper.max_overlap) == (200, 1, 1.0)
    assert paper.stop == "all_forgotten" and replace(paper, seed=2).max_length == 200
    assert pickle.loads(pickle.dumps(paper)) == copy.deepcopy(paper) == paper
    assert all(field.metadata["help"] for field in fields(ICUConfig))


# ---- the same again ----


def assert_same(a, b):
    timeless = [name for name in HISTORY if not name.startswith("seconds")]
    pd.testing.assert_frame_equal(a.history[timeless], b.history[timeless], check_exact=True)
    pd.testing.assert_frame_equal(a.samples, b.samples, check_exact=True)
    for left, right in zip(a.model.parameters(), b.model.parameters(), strict=True):
        assert torch.equal(left, right)


def test_the_same_seed_gives_the_same_run(tiny):
    assert_same(run(tiny), run(tiny))


def test_another_seed_gives_another_order(tiny):
    spies = Spy(), Spy()
    for seed, spy in enumerate(spies):
        run(tiny, objective=spy, refinement=None, seed=seed)
    assert spies[0].rows != spies[1].rows


@pytest.mark.parametrize("columns", [["text"], ["input_ids"], ["text", "input_ids"]])
def test_data_sets_are_as_good_as_lists(tiny, columns):
    def data_set(texts):
        return datasets.Dataset.from_dict(
            {"text": texts, "input_ids": tiny.tokenizer(texts)["input_ids"], "other": texts}
        ).select_columns([*columns, "other"])

    by_list, by_data_set = run(tiny), run(tiny, forget=data_set(tiny.forget), retain=data_set(tiny.retain))
    assert np.array_equal(by_list.pairs, by_data_set.pairs)
    assert_same(by_list, by_data_set)


# ---- what it leaves alone ----


def test_only_trainable_parameters_change(tiny):
    model = tiny.copy()
    for name, parameter in model.named_parameters():
        parameter.requires_grad = "h.1.mlp" in name
    before = tiny.weights(model)
    run(tiny, model)
    changed = {
        name for name, weights in tiny.weights(model).items() if not torch.equal(weights, before[name])
    }
    assert changed == {name for name in before if "h.1.mlp" in name}


def test_a_bf16_checkpoint_moves(tiny):
    """At learning_rate 5e-6 a bf16 weight stays where it is; its fp32 copy does not."""
    model = tiny.copy().to(torch.bfloat16)
    before = {name: tensor.float() for name, tensor in tiny.weights(model).items()}
    run(tiny, model, learning_rate=5e-6, max_epochs=1)
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    moved = [not torch.equal(tensor.cpu(), before[name]) for name, tensor in model.state_dict().items()]
    assert sum(moved) > len(moved) / 2
    assert all(
        torch.allclose(tensor.cpu(), before[name], atol=1e-4) for name, tensor in model.state_dict().items()
    ), "by no more than learning_rate per step"


def gpt2(tiny, dropout=0.0, tied=True):
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(tiny.tokenizer),
            n_embd=32,
            n_layer=1,
            n_head=2,
            n_positions=64,
            resid_pdrop=dropout,
            embd_pdrop=dropout,
            attn_pdrop=dropout,
            tie_word_embeddings=tied,
            bos_token_id=0,
            eos_token_id=0,
        )
    )


def test_dropout_is_off(tiny):
    """Also where neighbors are looked for: the mode in which the model comes makes no difference."""
    modes = []
    spy = Spy(before=lambda model, call: modes.append(model.training))
    training, evaluating = (
        run(tiny, gpt2(tiny, 0.5).train(), objective=spy, refinement=None),
        run(tiny, gpt2(tiny, 0.5).eval(), refinement=None),
    )
    assert modes and not any(modes)
    assert np.array_equal(training.pairs, evaluating.pairs)
    assert_same(training, evaluating)


@pytest.mark.parametrize("tied", [True, False])
def test_tied_embeddings_stay_tied(tiny, tied):
    """A head tied to the embedding trains with it; the original's must not."""
    divergence, model = [], gpt2(tiny, tied=tied).eval()

    def note(terms, call):
        divergence.append(terms["l_kl"].item())
        return terms

    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    run(tiny, model, objective=Spy(change=note), refinement=None, max_epochs=1)
    assert (head.weight is embedding.weight) is tied
    assert divergence[0] == pytest.approx(0, abs=1e-6) and divergence[1] > 1e-4


def test_texts_are_compared_by_what_is_trained_on(tiny):
    """A pool text that opens like a forget text and goes on otherwise is the same text once both are cut."""
    opening = tiny.tokenizer.decode(tiny.tokenizer(tiny.forget[0])["input_ids"][:60])
    pool = [opening + " " + " ".join(tiny.retain[:4]), *tiny.retain[:5]]
    with pytest.warns(UserWarning, match=r"`retain`.*\[0\]"):
        result = run(
            tiny,
            forget=tiny.forget[:1],
            retain=pool,
            embedder=lambda texts: np.zeros((len(texts), 2)),
            max_epochs=1,
        )
    assert result.pairs.tolist() == [[1]]
