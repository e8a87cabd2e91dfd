import torch
from torch import Tensor, nn

from vit_course.encoder import Encoder
from vit_course.positional import LearnedPositions, sinusoidal_1d, sinusoidal_2d
from vit_course.tokenizer import Tokenizer

__all__ = ["ViT", "vit_tiny", "vit_small", "vit_base", "vit_large"]


class FixedPositions(nn.Module):
    "Add a fixed table to the tokens, then dropout; not trained, not saved."

    def __init__(self, table: Tensor, dropout: float = 0.0):  # (N, D)
        super().__init__()
        self.register_buffer("positions", table[None], persistent=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.dropout(tokens + self.positions)


class ViT(nn.Module):
    "Vision Transformer (Dosovitskiy et al. 2021); sizes and names as in timm."

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,  # side in pixels, or (H, W)
        patch_size: int = 16,  # side of a square patch, in pixels
        in_chans: int = 3,  # C
        num_classes: int = 1000,
        embed_dim: int = 768,  # D
        depth: int = 12,  # L
        num_heads: int = 12,  # h
        mlp_ratio: float = 4.0,
        dropout: float = 0.0,
        attn_dropout: float = 0.0,
        drop_path: float = 0.0,
        pool: str = "cls",  # what the head reads: "cls" or "mean" (of the patches)
        class_token: bool | None = None,  # None: with pool="cls"
        positions: str = "learned",  # "learned", "sinusoidal_1d", "sinusoidal_2d" or "none"
        num_registers: int = 0,  # extra tokens without position (Darcet et al. 2024)
        layer_scale: float | None = None,
        stem: str = "conv",
        eps: float = 1e-6,
    ):
        super().__init__()
        if pool not in ("cls", "mean"):
            raise ValueError(f"pool={pool!r} is not known: use 'cls' or 'mean'")
        class_token = pool == "cls" if class_token is None else class_token
        if pool == "cls" and not class_token:
            raise ValueError("pool='cls' needs class_token=True or None")
        self.pool, self.embed_dim, self.num_classes = pool, embed_dim, num_classes
        self.num_prefix_tokens = int(class_token) + num_registers
        self.tokenizer = Tokenizer(img_size, patch_size, in_chans, embed_dim, stem)
        self.class_token = nn.Parameter(torch.zeros(1, 1, embed_dim)) if class_token else None
        self.registers = nn.Parameter(torch.zeros(1, num_registers, embed_dim)) if num_registers else None
        self.positions = self._make_positions(positions, dropout)
        self.encoder = Encoder(depth, embed_dim, num_heads, mlp_ratio, dropout, attn_dropout, drop_path, layer_scale, eps)
        self.norm = nn.LayerNorm(embed_dim, eps=eps)
        self.head = nn.Linear(embed_dim, num_classes)
        self._init_weights()

    def _make_positions(self, kind: str, dropout: float) -> nn.Module:
        rows, cols = self.grid
        n_class = 0 if self.class_token is None else 1
        if kind == "learned":
            return LearnedPositions(n_class + rows * cols, self.embed_dim, dropout)
        tables = {
            "sinusoidal_1d": lambda: sinusoidal_1d(rows * cols, self.embed_dim),
            "sinusoidal_2d": lambda: sinusoidal_2d((rows, cols), self.embed_dim),
            "none": lambda: torch.zeros(rows * cols, self.embed_dim),
        }
        if kind not in tables:
            raise ValueError(f"positions={kind!r} is not known: use 'learned' or one of {sorted(tables)}")
        table = tables[kind]()
        return FixedPositions(torch.cat([torch.zeros(n_class, self.embed_dim), table]), dropout)

    def _init_weights(self):
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for token in (self.class_token, self.registers):
            if token is not None:
                nn.init.trunc_normal_(token, std=0.02)

    @property
    def grid(self) -> tuple[int, int]:
        "(rows, cols) of patches."
        return self.tokenizer.grid

    def forward_features(self, images: Tensor) -> Tensor:  # (B, C, H, W) -> (B, N, D)
        "All tokens after the last norm: class token, registers, patches."
        x = self.tokenizer(images)
        if self.class_token is not None:
            x = torch.cat([self.class_token.expand(len(x), -1, -1), x], dim=1)
        x = self.positions(x)
        if self.registers is not None:
            start, registers = self.num_prefix_tokens - self.registers.shape[1], self.registers.expand(len(x), -1, -1)
            x = torch.cat([x[:, :start], registers, x[:, start:]], dim=1)
        return self.norm(self.encoder(x))

    def forward_head(self, features: Tensor) -> Tensor:  # (B, N, D) -> (B, num_classes)
        "Logits from the class token or from the patches' mean."
        pooled = features[:, 0] if self.pool == "cls" else features[:, self.num_prefix_tokens :].mean(dim=1)
        return self.head(pooled)

    def forward(self, images: Tensor) -> Tensor:  # (B, C, H, W) -> (B, num_classes)
        return self.forward_head(self.forward_features(images))


def vit_tiny(**options) -> ViT:
    "ViT-Ti/16: width 192, 12 blocks, 3 heads (Touvron et al. 2021); options as `ViT`'s."
    return ViT(**{"embed_dim": 192, "depth": 12, "num_heads": 3} | options)


def vit_small(**options) -> ViT:
    "ViT-S/16: width 384, 12 blocks, 6 heads (Touvron et al. 2021); options as `ViT`'s."
    return ViT(**{"embed_dim": 384, "depth": 12, "num_heads": 6} | options)


def vit_base(**options) -> ViT:
    "ViT-B/16: width 768, 12 blocks, 12 heads (Dosovitskiy et al. 2021); options as `ViT`'s."
    return ViT(**{"embed_dim": 768, "depth": 12, "num_heads": 12} | options)


def vit_large(**options) -> ViT:
    "ViT-L/16: width 1024, 24 blocks, 16 heads (Dosovitskiy et al. 2021); options as `ViT`'s."
    return ViT(**{"embed_dim": 1024, "depth": 24, "num_heads": 16} | options)
