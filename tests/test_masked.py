"Lesson 11's masked autoencoder against Hugging Face's, all weights random."
import pytest
import torch
from conftest import transformers
from test_pretrained import close, randomise

from vit_course.masked import LitMasked, MaskedAutoencoder, random_masking
from vit_course.positional import sinusoidal_2d
from vit_course.pretrained import from_huggingface, join_qkv, rename
from vit_course.sources import table
from vit_course.vit import ViT

DECODER = table(r"decoder_layers\.(\d+)\.", {
    r"decoder_embed\.(.+)": r"embed.\1",
    r"mask_token": "mask_token",
    r"decoder_pos_embed": "",  # a table that is not trained; copied below
    r"@layernorm_before\.(.+)": r"@norm1.\2",
    r"@layernorm_after\.(.+)": r"@norm2.\2",
    r"@attention\.([qkv])_proj\.(.+)": r"@attn.\2.\3",
    r"@attention\.o_proj\.(.+)": r"@attn.proj.\2",
    r"@mlp\.(fc[12])\.(.+)": r"@mlp.\2.\3",
    r"decoder_norm\.(.+)": r"norm.\1",
    r"decoder_pred\.(.+)": r"head.\1",
})


def theirs_with(**options):
    "A small `ViTMAEForPreTraining`; its eps is by default 1e-12, ours 1e-6."
    library = transformers()
    config = library.ViTMAEConfig(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=96,
        image_size=24, patch_size=4, num_channels=3, layer_norm_eps=1e-6, decoder_hidden_size=16,
        decoder_num_hidden_layers=3, decoder_num_attention_heads=2, decoder_intermediate_size=64,
        **options)
    return library.ViTMAEForPreTraining(config)


@torch.no_grad()
def ours_from(theirs) -> MaskedAutoencoder:
    "The same model as our own, with copied weights."
    config, vit = theirs.config, from_huggingface(theirs.vit)
    mae = MaskedAutoencoder(vit, decoder_dim=16, decoder_depth=3, decoder_heads=2,
                            ratio=config.mask_ratio, normalize=config.norm_pix_loss)
    mae.decoder.load_state_dict(join_qkv(rename(theirs.decoder.state_dict(), DECODER)))
    mae.decoder.positions.positions.copy_(theirs.decoder.decoder_pos_embed)
    return mae.eval()


@pytest.mark.parametrize("normalize", [False, True], ids=["plain", "normalized"])
@pytest.mark.parametrize("ratio", [0.75, 0.4])
def test_equal_to_hugging_face(ratio, normalize):
    theirs = randomise(theirs_with(mask_ratio=ratio, norm_pix_loss=normalize))
    ours = ours_from(theirs)
    images, noise = torch.randn(5, 3, 24, 24), torch.rand(5, 36)
    wanted = theirs(images, noise=noise)
    loss, prediction, mask = ours(images, noise)
    assert torch.equal(mask, wanted.mask)
    assert torch.equal(ours.encode(images, noise)[2], wanted.ids_restore)
    close(prediction, wanted.logits)
    assert loss.item() == pytest.approx(wanted.loss.item(), rel=1e-5)
    loss.backward()
    wanted.loss.backward()
    close(ours.decoder.mask_token.grad, theirs.decoder.mask_token.grad)
    close(ours.vit.class_token.grad, theirs.vit.embeddings.cls_token.grad)
    kernel = theirs.vit.embeddings.patch_embeddings.projection.weight.grad
    close(ours.vit.tokenizer.stem.proj.weight.grad, kernel)


def test_their_fixed_positions_are_ours_in_another_order():
    "Sines and cosines in blocks, the column before the row; ours alternate, the row first."
    decoder = theirs_with().decoder
    decoder.initialize_weights(36)
    table_of_theirs = decoder.decoder_pos_embed[0]  # (1 + 36, 16)
    sines_col, cosines_col, sines_row, cosines_row = table_of_theirs[1:].chunk(4, dim=1)
    row = torch.stack([sines_row, cosines_row], dim=2).flatten(1)
    col = torch.stack([sines_col, cosines_col], dim=2).flatten(1)
    close(sinusoidal_2d((6, 6), 16), torch.cat([row, col], dim=1), 1e-6)
    assert not table_of_theirs[0].any()  # the class token has none


@pytest.mark.parametrize("vit", [
    {"pool": "mean"}, {"num_registers": 2}, {"positions": "sinusoidal_2d", "stem": "linear"},
], ids=["no class token", "registers", "linear stem"])
def test_every_kind_of_prefix(vit):
    "Another order of the noise hides other patches, and hidden pixels reach no feature."
    torch.manual_seed(0)
    body = ViT(img_size=(8, 12), patch_size=4, in_chans=2, num_classes=0, embed_dim=12,
               depth=1, num_heads=3, **vit)
    mae = MaskedAutoencoder(body, 8, 1, 2, ratio=0.5, normalize=False).eval()
    images, noise = torch.randn(3, 2, 8, 12), torch.rand(3, 6)
    features, mask, restore = mae.encode(images, noise)
    assert features.shape == (3, body.num_prefix_tokens + 3, 12)
    hidden = mask.view(3, 1, 2, 3).repeat_interleave(4, 2).repeat_interleave(4, 3)
    assert torch.equal(mae.encode(images + 9 * hidden, noise)[0], features)
    assert not torch.allclose(mae.encode(images + 9 * (1 - hidden), noise)[0], features)
    assert mae(images, noise)[1].shape == (3, 6, 32)
    assert torch.equal(mae(images, noise)[2], (noise.argsort(1).argsort(1) >= 3).float())


def test_refusals():
    small = {"img_size": 8, "patch_size": 4, "embed_dim": 8, "depth": 1, "num_heads": 2}
    for ratio in (0.0, 1.0, -0.5):
        with pytest.raises(ValueError, match=f"ratio={ratio}"):
            MaskedAutoencoder(ViT(**small), ratio=ratio)
    with pytest.raises(ValueError, match="early_conv"):
        MaskedAutoencoder(ViT(**small, stem="early_conv"))
    with pytest.raises(ValueError, match="patch_dropout=0.5"):
        MaskedAutoencoder(ViT(**small, patch_dropout=0.5))
    with pytest.raises(ValueError, match="vit=Linear"):
        MaskedAutoencoder(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="noise of shape"):
        random_masking(torch.zeros(2, 6, 3), 0.5, torch.rand(2, 5))


def test_the_lightning_module_reads_no_label():
    lit = LitMasked(img_size=8, patch_size=4, in_chans=1, num_classes=0, embed_dim=8, depth=1,
                    num_heads=2, decoder_dim=8, decoder_depth=1, decoder_heads=2)
    lit.log = lambda *args, **options: None
    images = torch.rand(4, 1, 8, 8)
    torch.manual_seed(0)
    first = lit.training_step((images, torch.arange(4)), 0)
    torch.manual_seed(0)
    assert torch.equal(first, lit.training_step((images, None), 0))
