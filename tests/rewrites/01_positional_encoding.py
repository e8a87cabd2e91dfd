import math

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import nn

from vit_course.positional import alibi_slopes, relative_offsets, sinusoidal_1d, t5_bucket

# === sinusoidal_1d: with exp and log, in float32, as in the PyTorch tutorial
def sinusoidal_1d(n_tokens, dim, base=10000.0):
    pe = torch.zeros(n_tokens, dim)
    position = torch.arange(0, n_tokens, dtype=torch.float).unsqueeze(1)
    div_term = torch.exp(torch.arange(0, dim, 2).float() * (-math.log(base) / dim))
    pe[:, 0::2] = torch.sin(position * div_term)
    pe[:, 1::2] = torch.cos(position * div_term[: dim // 2])
    return pe

# === sinusoidal_1d: two loops
def sinusoidal_1d(n_tokens, dim, base=10000.0):
    rows = []
    for p in range(n_tokens):
        row = []
        for c in range(dim):
            angle = p / base ** (2 * (c // 2) / dim)
            row.append(math.cos(angle) if c % 2 else math.sin(angle))
        rows.append(row)
    return torch.tensor(rows)

# === sinusoidal_1d: every column has its angle, torch.where chooses
def sinusoidal_1d(n_tokens, dim, base=10000.0):
    col = torch.arange(dim)
    freq = base ** (-(col - col % 2) / dim)
    angle = torch.outer(torch.arange(n_tokens).float(), freq)
    return torch.where(col % 2 == 0, angle.sin(), angle.cos())

# === sinusoidal_1d: numpy
def sinusoidal_1d(n_tokens, dim, base=10000.0):
    angle = np.arange(n_tokens)[:, None] / np.power(base, 2 * (np.arange(dim) // 2) / dim)
    angle[:, 0::2] = np.sin(angle[:, 0::2])
    angle[:, 1::2] = np.cos(angle[:, 1::2])
    return torch.from_numpy(angle).float()

# === sinusoidal_1d: stacked, woven by flatten, and cut
def sinusoidal_1d(n_tokens, dim, base=10000.0):
    pairs = (dim + 1) // 2
    omega = torch.pow(torch.tensor(base), -2 * torch.arange(pairs) / dim)
    angle = torch.einsum("n,i->ni", torch.arange(n_tokens).float(), omega)
    return torch.stack((angle.sin(), angle.cos()), dim=2).reshape(n_tokens, 2 * pairs)[:, :dim]

# === sinusoidal_1d: a complex exponential
def sinusoidal_1d(n_tokens, dim, base=10000.0):
    omega = base ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    z = torch.exp(1j * torch.arange(n_tokens, dtype=torch.float64)[:, None] * omega)
    woven = rearrange([z.imag, z.real], "two n i -> n (i two)")
    return woven[:, :dim].to(torch.float32)

# === sinusoidal_1d: the cosine as a shifted sine
def sinusoidal_1d(n_tokens, dim, base=10000.0):
    c = torch.arange(dim, dtype=torch.float64)
    angle = torch.arange(n_tokens, dtype=torch.float64).view(-1, 1) * base ** -(2 * (c // 2) / dim)
    return torch.sin(angle + (c % 2) * math.pi / 2).float()

# === sinusoidal_1d: one clock hand, turned step by step
def sinusoidal_1d(n_tokens, dim, base=10000.0):
    omega = [1 / base ** (2 * i / dim) for i in range(math.ceil(dim / 2))]
    table = torch.empty((n_tokens, dim))
    for p in range(n_tokens):
        hands = [f(w * p) for w in omega for f in (math.sin, math.cos)]
        table[p] = torch.tensor(hands[:dim])
    return table

# === offset_matrix: entry by entry
def offset_matrix(k, dim, base=10000.0):
    if dim % 2 != 0:
        raise ValueError("dim must be even")
    m = torch.zeros(dim, dim)
    for i in range(0, dim, 2):
        t = k / base ** (i / dim)
        m[i, i] = m[i + 1, i + 1] = math.cos(t)
        m[i, i + 1] = math.sin(t)
        m[i + 1, i] = -math.sin(t)
    return m

# === offset_matrix: diagonals
def offset_matrix(k, dim, base=10000.0):
    if dim % 2:
        raise ValueError(f"{dim} is odd")
    turn = k * torch.exp(-math.log(base) * torch.arange(0, dim, 2) / dim)
    side = torch.stack([turn.sin(), torch.zeros_like(turn)], dim=1).flatten()[:-1]
    return turn.cos().repeat_interleave(2).diag() + side.diag(1) - side.diag(-1)

# === offset_matrix: the exponential of a matrix
def offset_matrix(k, dim, base=10000.0):
    if dim % 2:
        raise ValueError("odd")
    omega = torch.tensor([base ** (-2 * i / dim) for i in range(dim // 2)], dtype=torch.float64)
    one = torch.tensor([[0.0, 1.0], [-1.0, 0.0]], dtype=torch.float64)
    return torch.matrix_exp(k * torch.kron(omega.diag(), one)).float()

# === sinusoidal_2d: expanded on a grid
def sinusoidal_2d(grid, dim, base=10000.0):
    if dim % 4 != 0:
        raise ValueError("dim must be divisible by 4")
    h, w = grid
    half = dim // 2
    table = torch.zeros(h, w, dim)
    table[:, :, :half] = sinusoidal_1d(h, half, base=base)[:, None, :]
    table[:, :, half:] = sinusoidal_1d(w, half, base=base)[None, :, :]
    return table.reshape(h * w, dim)

# === sinusoidal_2d: two loops
def sinusoidal_2d(grid, dim, base=10000.0):
    if dim % 4:
        raise ValueError(dim)
    r, c = sinusoidal_1d(grid[0], dim // 2, base), sinusoidal_1d(grid[1], dim // 2, base)
    return torch.stack([torch.cat([r[i], c[j]]) for i in range(grid[0]) for j in range(grid[1])])

# === sinusoidal_2d: meshgrid and indexing
def sinusoidal_2d(grid, dim, base=10000.0):
    if dim % 4 > 0:
        raise ValueError("not divisible by 4")
    i, j = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    longest = sinusoidal_1d(max(grid), dim // 2, base)
    return torch.cat((longest[i.flatten()], longest[j.flatten()]), -1)

# === sinusoidal_2d: einops
def sinusoidal_2d(grid, dim, base=10000.0):
    if dim // 4 * 4 != dim:
        raise ValueError("dim")
    rows, cols = grid
    r = repeat(sinusoidal_1d(rows, dim // 2, base), "r d -> (r c) d", c=cols)
    c = repeat(sinusoidal_1d(cols, dim // 2, base), "c d -> (r c) d", r=rows)
    return torch.hstack([r, c])

# === sinusoidal_2d: on its own, quotient and remainder
def sinusoidal_2d(grid, dim, base=10000.0):
    if dim % 4:
        raise ValueError(f"{dim} % 4 != 0")
    n, quarter = grid[0] * grid[1], dim // 4
    omega = 1.0 / base ** (torch.arange(quarter, dtype=torch.float64) / quarter)
    out = torch.empty(n, dim)
    for start, p in ((0, torch.arange(n) // grid[1]), (2 * quarter, torch.arange(n) % grid[1])):
        angle = p[:, None] * omega
        out[:, start : start + 2 * quarter : 2] = torch.sin(angle)
        out[:, start + 1 : start + 2 * quarter : 2] = torch.cos(angle)
    return out

# === sinusoidal_2d: numpy with a helper inside
def sinusoidal_2d(grid, dim, base=10000.0):
    if dim % 4 != 0:
        raise ValueError("wrong width")

    def encode(p):
        a = p[:, None] * base ** (-2.0 * np.arange(dim // 4) / (dim // 2))
        return np.stack([np.sin(a), np.cos(a)], axis=-1).reshape(len(p), -1)

    y, x = np.mgrid[: grid[0], : grid[1]]
    return torch.tensor(np.concatenate([encode(y.ravel()), encode(x.ravel())], axis=1), dtype=torch.float32)

# === LearnedPositions: a table without batch axis, other names
class LearnedPositions(nn.Module):
    def __init__(self, n_tokens, dim, dropout=0.0, std=0.02):
        super().__init__()
        self.pos_embed = nn.Parameter(torch.empty(n_tokens, dim))
        torch.nn.init.trunc_normal_(self.pos_embed, std=std)
        self.drop = nn.Dropout(p=dropout)

    def forward(self, x):
        if x.shape[1] != self.pos_embed.shape[0]:
            raise ValueError(f"expected {self.pos_embed.shape[0]} tokens, got {x.shape[1]}")
        return self.drop(x + self.pos_embed)

# === LearnedPositions: nn.Embedding
class LearnedPositions(nn.Module):
    def __init__(self, n_tokens, dim, dropout=0.0, std=0.02):
        super().__init__()
        self.n_tokens = n_tokens
        self.embedding = nn.Embedding(n_tokens, dim)
        nn.init.trunc_normal_(self.embedding.weight, mean=0.0, std=std)
        self.register_buffer("ids", torch.arange(n_tokens), persistent=False)
        self.dropout = nn.Dropout(dropout) if dropout > 0 else nn.Identity()

    def forward(self, tokens):
        b, n, d = tokens.size()
        if n != self.n_tokens:
            raise ValueError("number of tokens")
        return self.dropout(tokens + self.embedding(self.ids).unsqueeze(0).expand(b, -1, -1))

# === LearnedPositions: functional dropout, torch.add, the number in a variable
class LearnedPositions(nn.Module):
    def __init__(self, n_tokens, dim, dropout=0.0, std=0.02):
        super(LearnedPositions, self).__init__()
        self.p = dropout
        self.table = nn.Parameter(nn.init.trunc_normal_(torch.zeros(1, n_tokens, dim), 0.0, std))

    def forward(self, tokens):
        if tokens.size(-2) != self.table.size(1):
            raise ValueError("tokens")
        return F.dropout(torch.add(tokens, self.table), p=self.p, training=self.training)

# === LearnedPositions: (D, N), scaled standard normals, in-place dropout of the fresh sum
class LearnedPositions(nn.Module):
    def __init__(self, n_tokens, dim, dropout=0.0, std=0.02):
        super().__init__()
        start = torch.randn(dim, n_tokens).clamp(-3, 3) * std
        self.weight = nn.Parameter(start)
        self.drop = nn.Dropout(dropout, inplace=True)

    def forward(self, tokens):
        if tokens.shape[1] != self.weight.shape[1]:
            raise ValueError("wrong number of tokens")
        return self.drop(tokens + self.weight.t())

# === LearnedPositions: cut at two deviations, dropout only where it is wanted
class LearnedPositions(nn.Module):
    def __init__(self, n_tokens, dim, dropout=0.0, std=0.02):
        super().__init__()
        self.positions = nn.Parameter(torch.empty(1, n_tokens, dim))
        nn.init.trunc_normal_(self.positions, std=std, a=-2 * std, b=2 * std)
        self.dropout = nn.Dropout(dropout) if dropout else None

    def forward(self, tokens):
        if tokens.shape[1:] != self.positions.shape[1:]:
            raise ValueError("shape")
        out = tokens + self.positions
        if self.dropout is not None:
            out = self.dropout(out)
        return out

# === LearnedPositions: (N, 1, D), plain normals, dropout by hand
class LearnedPositions(nn.Module):
    def __init__(self, n_tokens, dim, dropout=0.0, std=0.02):
        super().__init__()
        self.n, self.dropout = n_tokens, dropout
        self.pe = nn.Parameter(torch.zeros(n_tokens, 1, dim))
        with torch.no_grad():
            self.pe.normal_(0, std)

    def forward(self, tokens):
        if tokens.shape[1] != self.n:
            raise ValueError(f"{tokens.shape[1]} tokens")
        total = tokens + rearrange(self.pe, "n 1 d -> 1 n d")
        if self.training and self.dropout > 0:
            keep = (torch.rand_like(total) >= self.dropout).to(total.dtype)
            total = total * keep / (1 - self.dropout)
        return total

# === ShawRelative: the direct way, by einsum
class ShawRelative(nn.Module):
    def __init__(self, head_dim, max_distance=16):
        super().__init__()
        self.max_distance = max_distance
        self.table = nn.Parameter(torch.empty(2 * max_distance + 1, head_dim))
        nn.init.trunc_normal_(self.table, std=0.02)

    def forward(self, q):
        m = self.max_distance
        row = torch.clamp(relative_offsets(q.shape[-2]), -m, m) + m
        return torch.einsum("bhid,ijd->bhij", q, self.table[row])

# === ShawRelative: an nn.Embedding and a product
class ShawRelative(nn.Module):
    def __init__(self, head_dim, max_distance=16):
        super().__init__()
        self.m = max_distance
        self.rel = nn.Embedding(2 * max_distance + 1, head_dim)

    def forward(self, q):
        p = torch.arange(q.size(2))
        index = (p.view(1, -1) - p.view(-1, 1)).clip(-self.m, self.m) + self.m
        return (q.unsqueeze(3) * self.rel(index)).sum(-1)

# === ShawRelative: query by query
class ShawRelative(nn.Module):
    def __init__(self, head_dim, max_distance=16):
        super().__init__()
        self.max_distance = max_distance
        self.table = nn.Parameter(0.02 * torch.randn(2 * max_distance + 1, head_dim))

    def forward(self, q):
        n, m, out = q.shape[-2], self.max_distance, []
        for i in range(n):
            rows = [min(max(j - i, -m), m) + m for j in range(n)]
            out.append(q[:, :, i] @ self.table[rows].T)
        return torch.stack(out, dim=2)

# === T5Bias: an nn.Embedding
class T5Bias(nn.Module):
    def __init__(self, num_heads, num_buckets=32, max_distance=128):
        super().__init__()
        self.num_buckets, self.max_distance = num_buckets, max_distance
        self.relative_attention_bias = nn.Embedding(num_buckets, num_heads)

    def forward(self, n_tokens):
        p = torch.arange(n_tokens)
        bucket = t5_bucket(p[None] - p[:, None], num_buckets=self.num_buckets, max_distance=self.max_distance)
        return rearrange(self.relative_attention_bias(bucket), "i j h -> h i j")

# === T5Bias: heads first in the table
class T5Bias(nn.Module):
    def __init__(self, num_heads, num_buckets=32, max_distance=128):
        super().__init__()
        self.k, self.m = num_buckets, max_distance
        self.bias = nn.Parameter(torch.randn(num_heads, num_buckets) * 0.02)

    def forward(self, n_tokens):
        return self.bias[:, t5_bucket(relative_offsets(n_tokens), self.k, self.m)]

# === T5Bias: one-hot buckets and einsum
class T5Bias(nn.Module):
    def __init__(self, num_heads, num_buckets=32, max_distance=128):
        super().__init__()
        self.max_distance = max_distance
        self.table = nn.Parameter(torch.empty(num_buckets, num_heads))
        nn.init.trunc_normal_(self.table, std=0.02)

    def forward(self, n_tokens):
        buckets = t5_bucket(relative_offsets(n_tokens), len(self.table), self.max_distance)
        hot = F.one_hot(buckets, len(self.table)).to(self.table.dtype)
        return torch.einsum("ijk,kh->hij", hot, self.table)

# === alibi_slopes: recursive, as in the paper's code
def alibi_slopes(num_heads):
    def get(n):
        start = 2 ** (-(2 ** -(math.log2(n) - 3)))
        return [start * start**i for i in range(n)]

    def slopes(n):
        if math.log2(n).is_integer():
            return get(n)
        closest = 2 ** math.floor(math.log2(n))
        return get(closest) + slopes(2 * closest)[0::2][: n - closest]

    return torch.tensor(slopes(num_heads))

# === alibi_slopes: tensors
def alibi_slopes(num_heads):
    low = 1
    while low * 2 <= num_heads:
        low *= 2
    first = torch.pow(2.0, -8.0 / low * torch.arange(1, low + 1))
    further = torch.pow(2.0, -4.0 / low * (2 * torch.arange(num_heads - low) + 1))
    return torch.cat([first, further])

# === alibi_bias: broadcasting positions
def alibi_bias(n_tokens, num_heads):
    p = torch.arange(n_tokens)
    return alibi_slopes(num_heads).view(-1, 1, 1) * -(p[:, None] - p[None, :]).abs()

# === alibi_bias: einsum and cdist
def alibi_bias(n_tokens, num_heads):
    p = torch.arange(n_tokens).float()[:, None]
    return -torch.einsum("h,ij->hij", alibi_slopes(num_heads), torch.cdist(p, p, p=1))

# === alibi_bias: head by head
def alibi_bias(n_tokens, num_heads):
    table = torch.zeros(num_heads, n_tokens, n_tokens)
    for h, slope in enumerate(alibi_slopes(num_heads)):
        for i in range(n_tokens):
            for j in range(n_tokens):
                table[h, i, j] = -slope * abs(i - j)
    return table

# === apply_rotary: complex numbers
def apply_rotary(x, positions=None, base=10000.0):
    *_, n, d = x.shape
    if d % 2:
        raise ValueError("odd width")
    p = torch.arange(n) if positions is None else positions
    if len(p) != n:
        raise ValueError("positions")
    theta = p[:, None].double() * base ** (-torch.arange(0, d, 2).double() / d)
    z = torch.view_as_complex(x.reshape(*x.shape[:-1], d // 2, 2).contiguous())
    z = z * torch.polar(torch.ones_like(theta), theta).to(z.dtype)
    return torch.view_as_real(z).flatten(-2)

# === apply_rotary: repeated angles and turned pairs, in the input's format
def apply_rotary(x, positions=None, base=10000.0):
    n, d = x.size(-2), x.size(-1)
    if d % 2 != 0:
        raise ValueError("d must be even")
    if positions is None:
        positions = torch.arange(n)
    if positions.numel() != n:
        raise ValueError("one position for each token")
    freq = 1.0 / (base ** (torch.arange(0, d, 2).to(x.dtype) / d))
    theta = torch.outer(positions.to(x.dtype), freq).repeat_interleave(2, dim=-1)
    a, b = rearrange(x, "... (i two) -> two ... i", two=2)
    turned = rearrange([-b, a], "two ... i -> ... (i two)")
    return x * theta.cos() + turned * theta.sin()

# === apply_rotary: a matrix for each token
def apply_rotary(x, positions=None, base=10000.0):
    n, d = x.shape[-2:]
    if d % 2:
        raise ValueError("d")
    positions = range(n) if positions is None else positions.tolist()
    if len(positions) != n:
        raise ValueError("positions")
    rows = []
    for i, p in enumerate(positions):
        t = [p / base ** (2 * k / d) for k in range(d // 2)]
        blocks = [torch.tensor([[math.cos(u), -math.sin(u)], [math.sin(u), math.cos(u)]], dtype=x.dtype) for u in t]
        rows.append(x[..., i, :] @ torch.block_diag(*blocks).T)
    return torch.stack(rows, dim=-2)

# === apply_rotary: filled into an empty tensor
def apply_rotary(x, positions=None, base=10000.0):
    N, D = x.shape[-2:]
    if D % 2 == 1:
        raise ValueError("D must be even")
    pos = positions if positions is not None else torch.arange(N)
    if pos.shape[0] != N:
        raise ValueError("positions do not fit")
    angle = torch.einsum("n,i->ni", pos.to(torch.float64), base ** (-2 * torch.arange(D // 2, dtype=torch.float64) / D))
    c, s = torch.cos(angle).to(x.dtype), torch.sin(angle).to(x.dtype)
    out = torch.zeros_like(x)
    out[..., ::2] = x[..., ::2] * c - x[..., 1::2] * s
    out[..., 1::2] = x[..., ::2] * s + x[..., 1::2] * c
    return out

# === apply_rotary: angles in 32 bits, cast at the end
def apply_rotary(x, positions=None, base=10000.0):
    n, d = x.shape[-2:]
    if d % 2:
        raise ValueError("even width only")
    t = torch.arange(n) if positions is None else positions
    if len(t) != n:
        raise ValueError("length of positions")
    angle = t.float()[:, None] * torch.exp(torch.arange(0, d, 2) * (-math.log(base) / d))
    c, s = angle.cos(), angle.sin()
    x1, x2 = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((x1 * c - x2 * s, x2 * c + x1 * s), -1).reshape(x.shape).to(x.dtype)
