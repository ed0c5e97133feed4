"""Collect every summary.json under a folder into one CSV, and print the README's two tables.

Usage: collect_seeds.py RUNS_FOLDER OUT_CSV
"""

import json
import sys
from pathlib import Path

import pandas as pd

STATES = ["before", "after", "gradient_ascent", "retrained"]
METRICS = ["ma", "el10", "general_ppl", "heldout_ppl", "neighbor_ppl"]


def rows(summary):
    """One row per model state; everything the states share is repeated as provenance."""
    shared = {k: v for k, v in summary.items() if k not in STATES}
    shared["versions"] = " ".join(f"{k}=={v}" for k, v in sorted(shared.get("versions", {}).items()))
    shared = pd.json_normalize(shared, sep="_").iloc[0].to_dict()
    keys = {k: shared.pop(k) for k in ("dataset", "seed")}
    return [{**keys, "state": s, **{m: summary[s][m] for m in METRICS}, **shared} for s in STATES]


def markdown(table):
    """Mean [min, max] over the seeds, a line per data set and state."""
    lines = ["| data set | state | " + " | ".join(METRICS) + " |", "|---" * (2 + len(METRICS)) + "|"]
    for (dataset, state), group in table.groupby(["dataset", "state"], sort=False):
        cells = [f"{v.mean():.3g} [{v.min():.3g}, {v.max():.3g}]" for v in (group[m] for m in METRICS)]
        lines.append(" | ".join([f"| {dataset}", state, *cells]) + " |")
    return "\n".join(lines)


def shares(table):
    """Per data set and seed: ICU's rises as a share of gradient ascent's, and what general text paid."""
    columns = ["data set", "seed", "neighbors", "held-out", "general, ICU", "general, gradient ascent"]
    columns.append("MA, gradient ascent minus ICU")
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for (dataset, seed), group in table.groupby(["dataset", "seed"], sort=False):
        measured = group.set_index("state")[METRICS].astype(float)
        before, icu, ascent = (measured.loc[state] for state in STATES[:3])
        shares = (icu - before) / (ascent - before)
        cells = [dataset, seed, f"{shares.neighbor_ppl:.2f}", f"{shares.heldout_ppl:.2f}"]
        cells += [f"{state.general_ppl / before.general_ppl - 1:+.0%}" for state in (icu, ascent)]
        cells.append(f"{ascent.ma - icu.ma:+.3f}")
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


source, target = map(Path, sys.argv[1:])
found = sorted(source.glob("*/summary.json"))
table = pd.DataFrame([row for f in found for row in rows(json.loads(f.read_text(encoding="utf-8")))])
target.parent.mkdir(parents=True, exist_ok=True)
table.to_csv(target, index=False)
print(f"{target}: {len(found)} runs\n\n{markdown(table)}\n\n{shares(table)}")
