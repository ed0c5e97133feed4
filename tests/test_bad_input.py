"""Bad input gets one clear error that names argument and remedy, before any training or change."""

import copy
import importlib
import json
import math
import warnings
from dataclasses import asdict, replace

import datasets
import numpy as np
import pytest
import torch
from huggingface_hub import constants
from transformers import GPT2Config, GPT2LMHeadModel

from icu_nb.config import ICUConfig
from icu_nb.data.files import _download
from icu_nb.data.pile import pile_extraction
from icu_nb.data.sources import load_corpus
from icu_nb.embedding import sentence_embedder
from icu_nb.errors import DownloadError, InputError
from icu_nb.iur import Thresholds, calibrate_thresholds
from icu_nb.metrics import extraction_likelihood
from icu_nb.models.loading import load_model
from icu_nb.objective import ICU
from icu_nb.plumbing import seed_everything
from icu_nb.unlearn import unlearn

NAN, INF = math.nan, math.inf
NEVER = Thresholds(ma=0.0, el=0.0)


def files_in(folder):
    return [path for path in folder.rglob("*") if path.is_file()]


@pytest.fixture(autouse=True)
def nothing_is_written(cache):
    """No test of this file may leave a file in the working folder or in the cache."""
    yield
    assert not files_in(cache / "work") and not files_in(cache / "cache")


@pytest.fixture
def refused(tiny, monkeypatch):
    """Call `unlearn`, which must refuse without a step, a warning or a change; returns what it said."""

    def call(
        match, error=InputError, model=None, tokenizer=None, forget=None, retain=None, config=None, **rest
    ):
        def no_training(*args, **kwargs):
            raise AssertionError("it began to train")

        monkeypatch.setattr(importlib.import_module("icu_nb.unlearn"), "train_epoch", no_training)
        model = model or tiny.copy()
        before, mode, dtype = tiny.weights(model), model.training, model.dtype
        with pytest.raises(error, match=match) as caught, warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            unlearn(
                model,
                tiny.tokenizer if tokenizer is None else tokenizer,
                tiny.forget if forget is None else forget,
                tiny.retain if retain is None else retain,
                config or tiny.config(),
                **rest,
            )
        assert tiny.same(model, before) and (model.training, model.dtype) == (mode, dtype)
        return str(caught.value)

    return call


def is_one_clear_sentence(message):
    """The argument, what is wrong with it, and what to do, in a few words."""
    return (
        message.startswith("`")
        and message.count("`") >= 2
        and "\n" not in message
        and ". " in message
        and len(message) < 400
    )


# ---- texts ----


@pytest.mark.parametrize("argument", ["forget", "retain"])
@pytest.mark.parametrize(
    "texts",
    [[], "one string", 7, ["fine", ""], ["fine", " \n\t"], ["fine", None], ["fine", 3]],
    ids=["empty", "string", "number", "empty text", "blank text", "no text", "number in it"],
)
def test_texts_that_cannot_be_used(refused, argument, texts):
    if isinstance(texts, list) and texts:
        texts, where = (
            ["a text that is long enough to count for something here and there"] * 2 + texts,
            r".*\[3\]",
        )
    else:
        where = ""
    assert is_one_clear_sentence(refused(f"`{argument}`{where}", **{argument: texts}))


@pytest.mark.parametrize("argument", ["forget", "retain"])
@pytest.mark.parametrize(
    "columns",
    [
        {"letter": ["hello"]},
        {"text": []},
        {"input_ids": []},
        {"input_ids": [[5] * 48, []]},
        {"text": ["fine", ""]},
    ],
    ids=str,
)
def test_data_sets_that_cannot_be_used(refused, argument, columns):
    assert is_one_clear_sentence(refused(f"`{argument}`", **{argument: datasets.Dataset.from_dict(columns)}))


@pytest.mark.parametrize("argument", ["forget", "retain"])
@pytest.mark.parametrize("token", [300, 10**6, -1])
def test_tokens_that_the_model_does_not_know(refused, argument, token):
    rows = [list(range(5, 53)) for _ in range(4)]
    rows[2][7] = token
    refused(f"`{argument}`|`tokenizer`", **{argument: datasets.Dataset.from_dict({"input_ids": rows})})


def test_a_text_too_short_for_el(refused, tiny):
    message = refused(r"`forget`.*\[1\].*40 tokens", forget=[tiny.forget[0], "Too short."])
    assert is_one_clear_sentence(message) and "smaller el_n" in message


def test_a_text_cut_too_short_for_el(refused, tiny):
    assert "smaller el_n" in refused("`forget`.*40 tokens", config=tiny.config(max_length=30))


def test_a_text_longer_than_the_context(refused, tiny):
    message = refused("`forget`.*64 tokens", config=tiny.config(max_length=None))
    assert is_one_clear_sentence(message) and "max_length=64" in message


@pytest.mark.parametrize("texts, k", [(1, 2), (3, 4)])
def test_fewer_retain_texts_than_neighbors(refused, tiny, texts, k):
    message = refused(f"`retain`.*{k}", retain=tiny.retain[:texts], config=tiny.config(n_neighbors=k))
    assert is_one_clear_sentence(message) and "n_neighbors" in message


def test_nothing_but_near_duplicates(refused, tiny):
    message = refused(r"`retain`.*\[0\]", forget=tiny.forget[:1], retain=["So " + tiny.forget[0]])
    assert is_one_clear_sentence(message) and "max_overlap" in message


def test_a_text_in_both(tiny):
    """A warning names its index, and it is taken out of retain: no neighbor of anybody."""
    retain = [tiny.retain[0], tiny.forget[3], *tiny.retain[1:]]
    with pytest.warns(UserWarning, match=r"`retain`.*\[1\].*`forget`") as caught:
        result = unlearn(
            tiny.copy(),
            tiny.tokenizer,
            tiny.forget,
            retain,
            tiny.config(max_epochs=1, n_neighbors=5),
            thresholds=NEVER,
        )
    assert len([w for w in caught if "retain" in str(w.message)]) == 1
    assert 1 not in result.pairs and result.pairs.max() > 1
    without = unlearn(
        tiny.copy(),
        tiny.tokenizer,
        tiny.forget,
        tiny.retain,
        tiny.config(max_epochs=1, n_neighbors=5),
        thresholds=NEVER,
    )
    assert np.array_equal(np.array(retain)[result.pairs], np.array(tiny.retain)[without.pairs])


def test_all_of_retain_is_to_be_forgotten(tiny):
    model = tiny.copy()
    with (
        pytest.warns(UserWarning, match="`retain`"),
        pytest.raises(InputError, match=r"`retain`.*0 texts are left"),
    ):
        unlearn(model, tiny.tokenizer, tiny.forget, tiny.forget, tiny.config())
    assert tiny.same(model, tiny.weights(tiny.model))


@pytest.mark.parametrize(
    "neighbors, words",
    [
        ([0] * 8, r"int64 of shape \[8\]"),
        (np.zeros((7, 1), dtype=int), r"shape \[7, 1\] for 8 forget texts"),
        (np.zeros((8, 0), dtype=int), "integers"),
        (np.zeros((8, 1)), "float64"),
        (np.full((8, 1), 24), r"\[24\] are no indices of the 24"),
        (np.full((8, 1), -1), r"\[-1\] are no indices"),
    ],
)
def test_pairs_that_cannot_be_used(refused, neighbors, words):
    assert is_one_clear_sentence(refused(f"`neighbors`.*{words}", neighbors=neighbors))


def test_a_neighbor_that_is_to_be_forgotten(tiny):
    with pytest.warns(UserWarning), pytest.raises(InputError, match=r"`neighbors`: the retain texts \[0\]"):
        unlearn(
            tiny.copy(),
            tiny.tokenizer,
            tiny.forget,
            [tiny.forget[0], *tiny.retain],
            tiny.config(),
            neighbors=np.zeros((8, 1), dtype=int),
        )


# ---- model and tokenizer ----


def test_a_tokenizer_without_padding(tiny):
    """End-of-sequence is used, and said; masked as it is, it changes nothing."""
    tokenizer = copy.deepcopy(tiny.tokenizer)
    tokenizer.pad_token = None
    with pytest.warns(UserWarning, match="pad token.*end of sequence"):
        without = unlearn(
            tiny.copy(), tokenizer, tiny.forget, tiny.retain, tiny.config(max_epochs=1), thresholds=NEVER
        )
    usual = unlearn(
        tiny.copy(), tiny.tokenizer, tiny.forget, tiny.retain, tiny.config(max_epochs=1), thresholds=NEVER
    )
    assert np.array_equal(without.pairs, usual.pairs) and without.history["ma"].tolist() == pytest.approx(
        usual.history["ma"].tolist()
    )
    assert tokenizer.pad_token is None, "the tokenizer itself stays as it was"


def test_a_tokenizer_of_another_model(refused, tiny):
    small = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=200, n_embd=16, n_layer=1, n_head=2, n_positions=64, bos_token_id=0, eos_token_id=0
        )
    ).eval()
    message = refused("`tokenizer`.*299.*200", model=small)
    assert is_one_clear_sentence(message) and "belongs to the model" in message


def test_nothing_to_train(refused, tiny):
    model = tiny.copy().requires_grad_(False)
    assert is_one_clear_sentence(refused("`model`.*trainable", model=model))


@pytest.mark.parametrize(
    "embedder",
    [
        lambda texts: np.zeros((1, 2)),
        lambda texts: np.zeros(len(texts)),
        lambda texts: np.full((len(texts), 2), NAN),
    ],
)
def test_embedders_that_give_nonsense(refused, embedder):
    assert is_one_clear_sentence(refused("`embedder`", embedder=embedder))


# ---- numbers ----


@pytest.mark.parametrize(
    "name, values",
    [
        *((name, [-0.1, NAN, INF, "1", None, True]) for name in ("alpha", "beta")),
        ("learning_rate", [-0.1, NAN, INF, "1", True]),
        ("n_neighbors", [0, -1, 1.5, NAN, "1", True, np.bool_(True), np.float32(1)]),
        ("max_grad_norm", [0, 0.0, -0.1, NAN, INF, "1", True]),
        ("max_overlap", [-0.1, 1.1, NAN]),
        *(
            (name, [0, -1, 1.5, NAN, "1", None, True, np.bool_(True), np.float32(1)])
            for name in ("batch_size", "max_epochs", "el_n", "num_beams", "eval_batch_size")
        ),
        *((name, [0, -1, 1.5, NAN, "1"]) for name in ("max_length", "el_start", "check_steps")),
        ("seed", [-1, 0.5, None, True, 2**32]),
        ("precision", ["no", "fp8", 16]),
        ("stop", ["never", None]),
    ],
)
def test_impossible_settings(name, values):
    for value in values:
        with pytest.raises(InputError, match=f"`{name}`") as caught:
            ICUConfig(**{name: value})
        assert is_one_clear_sentence(str(caught.value))


def test_numbers_of_numpy_are_plain_numbers(tiny):
    """They are accepted wherever a number is, and stored as what JSON can hold."""
    config = ICUConfig(
        alpha=np.float32(0.5), seed=np.int64(3), batch_size=np.uint8(4), el_start=np.int32(7), max_grad_norm=1
    )
    assert json.loads(json.dumps(asdict(config))) == asdict(config) == asdict(replace(config))
    assert [type(getattr(config, name)) for name in ("alpha", "seed", "batch_size")] == [float, int, int]
    assert hash(config) == hash(replace(config, alpha=0.5, seed=3))
    thresholds = Thresholds(ma=np.float32(0.25), el=np.float64(0.5))
    assert json.loads(json.dumps(asdict(thresholds))) == asdict(thresholds)
    seed_everything(np.int64(3))
    ids = tiny.sequences.input_ids
    theirs = extraction_likelihood(tiny.model, ids, n=np.int64(5), start=np.int64(20), batch_size=np.int64(3))
    assert torch.equal(theirs, extraction_likelihood(tiny.model, ids, n=5, start=20, batch_size=3))


def test_no_clipping_is_none():
    assert ICUConfig.paper().max_grad_norm is None


@pytest.mark.parametrize("name", ["bleu", "bert_f1", "ma", "el"])
@pytest.mark.parametrize("value", [-0.1, NAN, 1.5])
def test_impossible_thresholds(name, value):
    with pytest.raises(InputError, match=f"`{name}`") as caught:
        Thresholds(**{name: value})
    assert is_one_clear_sentence(str(caught.value))


@pytest.mark.parametrize("start", [39, 47, 48, 1000])
def test_a_start_that_leaves_no_room(refused, tiny, start):
    message = refused("`el_start`.*10-gram", config=tiny.config(el_start=start))
    assert is_one_clear_sentence(message) and "smaller el_start or el_n" in message


def test_the_last_possible_start(tiny):
    assert extraction_likelihood(tiny.model, tiny.sequences.input_ids, start=38).shape == (8,)


@pytest.mark.parametrize("n", [13, 100])
def test_an_n_that_leaves_no_room(refused, tiny, n):
    assert "smaller el_n" in refused(f"`forget`.*4n = {4 * n}", config=tiny.config(el_n=n))


@pytest.mark.parametrize(
    "start, n, argument",
    [
        (0, 10, "start"),
        (-3, 10, "start"),
        (39, 10, "start"),
        (1.5, 10, "start"),
        (None, 0, "n"),
        (None, -1, "n"),
        (None, 2.5, "n"),
        (None, 13, "input_ids"),
    ],
)
def test_metrics_refuse_too(tiny, start, n, argument):
    with pytest.raises(InputError, match=f"`{argument}`"):
        extraction_likelihood(tiny.model, tiny.sequences.input_ids, n=n, start=start)


@pytest.mark.parametrize("texts", [[], ["fine", ""], "text", ["Too short."]])
def test_calibration_names_its_argument(tiny, texts):
    with pytest.raises(InputError, match="`heldout`"):
        calibrate_thresholds(tiny.model, tiny.tokenizer, texts, max_length=48)


# ---- names, files, the network ----


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: load_corpus("enron"), "`dataset`.*people.*pile"),
        (lambda: load_corpus("texts.csv"), "`dataset`.*texts.csv"),
        (lambda: pile_extraction(5), "`run`.*0, 1, 2, 3 or 4"),
        (lambda: pile_extraction(0, "no/such/folder"), "`data_dir`.*existing folder"),
    ],
)
def test_unknown_names(call, words):
    with pytest.raises(InputError, match=words) as caught:
        call()
    assert is_one_clear_sentence(str(caught.value))


def test_a_download_that_is_another_file(tmp_path):
    (tmp_path / "other.npy").write_bytes(b"something else")
    with pytest.raises(DownloadError, match=r"SHA-256.*data_dir"):
        _download((tmp_path / "other.npy").as_uri(), "ab" * 32, tmp_path / "cache" / "file.npy")


@pytest.fixture
def offline(monkeypatch):
    """As without a network; the Hub's client says so at once instead of trying again for a minute."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def test_a_hub_model_without_a_network(offline):
    with pytest.raises(InputError, match=r"`model`.*nobody/no-such-model.*network") as caught:
        load_model("nobody/no-such-model")
    assert is_one_clear_sentence(str(caught.value).replace("\n", " ")[:399])


def test_a_folder_that_holds_no_model(cache):
    with pytest.raises(InputError, match=r"`model`.*save_pretrained"):
        load_model(cache)


@pytest.mark.parametrize("argument", ["encoder", "embedder"])
def test_a_hub_encoder_without_a_network(offline, refused, argument):
    if argument == "embedder":
        pytest.importorskip("sentence_transformers")
    assert "network" in refused(
        f"`{argument}`.*nobody/no-such-encoder", **{argument: "nobody/no-such-encoder"}
    )


def test_a_sentence_encoder_without_its_library(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "sentence_transformers", None)
    with pytest.raises(InputError, match=r"`embedder`.*pip install"):
        sentence_embedder("all-MiniLM-L6-v2")


# ---- in training ----


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_a_loss_that_is_no_number(tiny, bad):
    """It stops with the epoch and the batch, and gives back the state before that step."""
    model, good, calls = tiny.copy(), {}, []

    def objective(model, batch, reference):
        calls.append(1)
        terms = ICU()(model, batch, reference)
        if len(calls) == 4:
            good.update(tiny.weights(model))
            terms["l_kl"] = terms["l_kl"] + bad
        return terms

    with pytest.warns(UserWarning, match="epoch 2: the loss is .* in batch 2.*smaller learning_rate"):
        result = unlearn(
            model,
            tiny.tokenizer,
            tiny.forget,
            tiny.retain,
            tiny.config(max_epochs=5),
            objective=objective,
            refinement=None,
            thresholds=NEVER,
        )
    assert result.stop_reason == "non_finite_loss" and len(calls) == 4
    assert tiny.same(model, good) and not tiny.same(model, tiny.weights(tiny.model))


def test_a_model_that_is_broken_already(tiny):
    model = tiny.copy()
    with torch.no_grad():
        model.transformer.ln_f.weight[0] = NAN
    with pytest.raises(InputError, match=r"`embedder`|`model`"):
        unlearn(model, tiny.tokenizer, tiny.forget, tiny.retain, tiny.config())


def test_processes_that_do_not_know_of_each_other(refused, monkeypatch):
    """Each would take itself for the first, and all would write the same files."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    refused("`WORLD_SIZE`: 2 processes .* knows of 1.*ACCELERATE_USE_CPU")


def test_heldout_texts_too_long_for_the_model(tiny):
    with pytest.raises(InputError, match=r"`heldout`: texts \[0\] are longer"):
        calibrate_thresholds(tiny.model, tiny.tokenizer, [" ".join(tiny.heldout[:3])])
