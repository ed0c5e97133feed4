"""Prompts are read and answers count; a tokenizer's habits do not matter, and it stays as it is."""

import itertools

import pytest
import torch
from tokenizers import ByteLevelBPETokenizer, Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from icu_nb.data.people import people
from icu_nb.errors import InputError
from icu_nb.iur import calibrate_thresholds
from icu_nb.metrics import extraction_likelihood, memorization_accuracy, memorization_scores, perplexity
from icu_nb.text import el_positions, prompt_suffix, special_ends, tokenize

TEXTS = people(24, seed=5)


def trained_bpe():
    bpe = ByteLevelBPETokenizer()
    special = ["<unk>", "<s>", "</s>", "<pad>"]
    bpe.train_from_iterator(TEXTS, vocab_size=400, special_tokens=special, show_progress=False)
    return bpe._tokenizer


BPE = trained_bpe().to_str()
HABITS = {"plain": "$A", "bos": "<s> $A", "eos": "$A </s>", "both": "<s> $A </s>"}


def tokenizer_with(habit, **settings):
    """A fast tokenizer that adds BOS, EOS or both, as those of Llama and T5 do."""
    backend = Tokenizer.from_str(BPE)
    ends = [(name, backend.token_to_id(name)) for name in ("<s>", "</s>")]
    backend.post_processor = TemplateProcessing(single=HABITS[habit], special_tokens=ends)
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names, **settings)


def tiny_llama(seed=0, vocab_size=400):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=256,
    )
    return LlamaForCausalLM(config).eval()


def overfit(model, rows, steps):
    """A model that has learned some of these rows, so that no measure is 0 or 1."""
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(steps):
        for row in rows:
            ids = row[None]
            loss = model(input_ids=ids, labels=ids).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.double()


@pytest.fixture(scope="module")
def learned():
    """Llama in float64 with the sequences that it half knows."""
    sequences = tokenize(TEXTS[:6], tokenizer_with("bos"), 60)
    return overfit(tiny_llama(), sequences.rows, 12), sequences


# ---- a tokenizer's habits ----


@pytest.mark.parametrize("habit", HABITS)
@pytest.mark.parametrize("sides", [*itertools.product(("left", "right"), repeat=2)])
def test_texts_are_cut_at_their_end_whatever_the_tokenizer_does(habit, sides):
    tokenizer = tokenizer_with(habit, truncation_side=sides[0], padding_side=sides[1])
    front, back = special_ends(tokenizer)
    assert [front, back] == [[1] * ("<s>" in HABITS[habit]), [2] * ("</s>" in HABITS[habit])]
    whole = tokenize(TEXTS, tokenizer)
    plain = tokenize(TEXTS, tokenizer_with("plain"))
    assert whole.tokens() == [front + row + back for row in plain.tokens()]
    cut = tokenize(TEXTS, tokenizer, 20)
    assert cut.tokens() == [row[:20] for row in whole.tokens()]  # the end goes, and EOS with it
    assert tokenize(TEXTS, tokenizer, special_tokens="front").tokens() == [
        front + row for row in plain.tokens()
    ]
    assert tokenize(TEXTS, tokenizer, special_tokens="none").tokens() == plain.tokens()


STATES = {
    "as made": {},
    "truncation": {
        "truncation": {"max_length": 7, "stride": 0, "strategy": "longest_first", "direction": "left"}
    },
    "padding": {"padding": {"direction": "left", "pad_id": 3, "pad_token": "<pad>", "length": 9}},
}


@pytest.mark.parametrize("state", STATES)
def test_the_tokenizer_stays_as_it_was_given(state, tmp_path, learned):
    """A call with truncation=True sets it for good, and it would be saved along."""
    tokenizer = tokenizer_with("bos")
    backend = tokenizer.backend_tokenizer
    if "truncation" in STATES[state]:
        backend.enable_truncation(**STATES[state]["truncation"])
    if "padding" in STATES[state]:
        backend.enable_padding(**STATES[state]["padding"])
    tokenizer.save_pretrained(tmp_path / "given")
    model, _ = learned
    tokenize(TEXTS, tokenizer, 20)
    calibrate_thresholds(model, tokenizer, TEXTS[:4], max_length=48, el_n=4)
    perplexity(model, tokenizer, TEXTS[:4], max_length=32)
    tokenizer.save_pretrained(tmp_path / "used")
    given, used = (
        (tmp_path / name / "tokenizer.json").read_text(encoding="utf-8") for name in ("given", "used")
    )
    assert used == given
    assert tokenize(TEXTS, tokenizer).tokens() == tokenize(TEXTS, tokenizer_with("bos")).tokens()


def test_the_prompt_begins_as_the_model_was_trained():
    """A prompt from the middle of a text keeps BOS in front where texts have it."""
    for habit in HABITS:
        tokenizer = tokenizer_with(habit)
        sequences = tokenize(TEXTS[:3], tokenizer, 40)
        front, _ = special_ends(tokenizer)
        prompts, suffixes = prompt_suffix(sequences, tokenizer)
        assert prompts == [front + row[20:30] for row in sequences.tokens()]
        assert suffixes == [row[30:] for row in sequences.tokens()]
        assert prompt_suffix(sequences)[0] == [row[20:30] for row in sequences.tokens()]


# ---- metrics on the answer alone ----


def slow_scores(model, row, prompt, n, start):
    """MA and EL_n of one answer by their definitions, one call per token."""
    tokens = row.tolist()

    @torch.no_grad()
    def greedy(prefix):
        return int(model(input_ids=torch.tensor([prefix])).logits[0, -1].argmax())

    hits = [greedy(tokens[:t]) == tokens[t] for t in range(max(prompt, 1), len(tokens))]
    overlaps = []
    for i in range(prompt + (start or 0), len(tokens) - n + 1):
        said = tokens[:i]
        while len(said) < len(tokens):
            said = [*said, greedy(said)]
        grams = [said[k : k + n] for k in range(i, len(said) - n + 1)]
        truth = [tokens[k : k + n] for k in range(i, len(tokens) - n + 1)]
        overlaps.append(sum(gram in truth for gram in grams) / len(grams))
    return sum(hits) / len(hits), sum(overlaps) / len(overlaps)


@pytest.mark.parametrize("start", [None, 3])
def test_metrics_of_answers_equal_the_slow_definition(learned, start):
    model, sequences = learned
    prompts = torch.tensor([40, 31, 20, 45, 1, 12])
    expected = torch.tensor(
        [
            slow_scores(model, row, prompt, 4, start)
            for row, prompt in zip(sequences.rows, prompts.tolist(), strict=True)
        ],
        dtype=torch.float64,
    ).T
    assert (expected[0] > 0).any() and (expected[0] < 1).any() and expected[1].unique().numel() > 2
    found = memorization_scores(
        model, **sequences.inputs, prompt_lengths=prompts, n=4, start=start, batch_size=4
    )
    assert torch.allclose(torch.stack(found), expected, rtol=0, atol=1e-9)
    marked = type(sequences)(sequences.rows, prompts.tolist())
    assert torch.equal(memorization_accuracy(model, marked), found[0])  # the sequences say it themselves
    likelihood = extraction_likelihood(model, **sequences.inputs, prompt_lengths=prompts, n=4, start=start)
    assert torch.equal(likelihood, found[1])


def test_answers_must_hold_an_n_gram():
    assert el_positions([30, 30], 5, prompt_lengths=[0, 25]) == [22, 25]
    assert el_positions([30, 30], 5, 2, prompt_lengths=[0, 22]) == [2, 24]
    with pytest.raises(InputError, match=r"^`forget`: the answers of \[1\] have fewer than n = 5 tokens"):
        el_positions([30, 30], 5, argument="forget", prompt_lengths=[0, 26])
    with pytest.raises(InputError, match=r"^`el_start`: no 5-gram fits behind position 2 in sequences \[1\]"):
        el_positions([30, 30], 5, 2, prefix="el_", prompt_lengths=[0, 24])
