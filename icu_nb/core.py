import importlib.metadata, importlib.util, json, math, numbers, os, platform, shutil, subprocess, tempfile, warnings
from contextlib import contextmanager
from pathlib import Path

# Without ipywidgets tqdm draws plain bars; that is fine and needs no warning in every notebook.
warnings.filterwarnings("ignore", message="IProgress not found")

import matplotlib.pyplot as plt
import seaborn as sns
import torch
import transformers


class ICUError(Exception):
    "Base of every error that this library raises on purpose."


class InputError(ICUError, ValueError):
    "An argument cannot be used; the message names it and says what to do."


class DownloadError(ICUError, OSError):
    "A file could not be fetched, or is not the file that was expected."


def require(
    condition: bool, # what must hold
    argument: str, # the name of the argument it is about
    problem: str, # what is wrong with it
    remedy: str, # what the caller can do
) -> None:
    "Raise one clear `InputError` unless `condition` holds."
    if not condition:
        raise InputError(f"`{argument}`: {problem}. {remedy}.")


def require_number(
    name: str, # the argument's name
    value: float, # its value
    low: float=0.0, # the smallest value allowed
    high: float=math.inf, # the largest value allowed
) -> None:
    "Raise `InputError` unless `value` is a number from `low` to `high`; NaN never is."
    allowed = f"at least {low:g}" if high == math.inf else f"from {low:g} to {high:g}"
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    require(is_number and low <= value <= high and value != math.inf, name, f"{value!r} is out of range", f"Give a number {allowed}")


def seed_everything(
    seed: int=0, # from 0 to 2**32 - 1, NumPy's range
) -> None:
    "Seed Python, NumPy and PyTorch, on every device."
    require(isinstance(seed, int) and 0 <= seed < 2**32, "seed", f"{seed!r} is not a whole number from 0 to 2**32 - 1", "Give for example seed=0")
    transformers.set_seed(seed)


def best_device() -> torch.device:
    "A CUDA GPU if there is one, else Apple's MPS, else the CPU."
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def mixed_precision() -> str:
    "`'bf16'` where the device computes in bfloat16 natively, else `'no'`. Weights stay fp32 either way."
    native = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bf16" if native else "no"


@contextmanager
def atomic_path(
    path: str|Path, # the file or folder that shall exist afterwards, whole or not at all
):
    "Yield a temporary path beside `path`; rename it to `path` if the block succeeds, remove it if not."
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        yield folder/path.name
        if path.is_dir(): # a folder cannot be renamed onto a full one: the old one is moved aside first
            os.replace(path, folder/"old")
        os.replace(folder/path.name, path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def cache_dir() -> Path:
    "Where downloads and trained tiny models are kept: `ICU_NB_CACHE`, or `~/.cache/icu_nb`."
    return Path(os.environ.get("ICU_NB_CACHE") or Path.home()/".cache"/"icu_nb")


LIBRARIES = ["torch", "transformers", "datasets", "accelerate", "tokenizers", "numpy", "faiss-cpu", "sacrebleu", "torchmetrics"]


def library_versions() -> dict[str, str]:
    "Versions of Python, of this package and of the libraries that its numbers depend on."
    versions = {}
    for name in ["icu_nb", *LIBRARIES]:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError: # for example faiss-gpu in place of faiss-cpu
            versions[name] = "not installed"
    return {"python": platform.python_version(), **versions}


def commit() -> str|None:
    "The git commit of the code that runs, with `+` behind it if files were changed since; None outside a checkout."
    folder = Path(importlib.util.find_spec("icu_nb").origin).parent
    git = lambda *words: subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, check=True).stdout.strip()
    try:
        tracked = git("ls-files", "core.py")
        return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain", "-uno", ".") else "") if tracked else None
    except (OSError, subprocess.CalledProcessError):
        return None


def machine() -> str:
    "The processor, or the GPU where there is one, in a few words."
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    cpu_info = Path("/proc/cpuinfo")
    models = [line.split(":")[1].strip() for line in cpu_info.read_text().splitlines() if line.startswith("model name")] if cpu_info.exists() else []
    return f"{models[0] if models else platform.processor() or platform.machine()}, {os.cpu_count()} cores"


def provenance() -> dict:
    "What a stored number must carry: machine, device, library versions and commit."
    return {"machine": machine(), "device": str(best_device()), "threads": torch.get_num_threads(), "commit": commit(), "versions": library_versions()}


# Okabe and Ito's palette: told apart by color-blind readers too.
COLORS = {
    "original": "#999999", "ICU": "#0072B2", "gradient ascent": "#D55E00", "retrained": "#009E73",
    "forget": "#D55E00", "neighbors": "#56B4E9", "held-out": "#CC79A7", "general": "#E69F00",
}


def set_figure_style() -> None:
    "The one style of all figures: readable at column width, in grey too."
    sns.set_theme(context="notebook", style="whitegrid", palette=list(COLORS.values()))
    plt.rcParams.update({
        "figure.dpi": 100, "savefig.dpi": 200, "savefig.bbox": "tight", "font.family": "DejaVu Sans",
        "axes.titlelocation": "left", "axes.titleweight": "bold", "axes.titlesize": 11, "axes.spines.top": False, "axes.spines.right": False,
        "svg.hashsalt": "icu_nb", "figure.constrained_layout.use": True,
    })


def save_figure(
    fig, # a matplotlib Figure
    name: str, # file name without an ending
    folder: str|Path="figures", # where it goes; made if it is not there
) -> list[Path]:
    "Write `fig` as PNG and SVG without a date, so that the same figure gives the same files."
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder/f"{name}.png", folder/f"{name}.svg"]
    fig.savefig(paths[0], metadata={"Software": None})
    fig.savefig(paths[1], metadata={"Date": None})
    return paths


def write_json(
    path: str|Path, # the file
    content: dict, # anything JSON can hold; numbers must be finite
) -> None:
    "Write `content` as JSON, whole or not at all."
    with atomic_path(path) as temporary:
        Path(temporary).write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
