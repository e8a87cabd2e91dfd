"""Other libraries' models in our `ViT`, all weights random:
equal logits, or an error that names what we do not have."""
import numpy as np
import pytest
import torch
from torch import nn
from conftest import transformers

from vit_course.pretrained import (
    from_huggingface, from_jax, from_timm, from_torchvision, layer_decay_groups)
from vit_course.sources import load_vit, options_of, save_vit, to_timm
from vit_course.vit import ViT


def randomise(model: nn.Module) -> nn.Module:
    "Every parameter random, biases, norms and tokens included."
    torch.manual_seed(1)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            spread = parameter.shape[1:].numel() ** -0.5 if parameter.ndim > 1 else 0.3
            one = "norm" in type(module).__name__.lower() and name == "weight"
            parameter.data = torch.randn_like(parameter) * spread + float(one)
    return model.eval()


def close(ours: torch.Tensor, theirs: torch.Tensor, eps: float = 1e-4) -> None:
    assert ours.shape == theirs.shape
    assert theirs.std() > 1e-3, "an output of zeros proves nothing"
    assert (ours - theirs).abs().max() <= eps * max(1.0, theirs.abs().max().item())


@torch.no_grad()
def same_logits(ours: ViT, theirs: nn.Module, size=(224, 224), chans: int = 3) -> None:
    images = torch.randn(2, chans, *size)
    close(ours(images), theirs(images))


SMALL = dict(img_size=(24, 32), patch_size=8, embed_dim=24, depth=2, num_heads=3, num_classes=7)
TIMM = {
    "class token": {}, "registers": dict(reg_tokens=3),
    "registers without positions": dict(reg_tokens=3, no_embed_class=True),
    "no_embed_class": dict(no_embed_class=True), "mean": dict(global_pool="avg"),
    "mean without class token": dict(global_pool="avg", class_token=False),
    "mean, norm before": dict(global_pool="avg", fc_norm=False),
    "class token, norm after": dict(fc_norm=True),
    "registers and no class token": dict(class_token=False, reg_tokens=2, global_pool="avg"),
    "layer scale": dict(init_values=0.1), "no bias": dict(qkv_bias=False),
    "no positions": dict(pos_embed="none"), "odd MLP": dict(mlp_ratio=2.7),
    "GELU by tanh": dict(act_layer="gelu_tanh"), "ReLU": dict(act_layer=nn.ReLU),
    "eps": dict(norm_layer=lambda d, **k: nn.LayerNorm(d, eps=0.1)),
    "no head": dict(num_classes=0), "one channel": dict(in_chans=1),
    "dropouts": dict(proj_drop_rate=0.3, attn_drop_rate=0.2, drop_path_rate=0.1),
    "dynamic size": dict(dynamic_img_size=True),
}


@pytest.mark.parametrize("options", TIMM.values(), ids=TIMM)
def test_timm_small(options):
    timm = pytest.importorskip("timm.models.vision_transformer")
    theirs = randomise(timm.VisionTransformer(**SMALL | options))
    ours = from_timm(theirs)
    same_logits(ours, theirs, (24, 32), options.get("in_chans", 3))
    assert (ours.encoder.blocks[1].drop_path1.p, ours.encoder.blocks[0].attn.attn_dropout) == (
        options.get("drop_path_rate", 0), options.get("attn_drop_rate", 0))


@pytest.mark.parametrize("name", [
    "vit_tiny_patch16_224", "vit_small_patch32_224", "vit_base_patch16_224",
    "vit_small_patch14_reg4_dinov2", "vit_small_patch14_dinov2", "vit_base_patch16_224.mae",
    "deit_tiny_patch16_224", "vit_small_patch16_18x2_224", "deit3_small_patch16_224",
    "vit_medium_patch16_gap_240", "vit_wee_patch16_reg1_gap_256",
])
def test_timm_published(name):
    timm = pytest.importorskip("timm")
    options = {"img_size": 224} if "dinov2" in name else {}
    if "18x2" in name:
        with pytest.raises(ValueError, match="parallel"):
            from_timm(timm.create_model(name, depth=1))
        return
    theirs = randomise(timm.create_model(name.split(".")[0], depth=3, **options))
    size = theirs.patch_embed.img_size
    same_logits(from_timm(theirs), theirs, size)
    by_names = from_timm(theirs.state_dict())
    with torch.no_grad():
        images = torch.randn(1, 3, *size)
        close(by_names.forward_features(images), from_timm(theirs).forward_features(images))


@pytest.mark.parametrize("options, says", [
    (dict(qk_norm=True), "queries and keys"), (dict(pre_norm=True), "norm before the blocks"),
    (dict(global_pool="map"), "attention"), (dict(global_pool="max"), "global_pool='max'"),
    (dict(global_pool="avg", pool_include_prefix=True), "pool_include_prefix"),
    (dict(scale_attn_norm=True), "norm inside"), (dict(act_layer=nn.Hardswish), "activation"),
    (dict(final_norm=False), "norm"),
])
def test_what_timm_has_and_we_have_not(options, says):
    timm = pytest.importorskip("timm.models.vision_transformer")
    with pytest.raises(ValueError, match=says):
        from_timm(timm.VisionTransformer(**SMALL | options))


@pytest.mark.parametrize("name, says", [
    ("deit_tiny_distilled_patch16_224", "distillation token"),
    ("vit_giant_patch14_dinov2", "gated MLP"),
    ("eva02_tiny_patch14_224", "timm|rotary|gated|RMSNorm|not have"),
    ("vit_small_r26_s32_224", "stem of several layers"),
    ("vit_base_patch16_siglip_224", "attention"), ("beit_base_patch16_224", "not"),
    ("swin_tiny_patch4_window7_224", "not"),
])
def test_other_timm_models_are_refused(name, says):
    timm = pytest.importorskip("timm")
    options = {} if name.startswith("swin") or "r26" in name else {"depth": 1}
    with pytest.raises(ValueError, match=says):
        from_timm(timm.create_model(name, **options))


@pytest.mark.parametrize("name", ["vit_b_16", "vit_b_32", "vit_l_16"])
def test_torchvision(name):
    models = pytest.importorskip("torchvision.models")
    theirs = randomise(models.get_model(name))
    same_logits(from_torchvision(theirs), theirs)
    if name == "vit_b_32":
        same_logits(from_torchvision(theirs.state_dict()), theirs)


def test_torchvision_small():
    from torchvision.models import VisionTransformer
    from torchvision.models.vision_transformer import ConvStemConfig

    small = dict(image_size=24, patch_size=8, num_layers=2, num_heads=3, hidden_dim=24,
                 mlp_dim=50, num_classes=7)
    theirs = randomise(VisionTransformer(**small, dropout=0.2, attention_dropout=0.1))
    ours = from_torchvision(theirs)
    same_logits(ours, theirs, (24, 24))
    block = ours.encoder.blocks[0]
    assert (block.mlp.drop1.p, block.attn.attn_dropout) == (0.2, 0.1)
    with pytest.raises(ValueError, match="layer between pooling and head"):
        from_torchvision(VisionTransformer(**small, representation_size=5))
    with pytest.raises(ValueError, match="stem of several layers"):
        from_torchvision(VisionTransformer(**small, conv_stem_configs=[ConvStemConfig(8, 8, 8)]))


HF = dict(hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=50,
          image_size=(24, 32), patch_size=8, num_labels=7)
DINO = {k: v for k, v in HF.items() if k != "intermediate_size"} | dict(mlp_ratio=2, image_size=32)


@pytest.mark.parametrize("options", [
    {}, dict(hidden_act="gelu_new"), dict(qkv_bias=False), dict(layer_norm_eps=0.1),
    dict(num_channels=1),
], ids=str)
def test_huggingface_vit(options):
    hf = transformers()
    theirs = randomise(hf.ViTForImageClassification(hf.ViTConfig(**HF | options)))
    images = torch.randn(2, options.get("num_channels", 3), 24, 32)
    with torch.no_grad():
        close(from_huggingface(theirs)(images), theirs(images).logits)
        if not options:
            by_names = from_huggingface(theirs.state_dict(), num_heads=3, img_size=(24, 32))
            close(by_names(images), theirs(images).logits)


@pytest.mark.parametrize("registers", [0, 3])
def test_huggingface_dinov2(registers):
    hf = transformers()
    if registers:
        config = hf.Dinov2WithRegistersConfig(**DINO, num_register_tokens=registers)
        theirs = randomise(hf.Dinov2WithRegistersModel(config))
    else:
        theirs = randomise(hf.Dinov2Model(hf.Dinov2Config(**DINO)))
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        ours = from_huggingface(theirs)
        close(ours.forward_features(images), theirs(images).last_hidden_state)
        close(ours(images), theirs(images).pooler_output)


def test_huggingface_at_full_size():
    hf = transformers()
    theirs = randomise(hf.ViTForImageClassification(hf.ViTConfig(num_hidden_layers=3)))
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        close(from_huggingface(theirs)(images), theirs(images).logits)


def test_what_huggingface_has_and_we_have_not():
    hf = transformers()
    with pytest.raises(ValueError, match="gated MLP"):
        from_huggingface(hf.Dinov2Model(hf.Dinov2Config(**DINO, use_swiglu_ffn=True)))
    with pytest.raises(ValueError, match="48 numbers"):
        from_huggingface(hf.Dinov2ForImageClassification(hf.Dinov2Config(**DINO)))
    with pytest.raises(ValueError, match="distillation token"):
        deit = hf.DeiTConfig(**HF | dict(image_size=32))
        from_huggingface(hf.DeiTForImageClassificationWithTeacher(deit))


def jax_block(state: dict, ours: str, heads: int) -> dict:
    "The weights of our block whose names begin with `ours`, as the official JAX code calls them."
    out, attention = {}, "MultiHeadDotProductAttention_1"
    weight, bias = state[ours + "attn.qkv.weight"], state[ours + "attn.qkv.bias"]
    dim = weight.shape[1]
    qkv = weight.reshape(3, heads, dim // heads, dim)
    for j, name in enumerate(("query", "key", "value")):
        out[f"{attention}/{name}/kernel"] = qkv[j].transpose(2, 0, 1)
        out[f"{attention}/{name}/bias"] = bias.reshape(3, heads, -1)[j]
    projection = state[ours + "attn.proj.weight"].T
    out[f"{attention}/out/kernel"] = projection.reshape(heads, -1, dim)
    out[f"{attention}/out/bias"] = state[ours + "attn.proj.bias"]
    for norm, number in (("norm1", 0), ("norm2", 2)):
        out[f"LayerNorm_{number}/scale"] = state[f"{ours}{norm}.weight"]
        out[f"LayerNorm_{number}/bias"] = state[f"{ours}{norm}.bias"]
    for layer, number in (("fc1", 0), ("fc2", 1)):
        out[f"MlpBlock_3/Dense_{number}/kernel"] = state[f"{ours}mlp.{layer}.weight"].T
        out[f"MlpBlock_3/Dense_{number}/bias"] = state[f"{ours}mlp.{layer}.bias"]
    return out


def write_jax(vit: ViT, path) -> None:
    "Our weights in the official JAX code's layout: inputs before outputs, an axis for the heads."
    heads, out = vit.encoder.blocks[0].attn.num_heads, {}
    state = {n: w.detach().numpy() for n, w in vit.state_dict().items()}
    out["embedding/kernel"] = state["tokenizer.stem.proj.weight"].transpose(2, 3, 1, 0)
    out["embedding/bias"] = state["tokenizer.stem.proj.bias"]
    if "class_token" in state:
        out["cls"] = state["class_token"]
    out["Transformer/posembed_input/pos_embedding"] = state["positions.positions"]
    for i in range(len(vit.encoder.blocks)):
        for name, weight in jax_block(state, f"encoder.blocks.{i}.", heads).items():
            out[f"Transformer/encoderblock_{i}/{name}"] = weight
    out["Transformer/encoder_norm/scale"] = state["norm.weight"]
    out["Transformer/encoder_norm/bias"] = state["norm.bias"]
    out["head/kernel"], out["head/bias"] = state["head.weight"].T, state["head.bias"]
    np.savez(path, **out)


@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_jax(tmp_path, pool):
    options = SMALL | dict(img_size=(16, 24), pool=pool, activation="gelu_tanh")
    theirs = randomise(ViT(**options))
    write_jax(theirs, tmp_path / "vit.npz")
    images = torch.randn(2, 3, 16, 24)
    with torch.no_grad():
        close(from_jax(tmp_path / "vit.npz", img_size=(16, 24))(images), theirs(images), 1e-6)
    with pytest.raises(FileNotFoundError, match="nothing.npz"):
        from_jax(tmp_path / "nothing.npz")


def test_jax_as_timm_reads_it(tmp_path):
    timm = pytest.importorskip("timm")
    options = dict(img_size=64, depth=2, num_classes=7)
    written = randomise(ViT(**options, patch_size=16, embed_dim=192, num_heads=3))
    write_jax(written, tmp_path / "vit.npz")
    theirs = timm.create_model("vit_tiny_patch16_224", **options)
    theirs.load_pretrained(str(tmp_path / "vit.npz"))
    same_logits(from_jax(tmp_path / "vit.npz", activation="gelu"), theirs.eval(), (64, 64))


OURS = {
    "plain": {}, "mean": dict(pool="mean"),
    "sinusoids": dict(positions="sinusoidal_2d", pool="mean"),
    "registers": dict(num_registers=3), "no positions": dict(positions="none"),
    "linear stem": dict(stem="linear"), "layer scale": dict(layer_scale=0.1),
    "odd MLP": dict(mlp_ratio=2.7), "late norm": dict(norm_after_pool=True, pool="mean"),
    "eps, tanh": dict(eps=0.1, activation="gelu_tanh"), "no head": dict(num_classes=0),
}


@pytest.mark.parametrize("options", OURS.values(), ids=OURS)
def test_the_way_back(options, tmp_path):
    ours = randomise(ViT(**SMALL | options))
    changed = {"layer_scale": 1.0, "mlp_ratio": pytest.approx(2.7, abs=1 / 24)}
    wanted = {**SMALL, "img_size": [24, 32], **options} | changed
    given = {name: value for name, value in options_of(ours).items() if name in SMALL | options}
    assert all(value == wanted[name] for name, value in given.items())
    save_vit(ours, tmp_path / "ours.safetensors")
    images = torch.randn(2, 3, 24, 32)
    with torch.no_grad():
        assert torch.equal(load_vit(tmp_path / "ours.safetensors")(images), ours(images))
        with pytest.raises(FileExistsError):
            save_vit(ours, tmp_path / "ours.safetensors")
        pytest.importorskip("timm")
        theirs = to_timm(ours)
        close(theirs(images), ours(images))
        close(from_timm(theirs)(images), ours(images))


def test_files_names_and_nonsense(tmp_path, monkeypatch):
    timm = pytest.importorskip("timm")
    theirs = randomise(timm.models.vision_transformer.VisionTransformer(**SMALL))
    weights = {f"module.{n}": w for n, w in theirs.state_dict().items()}
    torch.save({"epoch": 3, "model": weights}, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match="num_heads"):
        from_timm(tmp_path / "weights.pth")
    ours = from_timm(tmp_path / "weights.pth", num_heads=3, img_size=(24, 32))
    same_logits(ours, theirs, (24, 32))
    with pytest.raises(ValueError, match="img_size"):
        from_timm(theirs.state_dict(), num_heads=3)
    for wrong in (torch.zeros(3), {"a": 1}, {}, None, nn.Linear(2, 3)):
        with pytest.raises(ValueError):
            from_timm(wrong)
    # the variable of this name is read at import alone; nor may an earlier download help
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    with pytest.raises(RuntimeError, match="network"):
        from_timm("vit_tiny_patch16_224")


def test_layer_decay():
    vit = ViT(**SMALL)
    groups = layer_decay_groups(vit, lr=1e-2, decay=0.5)
    assert sum(len(g["params"]) for g in groups) == len(list(vit.parameters()))
    rates = {id(p): g["lr"] for g in groups for p in g["params"]}
    assert rates[id(vit.head.weight)] == rates[id(vit.norm.bias)] == 1e-2
    assert rates[id(vit.encoder.blocks[1].mlp.fc1.weight)] == 5e-3
    assert rates[id(vit.class_token)] == rates[id(vit.tokenizer.stem.proj.weight)] == 1.25e-3
    decays = {id(p): g["weight_decay"] for g in groups for p in g["params"]}
    assert decays[id(vit.class_token)] == decays[id(vit.positions.positions)] == 0
    assert decays[id(vit.head.bias)] == 0
    assert decays[id(vit.head.weight)] == 0.05
