#!/usr/bin/env python3
"""How faithful are the maps of lesson 7? Perturbation, deletion and insertion on test images, with
95% intervals.

    python benchmarks/faithfulness.py [--images N] [--threads N] [--model fashion] [--output FILE]

Writes benchmarks/results/faithfulness.csv, which lesson 7 reads, or another FILE: a row for each
fill, method and measure: the mean over images, the ends of its bootstrap interval, and the same for
the difference to the random order. About ten minutes for 400 images on one core.
"""
import argparse
from pathlib import Path

import pandas as pd
import torch

from vit_course.data import load_fashion_mini
from vit_course.faithfulness import bootstrap_interval, faithfulness, scores_by_method
from vit_course.training import load_model

TARGET = Path(__file__).parent / "results" / "faithfulness.csv"


def rows_of(fill: str, measured: dict[str, dict[str, torch.Tensor]]) -> list[dict]:
    "Means and intervals of all methods, and of their differences to the random order."
    rows = []
    for method, areas in measured.items():
        for measure, values in areas.items():
            mean, low, high = bootstrap_interval(values)
            more, more_low, more_high = bootstrap_interval(values - measured["random"][measure])
            numbers = {"mean": mean, "low": low, "high": high}
            numbers |= {"minus_random": more, "minus_low": more_low, "minus_high": more_high}
            about = {"fill": fill, "method": method, "measure": measure, "images": len(values)}
            rows.append(about | {name: round(value, 4) for name, value in numbers.items()})
    return rows


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--images", type=int, default=400, help="the first so many test images")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--model", default="fashion")
    parser.add_argument("--output", type=Path, default=TARGET,
                        help="the file to write; lesson 7 reads the default")
    args = parser.parse_args()
    if args.output.resolve() == TARGET.resolve() and (args.images, args.model) != (400, "fashion"):
        parser.error("lesson 7 reads 400 images of the model fashion there: "
                     "give --output for other ones")
    return args


def main():
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    model, share = load_model(args.model), load_fashion_mini()
    images = share.test_images[: args.images].float() / 255
    labels = share.test_labels[: args.images]
    fills = {"black": torch.zeros(1), "mean image": share.train_images.float().mean(dim=0) / 255}
    scores, rows = scores_by_method(model, images), []
    for fill, pixels in fills.items():
        measured = {}
        for method, score in scores.items():
            measured[method] = faithfulness(model, images, labels, score, pixels)
            means = [f"{name} {values.mean():.3f}" for name, values in measured[method].items()]
            print(f"{fill:11} {method:26}", *means, flush=True)
        rows += rows_of(fill, measured)
    args.output.absolute().parent.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(rows).to_csv(args.output, index=False, lineterminator="\n")
    print(f"written: {args.output}")


if __name__ == "__main__":
    main()
