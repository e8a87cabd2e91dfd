import json
import math
import os
from importlib.resources import files
from pathlib import Path

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

from vit_course.vit import ViT

__all__ = ["decay_groups", "cosine_schedule", "step_schedule", "ClassifierSteps", "LitViT", "EpochSeed", "save_model", "load_model"]


def decay_groups(
    model: nn.Module,
    weight_decay: float,  # of the matrices
) -> list[dict]:  # parameter groups for the optimizer
    "Decay on weight matrices only: none on biases, norms, tokens and positions (as in timm)."
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    matrices = [n for n, p in parameters.items() if n.endswith("weight") and p.ndim > 1]
    return [
        {"params": [parameters[n] for n in matrices], "weight_decay": weight_decay},
        {"params": [p for n, p in parameters.items() if n not in matrices], "weight_decay": 0.0},
    ]


def cosine_schedule(
    progress: float,  # share of all steps that is done
    warmup: float = 0.05,  # share of all steps over which the rate rises
) -> float:  # factor on the learning rate
    "A linear rise, then half a cosine down to 0 (Loshchilov & Hutter 2017)."
    if progress < warmup:
        return progress / warmup
    return 0.5 * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup)))


def step_schedule(
    progress: float,  # share of all steps that is done
    milestones: tuple[float, ...] = (100 / 160, 150 / 160),  # shares of all steps
    gamma: float = 0.1,  # factor at each milestone
) -> float:  # factor on the learning rate
    "Times `gamma` at each milestone."
    return gamma ** sum(progress >= m for m in milestones)


def make_schedule(name: str, warmup: float, milestones: tuple[float, ...], gamma: float):
    "The schedule of a name, as a function of the share of all steps that is done."
    schedules = {
        "cosine": lambda progress: cosine_schedule(progress, warmup),
        "step": lambda progress: step_schedule(progress, milestones, gamma),
        "constant": lambda progress: 1.0,
    }
    if name not in schedules:
        raise ValueError(f"schedule={name!r} is not known: use one of {sorted(schedules)}")
    return schedules[name]


class ClassifierSteps(pl.LightningModule):
    "What a classifier does with a batch: loss, metrics, logging. Sub-classes give `forward` and `hparams`."

    def add_metrics(self, num_classes: int):
        self.accuracy = nn.ModuleDict(
            {f"{stage}_acc": MulticlassAccuracy(num_classes, average="micro") for stage in ("train", "val", "test")}
        )

    def _step(self, batch: tuple[Tensor, Tensor], stage: str) -> Tensor:
        images, labels = batch
        logits = self(images)
        check_targets(labels, logits)
        smoothing = self.hparams.label_smoothing if stage == "train" else 0.0
        loss = F.cross_entropy(logits, labels, label_smoothing=smoothing)
        accuracy = self.accuracy[f"{stage}_acc"]
        accuracy(logits, labels)
        options = {"on_step": False, "on_epoch": True, "prog_bar": True, "batch_size": len(labels)}
        self.log_dict({f"{stage}_loss": loss, f"{stage}_acc": accuracy}, **options)
        return loss

    def training_step(self, batch, batch_idx):
        return self._step(batch, "train")

    def validation_step(self, batch, batch_idx):
        self._step(batch, "val")

    def test_step(self, batch, batch_idx):
        self._step(batch, "test")

    def predict_step(self, batch, batch_idx):
        images = batch[0] if isinstance(batch, (tuple, list)) else batch
        return self(images).softmax(dim=-1)


def check_targets(labels: Tensor, logits: Tensor) -> None:
    "On the CPU, where it costs nothing: labels must be classes that the model has."
    if labels.device.type == "cpu" and not 0 <= int(labels.min()) <= int(labels.max()) < logits.shape[-1]:
        raise ValueError(
            f"labels must lie in 0..{logits.shape[-1] - 1}, since the model has {logits.shape[-1]} classes; "
            f"this batch's range from {int(labels.min())} to {int(labels.max())}"
        )


class LitViT(ClassifierSteps):
    "A `ViT` with its normalisation, loss, metrics, optimizer and schedule; takes images in 0..1."

    def __init__(
        self,
        lr: float = 1e-3,  # peak learning rate
        weight_decay: float = 0.05,  # on matrices only
        betas: tuple[float, float] = (0.9, 0.999),  # AdamW's two memories
        schedule: str = "cosine",  # "cosine", "step" or "constant"
        warmup: float = 0.05,  # "cosine": share of all steps over which the rate rises
        milestones: tuple[float, ...] = (100 / 160, 150 / 160),  # "step": shares of all steps
        gamma: float = 0.1,  # "step": factor at each milestone
        label_smoothing: float = 0.0,  # share of the target spread over all classes
        mean: list[float] | None = None,  # of each channel; None: 0
        std: list[float] | None = None,  # of each channel; None: 1
        classes: list[str] | None = None,  # names of the classes
        **vit,  # as `ViT`'s
    ):
        super().__init__()
        self.save_hyperparameters()
        self.factor = make_schedule(schedule, warmup, milestones, gamma)
        self.vit = ViT(**vit)
        self.add_metrics(self.vit.num_classes)
        self.register_buffer("mean", torch.tensor(mean or [0.0]).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std or [1.0]).view(-1, 1, 1), persistent=False)

    def normalize(self, images: Tensor) -> Tensor:
        return (images - self.mean) / self.std

    def forward(self, images: Tensor) -> Tensor:  # (B, C, H, W) in 0..1 -> (B, num_classes)
        return self.vit(self.normalize(images))

    def configure_optimizers(self):
        groups = decay_groups(self, self.hparams.weight_decay)
        optimizer = torch.optim.AdamW(groups, lr=self.hparams.lr, betas=tuple(self.hparams.betas))
        steps = max(1, self.trainer.estimated_stepping_batches)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: self.factor(step / steps))
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        check_shapes(checkpoint["state_dict"], self.state_dict())


def check_shapes(loaded: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    "Raise `ValueError` where a checkpoint is another model's, naming what differs."
    differing = [
        f"{name}: {tuple(loaded[name].shape) if name in loaded else 'missing'} in the checkpoint, "
        f"{tuple(wanted[name].shape) if name in wanted else 'missing'} in the model"
        for name in sorted(loaded.keys() | wanted.keys())
        if name not in loaded or name not in wanted or loaded[name].shape != wanted[name].shape
    ]
    if differing:
        raise ValueError(
            "the checkpoint is another model's; build the model with the checkpoint's options. "
            f"{len(differing)} parameters differ, the first: " + "; ".join(differing[:3])
        )


class EpochSeed(pl.Callback):
    "Seeds each epoch by the run's seed and the epoch, so that a resumed run draws the same numbers."

    def __init__(self, seed: int | None = None):  # None: the one given to `seed_everything`
        self.seed = seed

    def on_train_epoch_start(self, trainer, module):
        seed = os.environ.get("PL_GLOBAL_SEED") if self.seed is None else self.seed
        if seed is not None:
            torch.manual_seed((int(seed) * 1_000_003 + trainer.current_epoch) * trainer.world_size + trainer.global_rank)


def save_model(
    model: LitViT,
    path: str | Path,  # ends in .safetensors; must not exist
) -> None:
    "Weights and options in one safetensors file, written whole or not at all."
    path = Path(path)
    if path.exists():
        raise FileExistsError(f"{path} exists already: choose another name, nothing is overwritten")
    options = {k: v for k, v in model.hparams.items() if not k.startswith("_")}
    temporary = path.with_name(path.name + ".part")
    weights = {name: value.contiguous() for name, value in model.vit.state_dict().items()}
    save_file(weights, temporary, metadata={"options": json.dumps(options)})
    temporary.replace(path)


def load_model(
    path: str | Path,  # a .safetensors or .ckpt file, or the name of a shipped model, such as "fashion"
) -> LitViT:  # in eval mode
    "A trained model with its options; nothing is unpickled."
    shipped = files("vit_course") / "weights" / f"{path}.safetensors"
    path = Path(str(shipped)) if shipped.is_file() else Path(path)
    if not path.is_file():
        names = sorted(f.name.removesuffix(".safetensors") for f in shipped.parent.iterdir() if f.name.endswith(".safetensors"))
        raise FileNotFoundError(f"no file {path}; shipped models are {names}")
    if path.suffix == ".ckpt":
        return LitViT.load_from_checkpoint(path, map_location="cpu", weights_only=True).eval()
    with safe_open(path, framework="pt") as file:
        model = LitViT(**json.loads(file.metadata()["options"]))
        weights = {name: file.get_tensor(name) for name in file.keys()}
    check_shapes(weights, model.vit.state_dict())
    model.vit.load_state_dict(weights)
    return model.eval()
