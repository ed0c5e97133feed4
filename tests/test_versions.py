"""Nothing that the library calls is deprecated, in the oldest and in the newest version that it allows."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
# SWIG's types in faiss: told of at its import, and not for us to mend
WARNINGS = ("error::FutureWarning", "error::DeprecationWarning", "ignore:builtin type:DeprecationWarning")


def test_a_run_calls_nothing_that_is_deprecated():
    """In full, with the published rule, and with LoRA where peft is installed; on two architectures."""
    filters = [argument for warning in WARNINGS for argument in ("-W", warning)]
    paths = ["lora"] if importlib.util.find_spec("peft") else []
    command = [sys.executable, *filters, str(ROOT / "tests" / "no_warnings.py"), *paths]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]


def test_the_oldest_versions_are_those_that_are_allowed():
    """configs/oldest.txt names exactly the lower bounds of pyproject.toml (of torch: see there)."""
    allowed = dict(re.findall(r'"([\w-]+)>=([\d.]+)"', (ROOT / "pyproject.toml").read_text()))
    oldest = dict(re.findall(r"(?m)^([\w-]+)==([\d.]+)", (ROOT / "configs" / "oldest.txt").read_text()))
    assert {"transformers", "accelerate", "datasets", "peft", "faiss-cpu", "numpy", "pandas"} <= set(oldest)
    for name, version in oldest.items():
        assert allowed[name].split(".") == version.split(".")[: len(allowed[name].split("."))], name
