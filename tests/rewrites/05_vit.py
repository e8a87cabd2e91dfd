import math
import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from einops.layers.torch import Rearrange
from torch import nn
from vit_course.encoder import DropPath, Encoder, EncoderBlock
from vit_course.positional import LearnedPositions, sinusoidal_1d, sinusoidal_2d
from vit_course.tokenizer import Tokenizer, patchify
from vit_course.vit import FixedPositions, ViTParts, insert_tokens, make_positions, pool_tokens

# === insert_tokens: repeat from einops, pieces in a list
def insert_tokens(x, extra, at=0):
    pieces = [x[:, :at], x[:, at:]]
    if extra is not None:
        pieces.insert(1, repeat(extra, "1 e d -> b e d", b=len(x)))
    return torch.cat(pieces, dim=1)

# === insert_tokens: written into an empty tensor
def insert_tokens(x, extra, at=0):
    if extra is None:
        return x
    b, n, d = x.shape
    e = extra.size(1)
    out = x.new_empty(b, n + e, d)
    out[:, :at] = x[:, :at]
    out[:, at:at + e] = extra
    out[:, at + e:] = x[:, at:]
    return out

# === insert_tokens: one sequence after another
def insert_tokens(x, extra, at=0):
    if extra is not None:
        x = torch.stack([torch.vstack((row[:at], extra[0], row[at:])) for row in x])
    return x

# === insert_tokens: repeat and split
def insert_tokens(x, extra, at=0):
    if extra is None:
        return x.clone()
    front, back = x.split([at, x.shape[1] - at], dim=1)
    return torch.concat((front, extra.repeat(x.shape[0], 1, 1), back), -2)

# === pool_tokens: a weight for each token
def pool_tokens(features, pool="cls", num_prefix_tokens=1):
    if pool == "cls":
        return features.select(1, 0)
    elif pool == "mean":
        patches = features.narrow(1, num_prefix_tokens, features.shape[1] - num_prefix_tokens)
        return patches.sum(1) / patches.shape[1]
    else:
        raise ValueError("pool must be cls or mean, not " + str(pool))

# === pool_tokens: einsum
def pool_tokens(features, pool="cls", num_prefix_tokens=1):
    n = features.shape[1]
    weights = features.new_zeros(n)
    match pool:
        case "cls":
            weights[0] = 1
        case "mean":
            weights[num_prefix_tokens:] = 1 / (n - num_prefix_tokens)
        case _:
            raise ValueError(pool)
    return torch.einsum("bnd,n->bd", features, weights)

# === pool_tokens: a table of functions
def pool_tokens(features, pool="cls", num_prefix_tokens=1):
    ways = {"cls": lambda x: x[:, :1].squeeze(1), "mean": lambda x: torch.mean(x[:, num_prefix_tokens:, :], -2)}
    try:
        return ways[pool](features)
    except KeyError:
        raise ValueError(f"{pool} unknown") from None

# === drop_patches: a permutation an image, in the old order
def drop_patches(x, rate, num_prefix_tokens=1):
    if rate == 0:
        return x
    count = x.shape[1] - num_prefix_tokens
    kept = max(1, int(count * (1 - rate)))
    rows = []
    for image in x:
        stay = torch.randperm(count)[:kept].sort().values + num_prefix_tokens
        rows.append(torch.cat([image[:num_prefix_tokens], image[stay]]))
    return torch.stack(rows)

# === drop_patches: a mask from ranks
def drop_patches(x, rate, num_prefix_tokens=1):
    if rate > 0:
        b, n, d = x.shape
        kept = max(int((n - num_prefix_tokens) * (1 - rate)), 1)
        noise = torch.rand(b, n)
        noise[:, :num_prefix_tokens] = -1  # the smallest stay
        stays = noise.argsort(dim=1).argsort(dim=1) < num_prefix_tokens + kept
        x = x[stays].view(b, num_prefix_tokens + kept, d)
    return x

# === drop_patches: smallest numbers, index pairs
def drop_patches(x, rate, num_prefix_tokens=1):
    if not rate:
        return x.clone()
    front, patches = x.tensor_split([num_prefix_tokens], dim=1)
    kept = max(1, math.floor(patches.size(1) * (1 - rate)))
    order = torch.empty(patches.shape[:2]).uniform_().argsort(-1)[:, :kept]
    return torch.hstack((front, patches[torch.arange(len(x)).unsqueeze(1), order]))

# === PlainViT: one linear layer over patches, (N, D) positions, a 1-D class token, own functional dropout
class PlainViT(nn.Module):
    def __init__(self, img_size=224, patch_size=16, in_chans=3, num_classes=1000, embed_dim=768, depth=12, num_heads=12,
                 mlp_ratio=4.0, dropout=0.0, attn_dropout=0.0, drop_path=0.0):
        super().__init__()
        height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
        self.p, self.rate = patch_size, dropout
        n = (height // patch_size) * (width // patch_size)
        self.cls = nn.Parameter(torch.randn(embed_dim) * 0.02)
        self.pos = nn.Parameter(torch.randn(n + 1, embed_dim) * 0.02)
        self.project = nn.Linear(in_chans * patch_size**2, embed_dim)
        rates = torch.linspace(0, drop_path, depth).tolist()
        blocks = [EncoderBlock(embed_dim, num_heads, mlp_ratio, dropout, attn_dropout, r) for r in rates]
        self.blocks = nn.Sequential(*blocks)
        self.classify = nn.Sequential(nn.LayerNorm(embed_dim), nn.Linear(embed_dim, num_classes))

    def forward(self, images):
        x = self.project(patchify(images, self.p))
        x = torch.cat([self.cls.expand(len(x), 1, -1), x], 1) + self.pos
        x = self.blocks(F.dropout(x, self.rate, self.training))
        return self.classify(x[:, 0])

# === PlainViT: everything in one Sequential, F.unfold
class _Unfold(nn.Module):
    def __init__(self, p, chans, dim):
        super().__init__()
        self.p, self.embed = p, nn.Linear(chans * p * p, dim)

    def forward(self, images):
        return self.embed(F.unfold(images, self.p, stride=self.p).transpose(1, 2))


class _Prepend(nn.Module):
    def __init__(self, n, dim):
        super().__init__()
        self.token = nn.Parameter(torch.zeros(1, dim))
        self.table = nn.Embedding(n + 1, dim)

    def forward(self, x):
        token = self.token[None].repeat(x.size(0), 1, 1)
        return torch.cat((token, x), dim=1) + self.table(torch.arange(x.size(1) + 1))


class PlainViT(nn.Sequential):
    def __init__(self, img_size=224, patch_size=16, in_chans=3, num_classes=1000, embed_dim=768, depth=12, num_heads=12,
                 mlp_ratio=4.0, dropout=0.0, attn_dropout=0.0, drop_path=0.0):
        h, w = (img_size,) * 2 if isinstance(img_size, int) else img_size
        super().__init__(
            _Unfold(patch_size, in_chans, embed_dim), _Prepend(h * w // patch_size**2, embed_dim), nn.Dropout(dropout),
            Encoder(depth, embed_dim, num_heads, mlp_ratio, dropout, attn_dropout, drop_path),
            nn.LayerNorm(embed_dim, eps=1e-6), nn.Linear(embed_dim, num_classes),
        )

    def forward(self, images):
        for layer in list(self)[:-1]:
            images = layer(images)
        return self[-1](images[:, 0, :])

# === PlainViT: every part by hand, the framework's attention layer inside
class _Block(nn.Module):
    def __init__(self, d, h, ratio, drop, attn_drop, path):
        super().__init__()
        self.n1, self.n2 = nn.LayerNorm(d, 1e-6), nn.LayerNorm(d, 1e-6)
        self.att = nn.MultiheadAttention(d, h, dropout=attn_drop, batch_first=True)
        m = int(d * ratio)
        self.ff = nn.Sequential(nn.Linear(d, m), nn.GELU(), nn.Dropout(drop), nn.Linear(m, d), nn.Dropout(drop))
        self.drop, self.path = nn.Dropout(drop), path

    def keep(self, x):
        if self.training and self.path > 0:
            x = x * (torch.rand(len(x), 1, 1, dtype=x.dtype) >= self.path) / (1 - self.path)
        return x

    def forward(self, x):
        y = self.n1(x)
        x = x + self.keep(self.drop(self.att(y, y, y, need_weights=False)[0]))
        return x + self.keep(self.ff(self.n2(x)))


class PlainViT(nn.Module):
    def __init__(self, img_size=224, patch_size=16, in_chans=3, num_classes=1000, embed_dim=768, depth=12, num_heads=12,
                 mlp_ratio=4.0, dropout=0.0, attn_dropout=0.0, drop_path=0.0):
        super().__init__()
        size = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
        self.conv = nn.Conv2d(in_chans, embed_dim, patch_size, patch_size)
        tokens = (size[0] // patch_size) * (size[1] // patch_size)
        self.pos_embed = nn.Parameter(torch.empty(1, tokens + 1, embed_dim).normal_(std=0.02))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_drop = nn.Dropout(dropout)
        self.layers = nn.ModuleList()
        for i in range(depth):
            path = drop_path * i / max(depth - 1, 1)
            self.layers.append(_Block(embed_dim, num_heads, mlp_ratio, dropout, attn_dropout, path))
        self.ln = nn.LayerNorm(embed_dim, eps=1e-6)
        self.fc = nn.Linear(embed_dim, num_classes)

    def forward(self, x):
        x = self.conv(x).flatten(2).transpose(1, 2)
        x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), dim=1)
        x = self.pos_drop(x + self.pos_embed)
        for layer in self.layers:
            x = layer(x)
        return self.fc(self.ln(x[:, 0]))

# === ViT: the four steps in another way
class ViT(ViTParts):
    @property
    def grid(self):
        return self.tokenizer.grid

    def embed(self, images):
        x = self.tokenizer(images)
        if self.class_token is not None:
            x = torch.cat([self.class_token.expand(len(x), -1, -1), x], dim=1)
        x = self.positions(x)
        if self.registers is None:
            return x
        first = 0 if self.class_token is None else 1
        return torch.cat([x[:, :first], self.registers.repeat(len(x), 1, 1), x[:, first:]], dim=1)

    def forward_features(self, images):
        x = self.embed(images)
        for block in self.encoder.blocks:
            x = block(x)
        return self.norm(x)

    def forward_head(self, features):
        if self.pool == "mean":
            return self.head(features[:, self.num_prefix_tokens:].mean(1))
        return self.head(features[:, 0])

    def forward(self, images):
        x = self.forward_features(images)
        return self.forward_head(x)

# === ViT: self-contained in timm's manner, own names, 1-D class token, positions of shape (N, D)
class ViT(nn.Module):
    def __init__(self, img_size=224, patch_size=16, in_chans=3, num_classes=1000, embed_dim=768, depth=12, num_heads=12,
                 mlp_ratio=4.0, dropout=0.0, attn_dropout=0.0, drop_path=0.0, pool="cls", class_token=None,
                 positions="learned", num_registers=0, layer_scale=None, stem="conv"):
        super().__init__()
        if isinstance(img_size, int):
            img_size = (img_size, img_size)
        self.grid = (img_size[0] // patch_size, img_size[1] // patch_size)
        n = self.grid[0] * self.grid[1]
        self.patch_embed = Tokenizer(img_size, patch_size, in_chans, embed_dim, stem)
        self.has_cls = class_token if class_token is not None else pool == "cls"
        self.cls_token = nn.Parameter(torch.zeros(embed_dim)) if self.has_cls else None
        self.reg_tokens = nn.Parameter(torch.zeros(num_registers, embed_dim)) if num_registers > 0 else None
        self.num_prefix_tokens = self.has_cls + num_registers
        if positions == "learned":
            self.pos_embed = nn.Parameter(torch.randn(n + self.has_cls, embed_dim) * 0.02)
        else:
            tables = {"sinusoidal_1d": lambda: sinusoidal_1d(n, embed_dim), "none": lambda: torch.zeros(n, embed_dim),
                      "sinusoidal_2d": lambda: sinusoidal_2d(self.grid, embed_dim)}
            table = tables[positions]()
            if self.has_cls:
                table = torch.cat([torch.zeros(1, embed_dim), table])
            self.register_buffer("pos_embed", table)
        self.pos_drop = nn.Dropout(dropout)
        dpr = np.linspace(0, drop_path, depth)
        self.blocks = nn.ModuleList([
            EncoderBlock(embed_dim, num_heads, mlp_ratio, dropout, attn_dropout, float(dpr[i]), layer_scale)
            for i in range(depth)
        ])
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.head = nn.Linear(embed_dim, num_classes)
        self.pool = pool

    def forward_features(self, x):
        x = self.patch_embed(x)
        b = x.shape[0]
        if self.has_cls:
            x = torch.cat([self.cls_token.expand(b, 1, -1), x], dim=1)
        x = self.pos_drop(x + self.pos_embed)
        if self.reg_tokens is not None:
            regs = self.reg_tokens.unsqueeze(0).expand(b, -1, -1)
            x = torch.cat([x[:, :1], regs, x[:, 1:]], 1) if self.has_cls else torch.cat([regs, x], 1)
        for blk in self.blocks:
            x = blk(x)
        return self.norm(x)

    def forward(self, x):
        x = self.forward_features(x)
        x = x[:, 0] if self.pool == "cls" else x[:, self.num_prefix_tokens:].mean(dim=1)
        return self.head(x)

# === ViT: all by hand, separate q, k, v, raw layer scale, embedding table for positions
class _SelfAttention(nn.Module):
    def __init__(self, dim, heads, attn_drop, drop):
        super().__init__()
        self.heads, self.scale = heads, (dim // heads) ** -0.5
        self.to_q, self.to_k, self.to_v = nn.Linear(dim, dim), nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.to_out = nn.Linear(dim, dim)
        self.attn_drop, self.drop = nn.Dropout(attn_drop), nn.Dropout(drop)

    def forward(self, x):
        q, k, v = (rearrange(f(x), "b n (h d) -> b h n d", h=self.heads) for f in (self.to_q, self.to_k, self.to_v))
        att = self.attn_drop((torch.einsum("bhid,bhjd->bhij", q, k) * self.scale).softmax(-1))
        return self.drop(self.to_out(rearrange(torch.einsum("bhij,bhjd->bhid", att, v), "b h n d -> b n (h d)")))


class _Layer(nn.Module):
    def __init__(self, dim, heads, ratio, drop, attn_drop, path, scale):
        super().__init__()
        self.ln_1 = nn.LayerNorm(dim, eps=1e-6)
        self.attention = _SelfAttention(dim, heads, attn_drop, drop)
        self.ln_2 = nn.LayerNorm(dim, eps=1e-6)
        hidden = int(ratio * dim)
        layers = [nn.Linear(dim, hidden), nn.GELU(), nn.Dropout(drop), nn.Linear(hidden, dim), nn.Dropout(drop)]
        self.mlp = nn.Sequential(*layers)
        self.gamma_1 = nn.Parameter(scale * torch.ones(dim)) if scale is not None else 1.0
        self.gamma_2 = nn.Parameter(scale * torch.ones(dim)) if scale is not None else 1.0
        self.path = DropPath(path)

    def forward(self, x):
        x = x + self.path(self.gamma_1 * self.attention(self.ln_1(x)))
        return x + self.path(self.gamma_2 * self.mlp(self.ln_2(x)))


class ViT(nn.Module):
    def __init__(self, img_size=224, patch_size=16, in_chans=3, num_classes=1000, embed_dim=768, depth=12, num_heads=12,
                 mlp_ratio=4.0, dropout=0.0, attn_dropout=0.0, drop_path=0.0, pool="cls", class_token=None,
                 positions="learned", num_registers=0, layer_scale=None, stem="conv"):
        super().__init__()
        self.tokens = Tokenizer(img_size, patch_size, in_chans, embed_dim, stem)
        self.grid, self.pool, self.n_reg = self.tokens.grid, pool, num_registers
        self.use_cls = pool == "cls" if class_token is None else class_token
        self.num_prefix_tokens = int(self.use_cls) + num_registers
        n = self.grid[0] * self.grid[1]
        if self.use_cls:
            self.cls = nn.Parameter(torch.zeros(1, embed_dim))
        if num_registers:
            self.reg = nn.Parameter(torch.zeros(1, num_registers, embed_dim))
        self.learned = positions == "learned"
        if self.learned:
            self.pos = nn.Embedding(n + int(self.use_cls), embed_dim)
        elif positions == "sinusoidal_1d":
            self.register_buffer("table", sinusoidal_1d(n, embed_dim), persistent=False)
        elif positions == "sinusoidal_2d":
            self.register_buffer("table", sinusoidal_2d(self.grid, embed_dim), persistent=False)
        else:
            self.table = None
        self.drop = nn.Dropout(dropout)
        rates = [x.item() for x in torch.linspace(0, drop_path, depth)]
        shape = (embed_dim, num_heads, mlp_ratio, dropout, attn_dropout)
        self.layers = nn.Sequential(*(_Layer(*shape, r, layer_scale) for r in rates))
        self.ln_post = nn.LayerNorm(embed_dim, eps=1e-6)
        self.classifier = nn.Linear(embed_dim, num_classes)

    def forward_features(self, images):
        x = self.tokens(images)
        if not self.learned and self.table is not None:
            x = x + self.table
        if self.use_cls:
            x = torch.cat([self.cls.repeat(len(x), 1, 1), x], dim=1)
        if self.learned:
            x = x + self.pos.weight
        x = self.drop(x)
        if self.n_reg:
            k = int(self.use_cls)
            x = torch.cat([x[:, :k], self.reg.expand(len(x), -1, -1), x[:, k:]], dim=1)
        return self.ln_post(self.layers(x))

    def forward(self, images):
        x = self.forward_features(images)
        return self.classifier(x[:, 0] if self.pool == "cls" else x[:, self.num_prefix_tokens:].mean(1))

# === ViT: the package's parts, joined by composition
class ViT(nn.Module):
    def __init__(self, img_size=224, patch_size=16, in_chans=3, num_classes=1000, embed_dim=768, depth=12, num_heads=12,
                 mlp_ratio=4.0, dropout=0.0, attn_dropout=0.0, drop_path=0.0, pool="cls", class_token=None,
                 positions="learned", num_registers=0, layer_scale=None, stem="conv", eps=1e-6):
        super().__init__()
        self.head = nn.Linear(embed_dim, num_classes)
        self.final = nn.LayerNorm(embed_dim, eps)
        rates = (dropout, attn_dropout, drop_path)
        self.encoder = Encoder(depth, embed_dim, num_heads, mlp_ratio, *rates, layer_scale, eps)
        self.stem = Tokenizer(img_size, patch_size, in_chans, embed_dim, stem)
        n_cls = int(class_token) if class_token is not None else int(pool == "cls")
        self.pos = make_positions(positions, self.stem.grid, embed_dim, n_cls, dropout)
        self.extra = nn.ParameterDict()
        if num_registers:
            self.extra["registers"] = nn.Parameter(torch.zeros(num_registers, embed_dim))
        if n_cls:
            self.extra["class"] = nn.Parameter(torch.zeros(1, embed_dim))
        self.n_cls, self.pooling = n_cls, pool
        self.num_prefix_tokens = n_cls + num_registers

    grid = property(lambda self: self.stem.grid)

    def forward_features(self, images):
        x = self.stem(images)
        b = x.shape[0]
        if "class" in self.extra:
            x = torch.cat([repeat(self.extra["class"], "n d -> b n d", b=b), x], 1)
        x = self.pos(x)
        if "registers" in self.extra:
            regs = repeat(self.extra["registers"], "n d -> b n d", b=b)
            x = torch.cat([x[:, :self.n_cls], regs, x[:, self.n_cls:]], 1)
        return self.final(self.encoder(x))

    def forward(self, images):
        return self.head(pool_tokens(self.forward_features(images), self.pooling, self.num_prefix_tokens))

# === ViT: nn.TransformerEncoderLayer inside, with drop path around it
class _TorchLayer(nn.TransformerEncoderLayer):
    def __init__(self, dim, heads, ratio, drop, attn_drop, path, scale):
        super().__init__(dim, heads, int(dim * ratio), drop, F.gelu, 1e-6, batch_first=True, norm_first=True)
        self.self_attn.dropout = attn_drop
        self.path = DropPath(path)
        count = 0 if scale is None else 2
        self.scales = nn.ParameterList([nn.Parameter(torch.full((dim,), scale)) for _ in range(count)])

    def forward(self, src):
        a = self._sa_block(self.norm1(src), None, None)
        src = src + self.path(a * self.scales[0] if len(self.scales) else a)
        f = self._ff_block(self.norm2(src))
        return src + self.path(f * self.scales[1] if len(self.scales) else f)


class ViT(nn.Module):
    def __init__(self, img_size=224, patch_size=16, in_chans=3, num_classes=1000, embed_dim=768, depth=12, num_heads=12,
                 mlp_ratio=4.0, dropout=0.0, attn_dropout=0.0, drop_path=0.0, pool="cls", class_token=None,
                 positions="learned", num_registers=0, layer_scale=None, stem="conv"):
        super().__init__()
        self.tok = Tokenizer(img_size, patch_size, in_chans, embed_dim, stem)
        self.grid = self.tok.grid
        cls = pool == "cls" if class_token is None else class_token
        self.prefix = nn.Parameter(torch.zeros(1, 1, embed_dim)) if cls else None
        self.regs = nn.Parameter(torch.zeros(1, num_registers, embed_dim)) if num_registers else None
        self.num_prefix_tokens, self.pool = cls + num_registers, pool
        self.add = make_positions(positions, self.grid, embed_dim, int(cls), dropout)
        self.body = nn.Sequential(*[
            _TorchLayer(embed_dim, num_heads, mlp_ratio, dropout, attn_dropout, r.item(), layer_scale)
            for r in torch.linspace(0, drop_path, depth)
        ])
        self.ln = nn.LayerNorm(embed_dim, 1e-6)
        self.fc = nn.Linear(embed_dim, num_classes)

    def forward_features(self, images):
        x = self.add(insert_tokens(self.tok(images), self.prefix))
        x = insert_tokens(x, self.regs, int(self.prefix is not None))
        return self.ln(self.body(x))

    def forward(self, images):
        return self.fc(pool_tokens(self.forward_features(images), self.pool, self.num_prefix_tokens))
