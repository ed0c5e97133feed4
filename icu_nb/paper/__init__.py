"""The paper's grids, rows, tables and figures. They need the extra `paper`, and say so in one line."""

from importlib.util import find_spec

for _module in ("matplotlib", "seaborn", "scipy", "psutil"):
    if find_spec(_module) is None:
        from ..plumbing import require_package  # loads torch, which figures do without

        require_package(_module, "paper")
