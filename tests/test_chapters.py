"""What a chapter quotes from another notebook still stands there."""

import json
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
