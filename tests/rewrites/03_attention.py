import math

import numpy as np
import torch
import torch.nn.functional as F
from einops import einsum, rearrange, repeat
from einops.layers.torch import Rearrange
from torch import Tensor, nn

from vit_course.attention import (AttentionHead, HeadwiseAttention, HeadwiseLinear, MultiHeadSelfAttention, ScaledDotProductAttention,
                                  causal_mask, merge_heads, scaled_dot_product_attention, split_heads)

# === score_spread: by einsum, a loop over the rows, tensors returned
def score_spread(q, k, scale):
    s = torch.einsum("...nd,...md->...nm", scale * q, k)
    rows = s.reshape(-1, s.shape[-1])
    tops = torch.stack([F.softmax(row, 0).max() for row in rows])
    return s.std(), tops.mean()

# === score_spread: the largest weight from the largest score and the log of the sum; population deviation
def score_spread(q, k, scale):
    scores = torch.matmul(q, k.mT).mul(scale)
    top = torch.exp(scores.max(dim=-1).values - torch.logsumexp(scores, dim=-1))
    centred = scores - scores.mean()
    return float((centred**2).mean() ** 0.5), float(top.mean())

# === score_spread: numpy
def score_spread(q, k, scale):
    scores = (q @ k.transpose(-1, -2)).detach().numpy() * scale
    e = np.exp(scores - scores.max(-1, keepdims=True))
    return scores.std(ddof=1), (e / e.sum(-1, keepdims=True)).max(-1).mean()

# === causal_mask: compare the indices
def causal_mask(n_tokens):
    i = torch.arange(n_tokens)
    return i[:, None] >= i

# === causal_mask: not the upper triangle
def causal_mask(n_tokens):
    return ~torch.triu(torch.ones(n_tokens, n_tokens), diagonal=1).bool()

# === causal_mask: row by row
def causal_mask(n_tokens):
    return torch.tensor([[j <= i for j in range(n_tokens)] for i in range(n_tokens)])

# === causal_mask: from 0 and 1, a cumulative sum
def causal_mask(n_tokens):
    return torch.eye(n_tokens).cumsum(0).T.flip(0, 1).eq(1).T.T.flip(0, 1).T

# === scaled_dot_product_attention: by einsum and exp
def scaled_dot_product_attention(q, k, v, mask=None, dropout=0.0):
    s = torch.einsum("...nd,...md->...nm", q, k) * q.shape[-1] ** -0.5
    if mask is not None:
        s = torch.where(mask, s, float("-inf")) if mask.dtype == torch.bool else s + mask
    w = torch.exp(s - torch.logsumexp(s, -1, keepdim=True))
    return torch.einsum("...nm,...me->...ne", F.dropout(w, dropout), v), w

# === scaled_dot_product_attention: the framework's function for the output, weights beside it
def scaled_dot_product_attention(q, k, v, mask=None, dropout=0.0):
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
    scores = q @ k.mT / q.size(-1) ** 0.5
    if mask is not None:
        bias = torch.zeros(mask.shape, dtype=q.dtype).masked_fill(mask.logical_not(), -torch.inf) if mask.dtype is torch.bool else mask
        scores = scores + bias
    return out, F.softmax(scores, dim=-1)

# === scaled_dot_product_attention: both sides scaled, very negative instead of infinite
def scaled_dot_product_attention(q, k, v, mask=None, dropout=0.0):
    root = q.shape[-1] ** 0.25
    scores = torch.matmul(q / root, (k / root).transpose(-1, -2))
    if mask is not None:
        if mask.dtype == torch.bool:
            scores = scores.masked_fill(mask == 0, torch.finfo(scores.dtype).min)
        else:
            scores = scores + mask
    weights = torch.softmax(scores, dim=-1)
    dropped = nn.Dropout(dropout)(weights)
    return torch.matmul(dropped, v), weights

# === scaled_dot_product_attention: softmax by hand, dropout by hand
def scaled_dot_product_attention(q, k, v, mask=None, dropout=0.0):
    d = torch.tensor(k.shape[-1], dtype=q.dtype)
    logits = (q.unsqueeze(-2) * k.unsqueeze(-3)).sum(-1).div(d.sqrt())
    if mask is not None and mask.dtype == torch.bool:
        logits = logits.masked_fill(~mask, -1e9)
    elif mask is not None:
        logits = logits.add(mask)
    logits = logits - logits.amax(-1, keepdim=True)
    weights = logits.exp() / logits.exp().sum(-1, keepdim=True)
    kept = weights
    if dropout > 0:
        kept = weights * torch.bernoulli(torch.full_like(weights, 1 - dropout)) / (1 - dropout)
    return kept @ v, weights

# === scaled_dot_product_attention: batch axes flattened for bmm
def scaled_dot_product_attention(q, k, v, mask=None, dropout=0.0):
    front = q.shape[:-2]
    n, m, e = q.shape[-2], k.shape[-2], v.shape[-1]
    scores = torch.bmm(q.reshape(-1, n, q.shape[-1]), k.reshape(-1, m, k.shape[-1]).transpose(1, 2))
    scores = scores.view(*front, n, m) / math.sqrt(q.shape[-1])
    if mask is not None:
        if mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, float("-inf"))
        scores += mask
    weights = nn.Softmax(dim=-1)(scores)
    out = torch.bmm(F.dropout(weights, p=dropout, training=True).reshape(-1, n, m), v.reshape(-1, m, e))
    return out.view(*front, n, e), weights

# === scaled_dot_product_attention: weights from the framework's function, with the identity as values
def scaled_dot_product_attention(q, k, v, mask=None, dropout=0.0):
    eye = torch.eye(k.shape[-2], dtype=q.dtype, device=q.device).expand(*k.shape[:-2], -1, -1)
    weights = F.scaled_dot_product_attention(q, k, eye, mask)
    return F.dropout(weights, dropout) @ v, weights

# === causal_attention: the framework's
def causal_attention(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)

# === causal_attention: minus infinity added above the diagonal
def causal_attention(q, k, v):
    n = q.shape[-2]
    future = torch.full((n, n), float("-inf"), dtype=q.dtype).triu(1)
    weights = torch.softmax(q @ k.mT / math.sqrt(q.shape[-1]) + future, dim=-1)
    return weights @ v

# === causal_attention: token by token, each with its past alone
def causal_attention(q, k, v):
    outs = []
    for i in range(q.shape[-2]):
        past = slice(0, i + 1)
        outs.append(scaled_dot_product_attention(q[..., i : i + 1, :], k[..., past, :], v[..., past, :])[0])
    return torch.cat(outs, dim=-2)

# === causal_attention: cut off after exp, then divided by the sum that is left
def causal_attention(q, k, v):
    e = (q @ k.mT / math.sqrt(q.shape[-1])).exp().tril()
    return (e / e.sum(-1, keepdim=True)) @ v

# === ScaledDotProductAttention: a dropout module
class ScaledDotProductAttention(nn.Module):
    def __init__(self, dropout=0.0):
        super().__init__()
        self.drop = nn.Dropout(dropout)
        self.softmax = nn.Softmax(dim=-1)

    def forward(self, q, k, v, mask=None):
        scores = torch.matmul(q, k.transpose(-1, -2)) / np.sqrt(q.shape[-1])
        if mask is not None:
            scores = scores.masked_fill(~mask, -1e9) if mask.dtype == torch.bool else scores + mask
        weights = self.softmax(scores)
        return self.drop(weights) @ v, weights

# === ScaledDotProductAttention: the framework's function
class ScaledDotProductAttention(nn.Module):
    def __init__(self, dropout=0.0):
        super().__init__()
        self.p = dropout

    def forward(self, q, k, v, mask=None):
        p = self.p * self.training
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=p)
        return out, scaled_dot_product_attention(q, k, v, mask=mask)[1]

# === AttentionHead: one layer for all three
class AttentionHead(nn.Module):
    def __init__(self, dim, head_dim, dropout=0.0):
        super().__init__()
        self.to_qkv = nn.Linear(dim, 3 * head_dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, mask=None):
        q, k, v = self.to_qkv(x).chunk(3, dim=-1)
        _, weights = scaled_dot_product_attention(q, k, v, mask)
        return torch.bmm(self.dropout(weights), v), weights

# === AttentionHead: bare parameters
class AttentionHead(nn.Module):
    def __init__(self, dim, head_dim, dropout=0.0):
        super().__init__()
        self.wv, self.wk, self.wq = (nn.Parameter(torch.randn(dim, head_dim) * dim**-0.5) for _ in range(3))
        self.bv, self.bk, self.bq = (nn.Parameter(torch.zeros(head_dim)) for _ in range(3))
        self.dropout = dropout

    def forward(self, x, mask=None):
        q, k, v = x @ self.wq + self.bq, x @ self.wk + self.bk, x @ self.wv + self.bv
        return scaled_dot_product_attention(q, k, v, mask, self.dropout if self.training else 0.0)

# === AttentionHead: other names, other order
class AttentionHead(nn.Module):
    def __init__(self, dim, head_dim, dropout=0.0):
        super().__init__()
        self.value, self.key, self.query = nn.Linear(dim, head_dim), nn.Linear(dim, head_dim), nn.Linear(dim, head_dim)
        self.attention = ScaledDotProductAttention(dropout)

    def forward(self, x, mask=None):
        v = self.value(x)
        k = self.key(x)
        return self.attention(self.query(x), k, v, mask=mask)

# === MultiHeadSelfAttention: all heads at once
class MultiHeadSelfAttention(nn.Module):
    def __init__(self, dim, num_heads, dropout=0.0):
        super().__init__()
        self.num_heads, self.p = num_heads, dropout
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x, mask=None):
        q, k, v = split_heads(self.qkv(x), self.num_heads)
        if mask is not None and mask.ndim == 3:
            mask = mask[:, None]
        out, _ = scaled_dot_product_attention(q, k, v, mask, self.p if self.training else 0.0)
        return self.out(merge_heads(out))

# === MultiHeadSelfAttention: three lists of layers
class MultiHeadSelfAttention(nn.Module):
    def __init__(self, dim, num_heads, dropout=0.0):
        super().__init__()
        d = dim // num_heads
        self.queries = nn.ModuleList(nn.Linear(dim, d) for _ in range(num_heads))
        self.keys = nn.ModuleList(nn.Linear(dim, d) for _ in range(num_heads))
        self.values = nn.ModuleList(nn.Linear(dim, d) for _ in range(num_heads))
        self.mix = nn.Linear(dim, dim)
        self.drop = nn.Dropout(dropout)

    def forward(self, x, mask=None):
        outs = []
        for q, k, v in zip(self.queries, self.keys, self.values):
            weights = scaled_dot_product_attention(q(x), k(x), v(x), mask)[1]
            outs.append(self.drop(weights) @ v(x))
        return self.mix(torch.cat(outs, -1))

# === MultiHeadSelfAttention: heads interleaved in the joined width
class MultiHeadSelfAttention(nn.Module):
    def __init__(self, dim, num_heads, dropout=0.0):
        super().__init__()
        self.heads = nn.ModuleList([AttentionHead(dim, dim // num_heads, dropout) for _ in range(num_heads)])
        self.output = nn.Linear(dim, dim)

    def forward(self, x, mask=None):
        outs = torch.stack([head(x, mask)[0] for head in self.heads], dim=-1)
        return self.output(outs.flatten(-2))

# === split_heads: reshape and permute
def split_heads(qkv, num_heads):
    b, n, wide = qkv.shape
    return qkv.view(b, n, 3, num_heads, wide // (3 * num_heads)).permute(2, 0, 3, 1, 4)

# === split_heads: chunk, then each by itself
def split_heads(qkv, num_heads):
    parts = [t.unflatten(-1, (num_heads, -1)).transpose(1, 2) for t in qkv.chunk(3, dim=-1)]
    return torch.stack(parts)

# === split_heads: by slices
def split_heads(qkv, num_heads):
    d = qkv.shape[-1] // 3 // num_heads
    cuts = [qkv[..., i * d : (i + 1) * d] for i in range(3 * num_heads)]
    return torch.stack([torch.stack(cuts[t * num_heads : (t + 1) * num_heads], dim=1) for t in range(3)])

# === HeadwiseLinear: flatten and multiply
class HeadwiseLinear(nn.Module):
    def __init__(self, in_shape, out_shape):
        super().__init__()
        self.in_shape, self.out_shape = tuple(in_shape), tuple(out_shape)
        bound = math.prod(in_shape) ** -0.5
        self.weight = nn.Parameter(torch.empty(*in_shape, *out_shape).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.zeros(*out_shape))

    def forward(self, x):
        flat = x.flatten(-len(self.in_shape)) if len(self.in_shape) > 1 else x
        out = flat @ self.weight.reshape(flat.shape[-1], -1)
        return out.unflatten(-1, self.out_shape) + self.bias

# === HeadwiseLinear: dims given as lists
class HeadwiseLinear(nn.Module):
    def __init__(self, in_shape, out_shape):
        super().__init__()
        self.n = len(in_shape)
        bound = math.prod(in_shape) ** -0.5
        self.weight = nn.Parameter((torch.rand(*in_shape, *out_shape) * 2 - 1) * bound)
        self.bias = nn.Parameter(torch.zeros(out_shape))

    def forward(self, x):
        return torch.tensordot(x, self.weight, dims=([*range(-self.n, 0)], [*range(self.n)])) + self.bias

# === HeadwiseAttention: einsum all the way
class HeadwiseAttention(nn.Module):
    def __init__(self, dim, num_heads):
        super().__init__()
        heads = (num_heads, dim // num_heads)
        self.query, self.key, self.value = (HeadwiseLinear((dim,), heads) for _ in range(3))
        self.out = HeadwiseLinear(heads, (dim,))

    def forward(self, x, mask=None):
        q, k, v = self.query(x), self.key(x), self.value(x)
        scores = torch.einsum("bnhd,bmhd->bhnm", q, k) * q.shape[-1] ** -0.5
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
        return self.out(torch.einsum("bhnm,bmhd->bnhd", scores.softmax(-1), v))

# === HeadwiseAttention: ordinary layers
class HeadwiseAttention(nn.Module):
    def __init__(self, dim, num_heads):
        super().__init__()
        self.h = num_heads
        self.query, self.key, self.value, self.out = (nn.Linear(dim, dim) for _ in range(4))

    def forward(self, x, mask=None):
        q, k, v = (rearrange(layer(x), "b n (h d) -> b h n d", h=self.h) for layer in (self.query, self.key, self.value))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out(rearrange(out, "b h n d -> b n (h d)"))

# === fuse_qkv: a check in words, data assigned
def fuse_qkv(q, k, v):
    for layer in (k, v):
        if (layer.in_features, layer.out_features) != (q.in_features, q.out_features):
            raise ValueError("the three layers must be of one size")
    wide = nn.Linear(q.in_features, 3 * q.out_features, bias=True, dtype=q.weight.dtype, device=q.weight.device)
    biases = [layer.bias if layer.bias is not None else torch.zeros(layer.out_features).to(q.weight) for layer in (q, k, v)]
    wide.weight.data = torch.cat((q.weight.data, k.weight.data, v.weight.data), dim=0)
    wide.bias.data = torch.cat(biases, dim=0).data
    return wide

# === fuse_qkv: new parameters, a bias only where there is one
def fuse_qkv(q, k, v):
    if not q.weight.shape == k.weight.shape == v.weight.shape:
        raise ValueError(f"{q.weight.shape}, {k.weight.shape}, {v.weight.shape}")
    layers = [q, k, v]
    some = any(layer.bias is not None for layer in layers)
    fused = nn.Linear(q.in_features, 3 * q.out_features, bias=some)
    fused.weight = nn.Parameter(torch.vstack([layer.weight for layer in layers]).detach().clone())
    if some:
        parts = [torch.zeros_like(layer.weight[:, 0]) if layer.bias is None else layer.bias for layer in layers]
        fused.bias = nn.Parameter(torch.hstack(parts).detach())
    return fused

# === fuse_qkv: slices of the new layer are filled
def fuse_qkv(q, k, v):
    dims = {(m.in_features, m.out_features) for m in (q, k, v)}
    if len(dims) > 1:
        raise ValueError(f"unequal sizes {dims}")
    d = q.out_features
    fused = nn.Linear(q.in_features, d * 3).to(device=q.weight.device, dtype=q.weight.dtype)
    with torch.no_grad():
        fused.bias.zero_()
        for i, m in enumerate((q, k, v)):
            fused.weight[i * d : (i + 1) * d] = m.weight
            if m.bias is not None:
                fused.bias[i * d : (i + 1) * d] = m.bias
    return fused

# === fuse_qkv: by load_state_dict
def fuse_qkv(q, k, v):
    if k.weight.shape != q.weight.shape or v.weight.shape != q.weight.shape:
        raise ValueError("widths differ")
    weight = rearrange([m.weight for m in (q, k, v)], "t o i -> (t o) i")
    bias = rearrange([m.weight.new_zeros(len(m.weight)) if m.bias is None else m.bias for m in (q, k, v)], "t o -> (t o)")
    layer = nn.Linear(weight.shape[1], weight.shape[0]).to(weight.dtype)
    layer.load_state_dict({"weight": weight, "bias": bias})
    return layer

# === fuse_qkv: found by probing with the unit vectors
def fuse_qkv(q, k, v):
    if not (q.in_features == k.in_features == v.in_features and q.out_features == k.out_features == v.out_features):
        raise ValueError("q, k and v differ in size")
    zero = torch.zeros(1, q.in_features, dtype=q.weight.dtype)
    eye = torch.eye(q.in_features, dtype=q.weight.dtype)
    fused = nn.Linear(q.in_features, 3 * q.out_features, dtype=q.weight.dtype)
    with torch.no_grad():
        bias = torch.cat([q(zero), k(zero), v(zero)], -1)[0]
        fused.bias.copy_(bias)
        fused.weight.copy_((torch.cat([q(eye), k(eye), v(eye)], -1) - bias).T)
    return fused

# === fuse_qkv: without drawing random numbers
def fuse_qkv(q, k, v):
    if len({m.weight.shape for m in (q, k, v)}) > 1:
        raise ValueError("q, k, v must have equal shapes")
    fused = nn.utils.skip_init(nn.Linear, q.in_features, 3 * q.out_features, dtype=q.weight.dtype)
    zeros = torch.zeros(q.out_features, dtype=q.weight.dtype)
    nn.utils.vector_to_parameters(
        torch.cat([*(m.weight.detach().flatten() for m in (q, k, v)), *((zeros if m.bias is None else m.bias.detach()) for m in (q, k, v))]),
        fused.parameters(),
    )
    return fused

# === MultiHeadAttention: the framework's own layer inside
class MultiHeadAttention(nn.Module):
    def __init__(self, dim, num_heads=8, qkv_bias=True, attn_dropout=0.0, proj_dropout=0.0, impl="auto"):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"dim={dim} does not divide by num_heads={num_heads}")
        self.h = num_heads
        self.mha = nn.MultiheadAttention(dim, num_heads, attn_dropout, bias=True, batch_first=True)
        if not qkv_bias:
            nn.init.zeros_(self.mha.in_proj_bias)
            self.mha.in_proj_bias.requires_grad_(False)
        self.out_drop = nn.Dropout(proj_dropout)

    def forward(self, x, mask=None, need_weights=False):
        B, N, _ = x.shape
        if mask is not None:
            mask = mask.expand(B, self.h, N, N).reshape(B * self.h, N, N)
            mask = ~mask if mask.dtype == torch.bool else mask
        out, weights = self.mha(x, x, x, attn_mask=mask, need_weights=need_weights, average_attn_weights=False)
        return (self.out_drop(out), weights) if need_weights else self.out_drop(out)

# === MultiHeadAttention: separate layers, the framework's formula, no check of sizes
class MultiHeadAttention(nn.Module):
    def __init__(self, dim, num_heads=8, qkv_bias=True, attn_dropout=0.0, proj_dropout=0.0, impl="auto"):
        super().__init__()
        self.num_heads = num_heads
        self.w_q = nn.Linear(dim, dim, bias=qkv_bias)
        self.w_k = nn.Linear(dim, dim, bias=qkv_bias)
        self.w_v = nn.Linear(dim, dim, bias=qkv_bias)
        self.w_o = nn.Linear(dim, dim)
        self.attn_dropout, self.proj_dropout = attn_dropout, proj_dropout

    def forward(self, x, mask=None, need_weights=False):
        B, N, D = x.shape
        q, k, v = (w(x).view(B, N, self.num_heads, -1).transpose(1, 2) for w in (self.w_q, self.w_k, self.w_v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=self.attn_dropout if self.training else 0.0)
        out = F.dropout(self.w_o(out.transpose(1, 2).reshape(B, N, D)), self.proj_dropout, self.training)
        if need_weights:
            scores = q @ k.mT / math.sqrt(D // self.num_heads)
            if mask is not None:
                scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
            return out, scores.softmax(-1)
        return out

# === MultiHeadAttention: bare parameters with an axis for the heads, einsum
class MultiHeadAttention(nn.Module):
    def __init__(self, dim, num_heads=8, qkv_bias=True, attn_dropout=0.0, proj_dropout=0.0, impl="auto"):
        super().__init__()
        d = dim // num_heads
        self.W = nn.Parameter(torch.randn(3, num_heads, dim, d) / dim**0.5)
        self.b = nn.Parameter(torch.zeros(3, num_heads, d)) if qkv_bias else None
        self.Wo = nn.Parameter(torch.randn(num_heads, d, dim) / dim**0.5)
        self.bo = nn.Parameter(torch.zeros(dim))
        self.drop1, self.drop2 = nn.Dropout(attn_dropout), nn.Dropout(proj_dropout)

    def forward(self, x, mask=None, need_weights=False):
        qkv = torch.einsum("bni,thid->tbhnd", x, self.W)
        if self.b is not None:
            qkv = qkv + self.b[:, None, :, None]
        q, k, v = qkv
        scores = torch.einsum("bhnd,bhmd->bhnm", q, k) * q.shape[-1] ** -0.5
        if mask is not None:
            scores = torch.where(mask, scores, -torch.inf) if mask.dtype == torch.bool else scores + mask
        weights = scores.softmax(-1)
        out = torch.einsum("bhnm,bhmd,hdo->bno", self.drop1(weights), v, self.Wo) + self.bo
        out = self.drop2(out)
        return (out, weights) if need_weights else out

# === MultiHeadAttention: heads as a list of modules
class MultiHeadAttention(nn.Module):
    def __init__(self, dim, num_heads=8, qkv_bias=True, attn_dropout=0.0, proj_dropout=0.0, impl="auto"):
        super().__init__()
        d = dim // num_heads
        self.heads = nn.ModuleList([nn.Linear(dim, 3 * d, bias=qkv_bias) for _ in range(num_heads)])
        self.last = nn.Sequential(nn.Linear(dim, dim), nn.Dropout(proj_dropout))
        self.drop = nn.Dropout(attn_dropout)

    def forward(self, x, mask=None, need_weights=False):
        B, N, _ = x.shape
        if mask is not None:
            mask = mask.expand(B, len(self.heads), N, N)
        outs, maps = [], []
        for i, head in enumerate(self.heads):
            q, k, v = head(x).chunk(3, -1)
            _, w = scaled_dot_product_attention(q, k, v, None if mask is None else mask[:, i])
            outs.append(self.drop(w) @ v)
            maps.append(w)
        out = self.last(torch.cat(outs, -1))
        return (out, torch.stack(maps, 1)) if need_weights else out

# === MultiHeadAttention: query by itself, key and value in one layer
class MultiHeadAttention(nn.Module):
    def __init__(self, dim, num_heads=8, qkv_bias=True, attn_dropout=0.0, proj_dropout=0.0, impl="auto"):
        super().__init__()
        self.heads = num_heads
        self.to_q = nn.Linear(dim, dim, bias=qkv_bias)
        self.to_kv = nn.Linear(dim, 2 * dim, bias=qkv_bias)
        self.to_out = nn.Linear(dim, dim)
        self.attend = ScaledDotProductAttention(attn_dropout)
        self.drop = nn.Dropout(proj_dropout, inplace=True)

    def forward(self, x, mask=None, need_weights=False):
        k, v = self.to_kv(x).chunk(2, dim=-1)
        q, k, v = (rearrange(t, "b n (h d) -> b h n d", h=self.heads) for t in (self.to_q(x), k, v))
        out, weights = self.attend(q, k, v, mask)
        out = self.drop(self.to_out(rearrange(out, "b h n d -> b n (h d)")))
        return (out, weights) if need_weights else out

# === MultiHeadAttention: wide layer cut as (heads, 3, width)
class MultiHeadAttention(nn.Module):
    def __init__(self, dim, num_heads=8, qkv_bias=True, attn_dropout=0.0, proj_dropout=0.0, impl="auto"):
        super().__init__()
        self.h, self.p = num_heads, attn_dropout
        self.in_proj = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.out_proj = nn.Linear(dim, dim)
        self.drop = nn.Dropout(proj_dropout)

    def forward(self, x, mask=None, need_weights=False):
        b, n, dim = x.size()
        q, k, v = self.in_proj(x).reshape(b, n, self.h, 3, dim // self.h).permute(3, 0, 2, 1, 4).unbind(0)
        out, weights = scaled_dot_product_attention(q, k, v, mask, self.p if self.training else 0.0)
        out = self.drop(self.out_proj(out.permute(0, 2, 1, 3).contiguous().view(b, n, dim)))
        return (out, weights) if need_weights else out

# === MultiHeadAttention: wide layer cut as (heads, width, 3), heads joined as (width, heads)
class MultiHeadAttention(nn.Module):
    def __init__(self, dim, num_heads=8, qkv_bias=True, attn_dropout=0.0, proj_dropout=0.0, impl="auto"):
        super().__init__()
        self.h, self.p = num_heads, attn_dropout
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.drop = nn.Dropout(proj_dropout)

    def forward(self, x, mask=None, need_weights=False):
        q, k, v = rearrange(self.qkv(x), "b n (h d t) -> t b h n d", t=3, h=self.h)
        out, weights = scaled_dot_product_attention(q, k, v, mask, self.p if self.training else 0.0)
        out = self.drop(self.proj(rearrange(out, "b h n d -> b n (d h)")))
        return (out, weights) if need_weights else out

# === MultiHeadAttention: functional, matrices stored as (in, out)
class MultiHeadAttention(nn.Module):
    def __init__(self, dim, num_heads=8, qkv_bias=True, attn_dropout=0.0, proj_dropout=0.0, impl="auto"):
        super().__init__()
        self.n_head, self.ps = num_heads, (attn_dropout, proj_dropout)
        self.c_attn = nn.Parameter(torch.empty(dim, 3 * dim))
        self.c_attn_bias = nn.Parameter(torch.zeros(3 * dim)) if qkv_bias else 0.0
        self.c_proj = nn.Parameter(torch.empty(dim, dim))
        self.c_proj_bias = nn.Parameter(torch.zeros(dim))
        nn.init.xavier_uniform_(self.c_attn)
        nn.init.xavier_uniform_(self.c_proj)

    def forward(self, x, mask=None, need_weights=False):
        q, k, v = (x @ self.c_attn + self.c_attn_bias).split(x.shape[-1], dim=-1)
        q, k, v = (t.unflatten(-1, (self.n_head, -1)).transpose(1, 2) for t in (q, k, v))
        scores = (q @ k.transpose(-1, -2)).div(q.shape[-1] ** 0.5)
        if mask is not None:
            scores = scores.masked_fill(mask.logical_not(), float("-inf")) if mask.dtype == torch.bool else scores + mask
        att = F.softmax(scores, dim=-1)
        y = F.dropout(att, self.ps[0], self.training) @ v
        y = y.transpose(1, 2).flatten(2) @ self.c_proj + self.c_proj_bias
        y = F.dropout(y, self.ps[1], self.training)
        return (y, att) if need_weights else y

# === MultiHeadAttention: layers with an axis for the heads
class MultiHeadAttention(nn.Module):
    def __init__(self, dim, num_heads=8, qkv_bias=True, attn_dropout=0.0, proj_dropout=0.0, impl="auto"):
        super().__init__()
        d = dim // num_heads
        self.query, self.key, self.value = (HeadwiseLinear((dim,), (num_heads, d)) for _ in range(3))
        if not qkv_bias:
            for layer in (self.query, self.key, self.value):
                zeros = layer.bias.detach()
                del layer.bias
                layer.register_buffer("bias", zeros)
        self.out = HeadwiseLinear((num_heads, d), (dim,))
        self.attn, self.drop = ScaledDotProductAttention(attn_dropout), nn.Dropout(proj_dropout)

    def forward(self, x, mask=None, need_weights=False):
        q, k, v = (layer(x).transpose(1, 2) for layer in (self.query, self.key, self.value))
        out, weights = self.attn(q, k, v, mask)
        out = self.drop(self.out(out.transpose(1, 2)))
        return (out, weights) if need_weights else out
