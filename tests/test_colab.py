"""Colab, played: a notebook's file alone, in an environment with what Colab has. Its first cell must do the rest."""

import os
import re
import shutil
import sys
from pathlib import Path

import pytest
from test_install import LOCK, ROOT, build_wheel, run

from icu_nb.plumbing import cache_dir

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="Colab is Linux")
NOTEBOOKS = sorted(f for f in (ROOT / "nbs").glob("*.ipynb") if f.name[:2] <= "10")
IN_MAKE_TEST = ("00_quickstart", "09a_judge")  # the others take long
# An older numpy, as on Colab: pip would have a newer one at hand.
PACKAGES = [
    "torch",
    "numpy<2.3",
    "transformers",
    "datasets",
    "pandas",
    "matplotlib",
    "seaborn",
    "ipykernel",
    "nbclient",
]
VERSIONS = "from importlib.metadata import version; print(version('torch'), version('numpy'))"


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A folder that is emptied afterwards: the environment has gigabytes."""
    path = tmp_path_factory.mktemp("colab")
    yield path
    shutil.rmtree(path)


@pytest.fixture(scope="session")
def colab(folder):
    """Runs the Python of a fresh environment that takes itself for Colab. One for all notebooks, and the cache of all other tests:
    what is played is the machine, and training the same tiny models again would only take longer."""
    python = folder / "env" / "bin" / "python"
    pins = folder / "constraints.txt"
    pins.write_text(re.sub(r"(?m)^numpy==.*\n", "", LOCK.read_text(encoding="utf-8")), encoding="utf-8")
    environ = {
        k: v for k, v in os.environ.items() if not k.startswith(("ICU_NB_", "JUPYTER_", "IPYTHON", "PYTHON"))
    } | {
        "HOME": str(folder / "home"),
        "ICU_NB_CACHE": str(cache_dir()),
        "ICU_NB_WHEEL": build_wheel(folder).as_uri(),
        "PIP_CONSTRAINT": str(pins),
        "PIP_CONFIG_FILE": str(Path.home() / ".config/pip/pip.conf"),
    }  # pip's settings lie at home

    def call(*command, cwd=folder):
        return run(python, *command, cwd=cwd, env=environ)

    run(sys.executable, "-m", "venv", folder / "env", cwd=folder)
    call("-m", "pip", "install", "--no-compile", *PACKAGES)
    # Colab's kernel loads google.colab as an extension when it starts.
    google = Path(call("-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()) / "google"
    google.mkdir(exist_ok=True)
    (google / "colab.py").write_text("def load_ipython_extension(shell): pass\n")
    config = folder / "env" / "etc" / "ipython" / "ipython_config.py"
    config.parent.mkdir(parents=True, exist_ok=True)
    config.write_text("c.InteractiveShellApp.extensions = ['google.colab']\n")
    return call


@pytest.mark.parametrize(
    "path",
    [pytest.param(f, id=f.stem, marks=[] if f.stem in IN_MAKE_TEST else pytest.mark.slow) for f in NOTEBOOKS],
)
def test_runs_from_its_file_alone(path, colab, folder, tmp_path):
    colab("-m", "pip", "uninstall", "-y", "icu_nb")  # the notebook before has installed it
    before = colab("-c", VERSIONS)
    shutil.copy(path, tmp_path)
    colab("-m", "jupyter", "execute", "--timeout=900", path.name, cwd=tmp_path)
    assert colab("-c", VERSIONS) == before
    module = Path(colab("-c", "import icu_nb; print(icu_nb.__file__)", cwd=tmp_path).strip())
    assert (folder / "env").resolve() in module.resolve().parents
