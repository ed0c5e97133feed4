"""The package installs into an empty environment, without any developer's tool, and works from elsewhere."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LOCK = ROOT / "requirements.lock"

IMPORT_CORE = """
import importlib.util
import icu_nb, icu_nb.cli
from icu_nb import ICU, ICUConfig, calibrate_thresholds, get_method, load_model, sample_pool, unlearn
tools = ["nbdev", "fastcore", "IPython", "ipykernel", "jupyter_core", "papermill", "nbval", "pytest"]
assert not [t for t in tools if importlib.util.find_spec(t)]
assert not [t for t in ("nbs", "tests", "figures", "docs", "tools") if importlib.util.find_spec(t)]
from icu_nb.models.tiny import tiny_gpt_neo
tiny_gpt_neo(64, n_layers=2)
print(icu_nb.__version__, icu_nb.__file__)
"""


@pytest.fixture
def folder(tmp_path):
    """A folder that is emptied afterwards: pytest would keep the last three environments, gigabytes each."""
    yield tmp_path
    shutil.rmtree(tmp_path)


def run(*command, cwd, env=None):
    done = subprocess.run(
        [str(c) for c in command], cwd=cwd, env=env, capture_output=True, text=True, timeout=1500
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def build_wheel(folder):
    """The wheel of this tree, in a folder that exists."""
    # A copy, since a build leaves files behind.
    shutil.copytree(ROOT / "icu_nb", folder / "source" / "icu_nb")
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / "source")
    run(sys.executable, "-m", "pip", "wheel", "--no-deps", "-w", folder, folder / "source", cwd=folder)
    (wheel,) = folder.glob("icu_nb-*.whl")
    return wheel


def test_installs_without_tools_and_imports_from_elsewhere(folder):
    elsewhere, env = folder / "elsewhere", folder / "env"
    elsewhere.mkdir()
    wheel = build_wheel(folder)

    run(sys.executable, "-m", "venv", "--without-pip", env, cwd=folder)
    python = env / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    # From outside, and without bytecode: half the files to write and to delete.
    run(
        sys.executable,
        "-m",
        "pip",
        "--python",
        python,
        "install",
        "--no-compile",
        "-c",
        LOCK,
        wheel,
        cwd=elsewhere,
    )
    said = run(python, "-I", "-B", "-c", IMPORT_CORE, cwd=elsewhere)
    assert str(env.resolve()) in str(Path(said.split(maxsplit=1)[1].strip()).resolve())
