import torch
from einops import rearrange
from torch import Tensor, nn

__all__ = ["patch_grid", "patchify", "unpatchify", "Tokenizer"]


def as_pair(size) -> tuple[int, int]:
    "An int or (H, W) as (H, W)."
    return (size, size) if isinstance(size, int) else tuple(size)


def patch_grid(
    img_size: int | tuple[int, int],  # side in pixels, or (H, W)
    patch_size: int,  # side of a square patch, in pixels
) -> tuple[int, int]:  # (rows, cols) of patches
    "How many patches fit an image; raises `ValueError` where they do not fit exactly."
    height, width = as_pair(img_size)
    if patch_size < 1 or height % patch_size or width % patch_size:
        raise ValueError(
            f"img_size={(height, width)} cannot be cut into patches of patch_size={patch_size}: "
            f"both sides must be multiples of it"
        )
    return height // patch_size, width // patch_size


def patchify(
    images: Tensor,  # (B, C, H, W)
    patch_size: int,  # side of a square patch, in pixels
) -> Tensor:  # (B, N, patch_size * patch_size * C), patches row by row
    "Cut images into flat, non-overlapping patches (Dosovitskiy et al. 2021, §3.1)."
    patch_grid(images.shape[-2:], patch_size)
    return rearrange(images, "b c (r p) (s q) -> b (r s) (p q c)", p=patch_size, q=patch_size)


def unpatchify(
    patches: Tensor,  # (B, N, patch_size * patch_size * C)
    patch_size: int,  # side of a square patch, in pixels
    grid: tuple[int, int],  # (rows, cols) of patches
    channels: int = 3,  # C
) -> Tensor:  # (B, C, rows * patch_size, cols * patch_size)
    "Put patches back into images: the inverse of `patchify`."
    rows, cols = grid
    expected = (rows * cols, patch_size * patch_size * channels)
    if tuple(patches.shape[1:]) != expected:
        raise ValueError(
            f"patches of shape {tuple(patches.shape)} do not fit grid={tuple(grid)}, patch_size={patch_size}, "
            f"channels={channels}: expected (B, {expected[0]}, {expected[1]})"
        )
    return rearrange(
        patches, "b (r s) (p q c) -> b c (r p) (s q)", r=rows, s=cols, p=patch_size, q=patch_size
    )


class LinearStem(nn.Module):
    "Flatten each patch, then one linear layer."

    def __init__(self, patch_size: int, in_chans: int, embed_dim: int):
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Linear(patch_size * patch_size * in_chans, embed_dim)

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(patchify(images, self.patch_size))


class ConvStem(nn.Module):
    "The same map as a convolution whose stride is its kernel's size."

    def __init__(self, patch_size: int, in_chans: int, embed_dim: int):
        super().__init__()
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, images: Tensor) -> Tensor:
        return rearrange(self.proj(images), "b d r s -> b (r s) d")


class EarlyConvStem(nn.Module):
    "A few small strided convolutions in place of one large one (Xiao et al. 2021)."

    def __init__(self, patch_size: int, in_chans: int, embed_dim: int):
        super().__init__()
        halvings = patch_size.bit_length() - 1
        if patch_size != 2**halvings or halvings < 1:
            raise ValueError(
                f"patch_size={patch_size} cannot be reached by halving: stem='early_conv' takes 2, 4, 8, 16, ..."
            )
        widths = [in_chans] + [max(8, embed_dim // 2**i) for i in reversed(range(halvings))]
        layers = []
        for fan_in, fan_out in zip(widths[:-1], widths[1:]):
            layers += [nn.Conv2d(fan_in, fan_out, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(fan_out), nn.ReLU()]
        self.layers = nn.Sequential(*layers, nn.Conv2d(widths[-1], embed_dim, 1))

    def forward(self, images: Tensor) -> Tensor:
        return rearrange(self.layers(images), "b d r s -> b (r s) d")


STEMS = {"linear": LinearStem, "conv": ConvStem, "early_conv": EarlyConvStem}


class Tokenizer(nn.Module):
    "Images to a sequence of patch tokens (Dosovitskiy et al. 2021, §3.1)."

    def __init__(
        self,
        img_size: int | tuple[int, int],  # side in pixels, or (H, W)
        patch_size: int,  # side of a square patch, in pixels
        in_chans: int = 3,  # C
        embed_dim: int = 768,  # D
        stem: str = "conv",  # one of "linear", "conv", "early_conv"
    ):
        super().__init__()
        if stem not in STEMS:
            raise ValueError(f"stem={stem!r} is not known: use one of {sorted(STEMS)}")
        self.img_size, self.patch_size, self.in_chans = as_pair(img_size), patch_size, in_chans
        self.grid = patch_grid(img_size, patch_size)
        self.stem = STEMS[stem](patch_size, in_chans, embed_dim)

    def forward(self, images: Tensor) -> Tensor:  # (B, C, H, W) -> (B, N, D)
        expected = (self.in_chans, *self.img_size)
        if images.ndim != 4 or tuple(images.shape[1:]) != expected:
            raise ValueError(
                f"images of shape {tuple(images.shape)} do not fit: "
                f"this tokenizer takes (B, {expected[0]}, {expected[1]}, {expected[2]})"
            )
        return self.stem(images)
