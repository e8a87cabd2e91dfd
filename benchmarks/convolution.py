#!/usr/bin/env python3
"""A Vision Transformer against a small convolutional network: the same images, the same steps.

    # 1. a rate for each model, by validation images (with --data: for CIFAR-10, too)
    python benchmarks/convolution.py rates [--data FOLDER]
    # 2. what a step costs
    python benchmarks/convolution.py costs [--data FOLDER]
    # 3. 250, 1,000, 4,000 and 9,000 of the bundled clothes; at 9,000 also shifted test images
    python benchmarks/convolution.py clothes [--seeds 0 1 2] [--share 0/1]
    # 4. the convolutional network on CIFAR-10, by the rules of benchmarks/study.py
    python benchmarks/convolution.py cifar --data FOLDER [--seeds 0 1 2] [--minutes 5]

Clothes: three models, a plain ViT, one with the stem of early convolutions, and a convolutional
network with about as many parameters. They have the same recipe, but for the rate and for the
optimizer: Muon for the matrices in the ViTs' blocks, AdamW for everything else. Of the 10,000
bundled training images 1,000 are kept for choosing the rate, and every seed draws its own share of
the other 9,000, the same for all models. The 2,000 test images are read after the last step.

CIFAR-10: FOLDER as for study.py, whose table of costs says how many steps the minutes buy. A step
of the network is timed in turns with one of the study's recipe `Muon`, and scaled so that `Muon`
costs here what it costs in that table.

Writes to benchmarks/results, or the folder of `--results`: convolution_rates.csv,
convolution_costs.csv, convolution.csv (a row a run on clothes), convolution_shifts.csv (a row a
shift), convolution_cifar.csv. A run that stands there is not made again: the same command goes on.
"""
import argparse
import json
import statistics
from collections import defaultdict
from pathlib import Path

import pytorch_lightning as pl
import study
import torch
import torch.nn.functional as F
from study import COST_COLUMNS, LINKED, RESULTS, RUN_COLUMNS, Clock, append
from tables import one_quiet_thread, read_rows, share_of, write_rows
from torch import Tensor, nn

from vit_course.data import FashionMiniData, ImageArrays
from vit_course.training import ChannelNorm, EpochSeed, LitViT, ScheduledAdamW, make_schedule

# with Muon for the matrices of its blocks, as from rung 9 of the study's ladder on
VIT = {"patch_size": 4, "embed_dim": 64, "depth": 2, "num_heads": 4, "mlp_ratio": 2.0,
       "pool": "mean", "optimizer": "muon", "weight_decay": 0.1}
MODELS = {
    "plain ViT": VIT,
    "ViT, early convolutions": VIT | {"stem": "early_conv"},
    "CNN": {"widths": [16, 32, 48]},
}
SCHEDULE = {"schedule": "cosine", "warmup": 0.1}
CLOTHES = SCHEDULE | {"weight_decay": 0.05, "batch_size": 50, "augment": "flip_crop"}
SIZES, STEPS = [250, 1000, 4000, 9000], 1000
SHIFTS = [0, 1, 2, 3, 4, 6, 8]  # pixels to the right; a patch has 4
# for the models of the shifted images: augmentation without and with shifts, at all 9,000 images
AUGMENTS = ["flip_crop", "flip_shift"]
CIFAR = SCHEDULE | {"widths": [16, 32, 64, 128], "weight_decay": 0.05, "label_smoothing": 0.1,
                    "batch_size": 128, "augment": "flip_shift"}
# each a factor of two apart; where the best lies at the edge, give another with --rates
RATES = [0.001, 0.002, 0.004, 0.008]
TRIAL = {"images": 1000, "steps": STEPS}  # of clothes, for the choice of a rate
TRIAL_MINUTES = 1  # of CIFAR-10

KEYS = {  # of each file, what makes a run
    "rates": ["data", "model", "lr", "seed"],
    "clothes": ["model", "augment", "images", "seed"],
    "cifar": ["step", "minutes", "seed"],
}
FILES = {"rates": "convolution_rates.csv", "costs": "convolution_costs.csv",
         "clothes": "convolution.csv", "shifts": "convolution_shifts.csv",
         "cifar": "convolution_cifar.csv"}
COLUMNS = {
    "rates": [*KEYS["rates"], "steps", "val_acc"],
    "clothes": [*KEYS["clothes"], "steps", "lr", "parameters", "seconds", "val_acc", "test_acc"],
    "shifts": ["model", "augment", "images", "seed", "shift", "test_acc"],
    "cifar": RUN_COLUMNS,
}


class Residual(nn.Module):
    "Two convolutions beside a way round them (He et al. 2016)."

    def __init__(self, width: int):
        super().__init__()
        self.layers = nn.Sequential(*convolution(width, width), *convolution(width, width)[:-1])

    def forward(self, x: Tensor) -> Tensor:  # (B, D, H, W) -> the same shape
        return F.relu(x + self.layers(x))


def convolution(fan_in: int, fan_out: int, stride: int = 1) -> list[nn.Module]:
    "3 x 3 pixels, batch norm, ReLU; the norm has a bias, so the convolution needs none."
    layer = nn.Conv2d(fan_in, fan_out, 3, stride=stride, padding=1, bias=False)
    return [layer, nn.BatchNorm2d(fan_out), nn.ReLU()]


def small_cnn(widths: list[int], in_chans: int, num_classes: int) -> nn.Sequential:
    "(B, C, H, W) -> (B, num_classes): a stage a width, each but the first on half of the grid."
    layers = convolution(in_chans, widths[0])
    for fan_in, fan_out in zip(widths, widths[1:]):
        layers += [*convolution(fan_in, fan_out, stride=2), Residual(fan_out)]
    head = nn.Linear(widths[-1], num_classes)
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), head)


class LitCNN(ScheduledAdamW):
    "`small_cnn` with the loss, the metrics, the optimizer and the schedule of `LitViT`."

    def __init__(
        self, widths: list[int], lr: float, weight_decay: float,
        schedule: str = "cosine", warmup: float = 0.1, label_smoothing: float = 0.0,
        num_classes: int = 10, in_chans: int = 1, img_size: int = 28,  # any size will do
        mean: list[float] | None = None, std: list[float] | None = None,
        classes: list[str] | None = None, betas: tuple[float, float] = (0.9, 0.999),
    ):
        super().__init__()
        self.save_hyperparameters()
        self.factor = make_schedule(schedule, warmup, (), 1.0)
        # numbers of one pixel beside each other: a step takes about a fifth less
        self.net = small_cnn(widths, in_chans, num_classes).to(memory_format=torch.channels_last)
        self.normalize = ChannelNorm(mean, std)
        self.add_metrics(num_classes)

    def forward(self, images: Tensor) -> Tensor:  # (B, C, H, W) in 0..1 -> (B, num_classes)
        return self.net(self.normalize(images))


def make_model(options: dict, linked: dict) -> pl.LightningModule:
    "The model that the options are of; `linked` comes from the data."
    return (LitCNN if "widths" in options else LitViT)(**options, **linked)


def begin(options: dict, seed: int, source, make=make_model) -> tuple[pl.LightningModule, object]:
    "A run before its first step: the model, and the data."
    of_data = {name: options.get(name, 0.0) for name in study.OF_DATA}
    of_model = {name: value for name, value in options.items() if name not in study.OF_DATA}
    pl.seed_everything(seed, verbose=False)
    data = study.data_of(source, of_data, 1)
    data.img_size = source.img_size
    return make(of_model, {name: getattr(data, name) for name in LINKED}), data


def fit(model: pl.LightningModule, data, seed: int, steps: int) -> Clock:
    "All steps of a run: the clock with each one's time."
    plan = {"steps": steps, "processes": 1, "precision": "32-true", "ema": None}
    clock = Clock(plan)
    trainer = study.make_trainer(plan, [EpochSeed(seed), clock], validate=False, keep=None)
    trainer.fit(model, data)
    model.eval()
    return clock


def train(
    options: dict, seed: int, steps: int, source, change=None
) -> tuple[pl.LightningModule, Clock, object]:
    "One run: the model (after `change` was done to it), the clock with its steps, and the data."
    model, data = begin(options, seed, source)
    if change:
        change(model)
    return model, fit(model, data, seed, steps), data


def clothes(images: int, seed: int) -> FashionMiniData:
    "So many of the bundled training images, drawn by the seed; a smaller share lies in a larger."
    source = FashionMiniData()
    train, generator = source.sets["train"], torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(train), generator=generator)[:images]
    share = ImageArrays(train.images[chosen], train.labels[chosen], len(source.classes))
    source.sets["train"] = share
    return source


def to_the_right(images: Tensor, pixels: int) -> Tensor:  # (B, C, H, W) -> the same shape
    "Moved to the right; what comes in at the left is black, what goes out is lost."
    return F.pad(images, (pixels, 0, 0, 0))[..., : images.shape[-1]]


@torch.inference_mode()
def accuracy(model: nn.Module, images: ImageArrays, shift: int = 0) -> float:
    "Share of right answers, on images moved to the right by so many pixels."
    right = 0
    for pixels, labels in zip(images.images.split(500), images.labels.split(500)):
        answers = model(to_the_right(pixels, shift).float() / 255).argmax(dim=1)
        right += int((answers == labels).sum())
    return round(right / len(images), 4)


def read(part: str, folder: Path) -> list[dict[str, str]]:
    "The rows that are there."
    return read_rows(folder / FILES[part])


def as_key(row: dict, part: str) -> tuple[str, ...]:
    "What makes a run, as the file writes it."
    return tuple(str(row[name]) for name in KEYS[part])


def missing(runs: list[dict], part: str, args) -> list[dict]:
    "This command's share of the runs, without those that stand in the file."
    there = {as_key(row, part) for row in read(part, args.results)}
    mine, shares = args.share
    return [run for run in runs[mine::shares] if as_key(run, part) not in there]


def best_rate(data: str, model: str, folder: Path) -> float:
    "The rate with the highest mean accuracy on validation images."
    found = defaultdict(list)
    for row in read("rates", folder):
        if (row["data"], row["model"]) == (data, model):
            found[float(row["lr"])].append(float(row["val_acc"]))
    if not found:
        more = " --data FOLDER" if data == "cifar" else ""
        raise SystemExit(f"{folder / FILES['rates']} has no rate for {model} on {data}: choose "
                         f"one first, by `python benchmarks/convolution.py rates{more}`")
    return max(found, key=lambda rate: statistics.mean(found[rate]))


def try_rates(args):
    "A run for each model and rate, judged on validation images."
    runs = [{"data": "clothes", "model": name, "lr": lr, "seed": seed}
            for seed in args.seeds for name in MODELS for lr in args.rates]
    if args.data:
        runs += [{"data": "cifar", "model": "CNN", "lr": lr, "seed": 0} for lr in args.rates]
    for run in missing(runs, "rates", args):
        lr, seed = {"lr": run["lr"]}, run["seed"]
        if run["data"] == "clothes":
            options, steps = CLOTHES | MODELS[run["model"]] | lr, TRIAL["steps"]
            source = clothes(TRIAL["images"], seed)
        else:
            options, steps = CIFAR | lr, steps_in(TRIAL_MINUTES, args.results)
            source = study.open_data(args.data)
        model, _, data = train(options, seed, steps, source)
        run |= {"steps": steps, "val_acc": accuracy(model, data.sets["val"])}
        append(args.results / FILES["rates"], COLUMNS["rates"], [run])
        print(run, flush=True)


def train_on_clothes(args):
    "Every model, number of images and seed; with all images, another augmentation, too."
    runs = [{"model": name, "augment": augment, "images": images, "seed": seed}
            for seed in args.seeds for augment in AUGMENTS for images in SIZES for name in MODELS
            if augment == AUGMENTS[0] or images == SIZES[-1]]
    for run in missing(runs, "clothes", args):
        name, seed = run["model"], run["seed"]
        lr = best_rate("clothes", name, args.results)
        options = CLOTHES | MODELS[name] | {"lr": lr, "augment": run["augment"]}
        model, clock, data = train(options, seed, STEPS, clothes(run["images"], seed))
        moved = SHIFTS if run["images"] == SIZES[-1] else SHIFTS[:1]
        found = {shift: accuracy(model, data.sets["test"], shift) for shift in moved}
        if len(found) > 1:
            rows = [run | {"shift": shift, "test_acc": acc} for shift, acc in found.items()]
            append(args.results / FILES["shifts"], COLUMNS["shifts"], rows)
        row = run | {"steps": STEPS, "lr": lr, "seconds": round(sum(clock.steps)),
                     "parameters": sum(p.numel() for p in model.parameters()),
                     "val_acc": accuracy(model, data.sets["val"]), "test_acc": found[0]}
        append(args.results / FILES["clothes"], COLUMNS["clothes"], [row])
        print(row, flush=True)


def steps_in(minutes: float, folder: Path) -> int:
    "How many steps of the network so many minutes on two cores buy."
    costs = {row["step"]: float(row["ms"]) for row in read("costs", folder)}
    if "CNN, CIFAR-10" not in costs:
        raise SystemExit(f"{folder / FILES['costs']} has no cost of a step on CIFAR-10: measure "
                         "it first, by `python benchmarks/convolution.py costs --data FOLDER`")
    return study.steps_for(minutes, costs["CNN, CIFAR-10"])


def measure_costs(args):
    "What a step takes: of the clothes' models here, of CIFAR-10's in units of the study's Muon."
    same = {"machine": study.machine_name()}
    shirts, lr = clothes(SIZES[-1], 0), {"lr": 1e-3}
    works = {name: lambda own=own: train(CLOTHES | own | lr, 0, 8, shirts)[1]
             for name, own in MODELS.items()}
    rows = [same | {"step": name, "batch_size": CLOTHES["batch_size"],
                    "ms": round(1e3 * of[0], 1), "ms_median": round(1e3 * of[1], 1)}
            for name, of in study.in_turns(works).items()]
    if args.data:
        rows.append(same | cost_on_cifar(args))
    write_costs(rows, args.results)


def cost_on_cifar(args) -> dict:
    "A step of the network, in turns with the study's `Muon`, in that table's milliseconds."
    table = study.result("costs", folder=args.results)
    if not table.exists() or "Muon" not in study.read(table):
        raise SystemExit(f"{table} has no row for Muon: measure it first, by `python benchmarks/"
                         f"study.py --data {args.data} --results {args.results} --costs`")
    source, muon = study.open_data(args.data), study.all_steps()["Muon"]
    works = {"CNN": lambda: train(CIFAR | {"lr": 1e-3}, 0, 6, source)[1],
             "Muon": lambda: study.train(muon, 0, 6, source, validate=False)[1]}
    found = study.in_turns(works)
    scale = float(study.read(table)["Muon"]["ms"]) / found["Muon"][0]
    first, median = (round(scale * seconds, 1) for seconds in found["CNN"][:2])
    return {"step": "CNN, CIFAR-10", "batch_size": CIFAR["batch_size"],
            "ms": first, "ms_median": median}


def write_costs(rows: list[dict], folder: Path):
    "The table; a row that was not measured now stays as it was."
    known = {row["step"]: row for row in read("costs", folder)}
    known |= {row["step"]: row for row in rows}
    write_rows(folder / FILES["costs"], COST_COLUMNS, known.values())


def train_on_cifar(args):
    "The network on CIFAR-10: the study's images, its budget, its validation."
    runs = [{"step": "CNN", "minutes": f"{args.minutes:g}", "seed": seed} for seed in args.seeds]
    steps, lr = steps_in(args.minutes, args.results), best_rate("cifar", "CNN", args.results)
    source = study.open_data(args.data)
    for run in missing(runs, "cifar", args):
        model, clock, data = train(CIFAR | {"lr": lr}, run["seed"], steps, source)
        found = pl.Trainer(**study.quiet("32-true")).validate(model, data, verbose=False)[0]
        clock.end(found, steps * CIFAR["batch_size"] / len(data.sets["train"]))
        last = clock.rows[-1]
        row = run | {name: last[name] for name in ("seconds", "val_loss", "val_acc")}
        row |= {"epochs": last["epoch"], "optimizer_steps": steps, "processes": 1,
                "parameters": sum(p.numel() for p in model.parameters()),
                "options": json.dumps(CIFAR | {"lr": lr})}
        append(args.results / FILES["cifar"], COLUMNS["cifar"], [row])
        print(row, flush=True)


PARTS = {"rates": try_rates, "costs": measure_costs, "clothes": train_on_clothes,
         "cifar": train_on_cifar}


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=list(PARTS), help="what to do, in this order")
    parser.add_argument("--data", help="the folder with CIFAR-10, as for study.py")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the folder of the tables")
    parser.add_argument("--seeds", type=int, nargs="+", help="default: 0 1 2; for rates: 0")
    parser.add_argument("--rates", type=float, nargs="+", default=RATES,
                        help="with rates: the learning rates to try")
    parser.add_argument("--minutes", type=float, default=5, help="with cifar: on two cores")
    parser.add_argument("--share", default="0/1",
                        help="i/n: every n-th run, beginning with number i")
    return parser


def check(args, parser: argparse.ArgumentParser):
    "Ends the command, before any work, where its options cannot work."
    if args.part == "cifar" and not args.data:
        parser.error("cifar needs --data: the folder that holds CIFAR-10")
    if args.data and not Path(args.data).is_dir():
        parser.error(f"--data {args.data}: there is no such folder")
    args.share = share_of(args.share, parser)
    args.seeds = args.seeds or ([0] if args.part == "rates" else [0, 1, 2])


def main():
    parser = make_parser()
    args = parser.parse_args()
    check(args, parser)
    one_quiet_thread()
    args.results.mkdir(parents=True, exist_ok=True)
    PARTS[args.part](args)


if __name__ == "__main__":
    main()
