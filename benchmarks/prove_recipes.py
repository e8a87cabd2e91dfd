r"""Train a shipped recipe for a few hundred steps on a folder of images, and keep its log as a
small CSV file.

    python benchmarks/prove_recipes.py cifar10_assignment --data_dir IMAGES \
        --img_size 32 --steps 240
    python benchmarks/prove_recipes.py image_folder --data_dir IMAGES \
        --img_size 48 --patch_size 8 --steps 300

IMAGES holds train/<class>, valid/<class> and test/<class>. The logs in benchmarks/results come from
CIFAR-10, re-compressed as JPEG files, with 500 training images of each class moved to valid/.
"""

import argparse
import csv
import time
from importlib.resources import files
from pathlib import Path
from statistics import fmean

import pytorch_lightning as pl
import torch
import yaml

from vit_course.data import ImageFolderData
from vit_course.training import LitViT


class StepLog(pl.Callback):
    "Loss and accuracy of the training batches, averages of some steps, and of the validation set."

    def __init__(
        self,
        every: int = 10,  # steps that are averaged into one row
    ):
        self.every, self.start = every, time.time()
        self.rows, self.losses, self.accuracies = [], [], []

    def on_train_start(self, trainer, module):
        # a metric called on a batch returns that batch's value
        def keep(metric, batch, value):
            self.accuracies.append(float(value))

        module.accuracy["train_acc"].register_forward_hook(keep)

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.losses.append(float(outputs["loss"]))
        if trainer.global_step % self.every == 0:
            self.add("train", trainer.global_step, fmean(self.losses), fmean(self.accuracies))
            self.losses.clear()
            self.accuracies.clear()

    def on_validation_end(self, trainer, module):
        step, metrics = trainer.global_step, trainer.callback_metrics
        self.add("valid", step, float(metrics["val_loss"]), float(metrics["val_acc"]))

    def add(self, split: str, step: int, loss: float, accuracy: float) -> None:
        values = {"loss": round(loss, 4), "accuracy": round(accuracy, 4)}
        self.rows.append({"step": step, "split": split} | values)
        print(*self.rows[-1].values(), f"{time.time() - self.start:.0f} s", flush=True)


def parse_arguments() -> argparse.Namespace:
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_written)
    parser.add_argument("recipe", help="name of a shipped recipe")
    parser.add_argument("--data_dir", required=True, help="folder with train, valid and test")
    parser.add_argument("--img_size", type=int, required=True, help="side of the images, in pixels")
    parser.add_argument("--patch_size", type=int,
                        help="in place of the recipe's, for smaller images")
    parser.add_argument("--lr", type=float, help="in place of the recipe's")
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--val_batches", type=int, default=10,
                        help="validation batches, of the recipe's size")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--workers", type=int, default=0, help="loading processes")
    parser.add_argument("--precision", default="32-true", help="Lightning's, such as bf16-mixed")
    parser.add_argument("--out", help="CSV file; default: none, print only")
    return parser.parse_args()


def make_trainer(recipe: dict, args: argparse.Namespace, log: StepLog) -> pl.Trainer:
    "The recipe's trainer, cut to some steps; schedules shrink with it."
    options = recipe["trainer"] | {"max_epochs": -1, "max_steps": args.steps}
    return pl.Trainer(
        **options, accelerator="cpu", precision=args.precision, callbacks=[log], logger=False,
        enable_checkpointing=False, enable_progress_bar=False, num_sanity_val_steps=0,
        val_check_interval=max(1, args.steps // 6), check_val_every_n_epoch=None,
        limit_val_batches=args.val_batches,
    )


def shuffled_batches(data: ImageFolderData) -> None:
    "A folder is sorted by class: mix the validation set, so that some batches stand for all."
    images = data.sets["val"]
    order = torch.randperm(len(images.samples), generator=torch.Generator().manual_seed(0))
    images.samples = [images.samples[i] for i in order]


def make_model(recipe: dict, args: argparse.Namespace, data: ImageFolderData) -> LitViT:
    "The recipe's model for these images, with the options that were given in place of its own."
    linked = {"num_classes": data.num_classes, "in_chans": data.in_chans, "img_size": args.img_size}
    linked |= {"mean": data.mean, "std": data.std, "classes": data.classes}
    given = {"patch_size": args.patch_size, "lr": args.lr}
    changed = {name: value for name, value in given.items() if value is not None}
    return LitViT(**recipe["model"] | linked | changed)


def main():
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    recipe = yaml.safe_load((files("vit_course") / "recipes" / f"{args.recipe}.yaml").read_text())
    pl.seed_everything(recipe["seed_everything"])
    batch_size = recipe["data"]["init_args"]["batch_size"]
    data = ImageFolderData(args.data_dir, args.img_size, batch_size,
                           in_memory=False, num_workers=args.workers)
    shuffled_batches(data)
    log, model = StepLog(), make_model(recipe, args, data)
    make_trainer(recipe, args, log).fit(model, data)
    if args.out:
        with Path(args.out).open("w", newline="") as file:
            writer = csv.DictWriter(file, list(log.rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(log.rows)


if __name__ == "__main__":
    main()
