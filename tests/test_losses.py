"""KUI's and CLE's losses against few-line formulas, neighbors against brute force, and the original model."""

import copy
import math
import zlib

import numpy as np
import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

from icu_nb.batch import Term
from icu_nb.cle import kl_loss, nearest_neighbors, neighbor_terms, pair_learning_loss
from icu_nb.embedding import model_embedder, second_half, sentence_embedder
from icu_nb.errors import InputError
from icu_nb.kui import forget_terms, unlearning_loss
from icu_nb.models.head import last_hidden_states
from icu_nb.models.tiny import train_tokenizer
from icu_nb.reference import OriginalModel
from icu_nb.text import containment, pad, real_tokens, tokenize, word_ngrams

V = 17  # vocabulary of the random cases


# ---- the three losses ----


def masks(side, lengths, width):
    """One row of ones per length, the padding on the given side."""
    rows = torch.zeros(len(lengths), width, dtype=torch.long)
    for row, length in zip(rows, lengths, strict=False):
        row[(slice(0, length) if side == "right" else slice(width - length, None))] = 1
    return rows


def log_probabilities(row):
    """log softmax of one list of logits, in Python's own floats."""
    top = max(row)
    total = math.log(sum(math.exp(x - top) for x in row)) + top
    return [x - total for x in row]


def positions(mask):
    return [
        (b, t) for b in range(len(mask)) for t in range(mask.shape[1] - 1) if mask[b][t] and mask[b][t + 1]
    ]


def slow_nll(logits, ids, mask):
    values = [-log_probabilities(logits[b, t].tolist())[ids[b, t + 1]] for b, t in positions(mask)]
    return sum(values) / len(values) if values else 0.0


def slow_kl(logits, reference, mask):
    total, where = 0.0, positions(mask)
    for b, t in where:
        p, q = log_probabilities(reference[b, t].tolist()), log_probabilities(logits[b, t].tolist())
        total += sum(math.exp(x) * (x - y) for x, y in zip(p, q, strict=False))
    return total / len(where) if where else 0.0


CASES = {  # padding side, real lengths, width
    "no padding": ("right", [7, 7, 7], 7),
    "right": ("right", [7, 4, 2], 7),
    "left": ("left", [7, 4, 2], 7),
    "one row": ("left", [5], 6),
    "one empty row": ("right", [0, 6], 6),
    "a row of one token": ("left", [1, 3], 4),
    "nothing": ("right", [0, 0], 5),
    "one token each": ("right", [1, 1], 3),
}


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def case(request):
    side, lengths, width = request.param
    torch.manual_seed(0)
    shape = (len(lengths), width, V)
    return (
        (3 * torch.randn(shape, dtype=torch.float64)).requires_grad_(),
        3 * torch.randn(shape, dtype=torch.float64),
        torch.randint(V, shape[:2]),
        masks(side, lengths, width),
    )


def test_losses_are_their_formulas(case):
    logits, reference, ids, mask = case
    nll = slow_nll(logits, ids, mask)
    assert pair_learning_loss(logits, ids, mask).item() == pytest.approx(nll, abs=1e-9)
    assert unlearning_loss(logits, ids, mask).item() == pytest.approx(-nll, abs=1e-9)
    assert kl_loss(logits, reference, mask).item() == pytest.approx(
        slow_kl(logits, reference, mask), abs=1e-9
    )


def test_gradients_are_their_formulas(case):
    """d NLL/dz = (q - onehot)/N and d KL/dz = (q - p)/N at the N positions that count, 0 everywhere else."""
    logits, reference, ids, mask = case
    q, p, where = logits.detach().softmax(-1), reference.softmax(-1), positions(mask)
    nll_gradient, kl_gradient = torch.zeros_like(q), torch.zeros_like(q)
    for b, t in where:
        nll_gradient[b, t] = q[b, t] / len(where)
        nll_gradient[b, t, ids[b, t + 1]] -= 1 / len(where)
        kl_gradient[b, t] = (q[b, t] - p[b, t]) / len(where)
    for loss, expected in [
        (pair_learning_loss(logits, ids, mask), nll_gradient),
        (unlearning_loss(logits, ids, mask), -nll_gradient),
        (kl_loss(logits, reference, mask), kl_gradient),
    ]:
        (found,) = torch.autograd.grad(loss, logits)
        assert torch.allclose(found, expected, atol=1e-9, rtol=0)


def test_no_mask_means_all_tokens_are_real():
    torch.manual_seed(1)
    logits, reference, ids = torch.randn(2, 5, V), torch.randn(2, 5, V), torch.randint(V, (2, 5))
    assert pair_learning_loss(logits, ids) == pair_learning_loss(logits, ids, torch.ones_like(ids))
    assert kl_loss(logits, reference) == kl_loss(logits, reference, torch.ones_like(ids))


def test_padding_changes_nothing_whatever_stands_there():
    torch.manual_seed(2)
    logits, reference, ids, mask = (
        torch.randn(2, 6, V),
        torch.randn(2, 6, V),
        torch.randint(V, (2, 6)),
        masks("right", [6, 3], 6),
    )
    other = torch.where(mask[..., None].bool(), logits, torch.tensor(1e4))
    assert unlearning_loss(logits, ids, mask) == unlearning_loss(other, ids * mask, mask)
    assert kl_loss(logits, reference, mask) == kl_loss(other, reference, mask)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_fp32(dtype):
    torch.manual_seed(3)
    logits, reference, ids = (
        (10 * torch.randn(2, 40, 5000)).to(dtype),
        (10 * torch.randn(2, 40, 5000)).to(dtype),
        torch.randint(5000, (2, 40)),
    )
    for loss, exact in [
        (unlearning_loss(logits, ids), unlearning_loss(logits.double(), ids)),
        (kl_loss(logits, reference), kl_loss(logits.double(), reference.double())),
    ]:
        assert loss.dtype == torch.float32
        assert loss.item() == pytest.approx(exact.item(), rel=1e-5)


def test_kl_is_no_cross_entropy():
    """Error 3: the authors log H(p0, p); it is not 0 for a model that did not change."""
    torch.manual_seed(4)
    logits = torch.randn(2, 6, V, dtype=torch.float64)
    cross_entropy = -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1).mean()
    assert abs(kl_loss(logits, logits)) < 1e-12 and cross_entropy > 1
    assert all(kl_loss(torch.randn_like(logits), logits) > 0 for _ in range(5))


def test_a_step_minimizes_the_losses_of_the_chapters():
    assert forget_terms() == {"l_fgt": Term("forget", unlearning_loss, 1.0)}
    assert neighbor_terms(0.3, 2.0) == {
        "l_lrn": Term("neighbor", pair_learning_loss, 0.3),
        "l_kl": Term("neighbor", kl_loss, 2.0),
    }


# ---- neighbors ----

POOL = [f"record {i}: " + " ".join(f"w{(7 * i + j) % 101}" for j in range(14)) for i in range(60)]
FORGET = [f"person {i}: " + " ".join(f"w{(5 * i + j) % 101}" for j in range(14)) for i in range(9)]


def hashed(texts):
    """Fixed random vectors, one per text."""
    return np.stack([np.random.default_rng(zlib.crc32(t.encode())).normal(size=8) for t in texts])


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("max_overlap", [0.0, 0.5, 1.0])
def test_neighbors_are_those_of_brute_force(k, max_overlap):
    pool = (
        POOL + FORGET[:4] + [t + " and more" for t in FORGET[4:]]
    )  # near-duplicates; the first four are the texts themselves
    distances = ((hashed(FORGET)[:, None] - hashed(pool)[None]) ** 2).sum(-1)
    expected = [
        [j for j in np.argsort(row) if containment(word_ngrams(text), word_ngrams(pool[j])) <= max_overlap][
            :k
        ]
        for text, row in zip(FORGET, distances, strict=False)
    ]
    found = nearest_neighbors(FORGET, pool, embedder=hashed, k=k, max_overlap=max_overlap)
    assert found.shape == (len(FORGET), k) and np.issubdtype(found.dtype, np.integer)
    assert found.tolist() == [[int(j) for j in row] for row in expected]


def test_the_search_goes_as_deep_as_it_must():
    """Hundreds of near-duplicates stand in front of the first usable neighbor."""
    text, other = " ".join(f"a{i}" for i in range(30)), " ".join(f"b{i}" for i in range(30))
    pool = [f"{text} {i}" for i in range(300)] + [other]
    vectors = {**{t: [i / 1000, 0] for i, t in enumerate(pool)}, text: [0, 0], other: [9, 9]}
    assert nearest_neighbors([text], pool, embedder=lambda texts: [vectors[t] for t in texts]).tolist() == [
        [300]
    ]


def test_no_neighbor_but_near_duplicates_is_one_clear_error():
    with pytest.raises(InputError, match=r"`retain`.*forget texts \[1\].*raise max_overlap"):
        nearest_neighbors([POOL[3], FORGET[0]], [FORGET[0], FORGET[0] + " again"], embedder=hashed)


@pytest.mark.parametrize(
    "argument, words",
    [
        ({"forget": []}, "`forget`"),
        ({"retain": []}, "`retain`"),
        ({"forget": ["  "]}, "index"),
        ({"forget": "text"}, "`forget`"),
        ({"k": 0}, "`k`"),
        ({"k": 1.5}, "`k`"),
        ({"k": 61}, "smaller k"),
        ({"max_overlap": -0.1}, "`max_overlap`"),
        ({"max_overlap": float("nan")}, "`max_overlap`"),
        ({"embedder": lambda texts: np.zeros(len(texts))}, "one vector per text"),
        ({"embedder": lambda texts: np.zeros((1, 3))}, "one vector per text"),
        ({"embedder": lambda texts: np.full((len(texts), 3), np.nan)}, "NaN"),
    ],
)
def test_bad_input_is_one_clear_error(argument, words):
    with pytest.raises(InputError, match=words):
        nearest_neighbors(**{**{"forget": FORGET, "retain": POOL, "embedder": hashed}, **argument})


def test_unknown_sentence_encoder_is_one_clear_error(tmp_path, monkeypatch):
    pytest.importorskip("sentence_transformers")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(InputError, match="`embedder`"):
        sentence_embedder(str(tmp_path / "nothing here"))


# ---- embedders and the original model ----

SIZES = {"vocab_size": 300, "hidden_size": 16}


def tiny(kind, seed=0):
    """A tiny random model with weights large enough for distributions far from uniform."""
    torch.manual_seed(seed)
    llama = dict(
        SIZES,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
    )
    build = {
        "gpt_neo": lambda: GPTNeoForCausalLM(
            GPTNeoConfig(
                **SIZES,
                num_layers=2,
                num_heads=2,
                attention_types=[[["global", "local"], 1]],
                window_size=8,
                max_position_embeddings=64,
                bos_token_id=0,
                eos_token_id=0,
            )
        ),
        "gpt2": lambda: GPT2LMHeadModel(
            GPT2Config(
                vocab_size=300, n_embd=16, n_layer=2, n_head=2, n_positions=64, bos_token_id=0, eos_token_id=0
            )
        ),
        "opt": lambda: OPTForCausalLM(
            OPTConfig(
                **SIZES,
                ffn_dim=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                max_position_embeddings=64,
                word_embed_proj_dim=8,
            )
        ),
        "llama": lambda: LlamaForCausalLM(LlamaConfig(**llama)),
        "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**llama, head_dim=8, final_logit_softcapping=1.0)),
    }
    model = build[kind]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(10)
    return model


def sequences(n=6):
    return pad([torch.randint(2, 300, (length,)).tolist() for length in range(20 - n, 20)])


@pytest.mark.parametrize("kind", ["gpt_neo", "gpt2", "opt", "llama", "gemma2"])
def test_the_original_is_remembered_exactly(kind):
    model, texts = tiny(kind), sequences()
    assert model.get_output_embeddings() is not None
    with torch.no_grad():
        before = model(**texts.inputs).logits
    original = OriginalModel(model, {"neighbor": texts}, batch_size=len(texts))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        assert not torch.allclose(model(**texts.inputs).logits, before, atol=0.1)
    real = texts.attention_mask.bool()  # nothing is kept about padding
    assert torch.equal(original.logits("neighbor", torch.arange(len(texts)))[real], before[real])
    rows = torch.tensor([4, 1, 4])
    again, real = original.logits("neighbor", rows), texts[rows].attention_mask.bool()
    wanted = before[rows][:, : real.shape[1]]
    assert torch.allclose(again[real], wanted[real], atol=1e-5, rtol=1e-5) and not again.requires_grad
    assert (original.whole is None) == (kind != "gemma2")


def test_a_tied_head_must_be_copied():
    model, texts = tiny("gpt2"), sequences()
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    original = OriginalModel(model, {"neighbor": texts})
    assert original.head.weight.data_ptr() != model.get_output_embeddings().weight.data_ptr()
    assert not any(p.requires_grad for p in original.head.parameters())
    assert all(p.requires_grad for p in model.parameters())


def test_the_original_costs_hidden_states_and_a_head():
    model, texts = tiny("gpt_neo"), sequences()
    original = OriginalModel(model, {"forget": texts, "neighbor": texts[:2], "none": texts[:0]}, batch_size=4)
    assert original.hidden("forget", torch.arange(6)).shape == (6, texts.input_ids.shape[1], 16)
    assert original.hidden("neighbor", torch.tensor([1])).shape[0] == 1 and original.whole is None


def test_hidden_states_leave_no_hook_behind():
    model, texts = tiny("llama"), sequences()
    last_hidden_states(model, texts)
    with pytest.raises(IndexError):
        last_hidden_states(model, real_tokens(texts.input_ids + 10**6, texts.attention_mask))
    assert len(model.get_output_embeddings()._forward_pre_hooks) == 0


def test_the_model_embeds_each_text_alone():
    tokenizer = train_tokenizer(POOL + FORGET, vocab_size=300)
    model = copy.deepcopy(tiny("gpt_neo"))
    embed = model_embedder(model, tokenizer, batch_size=4)
    texts = ["record 1", "person 2: w3 w4 w5 w6", "w9"]
    together = embed(texts)
    assert together.shape == (3, 16) and np.allclose(np.linalg.norm(together, axis=1), 1, atol=1e-6)
    assert np.allclose(together, np.concatenate([embed([t]) for t in texts]), atol=1e-5)
    one = tokenize(texts[:1], tokenizer)
    with torch.no_grad():
        states = model(**one.inputs, output_hidden_states=True).hidden_states[-1][0]
    mean = states.mean(0)
    assert np.allclose(together[0], mean / mean.norm(), atol=1e-5)


def test_second_half_shows_the_embedder_the_second_half():
    tokenizer = train_tokenizer(POOL + FORGET, vocab_size=300)
    seen = []
    second_half(lambda texts: seen.extend(texts), tokenizer)(POOL[:3])
    for text, half in zip(POOL, seen, strict=False):
        tokens = tokenizer(text)["input_ids"]
        assert half == tokenizer.decode(tokens[len(tokens) // 2 :]) and text.endswith(half)
