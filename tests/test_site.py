"The site in _docs/: its links, pictures and texts; every page in a browser, where there is one."
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import unquote, urldefrag, urlparse

import pytest
from bs4 import BeautifulSoup
from conftest import BROWSER, FLAGS, ROOT

SITE = ROOT / "_docs"
SOURCES = [ROOT / name for name in ("nbs", "site", "scripts", "_quarto.yml", "settings.ini")]


def newest(*folders):
    files = []
    for folder in folders:
        files += [folder] if folder.is_file() else folder.rglob("*")
    return max((file.stat().st_mtime for file in files if file.is_file()), default=0)


@pytest.fixture(scope="session")
def pages():
    "Every page, parsed; the site is built where it is missing or older than its sources."
    if not shutil.which("quarto"):
        reason = "neither Quarto nor smalldocs (Python 3.11 or newer) is here"
        pytest.importorskip("smalldocs", reason=reason)
    index = SITE / "index.html"
    if not index.exists() or index.stat().st_mtime < newest(*SOURCES):
        command = [sys.executable, str(ROOT / "scripts" / "make_docs.py")]
        subprocess.run(command, check=True, cwd=ROOT)
    found = sorted(SITE.rglob("*.html"))
    assert len(found) > 15
    return {page: BeautifulSoup(page.read_text(encoding="utf-8"), "html.parser") for page in found}


def problems(pages, look) -> str:
    found = [(page, fault) for page, soup in pages.items() for fault in look(page, soup)]
    return "\n".join(f"{page.relative_to(SITE)}: {fault}" for page, fault in found)


def test_links_and_anchors_lead_somewhere(pages):
    anchors = {page: {tag["id"] for tag in soup.find_all(id=True)} for page, soup in pages.items()}

    def look(page, soup):
        for tag in soup.find_all("a", href=True):
            address, anchor = urldefrag(tag["href"])
            if urlparse(address).scheme:
                continue
            target = (page.parent / unquote(address)).resolve() if address else page
            target = target / "index.html" if target.is_dir() else target
            if not target.exists():
                yield f"leads nowhere: {tag['href']}"
            elif anchor and target.suffix == ".html" and unquote(anchor) not in anchors[target]:
                yield f"no such anchor: {tag['href']}"

    assert not (found := problems(pages, look)), found


def test_pictures_exist_and_are_described(pages):
    def look(page, soup):
        for image in soup.find_all("img"):
            if not urlparse(image["src"]).scheme and not (page.parent / image["src"]).exists():
                yield f"missing picture {image['src']}"
            if not image.get("alt", "").strip():
                yield f"no alternative text: {image['src'][:60]}"
            if not image.get("width"):
                yield f"no size, so that the page jumps: {image['src'][:60]}"

    assert not (found := problems(pages, look)), found


def test_nothing_is_asked_of_another_host(pages):
    def look(page, soup):
        media = soup.find_all(["script", "img", "iframe", "source", "video"], src=True)
        for tag in media + soup.find_all("link", href=True):
            address = tag.get("src") or tag["href"]
            elsewhere = urlparse(address).scheme in ("http", "https")
            if elsewhere and tag.get("rel", [""])[0] != "canonical":
                yield address

    assert not (found := problems(pages, look)), found
    for sheet in SITE.rglob("*.css"):
        assert "url(http" not in sheet.read_text(encoding="utf-8", errors="replace"), sheet


def test_every_page_has_its_own_title_and_ids(pages):
    titles = Counter(soup.title.get_text() for soup in pages.values())
    assert max(titles.values()) == 1, titles.most_common(3)

    def look(page, soup):
        ids = Counter(tag["id"] for tag in soup.find_all(id=True))
        twice = [name for name, count in ids.items() if count > 1]
        if twice:
            yield f"ids twice: {twice[:5]}"
        if not soup.html.get("lang"):
            yield "no language"

    assert not (found := problems(pages, look)), found


def test_the_introductions_are_there(pages):
    "nbdev drops what stands beside the title: the first paragraphs must have come through."
    for page, soup in pages.items():
        notebook = ROOT / "nbs" / page.relative_to(SITE).with_suffix(".ipynb")
        cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
        texts = ["".join(c["source"]) for c in cells[1:] if c["cell_type"] == "markdown"]
        first = next(t for t in texts if not t.startswith(("#| hide", "[Open in Colab]")))
        # links without their addresses
        said = re.sub(r"\]\([^)]*\)", "]", first.split("\n\n")[0])
        words = re.findall(r"\w+", said)[:8]
        assert re.search(r"\W+".join(words), soup.get_text()), (page, words)


WEIGHTS = {"index.html": 500_000, "explorer.html": 1_000_000}  # bytes; 3,000,000 for lessons


SHIFT = """() => new Promise((done) => {
  let sum = 0;
  new PerformanceObserver((list) => {
    list.getEntries().forEach((entry) => { sum += entry.value; });
  }).observe({type: "layout-shift", buffered: true});
  setTimeout(() => done(sum), 600);
})"""
EAGER = "document.querySelectorAll('img[loading=lazy]').forEach(i => i.loading = 'eager')"


def test_pages_are_light_and_do_not_jump(pages, browser):
    """Bytes that a page loads, uncompressed, with all of its pictures;
    how far things move while it loads (0.1 counts as good)."""
    for page in pages:
        tab, loaded = browser.new_page(), set()
        tab.on("request", lambda request: loaded.add(urldefrag(request.url)[0]))
        tab.goto(page.as_uri())
        shift = tab.evaluate(SHIFT)
        assert shift < 0.1, (page.name, shift)
        tab.evaluate(EAGER)
        tab.wait_for_load_state("networkidle")
        files = [unquote(urlparse(url).path) for url in loaded if url.startswith("file:")]
        total = sum(os.path.getsize(file) for file in files if os.path.exists(file))
        assert total < WEIGHTS.get(page.name, 3_000_000), (page.name, total)
        tab.close()


# Code is coloured by a few classes:
# blocks that show no new one are hidden, since contrast takes axe long.
ONE_OF_EACH = """() => {
  const seen = new Set();
  for (const block of document.querySelectorAll("main pre")) {
    const inside = [...block.querySelectorAll("[class]")].map((e) => e.className);
    const classes = [block.className + getComputedStyle(block).backgroundColor, ...inside];
    if (classes.every((name) => seen.has(name))) block.style.display = "none";
    classes.forEach((name) => seen.add(name));
  }
}"""
AXE = """axe.run(document, {
  resultTypes: ['violations'],
  runOnly: ['wcag2a', 'wcag2aa', 'wcag21a', 'wcag21aa', 'wcag22aa'],
})"""


def axe_faults(pages: list[Path], scheme: str, script: str) -> list[str]:
    "What axe-core finds on the pages in one theme, in a browser of its own."
    from playwright.sync_api import sync_playwright

    faults = []
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=BROWSER, args=FLAGS)
        tab = started.new_page(viewport={"width": 1280, "height": 900}, color_scheme=scheme)
        for page in pages:
            tab.goto(page.as_uri())
            tab.wait_for_timeout(400)
            tab.evaluate(ONE_OF_EACH)
            tab.evaluate(script)
            found = [(v["id"], n) for v in tab.evaluate(AXE)["violations"] for n in v["nodes"]]
            faults += [
                f"{page.name}, {scheme}: {rule}: {n['html'][:120]} {n['failureSummary'][:200]}"
                for rule, n in found
            ]
        started.close()
    return faults


def test_everybody_can_use_every_page(pages, browser):
    "axe-core finds nothing against WCAG 2.2, levels A and AA, in both themes."
    axe = pytest.importorskip("axe_playwright_python")
    script = Path(axe.__file__).with_name("axe.min.js").read_text(encoding="utf-8")
    with ThreadPoolExecutor(2) as both:
        jobs = [both.submit(axe_faults, list(pages), theme, script) for theme in ("light", "dark")]
        faults = [fault for job in jobs for fault in job.result()]
    assert not faults, "\n".join(faults[:20])


# asked of the page in the browser
MATHS_LEFT = (
    "[...document.querySelectorAll('.math')].filter(e => !e.querySelector('.katex'))"
    ".map(e => e.textContent.slice(0, 60))")
MATHS_WRONG = (
    "[...document.querySelectorAll('.katex-error')].map(e => e.textContent.slice(0, 80))")
BROKEN = (
    "[...document.images].filter(i => i.complete && !i.naturalWidth && i.loading != 'lazy')"
    ".map(i => i.src)")
TOO_WIDE = "document.documentElement.scrollWidth - document.documentElement.clientWidth"


def faults_of(tab) -> list[str]:
    "A list that fills with a tab's errors, and with what it asks of other hosts."
    faults = []

    def hear(message):
        if message.type == "error":
            faults.append(f"{tab.url}: console: {message.text}")

    def see(request):
        if urlparse(request.url).scheme in ("http", "https"):
            faults.append(f"{tab.url}: asks {request.url}")

    tab.on("console", hear)
    tab.on("pageerror", lambda error: faults.append(f"{tab.url}: {error}"))
    tab.on("request", see)
    return faults


def test_every_page_in_a_browser(pages, browser):
    "No error, no request to elsewhere, maths set, pictures there, nothing wider than the screen."
    tab = browser.new_page(viewport={"width": 1280, "height": 900})
    faults = faults_of(tab)
    for page in pages:
        tab.goto(page.as_uri())
        tab.wait_for_load_state("load")
        tab.wait_for_timeout(300)
        maths = tab.evaluate(MATHS_LEFT) + tab.evaluate(MATHS_WRONG)
        faults += [f"{page.name}: maths as source: {text}" for text in maths]
        faults += [f"{page.name}: broken picture {source}" for source in tab.evaluate(BROKEN)]
        for width in (360, 768, 1280):
            tab.set_viewport_size({"width": width, "height": 900})
            over = tab.evaluate(TOO_WIDE)
            faults += [f"{page.name}: {over} pixels too wide at {width}"] if over > 1 else []
    tab.close()
    assert not faults, "\n".join(faults[:40])
