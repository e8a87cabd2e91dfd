import math
import torch
from torch import Tensor, nn

__all__ = ["sinusoidal_1d", "sinusoidal_2d", "LearnedPositions"]


def sinusoidal_1d(
    n_tokens: int,  # number of positions N
    dim: int,  # width D of each encoding
    base: float = 10000.0,  # the longest wavelength is near 2*pi*base
) -> Tensor:  # (n_tokens, dim), sines at even and cosines at odd columns
    "Interleaved sines and cosines of falling frequency (Vaswani et al. 2017, §3.5)."
    position = torch.arange(n_tokens, dtype=torch.float64)[:, None]
    _2i = torch.arange(0, dim, 2, dtype=torch.float64)
    angle = position / base ** (_2i / dim)
    encoding = torch.empty(n_tokens, dim, dtype=torch.float64)
    encoding[:, 0::2] = angle.sin()
    encoding[:, 1::2] = angle[:, : dim // 2].cos()
    return encoding.float()


def sinusoidal_2d(
    grid: tuple[int, int],  # (rows, cols) of patches
    dim: int,  # width D, divisible by 4
    base: float = 10000.0,  # as in `sinusoidal_1d`
) -> Tensor:  # (rows * cols, dim): first half codes the row, second half the column
    "One 1-D encoding a direction, side by side (as in Beyer et al. 2022)."
    if dim % 4:
        raise ValueError(f"dim={dim} must be divisible by 4: sine and cosine for row and column")
    rows, cols = grid
    row = sinusoidal_1d(rows, dim // 2, base).repeat_interleave(cols, dim=0)
    col = sinusoidal_1d(cols, dim // 2, base).repeat(rows, 1)
    return torch.cat([row, col], dim=1)


class LearnedPositions(nn.Module):
    "A trainable vector for each position, added to its token (Dosovitskiy et al. 2021, eq. 1)."

    def __init__(
        self,
        n_tokens: int,  # number of positions N
        dim: int,  # width D
        dropout: float = 0.0,  # applied to the sum
        std: float = 0.02,  # deviation of the truncated normal at the start
    ):
        super().__init__()
        self.positions = nn.Parameter(torch.empty(1, n_tokens, dim))
        nn.init.trunc_normal_(self.positions, std=std)
        self.dropout = nn.Dropout(dropout)

    def forward(self, tokens: Tensor) -> Tensor:  # (B, N, D) -> (B, N, D)
        if tokens.shape[1:] != self.positions.shape[1:]:
            raise ValueError(
                f"tokens of shape {tuple(tokens.shape)} do not fit positions of shape "
                f"{tuple(self.positions.shape)}: give (B, {self.positions.shape[1]}, {self.positions.shape[2]})"
            )
        return self.dropout(tokens + self.positions)
