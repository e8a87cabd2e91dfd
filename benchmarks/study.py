#!/usr/bin/env python3
"""From the assignment's recipe to a good one, a step at a time, each run with the same budget on real CIFAR-10.

    python benchmarks/study.py --data FOLDER [--steps NAME ...] [--seeds 0 1 2] [--minutes 5] [--share 0/1]

FOLDER holds CIFAR-10: torchvision's, or images as train/<class>/* and test/<class>/*. Ten per cent of the training images are kept for
validation; the test images are not read. A budget of M minutes on two cores is 120 * M seconds of one core's time: a run has one thread and
counts the processor's seconds, so that two runs fit side by side and a busy machine does not cheat. Validation is not counted.

Writes benchmarks/results/study.csv: a row an epoch (`val_acc` of the last one is the result), and study_runs.csv: a row a run, with
its options. A run that stands there is not made again. `--share 0/2` and `--share 1/2` split the work between two commands.
"""
import argparse
import csv
import fcntl
import json
import logging
import time
import warnings
from pathlib import Path

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import EMAWeightAveraging, Timer

from vit_course.data import CIFAR10Data, ImageFolderData
from vit_course.training import EpochSeed, LitViT

RESULTS = Path(__file__).parent / "results"
EPOCH_COLUMNS = ["step", "minutes", "seed", "epoch", "seconds", "train_loss", "val_loss", "val_acc"]
RUN_COLUMNS = ["step", "minutes", "seed", "epochs", "parameters", "val_acc", "options"]

ASSIGNMENT = {
    "patch_size": 4, "embed_dim": 256, "depth": 6, "num_heads": 8, "mlp_ratio": 2.0, "dropout": 0.2, "attn_dropout": 0.2,
    "lr": 3e-4, "weight_decay": 0.01, "schedule": "step", "batch_size": 64, "augment": "flip_crop",
}
# each step adds to the one before it; what a step is worth is the difference of the two
LADDER = {
    "assignment": ASSIGNMENT,
    "no dropout": {"dropout": 0.0, "attn_dropout": 0.0},
    "warm-up, cosine": {"schedule": "cosine", "warmup": 0.1, "lr": 1e-3},
    "batch of 128": {"batch_size": 128, "lr": 1.5e-3},
    "label smoothing": {"label_smoothing": 0.1},
    "flip and shift": {"augment": "flip_shift"},
    "mean pooling": {"pool": "mean"},
    "early convolutions": {"stem": "early_conv"},
    "smaller model": {"embed_dim": 64, "depth": 4, "num_heads": 4, "lr": 4e-3},
    "Muon": {"optimizer": "muon", "weight_decay": 0.1},
}
# each of these is the top of the ladder with one more change
BRANCHES = {
    "32 bits": {"precision": "32-true"},
    "residual in 32 bits": {"residual_in_fp32": True},
    "EMA": {"ema": 0.998},
    "drop path": {"drop_path": 0.1},
    "weight decay 0.3": {"weight_decay": 0.3},
    "no augmentation": {"augment": "none"},
    "random erasing": {"augment": "flip_shift_erase"},
    "RandAugment": {"augment": "rand_augment"},
    "mixup or cutmix": {"mixup": 0.8, "cutmix": 1.0},
    "class token": {"pool": "cls"},
    "half the rate": {"lr": 2e-3},
}
# width x depth, at the top of the ladder
SIZES = {f"{width}x{depth}": {"embed_dim": width, "depth": depth} for width in (64, 96, 128, 192) for depth in (2, 4, 6)}


def all_steps() -> dict[str, dict]:
    "Every step's options, complete."
    steps, options = {}, {}
    for name, change in LADDER.items():
        steps[name] = options = options | change
    return steps | {name: options | change for name, change in (BRANCHES | SIZES).items()}


class ProcessorClock(Timer):
    "Lightning's clock, counting this process's time on a processor in training alone."

    def __init__(self, seconds: float):
        super().__init__(duration={"seconds": seconds}, verbose=False)
        self.used, self.since = 0.0, None

    def time_elapsed(self, stage="train") -> float:
        return self.used + (0.0 if self.since is None else time.process_time() - self.since)

    def on_train_start(self, *args):
        self.since = time.process_time()

    def on_validation_start(self, *args):
        if self.since is not None:
            self.used, self.since = self.time_elapsed(), None

    def on_validation_end(self, trainer, *args):
        self.since = None if trainer.sanity_checking else time.process_time()

    def on_train_end(self, *args):
        self.used, self.since = self.time_elapsed(), None


class Curve(pl.Callback):
    "A row for each validation."

    def __init__(self, clock: ProcessorClock):
        self.clock, self.rows = clock, []

    def on_validation_end(self, trainer, module):
        values = trainer.callback_metrics
        row = {"epoch": trainer.current_epoch + 1, "seconds": round(self.clock.time_elapsed())}
        self.rows.append(row | {name: round(values[name].item(), 4) for name in ("val_loss", "val_acc")})

    def on_train_epoch_end(self, trainer, module):
        if self.rows and "train_loss" in trainer.callback_metrics:
            self.rows[-1]["train_loss"] = round(trainer.callback_metrics["train_loss"].item(), 4)


def open_data(folder: str) -> CIFAR10Data | ImageFolderData:
    "CIFAR-10 in either form, in memory."
    if (Path(folder) / "train").is_dir():
        return ImageFolderData(folder, img_size=32, in_memory=True, num_workers=0)
    return CIFAR10Data(folder)


def train(options: dict, seed: int, minutes: float, source) -> tuple[list[dict], LitViT]:
    "One run: a row an epoch, and the model."
    options = dict(options)
    precision, ema, of_data = options.pop("precision", "bf16-mixed"), options.pop("ema", None), {}
    for name in ("batch_size", "augment", "mixup", "cutmix"):
        of_data[name] = options.pop(name, 0.0)
    pl.seed_everything(seed, verbose=False)
    data = type(source)(source.data_dir, **of_data, seed=0, num_workers=0)
    data._sets, data._classes, data._stats, data.img_size = source.sets, source.classes, source.stats(), 32
    linked = {name: getattr(data, name) for name in ("num_classes", "in_chans", "img_size", "mean", "std", "classes")}
    model = LitViT(**options, **linked)
    clock = ProcessorClock(120 * minutes)
    callbacks = [EpochSeed(seed), clock, curve := Curve(clock)] + ([EMAWeightAveraging(decay=ema)] if ema else [])
    trainer = pl.Trainer(
        accelerator="cpu", precision=precision, max_epochs=-1, callbacks=callbacks, num_sanity_val_steps=0, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )
    trainer.fit(model, data)  # the run ends inside an epoch, with a validation
    curve.rows[-1]["epoch"] = round(trainer.global_step * data.batch_size / len(data.sets["train"]), 2)
    return curve.rows, model


def append(path: Path, columns: list[str], rows: list[dict]):
    "Add rows to a file that another command may be writing to."
    path.parent.mkdir(exist_ok=True)
    with path.open("a+", newline="") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        if not path.stat().st_size:
            writer.writeheader()
        writer.writerows(rows)


def done(path: Path, key: tuple) -> bool:
    "Whether the run stands in the file."
    if not path.exists():
        return False
    with path.open(newline="") as file:
        return any((row["step"], float(row["minutes"]), int(row["seed"])) == key for row in csv.DictReader(file))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--steps", nargs="+", default=[*LADDER, *BRANCHES], choices=list(all_steps()), metavar="NAME")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--share", default="0/1", help="i/n: every n-th run, beginning with number i")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    source, (mine, shares) = open_data(args.data), map(int, args.share.split("/"))
    runs = [(step, seed) for seed in args.seeds for step in args.steps][mine::shares]
    for step, seed in runs:
        key = (step, args.minutes, seed)
        if done(RESULTS / "study_runs.csv", key):
            continue
        options = all_steps()[step]
        rows, model = train(options, seed, args.minutes, source)
        same = {"step": step, "minutes": f"{args.minutes:g}", "seed": seed}
        append(RESULTS / "study.csv", EPOCH_COLUMNS, [same | row for row in rows])
        summary = {"epochs": rows[-1]["epoch"], "parameters": sum(p.numel() for p in model.parameters())}
        summary |= {"val_acc": rows[-1]["val_acc"], "options": json.dumps(options)}
        append(RESULTS / "study_runs.csv", RUN_COLUMNS, [same | summary])
        print(*key, summary["val_acc"], f"{summary['epochs']} epochs", flush=True)


if __name__ == "__main__":
    main()
