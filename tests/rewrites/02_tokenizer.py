import math
import torch
import torch.nn.functional as F
from einops import einsum, rearrange, reduce
from einops.layers.torch import Rearrange
from torch import Tensor, nn
from vit_course.tokenizer import STEMS, ConvStem, EarlyConvStem, LinearStem, as_pair, patch_grid, patchify

# === patch_grid: divmod
def patch_grid(img_size, patch_size):
    h, w = (img_size, img_size) if isinstance(img_size, int) else img_size
    if patch_size < 1:
        raise ValueError(f"patch_size={patch_size}")
    (rows, below), (cols, right) = divmod(h, patch_size), divmod(w, patch_size)
    if below or right:
        raise ValueError(f"{(h, w)} does not divide by {patch_size}")
    return rows, cols

# === patch_grid: multiplied back
def patch_grid(img_size, patch_size):
    if patch_size <= 0:
        raise ValueError("patch_size should be positive")
    size = as_pair(img_size)
    grid = tuple(side // patch_size for side in size)
    if tuple(n * patch_size for n in grid) != size:
        raise ValueError(f"{size} is no multiple of {patch_size}")
    return grid

# === patch_grid: modulo of a list
def patch_grid(img_size: int | tuple[int, int], patch_size: int) -> tuple[int, int]:
    sides = [img_size] * 2 if type(img_size) is int else list(img_size)
    if patch_size < 1 or any(s % patch_size != 0 for s in sides):
        raise ValueError(f"cannot cut {sides} into {patch_size}")
    return int(sides[0] / patch_size), int(sides[1] / patch_size)

# === patchify: reshape and permute
def patchify(images, patch_size):
    B, C, H, W = images.shape
    p = patch_size
    if H % p or W % p:
        raise ValueError(f"{H} x {W} does not divide by {p}")
    x = images.reshape(B, C, H // p, p, W // p, p)
    x = x.permute(0, 2, 4, 3, 5, 1)
    return x.reshape(B, (H // p) * (W // p), p * p * C)

# === patchify: view, contiguous and einsum for the move
def patchify(imgs, p):
    if imgs.size(2) % p != 0 or imgs.size(3) % p != 0:
        raise ValueError("sizes should be multiples of the patch size")
    h, w = imgs.size(2) // p, imgs.size(3) // p
    x = imgs.view(imgs.size(0), imgs.size(1), h, p, w, p)
    x = torch.einsum("nchpwq->nhwpqc", x).contiguous()
    return x.view(imgs.size(0), h * w, p**2 * imgs.size(1))

# === patchify: loops and slices
def patchify(images, patch_size):
    b, c, h, w = images.shape
    if h % patch_size or w % patch_size:
        raise ValueError("no whole number of patches")
    patches = []
    for top in range(0, h, patch_size):
        for left in range(0, w, patch_size):
            patch = images[:, :, top : top + patch_size, left : left + patch_size]
            patches.append(patch.permute(0, 2, 3, 1).flatten(1))
    return torch.stack(patches, dim=1)

# === patchify: F.unfold, then the places in another order
def patchify(images, patch_size):
    c = images.shape[1]
    if images.shape[2] % patch_size or images.shape[3] % patch_size:
        raise ValueError("sizes")
    columns = F.unfold(images, kernel_size=patch_size, stride=patch_size).transpose(1, 2)
    b, n, _ = columns.shape
    return columns.reshape(b, n, c, -1).transpose(2, 3).reshape(b, n, -1)

# === patchify: Tensor.unfold twice
def patchify(images, patch_size):
    rows, cols = patch_grid(tuple(images.shape[-2:]), patch_size)
    x = images.unfold(2, patch_size, patch_size).unfold(3, patch_size, patch_size)  # (B, C, R, S, p, p)
    return x.permute(0, 2, 3, 4, 5, 1).flatten(3).flatten(1, 2)

# === patchify: filled into an empty tensor
def patchify(images, patch_size):
    b, c, h, w = images.shape
    p = patch_size
    if h % p > 0 or w % p > 0:
        raise ValueError(f"images of {h} x {w} cannot be cut into patches of {p}")
    out = images.new_empty(b, (h // p) * (w // p), p * p * c)
    n = 0
    for i in range(h // p):
        for j in range(w // p):
            out[:, n] = images[:, :, i * p : (i + 1) * p, j * p : (j + 1) * p].movedim(1, -1).reshape(b, -1)
            n += 1
    return out

# === patchify: a fancy index
def patchify(images, patch_size):
    h, w = images.shape[-2:]
    if h % patch_size or w % patch_size:
        raise ValueError("sizes")
    places = torch.arange(h * w).view(h // patch_size, patch_size, w // patch_size, patch_size)
    places = places.transpose(1, 2).reshape(-1, patch_size**2)
    return images.flatten(2)[:, :, places].permute(0, 2, 3, 1).flatten(2)

# === patchify: split and cat, with dots in the pattern
def patchify(images, patch_size):
    if any(s % patch_size for s in images.shape[-2:]):
        raise ValueError("sizes")
    bands = [band.split(patch_size, dim=-1) for band in images.split(patch_size, dim=-2)]
    squares = torch.stack([square for band in bands for square in band], dim=1)
    return rearrange(squares, "... c h w -> ... (h w c)")

# === patchify: a convolution with a kernel of unit vectors
def patchify(images, patch_size):
    patch_grid(images.shape[-2:], patch_size)
    c, n = images.shape[1], patch_size * patch_size * images.shape[1]
    kernel = torch.eye(n, dtype=images.dtype).view(n, patch_size, patch_size, c).permute(0, 3, 1, 2)
    return F.conv2d(images, kernel, stride=patch_size).flatten(2).mT

# === unpatchify: reshape and permute
def unpatchify(patches, patch_size, grid, channels=3):
    B, N, _ = patches.shape
    rows, cols = grid
    p = patch_size
    if N != rows * cols or patches.shape[2] != p * p * channels:
        raise ValueError("patches do not fit the grid")
    x = patches.reshape(B, rows, cols, p, p, channels).permute(0, 5, 1, 3, 2, 4)
    return x.reshape(B, channels, rows * p, cols * p)

# === unpatchify: F.fold
def unpatchify(patches, patch_size, grid, channels=3):
    size = (grid[0] * patch_size, grid[1] * patch_size)
    x = rearrange(patches, "b n (pp c) -> b (c pp) n", c=channels)
    return F.fold(x, size, kernel_size=patch_size, stride=patch_size)

# === unpatchify: loops
def unpatchify(patches, patch_size, grid, channels=3):
    b, n, d = patches.shape
    p = patch_size
    if n != grid[0] * grid[1] or d != p * p * channels:
        raise ValueError("wrong number of patches, or of pixels")
    out = torch.empty(b, channels, grid[0] * p, grid[1] * p, dtype=patches.dtype, device=patches.device)
    for i in range(n):
        r, s = divmod(i, grid[1])
        out[:, :, r * p : r * p + p, s * p : s * p + p] = patches[:, i].view(b, p, p, channels).permute(0, 3, 1, 2)
    return out

# === unpatchify: cat of cats
def unpatchify(patches, patch_size, grid, channels=3):
    rows, cols = grid
    squares = rearrange(patches, "b n (p q c) -> n b c p q", p=patch_size, q=patch_size, c=channels)
    bands = [torch.cat(list(squares[r * cols : (r + 1) * cols]), dim=-1) for r in range(rows)]
    return torch.cat(bands, dim=-2)

# === unpatchify: einsum, channels inferred
def unpatchify(x, p, grid, channels=3):
    h, w = grid
    assert h * w == x.shape[1]
    x = x.reshape(x.shape[0], h, w, p, p, channels)
    return torch.einsum("nhwpqc->nchpwq", x).reshape(x.shape[0], -1, h * p, w * p)

# === LinearStem: own cut, in the same order
class LinearStem(nn.Module):
    def __init__(self, patch_size, in_chans, embed_dim):
        super().__init__()
        self.p = patch_size
        self.linear = nn.Linear(in_chans * patch_size**2, embed_dim)

    def forward(self, x):
        b, c, h, w = x.shape
        p = self.p
        x = x.view(b, c, h // p, p, w // p, p).permute(0, 2, 4, 3, 5, 1)
        return self.linear(x.reshape(b, -1, p * p * c))

# === LinearStem: as layers in a row
class LinearStem(nn.Module):
    def __init__(self, patch_size, in_chans, embed_dim):
        super().__init__()
        p = patch_size
        cut = Rearrange("b c (h p1) (w p2) -> b (h w) (p1 p2 c)", p1=p, p2=p)
        self.to_patch_embedding = nn.Sequential(cut, nn.Linear(p * p * in_chans, embed_dim))

    def forward(self, img):
        return self.to_patch_embedding(img)

# === LinearStem: a matrix and a bias made by hand
class LinearStem(nn.Module):
    def __init__(self, patch_size, in_chans, embed_dim):
        super().__init__()
        self.patch_size = patch_size
        n = patch_size * patch_size * in_chans
        self.E = nn.Parameter(torch.randn(n, embed_dim) / math.sqrt(n))
        self.b = nn.Parameter(torch.zeros(embed_dim))

    def forward(self, images):
        return patchify(images, self.patch_size) @ self.E + self.b

# === LinearStem: F.linear
class LinearStem(nn.Module):
    def __init__(self, patch_size, in_chans, embed_dim):
        super().__init__()
        self.size = patch_size
        self.bias = nn.Parameter(torch.zeros(embed_dim))
        self.weight = nn.Parameter(torch.empty(embed_dim, patch_size * patch_size * in_chans))
        nn.init.xavier_uniform_(self.weight)

    def forward(self, images):
        return F.linear(patchify(images, self.size), self.weight, self.bias)

# === kernel_from_linear: reshape and permute
def kernel_from_linear(weight, patch_size):
    D, K = weight.shape
    if K % (patch_size * patch_size):
        raise ValueError(f"{K} columns are no multiple of {patch_size**2}")
    return weight.reshape(D, patch_size, patch_size, -1).permute(0, 3, 1, 2)

# === kernel_from_linear: one square for each channel
def kernel_from_linear(weight, patch_size):
    channels, rest = divmod(weight.shape[1], patch_size**2)
    if rest:
        raise ValueError("the columns do not fit")
    squares = [weight[:, c::channels].reshape(-1, patch_size, patch_size) for c in range(channels)]
    return torch.stack(squares, dim=1)

# === kernel_from_linear: unflatten and movedim
def kernel_from_linear(weight, patch_size):
    if weight.size(1) % patch_size**2 != 0:
        raise ValueError("columns")
    return weight.unflatten(1, (patch_size, patch_size, -1)).movedim(-1, 1).contiguous()

# === ConvStem: flatten and transpose
class ConvStem(nn.Module):
    def __init__(self, patch_size, in_chans, embed_dim):
        super().__init__()
        self.conv = nn.Conv2d(in_chans, embed_dim, patch_size, patch_size)

    def forward(self, x):
        return self.conv(x).flatten(2).transpose(1, 2)

# === ConvStem: as layers in a row
class ConvStem(nn.Module):
    def __init__(self, patch_size, in_chans, embed_dim):
        super().__init__()
        self.patch_embed = nn.Sequential(
            nn.Conv2d(in_channels=in_chans, out_channels=embed_dim, kernel_size=patch_size, stride=patch_size),
            Rearrange("b c h w -> b (h w) c"),
        )

    def forward(self, img):
        return self.patch_embed(img)

# === ConvStem: a linear layer inside
class ConvStem(nn.Module):
    def __init__(self, patch_size, in_chans, embed_dim):
        super().__init__()
        self.inner = LinearStem(patch_size, in_chans, embed_dim)

    def forward(self, images):
        return self.inner(images)

# === ConvStem: unfold and a matrix
class ConvStem(nn.Module):
    def __init__(self, patch_size, in_chans, embed_dim):
        super().__init__()
        self.p = patch_size
        self.weight = nn.Parameter(torch.randn(embed_dim, in_chans, patch_size, patch_size) * 0.02)
        self.bias = nn.Parameter(torch.zeros(embed_dim))

    def forward(self, x):
        columns = F.unfold(x, self.p, stride=self.p)
        return (self.weight.flatten(1) @ columns + self.bias[:, None]).permute(0, 2, 1)

# === Tokenizer: the package's stems by if and else
class Tokenizer(nn.Module):
    def __init__(self, img_size, patch_size, in_chans=3, embed_dim=768, stem="conv"):
        super().__init__()
        self.img_size = as_pair(img_size)
        self.grid = patch_grid(self.img_size, patch_size)
        self.num_patches = self.grid[0] * self.grid[1]
        if stem == "linear":
            self.proj = LinearStem(patch_size, in_chans, embed_dim)
        elif stem == "conv":
            self.proj = ConvStem(patch_size, in_chans, embed_dim)
        elif stem == "early_conv":
            self.proj = EarlyConvStem(patch_size, in_chans, embed_dim)
        else:
            raise ValueError(f"stem={stem!r}: use linear, conv or early_conv")

    def forward(self, x):
        if tuple(x.shape[-2:]) != self.img_size:
            raise ValueError(f"expected {self.img_size}")
        return self.proj(x)

# === Tokenizer: all layers of its own
class Tokenizer(nn.Module):
    def __init__(self, img_size, patch_size, in_chans=3, embed_dim=768, stem="conv"):
        super().__init__()
        h, w = (img_size, img_size) if isinstance(img_size, int) else img_size
        if h % patch_size != 0 or w % patch_size != 0:
            raise ValueError(f"image {h} x {w} is not divisible by patch size {patch_size}")
        self.patch_size, self.stem_type = patch_size, stem
        if stem == "linear":
            self.embed = nn.Linear(patch_size * patch_size * in_chans, embed_dim)
        elif stem == "conv":
            self.embed = nn.Conv2d(in_chans, embed_dim, kernel_size=patch_size, stride=patch_size)
        else:
            layers, steps, before = [], int(math.log2(patch_size)), in_chans
            for i in range(steps):
                after = max(8, embed_dim // 2 ** (steps - 1 - i))
                layers.append(nn.Conv2d(before, after, kernel_size=3, stride=2, padding=1, bias=False))
                layers.append(nn.BatchNorm2d(after))
                layers.append(nn.ReLU(inplace=True))
                before = after
            layers.append(nn.Conv2d(before, embed_dim, kernel_size=1))
            self.embed = nn.Sequential(*layers)

    def forward(self, images):
        if self.stem_type == "linear":
            return self.embed(patchify(images, self.patch_size))
        x = self.embed(images)
        b, d, r, s = x.shape
        return x.reshape(b, d, r * s).permute(0, 2, 1)

# === Tokenizer: one convolution for linear and conv, einops layer
class Tokenizer(nn.Module):
    def __init__(self, img_size, patch_size, in_chans=3, embed_dim=768, stem="conv"):
        super().__init__()
        img_size = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
        for side in img_size:
            if side % patch_size:
                raise ValueError(f"{side} pixels do not make whole patches of {patch_size}")
        if stem == "early_conv":
            self.net = EarlyConvStem(patch_size, in_chans, embed_dim)
        elif stem == "conv":
            conv = nn.Conv2d(in_chans, embed_dim, patch_size, patch_size)
            self.net = nn.Sequential(conv, Rearrange("b c h w -> b (h w) c"))
        else:
            cut = Rearrange("b c (h p) (w q) -> b (h w) (p q c)", p=patch_size, q=patch_size)
            self.net = nn.Sequential(cut, nn.Linear(in_chans * patch_size**2, embed_dim))

    def forward(self, images):
        return self.net(images)

# === Tokenizer: stems in a dictionary of modules, made when asked
class Tokenizer(nn.Module):
    def __init__(self, img_size, patch_size, in_chans=3, embed_dim=768, stem="conv"):
        super().__init__()
        self.rows, self.cols = patch_grid(img_size, patch_size)
        self.shape = (in_chans, self.rows * patch_size, self.cols * patch_size)
        if stem not in STEMS:
            raise ValueError(f"{stem} is not one of {list(STEMS)}")
        self.stems = nn.ModuleDict({stem: STEMS[stem](patch_size, in_chans, embed_dim)})
        self.kind = stem

    def forward(self, images):
        if images.shape[1:] != self.shape:
            raise ValueError(f"images of {tuple(images.shape[1:])}, expected {self.shape}")
        tokens = self.stems[self.kind](images)
        assert tokens.shape[1] == self.rows * self.cols
        return tokens

# === Tokenizer: weights made by hand, early stem of blocks with a linear layer at its end
class ConvBlock(nn.Module):
    def __init__(self, a, b):
        super().__init__()
        self.norm = nn.BatchNorm2d(b)
        self.conv = nn.Conv2d(a, b, 3, 2, 1, bias=False)

    def forward(self, x):
        return F.relu(self.norm(self.conv(x)))


class Tokenizer(nn.Module):
    def __init__(self, img_size, patch_size, in_chans=3, embed_dim=768, stem="conv"):
        super().__init__()
        patch_grid(img_size, patch_size)
        self.p, self.kind = patch_size, stem
        if stem == "early_conv":
            steps = patch_size.bit_length() - 1
            widths = [in_chans] + [max(8, embed_dim >> i) for i in range(steps)][::-1]
            self.out = nn.Linear(widths[-1], embed_dim)
            self.blocks = nn.ModuleList(ConvBlock(a, b) for a, b in zip(widths, widths[1:]))
        elif stem == "linear":
            self.W = nn.Parameter(torch.randn(patch_size**2 * in_chans, embed_dim) * 0.02)
            self.b = nn.Parameter(torch.zeros(1, 1, embed_dim))
        else:
            self.W = nn.Parameter(torch.randn(embed_dim, in_chans, patch_size, patch_size) * 0.02)
            self.b = nn.Parameter(torch.zeros(embed_dim))

    def forward(self, x):
        if self.kind == "linear":
            return patchify(x, self.p) @ self.W + self.b
        if self.kind == "conv":
            return F.conv2d(x, self.W, self.b, stride=self.p).flatten(-2).mT
        for block in self.blocks:
            x = block(x)
        return self.out(x.permute(0, 2, 3, 1).flatten(1, 2))

# === Tokenizer: conv stem as a linear layer over F.unfold
class Tokenizer(nn.Module):
    def __init__(self, img_size, patch_size, in_chans=3, embed_dim=768, stem="conv"):
        super().__init__()
        height, width = as_pair(img_size)
        if height % patch_size:
            raise ValueError(f"height {height}")
        if width % patch_size:
            raise ValueError(f"width {width}")
        self.p = patch_size
        if stem == "conv":
            self.proj = nn.Linear(in_chans * patch_size * patch_size, embed_dim)
        self.other = None if stem == "conv" else STEMS[stem](patch_size, in_chans, embed_dim)

    def forward(self, x):
        if self.other is not None:
            return self.other(x)
        return self.proj(F.unfold(x, self.p, stride=self.p).transpose(1, 2))
