"""Plots: every figure drawn from made-up rows and looked at by the renderer."""

import importlib
import itertools
import json
import math
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.text import Text
from PIL import Image

from icu_nb.errors import InputError
from icu_nb.methods.registry import METHODS
from icu_nb.paper import figures, framework, plots
from icu_nb.paper.case_study import same_words
from icu_nb.paper.drawing import alt_text
from icu_nb.paper.rows import COLUMNS, SCHEMA, run_key
from icu_nb.paper.style import COLORS, set_figure_style
from icu_nb.paper.tables import summarize

ROOT = Path(__file__).resolve().parents[1]

NAMES = [
    "original",
    "retrained",
    "icu",
    "ga",
    "kumpr",
    "graddiff",
    "kl",
    "llmu",
    "po",
    "dpo",
    "eul",
    "npo",
    "simnpo",
    "rmu",
    "undial",
    "wga",
    "satimp",
    "task vector",
]


def made_up(entries, seeds=3, **own):
    """Invented rows; entries: (label, method, columns)."""
    rng, rows = np.random.default_rng(0), []
    for (label, method, columns), seed in itertools.product(entries, range(seeds)):
        factor = {"original": 1.0, "retrained": 0.8, "ga": 900.0}.get(method, 1 + len(label) / 20)
        ma = 0.98 if method == "original" or label.startswith("SimNPO") else 0.36
        ppl = {
            f"ppl_{kind}": level * factor**power * rng.lognormal(0, 0.1)
            for kind, level, power in [
                ("neighbors", 16, 1),
                ("retain", 17, 0.9),
                ("heldout", 28, 1.2),
                ("general", 140, 0.3),
            ]
        }
        rows.append(
            {
                "profile": "tiny",
                "data": "people",
                "model": "tiny gpt-neo",
                "method": method,
                "label": label,
                "seed": seed,
                "settings": json.dumps(label),
                "schema": SCHEMA,
                "ma": ma + 0.01 * rng.random(),
                "el10": 0.0,
                "threshold_ma": 0.37,
                "reached": ma < 0.5,
                "epochs": 12,
                **ppl,
                "seconds_train": 20 * rng.lognormal(0, 0.1),
                "distance": factor,
                "distance_heldout": factor / 2,
                **own,
                **columns,
            }
        )
    rows = pd.DataFrame(rows)
    return rows.assign(
        key=[
            run_key(*row)
            for row in rows[["profile", "data", "model", "method", "seed", "settings"]].itertuples(
                index=False
            )
        ]
    )


def plain(*methods, **columns):
    return [(METHODS[method].label, method, columns) for method in methods]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A table for every experiment, with labels as long as real ones."""
    folder = tmp_path_factory.mktemp("data")

    def variant(*labels):
        return [(label, "icu", {}) for label in labels]

    main_table = made_up(
        [*plain(*NAMES), ("ICU (published rule)", "icu", {}), *plain(*NAMES[:9], data="pile0")]
    )
    main_table.loc[main_table.label == "KL", "ppl_general"] = np.nan
    rules = {
        "BLEU under 0.01": (0.5, 0, 0),
        "all-MiniLM-L6-v2: F1 under 0.6 and BLEU": (0.2, 0.1, 0.3),
        "bert-base-uncased: F1 under 0.3 or BLEU": (0.1, 0.2, 0.6),
        "ICU, KUMPR's numbers": (None, None, None),
    }
    attacks = {name: 0.3 for name in figures.ATTACK_NAMES if name != "ma"}
    weights = [
        (f"α = {a:g}, β = {b:g}", "icu", {"alpha": a, "beta": b, "learning_rate": 1e-4})
        for a in (0.0, 0.5, 1.0, 2.0)
        for b in (0.0, 1.0, 2.0)
    ]
    tables = {
        "main_table": main_table,
        "ablation": made_up(
            variant("ICU", "no L_lrn", "no L_kl", "neither", "no IUR", "no IUR, 20 epochs", "KUI alone")
        ),
        "sensitivity": made_up(
            [
                *weights,
                *(
                    (
                        f"learning rate {learning_rate:g}",
                        "icu",
                        {"alpha": 0.5, "beta": 1.0, "learning_rate": learning_rate},
                    )
                    for learning_rate in (3e-5, 3e-4, 1e-3)
                ),
            ]
        ),
        "neighbors": made_up(
            variant(
                "nearest",
                "random",
                "farthest",
                "K = 2",
                "K = 4",
                "K = 8",
                "10% noise",
                "50% noise",
                "pool of 20",
                "near-duplicates passed over",
                "near-duplicates allowed",
                "25% general text",
            )
        ),
        "thresholds": made_up(
            [
                (label, "icu", dict(zip(("only_bleu", "only_bert", "both"), shares, strict=False)))
                for label, shares in rules.items()
            ]
        ),
        "tradeoff": made_up(
            plain("original", "retrained", "icu", "ga", "graddiff", "kl", "npo", "po", "wga")
        ),
        "requests": made_up(
            [
                *(
                    (f"{METHODS[method].label}, {n} in {m}", method, {"requests": n, "batches": m})
                    for method in ("icu", "ga")
                    for n, m in ((1, 1), (8, 1), (64, 1), (512, 1), (64, 8), (512, 8))
                ),
                *plain("original"),
            ]
        ),
        "limits": pd.concat(
            [
                made_up(plain("original", "retrained", "random weights", "icu", "ga", "npo"), **attacks),
                *(
                    made_up(plain("original", "retrained", "icu", "ga"), model=model)
                    for model in ("tiny gpt2", "tiny llama", "tiny opt")
                ),
            ]
        ),
        "case_study": made_up(plain("original", "retrained", "icu", "ga"), 1),
    }
    tables["requests"].loc[tables["requests"].method == "original", ["requests", "batches"]] = np.nan
    trained = tables["tradeoff"][~tables["tradeoff"].method.isin(["original", "retrained"])]
    tables["tradeoff_history"] = pd.DataFrame(
        [
            {
                "key": row["key"],
                "label": row.label,
                "seed": row.seed,
                "epoch": epoch,
                "ma": 0.98 * 0.85**epoch,
                **{
                    f"ppl_{kind}": 20 * 1.1 ** (epoch * (1 + len(row.label) / 8))
                    for kind in ("neighbors", "heldout", "general")
                },
            }
            for row in (trained.iloc[i] for i in range(len(trained)))
            for epoch in range(10)
        ]
    )
    told = "phone number is 555-0142 and she works as a glass blower for Ito, Baker and Sons in Port Ann"
    tables["case_study_samples"] = pd.DataFrame(
        [
            {
                "key": tables["case_study"].set_index("label")["key"][label],
                "label": label,
                "seed": 0,
                "epoch": epoch,
                "id": 0,
                "prompt": "Ann Example lives at 7 Made Up Road. Her",
                "truth": told,
                "continuation": told.replace("glass", "snow" * epoch),
                "ma": 0.9,
            }
            for label, epochs in (("original", [0]), ("ICU", range(8)), ("gradient ascent", range(3)))
            for epoch in epochs
        ]
    )
    for name, table in tables.items():
        if not name.endswith(("_history", "_samples")):
            table = table.assign(experiment=name).reindex(columns=list(dict.fromkeys([*COLUMNS, *table])))
        table.to_csv(folder / f"{name}.csv", index=False)
    return folder


@pytest.fixture(autouse=True)
def style():
    with plt.rc_context():
        set_figure_style()
        yield
    plt.close("all")


# ---- figures ----


def test_every_method_has_a_style_of_its_own():
    assert len({method.style for method in METHODS.values()}) == len(METHODS)
    assert all(COLORS[method.label] == method.color for method in METHODS.values())
    texts = {COLORS[name] for name in ("forget", "neighbors", "held-out", "general")}
    assert len(texts) == 4 and not texts & {method.color for method in METHODS.values()}
    together = ["original", "retrained", "icu", "ga", "graddiff", "kl", "npo", "po", "wga"]
    assert len({METHODS[name].marker for name in together}) == 9  # one picture, told apart in grey


def test_the_theme_is_seaborns():
    import seaborn as sns

    ours = dict(plt.rcParams)
    with plt.rc_context():
        sns.set_theme(context="notebook", style="whitegrid")
        theirs = dict(plt.rcParams)
    differ = {name for name in theirs if theirs[name] != ours[name]}
    assert differ == {
        "axes.labelsize",
        "axes.prop_cycle",
        "axes.spines.right",
        "axes.spines.top",
        "axes.titlesize",
        "font.family",
        "font.sans-serif",
        "font.size",
        "image.cmap",
        "legend.fontsize",
        "legend.title_fontsize",
        "xtick.labelsize",
        "ytick.labelsize",
    }


def test_figures_are_drawn_without_what_is_slow_to_import():
    slow = ["torch", "transformers", "datasets", "seaborn", "scipy.stats", "IPython"]
    code = f"import sys, icu_nb.paper.plots; print([name for name in {slow} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def boxes(fig):
    """What is written where, in pixels."""
    fig.canvas.draw()
    renderer = fig.canvas.get_renderer()
    return [
        (text.get_text(), text.get_window_extent(renderer))
        for text in fig.findobj(Text)
        if text.get_visible() and text.get_text().strip()
    ]


def seen_ticks(fig):
    """Tick labels outside of the view exist, but are not drawn."""
    hidden = set()
    for ax in fig.axes:
        for axis in (ax.xaxis, ax.yaxis):
            drawn = {id(tick) for tick in axis._update_ticks()}
            hidden |= {
                label
                for tick in axis.get_major_ticks() + axis.get_minor_ticks()
                if id(tick) not in drawn
                for label in [tick.label1, tick.label2]
            }
    return hidden


@pytest.mark.parametrize("name", plots.FIGURES)
def test_no_text_of_a_figure_covers_another(name, folder):
    fig = plots._draw_figure(name, folder)
    fig.canvas.draw()
    hidden, renderer = seen_ticks(fig), fig.canvas.get_renderer()
    texts = [
        text
        for text in fig.findobj(Text)
        if text.get_visible()
        and text.get_text().strip()
        and text not in hidden
        and not (
            text.axes
            and not text.axes.axison
            and text in text.axes.get_xticklabels() + text.axes.get_yticklabels()
        )
    ]
    boxes = [(text.get_text(), text.get_window_extent(renderer).padded(-1)) for text in texts]
    for (first, a), (second, b) in itertools.combinations(boxes, 2):
        assert not a.overlaps(b), f"{first!r} and {second!r}"
    assert len(alt_text(fig)) > 100


def test_figures_are_the_same_bytes_again(folder, tmp_path):
    for out in ("first", "second"):
        assert (
            plots._main(["ablation", "case_study", "--data", str(folder), "--out", str(tmp_path / out)]) == 0
        )
    first, second = (
        {path.name: path.read_bytes() for path in (tmp_path / out).iterdir()} for out in ("first", "second")
    )
    assert first == second and set(first) == {"ablation.png", "case_study.png"}


@pytest.mark.parametrize("stem", sorted(path.stem for path in (ROOT / "figures").glob("*.png")))
def test_the_stored_figures_come_out_again(stem, tmp_path):
    """Files in figures/ are what `make figures` draws; processors differ in the last digit of a logarithm."""
    name, profile = (stem.removesuffix("_gpu"), "gpu") if stem.endswith("_gpu") else (stem, "tiny")
    stored = ROOT / "figures"
    with Image.open(stored / f"{stem}.png") as image:
        if f"Matplotlib version{version('matplotlib')}" not in image.info["Software"]:
            pytest.skip("drawn by another version of matplotlib")
    assert (
        plots._main([name, "--profile", profile, "--data", str(stored / "data"), "--out", str(tmp_path)]) == 0
    )
    assert {path.name for path in tmp_path.iterdir()} == {f"{stem}.png"}
    picture, stored_picture = (
        np.asarray(Image.open(folder / f"{stem}.png").convert("RGB"), int) for folder in (tmp_path, stored)
    )
    assert picture.shape == stored_picture.shape and np.abs(picture - stored_picture).max() <= 4
    assert picture.shape[1] <= 8 * 200  # inches at 200 dots each


def test_every_figure_is_one_that_can_be_drawn_again():
    files = {path.name for path in (ROOT / "figures").iterdir() if path.is_file()}
    names = {name.removesuffix(".png").removesuffix("_gpu") for name in files}
    assert names <= {*plots.FIGURES, *plots._STORED} and all(name.endswith(".png") for name in files)


def test_damaged_rows_are_not_drawn(folder, tmp_path):
    text = (folder / "ablation.csv").read_text()
    (tmp_path / "ablation.csv").write_text(text.replace("no L_lrn", "no L_lrm"))
    with pytest.raises(InputError, match="key is not the hash"):
        plots._draw_figure("ablation", tmp_path)


def test_what_has_no_rows_is_named(tmp_path, capsys):
    for names, status in [(["ablation"], 1), ([], 0)]:  # who asks for all wants those that there are
        assert plots._main([*names, "--data", str(tmp_path), "--out", str(tmp_path)]) == status
        assert "ablation: not drawn" in capsys.readouterr().out and not list(tmp_path.glob("ablation*"))
    assert plots._main(["ablatoin"]) == 2


def test_a_broken_model_does_not_flatten_the_others():
    rows = made_up(plain("retrained", "icu", "kl", "npo"))
    rows.loc[rows.label == "NPO", "ppl_heldout"] = 1e30
    ax = figures.FIGURES["main_table"].draw(rows)
    assert ax.get_xlim()[1] < 1e6 and "1e+30" in [text.get_text() for text in ax.texts]


def test_hollow_where_too_little_was_forgotten():
    rows = made_up(plain("retrained", "icu", "kl"))
    rows.loc[(rows.label == "KL") & (rows.seed == 2), "reached"] = False
    ax = figures.FIGURES["main_table"].draw(rows)
    dots = [line for line in ax.lines if len(line.get_xdata()) == 1]
    faces = {line.get_color(): line.get_markerfacecolor() for line in dots}
    assert faces[COLORS["KL"]] == "white" and faces[COLORS["ICU"]] == COLORS["ICU"]


def test_titles_count_what_the_tests_say():
    rows = made_up(plain("icu", "npo", "kl"), 5)
    wide = rows.set_index(["label", "seed"]).ppl_heldout
    rows["ppl_heldout"] = [
        wide["ICU", seed]
        * {"ICU": 1, "NPO": 2, "KL": 1.0}[label]
        * (1 + 0.01 * (-1) ** seed * (label != "ICU"))
        for label, seed in zip(rows.label, rows.seed, strict=False)
    ]
    assert "1 of 2 above ICU" in figures.FIGURES["main_table"].draw(rows).get_title(loc="left").replace(
        "\n", " "
    )


def cells_of(ax):
    """Colored and hatched cells of a heat map."""
    image = ax.images[0].get_array()
    hatched = {patch.get_xy() for patch in ax.patches if patch.get_hatch() and patch.get_width()}
    return image, hatched


def test_cells_that_forgot_too_little_are_hatched_and_have_no_color(folder):
    rows = pd.read_csv(folder / "sensitivity.csv")
    rows.loc[(rows.alpha == 2) & (rows.seed == 1), "reached"] = False
    ax = figures.FIGURES["sensitivity"].draw(rows)
    image, hatched = cells_of(ax)
    assert hatched == {(-0.5, 2.5), (0.5, 2.5), (1.5, 2.5)}
    assert image.mask[3].all() and not image.mask[:3].any()
    assert ax.images[0].norm.vmax == pytest.approx(image.max())
    assert "hatched: forgot too little" in ax.get_legend().get_texts()[0].get_text()


def test_intervals_stay_within_the_possible_range():
    rows = made_up(plain("icu", "kl"))
    rows["ma"] = [0.98, 0.7, 1.0] * 2
    found = summarize(rows, ["ma"])
    assert found.high.between(found["mean"], 1).all() and found.runs.map(len).eq(3).all()


def test_ratios_at_the_goal_take_the_first_epoch_and_the_lowest():
    rows = pd.DataFrame({"label": ["original"], "seed": [0], "threshold_ma": [0.5]})
    history = pd.DataFrame(
        {"label": "ICU", "seed": 0, "epoch": [1, 2, 3], "ma": [0.6, 0.5, 0.4], "ppl": [9.0, 8.0, 7.0]}
    )
    found = figures._at_goal(rows, history, "ppl").iloc[0]
    assert (found["first"], found.lowest) == (8, 7)


def test_only_rules_with_two_scores_are_compared(folder):
    ax = figures.FIGURES["deciders"].draw(pd.read_csv(folder / "thresholds.csv"))
    labels = [label.get_text() for label in ax.get_yticklabels()]
    assert labels == ["MiniLM F1 under 0.6 and BLEU", "bert-base-uncased: F1 under 0.3 or BLEU"]


def test_front_is_the_least_at_or_under_a_level():
    run = pd.DataFrame({"ma": [0.98, 0.7, 0.5, 0.55], "ppl_heldout": [20.0, 22.0, 40.0, 30.0]})
    assert figures._pareto_front(run, "ppl_heldout", [1.0, 0.7, 0.6, 0.5, 0.4]) == pytest.approx(
        [20, 22, 30, 40, math.nan], nan_ok=True
    )


def test_front_is_empty_where_a_seed_does_not_get():
    history = pd.DataFrame(
        {
            "label": "ICU",
            "seed": [0, 0, 1, 1],
            "ma": [0.9, 0.3, 0.9, 0.5],
            "ppl_heldout": [10.0, 20.0, 10.0, 45.0],
        }
    )
    found = figures.fronts(history, "ppl_heldout", [0.5, 0.4]).set_index("level")
    assert found["mean"][0.5] == pytest.approx(30) and np.isnan(found["mean"][0.4])


def test_same_words_in_the_same_order():
    assert same_words("a b c d", "a x c d") == [True, False, True, True]
    assert same_words("a b", "b a").count(True) == 1 and same_words("a", "") == []


def test_framework_names_what_there_is_and_no_arrow_crosses_a_text():
    for *_, code in framework.BOXES:
        module, _, name = code.rpartition(".")
        assert getattr(importlib.import_module(f"icu_nb.{module}"), name).__module__ == f"icu_nb.{module}"
    ax = framework.plot_framework()
    written = [(said, box.padded(2)) for said, box in boxes(ax.figure)]
    for points in framework._ARROWS:
        for start, end in itertools.pairwise(points):
            for x, y in ax.transData.transform(np.linspace(start, end, 200)):
                assert not [said for said, box in written if box.contains(x, y)], (start, end)


def test_arrows_run_from_box_to_box_and_through_none():
    def inside(x, y, margin):
        return [
            code
            for left, bottom, *_, code in framework.BOXES
            if left + margin < x < left + framework._WIDTH - margin
            and bottom + margin < y < bottom + framework._HEIGHT - margin
        ]

    for points in framework._ARROWS:
        assert len(inside(*points[0], -0.1)) == len(inside(*points[-1], -0.1)) == 1
        for start, end in itertools.pairwise(points):
            assert not any(inside(x, y, 0.1) for x, y in np.linspace(start, end, 200))


# ---- bad input ----


@pytest.mark.parametrize(
    "draw, message",
    [
        (lambda rows: figures.FIGURES["main_table"].draw(rows[:0]), "`rows`: there are none"),
        (
            lambda rows: figures.FIGURES["main_table"].draw(rows.drop(columns="ppl_heldout")),
            "no column ppl_heldout",
        ),
        (
            lambda rows: figures.FIGURES["main_table"].draw(pd.concat([rows, rows.assign(model="another")])),
            "several kinds of model",
        ),
        (lambda rows: figures.FIGURES["ablation"].draw(rows[rows.label != "ICU"]), "no row is labeled 'ICU'"),
        (lambda rows: figures.FIGURES["limits"].draw(rows), "no attack was measured"),
        (lambda rows: plots._draw_figure("tabel"), "Known: framework"),
    ],
)
def test_bad_input_is_told(draw, message):
    with pytest.raises(InputError, match=message):
        draw(made_up(plain("icu", "kl")))
