import copy
import math
from bisect import bisect_right
from functools import reduce
import numpy as np
import torch
from torch import nn

# === decay_groups: a loop, groups the other way round, extra entries
def decay_groups(model, weight_decay):
    decay, no_decay = [], []
    for name, param in model.named_parameters():
        if not param.requires_grad:
            continue
        if param.dim() < 2 or not name.endswith("weight"):
            no_decay.append(param)
        else:
            decay.append(param)
    return [
        {"params": no_decay, "weight_decay": 0, "name": "free"},
        {"params": decay, "weight_decay": weight_decay, "name": "matrices"},
    ]

# === decay_groups: by the kind of the layer
def decay_groups(model, weight_decay):
    matrices = {id(m.weight) for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))}
    trained = [p for p in model.parameters() if p.requires_grad]
    return (
        dict(params=[p for p in trained if id(p) in matrices], weight_decay=weight_decay),
        dict(params=[p for p in trained if id(p) not in matrices], weight_decay=0.0),
    )

# === decay_groups: generators and a name list
def decay_groups(model, weight_decay):
    skip = ("bias", "class_token", "registers", "positions", "gamma")

    def decays(name, p):
        return p.ndim >= 2 and not any(s in name for s in skip)

    pick = lambda yes: [p for n, p in model.named_parameters() if p.requires_grad and decays(n, p) is yes]
    return [
        {"params": iter(pick(True)), "weight_decay": weight_decay},
        {"params": iter(pick(False)), "weight_decay": 0.0},
    ]

# === cosine_schedule: one expression
def cosine_schedule(progress, warmup=0.05):
    return progress / warmup if progress < warmup else (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup))) / 2

# === cosine_schedule: sine of half the angle, squared
def cosine_schedule(progress, warmup=0.05):
    if warmup > 0 and progress <= warmup:
        return progress / warmup
    rest = (1.0 - progress) / (1.0 - warmup)
    return math.sin(0.5 * math.pi * rest) ** 2

# === cosine_schedule: numpy
def cosine_schedule(progress, warmup=0.05):
    rise = progress / warmup if warmup else 1.0
    done = np.clip((progress - warmup) / (1 - warmup), 0, 1)
    return float(np.minimum(rise, 1.0) * (0.5 + 0.5 * np.cos(np.pi * done)))

# === step_schedule: a loop
def step_schedule(progress, milestones=(100 / 160, 150 / 160), gamma=0.1):
    factor = 1.0
    for milestone in milestones:
        if not progress < milestone:
            factor *= gamma
    return factor

# === step_schedule: bisection in the sorted milestones
def step_schedule(progress, milestones=(100 / 160, 150 / 160), gamma=0.1):
    return math.pow(gamma, bisect_right(sorted(milestones), progress))

# === step_schedule: a product
def step_schedule(progress, milestones=(100 / 160, 150 / 160), gamma=0.1):
    return reduce(lambda rate, m: rate * gamma if progress >= m else rate, milestones, 1)

# === resume: a copy of everything first
def resume(state, model, optimizer):
    state = copy.deepcopy(state)
    torch.set_rng_state(state["random"])
    optimizer.load_state_dict(state["optimizer"])
    model.load_state_dict(state["model"])
    return state["step"]

# === resume: weights copied one by one
def resume(state, model, optimizer):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(state["model"][name])
        for name, buffer in model.named_buffers():
            buffer.copy_(state["model"][name])
    copied = lambda kept: {n: v.clone() if torch.is_tensor(v) else v for n, v in kept.items()}
    memory = {
        "state": {k: copied(kept) for k, kept in state["optimizer"]["state"].items()},
        "param_groups": copy.deepcopy(state["optimizer"]["param_groups"]),
    }
    optimizer.load_state_dict(memory)
    torch.default_generator.set_state(state["random"])
    return int(state["step"])

# === resume: the step as a tensor's number, strict names
def resume(state, model, optimizer):
    model.load_state_dict({k: v.clone() for k, v in state["model"].items()}, strict=True)
    optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))
    torch.random.set_rng_state(state["random"].clone())
    step = state["step"]
    return step
