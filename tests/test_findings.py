"""What the notebooks of `nbs/paper` say about the stored rows, each number held against them."""

import functools
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from icu_nb.paper.figures import fronts
from icu_nb.paper.rows import read_csv, read_rows
from icu_nb.paper.tables import _holm as holm
from icu_nb.paper.tables import multiplies, pool_draws, significance, verdict

DATA = Path(__file__).resolve().parents[1] / "figures" / "data"
KINDS = ["ppl_neighbors", "ppl_retain", "ppl_heldout", "ppl_general"]


@functools.cache
def stored(name, profile="tiny"):
    rows = read_rows(DATA, name)
    return rows[rows.profile == profile]


def wide(rows, column):
    """A row per seed, a column per label."""
    return rows.pivot(index="seed", columns="label", values=column)


def with_labels(rows, *labels):
    return rows[rows.label.isin(labels)]


def reached_on_every_seed(rows):
    return rows[rows.groupby("label").reached.transform("all")]


def geometric_mean(values):
    return np.exp(np.log(values).mean())


def ends(values, digits):
    return [round(values.min(), digits), round(values.max(), digits)]


def clearly_apart(rows, column, against="ICU"):
    """The labels that are clearly higher than the other side, and those that are clearly lower."""
    tests = significance(rows, [column], against).set_index("label")
    clear, same = tests[tests.p_holm < 0.05], 1 if multiplies(column) else 0
    return set(clear.index[clear.effect > same]), set(clear.index[clear.effect < same])


# ---- 20: the main table ----


@pytest.fixture(scope="module")
def people():
    rows = stored("main_table")
    return rows[rows.data == "people"]


@pytest.fixture(scope="module")
def methods(people):
    """Those that forgot enough on every seed."""
    return reached_on_every_seed(people)


def test_main_table_neighbors(methods):
    higher, lower = clearly_apart(methods, "ppl_neighbors")
    assert len(higher - {"retrained"}) == 9 and methods.label.nunique() - 2 == 14
    assert lower == {"PO", "SimNPO", "DPO", "SatImp"}


def test_main_table_heldout_and_retain(methods):
    trained = methods[methods.label != "retrained"]
    assert clearly_apart(trained, "ppl_heldout") == ({"gradient ascent", "NPO", "task vector"}, set())
    assert "RMU" in clearly_apart(trained, "ppl_retain")[1]
    assert clearly_apart(trained, "acc_retain")[0] == {"SimNPO", "SatImp"}
    heldout = trained.groupby("label").ppl_heldout.apply(geometric_mean)
    lower = set(heldout.index[heldout < heldout["ICU"]])
    assert lower == {"RMU", "PO", "DPO", "UNDIAL", "SatImp", "SimNPO", "EUL"}


def test_main_table_general(people, methods):
    trained = methods[methods.label != "retrained"]
    means = people.groupby("label")[["ppl_neighbors", "ppl_general"]].mean()
    assert set(means.index[means.ppl_neighbors < 2.1]) == {"DPO", "SatImp", "SimNPO", "WGA"}
    assert means.ppl_general["DPO"] > 25 * means.ppl_general["ICU"]
    milder = ["gradient ascent", "KUMPR", "KL", "LLMU", "NPO"]
    assert clearly_apart(trained, "ppl_general")[1] == set(milder)
    over = means.ppl_general / means.ppl_general["original"]
    assert round(over["ICU"], 2) == 1.15 and over[milder].round(2).between(1.04, 1.09).all()


def test_main_table_on_the_pile():
    rows = stored("main_table")
    pile = reached_on_every_seed(rows[rows.data == "pile0"])
    pile = pile[pile.label != "retrained"]
    others = set(pile.label) - {"ICU"}
    assert pile.label.nunique() == 6
    assert clearly_apart(pile, "ppl_heldout") == (others, set())
    assert clearly_apart(pile, "ppl_neighbors") == (others - {"PO"}, {"PO"})
    assert clearly_apart(pile, "ppl_retain") == (set(), set())
    assert clearly_apart(pile, "ppl_general") == ({"PO"}, set())
    order = pile.groupby("label").ppl_heldout.mean()
    assert order["ICU"] < order["KL"] < order["KUMPR"] < 2 * order["ICU"]


def test_main_table_which_forgot_too_little(people):
    never = with_labels(people, "ICU (published rule)", "WGA")
    assert not never.reached.any() and never.ma.min() > never.threshold_ma.max()
    knows = wide(people, "acc_forget")
    assert (knows.drop(columns=["original", "retrained"]).min(axis=1) > knows["retrained"]).all()


# ---- 20: the larger model ----

ASCENT = ["gradient ascent", "KUMPR"]


@pytest.fixture(scope="module")
def larger():
    return pool_draws(stored("main_table", "gpu"))


def over_icu(rows, column):
    values = wide(rows, column)
    return values.drop(columns=["original", "ICU"]).div(values["ICU"], axis=0)


def test_larger_model_which_reached_the_goal(larger):
    reached = larger.groupby("label").reached.sum().to_dict()
    every = dict.fromkeys(["ICU", "gradient ascent", "KUMPR", "KL"], 3)
    assert reached == {**every, "LLMU": 2, "ICU (published rule)": 2, "PO": 0, "original": 0}
    over = (wide(larger, "ma") - wide(larger, "threshold_ma")).round(4)
    assert over.LLMU[0] == 0.0013
    assert set(larger[larger.label == "LLMU"].stop_reason) == {"thresholds"}
    assert ends(wide(larger, "ma").PO, 2) == [0.49, 0.65]
    assert larger.groupby("seed").threshold_ma.nunique().eq(1).all()  # both groups have the same originals
    assert over.KUMPR.min() >= -0.12 and over[["KL", "gradient ascent"]].min().min() >= -0.05
    assert over.ICU.min() > -0.01 and (over.loc[1, ["ICU", "KL", *ASCENT]] > -0.02).all()


def test_larger_model_heldout_and_neighbors(larger):
    held, near = over_icu(larger, "ppl_heldout"), over_icu(larger, "ppl_neighbors")
    assert (held[ASCENT].min() > 3).all()
    assert held[ASCENT].max().round().to_dict() == {"gradient ascent": 35, "KUMPR": 24}
    assert ends(held.KL, 1) == [1.3, 3.5] and ends(near.KL, 0) == [5, 7]
    assert (near[[*ASCENT, "KL"]] > held[[*ASCENT, "KL"]]).all(axis=None)
    assert held.loc[1, [*ASCENT, "KL"]].round(1).tolist() == [4.1, 3.4, 3.5]
    assert wide(larger, "ma")["original"].idxmin() == 1
    enough = larger.groupby("label").reached.transform("sum") == 3
    tests = significance(larger[enough], [*KINDS, "ppl_pile"])
    clear = tests[tests.p_holm < 0.05]
    assert clear[["column", "label"]].values.tolist() == [["ppl_neighbors", "KL"]]


def test_larger_model_llmu(larger):
    assert over_icu(larger, "ppl_heldout").LLMU.round(2).tolist() == [0.95, 1.98, 0.93]
    assert ends(over_icu(larger, "ppl_neighbors").LLMU, 1) == [1.4, 3.7]
    assert over_icu(larger, "ppl_pile").LLMU.round(2).tolist() == [0.69, 1.28, 0.78]
    assert over_icu(larger, "ppl_retain").LLMU.round(2).tolist() == [0.12, 2.29, 1.06]
    assert wide(larger, "epochs").LLMU.between(5, 7).all()
    assert wide(larger, "entropy").LLMU.round(1).between(0.2, 0.5).all()


def test_larger_model_far_text(larger):
    pile = over_icu(larger, "ppl_pile")
    order = geometric_mean(wide(larger, "ppl_pile"))
    assert order["ICU"] < order["KL"] < order["KUMPR"]
    assert (pile.KL.round(2)[[0, 2]] == [0.98, 0.93]).all() and (pile[ASCENT] > 1.5).all(axis=None)
    general = over_icu(larger, "ppl_general")[[*ASCENT, "KL", "LLMU"]]
    assert general.stack().between(0.8, 1.2).all()
    assert round(over_icu(larger, "ppl_retain").KL[0], 2) == 1.01


def test_larger_model_published_rule(larger):
    rule = "ICU (published rule)"
    first = with_labels(larger, rule).query("seed == 1")[["key"]]
    before = read_csv(DATA / "main_table_history.csv").merge(first).iloc[0]
    assert (before.epoch, before.active, round(before.ma, 2)) == (0, 128 - 115, 0.93)
    epochs = wide(larger, "epochs")
    assert epochs[rule][[0, 2]].tolist() == [30, 33]
    assert (epochs[rule] - epochs["ICU"])[[0, 2]].tolist() == [10, 14]
    assert over_icu(larger, "ppl_heldout")[rule][[0, 2]].round(1).tolist() == [1.6, 1.2]
    assert wide(larger, "ma")[rule].round(2)[1] == 0.68


def test_larger_model_icu_against_the_original(larger):
    over = {kind: wide(larger, kind)["ICU"] / wide(larger, kind)["original"] for kind in KINDS[:3]}
    assert 4 < geometric_mean(over["ppl_neighbors"]) < 6 and 1.8 < geometric_mean(over["ppl_heldout"]) < 2.2
    assert over["ppl_retain"].min() > 2 and round(over["ppl_retain"].max()) == 65
    entropy = wide(larger, "entropy")
    assert (entropy["ICU"] > entropy["original"]).loc[[0, 2]].all() and entropy["ICU"][1] < 0.2
    assert wide(larger, "acc_lambada").max().max() == 0


def test_larger_model_costs(larger):
    seconds = wide(larger.assign(seconds=larger.seconds_train + larger.seconds_check), "seconds")
    assert all((seconds["ICU"] / seconds[label]).between(4.5, 8).all() for label in ASCENT)
    epochs = wide(larger, "epochs")
    assert epochs["ICU"].between(17, 20).all() and epochs[ASCENT].stack().between(7, 14).all()
    assert epochs.KL.between(10, 19).all()
    gigabytes = (wide(larger, "peak_memory_mb").mean() / 1000).round()
    assert gigabytes[["ICU", "gradient ascent", "PO", "KL", "KUMPR"]].tolist() == [8, 9, 12, 15, 19]


# ---- 21: the ablation ----

PARTS = ["no L_lrn", "no L_kl", "neither", "KUI alone"]


def test_ablation_of_the_terms():
    columns = [*KINDS, "acc_retain"]
    tests = {column: significance(stored("ablation"), [column]).set_index("label") for column in columns}
    for column in KINDS[:3]:
        assert (tests[column].p_holm[[*PARTS, "no IUR, 20 epochs"]] < 0.05).all()
        assert (tests[column].effect[PARTS] > 1).all()
    assert tests["ppl_neighbors"].effect[PARTS].round(1).tolist() == [3.3, 6.1, 10.7, 10.7]
    assert tests["ppl_heldout"].effect[PARTS].round(1).tolist() == [1.4, 2.4, 3.2, 3.2]
    assert round(tests["ppl_retain"].effect["neither"], 1) == 3.6
    assert (tests["acc_retain"].p_holm[["no L_lrn", "no L_kl"]] < 0.05).all()
    assert tests["acc_retain"].effect[PARTS].between(-0.09, -0.07).all()
    assert (tests["ppl_general"].p_holm[PARTS] < 0.05).all()
    assert tests["ppl_general"].effect[PARTS].between(0.93, 0.96).all()
    assert all(test.p_holm["no IUR"] > 0.05 for test in tests.values())
    late = "no IUR, 20 epochs"
    assert round(tests["ppl_heldout"].effect[late], 1) == 18.5
    assert round(tests["ppl_neighbors"].effect[late], 1) == 1.7


def test_ablation_of_the_refinement():
    rows = stored("ablation")
    means = rows.groupby("label")[["ma", "epochs", "seconds_train", "seconds_check"]].mean()
    assert round(means.ma["no IUR, 20 epochs"], 2) == 0.14
    longer = means.loc["ICU"] / means.loc["KUI alone"]
    assert longer[["epochs", "seconds_train"]].between(3, 4).all()
    history = read_csv(DATA / "ablation_history.csv").query("label == 'ICU'")
    first_rest = history[history.active < 64].groupby("seed").epoch.min()
    assert (first_rest >= history.groupby("seed").epoch.max() - 4).all()
    tests = significance(rows, ["epochs", "seconds_train"]).query("label == 'no IUR'")
    assert tests.p.min() > 0.05
    plain = means.loc["no IUR", ["seconds_train", "seconds_check"]].sum()
    more_checks = means.seconds_check["ICU"] - means.seconds_check["no IUR"]
    assert round(more_checks / plain, 2) == 0.25


# ---- 22: sensitivity ----

USUAL = "α = 0.5, β = 1"


def test_sensitivity_to_the_weights():
    rows = stored("sensitivity")
    weights = rows[rows.label.str.startswith("α")]
    enough = reached_on_every_seed(weights)
    assert enough.label.nunique() == 6
    never = with_labels(rows, "α = 1, β = 2", "α = 2, β = 1", "α = 2, β = 2", "learning rate 3e-05")
    assert never.label.nunique() == 4 and not never.reached.any()
    order = {kind: enough.groupby("label")[kind].apply(geometric_mean).sort_values().index for kind in KINDS}
    assert order["ppl_neighbors"][0] == order["ppl_heldout"][0] == USUAL
    assert order["ppl_neighbors"][1] == order["ppl_heldout"][1] == "α = 0, β = 2"
    assert order["ppl_general"][0] == "α = 0, β = 0"
    tests = significance(enough, KINDS, USUAL).set_index(["column", "label"])
    near = tests.loc["ppl_neighbors"]
    assert (near.p_holm < 0.05).all() and (near.effect.min(), near.effect.max()) == pytest.approx(
        (1.26, 11.2), rel=0.01
    )
    others = tests.loc[["ppl_heldout", "ppl_general"]]
    assert not (others.p_holm < 0.05).any() and (weights.groupby("label").reached.sum() < 3).sum() == 6
    second = tests.loc["ppl_heldout", "α = 0, β = 2"]
    assert second[["effect", "low", "high"]].astype(float).round(2).tolist() == [1.10, 0.90, 1.34]
    assert round(tests.effect["ppl_general", "α = 0, β = 0"], 2) == 0.92


def test_sensitivity_to_the_learning_rate():
    rows = stored("sensitivity")
    rates = rows[(rows.alpha == 0.5) & (rows.beta == 1)]
    fast, usual = with_labels(rates, "learning rate 0.0003"), with_labels(rates, USUAL)
    assert (fast.epochs.mean(), usual.epochs.mean()) == (7, 16) and fast.reached.all()
    assert with_labels(rates, "learning rate 3e-05").ma.min() > 0.9
    tests = significance(pd.concat([usual, fast]), ["ppl_heldout", "ppl_general"], USUAL).set_index("column")
    assert tests.p["ppl_heldout"] > 0.05 and tests.p["ppl_general"] < 0.05
    assert round(tests.effect["ppl_general"], 2) == 1.12


# ---- 23: the case study ----


def test_case_study_an_address_under_the_goal():
    samples = read_csv(DATA / "case_study_samples.csv")
    last = samples[samples["id"] == 0].sort_values("epoch").groupby("label").last()
    address = next(word for word in last.truth["RMU"].split() if "@" in word)
    assert set(last.index[last.continuation.str.contains(address, regex=False)]) == {"original", "RMU"}
    assert round(last.ma["RMU"], 2) == 0.39
    invented = last.continuation[["PO", "DPO", "WGA", "SatImp", "SimNPO"]]
    assert invented.str.contains("@example.", regex=False).all()
    digits = last.continuation[["gradient ascent", "KUMPR", "NPO", "ICU"]]
    assert digits.str.contains(r"\d{8}").all()


# ---- 25: neighbors ----


def over_nearest(label, column, base="nearest"):
    values = wide(stored("neighbors"), column)
    return values[label] / values[base]


def test_neighbors_near_random_and_far():
    tests = significance(
        with_labels(stored("neighbors"), "nearest", "random"), ["ppl_heldout", "ppl_general"], "nearest"
    )
    assert tests.p.min() > 0.2
    assert over_nearest("farthest", "ppl_heldout").round(1).between(1.5, 2.2).all()


def test_neighbors_how_many():
    for label, base in (("K = 2", "nearest"), ("K = 4", "K = 2"), ("K = 8", "K = 4")):
        assert (over_nearest(label, "ppl_heldout", base) < 1).all()
    assert over_nearest("K = 8", "ppl_heldout").round(2).between(0.55, 0.78).all()
    assert over_nearest("K = 8", "ppl_general").round(2).between(1.04, 1.13).all()
    seconds = over_nearest("K = 8", "seconds_train")
    assert (seconds > 1.5).all() and seconds.mean() > 2


def test_neighbors_which_pool():
    assert over_nearest("50% noise", "ppl_heldout").round(1).between(1.4, 2.6).all()
    assert over_nearest("pool of 40", "ppl_heldout").round(1).between(1.1, 1.5).all()
    allowed = with_labels(stored("neighbors"), "near-duplicates allowed")
    assert allowed.ma.min() > 0.8 and (allowed.epochs == 20).all() and not allowed.reached.any()
    for label, epochs in (("50% general text", 0.6), ("100% general text", 0.38)):
        assert over_nearest(label, "epochs").mean() == pytest.approx(epochs, abs=0.05)
        assert over_nearest(label, "ppl_general").between(0.85, 1.05).all()
        assert over_nearest(label, "ppl_heldout").min() > 1.6


# ---- 26: thresholds ----


def test_thresholds_of_the_published_rule():
    rows = stored("thresholds")
    published = rows[~rows.label.str.startswith("ICU")]
    ma = published.groupby("label").ma.mean()
    assert not published.reached.any() and (published.epochs == 20).all()
    assert ma.round(1).between(0.7, 0.9).all()
    encoder = "all-MiniLM-L6-v2"
    alone = published.groupby("label").only_bert.mean()
    assert round(100 * alone[f"{encoder}: F1 under 0.3 or BLEU"], 2) == 0.05
    assert round(100 * alone[f"{encoder}: F1 under 0.6 or BLEU"]) == 15
    assert (ma.min(), ma.max()) == pytest.approx((0.70, 0.90), abs=0.005)
    strict, loose = f"{encoder}: F1 under 0.6 and BLEU", f"{encoder}: F1 under 0.6 or BLEU"
    assert ma[loose] > ma["BLEU under 0.01"] > ma[strict] == ma.min()


@pytest.mark.parametrize(
    "one, other",
    [
        ("BLEU under 0.01", "BLEU under 0.1"),
        ("ICU", "ICU, MA and EL"),
        ("BLEU under 0.01", "BLEU, until none is left"),
    ],
)
def test_thresholds_that_make_the_same_runs(one, other):
    for column in ("ma", "epochs", "ppl_neighbors", "ppl_heldout", "ppl_general"):
        values = wide(stored("thresholds"), column)
        assert (values[one] == values[other]).all()


def test_thresholds_of_published_numbers():
    rows = stored("thresholds")
    tests = significance(rows[rows.label.str.startswith("ICU")], ["ppl_heldout"]).set_index("label")
    numbers = ["ICU, ICU's numbers", "ICU, KUMPR's numbers"]
    assert tests.effect[numbers].round(1).tolist() == [0.6, 3.8] and (tests.p_holm[numbers] < 0.05).all()
    assert with_labels(rows, "ICU, KUMPR's numbers").reached.sum() == 2


# ---- 27: the tradeoff ----


@pytest.fixture(scope="module")
def tradeoff_history():
    history = read_csv(DATA / "tradeoff_history.csv")
    return history[history["key"].isin(stored("tradeoff")["key"])]


def test_tradeoff_which_is_least_at_which_depth(tradeoff_history):
    rows = stored("tradeoff")
    depth = round(with_labels(rows, "retrained").ma.mean(), 2)
    levels = [0.8, 0.6, 0.5, depth]
    means = {
        kind: fronts(tradeoff_history, kind, levels).pivot(index="level", columns="label", values="mean")
        for kind in ("ppl_neighbors", "ppl_heldout", "ppl_general")
    }
    assert means["ppl_heldout"].idxmin(axis=1).loc[levels].tolist() == ["ICU", "ICU", "NPO", "NPO"]
    near = means["ppl_neighbors"].loc[depth].sort_values().index
    assert [near[0], near[1], near[-1]] == ["NPO", "ICU", "gradient ascent"]
    far = means["ppl_general"].loc[depth].sort_values()
    assert (far.index[0], far.index[-1]) == ("gradient ascent", "ICU") and far.iloc[-1] < 1.2 * far.iloc[0]


def first_and_least(run, goal):
    """Perplexities where MA is first at or under the goal, and where held-out text is least at such an MA."""
    low = run[run.ma <= goal].sort_values("epoch")
    return low.iloc[0], low.loc[low.ppl_heldout.idxmin()]


def test_tradeoff_npo_comes_back(tradeoff_history):
    goals = with_labels(stored("tradeoff"), "original").set_index("seed").threshold_ma
    for (label, seed), run in tradeoff_history.groupby(["label", "seed"]):
        first, least = first_and_least(run, goals[seed])
        if label == "NPO":
            assert first.ppl_heldout > 3 * least.ppl_heldout
            assert least.ppl_general > 1.2 * first.ppl_general
        else:
            assert first.ppl_heldout == least.ppl_heldout


def at_goal(history, column):
    """Ratios to ICU where MA first reaches the goal, and at the lowest perplexity from there on."""
    goals = with_labels(stored("tradeoff"), "original").set_index("seed").threshold_ma
    ends = []
    for (label, seed), run in history.groupby(["label", "seed"], sort=False):
        there = run[run.ma <= goals[seed]].sort_values("epoch")[column]
        ends.append({"label": label, "seed": seed, "first": there.iloc[0], "lowest": there.min()})
    ends = pd.DataFrame(ends)
    return [
        significance(ends.rename(columns={kind: column}), [column]).set_index("label")
        for kind in ("first", "lowest")
    ]


def test_tradeoff_at_the_goal(tradeoff_history):
    def significant(tests):
        clear = tests.effect[tests.p_holm < 0.05]
        return set(clear.index[clear > 1]), set(clear.index[clear < 1])

    def numbers(tests):
        return tests.loc["NPO", ["effect", "low", "high"]].astype(float).round(2).tolist()

    first, lowest = at_goal(tradeoff_history, "ppl_neighbors")
    assert significant(first) == ({"gradient ascent", "GradDiff", "KL", "NPO"}, set())
    assert significant(lowest) == ({"gradient ascent", "GradDiff", "KL"}, {"NPO"})
    assert numbers(first) == [13.05, 8.51, 20.00] and numbers(lowest) == [0.59, 0.47, 0.74]
    first, lowest = at_goal(tradeoff_history, "ppl_heldout")
    assert significant(first) == ({"gradient ascent", "NPO"}, set())
    assert significant(lowest) == ({"gradient ascent"}, {"NPO"})
    assert numbers(first) == [3.09, 1.74, 5.47] and numbers(lowest) == [0.64, 0.61, 0.67]
    for tests in at_goal(tradeoff_history, "ppl_general"):
        assert significant(tests) == (set(), {"gradient ascent", "KL", "NPO"})
        assert tests.effect.drop("GradDiff").between(0.895, 0.935).all()


def test_tradeoff_distance_from_the_retrained_model():
    rows = stored("tradeoff")
    methods = rows[~rows.label.isin(["original", "retrained"])]
    assert methods.groupby("label").distance.mean().idxmax() == "ICU"
    assert "clearly lower: NPO" in verdict(methods, "distance_heldout")
    columns = ["distance", "distance_heldout"]
    clear = significance(rows[rows.label != "retrained"], columns, "original").query("p_holm < 0.05")
    assert (clear.effect > 0).all() and list(clear.column.unique()) == ["distance_heldout"]
    assert set(clear.label) == {"ICU", "gradient ascent"}


# ---- 28: requests ----

ICU = [f"ICU, {n} at once" for n in (1, 8, 64, 512)]
GA = [f"gradient ascent, {n} at once" for n in (1, 8, 64, 512)]
BATCHED = "ICU, 512 in 8 batches"


@functools.cache
def requests_history():
    return read_csv(DATA / "requests_history.csv")


@functools.cache
def steps():
    """A row per seed, a column per label: steps of 8 texts; the active texts are chosen an epoch before."""
    rows = stored("requests")
    rows = rows[rows.requests.notna()]
    history = requests_history().set_index("key")

    def steps_of(key):
        return np.ceil(history.loc[key].groupby("request").active.shift().dropna() / 8).sum()

    return wide(rows.assign(steps=rows["key"].map(steps_of)), "steps")


def requests(column):
    return wide(stored("requests"), column)


def test_requests_steps():
    rows = stored("requests")
    assert rows[rows.label != "original"].reached.all()
    assert steps()[ICU[0]].between(40, 42).all()
    assert [round(steps()[label].mean(), -1) for label in ICU[1:]] == [80, 240, 710]
    assert round(steps()[ICU[3]].mean() / steps()[ICU[0]].mean()) == 17
    assert steps()[ICU[2]].round(-1).between(230, 240).all()
    assert abs(steps()[GA[3]].mean() / steps()[GA[2]].mean() - 1) < 0.1
    assert requests("epochs")[ICU[1]].between(79, 83).all()
    assert requests("epochs")[ICU[3]].between(11, 12).all()


def test_requests_seconds():
    train, check = requests("seconds_train"), requests("seconds_check")
    both = train + check
    assert (both[ICU[3]] / both[GA[3]]).round().eq(4).all()
    assert round(train[ICU[3]].mean() / train[ICU[0]].mean(), -1) == 110
    rows = stored("requests")
    seconds = rows[["seconds_train", "seconds_check", "seconds_evaluate"]].sum().sum()
    assert round((seconds + rows.groupby("seed").seconds_prepare.max().sum()) / 3600, 1) == 1.1


def test_requests_damage_of_icu():
    over = {kind: requests(kind)[ICU].div(requests(kind)["original"], axis=0) for kind in KINDS}
    heldout = [ends(over["ppl_heldout"][label], 1) for label in ICU]
    assert heldout == [[1.1, 1.1], [1.6, 1.7], [2.8, 2.9], [7.5, 15.5]]
    assert (over["ppl_retain"] > over["ppl_heldout"]).all(axis=None)
    assert ends(over["ppl_retain"][ICU[3]], 0) == [14, 34]
    assert ends(over["ppl_general"][ICU[0]], 2) == [1.01, 1.05]
    assert ends(over["ppl_general"][ICU[3]], 2) == [1.08, 1.46]
    near = requests("ppl_neighbors")
    assert near[ICU[:2]].max(axis=None) < 2 < near["original"].min()


def p_of(n, column):
    return significance(with_labels(stored("requests"), ICU[n], GA[n]), [column], ICU[n]).p.item()


def ascent_over_icu(n, column):
    return requests(column)[GA[n]] / requests(column)[ICU[n]]


def test_requests_gradient_ascent_against_icu():
    for column in KINDS[1:]:
        assert p_of(0, column) > 0.05 and ascent_over_icu(0, column).between(0.95, 1.05).all()
    for column in ("ppl_retain", "ppl_heldout"):
        assert p_of(1, column) < 0.05 and ascent_over_icu(1, column).between(1.15, 1.3).all()
    assert p_of(2, "ppl_retain") < 0.05 and ascent_over_icu(2, "ppl_retain").between(2.9, 12.5).all()
    assert p_of(3, "ppl_heldout") > 0.05
    assert ascent_over_icu(3, "ppl_heldout").round(1).between(1.2, 1.9).all()
    assert (ascent_over_icu(3, "ppl_general") > 1).sum() == 2
    deeper = requests("ma")[ICU[3]] - requests("ma")[GA[3]]
    assert deeper.round(2).between(0, 0.04).all()


def test_requests_in_batches():
    batches = requests_history().query("label == @BATCHED").groupby(["seed", "request"])
    before, epochs = batches.ma.first().unstack(), batches.epoch.max().unstack()
    assert epochs[1].between(30, 31).all() and epochs[2].between(2, 3).all()
    assert before[2].round(2).between(0.71, 0.74).all() and before[3].round(2).between(0.57, 0.58).all()
    assert epochs.loc[:, 5:].max(axis=None) <= 1
    assert steps()[BATCHED].between(260, 280).all() and (steps()[BATCHED] < 0.5 * steps()[ICU[3]]).all()
    assert (requests("ma")[BATCHED] < requests("ma")[ICU[3]]).all()
    tests = significance(with_labels(stored("requests"), ICU[3], BATCHED), KINDS[1:], ICU[3])
    assert (tests.p > 0.05).all()
    near = requests("ppl_neighbors")
    assert 7 < geometric_mean(near[BATCHED] / near[ICU[3]]) < 9


def test_requests_questions():
    retain, forget = requests("acc_retain"), requests("acc_forget")
    assert [ends(retain[label], 2) for label in (ICU[3], GA[3], BATCHED)] == [
        [0.6, 0.7],
        [0.34, 0.34],
        [0.38, 0.45],
    ]
    assert [ends(forget[label], 2) for label in (ICU[3], GA[3], ICU[2], BATCHED)] == [
        [0.43, 0.76],
        [0.72, 0.73],
        [0.32, 0.43],
        [0.29, 0.41],
    ]


# ---- 29: limits ----

TRAINED = ["ICU", "gradient ascent", "NPO"]


@pytest.fixture(scope="module")
def neo():
    rows = stored("limits")
    return rows[rows.model == "tiny gpt-neo"]


def test_limits_relearning(neo):
    back, ma = wide(neo, "relearned_ma"), wide(neo, "ma")
    assert back["ICU"].min() > 0.85 and back[["gradient ascent", "NPO"]].min().min() > 0.95
    assert (back["retrained"] - ma["retrained"]).abs().max() < 0.03
    strength = wide(neo, "relearned_es")
    assert strength["ICU"].max() < 0.2 and strength[["gradient ascent", "NPO"]].min().min() > 0.7
    assert ((wide(neo, "unrelated_ma") > ma)[TRAINED].sum() >= 2).all()


def test_limits_rounding_and_extraction(neo):
    for column in ("int8_ma", "int4_ma"):
        assert (wide(neo, column) - wide(neo, "ma"))[TRAINED].abs().max(axis=None) < 0.02
    for column in ("recited", "sampled", "other_words"):
        found = verdict(with_labels(neo, "retrained", *TRAINED), column, "retrained")
        assert not found.startswith(f"{column}, against retrained: clearly higher")
    knows = wide(neo, "acc_forget").mean().round(2)
    labels = ["ICU", "gradient ascent", "NPO", "retrained", "random weights"]
    assert knows[labels].tolist() == [0.46, 0.63, 0.59, 0.21, 0.21]
    asked = significance(with_labels(neo, "retrained", *TRAINED), ["acc_forget"], "retrained")
    assert (asked.p_holm < 0.05).all() and (asked.effect > 0).all()
    assert wide(neo, "recited")["retrained"].mean().round(2) == 0.13


def test_limits_random_weights_pass_every_attack(neo):
    attacks = ["verbatim", "recited", "sampled", "other_words", "relearned_ma", "relearned_es"]
    attacks += ["unrelated_ma", "int8_ma", "int4_ma"]
    means = neo.groupby("label")[attacks].mean()
    assert (means.loc["random weights"] <= means.drop("random weights").min()).all()


def test_limits_other_architectures():
    rows = stored("limits")
    some = with_labels(rows, "ICU", "gradient ascent")
    held = some.pivot(index=["model", "seed"], columns="label", values="ppl_heldout")
    assert some.reached.all() and (held["ICU"] < held["gradient ascent"]).all()
    models = some.groupby("model")
    p = pd.Series({model: significance(group, ["ppl_heldout"]).p.item() for model, group in models})
    assert list(p.index[holm(p) < 0.05]) == ["tiny gpt2"]


def test_limits_damage_of_icu(neo):
    kinds = ["ppl_neighbors", "ppl_heldout", "ppl_retain", "ppl_general"]
    means = np.exp(np.log(neo.set_index("label")[kinds]).groupby("label").mean())
    over = means.loc["ICU"] / means.loc["original"]
    assert over.round(2).round(1).tolist() == [1.2, 2.6, 3.5, 1.2] and round(over.ppl_general, 2) == 1.16
