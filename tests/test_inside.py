"""Attention of other libraries' models: the right maps, and the model left exactly as it was."""
import copy
from functools import partial

import pytest
import torch
from torch import nn
from conftest import transformers

from vit_course.attention import MultiHeadAttention
from vit_course.inside import (
    attention_and_gradients, attention_layers, capture_from, gradient_rollout, looking_inside)
from vit_course.rollout import attention_rollout, capture_attention
from vit_course.vit import ViT

SMALL = dict(img_size=(24, 32), patch_size=8, embed_dim=24, depth=3, num_heads=3, num_classes=7)
HF = dict(hidden_size=24, num_hidden_layers=3, num_attention_heads=3, intermediate_size=50,
          image_size=(24, 32), patch_size=8, num_labels=7,
          attention_probs_dropout_prob=0.3, hidden_dropout_prob=0.2)
DINO = {k: v for k, v in HF.items() if k != "intermediate_size"} | dict(mlp_ratio=2, image_size=32)


def timm_vit(**options):
    library = pytest.importorskip("timm.models.vision_transformer")
    return library.VisionTransformer(**SMALL | dict(attn_drop_rate=0.3) | options)


def timm_named(name, **options):
    return pytest.importorskip("timm").create_model(name, depth=2, img_size=32, **options)


def huggingface(kind, config, **options):
    library = transformers()
    return getattr(library, kind)(getattr(library, config)(**options))


def torchvision_vit():
    from torchvision.models import VisionTransformer

    return VisionTransformer(image_size=24, patch_size=8, num_layers=3, num_heads=3, hidden_dim=24,
                             mlp_dim=50, num_classes=7, attention_dropout=0.3)


def vit_pytorch(kind):
    library = pytest.importorskip("vit_pytorch")
    options = dict(image_size=(24, 32), patch_size=8, num_classes=7, dim=24, depth=3, heads=3,
                   mlp_dim=50, dim_head=8)
    return library.ViT(**options, dropout=0.3) if kind == "ViT" else library.SimpleViT(**options)


class TorchEncoder(nn.Module):
    "torch's own encoder, whose fast path calls no attention layer in eval mode."

    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(24, 3, 50, dropout=0.3, batch_first=True)
        self.cut = nn.Conv2d(3, 24, 8, 8)
        self.encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)

    def forward(self, images):
        return self.encoder(self.cut(images).flatten(2).mT).mean(1)


MODELS = {  # name: (make, image size, tokens)
    "ours": (lambda: ViT(**SMALL, attn_dropout=0.3, num_registers=2), (24, 32), 15),
    "ours, sdpa": (lambda: ViT(**SMALL | dict(pool="mean"), dropout=0.3), (24, 32), 12),
    "timm": (timm_vit, (24, 32), 13),
    "timm, registers": (lambda: timm_vit(reg_tokens=4), (24, 32), 17),
    "timm, queries and keys normed": (lambda: timm_vit(qk_norm=True), (24, 32), 13),
    "timm, layer scale, mean": (
        lambda: timm_vit(init_values=0.3, global_pool="avg", class_token=False), (24, 32), 12),
    "timm, distilled": (lambda: timm_named("deit_tiny_distilled_patch16_224"), (32, 32), 6),
    "timm, rotary (EVA-02)": (
        lambda: timm_named("eva02_tiny_patch14_224", patch_size=16), (32, 32), 5),
    "timm, relative positions (BEiT)": (
        lambda: timm_named("beit_base_patch16_224", embed_dim=48, num_heads=3), (32, 32), 5),
    "timm, pooled by attention": (
        lambda: timm_vit(global_pool="map", class_token=False), (24, 32), 12),
    "torchvision": (torchvision_vit, (24, 24), 10),
    "torch's encoder": (TorchEncoder, (24, 32), 12),
    "Hugging Face ViT": (
        lambda: huggingface("ViTForImageClassification", "ViTConfig", **HF), (24, 32), 13),
    "Hugging Face DeiT": (lambda: huggingface("DeiTModel", "DeiTConfig", **HF), (24, 32), 14),
    "Hugging Face DINOv2": (
        lambda: huggingface("Dinov2Model", "Dinov2Config", **DINO), (32, 32), 17),
    "Hugging Face DINOv2, registers": (
        lambda: huggingface("Dinov2WithRegistersModel", "Dinov2WithRegistersConfig",
                            **DINO, num_register_tokens=3), (32, 32), 20),
    "vit-pytorch ViT": (lambda: vit_pytorch("ViT"), (24, 32), 13),
    "vit-pytorch SimpleViT": (lambda: vit_pytorch("SimpleViT"), (24, 32), 12),
}


def made(name):
    "The model with every weight random, and three images for it."
    torch.manual_seed(1)
    make, size, tokens = MODELS[name]
    model = make()
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter) * 0.3
    return model, torch.randn(3, 3, *size), tokens


def state_of(model):
    "All that must not change: hooks, flags, configuration, weights, global switches, the dice."
    modules = list(model.modules())
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks)
             for m in modules]
    flags = [(m.training, getattr(m, "fused_attn", None)) for m in modules]
    configs = [copy.deepcopy(vars(m.config)) for m in modules if hasattr(m, "config")]
    own = [set(vars(m)) for m in modules]
    weights = [(n, p.requires_grad, p.grad, p._version) for n, p in model.named_parameters()]
    switches = torch.backends.mha.get_fastpath_enabled(), torch.is_grad_enabled()
    return hooks, flags, configs, own, weights, switches, torch.get_rng_state().tolist()


@torch.no_grad()
def output_of(model, images):
    output = model(images)
    return (output if isinstance(output, torch.Tensor) else output[0]).clone()


@pytest.mark.parametrize("name", MODELS)
def test_left_as_found(name):
    model, images, tokens = made(name)
    with torch.no_grad():
        first = output_of(copy.deepcopy(model).eval(), images)
    model.train()
    list(model.modules())[4].eval()  # a frozen part
    before = state_of(model)
    maps = capture_from(model, images)
    assert state_of(model) == before
    with pytest.raises(Exception):
        capture_from(model, torch.zeros(3, 5, 9))
    assert state_of(model) == before
    assert torch.equal(output_of(model.eval(), images), first)
    assert len(maps) == len(attention_layers(model))
    for weights in maps:
        assert weights.shape == (3, 3, tokens, tokens) and not weights.requires_grad
        torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))
    assert not torch.allclose(maps[0], maps[-1], atol=1e-3)


@pytest.mark.parametrize("name", MODELS)
def test_batches_and_chosen_layers(name):
    model, images, _ = made(name)
    maps = capture_from(model, images)
    last = capture_from(model, images, layers=[-1])
    assert len(last) == 1
    torch.testing.assert_close(last[0], maps[-1])
    chosen = capture_from(model, images, layers=(1, 0))
    torch.testing.assert_close(chosen, maps[:2])
    for i in range(3):
        single = [m[0] for m in capture_from(model, images[i : i + 1])]
        torch.testing.assert_close(single, [m[i] for m in maps], atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match=f"0 to {len(maps) - 1}"):
        capture_from(model, images, layers=[len(maps)])


def inputs_of(model, layers, images):
    "What each attention layer was called with."
    seen = []

    def keep(module, args, kwargs):
        seen.append(args[0] if args else next(iter(kwargs.values())))

    handles = [layer.register_forward_pre_hook(keep, with_kwargs=True) for layer in layers]
    output_of(model.eval(), images)
    [handle.remove() for handle in handles]
    return seen


def by_hand(layer, x):
    "Softmax of query times key over the root of the width, from the layer's own weights."
    if hasattr(layer, "to_qkv"):  # vit-pytorch norms inside
        q, k = layer.to_qkv(layer.norm(x)).chunk(3, -1)[:2]
    elif hasattr(layer, "in_proj_weight"):
        q, k = nn.functional.linear(x, layer.in_proj_weight, layer.in_proj_bias).chunk(3, -1)[:2]
    elif hasattr(layer, "qkv"):
        q, k = layer.qkv(x).chunk(3, -1)[:2]
    else:
        q, k = layer.q_proj(x), layer.k_proj(x)
    heads = 3
    q, k = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k))
    if hasattr(layer, "q_norm"):
        q, k = layer.q_norm(q), layer.k_norm(k)
    return (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)


PLAIN = [name for name in MODELS if "rotary" not in name and "relative" not in name]


@torch.no_grad()
@pytest.mark.parametrize("name", PLAIN)
def test_equal_to_a_computation_by_hand(name):
    if name == "torch's encoder":
        torch.backends.mha.set_fastpath_enabled(False)
    try:
        model, images, _ = made(name)
        layers = [layer for layer, _ in attention_layers(model)]
        expected = [by_hand(layer, x) for layer, x in zip(layers, inputs_of(model, layers, images))]
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    torch.testing.assert_close(capture_from(model, images), expected, atol=1e-5, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("name", [name for name in MODELS if name.startswith("Hugging")])
def test_equal_to_what_hugging_face_says(name):
    model, images, _ = made(name)
    maps = capture_from(model, images)
    assert model.config._attn_implementation == "sdpa"
    model.eval().set_attn_implementation("eager")
    torch.testing.assert_close(tuple(maps), model(images, output_attentions=True).attentions)


def values_of(layer, x):
    "What a timm layer mixes, (B, heads, N, head width), from its own weights."
    if getattr(layer, "v_proj", None) is not None:
        value = layer.v_proj(x)
    else:
        width = layer.qkv.weight.shape[0] // 3
        bias = getattr(layer, "v_bias", None) if layer.qkv.bias is None else layer.qkv.bias[-width:]
        value = torch.nn.functional.linear(x, layer.qkv.weight[-width:], bias)
    return value.unflatten(-1, (layer.num_heads, -1)).transpose(1, 2)


@torch.no_grad()
@pytest.mark.parametrize("name", ["timm, rotary (EVA-02)", "timm, relative positions (BEiT)"])
def test_rotary_and_relative_positions_give_what_the_layer_mixes(name):
    "Not made by hand: times the values, their weights must give what the fused layer computes."
    model, images, _ = made(name)
    layers = [layer for layer, _ in attention_layers(model)]
    assert layers and all(layer.fused_attn for layer in layers)
    outs = []
    handles = [layer.proj.register_forward_pre_hook(lambda m, args: outs.append(args[0]))
               for layer in layers]
    inputs = inputs_of(model.eval(), layers, images)
    [handle.remove() for handle in handles]
    maps = capture_from(model, images)
    assert len(maps) == len(outs) == len(layers)
    for layer, weights, x, out in zip(layers, maps, inputs, outs):
        mixed = (weights @ values_of(layer, x)).transpose(1, 2).flatten(2)
        torch.testing.assert_close(mixed, out, atol=1e-4, rtol=1e-3)


def test_the_lesson_and_the_toolbox_agree():
    for name in ("ours", "timm"):
        model, images, _ = made(name)
        attention = capture_attention(model, images)
        torch.testing.assert_close(attention, torch.stack(capture_from(model, images)))


@pytest.mark.parametrize("name, prefix", [
    ("timm, distilled", 2), ("timm, registers", 5), ("timm, layer scale, mean", 0),
    ("torchvision", 1), ("Hugging Face DINOv2, registers", 4),
])
def test_rollout_of_captured_maps(name, prefix):
    model, images, tokens = made(name)
    maps = capture_from(model, images)
    for options in ({}, dict(discard_ratio=0.9), dict(head_fusion="max", start_layer=1)):
        rollout = attention_rollout(maps, num_prefix_tokens=prefix, **options)
        assert rollout.shape == (3, tokens, tokens)
        torch.testing.assert_close(rollout.sum(-1), torch.ones(3, tokens))


def test_what_it_cannot_do_is_said():
    with pytest.raises(ValueError, match="model=Linear has no attention layer"):
        capture_from(nn.Linear(2, 3), torch.zeros(1, 2))
    with pytest.raises(ValueError, match="model=Linear"):
        capture_attention(nn.Linear(2, 3), torch.zeros(1, 2))
    timm = pytest.importorskip("timm")
    sizes = dict(depths=(1, 1), embed_dim=24, num_heads=(3, 3), img_size=56)
    swin = timm.create_model("swin_tiny_patch4_window7_224", **sizes)
    with pytest.raises(ValueError, match="windows"):
        capture_from(swin, torch.zeros(2, 3, 56, 56))
    model, images, _ = made("ours")
    with pytest.raises(ValueError, match="scripted"):
        capture_from(torch.jit.trace(model.eval(), images), images)


def test_wrapped_models():
    model, images, _ = made("timm")
    expected = capture_from(model, images)
    torch.testing.assert_close(capture_from(nn.Sequential(nn.Identity(), model), images), expected)
    torch.testing.assert_close(capture_from(nn.DataParallel(model), images), expected)
    torch.testing.assert_close(capture_from(torch.compile(model), images), expected)


def test_only_chosen_layers_are_asked():
    model, images, _ = made("ours")
    asked, chosen = [], attention_layers(model)[:1]
    with torch.no_grad(), looking_inside(model, chosen, asked.append):
        model(images)
        assert sum(bool(m._forward_hooks) for m in model.modules()) == 1
    assert len(asked) == 1


def nudge(module, args, output, size):
    "The output if query 0 looked at key 5 in head 1 by `size` more."
    values = module.qkv(args[0]).unflatten(-1, (3, 3, 8))[:, :, 2]  # (1, N, h, d)
    moved = torch.zeros(1, 13, 3, 8, dtype=output.dtype)
    moved[0, 0, 1] = size * values[0, 5, 1]  # query 0, head 1, key 5
    return output + nn.functional.linear(moved.flatten(2), module.proj.weight)


def slope(model, image, block):
    "How fast the score of class 2 changes with that entry of the block's attention."
    scores = []
    for size in (1e-5, -1e-5):
        handle = block.attn.register_forward_hook(partial(nudge, size=size))
        with torch.no_grad():
            scores.append(model(image)[0, 2])
        handle.remove()
    return (scores[0] - scores[1]) / 2e-5


def relevance_of(maps, gradients):
    "The gradient rollout, written out."
    relevance = torch.eye(13, dtype=torch.float64)[None]
    for a, g in zip(maps, gradients):
        relevance = relevance + (a * g).clamp(min=0).mean(1) @ relevance
    return relevance


def test_gradients_are_paired_with_their_layers():
    "A nudge to one entry of one layer's attention moves the score as that layer's gradient says."
    torch.manual_seed(0)
    model = ViT(**SMALL).double().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    image = torch.randn(1, 3, 24, 32, dtype=torch.float64)
    maps, gradients = attention_and_gradients(model, image, target=2)
    for number, block in enumerate(model.encoder.blocks):
        said = gradients[number][0, 1, 0, 5]
        torch.testing.assert_close(slope(model, image, block), said, atol=1e-6, rtol=1e-4)
    relevance = relevance_of(maps, gradients)
    torch.testing.assert_close(gradient_rollout(model, image, target=2), relevance)
    backwards = relevance_of(maps, gradients[::-1])
    assert not torch.allclose(backwards, relevance, rtol=1e-2)


@pytest.mark.parametrize("name", [
    "ours", "timm", "timm, registers", "Hugging Face ViT", "vit-pytorch ViT",
])
def test_gradient_rollout_of_every_library(name):
    model, images, tokens = made(name)
    before = state_of(model)
    relevance = gradient_rollout(model, images)
    assert state_of(model) == before
    assert relevance.shape == (3, tokens, tokens)
    assert (relevance >= 0).all() and relevance[:, 0, 1:].max() > 0
    single = torch.cat([gradient_rollout(model, image[None]) for image in images])
    torch.testing.assert_close(single, relevance, atol=1e-4, rtol=1e-3)
    assert not any(isinstance(m, MultiHeadAttention) and m._forward_hooks for m in model.modules())
