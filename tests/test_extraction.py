"""Extraction: strength, near misses, prompts, samples and secrets."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from icu_nb.data.people import people
from icu_nb.errors import InputError
from icu_nb.evals.extraction import (
    PROMPTS,
    _attack_prompts,
    _longest_common_substring,
    _similarity,
    _strength,
    best_of,
    extract,
    extract_secrets,
    extraction_strength,
    secret_prompts,
)
from icu_nb.evals.people_questions import find_facts
from icu_nb.language_model import generate_continuations
from icu_nb.metrics import memorization_accuracy
from icu_nb.text import pad, prompt_suffix, tokenize

words = st.text(alphabet="abc", max_size=12)


def letters(word):
    return [ord(letter) for letter in word]


@given(st.lists(st.booleans(), min_size=1, max_size=20))
def test_strength_is_its_definition(hits):
    k = next(k for k in range(len(hits) + 1) if all(hits[k:]))
    assert _strength(np.array(hits)) == pytest.approx(1 - k / len(hits))


def test_extraction_strength_against_the_logits(tiny):
    sequences = tiny.sequences
    with torch.no_grad():
        greedy = tiny.model(**sequences.inputs).logits.argmax(-1)[:, :-1]
    for score, row, tokens in zip(
        extraction_strength(tiny.model, sequences, batch_size=3),
        greedy.tolist(),
        sequences.tokens(),
        strict=False,
    ):
        run = 0
        while run < len(tokens) - 1 and row[len(tokens) - 2 - run] == tokens[len(tokens) - 1 - run]:
            run += 1
        assert score == pytest.approx(run / (len(tokens) - 1))


def test_extraction_strength_is_at_most_ma(tiny):
    sequences = tiny.sequences
    assert (
        extraction_strength(tiny.model, sequences) <= memorization_accuracy(tiny.model, sequences) + 1e-12
    ).all()


def test_padding_on_the_left_changes_nothing(tiny):
    sequences = tiny.sequences
    tokens = sequences.tokens()
    width = max(map(len, tokens)) + 3
    ids = torch.tensor([[1] * (width - len(row)) + row for row in tokens])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in tokens])
    assert torch.equal(extraction_strength(tiny.model, ids, mask), extraction_strength(tiny.model, sequences))


def levenshtein(a, b):
    """By its recursive definition."""
    if not a or not b:
        return len(a) + len(b)
    return min(
        levenshtein(a[1:], b) + 1, levenshtein(a, b[1:]) + 1, levenshtein(a[1:], b[1:]) + (a[0] != b[0])
    )


@settings(max_examples=60)
@given(st.text("abc", max_size=6), st.text("abc", min_size=1, max_size=6))
def test_edit_similarity_is_its_definition(a, b):
    assert _similarity([letters(a)], [letters(b)]).edit[0] == pytest.approx(
        1 - levenshtein(a, b) / max(len(a), len(b))
    )


@given(words, words)
def test_longest_common_substring_by_trying_all(a, b):
    pieces = {a[i:j] for i in range(len(a)) for j in range(i, len(a) + 1)}
    assert _longest_common_substring(letters(a), letters(b)) == max(
        (len(piece) for piece in pieces if piece in b), default=0
    )


def test_a_frequent_token_is_no_junk():
    """difflib leaves frequent elements of long sequences out unless told otherwise."""
    assert _longest_common_substring([7] * 300, [7] * 300) == 300


def test_similarity_of_known_pairs():
    table = _similarity([[1, 2, 3, 4], [1, 2, 9, 4]], [[1, 2, 3, 4], [1, 2, 3, 4]])
    assert (
        table.verbatim.tolist() == [1, 0]
        and table.substring.tolist() == [1, 0.5]
        and table.edit.tolist() == [1, 0.75]
    )


def test_the_window_is_iurs_prompt(tiny):
    prompts, targets, gaps = _attack_prompts(tiny.sequences)
    assert (prompts, targets) == prompt_suffix(tiny.sequences) and set(gaps) == {0}


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("length", [8, 9, 10, 11, 96, 97])
def test_prompt_gap_and_target_follow_one_another(prompt, length):
    tokens = list(range(length))
    (shown,), (wanted,), (gap,) = _attack_prompts(pad([tokens]), prompt)
    assert shown and wanted and shown[-1] + 1 + gap == wanted[0] and wanted[-1] == length - 1


def test_unknown_prompt_lists_the_known_and_short_texts_are_refused(tiny):
    with pytest.raises(InputError, match="whole prefix, window, shortened, shifted"):
        extract(tiny.model, tiny.tokenizer, tiny.sequences, "backwards")
    with pytest.raises(InputError, match="fewer than 8 tokens"):
        extract(tiny.model, tiny.tokenizer, pad([[1, 2, 3]]))


def test_greedy_extraction_one_by_one(tiny):
    table = extract(tiny.model, tiny.tokenizer, tiny.sequences, "shifted", batch_size=3)
    prompts, targets, gaps = _attack_prompts(tiny.sequences, "shifted")
    for i, (prompt, target, gap) in enumerate(zip(prompts, targets, gaps, strict=False)):
        (said,) = generate_continuations(tiny.model, [prompt], [gap + len(target)], num_beams=1)
        assert table.continuation[i] == tiny.tokenizer.decode(said[gap:]) and table.verbatim[i] == (
            said[gap:] == target
        )


def test_memorized_texts_come_out(tiny):
    assert extract(tiny.model, tiny.tokenizer, tiny.sequences, "whole prefix").substring.mean() > 0.8
    unseen = tokenize(tiny.heldout, tiny.tokenizer, 48)
    assert extract(tiny.model, tiny.tokenizer, unseen, "whole prefix").substring.mean() < 0.5


def test_samples_follow_the_seed_alone(tiny):
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first = extract(tiny.model, tiny.tokenizer, tiny.sequences, samples=3, seed=1)
    assert torch.rand(1) == expected  # the caller's generator is where it was
    assert first.equals(extract(tiny.model, tiny.tokenizer, tiny.sequences, samples=3, seed=1))
    assert not first.equals(extract(tiny.model, tiny.tokenizer, tiny.sequences, samples=3, seed=2))
    assert first.groupby("id").size().tolist() == [3] * 8
    best = best_of(first, "edit")
    assert best[3].tolist() == first.groupby("id").edit.max().tolist() and (
        best.diff(axis=1).iloc[:, 1:] >= 0
    ).all(axis=None)


def test_records_are_read_back():
    for text in people(60, seed=5):
        facts = find_facts(text).groupdict()
        (own,) = secret_prompts([text], paraphrase=False)
        (other,) = secret_prompts([text])
        assert own[0] + own[1] in text and facts["phone"] == own[1].strip() == other[1].strip()
        assert facts["name"] in other[0] and facts["phone"] not in other[0] and not text.startswith(other[0])


def test_secret_prompts_need_records_and_a_known_field():
    with pytest.raises(InputError, match=r"`record`.*templates"):
        secret_prompts([people(1)[0], "hello"])
    with pytest.raises(InputError, match="Known: name"):
        secret_prompts(people(1), "shoe size")


def test_extract_secrets_cuts_a_long_prompt_and_knows_a_secret(tiny):
    text = tiny.tokenizer.decode(tiny.sequences.tokens()[0])
    prompt, secret = text[: len(text) // 2].rstrip(), text[len(text) // 2 :][:6]
    table = extract_secrets(tiny.model, tiny.tokenizer, [(prompt, secret), (prompt * 20, secret)])
    assert len(table) == 2 and table.substring.between(0, 1).all()
