"""Distilled models and losses of other libraries against ours; the teacher frozen and never saved;
what looks inside a ViT works on two tokens, too."""
import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from conftest import transformers
from test_pretrained import close, randomise
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from vit_course.distillation import (
    DistilledViT, LitDistilled, distillation_loss, from_timm_distilled, hard_distillation_loss,
    soft_distillation_loss)
from vit_course.interactive import explorer_data
from vit_course.pretrained import fill, from_timm, join_qkv, rename
from vit_course.rollout import attention_rollout, capture_attention, rollout_heatmap, run_from
from vit_course.sources import HUGGINGFACE
from vit_course.vit import ViT

SMALL = dict(img_size=(24, 32), patch_size=8, embed_dim=24, depth=2, num_heads=3, num_classes=7)
STUDENT = SMALL | {"img_size": (8, 12), "patch_size": 4, "in_chans": 1, "warmup": 0.0}


def timm_model(**options):
    deit = pytest.importorskip("timm.models.deit")
    return randomise(deit.VisionTransformerDistilled(**SMALL | options))


@pytest.mark.parametrize("options", [
    {}, dict(init_values=0.1), dict(qkv_bias=False), dict(in_chans=1), dict(act_layer="relu"),
    dict(mlp_ratio=2.0), dict(norm_layer=lambda d, **k: nn.LayerNorm(d, eps=0.1)),
], ids=["plain", "layer scale", "no bias", "one channel", "ReLU", "narrow MLP", "eps"])
def test_equal_logits_with_timm(options):
    theirs = timm_model(**options)
    ours, images = from_timm_distilled(theirs), torch.randn(2, options.get("in_chans", 3), 24, 32)
    assert isinstance(ours, DistilledViT) and not ours.training
    with torch.no_grad():
        close(ours(images), theirs(images))
        close(ours.forward_features(images), theirs.forward_features(images))
        theirs.set_distilled_training(True)
        for mine, wanted in zip(ours.train()(images), theirs.train()(images), strict=True):
            close(mine, wanted)


def test_equal_logits_with_a_published_shape():
    timm = pytest.importorskip("timm")
    theirs = randomise(timm.create_model("deit_tiny_distilled_patch16_224", depth=2))
    ours, images = from_timm_distilled(theirs.state_dict()), torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        close(ours(images), theirs(images))


def test_weights_of_the_other_kind_are_refused():
    timm = pytest.importorskip("timm.models.vision_transformer")
    with pytest.raises(ValueError, match="use from_timm"):
        from_timm_distilled(timm.VisionTransformer(**SMALL))
    with pytest.raises(ValueError, match="a distillation token"):
        from_timm(timm_model())


def test_equal_logits_with_hugging_face():
    library = transformers()
    config = library.DeiTConfig(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=96,
        image_size=(24, 32), patch_size=8, num_labels=7)
    theirs = randomise(library.DeiTForImageClassificationWithTeacher(config))
    rules = [(r"deit\.embeddings\.distillation_token", "dist_token"),
             (r"distillation_classifier\.(.+)", r"head_dist.\1"),
             (r"cls_classifier\.(.+)", r"head.\1"), *HUGGINGFACE]
    weights = join_qkv(rename(theirs.state_dict(), rules))
    ours = fill(DistilledViT(**SMALL, eps=config.layer_norm_eps), weights)
    images = torch.randn(2, 3, 24, 32)
    with torch.no_grad():
        found = theirs(images)
        close(ours(images), found.logits)
        own, told = ours.train()(images)
        close(own, found.cls_logits)
        close(told, found.distillation_logits)


@pytest.mark.parametrize("kind", ["soft", "hard"])
def test_losses_are_those_of_timm(kind):
    tasks, timm = pytest.importorskip("timm.task"), pytest.importorskip("timm")
    sizes = dict(depth=1, embed_dim=24, num_heads=3, num_classes=7)
    model = randomise(timm.create_model("deit_tiny_distilled_patch16_224", **sizes)).train()
    teacher = nn.Sequential(nn.AvgPool2d(56), nn.Flatten(), nn.Linear(48, 7))
    task = tasks.TokenDistillationTask(
        model, teacher, criterion=nn.CrossEntropyLoss(), distill_type=kind, task_loss_weight=0.7,
        temperature=2.5, device=torch.device("cpu"), verbose=False)
    images, labels = torch.randn(3, 3, 224, 224), torch.tensor([4, 0, 6])
    wanted = task(images, labels)
    ours = distillation_loss(model(images), labels, teacher(images), kind, 2.5, weight=0.3)
    torch.testing.assert_close(ours, wanted["loss"])
    second = {"soft": lambda *a: soft_distillation_loss(*a, 2.5), "hard": hard_distillation_loss}
    torch.testing.assert_close(second[kind](model(images)[1], teacher(images)),
                               wanted["distill_loss"])


@pytest.mark.parametrize("hard", [False, True])
def test_losses_are_those_of_vit_pytorch(hard):
    distill = pytest.importorskip("vit_pytorch.distill")
    student = distill.DistillableViT(image_size=16, patch_size=8, num_classes=7, dim=24, depth=1,
                                     heads=3, mlp_dim=48)
    teacher = nn.Sequential(nn.AvgPool2d(8), nn.Flatten(), nn.Linear(12, 7))
    wrapper = distill.DistillWrapper(student=student, teacher=teacher, temperature=2.5, alpha=0.3,
                                     hard=hard)
    images, labels = torch.randn(3, 3, 16, 16), torch.tensor([4, 0, 6])
    own, token = student(images, distill_token=wrapper.distillation_token)
    outputs = own, wrapper.distill_mlp(token)
    ours = distillation_loss(outputs, labels, teacher(images), "hard" if hard else "soft", 2.5, 0.3)
    torch.testing.assert_close(ours, wrapper(images, labels))


def test_the_soft_loss_is_exact_for_sure_teachers_and_in_64_bits():
    ours, theirs = torch.tensor([[0.0, 0, 150]]), torch.tensor([[200.0, 0, 0]])
    assert soft_distillation_loss(ours, theirs, 1.0).item() == pytest.approx(150)
    z, v = torch.randn(3, 5, dtype=torch.float64, requires_grad=True), torch.randn(3, 5).double()
    assert soft_distillation_loss(z, v).dtype == torch.float64
    assert torch.autograd.gradcheck(lambda x: soft_distillation_loss(x, v, 2.0), z)


@pytest.mark.parametrize("positions", ["learned", "sinusoidal_1d", "sinusoidal_2d", "none"])
@pytest.mark.parametrize("registers", [0, 2])
def test_options_of_a_vit_are_options_of_a_distilled_one(positions, registers):
    options = SMALL | {"positions": positions, "num_registers": registers, "patch_dropout": 0.5,
                       "dropout": 0.1, "stem": "early_conv", "layer_scale": 0.1}
    model, images = DistilledViT(**options), torch.randn(2, 3, 24, 32)
    assert model.num_prefix_tokens == 2 + registers
    assert model.embed(images).shape == (2, 2 + registers + 6, 24)  # half of 12 patches
    own, told = model(images)
    (own.sum() + told.sum()).backward()
    assert all(p.grad is not None for p in model.parameters())
    assert model.eval()(images).shape == (2, 7)


@pytest.mark.parametrize("options, says", [
    ({"pool": "mean"}, "pool='mean'"), ({"num_classes": 0}, "num_classes=0"),
    ({"norm_after_pool": True}, "norm_after_pool=True"), ({"class_token": False}, "class_token"),
])
def test_options_that_two_tokens_cannot_have_are_refused(options, says):
    with pytest.raises(ValueError, match=says):
        DistilledViT(**SMALL | options)


@pytest.mark.parametrize("registers", [0, 2])
def test_what_looks_inside_works_on_two_tokens(registers):
    model = randomise(DistilledViT(**SMALL, num_registers=registers)).train()
    images, prefix = torch.rand(2, 3, 24, 32), 2 + registers
    maps = capture_attention(model, images)
    assert maps.shape == (2, 2, 3, 12 + prefix, 12 + prefix) and model.training
    wanted = attention_rollout(maps, num_prefix_tokens=prefix)[:, 0, prefix:].unflatten(1, (3, 4))
    torch.testing.assert_close(rollout_heatmap(model, images), wanted)
    tokens = model.eval().embed(images)
    torch.testing.assert_close(run_from(model, tokens, 0), model(images))
    data = explorer_data(model, images, [None] * 2, ["a", "b"], None)
    assert len(data["prefix"]) == prefix and len(data["pictures"]) == 2


def batches(size: int = 4) -> DataLoader:
    torch.manual_seed(0)
    images, labels = torch.rand(12, 1, 8, 12), torch.randint(7, (12,))
    return DataLoader(TensorDataset(images, labels), batch_size=size)


def teacher_of(images: int = 96) -> nn.Module:
    torch.manual_seed(1)
    layers = [nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Dropout(0.5), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(3 * 6 * 10, 7))


def fit(student, tmp_path, steps: int = 6):
    trainer = pl.Trainer(
        max_steps=steps, max_epochs=-1, accelerator="cpu", logger=False, default_root_dir=tmp_path,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False)
    trainer.fit(student, batches())
    return trainer


@pytest.mark.parametrize("token", [True, False])
@pytest.mark.parametrize("kind", ["soft", "hard"])
def test_the_teacher_stays_and_is_not_saved(kind, token, tmp_path):
    teacher = teacher_of()
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    student = LitDistilled(kind=kind, token=token, **STUDENT).taught_by(teacher)
    trainer = fit(student, tmp_path)
    assert "train_loss" in trainer.callback_metrics
    assert not any(module.training for module in teacher.modules())
    for name, value in teacher.state_dict().items():
        assert torch.equal(value, before[name]), name
    trainer.save_checkpoint(tmp_path / "student.ckpt")
    saved = torch.load(tmp_path / "student.ckpt", weights_only=True)
    assert saved["state_dict"].keys() == LitDistilled(token=token, **STUDENT).state_dict().keys()
    again = LitDistilled.load_from_checkpoint(tmp_path / "student.ckpt", map_location="cpu")
    assert again.hparams.kind == kind and again.hparams.token == token
    images = torch.rand(3, 1, 8, 12)
    torch.testing.assert_close(again.eval()(images), student.eval()(images))


def test_the_teacher_sees_what_the_student_sees(tmp_path):
    "The normalisation is the student's own; the pixels are the same."
    class Watching(nn.Module):
        def forward(self, images):
            seen.append(images)
            return torch.zeros(len(images), 7)

    seen, student = [], LitDistilled(mean=[0.5], std=[0.2], **STUDENT).taught_by(Watching())
    fit(student, tmp_path, steps=3)
    for images, (wanted, _) in zip(seen, batches(), strict=True):
        assert torch.equal(images, wanted)


def test_a_step_has_the_loss_of_the_formula(tmp_path):
    teacher = teacher_of()
    student = LitDistilled(kind="soft", temperature=2.0, weight=0.3, label_smoothing=0.1,
                           lr=0.0, **STUDENT).taught_by(teacher)
    trainer = fit(student, tmp_path, steps=3)
    wanted = 0.0
    for images, labels in batches():
        own, told = student.train().vit(images)
        first = F.cross_entropy(own, labels, label_smoothing=0.1)
        p, log_q = (teacher(images) / 2).softmax(1), (told / 2).log_softmax(1)
        wanted += (0.7 * first + 0.3 * 4 * F.kl_div(log_q, p, reduction="batchmean")) / 3
    assert trainer.callback_metrics["train_loss"].item() == pytest.approx(wanted.item(), rel=1e-4)


def test_a_student_without_a_teacher_is_refused_before_the_training(tmp_path):
    with pytest.raises(ValueError, match="taught_by"):
        fit(LitDistilled(**STUDENT), tmp_path)
    fit(LitDistilled(kind="labels", **STUDENT), tmp_path, steps=1)


@pytest.mark.parametrize("options, says", [
    ({"kind": "firm"}, "kind='firm'"), ({"temperature": 0.0}, "temperature=0"),
    ({"weight": 1.5}, "weight=1.5"), ({"pool": "mean"}, "pool='mean'"),
])
def test_ways_of_teaching_that_do_not_exist_are_refused(options, says):
    with pytest.raises(ValueError, match=says):
        LitDistilled(**STUDENT | options)


def test_a_student_with_one_head_is_a_plain_vit():
    assert type(LitDistilled(token=False, pool="mean", **STUDENT).vit) is ViT
