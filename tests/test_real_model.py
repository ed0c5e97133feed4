"""Rows of the real model, made here with a tiny one: stages, resumption, and what a row says."""

import json
import math

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from icu_nb.data.people import people_corpus
from icu_nb.errors import InputError
from icu_nb.metrics import memorization_accuracy, perplexity
from icu_nb.models.loading import load_model
from icu_nb.models.tiny import memorize, tiny_gpt_neo, train_tokenizer
from icu_nb.paper import plots, real_model
from icu_nb.paper.chapter_figures import plot_real_model
from icu_nb.paper.real_model import run_real_model
from icu_nb.text import tokenize

MAX_LENGTH = 56
SETTINGS = real_model._Settings(
    n_forget=4,
    n_retain=8,
    max_length=MAX_LENGTH,
    n_general=3,
    n_questions=2,
    n_tokens=4,
    eval_batch_size=4,
    learning_rate=2e-3,
    ascent_learning_rate=2e-3,
    max_epochs=1,
)
TASKS = {
    "cities": [
        {"context": "Ann lives in", "choices": [" Leeds", " York"], "answer": 0},
        {"context": "Bob lives in", "choices": [" Leeds", " York"], "answer": 1},
        {"context": "The third is never asked", "choices": [" Leeds", " York"], "answer": 1},
    ]
}
MODELS = ["pretrained", "memorized", "ICU", "gradient ascent", "retrained"]


TAUGHT = []


def make_original(name, corpus, seed, max_length):
    "Tiny models: two layers that see each text often, or not at all."
    tokenizer = train_tokenizer(people_corpus(4, 8, 0).trained_on(), 600)
    model = tiny_gpt_neo(600, n_layers=2, hidden_size=32, n_heads=2, seed=seed)
    if name == "pretrained":
        return model, tokenizer, {"epochs": 0}
    texts = [] if name == "retrained" else corpus.forget
    memorize(model, tokenizer, texts, corpus.retain, repeats=8, epochs=12, max_length=max_length)
    facts = {"epochs": 12, "seconds": 3.0}
    if name in TAUGHT:  # as from the cache
        del facts["seconds"]
    TAUGHT.append(name)
    return model, tokenizer, facts


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    TAUGHT.clear()
    folder = tmp_path_factory.mktemp("real")
    run(folder)
    return folder


def run(folder, seeds=(0,), settings=SETTINGS, tasks=TASKS):
    how = {"settings": settings, "make_original": make_original, "tasks": tasks}
    run_real_model(seeds, folder / "rows.csv", folder / "work", **how)


def read(folder):
    return pd.read_csv(folder / "rows.csv").set_index("model")


def test_a_row_says_what_the_model_can(made):
    rows = read(made)
    assert list(rows.index) == MODELS
    corpus = people_corpus(4, 8, 0)
    model, tokenizer, _ = make_original("memorized", corpus, 0, MAX_LENGTH)
    ma = memorization_accuracy(model, tokenize(corpus.heldout, tokenizer, MAX_LENGTH)).mean().item()
    assert rows.loc["memorized", "heldout_ma"] == pytest.approx(ma)
    assert rows.threshold_ma.tolist() == pytest.approx([ma] * 5)
    assert (rows.threshold_el >= 0.0499).all()
    general = perplexity(model, tokenizer, corpus.general_test[:3], max_length=MAX_LENGTH)
    assert rows.loc["memorized", "ppl_general"] == pytest.approx(general, rel=1e-5)
    assert rows.loc["memorized", "ma"] > rows.loc["retrained", "ma"]
    assert rows.loc["memorized", ["epochs", "seconds"]].tolist() == [12, 3.0]
    assert set(rows.arithmetic) == {"fp32"}


def test_benchmarks_are_compared_question_by_question(made):
    rows = read(made)
    correct = {name: json.loads(row.correct)["cities"] for name, row in rows.iterrows()}
    assert {len(answers) for answers in correct.values()} == {2}
    for name, row in rows.iterrows():
        differences = [int(a) - int(b) for a, b in zip(correct[name], correct["pretrained"], strict=True)]
        assert row.acc_cities == row.classification == correct[name].count("1") / 2
        assert row.classification_change == sum(differences) / 2
        assert row.classification_change_se == pytest.approx(abs(differences[0] - differences[1]) / 2)
    assert rows.loc["pretrained", "classification_change"] == 0


def test_gradient_ascent_stops_at_the_first_step_under_icus_ma(made):
    rows = read(made)
    assert rows.loc["ICU", "ma"] < rows.loc["memorized", "ma"]
    assert rows.loc["ICU", "epochs"] == 1 and rows.loc["ICU", "stop_reason"] in ("max_epochs", "thresholds")
    if rows.loc["gradient ascent", "stop_reason"] == "thresholds":
        assert rows.loc["gradient ascent", "ma"] <= rows.loc["ICU", "ma"] + 1e-6


def test_unlearned_models_are_kept(made):
    rows = read(made)
    (folder,) = (made / "work").glob("0-ICU-*")
    model, tokenizer = load_model(folder / "model")
    forget = tokenize(people_corpus(4, 8, 0).forget, tokenizer, MAX_LENGTH)
    assert memorization_accuracy(model, forget).mean().item() == pytest.approx(rows.loc["ICU", "ma"])
    assert not list((made / "work").glob("*/*checkpoints"))


def test_answers_are_cut_to_their_length(made):
    answers = json.loads(read(made).loc["memorized", "answers"])
    assert list(answers) == list(real_model._QUESTIONS)
    assert all(isinstance(answer, str) for answer in answers.values())


def test_what_is_there_is_not_made_again(made, monkeypatch):
    before = (made / "rows.csv").read_bytes()

    def fail(*args):
        raise AssertionError("a row is made again")

    monkeypatch.setattr(real_model, "_make_row", fail)
    run(made)
    assert (made / "rows.csv").read_bytes() == before
    with pytest.raises(AssertionError):
        run(made, seeds=[1])


class Killed(BaseException):
    pass


def test_a_killed_run_goes_on(made, tmp_path, monkeypatch):
    asked, measured = [], []
    ask, measure = real_model._ask_benchmark, real_model._memory

    def counted(model, tokenizer, of):
        measured.append(of.seed)
        return measure(model, tokenizer, of)

    def killed(*args, **options):
        asked.append(1)
        if len(asked) == 3:  # in the row of ICU: its model is there, its benchmark is not
            raise Killed
        return ask(*args, **options)

    monkeypatch.setattr(real_model, "_memory", counted)
    monkeypatch.setattr(real_model, "_ask_benchmark", killed)
    with pytest.raises(Killed):
        run(tmp_path)
    assert list(read(tmp_path).index) == MODELS[:2]
    (folder,) = (tmp_path / "work").glob("0-ICU-*")
    weights = folder / "model/model.safetensors"
    trained = weights.stat().st_mtime_ns
    run(tmp_path)
    assert weights.stat().st_mtime_ns == trained
    assert len(measured) == 5  # a stage that was done is not done again
    numbers = ["ma", "el10", "ppl_heldout", "ppl_neighbors", "epochs", "classification"]
    pd.testing.assert_frame_equal(read(tmp_path)[numbers], read(made)[numbers])


def test_other_settings_of_unlearning_leave_the_originals(made, tmp_path):
    (tmp_path / "rows.csv").write_bytes((made / "rows.csv").read_bytes())
    of = real_model._Seed(0, real_model.dataclasses.replace(SETTINGS, learning_rate=1e-3), tmp_path, None)
    found = [real_model._find(tmp_path / "rows.csv", of, name) is not None for name in MODELS]
    assert found == [True, True, False, False, True]


def test_a_benchmark_that_cannot_be_asked_is_one_line(made, tmp_path):
    of = real_model._Seed(0, SETTINGS, made / "work", make_original)
    model, tokenizer, _ = of.original("pretrained")
    with pytest.raises(InputError, match=r"`data_dir`.*lambada.csv") as error:
        real_model._ask_benchmark(model, tokenizer, ["lambada"], limit=2, data_dir=tmp_path)
    assert "\n" not in str(error.value)


def test_standard_errors():
    columns = real_model._benchmark_columns({"a": "1100", "b": "1110"}, {"a": "1110", "b": "1110"})
    # of one benchmark: a sample variance over four questions
    assert columns["classification_se"] == pytest.approx(math.sqrt((1 / 3 + 0.25) / 4) / 2)
    assert columns["classification_change"] == -0.125
    assert columns["classification_change_se"] == pytest.approx(math.sqrt(0.25 / 4) / 2)


def test_the_figure_has_a_dot_for_each_model_and_seed(made):
    rows = pd.concat([pd.read_csv(made / "rows.csv"), pd.read_csv(made / "rows.csv").assign(seed=1)])
    fig = plot_real_model(rows)
    memory, other, benchmarks = (
        [line.get_xdata()[0] for line in ax.lines if line.get_marker() == "o" and len(line.get_xdata())]
        for ax in fig.axes
    )
    order = ["pretrained", "memorized", "retrained", "ICU", "gradient ascent"]
    in_order = rows.set_index("model").loc[order]
    assert memory == in_order.ma.tolist() and other == in_order.ppl_heldout.tolist()
    assert benchmarks == pytest.approx((100 * in_order.classification_change.iloc[2:]).tolist())
    assert fig.get_figwidth() <= 8
    plt.close(fig)


def test_trials_say_how_far_perplexities_rise(tmp_path, capsys):
    trials = [
        ("ICU", {"n_neighbors": 2, "learning_rate": 2e-3}),
        ("gradient ascent", {"ascent_learning_rate": 1e-3}),
        ("ICU+", {"plus_learning_rate": 2e-3}),
    ]
    how = {"trials": trials, "settings": SETTINGS, "make_original": make_original}
    path = tmp_path / "trials.csv"
    real_model._run_trials([3], path, tmp_path / "work", **how)
    rows = pd.read_csv(path).set_index("model")
    assert rows.loc["ICU", "n_neighbors"] == 2 and math.isnan(rows.loc["ICU", "ascent_learning_rate"])
    assert rows.loc["gradient ascent", "ascent_learning_rate"] == 1e-3
    corpus = people_corpus(4, 8, 3)
    model, tokenizer, _ = make_original("memorized", corpus, 3, MAX_LENGTH)
    before = perplexity(model, tokenizer, corpus.heldout, max_length=MAX_LENGTH)
    for _, row in rows.iterrows():
        assert row.ppl_heldout == pytest.approx(before * math.exp(row.log_rise_heldout), rel=1e-5)
        assert row.ma < 1 and row.seed == 3
    capsys.readouterr()
    real_model._run_trials([3], path, tmp_path / "work", **how)  # they are there
    assert capsys.readouterr().out == ""
    assert len(pd.read_csv(path)) == 3
    settings = {name: json.loads(row.settings) for name, row in rows.iterrows()}
    assert settings["ICU+"]["plus_learning_rate"] == 2e-3 and "n_neighbors" not in settings["ICU+"]
    assert "plus_learning_rate" not in settings["ICU"]  # what was stored before stays valid


def test_rows_of_the_depth_are_made_from_the_models_that_are_there(made, monkeypatch):
    path = made / "depth.csv"
    how = {"settings": SETTINGS, "make_original": make_original}
    real_model._run_depth([0], path, made / "work", **how)
    rows = pd.read_csv(path).set_index("model")
    assert list(rows.index) == ["memorized", "ICU", "gradient ascent", "retrained"]
    assert rows.depth["memorized"] == 0 and rows.depth["retrained"] == 1
    assert rows.depth.between(0, 1).all() and rows.depth_above_control.between(0, 1).all()
    for column in ("losses", "first", "log_p"):  # a value per layer
        assert rows[column].map(json.loads).str.len().tolist() == [2] * 4
    assert (rows.ever >= rows["first"].map(json.loads).str[-1]).all()
    assert rows.ever["memorized"] > rows.ever["retrained"]
    before = path.read_bytes()

    def fail(*args):
        raise AssertionError("measured again")

    monkeypatch.setattr(real_model, "_measure_depth", fail)
    monkeypatch.setattr(real_model, "_measure_lens", fail)
    real_model._run_depth([0], path, made / "work", **how)
    assert path.read_bytes() == before
    path.unlink()  # what was measured is kept
    real_model._run_depth([0], path, made / "work", **how)
    assert path.read_bytes() == before
    with pytest.raises(InputError, match=r"`work`: .* is not there. Run `python -m icu_nb\..*_model 5`"):
        real_model._load_again("ICU", real_model._Seed(5, SETTINGS, made / "work", make_original))


def test_the_picture_of_the_depth_has_a_bar_for_each_model(made):
    if not (made / "depth.csv").exists():
        real_model._run_depth([0], made / "depth.csv", made / "work", SETTINGS, make_original)
    rows = pd.read_csv(made / "depth.csv")
    fig = plots._plot_depth(pd.concat([rows, rows.assign(seed=1)]))
    left, right = fig.axes
    assert [line.get_label() for line in left.lines] == rows.model.tolist()
    assert left.lines[0].get_ydata() == pytest.approx(json.loads(rows["first"][0]))
    widths = np.array([patch.get_width() for patch in right.patches]).reshape(4, 3)
    assert widths.sum(1) == pytest.approx(1) and (widths[:, :2].sum(1) == pytest.approx(rows.ever))
    plt.close(fig)
