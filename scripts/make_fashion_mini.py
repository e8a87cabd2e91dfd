#!/usr/bin/env python3
"""Makes vit_course/data/fashion_mini.npz from the four IDX files of Fashion-MNIST.

The first 1,000 training and 200 test images of each of the ten classes, in their original order.
The files come with Debian's package `dataset-fashion-mnist`, or from
https://github.com/zalandoresearch/fashion-mnist (MIT licence).

    python scripts/make_fashion_mini.py [--source FOLDER] [--check]

`--check` writes nothing: it compares the bundled file with what the source gives. Both print and
verify CHECKSUM, the SHA-256 of the arrays' bytes (not of the file: its compression differs between
versions of zlib).
"""
import argparse
import gzip
import hashlib
import sys
from pathlib import Path

import numpy as np

CHECKSUM = "d5b91c929ef64cdf3fac6a13820932f698037ef77030a9584f3d6499a1ccee00"
TARGET = Path(__file__).parents[1] / "vit_course" / "data" / "fashion_mini.npz"
CLASSES = [
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat",
    "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
]


def read_idx(path: Path) -> np.ndarray:
    "An IDX file of unsigned bytes: two zero bytes, type, rank, then the sizes, big endian."
    raw = gzip.decompress(path.read_bytes())
    sizes = np.frombuffer(raw, ">i4", count=raw[3], offset=4)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(sizes)


def balanced(
    images: np.ndarray, labels: np.ndarray, per_class: int
) -> tuple[np.ndarray, np.ndarray]:
    "The first `per_class` images of each class, in their original order."
    firsts = [np.flatnonzero(labels == c)[:per_class] for c in range(len(CLASSES))]
    keep = np.sort(np.concatenate(firsts))
    return images[keep], labels[keep]


def build(source: Path) -> dict[str, np.ndarray]:
    arrays = {"classes": np.array(CLASSES)}
    for split, prefix, per_class in [("train", "train", 1000), ("test", "t10k", 200)]:
        images = read_idx(source / f"{prefix}-images-idx3-ubyte.gz")
        labels = read_idx(source / f"{prefix}-labels-idx1-ubyte.gz")
        arrays[f"{split}_images"], arrays[f"{split}_labels"] = balanced(images, labels, per_class)
    return arrays


def checksum(arrays) -> str:
    digest = hashlib.sha256()
    for name in ["train_images", "train_labels", "test_images", "test_labels"]:
        digest.update(np.ascontiguousarray(arrays[name]).tobytes())
    return digest.hexdigest()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--source", type=Path, default=Path("/usr/share/datasets/fashion-mnist"))
    parser.add_argument("--check", action="store_true", help="compare only, write nothing")
    args = parser.parse_args()
    arrays = build(args.source)
    print(f"from the source: {checksum(arrays)}")
    if not args.check:
        np.savez_compressed(TARGET, **arrays)
    with np.load(TARGET, allow_pickle=False) as bundled:
        print(f"in the package:  {checksum(bundled)} ({TARGET.stat().st_size / 1e6:.1f} MB)")
        same = checksum(bundled) == checksum(arrays) == CHECKSUM
    print("as recorded" if same else f"NOT as recorded: {CHECKSUM}")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
