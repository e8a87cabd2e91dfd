"""What the benchmarks share: a quiet start, tables of rows, one command's share of the runs."""
import argparse
import csv
import logging
import warnings
from pathlib import Path

import torch

from vit_course.files import written_whole


def read_rows(path: Path) -> list[dict[str, str]]:
    "The rows that are there; none where there is no file yet."
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def write_rows(path: Path, columns: list[str], rows):
    "The whole table, or nothing."
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as part, part.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def share_of(text: str, parser: argparse.ArgumentParser) -> tuple[int, int]:
    "i and n of \"i/n\", every n-th run from number i on; else the command ends."
    try:
        mine, shares = map(int, text.split("/"))
    except ValueError:
        parser.error(f"--share {text}: write i/n, such as 0/2 and 1/2 for two commands")
    if not 0 <= mine < shares:
        parser.error(f"--share {text}: "
                     "the first number counts from 0 and stays below the second")
    return mine, shares


def one_quiet_thread():
    "One thread for torch, and no word from Lightning but its errors."
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
