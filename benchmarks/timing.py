"""What the benchmarks share: timing in turns, quartiles, and the machine's description."""
import platform
import random
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version

import torch

from vit_course.attention import cpu_has_bf16
from vit_course.optimizers import bf16_is_faster

Quartiles = tuple[float, float, float]


def interleaved(work: dict[str, Callable], rounds: int, warm_up: int = 2) -> dict[str, list[float]]:
    "Seconds of each call, taken in turns, so that a slow minute of the machine meets all alike."
    for run in work.values():
        for _ in range(warm_up):
            run()
    times, names, order = {name: [] for name in work}, [], random.Random(0)
    # in another order each time, where there are more than two: nobody always follows the same
    # neighbour, or itself
    for _ in range(rounds):
        names = _next_round(names or list(work), order)
        for name in names:
            start = time.perf_counter()
            work[name]()
            times[name].append(time.perf_counter() - start)
    return times


def _next_round(names: list[str], order: random.Random) -> list[str]:
    "The names in a random order that does not begin with the last one's end."
    first = order.choice(names[:-1] or names)
    rest = [name for name in names if name != first]
    return [first, *order.sample(rest, len(rest))]


def quartiles(values) -> Quartiles:
    "First quartile, median, third quartile."
    shares = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
    return tuple(torch.tensor(values, dtype=torch.float64).quantile(shares).tolist())


def paired_ratios(times: dict[str, list[float]], base: str) -> dict[str, Quartiles]:
    "Quartiles of each one's time over the base's time in the same round."
    ratios = {}
    for name, values in times.items():
        ratios[name] = quartiles([a / b for a, b in zip(values, times[base])])
    return ratios


def kind_of_processor() -> str:
    "How a result file's name ends: empty where bfloat16 is fast, else _slow_bf16 or _without_bf16."
    if not cpu_has_bf16():
        return "_without_bf16"
    return "" if bf16_is_faster() else "_slow_bf16"


def processor() -> str:
    "The processor's name as the system gives it."
    try:
        with open("/proc/cpuinfo") as file:
            names = (line.split(":", 1)[1] for line in file if line.startswith("model name"))
            return next(names).strip()
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def machine(*packages: str) -> dict:
    "What a figure must be read with: processor, features, system, versions."
    versions = {}
    for name in ("torch", "torchvision", "vit_course", *packages):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    return {
        "processor": processor(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "bf16_instructions": cpu_has_bf16(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": versions,
    }
