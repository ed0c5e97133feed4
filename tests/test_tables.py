"""Tables: statistics against scipy and by hand; published values as reported, beside ours."""

import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from icu_nb.errors import InputError
from icu_nb.paper import tables


def made_up(*labels, seeds=3):
    """Invented rows."""
    rng = np.random.default_rng(0)
    return pd.DataFrame(
        [
            {
                "profile": "tiny",
                "data": "people",
                "model": "none",
                "method": label.lower(),
                "label": label,
                "seed": seed,
                "ma": 0.36,
                "el10": 0.0,
                "epochs": 12,
                "ppl_heldout": 30 * rng.lognormal(0, 0.2),
                "ppl_general": 140 * rng.lognormal(0, 0.1),
            }
            for label in labels
            for seed in range(seeds)
        ]
    )


# ---- statistics ----


def test_interval_is_students():
    values = [3.1, 2.7, 4.0, 3.3, 3.9]
    assert tables.interval(values)[1:] == pytest.approx(
        stats.t.interval(0.95, 4, loc=np.mean(values), scale=stats.sem(values))
    )
    assert np.log(tables.interval(np.exp(values), True)) == pytest.approx(tables.interval(values))


def test_interval_covers_as_often_as_it_says():
    rng = np.random.default_rng(0)
    covered = [
        low <= 1 <= high for _, low, high in (tables.interval(rng.normal(1, 2, 3)) for _ in range(2000))
    ]
    assert 0.93 < np.mean(covered) < 0.97


@pytest.mark.parametrize(
    "values, mean", [([], math.nan), ([math.nan, 5.0], 5.0), ([2.0, math.inf], math.inf)]
)
def test_interval_without_enough_numbers_has_no_ends(values, mean):
    found = tables.interval(values, True)
    assert found[0] == pytest.approx(mean, nan_ok=True) and np.isnan(found[1:]).all()


def test_holm_by_hand():
    assert tables._holm([0.01, math.nan, 0.04, 0.03]) == pytest.approx(
        [0.03, math.nan, 0.06, 0.06], nan_ok=True
    )
    assert tables._holm([0.9, 0.8]).tolist() == [1.0, 1.0]


def test_significance_is_scipys_paired_test():
    rows = made_up("ICU", "NPO", "KL", seeds=5)
    found = tables.significance(rows, ["ppl_heldout"]).set_index("label")
    wide = np.log(rows.pivot(index="seed", columns="label", values="ppl_heldout"))
    expected = stats.ttest_rel(wide["NPO"], wide["ICU"])
    assert found.p["NPO"] == pytest.approx(expected.pvalue)
    assert np.log(found.low["NPO"]) == pytest.approx(expected.confidence_interval().low)


def test_pairing_sees_what_unpaired_intervals_hide():
    levels = np.array([1.0, 5.0, 20.0, 70.0, 300.0])
    rows = made_up("ICU", "NPO", seeds=5)
    rows["ppl_heldout"] = [*levels, *(1.2 * levels * [1.01, 0.99, 1.0, 1.02, 0.98])]
    ours, theirs = (
        tables.interval(group, True) for _, group in rows.groupby("label", sort=False).ppl_heldout
    )
    assert ours[2] > theirs[0] and tables.significance(rows, ["ppl_heldout"]).p.item() < 1e-4


def test_seeds_that_one_side_lacks_are_left_out():
    rows = made_up("ICU", "NPO", seeds=5)
    found = tables.significance(rows[~((rows.label == "NPO") & (rows.seed == 4))], ["ppl_heldout"])
    assert found.n.item() == 4 and found.p.notna().all()


def test_tables_say_what_was_not_run_and_pool_draws():
    rows = made_up("ICU", "KL")
    rows.loc[rows.label == "KL", "ppl_general"] = np.nan
    draws = rows.assign(data=[f"pile{seed}" for seed in rows.seed])
    assert tables.results_table(rows, ["ppl_general"]).ppl_general.tolist()[1] == "not run"
    assert tables.results_table(draws, ["ma"]).index.get_level_values("data").unique().tolist() == ["pile"]
    both = pd.concat([rows, rows.assign(data="pile0")])
    assert tables.results_table(both, ["ma"]).index.get_level_values("data").unique().tolist() == [
        "people",
        "pile0",
    ]
    assert (tables.results_table(both, ["ma"]).seeds == 3).all()
    short = rows.assign(reached=[True, True, False] * 2)
    assert tables.results_table(short, ["ma"])["forgot enough"].tolist() == ["2 of 3"] * 2


def test_a_verdict_names_who_is_clearly_higher_and_lower():
    rows = made_up("ICU", "A", "B, too", "C", seeds=5)
    wide = rows.pivot(index="seed", columns="label", values="ppl_heldout")["ICU"]
    factor = {"ICU": 1.0, "A": 3.0, "B, too": 0.5, "C": 1.0}
    rows["ppl_heldout"] = [
        wide[seed] * factor[label] * (1 + 0.01 * (-1) ** seed * (label != "ICU"))
        for label, seed in zip(rows.label, rows.seed, strict=True)
    ]
    said = tables.verdict(rows, "ppl_heldout")
    assert (
        "clearly higher: A (×3" in said
        and "clearly lower: “B, too” (×0.5" in said
        and said.endswith("no difference shown: C")
    )
    for nothing in (rows[:0], rows[rows.label == "ICU"], rows.assign(ppl_heldout=math.nan)):
        assert tables.verdict(nothing, "ppl_heldout").endswith("not measured yet")


# ---- published values ----


def test_published_values_are_those_reported(shared_data, request):
    reported = (
        pd.read_csv(shared_data.parent / "paper_reported.csv")
        if (shared_data.parent / "paper_reported.csv").exists()
        else pytest.skip("no list of published values")
    )
    ours = tables._read_published(request.config.rootpath / "figures" / "data")
    assert len(ours) == len(reported)
    low = [float(str(value).split("-")[0]) for value in reported.value]
    assert (
        ours.low.tolist() == low
        and (ours.label == reported.method).all()
        and (ours.model.str.lower() == reported.model.str.lower()).all()
    )


def test_published_values_stand_beside_ours_in_their_unit(request):
    rows = made_up("original", "ICU", "KL", "KUMPR").assign(classification=0.5)
    data = request.config.rootpath / "figures" / "data"
    beside = tables.beside_published(rows, data).set_index(["measure", "method"])
    assert (
        beside.ours["classification", "ICU"].startswith("50 [")
        and beside.ours["ppl_pile", "ICU"] == "not run"
    )
    assert (tables.beside_published(rows[:0], data).ours == "not run").all()
    assert (
        beside.published["ppl_pile", "KUMPR"] == "over 10000"
        and beside.published["epochs", "ICU"] == "21.4 to 32.6"
    )


# ---- bad input ----


@pytest.mark.parametrize(
    "ask, message",
    [
        (lambda rows: tables.results_table(rows[:0], ["ma"]), "`rows`: there are none"),
        (lambda rows: tables.results_table(rows, ["mb"]), "no column mb"),
        (
            lambda rows: tables.significance(pd.concat([rows, rows.assign(model="another")]), ["ma"]),
            "several kinds of model",
        ),
        (lambda rows: tables.significance(rows, ["ma"], "NPO"), "no row is labeled 'NPO'"),
        (lambda rows: tables.significance(rows[rows.label == "ICU"], ["ma"]), "nothing but 'ICU'"),
        (lambda rows: tables.beside_published(rows, "nowhere"), "no published.csv"),
    ],
)
def test_bad_input_is_told(ask, message):
    with pytest.raises(InputError, match=message):
        ask(made_up("ICU", "KL"))


def test_a_published_value_without_a_source_is_refused(tmp_path, request):
    text = (request.config.rootpath / "figures" / "data" / "published.csv").read_text()
    for wrong in (
        text.replace("public review of arXiv 2407.20271", "", 1),
        text.replace("published,GPT", "ours,GPT", 1),
    ):
        (tmp_path / "published.csv").write_text(wrong)
        with pytest.raises(InputError, match="source"):
            tables.beside_published(made_up("ICU"), tmp_path)
