"""Slides of the four sessions, from cells with `slideshow` metadata and their stored outputs (make slides).

In JupyterLab a cell gets its place under "Slide Type": *slide* begins a slide, *fragment* appears on it at
the next key press. A slide holds what can be read from the last row: of prose the first sentences, of code
at most 16 lines; the rest is in the speaker's notes (key S).
One HTML file per session, with everything in it: it opens without a network.
"""

import html
import json
import math
import re
import sys
from importlib.util import find_spec
from pathlib import Path

from formulas import mathml
from markdown_it import MarkdownIt
from mdit_py_plugins.dollarmath import dollarmath_plugin
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
# The package that ships reveal.js.
REVEAL = Path(find_spec("sphinx_revealjs").origin).parent / "_static/revealjs"
SESSIONS = {
    "What a model remembers": [
        "00_quickstart",
        "learn/02_a_model_that_memorized",
        "learn/03_measuring_memory",
    ],
    "The loss": ["learn/04_kui", "learn/05_cle", "library/objective"],
    "The loop and its rivals": [
        "learn/06_iur",
        "learn/07_the_loop",
        "learn/08_other_methods",
        "paper/19_baselines",
    ],
    "Is it gone?": [
        "paper/33_what_a_model_can_still_do",
        "learn/09_what_remains",
        "paper/32_what_an_attack_measures",
        "paper/31_audit",
    ],
}
# What fits: characters in a line of code, lines of code, lines with their output, words of prose.
WIDTH = 86
CODE_LINES = 16
ALL_LINES = 17
WORDS = 60

MARKDOWN = (
    MarkdownIt("commonmark")
    .enable("table")
    .use(dollarmath_plugin, renderer=lambda text, options: mathml(text, options["display_mode"]))
)
HEADING = re.compile(r"#+ |\*\*(?:Exercises|References)")
MARK = re.compile(r"^(?:[-*]|\d+\.) ", re.M)
WHOLE = re.compile(r"[|>]|\$\$|```")
SENTENCES = re.compile(r"(?<=[.!?:])(?<!al\.)(\**)\s+(?=[A-Z*`\"])")


# ---- prose: what is said on the slide, and what the speaker says ----


def first_sentences(paragraph, words=WORDS):
    """The leading sentences that fit (one at least), and the rest."""
    ends = [m.end(1) for m in SENTENCES.finditer(paragraph)] + [len(paragraph)]
    fits = [end for end in ends if len(paragraph[:end].split()) <= words]
    cut = fits[-1] if fits else ends[0]
    return paragraph[:cut], paragraph[cut:].strip()


def shortened(text, kind):
    """A cell's Markdown as (on the slide, for the speaker).

    A slide takes the part from the cell's first heading to the next one, a fragment what stands before any.
    """
    text = re.sub(r"\[!\[.*?\]\(.*?\)\]\(.*?\)", "", text)  # badges
    text = re.sub(r"\[([^\]]+)\]\([\w./#-]+\.ipynb[^)]*\)", r"\1", text)  # other notebooks are not at hand
    text = re.sub(
        r"(?m)^(?!(?:[-*]|\d+\.) |\s)(.+)\n(?=(?:[-*]|\d+\.) )", r"\1\n\n", text
    )  # a list is a block of its own
    blocks = [block for block in re.split(r"\n\s*\n", text.strip()) if block.strip()]
    at = [i for i, block in enumerate(blocks) if HEADING.match(block)]
    if kind == "slide" and at:
        blocks = blocks[at[0] : at[1] if len(at) > 1 else None]
    elif at:
        blocks = blocks[: at[0]]
    shown, said, prose, listed = [], [], 0, False
    for block in blocks:
        if HEADING.match(block) or WHOLE.match(block):
            shown.append(block)
        elif MARK.match(block):
            marks, items = MARK.findall(block), [" ".join(item.split()) for item in MARK.split(block)[1:]]
            halves = [first_sentences(item, 30) for item in items]
            shown.append("\n".join(mark + head for mark, (head, _) in zip(marks, halves, strict=False)))
            said, listed = said + [rest for _, rest in halves], True
        else:  # below the list of a title stands what has to be read before
            full = prose >= WORDS * 2 // 3 or (listed and blocks[0].startswith("# "))
            head, rest = ("", block) if full else first_sentences(block, WORDS - prose)
            prose += len(head.split())
            shown, said = [*shown, head], [*said, rest]
    return "\n\n".join(filter(None, shown)), "\n\n".join(filter(None, said))


# ---- code and outputs ----


def lines_of(text):
    return sum(max(1, math.ceil(len(line) / WIDTH)) for line in text.rstrip().splitlines())


def printed(outputs):
    return "\n".join(
        "".join(o.get("text") or o.get("data", {}).get("text/plain", "")).rstrip()
        for o in outputs
        if not {"image/png", "text/html"} & o.get("data", {}).keys()
    )


def code_of(cell):
    """The source, if it can be read from the last row; what a picture was drawn with is not shown."""
    source = re.sub(r"^#\s*\|.*\n?", "", "".join(cell["source"]), flags=re.M).strip("\n")
    drawn = any(
        {"image/png", "text/html"} & o.get("data", {}).keys() and lines_of(source) > 5
        for o in cell["outputs"]
    )
    fits = (
        lines_of(source) <= CODE_LINES and lines_of(source) + lines_of(printed(cell["outputs"])) <= ALL_LINES
    )
    return "" if drawn or not fits else highlight(source, PythonLexer(), HtmlFormatter(cssclass="code"))


def outputs_of(cell, title):
    drawn = any("image/png" in output.get("data", {}) for output in cell["outputs"])
    parts = []
    if (said := printed(cell["outputs"]).strip("\n")) and not drawn:  # a picture needs the room
        parts.append(f"<pre class='said'>{html.escape(said)}</pre>")
    for output in cell["outputs"]:
        data = output.get("data", {})
        if "image/png" in data:
            alt = output["metadata"].get("image/png", {}).get("alt") or cell["metadata"].get("alt", title)
            words = html.escape(alt, quote=True)
            source = f"data:image/png;base64,{''.join(data['image/png']).strip()}"
            parts.append(f"<div class='figure'><img alt='{words}' src='{source}'></div>")
        elif "text/html" in data:
            table = "".join(data["text/html"])
            parts.append(re.sub(r"<style.*?</style>|border=\"1\"", "", table, flags=re.S))
    return "".join(parts)


# ---- slides ----


def slides_of(notebook):
    """The slides of one notebook, each a list of HTML parts with its notes."""
    slides, title = [], ""
    for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
        source, kind = "".join(cell["source"]), cell["metadata"].get("slideshow", {}).get("slide_type")
        headings = re.findall(r"^#+ (.+)", source, re.M) if cell["cell_type"] == "markdown" else []
        if kind in ("slide", "fragment"):
            if cell["cell_type"] == "markdown":
                shown, notes = shortened(source, kind)
                body = MARKDOWN.render(shown) if not re.fullmatch(r"#+ .*", shown) else ""
            else:
                body, notes = code_of(cell) + outputs_of(cell, title), ""
            if not body:
                raise SystemExit(f"{notebook.name}: cell {cell['id']} has nothing that fits on a slide")
            if kind == "slide":
                own = cell["cell_type"] == "markdown" and HEADING.match(shown)
                slides.append([[] if own else [f"<h2 class='again'>{MARKDOWN.renderInline(title)}</h2>"], []])
            slides[-1][0].append(body if kind == "slide" else f"<div class='fragment'>{body}</div>")
            slides[-1][1].append(notes)
        title = headings[-1] if headings else title
    sections = []
    for parts, notes in slides:
        said = MARKDOWN.render("\n".join(notes))
        aside = f"<aside class='notes'>{said}</aside><footer>{notebook.stem}</footer>"
        sections.append(f"<section>{''.join(parts)}{aside}</section>")
    return sections


SETTINGS = """{width: 1280, height: 720, margin: 0.02, center: false, display: "flex", hash: true,
slideNumber: "c/t", transition: "none", plugins: [RevealNotes]}"""


def script(name):
    """A file of reveal.js, to be put into a page."""
    return (REVEAL / name).read_text(encoding="utf-8").replace("</script", "<\\/script")


def deck(number, title, notebooks):
    """One session as a single HTML file."""
    session = f"<p>icu_nb · session {number} of {len(SESSIONS)}</p>"
    names = " · ".join(Path(name).name for name in notebooks)
    opening = f"<section class='opening'>{session}<h1>{title}</h1><p>{names}</p></section>"
    slides = [slide for name in notebooks for slide in slides_of(ROOT / f"nbs/{name}.ipynb")]
    body = "\n".join([opening, *slides])
    style = "\n".join(
        [
            (REVEAL / "dist/reveal.css").read_text(encoding="utf-8"),
            HtmlFormatter(cssclass="code").get_style_defs(".reveal"),
            (HERE / "slides.css").read_text(encoding="utf-8"),
        ]
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,"><title>{number} · {title} · icu_nb</title><style>{style}</style></head>
<body><div class="reveal"><div class="slides">
{body}
</div></div>
<script>{script("dist/reveal.js")}</script>
<script>{script("plugin/notes/notes.js")}</script>
<script>Reveal.initialize({SETTINGS})</script>
</body></html>
"""


folder = Path(sys.argv[1])
folder.mkdir(parents=True, exist_ok=True)
for number, (title, notebooks) in enumerate(SESSIONS.items(), 1):
    path = folder / f"session_{number}.html"
    page = deck(number, title, notebooks)
    path.write_text(page, encoding="utf-8")
    print(f"{path}: {page.count('<section')} slides, {len(page.encode()) / 1e6:.1f} MB")
