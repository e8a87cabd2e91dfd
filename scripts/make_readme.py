#!/usr/bin/env python3
"""Makes README.md from nbs/index.ipynb: its text, and its code with its outputs. Cells marked
`#| hide` stay out."""
import re
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter

ROOT = Path(__file__).parents[1]


def readme() -> str:
    notebook = nbformat.read(ROOT / "nbs" / "index.ipynb", as_version=4)
    notebook.cells = [cell for cell in notebook.cells if not cell.source.startswith("#| hide")]
    for cell in notebook.cells:
        cell.source = re.sub(r"(?m)^#\|.*\n?", "", cell.source)
    notebook.cells = [cell for cell in notebook.cells if cell.source.strip()]
    body, _ = MarkdownExporter().from_notebook_node(notebook)
    body = re.sub(r"\]\((?!https?:|#|\.\./)", "](nbs/", body).replace("](../", "](")
    note = "<!-- Made from nbs/index.ipynb by scripts/make_readme.py: edit the notebook. -->\n\n"
    return note + re.sub(r"\n{3,}", "\n\n", body).strip() + "\n"


if __name__ == "__main__":
    (ROOT / "README.md").write_text(readme(), encoding="utf-8")
