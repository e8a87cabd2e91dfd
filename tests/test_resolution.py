"""Positions and models for another image size: laws that any resizing obeys,
and equality with the libraries' own code."""
import warnings

import pytest
import torch
from conftest import transformers

from vit_course.resolution import (
    MODES, RESIZE_STYLES, SMOOTH, resize_model, resize_positions, sample_points)
from vit_course.sources import load_vit, options_of, save_vit
from vit_course.training import load_model
from vit_course.vit import ViT

hypothesis = pytest.importorskip("hypothesis")
from hypothesis import given, settings, strategies as st  # noqa: E402

SIDES = st.integers(1, 9)
GRIDS = st.tuples(SIDES, SIDES)
STYLES = st.sampled_from([
    *RESIZE_STYLES.values(),
    *(dict(mode=mode, antialias=False) for mode in MODES),
    dict(mode="bilinear", antialias=True), dict(mode="bicubic", antialias=True, offset=0.1),
])
few = settings()  # as conftest.py says


def table(grid, prefix=1, dim=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(prefix + grid[0] * grid[1], dim, generator=generator)


def close(a, b, eps=1e-5):
    assert a.shape == b.shape
    assert (a - b).abs().max() <= eps


@few
@given(GRIDS, st.integers(0, 3), STYLES)
def test_an_equal_grid_changes_nothing(grid, prefix, style):
    positions = table(grid, prefix)
    resized = resize_positions(positions, grid, grid, prefix, **style)
    assert resized.equal(positions)
    assert resized.data_ptr() != positions.data_ptr()


@few
@given(GRIDS, GRIDS, st.integers(0, 3), STYLES)
def test_shape_rank_and_prefix(old, new, prefix, style):
    positions = table(old, prefix)
    resized = resize_positions(positions, old, new, prefix, **style)
    assert resized.shape == (prefix + new[0] * new[1], 5)
    assert resized[:prefix].equal(positions[:prefix])
    assert resize_positions(positions[None], old, new, prefix, **style).equal(resized[None])


@few
@given(GRIDS, GRIDS, STYLES)
def test_constants_stay_constant(old, new, style):
    constant = torch.full((1 + old[0] * old[1], 3), 0.7)
    close(resize_positions(constant, old, new, **style), torch.full((1 + new[0] * new[1], 3), 0.7))


@few
@given(GRIDS, GRIDS, STYLES, st.floats(-2, 2))
def test_linear(old, new, style, factor):
    a, b = table(old, seed=1), table(old, seed=2)
    together = resize_positions(a + factor * b, old, new, **style)
    one, two = (resize_positions(t, old, new, **style) for t in (a, b))
    close(together, one + factor * two, 2e-5)


@few
@given(GRIDS, GRIDS, STYLES)
def test_rows_and_columns_may_be_exchanged(old, new, style):
    positions = table(old, 0)
    turned = positions.unflatten(0, old).transpose(0, 1).flatten(0, 1)
    one = resize_positions(positions, old, new, 0, **style)
    other = resize_positions(turned, old[::-1], new[::-1], 0, **style)
    close(one.unflatten(0, new).transpose(0, 1).flatten(0, 1), other, 2e-5)


@few
@given(GRIDS, GRIDS, STYLES)
def test_channels_do_not_mix(old, new, style):
    positions = table(old)
    whole = resize_positions(positions, old, new, **style)
    close(whole[:, 2:3], resize_positions(positions[:, 2:3], old, new, **style))


IN_PLACE = [style for style in RESIZE_STYLES.values() if "offset" not in style]


@few
@given(st.integers(8, 14), st.integers(8, 14), st.sampled_from(IN_PLACE))
def test_up_and_down_again_is_near_for_smooth_tables(rows, cols, style):
    y, x = torch.meshgrid(torch.linspace(-1, 1, rows), torch.linspace(-1, 1, cols), indexing="ij")
    smooth = torch.stack([x, y, x * y, (2 * x).sin(), y.cos()], dim=-1).flatten(0, 1)
    up = resize_positions(smooth, (rows, cols), (2 * rows, 2 * cols), 0, **style)
    back = resize_positions(up, (2 * rows, 2 * cols), (rows, cols), 0, **style)
    assert (back - smooth).norm() < 0.1 * smooth.norm()


@few
@given(
    st.integers(1, 40), st.integers(1, 40),
    st.sampled_from([{}, {"align_corners": True}, {"offset": 0.1}]),
)
def test_a_ramp_tells_where_it_was_sampled(old, new, options):
    ramp = torch.arange(float(old))[:, None]
    style = dict(mode="bilinear", antialias=False) | options
    found = resize_positions(ramp, (old, 1), (new, 1), 0, **style)[:, 0]
    wanted = sample_points(old, new, **options).clamp(0, old - 1)
    close(found, torch.arange(float(old)) if old == new else wanted, 1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_computed_in_float32(dtype):
    positions = table((4, 5)).to(dtype)
    wanted = resize_positions(positions.float(), (4, 5), (7, 3)).to(dtype)
    assert resize_positions(positions, (4, 5), (7, 3)).equal(wanted)


@pytest.mark.parametrize("name", RESIZE_STYLES)
def test_gradients(name):
    positions = table((4, 5)).requires_grad_()
    resize_positions(positions, (4, 5), (7, 8), **RESIZE_STYLES[name]).sum().backward()
    assert positions.grad[0].tolist() == [1] * 5
    assert abs(positions.grad[1:].sum() - 7 * 8 * 5) < 1e-2


# the libraries' own code
OTHER = [(5, 5), (9, 9), (14, 14), (4, 9), (12, 6)]


@pytest.mark.parametrize("new", OTHER)
@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_timm(new, prefix):
    theirs = pytest.importorskip("timm.layers").resample_abs_pos_embed
    for old in [(7, 7), (6, 8)]:
        positions = table(old, prefix)[None]
        wanted = theirs(positions, list(new), list(old), num_prefix_tokens=prefix)
        close(resize_positions(positions, old, new, prefix, **RESIZE_STYLES["timm"]), wanted)
        plain = theirs(positions, list(new), list(old), num_prefix_tokens=prefix,
                       interpolation="bilinear", antialias=False)
        ours = resize_positions(positions, old, new, prefix, mode="bilinear", antialias=False)
        close(ours, plain)


@pytest.mark.parametrize("side", [3, 9, 14])
def test_torchvision(side):
    from torchvision.models.vision_transformer import interpolate_embeddings

    positions, name = table((7, 7))[None], "encoder.pos_embedding"
    theirs = interpolate_embeddings(side * 16, 16, {name: positions.clone()})[name]
    close(resize_positions(positions, (7, 7), (side, side), **RESIZE_STYLES["torchvision"]), theirs)


@pytest.mark.parametrize("new", OTHER)
@pytest.mark.parametrize("name, style", [
    ("ViT", "huggingface"), ("Dinov2", "huggingface"), ("Dinov2WithRegisters", "timm"),
])
def test_huggingface(name, style, new):
    library = transformers()
    config = getattr(library, f"{name}Config")(
        image_size=28, patch_size=4, hidden_size=12, num_hidden_layers=1, num_attention_heads=3)
    embeddings = getattr(library, f"{name}Model")(config).embeddings
    embeddings.position_embeddings.data = table((7, 7), dim=12)[None]
    tokens = torch.zeros(1, 1 + new[0] * new[1], 12)
    theirs = embeddings.interpolate_pos_encoding(tokens, new[0] * 4, new[1] * 4)
    positions = embeddings.position_embeddings
    close(resize_positions(positions, (7, 7), new, **RESIZE_STYLES[style]), theirs)


@pytest.mark.parametrize("new", OTHER)
def test_jax(new):
    "The official JAX code calls SciPy's zoom with order 1."
    ndimage = pytest.importorskip("scipy.ndimage")
    positions = table((7, 7))
    grid = positions[1:].view(7, 7, 5).numpy()
    theirs = torch.from_numpy(ndimage.zoom(grid, (new[0] / 7, new[1] / 7, 1), order=1))
    ours = resize_positions(positions, (7, 7), new, **RESIZE_STYLES["jax"])
    close(ours[1:], theirs.reshape(-1, 5))


@pytest.mark.parametrize("new", OTHER)
def test_dinov2(new):
    "DINOv2's own code gives `interpolate` the ratio of the sizes, 0.1 being added to the new one."
    positions = table((7, 7))
    image = positions[1:].view(1, 7, 7, 5).permute(0, 3, 1, 2)
    ratio = ((new[0] + 0.1) / 7, (new[1] + 0.1) / 7)
    theirs = torch.nn.functional.interpolate(
        image, scale_factor=ratio, mode="bicubic", antialias=False)
    assert theirs.shape[-2:] == new
    wanted = theirs.permute(0, 2, 3, 1).reshape(-1, 5)
    close(resize_positions(positions, (7, 7), new, **RESIZE_STYLES["dinov2"])[1:], wanted)


# wrong arguments
@pytest.mark.parametrize("change, message", [
    (dict(old_grid=(4, 4)), "positions has 21 rows"),
    (dict(num_prefix_tokens=0), "num_prefix_tokens=0"),
    (dict(num_prefix_tokens=-1), "num_prefix_tokens=-1"),
    (dict(new_grid=(0, 3)), "new_grid"), (dict(new_grid=(3,)), "new_grid"),
    (dict(mode="cubic"), "mode='cubic'"), (dict(mode="nearest"), "antialias=True"),
    (dict(mode="area"), "antialias=True"), (dict(align_corners=True), "align_corners=True"),
    (dict(mode="nearest", antialias=False, align_corners=True), "nearest"),
    (dict(antialias=False, align_corners=True, offset=0.1), "offset=0.1"),
    (dict(offset=-0.1), "offset=-0.1"), (dict(offset=1.0), "offset=1.0"),
    (dict(mode="nearest", antialias=False, offset=0.1), "offset=0.1"),
])
def test_wrong_arguments(change, message):
    arguments = dict(positions=table((4, 5)), old_grid=(4, 5), new_grid=(3, 7)) | change
    with pytest.raises(ValueError) as caught:
        resize_positions(**arguments)
    assert message in str(caught.value)


@pytest.mark.parametrize("shape", [(12,), (2, 21, 5), (1, 1, 21, 5)])
def test_wrong_rank(shape):
    with pytest.raises(ValueError, match=r"\(1, N, D\) or \(N, D\)"):
        resize_positions(torch.zeros(shape), (4, 5), (3, 7))


# whole models
SMALL = dict(patch_size=4, in_chans=2, num_classes=5,
             embed_dim=12, depth=2, num_heads=3, mlp_ratio=2.5)
KINDS = [
    {}, dict(pool="mean"), dict(pool="mean", class_token=True, num_registers=3),
    dict(num_registers=2, layer_scale=0.1, dropout=0.2),
    dict(stem="linear", norm_after_pool=True),
    dict(stem="early_conv", activation="gelu_tanh", eps=0.1, drop_path=0.3),
    dict(positions="sinusoidal_1d", attn_dropout=0.1), dict(positions="sinusoidal_2d"),
    dict(positions="none"), dict(num_classes=0),
]


@pytest.mark.parametrize("options", KINDS, ids=str)
@torch.no_grad()
def test_models_of_all_kinds(options, tmp_path):
    torch.manual_seed(0)
    old = ViT((8, 12), **SMALL | options).eval()
    images, larger = torch.randn(2, 2, 8, 12), torch.randn(2, 2, 16, 20)
    before = old(images)
    new = resize_model(old, (16, 20), **RESIZE_STYLES["huggingface"])
    assert old(images).equal(before) and old.grid == (2, 3) and not hasattr(old, "resized_from")
    assert new.grid == (4, 5) and new(larger).shape == (2, before.shape[1])
    assert options_of(new) == options_of(old) | {"img_size": [16, 20]}
    assert new.state_dict().keys() == old.state_dict().keys()
    assert not new.training and not any(m.training for m in new.modules())
    for name, value in old.state_dict().items():
        assert name == "positions.positions" or value.equal(new.state_dict()[name])
    save_vit(new, tmp_path / "new.safetensors")
    assert load_vit(tmp_path / "new.safetensors")(larger).equal(new(larger))


def test_flags_types_and_gradients_of_the_copy():
    old = ViT((8, 12), **SMALL).double()
    old.positions.requires_grad_(False)
    old.encoder.blocks[1].eval()
    old(torch.randn(2, 2, 8, 12).double()).sum().backward()
    new = resize_model(old, 16)
    positions = new.positions.positions
    assert not positions.requires_grad and positions.dtype == torch.float64
    assert [m.training for m in new.modules()] == [m.training for m in old.modules()]
    assert all(p.grad is None for p in new.parameters())
    assert old.head.weight.grad is not None
    assert not {p.data_ptr() for p in old.parameters()} & {p.data_ptr() for p in new.parameters()}


def test_the_fact_of_resizing_is_remembered_and_not_saved():
    old = ViT((8, 12), **SMALL)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        new = resize_model(old, 16)
        resize_model(new, 16)  # nothing to do
        resize_model(resize_model(ViT(8, **SMALL, positions="none"), 16), 8)  # nothing is lost
    assert new.resized_from == (8, 12) and "resized_from" not in new.state_dict()
    with pytest.warns(UserWarning, match="from the original instead"):
        resize_model(new, (8, 12))


def test_lightning_model():
    lit = load_model("fashion")
    new = resize_model(lit, (28, 36))
    assert new.hparams["img_size"] == [28, 36] and lit.hparams["img_size"] != [28, 36]
    assert new(torch.rand(3, 1, 28, 36)).shape == (3, 10)
    assert new.vit.resized_from == (28, 28)


@pytest.mark.parametrize("model, size, message", [
    (ViT((8, 12), **SMALL), 14, "patch_size=4"), (ViT((8, 12), **SMALL), (8, 8, 8), "pair"),
    (torch.nn.Linear(2, 3), 8, "no ViT"),
])
def test_models_that_cannot_be_resized(model, size, message):
    with pytest.raises(ValueError, match=message):
        resize_model(model, size)


def test_style_is_handed_on():
    old = ViT((8, 12), **SMALL)
    with pytest.raises(ValueError, match="mode='cubic'"):
        resize_model(old, 16, mode="cubic")
    assert SMOOTH == ("bilinear", "bicubic")
    resized = [resize_model(old, 16, **style) for style in RESIZE_STYLES.values()]
    tables = [model.positions.positions for model in resized]
    assert not any(a.equal(b) for i, a in enumerate(tables) for b in tables[:i])
