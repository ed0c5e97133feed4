"""What readers need: figures in words, an ending that asks them something, references that can be found."""

import re
from collections import Counter

import IPython.display
import matplotlib.pyplot as plt
import pytest
from test_project import NOTEBOOKS, READING, ROOT, cells, each_notebook, prose

from icu_nb.paper import plots

# Syllabus and guide have endings of their own.
LESSONS = [path for path in READING if path.parent.name in ("nbs", "learn", "paper")]
each_lesson = pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.name)


def alternatives(path):
    """The words of each stored picture: of the output, as show_figure writes them, or of its cell."""
    return [
        (cell["id"], output["metadata"].get(kind, {}).get("alt") or cell["metadata"].get("alt", ""))
        for cell in cells(path, "code")
        for output in cell["outputs"]
        for kind in output.get("data", {})
        if kind.startswith("image/")
    ]


@each_notebook
def test_every_figure_is_told_in_words(path):
    assert not [cell for cell, told in alternatives(path) if len(told.split()) < 15]


@each_notebook
def test_no_words_without_a_figure(path):
    figures = {cell for cell, _ in alternatives(path)}
    assert not [c["id"] for c in cells(path) if "alt" in c["metadata"] and c["id"] not in figures]


def test_no_two_figures_are_told_alike():
    """Words written by hand: what a picture says of itself may come twice, as the picture may."""
    made = [path for path in NOTEBOOKS if not path.name.startswith("exercises_")]
    told = Counter(
        c["metadata"]["alt"] for path in made for c in cells(path, "code") if "alt" in c["metadata"]
    )
    assert not [words for words, times in told.items() if times > 1]


def test_images_in_markdown_have_words():
    written = [(ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "docs/results.md")]
    pages = [*written, *map(prose, NOTEBOOKS)]
    images = [image for page in pages for image in re.findall(r"!\[([^\]]*)\]\(([^)]+)\)", page)]
    assert len([address for _, address in images if "figures/" in address]) >= 3
    assert not [
        address for words, address in images if len(words.split()) < (3 if "badge" in address else 10)
    ]
    assert not [page for page in pages if "<img" in page]  # nobody would look for its words here


def test_a_figure_on_the_page_is_one_picture_with_its_words(monkeypatch):
    shown = []
    monkeypatch.setattr(plt, "get_backend", lambda: "module://matplotlib_inline.backend_inline")
    monkeypatch.setattr(
        IPython.display, "display", lambda fig, metadata: shown.append((plots.alt_text(fig), metadata))
    )
    plots.show_figure("framework")
    ((words, metadata),) = shown
    assert len(words) > 100 and metadata == {"image/png": {"alt": words}}
    assert not plt.get_fignums()  # what is still open when a cell ends is shown again


def ending(path):
    """All markdown from "What we learned" on."""
    return prose(path).rpartition("## What we learned\n")[2]


@each_lesson
def test_ends_with_one_question_exercises_references_and_the_next(path):
    marks = [
        r"^\*\*You should now be able to answer:\*\* .*\?$",
        r"^## Exercises$",
        r"^## References$",
        r"^Next: \[",
    ]
    places = [[found.start() for found in re.finditer(mark, ending(path), re.M)] for mark in marks]
    assert [len(place) for place in places] == [1] * 4 and places == sorted(places)


@each_lesson
def test_references_can_be_found(path):
    """An arXiv number, a DOI or an address in each entry, behind each title; numbers lead where they say."""
    references = ending(path).partition("## References\n")[2].partition("\nNext: ")[0]
    entries = [line for line in references.splitlines() if line]
    assert entries and all(line.startswith("- ") and "](https://" in line for line in entries), entries
    title = r"(?<![\w*])\*(?=\S)[^*]+\*(?![\w*])"
    for line in entries:
        found = all("](https://" in part for part in re.split(title, line)[1:])
        assert found or re.search(rf"\[{title}\]\(https://", line), line
        for words, address in re.findall(r"\[([^\]]+)\]\((https://(?:arxiv|doi)\.org/[^)]+)\)", line):
            kind, number = re.fullmatch(r"https://(arxiv\.org/abs|doi\.org)/(.+)", address).groups()
            arxiv = kind.startswith("arxiv")
            assert words in ((f"arXiv {number}", number) if arxiv else (f"doi {number}",)), line
            assert re.fullmatch(r"\d{4}\.\d{4,5}" if arxiv else r"10\.\d{4,5}/\S+", number), line
