"""Attention rollout on random attention: properties that hold whatever the numbers are."""
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from vit_course.attention import MultiHeadAttention
from vit_course.rollout import attention_rollout, capture_attention, mix_residual, rollout_heatmap
from vit_course.vit import ViT

SMALL = dict(patch_size=8, num_classes=5, embed_dim=24, depth=3, num_heads=3)


@st.composite
def attentions(draw, layers=st.integers(1, 4), sharpness=st.sampled_from([0.0, 1.0, 5.0, 30.0])):
    "(L, B, h, N, N) of rows summing to 1, from flat to nearly one-hot."
    shape = [draw(s) for s in (layers, st.integers(1, 3), st.integers(1, 4), st.integers(2, 7))]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    scores = torch.randn(*shape, shape[-1], generator=generator, dtype=torch.float64)
    return (scores * draw(sharpness)).softmax(dim=-1)


options = st.fixed_dictionaries({
    "residual": st.sampled_from([0.0, 0.3, 0.5, 1.0]),
    "head_fusion": st.sampled_from(["mean", "max", "min"]),
    "discard_ratio": st.sampled_from([0.0, 0.3, 0.9, 0.999]),
    "num_prefix_tokens": st.integers(0, 2)})


@given(attentions(), options)
def test_rows_sum_to_1(attention, chosen):
    rollout = attention_rollout(attention, **chosen)
    assert rollout.shape == attention.shape[1:2] + attention.shape[-2:]
    assert (rollout >= 0).all()
    torch.testing.assert_close(rollout.sum(-1), torch.ones_like(rollout[..., 0]))


@given(attentions(layers=st.just(1)))
def test_one_layer_is_the_mean_with_the_identity(attention):
    eye = torch.eye(attention.shape[-1], dtype=attention.dtype)
    torch.testing.assert_close(attention_rollout(attention), (attention[0].mean(1) + eye) / 2)


@given(attentions(), options)
def test_tokens_that_only_see_themselves(attention, chosen):
    eye = torch.eye(attention.shape[-1], dtype=attention.dtype)
    rollout = attention_rollout(eye.expand_as(attention), **chosen)
    torch.testing.assert_close(rollout, eye.expand_as(rollout))


# equal numbers have no order
@given(attentions(sharpness=st.just(1.0)), options, st.randoms(use_true_random=False))
def test_permuted_tokens_permute_the_result(attention, chosen, random):
    prefix, tokens = chosen["num_prefix_tokens"], attention.shape[-1]
    patches = list(range(min(prefix, tokens), tokens))
    random.shuffle(patches)  # prefix tokens stay: their rows are treated otherwise
    order = torch.tensor(list(range(min(prefix, tokens))) + patches)
    expected = attention_rollout(attention, **chosen)[:, order][:, :, order]
    permuted = attention_rollout(attention[..., order, :][..., order], **chosen)
    torch.testing.assert_close(permuted, expected)


@given(attentions(), options)
def test_a_batch_is_its_images_one_by_one(attention, chosen):
    whole = attention_rollout(attention, **chosen)
    images = [attention[:, i : i + 1] for i in range(attention.shape[1])]
    single = [attention_rollout(image, **chosen)[0] for image in images]
    torch.testing.assert_close(whole, torch.stack(single))


@given(attentions(layers=st.integers(2, 4)), options)
def test_a_start_layer_forgets_the_layers_before(attention, chosen):
    start = attention_rollout(attention, start_layer=1, **chosen)
    torch.testing.assert_close(start, attention_rollout(attention[1:], **chosen))
    torch.testing.assert_close(start, attention_rollout(list(attention[1:]), **chosen))


@given(attentions(layers=st.just(1)), st.sampled_from([0.3, 0.9, 0.999]), st.integers(0, 2))
def test_prefix_rows_are_never_discarded(attention, ratio, prefix):
    kept = attention_rollout(attention, residual=0.0, discard_ratio=ratio, num_prefix_tokens=prefix)
    torch.testing.assert_close(kept[:, :prefix], attention[0].mean(1)[:, :prefix])


@given(attentions(layers=st.just(1)), st.floats(0, 1))
def test_the_residual_is_a_share(attention, residual):
    fused = attention[0].mean(1)
    eye = torch.eye(fused.shape[-1], dtype=fused.dtype)
    expected = residual * eye + (1 - residual) * fused
    torch.testing.assert_close(mix_residual(fused, residual), expected)


def all_at_once(model, images, **chosen):
    "The heat maps (B, patches) from one rollout of all images, as it always was."
    vit = getattr(model, "vit", model)
    prefix = vit.num_prefix_tokens
    attention = capture_attention(model, images)
    rollout = attention_rollout(attention, num_prefix_tokens=prefix, **chosen)
    row = rollout[:, 0] if vit.pool == "cls" else rollout[:, prefix:].mean(1)
    return row[:, prefix:]


@pytest.mark.parametrize("changed", [
    dict(), dict(pool="mean"), dict(pool="mean", class_token=False), dict(num_registers=3),
    dict(num_registers=2, pool="mean"), dict(positions="sinusoidal_2d", pool="mean"),
], ids=str)
def test_heat_maps_of_every_kind_of_model(changed):
    torch.manual_seed(0)
    vit = ViT(img_size=(16, 24), **SMALL, **changed)
    for parameter in vit.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    images = torch.randn(3, 3, 16, 24)
    maps = rollout_heatmap(vit, images)
    assert maps.shape == (3, 2, 3)
    single = [rollout_heatmap(vit, image[None]) for image in images]
    torch.testing.assert_close(maps, torch.cat(single))
    torch.testing.assert_close(maps, all_at_once(vit, images).view(3, 2, 3))
    layers = [m for m in vit.modules() if isinstance(m, MultiHeadAttention)]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in layers)


class Wrapped(torch.nn.Module):
    "A model around a model, with a normalisation of its own, as `LitViT`."

    def __init__(self, vit):
        super().__init__()
        self.vit = vit

    def forward(self, images):
        return self.vit((images - 0.3) / 0.7)


def from_libraries():
    "Models of other libraries with random weights, imported."
    from vit_course import pretrained

    timm = pytest.importorskip("timm.models.vision_transformer").VisionTransformer
    models = pytest.importorskip("torchvision.models")
    torchvision = models.VisionTransformer(16, 8, 3, 3, 24, 50, num_classes=5)
    return {
        "timm": pretrained.from_timm(timm(img_size=16, **SMALL, reg_tokens=2)),
        "torchvision": pretrained.from_torchvision(torchvision),
    }


@pytest.mark.parametrize("chosen", [
    dict(), dict(head_fusion="max", discard_ratio=0.5, residual=0.3),
    dict(head_fusion="min", start_layer=2),
], ids=str)
@pytest.mark.parametrize("kind", ["ours", "wrapped", "timm", "torchvision"])
def test_heat_maps_do_not_depend_on_the_size_of_the_batches(kind, chosen):
    torch.manual_seed(0)
    ours = ViT(img_size=16, **SMALL, pool="mean", num_registers=2, dropout=0.3)
    model = {"ours": ours, "wrapped": Wrapped(ours)}.get(kind) or from_libraries()[kind]
    model.train()
    images, near = torch.randn(11, 3, 16, 16), dict(atol=1e-6, rtol=1e-5)
    expected = all_at_once(model, images, **chosen).view(11, 2, 2)
    for batch_size in (1, 2, 4, 8, 11, 100):  # 11 is divisible by none but 1 and itself
        maps = rollout_heatmap(model, images, batch_size, **chosen)
        torch.testing.assert_close(maps, expected, **near)
    maps = rollout_heatmap(model, images[:1], **chosen)
    torch.testing.assert_close(maps, expected[:1], **near)
    assert model.training
    for wrong in (0, -3):
        with pytest.raises(ValueError, match=f"batch_size={wrong} must be 1 or more"):
            rollout_heatmap(model, images, wrong)
