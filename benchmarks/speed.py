#!/usr/bin/env python3
"""How fast is the course's ViT, and its training, next to what a learner would use instead?

    python benchmarks/speed.py [--only SECTION ...] [--threads 2 1] [--rounds 9] [--data FOLDER]

Sections: models (a training step and inference, against six peers), dropout, memory, imports, rollout, augmentation, epoch (against the
plain recipe). bfloat16 is measured where the processor has instructions for it.
All that is compared runs in turns in one process (imports: in fresh processes in turns; memory: in fresh processes), with the number of threads fixed.
Ratios are of the same round, given as median and quartiles. FOLDER holds CIFAR-10, for `epoch`; without it, images of noise of the
same size are used, which take the same time. Writes benchmarks/results/speed.json and speed.md; or, on a processor without instructions
for bfloat16, speed_without_bf16.json and .md; or, on one whose instructions for it are slower than those for 32 bits,
speed_slow_bf16.json and .md. Sections that are not run keep their rows.
"""
import argparse
import datetime
import json
import logging
import platform
import subprocess
import sys
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from timing import interleaved, kind_of_processor, machine, paired_ratios, quartiles
from torch import nn

from vit_course.attention import cpu_has_bf16
from vit_course.vit import ViT

RESULTS = Path(__file__).parent / "results"
SIZES = {
    "assignment": {"img_size": 32, "patch_size": 4, "num_classes": 10, "embed_dim": 256, "depth": 6, "num_heads": 8, "mlp_ratio": 2.0},
    "ViT-Ti/16": {"img_size": 224, "patch_size": 16, "num_classes": 1000, "embed_dim": 192, "depth": 12, "num_heads": 3},
}
BATCH = {"assignment": 64, "ViT-Ti/16": 8}
DROPOUT = {"dropout": 0.2, "attn_dropout": 0.2}  # the assignment's
TIMMS_DROPOUT = {"pos_drop_rate": 0.2, "proj_drop_rate": 0.2, "attn_drop_rate": 0.2}
FORMATS = (True, False) if cpu_has_bf16() else (False,)  # bf16 or not
KIND = kind_of_processor()  # in the names of the results
FAST_BF16 = KIND == ""  # what `vit-course fit` asks, too


# ---- models -------------------------------------------------------------------------------------------------------------

class TorchViT(nn.Module):
    "`nn.TransformerEncoder` with what a ViT needs around it."

    def __init__(self, img_size, patch_size, num_classes, embed_dim, depth, num_heads, mlp_ratio=4.0):
        super().__init__()
        self.cut = nn.Conv2d(3, embed_dim, patch_size, patch_size)
        self.token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.positions = nn.Parameter(0.02 * torch.randn(1, (img_size // patch_size) ** 2 + 1, embed_dim))
        layer = nn.TransformerEncoderLayer(
            embed_dim, num_heads, int(mlp_ratio * embed_dim), 0.0, "gelu", layer_norm_eps=1e-6, batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, depth, nn.LayerNorm(embed_dim, eps=1e-6), enable_nested_tensor=False)
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
    model = VisionTransformer(img_size, patch_size, depth, num_heads, embed_dim, int(mlp_ratio * embed_dim), num_classes=num_classes)
    nn.init.normal_(model.heads.head.weight, std=0.02)  # its own start is 0, which would make every comparison equal
    return model


def huggingface(img_size, patch_size, num_classes, embed_dim, depth, num_heads, mlp_ratio=4.0):
    from transformers import ViTConfig, ViTForImageClassification
    config = ViTConfig(
        image_size=img_size, patch_size=patch_size, num_labels=num_classes, hidden_size=embed_dim, num_hidden_layers=depth,
        num_attention_heads=num_heads, intermediate_size=int(mlp_ratio * embed_dim), layer_norm_eps=1e-6,
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
    options = {"image_size": s["img_size"], "patch_size": s["patch_size"], "num_classes": s["num_classes"], "dim": s["embed_dim"]}
    options |= {"depth": s["depth"], "heads": s["num_heads"], "mlp_dim": int(s.get("mlp_ratio", 4.0) * s["embed_dim"])}
    return kind(**options, dim_head=s["embed_dim"] // s["num_heads"], **more)


def vit_pytorch(**s):
    from vit_pytorch import ViT as Theirs
    return _vit_pytorch(Theirs, s)


def simple_vit(**s):
    from vit_pytorch import SimpleViT
    return _vit_pytorch(SimpleViT, s)


def copied_into_torch(ours: ViT, sizes: dict) -> TorchViT:
    "nn.TransformerEncoder with our weights."
    theirs = TorchViT(**sizes)
    pairs = {theirs.cut: ours.tokenizer.stem.proj, theirs.encoder.norm: ours.norm, theirs.head: ours.head}
    for layer, block in zip(theirs.encoder.layers, ours.encoder.blocks):
        pairs |= {layer.norm1: block.norm1, layer.norm2: block.norm2, layer.linear1: block.mlp.fc1, layer.linear2: block.mlp.fc2}
        pairs |= {layer.self_attn.out_proj: block.attn.proj}
        layer.self_attn.in_proj_weight.data, layer.self_attn.in_proj_bias.data = block.attn.qkv.weight.data, block.attn.qkv.bias.data
    for to, source in pairs.items():
        to.load_state_dict(source.state_dict())
    theirs.token.data, theirs.positions.data = ours.class_token.data, ours.positions.positions.data
    return theirs


AGAIN = "timm, once more"  # how far apart two equal models may come out


def far_in_bf16(ours: nn.Module, theirs: nn.Module, images: torch.Tensor) -> float:
    "How far two models' outputs lie apart in bfloat16, as a share of the outputs' own deviation (root of mean squares)."
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        mine, others = ours(images), theirs(images)
    others = getattr(others, "logits", others).float()
    return ((mine.float() - others).square().mean().sqrt() / others.std()).item()


def contestants(sizes: dict) -> tuple[dict[str, nn.Module], dict[str, str]]:
    "Everybody's model at one size, and what was found when its outputs were compared with ours."
    from vit_course.pretrained import from_huggingface, from_timm, from_torchvision

    torch.manual_seed(0)
    ours = ViT(**sizes).eval()
    nn.init.normal_(ours.class_token, std=0.02)
    models = {"vit_course": ours, "timm": timm(**sizes), "torchvision": torchvision(**sizes), "Hugging Face": huggingface(**sizes)}
    models["nn.TransformerEncoder"] = copied_into_torch(ours, sizes)
    readers = {"timm": from_timm, "torchvision": from_torchvision, "Hugging Face": from_huggingface}
    images, checked = torch.rand(2, 3, sizes["img_size"], sizes["img_size"]), {"vit_course": "ours, with a class token"}
    for name, model in list(models.items())[1:]:
        same = readers[name](model.eval()) if name in readers else ours
        with torch.no_grad():
            theirs = model.eval()(images)
            off = (same.eval()(images) - getattr(theirs, "logits", theirs)).abs().max().item()
        if off > 1e-4:
            raise RuntimeError(f"{name} and vit_course differ by {off:.1e} with the same weights: nothing to compare")
        checked[name] = "the same outputs to 1e-4 with the same weights"
        if FORMATS[0] and (off := far_in_bf16(same, model, images)) > 0.05:
            raise RuntimeError(f"{name} and vit_course differ by {off:.2f} of a logit's deviation in bfloat16: nothing to compare")
    models["Hugging Face"] = Logits(models["Hugging Face"])
    models |= {"vit_course, mean pooling": ViT(**sizes, pool="mean"), "vit-pytorch ViT": vit_pytorch(**sizes)}
    models |= {"vit-pytorch SimpleViT": simple_vit(**sizes), AGAIN: timm(**sizes)}
    other = "another architecture of the same size: "
    return models, checked | {
        "vit_course, mean pooling": "ours, without a class token, like SimpleViT",
        AGAIN: "a second model of timm's; its distance from 1 is what chance can do",
        "vit-pytorch ViT": other + "norms around the patch embedding, no biases in attention",
        "vit-pytorch SimpleViT": other + "no class token, fixed positions, no biases in attention",
    }


def training_step(model: nn.Module, size: str, bf16: bool):
    "A whole step: forward, loss, backward, fused AdamW."
    sizes, model = SIZES[size], model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    images, labels = torch.rand(BATCH[size], 3, *[sizes["img_size"]] * 2), torch.randint(sizes["num_classes"], (BATCH[size],))

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


def bench_models(args) -> list[dict]:
    "Every contestant's training step and inference as ratios to timm's."
    rows = []
    for size, sizes in SIZES.items():
        models, checked = contestants(sizes)
        for threads in args.threads:
            torch.set_num_threads(threads)
            for work, make in {"training": training_step, "inference": inference}.items():
                for bf16 in FORMATS:
                    times = interleaved({name: make(m.train(work == "training"), size, bf16) for name, m in models.items()}, args.rounds)
                    case = {"size": size, "threads": threads, "work": work, "dtype": "bf16" if bf16 else "fp32"}
                    for name, ratio in paired_ratios(times, "timm").items():
                        wins = sum(a < b for a, b in zip(times[name], times[rival(name)])) / args.rounds  # in the same round
                        values = dict(zip(("q1", "ratio", "q3"), ratio)) | {"ms": 1e3 * quartiles(times[name])[1], "wins": wins}
                        rows.append(case | {"model": name, "checked": checked[name]} | {k: round(v, 4) for k, v in values.items()})
                    print(*case.values(), f"ours {[r for r in rows if r['model'] == 'vit_course'][-1]['ratio']:.3f} of timm", flush=True)
    return rows


def bench_dropout(args) -> list[dict]:
    "A training step of the assignment's model with its dropouts: PyTorch's, ours, and without."
    from vit_course.dropout import CheapDropout

    sizes, rows = SIZES["assignment"], []
    models = {"no dropout": ViT(**sizes), "vit_course": ViT(**sizes, **DROPOUT), "nn.Dropout": ViT(**sizes, **DROPOUT)}
    for module in list(models["nn.Dropout"].modules()):
        for name, part in module.named_children():
            if isinstance(part, CheapDropout):
                setattr(module, name, nn.Dropout(part.p))
            if hasattr(part, "impl"):
                part.impl = "sdpa"  # with PyTorch's dropout on the weights
    models["timm"] = timm(**sizes, **TIMMS_DROPOUT)
    for threads in args.threads:
        torch.set_num_threads(threads)
        for bf16 in FORMATS:
            times = interleaved({name: training_step(m, "assignment", bf16) for name, m in models.items()}, args.rounds)
            for name, ratio in paired_ratios(times, "no dropout").items():
                rows.append({"threads": threads, "dtype": "bf16" if bf16 else "fp32", "model": name, "ms": round(1e3 * quartiles(times[name])[1])}
                            | {k: round(v, 3) for k, v in zip(("q1", "ratio", "q3"), ratio)})
    return rows


# ---- in fresh processes -------------------------------------------------------------------------------------------------

MEMORY_SIZES = {  # tokens -> batch, sizes
    64: (32, SIZES["assignment"]),
    197: (8, SIZES["ViT-Ti/16"]),
    577: (2, SIZES["ViT-Ti/16"] | {"img_size": 384}),
}


def memory_of(name: str, tokens: int, bf16: bool) -> float:
    "Growth of this process's peak resident memory by two training steps, in MiB."
    batch, sizes = MEMORY_SIZES[tokens]
    pool = {"pool": "mean"} if tokens == 64 else {}
    makers = {
        "vit_course": lambda: ViT(**sizes, **pool), "with checkpointing": lambda: ViT(**sizes, **pool, grad_checkpointing=True),
        "timm": lambda: timm(**sizes, **({"class_token": False, "global_pool": "avg"} if pool else {})),
        "SimpleViT": lambda: simple_vit(**sizes),
    }
    torch.set_num_threads(1)
    model = makers[name]().train()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    images, labels = torch.rand(batch, 3, *[sizes["img_size"]] * 2), torch.randint(sizes["num_classes"], (batch,))
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

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if platform.system() == "Darwin" else 2**10)


def bench_memory(args) -> list[dict]:
    rows = []
    for tokens in MEMORY_SIZES:
        for dtype in ("bf16", "fp32")[not FORMATS[0] :]:
            for name in ("vit_course", "with checkpointing", "timm", "SimpleViT"):
                command = [sys.executable, __file__, "--memory-of", name, str(tokens), dtype]
                found = [float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1]) for _ in range(3)]
                q1, mib, q3 = map(round, quartiles(found))
                rows.append({"tokens": tokens, "batch": MEMORY_SIZES[tokens][0], "dtype": dtype, "model": name, "mib": mib, "q1": q1, "q3": q3})
    return rows


def bench_imports(args) -> list[dict]:
    "`import vit_course.vit` against what it needs."
    lines = {"torch, einops": "import torch, einops", "vit_course.vit": "import vit_course.vit"}
    work = {name: lambda line=line: subprocess.run([sys.executable, "-c", line], check=True) for name, line in lines.items()}
    times = interleaved(work, max(9, args.rounds))
    ratios = paired_ratios(times, "torch, einops")
    return [
        {"import": name, "seconds": round(quartiles(times[name])[1], 2)} | {k: round(v, 3) for k, v in zip(("q1", "ratio", "q3"), ratios[name])}
        for name in lines
    ]


# ---- rollout --------------------------------------------------------------------------------------------------------------

def rollout_image_by_image(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    "The way of github.com/jacobgil/vit-explain: hooks on timm's attention dropout, an image at a time, products in a loop."
    maps, found = [], []
    hooks = [block.attn.attn_drop.register_forward_hook(lambda m, i, out: found.append(out)) for block in model.blocks]
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


def bench_rollout(args) -> list[dict]:
    "Maps of 64 images by ViT-Ti/16: one by one, in batches of 8 (our default), and in one batch."
    from vit_course.pretrained import from_timm
    from vit_course.rollout import rollout_heatmap

    torch.manual_seed(0)
    theirs, images, rows = timm(**SIZES["ViT-Ti/16"]).eval(), torch.rand(64, 3, 224, 224), []
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

    work = {"one by one": one_by_one, "vit_course, batches of 8": in_batches, "vit_course, one batch": one_batch}
    for threads in args.threads:
        torch.set_num_threads(threads)
        off = max((way() - one_by_one()).abs().max().item() for way in (in_batches, one_batch))
        if off > 1e-4:
            raise RuntimeError(f"the ways differ by {off:.1e}: nothing to compare")
        times = interleaved(work, max(5, args.rounds // 2), warm_up=0)  # the comparison has warmed up all
        for name, ratio in paired_ratios(times, "one by one").items():
            rows.append({"threads": threads, "way": name, "seconds": round(quartiles(times[name])[1], 2)}
                        | {k: round(v, 3) for k, v in zip(("q1", "ratio", "q3"), ratio)})
    return rows


# ---- the input ------------------------------------------------------------------------------------------------------------

STATISTICS = [0.4914, 0.4822, 0.4465], [0.247, 0.2435, 0.2616]  # means and deviations of CIFAR-10's channels, for both sides


def plain_transform():
    from torchvision import transforms as T
    return T.Compose([T.RandomHorizontalFlip(), T.RandomResizedCrop(32, (0.8, 1.0), (0.9, 1.1)), T.ToTensor(), T.Normalize(*STATISTICS)])


def bench_augmentation(args) -> list[dict]:
    "Images a second: PIL's transforms an image at a time, ours a batch at a time; one thread."
    from PIL import Image
    from torchvision import transforms as T
    from vit_course.augment import POLICIES, as_floats
    from vit_course.training import ChannelNorm

    torch.set_num_threads(1)
    pixels = torch.randint(0, 256, (512, 3, 32, 32), dtype=torch.uint8)
    pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in pixels]
    # what our policy of this name does, too, an image at a time
    steps = [T.RandomHorizontalFlip(), T.RandomCrop(32, 4, padding_mode="reflect"), T.RandAugment(2, 9), T.ToTensor(), T.RandomErasing(0.25, value=0.5)]
    plain, random, normalise = plain_transform(), T.Compose([*steps, T.Normalize(*STATISTICS)]), ChannelNorm(*STATISTICS)
    parts = [pictures[i : i + 128] for i in range(0, 512, 128)]
    work = {"flip_crop, PIL": lambda: [torch.stack([plain(p) for p in part]) for part in parts]}
    work |= {"rand_augment, PIL": lambda: [torch.stack([random(p) for p in part]) for part in parts]}
    work |= {f"{name}, batch": lambda f=make(): [normalise(as_floats(f(part))) for part in pixels.split(128)] for name, make in POLICIES.items()}
    times = interleaved(work, args.rounds)
    return [{"augmentation": name, "images_per_second": round(512 / quartiles(values)[1])} for name, values in times.items()]


IN_EPOCH = 3200  # images of the 50,000 that are timed


def cifar(folder: str | None):
    "Bytes (N, 3, 32, 32) and labels."
    if folder is None:
        return torch.randint(0, 256, (IN_EPOCH, 3, 32, 32), dtype=torch.uint8), torch.randint(10, (IN_EPOCH,))
    from study import open_data
    train = open_data(folder).sets["train"]
    return train.images[:IN_EPOCH], train.labels[:IN_EPOCH]


class Pictures(torch.utils.data.Dataset):
    "The plain recipe's data set: each image as a picture, through PIL's transforms."

    def __init__(self, pixels: torch.Tensor, labels: torch.Tensor):
        self.arrays, self.labels, self.transform = pixels.permute(0, 2, 3, 1).numpy(), labels, plain_transform()

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        from PIL import Image
        return self.transform(Image.fromarray(self.arrays[i])), int(self.labels[i])


def bench_epoch(args) -> list[dict]:
    "An epoch, data to optimizer, of the assignment's model with its dropouts: the plain recipe and the course's, on a part of it."
    from vit_course.augment import FlipCrop, as_floats
    from vit_course.data import ImageArrays
    from vit_course.optimizers import fused_adamw
    from vit_course.training import ChannelNorm

    pixels, labels = cifar(args.data)
    rows = []

    def run(model, optimizer, loader, bf16, prepare):
        for images, targets in loader:
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                loss = F.cross_entropy(model(prepare(images)), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    for threads in args.threads:
        torch.set_num_threads(threads)
        theirs = timm(**SIZES["assignment"], **TIMMS_DROPOUT).train()
        loader = torch.utils.data.DataLoader(Pictures(pixels, labels), 64, shuffle=True, drop_last=True, num_workers=threads, persistent_workers=True)
        fast = torch.utils.data.DataLoader(ImageArrays(pixels, labels, 10), 64, shuffle=True, drop_last=True, collate_fn=lambda b: b)
        augment, normalise, plainly = FlipCrop(), ChannelNorm(*STATISTICS), "plain: PIL, fp32, SDPA (timm)"
        work = {
            plainly: lambda: run(theirs, torch.optim.AdamW(theirs.parameters()), loader, False, lambda x: x),
        }
        rates = {"vit_course": 0.0, "vit_course, half of the patches": 0.5, "vit_course, a quarter of the patches": 0.75}
        for name, rate in rates.items():  # all but the first do less, on purpose
            ours = ViT(**SIZES["assignment"], **DROPOUT, patch_dropout=rate).train()
            work[name] = lambda ours=ours: run(ours, fused_adamw([{"params": list(ours.parameters())}], 1e-3), fast, FAST_BF16,
                                               lambda x: normalise(as_floats(augment(x))))
        times = interleaved(work, 3, warm_up=1)  # the first pass also starts the loading processes
        for name, ratio in paired_ratios(times, plainly).items():
            seconds = quartiles(times[name])[1] * 50000 / IN_EPOCH
            rows.append({"threads": threads, "dtype": "bf16" if FAST_BF16 and name != plainly else "fp32", "recipe": name,
                         "seconds_per_epoch": round(seconds, 1)} | {k: round(v, 3) for k, v in zip(("q1", "ratio", "q3"), ratio)})
    return rows


# ---- what came out ----------------------------------------------------------------------------------------------------------

def table(rows: list[dict]) -> str:
    "Rows as a Markdown table."
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = [names, ["---"] * len(names), *[[str(row.get(name, "")) for name in names] for row in rows]]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def epoch_text(rows: list[dict]) -> str:
    "The table, and what its seconds are."
    return table(rows) + f"\n\nSeconds for 50,000 images, from passes over {IN_EPOCH:,} of them, loading processes already running."


def models_text(rows: list[dict]) -> str:
    "A table for each case, the fastest first, and a sentence for peers that beat the one of ours that is built like them."
    parts = []
    for case in dict.fromkeys((row["size"], row["threads"], row["work"], row["dtype"]) for row in rows):
        some = sorted((r for r in rows if (r["size"], r["threads"], r["work"], r["dtype"]) == case), key=lambda r: r["ratio"])
        peers = [r for r in some if not r["model"].startswith("vit_course") and r["model"] != AGAIN]
        if "wins" in some[0]:  # of two equal models, one wins eight rounds of nine in one case of fifty
            rule, faster = "in at least eight rounds of nine", [r["model"] for r in peers if r["wins"] > 0.88]
        else:  # measured by an earlier version, which kept no rounds
            q1, q3 = ({r["model"]: r[name] for r in some} for name in ("q1", "q3"))
            rule, faster = "beyond the quartiles", [r["model"] for r in peers if q3[r["model"]] < q1[rival(r["model"])]]
        shown = [{"model": r["model"], "to timm": f"{r['ratio']:.3f} ({r['q1']:.3f} to {r['q3']:.3f})", "ms": f"{r['ms']:.1f}"} for r in some]
        size, threads, work, dtype = case
        parts += [f"### {size}, {work}, {dtype}, threads: {threads}", table(shown)]
        parts.append(f"**Faster than ours, {rule}:** " + (", ".join(faster) or "nobody") + ".")
    checked = dict.fromkeys((row["model"], row["checked"]) for row in rows)
    return "\n\n".join(parts + ["What was compared before timing:", "\n".join(f"- {name}: {text}." for name, text in checked)])


SECTIONS = {
    "models": (bench_models, models_text), "dropout": (bench_dropout, table), "memory": (bench_memory, table), "imports": (bench_imports, table),
    "rollout": (bench_rollout, table), "augmentation": (bench_augmentation, table), "epoch": (bench_epoch, epoch_text),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", choices=list(SECTIONS), default=list(SECTIONS))
    parser.add_argument("--threads", type=int, nargs="+", default=[2, 1])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--data", help="a folder that holds CIFAR-10")
    parser.add_argument("--memory-of", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    if args.memory_of:
        return print(memory_of(args.memory_of[0], int(args.memory_of[1]), args.memory_of[2] == "bf16"))
    target = RESULTS / f"speed{KIND}.json"
    for name in args.only:
        print(f"== {name}", flush=True)
        rows = SECTIONS[name][0](args)
        about = machine("timm", "vit-pytorch", "transformers")
        found = json.loads(target.read_text()) if target.exists() else {"sections": {}}  # another command may have written, too
        found["sections"][name] = {"date": datetime.date.today().isoformat(), "machine": about, "rows": rows}
        target.parent.mkdir(exist_ok=True)
        target.write_text(json.dumps(found, indent=1) + "\n")
        text = SECTIONS[name][1](rows)
        print(text, flush=True)
        target.with_suffix(".md").write_text(report(found))


def report(found: dict) -> str:
    "All sections as Markdown."
    parts = ["# Speed, as `python benchmarks/speed.py` measured it"]
    for name, section in found["sections"].items():
        about = section["machine"]
        versions = ", ".join(f"{k} {v}" for k, v in about["versions"].items())
        parts += [f"## {name}", f"{section['date']}; {about['processor']}, {about['cpu_capability']}, instructions for bfloat16: "
                  f"{'yes' if about['bf16_instructions'] else 'no'}; Python {about['python']}, {versions}.", SECTIONS[name][1](section["rows"])]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    main()
