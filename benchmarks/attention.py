#!/usr/bin/env python3
"""The two paths of `MultiHeadAttention`: written out (`manual`) against PyTorch's fused function
(`sdpa`), in pairs in one process.

    python benchmarks/attention.py [--threads 1 2] [--rounds 9]

Writes benchmarks/results/attention.csv: a row for each number of threads and tokens, dtype (bf16:
under autocast, where the processor has instructions for it), training step or inference, and path:
median and quartiles in milliseconds, and the median over `sdpa`'s. On a processor that is not fast
in bfloat16 the file is attention_slow_bf16.csv or attention_without_bf16.csv. Lesson 3's rule for
`impl='auto'` comes from them.
"""
import argparse
import csv
import itertools
from pathlib import Path

import torch
from timing import interleaved, kind_of_processor, processor, quartiles

from vit_course.attention import MultiHeadAttention, cpu_has_bf16
from vit_course.files import written_whole

TARGET = Path(__file__).parent / "results" / f"attention{kind_of_processor()}.csv"
COLUMNS = [
    "processor", "threads", "tokens", "dtype", "work", "path",
    "median_ms", "q1_ms", "q3_ms", "to_sdpa",
]
SIZES = {65: (64, 256, 8), 197: (8, 192, 3), 577: (2, 384, 6)}  # tokens: batch, width, heads


def work_of(tokens: int, bf16: bool, training: bool, path: str):
    "A call that runs one layer once, with its backward pass in training."
    batch, dim, heads = SIZES[tokens]
    torch.manual_seed(0)
    layer = MultiHeadAttention(dim, heads, impl=path).train(training)
    x = torch.randn(batch, tokens, dim, requires_grad=training)

    def run():
        with torch.set_grad_enabled(training), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            out = layer(x)
        if training:
            out.float().sum().backward()

    return run


def measure(threads: int, tokens: int, bf16: bool, training: bool, rounds: int) -> list[dict]:
    "The rows of one case, one for each path."
    torch.set_num_threads(threads)
    work = {path: work_of(tokens, bf16, training, path) for path in ("sdpa", "manual")}
    times = interleaved(work, rounds)
    base = quartiles(times["sdpa"])[1]
    case = [threads, tokens, "bf16" if bf16 else "fp32", "training" if training else "inference"]
    rows = []
    for path, seconds in times.items():
        q1, median, q3 = quartiles(seconds)
        values = [f"{1e3 * t:.2f}" for t in (median, q1, q3)] + [f"{median / base:.2f}"]
        rows.append(dict(zip(COLUMNS, [processor(), *case, path, *values])))
    share = float(rows[-1]["to_sdpa"])
    print(*case, f"manual takes {share:.2f} of sdpa's {1e3 * base:.1f} ms", flush=True)
    return rows


def write(rows: list[dict], threads: list[int]):
    "The table with new rows for these numbers of threads; those of other numbers stay."
    TARGET.parent.mkdir(exist_ok=True)
    if TARGET.exists():
        with TARGET.open(newline="") as file:
            others = [row for row in csv.DictReader(file) if int(row["threads"]) not in threads]
        rows = others + rows
    with written_whole(TARGET) as part, part.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    formats = (False, True)[: 1 + cpu_has_bf16()]
    rows = []
    for case in itertools.product(args.threads, SIZES, formats, (True, False)):
        rows += measure(*case, args.rounds)
    write(rows, args.threads)


if __name__ == "__main__":
    main()
