"The comparison of teachers: what each way trains, its tables, and that no run is made twice."
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
import convolution  # noqa: E402
import distil  # noqa: E402

from vit_course.distillation import DistilledViT  # noqa: E402

NARROW = {"embed_dim": 8, "num_heads": 2, "depth": 1}


@pytest.mark.parametrize("part", list(distil.KEYS))
def test_no_run_stands_there_twice(part):
    keys = [distil.as_key(row, part) for row in distil.read(part, distil.RESULTS)]
    assert len(set(keys)) == len(keys)


def test_runs_have_the_options_that_were_chosen():
    for row in distil.read("clothes", distil.RESULTS):
        options = distil.WAYS[row["way"]][0] | distil.chosen(row["way"], distil.RESULTS)
        for name in distil.OPTIONS:
            assert row[name] == (str(options[name]) if name in options else "")
        assert int(row["steps"]) == distil.STEPS


def test_every_run_has_the_runs_that_it_is_compared_with():
    "Of its images and its seed: a ViT from labels, and its teacher."
    rows = distil.read("clothes", distil.RESULTS)
    there = {(row["way"], row["images"], row["seed"]) for row in rows}
    for way, images, seed in there:
        for other in {"ViT", distil.WAYS[way][1]} - {None}:
            assert (other, images, seed) in there


def test_rates_are_those_of_the_other_comparison():
    for ours, theirs in {"CNN": "CNN", "ViT": "plain ViT"}.items():
        rate = convolution.best_rate("clothes", theirs, convolution.RESULTS)
        assert distil.WAYS[ours][0]["lr"] == rate


def test_what_is_not_moved_is_answered_as_in_the_other_table():
    stated = {distil.as_key(row, "clothes"): row["test_acc"]
              for row in distil.read("clothes", distil.RESULTS)}
    for row in distil.read("shifts", distil.RESULTS):
        if row["shift"] == "0":
            assert row["test_acc"] == stated[distil.as_key(row, "clothes")]


def test_each_way_is_what_its_name_says():
    linked = {"num_classes": 10, "in_chans": 1, "img_size": 28}
    of_data = ("batch_size", "augment")
    common = {k: v for k, v in distil.CLOTHES.items() if k not in of_data}
    for name, (options, teacher) in distil.WAYS.items():
        model = distil.make_model(common | options, linked, torch.nn.Identity())
        assert isinstance(getattr(model, "vit", None), DistilledViT) == name.startswith("two")
        assert (teacher is not None) == ("soft" in name or "hard" in name)
        if teacher:
            assert model.hparams.kind == ("soft" if "soft" in name else "hard")


@pytest.fixture
def small(tmp_path, monkeypatch):
    "Tiny models, two steps; the folder of the tables."
    monkeypatch.setattr(distil, "STEPS", 2)
    monkeypatch.setattr(distil, "CHOICES", [{"temperature": t, "weight": 0.5} for t in (1.0, 2.0)])
    tiny = {name: (options | ({"widths": [4, 4]} if name == "CNN" else NARROW), teacher)
            for name, (options, teacher) in distil.WAYS.items()}
    monkeypatch.setattr(distil, "WAYS", tiny)
    return tmp_path


def run(monkeypatch, folder, *words):
    before = torch.get_num_threads()
    monkeypatch.setattr(sys, "argv", ["distil.py", *words, "--results", str(folder)])
    try:
        distil.main()
    finally:
        torch.set_num_threads(before)


def test_a_run_that_stands_there_is_not_made_again(small, monkeypatch):
    words = ["clothes", "--seeds", "0", "--images", "60", "--keep", str(small / "keep")]
    with pytest.raises(SystemExit, match=r"distil\.py trials"):
        run(monkeypatch, small, *words, "--ways", "soft")
    run(monkeypatch, small, "trials")
    assert len(distil.read("trials", small)) == 2
    run(monkeypatch, small, *words, "--ways", "CNN", "soft", "two tokens, hard")
    rows = {row["way"]: row for row in distil.read("clothes", small)}
    assert list(rows) == ["CNN", "soft", "two tokens, hard"]
    assert float(rows["CNN"]["like_cnn"]) == 1 and rows["CNN"]["cosine"] == ""
    assert rows["soft"]["temperature"] and rows["two tokens, hard"]["dist_acc"]
    monkeypatch.setattr(distil, "train", lambda *a: pytest.fail("a run was made again"))
    run(monkeypatch, small, *words, "--ways", "CNN", "soft", "two tokens, hard")
    assert {row["way"]: row for row in distil.read("clothes", small)} == rows
    # the kept teacher is the one of the table, so none is trained for another command
    model, _, data = distil.Teachers(small / "keep").get("CNN", 60, 0)
    assert str(convolution.accuracy(model, data.sets["test"])) == rows["CNN"]["test_acc"]


def test_too_many_images_are_refused(tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run(monkeypatch, tmp_path, "clothes", "--images", "9001")
    assert "9,000" in capsys.readouterr().err
