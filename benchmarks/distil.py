#!/usr/bin/env python3
"""Can a Vision Transformer learn from a convolutional network what that knows beforehand?

    # 1. temperature and weight of soft targets, by validation images
    python benchmarks/distil.py trials
    # 2. the runs, on 250, 1,000 and 9,000 of the bundled clothes
    python benchmarks/distil.py clothes [--images 1000 9000] [--ways NAME ...] [--seeds 0 1 2]
                                        [--keep FOLDER]
    # 3. what the teachers say about the images that they have learned from
    python benchmarks/distil.py answers [--images 1000 9000] [--seeds 0 1 2] [--keep FOLDER]

Images, models, rates, steps and augmentation are those of benchmarks/convolution.py: a row "CNN" or
"ViT" is made here again, since its model is a teacher. Of each seed and number of images, a
teacher and its students have the same training images. Trials are of seed 0 and 1,000 images. The
2,000 test images are read after the last step only: as they are, and with all 9,000 training
images also moved to the right.

Writes to benchmarks/results, or the folder of `--results`: distil_trials.csv, distil.csv (a row a
run; `like_cnn` is the share of test images on which it answers as the CNN of the same images and
seed), distil_shifts.csv (a row a shift), distil_answers.csv (a row a teacher: on its own training
images, flipped and cut once, how often it says the label, and the mean probability of what it
says). A run that stands there is not made again. With `--keep`
teachers are kept in that folder, for commands that follow.
"""
import argparse
import statistics
from collections import defaultdict
from functools import partial
from pathlib import Path

import convolution
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from convolution import CLOTHES, MODELS, SHIFTS, STEPS, clothes
from study import RESULTS, append
from tables import one_quiet_thread, read_rows
from torch import Tensor, nn

from vit_course.augment import make_augmentation
from vit_course.distillation import DistilledViT, LitDistilled

CNN = {"lr": 0.002} | MODELS["CNN"]
VIT = {"lr": 0.008} | MODELS["plain ViT"]
TWO = {"pool": "cls", "token": True}  # class token and distillation token
SOFT, HARD = {"kind": "soft"}, {"kind": "hard", "weight": 0.5}
WAYS = {  # name: (options beyond those of every run, teacher)
    "CNN": (CNN, None),
    "ViT": (VIT, None),
    "soft": (VIT | SOFT, "CNN"),
    "hard": (VIT | HARD, "CNN"),
    "two tokens, hard": (VIT | HARD | TWO, "CNN"),
    "two tokens, labels": (VIT | HARD | TWO | {"kind": "labels"}, None),
    "soft, from a ViT": (VIT | SOFT, "ViT"),
    "label smoothing": (VIT | {"label_smoothing": 0.1}, None),
}
SIZES = [1000, 9000, 250]
# of the way "soft", for every soft way
CHOICES = [{"temperature": t, "weight": w}
           for t, w in ((1.0, 0.5), (3.0, 0.5), (10.0, 0.5), (3.0, 0.9))]
HEADS = ["class_acc", "dist_acc", "cosine"]  # of two tokens
OPTIONS = ["lr", "temperature", "weight"]
KEYS = {"trials": ["way", "temperature", "weight", "images", "seed"],
        "clothes": ["way", "images", "seed"], "answers": ["way", "images", "seed"]}
FILES = {"trials": "distil_trials.csv", "clothes": "distil.csv", "shifts": "distil_shifts.csv",
         "answers": "distil_answers.csv"}
COLUMNS = {
    "trials": [*KEYS["trials"], "steps", "val_acc"],
    "clothes": [*KEYS["clothes"], "steps", *OPTIONS, "parameters", "seconds",
                "val_acc", "test_acc", "like_cnn", *HEADS],
    "shifts": [*KEYS["clothes"], "shift", "test_acc"],
    "answers": [*KEYS["answers"], "says_label", "sure"],
}


def make_model(options: dict, linked: dict, teacher: nn.Module | None) -> pl.LightningModule:
    "The model that the options are of; a student with its teacher."
    if "kind" not in options:
        return convolution.make_model(options, linked)
    student = LitDistilled(**{"token": False} | options, **linked)
    return student.taught_by(teacher) if teacher else student


def begin(options: dict, seed: int, images: int, teacher: nn.Module | None = None) -> tuple:
    "A run before its first step: the model, and the data."
    make = partial(make_model, teacher=teacher)
    return convolution.begin(CLOTHES | options, seed, clothes(images, seed), make)


def train(options: dict, seed: int, images: int, teacher: nn.Module | None = None) -> tuple:
    "One run, as those of convolution.py: the model, the seconds of its steps, and the data."
    model, data = begin(options, seed, images, teacher)
    clock = convolution.fit(model, data, seed, STEPS)
    return model, round(sum(clock.steps)), data


class Teachers:
    "Each teacher is trained once, and with a folder kept for the next command."

    def __init__(self, folder: Path | None):
        self.folder, self.made = folder, {}

    def get(self, name: str, images: int, seed: int) -> tuple:  # model, seconds, data
        key = (name, images, seed)
        if key not in self.made:
            self.made = {k: v for k, v in self.made.items() if k[1:] == key[1:]}  # the rest is done
            file = self.folder / f"{name}-{images}-{seed}.pt" if self.folder else None
            self.made[key] = self.kept(file, key) or train(WAYS[name][0], seed, images)
            if file:
                self.folder.mkdir(parents=True, exist_ok=True)
                model, seconds, _ = self.made[key]
                torch.save({"weights": model.state_dict(), "seconds": seconds}, file)
        return self.made[key]

    @staticmethod
    def kept(file: Path | None, key: tuple) -> tuple | None:
        "A teacher of an earlier command."
        if not file or not file.exists():
            return None
        (name, images, seed), saved = key, torch.load(file)
        model, data = begin(WAYS[name][0], seed, images)
        model.load_state_dict(saved["weights"])
        return model.eval(), saved["seconds"], data


@torch.inference_mode()
def answers(model: nn.Module, images: Tensor) -> Tensor:  # (N, C, H, W) uint8 -> (N,)
    "The model's classes."
    return torch.cat([model(part.float() / 255).argmax(dim=1) for part in images.split(500)])


@torch.inference_mode()
def heads_of(model: nn.Module, test) -> dict:
    "Of two tokens: how often each head is right alone, and the cosine of what they read."
    if not isinstance(getattr(model, "vit", None), DistilledViT):
        return {}
    vit, parts = model.vit, [part.float() / 255 for part in test.images.split(500)]
    both = torch.cat([vit.forward_features(model.normalize(part))[:, :2] for part in parts])
    heads = zip(HEADS, (vit.head, vit.head_dist), both.unbind(dim=1))
    right = {name: (head(x).argmax(dim=1) == test.labels).float().mean() for name, head, x in heads}
    found = right | {"cosine": F.cosine_similarity(both[:, 0], both[:, 1], dim=-1).mean()}
    return {name: round(value.item(), 4) for name, value in found.items()}


def as_key(row: dict, part: str) -> tuple[str, ...]:
    "What makes a run, as the file writes it."
    return tuple(str(row.get(name, "")) for name in KEYS[part])


def read(part: str, folder: Path) -> list[dict[str, str]]:
    "The rows that are there."
    return read_rows(folder / FILES[part])


def missing(runs: list[dict], part: str, folder: Path) -> list[dict]:
    "The runs without those that stand in the file."
    there = {as_key(row, part) for row in read(part, folder)}
    return [run for run in runs if as_key(run, part) not in there]


def chosen(way: str, folder: Path) -> dict:
    "Temperature and weight with the highest mean accuracy on validation images, for a soft way."
    if "soft" not in way:
        return {}
    found = defaultdict(list)
    for row in read("trials", folder):
        options = tuple((name, float(row[name])) for name in CHOICES[0])
        found[options].append(float(row["val_acc"]))
    if not found:
        raise SystemExit(f"{folder / FILES['trials']} has no trial: make them first, "
                         "by `python benchmarks/distil.py trials`")
    return dict(max(found, key=lambda options: statistics.mean(found[options])))


def try_options(args):
    "A run for each choice, of seed 0 and 1,000 images, judged on validation images."
    teachers, images = Teachers(args.keep), 1000
    runs = [{"way": "soft", **choice, "images": images, "seed": 0} for choice in CHOICES]
    for run in missing(runs, "trials", args.results):
        options, teacher = WAYS["soft"]
        options = options | {name: run[name] for name in CHOICES[0]}
        model, _, data = train(options, 0, images, teachers.get(teacher, images, 0)[0])
        run |= {"steps": STEPS, "val_acc": convolution.accuracy(model, data.sets["val"])}
        append(args.results / FILES["trials"], COLUMNS["trials"], [run])
        print(run, flush=True)


def train_on_clothes(args):
    "Every number of images, seed and way."
    teachers = Teachers(args.keep)
    runs = [{"way": way, "images": images, "seed": seed}
            for images in args.images for seed in args.seeds for way in args.ways]
    for run in missing(runs, "clothes", args.results):
        way, images, seed = run.values()
        options = WAYS[way][0] | chosen(way, args.results)
        if way in ("CNN", "ViT"):
            model, seconds, data = teachers.get(way, images, seed)
        else:
            teacher = WAYS[way][1] and teachers.get(WAYS[way][1], images, seed)[0]
            model, seconds, data = train(options, seed, images, teacher)
        write_run(run, options, model, seconds, data, teachers.get("CNN", images, seed)[0], args)


def write_run(run: dict, options: dict, model, seconds: int, data, cnn: nn.Module, args):
    "The rows of one run; the test images are read here."
    test = data.sets["test"]
    moved = SHIFTS if run["images"] == 9000 else SHIFTS[:1]
    found = {shift: convolution.accuracy(model, test, shift) for shift in moved}
    if len(found) > 1:
        rows = [run | {"shift": shift, "test_acc": acc} for shift, acc in found.items()]
        append(args.results / FILES["shifts"], COLUMNS["shifts"], rows)
    same = answers(model, test.images) == answers(cnn, test.images)
    row = run | {name: options[name] for name in OPTIONS if name in options}
    row |= {"steps": STEPS, "parameters": sum(p.numel() for p in model.parameters()),
            "seconds": seconds, "val_acc": convolution.accuracy(model, data.sets["val"]),
            "test_acc": found[0], "like_cnn": round(same.float().mean().item(), 4)}
    row |= heads_of(model, test)
    append(args.results / FILES["clothes"], COLUMNS["clothes"], [row])
    print(row, flush=True)


@torch.inference_mode()
def ask_teachers(args):
    "What students are told: each teacher on one view of each of its own training images."
    teachers = Teachers(args.keep)
    runs = [{"way": way, "images": images, "seed": seed}
            for images in args.images for seed in args.seeds for way in ("CNN", "ViT")]
    for run in missing(runs, "answers", args.results):
        with torch.inference_mode(False):
            model, _, data = teachers.get(*run.values())
        torch.manual_seed(run["seed"])
        own, view = data.sets["train"], make_augmentation(CLOTHES["augment"])
        said = torch.cat([model(view(part)).softmax(dim=1) for part in own.images.split(500)])
        sure, decided = said.max(dim=1)
        found = {"says_label": (decided == own.labels).float().mean(), "sure": sure.mean()}
        row = run | {name: round(value.item(), 4) for name, value in found.items()}
        append(args.results / FILES["answers"], COLUMNS["answers"], [row])
        print(row, flush=True)


PARTS = {"trials": try_options, "clothes": train_on_clothes, "answers": ask_teachers}


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=list(PARTS), help="what to do, in this order")
    parser.add_argument("--images", type=int, nargs="+", default=SIZES,
                        help="how many training images, at most 9000")
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS),
                        metavar="NAME", help="which models and teachers: " + "; ".join(WAYS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--results", type=Path, default=RESULTS, help="the folder of the tables")
    parser.add_argument("--keep", type=Path, help="a folder for the teachers")
    return parser


def main():
    parser = make_parser()
    args = parser.parse_args()
    if not all(1 <= images <= 9000 for images in args.images):
        parser.error(f"--images {args.images}: there are 9,000 bundled training images")
    one_quiet_thread()
    args.results.mkdir(parents=True, exist_ok=True)
    PARTS[args.part](args)


if __name__ == "__main__":
    main()
