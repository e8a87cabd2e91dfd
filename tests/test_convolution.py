"The comparison with a convolutional network: its models, its images, its tables."
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
import convolution  # noqa: E402

rows = convolution.read


def keys(part: str) -> list[tuple]:
    return [convolution.as_key(row, part) for row in rows(part, convolution.RESULTS)]


@pytest.mark.parametrize("part", list(convolution.KEYS))
def test_no_run_stands_there_twice(part):
    assert len(set(keys(part))) == len(keys(part))


def test_runs_are_of_the_rate_that_validation_images_chose():
    for row in rows("clothes", convolution.RESULTS):
        rate = convolution.best_rate("clothes", row["model"], convolution.RESULTS)
        assert (float(row["lr"]), int(row["steps"])) == (rate, convolution.STEPS)


def test_what_is_not_moved_is_answered_as_in_the_other_table():
    stated = {key: row["test_acc"]
              for key, row in zip(keys("clothes"), rows("clothes", convolution.RESULTS))}
    for row in rows("shifts", convolution.RESULTS):
        if row["shift"] == "0":
            assert row["test_acc"] == stated[convolution.as_key(row, "clothes")]


def test_runs_on_cifar_fill_their_budget():
    for row in rows("cifar", convolution.RESULTS):
        steps = convolution.steps_in(float(row["minutes"]), convolution.RESULTS)
        assert int(row["optimizer_steps"]) == steps


def test_a_share_of_the_images_lies_in_every_larger_one_and_apart_from_validation():
    def seen(images) -> set[bytes]:
        return {image.numpy().tobytes() for image in images.images}

    small, large = (convolution.clothes(n, 3).sets for n in (50, 200))
    assert len(small["train"]) == 50 and seen(small["train"]) <= seen(large["train"])
    assert len(large["val"]) == 1000
    assert not seen(convolution.clothes(9000, 3).sets["train"]) & seen(large["val"])
    assert seen(convolution.clothes(50, 4).sets["train"]) != seen(small["train"])


def test_moving_brings_in_black_and_loses_the_other_end():
    image = torch.arange(1, 7, dtype=torch.uint8).view(1, 1, 2, 3)
    assert convolution.to_the_right(image, 2).flatten().tolist() == [0, 0, 1, 0, 0, 4]
    assert torch.equal(convolution.to_the_right(image, 0), image)


def test_the_features_of_the_network_move_with_the_image():
    "Away from the borders, and by multiples of its strides alone."
    torch.manual_seed(0)
    features = convolution.small_cnn([4, 6, 8], 1, 3)[:-3].eval()  # two strides of two
    image = torch.zeros(1, 1, 64, 128)
    image[..., 20:40, 40:70] = torch.rand(1, 1, 20, 30)
    still, moved = features(image), features(convolution.to_the_right(image, 4))
    inner = still[..., 5:-6]
    assert inner.std() > 0
    assert torch.allclose(moved[..., 6:-5], inner, atol=1e-5)
    other = features(convolution.to_the_right(image, 3))
    assert not torch.allclose(other[..., 6:-5], inner, atol=1e-3)


def run(monkeypatch, folder, *words):
    command = ["convolution.py", *words, "--results", str(folder)]
    monkeypatch.setattr(sys, "argv", command)
    convolution.main()


def test_a_run_that_stands_there_is_not_made_again(tmp_path, monkeypatch):
    monkeypatch.setattr(convolution, "STEPS", 2)
    monkeypatch.setattr(convolution, "SIZES", [60])
    monkeypatch.setattr(convolution, "SHIFTS", [0, 4])
    monkeypatch.setattr(convolution, "MODELS", {"CNN": {"widths": [4, 4]}})
    with pytest.raises(SystemExit, match="convolution.py rates"):
        run(monkeypatch, tmp_path, "clothes", "--seeds", "0")
    rates = "data,model,lr,seed,steps,val_acc\n"
    rates += "".join(f"clothes,CNN,{lr},0,2,{acc}\n" for lr, acc in ((1, 0.2), (0.01, 0.3)))
    (tmp_path / "convolution_rates.csv").write_text(rates)
    run(monkeypatch, tmp_path, "clothes", "--seeds", "0")
    found = rows("clothes", tmp_path)
    assert [row["augment"] for row in found] == convolution.AUGMENTS
    assert {row["lr"] for row in found} == {"0.01"}
    assert [row["shift"] for row in rows("shifts", tmp_path)] == ["0", "4"] * 2

    def never(*args):
        raise AssertionError("a run was made again")

    monkeypatch.setattr(convolution, "train", never)
    run(monkeypatch, tmp_path, "clothes", "--seeds", "0")
    assert rows("clothes", tmp_path) == found
    with pytest.raises(AssertionError, match="made again"):
        run(monkeypatch, tmp_path, "clothes", "--seeds", "1")


@pytest.mark.parametrize("words, says", [
    ("cifar", "needs --data"), ("cifar --data nowhere", "no such folder"),
    ("rates --share 2/2", "counts from 0"), ("rates --share 1", "write i/n"),
])
def test_options_that_cannot_work_are_refused(words, says, tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run(monkeypatch, tmp_path, *words.split())
    assert says in capsys.readouterr().err


def test_minutes_need_a_cost(tmp_path):
    with pytest.raises(SystemExit, match="costs --data"):
        convolution.steps_in(5, tmp_path)
    row = dict.fromkeys(convolution.COST_COLUMNS, 1)
    convolution.write_costs([row | {"step": "CNN, CIFAR-10", "ms": 200.0}], tmp_path)
    convolution.write_costs([row | {"step": "CNN"}], tmp_path)  # the other row stays
    assert convolution.steps_in(5, tmp_path) == 3000
