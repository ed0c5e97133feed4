"""The stored rows of the comparison at equal forgetting: what is there is not made again."""

from pathlib import Path

import pandas as pd

from icu_nb.methods.registry import METHODS
from icu_nb.paper import baselines
from icu_nb.paper.baselines import _read_baselines as read_baselines
from icu_nb.paper.baselines import run_baselines

STORED = Path(__file__).resolve().parents[1] / "figures/data/baselines.csv"


def test_only_missing_rows_and_changed_settings_are_made(tmp_path, monkeypatch):
    made = []

    def row(name, seed, max_epochs):
        made.append((name, seed))
        return {"method": name, "seed": seed, "settings": baselines._settings(name), "ma": 0.5}

    monkeypatch.setattr(baselines, "_baseline_row", row)
    path = tmp_path / "baselines.csv"
    assert read_baselines(path).empty
    run_baselines(path, ["original", "npo"], [0, 1])
    assert made == [("original", 0), ("npo", 0), ("original", 1), ("npo", 1)]
    run_baselines(path, ["original", "npo", "ga"], [0])
    assert made[4:] == [("ga", 0)]
    rows = read_baselines(path)
    rows.loc[rows.method == "npo", "settings"] = '{"learning_rate": 1.0}'
    rows.to_csv(path, index=False)
    run_baselines(path, ["original", "npo", "ga"], [0])
    assert made[5:] == [("npo", 0)]
    assert len(read_baselines(path)) == 5
    assert {"machine", "commit", "versions"} <= set(read_baselines(path))


def test_stored_rows_are_those_of_the_registry():
    """But for DPO's, which were made with its loss without the factor 2/beta."""
    rows = read_baselines(STORED)
    same = rows.settings == rows.method.map(baselines._settings)
    assert set(rows.method[~same]) == {"dpo"}
    compared = {name for name, method in METHODS.items() if not method.since_paper}
    assert set(rows.method) == compared - {"random weights"}
    assert (rows.groupby("method").size() == 3).all()
    reached = pd.Series(rows.ma <= rows.threshold + 1e-6)
    assert (reached == rows.reached).all()
