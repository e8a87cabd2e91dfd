"The rows of lesson 11's comparison come out again."
import csv
import sys

import pytest
import torch

from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import masked  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def rows_of(name: str) -> list[dict]:
    with (RESULTS / name).open(newline="") as file:
        return list(csv.DictReader(file))


def run(monkeypatch, folder, *options):
    monkeypatch.setattr(sys, "argv", ["masked.py", "--results", str(folder), *options])
    monkeypatch.setattr(masked, "STEPS", {"pretrained": [2], "random": [2, 3]})
    masked.main()


@pytest.mark.parametrize("start, way", [("random", "probe"), ("pixels", "probe"),
                                        ("pixels", "neighbours")])
def test_a_row_comes_out_again(start, way):
    found = masked.run(start, way, 5, 0, 0, 0, 0)
    key = [str(found[name]) for name in masked.COLUMNS[:6]]
    (there,) = [row for row in rows_of("masked.csv") if list(row.values())[:6] == key]
    # another processor rounds otherwise, and the probe carries that on
    assert found["test_accuracy"] == pytest.approx(float(there["test_accuracy"]), abs=0.02)


def test_finished_runs_are_not_made_again(tmp_path, monkeypatch):
    run(monkeypatch, tmp_path, "--steps", "2", "--labels", "1", "--seeds", "0")
    before = [(tmp_path / name).read_text() for name in ("masked.csv", "masked_pretraining.csv")]
    assert len(before[0].splitlines()) == 1 + 6 + 1 + 4 and len(before[1].splitlines()) == 1 + 1
    for name in ("run", "judge"):
        monkeypatch.setattr(masked, name, lambda *key: pytest.fail(f"made again: {key}"))
    run(monkeypatch, tmp_path, "--steps", "2", "--labels", "1", "--seeds", "0")
    after = [(tmp_path / name).read_text() for name in ("masked.csv", "masked_pretraining.csv")]
    assert after == before
    with pytest.raises(SystemExit):
        run(monkeypatch, tmp_path, "--labels", "900")


def test_splits_do_not_overlap():
    data = masked.images_and_labels()
    assert [len(data[split][0]) for split in ("train", "val", "test")] == [9000, 1000, 2000]
    few = masked.few(data["train"][1], 100, 0)
    assert data["train"][1][few].bincount().tolist() == [100] * 10


def test_every_table_is_complete():
    keys = [tuple(list(row.values())[:6]) for row in rows_of("masked.csv")]
    frozen = 3 * 2
    trained = sum(len(masked.STEPS[start]) * len(masked.RATES[start]) for start in masked.STEPS)
    assert len(set(keys)) == len(keys) == 3 * 3 * (frozen + trained)
    seeds = [row["seed"] for row in rows_of("masked_pretraining.csv") if row["ratio"] == "0.75"]
    assert sorted(seeds) == ["0", "1", "2"]
