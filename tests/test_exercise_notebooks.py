"""Learners' notebooks in a real Jupyter kernel: solved with the pasted solutions, and untouched.

Every lesson takes as long as its notebook;
VIT_COURSE_LESSONS names those to run ("03", "01 02", "all").
"""
import json
import os

import nbformat
import pytest
from nbclient import NotebookClient

from vit_course.exercises import bank, source_of

LESSONS = sorted({e.lesson for e in bank().values()})
CHOSEN = os.environ.get("VIT_COURSE_LESSONS", "03").split()
LESSONS = [n for n in LESSONS if "all" in CHOSEN or n[:2] in CHOSEN]


def run(notebook, folder, progress):
    "The notebook, run to its end by a kernel; an error in a cell raises."
    first = f"import os\nos.environ['VIT_COURSE_PROGRESS'] = {str(progress)!r}"
    notebook.cells.insert(0, nbformat.v4.new_code_cell(first))
    resources = {"metadata": {"path": str(folder)}}
    client = NotebookClient(notebook, timeout=600, kernel_name="python3", resources=resources)
    client.execute()
    return notebook


def outcomes(notebook) -> dict[str, str]:
    "What each check said, as text."
    found = {}
    for cell in notebook.cells:
        if cell.cell_type == "code" and cell.source.startswith("check("):
            found[cell.source[6:-1]] = cell.outputs[-1]["data"]["text/plain"]
    return found


@pytest.fixture
def learner(tmp_path):
    "A folder far from the repository with the learners' notebooks."
    from vit_course.exercises import write_notebooks

    write_notebooks(tmp_path / "mine")
    return tmp_path / "mine"


@pytest.mark.parametrize("lesson", LESSONS)
def test_untouched_notebook_runs_to_the_end(lesson, learner, tmp_path):
    notebook = nbformat.read(learner / f"{lesson}.ipynb", 4)
    said = outcomes(run(notebook, learner, tmp_path / "progress.jsonl"))
    assert set(said) == {n for n, e in bank().items() if e.lesson == lesson}
    assert all(": not attempted" in text for text in said.values()), said
    assert not (tmp_path / "progress.jsonl").exists()


@pytest.mark.parametrize("lesson", LESSONS)
def test_solved_notebook_earns_all_points(lesson, learner, tmp_path):
    notebook = nbformat.read(learner / f"{lesson}.ipynb", 4)
    code = [c for c in notebook.cells if c.cell_type == "code"]
    for before, cell in zip(code, code[1:]):
        if cell.source.startswith("check("):
            before.source = source_of(cell.source[6:-1])
    said = outcomes(run(notebook, learner, tmp_path / "progress.jsonl"))
    assert all(": right" in text for text in said.values()), said
    lines = [json.loads(line) for line in (tmp_path / "progress.jsonl").read_text().splitlines()]
    earned = {line["exercise"]: line["points"] for line in lines}
    assert earned == {n: bank()[n].points for n in said}
    total = sum(bank()[n].points for n in said)
    assert f"{total} of {total}" in notebook.cells[-1].outputs[-1]["data"]["text/plain"]
