"""Batches of like length, halved where they do not fit into memory; how the original model is kept."""

import warnings
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from icu_nb.checkpoint import Progress
from icu_nb.embedding import model_embedder
from icu_nb.errors import ICUError
from icu_nb.evals.dialogue import _reply_losses
from icu_nb.evals.extraction import extraction_strength
from icu_nb.evals.membership import membership_scores
from icu_nb.iur import Thresholds
from icu_nb.language_model import generate_continuations, in_batches
from icu_nb.metrics import extraction_likelihood, memorization_accuracy, memorization_scores, perplexity
from icu_nb.models.head import last_hidden_states
from icu_nb.models.tiny import tiny_gpt_neo
from icu_nb.objective import ICU
from icu_nb.pairs import prepare_task
from icu_nb.plumbing import peak_memory
from icu_nb.reference import OriginalModel
from icu_nb.run import Run
from icu_nb.sampled_pool import sample_pool
from icu_nb.text import pad
from icu_nb.unlearn import unlearn

VOCAB = 37
NO_ROOM = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 8.00 GiB"
MIXED = [44, 5, 61, 8, 9, 40, 12, 96, 7, 50, 43, 6]  # lengths in tokens


def rows_of(lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCAB, (length,), generator=generator).tolist() for length in lengths]


def texts_of(lengths):
    return [" ".join(f"w{token:02}" for token in row) for row in rows_of(lengths)]


@pytest.fixture(scope="module")
def words():
    tokenizer = Tokenizer(models.WordLevel({f"w{k:02}": k for k in range(VOCAB)}, unk_token="w01"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    names = {"pad_token": "w00", "eos_token": "w00", "unk_token": "w01"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


@pytest.fixture
def model():
    model = tiny_gpt_neo(VOCAB, max_length=512, n_layers=2, hidden_size=16, n_heads=2).double().eval()
    memorization_scores(model, pad(rows_of([8])), n=1)  # what is tried out once per model
    generate_continuations(model, rows_of([3, 4]), [1, 1])
    return model


@contextmanager
def watched(model, room=None, error=torch.OutOfMemoryError, message=NO_ROOM):
    """How many tokens each forward pass takes; more than `room` do not fit."""
    passes = []

    def look(module, inputs):
        passes.append(inputs[0].numel())
        if room is not None and passes[-1] > room:
            raise error(message)

    handle = model.get_input_embeddings().register_forward_pre_hook(look)
    try:
        yield passes
    finally:
        handle.remove()


def everything(model, words, lengths):
    """Whatever is measured without training, by name: a call that takes a batch size."""
    rows, texts = pad(rows_of(lengths)), texts_of(lengths)
    prompts = [row[: max(1, len(row) // 2)] for row in rows.tokens()]
    endings = [row[max(1, len(row) // 2) :] for row in rows.tokens()]
    short = [min(3, len(row)) for row in endings]
    places = torch.arange(len(rows))

    def reference(size):
        original = OriginalModel(model, {"neighbor": rows}, size)
        assert original.way == "hidden states"
        return original.hidden("neighbor", places)

    return {
        "MA": lambda size: memorization_accuracy(model, rows, batch_size=size),
        "EL": lambda size: torch.stack(memorization_scores(model, rows, n=1, batch_size=size)),
        "perplexity": lambda size: perplexity(model, words, texts, batch_size=size),
        "windows": lambda size: perplexity(model, words, texts, max_length=20, stride=10, batch_size=size),
        "strength": lambda size: extraction_strength(model, rows, batch_size=size),
        "membership": lambda size: membership_scores(model, words, texts, batch_size=size).to_numpy(float),
        "replies": lambda size: _reply_losses(model, prompts, endings, batch_size=size),
        "embedding": lambda size: model_embedder(model, words, size)(texts),
        "reference": reference,
        "beams": lambda size: generate_continuations(model, prompts, short, batch_size=size),
        "greedy": lambda size: generate_continuations(model, prompts, short, num_beams=1, batch_size=size),
    }


NAMES = [
    *("MA", "EL", "perplexity", "windows", "strength", "membership"),
    *("replies", "embedding", "reference", "beams", "greedy"),
]


def assert_alike(found, wanted):
    if isinstance(wanted, list) and isinstance(wanted[0], list):
        assert found == wanted
    else:
        np.testing.assert_allclose(np.asarray(found), np.asarray(wanted), rtol=1e-6, atol=1e-6)


def test_one_long_text_does_not_pad_all_others(model):
    texts = pad(rows_of([40] * 100 + [480] + [40] * 155))
    with watched(model) as passes:
        together = memorization_accuracy(model, texts)
    assert sum(passes) == 255 * 40 + 480 and len(passes) == 3 and max(passes) <= 32 * 480
    one_by_one = torch.cat([memorization_accuracy(model, texts[[row]]) for row in (0, 99, 100, 101, 255)])
    assert torch.equal(together[[0, 99, 100, 101, 255]], one_by_one)
    with watched(model) as passes:
        memorization_accuracy(model, pad(rows_of([40] * 256)))
    assert passes == [32 * 40] * 8  # the setting is what it was where all are of one length


@pytest.mark.parametrize("name", NAMES)
def test_results_come_back_in_order_and_are_those_of_single_rows(model, words, name):
    measure = everything(model, words, MIXED)[name]
    assert_alike(measure(4), measure(1))


@pytest.mark.parametrize("name", NAMES)
def test_short_rows_do_not_pay_for_long_ones(model, words, name):
    """At most a quarter of what goes through the model is padding."""
    measure = everything(model, words, [20] * 40 + [120])[name]
    with watched(model) as padded:
        measure(8)
    with watched(model) as least:
        measure(1)
    assert sum(padded) <= sum(least) / 0.75 and max(padded) <= 2 * 8 * 120


def test_a_quarter_of_a_batch_is_padding_at_most():
    lengths = np.random.default_rng(0).integers(1, 200, 500).tolist()
    seen = []

    def measure(rows):
        own = [lengths[row] for row in rows]
        seen.append((len(own), max(own), sum(own)))
        return own

    assert in_batches(measure, lengths, 16, torch.nn.Linear(1, 1)) == lengths
    for size, longest, real in seen:
        assert size <= 64 and size * longest <= 16 * max(lengths) and real >= 0.75 * size * longest
    assert [longest for _, longest, _ in seen] == sorted((longest for _, longest, _ in seen), reverse=True)
    assert in_batches(measure, [], 16, torch.nn.Linear(1, 1)) == []


def test_only_the_batch_that_does_not_fit_is_halved_and_the_size_is_remembered(model):
    texts = pad(rows_of([40] * 24 + [10] * 8))
    wanted = memorization_accuracy(model, texts, batch_size=8)
    with watched(model, room=4 * 40) as passes:
        found = memorization_accuracy(model, texts, batch_size=8)
    # one failure; the other batches of 8 are halved before they are tried, the short rows fit as they are
    assert passes == [320] + [160] * 6 + [80] and torch.equal(found, wanted)
    with watched(model, room=4 * 40) as passes:
        again = memorization_accuracy(model, texts, batch_size=8)
    assert passes == [160] * 6 + [80] and torch.equal(again, wanted)
    with watched(model) as passes:  # another use of the model finds its own size
        extraction_strength(model, texts, batch_size=8)
    assert passes == [320] * 3 + [80]


@pytest.mark.parametrize("name", NAMES)
def test_whatever_is_measured_fits_in_the_end(model, words, name):
    measure = everything(model, words, MIXED)[name]
    wanted = measure(8)
    with watched(model, room=100) as passes:
        found = measure(8)
    assert max(passes) > 100
    assert_alike(found, wanted)
    with watched(model, room=100) as passes:
        assert_alike(measure(8), wanted)
    if name != "EL":  # rollouts are parts of a batch
        assert max(passes) <= 100


def test_rollouts_are_halved_too(model):
    """A step of a rollout takes a token per continuation: with room for eight of them, all come out."""
    texts = pad(rows_of([60] * 2))
    wanted = extraction_likelihood(model, texts, n=2, start=3, batch_size=8)
    steps = []

    def look(module, inputs):
        if inputs[0].shape[1] == 1:
            steps.append(len(inputs[0]))
            if steps[-1] > 8:
                raise torch.OutOfMemoryError(NO_ROOM)

    handle = model.get_input_embeddings().register_forward_pre_hook(look)
    with watched(model) as passes:
        found = extraction_likelihood(model, texts, n=2, start=3, batch_size=8)
    handle.remove()
    assert torch.equal(found, wanted) and max(steps) > 8
    assert passes.count(120) == 1  # the text itself was read once


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("error", "message"),
    [
        (torch.OutOfMemoryError, NO_ROOM),
        (RuntimeError, "[enforce fail at alloc_cpu.cpp:124] . DefaultCPUAllocator: can't allocate memory"),
    ],
    ids=["GPU", "CPU"],
)
def test_where_no_single_row_fits_the_error_says_what_to_do(model, words, name, error, message):
    measure = everything(model, words, [40, 96, 40])[name]
    with watched(model, room=2, error=error, message=message), pytest.raises(ICUError) as caught:
        measure(8)
    text = str(caught.value)
    assert text.startswith("`max_length`: ") and "tokens does not fit into memory" in text
    assert message in text and "\n" not in text and "gradient_checkpointing" in text
    assert isinstance(caught.value, torch.OutOfMemoryError)  # programs that catch this one go on doing so


def test_a_pool_is_sampled_in_smaller_batches(model, words):
    starts = sample_pool(model, words, 12, max_length=10, batch_size=16)
    with watched(model, room=4) as passes:
        pool = sample_pool(model, words, 12, max_length=10, batch_size=16)
    assert len(set(pool)) == 12 == len(set(starts)) and max(passes[4:]) <= 4


def test_sampled_continuations_are_those_of_the_given_order(model):
    """Draws depend on what is drawn together: their batches are not rearranged."""
    prompts, lengths = rows_of([9, 3, 12, 5]), [2, 4, 1, 3]
    sampling = {"temperature": 1.0, "top_k": 40}

    def drawn(first, last):
        return generate_continuations(model, prompts[first:last], lengths[first:last], sampling=sampling)

    torch.manual_seed(0)
    apart = drawn(0, 2) + drawn(2, 4)
    torch.manual_seed(0)
    assert generate_continuations(model, prompts, lengths, sampling=sampling, batch_size=2) == apart


# ---- a step that does not fit ----


def begin(tiny, **changes):
    """A run on a copy of the tiny model, ready to take steps."""
    model, config = tiny.copy(), tiny.config(**changes)
    task = prepare_task(model, tiny.tokenizer, tiny.forget, tiny.retain, config)
    return Run(model, task, config, ICU(), Thresholds(), tiny.tokenizer)


def one_step(run):
    with run.ending_well(Progress(np.full(len(run.task.forget), True))):
        return run.step(torch.arange(4), 1)


def test_a_step_that_does_not_fit_is_taken_in_smaller_pieces(tiny):
    whole, pieces = begin(tiny), begin(tiny)
    wanted = one_step(whole)
    width = int(whole.task.forget.lengths.max())
    with (
        watched(pieces.core, room=4 * width) as passes,
        pytest.warns(UserWarning, match="micro_batch_size is 2"),
    ):
        found = one_step(pieces)
    assert (
        len(passes) == 3 and pieces.how()["micro_batch_size"] == 2 and "micro_batch_size" not in whole.how()
    )
    assert found == pytest.approx(wanted, rel=1e-5)
    for name, weight in whole.core.state_dict().items():
        torch.testing.assert_close(pieces.core.state_dict()[name], weight, rtol=0, atol=1e-5)


def test_a_backward_pass_that_does_not_fit_leaves_no_half_gradient(tiny, monkeypatch):
    whole, pieces = begin(tiny), begin(tiny)
    one_step(whole)
    backward, failures = pieces.accelerator.backward, []

    def fails_at_first(loss):
        backward(loss)
        if not failures:
            failures.append(1)
            raise torch.OutOfMemoryError(NO_ROOM)

    monkeypatch.setattr(pieces.accelerator, "backward", fails_at_first)
    with pytest.warns(UserWarning, match="micro_batch_size is 2"):
        one_step(pieces)
    for name, weight in whole.core.state_dict().items():
        torch.testing.assert_close(pieces.core.state_dict()[name], weight, rtol=0, atol=1e-5)


def test_the_history_says_in_which_pieces_a_run_went_on(tiny):
    model, calls = tiny.copy(), []

    def look(module, inputs):
        if torch.is_grad_enabled():
            calls.append(len(inputs[0]))
            if calls[-1] > 4:  # two forget texts and their neighbors
                raise torch.OutOfMemoryError(NO_ROOM)

    model.get_input_embeddings().register_forward_pre_hook(look)
    with pytest.warns(UserWarning, match="micro_batch_size is 2") as warned:
        result = unlearn(
            model, tiny.tokenizer, tiny.forget, tiny.retain, tiny.config(), thresholds=Thresholds(ma=0, el=0)
        )
    assert sum("micro_batch_size" in str(one.message) for one in warned) == 1
    assert calls == [8, *[4] * 8]  # tried once in two epochs of two steps
    assert result.history["micro_batch_size"].tolist()[1:] == [2, 2]
    plain = unlearn(
        tiny.copy(),
        tiny.tokenizer,
        tiny.forget,
        tiny.retain,
        tiny.config(),
        thresholds=Thresholds(ma=0, el=0),
    )
    assert "micro_batch_size" not in plain.history
    np.testing.assert_allclose(plain.history["loss"], result.history["loss"], rtol=1e-4)


@pytest.mark.parametrize("where", ["forward", "optimizer", "other"])
def test_a_step_that_fits_in_no_way_changes_nothing(tiny, monkeypatch, where):
    run = begin(tiny)
    weights = tiny.weights(run.core)
    errors = {"other": RuntimeError("something else")}
    error = errors.get(where, torch.OutOfMemoryError(NO_ROOM))

    def fails(*args, **options):
        raise error

    if where == "optimizer":
        monkeypatch.setattr(run.optimizer, "step", fails)
    else:
        run.core.get_input_embeddings().register_forward_pre_hook(fails)
    messages = {
        "forward": r"`micro_batch_size`: a step .* 1 forget texts .*gradient_checkpointing.*CUDA out of",
        "optimizer": r"`model`: Adam's two numbers .*LoRA.*CUDA out of memory",
        "other": "something else",
    }
    with warnings.catch_warnings(), pytest.raises(Exception, match=messages[where]) as caught:
        warnings.simplefilter("ignore")
        one_step(run)
    assert tiny.same(run.core, weights) and isinstance(caught.value, ICUError) == (where != "other")


# ---- the original model ----


def test_the_smaller_way_is_taken(model):
    texts = pad(rows_of([30] * 20))
    bytes_of_model = sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])
    head, per_token = VOCAB * 16 * 8, 16 * 8
    few = OriginalModel(model, {"neighbor": texts[:1]})
    assert few.way == "hidden states" and few.bytes == 30 * per_token + head < bytes_of_model
    many = pad(rows_of([500] * 60))
    kept = OriginalModel(model, {"neighbor": many})
    assert kept.way == "copy" and kept.bytes == bytes_of_model < 60 * 500 * per_token
    assert str(kept) == f"copy, {bytes_of_model / 1e6:,.1f} MB"
    rows = torch.tensor([59, 3])
    with torch.no_grad():
        before = model(**many[rows].inputs).logits
        for parameter in model.parameters():
            parameter.add_(0.1)
    assert torch.equal(kept.logits("neighbor", rows), before)


def test_a_neighbor_of_several_texts_is_kept_once(model):
    texts = pad([*rows_of([20, 12]), *rows_of([20, 12]), rows_of([20])[0]])
    original = OriginalModel(model, {"neighbor": texts, "forget": texts[:1]})
    assert original.way == "hidden states" and original.bytes == (20 + 12) * 16 * 8 + VOCAB * 16 * 8
    states = original.hidden("neighbor", torch.tensor([0, 2, 4]))
    assert states[0].equal(states[1]) and states[0].equal(states[2])
    assert states[0].equal(original.hidden("forget", torch.tensor([0]))[0])


@pytest.mark.parametrize("way", ["hidden states", "copy"])
def test_the_original_is_never_there_twice(way):
    """Also where the model holds gradients, and its head is its embedding."""
    wide = tiny_gpt_neo(4000, max_length=64, n_layers=2, hidden_size=64, n_heads=2).eval()
    texts = pad(rows_of([60] * 16 if way == "hidden states" else [60] * 256))
    wide(**texts[:2].inputs).logits.sum().backward()
    made = []
    peak = peak_memory(lambda: made.append(OriginalModel(wide, {"neighbor": texts}, 2)))
    batch = peak_memory(lambda: last_hidden_states(wide.requires_grad_(False), texts[:2]))
    assert made[0].way == way and made[0].bytes > 1e6
    assert peak <= made[0].bytes + 1.5 * batch + 1e5
    assert made[0].head.weight.grad is None and not made[0].head.weight.requires_grad


def test_weights_that_never_train_are_shared_with_the_original():
    wide = tiny_gpt_neo(VOCAB, max_length=512, n_layers=2, hidden_size=16, n_heads=2).eval()
    wide.requires_grad_(False)
    wide.transformer.h[1].requires_grad_(True)
    texts = pad(rows_of([500] * 60))
    original = OriginalModel(wide, {"neighbor": texts})
    trains = sum(p.nbytes for p in wide.transformer.h[1].parameters())
    assert original.way == "copy" and original.bytes == trains + sum(b.nbytes for b in wide.buffers())
    rows = torch.tensor([4, 9])
    with torch.no_grad():
        before = wide(**texts[rows].inputs).logits
        for parameter in wide.transformer.h[1].parameters():
            parameter.add_(0.1)
        assert not torch.allclose(wide(**texts[rows].inputs).logits, before)
    assert torch.equal(original.logits("neighbor", rows), before)
    assert all(p.requires_grad for p in wide.transformer.h[1].parameters())
    assert original.head.weight is wide.lm_head.weight
