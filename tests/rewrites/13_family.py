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
