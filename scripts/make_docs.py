#!/usr/bin/env python3
"""Builds the site into _docs/: the notebooks go through nbdev's processing, then Quarto where it is
installed, else smalldocs.

    python scripts/make_docs.py [--serve [PORT]]

Everything that a page needs is in the folder: it works from a disk, without a server, and asks no
other host for anything.
"""
import argparse
import base64
import functools
import http.server
import io
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import nbformat
import yaml
from bs4 import BeautifulSoup
from colab import address, settings
from lighten import lighten
from PIL import Image

ROOT = Path(__file__).parents[1]
STAGE, SITE = ROOT / "_proc", ROOT / "_docs"
KATEX = re.compile(r"https://cdn\.jsdelivr\.net/npm/katex@[\w.]+/dist/(?:contrib/)?")


def stage(cfg: dict) -> None:
    "The processed notebooks, the configuration and the assets, in one folder."
    from nbdev.serve import proc_nbs

    proc_nbs(n_workers=min(2, os.cpu_count() or 1), force=True)
    for name, target in (("nbs/images", "images"), ("site", "assets")):
        shutil.copytree(ROOT / name, STAGE / target, dirs_exist_ok=True)
    config = yaml.safe_load((ROOT / "_quarto.yml").read_text(encoding="utf-8"))
    config["website"] |= {
        "repo-url": cfg["git_url"], "repo-branch": cfg["branch"], "repo-subdir": cfg["nbs_path"],
        "repo-actions": ["edit", "source", "issue"],
        "site-url": cfg["doc_host"] + cfg["doc_baseurl"],
    }
    if shutil.which("quarto"):
        command = ["quarto", "--version"]
        version = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        if [int(number) for number in version.split(".")[:2]] < [1, 9]:
            config["website"].pop("llms-txt", None)  # older ones refuse what they do not know
    (STAGE / "_quarto.yml").write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    for path in STAGE.rglob("*.ipynb"):
        adapt(path, cfg)


def in_quotes(found: re.Match) -> str:
    "A figure's description as YAML, in which a colon would end it."
    return f"#| fig-alt: {json.dumps(found[1], ensure_ascii=False)}"


def adapt(path: Path, cfg: dict) -> None:
    "Links out of the notebooks' folder lead to the repository; each page can be opened in Colab."
    notebook, place = nbformat.read(path, as_version=4), path.relative_to(STAGE)
    source = f"{cfg['git_url']}/blob/{cfg['branch']}"
    colab = address(f"{cfg['nbs_path']}/{place.as_posix()}")
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            up = r"\.\./" * len(place.parts)
            cell.source = re.sub(rf"\]\({up}(?!\.\.)", f"]({source}/", cell.source)
        if cell.cell_type == "code":
            cell.source = re.sub(r"(?m)^#\| fig-alt: *(.+)$", in_quotes, cell.source)
        if cell.cell_type == "raw" and cell.source.startswith("---"):
            front = yaml.safe_load(cell.source.strip().strip("-"))
            # pages keep the notebooks' names, so that links between them hold
            front.pop("output-file", None)
            front["code-links"] = [{"text": "Open in Colab", "href": colab, "icon": "play-circle"}]
            cell.source = f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n"
    nbformat.write(notebook, path)


def render() -> str:
    "The name of the program that made the pages."
    program = "quarto" if shutil.which("quarto") else "smalldocs"
    if program == "smalldocs":
        try:
            from smalldocs.cli import main
        except ImportError:
            raise SystemExit("the site needs Quarto, or smalldocs, "
                             "which comes with the project's tools from Python 3.11 on") from None

        if main(["render", str(STAGE)]):
            raise SystemExit("smalldocs failed")
    else:
        subprocess.run(["quarto", "render", str(STAGE), "--no-execute"], check=True)
    shutil.rmtree(SITE, ignore_errors=True)
    shutil.move(STAGE / "_docs", SITE)
    return program


def save_picture(data: bytes, folder: Path, number: int) -> tuple[str, tuple[int, int]]:
    "The figure as a file, a PNG in the smaller of two lossless forms: its name and its size."
    with Image.open(io.BytesIO(data)) as image:
        size, squeezed, kind = image.size, io.BytesIO(), f".{image.format.lower()}"
        image.save(squeezed, "webp", lossless=True, quality=60)
    ending, kept = min((".webp", squeezed.getvalue()), (kind, data), key=lambda form: len(form[1]))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"figure-{number}{ending}").write_bytes(kept)
    return f"{folder.name}/figure-{number}{ending}", size


def figures_as_files(soup: BeautifulSoup, page: Path) -> None:
    "Pictures inside the page become files beside it, with a size, so that nothing jumps."
    inside = re.compile("^data:image/(png|webp);base64,")
    for number, image in enumerate(soup.find_all("img", src=inside)):
        data = base64.b64decode(image["src"].split(",", 1)[1])
        image["src"], size = save_picture(data, page.with_name(page.stem + "_files"), number)
        image["width"], image["height"] = size
        image["loading"] = "lazy"


def drawings_as_parts(soup: BeautifulSoup, page: Path) -> None:
    "Drawings become part of the page, where their links work; other pictures get a size."
    for image in soup.find_all("img", src=re.compile(r"images/.*\.svg$")):
        drawing = (page.parent / image["src"]).read_text(encoding="utf-8")
        box = soup.new_tag("div", attrs={"class": "drawing"})
        box.append(BeautifulSoup(drawing, "html.parser").svg)
        (image.find_parent("figure") or image).replace_with(box)
    for image in soup.find_all("img", src=re.compile(r"^(\.\./)*images/")):
        with Image.open(page.parent / image["src"]) as picture:
            image["width"], image["height"] = picture.size


def finish(page: Path) -> None:
    "Pictures and captions as a page needs them; maths is served by the site itself."
    up = "../" * (len(page.relative_to(SITE).parts) - 1)
    text = KATEX.sub(f"{up}assets/katex/", page.read_text(encoding="utf-8"))
    soup = BeautifulSoup(text, "html.parser")
    figures_as_files(soup, page)
    drawings_as_parts(soup, page)
    # what is there for those who cannot see a picture need not be said twice
    for caption in soup.find_all("figcaption"):
        image = caption.find_parent("figure").find("img")
        if image is not None and caption.get_text(" ", strip=True) == image.get("alt"):
            caption.decompose()
    soup.head.append(soup.new_tag("script", src=f"{up}assets/site.js", defer=""))
    page.write_text(str(soup), encoding="utf-8")


def text_only(page: Path) -> None:
    "The plain text for language models, without the interactive figures' data."
    text = page.read_text(encoding="utf-8")
    text = re.sub(r"(?s)<style>.*?</style>|<script.*?</script>", "", text)
    page.write_text(re.sub(r"data:image/[a-z]+;base64,[\w+/=]+", "", text), encoding="utf-8")


def keep_to_itself(sheet: Path) -> None:
    """Themes fetch their fonts from elsewhere: the system's own are as good, and nobody is told who
    reads what."""
    text = sheet.read_text(encoding="utf-8")
    away = r"""@import\s+(?:url\()?(["']?)https?:[^"')]*\1\)?[^;]*;"""
    sheet.write_text(re.sub(away, "", text), encoding="utf-8")


def serve(port: int) -> None:
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(SITE))
    with http.server.ThreadingHTTPServer(("127.0.0.1", port), handler) as server:
        print(f"http://127.0.0.1:{port}/ (stop with Ctrl+C)", flush=True)
        server.serve_forever()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--serve", nargs="?", const=8000, type=int, metavar="PORT",
                        help="then serve it on this machine")
    args = parser.parse_args()
    os.chdir(ROOT)
    stage(settings())
    program = render()
    pages = sorted(SITE.rglob("*.html"))
    for page in pages:
        finish(page)
    for page in SITE.rglob("*.llms.md"):
        text_only(page)
    for sheet in SITE.rglob("*.css"):
        keep_to_itself(sheet)
    if program == "smalldocs":
        lighten(SITE)
    print(f"{len(pages)} pages in {SITE.name}/, made by {program}")
    if args.serve is not None:
        serve(args.serve)


if __name__ == "__main__":
    main()
