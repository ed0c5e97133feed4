"""Utility: perplexity, tasks, dialogue and the one row, each against a direct computation."""

import copy
import json
import math
import random
import socket
import warnings
from collections import Counter

import numpy as np
import pytest
import torch
from benchmark_files import write_benchmarks
from faker import Faker

from icu_nb.data.benchmarks import BENCHMARKS
from icu_nb.data.corpus import Corpus
from icu_nb.data.files import _PUBLIC_FILES
from icu_nb.data.general import DIALOGUES, dialogue_turns
from icu_nb.data.people import TEMPLATES, _person, people
from icu_nb.errors import InputError
from icu_nb.evals.dialogue import _clean_turn, _dialogue_prompt, _reply_text, _unigram_f1, dialogue_scores
from icu_nb.evals.people_questions import find_facts, people_questions, people_tasks
from icu_nb.evals.tasks import evaluate_tasks
from icu_nb.evals.utility import evaluate_utility
from icu_nb.metrics import perplexity

pytest.importorskip("lm_eval")


@pytest.fixture
def no_network(monkeypatch):
    """Any attempt to reach another machine fails the test."""
    tried = []

    def refuse(self, address):
        tried.append(address)
        raise OSError("no network in this test")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **options: refuse(None, args))
    yield tried
    assert not tried


@pytest.fixture(scope="module")
def corpus(tiny):
    return Corpus(
        "people",
        tiny.forget,
        tiny.retain,
        tiny.heldout,
        ["unused"],
        ["The weather is fine today, and so it stays."],
    )


def nll(model, tokens, start=1):
    """The negative log-likelihoods of tokens[start:], one token at a time."""
    with torch.no_grad():
        logits = model(torch.tensor([tokens])).logits[0].double()
    return [-logits[t - 1].log_softmax(-1)[tokens[t]].item() for t in range(start, len(tokens))]


# ---- perplexity ----


def test_perplexity_is_a_direct_sum(tiny):
    texts = [*tiny.heldout[:4], "Hello."]
    losses = [value for text in texts for value in nll(tiny.model, tiny.tokenizer(text).input_ids[:40])]
    assert perplexity(tiny.model, tiny.tokenizer, texts, max_length=40, batch_size=2) == pytest.approx(
        math.exp(np.mean(losses)), rel=1e-5
    )


@pytest.mark.parametrize("width, stride", [(16, 8), (16, 15), (9, 1), (64, 32)])
def test_sliding_perplexity_is_a_direct_sum(tiny, width, stride):
    """Every token once, in the first window that holds it."""
    texts = [tiny.heldout[0][:120], tiny.heldout[3][:30], "Hello."]
    losses = []
    for text in texts:
        tokens = tiny.tokenizer(text).input_ids
        for t in range(1, len(tokens)):
            begin = 0
            while begin + width <= t:
                begin += stride
            window = tokens[begin : t + 1]
            losses.append(nll(tiny.model, window, len(window) - 1)[0])
    assert perplexity(
        tiny.model, tiny.tokenizer, texts, max_length=width, stride=stride, batch_size=3
    ) == pytest.approx(math.exp(np.mean(losses)), rel=1e-5)


def test_a_window_that_holds_everything_changes_nothing(tiny):
    texts = [text[:60] for text in tiny.heldout]
    assert perplexity(tiny.model, tiny.tokenizer, texts, stride=10) == pytest.approx(
        perplexity(tiny.model, tiny.tokenizer, texts), rel=1e-6
    )


@pytest.mark.parametrize("stride", [0, -1, 64, 100])
def test_windows_must_overlap(tiny, stride):
    with pytest.raises(InputError, match="`stride`"):
        perplexity(tiny.model, tiny.tokenizer, tiny.heldout, stride=stride)


# ---- questions about people ----


def test_facts_are_those_the_record_was_made_of():
    faker, rng, pool = Faker("en_US"), random.Random(5), Faker("en_US")
    faker.seed_instance(5)
    shared = {
        "company": [pool.company() for _ in range(40)],
        "city": [pool.city() for _ in range(40)],
        "job": [pool.job().lower() for _ in range(40)],
    }
    for _ in range(40):
        facts = _person(faker, shared, rng)
        for template in TEMPLATES.values():
            assert find_facts(template.format(**facts)).groupdict() == facts


def test_a_question_has_one_right_answer_and_others_that_are_wrong(corpus):
    questions = people_questions(corpus.forget, seed=4)
    for record, (company, city) in zip(
        corpus.forget, zip(questions[::2], questions[1::2], strict=False), strict=False
    ):
        for field, question in (("company", company), ("city", city)):
            truth, choices = find_facts(record)[field], question["choices"]
            assert len({*choices}) == 4 and choices[question["answer"]] == truth
            assert record.startswith(f"{question['context']} {truth}")
            assert all(
                any(find_facts(other)[field] == choice for other in corpus.forget) for choice in choices
            )
    assert {question["answer"] for question in questions} == {0, 1, 2, 3}
    assert questions == people_questions(corpus.forget, seed=4) != people_questions(corpus.forget, seed=5)


def test_a_frequent_answer_is_no_hint():
    """A guesser who knows only frequencies is right one time in four (a bound of four deviations)."""
    right, questions = 0, []
    for seed in range(6):
        records = people(64, seed=seed)
        seen = Counter(find_facts(record)[field] for record in records for field in ("company", "city"))
        questions += (asked := people_questions(records))
        right += sum(max(q["choices"], key=seen.__getitem__) == q["choices"][q["answer"]] for q in asked)
    assert abs(right / len(questions) - 0.25) < 4 * (0.25 * 0.75 / len(questions)) ** 0.5


def test_too_few_different_answers():
    with pytest.raises(
        InputError, match="`records`: they have 1 different answers about company, for 4 choices"
    ):
        people_questions(people(1))


def test_groups_are_asked_apart(corpus):
    tasks = people_tasks(corpus)
    assert {name: len(questions) for name, questions in tasks.items()} == {
        "people_forget": 16,
        "people_retain": 16,
        "people_heldout": 16,
    }
    for name, records in [
        ("people_forget", corpus.forget),
        ("people_retain", corpus.retain),
        ("people_heldout", corpus.heldout),
    ]:
        assert all(
            any(record.startswith(question["context"]) for record in records) for question in tasks[name]
        )


def test_a_record_of_no_template():
    with pytest.raises(InputError, match="`record`"):
        people_questions(["Ann lives in Leeds.", *people(5)])


# ---- tasks ----


def directly(model, tokenizer, questions, width):
    """Accuracy by hand: one choice at a time, nothing padded, what is too long cut from the left."""
    right = []
    for question in questions:
        answers = (
            [f" {choice}" for choice in question["choices"]]
            if "choices" in question
            else [question["answer"]]
        )
        scores = []
        for answer in answers:
            context, whole = (
                tokenizer(question["context"]).input_ids,
                tokenizer(question["context"] + answer).input_ids,
            )
            n = len(whole) - len(context)
            tokens = whole[-(width + 1) :]
            with torch.no_grad():
                logits = model(torch.tensor([tokens[:-1]])).logits[0, -n:].log_softmax(-1)
            target = torch.tensor(tokens[-n:])
            scores.append(
                logits.gather(1, target[:, None]).sum().item()
                if "choices" in question
                else (logits.argmax(-1) == target).all().item()
            )
        right.append(np.argmax(scores) == question["answer"] if "choices" in question else scores[0])
    return float(np.mean(right))


def completions(records, tokenizer):
    "The last of the first six words."
    halves = [" ".join(record.split()[:6]).rsplit(" ", 1) for record in records]
    return [{"context": context, "answer": f" {word}"} for context, word in halves]


def test_accuracy_is_a_direct_computation(tiny, corpus, no_network):
    tasks = people_tasks(corpus)
    tasks |= {
        "words_forget": completions(corpus.forget, tiny.tokenizer),
        "words_heldout": completions(corpus.heldout, tiny.tokenizer),
    }
    for width in (48, 30):  # 30: the beginning of most questions is cut off
        table = evaluate_tasks(tiny.model, tiny.tokenizer, tasks, max_length=width, batch_size=5)
        assert table["accuracy"].to_dict() == pytest.approx(
            {
                name: directly(tiny.model, tiny.tokenizer, questions, width)
                for name, questions in tasks.items()
            }
        )
    table = evaluate_tasks(tiny.model, tiny.tokenizer, tasks)
    assert (
        table.loc["words_forget", "accuracy"] > 0.7 > 0.4 > table.loc["words_heldout", "accuracy"]
    )  # it has memorized them
    assert table["chance"].tolist()[:3] == [0.25] * 3 and table["chance"].iloc[3:].isna().all()
    assert table["n"].tolist() == [16, 16, 16, 8, 8] and table["missing"].isna().all()


def test_choices_may_differ_in_number(tiny):
    questions = [
        {"context": "Ann lives in", "choices": ["Leeds", "York"], "answer": 0},
        {"context": "Ann works in", "choices": ["Leeds", "York", "Hull", "Bath"], "answer": 3},
    ]
    row = evaluate_tasks(tiny.model, tiny.tokenizer, {"mixed": questions}).loc["mixed"]
    assert row["chance"] == (1 / 2 + 1 / 4) / 2 and row["accuracy"] == directly(
        tiny.model, tiny.tokenizer, questions, 64
    )


def test_a_limit_takes_the_first_questions(tiny, corpus):
    questions = people_tasks(corpus)["people_forget"]
    table = evaluate_tasks(tiny.model, tiny.tokenizer, {"few": questions}, limit=5)
    alone = [directly(tiny.model, tiny.tokenizer, [question], 64) for question in questions[:5]]
    assert table.loc["few", "correct"] == "".join(str(int(right)) for right in alone)
    assert table.loc["few", "n"] == 5 and table.loc["few", "accuracy"] == directly(
        tiny.model, tiny.tokenizer, questions[:5], 64
    )


def test_model_tokenizer_and_generators_stay_as_they_were(tiny, corpus, capfd):
    model, tokenizer = tiny.copy().train(), copy.deepcopy(tiny.tokenizer)
    tokenizer.pad_token, weights = None, tiny.weights(tiny.model)
    torch.manual_seed(3), random.seed(3), np.random.seed(3)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    evaluate_tasks(model, tokenizer, people_tasks(corpus), limit=2)
    after = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    assert model.training and tokenizer.pad_token is None and tiny.same(model, weights)
    assert torch.equal(before[0], after[0]) and before[1:] == after[1:]
    assert capfd.readouterr() == ("", "")  # and the harness is quiet


def test_cached_answers_are_used_and_belong_to_the_weights(tiny, corpus, cache, monkeypatch):
    tasks, model = people_tasks(corpus), tiny.copy()
    first = evaluate_tasks(model, tiny.tokenizer, tasks, cache=True)
    assert "Ann" not in str(list((cache / "cache").rglob("*")))
    monkeypatch.setattr(type(model), "forward", lambda *args, **options: pytest.fail("asked again"))
    assert evaluate_tasks(model, tiny.tokenizer, tasks, cache=True).equals(first)
    monkeypatch.undo()
    monkeypatch.setenv("ICU_NB_CACHE", str(cache / "cache"))
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(0.0)
    other = evaluate_tasks(model, tiny.tokenizer, tasks, cache=True)
    assert other.loc["people_forget", "accuracy"] < first.loc["people_forget", "accuracy"]


def test_the_cache_holds_no_text(tiny, corpus, cache):
    evaluate_tasks(tiny.model, tiny.tokenizer, people_tasks(corpus), limit=2, cache=True)
    stored = b"".join(path.read_bytes() for path in (cache / "cache").rglob("*") if path.is_file())
    name = find_facts(corpus.forget[0])["name"].encode()
    assert stored and name not in stored and find_facts(corpus.forget[0])["company"].encode() not in stored


@pytest.mark.parametrize(
    "call, argument, known",
    [
        (
            lambda m, t: evaluate_tasks(m, t, ["hellaswag", "helaswag"]),
            "tasks",
            "helaswag is not known. Known: lambada, hellaswag, winogrande",
        ),
        (lambda m, t: evaluate_tasks(m, t, []), "tasks", "there are none"),
        (lambda m, t: evaluate_tasks(m, t, {"mine": []}), "questions", "mine has none"),
        (lambda m, t: evaluate_tasks(m, t, ["lambada"], limit=0), "limit", "0"),
        (lambda m, t: evaluate_utility(m, t, "large"), "suite", 'Known: "tiny", "paper"'),
        (lambda m, t: dialogue_scores(m, t, []), "dialogues", "none"),
        (lambda m, t: dialogue_scores(m, t, [["a", "b"], ["c"]]), "dialogues", r"index \[1\]"),
        (lambda m, t: dialogue_scores(m, t, [["a", "b"]], max_length=32), "max_new_tokens", "32"),
    ],
)
def test_bad_input(tiny, no_network, call, argument, known):
    with pytest.raises(InputError, match=f"`{argument}`.*{known}"):
        call(tiny.model, tiny.tokenizer)


# ---- dialogue ----


@pytest.mark.parametrize(
    "reply, truth, f1",
    [
        ("I like cats", "I like cats", 1),
        ("i LIKE, cats!", "I like the cats.", 1),
        ("", "cats", 0),
        ("cats", "", 0),
        ("the a an", "the", 0),
        ("dogs", "cats", 0),
        ("cats", "I like cats", 2 * 1 * (1 / 3) / (1 + 1 / 3)),
        ("cats cats", "cats", 2 * 0.5 * 1 / 1.5),
        ("b a c d", "d c b", 1),
        ("don't", "dont", 1),
        ("a b", "b c", 2 / 3),
    ],
)
def test_unigram_f1(reply, truth, f1):
    assert _unigram_f1(reply, truth) == pytest.approx(f1) == _unigram_f1(truth, reply)


@pytest.mark.parametrize(
    "turn, cleaned",
    [
        ("hello", "Hello."),
        ("Hello !", "Hello!"),
        ("i 'm IN   leeds , and you ?", "I'm in leeds, and you?"),
        ("yes . it is . i like it", "Yes. It is. I like it."),
        ("so do i", "So do I."),
        ("(sure)", "(sure)"),
        ("well ... no", "Well... No."),
        ("", ""),
        ("i've a cat", "I've a cat."),
        ("skiing in italy", "Skiing in italy."),
    ],
)
def test_clean_turn(turn, cleaned):
    assert _clean_turn(turn) == cleaned


def test_the_speakers_take_turns():
    assert _dialogue_prompt(["hi"]) == "User 1: Hi.\nUser 2:"
    assert _dialogue_prompt(["hi", "hello !"]) == "User 1: Hi.\nUser 2: Hello!\nUser 1:"


@pytest.mark.parametrize(
    "said, reply",
    [
        (" I am fine.\nUser 2: And you?", "I am fine."),
        (" I am fine.\nUser", "I am fine."),
        (" I am\nfine.", "I am\nfine."),
        ("\nUser 1: No", ""),
        (" Fine.<|endoftext|> More", "Fine."),
        (" The User is fine", "The User is fine"),
    ],
)
def test_a_reply_ends_with_its_turn(tiny, said, reply):
    assert _reply_text(tiny.tokenizer(said).input_ids, tiny.tokenizer) == reply


TALKS = [
    ["hi , who are you ?", "ann lee"],
    ["i live in leeds", "so do i !", "is it nice there ?"],
    ["yes", "no"],
    ["what a day . it rains , and rains , and rains again", "we are dry"],
]


def test_replies_in_a_batch_are_those_given_alone(tiny):
    """Left padded and masked: greedy by hand, without any padding."""
    table = dialogue_scores(tiny.model, tiny.tokenizer, TALKS, max_new_tokens=8, batch_size=3)
    for turns, row in zip(TALKS, table.itertuples(), strict=False):
        tokens = tiny.tokenizer(_dialogue_prompt(turns[:-1])).input_ids[-(64 - 8) :]
        said = []
        for _ in range(8):
            with torch.no_grad():
                said.append(tiny.model(torch.tensor([tokens + said])).logits[0, -1].argmax().item())
        assert row.reply == _reply_text(said, tiny.tokenizer) and row.truth == _clean_turn(turns[-1])
        assert row.f1 == _unigram_f1(row.reply, row.truth)


def test_the_loss_counts_every_token_of_every_reply(tiny):
    table = dialogue_scores(tiny.model, tiny.tokenizer, TALKS, max_new_tokens=8, batch_size=3)
    for turns, row in zip(TALKS, table.itertuples(), strict=False):
        prompt, reply = (
            tiny.tokenizer(_dialogue_prompt(turns[:-1])).input_ids,
            tiny.tokenizer(f" {_clean_turn(turns[-1])}").input_ids,
        )
        tokens = (prompt + reply)[-64:]
        assert row.tokens == len(reply) and row.loss == pytest.approx(
            sum(nll(tiny.model, tokens, len(tokens) - len(reply))), rel=1e-4
        )


def test_a_long_dialogue_loses_its_beginning(tiny):
    long = [*["What a day it is, and how long it takes to tell of it."] * 6, "who are you ?", "ann"]
    table = dialogue_scores(
        tiny.model,
        tiny.tokenizer,
        [long, ["Quite another beginning, " + "and so on " * 40, *long[1:]]],
        max_new_tokens=8,
    )
    assert table["reply"].nunique() == 1 and table["loss"].nunique() == 1


# ---- one row ----


def test_the_tiny_row_is_made_of_its_parts(tiny, corpus, no_network):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        row = evaluate_utility(tiny.model, tiny.tokenizer, corpus=corpus, max_length=48)
    assert len(row) == 1 and row.loc[0, "suite"] == "tiny"
    table = evaluate_tasks(tiny.model, tiny.tokenizer, people_tasks(corpus), max_length=48)
    for name, accuracy in table["accuracy"].items():
        assert row.loc[0, f"acc_{name}"] == accuracy
    for name, texts in [
        ("heldout", corpus.heldout),
        ("retain", corpus.retain),
        ("general", corpus.general_test),
    ]:
        assert row.loc[0, f"ppl_{name}"] == pytest.approx(
            perplexity(tiny.model, tiny.tokenizer, texts, max_length=48, stride=24)
        )
    assert row.loc[0, "classification"] == table.loc["people_retain", "accuracy"]


@pytest.fixture
def paper_files(tmp_path, monkeypatch):
    """A data folder in the published form, with a few lines in each file but one."""
    for folder in ("dialogue", "perplexity"):
        (tmp_path / folder).mkdir()
    for name in ("blended_skill_talk", "empathetic_dialogues", "wizard_of_wikipedia"):
        (tmp_path / f"dialogue/{name}.json").write_text(
            json.dumps({"text": {str(i): turns for i, turns in enumerate(TALKS)}})
        )
    for name in ("wikitext", "pile"):
        (tmp_path / f"perplexity/{name}.csv").write_text('text\n"A line, and more."\nAnother line of text.\n')
    return write_benchmarks(tmp_path)


def test_what_could_not_run_is_missing_and_never_zero(tiny, paper_files, no_network):
    """Files that are not there are named in one warning."""
    (paper_files / "benchmarks/hellaswag_val_full.txt.bz2").unlink()
    (paper_files / "benchmarks/math_qa.jsonl").unlink()
    with pytest.warns(UserWarning) as said:
        row = evaluate_utility(tiny.model, tiny.tokenizer, "paper", data_dir=paper_files, limit=2).loc[0]
    assert len(said) == 1
    for name in (
        f"acc_hellaswag (`data_dir`: {paper_files} holds no benchmarks/hellaswag_val_full.txt.bz2",
        "acc_mathqa",
        "f1_wizard_of_internet",
    ):
        assert name in str(said[0].message)
    measured = {
        "ppl_wikitext",
        "ppl_pile",
        *(f"acc_{name}" for name in BENCHMARKS if name not in ("hellaswag", "mathqa")),
        "f1_blended_skill_talk",
        "f1_empathetic_dialogues",
        "f1_wizard_of_wikipedia",
    }
    errors = {f"se_{name}" for name in measured}
    assert {*row.dropna().index} == {"suite", "limit", "arithmetic", *measured, *errors}
    columns = {*measured, *(f"acc_{name}" for name in BENCHMARKS), "f1_wizard_of_internet"}
    columns |= {"classification", "dialogue"}
    assert {*row.index} == {"suite", "limit", "arithmetic", *columns, *(f"se_{name}" for name in columns)}


def test_the_papers_averages_fall_out_of_a_whole_row(tiny, paper_files, no_network):
    (paper_files / "dialogue/wizard_of_internet.json").write_text(json.dumps({"text": {"0": TALKS[0]}}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        row = evaluate_utility(tiny.model, tiny.tokenizer, "paper", data_dir=paper_files).loc[0]
    assert row["classification"] == pytest.approx(np.mean([row[f"acc_{name}"] for name in BENCHMARKS]))
    assert (
        row["dialogue"] == pytest.approx(np.mean([row[f"f1_{name}"] for name in DIALOGUES]))
        and row.drop("limit").filter(regex="^(?!se_)").notna().all()
    )


def test_other_tasks_have_their_own_average(tiny, paper_files, no_network):
    row = evaluate_utility(
        tiny.model,
        tiny.tokenizer,
        "tiny",
        corpus=Corpus("people", tiny.forget, tiny.retain, tiny.heldout, [], ["Fine weather."]),
        tasks=["lambada", "pubmedqa"],
        data_dir=paper_files,
    ).loc[0]
    assert row["classification"] == (row["acc_lambada"] + row["acc_pubmedqa"]) / 2


# ---- the paper's files ----


def test_every_part_of_the_paper_is_public():
    wanted = [
        *(f"dialogue/{name}.json" for name in DIALOGUES),
        "perplexity/wikitext.csv",
        "perplexity/pile.csv",
        "completion/lambada.csv",
        "completion/pubmed_qa.csv",
    ]
    assert {*wanted} <= {*_PUBLIC_FILES}
    assert _PUBLIC_FILES["completion/lambada.csv"][0].endswith("/datasets/lambada.csv") and _PUBLIC_FILES[
        "perplexity/pile.csv"
    ][0].endswith("/datasets/validation_data/pile.csv")


def test_dialogues_of_the_paper(tiny, shared_data):
    sizes = {name: len(dialogue_turns(name, shared_data)) for name in DIALOGUES[:3]}
    assert sizes == {"blended_skill_talk": 1009, "empathetic_dialogues": 2758, "wizard_of_wikipedia": 967}
    for name in sizes:
        turns = dialogue_turns(name, shared_data)
        assert min(map(len, turns)) >= 2
        table = dialogue_scores(tiny.model, tiny.tokenizer, turns[:6], batch_size=4)
        assert table["f1"].between(0, 1).all() and len(table) == 6 and (table["tokens"] > 0).all()


def test_a_set_that_is_not_there_is_missing(tiny, shared_data, tmp_path):
    for file in shared_data.glob("*/*.*"):
        if file.name != "wizard_of_internet.json":
            link = tmp_path / "data" / file.parent.name / file.name
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(file)
    folder = tmp_path / "data"
    with pytest.warns(
        UserWarning, match=r"f1_wizard_of_internet .*holds no dialogue/wizard_of_internet.json"
    ):
        row = evaluate_utility(
            tiny.model, tiny.tokenizer, "paper", tasks=["lambada"], data_dir=folder, limit=3
        ).loc[0]
    assert math.isnan(row["f1_wizard_of_internet"]) and math.isnan(row["dialogue"]) and row["ppl_pile"] > 1
