#!/usr/bin/env python3
"""Gives each notebook a link to Colab and a first code cell that installs the package there, and
only there.

Both hold the repository's address, which is read from settings.ini: after a change there, run this
and commit what it writes.
"""
import hashlib
import json
from configparser import ConfigParser
from pathlib import Path

ROOT = Path(__file__).parents[1]
COLAB = "https://colab.research.google.com/github/{user}/{repo}/blob/{branch}/"
INSTALL = """#| hide
import sys
if "google.colab" in sys.modules:  # nothing happens elsewhere; Colab's own torch stays
    get_ipython().run_line_magic("pip", "install -q git+{git_url}")"""


def settings() -> dict:
    "What settings.ini says."
    config = ConfigParser(delimiters=["="])
    config.read(ROOT / "settings.ini", encoding="utf-8")
    return dict(config["DEFAULT"])


def address(place: str) -> str:
    "Where Colab opens a notebook of the repository."
    return COLAB.format(**settings()) + place


def is_ours(cell: dict) -> bool:
    "Whether this script wrote the cell."
    source = "".join(cell["source"])
    return source.startswith("[Open in Colab](") or '"google.colab" in sys.modules' in source


def cells(place: str) -> list[dict]:
    "The link and the installing cell of a notebook, by its place in the repository."
    made = []
    link, install = f"[Open in Colab]({address(place)})", INSTALL.format(**settings())
    for kind, source in (("markdown", link), ("code", install)):
        key = hashlib.sha1(f"{kind} {place} colab".encode()).hexdigest()[:8]
        lines = source.splitlines(True)
        made.append({"cell_type": kind, "id": key, "metadata": {}, "source": lines})
    made[1] |= {"execution_count": None, "outputs": []}
    return made


def with_colab(notebook: dict, place: str) -> dict:
    "The notebook with both cells after its title; the home page has no link."
    kept = [cell for cell in notebook["cells"] if not is_ours(cell)]
    own = cells(place)[1:] if place.endswith("index.ipynb") else cells(place)
    return notebook | {"cells": [*kept[:1], *own, *kept[1:]]}


def main() -> None:
    for file in sorted((ROOT / "nbs").rglob("*.ipynb")):
        if ".ipynb_checkpoints" not in file.parts:
            old = file.read_text(encoding="utf-8")
            book = with_colab(json.loads(old), file.relative_to(ROOT).as_posix())
            text = json.dumps(book, indent=1, ensure_ascii=False, sort_keys=True) + "\n"
            if text != old:
                file.write_text(text, encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
