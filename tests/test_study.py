"The study's recipes, costs and rows belong together."
import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
import study  # noqa: E402


STUDIES = [study.RESULTS, study.RESULTS / "avx512"]
of_each_study = pytest.mark.parametrize("folder", STUDIES, ids=["first", "avx512"])


def rows(kind: str, folder: Path) -> list[dict]:
    with study.result(kind, folder=folder).open(newline="") as file:
        return list(csv.DictReader(file))


def keys(kind: str, folder: Path) -> list[tuple]:
    return [(row["step"], row["minutes"], row["seed"]) for row in rows(kind, folder)]


def accuracies(kind: str, folder: Path) -> dict[tuple, str]:
    "The last validation accuracy of every run."
    return {key: row["val_acc"] for key, row in zip(keys(kind, folder), rows(kind, folder))}


@of_each_study
def test_every_run_is_of_a_recipe_that_stands_in_the_script(folder):
    recipes, costs = study.all_steps(), study.result("costs", folder=folder)
    for row in rows("runs", folder):
        assert json.loads(row["options"]) == recipes[row["step"]], row["step"]
        steps = study.steps_in(float(row["minutes"]), costs)
        assert int(row["optimizer_steps"]) == steps[row["step"]]
    assert len(set(keys("runs", folder))) == len(keys("runs", folder))


@of_each_study
def test_epochs_end_as_the_runs_say(folder):
    assert accuracies("epochs", folder) == accuracies("runs", folder)


@of_each_study
def test_models_of_the_test_are_models_of_runs(folder):
    assert set(keys("test", folder)) <= set(keys("runs", folder))


def test_a_run_with_patch_dropout_has_two_parts():
    recipes = study.all_steps()
    (early, half), (late, whole) = study.parts_of(recipes["half of the patches"])
    assert (early, late) == (0.75, 0.25)
    assert json.loads(half)["patch_dropout"] == 0.5 and "patch_dropout" not in json.loads(whole)
    for name in ("Muon", "higher rate"):
        assert study.parts_of(recipes[name]) == [(1.0, whole)]
    for options in recipes.values():
        assert sum(share for share, _ in study.parts_of(options)) == pytest.approx(1)


def test_another_recipe_is_told_apart():
    assert study.differences({"lr": 1, "_private": 1}, {"lr": 1, "_private": 2}) == ""
    assert study.differences({"lr": 1}, {"lr": 2, "depth": 3}) == "lr: 1, now 2, depth: None, now 3"


def test_a_study_of_ones_own_begins_with_costs(tmp_path):
    with pytest.raises(FileNotFoundError, match="--costs"):
        study.steps_in(5, study.result("costs", folder=tmp_path))
    assert study.result("runs", bf16=True, folder=tmp_path) == tmp_path / "study_bf16_runs.csv"


COSTS = "step,batch_size,ms,ms_median,machine\n"


@pytest.mark.parametrize("options, says", [
    ("--share 2/2", "counts from 0"), ("--share 1", "write i/n"),
    ("--steps Muon --processes 3", "shared evenly"),
    ("--steps 64x2", "--costs --steps '64x2'"),
])
def test_options_that_cannot_work_are_refused_before_the_work(
        options, says, tmp_path, monkeypatch, capsys):
    (tmp_path / "study_costs.csv").write_text(COSTS + "Muon,128,100,0,none\n")
    command = ["study.py", "--data", "nowhere", "--results", str(tmp_path), *options.split()]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit):
        study.main()
    assert says in capsys.readouterr().err


def test_the_loss_of_a_cut_off_epoch_goes_to_the_end_of_the_run():
    class Trainer:
        current_epoch, world_size = 0, 1
        callback_metrics = {
            name: torch.tensor(0.5) for name in ("train_loss", "val_loss", "val_acc")}

    trainer, clock = Trainer(), study.Clock({})
    clock.on_validation_end(trainer, None)
    clock.on_train_epoch_end(trainer, None)
    trainer.current_epoch, trainer.callback_metrics = 1, {"train_loss": torch.tensor(0.25)}
    clock.on_train_epoch_end(trainer, None)  # stopped before the next validation
    assert [row["train_loss"] for row in clock.rows] == [0.5]
    assert clock.cut_off == {"train_loss": 0.25}


def test_a_run_that_stands_there_is_not_made_again(tmp_path):
    path = tmp_path / "study_runs.csv"
    row = dict.fromkeys(study.RUN_COLUMNS, 1) | {"step": "Muon", "minutes": "0.5"}
    assert not study.done(path, ("Muon", 0.5, 1))
    for seed in (1, 2):
        study.append(path, study.RUN_COLUMNS, [row | {"seed": seed}])
    assert path.read_text().count("optimizer_steps") == 1  # one head
    assert study.done(path, ("Muon", 0.5, 2))
    others = (("Muon", 0.5, 3), ("Muon", 5.0, 1), ("EMA", 0.5, 1))
    assert not any(study.done(path, key) for key in others)


@pytest.fixture
def images(tmp_path) -> Path:
    "A folder of pictures of noise, of two classes."
    generator = torch.Generator().manual_seed(0)
    for split, n in (("train", 40), ("test", 4)):
        for name in ("cats", "dogs"):
            folder = tmp_path / "images" / split / name
            folder.mkdir(parents=True)
            for i in range(n):
                pixels = torch.randint(256, (32, 32, 3), generator=generator, dtype=torch.uint8)
                Image.fromarray(pixels.numpy()).save(folder / f"{i}.png")
    return tmp_path / "images"


def test_a_kept_run_goes_on_to_the_same_weights(images, tmp_path, monkeypatch):
    options = {
        "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2, "dropout": 0.1,
        "lr": 1e-3, "batch_size": 24, "augment": "flip_shift",
    }
    source, old = study.open_data(str(images)), study.Clock.on_train_epoch_start
    straight = study.train(options, 0, 6, source)[0].state_dict()

    def stop(self, trainer, *args):
        if trainer.current_epoch == 1:
            raise RuntimeError("stopped")
        old(self, trainer, *args)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="stopped"):
        patch.setattr(study.Clock, "on_train_epoch_start", stop)
        study.train(options, 0, 6, source, keep=tmp_path / "kept")
    with pytest.raises(ValueError, match="another recipe"):
        study.train(options | {"lr": 2e-3}, 0, 6, source, keep=tmp_path / "kept")
    resumed = study.train(options, 0, 6, source, keep=tmp_path / "kept")[0].state_dict()
    assert all(torch.equal(value, resumed[name]) for name, value in straight.items())


def test_two_processes_share_a_run(images, tmp_path):
    "To its end: the last validation is one process's work, and must not wait for the other."
    ours = tmp_path / "ours"
    ours.mkdir()
    ms = 1000 * 120 * 0.1 / 3  # a tenth of a minute buys three steps
    (ours / "study_costs.csv").write_text(f"{COSTS}half of the patches,128,{ms},0,none\n")
    command = [sys.executable, study.__file__, "--data", str(images), "--results", str(ours),
               "--minutes", "0.1", "--seeds", "0", "--steps", "half of the patches",
               "--processes", "2", "--keep", str(tmp_path / "kept")]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert ended.returncode == 0, ended.stderr
    with (ours / "study_runs.csv").open(newline="") as file:
        (run,) = csv.DictReader(file)
    assert (run["step"], run["optimizer_steps"]) == ("half of the patches", "3")
    assert list((tmp_path / "kept").glob("*/model.safetensors"))
