"What a user meets on the command line: mistakes, folders, interruptions."
import re
import signal
import sys

import pytest
import torch

from conftest import SMALL

BARE = [*SMALL[:2], *SMALL[4:]]  # without "--report false"


def weights(path):
    return torch.load(path, weights_only=True)["state_dict"]


def same(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    "The weights after three uninterrupted epochs."
    from conftest import CommandLine

    folder = tmp_path_factory.mktemp("straight")
    CommandLine(folder)("fit", *SMALL, "--trainer.max_epochs", "3")
    return weights(folder / "runs/quickstart/checkpoints/last.ckpt")


# keeps the process busy after its first epoch, so that there is time to stop it
SLOW = """
import time, pytorch_lightning as pl
from vit_course.training import EpochSeed
old = EpochSeed.on_train_epoch_start
def slow(self, trainer, module):
    old(self, trainer, module)
    if trainer.current_epoch == 1:
        print("in the second epoch", flush=True)
        time.sleep(5)
EpochSeed.on_train_epoch_start = slow
from vit_course.cli import main; main()
"""


def test_the_last_checkpoint_is_of_the_last_epoch(command_line):
    "Also when no epoch after the first is better: with a learning rate of 0 none is."
    command_line("fit", *SMALL, "--trainer.max_epochs", "3", "--model.lr", "0")
    folder = command_line.folder / "runs/quickstart/checkpoints"
    assert torch.load(folder / "last.ckpt", weights_only=True)["epoch"] == 2
    best = [file.name for file in folder.glob("best-*.ckpt")]
    assert len(best) == 1 and "epoch=0" in best[0]


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_goes_on_to_the_same_weights(command_line, straight, sign):
    process = command_line.start("fit", *SMALL, "--trainer.max_epochs", "3", code=SLOW)
    for line in process.stdout:
        if "in the second epoch" in line:
            break
    process.send_signal(sign)
    output = process.communicate(timeout=100)[0]
    # Lightning ends in order when asked to
    assert process.returncode != 0 or sign == signal.SIGTERM
    last = command_line.folder / "runs/quickstart/checkpoints/last.ckpt"
    assert not same(weights(last), straight)
    if sign != signal.SIGKILL:
        assert "--ckpt_path" in output and str(last.name) in output
    command_line("fit", *SMALL, "--trainer.max_epochs", "3", "--ckpt_path", last)
    assert same(weights(command_line.folder / "runs/quickstart-2/checkpoints/last.ckpt"), straight)


FULL_DISK = """
import resource
from vit_course.training import EpochSeed
old = EpochSeed.on_train_epoch_start
def fill(self, trainer, module):
    old(self, trainer, module)
    if trainer.current_epoch == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
EpochSeed.on_train_epoch_start = fill
from vit_course.cli import main; main()
"""


# a processor that is fast in bfloat16, whatever this one is;
# the model says in which format it answers
FAST = """
import vit_course.cli as cli
from vit_course.vit import ViT
cli.best_precision, old = lambda **options: "bf16-mixed", ViT.forward
def spoken(self, images):
    logits = old(self, images)
    print("logits in", logits.dtype, flush=True)
    return logits
ViT.forward = spoken
cli.main()
"""


@pytest.mark.parametrize("asked, taken, dtype", [
    ([], "bf16-mixed", "bfloat16"),
    (["--trainer.precision", "32-true"], "32-true", "float32"),
])
def test_the_format_is_chosen_unless_it_is_asked_for(command_line, asked, taken, dtype):
    plain = SMALL[: SMALL.index("--trainer.precision")]
    short = ["--trainer.accelerator", "cpu", "--trainer.max_epochs", "1"]
    output = command_line("fit", *plain, *asked, *short, code=FAST)
    assert set(re.findall(r"logits in torch.(\w+)", output)) == {dtype}
    config = command_line.folder / "runs/quickstart/config.yaml"
    assert f"precision: {taken}" in config.read_text()


@pytest.mark.skipif(sys.platform == "win32", reason="no limit on the size of files")
def test_a_full_disk_leaves_the_previous_checkpoint(command_line):
    output = command_line("fit", *SMALL, "--trainer.max_epochs", "3", code=FULL_DISK, fails=True)
    assert "is the disk full?" in output
    folder = command_line.folder / "runs/quickstart/checkpoints"
    last = torch.load(folder / "last.ckpt", weights_only=True)
    assert last["global_step"] == 4  # of the first epoch
    assert not list(folder.glob("*.part"))


def test_an_earlier_run_is_not_overwritten(command_line):
    first = command_line("fit", *SMALL, "--trainer.max_epochs", "1")
    found = command_line.folder.rglob("runs/quickstart/**/*")
    files = {f: f.read_bytes() for f in found if f.is_file()}
    command_line("fit", *SMALL, "--trainer.max_epochs", "1", "--model.lr", "0.01")
    assert files and all(f.read_bytes() == content for f, content in files.items()), first
    assert (command_line.folder / "runs/quickstart-2/metrics.csv").is_file()


def test_the_settings_of_an_earlier_run_leave_its_files_alone(command_line):
    command_line("fit", *SMALL, "--trainer.max_epochs", "1")
    first = command_line.folder / "runs/quickstart"
    files = {f: f.read_bytes() for f in first.rglob("*") if f.is_file()}
    # the second time, by the settings of a run that went by settings itself
    for name in ("quickstart", "quickstart-2"):
        command_line("fit", "--config", f"runs/{name}/config.yaml")
    last = first / "checkpoints/last.ckpt"
    for work in ("validate", "test"):
        output = command_line(work, "--config", "runs/quickstart/config.yaml", "--ckpt_path", last)
        assert "acc" in output
    assert all(f.read_bytes() == content for f, content in files.items()) and len(files) > 3
    runs = sorted(command_line.folder.glob("runs/*"))
    assert len(runs) == 3
    for run in runs:
        assert (run / "metrics.csv").is_file()
        assert (run / "config.yaml").read_text().count("CSVLogger") == 1


def test_a_checkpoint_callback_of_the_users_changes_no_report(command_line):
    "At a rate of 0 the first epoch is the best; the user's own callback keeps the second alone."
    mine = ["--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.every_n_epochs=2",
            "--trainer.callbacks.save_top_k=-1"]
    output = command_line("fit", *BARE, "--trainer.max_epochs", "2", "--model.lr", "0", *mine)
    assert re.search(r"The best model is .*best-epoch=0", output)
    metrics = command_line.folder / "runs/quickstart/metrics.json"
    assert '"checkpoint": "best-epoch=0' in metrics.read_text()


def test_a_run_without_checkpoints(command_line):
    options = ["--trainer.max_epochs", "1", "--trainer.enable_checkpointing", "false"]
    output = command_line("fit", *BARE, *options)
    assert "no checkpoint to test" in output
    assert (command_line.folder / "runs/quickstart/metrics.csv").is_file()


def test_an_untrained_model_is_not_judged(command_line):
    for work in ("validate", "test"):
        output = command_line(work, "--config", "quickstart", fails=True)
        assert "--ckpt_path" in output and "Traceback" not in output


def test_two_commands_at_once_take_two_folders(command_line):
    both = [command_line.start("fit", *SMALL, "--trainer.max_epochs", "1") for _ in range(2)]
    outputs = [process.communicate(timeout=300)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    for name in ("quickstart", "quickstart-2"):
        assert (command_line.folder / "runs" / name / "metrics.csv").is_file()
        assert (command_line.folder / "runs" / name / "checkpoints/last.ckpt").is_file()
    assert "Experiment logs directory" not in "".join(outputs)


def test_a_command_that_fails_before_its_work_leaves_no_folder(command_line):
    command_line("fit", *SMALL, "--data.batch_size", "0", fails=True)
    assert not list(command_line.folder.glob("runs/*"))


@pytest.mark.parametrize(
    "args, message",
    [
        (["--config", "quickstrat"], "recipes: cifar10, cifar10_assignment"),
        (["--model.embed_dim", "30", "--model.num_heads", "4"], "num_heads=4"),
        (["--model.patch_size", "5"], "patch_size=5"),
        (["--model.pool", "max"], "pool='max'"),
        (["--model.schedule", "linear"], "schedule='linear'"),
        (["--data.batch_size", "0"], "batch_size=0"),
        (["--data", "CIFAR10Data", "--data.data_dir", "nowhere"], "--data.download true"),
        (["--data", "ImageFolderData", "--data.data_dir", "nowhere"], "nowhere"),
        (["--trainer.limit_train_batches", "-1"], "limit_train_batches"),
    ],
)
def test_mistakes_are_named(args, message, tmp_path, monkeypatch, capsys):
    from vit_course.cli import main

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["vit-course"])
    # what the command sets is taken back
    for name in ("VIT_COURSE_RUN_DIR", "VIT_COURSE_PRECISION"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    with pytest.raises(SystemExit) as ended:
        main(["fit", *SMALL, *args])
    assert ended.value.code not in (None, 0)  # as a shell sees it
    said = capsys.readouterr().err + str(ended.value)
    assert message in said and "Traceback" not in said and not list(tmp_path.glob("runs/*"))


def test_an_unknown_key_in_a_recipe_is_named(command_line):
    (command_line.folder / "mine.yaml").write_text("model:\n  embed_dimm: 64\n")
    output = command_line("fit", *SMALL, "--config", "mine.yaml", fails=True)
    assert "embed_dimm" in output and "Traceback" not in output


def test_a_checkpoint_of_another_shape_is_named(command_line):
    command_line("fit", *SMALL, "--trainer.max_epochs", "1")
    last = command_line.folder / "runs/quickstart/checkpoints/last.ckpt"
    output = command_line("fit", *SMALL, "--model.embed_dim", "24", "--ckpt_path", last, fails=True)
    assert "another model's" in output and "Traceback" not in output


def test_a_checkpoint_of_other_classes_or_colours_is_named(command_line):
    command_line("fit", *SMALL, "--trainer.max_epochs", "1")
    last = command_line.folder / "runs/quickstart/checkpoints/last.ckpt"
    changes = {"classes": lambda old: old[::-1], "std": lambda old: [2 * s for s in old]}
    for name, change in changes.items():
        checkpoint = torch.load(last, weights_only=True)
        checkpoint["hyper_parameters"][name] = change(checkpoint["hyper_parameters"][name])
        torch.save(checkpoint, command_line.folder / "other.ckpt")
        for work in (["fit", *SMALL], ["validate", *BARE]):
            output = command_line(*work, "--ckpt_path", "other.ckpt", fails=True)
            assert f"trained with {name}=" in output and "Traceback" not in output


def test_a_pickle_is_not_run(command_line):
    code = """
import os, sys, torch
class Evil:
    def __reduce__(self):
        return os.mkdir, ("evil",)
torch.save({"state_dict": Evil()}, "evil.ckpt")
from vit_course.cli import main; main()
"""
    for args in (["rollout", "evil.ckpt"], ["test", *SMALL[:2], "--ckpt_path", "evil.ckpt"]):
        command_line(*args, code=code, fails=True)
        assert not (command_line.folder / "evil").exists()


def test_rollout_writes_a_picture_and_overwrites_none(command_line):
    for name in ("rollout.png", "rollout-2.png"):
        assert name in command_line("rollout", "fashion")
        assert (command_line.folder / name).read_bytes().startswith(b"\x89PNG")


def test_rollout_of_own_images_to_a_name_without_ending(command_line):
    from PIL import Image

    for name, size in (("a.png", (28, 28)), ("b.png", (60, 40))):
        Image.new("L", size, 90).save(command_line.folder / name)
    (command_line.folder / "mine.png").write_bytes(b"precious")
    images = ["--images+", "a.png", "--images+", "b.png"]
    assert "mine-2.png" in command_line("rollout", "fashion", *images, "--output", "mine")
    assert (command_line.folder / "mine.png").read_bytes() == b"precious"
    assert (command_line.folder / "mine-2.png").read_bytes().startswith(b"\x89PNG")


def test_report_is_complete(command_line):
    import json

    output = command_line("fit", *BARE, "--trainer.max_epochs", "1")
    folder = command_line.folder / "runs/quickstart"
    metrics = json.loads((folder / "metrics.json").read_text())
    assert len(metrics["per_class_accuracy"]) == 10
    mean = sum(metrics["per_class_accuracy"].values()) / 10  # the bundled test set is balanced
    assert metrics["test_accuracy"] == pytest.approx(mean, abs=1e-6)
    assert {"parameters", "seconds", "images_per_second", "versions"} <= metrics.keys()
    names = {"learning_curves", "confusion_matrix", "predictions_right", "predictions_wrong"}
    assert names | {"rollout_right", "rollout_wrong"} <= {f.stem for f in folder.glob("*.png")}
    assert f"Test accuracy {metrics['test_accuracy']:.1%}" in output
