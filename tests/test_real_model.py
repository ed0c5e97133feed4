"""The study of the real model, made here with a tiny one: what a row holds, choosing, resuming, TOFU."""

import dataclasses
import json
import math
from functools import partial

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from icu_nb.data.general import DIALOGUES
from icu_nb.data.people import people_corpus
from icu_nb.errors import InputError
from icu_nb.methods.registry import get_method
from icu_nb.metrics import memorization_accuracy, perplexity
from icu_nb.models.loading import load_model
from icu_nb.models.tiny import memorize, tiny_gpt_neo, train_tokenizer
from icu_nb.paper import plots, real_model
from icu_nb.paper.chapter_figures import plot_real_model
from icu_nb.text import tokenize

SIZES = real_model._Sizes(
    n_forget=10,
    n_retain=12,
    max_length=56,
    repeats=8,
    epochs=6,
    teach_rate=4e-3,
    n_general=3,
    eval_batch_size=16,
    max_epochs=4,
    n_questions=2,
    n_dialogues=1,
    n_tokens=4,
    n_tofu=4,
    tofu_tokens=4,
    relearn_steps=2,
)
RECIPES = {
    "ICU+": real_model._Recipe("icu_plus", (1e-3, 3e-3), general=True),
    "gradient ascent": real_model._Recipe("ga", (1e-3,)),
    "ICU": real_model._Recipe("icu", (2e-3,), {"beta": 4.0}, {"n_neighbors": 2}),
    "SimNPO": real_model._Recipe("simnpo", (1e-3,)),
    "RMU": real_model._Recipe("rmu", (1e-3,), {"layer": 1}),
    "ICU without IUR": real_model._Recipe("icu", refined=False, rate_of="ICU"),
}
TASKS = {
    "cities": [
        {"context": "Ann lives in", "choices": [" Leeds", " York"], "answer": 0},
        {"context": "Bob lives in", "choices": [" Leeds", " York"], "answer": 1},
        {"context": "The third is never asked", "choices": [" Leeds", " York"], "answer": 1},
    ]
}
ORIGINALS = ["pretrained", "memorized", "retrained"]
MODELS = [*ORIGINALS, "ICU+", "gradient ascent"]
PROFILE = real_model._Profile({"people": SIZES}, tuple(("people", 0, name) for name in MODELS))


@pytest.fixture(autouse=True, scope="module")
def recipes():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(real_model, "_RECIPES", RECIPES)
        yield


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A small model in a folder, which has read other people's records."""
    corpus = people_corpus(10, 12, 7)
    tokenizer = train_tokenizer(corpus.trained_on(), 600)
    model = tiny_gpt_neo(600, max_length=512, n_layers=2, hidden_size=64, n_heads=2)
    memorize(model, tokenizer, [], corpus.retain, epochs=4, max_length=56, cache=False)
    folder = tmp_path_factory.mktemp("base")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    (folder / "dialogue").mkdir()
    for name in DIALOGUES:
        turns = {"0": ["Hello, who are you?", "I am Ann."]}
        (folder / "dialogue" / f"{name}.json").write_text(json.dumps({"text": turns}))
    return folder


def study(folder, base, data_dir, profile=PROFILE):
    names = ["rows.csv", "trials.csv", "locked.json", "work"]
    return real_model._Study(profile, *[folder / name for name in names], data_dir, base, TASKS)


def read(folder, file="rows.csv"):
    return pd.read_csv(folder / file).set_index("model")


@pytest.fixture(scope="module")
def made(tmp_path_factory, base, data_dir):
    folder = tmp_path_factory.mktemp("real")
    with pytest.MonkeyPatch.context() as patch:  # what is deleted at the end is looked at below
        patch.setattr(real_model, "_delete_what_is_done", lambda study: None)
        assert real_model._run(study(folder, base, data_dir), list(PROFILE.plan)) == 0
    return folder


def test_a_row_says_what_the_model_can(made, base, data_dir):
    rows = read(made)
    assert list(rows.index) == MODELS
    of = real_model._Seed(study(made, base, data_dir), "people", 0)
    model, tokenizer = of.original("memorized")
    heldout, general = of.texts.heldout, of.texts.general_test[:3]
    ma = memorization_accuracy(model, tokenize(heldout, tokenizer, 56)).mean().item()
    assert rows.loc["memorized", "heldout_ma"] == pytest.approx(ma)
    assert rows.threshold_ma.tolist() == pytest.approx([ma] * len(rows))
    assert (rows.threshold_el >= 0.0499).all()
    for kind, texts in {"heldout": heldout, "general": general, "retain": of.texts.retain}.items():
        expected = perplexity(model, tokenizer, texts, max_length=56)
        assert rows.loc["memorized", f"ppl_{kind}"] == pytest.approx(expected, rel=1e-5)
    assert rows.loc["memorized", "log_rise_heldout"] == 0
    rise = math.log(rows.ppl_heldout["ICU+"] / rows.ppl_heldout["memorized"])
    assert rows.log_rise_heldout["ICU+"] == pytest.approx(rise)
    assert rows.ma["memorized"] > rows.ma["retrained"] + 0.1
    assert rows.auc_loss["memorized"] > 0.9 and rows.auc_loss["pretrained"] < 0.9
    assert rows.loc["memorized", ["epochs", "method"]].tolist() == [6, "memorized"]
    for column in ("answered", "dialogue", "seconds", "memory_mb", "ever"):
        assert rows[column].drop("pretrained").notna().all(), column
    assert set(rows.arithmetic) == {"fp32"}


def test_what_is_measured_of_unlearned_models_alone(made):
    rows = read(made)
    unlearned = rows.loc[["ICU+", "gradient ascent"]]
    assert unlearned.depth.between(0, 1).all() and rows.depth[ORIGINALS].isna().all()
    assert unlearned.relearned_ma.between(0, 1).all()
    assert unlearned.reached.isin([True, False]).all() and (unlearned.epochs <= SIZES.max_epochs).all()
    met = (unlearned.ma <= unlearned.threshold_ma + 1e-6) & (unlearned.el10 <= unlearned.threshold_el)
    assert (met == (unlearned.stop_reason == "thresholds")).all() and met.any()
    assert (unlearned.ma < rows.ma["memorized"]).all()


def test_the_retrained_model_takes_as_many_steps_on_other_people(made, base, data_dir):
    texts = real_model._Seed(study(made, base, data_dir), "people", 0).texts
    assert len(texts.others) == len(texts.forget)
    assert not set(texts.others) & {*texts.forget, *texts.retain, *texts.heldout}


def test_benchmarks_are_compared_question_by_question(made):
    rows = read(made)
    correct = {name: json.loads(row.correct)["cities"] for name, row in rows.iterrows()}
    assert {len(answers) for answers in correct.values()} == {2}
    for name, row in rows.iterrows():
        differences = [int(a) - int(b) for a, b in zip(correct[name], correct["pretrained"], strict=True)]
        assert row.acc_cities == row.classification == correct[name].count("1") / 2
        assert row.classification_change == sum(differences) / 2
        assert row.classification_change_se == pytest.approx(abs(differences[0] - differences[1]) / 2)
    kept = rows.loc[["ICU+", "gradient ascent"]]
    assert kept.kept.tolist() == (kept.classification - rows.classification["memorized"]).tolist()
    assert math.isnan(rows.kept["pretrained"])  # no memorized model was there to compare with


def test_standard_errors_and_the_paired_interval():
    pretrained, memorized = {"a": "1110", "b": "1110"}, {"a": "1111", "b": "1110"}
    columns = real_model._benchmark_columns({"a": "1100", "b": "1110"}, pretrained, memorized)
    # of one benchmark: a sample variance over four questions
    assert columns["classification_se"] == pytest.approx(math.sqrt((1 / 3 + 0.25) / 4) / 2)
    assert columns["classification_change"] == -0.125
    assert columns["classification_change_se"] == pytest.approx(math.sqrt(0.25 / 4) / 2)
    error = math.sqrt((1 / 3) / 4) / 2  # of the differences 0, 0, -1, -1; those of b do not vary
    assert columns["kept"] == -0.25
    assert columns["kept_low"] == pytest.approx(-0.25 - 1.96 * error)
    assert columns["kept_high"] == pytest.approx(-0.25 + 1.96 * error)


def test_the_rate_of_the_best_trial_is_locked_and_used(made):
    trials, locked = (
        pd.read_csv(made / "trials.csv"),
        json.loads((made / "locked.json").read_text())["people"],
    )
    assert set(trials.seed) == {100} and trials.groupby("model").size().to_dict() == {
        "ICU+": 2,
        "gradient ascent": 1,
    }
    plus = trials[trials.model == "ICU+"]
    assert locked["ICU+"]["tried"] == plus.learning_rate.tolist() == [1e-3, 3e-3]
    score = (plus.log_rise_heldout + plus.log_rise_general) / 2
    reached = plus.stop_reason == "thresholds"
    best = score[reached].idxmin() if reached.any() else plus.ma.idxmin()
    assert locked["ICU+"]["learning_rate"] == plus.learning_rate[best] == read(made).learning_rate["ICU+"]


def trial(rate, heldout, general, ma=0.5, stop_reason="thresholds"):
    names = ["learning_rate", "log_rise_heldout", "log_rise_general", "ma", "stop_reason"]
    return dict(zip(names, [rate, heldout, general, ma, stop_reason], strict=True))


@pytest.mark.parametrize(
    ("trials", "chosen", "reached"),
    [
        ([trial(1, 0.4, 0.0), trial(2, 0.1, 0.2), trial(3, 0.3, 0.3)], 2, True),
        ([trial(1, 0.0, 0.0, stop_reason="max_epochs"), trial(2, 0.5, 0.5)], 2, True),
        ([trial(1, math.nan, 0.0), trial(2, 0.5, 0.5)], 2, True),  # a model that broke
        ([trial(1, 0.0, 0.0, 0.7, "max_epochs"), trial(2, 0.5, 0.5, 0.6, "max_epochs")], 2, False),
    ],
)
def test_choosing(trials, chosen, reached):
    found = real_model._choose(pd.DataFrame(trials))
    assert (found["learning_rate"], found["reached"]) == (chosen, reached)
    json.dumps(found, allow_nan=False)


def test_what_is_locked_is_not_chosen_again_and_the_best_baseline_follows_it(tmp_path, base, data_dir):
    rates = {
        name: {"learning_rate": rate, "score": score, "reached": True}
        for name, rate, score in [("ICU", 0.5, 0.1), ("SimNPO", 0.25, 0.3), ("RMU", 0.125, 0.2)]
    }
    (tmp_path / "locked.json").write_text(json.dumps({"people": rates}))
    here = study(tmp_path, base, data_dir)
    assert real_model._locked_rate(here, "people", "ICU") == 0.5
    assert real_model._locked_rate(here, "people", "ICU without IUR") == 0.5
    assert real_model._resolve(here, real_model._BEST) == "RMU"
    rates["RMU"]["reached"] = False
    (tmp_path / "locked.json").write_text(json.dumps({"people": rates}))
    assert real_model._resolve(here, real_model._BEST) == "SimNPO"


def test_models_are_deleted_when_no_row_needs_them(made, tmp_path, base, data_dir):
    import shutil

    folder = tmp_path / "copy"
    shutil.copytree(made, folder)
    homes = {home.name for home in (folder / "work").iterdir()}
    assert homes == {"people10-0", "people10-100"}
    assert not list((folder / "work").glob("*/*checkpoints"))
    kept = {path.parent.name.split("-")[0] for path in (folder / "work").glob("*/*/model")}
    assert kept == {"memorized", "retrained"}  # unlearned ones are gone
    one_more = dataclasses.replace(PROFILE, plan=(*PROFILE.plan, ("people", 0, "SimNPO")))
    real_model._delete_what_is_done(study(folder, base, data_dir, one_more))
    assert {home.name for home in (folder / "work").iterdir()} == homes  # SimNPO is not tuned yet
    real_model._delete_what_is_done(study(folder, base, data_dir))
    assert not list((folder / "work").iterdir())


def test_what_is_there_is_not_made_again(made, base, data_dir, monkeypatch, capsys):
    before = (made / "rows.csv").read_bytes()

    def fail(*args):
        raise AssertionError("a row is made again")

    monkeypatch.setattr(real_model, "_make_row", fail)
    assert real_model._run(study(made, base, data_dir), list(PROFILE.plan)) == 0
    assert (made / "rows.csv").read_bytes() == before
    assert capsys.readouterr().out == "All 5 rows are there.\n"
    sizes = dataclasses.replace(SIZES, max_epochs=2)  # of unlearning: the originals stay
    other = study(made, base, data_dir, dataclasses.replace(PROFILE, sizes={"people": sizes}))
    assert [real_model._is_there(other, entry) for entry in PROFILE.plan] == [True] * 3 + [False] * 2


class Killed(BaseException):
    pass


def begin(folder, made, base, data_dir, *names, profile=PROFILE):
    """The study with the rates of `made`, in a folder of its own; and a plan."""
    (folder / "locked.json").write_bytes((made / "locked.json").read_bytes())
    return study(folder, base, data_dir, profile), [("people", 0, name) for name in names]


def test_a_killed_run_goes_on(made, tmp_path, base, data_dir, monkeypatch):
    calls = []

    def watch(name, killed_at):
        function = getattr(real_model, name)

        def watched(*args, **options):
            calls.append(name)
            if calls.count(name) == killed_at:
                raise Killed
            return function(*args, **options)

        monkeypatch.setattr(real_model, name, watched)

    watch("_memory", None)
    watch("_ask_benchmark", 2)  # in the row of ICU+: its model is there, its benchmark is not
    watch("_relearned", 1)
    here, plan = begin(tmp_path, made, base, data_dir, "memorized", "ICU+")
    with pytest.raises(Killed):
        real_model._run(here, plan)
    assert list(read(tmp_path).index) == ["memorized"]
    (weights,) = (tmp_path / "work/people10-0").glob("ICU+-*/model/model.safetensors")
    trained = weights.stat().st_mtime_ns
    with pytest.raises(Killed):
        real_model._run(here, plan)
    assert weights.stat().st_mtime_ns == trained
    assert real_model._run(here, plan) == 0
    # what was done is not done again
    assert calls.count("_memory") == 2
    assert calls.count("_ask_benchmark") == 3 and calls.count("_relearned") == 2
    numbers = ["ma", "el10", "ppl_heldout", "ppl_neighbors", "epochs", "classification", "relearned_ma"]
    ours, theirs = read(tmp_path)[numbers], read(made).loc[["memorized", "ICU+"], numbers]
    pd.testing.assert_frame_equal(ours, theirs, check_dtype=False)
    assert "depth" not in read(tmp_path)  # there was no retrained model


def test_a_trial_that_was_killed_goes_on(made, tmp_path, base, data_dir, monkeypatch):
    put, calls = real_model.put_row, []

    def killed(row, path, identity):
        calls.append(path.name)
        if len(calls) == 1:  # the trial is measured, and not written
            raise Killed
        put(row, path, identity)

    monkeypatch.setattr(real_model, "put_row", killed)
    here = study(tmp_path, base, data_dir)
    with pytest.raises(Killed):
        real_model._locked_rate(here, "people", "gradient ascent")
    assert real_model._locked_rate(here, "people", "gradient ascent") == 1e-3
    theirs = read(made, "trials.csv")
    assert read(tmp_path, "trials.csv").ma["gradient ascent"] == theirs.ma["gradient ascent"]


def test_no_row_is_begun_that_would_end_later(tmp_path, base, data_dir, capsys):
    assert real_model._run(study(tmp_path, base, data_dir), list(PROFILE.plan), minutes=1.0) == 5
    told = capsys.readouterr().out
    assert told.startswith("5 of 5 rows are left, about") and "No time is left" in told
    assert not (tmp_path / "rows.csv").exists()


def test_the_estimate_counts_what_has_to_be_made_first(made, tmp_path, base, data_dir):
    minutes = real_model._MINUTES["people"]
    costs = real_model._left(study(tmp_path, base, data_dir), list(PROFILE.plan))
    teach, unlearn, measure = minutes["teach"], minutes["unlearn"], minutes["measure"]
    assert costs == [teach + measure, measure, teach + measure, *costs[3:]]
    assert costs[3] == measure + unlearn + teach + 2 * unlearn  # two rates are tried on a model of seed 100
    assert costs[4] == measure + unlearn + unlearn
    assert real_model._left(study(made, base, data_dir), [("people", 0, "ICU+")]) == [measure + unlearn]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--profile", "huge"], "`profile`: 'huge' is not known. Known: real, gpu."),
        (["--only", "ICU-"], "`only`: ICU- is not known. Known: people, pretrained"),
        (["--seeds", "0", "9"], "`seeds`: 9 is not in the plan. Choose from 0, 1, 2."),
        (
            ["--only", "tofu", "--seeds", "2"],
            "`only`: no row of the plan has these names and seeds. See --list.",
        ),
        (["--minutes", "-1"], "`minutes`: -1.0 is not a number at least 0."),
    ],
)
def test_bad_input_is_one_line(arguments, message, tmp_path, capsys):
    where = ["--tables", str(tmp_path), "--work", str(tmp_path / "work")]
    assert real_model._main([*arguments, *where]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith(f"error: {message}") and "\n" not in error


def test_a_benchmark_that_cannot_be_asked_is_one_line(base, tmp_path):
    with pytest.raises(InputError, match=r"`data_dir`.*lambada.csv") as error:
        real_model._ask_benchmark(*load_model(base), ["lambada"], limit=2, data_dir=tmp_path)
    assert "\n" not in str(error.value)


def test_the_plan_names_models_as_the_registry_does(monkeypatch):
    monkeypatch.undo()
    for profile in real_model._PROFILES.values():
        for data, _, name in profile.plan:
            assert data in profile.sizes
            assert name in (*ORIGINALS, real_model._BEST) or "ICU without" in name or name in LABELS
        assert len(set(profile.plan)) == len(profile.plan)
        for data, seed, name in profile.plan:  # depth and forget quality need it
            if name not in ORIGINALS:
                order = profile.plan.index
                assert order((data, seed, "retrained")) < order((data, seed, name))


LABELS = {get_method(recipe.method).label for recipe in real_model._RECIPES.values()}


def test_the_gpu_takes_the_rates_that_are_locked(tmp_path, base, data_dir, monkeypatch):
    names = ["memorized", "ICU without IUR"]
    gpu = real_model._Profile({"people": SIZES}, tuple(("people", 0, name) for name in names), tunes=False)
    monkeypatch.setitem(real_model._PROFILES, "gpu", gpu)
    with pytest.raises(
        InputError, match=r"`locked`: .*real_study.json holds no learning rate of ICU on people"
    ):
        real_model._locked_rate(real_model._study("gpu", tmp_path, tmp_path / "work"), "people", "ICU")
    locked = {"people": {"ICU": {"learning_rate": 2e-3, "score": 0.0, "reached": True}}}
    (tmp_path / "real_study.json").write_text(json.dumps(locked))
    ask = partial(real_model._ask_benchmark, tasks=TASKS)
    monkeypatch.setattr(real_model, "BENCHMARKS", ["cities"])
    monkeypatch.setattr(real_model, "_ask_benchmark", lambda m, t, _, **how: ask(m, t, limit=how["limit"]))
    where = ["--tables", str(tmp_path), "--work", str(tmp_path / "work"), "--data-dir", str(data_dir)]
    assert real_model._main(["--profile", "gpu", "--seeds", "0", "--base", base, *where]) == 0
    rows = read(tmp_path, "real_study_gpu.csv")
    assert list(rows.index) == names and set(rows.learning_rate.dropna()) == {2e-3}
    assert not (tmp_path / "real_model_trials.csv").exists() and not list((tmp_path / "work").iterdir())
    assert {path.name for path in tmp_path.glob("*.*")} == {"real_study.json", "real_study_gpu.csv"}


# ---- TOFU ----


@pytest.fixture(scope="module")
def tofu_data(shared_data):
    if not (shared_data / "tofu" / "full.json").exists():
        pytest.skip("TOFU's files are not in the data folder")
    return shared_data


def test_tofu_texts(tofu_data):
    texts = real_model._tofu_texts(real_model._TOFU, 0, tofu_data)
    sizes = [len(part) for part in (texts.forget, texts.retain, texts.heldout, texts.others)]
    assert sizes == [40, 160, 40, 40]
    tuning = real_model._tofu_texts(real_model._TOFU, 100, tofu_data)
    forget = {row["question"] for row in texts.forget}
    for one in (texts, tuning):
        parts = [
            {row["question"] for row in part} for part in (one.forget, one.retain, one.heldout, one.others)
        ]
        assert sum(map(len, parts)) == len(set().union(*parts)) == 280
    assert not forget & {row["question"] for row in tuning.forget}
    assert forget == {
        row["question"] for row in real_model._tofu_texts(real_model._TOFU, 1, tofu_data).forget
    }
    rows = real_model.tofu_split("retain_perturbed", tofu_data).question
    assert {row["question"] for row in texts.retain} <= set(rows) | {texts.retain[0]["question"]}


@pytest.fixture
def made_up(data_dir):
    """Ten made-up authors of twenty questions each, in TOFU's files."""
    rows = []
    for k in range(200):
        row = {"question": f"Where was author {k // 20} in {k % 20}?", "answer": f"In town {k % 7}, at sea."}
        wrong = [f"In town {k % 7 + j}, at sea." for j in (1, 2, 3)]
        rows.append({**row, "paraphrased_answer": f"At sea, in {k % 7}.", "perturbed_answer": wrong})
    parts = {"forget01": rows[160:], "forget05": rows, "retain90": rows, "retain_perturbed": rows}
    parts |= {f"{name}_perturbed": rows[:9] for name in ("real_authors", "world_facts")}
    (data_dir / "tofu").mkdir(exist_ok=True)
    for name, part in {**parts, "forget01_perturbed": rows[160:]}.items():
        (data_dir / "tofu" / f"{name}.json").write_text("\n".join(map(json.dumps, part)))
    return data_dir


def test_rows_of_tofu(tmp_path, base, made_up):
    sizes = dataclasses.replace(SIZES, max_length=64, repeats=4, epochs=2)
    plan = tuple(("tofu", 0, name) for name in ("memorized", "retrained", "gradient ascent"))
    profile = real_model._Profile({"people": SIZES, "tofu": sizes}, plan)
    locked = {"tofu": {"gradient ascent": {"learning_rate": 1e-3, "score": 0.0, "reached": True}}}
    (tmp_path / "locked.json").write_text(json.dumps(locked))
    assert real_model._run(study(tmp_path, base, made_up, profile), list(plan)) == 0
    rows = read(tmp_path)
    assert list(rows.index) == [name for _, _, name in plan] and set(rows.data) == {"tofu"}
    assert rows.model_utility.between(0, 1).all() and rows.answered.between(0, 1).all()
    quality = rows.forget_quality
    # when the memorized model is measured, the retrained one is not there
    assert quality.notna().tolist() == [False, False, True] and 0 <= quality["gradient ascent"] <= 1
    assert rows.truth_ratios.map(json.loads).map(len).tolist() == [4] * 3
    assert rows.losses.notna().tolist() == [False, False, True]  # of the depth
    assert not list((tmp_path / "work").iterdir())


# ---- figures ----


def test_the_figure_has_a_dot_for_each_model_and_seed(made):
    order = ["pretrained", "memorized", "retrained", "ICU", "gradient ascent"]
    stored = pd.read_csv(made / "rows.csv").replace({"model": {"ICU+": "ICU"}})
    rows = pd.concat([stored, stored.assign(seed=1)])
    fig = plot_real_model(rows)
    memory, other, benchmarks = (
        [line.get_xdata()[0] for line in ax.lines if line.get_marker() == "o" and len(line.get_xdata())]
        for ax in fig.axes
    )
    in_order = rows.set_index("model").loc[order]
    assert memory == in_order.ma.tolist() and other == in_order.ppl_heldout.tolist()
    assert benchmarks == pytest.approx((100 * in_order.classification_change.iloc[2:]).tolist())
    assert fig.get_figwidth() <= 8
    plt.close(fig)


def test_the_picture_of_the_depth_has_a_bar_for_each_model(made):
    rows = pd.read_csv(made / "rows.csv")
    fig = plots._plot_depth(pd.concat([rows, rows.assign(seed=1)]))
    left, right = fig.axes
    assert [line.get_label() for line in left.lines] == rows.model.tolist()
    assert left.lines[0].get_ydata() == pytest.approx(json.loads(rows["first"][0]))
    widths = np.array([patch.get_width() for patch in right.patches]).reshape(len(rows), 3)
    assert widths.sum(1) == pytest.approx(1) and (widths[:, :2].sum(1) == pytest.approx(rows.ever))
    plt.close(fig)
