"The site in _docs/: its links, pictures and texts; and every page in a browser, where there is one."
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
SOURCES = [ROOT / "nbs", ROOT / "site", ROOT / "scripts", ROOT / "_quarto.yml", ROOT / "settings.ini"]


def newest(*folders):
    files = [file for folder in folders for file in ([folder] if folder.is_file() else folder.rglob("*"))]
    return max((file.stat().st_mtime for file in files if file.is_file()), default=0)


@pytest.fixture(scope="session")
def pages():
    "Every page, parsed; the site is built where it is missing or older than its sources."
    if not shutil.which("quarto"):
        pytest.importorskip("smalldocs", reason="neither Quarto nor smalldocs (Python 3.11 or newer) is here")
    if not (SITE / "index.html").exists() or (SITE / "index.html").stat().st_mtime < newest(*SOURCES):
        subprocess.run([sys.executable, str(ROOT / "scripts" / "make_docs.py")], check=True, cwd=ROOT)
    found = sorted(SITE.rglob("*.html"))
    assert len(found) > 15
    return {page: BeautifulSoup(page.read_text(encoding="utf-8"), "html.parser") for page in found}


def problems(pages, look) -> str:
    return "\n".join(f"{page.relative_to(SITE)}: {fault}" for page, soup in pages.items() for fault in look(page, soup))


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
        for tag in soup.find_all(["script", "img", "iframe", "source", "video"], src=True) + soup.find_all("link", href=True):
            address = tag.get("src") or tag["href"]
            if urlparse(address).scheme in ("http", "https") and tag.get("rel", [""])[0] != "canonical":
                yield address

    assert not (found := problems(pages, look)), found
    for sheet in SITE.rglob("*.css"):
        assert "url(http" not in sheet.read_text(encoding="utf-8", errors="replace"), sheet


def test_every_page_has_its_own_title_and_ids(pages):
    titles = Counter(soup.title.get_text() for soup in pages.values())
    assert max(titles.values()) == 1, titles.most_common(3)

    def look(page, soup):
        twice = [name for name, count in Counter(tag["id"] for tag in soup.find_all(id=True)).items() if count > 1]
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
        first = next(c for c in cells[1:] if c["cell_type"] == "markdown" and not "".join(c["source"]).startswith(("#| hide", "[Open in Colab]")))
        said = re.sub(r"\]\([^)]*\)", "]", "".join(first["source"]).split("\n\n")[0])  # links without their addresses
        words = re.findall(r"\w+", said)[:8]
        assert re.search(r"\W+".join(words), soup.get_text()), (page, words)


WEIGHTS = {"index.html": 500_000, "explorer.html": 1_000_000}  # bytes; 3,000,000 for lessons


SHIFT = """() => new Promise((done) => {
  let sum = 0;
  new PerformanceObserver((list) => list.getEntries().forEach((entry) => { sum += entry.value; })).observe({type: "layout-shift", buffered: true});
  setTimeout(() => done(sum), 600);
})"""


def test_pages_are_light_and_do_not_jump(pages, browser):
    "Bytes that a page loads, uncompressed, with all of its pictures; how far things move while it loads (0.1 counts as good)."
    for page in pages:
        tab, loaded = browser.new_page(), set()
        tab.on("request", lambda request: loaded.add(urldefrag(request.url)[0]))
        tab.goto(page.as_uri())
        shift = tab.evaluate(SHIFT)
        assert shift < 0.1, (page.name, shift)
        tab.evaluate("document.querySelectorAll('img[loading=lazy]').forEach(i => i.loading = 'eager')")
        tab.wait_for_load_state("networkidle")
        files = [unquote(urlparse(address).path) for address in loaded if address.startswith("file:")]
        total = sum(os.path.getsize(file) for file in files if os.path.exists(file))
        assert total < WEIGHTS.get(page.name, 3_000_000), (page.name, total)
        tab.close()


# Code is coloured by a few classes: blocks that show no new one are hidden, since contrast takes axe long.
ONE_OF_EACH = """() => {
  const seen = new Set();
  for (const block of document.querySelectorAll("main pre")) {
    const classes = [block.className + getComputedStyle(block).backgroundColor, ...[...block.querySelectorAll("[class]")].map((e) => e.className)];
    if (classes.every((name) => seen.has(name))) block.style.display = "none";
    classes.forEach((name) => seen.add(name));
  }
}"""


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
            found = tab.evaluate("axe.run(document, {resultTypes: ['violations'], runOnly: ['wcag2a', 'wcag2aa', 'wcag21a', 'wcag21aa', 'wcag22aa']})")
            faults += [f"{page.name}, {scheme}: {v['id']}: {n['html'][:120]} {n['failureSummary'][:200]}" for v in found["violations"] for n in v["nodes"]]
        started.close()
    return faults


def test_everybody_can_use_every_page(pages, browser):
    "axe-core finds nothing against WCAG 2.2, levels A and AA, in both themes."
    axe = pytest.importorskip("axe_playwright_python")
    script = Path(axe.__file__).with_name("axe.min.js").read_text(encoding="utf-8")
    with ThreadPoolExecutor(2) as both:
        jobs = [both.submit(axe_faults, list(pages), scheme, script) for scheme in ("light", "dark")]
        faults = [fault for job in jobs for fault in job.result()]
    assert not faults, "\n".join(faults[:20])


def test_every_page_in_a_browser(pages, browser):
    "No error, no request to elsewhere, maths set, pictures there, nothing wider than the screen."
    faults, tab = [], browser.new_page(viewport={"width": 1280, "height": 900})
    tab.on("console", lambda message: message.type == "error" and faults.append(f"{tab.url}: console: {message.text}"))
    tab.on("pageerror", lambda error: faults.append(f"{tab.url}: {error}"))
    tab.on("request", lambda request: urlparse(request.url).scheme in ("http", "https") and faults.append(f"{tab.url}: asks {request.url}"))
    for page in pages:
        tab.goto(page.as_uri())
        tab.wait_for_load_state("load")
        tab.wait_for_timeout(300)
        left = tab.evaluate("[...document.querySelectorAll('.math')].filter(e => !e.querySelector('.katex')).map(e => e.textContent.slice(0, 60))")
        wrong = tab.evaluate("[...document.querySelectorAll('.katex-error')].map(e => e.textContent.slice(0, 80))")
        faults += [f"{page.name}: maths as source: {text}" for text in left + wrong]
        broken = tab.evaluate("[...document.images].filter(i => i.complete && !i.naturalWidth && i.loading != 'lazy').map(i => i.src)")
        faults += [f"{page.name}: broken picture {source}" for source in broken]
        for width in (360, 768, 1280):
            tab.set_viewport_size({"width": width, "height": 900})
            over = tab.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
            faults += [f"{page.name}: {over} pixels too wide at {width}"] if over > 1 else []
    tab.close()
    assert not faults, "\n".join(faults[:40])
