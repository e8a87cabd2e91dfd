#!/usr/bin/env python3
"""Few labels: the shipped model fine-tuned, and the same model from scratch, on clothes that lie
on their side, with more and more steps.

    python benchmarks/transfer.py [--seeds 0 1 2] [--labels 5 20 100] [--steps 80 600 2400]
                                  [--threads N]

A seed draws the labelled pictures of each class, the random weights and the batches. Rates, batches
and schedule are those of lesson 9; nothing is chosen here. Accuracy is that on the first 1,000
bundled test images.

Writes benchmarks/results/transfer.csv with a row a run: way, labels (of each class), steps, seed,
accuracy. A run that stands in the file already is not made again, so the command can be stopped
and started at will.
"""
import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from tables import read_rows, write_rows
from torch import Tensor

from vit_course.data import FashionMini, load_fashion_mini
from vit_course.pretrained import layer_decay_groups
from vit_course.training import LitViT, load_model
from vit_course.vit import ViT

TARGET = Path(__file__).parent / "results" / "transfer.csv"
COLUMNS = ["way", "labels", "steps", "seed", "accuracy"]
WAYS = {"fine-tuning": {"lr": 5e-3, "decay": 0.75}, "from scratch": {"lr": 1e-3, "decay": 1.0}}


def lay_down(lit: LitViT, images: Tensor) -> Tensor:
    "uint8 pictures (B, 1, H, W): turned by a quarter, and as the model wants them."
    return lit.normalize(images.rot90(1, dims=(2, 3)).float() / 255)


def few(labels: Tensor, count: int, seed: int) -> Tensor:
    "Indices of so many pictures of each class."
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    chosen = [order[labels[order] == c][:count] for c in range(int(labels.max()) + 1)]
    return torch.cat(chosen)


def begin(way: str, seed: int) -> ViT:
    "The shipped model's network with its weights, or with random ones."
    torch.manual_seed(seed)
    lit = load_model("fashion")
    if way == "fine-tuning":
        return lit.vit
    options = {k: v for k, v in lit.hparams.items() if not k.startswith("_")}
    return LitViT(**options).vit


def train(vit: ViT, groups: list[dict], images: Tensor, labels: Tensor, steps: int) -> ViT:
    "Random batches of 32, with a rate that falls to 0 along half a cosine."
    optimizer = torch.optim.AdamW(groups)
    fall = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    vit.train()
    for _ in range(steps):
        batch = torch.randint(len(images), (32,))
        optimizer.zero_grad()
        F.cross_entropy(vit(images[batch]), labels[batch]).backward()
        optimizer.step()
        fall.step()
    return vit.eval()


@torch.no_grad()
def accuracy(vit: ViT, images: Tensor, labels: Tensor) -> float:
    "Share of right answers."
    answers = torch.cat([vit(chunk).argmax(1) for chunk in images.split(500)])
    return (answers == labels).double().mean().item()


def run(way: str, count: int, steps: int, seed: int, mini: FashionMini) -> dict:
    "One row."
    # loading a model draws random numbers, too, so the rows depend on its place here
    vit, lit = begin(way, seed), load_model("fashion")
    chosen = few(mini.train_labels, count, seed)
    images, labels = lay_down(lit, mini.train_images[chosen]), mini.train_labels[chosen]
    train(vit, layer_decay_groups(vit, **WAYS[way]), images, labels, steps)
    tests = lay_down(lit, mini.test_images[:1000])
    found = accuracy(vit, tests, mini.test_labels[:1000])
    return {"way": way, "labels": count, "steps": steps, "seed": seed, "accuracy": round(found, 4)}


def main():
    parser = argparse.ArgumentParser(description=" ".join(__doc__.split("\n\n")[0].split()))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--labels", type=int, nargs="+", default=[5, 20, 100],
                        help="labelled pictures of each class, at most 1,000")
    parser.add_argument("--steps", type=int, nargs="+", default=[80, 600, 2400])
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    if not all(1 <= count <= 1000 for count in args.labels):
        parser.error(f"--labels {args.labels}: there are 1,000 bundled pictures of each class")
    torch.set_num_threads(args.threads)
    mini, rows = load_fashion_mini(), read_rows(TARGET)
    there = {tuple(row[name] for name in COLUMNS[:4]) for row in rows}
    asked = [(way, count, steps, seed) for steps in args.steps for seed in args.seeds
             for count in args.labels for way in WAYS]
    for wanted in asked:
        if tuple(map(str, wanted)) not in there:
            rows.append(run(*wanted, mini))
            write_rows(TARGET, COLUMNS, rows)
            print(*rows[-1].values(), flush=True)


if __name__ == "__main__":
    main()
