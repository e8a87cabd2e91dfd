import torch
from torch import Tensor, nn

from vit_course.attention import MultiHeadAttention

__all__ = ["MLP", "DropPath", "LayerScale", "EncoderBlock", "Encoder"]


class MLP(nn.Module):
    "Two linear layers with an activation between, the same for every token (Vaswani et al. 2017, §3.3)."

    def __init__(
        self,
        in_features: int,  # D
        hidden_features: int | None = None,  # in_features if None
        out_features: int | None = None,  # in_features if None
        dropout: float = 0.0,  # after both layers
        activation: type[nn.Module] = nn.GELU,  # a module's class
    ):
        super().__init__()
        hidden_features = hidden_features or in_features
        self.fc1 = nn.Linear(in_features, hidden_features)
        self.act = activation()
        self.drop1 = nn.Dropout(dropout)
        self.fc2 = nn.Linear(hidden_features, out_features or in_features)
        self.drop2 = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:  # (..., in_features) -> (..., out_features)
        return self.drop2(self.fc2(self.drop1(self.act(self.fc1(x)))))


class DropPath(nn.Module):
    "Drop a residual branch for whole samples, in training (Huang et al. 2016)."

    def __init__(self, p: float = 0.0):  # chance that a sample's branch is dropped
        super().__init__()
        if not 0.0 <= p < 1.0:
            raise ValueError(f"p={p} must lie in [0, 1)")
        self.p = p

    def forward(self, x: Tensor) -> Tensor:  # (B, ...) -> (B, ...)
        if not self.training or self.p == 0.0:
            return x
        keep = torch.empty(x.shape[0], *[1] * (x.ndim - 1), device=x.device, dtype=x.dtype)
        return x * keep.bernoulli_(1 - self.p) / (1 - self.p)

    def extra_repr(self) -> str:
        return f"p={self.p:g}"


class LayerScale(nn.Module):
    "One trainable factor a feature (Touvron et al. 2021)."

    def __init__(self, dim: int, init: float):  # D, start value
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), float(init)))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class EncoderBlock(nn.Module):
    "Pre-norm block: x + Attention(norm(x)), then x + MLP(norm(x)) (Dosovitskiy et al. 2021, eq. 2-3)."

    def __init__(
        self,
        dim: int,  # D
        num_heads: int,  # h
        mlp_ratio: float = 4.0,  # hidden width of the MLP over D
        dropout: float = 0.0,  # in the MLP and on the attention's output
        attn_dropout: float = 0.0,  # on the attention's weights
        drop_path: float = 0.0,  # chance to drop each branch
        layer_scale: float | None = None,  # start value of the branches' factors; None: off
        eps: float = 1e-6,  # of the layer norms
    ):
        super().__init__()
        scale = (lambda: nn.Identity()) if layer_scale is None else (lambda: LayerScale(dim, layer_scale))
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.attn = MultiHeadAttention(dim, num_heads, attn_dropout=attn_dropout, proj_dropout=dropout)
        self.scale1, self.drop_path1 = scale(), DropPath(drop_path)
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.mlp = MLP(dim, int(dim * mlp_ratio), dropout=dropout)
        self.scale2, self.drop_path2 = scale(), DropPath(drop_path)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:  # (B, N, D) -> (B, N, D)
        x = x + self.drop_path1(self.scale1(self.attn(self.norm1(x), mask)))
        return x + self.drop_path2(self.scale2(self.mlp(self.norm2(x))))


class Encoder(nn.Module):
    "A stack of blocks whose drop path rises linearly from 0 (Dosovitskiy et al. 2021, §3.1)."

    def __init__(
        self,
        depth: int,  # L, number of blocks
        dim: int,  # D
        num_heads: int,  # h
        mlp_ratio: float = 4.0,
        dropout: float = 0.0,
        attn_dropout: float = 0.0,
        drop_path: float = 0.0,  # of the last block
        layer_scale: float | None = None,
        eps: float = 1e-6,
    ):
        super().__init__()
        rates = torch.linspace(0, drop_path, depth).tolist()
        self.blocks = nn.ModuleList(
            EncoderBlock(dim, num_heads, mlp_ratio, dropout, attn_dropout, rate, layer_scale, eps) for rate in rates
        )

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:  # (B, N, D) -> (B, N, D)
        for block in self.blocks:
            x = block(x, mask)
        return x
