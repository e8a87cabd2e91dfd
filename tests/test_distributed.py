"""Two processes on this machine, joined by gloo, against one with the same global batch.

DDP, two played nodes, FSDP.
"""
import csv
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import FSDPStrategy
from torch.distributed.fsdp import FullyShardedDataParallel

SMALL = [
    "fit", "--config", "quickstart", "--trainer.accelerator", "cpu",
    "--trainer.precision", "32-true", "--trainer.enable_progress_bar", "false",
    "--trainer.enable_model_summary", "false", "--trainer.limit_train_batches", "4",
    "--trainer.max_epochs", "3", "--trainer.log_every_n_steps", "1",
    "--model.embed_dim", "16", "--model.depth", "2", "--model.num_heads", "2",
    "--model.dropout", "0", "--model.warmup", "0.2", "--model.stem", "conv", "--model.lr", "0.01",
    "--trainer.gradient_clip_val", "0.5",
    "--data.val_fraction", "0.1001",  # 1,001 images: not even, nor are batches of 20
]  # nothing is drawn at random in training, and no batch norm: what differs would be a mistake
TWO = ["--trainer.devices", "2", "--trainer.strategy", "ddp"]
OF_OTHER_RUNS = {"LOCAL_RANK", "NODE_RANK", "WORLD_SIZE",
                 "VIT_COURSE_RUN_DIR", "VIT_COURSE_PRECISION"}
SCRIPT = shutil.which("vit-course", path=str(Path(sys.executable).parent))
NO_COMMAND = "the package is not installed, so there is no command vit-course"
pytestmark = [
    pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this torch has no gloo"),
    pytest.mark.skipif(SCRIPT is None, reason=NO_COMMAND),
]


def environment(**more) -> dict[str, str]:
    "What a process of a run gets: nothing of other runs, and this folder's classes."
    clean = {k: v for k, v in os.environ.items() if k not in OF_OTHER_RUNS}
    return clean | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent)} | more


def fit(folder: Path, *options) -> str:
    "The command as a user gives it; Lightning starts the second process itself."
    command = [SCRIPT, *SMALL, *map(str, options)]
    done = subprocess.run(command, cwd=folder, env=environment(), timeout=600,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def logged(run: Path, name: str) -> list[float]:
    "A column of the run's log."
    with (run / "metrics.csv").open() as file:
        return [float(row[name]) for row in csv.DictReader(file) if row.get(name)]


def last_checkpoint(run: Path) -> Path:
    return next((run / "checkpoints").glob("last*.ckpt"))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    outputs = {
        "one": fit(folder, "--run_dir", "one", "--data.batch_size", 40),
        "two": fit(folder, "--run_dir", "two", "--data.batch_size", 20, *TWO),
    }
    return folder, outputs


def test_losses_are_equal(runs):
    folder, _ = runs
    for name in ("train_loss", "val_loss"):
        one, two = (logged(folder / run, name) for run in ("one", "two"))
        assert len(one) == len(two) == 3
        assert one == pytest.approx(two, abs=1e-5)
        assert one[0] > one[-1] + 0.02  # the runs did learn, so there was something to get wrong


def test_metrics_are_over_all_processes(runs):
    folder, _ = runs
    for name in ("train_acc", "val_acc"):
        assert logged(folder / "one", name) == pytest.approx(logged(folder / "two", name), abs=2e-3)


def test_one_log_one_report_and_the_same_weights(runs):
    folder, outputs = runs
    folders = [path.name for path in folder.iterdir() if path.name.startswith(("one", "two"))]
    assert sorted(folders) == ["one", "two"]  # no folder of the second process
    assert outputs["two"].count("Test accuracy") == 1
    names = [sorted(path.name for path in (folder / run).glob("*")) for run in ("one", "two")]
    assert names[0] == names[1]
    weights = []
    for run in ("one", "two"):
        last = torch.load(last_checkpoint(folder / run), weights_only=False)
        weights.append(last["state_dict"])
    for name, value in weights[0].items():
        # a key's bias has no gradient but rounding, which AdamW blows up
        if not name.endswith("qkv.bias"):
            torch.testing.assert_close(value, weights[1][name], atol=1e-4, rtol=0)
    one, two = (json.loads((folder / run / "metrics.json").read_text()) for run in ("one", "two"))
    assert one["test_accuracy"] == pytest.approx(two["test_accuracy"], abs=0.01)
    assert (one["processes"], two["processes"]) == (1, 2)


class StopAfterOne(pl.Callback):
    "Ends the run after its first epoch, in all processes; its schedule is that of the whole run."

    def on_train_epoch_end(self, trainer, module):
        trainer.should_stop = trainer.current_epoch == 0


def test_a_stopped_run_of_two_processes_goes_on(runs):
    "To the weights and losses of the run that was never stopped, in one new folder."
    folder, _ = runs
    two = [*TWO, "--data.batch_size", 20, "--report", "false"]
    stop = ["--trainer.callbacks+", "test_distributed.StopAfterOne"]
    fit(folder, "--run_dir", "stopped", *two, *stop)
    assert len(logged(folder / "stopped", "val_loss")) == 1
    fit(folder, "--run_dir", "resumed", *two, "--ckpt_path", "stopped/checkpoints/last.ckpt")
    for name in ("train_loss", "val_loss"):
        rest = logged(folder / "two", name)[1:]
        assert logged(folder / "resumed", name) == pytest.approx(rest, abs=1e-6)
    last = [torch.load(last_checkpoint(folder / run)) for run in ("two", "resumed")]
    weights = [checkpoint["state_dict"] for checkpoint in last]
    for name, value in weights[0].items():
        torch.testing.assert_close(value, weights[1][name], atol=1e-6, rtol=0)
    assert not [path for run in ("stopped", "resumed") for path in folder.glob(f"{run}-*")]


def test_every_image_counts_once(runs):
    "Of 1,000 images for validation, shared by 3 processes as 334, 333, 333, none is counted twice."
    from vit_course.data import FashionMiniData, make_loader

    class Share:
        world_size = 3

        def __init__(self, rank):
            self.global_rank = rank

    seen = []
    for rank in range(3):
        data = FashionMiniData(batch_size=64)
        data.trainer = Share(rank)
        seen += [label for _, labels in make_loader(data, "val") for label in labels.tolist()]
    assert sorted(seen) == sorted(FashionMiniData().sets["val"].labels.tolist())
    reported = make_loader(data, "val", whole=True)  # what a report reads
    assert sum(len(labels) for _, labels in reported) == len(seen)


def run_nodes(folder: Path, commands: list[list[str]], environments: list[dict]):
    "Commands at the same time, each for a machine with one process; none may fail, none may stay."
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    nodes = [
        subprocess.Popen(command, cwd=folder, env=env, **pipes)
        for command, env in zip(commands, environments)
    ]
    try:
        outputs = [node.communicate(timeout=600)[0] for node in nodes]
    finally:
        for node in nodes:
            node.kill()
    assert [node.returncode for node in nodes] == [0, 0], outputs


def assert_same_losses(folder: Path, run: str):
    for name in ("train_loss", "val_loss"):
        assert logged(folder / "one", name) == pytest.approx(logged(folder / run, name), abs=1e-5)
    assert not list(folder.glob(f"{run}-*"))  # no folder of another process


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def node_options(run: str) -> list[str]:
    return [*SMALL, "--run_dir", run, "--data.batch_size", "20", "--report", "false",
            "--trainer.strategy", "ddp", "--trainer.num_nodes", "2", "--trainer.devices", "1"]


def test_torchrun_on_two_nodes(runs):
    meet = ["--nnodes", "2", "--nproc-per-node", "1", "--master-addr", "127.0.0.1",
            "--master-port", str(free_port())]
    torchrun = [sys.executable, "-m", "torch.distributed.run", *meet, "--no-python"]
    options = node_options("torchrun")
    commands = [[*torchrun, "--node-rank", rank, SCRIPT, *options] for rank in ("0", "1")]
    run_nodes(runs[0], commands, [environment()] * 2)
    assert_same_losses(runs[0], "torchrun")


def test_slurm_on_two_nodes(runs):
    "SLURM's variables as `srun` would set them; SLURM itself is not here."
    job = {"SLURM_JOB_ID": "1", "SLURM_JOB_NAME": "course", "SLURM_NNODES": "2",
           "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "1", "SLURM_NODELIST": "127.0.0.1",
           "MASTER_PORT": str(free_port())}
    tasks = [{"SLURM_PROCID": r, "SLURM_NODEID": r, "SLURM_LOCALID": "0"} for r in ("0", "1")]
    environments = [environment(**job, **task) for task in tasks]
    run_nodes(runs[0], [[SCRIPT, *node_options("slurm")]] * 2, environments)
    assert_same_losses(runs[0], "slurm")


class ShardedOnCPU(FSDPStrategy):
    "Lightning's strategy asks for a graphics card, torch's FSDP does not."

    def _setup_model(self, model):
        own = {"device_id": self.root_device, "sharding_strategy": self.sharding_strategy}
        return FullyShardedDataParallel(model, **self.kwargs | own)


class Sizes(pl.Callback):
    "Rank 0 writes how many parameters it holds, in all and by decay."

    def on_train_start(self, trainer, module):
        if trainer.is_global_zero:
            groups = trainer.optimizers[0].param_groups
            counts = [(group["weight_decay"], len(group["params"])) for group in groups]
            held = sum(p.numel() for p in module.parameters())
            Path("sizes.json").write_text(json.dumps({"held": held, "groups": counts}))


SHARDED = """
trainer:
  devices: 2
  strategy:
    class_path: test_distributed.ShardedOnCPU
    init_args:
      auto_wrap_policy: [vit_course.encoder.EncoderBlock]
"""


TORCH = tuple(map(int, torch.__version__.split(".")[:2]))


@pytest.mark.skipif(TORCH < (2, 14), reason="tried with torch 2.14")
def test_sharded_losses_are_equal(runs):
    "Half the weights each; decay on matrices only, clipping by the whole norm, whole checkpoints."
    folder, _ = runs
    (folder / "sharded.yaml").write_text(SHARDED)
    try:
        fit(folder, "--config", "sharded.yaml", "--run_dir", "sharded", "--data.batch_size", 20,
            "--report", "false", "--trainer.callbacks+", "test_distributed.Sizes")
    finally:
        (folder / "sharded.yaml").unlink()
    assert_same_losses(folder, "sharded")
    one, two = (torch.load(last_checkpoint(folder / run)) for run in ("one", "sharded"))
    for name, value in one["state_dict"].items():
        if not name.endswith("qkv.bias"):
            torch.testing.assert_close(value, two["state_dict"][name], atol=1e-4, rtol=0)
    sizes = json.loads((folder / "sizes.json").read_text())
    parameters = sum(value.numel() for value in one["state_dict"].values())
    assert sizes["held"] == pytest.approx(parameters / 2, rel=0.01)
    assert [tuple(group) for group in sizes["groups"]] == [(0.05, 10), (0.0, 22)]


class KeepWeights(pl.Callback):
    "Each process writes its own weights at the end."

    def on_train_end(self, trainer, module):
        torch.save(module.state_dict(), f"rank{trainer.global_rank}.pt")


def test_a_run_by_the_clock_keeps_the_processes_together(tmp_path):
    "The rate follows rank 0's clock in all processes; else their weights would drift apart."
    fit(tmp_path, "--run_dir", "timed", "--data.batch_size", 20, *TWO,
        "--trainer.max_epochs", -1, "--report", "false", "--trainer.max_time", "00:00:00:03",
        "--trainer.callbacks+", "test_distributed.KeepWeights")
    weights = [torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1)]
    for name, value in weights[0].items():
        assert torch.equal(value, weights[1][name]), name
