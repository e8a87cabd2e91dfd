#!/usr/bin/env python3
"""From the assignment's recipe to a good one, a step at a time, each run with the same budget on
real CIFAR-10.

    # what one step of each recipe costs on this machine
    python benchmarks/study.py --data FOLDER --costs
    # the runs
    python benchmarks/study.py --data FOLDER [--steps NAME ...] [--seeds 0 1 2] [--minutes 5]
                               [--share 0/1 | --processes 2] [--keep RUNS]
    # a study of your own, beginning with --costs
    python benchmarks/study.py --data FOLDER --results OURS ...

FOLDER holds CIFAR-10: torchvision's, or images as train/<class>/* and test/<class>/*. Ten per cent
of the training images are kept for validation; the test images are read by `--test` alone. A budget
of M minutes on two cores is 120 * M seconds of one core's time. How many steps that buys is worked
out once, from study_costs.csv: `--costs` trains recipes in turns, a few steps each, on one thread.
The runs then have that many steps, so that they give the same numbers again on any machine,
whatever else it is doing.

Writes to benchmarks/results, or the folder of `--results`: study_costs.csv; study.csv, a row an
epoch; study_runs.csv, a row a run, `val_acc` being the result after its last step. A run that
stands there is not made again. `--share 0/2` and `--share 1/2` split the work between two commands.
With `--bf16` everything is done in bfloat16, with costs and files of its own (study_bf16_*.csv):
for processors that have instructions for it.
With `--keep RUNS` each run leaves its model in that folder, and a checkpoint after each epoch: the
same command goes on from there. With `--keep RUNS --test` nothing is trained: finished models are
measured on the test images, once, and study_test.csv has the rows.
"""
import argparse
import csv
import json
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import EMAWeightAveraging, ModelCheckpoint
from tables import one_quiet_thread, read_rows, share_of, write_rows
from timing import machine, quartiles

from vit_course.data import CIFAR10Data, ImageFolderData
from vit_course.training import EpochSeed, LitViT, save_model

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

RESULTS = Path(__file__).parent / "results"
EPOCH_COLUMNS = ["step", "minutes", "seed", "epoch", "seconds", "train_loss", "val_loss", "val_acc"]
RUN_COLUMNS = [
    "step", "minutes", "seed", "optimizer_steps", "epochs", "seconds",
    "parameters", "val_loss", "val_acc", "processes", "options",
]
TEST_COLUMNS = ["step", "minutes", "seed", "test_acc", "calibration_error"]
# ms: the first quartile, a step that nothing disturbs
COST_COLUMNS = ["step", "batch_size", "ms", "ms_median", "machine"]

ASSIGNMENT = {
    "patch_size": 4, "embed_dim": 256, "depth": 6, "num_heads": 8, "mlp_ratio": 2.0,
    "dropout": 0.2, "attn_dropout": 0.2, "lr": 3e-4, "weight_decay": 0.01, "schedule": "step",
    "batch_size": 64, "augment": "flip_crop",
}
# each step adds to the one before it; what a step is worth is the difference of the two
LADDER = {
    "assignment": ASSIGNMENT,
    "smaller model": {"embed_dim": 64, "depth": 4, "num_heads": 4, "lr": 1e-3},
    "no dropout": {"dropout": 0.0, "attn_dropout": 0.0},
    "warm-up, cosine": {"schedule": "cosine", "warmup": 0.1, "lr": 2e-3},
    "batch of 128": {"batch_size": 128, "lr": 3e-3},
    "label smoothing": {"label_smoothing": 0.1},
    "flip and shift": {"augment": "flip_shift"},
    "mean pooling": {"pool": "mean"},
    "early convolutions": {"stem": "early_conv"},
    "Muon": {"optimizer": "muon", "weight_decay": 0.1},
    "higher rate": {"lr": 6e-3},
    "half of the patches": {"patch_dropout": 0.5, "patch_dropout_until": 0.75},
}
# the rung "Muon" with another change: its rate is 0.003, that of "higher rate" 0.006
FROM_MUON = {
    "rate 0.0015": {"lr": 1.5e-3}, "rate 0.012": {"lr": 1.2e-2},
    "96x4 from Muon": {"embed_dim": 96, "depth": 4},
}
# each of these is the top of the ladder with one more change
BRANCHES = {
    "EMA": {"ema": 0.998},
    "drop path": {"drop_path": 0.1},
    "weight decay 0.3": {"weight_decay": 0.3},
    "no augmentation": {"augment": "none"},
    "random erasing": {"augment": "flip_shift_erase"},
    "RandAugment": {"augment": "rand_augment"},
    "mixup or cutmix": {"mixup": 0.8, "cutmix": 1.0},
    "class token": {"pool": "cls"},
    "half of the patches to the end": {"patch_dropout_until": 1.0},
    "a quarter of the patches": {"patch_dropout": 0.75},
}
# the top of the ladder and as many steps as it gets, in the other format: for processors with
# instructions for it
FORMATS = {
    "bfloat16": {"precision": "bf16-mixed"},
    "bfloat16, residual in 32 bits": {"precision": "bf16-mixed", "residual_in_fp32": True},
}
# width x depth, at the top of the ladder
SHAPES = [(width, depth) for width in (64, 96, 128) for depth in (2, 4, 6)]
# the best of these nine lay at the edge of the table: its neighbours outside
SHAPES += [(48, 2), (64, 1), (96, 1)]
# Muon's steps grow with the root of the width, which the rate undoes
RATE = {width: round(6e-3 * (64 / width) ** 0.5, 4) for width in (48, 64, 96, 128)}
SIZES = {f"{w}x{d}": {"embed_dim": w, "depth": d, "lr": RATE[w]} for w, d in SHAPES}
# for the hour, where the model begins to know its training images by heart
SIZES |= {
    f"{size}, RandAugment": SIZES[size] | {"augment": "rand_augment"}
    for size in ("96x4", "96x6", "128x4", "128x6")
}
OF_DATA = ("batch_size", "augment", "mixup", "cutmix")  # the options of a recipe that data take
LINKED = ("num_classes", "in_chans", "img_size", "mean", "std", "classes")  # from data to model


def all_steps() -> dict[str, dict]:
    "Every step's options, complete."
    steps, options = {}, {}
    for name, change in LADDER.items():
        steps[name] = options = options | change
    steps |= {name: steps["Muon"] | change for name, change in FROM_MUON.items()}
    return steps | {name: options | change for name, change in (BRANCHES | FORMATS | SIZES).items()}


class Clock(pl.Callback):
    """A row for each validation, and this process's time on a processor in each training step;
    several processes count alike."""

    def __init__(self, plan: dict):
        self.plan, self.steps, self.rows, self.cut_off = plan, [], [], {}

    def state_dict(self) -> dict:
        return {"plan": self.plan, "steps": self.steps, "rows": self.rows}

    def load_state_dict(self, state: dict):
        self.steps, self.rows = list(state["steps"]), list(state["rows"])

    def on_train_epoch_start(self, *args):
        self.since = time.process_time()

    def on_train_batch_end(self, *args):  # from the last one's end: getting the batch counts, too
        now = time.process_time()
        self.steps.append(now - self.since)
        self.since = now

    def on_validation_end(self, trainer, module):
        values = trainer.callback_metrics
        seconds = round(sum(self.steps) * trainer.world_size)
        row = {"epoch": trainer.current_epoch + 1, "seconds": seconds}
        row |= {name: round(values[name].item(), 4) for name in ("val_loss", "val_acc")}
        self.rows.append(row)

    def on_train_epoch_end(self, trainer, module):
        # a run that goes on ends its last whole epoch once more
        if "train_loss" not in trainer.callback_metrics:
            return
        loss = {"train_loss": round(trainer.callback_metrics["train_loss"].item(), 4)}
        if self.rows and self.rows[-1]["epoch"] == trainer.current_epoch + 1:
            self.rows[-1] |= loss
        else:  # the last step fell within the epoch
            self.cut_off = loss

    def end(self, found: dict[str, float], epochs: float):
        "A row for the end of the run, from what the last validation found."
        seconds = round(sum(self.steps) * self.plan["processes"])
        values = {name: round(found[name], 4) for name in ("val_loss", "val_acc")}
        row = {"epoch": round(epochs, 2), "seconds": seconds}
        self.rows.append(row | self.cut_off | values)


def open_data(folder: str) -> CIFAR10Data | ImageFolderData:
    "CIFAR-10 in either form, in memory."
    if (Path(folder) / "train").is_dir():
        return ImageFolderData(folder, img_size=32, in_memory=True, num_workers=0)
    return CIFAR10Data(folder)


def result(kind: str, bf16: bool = False, folder: Path = RESULTS) -> Path:
    "Where the costs, the epochs or the runs of a format stand."
    name = "study_bf16" if bf16 else "study"
    return folder / (f"{name}.csv" if kind == "epochs" else f"{name}_{kind}.csv")


def differences(old: dict, new: dict) -> str:
    "Options of two recipes that differ."
    names = [name for name in {**old, **new} if not name.startswith("_")]
    names = [name for name in names if old.get(name) != new.get(name)]
    return ", ".join(f"{name}: {old.get(name)}, now {new.get(name)}" for name in names)


def quiet(precision: str) -> dict:
    "Options of a trainer that shows and logs nothing."
    return {
        "accelerator": "cpu", "precision": precision, "logger": False,
        "enable_progress_bar": False, "enable_model_summary": False,
    }


def data_of(source, options: dict, processes: int) -> CIFAR10Data | ImageFolderData:
    "The source's images with a recipe's options; several processes share each batch."
    share = options["batch_size"] // processes
    options = options | {"batch_size": share, "seed": 0, "num_workers": 0}
    data = type(source)(source.data_dir, **options)
    data._sets, data._classes, data._stats = source.sets, source.classes, source.stats()
    data.img_size = 32
    return data


def make_trainer(plan: dict, callbacks: list, validate: bool, keep: Path | None) -> pl.Trainer:
    "A run's trainer; with `keep` it leaves a checkpoint there after each epoch."
    if plan["ema"]:
        callbacks.append(EMAWeightAveraging(decay=plan["ema"]))
    if keep:
        callbacks.append(ModelCheckpoint(keep, filename="last", enable_version_counter=False))
    processes = plan["processes"]
    return pl.Trainer(
        max_epochs=-1, max_steps=plan["steps"], callbacks=callbacks, num_sanity_val_steps=0,
        limit_val_batches=1.0 if validate else 0, enable_checkpointing=bool(keep),
        devices=processes, strategy="ddp" if processes > 1 else "auto", **quiet(plan["precision"]),
    )


def saved_in(last: Path, model: LitViT, clock: Clock) -> dict:
    "A checkpoint's contents; raises `ValueError` if it is of another recipe than the model."
    saved = torch.load(last, map_location="cpu", weights_only=False)
    plan = saved["callbacks"].get(clock.state_key, {}).get("plan", clock.plan)
    old = saved["hyper_parameters"] | plan
    if other := differences(old, {**model.hparams, **clock.plan}):
        raise ValueError(f"{last} is of another recipe ({other}): "
                         "name another folder with --keep, or move this one away")
    return saved


def train(
    options: dict, seed: int, steps: int, source, validate: bool = True,
    keep: Path | None = None, processes: int = 1,
):
    """One run: the model, and the clock with a row an epoch and one for the end. Several processes
    share each batch."""
    of_data = {name: options.get(name, 0.0) for name in OF_DATA}
    of_model = {k: v for k, v in options.items() if k not in (*OF_DATA, "precision", "ema")}
    precision, ema = options.get("precision", "32-true"), options.get("ema")
    plan = of_model | of_data | {"precision": precision, "ema": ema}
    plan |= {"steps": steps, "processes": processes}
    pl.seed_everything(seed, verbose=False)
    data = data_of(source, of_data, processes)
    linked = {name: getattr(data, name) for name in LINKED}
    model, clock = LitViT(**of_model, **linked), Clock(plan)
    trainer = make_trainer(plan, [EpochSeed(seed), clock], validate, keep)
    last = keep / "last.ckpt" if keep and (keep / "last.ckpt").exists() else None
    saved = saved_in(last, model, clock) if last else None
    trainer.fit(model, data, ckpt_path=last)
    # nothing was left to train; the average is what the run is about
    if saved and ema and saved["global_step"] >= steps:
        model.load_state_dict(saved["state_dict"])
    if processes > 1:  # one process goes on alone: what it measures must not wait for the others
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    if validate and trainer.is_global_zero:
        found = pl.Trainer(**quiet(precision)).validate(model, data, verbose=False)[0]
        clock.end(found, steps * of_data["batch_size"] / len(data.sets["train"]))
    return model, clock


# options that change no step's duration
FREE = ("lr", "weight_decay", "schedule", "warmup", "label_smoothing")


def work_of(options: dict) -> str:
    "What decides how long a step takes; equal for recipes whose steps do the same work."
    work = {name: value for name, value in options.items() if name not in FREE}
    return json.dumps(work, sort_keys=True)


def parts_of(options: dict) -> list[tuple[float, str]]:
    "What a run consists of: shares of its steps, and what work they do."
    rate, until = options.get("patch_dropout", 0.0), options.get("patch_dropout_until", 1.0)
    plain = {k: v for k, v in options.items() if not k.startswith("patch_dropout")}
    parts = [(1.0, plain)]
    if rate:
        parts = [(until, plain | {"patch_dropout": rate}), (1 - until, plain)]
    return [(share, work_of(part)) for share, part in parts if share]


def in_turns(works: dict[str, Callable[[], Clock]], rounds: int = 5) -> dict[str, tuple]:
    "Quartiles of the seconds of a step of each work, which does a few steps at a time."
    times = {name: [] for name in works}
    for i in range(rounds):
        for name in list(works)[:: 1 if i % 2 else -1]:
            times[name] += works[name]().steps[2:]
        print(f"round {i + 1} of {rounds}", flush=True)
    return {name: quartiles(of) for name, of in times.items()}


def measure_costs(
    steps: dict[str, dict], names: list[str], path: Path, source, against: str = "Muon",
    rounds: int = 5, each: int = 6,
):
    """Train recipes a few steps, in turns, and write what one step takes; where a table stands
    already, `against` is the measure."""
    table = read(path) if path.exists() else {}
    known = {name: row for name, row in table.items() if name in steps}
    if known and against not in known:
        raise ValueError(f"--against {against}: {path} has no such row; it has {', '.join(known)}")
    wanted = [name for name in steps if name in names or name == against]
    works = dict.fromkeys(work for name in wanted for _, work in parts_of(steps[name]))
    some_steps = lambda work: train(json.loads(work), 0, each, source, validate=False)[1]
    found = in_turns({work: partial(some_steps, work) for work in works}, rounds)

    def seconds(name: str, quartile: int) -> float:
        return sum(share * found[work][quartile] for share, work in parts_of(steps[name]))

    scale = float(known[against]["ms"]) / (1e3 * seconds(against, 0)) if known else 1.0
    for name in wanted if not known else names:
        ms, median = (round(1e3 * scale * seconds(name, quartile), 1) for quartile in (0, 1))
        row = {"step": name, "batch_size": steps[name]["batch_size"]}
        known[name] = row | {"ms": ms, "ms_median": median, "machine": machine_name()}
    write_costs(path, steps, known)


def write_costs(path: Path, steps: dict[str, dict], known: dict[str, dict]):
    "The table; recipes that do the same work, step for step, cost the same."
    for name in steps:
        same = [other for other in known if parts_of(steps[other]) == parts_of(steps[name])]
        if same and name not in known and name not in FORMATS:
            known[name] = known[same[0]] | {"step": name}
    write_rows(path, COST_COLUMNS, [known[name] for name in steps if name in known])


def read(path: Path) -> dict[str, dict]:
    "Rows by their step."
    return {row["step"]: row for row in read_rows(path)}


def machine_name() -> str:
    "The processor in a few words."
    about = machine()
    bf16 = "with" if about["bf16_instructions"] else "without"
    return (f"{about['processor']}, {about['cpu_capability']}, {bf16} bfloat16, "
            f"torch {about['versions']['torch']}")


def steps_for(minutes: float, ms: float) -> int:
    "How many steps of so many milliseconds fit into so many minutes on two cores."
    return int(120 * minutes / (1e-3 * ms))


def steps_in(minutes: float, costs: Path) -> dict[str, int]:
    "How many steps of each recipe fit into so many minutes on two cores."
    if not costs.exists():
        raise FileNotFoundError(f"{costs} is not there: measure first what a step costs, "
                                "by the same command with --costs")
    bought = {}
    for name, row in read(costs).items():
        bought[name] = steps_for(minutes, float(row["ms"]))
    top = list(LADDER)[-1]
    return bought | ({name: bought[top] for name in FORMATS} if top in bought else {})


def append(path: Path, columns: list[str], rows: list[dict]):
    "Add rows to a file that another command may be writing to."
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+", newline="") as file:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX)
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        if not path.stat().st_size:
            writer.writeheader()
        writer.writerows(rows)


def folder_of(keep: Path, step: str, minutes: float, seed: int, bf16: bool) -> Path:
    "Where a run leaves its model and its checkpoints."
    return keep / f"{step}-{minutes:g}-{seed}{'-bf16' * bf16}".replace(" ", "_")


def measure_kept(runs: list[tuple[str, int]], args):
    "The test images' word on models that are finished; a row for each that has none yet."
    from vit_course.data import open_test_set
    from vit_course.report import evaluate
    from vit_course.training import load_model

    path = result("test", args.bf16, args.results)
    for step, seed in runs:
        file = folder_of(args.keep, step, args.minutes, seed, args.bf16) / "model.safetensors"
        if done(path, (step, args.minutes, seed)):
            continue
        if not file.exists():
            print(f"{step}, seed {seed}: no model in {file.parent}")
            continue
        lit = load_model(file)
        size = lit.vit.tokenizer.img_size
        found, _ = evaluate(lit, open_test_set(args.data, lit.hparams.classes, size, 3))
        row = {"step": step, "minutes": f"{args.minutes:g}", "seed": seed}
        row |= {"test_acc": round(found["test_accuracy"], 4)}
        row |= {"calibration_error": round(found["calibration_error"], 4)}
        append(path, TEST_COLUMNS, [row])
        print(step, seed, row["test_acc"], flush=True)


def done(path: Path, key: tuple) -> bool:
    "Whether the run stands in the file."
    rows = read_rows(path)
    return key in ((row["step"], float(row["minutes"]), int(row["seed"])) for row in rows)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--results", type=Path, default=RESULTS,
                        help="the folder of the tables; another one is another study")
    parser.add_argument("--steps", nargs="+", choices=list(all_steps()), metavar="NAME",
                        help="the ladder, rates and branches; with --costs: all")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--minutes", type=lambda text: float(f"{float(text):g}"), default=5)
    parser.add_argument("--costs", action="store_true",
                        help="measure what a step of each recipe costs, and train nothing")
    parser.add_argument("--against", default="Muon", choices=list(all_steps()), metavar="NAME",
                        help="with --costs: the row that new ones are measured against")
    parser.add_argument("--keep", type=Path, help="a folder for models and checkpoints")
    parser.add_argument("--test", action="store_true",
                        help="measure the models in --keep on the test images, and train nothing")
    parser.add_argument("--bf16", action="store_true",
                        help="in bfloat16, with costs and results of its own")
    parser.add_argument("--share", default="0/1",
                        help="i/n: every n-th run, beginning with number i")
    parser.add_argument("--processes", type=int, default=1,
                        help="that share each batch of a run: one a core, if it is the only run")
    return parser


def steps_asked(args) -> list[str]:
    "Which recipes: those that were named, else the usual ones or those that have no costs yet."
    costs = result("costs", args.bf16, args.results)
    steps = args.steps
    if args.costs and not steps and costs.exists():  # budgets rest on what was measured before
        steps = [name for name in all_steps() if name not in read(costs)]
    usual = [*LADDER, "rate 0.0015", "rate 0.012", *BRANCHES]
    return steps or (list(all_steps()) if args.costs else usual)


def runs_asked(args, parser: argparse.ArgumentParser) -> list[tuple[str, int]]:
    "This command's share of the runs: recipes and seeds."
    mine, shares = share_of(args.share, parser)
    return [(step, seed) for seed in args.seeds for step in args.steps][mine::shares]


def check_tables(args, parser: argparse.ArgumentParser, steps: dict[str, dict], bought: dict):
    "Ends the command if a recipe's cost is unknown, a batch cannot be shared, or a table is old."
    if missing := [step for step in args.steps if step not in bought]:
        costs = result("costs", args.bf16, args.results)
        parser.error(f"{costs} has no row for {', '.join(missing)}: "
                     f"measure first, by --costs --steps {' '.join(map(repr, missing))}")
    if uneven := [step for step in args.steps if steps[step]["batch_size"] % args.processes]:
        parser.error(f"--processes {args.processes}: "
                     f"the batches of {', '.join(uneven)} cannot be shared evenly by so many")
    for kind, columns in {"epochs": EPOCH_COLUMNS, "runs": RUN_COLUMNS}.items():
        file, head = result(kind, args.bf16, args.results), ",".join(columns)
        if file.exists() and file.open().readline().strip() != head:
            parser.error(f"{file} has not the columns {head}: "
                         "it is from another version, move it away or give --results")


def make_run(step: str, seed: int, options: dict, count: int, source, args):
    "Train one recipe with one seed, and write its rows; `--keep` keeps the model, too."
    folder = args.keep and folder_of(args.keep, step, args.minutes, seed, args.bf16)
    model, clock = train(options, seed, count, source, keep=folder, processes=args.processes)
    if not model.trainer.is_global_zero:
        return
    # the model is there if a command ended between this line and the last
    if folder and not (folder / "model.safetensors").exists():
        save_model(model, folder / "model.safetensors")
    epochs, runs = (result(kind, args.bf16, args.results) for kind in ("epochs", "runs"))
    same = {"step": step, "minutes": f"{args.minutes:g}", "seed": seed}
    append(epochs, EPOCH_COLUMNS, [same | row for row in clock.rows])
    last = clock.rows[-1]
    summary = {name: last[name] for name in ("seconds", "val_loss", "val_acc")}
    summary |= {"optimizer_steps": count, "epochs": last["epoch"], "options": json.dumps(options)}
    summary["processes"] = args.processes
    summary["parameters"] = sum(p.numel() for p in model.parameters())
    append(runs, RUN_COLUMNS, [same | summary])
    print(step, args.minutes, seed, last["val_acc"], f"{last['epoch']} epochs", flush=True)


def main():
    parser = make_parser()
    args = parser.parse_args()
    one_quiet_thread()
    # without it Lightning gives the first of several processes more
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if args.test and not args.keep:
        parser.error("--test needs --keep: the folder that holds the models")
    args.steps = steps_asked(args)
    runs = runs_asked(args, parser)
    if args.test:
        return measure_kept(runs, args)
    precision = {"precision": "bf16-mixed"} if args.bf16 else {}
    steps = {name: precision | options for name, options in all_steps().items()}
    costs = result("costs", args.bf16, args.results)
    if args.costs:
        names = [name for name in args.steps if name not in FORMATS]
        return measure_costs(steps, names, costs, open_data(args.data), args.against)
    bought = steps_in(args.minutes, costs)
    check_tables(args, parser, steps, bought)
    source = open_data(args.data)
    for step, seed in runs:
        if not done(result("runs", args.bf16, args.results), (step, args.minutes, seed)):
            make_run(step, seed, steps[step], bought[step], source, args)


if __name__ == "__main__":
    main()
