"""Formulas as MathML, which browsers set by themselves: no script, no network, for site and slides."""

import re

from latex2mathml.converter import convert

MEND = [
    (r"\\arg\s*\\max", r"\\mathrm{arg\\,max}"),
    (r"(?:\\[bB]ig)?\\\|", "‖"),
]  # what the converter does not know


def mathml(latex, display=False):
    """A formula; a long display of several parts gets a line for each."""
    for old, new in MEND:
        latex = re.sub(old, new, latex)
    parts = re.split(r"\\qquad", latex) if display and len(latex) > 100 and r"\qquad" in latex else [latex]
    made = [convert(part.strip(), display="block" if display else "inline") for part in parts]
    left = re.search(r"\\\w*", re.sub("<[^>]*>", "", "".join(made)))
    if left:
        raise ValueError(
            f"{left[0]} cannot be set in {latex!r}: use another command, or mend it in {__file__}"
        )
    return "".join(f'<div class="formula">{one}</div>' for one in made) if display else made[0]
