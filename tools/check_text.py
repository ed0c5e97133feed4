"""Whether README and chapters are short, and all pages plainly worded: sizes, and words that style avoids.

Usage: check_text.py
"""

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
README_BYTES = 9000
WORDS = 1500  # of a chapter, without its exercises and references
CODE_LINES = 25  # of a cell, without signatures

# texts are things, and numbers have no price, no court and no battle
IDIOMS = re.compile(
    r"\b(whoever|nobody|everybody|somebody|strangers?|pays?|paid|cost(?:s|ly)?|dear(?:er|est|ly)?"
    r"|cheap(?:er|est|ly)?|prices?|priced|bills?|leash(?:es)?|witness(?:es)?|betrays?|ruin(?:s|ed)?|ransom"
    r"|(?:those|texts|people|sequences) who (?:is|are|still|stays?|trains?|rests?|remembers?)"
    r"|who is forgotten"
    r"|at a loss|by heart|for free|comes? at|walk(?:s|ed|ing)? (?:back|out)|knows? nothing of)\b",
    re.I,
)
MARKUP = re.compile(r"```.*?```|\$\$.*?\$\$|\$[^$]*\$|`[^`]*`|\]\([^)]*\)|<[^>]+>|\|", re.S)
SIGNATURE = re.compile(r"^(?:async )?def \w+\(.*?^\s*\).*?:$|^def \w+\([^\n]*$", re.M | re.S)


def plain(text):
    """Markdown without formulas, code, addresses and tags."""
    return MARKUP.sub(" ", text)


def chapter(path):
    """A chapter's prose, and its code cells but the first, which installs on Colab."""
    book = json.loads(path.read_text(encoding="utf-8"))
    cells = [(cell["cell_type"], "".join(cell["source"])) for cell in book["cells"]]
    code = [source for kind, source in cells if kind == "code"]
    return "\n\n".join(source for kind, source in cells if kind == "markdown"), code[1:]


def code_lines(source):
    """How many lines a cell has, its signatures and directives not counted."""
    lines = SIGNATURE.sub("", source).splitlines()
    return len([line for line in lines if line.strip() and not line.startswith(("#|", "@"))])


def found_in(name, text):
    """Every idiom of a page, with what stands around it."""
    text = " ".join(plain(text).split())
    return [f"{name}: ...{text[max(0, m.start() - 30) : m.end() + 30]}..." for m in IDIOMS.finditer(text)]


def faults():
    """What is too long or not plain."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    size = len(readme.encode())
    print(f"README.md: {size} bytes")
    wrong = [f"README.md: {size} bytes, at most {README_BYTES}"] if size > README_BYTES else []
    wrong += found_in("README.md", readme)
    wrong += found_in("docs/results.md", (ROOT / "docs/results.md").read_text(encoding="utf-8"))
    for path in sorted((ROOT / "nbs/learn").glob("*.ipynb")):
        prose, code = chapter(path)
        words = len(plain(prose.partition("## Exercises")[0]).split())
        longest = max(map(code_lines, code))
        print(f"{path.name}: {words} words, longest cell {longest} lines")
        if words > WORDS:
            wrong.append(f"{path.name}: {words} words, at most {WORDS}")
        if longest > CODE_LINES:
            wrong.append(f"{path.name}: a cell of {longest} lines, at most {CODE_LINES}")
    for part in ("", "learn", "guide", "paper", "course"):
        for path in sorted((ROOT / "nbs" / part).glob("*.ipynb")):
            wrong += found_in(path.name, chapter(path)[0])
    return wrong


if __name__ == "__main__":
    found = faults()
    print("\n".join(found))
    sys.exit(bool(found))
