"""Every solution passes its checker, every wrong answer hears why, and no answer can break a notebook."""

import ast
import contextlib
import copy
import json
import random
import re
import sys
import threading
import traceback
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from icu_nb.course import exercises
from icu_nb.course.exercises import _EXERCISES, _call_answer, _outline, _student_notebook, check
from icu_nb.errors import InputError

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))
import check_text

NBS = Path(__file__).resolve().parents[1] / "nbs"
SOLUTIONS = sorted(NBS.glob("course/solutions_*.ipynb"))

each_exercise = pytest.mark.parametrize("name", _EXERCISES)


def cells(path, kind=None):
    return [
        c | {"source": "".join(c["source"])}
        for c in json.loads(path.read_text(encoding="utf-8"))["cells"]
        if kind in (None, c["cell_type"])
    ]


def checked(path):
    """Exercise -> the code cell with the answer, and the name that its check is given."""
    code = cells(path, "code")
    calls = [(i, re.fullmatch(r'check\("(\w+)", (\w+)\)', c["source"])) for i, c in enumerate(code)]
    return {call[1]: (code[i - 1], call[2]) for i, call in calls if call}


@pytest.fixture(scope="module")
def solved():
    """Exercise -> its solution: the solutions' notebooks, run without their checks."""
    found = {}
    for path in SOLUTIONS:
        names = {"__name__": path.stem}
        for cell in cells(path, "code")[1:]:  # the first one is Colab's
            if not cell["source"].startswith("check("):
                exec(compile(cell["source"], path.name, "exec"), names)
        found |= {name: names[given] for name, (_, given) in checked(path).items()}
    plt.close("all")
    return found


def told(name, answer):
    """What the checker says of a wrong answer: one sentence."""
    with pytest.raises(AssertionError) as caught:
        check(name, answer)
    said = str(caught.value)
    assert (
        "\n" not in said and len(said) < 250 and said[-1] in ".?" and not re.search(r"[.?!] [A-Z]", said)
    ), said
    assert "cannot be judged" not in said
    return said


# ---- answers ----


@each_exercise
def test_the_solution_is_praised(name, solved):
    said = check(name, solved[name])
    assert said.startswith("Well ") and len(said) < 120


@each_exercise
def test_an_unanswered_exercise_is_passed_over(name):
    """What the students' notebook has before anything is written, and the three dots themselves."""
    (path,) = (p for p in NBS.glob("course/exercises_*.ipynb") if name in checked(p))
    stub, given = checked(path)[name]
    names = {}
    exec(stub["source"], names)
    for answer in (names[given], ...):
        assert check(name, answer).startswith("Not answered yet")


def test_the_score_counts_what_was_checked(monkeypatch):
    monkeypatch.setattr(exercises, "_outcomes", {})
    check("first_loss", [5.55, 7.62])
    check("loop")
    with pytest.raises(AssertionError):
        check("shared_frame", "c")
    said = "1 of 3 exercises solved; not solved: shared_frame; not answered: loop"
    assert check() == said
    check("shared_frame", "a")
    assert check() == "2 of 3 exercises solved; not answered: loop"


def per_token(logits, ids):
    return -logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]


def token_mean(values, mask):
    real = mask[:, :-1] * mask[:, 1:]
    return (values * real).sum() / real.sum().clamp(min=1)


def unlikely(floor):
    return lambda logits, ids, mask: token_mean(-(1 - (-per_token(logits, ids)).exp() + floor).log(), mask)


def kl(p, q, mask):
    p, q = (z[:, :-1].log_softmax(-1) for z in (p, q))
    return token_mean((p.exp() * (p - q)).sum(-1), mask)


def once_each(texts, n_forget, n_heldout):
    texts = list(dict.fromkeys(texts))
    random.Random(0).shuffle(texts)
    return texts[:n_forget], texts[n_forget + n_heldout :], texts[n_forget : n_forget + n_heldout]


def trained(sign, steps=5, learning_rate=1e-3):
    def answer(model, shown):
        model = copy.deepcopy(model)
        optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate)
        for _ in range(steps):
            optimizer.zero_grad()
            (
                sign
                * token_mean(per_token(model(**shown.inputs).logits, shown.input_ids), shown.attention_mask)
            ).backward()
            optimizer.step()
        return model

    return answer


def likelihood(model, sequences):
    with torch.no_grad():
        return token_mean_rows(
            per_token(model(**sequences.inputs).logits, sequences.input_ids), sequences.attention_mask
        )


def token_mean_rows(values, mask):
    real = mask[:, :-1] * mask[:, 1:]
    return (values * real).sum(1) / real.sum(1).clamp(min=1)


def terms(forget, neighbor):
    def answer(model, batch, reference):
        def ce(part):
            logits = model(input_ids=part.input_ids, attention_mask=part.attention_mask).logits
            return token_mean(per_token(logits, part.input_ids), part.attention_mask)

        return {"f": forget * ce(batch.forget), "r": neighbor * ce(batch.neighbor)}

    return answer


def runs(*settings):
    return [dict(zip(("alpha", "beta", "seed"), values, strict=False)) for values in settings]


PAIRS = [(0.5, beta, seed) for seed in range(3) for beta in (0.0, 1.0)]

# Exercise -> plausible wrong answers, and a part of what each is told.
WRONG = {
    "shared_frame": [("c", "count how many words"), ("d", "one letter"), (1, "one letter")],
    "ngram_share": [
        (
            lambda a, b, n: (lambda x, y: len(x & y) / max(len(x | y), 1))(
                *({*zip(*(t.split()[i:] for i in range(n)), strict=False)} for t in (a, b))
            ),
            "of whose n-grams",
        ),
        (
            lambda a, b, n: (lambda x, y: sum(g in y for g in x) / max(len(x), 1))(
                *([*zip(*(t.split()[i:] for i in range(n)), strict=False)] for t in (a, b))
            ),
            "count once",
        ),
        (lambda a, b, n: len({*a.split()} & {*b.split()}) / len({*a.split()}), "order within an n-gram"),
    ],
    "clean_split": [
        (lambda texts, f, h: (texts[:f], texts[f + h :], texts[f : f + h]), "stands twice"),
        (once_each, "word for word"),
        (lambda texts, f, h: (texts[:f], [], texts[-h:]), "stands twice|leave out"),
        (lambda texts, f, h: (["a"], ["b"], ["c"]), "among the texts that were given"),
    ],
    "first_loss": [
        ([1.0, 1.0], "spread its probability"),
        ([256, 2048], "spread its probability"),
        (7.6, "list of numbers"),
    ],
    "token_nll": [
        (
            lambda logits, ids, mask: token_mean(
                -logits[:, 1:].log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0], mask
            ),
            "which logits speak about which token",
        ),
        (lambda logits, ids, mask: per_token(logits, ids).mean(), "a padded batch is not"),
        (
            lambda logits, ids, mask: token_mean_rows(per_token(logits, ids), mask).mean(),
            "over what is the mean taken",
        ),
        (lambda logits, ids, mask: per_token(logits, ids)[mask[:, 1:].bool()].mean(), "NaN"),
        (lambda logits, ids, mask: token_mean(per_token(logits, ids), mask).item(), "carries a gradient"),
    ],
    "next_token": [
        (lambda logits, mask: logits[:, -1].argmax(-1), "where does that text end"),
        (lambda logits, mask: logits[:, 0].argmax(-1), "speak about what comes next"),
    ],
    "loop": [([4.0, 0.125], "how often does each token"), ([1.0, 2.0], "how many different")],
    "accuracy": [
        (
            lambda logits, ids, mask: token_mean_rows((logits[:, 1:].argmax(-1) == ids[:, 1:]).float(), mask),
            "which token does position t",
        ),
        (
            lambda logits, ids, mask: (logits[:, :-1].argmax(-1) == ids[:, 1:]).float().mean(1),
            "a share of how many tokens",
        ),
    ],
    "strength": [
        (lambda hits: sum(hits) / len(hits), "One mistake in the middle"),
        (
            lambda hits: 1 - hits.index(False) / len(hits) if False in hits else 1.0,
            "One mistake|only one of them",
        ),
    ],
    "fool_bleu": [(lambda text: text, "the same four words"), (lambda text: "nothing at all", "Too little")],
    "slopes": [([0.99, 0.5, 0.01], "how much log p can still rise")],
    "sequence_mean": [
        (lambda logits, ids, mask: token_mean(per_token(logits, ids), mask), "over what is the mean taken")
    ],
    "unlikelihood": [
        (unlikely(0), "infinite"),
        (unlikely(1e-6), "what do 32 bits leave"),
        (lambda logits, ids, mask: -token_mean(per_token(logits, ids), mask), "Without any padding"),
    ],
    "nearest": [
        (lambda q, p, c: np.where(c, -np.inf, q @ p.T).argmax(1), "by which distance"),
        (lambda q, p, c: np.linalg.norm(q[:, None] - p, axis=-1).argmin(1), "A copy is no neighbor"),
        (
            lambda q, p, c: (c.fill(False), np.linalg.norm(q[:, None] - p, axis=-1).argmin(1))[1],
            "A copy is no neighbor|changes what it was given",
        ),
    ],
    "mended_kl": [
        (lambda z, ref, mask: -(ref.softmax(-1) * z.log_softmax(-1)).sum(-1).mean(), "Two equal models"),
        (lambda z, ref, mask: kl(z, ref, mask), r"is it KL\(original"),
        (lambda z, ref, mask: kl(ref, z, torch.ones_like(mask)), "position counts when"),
    ],
    "reverse_kl": [(lambda z, ref, mask: kl(ref, z, mask), r"is it KL\(current")],
    "stops": [([6, 3], "epochs in order"), ([3, 5], "epochs in order"), ([3], "2 of them")],
    "active_mean": [
        (lambda losses, active: losses[active].mean(), "NaN"),
        (lambda losses, active: (losses * active).mean(), "the mean of what"),
        (lambda losses, active: losses[active].mean() if active.any() else 0.0, "carries a gradient"),
        (
            lambda losses, active: (
                (losses.detach() * active).sum() / active.sum().clamp(min=1) + 0 * losses.sum()
            ),
            "its gradient is not",
        ),
    ],
    "who_trains": [
        (lambda s, t: ~((s.bleu < t.bleu) & (s.bert_f1 < t.bert_f1)).to_numpy(), "One low score"),
        (lambda s, t: ((s.bleu < t.bleu) | (s.bert_f1 < t.bert_f1)).to_numpy(), "a forgotten text rests"),
        (lambda s, t: ((s.bleu > t.bleu) & (s.bert_f1 > t.bert_f1)).to_numpy(), "Under a threshold"),
        (lambda s, t: ~((s.bleu < t.bleu) | (s.bert_f1 < t.bert_f1)).to_numpy(), "When everybody"),
    ],
    "graddiff": [
        (terms(1, -1), "become less likely"),
        (terms(-1, 0.5), "sum of your terms"),
        (lambda model, batch, reference: {"f": 1.0}, "Every term"),
        (lambda model, batch, reference: {}, "Every term"),
    ],
    "hardest": [
        (lambda s, t: (s.ma.rank(method="first") <= 16).to_numpy(), "highest MA"),
        (lambda s, t: (s.ma > t.ma).to_numpy(), "Exactly the sixteen"),
        (
            lambda s, t: np.isin(np.arange(len(s)), s.ma.nlargest(16).index) & (len(s) > 16),
            "fewer than sixteen",
        ),
    ],
    "ablation": [
        (runs((0.5, 1.0, 0), (0.5, 1.0, 1)), "treat L_kl alike"),
        (runs((0.5, 1.0, 0), (0.5, 0.5, 0)), "entirely without"),
        (runs((0.5, 1.0, 0), (0.0, 0.0, 0)), "Something else differs"),
        (runs((0.0, 1.0, 0), (0.0, 0.0, 0)), "also has L_lrn"),
        (runs(*PAIRS[:2]), "so few seeds"),
        (runs(*PAIRS[:5]), "one of the two arms"),
        (runs(*PAIRS, PAIRS[0]), "stands there twice"),
        ([], "list of runs"),
        ([{"beta": 1}], "list of runs"),
    ],
    "claims": [
        ({"a", "b", "d"}, "too many"),
        ({"b", "c", "d"}, "too many"),
        ({"b"}, "doubt"),
        (set(), "doubt"),
        ({"e"}, "letters"),
        (7, "letters"),
    ],
    "inverted_hinge": [
        (
            lambda z, ids, mask: token_mean(
                1 + (-per_token(z, ids)).exp() - z[:, :-1].softmax(-1).max(-1).values, mask
            ),
            "Without any padding",
        ),
        (
            lambda z, ids, mask: (
                1
                + (-per_token(z, ids)).exp()
                - z[:, :-1].softmax(-1).scatter(2, ids[:, 1:, None], 0.0).max(-1).values
            ).mean(),
            "a padded batch is not",
        ),
    ],
    "npo": [
        (lambda p, p0, beta: -2 / beta * F.logsigmoid(beta * (p - p0)).mean(), "which direction"),
        (lambda p, p0, beta: -2 / beta * torch.sigmoid(-beta * (p - p0)).log().mean(), "infinite"),
        (lambda p, p0, beta: -F.logsigmoid(-beta * (p - p0)).mean(), "At the beginning"),
        (lambda p, p0, beta: -2 / beta * F.logsigmoid(-0.1 * (p - p0)).mean(), "Beta stands"),
    ],
    "word_f1": [
        (
            lambda a, b: 2 * len({*a.split()} & {*b.split()}) / (len({*a.split()}) + len({*b.split()})),
            "three times",
        ),
        (lambda a, b: len({*a.split()} & {*b.split()}) / len(a.split()), "harmonic mean"),
        (
            lambda a, b: (lambda n, x, y: 2 * (n / x) * (n / y) / (n / x + n / y))(
                sum(min(a.split().count(w), b.split().count(w)) for w in {*a.split()}),
                len(a.split()),
                len(b.split()),
            ),
            "ZeroDivisionError",
        ),
    ],
    "corpus_perplexity": [
        (lambda batches: float(np.mean([np.exp(np.mean(b)) for b in batches])), "cut into other batches"),
        (lambda batches: float(np.exp(np.mean([np.mean(b) for b in batches]))), "cut into other batches"),
        (lambda batches: float(np.exp(sum(map(sum, batches)))), "Even for one batch"),
    ],
    "beats_chance": [
        (lambda correct, n, choices: correct / n > 1 / choices, "too easily convinced"),
        (lambda correct, n, choices: correct / n > 0.6, "too strict"),
    ],
    "privleak": [([80.0, 0.0, -80.0], "it compares 1 - AUC"), ([0.9, 0.5, 0.1], "it compares 1 - AUC")],
    "auc": [
        (lambda m, o: sum(a >= b for a in m for b in o) / len(m) / len(o), "A tie"),
        (lambda m, o: sum(a < b for a in m for b in o) / len(m) / len(o), "for how many of the pairs"),
        (
            lambda m, o: (lambda x: max(x, 1 - x))(sum(a > b for a in m for b in o) / len(m) / len(o)),
            "under one half",
        ),
    ],
    "membership": [
        (likelihood, "for which texts should the score be higher"),
        (lambda model, sequences: torch.zeros(len(sequences)), "is not enough"),
    ],
    "relearning": [
        (lambda model, shown: model, "which loss do you minimize"),
        (trained(-1), "which loss do you minimize"),
        (trained(1, steps=3, learning_rate=1e-4), "could rise more"),
    ],
}


@pytest.mark.parametrize(
    "name, answer, said",
    [
        pytest.param(name, *case, id=f"{name}-{i}")
        for name, cases in WRONG.items()
        for i, case in enumerate(cases)
    ],
)
def test_a_wrong_answer_hears_why(name, answer, said):
    assert re.search(said, told(name, answer))


def test_every_exercise_has_a_wrong_answer():
    assert WRONG.keys() == _EXERCISES.keys()


# ---- bad input ----


def train_a_little(model):
    with torch.no_grad():
        next(model.parameters()).add_(1)
    return model


@pytest.mark.parametrize(
    "answer, argument, like, said",
    [
        (7, 1.0, 1.0, "this is a number"),
        ("x", 1.0, 1.0, "this is a string"),
        (lambda: 1, 1.0, 1.0, "raises TypeError"),
        (lambda x: 1 / 0, 1.0, 1.0, "raises ZeroDivisionError: division by zero"),
        (lambda x: sys.exit(3), 1.0, 1.0, "raises SystemExit: 3"),
        (lambda x: (lambda f: f(f))(lambda f: f(f)), 1.0, 1.0, "raises RecursionError"),
        (lambda x: None, 1.0, 1.0, "returns nothing"),
        (lambda x: "a", 1.0, 1.0, "should return a number, and returns a string"),
        (lambda x: torch.tensor(x), 1.0, 1.0, "returns a float tensor of shape"),
        (lambda x: [1], 1.0, [1, 2], "a list of 2, and returns a list of 1"),
        (
            lambda x: x.sum(),
            torch.ones(2),
            torch.ones(2),
            r"shape \[2\], and returns a float tensor of shape \[\]",
        ),
        (lambda x: x > 0, torch.ones(2), torch.ones(2), "returns a boolean tensor"),
        (lambda x: x.log() * 0, torch.zeros(2), torch.ones(2), "NaN"),
        (lambda x: float("inf"), 1.0, 1.0, "infinite"),
        (lambda x: x.add_(1), torch.ones(2), torch.ones(2), "changes what it was given"),
        (lambda x: x.append(1) or 1.0, [], 1.0, "changes what it was given"),
        (lambda x: x.clear() or 1.0, {"a": np.ones(1)}, 1.0, "changes what it was given"),
        (train_a_little, torch.nn.Linear(1, 1), torch.nn.Linear(1, 1), "changes what it was given"),
    ],
)
def test_a_bad_answer_is_one_sentence(answer, argument, like, said):
    with pytest.raises(AssertionError, match=said):
        _call_answer(answer, argument, like=like)


def endless(x):
    while True:
        x = x


def stubborn(x):
    while True:
        with contextlib.suppress(Exception):
            x = x


@pytest.mark.parametrize("answer", [endless, stubborn, lambda x: all(iter(lambda: True, False)) or x])
def test_an_endless_answer_is_stopped(answer, monkeypatch):
    monkeypatch.setattr(exercises, "_TIME_LIMIT", 0.2)
    before = threading.active_count()
    assert "had not returned after 0.2 seconds" in told("strength", answer)
    assert threading.active_count() == before


def test_an_endless_answer_is_stopped_in_any_thread(monkeypatch):
    """No signal is used, which only the main thread could receive."""
    monkeypatch.setattr(exercises, "_TIME_LIMIT", 0.2)
    said = []
    thread = threading.Thread(target=lambda: said.append(told("strength", endless)))
    thread.start()
    thread.join(20)
    assert "had not returned" in said[0]


def test_the_user_can_interrupt(monkeypatch):
    def interrupted(self, timeout=None):
        raise KeyboardInterrupt

    monkeypatch.setattr(exercises, "_stop_thread", lambda thread: None)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "join", interrupted)
        with pytest.raises(KeyboardInterrupt):
            _call_answer(lambda x: x, 1.0, like=1.0)


def test_what_the_checker_cannot_judge_is_one_sentence_too():
    class Odd(dict):
        def values(self):
            raise RuntimeError("odd")

    Odd.__name__ = "dict"  # so that it passes for one
    with pytest.raises(AssertionError, match=r"cannot be judged \(RuntimeError\)"):
        check("graddiff", lambda model, batch, reference: Odd(a=1))


@pytest.mark.parametrize("exercise", ["first_los", "check_first_loss", "", None, [7.6, 5.5], lambda x: x])
def test_an_unknown_exercise_is_named_beside_the_known_ones(exercise):
    with pytest.raises(InputError) as caught:
        check(exercise, [1.0, 1.0])
    said = str(caught.value)
    assert said.startswith(f"`exercise`: {exercise!r} is not known. ") and "\n" not in said
    assert said.split("Known: ")[1] == f"{', '.join(WRONG)}."


def test_the_course_has_one_checker():
    """One public name for all exercises, and what the notebooks show beside it."""
    assert exercises.__all__ == ["check", "made_up_history", "made_up_rows", "unlearned_model"]


def test_no_traceback_leads_into_a_checker():
    """IPython prints the lines around each frame, which in a checker hold the right answer.

    Of the student's own error the frames are shown.
    """

    def frames(error):
        return [frame.name for frame in traceback.extract_tb(error.__traceback__)]

    with pytest.raises(AssertionError) as caught:
        check("strength", lambda hits: 0.123)
    assert (
        frames(caught.value)[1:] == ["check"]
        and caught.value.__cause__ is None
        and caught.value.__suppress_context__
    )
    with pytest.raises(AssertionError) as caught:
        check("strength", lambda hits: 1 / 0)
    assert isinstance(caught.value.__cause__, ZeroDivisionError) and "_check_strength" not in frames(
        caught.value.__cause__
    )


# ---- in step ----


@pytest.mark.parametrize("path", SOLUTIONS, ids=lambda path: path.name)
def test_exercises_are_the_solutions_without_solutions(path):
    student = path.with_name(path.name.replace("solutions_", "exercises_"))
    assert json.loads(student.read_text(encoding="utf-8")) == _student_notebook(
        json.loads(path.read_text(encoding="utf-8"))
    ), "run make course"
    assert not [c for c in cells(student) if "solution" in c["metadata"].get("tags", []) or c.get("outputs")]
    for name, (stub, _) in checked(student).items():
        body = ast.parse(stub["source"]).body[-1]
        assert ast.unparse(getattr(body, "body", [body])[-1]).endswith("..."), name


def test_an_outline_tells_nothing():
    assert (
        _outline(
            "import math\ndef f(x,\n      y): # two\n    return 42\n\ndef g(x): return 42\na, b = 42, 42"
        )
        == "def f(x,\n      y): # two\n    ...\n\ndef g(x):\n    ...\n\n(a, b) = ..."
    )
    assert _outline("print(42)") == "..."


def section(notebook):
    """The exercises at the end of a chapter."""
    last = cells(NBS / f"learn/{notebook}.ipynb", "markdown")[-1]["source"]
    return last.split("## Exercises")[1].split("\n## ")[0]


@each_exercise
def test_course_and_notebook_describe_the_exercise(name):
    """Stars, minutes and aim are entered once, at the checker."""
    exercise = _EXERCISES[name]
    (path,) = (p for p in SOLUTIONS if name in checked(p))
    assert any(f"\n{exercise}\n" in c["source"] for c in cells(path, "markdown"))
    assert {"solution"} <= set(checked(path)[name][0]["metadata"]["tags"])
    words = re.sub(r"\[([^]]+)\]\([^)]*\)", r"\1", section(exercise.notebook))  # some lead to the glossary
    assert str(exercise) in words and f'`check("{name}", answer)`' in words
    student = path.name.replace("solutions_", "exercises_")
    assert f"](../course/{student})" in section(exercise.notebook)


def test_each_chapter_has_exercises():
    """01 is the map; from 02 on each has three or more that check themselves, in the chapters' order."""
    chapters = list(dict.fromkeys(exercise.notebook for exercise in _EXERCISES.values()))
    assert [name[:2] for name in chapters] == [f"{i:02}" for i in range(2, 10)]
    for chapter in chapters:
        numbers = [int(n) for n in re.findall(r"^(\d+)\. ", section(chapter), re.M)]
        assert len(numbers) >= 3 and numbers == list(range(1, len(numbers) + 1)), chapter


# ---- the syllabus ----


def syllabus_sessions():
    """What the syllabus plans, from its own cell."""
    source = next(
        c["source"] for c in cells(NBS / "course/syllabus.ipynb", "code") if "sessions = {" in c["source"]
    )
    names = {}
    exec(source, names)
    return names["sessions"]


def test_the_syllabus_has_every_exercise_once_with_its_minutes():
    headed = re.compile(r"^### (\d+\.\d+) .*\n\S+ (\d+) min", re.M)
    minutes = {}
    for path in SOLUTIONS:
        for cell in cells(path, "markdown"):
            minutes |= {number: int(some) for number, some in headed.findall(cell["source"])}
    planned = {}
    for session in syllabus_sessions().values():
        assert not planned.keys() & (session["class"] | session["home"]).keys()
        planned |= session["class"] | session["home"]
    assert planned == minutes and len(minutes) == len(_EXERCISES)


READ = {  # chapter: the sections that are read before a session; "": the opening
    "00_quickstart": ["", "1. Texts", "2. A model that memorized", "3. When is a text forgotten?"],
    "learn/04_kui": ["", "The loss by hand", "Padding", "Why it runs away"],
    "learn/05_cle": ["", "Learn while unlearning"],
    "learn/06_iur": [
        "",
        "The authors' rule",
        "Thresholds",
        "What the model still says",
        "Which texts count as forgotten?",
        "When training ends",
        "Which texts train next?",
    ],
    "learn/07_the_loop": ["", "The whole idea on one page"],
    "paper/33_what_a_model_can_still_do": ["What does an accuracy mean?"],
    "learn/09_what_remains": ["", "The models", "Is it recognized?", "Six attacks", "One number: the AUC"],
}


@pytest.mark.parametrize("notebook", READ)
def test_the_syllabus_counts_the_words_to_read(notebook):
    prose = "\n\n".join(c["source"] for c in cells(NBS / f"{notebook}.ipynb", "markdown"))
    title, *parts = re.split(r"^#+ (.*)$", prose, flags=re.M)[1:]
    sections = dict(zip(["", *parts[1::2]], [parts[0], *parts[2::2]], strict=True))
    words = sum(len(check_text.plain(sections[name]).split()) for name in READ[notebook])
    told = {name: some for session in syllabus_sessions().values() for name, some in session["read"].items()}
    assert told[notebook.rpartition("/")[2]] == pytest.approx(words, rel=0.1), (title, words)
