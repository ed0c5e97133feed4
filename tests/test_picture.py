"""The picture of forgetting: its numbers, its page and its figure."""

import base64
import io
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from itertools import pairwise

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from icu_nb.errors import InputError
from icu_nb.metrics import memorization_accuracy
from icu_nb.models.tiny import tiny_gpt_neo, train_tokenizer
from icu_nb.paper.drawing import alt_text
from icu_nb.paper.token_picture import _PALETTE, TokenPicture, _contrast, _lines_of
from icu_nb.paper.token_probabilities import token_probabilities

TEXT = "Zoë O'Neil lives at 12 Main Street. Zoë's phone number is 555-0142 <b>& more</b>."


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([TEXT.replace("Zoë", "Ann")] * 3, 300)


@pytest.fixture(scope="module")
def model(tokenizer):
    return tiny_gpt_neo(len(tokenizer), n_layers=2, hidden_size=32, n_heads=2)


def look(*probabilities):
    return {"probability": list(probabilities), "greedy": [int(p > 0.5) for p in probabilities]}


@pytest.fixture
def picture():
    return TokenPicture(
        ["</script>", " <b>x", " & \"y'", "\n\u2028z"],
        {
            "a <i>": [look(0.97, 0.5, 0.0), look(0.6, 0.04, 0.0), look(0.1, 0.0, 0.0)],
            "gradient ascent": [look(0.97, 0.5, 0.0), look(0.0, 1.0, 0.3)],
        },
    )


# ---- numbers ----


def test_probabilities_are_those_of_an_independent_softmax(model, tokenizer, monkeypatch):
    monkeypatch.setattr("icu_nb.paper.token_probabilities.chunk_length", lambda head: 7)
    found, ids = token_probabilities(model, tokenizer, TEXT), torch.tensor([tokenizer(TEXT)["input_ids"]])
    with torch.no_grad():
        logits = model.double()(ids).logits[0].numpy()
    model.float()
    odds = np.exp(logits - logits.max(-1, keepdims=True))
    expected = [odds[t - 1, ids[0, t]] / odds[t - 1].sum() for t in range(1, ids.shape[1])]
    assert np.isnan(found.probability[0]) and np.allclose(found.probability[1:], expected, rtol=1e-4)
    assert found.greedy[1:].tolist() == [
        int(logits[t - 1].argmax()) == ids[0, t] for t in range(1, ids.shape[1])
    ]


def test_the_share_of_greedy_tokens_is_ma(model, tokenizer):
    ids = torch.tensor([tokenizer(TEXT)["input_ids"]])
    assert token_probabilities(model, tokenizer, TEXT).greedy[1:].mean() == pytest.approx(
        memorization_accuracy(model, ids).item()
    )


def test_pieces_are_the_text_even_where_a_character_is_two_tokens(model, tokenizer):
    found = token_probabilities(model, tokenizer, TEXT)
    assert "".join(found.token) == TEXT and len(found) == len(tokenizer(TEXT)["input_ids"])
    assert "" in found.token.tolist()  # the second half of an ë
    cut = token_probabilities(model, tokenizer, TEXT, 9)
    assert len(cut) == 9 and TEXT.startswith("".join(cut.token))


def test_the_model_stays_in_its_mode(model, tokenizer):
    model.train()
    token_probabilities(model, tokenizer, TEXT)
    assert model.training
    model.eval()


# ---- colors ----


def test_text_is_readable_on_every_ground():
    assert len(_PALETTE) == 101 and min(_contrast(*colors) for colors in _PALETTE) >= 4.5
    assert _contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.01)  # a value of WCAG's own examples


def test_brighter_is_more_probable():
    assert all(
        _contrast(low, "black") < _contrast(high, "black") for (low, _), (high, _) in pairwise(_PALETTE)
    )


# ---- the page ----


class Elements(HTMLParser):
    """The elements of a page; open and closed ones must match."""

    def __init__(self, page):
        super().__init__()
        self.open, self.found, self.said = [], [], {}
        self.feed(page)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))
        if tag not in ("img", "input", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open:
            self.said.setdefault(self.open[-1], []).append(data)


def test_page_is_well_formed_and_needs_nothing_else(picture):
    bundle, _ = picture._repr_mimebundle_()
    page = Elements(bundle["text/html"])
    assert [tag for tag, _ in page.found] == ["figure", "style", "figcaption", "img", "script", "script"]
    assert not any(
        {"src", "href", "id", "onclick"} & set(attributes) for tag, attributes in page.found if tag != "img"
    )
    assert dict(page.found)["img"]["src"].startswith("data:image/png;base64,")
    assert not re.search(
        r"https?:|//|@import|url\(|fetch|XMLHttp|eval", re.sub(r'src="[^"]*"', "", bundle["text/html"])
    )


def test_page_holds_a_look_per_epoch_and_no_html_of_the_text(picture):
    page = Elements(picture._as_html(""))
    data = json.loads(page.said["script"][0])
    assert data["tokens"] == picture.tokens
    assert [(run["label"], len(run["looks"])) for run in data["runs"]] == [
        ("a <i>", 3),
        ("gradient ascent", 2),
    ]
    assert [run["ma"] for run in data["runs"]] == [[0.3333, 0.3333, 0.0], [0.3333, 0.3333]]


def test_picture_holds_words_an_image_and_its_alt_text(picture):
    bundle, metadata = picture._repr_mimebundle_()
    assert (
        set(bundle) == {"text/plain", "text/html", "image/png"}
        and "".join(picture.tokens) in bundle["text/plain"]
    )
    assert (
        "gradient ascent: epoch 0 MA 0.33" in bundle["text/plain"]
        and metadata["image/png"]["alt"] == bundle["text/plain"]
    )
    assert dict(Elements(bundle["text/html"]).found)["img"]["alt"] == bundle["text/plain"]
    assert Image.open(io.BytesIO(base64.b64decode(bundle["image/png"]))).width > 400


DRIVER = """<script>
const figures = [...document.querySelectorAll("figure")], slider = figures[1].querySelector("input");
const look = ({textContent, style}) => [textContent, style.background, style.color, style.textDecorationLine];
const seen = figure => [...figure.querySelectorAll(".icu-tokens-text span")].map(look);
const status = figures[1].querySelector("[aria-live]");
const report = [figures.map(seen)];
for (const epoch of [1, 2]) {
  slider.value = epoch;
  slider.dispatchEvent(new Event("input"));
  report.push(figures.map(seen), status.textContent);
}
document.body.textContent = JSON.stringify({
  report,
  images: document.images.length,
  names: Object.keys(window).filter(name => name.includes("icu") || name == "runs"),
  label: figures[1].querySelector("label").contains(slider),
});
</script>"""


def test_the_slider_colors_the_tokens_of_its_own_picture(picture, tmp_path):
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("no Chromium here")
    page = tmp_path / "page.html"
    other = TokenPicture(["one", " two"], {"alone": [look(0.2)]})
    page.write_text(
        f"<!doctype html><meta charset=utf-8><body>{other._as_html('')}{picture._as_html('')}{DRIVER}",
        encoding="utf-8",
    )
    options = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={tmp_path / 'profile'}",
        "--dump-dom",
        page.as_uri(),
    ]
    dom = subprocess.run([browser, *options], capture_output=True, text=True, timeout=120, check=True).stdout
    body = re.search(r"<body>(.*)</body>", dom, re.S).group(1)
    found = json.loads(body.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))

    def colors(epoch):  # what each span of the picture should be
        for looks in picture.runs.values():
            one = looks[min(epoch, len(looks) - 1)]
            yield from [
                (picture.tokens[0], "", "", ""),
                *(
                    (
                        token,
                        *(
                            f"rgb({', '.join(str(int(color[k : k + 2], 16)) for k in (1, 3, 5))})"
                            for color in _PALETTE[round(100 * p)]
                        ),
                        "underline" if greedy else "none",
                    )
                    for token, p, greedy in zip(
                        picture.tokens[1:], one["probability"], one["greedy"], strict=False
                    )
                ),
            ]

    first, second, said, third, at_last = found["report"]
    for epoch, (still, own) in enumerate([first, second, third]):
        assert list(map(tuple, own)) == list(colors(epoch)) and still == first[0]
    assert said == "epoch 1 of 2. a <i>: MA 0.33; gradient ascent: MA 0.33"
    assert at_last == "epoch 2 of 2. a <i>: MA 0.00; gradient ascent: MA 0.33 (ended after epoch 1)"
    assert found["images"] == 0 and found["names"] == [] and found["label"] is True


# ---- the figure ----


def test_lines_break_between_words():
    assert _lines_of(["ab", "cd", " ef", " g"], 6) == [[0, 1], [2, 3]]
    assert _lines_of(["abcd", "efgh", " i"], 6) == [[0], [1, 2]]  # a word longer than a line
    assert _lines_of(["a"]) == [[0]]


def test_figure_writes_every_token_and_has_alt_text(picture):
    fig = picture.draw()
    written = [text.get_text() for ax in fig.axes for text in ax.texts]
    assert written.count(" <b>x") == 5  # three epochs and two
    assert (
        any("gradient ascent" in ax.get_title(loc) for ax in fig.axes for loc in ("left", "center"))
        and alt_text(fig) == picture.alt()
    )
    plt.close(fig)


# ---- bad input ----


def frame(*tokens, p=0.5):
    return pd.DataFrame(
        {"token": list(tokens), "probability": [np.nan, *[p] * (len(tokens) - 1)], "greedy": False}
    )


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: TokenPicture.of({}), "there is nothing to show"),
        (lambda: TokenPicture.of({"ICU": [frame("a", "b")], "ga": []}), "there is nothing to show"),
        (lambda: TokenPicture.of({"ICU": [frame("a", "b"), frame("a", "c")]}), "different texts"),
        (lambda: TokenPicture.of({"ICU": [frame("a", "b", p=np.nan)]}), "a probability that is none"),
        (lambda: TokenPicture(["a", "b"], {"ICU": [look(0.1, 0.2)]}), "another number of tokens"),
        (lambda: TokenPicture(["a"], {"ICU": [look()]}), "fewer than two"),
        (lambda: TokenPicture(["a", "b"], [look(0.1)]), "nothing to show"),
    ],
)
def test_what_cannot_be_shown_is_told(make, message):
    with pytest.raises(InputError, match=message):
        make()


@pytest.mark.parametrize(
    "text, message", [("", "no text"), (["a"], "no text"), ("Ann" * 200, "Give 2 to 128 tokens")]
)
def test_what_cannot_be_looked_at_is_told(model, tokenizer, text, message):
    with pytest.raises(InputError, match=message):
        token_probabilities(model, tokenizer, text)
