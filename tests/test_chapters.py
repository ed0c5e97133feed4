"""What a chapter quotes from another notebook still stands there."""

import json
import math
import re

import pandas as pd
from test_project import CHAPTERS, NBS, ROOT

from icu_nb.config import ICUConfig
from icu_nb.data.people import people_corpus


def settings_in(path, name):
    """The `ICUConfig(...)` that a cell of the notebook assigns to this name."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    (found,) = re.findall(rf"^{name} = (ICUConfig\([^()]*\))$", code, re.M)
    return eval(found, {"ICUConfig": ICUConfig})


def test_the_table_of_settings_quotes_the_guide():
    """Chapter 07 has a column for guide/your_own_model."""
    (loop,) = (path for path in CHAPTERS if path.name == "07_the_loop.ipynb")
    assert settings_in(loop, "own") == settings_in(NBS / "guide/your_own_model.ipynb", "config")


def test_chapter_06_quotes_the_rows_of_26():
    """The published rule with and without an encoder, and the goal."""
    rows = pd.read_csv(ROOT / "figures/data/thresholds.csv")
    means = rows.groupby("label")[["ma", "threshold_ma", "epochs"]].mean().round(2)
    for label in ("BLEU under 0.01", "all-MiniLM-L6-v2: F1 under 0.3 or BLEU"):
        assert means.loc[label].tolist() == [0.78, 0.48, 20]


def test_chapter_04_quotes_the_depths_of_18():
    """MA of the forget texts under the retrained model, and the goal, on the two tuning seeds."""
    rows = pd.read_csv(ROOT / "figures/data/comparison_trials.csv").query("method == 'original'")
    depths = rows.query("data == 'people'").set_index("seed")[["depth_deep", "depth_shallow"]].round(2)
    assert depths.loc[[100, 101]].to_numpy().tolist() == [[0.41, 0.49], [0.39, 0.48]]


def test_chapter_05_quotes_two_runs_of_18():
    """General text in the pool, and not: the same settings, the same seed."""
    rows = pd.read_csv(ROOT / "figures/data/comparison_recipe.csv").set_index("run").loc[[18, 17]]
    assert rows["pool"].tolist() == ["people", "people+general"]
    same = ["seed", "forget_loss", "margin", "prior", "learning_rate", "n_neighbors", "refinement"]
    assert (rows[same].nunique() == 1).all()
    assert [int(100 * math.expm1(rise)) for rise in rows["deep_general"]] == [76, -5]


def test_chapter_05_quotes_the_near_duplicates_of_published_pairs():
    book = (NBS / "library/paper/published_pairs.ipynb").read_text(encoding="utf-8")
    (counts,) = re.findall(r"near-duplicates, 10-grams > 0\.5 +(\d+) +(\d+) +(\d+)", book)
    prose = (NBS / "learn/05_cle.ipynb").read_text(encoding="utf-8")
    low, high = sorted(map(int, counts))[:: len(counts) - 1]
    assert f"{low} to {high} of the 128 published neighbors" in prose


def prose_of(name):
    """The Markdown of a notebook of `nbs`."""
    cells = json.loads((NBS / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]
    return "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")


def test_chapter_05_quotes_nearest_and_random_neighbors_of_25():
    rows = pd.read_csv(ROOT / "figures/data/neighbors.csv").query("profile == 'tiny'")
    heldout = rows.ppl_heldout.map(math.log).groupby(rows.label).mean().map(math.exp)
    shown = f"held-out perplexity of {heldout['nearest']:.1f} and {heldout['random']:.1f}"
    assert shown in prose_of("learn/05_cle")


def test_steps_of_the_retrained_model():
    """Texts a pass, and steps of eight texts in five passes: 18, 32 and 33 quote them."""
    corpus = people_corpus()
    others = len(corpus.retain) + len(corpus.general_train)
    texts = others + corpus.repeats * len(corpus.forget)
    assert f"({others} texts a pass instead of {texts:,}" in prose_of("paper/18_protocol")
    assert f"{others / texts:.0%}".replace("%", " %") in prose_of("paper/18_protocol")
    steps = [corpus.epochs * math.ceil(number / 8) for number in (others, texts)]
    for name in ("32_what_an_attack_measures", "33_what_a_model_can_still_do"):
        assert re.search(rf"{steps[0]}\D+{steps[1]}", prose_of(f"paper/{name}")), (name, steps)


def test_30_opens_with_the_benchmarks_medians():
    rows = pd.read_csv(ROOT / "figures/data/bench.csv").query("device == 'cpu' and unit == 'seconds'")
    whole = rows[rows.phase.isna()].pivot_table(index=["benchmark", "pair"], columns="way", values="value")
    told = prose_of("paper/30_speed_and_memory")
    run = whole.loc["whole run"]
    assert f"takes {run.ours.median():.1f} s instead of {run.plain.median():.1f} s" in told
    ratio = {name: (of.plain / of.ours).median() for name, of in whole.groupby("benchmark")}
    assert f"(ratio {ratio['whole run']:.1f}; our target, 12" in told
    faster = f"{ratio['MA + EL, memorized']:.0f} times as fast on memorized texts"
    assert faster in told and f"{ratio['MA + EL, random']:.1f} times with random weights" in told
