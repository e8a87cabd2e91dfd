import math
import re

import torch
from einops import rearrange

# === join_qkv: a new dictionary, entry by entry
def join_qkv(weights):
    _check_lost(weights)
    joined = {}
    for name, value in weights.items():
        match = re.fullmatch(r"(.*attn\.)([qkv])\.(weight|bias)", name)
        if not match:
            joined[name] = value
        elif (match[2], match[3]) == ("q", "weight"):
            rows, start = value.shape[0], match[1]
            names = [start + part for part in ("q", "k", "v")]
            joined[start + "qkv.weight"] = torch.cat([weights[n + ".weight"] for n in names], dim=0)
            joined[start + "qkv.bias"] = torch.cat(
                [weights.get(n + ".bias", torch.zeros(rows, dtype=value.dtype)) for n in names])
    return joined

# === join_qkv: stack and flatten, zeros from the matrix
def join_qkv(weights):
    _check_lost(weights)
    out = weights.copy()
    starts = {n[: -len("q.weight")] for n in weights if n.endswith("attn.q.weight")}
    for start in starts:
        q, k, v = (out.pop(start + p + ".weight") for p in "qkv")
        zero = torch.zeros_like(q[:, 0])
        bq, bk, bv = (out.pop(start + p + ".bias", zero) for p in "qkv")
        out[start + "qkv.weight"] = torch.stack([q, k, v]).flatten(0, 1)
        out[start + "qkv.bias"] = torch.stack([bq, bk, bv]).flatten()
    return out

# === join_qkv: its own refusal, filled into one tensor
def join_qkv(weights):
    blocks = {}
    for name in weights:
        if name.startswith("encoder.blocks."):
            number, part = name.removeprefix("encoder.blocks.").split(".", 1)
            blocks.setdefault(number, set()).add(part)
    if any(parts != next(iter(blocks.values())) for parts in blocks.values()):
        raise ValueError("the blocks do not have the same parts")
    joined = {n: w for n, w in weights.items() if not re.search(r"attn\.[qkv]\.(weight|bias)$", n)}
    for name, query in weights.items():
        if name.endswith("attn.q.weight"):
            start, (rows, columns) = name[:-8], query.shape
            matrix, bias = query.new_empty(3 * rows, columns), query.new_zeros(3 * rows)
            for i, part in enumerate("qkv"):
                matrix[i * rows : (i + 1) * rows] = weights[f"{start}{part}.weight"]
                if f"{start}{part}.bias" in weights:
                    bias[i * rows : (i + 1) * rows] = weights[f"{start}{part}.bias"]
            joined[f"{start}qkv.weight"], joined[f"{start}qkv.bias"] = matrix, bias
    return joined

# === find_grid: whole roots
def find_grid(n_positions, prefixes):
    for prefix in prefixes:
        left = n_positions - prefix
        if left > 0 and math.isqrt(left) ** 2 == left:
            return math.isqrt(left), math.isqrt(left)
    raise ValueError("no square")

# === find_grid: counting up
def find_grid(n_positions, prefixes):
    squares = {side * side: side for side in range(1, n_positions + 1)}
    fits = [squares[n_positions - p] for p in prefixes if n_positions - p in squares]
    if not fits:
        raise ValueError(f"{n_positions} positions and {prefixes} other tokens: give the size")
    return (fits[0],) * 2

# === find_grid: floats that are whole
def find_grid(n_positions, prefixes):
    for n in (n_positions - p for p in prefixes):
        if n < 1:
            continue
        root = math.sqrt(n)
        if root.is_integer():
            return [int(root), int(root)]
    raise ValueError(n_positions)

# === turn_kernel: permute and flatten, by the last words of the name
def turn_kernel(name, value):
    *path, kind = name.split(".")
    layer = path[-1] if path else ""
    ours = ".".join([*path, "weight" if kind in ("kernel", "scale") else kind])
    if layer in ("q", "k", "v"):
        value = value.flatten(-2)
        return ours, value.t() if kind == "kernel" else value
    if kind != "kernel":
        return ours, value
    if value.dim() == 4:
        return ours, value.permute(3, 2, 0, 1)
    if value.dim() == 3:
        return ours, value.flatten(0, 1).t()
    return ours, value.t()

# === turn_kernel: reshape and replace, number of axes first
def turn_kernel(name, value):
    new = name.replace(".kernel", ".weight").replace(".scale", ".weight")
    qkv = any(f"attn.{part}." in name for part in "qkv")
    if value.ndim == 4:
        value = value.movedim((0, 1), (2, 3)).transpose(0, 1)
    elif value.ndim == 3 and qkv:
        value = value.reshape(value.shape[0], -1).T.contiguous()
    elif value.ndim == 3 and "proj" in name:
        value = value.reshape(-1, value.shape[-1]).T.contiguous()
    elif value.ndim == 2:
        value = value.reshape(-1) if qkv else torch.transpose(value, 0, 1)
    return new, value

# === turn_kernel: a table of patterns
def turn_kernel(name, value):
    rules = [(r"stem.*kernel", "p q c d -> d c p q"), (r"attn\.[qkv]\.kernel", "i h d -> (h d) i"),
             (r"attn\.[qkv]\.bias", "h d -> (h d)"), (r"attn\.proj\.kernel", "h d o -> o (h d)"),
             (r"kernel", "i o -> o i")]
    pattern = next((p for rule, p in rules if re.search(rule, name)), None)
    ending = {"kernel": "weight", "scale": "weight"}
    head, _, tail = name.rpartition(".")
    name = f"{head}.{ending.get(tail, tail)}" if head else tail
    return name, value if pattern is None else rearrange(value, pattern)

# === layer_of: a regular expression
def layer_of(name, depth):
    match = re.match(r"encoder\.blocks\.(\d+)\.", name)
    if match:
        return int(match[1]) + 1
    return depth + 1 if re.match("norm|head", name) else 0

# === layer_of: the first word
def layer_of(name: str, depth: int) -> int:
    first, *rest = name.split(".")
    if first == "encoder":
        return int(rest[1]) + 1
    if first in ("class_token", "registers", "positions", "tokenizer"):
        return 0
    return depth + 1
