"""MA and EL against the slow definition on several model families; text scores against few-line formulas."""

import functools
import math
import random
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedTokenizerFast,
)

from icu_nb.errors import InputError
from icu_nb.metrics import (
    extraction_likelihood,
    memorization_accuracy,
    memorization_scores,
    perplexity,
)
from icu_nb.models.rollouts import needed_rollouts
from icu_nb.text import el_positions, pad
from icu_nb.text_scores import BERTScorer, distinct_n, sentence_bleu, token_entropy

VOCAB, CONTEXT = 29, 16
LENGTHS = [16, 11, 16, 8]  # two as long as the context
SPECIAL = {"vocab_size": VOCAB, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
LLAMA = dict(
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
    intermediate_size=32,
    max_position_embeddings=CONTEXT,
    **SPECIAL,
)
FAMILIES = {
    "gpt_neo": lambda: GPTNeoForCausalLM(
        GPTNeoConfig(
            max_position_embeddings=CONTEXT,
            hidden_size=16,
            num_layers=2,
            num_heads=2,
            attention_types=[[["global", "local"], 1]],
            window_size=5,
            **SPECIAL,
        )
    ),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(n_positions=CONTEXT, n_embd=16, n_layer=2, n_head=2, **SPECIAL)
    ),  # dropout stays at 0.1
    "opt": lambda: OPTForCausalLM(
        OPTConfig(
            max_position_embeddings=CONTEXT,
            hidden_size=16,
            word_embed_proj_dim=16,
            ffn_dim=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            vocab_size=VOCAB,
            bos_token_id=2,
            eos_token_id=2,
            pad_token_id=1,
        )
    ),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**LLAMA)),
    "gpt_neox": lambda: GPTNeoXForCausalLM(
        GPTNeoXConfig(
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=CONTEXT,
            **SPECIAL,
        )
    ),
    "mistral": lambda: MistralForCausalLM(
        MistralConfig(sliding_window=5, **LLAMA)
    ),  # its own cache drops slots
}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Two threads gain nothing on models this small, and much is lost on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def rows_of(lengths, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCAB, (length,), generator=generator).tolist() for length in lengths]


def overfit(model, rows, steps=18):
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(steps):
        loss = torch.stack(
            [model(input_ids=torch.tensor([row]), labels=torch.tensor([row])).loss for row in rows]
        ).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


@functools.cache
def make_model(family, state):
    torch.manual_seed(0)
    model = FAMILIES[family]().double().eval()
    return overfit(model, rows_of(LENGTHS)) if state == "half memorized" else model


def ngrams(tokens, n):
    return [tuple(tokens[k : k + n]) for k in range(len(tokens) - n + 1)]


@torch.no_grad()
def slow_scores(model, row, n, start):
    """MA and EL_n word for word: one call per token, one greedy continuation per offset."""

    @functools.cache
    def next_token(prefix):
        return model(input_ids=torch.tensor([prefix])).logits[0, -1].argmax().item()

    T = len(row)
    ma = sum(next_token(tuple(row[:t])) == row[t] for t in range(1, T)) / (T - 1)
    first, total = 3 * T // 4 if start is None else start, 0
    for i in range(first, T - n + 1):
        continuation = list(row[:i])
        while len(continuation) < T:
            continuation.append(next_token(tuple(continuation)))
        truth = ngrams(row[i:], n)
        total += sum(gram in truth for gram in ngrams(continuation[i:], n)) / (T - i - n + 1)
    return ma, total / (T - first - (n - 1))


def on_the_left(batch):
    order = batch.attention_mask.argsort(dim=1, stable=True)  # the padding's zeros come first
    return batch.input_ids.gather(1, order), batch.attention_mask.gather(1, order)


@pytest.mark.filterwarnings("ignore:.*has no cache that can be copied")
@pytest.mark.parametrize("n, start", [(2, None), (3, 1)])
@pytest.mark.parametrize("state", ["random", "half memorized"])
@pytest.mark.parametrize("family", FAMILIES)
def test_equal_to_the_slow_definition(family, state, n, start):
    model, rows = make_model(family, state), rows_of(LENGTHS)
    batch = pad(rows)
    slow = torch.tensor([slow_scores(model, row, n, start) for row in rows], dtype=torch.float64)
    if state == "half memorized":  # else there is nothing to see
        assert 0.1 < slow[:, 0].mean() < 0.97 and slow[:, 1].mean() > 0.1
    for ids, mask in [(batch.input_ids, batch.attention_mask), on_the_left(batch)]:
        for batch_size in (1, 3, 32):
            fast = torch.stack(
                memorization_scores(model, ids, mask, n=n, start=start, batch_size=batch_size), 1
            )
            torch.testing.assert_close(fast, slow, rtol=0, atol=1e-9)
            torch.testing.assert_close(
                memorization_accuracy(model, ids, mask, batch_size=batch_size), slow[:, 0], rtol=0, atol=1e-9
            )
    same_length = extraction_likelihood(model, batch.input_ids[[0, 2]], n=n, start=start)
    torch.testing.assert_close(same_length, slow[[0, 2], 1], rtol=0, atol=1e-9)


def test_one_pass_serves_a_model_that_knows_the_text(monkeypatch):
    """The authors' error 1: 199 and 50 generate calls. Here: one pass when nothing is wrong."""
    rows = rows_of([16, 16])
    torch.manual_seed(0)
    model = overfit(FAMILIES["gpt_neo"]().double(), rows, steps=150)
    memorization_scores(model, torch.tensor(rows), n=3, start=4)  # what is tried out once per model
    calls, forward = [], model.forward
    monkeypatch.setattr(model, "forward", lambda *args, **kwargs: calls.append(1) or forward(*args, **kwargs))
    ma, el = memorization_scores(model, torch.tensor(rows), n=3, start=4)
    assert ma.tolist() == el.tolist() == [1, 1] and len(calls) == 1


def test_needed_rollouts():
    truth, wrong = list(range(20)), [-1] * 20
    assert needed_rollouts(truth, truth, 4, 3) == []
    assert needed_rollouts(truth, wrong, 4, 3) == list(range(4, 18))  # 18 and 19 hold no 3-gram
    assert needed_rollouts(truth, [*truth[:18], -1, -1], 4, 3) == [18]  # met by reciting from 17
    assert needed_rollouts(truth, [*truth[:17], -1, -1, -1], 4, 3) == [
        17
    ]  # 17 is wrong already, so 18 is never met


def test_dropout_is_off_while_measuring_and_the_mode_is_put_back():
    model, ids = make_model("gpt2", "half memorized"), pad(rows_of([16, 16])).input_ids
    expected = memorization_scores(model, ids, n=3)
    model.train()
    try:
        again = [memorization_scores(model, ids, n=3) for _ in range(3)]
        assert model.training and memorization_accuracy(model, ids).requires_grad is False
    finally:
        model.eval()
    assert all(ma.equal(expected[0]) and el.equal(expected[1]) for ma, el in again)


@settings(max_examples=25)
@given(
    st.lists(st.lists(st.integers(3, VOCAB - 1), min_size=8, max_size=CONTEXT), min_size=1, max_size=5),
    st.integers(1, 2),
    st.sampled_from([None, 1, 3]),
    st.integers(1, 6),
    st.randoms(use_true_random=False),
)
def test_properties(rows, n, start, batch_size, shuffler):
    model, batch = make_model("gpt_neo", "half memorized"), pad(rows)
    ma, el = memorization_scores(model, batch.input_ids, batch.attention_mask, n=n, start=start)
    assert len(ma) == len(el) == len(rows) and ((ma >= 0) & (ma <= 1)).all() and ((el >= 0) & (el <= 1)).all()
    order = list(range(len(rows)))
    shuffler.shuffle(order)
    ma2, el2 = memorization_scores(
        model, batch.input_ids[order], batch.attention_mask[order], n=n, start=start, batch_size=batch_size
    )
    assert ma2.equal(ma[order]) and el2.equal(el[order])


class Perfect(torch.nn.Module):
    """Says token + 1 after any token."""

    config, device = type("Config", (), {})(), torch.device("cpu")

    def forward(self, input_ids, attention_mask=None, **kwargs):
        return type(
            "Output",
            (),
            {
                "logits": torch.nn.functional.one_hot((input_ids + 1) % VOCAB, VOCAB).double(),
                "past_key_values": None,
            },
        )()


@settings(max_examples=20)
@given(
    st.lists(st.integers(12, 28), min_size=1, max_size=4), st.sampled_from([None, 1, 2]), st.integers(1, 3)
)
def test_a_perfect_model_scores_one(lengths, start, n):
    batch = pad([[k % VOCAB for k in range(length)] for length in lengths])
    ma, el = memorization_scores(Perfect(), batch.input_ids, batch.attention_mask, n=n, start=start)
    assert (ma == 1).all() and (el == 1).all()


@pytest.mark.parametrize(
    "change, named",
    [
        ({"input_ids": torch.zeros(0, 16, dtype=torch.long)}, "input_ids"),
        ({"input_ids": torch.zeros(16, dtype=torch.long)}, "input_ids"),
        ({"input_ids": torch.zeros(2, CONTEXT + 1, dtype=torch.long)}, "context of 16"),
        ({"attention_mask": torch.ones(2, 15)}, "attention_mask"),
        ({"n": 6}, "input_ids.*fewer than 4n = 24"),
        ({"n": 0}, "n"),
        ({"n": 2.5}, "n"),
        ({"start": 0}, "start"),
        ({"start": -3}, "start"),
        ({"start": 0.5}, "start"),
        ({"start": 14}, "start.*no 3-gram fits"),
    ],
)
def test_bad_input(change, named):
    good = {"input_ids": torch.ones(2, 16, dtype=torch.long), "n": 3}
    with pytest.raises(InputError, match=f"`{named}" if "context" not in named else named):
        extraction_likelihood(make_model("gpt_neo", "random"), **(good | change))


def test_el_positions():
    assert el_positions([200, 40, 41]) == [150, 30, 30] and el_positions([20, 15], n=5, start=7) == [7, 7]
    assert el_positions([10], n=10 - 1, start=1) == [1]


def test_a_sequence_of_one_token_has_no_accuracy():
    batch = pad([[5], [5, 6, 7]])
    assert (
        memorization_accuracy(make_model("gpt_neo", "random"), batch.input_ids, batch.attention_mask)[0] == 0
    )


def bleu4(continuation, truth):
    """Sentence BLEU-4 on words without punctuation: no smoothing, brevity penalty."""
    continuation, truth = continuation.lower().split(), truth.lower().split()
    counts = [(Counter(ngrams(continuation, k)), Counter(ngrams(truth, k))) for k in range(1, 5)]
    hits = [(a & b).total() for a, b in counts]
    if not all(hits):
        return 0.0
    shares = [hit / a.total() for hit, (a, _) in zip(hits, counts, strict=False)]
    return min(1, math.exp(1 - len(truth) / len(continuation))) * math.prod(shares) ** 0.25


@settings(max_examples=200)
@given(
    st.lists(st.sampled_from(["Aa", "b", "c"]), max_size=12),
    st.lists(st.sampled_from(["a", "B", "c"]), min_size=1, max_size=12),
)
def test_bleu(continuation, truth):
    continuation, truth = " ".join(continuation), " ".join(truth)
    expected = bleu4(continuation, truth) if len(truth.split()) >= 4 else math.nan
    assert sentence_bleu([continuation], [truth])[0] == pytest.approx(expected, abs=1e-12, nan_ok=True)


def test_bleu_takes_pairs_only():
    with pytest.raises(ValueError):
        sentence_bleu(["a", "b"], ["a"])


@given(st.lists(st.integers(0, 5), max_size=30), st.integers(1, 3))
def test_entropy_and_distinct(tokens, n):
    p = np.array(list(Counter(tokens).values())) / max(1, len(tokens))
    assert token_entropy(tokens) == pytest.approx(-(p * np.log2(p)).sum(), abs=1e-12)
    assert distinct_n(tokens, n) == (
        len(set(ngrams(tokens, n))) / len(ngrams(tokens, n)) if len(tokens) >= n else 0
    )


@pytest.fixture(scope="module")
def words():
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({f"w{k:02}": k for k in range(VOCAB)}, unk_token="w01"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="w00", eos_token="w00", unk_token="w01"
    )


def test_perplexity_counts_every_token_once(words):
    model, rows = (
        make_model("gpt2", "random"),
        rows_of([3, 20, 9, 30]),
    )  # the last one is cut to the model's context
    texts = [" ".join(f"w{token:02}" for token in row) for row in rows]
    nll = []
    with torch.no_grad():
        for row in rows:
            log_p = model(torch.tensor([row[:CONTEXT]])).logits[0].log_softmax(-1)
            nll += [-log_p[t - 1, row[t]].item() for t in range(1, min(len(row), CONTEXT))]
    for batch_size in (1, 2, 8):
        assert perplexity(model, words, texts, batch_size=batch_size) == pytest.approx(
            math.exp(np.mean(nll)), rel=1e-9
        )


def test_perplexity_of_a_ruined_model_is_infinite(words):
    torch.manual_seed(0)
    model = FAMILIES["gpt2"]()
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight * 1e6)
    assert perplexity(model, words, ["w05 w06 w07 w08"]) == math.inf


@pytest.mark.parametrize("texts", [[], [""], ["w03 w04", " "], "w03 w04", [3], ["w03"]])
def test_perplexity_refuses(words, texts):
    with pytest.raises(InputError, match="`texts`"):
        perplexity(make_model("gpt2", "random"), words, texts)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    from tokenizers import BertWordPieceTokenizer

    folder = tmp_path_factory.mktemp("encoder")
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghij"]
    pieces = BertWordPieceTokenizer({name: k for k, name in enumerate(names)})
    PreTrainedTokenizerFast(
        tokenizer_object=pieces._tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    ).save_pretrained(folder)
    torch.manual_seed(0)
    BertModel(
        BertConfig(
            vocab_size=len(names),
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=16,
            initializer_range=0.5,
        )
    ).save_pretrained(folder)
    return str(folder)


def test_bert_score_keeps_pairs_together(encoder):
    """Against the formula, on texts of many lengths: torchmetrics 1.9 mixes up the pairs of such a list."""
    chooser = random.Random(0)
    continuation, truth = (
        [" ".join(chooser.choices("abcdefghij", k=chooser.randint(1, 12))) for _ in range(12)]
        for _ in range(2)
    )
    scorer = BERTScorer(encoder)
    model = BertModel.from_pretrained(encoder).eval()
    names = {name: k for k, name in enumerate("abcdefghij", start=5)}

    @torch.no_grad()
    def vectors(text):
        ids = torch.tensor([[2, *(names[letter] for letter in text.split()), 3]])
        hidden = model(ids).last_hidden_state[0, 1:-1]
        return hidden / hidden.norm(dim=1, keepdim=True)

    expected = []
    for a, b in zip(continuation, truth, strict=False):
        similar = vectors(a) @ vectors(b).T
        precision, recall = similar.max(1).values.mean(), similar.max(0).values.mean()
        expected.append((2 * precision * recall / (precision + recall)).item())
    assert scorer(continuation, truth) == pytest.approx(expected, abs=1e-5)
    assert scorer(continuation[::-1], truth[::-1]) == pytest.approx(expected[::-1], abs=1e-5)
    assert scorer(["a b", "", "a"], ["a b", "c", ""]) == pytest.approx([1, 0, 0], abs=1e-5)
    assert np.isfinite(scorer(["a b " * 40], ["a c"])).all()  # longer than the encoder's context: cut


def test_bert_score_without_an_encoder(tmp_path):
    with pytest.raises(InputError, match="`encoder`"):
        BERTScorer(str(tmp_path / "nothing"))
