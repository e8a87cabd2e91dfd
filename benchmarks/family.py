#!/usr/bin/env python3
"""Variants of lesson 13, each in the same model with the same recipe, on the bundled clothes.

    python benchmarks/family.py costs                # what a training step of each takes
    python benchmarks/family.py runs [--seeds 0 1 2] [--images 9000 1000]
                                     [--stems conv early_conv] [--share 0/1]

The model, the recipe and the images are those of the plain ViT, and of the one with early
convolutions, in benchmarks/convolution.py: 1,000 steps on so many of the bundled training images.
Every seed draws its own share of them, the same for all variants, and every variant has the rate
that was chosen there for the model that it changes, by validation images (convolution_rates.csv).
The 2,000 test images are read after the last step.

Writes to benchmarks/results, or the folder of `--results`: family_costs.csv, family.csv (a row a
run). A run that stands there is not made again: the same command goes on.
"""
import argparse
from functools import partial
from pathlib import Path

import convolution
import study
from study import COST_COLUMNS, RESULTS, append
from tables import one_quiet_thread, read_rows, share_of, write_rows

from vit_course.family import (BiasedAttention, LocalityAttention, NormedAttention,
                               RotaryAttention, ShiftedPatches, swap_attention)

KEY = ["stem", "variant", "images", "seed"]
COLUMNS = [*KEY, "steps", "lr", "parameters", "seconds", "val_acc", "test_acc"]
STEMS = {"conv": "plain ViT", "early_conv": "ViT, early convolutions"}


def with_places(kind, vit):
    "Attention that knows the grid; these models have no tokens but the patches."
    swap_attention(vit, partial(kind, grid=vit.grid))


def with_attention(kind, vit):
    swap_attention(vit, kind)


def with_shifted_patches(vit):
    of = vit.tokenizer
    of.stem = ShiftedPatches(of.patch_size, of.in_chans, vit.embed_dim)


NONE = {"positions": "none"}
VARIANTS = {  # the model's options, and what is done to it before training
    "learned positions": ({}, None),
    "no positions": (NONE, None),
    "sinusoids in 2-D": ({"positions": "sinusoidal_2d"}, None),
    "relative bias": (NONE, partial(with_places, BiasedAttention)),
    "rotary": (NONE, partial(with_places, RotaryAttention)),
    "LSA": ({}, partial(with_attention, LocalityAttention)),
    "normed q and k": ({}, partial(with_attention, NormedAttention)),
    "SPT": ({}, with_shifted_patches),
}
POSITIONS = list(VARIANTS)[:5]
# SPT is a stem itself, and the other two are asked on plain patches alone
MODELS = [("conv", name) for name in VARIANTS] + [("early_conv", name) for name in POSITIONS]


def recipe(stem: str, variant: str, folder: Path) -> dict:
    "All options of a run; the rate is that of the model without the change."
    name = STEMS[stem]
    rate = {"lr": convolution.best_rate("clothes", name, folder)}
    return convolution.CLOTHES | convolution.MODELS[name] | rate | VARIANTS[variant][0]


def train(stem: str, variant: str, seed: int, steps: int, source, folder: Path):
    "One run: the model, the clock with its steps, and the data."
    change = VARIANTS[variant][1]
    of_vit = change and (lambda model: change(model.vit))
    return convolution.train(recipe(stem, variant, folder), seed, steps, source, of_vit)


def measure_costs(args):
    "What a step of each takes, in turns."
    source = convolution.clothes(convolution.SIZES[-1], 0)
    works = {model: lambda model=model: train(*model, 0, 8, source, RESULTS)[1]
             for model in MODELS}
    found = study.in_turns(works)
    same = {"batch_size": convolution.CLOTHES["batch_size"], "machine": study.machine_name()}
    rows = [same | {"step": f"{stem}, {variant}", "ms": round(1e3 * of[0], 1),
                    "ms_median": round(1e3 * of[1], 1)} for (stem, variant), of in found.items()]
    write_rows(args.results / "family_costs.csv", COST_COLUMNS, rows)


def make_runs(args):
    "This command's share of the runs, but for those that stand in the file."
    file, (mine, shares) = args.results / "family.csv", args.share
    runs = [dict(zip(KEY, (*model, images, seed)))
            for images in args.images for seed in args.seeds for model in MODELS
            if model[0] in args.stems]
    there = {tuple(row[name] for name in KEY) for row in read_rows(file)}
    for run in runs[mine::shares]:
        if tuple(str(value) for value in run.values()) in there:
            continue
        source = convolution.clothes(run["images"], run["seed"])
        of_model = run["stem"], run["variant"]
        model, clock, data = train(*of_model, run["seed"], args.steps, source, RESULTS)
        row = run | {"steps": args.steps, "lr": recipe(*of_model, RESULTS)["lr"],
                     "parameters": sum(p.numel() for p in model.parameters()),
                     "seconds": round(sum(clock.steps))}
        row |= {f"{part}_acc": convolution.accuracy(model, data.sets[part])
                for part in ("val", "test")}
        append(file, COLUMNS, [row])
        print(row, flush=True)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["costs", "runs"])
    parser.add_argument("--results", type=Path, default=RESULTS, help="the folder of the tables")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--images", type=int, nargs="+", default=[9000, 1000],
                        help="how many training images")
    parser.add_argument("--stems", nargs="+", choices=list(STEMS), default=list(STEMS))
    parser.add_argument("--steps", type=int, default=convolution.STEPS)
    parser.add_argument("--share", default="0/1",
                        help="i/n: every n-th run, beginning with number i")
    return parser


def main():
    parser = make_parser()
    args = parser.parse_args()
    args.share = share_of(args.share, parser)
    most = convolution.SIZES[-1]
    if any(not 1 <= images <= most for images in args.images):
        parser.error(f"--images {args.images}: give numbers from 1 to {most}")
    one_quiet_thread()
    {"costs": measure_costs, "runs": make_runs}[args.part](args)


if __name__ == "__main__":
    main()
