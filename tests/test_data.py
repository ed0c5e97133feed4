"""Corpora, texts from anywhere, token sequences, and the published files."""

import copy
import hashlib
import json
import re
import socket
import urllib.error
import urllib.request
from dataclasses import replace

import datasets
import pandas as pd
import pytest
import torch

from icu_nb.data.corpus import split
from icu_nb.data.files import _PUBLIC_FILES, _download, data_file
from icu_nb.data.general import documentation_paragraphs
from icu_nb.data.people import TEMPLATES, people, people_controls, people_corpus
from icu_nb.data.pile import gpt2_tokenizer, pile_corpus, pile_extraction
from icu_nb.data.sources import load_corpus
from icu_nb.errors import DownloadError, InputError
from icu_nb.evals.people_questions import find_facts
from icu_nb.language_model import predicted_positions
from icu_nb.text import (
    containment,
    deduplicate,
    pad,
    pad_id,
    prompt_suffix,
    read_texts,
    real_tokens,
    tokenize,
    word_ngrams,
)

RUNS = range(3)  # those in the shared folder
SETS = ["forget", "retain", "heldout", "general_train", "general_test"]
FORMAL = {"staff file", "clinic letter", "bank form", "police report"}


def files_in(folder):
    return [path for path in folder.rglob("*") if path.is_file()]


# ---- invented people ----


def template_of(record):
    """The name of the one template that a record fills."""
    patterns = {
        name: ".+".join(map(re.escape, re.split(r"\{\w+\}", template)))
        for name, template in TEMPLATES.items()
    }
    found = [name for name, pattern in patterns.items() if re.fullmatch(pattern, record)]
    assert len(found) == 1, (record, found)
    return found[0]


def test_people_come_in_many_templates_and_two_registers():
    used = {template_of(record) for record in people(200)}
    assert len(used) >= 6 and used == {*TEMPLATES}
    assert len(used & FORMAL) >= 3 and len(used - FORMAL) >= 3


@pytest.mark.parametrize("field", ["name", "street", "city", "phone", "email", "company", "birth"])
def test_every_template_tells_the_facts(field):
    assert all(f"{{{field}}}" in template for template in TEMPLATES.values())


def test_people_belong_to_their_seed():
    assert people(20, seed=1) == people(20, seed=1)
    assert not {*people(20, seed=1)} & {*people(20, seed=2)}


def test_secrets_belong_to_one_person():
    records = people(200)
    for pattern in (r"[\w.+-]+@[\w.-]+\w", r"\d{3}-\d{3}-\d{4}"):
        found = [re.search(pattern, record)[0] for record in records]
        assert len({*found}) == len(records)


def test_people_have_neighbors():
    """Companies and towns are shared, so records are close to others without being copies of them."""
    records = people(100)
    grams = [word_ngrams(record, 3) for record in records]
    best = [
        max(containment(own, other) for j, other in enumerate(grams) if j != i) for i, own in enumerate(grams)
    ]
    assert min(best) > 0.05 and max(best) < 0.9


# ---- corpora ----


def assert_sound(corpus):
    """Sets are disjoint, and nothing held out stands in what was trained on."""
    sets = [getattr(corpus, name) for name in SETS]
    assert all(sets) and sum(map(len, sets)) == len(set().union(*sets))
    known = set().union(*map(word_ngrams, corpus.trained_on()))
    assert max(containment(word_ngrams(text), known) for text in corpus.heldout) <= 0.5
    general = set().union(*map(word_ngrams, corpus.general_train))
    assert max(containment(word_ngrams(text), general) for text in corpus.general_test) <= 0.5


def test_controls_keep_the_template_and_replace_every_fact():
    records = people(40)
    controls = people_controls(records, n=3)
    assert len(set(controls)) == 120 and not set(controls) & set(records)
    for i, record in enumerate(records):
        facts = find_facts(record).groupdict()
        for control in controls[3 * i : 3 * i + 3]:
            assert template_of(control) == template_of(record)
            others = find_facts(control).groupdict()
            own = [field for field in ("name", "phone", "email", "account") if others[field] == facts[field]]
            assert not own
    assert people_controls(records, n=3) == controls != people_controls(records, n=3, seed=5)
    with pytest.raises(InputError, match=r"`records`.*`people`"):
        people_controls(["A text of another kind."])


def test_people_corpus_is_sound():
    corpus = people_corpus(12, n_retain=40)
    assert_sound(corpus)
    assert (len(corpus.forget), len(corpus.retain)) == (12, 40) and 0 < len(corpus.heldout) <= 12
    assert corpus.trained_on() == corpus.forget + corpus.retain + corpus.general_train


def test_a_corpus_belongs_to_its_seed():
    assert people_corpus(5, 10, seed=4) == people_corpus(5, 10, seed=4)
    assert people_corpus(5, 10, seed=4) != people_corpus(5, 10, seed=5)


def test_documentation_is_prose():
    paragraphs = documentation_paragraphs()
    assert len(paragraphs) == len({*paragraphs}) > 400
    assert all(len(p.split()) >= 20 and "\n" not in p for p in paragraphs)


def test_split_gives_disjoint_parts():
    parts = split(list(range(20)), [5, 10, 3], seed=1)
    assert [*map(len, parts)] == [5, 10, 3] and len(set().union(*parts)) == 18
    assert parts == split(list(range(20)), [5, 10, 3], seed=1) != split(list(range(20)), [5, 10, 3], seed=2)


def test_deduplication():
    known = "the quick brown fox jumps over the lazy dog and runs far away into the deep dark wood tonight"
    mostly = known.replace("tonight", "again")
    fresh = (
        "an entirely different sentence about boats and harbors "
        "that nobody has ever written down before today in any book"
    )
    assert deduplicate([known, mostly, fresh, fresh], against=[known]) == [fresh]
    assert deduplicate([mostly], against=[known], max_overlap=1.0) == [mostly]
    assert deduplicate([known.upper()], against=[known]) == []


def test_containment_has_a_direction():
    assert (
        containment({1, 2}, {1, 2, 3, 4}) == 1
        and containment({1, 2, 3, 4}, {1, 2}) == 0.5
        and containment(set(), {1}) == 0
    )


def test_a_file_becomes_a_corpus(tmp_path):
    path = tmp_path / "letters.txt"
    path.write_text("\n".join(people(60)), encoding="utf-8")
    corpus = load_corpus(str(path), n_forget=10)
    assert corpus.name == "letters" and len(corpus.forget) == 10
    assert {*corpus.forget, *corpus.retain, *corpus.heldout} <= {*people(60)}
    assert_sound(corpus)
    assert load_corpus(str(path), n_forget=10) == corpus


def test_corpora_have_names():
    assert load_corpus("people", n_forget=3) == people_corpus(3)


def test_a_corpus_with_a_smaller_retain_pool():
    assert load_corpus("people", 3, seed=2, n_retain=8) == people_corpus(3, 8, seed=2)
    whole = load_corpus(people(60), n_forget=10)
    assert load_corpus(people(60), n_forget=10, n_retain=8) == replace(whole, retain=whole.retain[:8])


# ---- texts from anywhere ----

# "None" and "001" are texts like others; no reader may make something else of them.
TEXTS = ['Ann says "hi, you"', "None", "001", "Zoë lives in Łódź"]


def as_source(kind, folder):
    path = folder / f"texts.{kind}"
    if kind == "csv":
        pd.DataFrame({"text": TEXTS, "other": 1}).to_csv(path, index=False)
    elif kind == "jsonl":
        path.write_text("\n".join(json.dumps({"text": text}) for text in TEXTS), encoding="utf-8")
    elif kind == "json":
        path.write_text(json.dumps([{"text": text} for text in TEXTS]), encoding="utf-8")
    elif kind == "txt":
        path.write_text("\n\n".join(TEXTS) + "\n", encoding="utf-8")
    else:
        return {
            "list": TEXTS,
            "tuple": tuple(TEXTS),
            "generator": (text for text in TEXTS),
            "Dataset": datasets.Dataset.from_dict({"text": TEXTS}),
            "frame": pd.DataFrame({"text": TEXTS}),
        }[kind]
    return path


@pytest.mark.parametrize(
    "kind", ["list", "tuple", "generator", "Dataset", "frame", "csv", "jsonl", "json", "txt"]
)
def test_texts_are_the_same_from_everywhere(kind, tmp_path):
    assert read_texts(as_source(kind, tmp_path)) == TEXTS


def test_another_column(tmp_path):
    path = tmp_path / "letters.csv"
    pd.DataFrame({"letter": TEXTS}).to_csv(path, index=False)
    assert read_texts(path, column="letter") == TEXTS
    with pytest.raises(InputError, match=r"`source`.*letter"):
        read_texts(path)


@pytest.mark.parametrize(
    "source, argument",
    [
        ("nowhere.txt", "source"),
        ([], "source"),
        (["fine", "  "], r"source.*\[1\]"),
        (["fine", None], r"source.*\[1\]"),
        (["fine", "half \ud83d"], r"source.*half a character.*\[1\]"),
        (7, "source"),
    ],
)
def test_unusable_sources(source, argument):
    with pytest.raises(InputError, match=argument):
        read_texts(source)


@pytest.mark.parametrize(
    "name, content",
    [
        ("texts.pdf", b"%PDF"),
        ("texts.txt", b"\xff\xfe\xff"),
        ("texts.jsonl", b"{not json"),
        ("texts.jsonl", b'{"text": "a"}\n\n{"text": "b"'),
        ("texts.csv", b""),
        ("texts.csv", b'text\n"open'),
        ("texts.txt", b"\n \n"),
    ],
)
def test_unusable_files(name, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match="`source`"):
        read_texts(tmp_path / name)


@pytest.mark.parametrize("value", ["null", "7", "[1]", '"secret"'])
def test_a_record_that_is_none(value, tmp_path):
    """Named by its place; what it is might be a text."""
    files = {
        "first.jsonl": (f'{value}\n{{"text": "a"}}', "line 1"),
        "later.jsonl": (f'{{"text": "a"}}\n\n{value}\n', "line 3"),
        "list.json": (f'[{{"text": "a"}}, {value}]', "index 1"),
    }
    for name, (content, place) in files.items():
        (tmp_path / name).write_text(content)
        with pytest.raises(InputError, match=f"`source`: {name} .*{place} is no record") as error:
            read_texts(tmp_path / name)
        assert "secret" not in str(error.value)


def test_half_a_character_in_a_file(tmp_path):
    (tmp_path / "texts.jsonl").write_text('{"text": "fine"}\n{"text": "\\ud83d"}\n{"text": "\\ud83d\\ude00"}')
    with pytest.raises(InputError, match=r"`source`: half a character .*line \[2\]"):
        read_texts(tmp_path / "texts.jsonl")


# ---- token sequences ----


def test_padding_is_on_the_right_and_masked():
    sequences = pad([[5, 6, 7], [8], [9, 10]], pad_token_id=1)
    assert sequences.input_ids.tolist() == [[5, 6, 7], [8, 1, 1], [9, 10, 1]]
    assert sequences.attention_mask.tolist() == [[1, 1, 1], [1, 0, 0], [1, 1, 0]]
    assert sequences.lengths.tolist() == [3, 1, 2] and len(sequences) == 3
    assert sequences.tokens() == [[5, 6, 7], [8], [9, 10]]
    assert sequences.input_ids.dtype == sequences.attention_mask.dtype == torch.long


def test_prompts_are_read_and_do_not_count():
    sequences = pad([[5, 6, 7, 8], [9, 10]], prompt_lengths=[2, 0])
    assert sequences.loss_mask.tolist() == [[0, 1, 1, 1], [1, 1, 0, 0]]
    assert predicted_positions(sequences.loss_mask).tolist() == [[False, True, True], [True, False, False]]
    assert sequences[[1, 0]].prompt_lengths.tolist() == [0, 2]
    again = real_tokens(**sequences.inputs, prompt_lengths=sequences.prompt_lengths)
    assert torch.equal(again.loss_mask, sequences.loss_mask)


def test_one_long_sequence_pads_no_other():
    sequences = pad([[1] * 100_000, *([[2] * 3] * 50_000)])
    assert sequences[[5, 7]].input_ids.shape == (2, 3)  # and no matrix of 50,001 x 100,000


def test_rows_and_batches():
    sequences = pad([[i] * (i + 1) for i in range(5)])
    assert sequences[[3, 1]].tokens() == [[3] * 4, [1] * 2]
    assert [len(batch) for batch in sequences.batches(2)] == [2, 2, 1]
    assert [row for batch in sequences.batches(2) for row in batch.tokens()] == sequences.tokens()


def test_tokenizing_cuts_and_comes_back(tiny):
    whole, cut = tokenize(tiny.forget, tiny.tokenizer), tokenize(tiny.forget, tiny.tokenizer, 20)
    assert tiny.tokenizer.batch_decode(whole.tokens()) == tiny.forget
    assert cut.tokens() == [row[:20] for row in whole.tokens()]
    assert (
        whole.input_ids[whole.attention_mask == 0] == tiny.tokenizer.pad_token_id
    ).all() and whole.attention_mask.min() == 0


def test_beginning_of_sequence_stays(bos_tokenizer):
    rows = tokenize(["Ann is here", "Bob"], bos_tokenizer).tokens()
    assert all(
        row[0] == bos_tokenizer.bos_token_id and bos_tokenizer.bos_token_id not in row[1:] for row in rows
    )


def test_padding_token(tiny):
    tokenizer = copy.deepcopy(tiny.tokenizer)
    assert pad_id(tokenizer) == tokenizer.pad_token_id != tokenizer.eos_token_id
    tokenizer.pad_token = None
    assert pad_id(tokenizer) == tokenizer.eos_token_id


@pytest.mark.parametrize("length, middle, last", [(200, 100, 150), (48, 24, 36), (41, 20, 30), (40, 20, 30)])
def test_prompt_and_suffix(length, middle, last):
    """100, 150 and 200 in the paper; padding does not move them."""
    (prompt, _), (suffix, _) = prompt_suffix(pad([list(range(length)), list(range(2 * length))]))
    assert prompt == list(range(middle, last)) and suffix == list(range(last, length))


# ---- downloads ----

CONTENT = b"the published file"
SHA = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "public.npy"
    path.write_bytes(CONTENT)
    return path


def test_the_right_file_is_kept_and_fetched_once(source, tmp_path):
    target = tmp_path / "cache" / "file.npy"
    assert _download(source.as_uri(), SHA, target).read_bytes() == CONTENT
    url = source.as_uri()
    source.unlink()
    assert _download(url, SHA, target) == target
    assert files_in(target.parent) == [target]


def test_a_file_with_another_checksum_is_not_kept(source, tmp_path):
    with pytest.raises(DownloadError, match="SHA-256"):
        _download(source.as_uri(), "0" * 64, tmp_path / "cache" / "file.npy")
    assert not files_in(tmp_path / "cache") if (tmp_path / "cache").exists() else True


def test_a_damaged_copy_is_fetched_again(source, tmp_path):
    target = tmp_path / "file.npy"
    target.write_bytes(b"half of it")
    assert _download(source.as_uri(), SHA, target).read_bytes() == CONTENT


@pytest.mark.parametrize(
    "error", [urllib.error.URLError("no route"), TimeoutError("slow"), ConnectionResetError("cut")]
)
def test_without_a_network(cache, monkeypatch, error):
    def no_network(*args, **kwargs):
        raise error

    monkeypatch.setattr(urllib.request, "urlopen", no_network)
    with pytest.raises(DownloadError, match="data_dir"):
        pile_extraction(0)
    assert not files_in(cache)


def test_a_closed_port(tmp_path):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # bound and not listening: nobody answers
        with pytest.raises(DownloadError, match="cannot be reached"):
            _download(f"http://127.0.0.1:{unused.getsockname()[1]}/file.npy", SHA, tmp_path / "file.npy")


@pytest.mark.parametrize(
    "call, argument",
    [
        (lambda: pile_extraction(5), "run"),
        (lambda: pile_extraction(-1), "run"),
        (lambda: pile_extraction("0"), "run"),
        (lambda: data_file("pile/run9.npy"), "name"),
        (lambda: pile_extraction(0, "no/such/folder"), "data_dir"),
        (lambda: pile_corpus(129), "n_forget"),
        (lambda: pile_corpus(0), "n_forget"),
        (lambda: pile_corpus(8, run=7), "run"),
        (lambda: people_corpus(0), "n_forget"),
        (lambda: people_corpus(3, 0), "n_retain"),
        (lambda: load_corpus("enron"), "dataset"),
        (lambda: load_corpus("people", n_forget=0), "n_forget"),
        (lambda: load_corpus("people", n_forget=4, n_retain=0), "n_retain"),
    ],
)
def test_unknown_names_and_impossible_numbers(cache, call, argument):
    with pytest.raises(InputError, match=f"`{argument}`"):
        call()
    assert not files_in(cache)


def test_a_folder_without_the_file(cache):
    with pytest.raises(InputError, match=r"`data_dir`.*forget_tokens\.npy"):
        pile_extraction(0, cache)


# ---- the real data ----


def test_local_files_are_the_published_ones(shared_data):
    here = [name for name in _PUBLIC_FILES if (shared_data / name).exists()]
    assert len(here) >= 2 * len(RUNS) + 4
    for name in here:
        assert hashlib.sha256((shared_data / name).read_bytes()).hexdigest() == _PUBLIC_FILES[name][1], name


@pytest.mark.parametrize("run", RUNS)
def test_runs_have_the_papers_shape(shared_data, run):
    rows = pile_extraction(run, shared_data)
    assert rows.num_rows == 128 and {*rows.column_names} == {"input_ids", "neighbor_input_ids"}
    for column in rows.column_names:
        assert {len(row) for row in rows[column]} == {200}
        assert min(map(min, rows[column])) >= 0 and max(map(max, rows[column])) < 50257


def test_the_folder_may_be_named_in_the_environment(shared_data, monkeypatch):
    monkeypatch.setenv("ICU_NB_DATA", str(shared_data))
    assert pile_extraction(1)[:2] == pile_extraction(1, shared_data)[:2]


@pytest.fixture(scope="module")
def pile_texts(shared_data):
    """(part, run) -> the texts of a run."""
    tokenizer = gpt2_tokenizer(shared_data)
    runs = {run: pile_extraction(run, shared_data) for run in RUNS}
    return {
        (part, run): tokenizer.batch_decode(rows[part][:])
        for run, rows in runs.items()
        for part in rows.column_names
    }


def test_the_tokens_are_the_published_texts(shared_data, pile_texts):
    published = pd.read_csv(shared_data / "pile_extraction" / "run0" / "forget.csv", keep_default_na=False)[
        "text"
    ].tolist()
    assert (
        sum(a.strip() == b.strip() for a, b in zip(pile_texts["input_ids", 0], published, strict=False))
        >= 120
    )


def test_the_traps_are_there(pile_texts):
    """What the next test guards against does happen in these files."""
    forget, neighbors = (
        {run: {*pile_texts[part, run]} for run in RUNS} for part in ("input_ids", "neighbor_input_ids")
    )
    assert len(neighbors[0] & forget[2]) == 2
    assert len(forget[0] & forget[1]) == 1


@pytest.mark.parametrize("run, n_forget", [(0, 128), (2, 64)])
def test_pile_corpus_is_sound(shared_data, pile_texts, run, n_forget):
    corpus = pile_corpus(n_forget, run=run, data_dir=shared_data)
    assert_sound(corpus)
    assert len(corpus.forget) == n_forget and {*corpus.forget} <= {*pile_texts["input_ids", run]}
    assert not {*corpus.heldout} & {*pile_texts["input_ids", run]}
    assert {*corpus.heldout} <= set().union(*(pile_texts["input_ids", k] for k in RUNS if k != run))
    assert {*corpus.retain} <= set().union(*(pile_texts["neighbor_input_ids", k] for k in RUNS))
    assert len(corpus.heldout) > 40 and len(corpus.retain) > 250
