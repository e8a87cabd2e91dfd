"The README's commands exist; the lessons keep the form that the course promises."
import ast
import json
import re
import statistics
import subprocess

import pytest

from conftest import ROOT

LESSONS = sorted((ROOT / "nbs").glob("[0-9]*.ipynb"))
NOTEBOOKS = sorted((ROOT / "nbs").rglob("*.ipynb"))
NOTEBOOKS = [n for n in NOTEBOOKS if ".ipynb_checkpoints" not in n.parts]
EXERCISES = sorted((ROOT / "exercises").glob("*.ipynb"))


def cells(path, kind: str | None = None) -> list[dict]:
    found = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [c | {"source": "".join(c["source"])} for c in found if kind in (None, c["cell_type"])]


def lines(source: str) -> list[str]:
    "Lines of code, without blank ones and directives."
    return [line for line in source.splitlines()
            if line.strip() and not line.strip().startswith("#|")]


def test_the_readme_names_only_commands_that_exist():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    targets = set(re.findall(r"\bmake ([a-z]+)\b", readme))
    assert {"run", "test", "lab"} <= targets
    for target in targets:
        command = ["make", "--dry-run", target]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
    from vit_course.cli import SafeCLI, other_commands

    commands = {*SafeCLI.subcommands(), "rollout", *other_commands()}
    assert set(re.findall(r"vit-course (\w+)", readme)) <= commands


def test_the_readme_links_to_files_that_exist():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", readme):
        assert (ROOT / target).exists(), target


def test_make_help_lists_every_command():
    done = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True)
    for name in ("run", "test", "lab", "exercises", "docs", "preview", "bench", "help"):
        assert re.search(rf"^{name}\b", done.stdout, re.M)


def test_there_are_the_thirteen_lessons():
    assert [lesson.name[:2] for lesson in LESSONS] == [f"{i:02}" for i in range(1, 14)]


@pytest.mark.parametrize("path", LESSONS, ids=lambda p: p.stem)
def test_a_lesson_ends_with_recap_quiz_names_and_references(path):
    text = "\n".join(cell["source"] for cell in cells(path, "markdown"))
    wanted = "Recap|Quiz|The same thing elsewhere|References"
    heads = re.findall(rf"(?m)^#+ (?:\d+\. )?({wanted})\s*$", text)
    assert sorted(heads) == ["Quiz", "Recap", "References", "The same thing elsewhere"]
    assert text[re.search(r"(?m)^#+ (?:\d+\. )?Quiz", text).start() :].count("<details>") >= 5


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_outputs_are_clean(path):
    for cell in cells(path, "code"):
        for output in cell["outputs"]:
            text = json.dumps(output)
            assert output["output_type"] != "error", cell["source"]
            assert output.get("name") != "stderr", text[:300]
            assert not re.search(r"(/root/|/home/\w|/Users/\w|/work/|/tmp/)", text), text[:300]
            if "image/png" in output.get("data", {}):
                assert re.search(r"(?m)^#\| fig-alt: .{20,}", cell["source"]), cell["source"]


@pytest.mark.parametrize("path", LESSONS, ids=lambda p: p.stem)
def test_a_lesson_keeps_its_form(path):
    code = [c for c in cells(path, "code") if lines(c["source"])]
    sizes = [len(lines(c["source"])) for c in code]
    words = sum(len(c["source"].split()) for c in cells(path, "markdown"))
    figures = [c for c in code if any("image/png" in o.get("data", {}) for o in c["outputs"])]
    checks = [c for c in code if re.search(r"\b(assert|test_\w+)\b", c["source"])]
    assert statistics.median(sizes) <= 8 and max(sizes) <= 25
    assert words >= 4 * sum(sizes)
    assert len(figures) >= 5 and len(checks) >= 10


def imported(source: str) -> list[str]:
    "The full names of what a cell imports, anywhere in it."
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names += [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
    return names


@pytest.mark.parametrize("path", LESSONS, ids=lambda p: p.stem)
def test_a_lesson_imports_only_lower_numbers(path):
    modules = {
        "positional": 1, "tokenizer": 2, "attention": 3, "encoder": 4, "vit": 5,
        "training": 6, "rollout": 7, "resolution": 8, "pretrained": 9,
        "masked": 11, "distillation": 12, "family": 13,
    }
    for cell in cells(path, "code"):
        for name in imported(cell["source"]):
            if name.startswith("vit_course."):
                assert modules.get(name.split(".")[1], 0) < int(path.name[:2]), cell["source"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_the_site_can_be_made_from_it(path):
    """The site makes its title from the first cell, and drops what else stands there.

    It runs cells that import something.
    """
    first = cells(path)[0]["source"]
    first = cells(path)[1]["source"] if first.startswith("#| hide") else first
    title = r"# [^\n]+\n\n> [^\n]+(\n> [^\n]+)*\n?"
    assert re.fullmatch(title, first), "the first cell holds the title and one line, nothing else"
    exempt = r"(?m)^#\|\s*export|google.colab"
    for cell in cells(path, "code"):
        if not re.search(exempt, cell["source"]) and path.stem != "index":
            body = ast.parse(cell["source"]).body
            imports = [isinstance(node, (ast.Import, ast.ImportFrom)) for node in body]
            fault = "imports stand in cells of their own:\n" + cell["source"]
            assert all(imports) or not any(imports), fault


@pytest.mark.parametrize("path", NOTEBOOKS + EXERCISES, ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_the_first_code_cell_installs_on_colab_alone(path, monkeypatch):
    """It does nothing here; on Colab it installs from the address of settings.ini.

    The address stands nowhere else in a notebook.
    """
    import configparser
    import sys

    config = configparser.ConfigParser(delimiters=["="])
    config.read(ROOT / "settings.ini", encoding="utf-8")
    address, first = config["DEFAULT"]["git_url"], cells(path, "code")[0]["source"]
    exec(first, {})
    asked = []
    shell = type("Shell", (), {"run_line_magic": lambda self, *command: asked.append(command)})()
    monkeypatch.setitem(sys.modules, "google.colab", sys)
    exec(first, {"get_ipython": lambda: shell})
    assert asked == [("pip", f"install -q git+{address}")]
    rest = [cell for cell in cells(path) if "colab" not in cell["source"]]
    assert not any(address in cell["source"] for cell in rest)


def test_the_card_of_cifar10_says_what_was_measured():
    found = json.loads((ROOT / "benchmarks" / "results" / "cifar10_model.json").read_text())
    card = (ROOT / "vit_course" / "weights" / "cifar10.md").read_text()
    assert f"**test accuracy {found['test_accuracy']:.3f}**" in card
    assert f"calibration error {found['calibration_error']:.3f}" in card
    row = " | ".join(f"{value:.3f}" for value in found["per_class_accuracy"].values())
    assert f"| {row} |" in card
    assert sum(map(sum, found["confusion"])) == found["test_images"] == 10_000
