"""Checks in two stages: what they measure, what they cost, and that they decide as full ones do."""

import importlib
import math

import numpy as np
import pandas as pd
import pytest
import torch

import icu_nb.run
from icu_nb.config import ICUConfig
from icu_nb.errors import InputError
from icu_nb.iur import Thresholds, score_forget_set, select_icu, select_published_rule, thresholds_met
from icu_nb.objective import ICU
from icu_nb.pairs import Task
from icu_nb.result import before_and_after
from icu_nb.run import Run, check_all, is_enough
from icu_nb.text import pad, prompt_suffix, tokenize
from icu_nb.text_scores import sentence_bleu
from icu_nb.unlearn import unlearn

FAR = Thresholds(ma=0.05, el=0.0)
GOAL = Thresholds(ma=0.6, el=0.3)
LEARNS = {"learning_rate": 1e-2, "max_epochs": 30}


def with_four_words(tiny):
    """The forget texts whose true continuations BLEU can compare."""
    truths = tiny.tokenizer.batch_decode(prompt_suffix(tiny.sequences)[1])
    return [text for text, bleu in zip(tiny.forget, sentence_bleu(truths, truths), strict=True) if bleu > 0]


def run(
    tiny, *, thresholds=GOAL, check="staged", refinement=select_icu, folder=None, forget=None, **settings
):
    """A run of `unlearn`, by default a staged one that reaches its goal."""
    options = {
        name: settings.pop(name) for name in ("callback", "resume_from_checkpoint") if name in settings
    }
    return unlearn(
        tiny.copy(),
        tiny.tokenizer,
        forget or tiny.forget,
        tiny.retain,
        tiny.config(check=check, **{**LEARNS, **settings}),
        thresholds=thresholds,
        refinement=refinement,
        checkpoint_dir=folder,
        **options,
    )


def same_weights(one, other):
    pairs = zip(one.model.parameters(), other.model.parameters(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def last_rows(result):
    return result.samples[result.samples["epoch"] == result.history["epoch"].iloc[-1]]


# ---- what a check costs ----


class Counted:
    """The tokens that go through a model."""

    def __init__(self, model):
        self.tokens = 0
        self.hook = model.register_forward_pre_hook(self.count, with_kwargs=True)

    def count(self, module, args, kwargs):
        ids, mask = kwargs["input_ids"], kwargs.get("attention_mask")
        self.tokens += ids.numel() if mask is None else int(mask[:, -ids.shape[1] :].sum())


@pytest.fixture
def checked(tiny):
    """A function that checks a model against thresholds: the scores, and tokens per token of the texts."""
    runs = []

    def check(thresholds=FAR, config=None, refinement=select_icu, how=check_all):
        model = tiny.copy()
        task = Task(tiny.sequences, tiny.sequences, np.arange(8)[:, None])
        config = config or tiny.config(check="staged")
        this = Run(model, task, config, ICU(), thresholds, tiny.tokenizer, refinement)
        counted = Counted(this.core)
        found = how(this)
        runs.append(this)
        return found, counted.tokens / int(tiny.sequences.lengths.sum())

    yield check
    for this in runs:
        this.close()


def test_far_from_the_goal_a_check_is_one_forward_pass(tiny, checked):
    scores, passes = checked(FAR)
    assert 1 <= passes < 1.2 and scores["ma"].mean() > 0.9
    assert scores[["el", "bleu", "bert_f1", "entropy", "distinct", "continuation"]].isna().all(axis=None)
    assert scores["check"].tolist() == ["staged"] * 8


def test_el_is_measured_where_ma_passes(tiny, checked):
    full, dear = checked(FAR, tiny.config(check="full"))
    middle = Thresholds(ma=float(full["ma"].min()), el=0.0)
    scores, passes = checked(middle)
    assert full["ma"].mean() > middle.ma and 1 < passes < dear
    passing = scores["ma"] <= middle.ma
    assert 0 < passing.sum() < 8 and (scores["el"].notna() == passing).all()
    assert scores["ma"].equals(full["ma"]) and scores["el"][passing].equals(full["el"][passing])
    assert select_icu(scores, middle).tolist() == select_icu(full, middle).tolist()
    assert not thresholds_met(scores, middle)


def test_near_the_goal_el_is_measured_for_all(tiny, checked):
    near = Thresholds(ma=1.0, el=0.0)
    scores, _ = checked(near)
    full, _ = checked(near, tiny.config(check="full"))
    assert scores["el"].equals(full["el"]) and scores["bleu"].isna().all()


def test_a_staged_check_is_completed_and_not_begun_again(tiny, checked):
    whole = []

    def complete(this):
        begun = check_all(this)
        counted = Counted(this.core)
        whole.append(check_all(this, begun))
        return counted.tokens / int(tiny.sequences.lengths.sum())

    near = Thresholds(ma=1.0, el=0.0)
    later, _ = checked(near, how=complete)
    full, passes = checked(near, tiny.config(check="full"))
    assert whole[0].drop(columns="continuation").equals(full.drop(columns="continuation"))
    assert whole[0]["continuation"].tolist() == full["continuation"].tolist()
    assert later < passes, "MA and EL were there already"


@pytest.mark.parametrize(
    "refinement, settings, generates",
    [
        (select_icu, {}, False),
        (None, {}, False),
        (select_published_rule, {}, True),
        (select_icu, {"stop": "all_forgotten"}, True),
    ],
)
def test_continuations_are_generated_where_they_are_asked_for(tiny, checked, refinement, settings, generates):
    scores, _ = checked(FAR, tiny.config(check="staged", **settings), refinement)
    assert scores["continuation"].notna().all() == scores["bleu"].notna().any() == generates
    assert scores["el"].isna().all()


def test_a_refinement_of_ones_own_sees_every_number(tiny):
    seen = []

    def hardest(scores, thresholds):
        seen.append(scores)
        return scores["el"].rank() > 4

    result = run(tiny, thresholds=FAR, refinement=hardest, max_epochs=1)
    assert result.history["check"].tolist() == ["full"] * 2
    assert all(scores[["ma", "el", "continuation"]].notna().all(axis=None) for scores in seen)


def test_some_measures_of_a_forget_set(tiny):
    def score(*measures):
        return score_forget_set(tiny.model, tiny.tokenizer, tiny.sequences, num_beams=1, measures=measures)

    everything = score("ma", "el", "continuation")
    for measures, columns in {
        ("ma",): ["ma"],
        ("ma", "el"): ["ma", "el"],
        ("continuation",): ["bleu", "entropy", "distinct", "continuation"],
    }.items():
        part = score(*measures)
        assert part.columns.tolist() == everything.columns.tolist()
        assert part[columns].equals(everything[columns])
        assert part.drop(columns=["id", *columns]).isna().all(axis=None)


# ---- the same run ----


@pytest.mark.parametrize("check_steps", [None, 1])
@pytest.mark.parametrize("refinement", [select_icu, None, select_published_rule])
def test_staged_and_full_checks_give_the_same_run(tiny, refinement, check_steps):
    staged, full = (
        run(tiny, check=check, refinement=refinement, check_steps=check_steps) for check in ("staged", "full")
    )
    assert staged.stop_reason == full.stop_reason == "thresholds" and same_weights(staged, full)
    shared = ["epoch", "loss", "ma", "active"]
    pd.testing.assert_frame_equal(staged.history[shared], full.history[shared], check_exact=True)
    pd.testing.assert_frame_equal(
        last_rows(staged).reset_index(drop=True), last_rows(full).reset_index(drop=True), check_exact=True
    )
    assert set(full.history["check"]) == {"full"} and staged.history["check"].iloc[0] == "staged"


def test_what_was_not_measured_is_nan(tiny):
    result = run(tiny)
    history, samples = result.history, result.samples.set_index("epoch")
    assert history["ma"].notna().all() and history["check"].isin(["staged", "full"]).all()
    far = history["epoch"][history["ma"] > GOAL.ma]
    assert history.set_index("epoch")["el"][far].isna().all() and history["bleu"][:-1].isna().all()
    rows = samples.loc[far]
    assert (rows["el"].notna() == (rows["ma"] <= GOAL.ma)).all() and rows["continuation"].isna().all()
    table = before_and_after(history, GOAL)
    assert math.isnan(table.before.el) and table.after.el <= GOAL.el and table.after.ma <= GOAL.ma


# ---- the last check ----


@pytest.mark.parametrize(
    "reason, options",
    [
        ("thresholds", {}),
        ("thresholds", {"check_every": 3, "check_steps": 1}),
        ("max_epochs", {"thresholds": FAR, "max_epochs": 2}),
        ("max_epochs", {"thresholds": FAR, "max_epochs": 2, "check_sample": 2}),
        ("nothing_to_forget", {"thresholds": Thresholds(ma=1.0, el=1.0)}),
        ("nothing_to_forget", {"thresholds": Thresholds(ma=1.0, el=1.0), "check_sample": 2}),
        ("all_forgotten", {"thresholds": Thresholds(ma=0, el=0, bleu=0.9), "stop": "all_forgotten"}),
    ],
)
def test_the_last_check_is_full(tiny, reason, options):
    forget = with_four_words(tiny)
    result = run(tiny, forget=forget, **options)
    assert result.stop_reason == reason and result.history["check"].iloc[-1] == "full"
    columns = ["ma", "el", "bleu", "entropy", "distinct", "continuation"]
    assert result.history[columns[:3]].iloc[-1].notna().all()
    sequences = tokenize(forget, tiny.tokenizer, tiny.config().max_length)
    scores = score_forget_set(result.model, tiny.tokenizer, sequences, num_beams=1)
    rows = last_rows(result).reset_index(drop=True)
    pd.testing.assert_frame_equal(rows[columns], scores[columns], check_exact=True)


def test_a_run_that_a_full_check_does_not_end_goes_on(tiny, monkeypatch):
    """The stop is decided again once everything is known."""
    completed = []
    original = check_all

    def noted(this, begun=None):
        scores = original(this, begun)
        if begun is not None:
            completed.append(len(completed))
            if len(completed) == 1:  # the texts look remembered after all
                scores["bleu"] = 1.0
        return scores

    monkeypatch.setattr(importlib.import_module("icu_nb.unlearn"), "check_all", noted)
    settings = {"thresholds": Thresholds(ma=0, el=0, bleu=0.9), "stop": "all_forgotten"}
    result = run(tiny, forget=with_four_words(tiny), refinement=select_published_rule, **settings)
    assert result.history["check"].tolist().count("full") == len(completed) == 2


# ---- above `check_sample` ----


@pytest.fixture
def made_up(tiny, monkeypatch):
    """A function that gives a run over sequences with these MA and EL, and notes of which EL was asked."""
    runs = []

    def make(ma, el, thresholds, size, refinement=select_icu, **settings):
        ma, el = np.asarray(ma, dtype=float), np.asarray(el, dtype=float)
        ids = [[i % 300] * 12 + [i // 300] for i in range(len(ma))]
        task = Task(pad(ids), pad(ids), np.arange(len(ma))[:, None])
        config = ICUConfig(check_sample=size, el_n=2, **settings)
        model = tiny.copy()
        this = Run(model, task, config, ICU(), thresholds, tiny.tokenizer, refinement)
        this.asked = []
        runs.append(this)

        def rows_of(sequences):
            return [row[0] + 300 * row[-1] for row in sequences.tokens()]

        def scored(model, tokenizer, sequences, measures, **how):
            rows = rows_of(sequences)
            values = {"ma": ma[rows], "el": math.nan, "bleu": math.nan, "bert_f1": math.nan}
            if "el" in measures:
                this.asked.append(rows)
                values["el"] = el[rows]
            others = {"entropy": math.nan, "distinct": math.nan, "continuation": None}
            return pd.DataFrame({"id": rows, **values, **others})

        def accuracy(model, sequences):
            return torch.from_numpy(ma[rows_of(sequences)])

        monkeypatch.setattr(icu_nb.run, "score_forget_set", scored)
        monkeypatch.setattr(icu_nb.run, "memorization_accuracy", accuracy)
        return this

    yield make
    for this in runs:
        this.close()


LIMITS = Thresholds(ma=0.3, el=0.1)


def test_of_many_that_pass_a_sample_is_measured(made_up):
    n = 400
    ma = np.where(np.arange(n) < 250, 0.2, 0.9)
    this = made_up(ma, np.full(n, 0.5), LIMITS, 50)
    scores = check_all(this)
    (rows,) = this.asked
    assert len(rows) == 50 and max(rows) < 250 and scores["el"].notna().sum() == 50
    assert set(scores["check"]) == {"staged, sample of 50"}
    active = select_icu(scores, LIMITS)
    assert active.sum() == 150 + 50 and not active[:250][scores["el"][:250].isna()].any()


def test_a_sample_rules_the_stop_out(made_up):
    el = np.random.default_rng(0).uniform(0.1, 0.5, 400)
    this = made_up(np.full(400, 0.2), el, LIMITS, 50)
    scores = check_all(this)
    assert [len(rows) for rows in this.asked] == [50] and set(scores["check"]) == {"sample of 50"}
    assert not thresholds_met(scores, LIMITS), "never on what was not measured"
    this.asked.clear()
    assert not is_enough(this) and [len(rows) for rows in this.asked] == [50]


@pytest.mark.parametrize("level, met", [(0.09, True), (0.102, False)])
def test_what_a_sample_cannot_rule_out_is_measured_for_all(made_up, level, met):
    el = np.random.default_rng(0).uniform(0, 2 * level, 400)
    el += level - el.mean()
    this = made_up(np.full(400, 0.2), el, LIMITS, 50)
    scores = check_all(this)
    assert [len(rows) for rows in this.asked] == [50, 350], "none is measured twice"
    assert set(scores["check"]) == {"staged"} and thresholds_met(scores, LIMITS) is met
    this.asked.clear()
    assert is_enough(this) is met and [len(rows) for rows in this.asked] == [50, 350]


def test_full_checks_draw_no_sample(made_up):
    this = made_up(np.full(400, 0.2), np.full(400, 0.5), LIMITS, 50, check="full")
    assert check_all(this)["el"].notna().all() and not is_enough(this)
    assert [len(rows) for rows in this.asked] == [400, 400]


def test_the_bound_holds_at_its_level():
    """A stop that is due is ruled out by at most about one sample in twenty; a stop that is far always."""
    generator = np.random.default_rng(1)
    everything = generator.beta(0.5, 4, 2000)
    wrong = [
        icu_nb.run._surely_over(generator.choice(everything, 512, replace=False), 2000, everything.mean())
        for _ in range(2000)
    ]
    assert 0.03 < np.mean(wrong) < 0.07
    far = [
        icu_nb.run._surely_over(
            generator.choice(everything, 512, replace=False), 2000, 0.7 * everything.mean()
        )
        for _ in range(100)
    ]
    assert all(far)
    assert not icu_nb.run._surely_over(np.array([0.5]), 1, 0.5) and icu_nb.run._surely_over(
        np.array([0.6]), 1, 0.5
    )


def test_each_epoch_has_a_sample_of_its_own_and_training_keeps_its_order(made_up):
    this = made_up(np.full(400, 0.2), np.full(400, 0.5), LIMITS, 50)
    before = this.generator.get_state()
    check_all(this), check_all(this)
    assert torch.equal(before, this.generator.get_state()) and this.asked[0] == this.asked[1]
    torch.randperm(400, generator=this.generator)  # an epoch's order
    check_all(this)
    assert this.asked[2] != this.asked[0] and len(set(this.asked[2])) == 50


def sampled(tiny, **options):
    """Of eight texts EL of two; MA soon passes."""
    thresholds = Thresholds(ma=0.97, el=0.01)
    return run(tiny, thresholds=thresholds, check_sample=2, learning_rate=3e-3, max_epochs=8, **options)


def test_a_sampled_run_resumes_bit_for_bit(tiny, tmp_path):
    def pull_the_plug(model, row):
        if row["epoch"] == 4:
            raise KeyboardInterrupt

    undisturbed = sampled(tiny)
    assert undisturbed.history["check"].str.contains("sample of 2").sum() > 2
    cut_off = sampled(tiny, folder=tmp_path / "run", callback=pull_the_plug)
    assert cut_off.stop_reason == "interrupted"
    resumed = sampled(tiny, folder=tmp_path / "run", resume_from_checkpoint=True)
    seconds = ["seconds_train", "seconds_check"]
    pd.testing.assert_frame_equal(
        resumed.history.drop(columns=seconds), undisturbed.history.drop(columns=seconds), check_exact=True
    )
    pd.testing.assert_frame_equal(resumed.samples, undisturbed.samples, check_exact=True)
    assert same_weights(resumed, undisturbed)


def test_the_estimate_of_a_sample_stands_with_its_label(tiny):
    history = sampled(tiny).history
    estimated = history["check"] == "sample of 2"
    assert estimated.any() and history["el"][estimated].notna().all()
    assert history["el"][history["check"].str.startswith("staged, ")].isna().all()


def test_checks_may_change_when_a_run_is_resumed_unless_a_sample_was_drawn(tiny, tmp_path):
    def pull_the_plug(model, row):
        if row["epoch"] == 3:
            raise KeyboardInterrupt

    undisturbed = run(tiny, check="full")
    run(tiny, folder=tmp_path / "one", callback=pull_the_plug)
    resumed = run(tiny, folder=tmp_path / "one", check="full", resume_from_checkpoint=True)
    assert same_weights(resumed, undisturbed)
    sampled(tiny, folder=tmp_path / "two", callback=pull_the_plug)
    with pytest.raises(Exception, match="check_sample was 2 and is None"):
        sampled(tiny, folder=tmp_path / "two", check="full", resume_from_checkpoint=True)


# ---- settings ----


@pytest.mark.parametrize("wrong", [{"check": "half"}, {"check": None}, {"check_sample": 1}])
def test_impossible_settings(wrong):
    (name,) = wrong
    with pytest.raises(InputError, match=f"^`{name}`"):
        ICUConfig(**wrong)


def test_thresholds_are_never_met_by_what_is_not_known():
    known = pd.DataFrame({"ma": [0.1, 0.1], "el": [0.0, 0.0]})
    assert thresholds_met(known, LIMITS)
    assert not thresholds_met(known.assign(el=[0.0, math.nan]), LIMITS)
    assert not thresholds_met(known.assign(ma=math.nan), LIMITS)
    unknown = pd.DataFrame(
        {"ma": [0.1, 0.9], "el": math.nan, "bleu": math.nan, "bert_f1": math.nan, "continuation": None}
    )
    assert select_icu(unknown, LIMITS).tolist() == [False, True], "EL that is not known is not over it"
    assert select_published_rule(unknown, LIMITS).tolist() == [True, True], (
        "BLEU that is not known is not low"
    )
