"""Site, slides and JupyterLab in headless Chromium, driven by Playwright; skipped where these are missing."""

import contextlib
import functools
import http.server
import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from urllib.parse import unquote, urldefrag, urljoin, urlsplit

import pytest

import icu_nb

sync_api = pytest.importorskip("playwright.sync_api", reason="Playwright is in the extra dev")
pytest.importorskip("myst_nb", reason="Sphinx and its parts are in the extra docs")
ROOT = Path(__file__).resolve().parents[1]
SITE, SLIDES = ROOT / "_docs/site", ROOT / "_docs/slides"
CHROMIUM = next(filter(None, map(shutil.which, ["chromium", "chromium-browser", "google-chrome"])), None)


def run(*command):
    done = subprocess.run(
        [sys.executable, *map(str, command)], cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("no Chromium: install it (Debian: apt install chromium)")
    with sync_api.sync_playwright() as playwright:
        one = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield one
        one.close()


@contextlib.contextmanager
def opened(browser):
    """A page, with what went wrong on it and the addresses it asked for."""
    one = browser.new_page(viewport={"width": 1280, "height": 720})
    one.set_default_timeout(120_000)
    one.problems, one.asked = [], set()
    one.on("console", lambda message: one.problems.append(message.text) if message.type == "error" else None)
    one.on("pageerror", lambda error: one.problems.append(str(error)))
    one.on("request", lambda request: one.asked.add(request.url))
    yield one
    one.close()


@pytest.fixture
def page(browser):
    with opened(browser) as one:
        yield one


@pytest.fixture(scope="module")
def slides(browser):
    run("docs/slides.py", SLIDES)
    return sorted(SLIDES.glob("session_*.html"))


@pytest.fixture(scope="module")
def site(slides):
    """The address of the site, built as `make docs` builds it: a warning is an error."""
    (ROOT / "_docs/source").mkdir(parents=True, exist_ok=True)
    run("-m", "sphinx", "-aW", "--keep-going", "-q", "-c", "docs", "_docs/source", SITE)

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *arguments):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=SITE))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()


# ---- the site ----


# What cannot be seen of a page: a table whose last column does not come into view when its box is scrolled
# to the end, and whatever makes the page wider than the window.
OUT_OF_REACH = """() => {
  const scrolls = one => /auto|scroll/.test(getComputedStyle(one).overflowX);
  const box = one => scrolls(one) || !one.parentElement ? one : box(one.parentElement);
  const reached = table => {
    const widest = [...table.rows].sort((one, other) => other.cells.length - one.cells.length)[0];
    const frame = box(table), first = widest.cells[0], last = [...widest.cells].at(-1);
    frame.scrollLeft = 0;
    const begins = first.getBoundingClientRect().left >= frame.getBoundingClientRect().left - 1;
    frame.scrollLeft = frame.scrollWidth;
    window.scrollTo({top: scrollY + last.getBoundingClientRect().top - innerHeight/2, behavior: "instant"});
    const cell = last.getBoundingClientRect(), edge = frame.getBoundingClientRect();
    const painted = document.elementFromPoint(cell.right - 3, (cell.top + cell.bottom)/2);
    return begins && last.contains(painted) && cell.right <= edge.right + 1 && edge.right <= innerWidth;
  };
  const wide = [document.documentElement, document.querySelector(".content")].filter(
    one => one.scrollWidth > one.clientWidth);
  const missed = [...document.querySelectorAll("article table")].filter(table => !reached(table));
  return [...wide, ...missed].map(one => one.outerHTML.slice(0, 200));
}"""


@pytest.fixture(scope="module")
def visited(site, browser):
    """Every page, seen once: its links and anchors, its tables, and what is out of reach at two widths."""
    names = sorted(
        {path.relative_to(SITE).as_posix() for path in SITE.rglob("*.html") if path.parent.name != "_static"}
        - {path.name for path in SLIDES.glob("*.html")}
    )
    seen = {}
    with opened(browser) as one:
        for name in names:
            one.goto(site + name)
            assert one.title() and not one.problems, (name, one.problems)
            links = one.eval_on_selector_all("a[href]", "all => all.map(link => link.getAttribute('href'))")
            anchors = one.eval_on_selector_all("[id]", "all => all.map(one => one.id)")
            seen[name] = {"links": links, "anchors": {*anchors, ""}, "missed": {}}
            seen[name]["tables"] = one.locator("article table").count()
            for width in (390, 1280):
                one.set_viewport_size({"width": width, "height": 720})
                if found := one.evaluate(OUT_OF_REACH):
                    seen[name]["missed"][width] = found
        assert not {url for url in one.asked if not url.startswith((site, "data:"))}
    return seen


def test_every_page_leads_to_pages_that_exist(site, visited):
    assert {
        "index.html",
        "api.html",
        "api/unlearn.html",
        "api/evals.audit.html",
        "nbs/00_quickstart.html",
        "nbs/learn/07_the_loop.html",
        "nbs/library/models/loading.html",
        "nbs/course/syllabus.html",
    } <= visited.keys()
    for name, found in visited.items():
        for link in found["links"]:
            target, anchor = urldefrag(urljoin(site + name, link))
            if target.startswith(site):
                path = unquote(target.removeprefix(site)) or "index.html"
                assert (SITE / path).exists(), f"{name}: {link}"
                assert path not in visited or unquote(anchor) in visited[path]["anchors"], f"{name}: {link}"


def test_every_column_can_be_reached_and_no_page_is_wider_than_the_window(visited):
    assert not {name: found["missed"] for name, found in visited.items() if found["missed"]}
    assert sum(found["tables"] for found in visited.values()) > 100


def test_search_finds_a_notebook_and_a_function(site, page):
    page.goto(site + "search.html?q=calibrate_thresholds")
    for found in ("icu_nb.iur", "Iterative unlearning refinement"):  # they come one after the other
        page.locator("#search-results li", has_text=found).first.wait_for()


def test_site_is_light_and_dark(site, page):
    page.goto(site)
    ground = {}
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        color = page.evaluate("getComputedStyle(document.body).backgroundColor")  # rgb(255, 255, 255)
        ground[scheme] = sum(map(int, color[4:-1].split(",")))
    assert ground["light"] > 600 > 200 > ground["dark"]


def test_formulas_are_set_and_parameters_described(site, page):
    page.goto(site + "nbs/learn/04_kui.html")
    heights = page.eval_on_selector_all(
        ".formula math", "all => all.map(one => one.getBoundingClientRect().height)"
    )
    assert len(heights) > 2 and max(heights) > 35  # a fraction is higher than a line
    page.goto(site + "api/iur.html")
    assert page.locator("tr", has_text="heldout").filter(has_text="that the model never saw").count() == 1


def test_slider_changes_the_picture(site, page):
    page.goto(site + "nbs/learn/07_the_loop.html")
    figures = page.locator("figure:has(input[type=range])")
    assert figures.count() == 1

    def seen():
        color = "span => getComputedStyle(span).backgroundColor"
        return figures.first.evaluate(f"figure => [...figure.querySelectorAll('span')].map({color}).join()")

    before = seen()
    figures.first.locator("input[type=range]").press("End")
    assert seen() != before
    figures.first.locator("input[type=range]").press("Home")
    assert seen() == before and not page.problems


def test_imports_and_assertions_are_folded(site, page):
    page.goto(site + "nbs/learn/04_kui.html")
    for label, code in [("Imports", "import torch"), ("Assertions", "assert torch.isclose(unlearning_loss")]:
        fold = page.locator("details", has_text=label).filter(has_text=code).first
        assert not fold.locator("pre").is_visible(), label
        fold.locator("summary").click()
        assert fold.locator("pre").is_visible(), label
    assert page.locator("pre:visible", has_text="def unlearning_loss").count() == 1


def test_notebooks_are_numbered_as_they_are_linked(site, page):
    page.goto(site)
    entries = page.eval_on_selector_all(".sidebar-tree a", "all => all.map(a => [a.href, a.textContent])")
    titles = dict(entries)
    numbered = {link: re.search(r"/(\d\d)_\w+\.html", link) for link in titles}
    assert sum(map(bool, numbered.values())) > 20
    assert not [titles[link] for link, found in numbered.items() if found and titles[link][:2] != found[1]]


def test_every_notebook_has_its_links_to_colab_and_to_the_file(site):
    for path in (ROOT / "nbs").rglob("*.ipynb"):
        name = path.relative_to(ROOT)
        shown = (SITE / name).with_suffix(".html")
        html = shown.read_text(encoding="utf-8")
        colab = "https://colab.research.google.com/github/icu-nb/icu_nb/blob/main/"
        assert f'href="{colab}{name.as_posix()}"' in html
        file = re.search(r'class="reference download internal" download="" href="([^"]+)"', html)
        assert (shown.parent / file[1]).read_bytes() == path.read_bytes(), name


def test_api_begins_with_the_front_door(site, page):
    page.goto(site + "api.html")
    rows = page.locator("article table").first.locator("tbody tr")
    names = rows.locator("td:nth-child(1)").all_inner_texts()
    uses = rows.locator("td:nth-child(2)").all_inner_texts()
    assert names[0] == "unlearn" and sorted(names) == sorted(icu_nb.__all__) and all(uses)


# ---- slides ----

CUT_OFF = """() => {
  const slide = Reveal.getCurrentSlide(), box = slide.getBoundingClientRect(), unit = box.height/720;
  const kinds = ":scope > :not(aside, footer), .fragment > *, img, pre, table, .formula > math";
  const parts = [...slide.querySelectorAll(kinds)].filter(part => !part.closest("aside"));
  const outside = part => {
    const b = part.getBoundingClientRect();
    return b.bottom > box.bottom - 24*unit || b.right > box.right || b.left < box.left;
  };
  return parts.filter(outside).map(part => part.outerHTML.slice(0, 200));
}"""


@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_slides_go_forward_to_the_end(slides, page, number):
    """With the space bar, from a file, and nothing is cut off on the way."""
    path = slides[number - 1]
    page.goto(path.as_uri())
    page.wait_for_function("Reveal.isReady()")
    total = page.evaluate("Reveal.getTotalSlides()")
    assert total > 15
    steps = page.evaluate("document.querySelectorAll('.fragment').length") + total - 1
    at_the_end, cut = "Reveal.isLastSlide() && !Reveal.availableFragments().next", {}
    for step in range(steps + 1):
        assert page.evaluate(at_the_end) == (step == steps)
        if found := page.evaluate(CUT_OFF):
            cut[page.evaluate("Reveal.getIndices().h + 1")] = found
        page.keyboard.press("Space")
    assert not cut
    assert not page.problems and {urlsplit(url).scheme for url in page.asked} <= {"file", "data", "blob"}


# ---- JupyterLab ----


def answers(port):
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False


@contextlib.contextmanager
def lab(folder):
    """The address of a JupyterLab whose root is this folder."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    token = secrets.token_hex(16)
    settings = [
        f"--ServerApp.root_dir={folder}",
        "--ServerApp.ip=127.0.0.1",
        f"--ServerApp.port={port}",
        f"--IdentityProvider.token={token}",
        "--ServerApp.open_browser=False",
        "--ServerApp.allow_root=True",
        "--LabApp.news_url=None",
        "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
        "--ServerApp.jpserver_extensions={'jupyterlab': True}",
    ]
    log = folder / "jupyterlab.log"
    with log.open("w") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "jupyterlab", *settings],
            cwd=folder,
            stdout=out,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
    try:
        deadline = time.monotonic() + 120
        while not answers(port):  # its log names the address before anybody listens there
            assert process.poll() is None and time.monotonic() < deadline, (
                "JupyterLab did not start:\n" + log.read_text()
            )
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}/lab/tree/{{}}?token={token}"
    finally:
        process.terminate()
        process.wait(60)


def run_all_cells(page, folder, notebook, minutes):
    """Open a notebook in JupyterLab, run it by the menu and save it.

    Returns its cells, and how many tables and pictures stand on the page.
    """
    with lab(folder) as address:
        page.goto(address.format(notebook))
        # Earlier there is no kernel that could run anything.
        page.wait_for_selector("#jp-main-statusbar >> text=/\\| Idle/")
        page.click('.lm-MenuBar-itemLabel:text-is("Run")')
        page.click('.lm-Menu-itemLabel:text-is("Run All Cells")')
        page.wait_for_function(
            """() => {
            const found = [...document.querySelectorAll('.jp-InputArea-prompt')];
            const prompts = found.map(prompt => prompt.textContent).filter(text => text.trim());
            return prompts.length && prompts.every(text => /\\[\\d+\\]/.test(text)); }""",
            timeout=60_000 * minutes,
        )
        page.keyboard.press("Control+s")
        page.wait_for_function("() => !document.querySelector('.jp-mod-dirty')")
        shown = {kind: page.locator(f".jp-OutputArea-output {kind}").count() for kind in ("table", "img")}
    return json.loads((folder / notebook).read_text(encoding="utf-8"))["cells"], shown


def without_outputs(notebook, target):
    book = json.loads(notebook.read_text(encoding="utf-8"))
    for cell in book["cells"]:
        cell.update({"outputs": [], "execution_count": None} if cell["cell_type"] == "code" else {})
    target.write_text(json.dumps(book), encoding="utf-8")


@pytest.mark.slow
def test_quickstart_runs_in_jupyterlab(page, tmp_path):
    pytest.importorskip("jupyterlab")
    without_outputs(ROOT / "nbs/00_quickstart.ipynb", tmp_path / "00_quickstart.ipynb")
    cells, shown = run_all_cells(page, tmp_path, "00_quickstart.ipynb", minutes=15)
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert all(cell["execution_count"] for cell in code)
    outputs = [output for cell in code for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error"]
    assert shown["table"] and shown["img"], shown
