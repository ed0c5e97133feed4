"""Colab, played: its first cell in IPython, and notebooks from their file alone in a fresh environment."""

import os
import re
import shutil
import sys
import types
from pathlib import Path

import pytest
from test_install import LOCK, build_wheel, run
from test_project import CHAPTERS, NBS, ROOT, cells, settings, text

from icu_nb.plumbing import cache_dir

COLAB = pytest.mark.skipif(sys.platform == "win32", reason="Colab is Linux")
NOTEBOOKS = [NBS / "00_quickstart.ipynb", *CHAPTERS]
IN_MAKE_TEST = ("10_a_real_model",)  # the others take long
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


# ---- the first cell: tests/test_project.py sees to it that it is the same in all notebooks ----


@pytest.fixture
def colab_cell(monkeypatch):
    """Runs the cell where `google.colab` is loaded, with stubs for git and pip: the commands it gave."""
    shells = pytest.importorskip("IPython.core.interactiveshell")
    monkeypatch.setitem(sys.modules, "google.colab", types.ModuleType("google.colab"))
    monkeypatch.delenv("ICU_NB_WHEEL", raising=False)
    source = text(cells(NBS / "00_quickstart.ipynb", "code")[0]["source"])

    def run_cell(tags):
        shell, commands = shells.InteractiveShell(), []

        def git(command, **_):
            commands.append(shell.var_expand(command))
            return tags

        def pip(line):
            commands.append(f"pip {line}")

        monkeypatch.setattr(shell, "getoutput", git)
        shell.register_magic_function(pip)
        shell.run_cell(source).raise_error()
        return commands

    return run_cell


def test_first_cell_installs_the_tag_if_it_exists(colab_cell):
    user, repo, branch, version = settings("user", "repo", "branch", "version")
    address = f"https://github.com/{user}/{repo}"
    git, pip, *_ = colab_cell([f"0123456\trefs/tags/v{version}"])
    assert git == f"git ls-remote --tags {address} v{version} 2>/dev/null"
    assert re.fullmatch(
        rf'pip install -q "icu_nb\[paper\] @ git\+{address}@v{version}" torch==\S+ numpy==\S+', pip
    )
    _, pip, *_ = colab_cell([])
    assert f'"icu_nb[paper] @ git+{address}@{branch}"' in pip


def test_first_cell_installs_a_given_wheel(colab_cell, monkeypatch):
    monkeypatch.setenv("ICU_NB_WHEEL", "file:///tmp/icu_nb.whl")
    assert '"icu_nb[paper] @ file:///tmp/icu_nb.whl"' in colab_cell([])[1]


# ---- whole notebooks ----


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A folder that is emptied afterwards: the environment has gigabytes."""
    path = tmp_path_factory.mktemp("colab")
    yield path
    shutil.rmtree(path)


@pytest.fixture(scope="session")
def colab(folder):
    """Runs the Python of a fresh environment that takes itself for Colab.

    One for all notebooks, and the cache of all other tests: what is played is the machine, and training the
    same tiny models again would only take longer.
    """
    python = folder / "env" / "bin" / "python"
    pins = folder / "constraints.txt"
    pins.write_text(re.sub(r"(?m)^numpy==.*\n", "", LOCK.read_text(encoding="utf-8")), encoding="utf-8")
    own = ("ICU_NB_", "JUPYTER_", "IPYTHON", "PYTHON")
    environ = {name: value for name, value in os.environ.items() if not name.startswith(own)}
    environ |= {
        "HOME": str(folder / "home"),
        "ICU_NB_CACHE": str(cache_dir()),
        "ICU_NB_WHEEL": build_wheel(folder).as_uri(),
        "PIP_CONSTRAINT": str(pins),
        "PIP_CONFIG_FILE": str(Path.home() / ".config/pip/pip.conf"),  # pip's settings lie at home
    }

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


def case(path):
    return pytest.param(path, id=path.stem, marks=[] if path.stem in IN_MAKE_TEST else pytest.mark.slow)


@COLAB
@pytest.mark.parametrize("path", [case(path) for path in NOTEBOOKS])
def test_runs_from_its_file_alone(path, colab, folder, tmp_path):
    colab("-m", "pip", "uninstall", "-y", "icu_nb")  # the notebook before has installed it
    before = colab("-c", VERSIONS)
    place = tmp_path / path.parent.relative_to(ROOT)
    place.mkdir(parents=True)
    shutil.copy(path, place)
    if "../../figures/data" in path.read_text(encoding="utf-8"):  # Colab has them from GitHub
        shutil.copytree(ROOT / "figures/data", tmp_path / "figures/data")
    colab("-m", "jupyter", "execute", "--timeout=900", path.name, cwd=place)
    assert colab("-c", VERSIONS) == before
    module = Path(colab("-c", "import icu_nb; print(icu_nb.__file__)", cwd=tmp_path).strip())
    assert (folder / "env").resolve() in module.resolve().parents
