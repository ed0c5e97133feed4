"""What a chapter quotes from another notebook still stands there."""

import json
import math
import re

import pandas as pd
from test_project import CHAPTERS, NBS, ROOT

from icu_nb.config import ICUConfig


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
