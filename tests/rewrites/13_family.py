import math

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import nn

from vit_course.attention import _split, merge_heads
from vit_course.family import OpenAttention, grid_offsets, move
from vit_course.tokenizer import patchify

# === grid_offsets: quotient and remainder
def grid_offsets(grid):
    n = torch.arange(grid[0] * grid[1])
    row, col = n // grid[1], n % grid[1]
    return torch.stack([row[None] - row[:, None], col[None] - col[:, None]], dim=-1)

# === grid_offsets: four loops
def grid_offsets(grid):
    rows, cols = grid
    places = [(r, c) for r in range(rows) for c in range(cols)]
    return torch.tensor([[[r2 - r1, c2 - c1] for r2, c2 in places] for r1, c1 in places])

# === grid_offsets: a mesh, as in Swin's code
def grid_offsets(grid):
    mesh = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    flat = torch.stack(mesh).flatten(1)
    return (flat[:, None, :] - flat[:, :, None]).permute(1, 2, 0).contiguous()

# === grid_offsets: einops
def grid_offsets(grid):
    row = repeat(torch.arange(grid[0]), "r -> (r c)", c=grid[1])
    col = repeat(torch.arange(grid[1]), "c -> (r c)", r=grid[0])
    place = rearrange([row, col], "two n -> n two")
    return rearrange(place, "j two -> 1 j two") - rearrange(place, "i two -> i 1 two")

# === GridBias: flat and heads last, as in Swin's code
class GridBias(nn.Module):
    def __init__(self, num_heads, grid, num_prefix_tokens=0):
        super().__init__()
        self.p, (rows, cols) = num_prefix_tokens, grid
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * rows - 1) * (2 * cols - 1), num_heads))
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)
        index = grid_offsets(grid) + torch.tensor([rows - 1, cols - 1])
        index[..., 0] *= 2 * cols - 1
        self.register_buffer("index", index.sum(-1), persistent=False)

    def forward(self):
        n = self.p + len(self.index)
        bias = self.relative_position_bias_table[self.index].permute(2, 0, 1)
        whole = bias.new_zeros(len(bias), n, n)
        whole[:, self.p :, self.p :] = bias
        return whole

# === GridBias: an nn.Embedding, cells found in forward
class GridBias(nn.Module):
    def __init__(self, num_heads, grid, num_prefix_tokens=0):
        super().__init__()
        self.grid, self.n_prefix = tuple(grid), num_prefix_tokens
        self.numbers = nn.Embedding((2 * grid[0] - 1) * (2 * grid[1] - 1), num_heads)
        nn.init.trunc_normal_(self.numbers.weight, std=0.02)

    def forward(self):
        rows, cols = self.grid
        down, right = grid_offsets(self.grid).unbind(-1)
        cell = (down + rows - 1) * (2 * cols - 1) + (right + cols - 1)
        bias = rearrange(self.numbers(cell), "i j h -> h i j")
        return nn.ZeroPad2d((self.n_prefix, 0, self.n_prefix, 0))(bias)

# === GridBias: query by query, a window of the table each
class GridBias(nn.Module):
    def __init__(self, num_heads, grid, num_prefix_tokens=0):
        super().__init__()
        self.rows, self.cols = grid
        self.prefix = num_prefix_tokens
        self.b = nn.Parameter(0.02 * torch.randn(num_heads, 2 * self.rows - 1, 2 * self.cols - 1))

    def forward(self):
        lines = []
        for r in range(self.rows):
            for c in range(self.cols):
                top, left = self.rows - 1 - r, self.cols - 1 - c
                seen = self.b[:, top : top + self.rows, left : left + self.cols]
                lines.append(seen.reshape(len(self.b), -1))
        return F.pad(torch.stack(lines, dim=1), (self.prefix, 0, self.prefix, 0))

# === GridBias: columns before rows, joined from blocks
class GridBias(nn.Module):
    def __init__(self, num_heads, grid, num_prefix_tokens=0):
        super().__init__()
        (r, c), self.prefix = grid, num_prefix_tokens
        self.table = nn.Parameter(nn.init.trunc_normal_(torch.empty(2 * c - 1, 2 * r - 1, num_heads), std=0.02))
        self.cells = grid_offsets(grid).add(torch.tensor([r - 1, c - 1]))

    def forward(self):
        bias = self.table.permute(2, 1, 0)[:, self.cells[:, :, 0], self.cells[:, :, 1]]
        h, n, _ = bias.shape
        bias = torch.cat([torch.zeros(h, self.prefix, n).to(bias), bias], dim=1)
        return torch.cat([torch.zeros(h, n + self.prefix, self.prefix).to(bias), bias], dim=2)

# === grid_turns: rows and columns apart, cos + i sin
def grid_turns(grid, head_dim, num_prefix_tokens=0, base=100.0):
    if head_dim % 4 != 0:
        raise ValueError("head_dim")
    quarter = head_dim // 4
    theta = 1.0 / base ** (torch.arange(quarter, dtype=torch.float64) / quarter)
    n = torch.arange(grid[0] * grid[1], dtype=torch.float64)
    row, col = torch.outer(n // grid[1], theta), torch.outer(n % grid[1], theta)
    angle = torch.cat([torch.zeros(num_prefix_tokens, 2 * quarter), torch.cat([row, col], dim=1)])
    return torch.complex(angle.cos().float(), angle.sin().float())

# === grid_turns: powers of single turns
def grid_turns(grid, head_dim, num_prefix_tokens=0, base=100.0):
    if head_dim % 4:
        raise ValueError(f"{head_dim} % 4")
    d = head_dim // 2
    turns = [[1.0] * d for _ in range(num_prefix_tokens)]
    steps = [base ** (-i / d) for i in range(0, d, 2)]
    for r in range(grid[0]):
        for c in range(grid[1]):
            angles = [r * s for s in steps] + [c * s for s in steps]
            turns.append([complex(math.cos(a), math.sin(a)) for a in angles])
    return torch.tensor(turns, dtype=torch.complex64)

# === grid_turns: the exponential of i times a mesh
def grid_turns(grid, head_dim, num_prefix_tokens=0, base=100.0):
    if head_dim // 4 * 4 != head_dim:
        raise ValueError("a multiple of 4 is needed")
    speed = torch.exp(-math.log(base) * torch.arange(head_dim // 4) / (head_dim // 4))
    mesh = torch.stack(torch.meshgrid(*map(torch.arange, grid), indexing="ij"), dim=-1)
    angle = torch.einsum("rcx,k->rcxk", mesh.float(), speed).reshape(-1, head_dim // 2)
    turns = torch.exp(1j * angle)
    return torch.cat([torch.ones(num_prefix_tokens, head_dim // 2, dtype=turns.dtype), turns])

# === turn: written out, cosines and sines
def turn(x, turns):
    wide = x if x.dtype in (torch.float32, torch.float64) else x.float()
    cos, sin = turns.real, turns.imag
    a, b = wide[..., 0::2], wide[..., 1::2]
    return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2).to(x.dtype)

# === turn: einops and torch.complex
def turn(x, turns):
    a, b = rearrange(x, "... (i two) -> two ... i", two=2)
    if x.dtype in (torch.float16, torch.bfloat16):
        a, b = a.float(), b.float()
    z = torch.complex(a.contiguous(), b.contiguous()) * turns
    return rearrange([z.real, z.imag], "two ... i -> ... (i two)").to(x.dtype)

# === turn: a little matrix for each pair
def turn(x, turns):
    c, s = turns.real, turns.imag
    matrices = torch.stack([torch.stack([c, -s], -1), torch.stack([s, c], -1)], dim=-2)
    pairs = x.reshape(*x.shape[:-1], -1, 2, 1).to(torch.promote_types(x.dtype, c.dtype))
    return (matrices.to(pairs.dtype) @ pairs).reshape(x.shape).to(x.dtype)

# === turn: two cosines and two sines a pair, neighbours swapped
def turn(x, turns):
    cos, sin = (t.repeat_interleave(2, dim=-1) for t in (turns.real, turns.imag))
    other = x.unflatten(-1, (-1, 2)).flip(-1) * torch.tensor([-1.0, 1.0], dtype=x.dtype)
    return (x * cos + other.flatten(-2) * sin).to(x.dtype)

# === same_window: four loops
def same_window(grid, window, shift=0):
    rows, cols = grid
    names = [((r - shift) // window, (c - shift) // window) for r in range(rows) for c in range(cols)]
    return torch.tensor([[a == b for b in names] for a in names])

# === same_window: rows and columns apart, joined at the end
def same_window(grid, window, shift=0):
    row, col = ((torch.arange(n) - shift) // window for n in grid)
    rows, cols = (t[:, None] == t for t in (row, col))
    n = grid[0] * grid[1]
    return (rows[:, None, :, None] & cols[None, :, None, :]).reshape(n, n)

# === same_window: a name for each window
def same_window(grid, window, shift=0):
    n = torch.arange(grid[0] * grid[1])
    row = torch.floor((n // grid[1] - shift) / window)
    col = torch.floor((n % grid[1] - shift) / window)
    name = row * 1000 + col
    return torch.eq(name.unsqueeze(0), name.unsqueeze(1))

# === same_window: a product of two masks
def same_window(grid, window, shift=0):
    sides = []
    for n in grid:
        number = (torch.arange(n) + window - shift) // window
        sides.append(number[:, None] == number[None, :])
    return torch.kron(sides[0].int(), sides[1].int()).bool()

# === window_order: view, permute, reshape
def window_order(grid, window, shift=0):
    (rows, cols), w = grid, window
    picture = torch.arange(rows * cols).view(rows, cols)
    picture = torch.roll(picture, shifts=[-shift, -shift], dims=[0, 1])
    return picture.view(rows // w, w, cols // w, w).permute(0, 2, 1, 3).reshape(-1, w * w)

# === window_order: loops
def window_order(grid, window, shift=0):
    rows, cols = grid
    found = []
    for top in range(0, rows, window):
        for left in range(0, cols, window):
            inside = [(top + r, left + c) for r in range(window) for c in range(window)]
            found.append([(r + shift) % rows * cols + (c + shift) % cols for r, c in inside])
    return torch.tensor(found)

# === window_order: unfold, pieces joined again
def window_order(grid, window, shift=0):
    picture = torch.arange(grid[0] * grid[1]).reshape(*grid)
    picture = torch.cat([picture[shift:], picture[:shift]], dim=0)
    picture = torch.cat([picture[:, shift:], picture[:, :shift]], dim=1)
    return picture.unfold(0, window, window).unfold(1, window, window).flatten(2).flatten(0, 1)

# === window_order: a picture with one channel, cut by patchify
def window_order(grid, window, shift=0):
    picture = torch.arange(grid[0] * grid[1]).view(1, 1, *grid).roll((-shift, -shift), (2, 3))
    return patchify(picture, window)[0]

# === ShiftedPatches: copies cut one by one, joined afterwards
class ShiftedPatches(nn.Module):
    def __init__(self, patch_size, in_chans, embed_dim, moves=None):
        super().__init__()
        h = patch_size // 2
        self.p = patch_size
        self.by = [(-h, -h), (h, -h), (-h, h), (h, h)] if moves is None else list(moves)
        n = in_chans * patch_size * patch_size * (len(self.by) + 1)
        self.layers = nn.Sequential(nn.LayerNorm(n), nn.Linear(n, embed_dim))

    def forward(self, images):
        pictures = [images] + [move(images, right, down) for right, down in self.by]
        return self.layers(torch.cat([patchify(picture, self.p) for picture in pictures], dim=2))

# === ShiftedPatches: colours before pixels, cut by einops, moved by slices
class ShiftedPatches(nn.Module):
    def __init__(self, patch_size, in_chans, embed_dim, moves=None):
        super().__init__()
        if moves is None:
            moves = [(int(x) * (patch_size // 2), int(y) * (patch_size // 2))
                     for x, y in ((-1, -1), (1, -1), (-1, 1), (1, 1))]
        self.patch_size, self.moves = patch_size, moves
        self.proj = nn.Linear(patch_size**2 * in_chans * (1 + len(moves)), embed_dim)
        self.norm = nn.LayerNorm(self.proj.in_features)

    def forward(self, images):
        height, width = images.shape[2:]
        pile = [images]
        for right, down in self.moves:
            rows, cols = torch.arange(height) - down, torch.arange(width) - right
            inside = ((rows >= 0) & (rows < height))[:, None] & ((cols >= 0) & (cols < width))
            copy = images[:, :, rows.clamp(0, height - 1)][..., cols.clamp(0, width - 1)]
            pile.append(copy * inside)
        p = self.patch_size
        tokens = rearrange(pile, "m b c (r p) (s q) -> b (r s) (m c p q)", p=p, q=p)
        return self.proj(self.norm(tokens))

# === ShiftedPatches: a functional norm, copies made into one tensor
class ShiftedPatches(nn.Module):
    def __init__(self, patch_size, in_chans, embed_dim, moves=None):
        super().__init__()
        half = patch_size // 2
        self.patch_size = patch_size
        self.moves = [(-half, -half), (half, -half), (-half, half), (half, half)]
        if moves is not None:
            self.moves = moves
        width = (1 + len(self.moves)) * in_chans * patch_size**2
        self.gain = nn.Parameter(torch.ones(width))
        self.shift = nn.Parameter(torch.zeros(width))
        self.lin = nn.Linear(width, embed_dim)

    def forward(self, images):
        pile = images
        for x, y in self.moves:
            pile = torch.cat((pile, F.pad(images, (x, -x, y, -y))), 1)
        tokens = patchify(pile, self.patch_size)
        mean = tokens.mean(-1, keepdim=True)
        std = (tokens.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt()
        return self.lin((tokens - mean) / std * self.gain + self.shift)

# === LocalityAttention: a mask of True and False where it will do
class LocalityAttention(OpenAttention):
    def __init__(self, dim, num_heads=8, **options):
        super().__init__(dim, num_heads, **options)
        self.log_scale = nn.Parameter(torch.zeros(()))

    def change(self, q, k, v, mask):
        other = ~torch.eye(q.shape[2], dtype=torch.bool, device=q.device)
        if mask is None:
            both = other
        elif mask.dtype == torch.bool:
            both = mask & other
        else:
            both = mask.masked_fill(~other, -torch.inf)
        return q, k * torch.exp(self.log_scale), v, both

# === LocalityAttention: always a float mask, half of the factor on each side
class LocalityAttention(OpenAttention):
    def __init__(self, dim, num_heads=8, **options):
        super().__init__(dim, num_heads, **options)
        self.log_scale = nn.Parameter(torch.zeros(()))

    def change(self, q, k, v, mask):
        n = q.size(-2)
        own = torch.diag(torch.full((n,), float("-inf"), dtype=q.dtype))
        if mask is not None and mask.dtype == torch.bool:
            mask = torch.where(mask, 0.0, -math.inf).to(q.dtype)
        half = (self.log_scale / 2).exp()
        return q * half, k * half, v, own if mask is None else own + mask

# === LocalityAttention: forward written anew, another name and a factor of one number
class LocalityAttention(OpenAttention):
    def __init__(self, dim, num_heads=8, **options):
        super().__init__(dim, num_heads, **options)
        self.temperature = nn.Parameter(torch.zeros(1))

    def forward(self, x, mask=None, need_weights=False):
        q, k, v = _split(self.qkv(x), self.num_heads)
        scores = q @ k.mT / q.shape[-1] ** 0.5 * self.temperature.exp()
        if mask is not None:
            scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
        itself = torch.eye(x.shape[1], dtype=torch.bool)
        weights = scores.masked_fill(itself, -math.inf).softmax(dim=-1)
        out = self.proj(merge_heads(weights @ v))
        return (out, weights) if need_weights else out
