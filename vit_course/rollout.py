import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vit_course.attention import MultiHeadAttention

__all__ = ["capture_attention", "attention_rollout", "rollout_heatmap", "show_rollout"]


@torch.no_grad()
def capture_attention(
    model: nn.Module,  # a model with `MultiHeadAttention` layers
    images: Tensor,  # (B, C, H, W)
) -> Tensor:  # (L, B, h, N, N), rows summing to 1
    "Attention weights of every layer; the model is left as it was found."
    layers = [m for m in model.modules() if isinstance(m, MultiHeadAttention)]
    if not layers:
        raise ValueError(f"model={type(model).__name__} has no MultiHeadAttention layer to look into")
    maps, was_training = [], {m: m.training for m in model.modules()}

    def ask(module, args, kwargs):
        return args, kwargs | {"need_weights": True}

    def keep(module, args, kwargs, output):
        maps.append(output[1])
        return output[0]

    handles = [m.register_forward_pre_hook(ask, with_kwargs=True) for m in layers]
    handles += [m.register_forward_hook(keep, with_kwargs=True) for m in layers]
    try:
        model.eval()
        model(images)
    finally:
        for handle in handles:
            handle.remove()
        for module, training in was_training.items():
            module.training = training
    return torch.stack(maps)


def attention_rollout(
    attentions,  # (L, B, h, N, N), or a list of L tensors (B, h, N, N)
    residual: float = 0.5,  # share of the skip connection
    head_fusion: str = "mean",  # "mean", "max" or "min" over heads
    discard_ratio: float = 0.0,  # share of the smallest entries set to 0
    start_layer: int = 0,  # first layer used, counted from 0
    num_prefix_tokens: int = 1,  # class token and registers: their rows are never discarded
) -> Tensor:  # (B, N, N), rows summing to 1
    "How much of each input token reaches each output token (Abnar & Zuidema 2020)."
    if not 0 <= residual <= 1:
        raise ValueError(f"residual={residual} must lie in [0, 1]")
    if not 0 <= discard_ratio < 1:
        raise ValueError(f"discard_ratio={discard_ratio} must lie in [0, 1)")
    fusions = {"mean": lambda a: a.mean(1), "max": lambda a: a.amax(1), "min": lambda a: a.amin(1)}
    if head_fusion not in fusions:
        raise ValueError(f"head_fusion={head_fusion!r} is not known: use one of {sorted(fusions)}")
    if not 0 <= start_layer < len(attentions):
        raise ValueError(f"start_layer={start_layer} must lie in 0..{len(attentions) - 1}")
    rollout = None
    for attention in attentions[start_layer:]:
        fused = _discard(fusions[head_fusion](attention), discard_ratio, num_prefix_tokens)
        eye = torch.eye(fused.shape[-1], dtype=fused.dtype, device=fused.device)
        mixed = residual * eye + (1 - residual) * fused
        mixed = mixed / mixed.sum(dim=-1, keepdim=True)
        rollout = mixed if rollout is None else mixed @ rollout
    return rollout


def _discard(fused: Tensor, ratio: float, num_prefix_tokens: int) -> Tensor:
    "Set the smallest entries of the patches' rows to 0, a map at a time."
    candidates = fused[:, num_prefix_tokens:].flatten(1)
    count = int(ratio * candidates.shape[1])
    if count == 0:
        return fused
    smallest = candidates.topk(count, dim=1, largest=False).indices
    rows = candidates.scatter(1, smallest, 0.0).view_as(fused[:, num_prefix_tokens:])
    return torch.cat([fused[:, :num_prefix_tokens], rows], dim=1)


def rollout_heatmap(
    model: nn.Module,  # a `ViT`
    images: Tensor,  # (B, C, H, W)
    **options,  # as `attention_rollout`'s
) -> Tensor:  # (B, rows, cols), each summing to at most 1
    "What the model's pooled output draws from each patch."
    prefix = model.num_prefix_tokens
    rollout = attention_rollout(capture_attention(model, images), num_prefix_tokens=prefix, **options)
    pooled = rollout[:, 0] if model.pool == "cls" else rollout[:, prefix:].mean(dim=1)
    return pooled[:, prefix:].unflatten(1, model.grid)
