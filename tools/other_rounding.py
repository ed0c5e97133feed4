"""Which cells of a notebook fail where the tiny model's first weights are changed by about a millionth?

Another processor's rounding would do as much.

python tools/other_rounding.py NOTEBOOK SEED [OUT]    OUT: keep the executed notebook there
"""

import os
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

NUDGE = """
import torch
import icu_nb.models.tiny

def nudged(config, plain=icu_nb.models.tiny.GPTNeoForCausalLM):
    model, draw = plain(config), torch.Generator().manual_seed({seed})
    with torch.no_grad():
        for weights in model.parameters():
            weights.mul_(1 + 1e-6*torch.randn(weights.shape, generator=draw))
    return model

icu_nb.models.tiny.GPTNeoForCausalLM = nudged
"""


def main(notebook, seed, out=None):
    book = nbformat.read(notebook, as_version=4)
    book.cells.insert(0, nbformat.v4.new_code_cell(NUDGE.format(seed=int(seed))))
    with tempfile.TemporaryDirectory() as cache:  # models that others memorized are of no use here
        os.environ["ICU_NB_CACHE"] = cache
        NotebookClient(
            book,
            timeout=1800,
            allow_errors=True,
            resources={"metadata": {"path": str(Path(notebook).parent)}},
        ).execute()
    if out:
        nbformat.write(book, out)
    failed = [
        f"{cell.id}: {output.ename}: {output.evalue}"
        for cell in book.cells
        if cell.cell_type == "code"
        for output in cell.outputs
        if output.output_type == "error"
    ]
    print("\n".join(failed) or "every cell ran")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
