#!/usr/bin/env python3
"""Does it help to fill in hidden patches first? A small ViT learns from the bundled training images
without their labels, and then from a few labels; against the same ViT with random weights.

    python benchmarks/masked.py [--seeds 0 1 2] [--labels 5 20 100] [--steps 1500] [--threads N]
    python benchmarks/masked.py --ratios 0.25 0.5 0.75 0.9 [--seeds 0 1 2] [--steps 1500]

Of the 10,000 training images, 1,000 are kept for validation; labelled pictures and the pictures for
pretraining come from the other 9,000. Nothing is chosen on the 2,000 test images. A seed draws the
random weights, the order, the masks, the labelled pictures and the batches; runs of one seed and
number of labels have the same pictures and batches, so their differences are paired. Rates of
fine-tuning and training from scratch are those of lesson 9; the random start may take three times
the rate and more steps as well, since it is the one to be beaten.

Writes benchmarks/results/masked.csv with a row a run: start (pretrained, random, pixels), way
(all weights, probe, neighbours), labels of each class, steps, rate (of the head), seed, accuracy
on validation and test images; and masked_pretraining.csv, a row a pretraining: ratio, seed, steps,
the loss on hidden patches of the validation images, and the probe's validation accuracy with 100
labels a class. With `--ratios` only the second table grows. A run that stands in its file is not
made again.
"""
import argparse
from copy import deepcopy
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from tables import read_rows, write_rows
from torch import Tensor, nn
from transfer import accuracy, few, train

from vit_course.data import channel_stats, load_fashion_mini, split_off
from vit_course.masked import MaskedAutoencoder
from vit_course.pretrained import layer_decay_groups
from vit_course.training import cosine_schedule, decay_groups
from vit_course.vit import ViT, pool_tokens

RESULTS = Path(__file__).parent / "results"
COLUMNS = ["start", "way", "labels", "steps", "rate", "seed", "val_accuracy", "test_accuracy"]
PRETRAINING = ["ratio", "seed", "steps", "val_loss", "probe_val_accuracy"]
BODY = {"img_size": 28, "patch_size": 4, "in_chans": 1, "num_classes": 10, "embed_dim": 48,
        "depth": 3, "num_heads": 4, "mlp_ratio": 2, "pool": "mean", "positions": "sinusoidal_2d"}
DECODER = {"decoder_dim": 32, "decoder_depth": 1, "decoder_heads": 4, "normalize": False}
LR, BATCH = 4e-3, 128  # of pretraining
# all weights: what is tried; each layer below the head has `DECAY` times the rate above it
STEPS = {"pretrained": [100, 400], "random": [100, 400, 1200]}
RATES = {"pretrained": [0.005], "random": [0.001, 0.003]}
DECAY = {"pretrained": 0.75, "random": 1.0}


@cache
def images_and_labels() -> dict[str, tuple[Tensor, Tensor]]:
    "Normalised images and labels of the three splits."
    mini = load_fashion_mini()
    rest, val = split_off(mini.train_images, mini.train_labels, 0.1, 0, 10)
    (mean,), (std,) = channel_stats(rest.images)
    pairs = {"train": (rest.images, rest.labels), "val": (val.images, val.labels),
             "test": (mini.test_images, mini.test_labels)}
    return {name: ((x.float() / 255 - mean) / std, y) for name, (x, y) in pairs.items()}


def fresh(ratio: float, seed: int) -> MaskedAutoencoder:
    "Random weights."
    torch.manual_seed(seed)
    return MaskedAutoencoder(ViT(**BODY), ratio=ratio, **DECODER)


@cache
def pretrained(ratio: float, seed: int, steps: int) -> MaskedAutoencoder:
    "Trained without labels: random batches, half of them mirrored."
    mae, images = fresh(ratio, seed), images_and_labels()["train"][0]
    optimizer = torch.optim.AdamW(decay_groups(mae, 0.05), lr=LR, betas=(0.9, 0.95))
    factor = lambda step: cosine_schedule(step / steps, 0.1)
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    for _ in range(steps):
        batch = images[torch.randint(len(images), (BATCH,))]
        batch = batch.flip(-1) if torch.rand(()) < 0.5 else batch
        optimizer.zero_grad()
        mae(batch)[0].backward()
        optimizer.step()
        rate.step()
    return mae.eval()


@torch.no_grad()
def features(vit: ViT | None, images: Tensor) -> Tensor:
    "(N, D): the mean of the patches after the last norm; without a model, the pixels."
    if vit is None:
        return images.flatten(1)
    parts = [vit.forward_features(part) for part in images.split(500)]
    return torch.cat([pool_tokens(part, "mean", vit.num_prefix_tokens) for part in parts])


def probe(train: Tensor, labels: Tensor, others: list[Tensor], steps: int = 200) -> list[Tensor]:
    "Answers of one linear layer on standardised features."
    torch.manual_seed(0)
    mean, deviation = train.mean(0), train.std(0) + 1e-6
    head = nn.Linear(train.shape[1], 10)
    optimizer = torch.optim.AdamW(head.parameters(), lr=0.05, weight_decay=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(head((train - mean) / deviation), labels).backward()
        optimizer.step()
    return [head((other - mean) / deviation).argmax(1) for other in others]


def neighbours(train: Tensor, labels: Tensor, others: list[Tensor]) -> list[Tensor]:
    "The label of the one picture that is nearest by the cosine, features centred first."
    mean = train.mean(0)
    known = F.normalize(train - mean, dim=1)
    return [labels[(F.normalize(other - mean, dim=1) @ known.T).argmax(1)] for other in others]


def share(answers: Tensor, labels: Tensor) -> float:
    return (answers == labels).double().mean().item()


def frozen(vit: ViT | None, way: str, count: int, seed: int) -> list[float]:
    "Validation and test accuracy of a way that does not touch the model."
    data = images_and_labels()
    images, labels = data["train"]
    chosen = few(labels, count, seed)
    others = [features(vit, data[split][0]) for split in ("val", "test")]
    classify = {"probe": probe, "neighbours": neighbours}[way]
    answers = classify(features(vit, images[chosen]), labels[chosen], others)
    return [share(a, data[split][1]) for a, split in zip(answers, ("val", "test"))]


def tuned(
    vit: ViT, start: str, count: int, steps: int, rate: float, seed: int
) -> list[float]:
    "Validation and test accuracy after training all weights; the model stays as it is."
    data, vit = images_and_labels(), deepcopy(vit)
    images, labels = data["train"]
    chosen = few(labels, count, seed)
    torch.manual_seed(seed)
    groups = layer_decay_groups(vit, rate, DECAY[start])
    train(vit, groups, images[chosen], labels[chosen], steps)
    return [accuracy(vit, *data[split]) for split in ("val", "test")]


def run(
    start: str, way: str, count: int, steps: int, rate: float, seed: int, pretraining: int
) -> dict:
    "One row of the first table; no steps: the model stays frozen."
    models = {"pretrained": lambda: pretrained(0.75, seed, pretraining).vit,
              "random": lambda: fresh(0.75, seed).vit.eval(), "pixels": lambda: None}
    vit = models[start]()
    if steps:
        found = tuned(vit, start, count, steps, rate, seed)
    else:
        found = frozen(vit, way, count, seed)
    key = dict(zip(COLUMNS, (start, way, count, steps, rate, seed)))
    return key | dict(zip(COLUMNS[6:], (round(value, 4) for value in found)))


def judge(ratio: float, seed: int, steps: int) -> dict:
    "One row of the second table."
    mae, images = pretrained(ratio, seed, steps), images_and_labels()["val"][0]
    noise = torch.rand(len(images), 49, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        loss = mae(images, noise)[0].item()
    probed = frozen(mae.vit, "probe", 100, seed)[0]
    return dict(zip(PRETRAINING, (ratio, seed, steps, round(loss, 4), round(probed, 4))))


def asked(args) -> list[tuple]:
    "The rows of the first table that this command is about."
    ways = [(start, way, 0, 0) for start in ("pretrained", "random", "pixels")
            for way in ("probe", "neighbours")]
    ways += [(start, "all weights", steps, rate) for start in STEPS
             for rate in RATES[start] for steps in STEPS[start]]
    return [(start, way, count, steps, rate, seed) for seed in args.seeds
            for start, way, steps, rate in ways for count in args.labels]


def grow(path: Path, columns: list[str], wanted: list[tuple], make):
    "Add a row for each key that has none."
    rows = read_rows(path)
    width = len(wanted[0])
    there = {tuple(row[name] for name in columns[:width]) for row in rows}
    for key in wanted:
        if tuple(map(str, key)) not in there:
            rows.append(make(*key))
            write_rows(path, columns, rows)
            print(*rows[-1].values(), flush=True)


def main():
    parser = argparse.ArgumentParser(description=" ".join(__doc__.split("\n\n")[0].split()))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--labels", type=int, nargs="+", default=[5, 20, 100],
                        help="labelled pictures of each class, at most 800")
    parser.add_argument("--steps", type=int, default=1500, help="of pretraining")
    parser.add_argument("--ratios", type=float, nargs="+",
                        help="compare shares of hidden patches, and nothing else")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the folder of the tables")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    if not all(1 <= count <= 800 for count in args.labels):
        parser.error(f"--labels {args.labels}: 1 to 800 of each class can be labelled")
    torch.set_num_threads(args.threads)
    ratios = [(ratio, seed, args.steps) for ratio in args.ratios or [0.75] for seed in args.seeds]
    if not args.ratios:
        make = lambda *key: run(*key, args.steps)
        grow(args.results / "masked.csv", COLUMNS, asked(args), make)
    grow(args.results / "masked_pretraining.csv", PRETRAINING, ratios, judge)


if __name__ == "__main__":
    main()
