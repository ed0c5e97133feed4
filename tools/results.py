"""Write the tables of docs/results.md from figures/data, between their markers; prose is left alone.

Usage: results.py
"""

import re
import sys
from pathlib import Path

import pandas as pd

from icu_nb.paper.tables import format_interval, pool_draws, summarize

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs/results.md"
DATA = ROOT / "figures/data"
MARKED = re.compile(r"(<!-- table: ([\w -]+) -->\n).*?(<!-- end -->)", re.S)

NAMES = {
    "ma": "MA",
    "el10": "EL₁₀",
    "ppl_neighbors": "neighbors",
    "ppl_retain": "retain set",
    "ppl_heldout": "held-out",
    "ppl_general": "general text",
    "ppl_pile": "Pile validation",
    "acc_retain": "questions",
    "classification": "nine benchmarks",
    "epochs": "epochs",
}
MAIN_COLUMNS = ["ma", "ppl_neighbors", "ppl_heldout", "ppl_general"]
STATES = {
    "before": "memorized",
    "after": "ICU",
    "gradient_ascent": "gradient ascent",
    "retrained": "retrained",
}


def lines(heads, rows):
    """A table in Markdown."""
    return "\n".join(
        ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
        + ["| " + " | ".join(row) + " |" for row in rows]
    )


def real_model():
    """SmolLM2, a number per seed."""
    rows = pd.read_csv(DATA / "real_model.csv")
    columns = ["ma", "el10", "ppl_heldout", "ppl_retain", "ppl_general", "classification"]
    form = {"ma": "{:.3f}", "el10": "{:.4f}", "classification": "{:.3f}"}
    shown = []
    for model, group in rows.groupby("model", sort=False):
        values = [", ".join(form.get(c, "{:.1f}").format(v) for v in group[c]) for c in columns]
        shown.append([model, *values])
    return lines(["model", *(NAMES[c] for c in columns)], shown)


def quickstart():
    """The tiny model of the quickstart, mean [smallest, largest] over three seeds."""
    rows = pd.read_csv(DATA / "quickstart.csv")
    columns = ["ma", "el10", "general_ppl", "heldout_ppl", "neighbor_ppl"]
    shown = []
    for (dataset, state), group in rows.groupby(["dataset", "state"], sort=False):
        values = [f"{v.mean():.3g} [{v.min():.3g}, {v.max():.3g}]" for v in (group[c] for c in columns)]
        shown.append([dataset, STATES[state], *values])
    return lines(["data", "model", "MA", "EL₁₀", "general text", "held-out", "neighbors"], shown)


def quickstart_shares():
    """Per data set and seed: ICU's rise as a share of gradient ascent's, and the rise on general text."""
    heads = ["data", "seed", "neighbors", "held-out", "general text, ICU", "general text, gradient ascent"]
    rows = pd.read_csv(DATA / "quickstart.csv")
    shown = []
    for (dataset, seed), group in rows.groupby(["dataset", "seed"], sort=False):
        states = group.set_index("state")
        before, icu, ascent = (states.loc[state] for state in ("before", "after", "gradient_ascent"))
        cells = [dataset, str(seed)]
        for column in ("neighbor_ppl", "heldout_ppl"):
            cells.append(f"{(icu[column] - before[column]) / (ascent[column] - before[column]):.2f}")
        cells += [f"{state.general_ppl / before.general_ppl - 1:+.0%}" for state in (icu, ascent)]
        shown.append(cells)
    return lines(heads, shown)


def main_table(profile, data, more=()):
    """All methods by what held-out texts show, mean [95 % interval]."""
    rows = pool_draws(pd.read_csv(DATA / "main_table.csv").query("profile == @profile"))
    rows = rows[rows.data == data]
    columns = [*MAIN_COLUMNS, *more]
    found = summarize(rows, [*columns, "epochs"], ["label"])
    found["shown"] = [format_interval(*three) for three in found[["mean", "low", "high"]].to_numpy()]
    table = found.pivot(index="label", columns="column", values="shown")
    order = found[found.column == "ppl_heldout"].set_index("label")["mean"].sort_values().index
    reached = rows.groupby("label").reached.all()
    shown = []
    for label in order:
        star = "" if reached[label] or label == "original" else " *"
        epochs = found[(found.label == label) & (found.column == "epochs")]["mean"].item()
        shown.append([label + star, *table.loc[label, columns], f"{epochs:.0f}"])
    return lines(["method", *(NAMES[c] for c in [*columns, "epochs"])], shown)


def audit():
    """What attacks find, mean [lowest, highest seed]."""
    rows = pd.read_csv(DATA / "audit.csv")
    metrics = {
        "MA": "MA",
        "AUC loss": "AUC of the loss",
        "some forget texts: MA": "MA of the others after relearning a quarter",
        "int8: MA": "MA in 8 bits",
        "int4: MA": "MA in 4 bits",
    }
    models = list(dict.fromkeys(rows.model))
    shown = []
    for metric, name in metrics.items():
        cells = []
        for model in models:
            values = rows[(rows.metric == metric) & (rows.model == model)].value
            some = f"{values.mean():.2f} [{values.min():.2f}, {values.max():.2f}]"
            cells.append(some if len(values) else "not measured")
        shown.append([name, *cells])
    return lines(["attack", *models], shown)


TABLES = {
    "real model": real_model,
    "quickstart": quickstart,
    "quickstart shares": quickstart_shares,
    "main table people": lambda: main_table("tiny", "people", ["acc_retain"]),
    "main table pile": lambda: main_table("tiny", "pile0"),
    "main table larger": lambda: main_table("gpu", "pile", ["ppl_pile"]),
    "audit": audit,
}


def written(page):
    """The page with its tables made again."""
    return MARKED.sub(lambda found: f"{found[1]}{TABLES[found[2]]()}\n{found[3]}", page)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        sys.exit(__doc__)
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
