"The rows of lesson 9's longer comparison come out again."
import csv
import sys

import pytest
import torch

from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import transfer  # noqa: E402


@pytest.fixture
def target(tmp_path, monkeypatch):
    "A table of this test's own."
    monkeypatch.setattr(transfer, "TARGET", tmp_path / "transfer.csv")
    return tmp_path / "transfer.csv"


def run(monkeypatch, *options):
    before = torch.get_num_threads()
    monkeypatch.setattr(sys, "argv", ["transfer.py", *options])
    try:
        transfer.main()
    finally:
        torch.set_num_threads(before)


def test_a_row_comes_out_again(target, monkeypatch):
    with (ROOT / "benchmarks" / "results" / "transfer.csv").open(newline="") as file:
        rows = {tuple(list(row.values())[:4]): float(row["accuracy"])
                for row in csv.DictReader(file)}
    run(monkeypatch, "--steps", "80", "--labels", "5", "--seeds", "1")
    found = transfer.read_rows(target)
    assert [row["way"] for row in found] == list(transfer.WAYS)
    for row in found:
        # another processor rounds otherwise, and 80 steps carry that on
        wanted = rows[tuple(list(row.values())[:4])]
        assert float(row["accuracy"]) == pytest.approx(wanted, abs=0.05)


def test_finished_runs_are_not_made_again(target, monkeypatch):
    run(monkeypatch, "--steps", "2", "--labels", "1", "--seeds", "0")
    before = target.read_text()
    monkeypatch.setattr(transfer, "run", lambda *wanted: pytest.fail(f"made again: {wanted}"))
    run(monkeypatch, "--steps", "2", "--labels", "1", "--seeds", "0")
    assert target.read_text() == before
    with pytest.raises(SystemExit):
        run(monkeypatch, "--labels", "2000")


def test_every_table_is_complete():
    with (ROOT / "benchmarks" / "results" / "transfer.csv").open(newline="") as file:
        keys = [tuple(list(row.values())[:4]) for row in csv.DictReader(file)]
    assert len(set(keys)) == len(keys) == 2 * 3 * 3 * 3
