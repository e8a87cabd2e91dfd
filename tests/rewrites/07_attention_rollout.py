import contextlib
import copy
import functools
import math

import numpy as np
import torch
import torch.nn.functional as F
from einops import einsum, rearrange, reduce
from torch import nn

from vit_course.attention import MultiHeadAttention, split_heads
from vit_course.rollout import attention_rollout, capture_attention, discard_smallest, fuse_heads, mix_residual
from vit_course.training import LitViT
from vit_course.vit import ViT

# === capture_attention: the layers' forward is wrapped and put back
def capture_attention(model, images):
    layers = [m for m in model.modules() if isinstance(m, MultiHeadAttention)]
    was = [m.training for m in model.modules()]
    seen = []

    def listening(layer):
        original = layer.forward

        def forward(x, mask=None, need_weights=False):
            out, weights = original(x, mask=mask, need_weights=True)
            seen.append(weights.detach())
            return (out, weights) if need_weights else out

        return forward

    try:
        model.eval()
        for layer in layers:
            layer.forward = listening(layer)
        with torch.no_grad():
            model(images)
    finally:
        for layer in layers:
            layer.__dict__.pop("forward", None)
        for m, flag in zip(model.modules(), was):
            m.training = flag
    return torch.stack(seen, 0)

# === capture_attention: a copy of the model is looked into
@torch.no_grad()
def capture_attention(model, images):
    twin = copy.deepcopy(model).eval()
    found = {}
    for name, m in twin.named_modules():
        if type(m).__name__ == "MultiHeadAttention":
            def pre(module, args, kwargs, name=name):
                x = args[0]
                q, k, _ = split_heads(module.qkv(x), module.num_heads)
                found[name] = torch.softmax(q @ k.mT / math.sqrt(q.shape[-1]), dim=-1)
            m.register_forward_pre_hook(pre, with_kwargs=True)
    twin(images)
    return torch.stack(list(found.values()))

# === capture_attention: weights from the wide layer's output
@torch.no_grad()
def capture_attention(model, images):
    flags = [(m, m.training) for m in model.modules()]
    attns = [m for m in model.modules() if isinstance(m, MultiHeadAttention)]
    maps = [None] * len(attns)

    def keep(i, heads, module, args, output):
        b, n, d3 = output.shape
        q, k, _ = output.reshape(b, n, 3, heads, d3 // 3 // heads).permute(2, 0, 3, 1, 4)
        maps[i] = ((q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)).softmax(-1)

    with contextlib.ExitStack() as stack:
        for i, attn in enumerate(attns):
            handle = attn.qkv.register_forward_hook(functools.partial(keep, i, attn.num_heads))
            stack.callback(handle.remove)
        for m, flag in flags:
            stack.callback(setattr, m, "training", flag)
        model.eval()
        model(images)
    return torch.stack(maps)

# === capture_attention: a walk by hand, for a ViT and a LitViT
def capture_attention(model, images):
    modes = {name: m.training for name, m in model.named_modules()}
    model.eval()
    try:
        with torch.inference_mode():
            vit, x = model, images
            if hasattr(model, "vit"):
                vit = model.vit
                grabbed = []
                h = vit.register_forward_pre_hook(lambda m, a: grabbed.append(a[0]))
                try:
                    model(images)
                finally:
                    h.remove()
                x = grabbed[0]
            tokens = vit.embed(x)
            result = []
            for block in vit.encoder.blocks:
                result.append(block.attn(block.norm1(tokens), need_weights=True)[1])
                tokens = block(tokens)
    finally:
        for name, m in model.named_modules():
            m.training = modes[name]
    return torch.stack(result).clone()

# === capture_attention: a walk by hand, for a ViT alone
@torch.no_grad()
def capture_attention(model, images):
    flags = [m.training for m in model.modules()]
    try:
        model.eval()
        x = model.embed(images)
        all_maps = []
        for blk in model.encoder.blocks:
            _, w = blk.attn(blk.norm1(x), need_weights=True)
            all_maps.append(w)
            x = blk(x)
        return torch.stack(all_maps, dim=0)
    finally:
        for m, f in zip(model.modules(), flags):
            m.training = f

# === capture_attention: a context manager of one's own, parents' flags first
class _Eval:
    def __init__(self, model):
        self.model = model

    def __enter__(self):
        self.state = [(m, m.training) for m in self.model.modules()]
        self.model.eval()

    def __exit__(self, *exc):
        for m, training in self.state:
            m.train(training)


@contextlib.contextmanager
def _hooked(modules, store):
    handles = []
    try:
        for m in modules:
            ask = lambda m, a, k: (a, {**k, "need_weights": True})
            handles.append(m.register_forward_pre_hook(ask, with_kwargs=True))
            handles.append(m.register_forward_hook(lambda m, a, o: store.append(o[1].detach().clone()) or o[0]))
        yield
    finally:
        while handles:
            handles.pop().remove()


def capture_attention(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    store = []
    mods = filter(lambda m: isinstance(m, MultiHeadAttention), model.modules())
    with torch.no_grad(), _Eval(model), _hooked(list(mods), store):
        model(images)
    return torch.cat([w.unsqueeze(0) for w in store], dim=0)

# === capture_attention: gradients are recorded, the hook looks and asks the layer again
def capture_attention(model, images):
    store, handles, modes = [], [], [(m, m.training) for m in model.modules()]

    def look(module, args, output):
        with torch.no_grad():
            store.append(MultiHeadAttention.forward(module, args[0], need_weights=True)[1])

    try:
        for m in model.modules():
            m.training = False
            if isinstance(m, MultiHeadAttention):
                handles.append(m.register_forward_hook(look))
        model(images)
    finally:
        [h.remove() for h in handles]
        for m, mode in modes:
            m.training = mode
    return torch.stack(store)

# === mix_residual: in two steps, without where
def mix_residual(fused, residual=0.5):
    n = fused.size(-1)
    out = fused * (1.0 - residual)
    out = out + residual * torch.eye(n).to(fused)
    total = out.sum(-1, keepdim=True)
    empty = (total == 0).to(out.dtype)
    out = out + empty * torch.eye(n).to(fused)
    return out / (total + empty)

# === mix_residual: the diagonal written, numpy
def mix_residual(fused, residual=0.5):
    a = fused.detach().numpy() * (1 - residual)
    i = np.arange(a.shape[-1])
    a[..., i, i] += residual
    s = a.sum(-1)
    rows = np.argwhere(s == 0)
    for *lead, r in rows:
        a[(*lead, r, r)] = 1
    return torch.from_numpy(a / a.sum(-1)[..., None])

# === mix_residual: lerp and F.normalize
def mix_residual(fused, residual=0.5):
    eye = torch.eye(fused.shape[-1], dtype=fused.dtype).expand_as(fused)
    mixed = torch.lerp(fused, eye, residual)
    mixed = torch.where((mixed == 0).all(dim=-1, keepdim=True), eye, mixed)
    return F.normalize(mixed, p=1, dim=-1)

# === fuse_heads: a table of functions, einops
def fuse_heads(attention, head_fusion="mean"):
    if head_fusion not in {"mean", "max", "min"}:
        raise ValueError(head_fusion)
    return reduce(attention, "b h n m -> b n m", head_fusion)

# === fuse_heads: max and min by values, mean by a sum
def fuse_heads(attention, head_fusion="mean"):
    match head_fusion:
        case "mean":
            return attention.sum(1) / attention.size(1)
        case "max":
            return attention.max(1).values
        case "min":
            return -((-attention).max(dim=1)[0])
        case _:
            raise ValueError("unknown")

# === fuse_heads: heads one after the other
def fuse_heads(attention, head_fusion="mean"):
    heads = attention.unbind(1)
    ops = {"mean": torch.add, "max": torch.maximum, "min": torch.minimum}
    if head_fusion not in ops:
        raise ValueError("head_fusion")
    out = functools.reduce(ops[head_fusion], heads)
    return out / len(heads) if head_fusion == "mean" else out

# === discard_smallest: a loop over images and a threshold
def discard_smallest(fused, discard_ratio=0.0, num_prefix_tokens=1):
    out = fused.clone()
    for image in out:
        part = image[num_prefix_tokens:]
        k = int(part.numel() * discard_ratio)
        if k > 0:
            limit = part.flatten().kthvalue(k).values
            part[part <= limit] = 0
    return out

# === discard_smallest: sorted indices, a mask of the whole map
def discard_smallest(fused, discard_ratio=0.0, num_prefix_tokens=1):
    b, n, _ = fused.shape
    p = num_prefix_tokens
    k = int(discard_ratio * (n - p) * n)
    order = fused[:, p:].reshape(b, -1).argsort(dim=1)[:, :k] + p * n
    mask = torch.zeros(b, n * n, dtype=torch.bool)
    for i in range(b):
        mask[i, order[i]] = True
    return fused.masked_fill(mask.view(b, n, n), 0)

# === discard_smallest: ranks, prefix rows set to infinity for the ranking
def discard_smallest(fused, discard_ratio=0.0, num_prefix_tokens=1):
    guarded = fused.clone()
    guarded[:, :num_prefix_tokens] = math.inf
    ranks = guarded.flatten(1).argsort(1).argsort(1).view_as(fused)
    n = fused.shape[1]
    k = math.floor(discard_ratio * (n - num_prefix_tokens) * n)
    return fused * (ranks >= k)

# === attention_rollout: one function, starts from the identity
def attention_rollout(
    attentions, residual=0.5, head_fusion="mean", discard_ratio=0.0, start_layer=0, num_prefix_tokens=1
):
    B, _, N, _ = attentions[0].shape
    eye = torch.eye(N, dtype=attentions[0].dtype, device=attentions[0].device)
    result = eye.expand(B, N, N)
    with torch.no_grad():
        for layer in range(start_layer, len(attentions)):
            A = attentions[layer]
            if head_fusion == "mean":
                A = A.mean(axis=1)
            elif head_fusion == "max":
                A = A.max(axis=1)[0]
            elif head_fusion == "min":
                A = A.min(axis=1)[0]
            else:
                raise ValueError("Attention head fusion type not supported")
            if discard_ratio > 0:
                A = A.clone()
                flat = A[:, num_prefix_tokens:].reshape(B, -1)
                _, idx = flat.topk(int(flat.size(-1) * discard_ratio), -1, False)
                flat.scatter_(1, idx, 0)
                A[:, num_prefix_tokens:] = flat.view(B, N - num_prefix_tokens, N)
            A = residual * eye + (1 - residual) * A
            A = A / A.sum(dim=-1, keepdim=True)
            result = torch.matmul(A, result)
    return result

# === attention_rollout: all layers at once, then a product
def attention_rollout(
    attentions, residual=0.5, head_fusion="mean", discard_ratio=0.0, start_layer=0, num_prefix_tokens=1
):
    a = torch.stack(list(attentions))[start_layer:]
    a = {"mean": a.mean, "max": a.amax, "min": a.amin}[head_fusion](dim=2)
    L, B, N, _ = a.shape
    cand = a[:, :, num_prefix_tokens:].flatten(2)
    k = int(discard_ratio * cand.shape[-1])
    gone = cand.argsort(-1)[..., :k]
    cand = cand.scatter(-1, gone, 0)
    a = torch.cat([a[:, :, :num_prefix_tokens].flatten(2), cand], -1).view(L, B, N, N)
    a = (1 - residual) * a + residual * torch.eye(N, dtype=a.dtype)
    a = a / a.sum(-1, keepdim=True)
    return functools.reduce(lambda r, m: m @ r, a)

# === attention_rollout: last layer first, multiplied from the right
def attention_rollout(
    attentions, residual=0.5, head_fusion="mean", discard_ratio=0.0, start_layer=0, num_prefix_tokens=1
):
    maps = []
    for attention in attentions[start_layer:]:
        a = fuse_heads(attention, head_fusion)
        a = discard_smallest(a, discard_ratio, num_prefix_tokens)
        maps.append(mix_residual(a, residual))
    out = maps.pop()
    while maps:
        out = out.bmm(maps.pop())
    return out

# === attention_rollout: transposed maps, einsum
def attention_rollout(
    attentions, residual=0.5, head_fusion="mean", discard_ratio=0.0, start_layer=0, num_prefix_tokens=1
):
    rolled = None
    for a in list(attentions)[start_layer:]:
        a = reduce(a, "b h q k -> b q k", head_fusion)
        rows = rearrange(a[:, num_prefix_tokens:], "b q k -> b (q k)")
        count = int(discard_ratio * rows.shape[-1])
        if count:
            limit = rows.sort(dim=-1).values[:, count - 1 : count]
            rows = rows.where(rows > limit, torch.zeros_like(rows))
        a = torch.cat((a[:, :num_prefix_tokens], rearrange(rows, "b (q k) -> b q k", k=a.shape[-1])), dim=1)
        a = a * (1 - residual) + torch.diag_embed(torch.full_like(a[..., 0], residual))
        a = einsum(a, 1 / a.sum(-1), "b q k, b q -> b q k")
        rolled = a if rolled is None else einsum(a, rolled, "b q k, b k j -> b q j")
    return rolled

# === attention_rollout: image by image in numpy
def attention_rollout(
    attentions, residual=0.5, head_fusion="mean", discard_ratio=0.0, start_layer=0, num_prefix_tokens=1
):
    fuse = {"mean": np.mean, "max": np.max, "min": np.min}[head_fusion]
    layers = [np.array(a.detach().cpu()) for a in attentions]
    b, _, n, _ = layers[0].shape
    out = []
    for i in range(b):
        roll = np.eye(n, dtype=layers[0].dtype)
        for a in layers[start_layer:]:
            m = fuse(a[i], axis=0).copy()
            rows = m[num_prefix_tokens:].reshape(-1)
            rows[np.argsort(rows)[: int(discard_ratio * rows.size)]] = 0
            m = residual * np.eye(n, dtype=m.dtype) + (1 - residual) * m
            m = m / m.sum(axis=-1, keepdims=True)
            roll = m @ roll
        out.append(roll)
    return torch.from_numpy(np.stack(out))

# === attention_rollout: vectors are pushed through the layers
def attention_rollout(
    attentions, residual=0.5, head_fusion="mean", discard_ratio=0.0, start_layer=0, num_prefix_tokens=1
):
    def step(x, a):
        kept = discard_smallest(fuse_heads(a, head_fusion), discard_ratio, num_prefix_tokens)
        mixed = (1 - residual) * (kept @ x) + residual * x
        sums = (1 - residual) * kept.sum(-1, keepdim=True) + residual
        return mixed / sums

    first = attentions[0]
    x = torch.eye(first.shape[-1]).to(first).repeat(len(first), 1, 1)
    for a in attentions[start_layer:]:
        x = step(x, a)
    return x

# === attention_rollout: recursion, keyword arguments only for options
def attention_rollout(
    attentions, *, residual=0.5, head_fusion="mean", discard_ratio=0.0, start_layer=0, num_prefix_tokens=1
):
    rest = dict(discard_ratio=discard_ratio, num_prefix_tokens=num_prefix_tokens)
    options = dict(residual=residual, head_fusion=head_fusion) | rest
    if start_layer >= len(attentions):
        raise ValueError("start_layer")
    last = mix_residual(discard_smallest(fuse_heads(attentions[-1], head_fusion), **rest), residual)
    if start_layer == len(attentions) - 1:
        return last
    return last @ attention_rollout(attentions[:-1], start_layer=start_layer, **options)

# === attention_rollout: chain_matmul a sample, normalised with F.normalize
@torch.inference_mode()
def attention_rollout(
    attentions, residual=0.5, head_fusion="mean", discard_ratio=0.0, start_layer=0, num_prefix_tokens=1
):
    used = [a.clone() for i, a in enumerate(attentions) if i >= start_layer]
    mats = []
    for a in used:
        a = a.mean(1) if head_fusion == "mean" else getattr(torch, "a" + head_fusion)(a, 1)
        p, n = num_prefix_tokens, a.shape[-1]
        k = int(discard_ratio * n * (n - p))
        if k:
            thr = a[:, p:].flatten(1).kthvalue(k, dim=1).values[:, None, None]
            keep = a > thr
            keep[:, :p] = True
            a = a * keep
        a = torch.lerp(a, torch.eye(n, dtype=a.dtype), residual)
        mats.append(F.normalize(a, p=1, dim=2))
    if len(mats) == 1:
        return mats[0].clone()
    return torch.stack([torch.linalg.multi_dot([m[i] for m in reversed(mats)]) for i in range(len(mats[0]))])

# === rollout_heatmap: patches counted from the end
def rollout_heatmap(model, images, **options):
    core = model.vit if hasattr(model, "vit") else model
    rows, cols = core.grid
    n = rows * cols
    options.setdefault("num_prefix_tokens", core.num_prefix_tokens)
    r = attention_rollout(capture_attention(model, images), **options)
    if core.pool == "mean":
        heat = r[:, -n:, -n:].mean(1)
    else:
        heat = r[:, 0, -n:]
    return heat.reshape(-1, rows, cols)

# === rollout_heatmap: options named, a ViT alone
def rollout_heatmap(model, images, residual=0.5, head_fusion="mean", discard_ratio=0.0, start_layer=0):
    p = model.num_prefix_tokens
    maps = capture_attention(model, images)
    r = attention_rollout(maps, residual, head_fusion, discard_ratio, start_layer, p)
    if model.pool == "cls":
        row = r[:, 0, p:]
    else:
        row = r[:, p:, p:].sum(dim=1) / (r.shape[1] - p)
    return rearrange(row, "b (r c) -> b r c", r=model.grid[0])

# === rollout_heatmap: a weighting vector picks the row
def rollout_heatmap(model, images, **kw):
    inner = next(m for m in model.modules() if isinstance(m, ViT))
    p, (rows, cols) = inner.num_prefix_tokens, inner.grid
    attentions = list(capture_attention(model, images))
    table = attention_rollout(attentions, num_prefix_tokens=p, **kw)
    reader = torch.zeros(p + rows * cols, dtype=table.dtype)
    if inner.pool == "cls":
        reader[0] = 1
    else:
        reader[p:] = 1 / (rows * cols)
    return torch.einsum("n,bnm->bm", reader, table)[:, p:].view(len(images), rows, cols)

# === rollout_heatmap: image by image
def rollout_heatmap(model, images, **options):
    vit = model.vit if isinstance(model, LitViT) else model
    out = []
    for image in images:
        a = capture_attention(model, image[None])
        r = attention_rollout(a, num_prefix_tokens=vit.num_prefix_tokens, **options)[0]
        r = r[:, vit.num_prefix_tokens:]
        v = r[0] if vit.pool == "cls" else torch.mean(r[vit.num_prefix_tokens:], 0)
        out.append(v.unflatten(0, vit.grid))
    return torch.stack(out)

# === rollout_heatmap: own rollout inside
@torch.no_grad()
def rollout_heatmap(model, images, residual=0.5, head_fusion="mean", discard_ratio=0.0, start_layer=0):
    net = getattr(model, "vit", model)
    p = net.num_prefix_tokens
    flow = None
    for a in capture_attention(model, images)[start_layer:]:
        a = a.mean(1) if head_fusion == "mean" else a.amax(1) if head_fusion == "max" else a.amin(1)
        body = a[:, p:].flatten(1)
        k = int(discard_ratio * body.size(1))
        body[torch.arange(len(body))[:, None], body.argsort(1)[:, :k]] = 0
        a = torch.cat([a[:, :p], body.view(len(a), -1, a.size(2))], 1)
        a = residual * torch.eye(a.size(-1), dtype=a.dtype) + (1 - residual) * a
        a /= a.sum(-1, keepdim=True)
        flow = a if flow is None else a @ flow
    tokens = flow[:, :1] if net.pool == "cls" else flow[:, p:]
    return tokens[:, :, p:].mean(1).reshape(len(images), *net.grid)

# === rollout_heatmap: pooled by the course's own function, eager normalisation for a wrapper
def rollout_heatmap(model, images, **options):
    from vit_course.vit import pool_tokens

    vit = model
    while not hasattr(vit, "num_prefix_tokens"):
        vit = vit.vit
    n = vit.num_prefix_tokens
    table = attention_rollout(capture_attention(model, images), **(dict(num_prefix_tokens=n) | options))
    pooled = pool_tokens(table, vit.pool, n)
    return torch.stack(pooled[:, n:].chunk(vit.grid[0], dim=1), dim=1)
