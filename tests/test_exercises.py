"""check, hint, solution, use, progress, the learners' notebooks and the teacher's command,
as people meet them."""
import csv
import json
import random
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from answers import ROOT
from torch import Tensor, nn

from vit_course import exercises
from vit_course.exercises import (
    bank, check, earned, grade_notebook, hint, progress, solution, source_of, use)

COMMAND = [sys.executable, "-c", "from vit_course.cli import main; main()"]
RIGHT = """\
import torch
from torch import nn
import torch.nn.functional as F
def gelu(z):
    return F.gelu(z)
"""


@pytest.fixture(autouse=True)
def own_progress(tmp_path, monkeypatch):
    monkeypatch.setenv("VIT_COURSE_PROGRESS", str(tmp_path / "progress.jsonl"))


def answer(source: str, name: str, **space):
    given = {"__name__": "__main__", "torch": torch, "nn": nn, "Tensor": Tensor,
             "F": nn.functional}
    space = given | space
    exec(textwrap.dedent(source), space)
    return space[name]


def gelu(z):
    return nn.functional.gelu(z)


def test_outcome_can_be_built_upon():
    outcome = check(answer("def gelu(z):\n    return torch.relu(z)", "gelu"))
    assert outcome.status == "wrong" and outcome.exercise == "gelu" and outcome.points == 0
    assert isinstance(outcome.hint, str) and outcome.hint and isinstance(outcome.cause, str)
    assert "wrong" in str(outcome) and "wrong" in outcome._repr_html_()
    assert check(gelu).cause is None


MLP = (
    "class MLP(nn.Module):\n"
    "    def __init__(self, in_features, hidden_features=None, out_features=None, "
    "dropout=0., activation=nn.GELU):\n"
)
SLIPS = [
    (MLP + "        super().__init__()\n        self.a = nn.Linear(3, 3)\n"
     "    def foward(self, x): return self.a(x)", "wrong", "misspelt-method"),
    ("class MLP(nn.Module):\n    def __int__(self, in_features): pass\n"
     "    def forward(self, x): return x", "wrong", "misspelt-method"),
    (MLP + "        self.a = nn.Linear(3, 3)\n"
     "    def forward(self, x): return x", "error", "no-super-init"),
    (MLP + "        super().__init__()\n        self.layers = [nn.Linear(in_features, 3)]\n"
     "    def forward(self, x): return self.layers[0](x)", "wrong", "not-registered"),
    ("class MLP(nn.Module):\n    def __init__(self, in_features): super().__init__()\n"
     "    def forward(self, x): return x", "error", "signature"),
    ("def gelu(z):\n    out = F.gelu(z)", "wrong", "no-return"),
    ("def gelu(z):\n    return F.gelu(zz)", "error", "misspelt-name"),
    ("def gelu(z):\n    exit()", "error", "error"),
    ("def gelu(z):\n    z.mul_(0.5 * (1 + torch.erf(z.detach() / 2**0.5)))\n    return z",
     "wrong", "in-place changes-input input-changed"),
    ("def gelu(z):\n    torch.manual_seed(0)\n    return F.gelu(z)",
     "wrong", "random-state sets-seed"),
    ("def gelu(z):\n    return F.gelu(z.detach())", "wrong", "no-gradient"),
    ("def gelu(z):\n    return F.gelu(z).float()", "wrong", "dtype"),
    ("def gelu(z):\n    return z @ torch.zeros(z.shape[-1], 2)", "error", "float64"),
    ("def patchify(images, patch_size):\n    from einops import rearrange\n"
     "    if images.ndim == 4 and images.shape[-1] % patch_size:\n        raise ValueError('x')\n"
     "    return rearrange(images, 'c (r p) (s q) -> (r s) (p q c)', p=patch_size, q=patch_size)",
     "wrong", "no-batch-axis lost-batch-axis"),
]


@pytest.mark.parametrize("source, status, cause", SLIPS)
def test_slips_are_named(source, status, cause):
    outcome = check(answer(source, source.split()[1].split("(")[0]))
    assert outcome.status == status and outcome.cause in cause.split(), str(outcome)


def test_an_endless_answer_is_stopped(monkeypatch):
    monkeypatch.setattr(exercises, "SECONDS", 0.5)
    outcome = check(answer("def gelu(z):\n    while True: print('again')", "gelu"))
    assert (outcome.status, outcome.cause) == ("error", "too-long")


def test_the_package_itself_earns_nothing():
    from vit_course.encoder import gelu

    outcome = check(gelu)
    assert (outcome.status, outcome.points) == ("right", 0) and not earned()


def test_unknown_names_and_wrong_objects():
    with pytest.raises(ValueError, match="gelu"):
        hint("gelo")
    with pytest.raises(ValueError, match="without quotes"):
        check("gelu")
    with pytest.raises(ValueError, match="function or a class"):
        check(nn.GELU())
    assert check(lambda z: nn.functional.gelu(z), "gelu").status == "right"
    with pytest.raises(ValueError, match="step=4"):
        hint("gelu", 4)


NOISY = """
import random
import numpy as np
def gelu(z):
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float16)
    torch.set_grad_enabled(False)
    print("noise")
    return z
"""


def test_nothing_outside_changes():
    noisy = answer(NOISY, "gelu")
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    torch.set_default_dtype(torch.float64)
    before = vars(noisy).copy()
    dice = torch.get_rng_state(), random.getstate(), str(np.random.get_state())
    try:
        with torch.no_grad():
            check(noisy)
            assert not torch.is_grad_enabled()
        assert torch.get_num_threads() == 2 and torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_num_threads(threads)
    assert torch.equal(dice[0], torch.get_rng_state())
    assert dice[1] == random.getstate() and dice[2] == str(np.random.get_state())
    assert vars(noisy) == before


def test_checks_print_nothing(capsys):
    check(answer("def gelu(z):\n    print('noise')\n    return z", "gelu"))
    assert capsys.readouterr() == ("", "")


def test_hints_climb_and_solution_is_the_source():
    exercises._GIVEN.clear()
    first, second, third, again = (hint("gelu") for _ in range(4))
    assert first.startswith("Hint 1") and second.startswith("Hint 2")
    assert third.startswith("Hint 3") and again == third
    assert str(solution("gelu")) == source_of("gelu") and "class" in solution("MLP")._repr_html_()


def test_use_puts_a_stand_in_that_earns_nothing():
    space = {"use": use, "check": check}
    exec('note = use("gelu")\nvalue = gelu\noutcome = check(gelu)', space)
    assert "gelu" in space["note"] and space["outcome"].status == "not attempted" and not earned()
    assert torch.equal(space["gelu"](torch.ones(2)), gelu(torch.ones(2)))


def test_an_untouched_answer_is_stood_in_for():
    space = {"check": check, "torch": torch, "Tensor": Tensor}
    exec('def gelu(z):\n    "doc"\n    raise NotImplementedError("your code here")\n'
         'outcome = check(gelu)\nvalue = gelu(torch.ones(2))', space)
    assert space["outcome"].status == "not attempted" and space["value"].shape == (2,)


def test_progress_survives_and_never_falls(tmp_path):
    check(gelu)
    points = earned()["gelu"]
    check(answer("def gelu(z):\n    return z", "gelu"))
    file = tmp_path / "progress.jsonl"
    file.write_text(file.read_text() + '{"exercise": "MLP", "poi')  # a line that was cut off
    check(answer(source_of("create_mlp"), "create_mlp"))
    assert earned() == {"gelu": points, "create_mlp": bank()["create_mlp"].points}
    table = progress("04")
    assert table.points == sum(earned().values())
    assert "gelu" in repr(table) and "gelu" in table._repr_html_()
    with pytest.raises(ValueError, match="lesson='99'"):
        progress("99")


def test_a_folder_that_cannot_be_written_does_not_stop_a_check(monkeypatch):
    monkeypatch.setenv("VIT_COURSE_PROGRESS", "/no/such/folder/file.jsonl")
    outcome = check(gelu)
    assert outcome.status == "right" and "could not be kept" in outcome.hint


def test_command_puts_notebooks_and_overwrites_nothing(tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "03_attention.ipynb").write_text("my work")
    command = [*COMMAND, "exercises", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert (folder / "03_attention.ipynb").read_text() == "my work" and "left alone" in done.stdout
    shipped = {f.name for f in (ROOT / "exercises").glob("*.ipynb")}
    assert {f.name for f in folder.glob("*.ipynb")} == shipped


def notebook(path: Path, *cells: str) -> Path:
    empty = {"cell_type": "code", "metadata": {}, "outputs": [], "execution_count": None}
    made = [empty | {"source": c} for c in cells]
    path.write_text(json.dumps({"cells": made, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}))
    return path


FIRST = "from vit_course.exercises import check"
WRONG = "def gelu(z):\n    return z"
HANDED_IN = {  # the cells of a notebook by its name
    "good": [FIRST, RIGHT, "check(gelu)"],
    "wrong": [FIRST, WRONG, "check(gelu)", "1 / 0"],
    "hangs": [RIGHT, "while True: pass"],
    "prints": ["while True: print('x' * 1000)", RIGHT],
    "dies": [RIGHT, "import os; os._exit(3)"],
    "cheats": ["def check(f): return 'right'", WRONG, "check(gelu)"],
    "borrows": [FIRST, "from vit_course.encoder import gelu", "check(gelu)"],
    "other": ["x = 1"],
}


def test_grading_goes_on_whatever_happens(tmp_path):
    files = {k: notebook(tmp_path / f"{k}.ipynb", *cells) for k, cells in HANDED_IN.items()}
    (tmp_path / "broken.ipynb").write_text("{")
    files |= {"broken": tmp_path / "broken.ipynb", "absent": tmp_path / "absent.ipynb"}
    before = {k: f.read_bytes() for k, f in files.items() if f.exists()}
    seconds = {"prints": 10, "hangs": 25}
    rows = {k: grade_notebook(f, seconds=seconds.get(k, 100)) for k, f in files.items()}
    points = {k: row["points"] for k, row in rows.items()}
    worth = bank()["gelu"].points
    assert points == {
        "good": worth, "hangs": worth, "dies": worth, "wrong": 0, "prints": 0,
        "cheats": 0, "borrows": 0, "other": 0, "broken": 0, "absent": 0}
    notes = {k: row["note"] for k, row in rows.items()}
    assert notes["good"] == ""
    assert "ZeroDivisionError" in notes["wrong"] and "code cell 4" in notes["wrong"]
    assert "stopped after 25 s in code cell 2" in notes["hangs"] and "stopped" in notes["prints"]
    assert "ended" in notes["dies"] and "redefines check" in notes["cheats"]
    assert all("not graded" in notes[k] for k in ("other", "broken", "absent"))
    assert before == {k: f.read_bytes() for k, f in files.items() if f.exists()}


def test_grade_command_writes_tables_and_overwrites_nothing(tmp_path):
    file = notebook(tmp_path / "anna.ipynb", RIGHT)
    (tmp_path / "grades.csv").write_text("mine")
    command = [*COMMAND, "grade", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert "gelu" in done.stdout and (tmp_path / "grades.csv").read_text() == "mine"
    lines = list(csv.DictReader((tmp_path / "grades-2.csv").open()))
    assert {l["exercise"]: l["status"] for l in lines}["gelu"] == "right"
    grades = json.loads((tmp_path / "grades-2.json").read_text())
    assert grades[0]["points"] == bank()["gelu"].points
    usage = subprocess.run([*command[:-1], "--help"], capture_output=True, text=True, check=True)
    assert "runs the learners' code" in " ".join(usage.stdout.split())


def test_learners_cannot_change_the_original(tmp_path):
    path = tmp_path / "sly.ipynb"
    notebook(path, RIGHT, f"open({str(path)!r}, 'w').write('gone')")
    content = path.read_bytes()
    row = grade_notebook(path, 100)
    assert path.read_bytes() == content and "put back" in row["note"]


def test_package_has_no_marks_and_no_stubs():
    files = (ROOT / "vit_course").glob("*.py")
    texts = {file.name: file.read_text(encoding="utf-8") for file in files}
    found = {name for name, text in texts.items() if "exercise" in text.lower()}
    assert found == {"exercises.py", "_modidx.py"}  # the second is nbdev's index of all modules
    text = "".join(text for name, text in texts.items() if name != "exercises.py")
    assert "NotImplementedError(" not in text and "your code here" not in text


@pytest.fixture
def make_exercises(tmp_path, monkeypatch):
    "The script of this name, with a folder of one lesson instead of the repository."
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import make_exercises

    for name in ("nbs", "exercises"):
        (tmp_path / name).mkdir()
    shutil.copy(ROOT / "nbs/01_positional_encoding.ipynb", tmp_path / "nbs")
    monkeypatch.setattr(make_exercises, "ROOT", tmp_path)
    monkeypatch.setattr(make_exercises.sys, "argv", ["make_exercises.py"])
    return make_exercises


def test_make_exercises_overwrites_no_answers(tmp_path, make_exercises):
    assert make_exercises.main() == 0
    made = tmp_path / "exercises/01_positional_encoding.ipynb"
    shutil.copy(made, tmp_path / "exercises/01_mine.ipynb")  # a copy under another name stays, too
    assert make_exercises.main() == 0 and (tmp_path / "exercises/01_mine.ipynb").exists()
    book = json.loads(made.read_text(encoding="utf-8"))
    code = next(c for c in book["cells"] if c["cell_type"] == "code")
    code.update(source=["my = 'answer'"], execution_count=1)
    made.write_text(json.dumps(book), encoding="utf-8")
    assert make_exercises.main() == 1
    assert json.loads(made.read_text(encoding="utf-8")) == book
    for c in book["cells"]:
        c.pop("execution_count", None)
    made.write_text(json.dumps(book), encoding="utf-8")  # edited, its outputs cleared
    assert make_exercises.main() == 1
    assert json.loads(made.read_text(encoding="utf-8")) == book
