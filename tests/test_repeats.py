"""Which texts repeat another one, in any language and at any length, and how often each is read."""

import random

import faiss
import numpy as np
import pytest

from icu_nb import text as text_module
from icu_nb.cle import _nearest_allowed, nearest_neighbors
from icu_nb.data.people import people
from icu_nb.errors import InputError
from icu_nb.sampled_pool import sample_pool
from icu_nb.text import Repeats, containment, deduplicate, word_ngrams

ANNA = "Anna Berg, born 1970, lives at Rosenweg 5."
TEXTS = {
    "short": (ANNA, "As we know: Anna Berg, born 1970, lives at Rosenweg 5, in Bonn."),
    "short, full stop": (ANNA, "anna berg born 1970 lives at rosenweg 5 and sings"),
    "two words": ("Hunter2 Swordfish", "The password is hunter2-swordfish, do not tell."),
    "chinese": (
        "张伟生于一九七零年五月三日,现居北京市朝阳区建国路十二号。",
        "据悉,张伟生于一九七零年五月三日,现居北京市朝阳区建国路十二号,是工程师。",
    ),
    "chinese, other width": (
        "张伟，电话１３８００１３８０００，住在北京市朝阳区",
        "联系人张伟,电话13800138000,住在北京市朝阳区。",
    ),
    "japanese": (
        "田中花子は千九百七十年に生まれ、東京都港区芝公園四丁目に住んでいます。",
        "記録によると田中花子は千九百七十年に生まれ、 東京都港区芝公園四丁目に住んでいます。以上",
    ),
    "thai": (
        "นางสาวสมหญิงเกิดเมื่อวันที่ห้าพฤษภาคมและอาศัยอยู่ที่ถนนสุขุมวิทกรุงเทพ",
        "ทราบว่า นางสาวสมหญิง เกิดเมื่อวันที่ห้าพฤษภาคม และอาศัยอยู่ที่ถนนสุขุมวิท กรุงเทพ",
    ),
    "key": (
        "key sk-live-51HcQ9ZtYbV7uKpWmXeRn3TgLq8Jd0",
        "export KEY=sk_live_51HcQ9ZtYbV7uKpWmXeRn3TgLq8Jd0 # key sk-live-51HcQ9ZtYbV7uKpWmXeRn3TgLq8Jd0",
    ),
    "signs": ("🙂🙃🙂🙂", "so 🙂 🙃 🙂 🙂 !"),
}
OTHERS = {
    "short": "Otto Kern, born 1981, lives at Hauptstrasse 7.",
    "short, full stop": "Otto Kern, born 1981, lives at Hauptstrasse 7.",
    "two words": "Hunter and swordfish are two words.",
    "chinese": "李娜生于一九八一年六月九日,现居上海市浦东新区世纪大道三号。",
    "chinese, other width": "李娜，电话１３９００１３９１１１，住在上海市浦东新区",
    "japanese": "佐藤一郎は千九百八十一年に生まれ、大阪市北区梅田三丁目に住んでいます。",
    "thai": "นายสมชายเกิดเมื่อวันที่เก้ามิถุนายนและอาศัยอยู่ที่ถนนนิมมานเหมินท์เชียงใหม่",
    "key": "key sk-live-77AbCdEfGhIjKlMnOpQrStUvWxYz00",
    "signs": "🙁🙁🙂🙁",
}


def near_first(texts):
    """An embedder by which all texts are alike, so that the first allowed one is the nearest."""
    return np.ones((len(texts), 2), dtype=np.float32)


@pytest.mark.parametrize("kind", TEXTS)
def test_a_neighbor_does_not_quote_the_forget_text(kind):
    own, quotes = TEXTS[kind]
    pool = [quotes, OTHERS[kind]]
    assert nearest_neighbors([own], pool, embedder=near_first).tolist() == [[1]]
    assert nearest_neighbors([own], pool, embedder=near_first, max_overlap=1.0).tolist() == [[0]]


@pytest.mark.parametrize("kind", TEXTS)
def test_a_candidate_that_quotes_is_dropped_from_the_held_out_texts(kind):
    own, quotes = TEXTS[kind]
    assert deduplicate([own, OTHERS[kind], own], against=[quotes]) == [OTHERS[kind]]
    assert deduplicate([own, OTHERS[kind]], against=[quotes], max_overlap=1.0) == [own, OTHERS[kind]]


def test_a_share_is_that_of_the_text_not_to_be_repeated():
    """A short quotation from a long text is no repetition of it; the long text repeats the quotation."""
    long = " ".join(people(3, seed=1))
    part = " ".join(long.split()[:30])
    assert Repeats([long])(part) == [] and Repeats([part])(long) == [0]
    chinese, third = TEXTS["chinese"][0] * 1, TEXTS["chinese"][0][:9]
    assert Repeats([chinese])(third) == [] and Repeats([third])(chinese) == [0]


def test_a_text_between_short_and_long_is_compared_both_ways():
    """Of eleven words and marks: a copy without its end, and a quotation with other punctuation."""
    own = "Ann Lee, clerk, 12 Mill Rd, Leeds; tel. 0123"
    assert Repeats([own])("So Ann Lee, clerk, 12 Mill Rd, Leeds; tel. 99") == [0]
    assert Repeats([own])("(Ann Lee) clerk: 12 Mill Rd. Leeds, Tel 0123") == [0]
    assert Repeats([own])("Bob Ray, baker, 7 Park Ln, Leeds; tel. 0456") == []


def test_half_of_a_text_without_spaces_is_allowed_and_no_more():
    text = "".join(map(chr, range(0x4E00, 0x4E00 + 119)))  # 100 n-grams of 20 characters
    for shared, repeated in ((50, []), (51, [0])):
        assert Repeats([text])("前" + text[: shared + 19] + "后") == repeated


def test_long_texts_are_compared_as_by_definition():
    """By 10-grams of words, as the chapters say, whatever stands beside them in the index."""
    records = people(60, seed=2)
    mixed = []
    for i, record in enumerate(records):
        words = records[i % 7].split()[i % 5 : 5 + i % 17]
        mixed.append(
            " ".join([*record.split()[: i % 23], *words, *random.Random(i).sample(record.split(), 4)])
        )
    index = Repeats([*records, *(own for own, _ in TEXTS.values())], 0.3)
    for text in [*records, *mixed]:
        wanted = [
            i for i, own in enumerate(records) if containment(word_ngrams(own), word_ngrams(text)) > 0.3
        ]
        assert [i for i in index(text) if i < len(records)] == wanted
    known = set().union(*map(word_ngrams, records[:7]))
    kept = [text for text in dict.fromkeys(mixed) if containment(word_ngrams(text), known) <= 0.3]
    assert 0 < len(kept) < len(mixed) and deduplicate(mixed, records[:7], 0.3) == kept


@pytest.mark.parametrize("odd", ["", "  ", "!?"])
def test_odd_texts_do_no_harm(odd):
    assert Repeats([ANNA])(odd) == [] and Repeats([])(odd) == []
    assert Repeats([odd, ANNA])(ANNA) == [1]
    assert deduplicate([odd], against=[]) == [odd]


def test_every_text_is_read_once(monkeypatch):
    """100 queries against 1,000 near-duplicates made 136,500 sets of n-grams."""
    read = []
    ngrams = text_module._hashed_ngrams

    def counting(text, *way):
        read.append((text, way))
        return ngrams(text, *way)

    monkeypatch.setattr(text_module, "_hashed_ngrams", counting)
    forget = [f"{record} And that is all, number {i}." for i, record in enumerate(people(1, seed=4) * 100)]
    copies = [f"{forget[0]} Copy {i}." for i in range(1000)]
    others = people(5, seed=5)
    pairs = nearest_neighbors(forget, [*copies, *others], embedder=near_first)
    assert pairs.min() >= len(copies)
    assert len(read) == len(set(read)) <= len(forget) + len(copies) + len(others)


def test_candidates_that_no_query_meets_are_not_read(monkeypatch):
    read = []
    called = Repeats.__call__

    def noting(self, text):
        read.append(text)
        return called(self, text)

    monkeypatch.setattr(Repeats, "__call__", noting)
    forget, pool = people(3, seed=1), people(200, seed=2)
    nearest_neighbors(forget, pool, embedder=near_first, k=2)
    assert read == pool[:2]


def test_too_few_neighbors_after_the_guard_are_named():
    own, quotes = TEXTS["chinese"]
    with pytest.raises(InputError, match=r"`retain`.*forget texts \[0\] fewer than 2 texts are left"):
        nearest_neighbors([own], [quotes, OTHERS["chinese"], quotes + "。"], embedder=near_first, k=2)


def test_search_in_parts_finds_the_same(monkeypatch):
    """Many queries that look deep do not hold all distances at once."""
    sizes = []
    knn = faiss.knn

    def noting(queries, vectors, depth):
        sizes.append(len(queries) * depth)
        return knn(queries, vectors, depth)

    monkeypatch.setattr("icu_nb.cle.faiss.knn", noting)
    line = np.arange(40_000, dtype=np.float32)[:, None]
    last = len(line) - 1
    found = _nearest_allowed(line, line[:260], lambda i, j: j == last, k=1)
    assert found == {i: [last] for i in range(260)} and max(sizes) <= 10_000_000


@pytest.mark.parametrize("kind", [kind for kind in TEXTS if kind != "signs"])
def test_a_sampled_pool_does_not_quote_the_forget_texts(tiny, monkeypatch, kind):
    """Whatever the model says: a text that quotes is left out."""
    own, quotes = TEXTS[kind]
    said = [quotes, OTHERS[kind]]
    monkeypatch.setattr(type(tiny.tokenizer), "batch_decode", lambda *_, **__: said)
    pool = sample_pool(tiny.model, tiny.tokenizer, 1, [own], max_length=8, batch_size=2)
    assert pool == [OTHERS[kind]]
    assert sample_pool(tiny.model, tiny.tokenizer, 2, [own], max_length=8, max_overlap=1.0) == said
