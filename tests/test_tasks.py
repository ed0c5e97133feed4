"""The nine benchmarks from local files: the harness's documents and scores, against direct computations."""

import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from benchmark_files import write_benchmarks

from icu_nb.data.benchmarks import BENCHMARKS
from icu_nb.data.files import _PUBLIC_FILES
from icu_nb.errors import InputError
from icu_nb.evals.tasks import _harness_model, _load_tasks, _write_benchmark, evaluate_tasks
from icu_nb.models.tiny import tiny_gpt_neo

pytest.importorskip("lm_eval")

NINE = list(BENCHMARKS)
each_benchmark = pytest.mark.parametrize("name", NINE)
HARNESS_NAMES = ["lambada_openai", "hellaswag", "winogrande", "copa", "arc_easy", "arc_challenge", "piqa"]
HARNESS_NAMES += ["mathqa", "pubmedqa"]


@pytest.fixture(scope="module")
def reader(tiny):
    """An untrained model that reads 1,024 tokens, with the tests' tokenizer."""
    torch.manual_seed(0)
    model = tiny_gpt_neo(len(tiny.tokenizer), max_length=1024, n_layers=2, hidden_size=32, n_heads=2)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(4)  # far from uniform
    return model.eval(), tiny.tokenizer


@pytest.fixture
def files(tmp_path):
    return write_benchmarks(tmp_path)


def load(name, data, folder, limit=None, ask=True):
    """The harness's task, made from a data folder."""
    from lm_eval.tasks import TaskManager

    path = _write_benchmark(folder, name, data, limit)
    loaded, missing = _load_tasks(TaskManager(include_defaults=False), {name: path})
    assert not missing
    task = loaded[name]
    if ask:
        task.build_all_requests(limit=limit)
    return task


# ---- what the harness asks ----

# the first question of a published file as the harness puts it: (context, continuation), the answer, metrics
ASKED = {
    "winogrande": (
        [
            ("Sarah was a much better surgeon than Maria so Sarah", " always got the easier cases."),
            ("Sarah was a much better surgeon than Maria so Maria", " always got the easier cases."),
        ],
        1,
        ["acc"],
    ),
    "copa": (
        [
            ("The man turned on the faucet therefore", "  the toilet filled with water."),
            ("The man turned on the faucet therefore", "  water flowed from the spout."),
        ],
        1,
        ["acc"],
    ),
    "hellaswag": (
        [
            ("Roof shingle removal: A man is sitting on a roof. He", f" {ending}")
            for ending in [
                "is using wrap to wrap a pair of skis.",
                "is ripping level tiles off.",
                "is holding a rubik's cube.",
                "starts pulling up roofing on a roof.",
            ]
        ],
        3,
        ["acc", "acc_norm"],
    ),
    "arc_easy": (
        [
            (
                "Question: Which statement best explains why photosynthesis is the foundation of "
                "most food webs?\nAnswer:",
                f" {choice}",
            )
            for choice in [
                "Sunlight is the source of energy for nearly all ecosystems.",
                "Most ecosystems are found on land instead of in water.",
                "Carbon dioxide is more available than other gases.",
                "The producers in all ecosystems are plants.",
            ]
        ],
        0,
        ["acc", "acc_norm"],
    ),
    "arc_challenge": (
        [
            (
                "Question: An astronomer observes that a planet rotates faster after a meteorite impact. "
                "Which is the most likely effect of this increase in rotation?\nAnswer:",
                f" {choice}",
            )
            for choice in [
                "Planetary density will decrease.",
                "Planetary years will become longer.",
                "Planetary days will become shorter.",
                "Planetary gravity will become stronger.",
            ]
        ],
        2,
        ["acc", "acc_norm"],
    ),
    "piqa": (
        [
            (
                "Question: How do I ready a guinea pig cage for it's new occupants?\nAnswer:",
                " Provide the guinea pig with a cage full of a few inches of bedding made of ripped "
                f"{material}, you will also need to supply it with a water bottle and a food dish.",
            )
            for material in ("paper strips", "jeans material")
        ],
        0,
        ["acc", "acc_norm"],
    ),
    "mathqa": (
        [
            (
                "Question: a shopkeeper sold an article offering a discount of 5 % and earned a profit of "
                "31.1 % . what would have been the percentage of profit earned if no discount had been "
                "offered ?\nAnswer:",
                f" {option}",
            )
            for option in ("30", "data inadequate", "none of these", "38")
        ],
        3,
        ["acc", "acc_norm"],
    ),
}


@pytest.mark.parametrize("name", ASKED)
def test_first_question_is_asked_as_the_harness_does(name, shared_data, tmp_path):
    asked, gold, metrics = ASKED[name]
    task = load(name, shared_data, tmp_path, limit=1)
    assert [request.args for request in task.instances] == asked
    target = task.doc_to_text if name == "winogrande" else task.doc_to_target
    found = target(task.instances[0].doc)
    assert (int(found == f" {asked[1][1].strip()}") if name == "copa" else found) == gold
    assert list(task.aggregation()) == metrics


def test_last_word_of_a_passage(shared_data, tmp_path):
    task = load("lambada", shared_data, tmp_path, limit=1)
    ((context, word),) = [request.args for request in task.instances]
    assert context.startswith("With Tristran's next step he was standing beside a lake, and the candlelight")
    assert context.endswith("He took another step, but he was still in the") and word == " glen"
    assert list(task.aggregation()) == ["perplexity", "acc"]


def test_abstract_is_whole(shared_data, tmp_path):
    task = load("pubmedqa", shared_data, tmp_path, limit=1)
    contexts = {request.args[0] for request in task.instances}
    assert [request.args[1] for request in task.instances] == [" yes", " no", " maybe"]
    (context,) = contexts
    assert context.startswith(
        "Abstract: Rapid prescreening (RPS) is one of the quality assurance (QA) methods"
    )
    assert context.endswith(
        "these showed endometrial adenocarcinoma on histologic follow-up.\nQuestion: Pap smears with "
        "glandular cell abnormalities: Are they detected by rapid prescreening?\nAnswer:"
    )
    assert context.count("\n") == 4  # three paragraphs, the question, the answer
    assert task.doc_to_target(task.instances[0].doc) == "yes"


def test_all_published_questions(shared_data):
    sizes = [4992, 10042, 1267, 100, 2376, 1172, 1838, 2983, 500]
    documents = {name: benchmark.documents(shared_data) for name, benchmark in BENCHMARKS.items()}
    assert [len(found) for found in documents.values()] == sizes
    # only captions of videos have a second half, and only seven of these begin with no letter
    seconds = [document["ctx_b"] for document in documents["hellaswag"]]
    assert all(seconds[:3243]) and not any(seconds[3243:])
    assert sum(not second[0].islower() for second in seconds[:3243]) == 7
    assert all(second == second.lower() for second in seconds)  # `capitalize` changes nothing behind it
    n_options = [len(document["choices"]["text"]) for document in documents["arc_easy"]]
    assert (n_options.count(3), n_options.count(4)) == (7, 2369)
    answers = [document["final_decision"] for document in documents["pubmedqa"]]
    assert [answers.count(answer) for answer in ("yes", "no", "maybe")] == [288, 162, 50]


def test_harness_splits_mathqa_into_the_four_options(shared_data, tmp_path):
    task = load("mathqa", shared_data, tmp_path, ask=False)
    from_file = [document["options"] for document in BENCHMARKS["mathqa"].documents(shared_data)]
    for document, options in zip(task.test_docs(), from_file, strict=True):
        assert task.doc_to_choice(document) == [
            part[4:].rstrip(" ,") for part in options.replace(" , ", " , \n").split("\n")[:4]
        ]


# ---- scores ----


def slow_log_likelihood(model, tokenizer, context, continuation, width):
    """One request alone, unpadded, in fp32: the log-likelihood, and whether greedy decoding says the same."""
    stripped = context.rstrip()
    context, continuation = stripped, context[len(stripped) :] + continuation
    n = len(tokenizer(context + continuation).input_ids) - len(tokenizer(context).input_ids)
    tokens = tokenizer(context + continuation).input_ids[-(width + 1) :]
    with torch.no_grad():
        scores = model(torch.tensor([tokens[:-1]])).logits[0, -n:].double().log_softmax(-1)
    target = torch.tensor(tokens[-n:])
    return scores.gather(1, target[:, None]).sum().item(), bool((scores.argmax(-1) == target).all())


@each_benchmark
@pytest.mark.parametrize("width", [1024, 200])  # 200: passages and abstracts lose their beginning
def test_scores_are_a_slow_computation(name, width, reader, shared_data, tmp_path):
    model, tokenizer = reader
    task = load(name, shared_data, tmp_path, limit=4)
    requests = task.instances
    slow = [slow_log_likelihood(model, tokenizer, *request.args, width) for request in requests]
    found = _harness_model(model, tokenizer, width, 8).loglikelihood(requests, disable_tqdm=True)
    assert [value for value, _ in found] == pytest.approx([value for value, _ in slow], rel=1e-4)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in slow]
    # acc and acc_norm by hand, from the documents of the file
    right, right_norm, n_cut = [], [], 0
    for place, document in enumerate(BENCHMARKS[name].documents(shared_data)[:4]):
        rows = [i for i, request in enumerate(requests) if request.doc_id == place]
        values = np.array([slow[i][0] for i in rows])
        texts = [requests[i].args for i in rows]
        n_cut += any(len(tokenizer("".join(text)).input_ids) > width + 1 for text in texts)
        if name == "lambada":
            right.append(slow[rows[0]][1])
            continue
        gold = gold_of(name, document)
        right.append(values.argmax() == gold)
        lengths = [len(continuation) - 1 for _, continuation in texts]
        right_norm.append((values / lengths).argmax() == gold)
    row = evaluate_tasks(model, tokenizer, [name], limit=4, max_length=width, data_dir=shared_data).loc[name]
    assert row["acc"] == np.mean(right) and row["n"] == 4 and row["cut"] == n_cut
    has_norm = name in ("hellaswag", "arc_easy", "arc_challenge", "piqa", "mathqa")
    assert row["acc_norm"] == np.mean(right_norm) if has_norm else math.isnan(row["acc_norm"])
    counted = right_norm if name in ("hellaswag", "arc_challenge") else right
    assert row["metric"] == ("acc_norm" if counted is right_norm else "acc")
    assert row["accuracy"] == np.mean(counted) and row["correct"] == "".join(str(int(r)) for r in counted)
    assert row["stderr"] == pytest.approx(np.std(counted, ddof=1) / 2)
    chances = {"lambada": math.nan, "winogrande": 1 / 2, "copa": 1 / 2, "piqa": 1 / 2, "pubmedqa": 1 / 3}
    assert row["chance"] == pytest.approx(chances.get(name, 1 / 4), nan_ok=True)


def gold_of(name, document):
    """The index of the right answer, from a document in the harness's form."""
    if name == "arc_easy" or name == "arc_challenge":
        return document["choices"]["label"].index(document["answerKey"])
    if name == "winogrande":
        return int(document["answer"]) - 1
    if name == "mathqa":
        return "abcd".index(document["correct"])
    if name == "pubmedqa":
        return ["yes", "no", "maybe"].index(document["final_decision"])
    return int(document["label"])


def test_one_pass_for_answers_of_one_token(reader, files, monkeypatch):
    """Choices that differ in the last token alone share a forward pass; batches hold few tokens."""
    model, tokenizer = reader
    sizes = []
    forward = type(model).forward

    def counted(self, input_ids, **options):
        sizes.append(tuple(input_ids.shape))
        return forward(self, input_ids, **options)

    monkeypatch.setattr(type(model), "forward", counted)
    words = [tokenizer.decode([token]) for token in range(len(tokenizer))]
    known = [word[1:] for word in words if word.startswith(" ") and len(tokenizer(word).input_ids) == 1]
    letters = [word for word in known if word.strip() == word and word][:3]
    assert len(letters) == 3
    prompt = "The answer is one of these letters:" * 20
    questions = [{"context": f"{prompt} {i}", "choices": letters, "answer": 0} for i in range(6)]
    table = evaluate_tasks(model, tokenizer, {"letters": questions}, max_length=1024, batch_size=4)
    assert sum(rows for rows, _ in sizes) == 6 and table.loc["letters", "n"] == 6  # of 18 requests
    assert max(rows * width for rows, width in sizes) <= 2048


def test_harness_reads_notes_and_files(reader, files):
    model, tokenizer = reader
    table = evaluate_tasks(model, tokenizer, NINE, data_dir=files)
    assert table.index.tolist() == NINE and table["missing"].isna().all()
    assert table["n"].tolist() == [2] * 9 and table["note"].str.len().min() > 10
    assert table.attrs["arithmetic"] == "fp32"
    assert table.loc["arc_easy", "chance"] == (1 / 3 + 1 / 4) / 2  # the repeated choice is padding


def test_16_bits_round_the_scores_a_little(reader, files, monkeypatch):
    """As in runs, of which `Arithmetic` decides."""
    from icu_nb.plumbing import Arithmetic

    model, tokenizer = reader
    requests = [request for name in ("copa", "piqa") for request in load(name, files, files).instances]
    exact = _harness_model(model, tokenizer, 1024, 8).loglikelihood(requests, disable_tqdm=True)
    monkeypatch.setattr(Arithmetic, "of", classmethod(lambda cls, model: cls("bf16")))
    rounded = _harness_model(model, tokenizer, 1024, 8).loglikelihood(requests, disable_tqdm=True)
    values = np.array([[value for value, _ in found] for found in (exact, rounded)])
    assert (values[0] != values[1]).any() and np.allclose(values[0], values[1], rtol=0.05)


# ---- what may go wrong ----


def spoil(folder, name, old, new):
    """Change a file of a data folder."""
    path = folder / name
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


@pytest.mark.parametrize(
    "name, file, old, new, problem",
    [
        ("copa", "benchmarks/copa.jsonl", '"I fell, ', '{"', r"line 2: column \d+: "),
        (
            "copa",
            "benchmarks/copa.jsonl",
            '"gold": 0',
            '"gold": 2',
            "line 2: 'gold' is 2, and there are 2 choices",
        ),
        ("copa", "benchmarks/copa.jsonl", ", because", ", but", "line 1: the query ends with neither"),
        ("piqa", "benchmarks/piqa.jsonl", '"Use a knife.", ', "", "line 1: 'choices' is no list of texts"),
        ("piqa", "benchmarks/piqa.jsonl", '"gold": 1', '"gold": true', "line 2: 'gold' is True"),
        ("winogrande", "benchmarks/winogrande.jsonl", '"gold": 0', '"gold": -1', "line 2: 'gold' is -1"),
        ("winogrande", "benchmarks/winogrande.jsonl", '"fell."', "4", "line 2: 'continuation' is no text"),
        ("arc_easy", "benchmarks/arc_easy.jsonl", '"query"', '"question"', "line 1: 'query' is no text"),
        ("arc_challenge", "benchmarks/arc_challenge.jsonl", '"gold": 2', '"gold": 4', "line 2: 'gold' is 4"),
        (
            "mathqa",
            "benchmarks/math_qa.jsonl",
            "\\nD. none",
            "",
            "line 1: the query is no question with the opt",
        ),
        (
            "pubmedqa",
            "completion/pubmed_qa.csv",
            ",no,",
            ",perhaps,",
            "line 3: 'final_decision' is not yes, no",
        ),
        (
            "pubmedqa",
            "completion/pubmed_qa.csv",
            "array(['It is.'",
            "(['It is.'",
            "line 2: 'context' holds no",
        ),
        ("lambada", "completion/lambada.csv", "bob lives in york", "bob", "line 3: 'text' has no last word"),
    ],
)
def test_damaged_line_is_named(reader, files, name, file, old, new, problem):
    spoil(files, file, old, new)
    with pytest.raises(InputError, match=rf"`data_dir`: {file} is damaged \({problem}") as caught:
        evaluate_tasks(*reader, ["winogrande" if name == "copa" else "copa", name], data_dir=files)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "spoiled, problem",
    [
        (lambda text: text.replace("\n1\n", "\n5\n"), "line 1: the label is '5', and there are 4 endings"),
        (lambda text: text.replace("Shout.\n", ""), "line 7: 5 of a question's 6 lines are there"),
        (lambda text: text.replace("Health: ", ""), "line 7: no activity stands before the context"),
    ],
)
def test_damaged_six_lines(reader, files, spoiled, problem):
    import bz2

    path = files / "benchmarks/hellaswag_val_full.txt.bz2"
    path.write_bytes(bz2.compress(spoiled(bz2.decompress(path.read_bytes()).decode()).encode()))
    with pytest.raises(InputError, match=rf"hellaswag_val_full.txt.bz2 is damaged \({problem}"):
        evaluate_tasks(*reader, ["hellaswag"], data_dir=files)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(InputError, match=r"hellaswag_val_full.txt.bz2 is damaged \("):
        evaluate_tasks(*reader, ["hellaswag"], data_dir=files)


@each_benchmark
def test_missing_file_is_named_with_its_source(reader, files, name):
    (files / BENCHMARKS[name].file).unlink()
    others = [other for other in ("copa", "piqa") if other != name]
    table = evaluate_tasks(*reader, [name, *others], data_dir=files)
    url, sha256 = _PUBLIC_FILES[BENCHMARKS[name].file]
    assert f"holds no {BENCHMARKS[name].file}" in table.loc[name, "missing"] and len(sha256) == 64
    assert url.startswith("https://raw.githubusercontent.com/") and url in table.loc[name, "missing"]
    assert math.isnan(table.loc[name, "accuracy"]) and table.loc[name, "n"] == 0
    assert table.loc[others, "missing"].isna().all()  # and the others are asked


def test_folder_of_the_environment(reader, files, monkeypatch):
    monkeypatch.setenv("ICU_NB_DATA", str(files))
    assert evaluate_tasks(*reader, ["copa"]).loc["copa", "n"] == 2


def test_without_folder_and_hub_the_remedy_is_named(reader, monkeypatch):
    import datasets

    def refuse(path, **options):
        raise ConnectionError(f"Couldn't reach '{path}' on the Hub\nmore lines")

    monkeypatch.delenv("ICU_NB_DATA", raising=False)
    monkeypatch.setattr(datasets, "load_dataset", refuse)
    table = evaluate_tasks(*reader, ["piqa"])
    assert table.loc["piqa", "missing"].startswith(
        "Couldn't reach 'baber/piqa' on the Hub; without the Hub, "
    )
    assert "benchmarks/piqa.jsonl" in table.loc["piqa", "missing"] and table.loc["piqa", "note"] is None


def test_without_folder_the_harness_loads_its_own(reader, monkeypatch):
    """By its own name and configuration; the Hub is a stand-in here."""
    import datasets

    asked = []

    def stand_in(path, name=None, **options):
        asked.append((path, name))
        rows = [{"goal": "Cut bread.", "sol1": "Use a knife.", "sol2": "Use a cup.", "label": 0}]
        return datasets.DatasetDict(
            {split: datasets.Dataset.from_list(rows) for split in ("train", "validation")}
        )

    monkeypatch.delenv("ICU_NB_DATA", raising=False)
    monkeypatch.setattr(datasets, "load_dataset", stand_in)
    assert evaluate_tasks(*reader, ["piqa"]).loc["piqa", "n"] == 1 and asked == [("baber/piqa", None)]


def test_configurations_are_those_of_the_harness():
    """Every file of the harness is there and makes the task of the name that the field knows."""
    import lm_eval
    import yaml

    class Loader(yaml.SafeLoader):
        pass

    Loader.add_constructor("!function", lambda loader, node: node.value)
    tasks = Path(lm_eval.__file__).parent / "tasks"
    names = [
        yaml.load((tasks / benchmark.harness).read_text(), Loader)["task"]
        for benchmark in BENCHMARKS.values()
    ]
    assert names == HARNESS_NAMES


def test_answer_longer_than_the_model_reads(tiny, files):
    questions = [{"context": "Ann", "choices": ["Leeds", "York and so on " * 40], "answer": 0}]
    with pytest.raises(
        InputError, match=r"`max_length`: an answer to choose has \d+ tokens, and the model reads 64"
    ):
        evaluate_tasks(tiny.model, tiny.tokenizer, {"long": questions})


@pytest.mark.parametrize("answer", [2, -1, True, "York", None])
def test_answer_that_is_no_choice(reader, answer):
    questions = [{"context": "Ann", "choices": ["Leeds", "York"], "answer": 0}]
    questions.append({**questions[0], "answer": answer})
    with pytest.raises(
        InputError, match=rf"`questions`: in mine, question 1 has 2 choices and the answer {answer!r}"
    ):
        evaluate_tasks(*reader, {"mine": questions})
    with pytest.raises(InputError, match="`questions`: in mine, question 0 has neither choices nor a text"):
        evaluate_tasks(*reader, {"mine": [{"context": "Ann", "answer": 1}]})


def test_no_file_is_ordered_by_its_answers(shared_data):
    """So the first questions are as good for comparing models as any."""
    for name in set(NINE) - {"lambada"}:
        answers = [gold_of(name, document) for document in BENCHMARKS[name].documents(shared_data)[:50]]
        n_choices = max(answers) + 1
        assert len(set(answers)) == n_choices > 1
        assert max(map(answers.count, set(answers))) <= 40


@pytest.mark.parametrize(
    "tasks, problem",
    [
        (["copa", "helaswag"], "helaswag is not known. Known: lambada, hellaswag, winogrande, copa"),
        (["lambada_openai"], "lambada_openai is not known"),
        ("copa", "it is one string"),
        ([], "there are none"),
    ],
)
def test_unknown_task(reader, tasks, problem):
    with pytest.raises(InputError, match=f"`tasks`: {problem}"):
        evaluate_tasks(*reader, tasks)


# ---- rows of the real model ----


def test_row_of_a_benchmark(reader, files, monkeypatch, tmp_path):
    """What is stored beside the number, and that a row that is there is not made again."""
    from icu_nb.paper import benchmark_scores

    monkeypatch.setattr(benchmark_scores, "load_model", lambda name: reader)
    path = tmp_path / "rows.csv"
    names = ["hellaswag", "arc_easy", "arc_challenge"]
    command = ["scores", *names, "--data-dir", str(files), "--rows", str(path)]
    monkeypatch.setattr("sys.argv", command)
    benchmark_scores._main()
    rows = pd.read_csv(path)
    assert rows["task"].tolist() == [*names, "arc (average)"] and rows["published"].count() == 2
    facts = [
        "n",
        "acc",
        "acc_norm",
        "stderr",
        "chance",
        "note",
        "device",
        "versions",
        "commit",
        "cpu_seconds",
    ]
    assert rows.loc[:2, facts].notna().all(axis=None) and rows.loc[:2, "n"].tolist() == [2, 2, 2]
    parts = rows.loc[1:2, "acc_norm"]
    assert rows.loc[3, "acc_norm"] == parts.mean()
    assert rows.loc[3, "stderr"] == pytest.approx(np.sqrt(sum(p * (1 - p) / 1 for p in parts)) / 2)
    monkeypatch.setattr(benchmark_scores, "_make_row", lambda *args: pytest.fail("made again"))
    benchmark_scores._main()


def test_stored_scores_of_smollm2():
    """Whole sets but for two; no question is cut; every number comes with how it was made."""
    path = Path(__file__).parents[1] / "figures/data/smollm2_benchmarks.csv"
    rows = pd.read_csv(path).set_index("task")
    sizes = dict(zip(NINE, [1000, 1000, 1267, 100, 2376, 1172, 1838, 2983, 500], strict=True))
    sizes["arc (average)"] = 2376 + 1172
    assert rows["n"].to_dict() == sizes
    measured = rows.drop(index="arc (average)")
    assert (measured["cut"] == 0).all() and (measured["arithmetic"] == "bf16").all()
    assert measured[["commit", "versions", "machine", "cpu_seconds", "note"]].notna().all(axis=None)
    assert rows["model"].eq("SmolLM2-135M-Instruct, dequantized from 4 bits").all()
    published = {"hellaswag": 0.409, "piqa": 0.663, "arc (average)": 0.373}
    for name, row in rows.iterrows():
        assert row["published"] == published[name] if name in published else math.isnan(row["published"])
    above = measured["low"] > measured["chance"]
    assert above[["hellaswag", "arc_easy", "piqa", "copa"]].all()
