"""The comparison's runs: looks on the way, which checkpoint counts, and the search for settings."""

import json
import math

import pandas as pd
import pytest

from icu_nb.data.corpus import Corpus
from icu_nb.methods.registry import METHODS
from icu_nb.metrics import memorization_accuracy, perplexity
from icu_nb.models.tiny import tiny_gpt_neo
from icu_nb.paper import comparison
from icu_nb.paper.comparison import _Case, _Entry, _Looks, _next_setting, _run_comparison, _tune
from icu_nb.paper.setup import Setup


@pytest.fixture
def case(tiny, monkeypatch):
    """Texts and model of the tests in place of those of the comparison."""
    corpus = Corpus("people", tiny.forget, tiny.retain, tiny.heldout, tiny.retain[:6], tiny.heldout[:4])
    fresh = tiny_gpt_neo(len(tiny.tokenizer), 64, 2, 32, 2, 7)
    setup = Setup(corpus, tiny.model, tiny.tokenizer, 0, 48, retrain=lambda: fresh)
    found = _Case(setup, {"shallow": 0.8, "deep": 0.5}, fresh)
    monkeypatch.setattr(comparison, "_case_of", lambda *_: found)
    monkeypatch.setattr(comparison, "_MAX_EPOCHS", 12)
    monkeypatch.setattr(comparison, "_LOOK_EVERY", 1)
    return found


# ---- looks ----


def test_the_best_checkpoint_at_a_depth_counts(case):
    looks = _Looks(case)
    path = [(0, 0.9, None), (1, 0.7, 2.0), (2, 0.6, 1.0), (3, 0.45, 3.0), (4, 0.4, 1.5)]
    looks.rows = [{"step": step, "ma": ma, "score": score} for step, ma, score in path]
    steps = {place: row["step"] for place, row in looks._found().items()}
    assert steps == {"first": 1, "shallow": 2, "deep": 4}
    looks.rows = looks.rows[:3]
    assert looks._found()["deep"] is None


def test_a_look_is_the_rise_of_log_perplexity(case, tiny):
    looks, fresh = _Looks(case), case.replaced
    looks.take(tiny.model, 0)
    looks.take(fresh, 1)
    before, after = looks.rows
    assert set(before) == {"step", "ma"}  # over both depths
    assert after["ma"] == pytest.approx(memorization_accuracy(fresh, tiny.sequences).mean().item())
    perplexities = [perplexity(m, tiny.tokenizer, tiny.heldout, max_length=48) for m in (tiny.model, fresh)]
    assert after["heldout"] == pytest.approx(math.log(perplexities[1] / perplexities[0]), abs=1e-6)
    assert after["score"] == pytest.approx((after["heldout"] + after["general"]) / 2)
    columns = looks.columns()
    assert columns["first_step"] == columns["deep_step"] == 1
    assert columns["deep_retain"] == pytest.approx(looks._rises(fresh, "retain")["retain"]) != 0


# ---- runs ----


@pytest.mark.parametrize("method", ["original", "retrained", "icu", "ga", "npo_sam", "idk", "task vector"])
def test_a_run_is_a_row(case, method):
    tuned = METHODS[method].tuned
    settings = {} if tuned is None else {**tuned.loss, **tuned.rule}
    rate = {"original": None, "retrained": None, "task vector": 5e-3}.get(method, 5e-3)
    row = comparison._row(_Entry(method, 0, rate, settings, METHODS[method].neighbors))
    path = json.loads(row["looks"])
    assert row["depth_shallow"] == 0.8 and row["depth_deep"] == 0.5
    assert all(0 <= ma <= 1 for _, ma, *_ in path)
    if method == "original":
        assert math.isnan(row["shallow_score"]) and path[0][0] == 0
    if method == "retrained":
        assert row["deep_ma"] <= 0.5 and not math.isnan(row["deep_score"])
    if method in ("icu", "ga", "npo_sam"):
        assert row["first_ma"] <= 0.8 and [step for step, *_ in path] == list(range(len(path)))
        assert row["shallow_score"] <= row["first_score"]


def test_looks_change_nothing(case, tiny):
    entry = _Entry("ga", 0, 2e-3)
    seen = []
    for every in (1, 10**6):
        comparison._LOOK_EVERY = every
        looks = _Looks(case)
        comparison._train(entry, case, looks)
        seen.append(looks.rows[-1])
    assert seen[0] == seen[1]


def test_what_is_stored_is_not_made_again(tmp_path, monkeypatch):
    made = []

    def row(entry, audited):
        made.append(entry)
        facts = {"method": entry.method, "data": entry.data, "seed": entry.seed}
        return {**facts, "settings": entry.to_json(), "deep_score": entry.learning_rate}

    monkeypatch.setattr(comparison, "_row", row)
    path = tmp_path / "rows.csv"
    entries = [_Entry("ga", seed, 1e-4) for seed in (1, 2)]
    rows = _run_comparison(path, entries)
    assert [found["seed"] for found in rows] == [1, 2] and len(made) == 2
    _run_comparison(path, [*entries, _Entry("ga", 1, 1e-4, neighbors="redraw")])
    assert len(made) == 3 and len(pd.read_csv(path)) == 3


# ---- the search ----


def test_the_search_goes_on_from_the_best_setting():
    tried = {}
    order = []
    while (setting := _next_setting((1e-4, 1.0), tried)) and len(tried) < 6:
        order.append(setting)
        tried[setting] = abs(math.log(setting[0] / 3e-4)) + abs(math.log(setting[1] / 4))
    assert order[:4] == [(1e-4, 1.0), (3e-4, 1.0), (3.33e-5, 1.0), (3e-4, 4.0)]
    assert order[4:] == [(5.2e-4, 4.0), (1.73e-4, 4.0)]  # smaller moves from the best
    assert len(set(order)) == len(order)


def test_where_nothing_is_deep_enough_the_largest_rate_is_the_best():
    tried = {(1e-4, 1.0): math.inf, (3e-4, 1.0): math.inf, (3.33e-5, 1.0): math.inf}
    assert _next_setting((1e-4, 1.0), tried) == (3e-4, 4.0)


def test_a_share_stays_a_share():
    tried = {(1e-4, 0.3): 1.0, (3e-4, 0.3): 2.0, (3.33e-5, 0.3): 2.0}
    assert _next_setting((1e-4, 0.3), tried) == (1e-4, 1.2)
    assert _next_setting((1e-4, 0.3), tried, 1.0) == (1e-4, 0.6)
    assert _next_setting((None, 0.6), {(None, 0.6): 1.0}, 1.0) == (None, 0.3)


def test_a_method_without_numbers_has_one_setting():
    assert _next_setting((None, None), {}) == (None, None)
    assert _next_setting((None, None), {(None, None): 1.0}) is None


def test_a_depth_missed_on_one_seed_comes_last(tmp_path, monkeypatch):
    def row(entry, audited):
        missed = entry.seed == 101 and entry.learning_rate < 1e-4
        facts = {"method": entry.method, "data": entry.data, "seed": entry.seed}
        return {**facts, "settings": entry.to_json(), "deep_score": math.nan if missed else 1.0}

    monkeypatch.setattr(comparison, "_row", row)
    scores = _tune(tmp_path / "rows.csv", "icu", 4)
    assert list(scores) == [(1e-4, 1.0), (3e-4, 1.0), (3.33e-5, 1.0), (3e-4, 4.0)]
    assert scores[3.33e-5, 1.0] == math.inf and scores[1e-4, 1.0] == 1.0
    stored = pd.read_csv(tmp_path / "rows.csv")
    assert json.loads(stored.settings[0]) == {"learning_rate": 1e-4, "neighbors": "nearest", "beta": 1.0}


def test_first_settings_are_the_registrys():
    for name, method in METHODS.items():
        if method.tuned and not method.edit_path:
            rate, knob = comparison._first_setting(name)
            assert rate == method.tuned.learning_rate
            assert knob is None or name in comparison._KNOBS
            comparison.get_method(name).make(
                **{
                    key: value
                    for key, value in comparison._entry(name, 0, (rate, knob), "people").settings.items()
                    if key not in method.tuned.rule
                }
            )


def test_a_test_row_says_what_attacks_find(case, tiny, monkeypatch):
    monkeypatch.setattr(comparison, "_LOOK_EVERY", 4)
    monkeypatch.setattr("icu_nb.evals.membership.MIN_TEXTS", 4)
    row = comparison._row(_Entry("ga", 0, 5e-3), audited=True)
    names = ("auc_loss", "auc_min-k", "answered", "relearned_ma")
    assert all(0 <= row[f"{depth}_{name}"] <= 1 for depth in ("shallow", "deep") for name in names)
    before = comparison._row(_Entry("original", 0), audited=True)
    assert before["deep_auc_loss"] == before["shallow_auc_loss"] > row["deep_auc_loss"]


# ---- locked, and tested ----


def trials(tmp_path):
    """Six methods of a trial or two on two seeds."""
    rows = []
    scores = {
        "icu": [0.9, 0.7],
        "ga": [math.nan, 1.5],
        "npo": [0.2],
        "rmu": [0.3],
        "simnpo": [0.4],
        "wga": [0.5],
        "kl": [0.6],
        "po": [math.nan, math.nan],
    }
    for method, found in scores.items():
        for number, score in enumerate(found):
            settings = _Entry(method, 0, 1e-4 * (number + 1), {"beta": 2.0}, "redraw").to_json()
            for seed in (100, 101):
                missed = method == "po" or (method == "icu" and number == 1 and seed == 101)
                row = {"method": method, "data": "people", "seed": seed, "settings": settings}
                value = math.nan if missed else score
                rows.append({**row, "deep_score": value, "shallow_score": value})
    pd.DataFrame(rows).to_csv(tmp_path / "trials.csv", index=False)
    return comparison._lock(tmp_path / "trials.csv", tmp_path / "locked.json")


def test_the_best_trial_on_both_seeds_is_locked(tmp_path):
    locked = trials(tmp_path)
    assert json.loads((tmp_path / "locked.json").read_text()) == locked
    assert set(locked) == {"people"}
    locked = locked["people"]
    assert locked["finalists"] == ["icu", "npo", "rmu", "simnpo", "wga", "kl"]  # the five best others
    best = {method: json.loads(row["settings"])["learning_rate"] for method, row in locked["best"].items()}
    assert best["icu"] == 1e-4  # the other trial missed the depth on a seed
    assert best["ga"] == best["po"] == 2e-4  # where nothing is deep enough, the larger rate
    assert locked["best"]["po"]["deep_score"] is None and locked["best"]["icu"]["n_trials"] == 2


def test_what_is_locked_is_tested_once(tmp_path, monkeypatch):
    best = trials(tmp_path)["people"]["best"]
    made = []

    def row(entry, audited):
        made.append(entry)
        facts = {"method": entry.method, "data": entry.data, "seed": entry.seed}
        return {**facts, "settings": entry.to_json(), "audited": audited}

    monkeypatch.setattr(comparison, "_row", row)
    path = tmp_path / "rows.csv"
    for _ in range(2):
        comparison._test(path, best, ["original", "npo"], [("people", 200), ("people", 201)])
    comparison._test(path, best, ["npo"], [("pile1a", 200)], "mixed")
    rows = pd.read_csv(path)
    assert len(made) == len(rows) == 5 and rows.audited.all()
    assert [(entry.method, entry.seed) for entry in made[:2]] == [("original", 200), ("npo", 200)]
    assert made[1] == _Entry("npo", 200, 1e-4, {"beta": 2.0}, "redraw")
    assert made[-1] == _Entry("npo", 200, 1e-4, {"beta": 2.0}, "mixed", "pile1a")


def test_each_part_is_taken_out_once(case, tmp_path, monkeypatch):
    monkeypatch.setattr(comparison, "_MAX_EPOCHS", 6)
    whole = _Entry("icu_plus", 0, 5e-3, {"beta": 1.0}, "mixed").to_json()
    best = {"icu_plus": {"settings": whole}}
    rows = comparison._ablate(tmp_path / "rows.csv", best, [0])
    assert [row["label"] for row in rows] == list(comparison._ABLATION)
    stored = pd.read_csv(tmp_path / "rows.csv")
    settings = [json.loads(text) for text in stored.settings]
    assert len(stored) == len(rows) and stored.method.value_counts().to_dict() == {"icu_plus": 7, "icu": 1}
    assert [found["neighbors"] for found in settings[:5]] == ["mixed"] * 2 + ["nearest", "redraw", "sampled"]
    assert settings[5]["alpha"] == 0 and settings[6]["beta"] == 0 and settings[7]["refinement"] == "none"
    assert stored.looks.nunique() > 4  # most changes change the run


def test_general_text_and_samples_are_as_many_as_retain_texts(case, tiny):
    pools = {name: comparison._pool(_Entry("icu_plus", 0, neighbors=name), case.setup) for name in NEIGHBORS}
    assert pools["redraw"] == tiny.retain and pools["mixed"] == tiny.retain + tiny.retain[:6]
    assert len(pools["sampled"]) == 2 * len(tiny.retain)
    assert not set(pools["sampled"][len(tiny.retain) :]) & set(tiny.forget)


NEIGHBORS = ("redraw", "mixed", "sampled")


def test_the_commands(tmp_path, monkeypatch):
    called = []
    for name in ("_tune", "_lock", "_test", "_ablate"):
        monkeypatch.setattr(comparison, name, lambda *given, name=name: called.append((name, *given)))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "figures/data").mkdir(parents=True)
    stored = {kind: {"finalists": ["icu"], "best": {"icu": kind}} for kind in ("people", "pile")}
    (tmp_path / "figures/data/comparison_settings.json").write_text(json.dumps(stored))
    tests = ("test", "test npo --cases 1 --neighbors mixed", "test --data pile")
    for words in ("tune npo --trials 12 --data pile", "lock", *tests, "ablate"):
        monkeypatch.setattr("sys.argv", ["comparison", *words.split()])
        assert comparison._main() == 0
    assert [call[0] for call in called] == ["_tune", "_lock", *["_test"] * 3, "_ablate"]
    assert called[0][2:] == ("npo", 12, "pile")
    people, one, pile = called[2:5]
    assert people[1].name == pile[1].name == "comparison.csv" and one[1].name == "comparison_same_stream.csv"
    assert people[2:4] == ({"icu": "people"}, ["original", "retrained", "icu"])
    assert people[4:] == ([("people", 200 + k) for k in range(12)], None)
    assert one[3:] == (["npo"], [("people", 200)], "mixed")
    assert pile[2] == {"icu": "pile"} and [data for data, _ in pile[4]] == [
        "pile1a",
        "pile1b",
        "pile2a",
        "pile2b",
    ]
    assert called[5][2] == {"icu": "people"}


def test_no_text_is_tuned_and_tested_on():
    for cases in comparison._CASES.values():
        assert not set(cases["tune"]) & set(cases["test"])
    pile = comparison._CASES["pile"]
    assert not {data[:5] for data, _ in pile["tune"]} & {data[:5] for data, _ in pile["test"]}
