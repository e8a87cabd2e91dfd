"The package as its users meet it: built, installed without the development tools, imported."
import hashlib
import re
import shutil
import subprocess
import sys
import venv
from importlib.metadata import Distribution, PathDistribution, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from conftest import ROOT


def copy_of_sources(source: Path) -> None:
    "What a build takes; what earlier ones left in build/ and *.egg-info would get into the wheel."
    unwanted = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints")
    for name in ("vit_course", "exercises", "benchmarks"):
        shutil.copytree(ROOT / name, source / name, ignore=unwanted)
    for name in ("setup.py", "settings.ini", "pyproject.toml",
                 "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)


def site_packages(python) -> Path:
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    return Path(subprocess.check_output([python, "-c", code], text=True).strip())


def required(requirements: list[str]) -> dict[str, Distribution]:
    "What these requirements take, directly or not, as it is installed here."
    found, waiting = {}, [(Requirement(line), ("",)) for line in requirements]
    while waiting:
        need, extras = waiting.pop()
        name, wanted = canonicalize_name(need.name), ("", *sorted(need.extras))
        if need.marker and not any(need.marker.evaluate({"extra": extra}) for extra in extras):
            continue
        if (name, wanted) not in found:
            found[name, wanted] = there = distribution(name)
            waiting += [(Requirement(line), wanted) for line in there.requires or []]
    return {name: there for (name, _), there in found.items()}


def lend_packages(wheel: Path, folder: Path) -> None:
    "Put what the wheel requires into an environment, as links: a second torch is gigabytes."
    metadata = next(PathDistribution.discover(path=[str(wheel)]))
    for there in required(metadata.requires).values():
        for name in {file.parts[0] for file in there.files} - {"..", "__pycache__"}:
            if not (folder / name).exists():
                (folder / name).symlink_to(there.locate_file(name).resolve())


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    "A Python of an environment that holds the built wheel, and what it requires, alone."
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    copy_of_sources(source)
    build = [sys.executable, "-m", "build", "--wheel", "--outdir", folder, source]
    subprocess.run(build, check=True, capture_output=True)
    venv.create(folder / "env", with_pip=True)
    python = folder / "env" / ("Scripts" if sys.platform == "win32" else "bin") / "python"
    wheel = next(folder.glob("*.whl"))
    lend_packages(wheel, site_packages(python))
    install = [python, "-m", "pip", "install", "--quiet", "--no-index", wheel]
    result = subprocess.run(install, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return python


def run(python, code: str, cwd) -> str:
    result = subprocess.run([python, "-c", code], cwd=cwd, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_the_wheel_runs_a_vit_without_nbdev(installed, tmp_path):
    code = """
import importlib.util, torch
assert importlib.util.find_spec("nbdev") is None and importlib.util.find_spec("jupyterlab") is None
from vit_course.vit import ViT
model = ViT(img_size=(8, 12), patch_size=4, num_classes=5, embed_dim=24, depth=2, num_heads=3)
print(tuple(model(torch.randn(2, 3, 8, 12)).shape))
"""
    assert run(installed, code, tmp_path).strip() == "(2, 5)"


def test_every_module_of_the_wheel_imports(installed, tmp_path):
    names = sorted(f.stem for f in (ROOT / "vit_course").glob("*.py") if not f.stem.startswith("_"))
    assert len(names) >= 11
    code = f"import importlib\nfor name in {names}: importlib.import_module('vit_course.' + name)"
    run(installed, code, tmp_path)


def test_the_wheel_carries_images_recipes_and_weights(installed, tmp_path):
    code = """
from vit_course.data import load_fashion_mini, load_photo
from vit_course.training import load_model
from vit_course.cli import recipes
print(len(load_fashion_mini().train_images), tuple(load_photo().shape), sorted(recipes()))
load_model("fashion")
"""
    output = run(installed, code, tmp_path)
    assert "10000 (3, 288, 448)" in output
    for recipe in ("quickstart", "cifar10_assignment", "image_folder"):
        assert recipe in output


def test_the_wheel_carries_the_learners_notebooks(installed, tmp_path):
    command = [Path(installed).with_name("vit-course"), "exercises", "mine"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    names = sorted(f.name for f in (ROOT / "exercises").glob("*.ipynb"))
    assert names and sorted(f.name for f in (tmp_path / "mine").glob("*.ipynb")) == names
    code = """
import fastcore.test
from torch import nn
from vit_course.data import course_folder
from vit_course.exercises import bank, check
def gelu(z): return nn.functional.gelu(z)
tables = list(course_folder("benchmarks/results").rglob("*.csv"))
print(len(bank()), check(gelu).status, len(tables))
"""
    count, status, tables = run(installed, code, tmp_path).split()
    assert int(count) >= 30 and status == "right"
    assert int(tables) == len(list((ROOT / "benchmarks" / "results").rglob("*.csv"))) > 3


def test_the_command_is_installed(installed, tmp_path):
    command = installed.with_name("vit-course.exe" if sys.platform == "win32" else "vit-course")
    done = subprocess.run([command], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "quickstart" in done.stdout


@pytest.mark.parametrize("module", ["vit", "rollout"])
def test_light_modules_load_nothing_heavy(module):
    heavy = ["pytorch_lightning", "lightning_fabric", "matplotlib",
             "seaborn", "pandas", "torchmetrics"]
    code = f"import sys, vit_course.{module}\nprint([m for m in {heavy} if m in sys.modules])"
    assert run(sys.executable, code, ROOT).strip() == "[]"


def test_the_bundled_images_have_the_recorded_checksum():
    sys.path.insert(0, str(ROOT / "scripts"))
    import numpy as np
    from make_fashion_mini import CHECKSUM, TARGET, checksum

    with np.load(TARGET, allow_pickle=False) as arrays:
        assert checksum(arrays) == CHECKSUM


WEIGHTS = {  # the files that the cards' numbers were measured with
    "cifar10": "4253e8dd5581339b6fd8351cbcbb40f096aaa41a39cef3ce4997953a4cbcf373",
    "fashion": "aa80574661f1f95a356d2e3c4443b864c2ec85094aba1c86fa9b2d25e5a6b7cd",
}


def test_shipped_weights_are_those_of_their_cards():
    files = {file.stem: file for file in (ROOT / "vit_course" / "weights").glob("*.safetensors")}
    sums = {name: hashlib.sha256(file.read_bytes()).hexdigest() for name, file in files.items()}
    assert sums == WEIGHTS
    for file in files.values():
        assert file.stat().st_size <= 2_000_000
        assert len(file.with_suffix(".md").read_text(encoding="utf-8").split()) > 100


def test_the_card_of_fashion_says_what_is_measured():
    import torch

    from vit_course.data import load_fashion_mini
    from vit_course.training import load_model

    lit, mini = load_model("fashion"), load_fashion_mini()
    batches = mini.test_images.split(250)
    with torch.inference_mode():
        said = torch.cat([lit(part.float() / 255).argmax(1) for part in batches])
    accuracy = (said == mini.test_labels).double().mean().item()
    card = (ROOT / "vit_course" / "weights" / "fashion.md").read_text(encoding="utf-8")
    stated = float(re.search(r"accuracy there: ([\d.]+)", card)[1])
    assert stated == pytest.approx(accuracy, abs=0.002)
