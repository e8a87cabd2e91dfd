import torch
import torch.nn.functional as F
from einops import rearrange

# === sample_points: a list
def sample_points(old, new, align_corners=False, offset=0.0):
    if align_corners and new == 1:
        return torch.zeros(1)
    if align_corners:
        return torch.tensor([k * (old - 1) / (new - 1) for k in range(new)])
    step = old / (new + offset)
    return torch.tensor([(k + 0.5) * step - 0.5 for k in range(new)])

# === sample_points: linspace
def sample_points(old, new, align_corners=False, offset=0.0):
    if align_corners:
        return torch.linspace(0, old - 1, new)
    step = old / (new + offset)
    return torch.linspace(0.5 * step - 0.5, (new - 0.5) * step - 0.5, new)

# === sample_points: a running sum
def sample_points(old: int, new: int, align_corners: bool = False, offset: float = 0.0) -> torch.Tensor:
    step = (old - 1) / max(new - 1, 1) if align_corners else old / (offset + new)
    start = 0.0 if align_corners else (step - 1) / 2
    return start + step * torch.arange(new, dtype=torch.float32)

# === resize_positions: einops, no special case for equal grids
def resize_positions(positions, old_grid, new_grid, num_prefix_tokens=1, mode="bicubic", antialias=True,
                     align_corners=False, offset=0.0):
    table = positions if positions.ndim == 3 else positions[None]
    prefix, patches = table[:, :num_prefix_tokens], table[:, num_prefix_tokens:]
    image = rearrange(patches.float(), "b (r c) d -> b d r c", r=old_grid[0], c=old_grid[1])
    image = _interpolate(image, new_grid, mode, antialias, align_corners, offset)
    new = rearrange(image, "b d r c -> b (r c) d").to(positions.dtype)
    out = torch.cat([prefix, new], dim=1)
    return out if positions.ndim == 3 else out[0]

# === resize_positions: F.interpolate itself, reshape and permute
def resize_positions(positions, old_grid, new_grid, num_prefix_tokens=1, mode="bicubic", antialias=True,
                     align_corners=False, offset=0.0):
    d, n = positions.shape[-1], num_prefix_tokens
    flat = positions.reshape(-1, d)
    image = flat[n:].to(torch.float32).reshape(1, *old_grid, d).permute(0, 3, 1, 2)
    options = {"mode": mode}
    if mode in ("bilinear", "bicubic"):
        options |= {"align_corners": align_corners, "antialias": antialias}
    if offset:
        scale = [(a + offset) / b for a, b in zip(new_grid, old_grid)]
        image = F.interpolate(image, scale_factor=scale, **options)
    else:
        image = F.interpolate(image, size=list(new_grid), **options)
    new = image.permute(0, 2, 3, 1).reshape(-1, d).type_as(positions)
    return torch.cat((flat[:n], new), 0).reshape(*positions.shape[:-2], -1, d)

# === resize_positions: features by features
def resize_positions(positions, old_grid, new_grid, num_prefix_tokens=1, mode="bicubic", antialias=True,
                     align_corners=False, offset=0.0):
    if positions.dim() == 2:
        options = mode, antialias, align_corners, offset
        return resize_positions(positions.unsqueeze(0), old_grid, new_grid, num_prefix_tokens, *options).squeeze(0)
    prefix, patches = positions.split([num_prefix_tokens, old_grid[0] * old_grid[1]], dim=1)
    pictures = patches[0].float().T.unflatten(1, tuple(old_grid))[:, None]  # (D, 1, rows, cols)
    new = _interpolate(pictures, tuple(new_grid), mode, antialias, align_corners, offset)
    return torch.cat([prefix, new.flatten(1).T[None].to(positions.dtype)], dim=1)
