"""Collect every summary.json under a folder into one CSV.

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


source, target = map(Path, sys.argv[1:])
found = sorted(source.glob("*/summary.json"))
table = pd.DataFrame([row for f in found for row in rows(json.loads(f.read_text(encoding="utf-8")))])
target.parent.mkdir(parents=True, exist_ok=True)
table.to_csv(target, index=False)
print(f"{target}: {len(found)} runs; tools/results.py writes their tables")
