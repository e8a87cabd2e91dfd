#!/usr/bin/env python3
"""Class token against mean pooling: the quickstart recipe, three seeds each, on the bundled images.

    python benchmarks/pooling.py [--seeds 0 1 2] [--epochs N] [--threads N] [--again]

Writes benchmarks/results/pooling.csv with a row an epoch: pool, seed, epoch, val_acc, and test_acc
in the last one. A run that stands in the file already is not made again, so the command can be
stopped and started at will; `--again` makes those that are asked for anew, and writes them at the
end.
"""
import argparse
import logging
import warnings
from collections import Counter
from pathlib import Path

import pytorch_lightning as pl
import torch
import yaml
from tables import read_rows, write_rows

from vit_course.cli import recipes
from vit_course.data import FashionMiniData
from vit_course.training import EpochSeed, LitViT

TARGET = Path(__file__).parent / "results" / "pooling.csv"
COLUMNS = ["pool", "seed", "epoch", "val_acc", "test_acc"]
LINKED = ("num_classes", "in_chans", "img_size", "mean", "std", "classes")  # from data to model


class Curve(pl.Callback):
    "Keeps the accuracy on the validation images after each epoch."

    def __init__(self):
        self.values = []

    def on_validation_epoch_end(self, trainer, module):
        if not trainer.sanity_checking:
            self.values.append(trainer.callback_metrics["val_acc"].item())


def train(pool: str, seed: int, epochs: int) -> list[dict]:
    "One run of the recipe with another pooling and seed: its rows."
    recipe = yaml.safe_load(recipes()["quickstart"].read_text())
    pl.seed_everything(seed, verbose=False)
    data = FashionMiniData(**recipe["data"]["init_args"])  # the same split for every seed
    linked = {name: getattr(data, name) for name in LINKED}
    model = LitViT(**recipe["model"] | linked | {"pool": pool})
    options = recipe["trainer"] | {"max_epochs": epochs}
    curve = Curve()
    trainer = pl.Trainer(
        **options, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, callbacks=[EpochSeed(seed), curve],
    )
    trainer.fit(model, data)
    test = trainer.test(model, data, verbose=False)[0]["test_acc"]
    run, rows = {"pool": pool, "seed": seed}, []
    for epoch, accuracy in enumerate(curve.values):
        rows.append(run | {"epoch": epoch, "val_acc": round(accuracy, 4), "test_acc": ""})
    rows[-1]["test_acc"] = round(test, 4)
    return rows


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, help="instead of the recipe's")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--again", action="store_true",
                        help="make runs anew that stand in the file")
    return parser


def main():
    parser = make_parser()
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    asked = [(pool, seed) for seed in args.seeds for pool in ("cls", "mean")]
    recipe = yaml.safe_load(recipes()["quickstart"].read_text())
    epochs = args.epochs or recipe["trainer"]["max_epochs"]
    rows = read_rows(TARGET)
    if args.again:
        rows = [row for row in rows if (row["pool"], int(row["seed"])) not in asked]
    there = Counter((row["pool"], int(row["seed"])) for row in rows)
    if others := {run: n for run, n in there.items() if n != epochs}:
        parser.error(f"{TARGET} holds runs of another length than {epochs} epochs: {others}; "
                     "give --epochs, or --again for all of them")
    for pool, seed in asked:
        if (pool, seed) in there:
            continue
        rows += train(pool, seed, epochs)
        if not args.again:
            write_rows(TARGET, COLUMNS, rows)
        print(pool, seed, "test accuracy", rows[-1]["test_acc"], flush=True)
    write_rows(TARGET, COLUMNS, rows)


if __name__ == "__main__":
    main()
