"Lesson 13's variants give what the libraries' own give, with the same weights."
import copy
from functools import partial

import pytest
import pytorch_lightning as pl
import torch
from torch import nn

from vit_course.family import (BiasedAttention, GridBias, LocalityAttention, NormedAttention,
                               OpenAttention, RotaryAttention, ShiftedPatches, WindowAttention,
                               grid_turns, swap_attention, turn)
from vit_course.training import LitViT, load_model, save_model
from vit_course.vit import ViT

VARIANTS = {
    "open": OpenAttention,
    "bias": partial(BiasedAttention, grid=(3, 5), num_prefix_tokens=1),
    "rotary": partial(RotaryAttention, grid=(3, 5), num_prefix_tokens=1),
    "locality": LocalityAttention,
    "normed": NormedAttention,
}


def small_vit(**options) -> ViT:
    torch.manual_seed(0)
    sizes = {"img_size": (12, 20), "patch_size": 4, "num_classes": 5, "embed_dim": 24}
    return ViT(**sizes | {"depth": 2, "num_heads": 3} | options)


@pytest.fixture
def tokens():
    return torch.randn(2, 16, 24, generator=torch.Generator().manual_seed(1))


def close(ours, theirs, atol=1e-5):
    torch.testing.assert_close(ours, theirs, atol=atol, rtol=1e-5)


@torch.no_grad()
def test_locality_attention_is_vit_pytorchs(tokens):
    LSA = pytest.importorskip("vit_pytorch.vit_for_small_dataset").LSA
    theirs = LSA(24, heads=3, dim_head=8).eval()
    ours = LocalityAttention(24, 3, qkv_bias=False).eval()
    ours.qkv.load_state_dict(theirs.to_qkv.state_dict())
    ours.proj.load_state_dict(theirs.to_out[0].state_dict())
    theirs.temperature.add_(0.7)
    ours.log_scale.fill_(0.7)
    close(ours(theirs.norm(tokens)), theirs(tokens))


@torch.no_grad()
def test_shifted_patches_are_vit_pytorchs_with_its_moves():
    SPT = pytest.importorskip("vit_pytorch.vit_for_small_dataset").SPT
    theirs = SPT(dim=24, patch_size=4).eval()
    ours = ShiftedPatches(4, 3, 24, moves=[(1, 0), (-1, 0), (0, 1), (0, -1)])
    ours.norm.load_state_dict(theirs.to_patch_tokens[1].state_dict())
    ours.proj.load_state_dict(theirs.to_patch_tokens[2].state_dict())
    images = torch.randn(2, 3, 12, 20)
    close(ours(images), theirs(images))


@torch.no_grad()
def test_normed_attention_is_timms(tokens):
    Attention = pytest.importorskip("timm.layers.attention").Attention
    norm = partial(nn.LayerNorm, eps=1e-6)
    theirs = Attention(24, 3, qkv_bias=True, qk_norm=True, norm_layer=norm).eval()
    for layer in (theirs.q_norm, theirs.k_norm):
        nn.init.normal_(layer.weight)
        nn.init.normal_(layer.bias)
    ours = NormedAttention(24, 3).eval()
    ours.load_state_dict(theirs.state_dict())
    close(ours(tokens), theirs(tokens))


@torch.no_grad()
def test_grid_bias_is_timms():
    timm = pytest.importorskip("timm.layers")
    theirs = timm.RelPosBias(window_size=(3, 5), num_heads=2)
    ours = GridBias(2, (3, 5))
    nn.init.normal_(theirs.relative_position_bias_table)
    ours.table.copy_(theirs.relative_position_bias_table.T.unflatten(1, (5, 9)).flip(1, 2))
    close(ours(), theirs.get_bias()[0])


def test_turns_are_timms_in_another_order():
    timm = pytest.importorskip("timm.layers")
    theirs = timm.RotaryEmbeddingCat(8, max_res=0, temperature=100.0, in_pixels=False,
                                     feat_shape=[3, 5])
    sin, cos = theirs.get_embed().chunk(2, dim=-1)  # (N, d) each, every number twice
    close(grid_turns((3, 5), 8), torch.complex(cos[:, ::2], sin[:, ::2]))
    x = torch.randn(2, 3, 15, 8)
    close(turn(x, grid_turns((3, 5), 8)), timm.apply_rot_embed(x, sin, cos))


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_trains_and_all_its_weights_learn(name):
    # in the last block a class token's row would be all that counts, and it has no bias
    model = swap_attention(small_vit(pool="mean", class_token=True, dropout=0.1), VARIANTS[name])
    model.train()(torch.randn(4, 3, 12, 20)).square().sum().backward()
    still = [n for n, p in model.encoder.named_parameters()
             if p.grad is None or not p.grad.abs().any()]
    assert not still


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_variant_keeps_the_format(name, dtype):
    model = swap_attention(small_vit(), VARIANTS[name]).eval()
    images = torch.randn(2, 3, 12, 20)
    expected = model(images)
    found = copy.deepcopy(model).to(dtype)(images.to(dtype))
    assert found.dtype == dtype
    close(found.float(), expected, atol=1e-4 if dtype == torch.float64 else 0.1)
    with torch.autocast("cpu", torch.bfloat16):
        close(model(images).float(), expected, atol=0.1)


@pytest.mark.filterwarnings("error:Casting complex")
def test_rotary_positions_survive_a_swap_and_a_format(tokens):
    layer = RotaryAttention(24, 3, grid=(4, 4))
    model = small_vit(img_size=16, pool="mean")
    model.encoder.blocks[0].attn.load_state_dict(layer.state_dict())
    swap_attention(model, partial(RotaryAttention, grid=(4, 4)))
    expected = layer(tokens)
    close(model.encoder.blocks[0].attn(tokens), expected)
    close(layer.bfloat16().float()(tokens), expected, atol=0.05)


def test_a_mask_that_leaves_only_the_token_itself_is_refused(tokens):
    layer = LocalityAttention(24, 3)
    for mask in (torch.ones(16, 16).tril().bool(), torch.eye(16, dtype=torch.bool)):
        with pytest.raises(ValueError, match="nobody to look at"):
            layer(tokens, mask)
    neighbours = torch.eye(16).roll(1, 0).bool()  # each looks at one other token
    assert layer(tokens, neighbours).isfinite().all()


def test_a_swap_there_and_back_changes_nothing():
    model = small_vit().eval()
    images = torch.randn(2, 3, 12, 20)
    before = model(images)
    for name in ("bias", "rotary", "open"):
        swap_attention(model, VARIANTS[name])
    close(model(images), before)


def test_windows_survive_a_checkpoint_and_a_copy(tokens):
    layer = WindowAttention(24, 3, grid=(4, 4), window=2, shift=1)
    other = WindowAttention(24, 3, grid=(4, 4), window=2, shift=1)
    other.load_state_dict(layer.state_dict())
    close(other(tokens), layer(tokens))
    close(copy.deepcopy(layer)(tokens), layer(tokens))


@pytest.mark.parametrize("wrong, said", [
    ({"grid": (4, 5), "window": 2}, "windows of 2 x 2"),
    ({"grid": (4, 4), "window": 2, "shift": 2}, "shift=2"),
])
def test_windows_that_do_not_fit_are_refused(wrong, said):
    with pytest.raises(ValueError, match=said):
        WindowAttention(24, 3, **wrong)


def test_a_mask_holds_beside_a_bias(tokens):
    layer = BiasedAttention(24, 3, grid=(4, 4))
    nn.init.normal_(layer.bias.table)
    allowed = torch.ones(16, 16, dtype=torch.bool).tril()
    weights = layer(tokens, allowed, need_weights=True)[1]
    assert not weights[..., ~allowed].any()
    added = torch.zeros(16, 16).masked_fill(~allowed, -torch.inf)
    close(layer(tokens, added), layer(tokens, allowed))


def test_a_variant_is_not_saved_as_if_it_were_plain(tmp_path):
    lit = LitViT(img_size=(12, 20), patch_size=4, num_classes=5, embed_dim=24, depth=2, num_heads=3)
    swap_attention(lit.vit, VARIANTS["rotary"])  # no weights of its own: a reader could not tell
    with pytest.raises(ValueError, match="RotaryAttention"):
        save_model(lit, tmp_path / "model.safetensors")
    assert not any(tmp_path.iterdir())


def test_a_variants_checkpoint_is_not_read_as_a_plain_model(tmp_path):
    "Rotary positions have no weights, so nothing but the note tells them from none."
    lit = LitViT(img_size=8, patch_size=4, num_classes=2, embed_dim=8, depth=1, num_heads=2,
                 positions="none")
    images = torch.utils.data.TensorDataset(torch.rand(4, 3, 8, 8), torch.tensor([0, 1, 0, 1]))
    trainer = pl.Trainer(max_steps=1, accelerator="cpu", logger=False, enable_progress_bar=False,
                         enable_checkpointing=False, enable_model_summary=False)
    for kind in ("plain", "rotary"):
        if kind == "rotary":
            swap_attention(lit.vit, partial(RotaryAttention, grid=(2, 2), num_prefix_tokens=1))
        trainer.fit(lit, torch.utils.data.DataLoader(images, batch_size=4))
        trainer.save_checkpoint(tmp_path / f"{kind}.ckpt")
    assert load_model(tmp_path / "plain.ckpt").vit.num_classes == 2
    with pytest.raises(ValueError, match=r"no option of ViT makes \(RotaryAttention\)"):
        load_model(tmp_path / "rotary.ckpt")
