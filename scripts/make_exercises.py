#!/usr/bin/env python3
"""Makes exercises/*.ipynb from the lessons: bodies of cells marked `#| exercise NAME
METHODS-TO-KEEP` are cut out.

Signature, comments on parameters, docstring and numbered step comments stay. The same lessons give
the same bytes everywhere: nothing is executed, and ids come from names. With --check nothing is
written; the exit status is 1 if something is out of date.
"""
import ast
import hashlib
import io
import json
import re
import sys
import tokenize
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
MARK = re.compile(r"^#\|\s*exercise\s+(.+)$", re.M)
STEP = re.compile(r"^#\s*\d+\.")
DIRECTIVE = re.compile(r"^#\|.*\n?", re.M)

INTRO = """---

**This is the exercise notebook of this lesson.** {count} exercises and {points} points are \
waiting. Text and figures are those of
the lesson `nbs/{name}.ipynb`, where you find all answers. Under each exercise:

- `check(...)` tells you at once: right, or which mistake it is and where to look. \
It runs your code and changes nothing.
- `hint("...")` gives three hints, one at a time; `solution("...")` shows our answer; \
`use("...")` puts ours in place of yours, so that you can go on.
  Remove the `#` in front to use them.
- An exercise that you leave alone does not stop the notebook: ours stands in for it.

Your points are kept in the folder in which the notebook runs (`vit_course_progress.jsonl`). \
On Colab nothing is kept by itself: choose
*File → Save a copy in Drive* before you begin; \
the file with the points goes when its machine does."""

# pages without a learners' notebook: named, not linked, since a learner's folder does not hold them
ELSEWHERE = re.compile(r"\[([^\]]+)\]\(((?:toolbox/|10_)[^)]*)\)")
SETUP = "from vit_course.exercises import check, hint, progress, solution, use"
LADDER = '# hint("{0}")\n# solution("{0}")\n# use("{0}")'
SLOW = (
    "*(Here the lesson has a cell that takes long or needs more than the course installs. "
    "It is left out; you find it in the lesson.)*"
)


def numbered_comments(source: str, first: int, last: int) -> list[str]:
    "Step comments in lines first..last, with the comment lines that go on below each."
    found, previous = [], None
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        row = token.start[0]
        if token.type != tokenize.COMMENT or not first <= row <= last:
            continue
        own_line = not token.line[: token.start[1]].strip()
        if STEP.match(token.string) or (own_line and previous == row - 1):
            found.append(token.string)
            previous = row if own_line else None
    return found


def is_super_call(statement: ast.stmt) -> bool:
    return ast.unparse(statement) == "super().__init__()"


def stub(lines: list[str], source: str, function: ast.FunctionDef) -> list[str]:
    "A function's lines without its body."
    body = function.body
    has_doc = ast.get_docstring(function) is not None
    code = body[has_doc:]
    end = function.end_lineno
    head_end = body[0].end_lineno if has_doc else function.body[0].lineno - 1
    while not has_doc and lines[head_end - 1].strip().startswith("#"):
        head_end -= 1  # comments above the first statement belong to the body
    indent = " " * body[0].col_offset
    kept = lines[function.lineno - 1 : head_end]
    kept += [indent + "super().__init__()"] if code and is_super_call(code[0]) else []
    kept += [indent + comment for comment in numbered_comments(source, head_end + 1, end)]
    return kept + [f'{indent}raise NotImplementedError("your code here")']


def cut(source: str, name: str, keep: list[str]) -> str:
    "A cell's source without the bodies that are asked for."
    lines = source.split("\n")
    target = next(n for n in ast.parse(source).body if getattr(n, "name", None) == name)
    functions = [target]
    if isinstance(target, ast.ClassDef):
        functions = [n for n in target.body if isinstance(n, ast.FunctionDef)]
        functions = [n for n in functions if n.name not in keep]
    for function in reversed(functions):
        lines[function.lineno - 1 : function.end_lineno] = stub(lines, source, function)
    return "\n".join(lines)


def is_refusal(node: ast.stmt) -> bool:
    "Whether a statement only tests that our code refuses something, in our own words."
    if isinstance(node, ast.For):
        return all(is_refusal(n) for n in node.body)
    call = node.value if isinstance(node, ast.Expr) else None
    if not (isinstance(call, ast.Call) and getattr(call.func, "id", "") == "test_fail"):
        return False
    if not any(k.arg == "contains" for k in call.keywords):
        return False
    return begins_with(getattr(call.args[0], "body", None)) not in ("torch", "nn", "pl")


def begins_with(node: ast.expr | None) -> str:
    "The name that a call begins with: torch in `torch.cat(...)`."
    while isinstance(node, (ast.Call, ast.Attribute)):
        node = node.func if isinstance(node, ast.Call) else node.value
    return getattr(node, "id", "")


def without_refusals(source: str) -> str:
    """A cell without tests of error messages: a right answer may say them otherwise, and `check`
    grades what is asked."""
    nodes = [n for n in ast.parse(source).body if is_refusal(n)]
    gone = {row for n in nodes for row in range(n.lineno, n.end_lineno + 1)}
    if not gone:
        return source
    kept = [line for row, line in enumerate(source.split("\n"), 1) if row not in gone]
    return "\n".join(kept).strip("\n")


def attributes(source: str, name: str, keep: list[str]) -> list[str]:
    "What the lesson's version of a class calls its parts."
    target = next(n for n in ast.parse(source).body if getattr(n, "name", None) == name)
    methods = [] if "__init__" in keep else getattr(target, "body", [])
    inits = [n for n in methods if getattr(n, "name", "") == "__init__"]
    found = [n for init in inits for n in ast.walk(init) if isinstance(n, ast.Attribute)]
    found = [n for n in found if isinstance(n.ctx, ast.Store)]
    return list(dict.fromkeys(n.attr for n in found if getattr(n.value, "id", "") == "self"))


def cell(kind: str, source: str, key: str, outputs: list | None = None) -> dict:
    "A notebook's cell whose id depends on its key alone."
    made = {"cell_type": kind, "id": hashlib.sha1(key.encode()).hexdigest()[:8], "metadata": {}}
    made["source"] = source.splitlines(True)
    return made | ({"execution_count": None, "outputs": outputs or []} if kind == "code" else {})


def pictures(outputs: list[dict]) -> list[dict]:
    "The figures among a cell's outputs."
    found = [o["data"]["image/png"] for o in outputs if "image/png" in o.get("data", {})]
    shown = {"output_type": "display_data", "metadata": {}}
    return [shown | {"data": {"image/png": picture}} for picture in found]


def title(task) -> str:
    "What stands above an exercise."
    stars = "●" * task.difficulty + "○" * (5 - task.difficulty)
    points = f"{task.points} point{'s' * (task.points > 1)}"
    text = (f"### ✎ Exercise: `{task.name}`\n\n{points} · difficulty {stars} "
            f"({task.difficulty} of 5) · about {task.minutes} minutes")
    return text + (f"\n\n{task.asks}" if task.asks else "")


def exercise_cells(source: str, mark: str, bank: dict) -> list[dict]:
    "The cells that take the place of an answer."
    name, *keep = mark.split()
    if name not in bank:
        raise SystemExit(f"{name} is marked in a lesson, but vit_course/bank has no entry for it")
    clean = DIRECTIVE.sub("", source)
    text, parts = cut(clean, name, keep), attributes(clean, name, keep)
    head = title(bank[name])
    if parts:
        named = ", ".join(f"`{p}`" for p in parts)
        head += ("\n\nName its parts as you like; `check` does not mind. "
                 f"Some cells below look into them by our names, though: {named}.")
    check, ladder = f"check({name})", LADDER.format(name)
    return [cell("markdown", head, f"{name} title"), cell("code", text, f"{name} stub"),
            cell("code", check, f"{name} check"), cell("code", ladder, f"{name} ladder")]


def code_cells(old: dict, key: str, bank: dict) -> list[dict]:
    "The cells that take the place of one of the lesson's code."
    source = "".join(old["source"])
    mark = MARK.search(source) if old["cell_type"] == "code" else None
    if mark:
        return exercise_cells(source, mark[1], bank)
    if source.startswith("#| default_exp"):
        return [cell("code", SETUP, key)]
    if re.search(r"^#\| slow", source, re.M):
        return [cell("markdown", SLOW, key)]
    text = without_refusals(DIRECTIVE.sub("", source))
    return [cell("code", text, key, pictures(old["outputs"]))] if text.strip() else []


def convert(lesson: dict, name: str, bank: dict) -> dict:
    "A learner's notebook from a lesson."
    tasks = [t for t in bank.values() if t.lesson == name]
    intro = INTRO.format(name=name, count=len(tasks), points=sum(t.points for t in tasks))
    cells = []
    for number, old in enumerate(lesson["cells"]):
        if old["cell_type"] == "markdown":
            source = "".join(old["source"]) + (f"\n\n{intro}" if number == 0 else "")
            source = ELSEWHERE.sub(r"\1 (`nbs/\2`)", source)
            cells.append(cell("markdown", source, f"{name} {number}"))
        else:
            cells += code_cells(old, f"{name} {number}", bank)
    cells.append(cell("markdown", "## Your points", f"{name} points"))
    cells.append(cell("code", f'progress("{name[:2]}")', f"{name} progress"))
    metadata = {"kernelspec": {"display_name": "python3", "language": "python", "name": "python3"}}
    return {"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}


def fingerprint(book: dict) -> str:
    "A number for what the cells of a notebook say."
    sources = ["".join(c["source"]) for c in book["cells"]]
    return hashlib.sha1(json.dumps(sources).encode()).hexdigest()[:16]


def worked_in(file: Path) -> bool:
    """Whether somebody may have run or edited a notebook: those made here carry no execution count,
    and the fingerprint of their cells."""
    book = json.loads(file.read_text(encoding="utf-8"))
    made = book["metadata"].get("vit_course", {}).get("made")
    return made != fingerprint(book) or any(c.get("execution_count") for c in book["cells"])


def make_all() -> dict[Path, str]:
    "The text of each learners' notebook, by the file in which it belongs."
    from colab import with_colab

    from vit_course.exercises import bank

    made = {}
    for file in sorted((ROOT / "nbs").glob("[0-9]*.ipynb")):
        lesson = json.loads(file.read_text(encoding="utf-8"))
        code = ["".join(c["source"]) for c in lesson["cells"] if c["cell_type"] == "code"]
        if any(MARK.search(source) for source in code):
            book = with_colab(convert(lesson, file.stem, bank()), f"exercises/{file.name}")
            book["metadata"]["vit_course"] = {"made": fingerprint(book)}
            text = json.dumps(book, indent=1, ensure_ascii=False, sort_keys=True)
            made[ROOT / "exercises" / file.name] = text + "\n"
    return made


def is_up_to_date(file: Path, text: str) -> bool:
    return file.exists() and file.read_text(encoding="utf-8") == text


def main() -> int:
    made = make_all()
    stale = [f for f in (ROOT / "exercises").glob("*.ipynb") if f not in made]
    changed = [f for f, text in made.items() if not is_up_to_date(f, text)] + stale
    for file in changed:
        print(f"out of date: {file.relative_to(ROOT)}")
    if "--check" in sys.argv:
        return 1 if changed else 0
    there = [f for f in changed if f in made and f.exists()]
    if answers := [str(f.relative_to(ROOT)) for f in there if worked_in(f)]:
        print(f"nothing was written: {', '.join(answers)} may hold somebody's answers, "
              "since it was edited or run. Move it elsewhere, then try again")
        return 1
    (ROOT / "exercises").mkdir(exist_ok=True)
    for file, text in made.items():
        file.write_text(text, encoding="utf-8", newline="\n")
    print(f"{len(made)} notebooks in exercises/")
    if stale:
        names = ", ".join(str(f.relative_to(ROOT)) for f in stale)
        print(f"not made here, and left alone: {names}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
