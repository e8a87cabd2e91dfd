#!/usr/bin/env python3
"""Checks that modules, notebooks and README agree: exporting, cleaning, making the README and the
cells for Colab must change nothing.

What changes is left as the tools wrote it, to be looked at and committed;
the exit status is then 1.
"""
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
COMMANDS = [
    ["python", "scripts/colab.py"], ["nbdev_export"], ["nbdev_clean"],
    ["python", "scripts/make_readme.py"],
]


def contents() -> dict[Path, bytes]:
    "Every file that the commands may write."
    patterns = ["nbs/**/*.ipynb", "vit_course/*.py", "README.md"]
    files = {file for pattern in patterns for file in ROOT.glob(pattern)}
    return {file: file.read_bytes() for file in files if ".ipynb_checkpoints" not in file.parts}


def main() -> int:
    before = contents()
    for command in COMMANDS:
        subprocess.run([BIN / command[0], *command[1:]], cwd=ROOT, check=True)
    after = contents()
    changed = sorted(f for f in before.keys() | after.keys() if before.get(f) != after.get(f))
    for file in changed:
        print(f"out of date: {file.relative_to(ROOT)}")
    print("Commit what has changed." if changed else "Modules, notebooks and README agree.")
    return 1 if changed else 0


if __name__ == "__main__":
    sys.exit(main())
