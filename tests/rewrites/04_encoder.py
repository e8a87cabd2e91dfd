import math
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from einops import einsum, rearrange, reduce
from torch import nn
from torchvision.ops import StochasticDepth

from vit_course.attention import MultiHeadAttention, MultiHeadSelfAttention, scaled_dot_product_attention
from vit_course.encoder import MLP, DropPath, EncoderBlock, LayerScale, create_mlp, drop_path_rates

# === layer_norm: torch's own function
def layer_norm(x, weight, bias, eps=1e-6):
    return F.layer_norm(x, weight.shape, weight, bias, eps)

# === layer_norm: std with correction 0 cannot hold eps, so var and rsqrt
def layer_norm(x, weight, bias, eps=1e-6):
    var, mu = torch.var_mean(x, -1, correction=0, keepdim=True)
    return torch.addcmul(bias, (x - mu) * (var + eps).rsqrt(), weight)

# === layer_norm: mean of squares minus squared mean, einops
def layer_norm(x, weight, bias, eps=1e-6):
    centred = x - reduce(x, "... d -> ... 1", "mean")
    size = (reduce(centred**2, "... d -> ... 1", "mean") + eps) ** 0.5
    return weight * centred / size + bias

# === layer_norm: sums and the number of features
def layer_norm(x, weight, bias, eps=1e-6):
    D = x.shape[-1]
    z = x - (x.sum(-1) / D).unsqueeze(-1)
    return z.div((z.pow(2).sum(-1) / D + eps).sqrt()[..., None]).mul(weight).add(bias)

# === gelu: torch's own function
def gelu(z):
    return F.gelu(z)

# === gelu: the normal distribution's class
def gelu(z):
    return z * torch.distributions.Normal(torch.zeros((), dtype=z.dtype), 1.0).cdf(z)

# === gelu: ndtr
def gelu(z):
    return z * torch.special.ndtr(z)

# === gelu: erfc of the other side
def gelu(z):
    return z / 2 * torch.erfc(-z * 2**-0.5)

# === create_mlp: a list of layers, two dropout modules by a loop
def create_mlp(embedding_dim, mlp_size, dropout_rate=0.0):
    layers = []
    for n_in, n_out, act in [(embedding_dim, mlp_size, True), (mlp_size, embedding_dim, False)]:
        layers += [nn.Linear(n_in, n_out)] + [nn.ReLU()] * act + [nn.Dropout(dropout_rate)]
    return nn.Sequential(*layers)

# === create_mlp: the document's solution, which works by luck
def create_mlp(embedding_dim, mlp_size, dropout_rate=0.0):
    return nn.Sequential(
        nn.Linear(embedding_dim, mlp_size),
        nn.ReLU(mlp_size),
        nn.Dropout(dropout_rate),
        nn.Linear(mlp_size, embedding_dim),
        nn.Dropout(dropout_rate),
    )

# === create_mlp: ReLU after dropout, which is the same for ReLU
def create_mlp(embedding_dim, mlp_size, dropout_rate=0.0):
    widen = nn.Sequential(nn.Linear(embedding_dim, mlp_size), nn.Dropout(dropout_rate), nn.ReLU(inplace=True))
    return nn.Sequential(widen, nn.Sequential(nn.Linear(mlp_size, embedding_dim), nn.Dropout(dropout_rate)))

# === create_mlp: torchvision's MLP
def create_mlp(embedding_dim, mlp_size, dropout_rate=0.0):
    from torchvision.ops import MLP

    return MLP(embedding_dim, [mlp_size, embedding_dim], activation_layer=nn.ReLU, inplace=None, dropout=dropout_rate)

# === MLP: functional dropout, the second layer defined first
class MLP(nn.Module):
    def __init__(self, in_features, hidden_features=None, out_features=None, dropout=0.0, activation=nn.GELU):
        super().__init__()
        hidden_features = hidden_features or in_features
        self.down = nn.Linear(hidden_features, out_features or in_features)
        self.up = nn.Linear(in_features, hidden_features)
        self.activation, self.p = activation(), dropout

    def forward(self, x):
        h = F.dropout(self.activation(self.up(x)), self.p, self.training)
        return F.dropout(self.down(h), self.p, training=self.training)

# === MLP: a Sequential
class MLP(nn.Module):
    def __init__(self, in_features, hidden_features=None, out_features=None, dropout=0.0, activation=nn.GELU):
        super().__init__()
        h, o = hidden_features or in_features, out_features or in_features
        self.net = nn.Sequential(nn.Linear(in_features, h), activation(), nn.Dropout(dropout), nn.Linear(h, o), nn.Dropout(dropout))

    def forward(self, x):
        return self.net(x)

# === MLP: itself a Sequential
class MLP(nn.Sequential):
    def __init__(self, in_features, hidden_features=None, out_features=None, dropout=0.0, activation=nn.GELU):
        h = in_features if hidden_features is None else hidden_features
        o = in_features if out_features is None else out_features
        drop = nn.Dropout(dropout)
        super().__init__(nn.Linear(in_features, h), activation(), drop, nn.Linear(h, o), drop)

# === MLP: raw parameters in the other orientation
class MLP(nn.Module):
    def __init__(self, in_features, hidden_features=None, out_features=None, dropout=0.0, activation=nn.GELU):
        super().__init__()
        h, o = hidden_features or in_features, out_features or in_features
        self.w1 = nn.Parameter(torch.randn(in_features, h) * in_features**-0.5)
        self.b1 = nn.Parameter(torch.zeros(h))
        self.w2 = nn.Parameter(torch.randn(h, o) * h**-0.5)
        self.b2 = nn.Parameter(torch.zeros(o))
        self.act, self.drop = activation(), nn.Dropout(dropout)

    def forward(self, x):
        x = self.drop(self.act(x @ self.w1 + self.b1))
        return self.drop(x @ self.w2 + self.b2)

# === MLP: raw parameters and einsum, second layer's weight (in, out) first
class MLP(nn.Module):
    def __init__(self, in_features, hidden_features=None, out_features=None, dropout=0.0, activation=nn.GELU):
        super().__init__()
        h, o = hidden_features or in_features, out_features or in_features
        self.inner = nn.ParameterDict({"weight": nn.Parameter(torch.randn(h, in_features)), "bias": nn.Parameter(torch.zeros(h))})
        self.outer = nn.ParameterDict({"weight": nn.Parameter(torch.randn(o, h)), "bias": nn.Parameter(torch.zeros(o))})
        self.bend, self.p = activation(), dropout

    def forward(self, x):
        x = self.bend(einsum(x, self.inner["weight"], "... i, h i -> ... h") + self.inner["bias"])
        x = F.dropout(x, self.p, self.training, inplace=True)
        x = einsum(x, self.outer["weight"], "... h, o h -> ... o") + self.outer["bias"]
        return F.dropout(x, self.p, self.training, inplace=True)

# === MLP: convolutions of width 1
class MLP(nn.Module):
    def __init__(self, in_features, hidden_features=None, out_features=None, dropout=0.0, activation=nn.GELU):
        super().__init__()
        h, o = hidden_features or in_features, out_features or in_features
        self.conv1, self.conv2 = nn.Conv1d(in_features, h, 1), nn.Conv1d(h, o, 1)
        self.act, self.drop = activation(), nn.Dropout(dropout)

    def forward(self, x):
        flat = x.reshape(-1, x.shape[-1], 1)
        out = self.drop(self.conv2(self.drop(self.act(self.conv1(flat)))))
        return out.reshape(*x.shape[:-1], -1)

# === MLP: no dropout modules where nothing is dropped
class MLP(nn.Module):
    def __init__(self, in_features, hidden_features=None, out_features=None, dropout=0.0, activation=nn.GELU):
        super(MLP, self).__init__()
        self.fc_1 = nn.Linear(in_features, hidden_features or in_features)
        self.fc_2 = nn.Linear(hidden_features or in_features, out_features or in_features)
        self.activation = activation()
        self.dropout_1 = nn.Dropout(dropout) if dropout > 0 else None
        self.dropout_2 = nn.Dropout(dropout) if dropout > 0 else None

    def forward(self, x):
        out = self.activation(self.fc_1(x))
        if self.dropout_1:
            out = self.dropout_1(out)
        out = self.fc_2(out)
        if self.dropout_2:
            out = self.dropout_2(out)
        return out

# === LayerScale: three axes, full of ones times init
class LayerScale(nn.Module):
    def __init__(self, dim, init):
        super().__init__()
        self.lambda_ = nn.Parameter(init * torch.ones(1, 1, dim))

    def forward(self, x):
        return (self.lambda_ * x).reshape(x.shape)

# === LayerScale: a diagonal matrix
class LayerScale(nn.Module):
    def __init__(self, dim, init):
        super().__init__()
        self.scale = nn.Parameter(torch.empty(dim))
        nn.init.constant_(self.scale, init)

    def forward(self, x):
        return x @ torch.diag(self.scale)

# === DropPath: as timm's
class DropPath(nn.Module):
    def __init__(self, drop_prob: float = 0.0):
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x):
        if self.drop_prob == 0.0 or not self.training:
            return x
        keep_prob = 1 - self.drop_prob
        shape = (x.shape[0],) + (1,) * (x.ndim - 1)
        random_tensor = x.new_empty(shape).bernoulli_(keep_prob)
        if keep_prob > 0.0:
            random_tensor.div_(keep_prob)
        return x * random_tensor

# === DropPath: floor of a shifted uniform number, as timm's older one
class DropPath(nn.Module):
    def __init__(self, p=0.0):
        super().__init__()
        self.p = p

    def forward(self, x):
        if not self.training:
            return x
        keep = 1 - self.p
        mask = torch.rand((len(x), *[1] * (x.dim() - 1)), dtype=x.dtype, device=x.device) + keep
        return x.div(keep) * mask.floor_()

# === DropPath: torchvision's inside
class DropPath(nn.Module):
    def __init__(self, p=0.0):
        super().__init__()
        self.drop = StochasticDepth(p, mode="row")

    def forward(self, x):
        return self.drop(x)

# === DropPath: a dropout on ones
class DropPath(nn.Module):
    def __init__(self, p=0.0):
        super().__init__()
        self.p = p

    def forward(self, x):
        ones = torch.ones_like(x[(slice(None),) + (slice(0, 1),) * (x.ndim - 1)])
        return x * F.dropout(ones, self.p, self.training)

# === DropPath: comparison and where
class DropPath(nn.Module):
    def __init__(self, p=0.0):
        super().__init__()
        self.p = p

    def forward(self, x):
        if self.training and self.p > 0:
            dropped = torch.rand(x.size(0), device=x.device) < self.p
            dropped = dropped.view(-1, *(1 for _ in x.shape[1:]))
            x = torch.where(dropped, torch.zeros_like(x), x / (1 - self.p))
        return x

# === DropPath: sample by sample
class DropPath(nn.Module):
    def __init__(self, p=0.0):
        super().__init__()
        self.p = p

    def forward(self, x):
        if not self.training or not self.p:
            return x
        return torch.stack([s / (1 - self.p) if torch.rand(()) >= self.p else s * 0 for s in x])

# === DropPath: flattened samples and a Bernoulli tensor
class DropPath(nn.Module):
    def __init__(self, p=0.0):
        super().__init__()
        self.keep = 1.0 - p

    def forward(self, x):
        if not self.training:
            return x
        coins = torch.bernoulli(torch.full((x.shape[0], 1), self.keep)).to(x.dtype)
        return (x.flatten(1) * coins / self.keep).view_as(x)

# === EncoderBlock: parts of the package under other names and in another order
class EncoderBlock(nn.Module):
    def __init__(self, dim, num_heads, mlp_ratio=4.0, dropout=0.0, attn_dropout=0.0, drop_path=0.0, layer_scale=None, eps=1e-6):
        super().__init__()
        self.ffn = MLP(dim, int(dim * mlp_ratio), dropout=dropout)
        self.ln_b = nn.LayerNorm(dim, eps)
        self.mha = MultiHeadAttention(dim, num_heads, True, attn_dropout, dropout)
        self.ln_a = nn.LayerNorm(dim, eps)
        self.drop = DropPath(drop_path)
        self.use_scale = layer_scale is not None
        if self.use_scale:
            self.ls_b, self.ls_a = LayerScale(dim, layer_scale), LayerScale(dim, layer_scale)

    def forward(self, x, mask=None):
        y = self.mha(self.ln_a(x), mask=mask)
        x = x + self.drop(self.ls_a(y) if self.use_scale else y)
        y = self.ffn(self.ln_b(x))
        return x + self.drop(self.ls_b(y) if self.use_scale else y)

# === EncoderBlock: attention written out, own q, k, v
class EncoderBlock(nn.Module):
    def __init__(self, dim, num_heads, mlp_ratio=4.0, dropout=0.0, attn_dropout=0.0, drop_path=0.0, layer_scale=None, eps=1e-6):
        super().__init__()
        self.h = num_heads
        self.ln1 = nn.LayerNorm(dim, eps=eps)
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.ln2 = nn.LayerNorm(dim, eps=eps)
        hidden = int(dim * mlp_ratio)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Dropout(dropout), nn.Linear(hidden, dim), nn.Dropout(dropout))
        self.attn_drop, self.out_drop = nn.Dropout(attn_dropout), nn.Dropout(dropout)
        self.path = DropPath(drop_path)
        self.g1 = LayerScale(dim, layer_scale) if layer_scale is not None else nn.Identity()
        self.g2 = LayerScale(dim, layer_scale) if layer_scale is not None else nn.Identity()

    def attention(self, x, mask):
        B, N, D = x.shape
        q, k, v = (lin(x).view(B, N, self.h, -1).transpose(1, 2) for lin in (self.q, self.k, self.v))
        scores = q @ k.mT * q.shape[-1] ** -0.5
        if mask is not None:
            scores = scores.masked_fill(mask.logical_not(), -torch.inf) if mask.dtype == torch.bool else scores + mask
        out = self.attn_drop(scores.softmax(-1)) @ v
        return self.out_drop(self.o(out.transpose(1, 2).reshape(B, N, D)))

    def forward(self, x, mask=None):
        x = x + self.path(self.g1(self.attention(self.ln1(x), mask)))
        return x + self.path(self.g2(self.mlp(self.ln2(x))))

# === EncoderBlock: the framework's attention inside
class EncoderBlock(nn.Module):
    def __init__(self, dim, num_heads, mlp_ratio=4.0, dropout=0.0, attn_dropout=0.0, drop_path=0.0, layer_scale=None, eps=1e-6):
        super().__init__()
        self.num_heads = num_heads
        self.attention_pre_norm = nn.LayerNorm(dim, eps=eps)
        self.attention = nn.MultiheadAttention(dim, num_heads, dropout=attn_dropout, batch_first=True)
        self.attention_output_dropout = nn.Dropout(dropout)
        self.mlp_pre_norm = nn.LayerNorm(dim, eps=eps)
        self.mlp = MLP(dim, int(dim * mlp_ratio), dropout=dropout)
        self.stochastic_depth = StochasticDepth(drop_path, "row")
        self.scales = nn.ModuleList(nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale) for _ in range(2))

    def forward(self, x, mask=None):
        y = self.attention_pre_norm(x)
        if mask is not None:
            B, N, _ = x.shape
            mask = mask.expand(B, self.num_heads, N, N).flatten(0, 1)
            mask = ~mask if mask.dtype == torch.bool else mask
        y = self.attention(y, y, y, attn_mask=mask, need_weights=False)[0]
        x = x + self.stochastic_depth(self.scales[0](self.attention_output_dropout(y)))
        y = self.mlp(self.mlp_pre_norm(x))
        return x + self.stochastic_depth(self.scales[1](y))

# === EncoderBlock: the framework's whole layer, its two halves called by hand
class EncoderBlock(nn.Module):
    def __init__(self, dim, num_heads, mlp_ratio=4.0, dropout=0.0, attn_dropout=0.0, drop_path=0.0, layer_scale=None, eps=1e-6):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(
            dim, num_heads, int(dim * mlp_ratio), dropout, "gelu", layer_norm_eps=eps, batch_first=True, norm_first=True
        )
        self.layer.self_attn.dropout = attn_dropout
        self.path = DropPath(drop_path)
        make = (lambda: LayerScale(dim, layer_scale)) if layer_scale is not None else nn.Identity
        self.scale_a, self.scale_b = make(), make()

    def forward(self, x, mask=None):
        if mask is not None:
            mask = torch.zeros_like(mask, dtype=x.dtype).masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else mask
            mask = mask.expand(len(x), self.layer.self_attn.num_heads, *mask.shape[-2:]).flatten(0, 1)
        x = x + self.path(self.scale_a(self.layer._sa_block(self.layer.norm1(x), mask, None)))
        return x + self.path(self.scale_b(self.layer._ff_block(self.layer.norm2(x))))

# === EncoderBlock: fused qkv and sdpa, functional dropout everywhere
class EncoderBlock(nn.Module):
    def __init__(self, dim, num_heads, mlp_ratio=4.0, dropout=0.0, attn_dropout=0.0, drop_path=0.0, layer_scale=None, eps=1e-6):
        super().__init__()
        self.heads, self.p, self.pa, self.pp = num_heads, dropout, attn_dropout, drop_path
        self.ln_1, self.ln_2 = nn.LayerNorm(dim, eps), nn.LayerNorm(dim, eps)
        self.c_attn, self.c_proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.c_fc, self.c_out = nn.Linear(dim, int(dim * mlp_ratio)), nn.Linear(int(dim * mlp_ratio), dim)
        self.ls = nn.ModuleList([LayerScale(dim, 1.0 if layer_scale is None else layer_scale) for _ in range(2)])
        if layer_scale is None:
            self.ls = nn.ModuleList([nn.Identity(), nn.Identity()])

    def path(self, y):
        if not self.training:
            return y
        return y * F.dropout(y.new_ones(len(y), 1, 1), self.pp)

    def forward(self, x, mask=None):
        q, k, v = self.c_attn(self.ln_1(x)).chunk(3, dim=-1)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, mask, self.pa * self.training)
        y = F.dropout(self.c_proj(y.transpose(1, 2).flatten(2)), self.p, self.training)
        x = x + self.path(self.ls[0](y))
        y = F.dropout(F.gelu(self.c_fc(self.ln_2(x))), self.p, self.training)
        return x + self.path(self.ls[1](F.dropout(self.c_out(y), self.p, self.training)))

# === EncoderBlock: a residual wrapper around each branch, raw einsum attention
class Residual(nn.Module):
    def __init__(self, layer, dim, eps, scale, p):
        super().__init__()
        self.norm, self.layer, self.path = nn.LayerNorm(dim, eps=eps), layer, DropPath(p)
        self.scale = nn.Identity() if scale is None else LayerScale(dim, scale)

    def forward(self, x, *args):
        return x + self.path(self.scale(self.layer(self.norm(x), *args)))


class Attend(nn.Module):
    def __init__(self, dim, h, p, p_out):
        super().__init__()
        d, self.p = dim // h, p
        self.wq, self.wk, self.wv = (nn.Parameter(torch.randn(h, dim, d) * dim**-0.5) for _ in range(3))
        self.bq, self.bk, self.bv = (nn.Parameter(torch.zeros(h, d)) for _ in range(3))
        self.wo, self.bo = nn.Parameter(torch.randn(h, d, dim) * dim**-0.5), nn.Parameter(torch.zeros(dim))
        self.drop = nn.Dropout(p_out)

    def forward(self, x, mask=None):
        q, k, v = (
            torch.einsum("bnD,hDd->bhnd", x, w) + b[:, None] for w, b in ((self.wq, self.bq), (self.wk, self.bk), (self.wv, self.bv))
        )
        out = F.scaled_dot_product_attention(q, k, v, mask, self.p if self.training else 0.0)
        return self.drop(torch.einsum("bhnd,hdD->bnD", out, self.wo) + self.bo)


class EncoderBlock(nn.Module):
    def __init__(self, dim, num_heads, mlp_ratio=4.0, dropout=0.0, attn_dropout=0.0, drop_path=0.0, layer_scale=None, eps=1e-6):
        super().__init__()
        self.a = Residual(Attend(dim, num_heads, attn_dropout, dropout), dim, eps, layer_scale, drop_path)
        self.b = Residual(MLP(dim, int(dim * mlp_ratio), dropout=dropout), dim, eps, layer_scale, drop_path)

    def forward(self, x, mask=None):
        return self.b(self.a(x, mask))

# === EncoderBlock: norms by hand with gamma and beta
class Norm(nn.Module):
    def __init__(self, dim, eps):
        super().__init__()
        self.gamma, self.beta, self.eps = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.zeros(dim)), eps

    def forward(self, x):
        var, mean = torch.var_mean(x, -1, keepdim=True, correction=0)
        return (x - mean) / (var + self.eps).sqrt() * self.gamma + self.beta


class EncoderBlock(nn.Module):
    def __init__(self, dim, num_heads, mlp_ratio=4.0, dropout=0.0, attn_dropout=0.0, drop_path=0.0, layer_scale=None, eps=1e-6):
        super().__init__()
        self.norm_attn, self.norm_mlp = Norm(dim, eps), Norm(dim, eps)
        self.attn = MultiHeadAttention(dim, num_heads, attn_dropout=attn_dropout, proj_dropout=dropout)
        self.mlp = MLP(dim, int(mlp_ratio * dim), dropout=dropout)
        self.ls = [1.0, 1.0] if layer_scale is None else nn.ParameterList([torch.full((dim,), float(layer_scale)) for _ in range(2)])
        self.dp = DropPath(drop_path)

    def forward(self, x, mask=None):
        x = x + self.dp(self.ls[0] * self.attn(self.norm_attn(x), mask))
        return x + self.dp(self.ls[1] * self.mlp(self.norm_mlp(x)))

# === EncoderBlock: layer scale as raw parameters of the block
class EncoderBlock(nn.Module):
    def __init__(self, dim, num_heads, mlp_ratio=4.0, dropout=0.0, attn_dropout=0.0, drop_path=0.0, layer_scale=None, eps=1e-6):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps), nn.LayerNorm(dim, eps)
        self.attn = MultiHeadAttention(dim, num_heads, attn_dropout=attn_dropout, proj_dropout=dropout)
        self.mlp = MLP(dim, int(mlp_ratio * dim), dropout=dropout)
        self.gamma_1 = self.gamma_2 = None
        if layer_scale is not None:
            self.gamma_1 = nn.Parameter(layer_scale * torch.ones(dim))
            self.gamma_2 = nn.Parameter(layer_scale * torch.ones(dim))
        self.drop_path = DropPath(drop_path)

    def forward(self, x, mask=None):
        a = self.attn(self.norm1(x), mask)
        x = x + self.drop_path(a if self.gamma_1 is None else self.gamma_1 * a)
        m = self.mlp(self.norm2(x))
        return x + self.drop_path(m if self.gamma_2 is None else self.gamma_2 * m)

# === EncoderBlock: heads as a list of modules
class Head(nn.Module):
    def __init__(self, dim, width, p):
        super().__init__()
        self.q, self.k, self.v, self.p = nn.Linear(dim, width), nn.Linear(dim, width), nn.Linear(dim, width), p

    def forward(self, x, mask):
        q, k, v = self.q(x), self.k(x), self.v(x)
        return scaled_dot_product_attention(q, k, v, mask, self.p if self.training else 0.0)[0]


class EncoderBlock(nn.Module):
    def __init__(self, dim, num_heads, mlp_ratio=4.0, dropout=0.0, attn_dropout=0.0, drop_path=0.0, layer_scale=None, eps=1e-6):
        super().__init__()
        self.n1, self.n2 = nn.LayerNorm(dim, eps=eps), nn.LayerNorm(dim, eps=eps)
        self.heads = nn.ModuleList(Head(dim, dim // num_heads, attn_dropout) for _ in range(num_heads))
        self.out, self.drop, self.path = nn.Linear(dim, dim), nn.Dropout(dropout), DropPath(drop_path)
        self.fc1, self.fc2, self.act = nn.Linear(dim, int(dim * mlp_ratio)), nn.Linear(int(dim * mlp_ratio), dim), nn.GELU()
        scales = [nn.Identity(), nn.Identity()] if layer_scale is None else [LayerScale(dim, layer_scale) for _ in range(2)]
        self.s1, self.s2 = scales

    def forward(self, x, mask=None):
        n = self.n1(x)
        masks = [None] * len(self.heads) if mask is None else mask.expand(len(x), len(self.heads), *mask.shape[-2:]).unbind(1)
        y = torch.cat([head(n, m) for head, m in zip(self.heads, masks)], dim=-1)
        x = x + self.path(self.s1(self.drop(self.out(y))))
        y = self.drop(self.fc2(self.drop(self.act(self.fc1(self.n2(x))))))
        return x + self.path(self.s2(y))

# === drop_path_rates: linspace
def drop_path_rates(depth, drop_path):
    if depth < 1 or drop_path < 0 or drop_path >= 1:
        raise ValueError(f"depth={depth}, drop_path={drop_path}: need depth >= 1 and a rate in [0, 1)")
    return torch.linspace(0, drop_path, depth).tolist()

# === drop_path_rates: numpy, and a sum of steps
def drop_path_rates(depth, drop_path):
    if depth <= 0:
        raise ValueError("depth")
    if not (drop_path >= 0 and drop_path < 1):
        raise ValueError("drop_path")
    return [float(r) for r in np.linspace(0.0, drop_path, depth)]

# === drop_path_rates: one step after the other
def drop_path_rates(depth, drop_path):
    if depth < 1 or not 0 <= drop_path < 1:
        raise ValueError("wrong argument")
    rates = [0.0]
    while len(rates) < depth:
        rates.append(rates[-1] + drop_path / (depth - 1))
    return rates

# === Encoder: options by name, torch's linspace
class Encoder(nn.Module):
    def __init__(self, depth, dim, num_heads, mlp_ratio=4.0, dropout=0.0, attn_dropout=0.0, drop_path=0.0, layer_scale=None, eps=1e-6):
        super().__init__()
        rates = [r.item() for r in torch.linspace(0, drop_path, depth)]
        make = partial(EncoderBlock, dim, num_heads, mlp_ratio=mlp_ratio, dropout=dropout, attn_dropout=attn_dropout)
        self.layers = nn.ModuleList([make(drop_path=r, layer_scale=layer_scale, eps=eps) for r in rates])

    def forward(self, x, mask=None):
        for layer in self.layers:
            x = layer(x, mask=mask)
        return x

# === Encoder: a Sequential of blocks, run in a loop
class Encoder(nn.Module):
    def __init__(self, depth, dim, num_heads, **options):
        super().__init__()
        drop_path = options.pop("drop_path", 0.0)
        blocks = [EncoderBlock(dim, num_heads, drop_path=i * drop_path / max(depth - 1, 1), **options) for i in range(depth)]
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x, mask=None):
        if mask is None:
            return self.blocks(x)
        for block in self.blocks:
            x = block(x, mask)
        return x

# === Encoder: a Sequential of blocks that takes no mask
class Encoder(nn.Sequential):
    def __init__(self, depth, dim, num_heads, mlp_ratio=4.0, dropout=0.0, attn_dropout=0.0, drop_path=0.0, layer_scale=None, eps=1e-6):
        rest = mlp_ratio, dropout, attn_dropout
        super().__init__(*(EncoderBlock(dim, num_heads, *rest, r, layer_scale, eps) for r in np.linspace(0, drop_path, depth).tolist()))

# === Encoder: built from the end, first block last
class Encoder(nn.Module):
    def __init__(self, depth, dim, num_heads, mlp_ratio=4.0, dropout=0.0, attn_dropout=0.0, drop_path=0.0, layer_scale=None, eps=1e-6):
        super().__init__()
        self.depth = depth
        for i in reversed(range(depth)):
            rate = drop_path * i / (depth - 1) if depth > 1 else 0.0
            self.add_module(f"block{i}", EncoderBlock(dim, num_heads, mlp_ratio, dropout, attn_dropout, rate, layer_scale, eps))

    def forward(self, x, mask=None):
        for i in range(self.depth):
            x = getattr(self, f"block{i}")(x, mask)
        return x

# === Encoder: recursion
class Encoder(nn.Module):
    def __init__(self, depth, dim, num_heads, mlp_ratio=4.0, dropout=0.0, attn_dropout=0.0, drop_path=0.0, layer_scale=None, eps=1e-6):
        super().__init__()
        below = drop_path * (depth - 2) / max(1, depth - 1)
        rest = mlp_ratio, dropout, attn_dropout
        self.below = Encoder(depth - 1, dim, num_heads, *rest, below, layer_scale, eps) if depth > 1 else None
        self.top = EncoderBlock(dim, num_heads, *rest, drop_path if depth > 1 else 0.0, layer_scale, eps)

    def forward(self, x, mask=None):
        return self.top(x if self.below is None else self.below(x, mask), mask)

# === Encoder: lists of parts, no block class
class Encoder(nn.Module):
    def __init__(self, depth, dim, num_heads, mlp_ratio=4.0, dropout=0.0, attn_dropout=0.0, drop_path=0.0, layer_scale=None, eps=1e-6):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(dim, eps) for _ in range(2 * depth))
        attn = partial(MultiHeadAttention, dim, num_heads, attn_dropout=attn_dropout, proj_dropout=dropout)
        self.attns = nn.ModuleList(attn() for _ in range(depth))
        self.mlps = nn.ModuleList(MLP(dim, int(dim * mlp_ratio), dropout=dropout) for _ in range(depth))
        self.paths = nn.ModuleList(DropPath(r) for r in drop_path_rates(depth, drop_path))
        off = layer_scale is None
        self.scales = nn.ModuleList(nn.Identity() if off else LayerScale(dim, layer_scale) for _ in range(2 * depth))

    def forward(self, x, mask=None):
        for i, (attn, mlp, path) in enumerate(zip(self.attns, self.mlps, self.paths)):
            x = x + path(self.scales[2 * i](attn(self.norms[2 * i](x), mask)))
            x = x + path(self.scales[2 * i + 1](mlp(self.norms[2 * i + 1](x))))
        return x

# === CrossAttention: three layers
class CrossAttention(nn.Module):
    def __init__(self, dim, num_heads=8):
        super().__init__()
        self.h = num_heads
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(dim, dim) for _ in range(4))

    def forward(self, x, memory, mask=None, need_weights=False):
        q, k, v = self.to_q(x), self.to_k(memory), self.to_v(memory)
        q, k, v = (rearrange(t, "b n (h d) -> b h n d", h=self.h) for t in (q, k, v))
        out, weights = scaled_dot_product_attention(q, k, v, mask)
        out = self.to_out(rearrange(out, "b h n d -> b n (h d)"))
        return (out, weights) if need_weights else out

# === CrossAttention: the framework's layer
class CrossAttention(nn.Module):
    def __init__(self, dim, num_heads=8):
        super().__init__()
        self.mha = nn.MultiheadAttention(dim, num_heads, batch_first=True)

    def forward(self, x, memory, mask=None, need_weights=False):
        if mask is not None:
            mask = ~mask if mask.dtype == torch.bool else mask
            mask = mask.expand(len(x), self.mha.num_heads, *mask.shape[-2:]).flatten(0, 1)
        out, weights = self.mha(x, memory, memory, attn_mask=mask, average_attn_weights=False)
        return (out, weights) if need_weights else out

# === CrossAttention: chunks, sdpa where no weights are asked for
class CrossAttention(nn.Module):
    def __init__(self, dim, num_heads=8):
        super().__init__()
        self.num_heads = num_heads
        self.kv, self.q = nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x, memory, mask=None, need_weights=False):
        def cut(t):
            return t.unflatten(2, (self.num_heads, -1)).transpose(1, 2)

        q, (k, v) = cut(self.q(x)), map(cut, self.kv(memory).chunk(2, -1))
        if not need_weights:
            return self.proj(F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2))
        out, weights = scaled_dot_product_attention(q, k, v, mask)
        return self.proj(out.transpose(1, 2).flatten(2)), weights

# === DecoderBlock: separate parts in another order
class DecoderBlock(nn.Module):
    def __init__(self, dim, num_heads, mlp_ratio=4.0, dropout=0.0, eps=1e-6):
        super().__init__()
        self.ffn = MLP(dim, int(dim * mlp_ratio), dropout=dropout)
        self.cross, self.own = nn.MultiheadAttention(dim, num_heads, batch_first=True), MultiHeadAttention(dim, num_heads)
        self.norms = nn.ModuleList(nn.LayerNorm(dim, eps) for _ in range(3))
        self.drop = nn.Dropout(dropout)

    def forward(self, x, memory, mask=None):
        x = x + self.drop(self.own(self.norms[0](x), mask))
        x = x + self.drop(self.cross(self.norms[1](x), memory, memory, need_weights=False)[0])
        return x + self.ffn(self.norms[2](x))

# === DecoderBlock: the framework's layer
class DecoderBlock(nn.Module):
    def __init__(self, dim, num_heads, mlp_ratio=4.0, dropout=0.0, eps=1e-6):
        super().__init__()
        self.layer = nn.TransformerDecoderLayer(
            dim, num_heads, int(dim * mlp_ratio), dropout, "gelu", layer_norm_eps=eps, batch_first=True, norm_first=True
        )
        self.layer.self_attn.dropout = self.layer.multihead_attn.dropout = 0.0

    def forward(self, x, memory, mask=None):
        if mask is not None and mask.dtype == torch.bool:
            mask = ~mask
        return self.layer(x, memory, tgt_mask=mask)
