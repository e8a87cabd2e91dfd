import math
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

__all__ = ["scaled_dot_product_attention", "fuse_qkv", "MultiHeadAttention"]


def scaled_dot_product_attention(
    q: Tensor,  # (..., N, d) queries
    k: Tensor,  # (..., M, d) keys
    v: Tensor,  # (..., M, e) values
    mask: Tensor | None = None,  # bool (True: may attend) or float (added to the scores)
    dropout: float = 0.0,  # share of weights set to 0; always on, as torch's
) -> tuple[Tensor, Tensor]:  # output (..., N, e) and weights (..., N, M), before dropout
    "softmax(q kᵀ / sqrt(d)) v (Vaswani et al. 2017, eq. 1)."
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    weights = scores.softmax(dim=-1)
    return F.dropout(weights, dropout) @ v, weights


def fuse_qkv(
    q: nn.Linear,  # in -> D
    k: nn.Linear,  # in -> D
    v: nn.Linear,  # in -> D
) -> nn.Linear:  # in -> 3 * D, a new layer with copied weights
    "Three linear layers as one wide one, rows stacked in the order q, k, v."
    shapes = [tuple(layer.weight.shape) for layer in (q, k, v)]
    if len(set(shapes)) != 1:
        raise ValueError(f"q, k and v have weights of shapes {shapes}: all three must be equal")
    fused = nn.Linear(q.in_features, 3 * q.out_features).to(q.weight)
    with torch.no_grad():
        fused.weight.copy_(torch.cat([layer.weight for layer in (q, k, v)]))
        zeros = torch.zeros_like(fused.bias[: q.out_features])
        fused.bias.copy_(torch.cat([zeros if layer.bias is None else layer.bias for layer in (q, k, v)]))
    return fused


class MultiHeadAttention(nn.Module):
    "Self-attention in several heads side by side (Vaswani et al. 2017, §3.2.2)."

    def __init__(
        self,
        dim: int,  # D, divisible by num_heads
        num_heads: int = 8,  # h
        qkv_bias: bool = True,  # biases on the query, key and value layer
        attn_dropout: float = 0.0,  # on the weights, in training
        proj_dropout: float = 0.0,  # on the output, in training
        impl: str = "auto",  # "manual", "sdpa", or "auto" for the faster one
    ):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"dim={dim} is not divisible by num_heads={num_heads}")
        if impl not in ("auto", "manual", "sdpa"):
            raise ValueError(f"impl={impl!r} is not known: use 'auto', 'manual' or 'sdpa'")
        self.num_heads, self.head_dim, self.impl = num_heads, dim // num_heads, impl
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.attn_dropout = attn_dropout
        self.proj = nn.Linear(dim, dim)
        self.proj_dropout = nn.Dropout(proj_dropout)

    def forward(
        self,
        x: Tensor,  # (B, N, D)
        mask: Tensor | None = None,  # broadcasts to (B, h, N, N)
        need_weights: bool = False,  # also return the weights
    ) -> Tensor | tuple[Tensor, Tensor]:  # (B, N, D), and (B, h, N, N) where asked for
        q, k, v = rearrange(self.qkv(x), "b n (three h d) -> three b h n d", three=3, h=self.num_heads)
        dropout = self.attn_dropout if self.training else 0.0
        weights = None
        if need_weights or self._use_manual(x):
            out, weights = scaled_dot_product_attention(q, k, v, mask, dropout)
        else:
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
        out = self.proj_dropout(self.proj(rearrange(out, "b h n d -> b n (h d)")))
        return (out, weights) if need_weights else out

    def _use_manual(self, x: Tensor) -> bool:
        if self.impl != "auto":
            return self.impl == "manual"
        return self.training and x.device.type == "cpu" and torch.is_autocast_enabled("cpu")
