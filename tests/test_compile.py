"""Models translated by `torch.compile` (`LitViT(compile=True)`) compute what they do as written.

Translating takes nearly all of the time, so one model is translated to C++ for all tests
of outputs, gradients and training (`pair`). What is no question of the C++ code goes through
the first steps only: the backend "aot_eager" translates both ways but writes no C++,
"eager" translates the way forth alone.
"""
import copy
import os
import shutil
import sys
import sysconfig
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

import vit_course.dropout as own
from vit_course.dropout import dropout
from vit_course.encoder import DropPath, Encoder
from vit_course.inside import attention_and_gradients, capture_from
from vit_course.rollout import capture_attention, rollout_heatmap
from vit_course.training import LitViT, load_model, save_model
from vit_course.vit import ViT

SMALL = dict(img_size=(8, 12), patch_size=4, in_chans=2, num_classes=5,
             embed_dim=32, depth=2, num_heads=4, mlp_ratio=2.0)
CHANCE = dict(dropout=0.2, attn_dropout=0.1, drop_path=0.4)
EXACT = dict(atol=1e-5, rtol=1e-5)


def missing() -> str | None:
    "What `torch.compile` lacks here, or None."
    usual = {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")
    compiler = os.environ.get("CXX", usual)
    if shutil.which(compiler) is None:
        return f"torch.compile needs a C++ compiler, and there is no {compiler}"
    if not (Path(sysconfig.get_path("include")) / "Python.h").exists():
        return "torch.compile needs Python's headers, and there is no Python.h"


pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))


@pytest.fixture(autouse=True, scope="module")
def quick():
    "One thread, no processes for translating: for small models they cost more than they bring."
    from torch._inductor import config

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with config.patch(compile_threads=1):
        yield
    torch.set_num_threads(threads)
    torch.compiler.reset()


def batch(size: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(size, 2, 8, 12, generator=generator)
    return images, torch.randint(5, (size,), generator=generator)


def made(**options) -> ViT:
    torch.manual_seed(0)
    vit = ViT(**SMALL | options)
    for parameter in vit.parameters():
        nn.init.normal_(parameter, std=0.2)
    return vit


def gradients(model: nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor, dict]:
    model.zero_grad()
    logits = model(images)
    nn.functional.cross_entropy(logits, labels).backward()
    grads = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    return logits.detach(), grads


@pytest.fixture(scope="module")
def pair():
    "The same model twice: as written, and translated at once for batches of any size."
    eager = made()
    translated = copy.deepcopy(eager)
    translated.compile()
    images, labels = batch(4)
    torch._dynamo.mark_dynamic(images, 0)
    gradients(translated, images, labels)
    return eager, translated


@pytest.mark.parametrize("size", [4, 3, 7], ids=lambda n: f"batch of {n}")
def test_outputs_and_gradients(pair, size):
    (logits, grads), (translated, translated_grads) = (gradients(m, *batch(size)) for m in pair)
    torch.testing.assert_close(translated, logits, **EXACT)
    torch.testing.assert_close(translated_grads, grads, **EXACT)


def test_outputs_and_gradients_in_bfloat16(pair):
    eager, images_and_labels = pair[0], batch(4)
    translated = copy.deepcopy(eager)
    translated.compile(backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16):
        logits, grads = gradients(eager, *images_and_labels)
        others, other_grads = gradients(translated, *images_and_labels)
    assert logits.dtype == torch.bfloat16
    torch.testing.assert_close(others, logits, atol=0.05, rtol=0.05)
    for name, grad in grads.items():
        assert (other_grads[name] - grad).norm() <= 0.05 * grad.norm() + 1e-3, name


def test_names_of_weights_stay(pair, tmp_path):
    eager, translated = pair
    assert list(translated.state_dict()) == list(eager.state_dict())
    made(drop_path=0.3).load_state_dict(translated.state_dict())


def test_hooks_are_heard(pair):
    eager, images = pair[0], batch(3)[0]
    translated = copy.deepcopy(eager).eval()
    translated.compile(backend="aot_eager")
    with torch.no_grad():
        translated(images)  # as in validation: translated without hooks
    looks = (capture_attention, rollout_heatmap, lambda m, x: torch.stack(capture_from(m, x)),
             lambda m, x: attention_and_gradients(m, x)[1])
    for look in looks:
        torch.testing.assert_close(look(translated, images), look(eager, images), **EXACT)
    wrapped = torch.compile(eager)  # another way to ask for it, a model around the model
    attention = capture_attention(wrapped, images)
    torch.testing.assert_close(attention, capture_attention(eager, images), **EXACT)


def trained(compile: bool, folder: Path, **options) -> tuple[LitViT, list[float]]:
    "Three steps by Lightning, the last batch smaller; and the losses."
    torch.manual_seed(0)
    lit, losses = LitViT(lr=1e-2, compile=compile, **SMALL | options), []

    def keep(trainer, module, outputs, *_):
        losses.append(outputs["loss"].item())

    callback = pl.callbacks.LambdaCallback(on_train_batch_end=keep)
    quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False,
                 enable_model_summary=False)
    trainer = pl.Trainer(max_epochs=1, accelerator="cpu", callbacks=[callback],
                         default_root_dir=folder, **quiet)
    loader = DataLoader(TensorDataset(*batch(11)), batch_size=4)
    trainer.fit(lit, loader)
    trainer.save_checkpoint(folder / f"{compile}.ckpt")
    assert (lit.vit._compiled_call_impl is not None) == compile
    return lit, losses


def test_training_by_lightning(pair, tmp_path):  # pair: its translation is used again
    eager, losses = trained(False, tmp_path)
    translated, translated_losses = trained(True, tmp_path)
    assert len(losses) == 3
    assert translated_losses == pytest.approx(losses, abs=1e-5)
    found, weights = (dict(lit.named_parameters()) for lit in (translated, eager))
    torch.testing.assert_close(found, weights, atol=1e-3, rtol=0)
    # either's checkpoint is the other's, and both ways of saving know nothing of the translation
    eager.load_state_dict(translated.state_dict())
    translated.load_state_dict(eager.state_dict())
    save_model(translated, tmp_path / "model.safetensors")
    for saved in ("model.safetensors", "True.ckpt"):
        weights = load_model(tmp_path / saved).vit.state_dict()
        torch.testing.assert_close(weights, eager.vit.state_dict(), **EXACT)


def test_drop_path_drops_whole_samples():
    layer = DropPath(0.3).train()
    layer.compile()
    torch.manual_seed(0)
    x = torch.ones(4000, 2, 3, requires_grad=True)
    out = layer(x)
    first = out[:, :1, :1].expand_as(out)
    torch.testing.assert_close(out, first)  # all of a sample, or nothing of it
    dropped = out[:, 0, 0] == 0
    torch.testing.assert_close(out[~dropped], torch.full_like(out[~dropped], 1 / 0.7))
    assert dropped.float().mean().item() == pytest.approx(0.3, abs=4 * (0.3 * 0.7 / 4000) ** 0.5)
    assert not torch.equal(layer(x), out)  # drawn anew
    out.sum().backward()
    torch.testing.assert_close(x.grad, out.detach())  # the way back knows what the way forth drew
    torch.testing.assert_close(layer.eval()(x), x)


def test_chance_in_the_whole_model(pair):
    model = made(**CHANCE)
    eager = copy.deepcopy(model).eval()
    model.compile(backend="eager")
    images, labels = batch(4)
    torch.manual_seed(1)
    first, again = model(images), model(images)
    torch.manual_seed(1)
    torch.testing.assert_close(model(images), first)  # the same seed, the same draws
    assert not torch.allclose(first, again)
    assert all(grad.isfinite().all() for grad in gradients(model, images, labels)[1].values())
    torch.testing.assert_close(model.eval()(images), eager(images), **EXACT)
    for size in (3, 7):  # the second size makes torch translate once more, for any size
        torch.testing.assert_close(model(batch(size)[0]), eager(batch(size)[0]), **EXACT)


def test_gradient_checkpointing():
    eager, model = made(depth=1), made(depth=1, grad_checkpointing=True)
    model.compile(backend="aot_eager")
    logits, grads = gradients(eager, *batch(4))
    translated, translated_grads = gradients(model, *batch(4))
    torch.testing.assert_close(translated, logits, **EXACT)
    torch.testing.assert_close(translated_grads, grads, **EXACT)


def test_gradient_checkpointing_draws_the_same_again():
    encoder = Encoder(1, 8, 2, grad_checkpointing=True)
    for drop in (encoder.blocks[0].drop_path1, encoder.blocks[0].drop_path2):
        drop.p = 0.5
    encoder.compile(backend="aot_eager")
    torch.manual_seed(0)
    x = torch.randn(40, 3, 8, requires_grad=True)
    out = encoder(x)
    out.sum().backward()
    whole = (out == x).all(dim=2).all(dim=1)  # both branches dropped: about a quarter
    assert 2 <= whole.sum() <= 20
    plain = (x.grad == 1).all(dim=2).all(dim=1)
    assert torch.equal(plain, whole)


class Dropping(nn.Module):
    "Dropout in a block that may be computed again for the way back."

    def __init__(self, checkpointing: bool):
        super().__init__()
        self.checkpointing = checkpointing

    def forward(self, x):
        def block(x):
            return dropout(torch.sin(dropout(x, 0.5)), 0.5)

        return checkpoint(block, x, use_reentrant=False) if self.checkpointing else block(x)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "computed again"])
def test_dropout_draws_the_same_for_the_way_back(checkpointing):
    model, x = Dropping(checkpointing), torch.ones(2000, requires_grad=True)
    model.compile(backend="aot_eager")
    torch.manual_seed(0)
    out = model(x)
    out.sum().backward()
    assert 0.2 < (out != 0).float().mean() < 0.3
    assert torch.equal(x.grad != 0, out != 0)


def test_two_dropouts_of_one_input_draw_apart():
    def twice(x):
        return dropout(x, 0.5) + 10 * dropout(x, 0.5)

    translated = torch.compile(twice, backend="aot_eager")
    x = torch.ones(1000, requires_grad=True)
    assert translated(x).unique().tolist() == [0, 2, 20, 22]
    assert not torch.equal(translated(x), translated(x))


def test_an_older_torch_translates_its_own_dropout(monkeypatch):
    def without_tags(name, function, *, mutates_args):
        raise AssertionError("called without the tag")

    monkeypatch.setattr(torch.library, "custom_op", without_tags)
    monkeypatch.setattr(own, "_box", own._boxed())
    assert own._box is None
    translated = torch.compile(lambda x: dropout(x, 0.5), backend="aot_eager")
    assert translated(torch.ones(1000)).unique().tolist() == [0, 2]


def test_patch_dropout_can_end():
    "Another rate is another number of tokens: the translation of the old one must not stay in use."
    model, images = ViT(**SMALL, patch_dropout=0.5).train(), batch(4)[0]
    seen = []
    model.norm.register_forward_hook(lambda module, args, out: seen.append(out.shape[1]))
    model.compile(backend="eager")
    for rate in (0.5, 0.0, 0.5):
        model.patch_dropout = rate
        model(images)
    assert seen == [4, 7, 4]  # the class token and 3 or 6 patches
