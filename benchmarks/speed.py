#!/usr/bin/env python3
"""How fast is the course's ViT, and its training, next to what a learner would use instead?

    python benchmarks/speed.py [--only SECTION ...] [--threads 2 1] [--rounds 9] [--data FOLDER]

Sections: models (a training step and inference, against six peers), dropout, memory, imports,
rollout, augmentation, epoch (against the plain recipe). bfloat16 is measured where the processor
has instructions for it. All that is compared runs in turns in one process (imports: in fresh
processes in turns; memory: in fresh processes), with the number of threads fixed. Ratios are of the
same round, given as median and quartiles. FOLDER holds CIFAR-10, for `epoch`; without it, images of
noise of the same size are used, which take the same time. Writes benchmarks/results/speed.json and
speed.md; or, on a processor without instructions for bfloat16, speed_without_bf16.json and .md; or,
on one whose instructions for it are slower than those for 32 bits, speed_slow_bf16.json and .md.
Sections that are not run keep their rows.
"""
import argparse
import datetime
import functools
import itertools
import json
import logging
import platform
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from timing import interleaved, kind_of_processor, machine, paired_ratios, quartiles
from torch import nn

from vit_course.attention import cpu_has_bf16
from vit_course.files import written_whole
from vit_course.vit import ViT

RESULTS = Path(__file__).parent / "results"
SIZES = {
    "assignment": {
        "img_size": 32, "patch_size": 4, "num_classes": 10,
        "embed_dim": 256, "depth": 6, "num_heads": 8, "mlp_ratio": 2.0,
    },
    "ViT-Ti/16": {
        "img_size": 224, "patch_size": 16, "num_classes": 1000,
        "embed_dim": 192, "depth": 12, "num_heads": 3,
    },
}
BATCH = {"assignment": 64, "ViT-Ti/16": 8}
DROPOUT = {"dropout": 0.2, "attn_dropout": 0.2}  # the assignment's
TIMMS_DROPOUT = {"pos_drop_rate": 0.2, "proj_drop_rate": 0.2, "attn_drop_rate": 0.2}
FORMATS = (True, False) if cpu_has_bf16() else (False,)  # bf16 or not
KIND = kind_of_processor()  # in the names of the results
FAST_BF16 = KIND == ""  # what `vit-course fit` asks, too


def dtype_of(bf16: bool) -> str:
    return "bf16" if bf16 else "fp32"


def columns(ratio: tuple[float, float, float], digits: int = 3) -> dict[str, float]:
    "A ratio's quartiles as a row's columns."
    return {name: round(value, digits) for name, value in zip(("q1", "ratio", "q3"), ratio)}


# ---- models --------------------------------------------------------------------------------------

class TorchViT(nn.Module):
    "`nn.TransformerEncoder` with what a ViT needs around it."

    def __init__(
        self, img_size, patch_size, num_classes, embed_dim, depth, num_heads, mlp_ratio=4.0
    ):
        super().__init__()
        self.cut = nn.Conv2d(3, embed_dim, patch_size, patch_size)
        self.token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        tokens = (img_size // patch_size) ** 2 + 1
        self.positions = nn.Parameter(0.02 * torch.randn(1, tokens, embed_dim))
        layer = nn.TransformerEncoderLayer(
            embed_dim, num_heads, int(mlp_ratio * embed_dim), 0.0, "gelu",
            layer_norm_eps=1e-6, batch_first=True, norm_first=True,
        )
        norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.encoder = nn.TransformerEncoder(layer, depth, norm, enable_nested_tensor=False)
        self.head = nn.Linear(embed_dim, num_classes)

    def forward(self, x):
        x = self.cut(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], dim=1) + self.positions
        return self.head(self.encoder(x)[:, 0])


def timm(**s):
    from timm.models.vision_transformer import VisionTransformer
    return VisionTransformer(**s)


def torchvision(img_size, patch_size, num_classes, embed_dim, depth, num_heads, mlp_ratio=4.0):
    from torchvision.models.vision_transformer import VisionTransformer
    hidden = int(mlp_ratio * embed_dim)
    model = VisionTransformer(
        img_size, patch_size, depth, num_heads, embed_dim, hidden, num_classes=num_classes
    )
    # its own start is 0, which would make every comparison equal
    nn.init.normal_(model.heads.head.weight, std=0.02)
    return model


def huggingface(img_size, patch_size, num_classes, embed_dim, depth, num_heads, mlp_ratio=4.0):
    from transformers import ViTConfig, ViTForImageClassification
    config = ViTConfig(
        image_size=img_size, patch_size=patch_size, num_labels=num_classes, hidden_size=embed_dim,
        num_hidden_layers=depth, num_attention_heads=num_heads,
        intermediate_size=int(mlp_ratio * embed_dim), layer_norm_eps=1e-6,
    )
    return ViTForImageClassification(config)


class Logits(nn.Module):
    "Hugging Face's model gives an object; its logits are what the others give."

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x).logits


def _vit_pytorch(kind, s, **more):
    dim, heads = s["embed_dim"], s["num_heads"]
    return kind(
        image_size=s["img_size"], patch_size=s["patch_size"], num_classes=s["num_classes"],
        dim=dim, depth=s["depth"], heads=heads, mlp_dim=int(s.get("mlp_ratio", 4.0) * dim),
        dim_head=dim // heads, **more,
    )


def vit_pytorch(**s):
    from vit_pytorch import ViT as Theirs
    return _vit_pytorch(Theirs, s)


def simple_vit(**s):
    from vit_pytorch import SimpleViT
    return _vit_pytorch(SimpleViT, s)


def copied_into_torch(ours: ViT, sizes: dict) -> TorchViT:
    "nn.TransformerEncoder with our weights."
    theirs = TorchViT(**sizes)
    pairs = {theirs.cut: ours.tokenizer.stem.proj}
    pairs |= {theirs.encoder.norm: ours.norm, theirs.head: ours.head}
    for layer, block in zip(theirs.encoder.layers, ours.encoder.blocks):
        pairs |= {layer.norm1: block.norm1, layer.norm2: block.norm2}
        pairs |= {layer.linear1: block.mlp.fc1, layer.linear2: block.mlp.fc2}
        attention, qkv = layer.self_attn, block.attn.qkv
        pairs |= {attention.out_proj: block.attn.proj}
        attention.in_proj_weight.data, attention.in_proj_bias.data = qkv.weight.data, qkv.bias.data
    for to, source in pairs.items():
        to.load_state_dict(source.state_dict())
    theirs.token.data, theirs.positions.data = ours.class_token.data, ours.positions.positions.data
    return theirs


AGAIN = "timm, once more"  # how far apart two equal models may come out
OTHER = "another architecture of the same size: "
UNCHECKED = {  # models whose outputs are compared with nothing, and what they are
    "vit_course, mean pooling": "ours, without a class token, like SimpleViT",
    AGAIN: "a second model of timm's; its distance from 1 is what chance can do",
    "vit-pytorch ViT": OTHER + "norms around the patch embedding, no biases in attention",
    "vit-pytorch SimpleViT": OTHER + "no class token, fixed positions, no biases in attention",
}


def far_in_bf16(ours: nn.Module, theirs: nn.Module, images: torch.Tensor) -> float:
    "Distance of two models' outputs in bfloat16 (root mean square), over the outputs' deviation."
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        mine, others = ours(images), theirs(images)
    others = getattr(others, "logits", others).float()
    return ((mine.float() - others).square().mean().sqrt() / others.std()).item()


def must_agree(name: str, same: nn.Module, model: nn.Module, images: torch.Tensor):
    "Raises `RuntimeError` if another's model and ours with the same weights give other outputs."
    with torch.no_grad():
        theirs = model.eval()(images)
        off = (same.eval()(images) - getattr(theirs, "logits", theirs)).abs().max().item()
    differ = f"{name} and vit_course differ by"
    if off > 1e-4:
        raise RuntimeError(f"{differ} {off:.1e} with the same weights: nothing to compare")
    if FORMATS[0] and (off := far_in_bf16(same, model, images)) > 0.05:
        raise RuntimeError(f"{differ} {off:.2f} of a logit's deviation in bfloat16: "
                           "nothing to compare")


def contestants(sizes: dict) -> tuple[dict[str, nn.Module], dict[str, str]]:
    "Everybody's model at one size, and what was found when its outputs were compared with ours."
    from vit_course.pretrained import from_huggingface, from_timm, from_torchvision

    torch.manual_seed(0)
    ours = ViT(**sizes).eval()
    nn.init.normal_(ours.class_token, std=0.02)
    models = {"vit_course": ours, "timm": timm(**sizes), "torchvision": torchvision(**sizes)}
    models["Hugging Face"] = huggingface(**sizes)
    models["nn.TransformerEncoder"] = copied_into_torch(ours, sizes)
    readers = {"timm": from_timm, "torchvision": from_torchvision, "Hugging Face": from_huggingface}
    images = torch.rand(2, 3, sizes["img_size"], sizes["img_size"])
    checked = {"vit_course": "ours, with a class token"}
    for name, model in list(models.items())[1:]:
        same = readers[name](model.eval()) if name in readers else ours
        must_agree(name, same, model, images)
        checked[name] = "the same outputs to 1e-4 with the same weights"
    models["Hugging Face"] = Logits(models["Hugging Face"])
    models["vit_course, mean pooling"] = ViT(**sizes, pool="mean")
    models["vit-pytorch ViT"] = vit_pytorch(**sizes)
    models |= {"vit-pytorch SimpleViT": simple_vit(**sizes), AGAIN: timm(**sizes)}
    return models, checked | UNCHECKED


def training_step(model: nn.Module, size: str, bf16: bool):
    "A whole step: forward, loss, backward, fused AdamW."
    sizes, model = SIZES[size], model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    images = torch.rand(BATCH[size], 3, *[sizes["img_size"]] * 2)
    labels = torch.randint(sizes["num_classes"], (BATCH[size],))

    def run():
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return run


def inference(model: nn.Module, size: str, bf16: bool):
    "A forward pass."
    images = torch.rand(BATCH[size], 3, *[SIZES[size]["img_size"]] * 2)

    def run():
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            model(images)

    return run


def rival(peer: str) -> str:
    "Our model that is built like it."
    return "vit_course, mean pooling" if "SimpleViT" in peer else "vit_course"


WORK = {"training": training_step, "inference": inference}


def models_times(models: dict[str, nn.Module], case: dict, rounds: int) -> dict[str, list[float]]:
    "Everybody's seconds in each round of one case."
    calls = {}
    for name, model in models.items():
        model.train(case["work"] == "training")
        calls[name] = WORK[case["work"]](model, case["size"], case["dtype"] == "bf16")
    return interleaved(calls, rounds)


def models_rows(times: dict[str, list[float]], checked: dict[str, str]) -> list[dict]:
    "Ratios to timm's time, and how often each was faster than ours in the same round."
    rows = []
    for name, ratio in paired_ratios(times, "timm").items():
        won = [a < b for a, b in zip(times[name], times[rival(name)])]
        ms, wins = 1e3 * quartiles(times[name])[1], sum(won) / len(won)
        about = {"model": name, "checked": checked[name]}
        rows.append(about | columns(ratio, 4) | {"ms": round(ms, 4), "wins": round(wins, 4)})
    return rows


def bench_models(args) -> list[dict]:
    "Every contestant's training step and inference as ratios to timm's."
    rows = []
    for size, sizes in SIZES.items():
        models, checked = contestants(sizes)
        for threads, work, bf16 in itertools.product(args.threads, WORK, FORMATS):
            torch.set_num_threads(threads)
            case = {"size": size, "threads": threads, "work": work, "dtype": dtype_of(bf16)}
            found = models_rows(models_times(models, case, args.rounds), checked)
            rows += [case | row for row in found]
            ours = next(row["ratio"] for row in found if row["model"] == "vit_course")
            print(*case.values(), f"ours {ours:.3f} of timm", flush=True)
    return rows


def with_torchs_dropout(model: ViT) -> ViT:
    "Our model with PyTorch's dropout in place of ours, also on the attention weights."
    from vit_course.dropout import CheapDropout

    for module in list(model.modules()):
        for name, part in module.named_children():
            if isinstance(part, CheapDropout):
                setattr(module, name, nn.Dropout(part.p))
            if hasattr(part, "impl"):
                part.impl = "sdpa"  # with PyTorch's dropout on the weights
    return model


def bench_dropout(args) -> list[dict]:
    "A training step of the assignment's model with its dropouts: PyTorch's, ours, and without."
    sizes, rows = SIZES["assignment"], []
    models = {"no dropout": ViT(**sizes), "vit_course": ViT(**sizes, **DROPOUT)}
    models["nn.Dropout"] = with_torchs_dropout(ViT(**sizes, **DROPOUT))
    models["timm"] = timm(**sizes, **TIMMS_DROPOUT)
    for threads, bf16 in itertools.product(args.threads, FORMATS):
        torch.set_num_threads(threads)
        steps = {name: training_step(m, "assignment", bf16) for name, m in models.items()}
        times = interleaved(steps, args.rounds)
        for name, ratio in paired_ratios(times, "no dropout").items():
            about = {"threads": threads, "dtype": dtype_of(bf16), "model": name}
            ms = round(1e3 * quartiles(times[name])[1])
            rows.append(about | {"ms": ms} | columns(ratio))
    return rows


# ---- in fresh processes --------------------------------------------------------------------------

MEMORY_SIZES = {  # tokens -> batch, sizes
    64: (32, SIZES["assignment"]),
    197: (8, SIZES["ViT-Ti/16"]),
    577: (2, SIZES["ViT-Ti/16"] | {"img_size": 384}),
}


def memory_model(name: str, sizes: dict, mean: bool) -> nn.Module:
    "A new model of this name, with mean pooling or, where it has the choice, a class token."
    pool = {"pool": "mean"} if mean else {}
    timms_pool = {"class_token": False, "global_pool": "avg"} if mean else {}
    makers = {
        "vit_course": lambda: ViT(**sizes, **pool),
        "with checkpointing": lambda: ViT(**sizes, **pool, grad_checkpointing=True),
        "timm": lambda: timm(**sizes, **timms_pool),
        "SimpleViT": lambda: simple_vit(**sizes),
    }
    return makers[name]()


def memory_of(name: str, tokens: int, bf16: bool) -> float:
    "Growth of this process's peak resident memory by two training steps, in MiB."
    batch, sizes = MEMORY_SIZES[tokens]
    torch.set_num_threads(1)
    model = memory_model(name, sizes, tokens == 64).train()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    images = torch.rand(batch, 3, *[sizes["img_size"]] * 2)
    labels = torch.randint(sizes["num_classes"], (batch,))
    before = peak_mib()
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return peak_mib() - before


def peak_mib() -> float:
    "This process's peak resident memory in MiB."
    if platform.system() == "Linux":  # what getrusage says includes the parent's
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) for line in file if line.startswith("VmHWM")) / 2**10
    import resource

    unit = 2**20 if platform.system() == "Darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def in_fresh_process(name: str, tokens: int, dtype: str) -> float:
    "`memory_of` as another process finds it."
    command = [sys.executable, __file__, "--memory-of", name, str(tokens), dtype]
    ended = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(ended.stdout.split()[-1])


def bench_memory(args) -> list[dict]:
    rows = []
    names = ("vit_course", "with checkpointing", "timm", "SimpleViT")
    for tokens, bf16, name in itertools.product(MEMORY_SIZES, FORMATS, names):
        dtype, batch = dtype_of(bf16), MEMORY_SIZES[tokens][0]
        found = [in_fresh_process(name, tokens, dtype) for _ in range(3)]
        q1, mib, q3 = map(round, quartiles(found))
        about = {"tokens": tokens, "batch": batch, "dtype": dtype, "model": name}
        rows.append(about | {"mib": mib, "q1": q1, "q3": q3})
    return rows


def bench_imports(args) -> list[dict]:
    "`import vit_course.vit` against what it needs."
    work, rows = {}, []
    for name in ("torch, einops", "vit_course.vit"):
        command = [sys.executable, "-c", f"import {name}"]
        work[name] = functools.partial(subprocess.run, command, check=True)
    times = interleaved(work, max(9, args.rounds))
    for name, ratio in paired_ratios(times, "torch, einops").items():
        seconds = round(quartiles(times[name])[1], 2)
        rows.append({"import": name, "seconds": seconds} | columns(ratio))
    return rows


# ---- rollout -------------------------------------------------------------------------------------

def rollout_image_by_image(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """The way of github.com/jacobgil/vit-explain: hooks on timm's attention dropout, an image at a
    time, products in a loop."""
    maps, found, hooks = [], [], []
    for block in model.blocks:
        hook = block.attn.attn_drop.register_forward_hook(lambda m, i, out: found.append(out))
        hooks.append(hook)
    for image in images:
        found.clear()
        model(image[None])
        result = torch.eye(found[0].shape[-1])
        for weights in found:
            mixed = weights[0].mean(dim=0) + torch.eye(weights.shape[-1])
            result = mixed / mixed.sum(dim=-1, keepdim=True) @ result
        maps.append(result[0, 1:])
    for hook in hooks:
        hook.remove()
    return torch.stack(maps)


def ways_of_rollout() -> dict[str, Callable]:
    "Maps of 64 images by ViT-Ti/16: one by one, in batches of 8 (our default), and in one batch."
    from vit_course.pretrained import from_timm
    from vit_course.rollout import rollout_heatmap

    torch.manual_seed(0)
    theirs, images = timm(**SIZES["ViT-Ti/16"]).eval(), torch.rand(64, 3, 224, 224)
    ours = from_timm(theirs).eval()
    for block in theirs.blocks:
        block.attn.fused_attn = False  # else it gives no weights

    def in_batches():
        return rollout_heatmap(ours, images).flatten(1)

    def one_batch():
        return rollout_heatmap(ours, images, batch_size=len(images)).flatten(1)

    def one_by_one():
        with torch.inference_mode():
            return rollout_image_by_image(theirs, images)

    ours_of = {"vit_course, batches of 8": in_batches, "vit_course, one batch": one_batch}
    return {"one by one": one_by_one} | ours_of


def bench_rollout(args) -> list[dict]:
    "The ways as ratios to the first, after a look whether they give the same maps."
    work, rows = ways_of_rollout(), []
    one_by_one, *others = work.values()
    for threads in args.threads:
        torch.set_num_threads(threads)
        off = max((way() - one_by_one()).abs().max().item() for way in others)
        if off > 1e-4:
            raise RuntimeError(f"the ways differ by {off:.1e}: nothing to compare")
        # the comparison has warmed up all
        times = interleaved(work, max(5, args.rounds // 2), warm_up=0)
        for name, ratio in paired_ratios(times, "one by one").items():
            seconds = round(quartiles(times[name])[1], 2)
            rows.append({"threads": threads, "way": name, "seconds": seconds} | columns(ratio))
    return rows


# ---- the input -----------------------------------------------------------------------------------

# means and deviations of CIFAR-10's channels, for both sides
STATISTICS = [0.4914, 0.4822, 0.4465], [0.247, 0.2435, 0.2616]


def plain_transform():
    from torchvision import transforms as T
    crop = T.RandomResizedCrop(32, (0.8, 1.0), (0.9, 1.1))
    return T.Compose([T.RandomHorizontalFlip(), crop, T.ToTensor(), T.Normalize(*STATISTICS)])


def random_transform():
    "What our policy `rand_augment` does, too, an image at a time."
    from torchvision import transforms as T
    crop = T.RandomCrop(32, 4, padding_mode="reflect")
    before = [T.RandomHorizontalFlip(), crop, T.RandAugment(2, 9), T.ToTensor()]
    return T.Compose([*before, T.RandomErasing(0.25, value=0.5), T.Normalize(*STATISTICS)])


def bench_augmentation(args) -> list[dict]:
    "Images a second: PIL's transforms an image at a time, ours a batch at a time; one thread."
    from PIL import Image
    from vit_course.augment import POLICIES, as_floats
    from vit_course.training import ChannelNorm

    torch.set_num_threads(1)
    pixels = torch.randint(0, 256, (512, 3, 32, 32), dtype=torch.uint8)
    pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in pixels]
    parts = [pictures[i : i + 128] for i in range(0, 512, 128)]
    normalise = ChannelNorm(*STATISTICS)

    def one_by_one(transform):
        return [torch.stack([transform(picture) for picture in part]) for part in parts]

    def in_batches(policy):
        return [normalise(as_floats(policy(part))) for part in pixels.split(128)]

    transforms = {"flip_crop": plain_transform(), "rand_augment": random_transform()}
    work = {f"{name}, PIL": functools.partial(one_by_one, t) for name, t in transforms.items()}
    for name, make in POLICIES.items():
        work[f"{name}, batch"] = functools.partial(in_batches, make())
    times = interleaved(work, args.rounds)
    rates = {name: round(512 / quartiles(values)[1]) for name, values in times.items()}
    return [{"augmentation": name, "images_per_second": rate} for name, rate in rates.items()]


IN_EPOCH = 3200  # images of the 50,000 that are timed


def cifar(folder: str | None):
    "Bytes (N, 3, 32, 32) and labels."
    if folder is None:
        pixels = torch.randint(0, 256, (IN_EPOCH, 3, 32, 32), dtype=torch.uint8)
        return pixels, torch.randint(10, (IN_EPOCH,))
    from study import open_data
    train = open_data(folder).sets["train"]
    return train.images[:IN_EPOCH], train.labels[:IN_EPOCH]


class Pictures(torch.utils.data.Dataset):
    "The plain recipe's data set: each image as a picture, through PIL's transforms."

    def __init__(self, pixels: torch.Tensor, labels: torch.Tensor):
        self.arrays, self.labels = pixels.permute(0, 2, 3, 1).numpy(), labels
        self.transform = plain_transform()

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        from PIL import Image
        return self.transform(Image.fromarray(self.arrays[i])), int(self.labels[i])


def one_epoch(model, optimizer, loader, bf16: bool, prepare):
    for images, targets in loader:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = F.cross_entropy(model(prepare(images)), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def plain_epoch(pixels: torch.Tensor, labels: torch.Tensor, threads: int):
    "A call that trains timm's model for an epoch in the plain way."
    theirs = timm(**SIZES["assignment"], **TIMMS_DROPOUT).train()
    loader = torch.utils.data.DataLoader(
        Pictures(pixels, labels), 64, shuffle=True, drop_last=True,
        num_workers=threads, persistent_workers=True,
    )

    def run():
        optimizer = torch.optim.AdamW(theirs.parameters())
        one_epoch(theirs, optimizer, loader, False, lambda images: images)

    return run


def our_epoch(pixels: torch.Tensor, labels: torch.Tensor, patch_dropout=0.0, compiled=False):
    "A call that trains our model for an epoch in our way."
    from vit_course.augment import FlipCrop, as_floats
    from vit_course.data import ImageArrays
    from vit_course.optimizers import fused_adamw
    from vit_course.training import ChannelNorm

    ours = ViT(**SIZES["assignment"], **DROPOUT, patch_dropout=patch_dropout).train()
    if compiled:
        ours.compile()
    loader = torch.utils.data.DataLoader(
        ImageArrays(pixels, labels, 10), 64, shuffle=True, drop_last=True, collate_fn=lambda b: b
    )
    augment, normalise = FlipCrop(), ChannelNorm(*STATISTICS)

    def run():
        optimizer = fused_adamw([{"params": list(ours.parameters())}], 1e-3)
        one_epoch(ours, optimizer, loader, FAST_BF16, lambda x: normalise(as_floats(augment(x))))

    return run


PLAINLY = "plain: PIL, fp32, SDPA (timm)"
OURS = {  # the last two do less, on purpose
    "vit_course": {}, "vit_course, compiled": {"compiled": True},
    "vit_course, half of the patches": {"patch_dropout": 0.5},
    "vit_course, a quarter of the patches": {"patch_dropout": 0.75},
}
if not (shutil.which("g++") or shutil.which("clang++")):
    del OURS["vit_course, compiled"]  # torch.compile has nothing to translate with


def bench_epoch(args) -> list[dict]:
    """An epoch, data to optimizer, of the assignment's model with its dropouts: the plain recipe
    and the course's, on a part of it."""
    pixels, labels = cifar(args.data)
    rows = []
    for threads in args.threads:
        torch.set_num_threads(threads)
        work = {PLAINLY: plain_epoch(pixels, labels, threads)}
        work |= {name: our_epoch(pixels, labels, **more) for name, more in OURS.items()}
        # the first pass also starts the loading processes, and translates
        times = interleaved(work, 3, warm_up=1)
        for name, ratio in paired_ratios(times, PLAINLY).items():
            seconds = round(quartiles(times[name])[1] * 50000 / IN_EPOCH, 1)
            about = {"threads": threads, "dtype": dtype_of(FAST_BF16 and name != PLAINLY)}
            rows.append(about | {"recipe": name, "seconds_per_epoch": seconds} | columns(ratio))
    return rows


# ---- what came out -------------------------------------------------------------------------------

def table(rows: list[dict]) -> str:
    "Rows as a Markdown table."
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = [names, ["---"] * len(names)]
    lines += [[str(row.get(name, "")) for name in names] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def epoch_text(rows: list[dict]) -> str:
    "The table, and what its seconds are."
    return table(rows) + (f"\n\nSeconds for 50,000 images, from passes over {IN_EPOCH:,} of them, "
                          "loading processes already running, and compiled models translated.")


def faster_than_ours(rows: list[dict]) -> str:
    "A sentence about the peers that beat the one of ours that is built like them, in one case."
    peers = [r for r in rows if not r["model"].startswith("vit_course") and r["model"] != AGAIN]
    # of two equal models, one wins eight rounds of nine in one case of fifty
    names = ", ".join(r["model"] for r in peers if r["wins"] > 0.88) or "nobody"
    return f"**Faster than ours, in eight of nine rounds or more:** {names}."


def shown(row: dict) -> dict[str, str]:
    "What the table of a case says of a model."
    ratio = f"{row['ratio']:.3f} ({row['q1']:.3f} to {row['q3']:.3f})"
    return {"model": row["model"], "to timm": ratio, "ms": f"{row['ms']:.1f}"}


def models_text(rows: list[dict]) -> str:
    "For each case a table, the fastest first, and who is faster than ours; then what was compared."
    cases, parts = {}, []
    for row in rows:
        case = row["size"], row["threads"], row["work"], row["dtype"]
        cases.setdefault(case, []).append(row)
    for (size, threads, work, dtype), some in cases.items():
        some.sort(key=lambda row: row["ratio"])
        parts.append(f"### {size}, {work}, {dtype}, threads: {threads}")
        parts += [table([shown(row) for row in some]), faster_than_ours(some)]
    checked = dict.fromkeys((row["model"], row["checked"]) for row in rows)
    parts.append("What was compared before timing:")
    parts.append("\n".join(f"- {name}: {text}." for name, text in checked))
    return "\n\n".join(parts)


SECTIONS = {
    "models": (bench_models, models_text), "dropout": (bench_dropout, table),
    "memory": (bench_memory, table), "imports": (bench_imports, table),
    "rollout": (bench_rollout, table), "augmentation": (bench_augmentation, table),
    "epoch": (bench_epoch, epoch_text),
}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", choices=list(SECTIONS), default=list(SECTIONS))
    parser.add_argument("--threads", type=int, nargs="+", default=[2, 1])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--data", help="a folder that holds CIFAR-10")
    parser.add_argument("--memory-of", nargs=3, help=argparse.SUPPRESS)
    return parser.parse_args()


def main():
    args = parse_arguments()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    if args.memory_of:
        name, tokens, dtype = args.memory_of
        return print(memory_of(name, int(tokens), dtype == "bf16"))
    target = RESULTS / f"speed{KIND}.json"
    for name in args.only:
        print(f"== {name}", flush=True)
        bench, text = SECTIONS[name]
        rows = bench(args)
        found = with_section(target, name, rows)
        target.parent.mkdir(exist_ok=True)
        with written_whole(target) as part:
            part.write_text(json.dumps(found, indent=1) + "\n")
        print(text(rows), flush=True)
        with written_whole(target.with_suffix(".md")) as part:
            part.write_text(report(found))


def with_section(target: Path, name: str, rows: list[dict]) -> dict:
    "What stands in the file, where another command may have written meanwhile, with new rows."
    about = machine("timm", "vit-pytorch", "transformers")
    found = json.loads(target.read_text()) if target.exists() else {"sections": {}}
    today = datetime.date.today().isoformat()
    found["sections"][name] = {"date": today, "machine": about, "rows": rows}
    return found


def report(found: dict) -> str:
    "All sections as Markdown."
    parts = ["# Speed, as `python benchmarks/speed.py` measured it"]
    for name, section in found["sections"].items():
        about = section["machine"]
        versions = ", ".join(f"{k} {v}" for k, v in about["versions"].items())
        parts.append(f"## {name}")
        parts.append(f"{section['date']}; {about['processor']}, {about['cpu_capability']}, "
                     f"instructions for bfloat16: {'yes' if about['bf16_instructions'] else 'no'}; "
                     f"Python {about['python']}, {versions}.")
        parts.append(SECTIONS[name][1](section["rows"]))
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    main()
