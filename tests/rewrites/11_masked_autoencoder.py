import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import nn

# === random_masking: one image after the other
def random_masking(tokens, ratio, noise=None):
    b, n, d = tokens.shape
    k = max(int(n * (1 - ratio)), 1)
    kept, mask, restore = [], tokens.new_ones(b, n), torch.empty(b, n, dtype=torch.long)
    for i in range(b):
        numbers = torch.rand(n).tolist() if noise is None else noise[i].tolist()
        order = sorted(range(n), key=numbers.__getitem__)
        kept.append(tokens[i, order[:k]])
        mask[i, order[:k]] = 0
        restore[i, order] = torch.arange(n)
    return torch.stack(kept), mask, restore

# === random_masking: index pairs, the mask gathered as in the paper's code
def random_masking(tokens, ratio, noise=None):
    batch, count = tokens.shape[:2]
    noise = torch.randn(batch, count) if noise is None else noise
    k = max(1, int(count * (1 - ratio)))
    order = torch.sort(noise, dim=-1).indices
    restore = torch.argsort(order, dim=-1)
    kept = tokens[torch.arange(batch)[:, None], order[:, :k]]
    mask = torch.ones_like(tokens[..., 0])
    mask[:, :k] = 0
    return kept, torch.gather(mask, 1, restore), restore

# === random_masking: scatter for the way back, permutations without noise
def random_masking(tokens, ratio, noise=None):
    batch, count, dim = tokens.size()
    if noise is None:
        order = torch.stack([torch.randperm(count) for _ in range(batch)])
    else:
        order = torch.topk(noise, count, dim=1, largest=False).indices
    places = repeat(torch.arange(count), "n -> b n", b=batch)
    restore = torch.zeros_like(order).scatter(1, order, places)
    k = max(1, int(count * (1 - ratio)))
    kept = torch.take_along_dim(tokens, order[:, :k].unsqueeze(-1), dim=1)
    return [kept, torch.where(restore < k, 0.0, 1.0).to(tokens), restore]

# === unshuffle: written into an array of mask tokens
def unshuffle(tokens, restore, mask_token):
    order = restore.argsort(1)[:, : tokens.shape[1]]  # the token that each visible one is
    image = mask_token.repeat(tokens.shape[0], restore.shape[1], 1)
    return image.scatter(1, order.unsqueeze(-1).expand_as(tokens), tokens)

# === unshuffle: one token after the other
def unshuffle(tokens, restore, mask_token):
    images = []
    for row, places in zip(tokens, restore.tolist()):
        images.append(torch.stack([row[p] if p < len(row) else mask_token[0, 0] for p in places]))
    return torch.stack(images)

# === unshuffle: N mask tokens behind, index pairs
def unshuffle(tokens, restore, mask_token):
    more = repeat(mask_token, "1 1 d -> b n d", b=len(tokens), n=restore.size(1))
    return torch.hstack([tokens, more])[torch.arange(len(tokens)).unsqueeze(1), restore]

# === unshuffle: where, with places cut off
def unshuffle(tokens, restore, mask_token):
    k = tokens.shape[1]
    taken = torch.take_along_dim(tokens, restore.clamp(max=k - 1)[..., None], dim=1)
    return torch.where((restore < k)[..., None], taken, mask_token)

# === PixelDecoder: concat with an index that knows the prefix
class PixelDecoder(nn.Module):
    def __init__(self, in_dim, grid, num_outputs, dim=512, depth=8, num_heads=16, num_prefix_tokens=1):
        super().__init__()
        self.num_prefix_tokens = num_prefix_tokens
        self.embed, self.mask_token = nn.Linear(in_dim, dim), nn.Parameter(torch.zeros(1, 1, dim))
        self.positions = make_positions("sinusoidal_2d", grid, dim, num_prefix_tokens)
        self.encoder, self.norm = Encoder(depth, dim, num_heads), nn.LayerNorm(dim, eps=1e-6)
        self.head = nn.Linear(dim, num_outputs)
        _init_decoder(self)

    def forward(self, features, restore):
        x, n = self.embed(features), self.num_prefix_tokens
        missing = n + restore.shape[1] - x.shape[1]
        x = torch.cat([x, self.mask_token.expand(len(x), missing, -1)], dim=1)
        index = torch.cat([torch.arange(n).expand(len(x), -1), restore + n], dim=1)
        x = self.positions(x[torch.arange(len(x))[:, None], index])
        return self.head(self.norm(self.encoder(x)))[:, n:]

# === PixelDecoder: step by step, prefix cut by slices
class PixelDecoder(nn.Module):
    def __init__(self, in_dim, grid, num_outputs, dim=512, depth=8, num_heads=16, num_prefix_tokens=1):
        super().__init__()
        self.num_prefix_tokens = num_prefix_tokens
        self.embed, self.mask_token = nn.Linear(in_dim, dim), nn.Parameter(torch.zeros(1, 1, dim))
        self.positions = make_positions("sinusoidal_2d", grid, dim, num_prefix_tokens)
        self.encoder, self.norm = Encoder(depth, dim, num_heads), nn.LayerNorm(dim, eps=1e-6)
        self.head = nn.Linear(dim, num_outputs)
        _init_decoder(self)

    def forward(self, features, restore):
        features = self.embed(features)
        front = features[:, : self.num_prefix_tokens]
        patches = unshuffle(features[:, self.num_prefix_tokens :], restore, self.mask_token)
        tokens = self.positions(torch.hstack([front, patches]))
        for block in self.encoder.children():
            tokens = block(tokens) if not isinstance(block, nn.ModuleList) else nn.Sequential(*block)(tokens)
        tokens = self.norm(tokens)
        return self.head(tokens[:, -restore.shape[1] :, :])

# === PixelDecoder: other names, the mask token one-dimensional
class PixelDecoder(nn.Module):
    def __init__(self, in_dim, grid, num_outputs, dim=512, depth=8, num_heads=16, num_prefix_tokens=1):
        super().__init__()
        self.prefix = num_prefix_tokens
        self.narrow, self.unknown = nn.Linear(in_dim, dim), nn.Parameter(0.02 * torch.randn(dim))
        self.add_positions = make_positions("sinusoidal_2d", grid, dim, num_prefix_tokens)
        self.blocks = Encoder(depth, dim, num_heads)
        self.out = nn.Sequential(nn.LayerNorm(dim, eps=1e-6), nn.Linear(dim, num_outputs))

    def forward(self, features, restore):
        x = self.narrow(features)
        patches = unshuffle(x[:, self.prefix :], restore, self.unknown[None, None])
        x = self.blocks(self.add_positions(torch.cat([x[:, : self.prefix], patches], 1)))
        return self.out(x)[:, self.prefix :]

# === patch_targets: einops, std by hand
def patch_targets(images, patch_size, normalize=True, eps=1e-6):
    p = patch_size
    x = rearrange(images, "b c (r p) (s q) -> b (r s) (p q c)", p=p, q=p)
    if normalize:
        centred = x - x.mean(2, keepdim=True)
        variance = (centred**2).sum(2, keepdim=True) / (x.shape[2] - 1)
        return centred / torch.sqrt(variance + eps)
    return x

# === patch_targets: var and rsqrt, under no_grad
@torch.no_grad()
def patch_targets(images, patch_size, normalize=True, eps=1e-6):
    target = patchify(images, patch_size)
    if normalize:
        mean, var = target.mean(-1), target.var(-1)
        target = (target - mean.unsqueeze(-1)) * (var + eps).rsqrt()[..., None]
    return target

# === patch_targets: patch by patch
def patch_targets(images, patch_size, normalize=True, eps=1e-6):
    _, _, height, width = images.shape
    rows = []
    for top in range(0, height, patch_size):
        for left in range(0, width, patch_size):
            patch = images[:, :, top : top + patch_size, left : left + patch_size]
            rows.append(patch.permute(0, 2, 3, 1).flatten(1))
    if normalize:
        rows = [(r - r.mean(1, True)) / (r.std(1, keepdim=True) ** 2 + eps) ** 0.5 for r in rows]
    return torch.stack(rows, dim=1)

# === masked_loss: the hidden ones picked
def masked_loss(prediction, target, mask):
    hidden = mask.bool()
    return F.mse_loss(prediction[hidden], target[hidden])

# === masked_loss: one sum over all numbers
def masked_loss(prediction, target, mask):
    squares = (prediction - target) ** 2 * mask[..., None]
    return squares.sum() / (mask.sum() * target.shape[-1])

# === masked_loss: a loop, the target without a gradient
def masked_loss(prediction, target, mask):
    errors = []
    for guess, truth, row in zip(prediction, target.detach(), mask):
        for n in range(len(row)):
            if row[n] == 1:
                errors.append(F.mse_loss(guess[n], truth[n]))
    return torch.stack(errors).mean()

# === masked_loss: a weighted mean by einsum
def masked_loss(prediction, target, mask):
    error = F.mse_loss(prediction, target, reduction="none").mean(2)
    return torch.einsum("bn,bn->", error, mask / mask.sum())
