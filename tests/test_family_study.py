"benchmarks/family.py: a few steps of its variants, and no run twice."
import csv
import subprocess
import sys

from conftest import ROOT


def run(folder, *options) -> str:
    command = [sys.executable, ROOT / "benchmarks" / "family.py", "runs", "--results", folder,
               "--steps", "2", "--images", "60", "--seeds", "0", *options]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_variant_trains_once(tmp_path):
    assert run(tmp_path, "--stems", "conv").count("\n") == 8
    assert run(tmp_path, "--stems", "conv") == ""
    rows = list(csv.DictReader((tmp_path / "family.csv").open()))
    names = {row["variant"] for row in rows}
    assert len(rows) == len(names) == 8 and {"rotary", "LSA", "SPT"} <= names
    # the same recipe, and what a variant adds to the parameters
    more = {row["variant"]: int(row["parameters"]) for row in rows}
    assert len({row["lr"] for row in rows}) == 1
    assert more["LSA"] - more["learned positions"] == 2  # a factor in each of two blocks
    assert more["relative bias"] - more["no positions"] == 2 * 4 * 13 * 13


def test_a_number_of_images_that_is_not_there_is_refused(tmp_path):
    command = [sys.executable, ROOT / "benchmarks" / "family.py", "runs", "--images", "9001"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and "from 1 to 9000" in done.stderr
