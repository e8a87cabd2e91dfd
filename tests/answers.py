"Answers to exercises, as text: stubs from the learners' notebooks, rewrites from tests/rewrites."
import json
import re
from importlib import import_module
from pathlib import Path

from vit_course.exercises import Exercise, bank

ROOT = Path(__file__).parents[1]


def code_cells(lesson: str) -> list[str]:
    "Sources of the code cells of a learner's notebook."
    file = ROOT / "exercises" / f"{lesson}.ipynb"
    cells = json.loads(file.read_text(encoding="utf-8"))["cells"]
    return ["".join(c["source"]) for c in cells if c["cell_type"] == "code"]


def stub(exercise: Exercise) -> str:
    "The cell that a learner has to fill in."
    cells = code_cells(exercise.lesson)
    return cells[cells.index(f"check({exercise.name})") - 1]


def run(source: str, exercise: Exercise):
    "The object that a cell defines, in a namespace like the learner's."
    space = dict(vars(import_module(f"vit_course.{exercise.module}"))) | {"__name__": "__main__"}
    exec(source, space)
    return space[exercise.name]


def rewrites() -> list[tuple[str, str, str]]:
    "(exercise, what is different, complete code) of every rewrite."
    found = []
    for file in sorted((ROOT / "tests" / "rewrites").glob("*.py")):
        head, *parts = re.split(r"(?m)^# === ", file.read_text(encoding="utf-8"))
        for part in parts:
            title, code = part.split("\n", 1)
            name, _, what = title.partition(":")
            found.append((name.strip(), what.strip(), head + code))
    return found


def headings(lesson: str) -> set[str]:
    "The headings of a lesson."
    cells = json.loads((ROOT / "nbs" / f"{lesson}.ipynb").read_text(encoding="utf-8"))["cells"]
    text = "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")
    return set(re.findall(r"(?m)^#+ (.+?)\s*$", text))


def names() -> list[str]:
    "All exercises."
    return list(bank())
