import torch
import torch.nn.functional as F
from einops import rearrange, reduce

# === soft_distillation_loss: torch's divergence, the teacher under no_grad
def soft_distillation_loss(student_logits, teacher_logits, temperature=3.0):
    with torch.no_grad():
        p = torch.softmax(teacher_logits / temperature, dim=1)
    log_q = torch.log_softmax(student_logits / temperature, dim=1)
    return F.kl_div(log_q, p, reduction="batchmean") * temperature**2

# === soft_distillation_loss: torch's divergence, both sides as logarithms
def soft_distillation_loss(student_logits, teacher_logits, temperature=3.0):
    log_q, log_p = ((z / temperature).log_softmax(-1) for z in (student_logits, teacher_logits))
    total = F.kl_div(log_q, log_p.detach(), reduction="sum", log_target=True)
    return total / len(student_logits) * temperature * temperature

# === soft_distillation_loss: cross-entropy less the teacher's entropy
def soft_distillation_loss(student_logits, teacher_logits, temperature=3.0):
    p = (teacher_logits.detach() / temperature).softmax(dim=-1)
    cross = F.cross_entropy(student_logits / temperature, p)
    own = torch.special.entr(p).sum(dim=-1).mean()
    return temperature**2 * (cross - own)

# === soft_distillation_loss: image by image, logsumexp by hand
def soft_distillation_loss(student_logits, teacher_logits, temperature=3.0):
    losses = []
    for z, v in zip(student_logits / temperature, teacher_logits.detach() / temperature):
        log_q = z - torch.logsumexp(z, dim=0)
        log_p = v - torch.logsumexp(v, dim=0)
        losses.append(sum(a.exp() * (a - b) for a, b in zip(log_p, log_q)))
    return temperature**2 * torch.stack(losses).mean()

# === soft_distillation_loss: einops, logits shifted by their largest
def soft_distillation_loss(student_logits, teacher_logits, temperature=3.0):
    def logs(z):
        z = z / temperature
        z = z - rearrange(reduce(z, "b k -> b", "max"), "b -> b 1").detach()
        return z - z.exp().sum(dim=1, keepdim=True).log()

    log_p, log_q = logs(teacher_logits).detach(), logs(student_logits)
    return temperature**2 * torch.einsum("bk,bk->b", log_p.exp(), log_p - log_q).mean()

# === hard_distillation_loss: picked logarithms
def hard_distillation_loss(student_logits, teacher_logits):
    decided = teacher_logits.max(dim=1).indices
    rows = torch.arange(len(decided))
    return -student_logits.log_softmax(dim=1)[rows, decided].mean()

# === hard_distillation_loss: one-hot targets
def hard_distillation_loss(student_logits, teacher_logits):
    best = torch.softmax(teacher_logits.detach(), dim=-1).argmax(dim=-1)
    one_hot = F.one_hot(best, teacher_logits.shape[-1]).to(student_logits)
    return -(one_hot * F.log_softmax(student_logits, dim=-1)).sum() / len(best)

# === hard_distillation_loss: nll_loss, decisions from topk
def hard_distillation_loss(student_logits, teacher_logits):
    _, decided = teacher_logits.topk(1, dim=-1)
    return F.nll_loss(student_logits.log_softmax(-1), decided.squeeze(-1))

# === hard_distillation_loss: image by image
def hard_distillation_loss(student_logits, teacher_logits):
    total = 0.0
    for z, v in zip(student_logits, teacher_logits):
        total = total + z.logsumexp(0) - z[int(v.argmax())]
    return total / student_logits.shape[0]

# === distillation_loss: early returns, torch's lerp
def distillation_loss(outputs, labels, teacher_logits, kind="hard", temperature=3.0, weight=0.5,
                      label_smoothing=0.0):
    heads = outputs if isinstance(outputs, (tuple, list)) else [outputs, outputs]
    truth = lambda logits: F.cross_entropy(logits, labels, label_smoothing=label_smoothing)
    first = truth(heads[0])
    if kind == "labels":
        return torch.lerp(first, truth(heads[1]), weight)
    if kind == "hard":
        return torch.lerp(first, hard_distillation_loss(heads[1], teacher_logits), weight)
    return torch.lerp(first, soft_distillation_loss(heads[1], teacher_logits, temperature), weight)

# === distillation_loss: a table of functions, nothing from above
def distillation_loss(outputs, labels, teacher_logits, kind="hard", temperature=3.0, weight=0.5,
                      label_smoothing=0.0):
    if torch.is_tensor(outputs):
        own = told = outputs
    else:
        own, told = outputs
    criterion = torch.nn.CrossEntropyLoss(label_smoothing=label_smoothing)

    def soft():
        p = (teacher_logits.detach() / temperature).softmax(-1)
        log_q = (told / temperature).log_softmax(-1)
        return temperature**2 * F.kl_div(log_q, p, reduction="batchmean")

    ways = {"soft": soft, "labels": lambda: criterion(told, labels),
            "hard": lambda: F.cross_entropy(told, teacher_logits.argmax(1))}
    return criterion(own, labels) * (1 - weight) + ways[kind]() * weight

# === distillation_loss: match, and smoothing by hand
def distillation_loss(outputs, labels, teacher_logits, kind="hard", temperature=3.0, weight=0.5,
                      label_smoothing=0.0):
    own, told = outputs if type(outputs) is tuple else (outputs,) * 2
    shares = labels if labels.ndim > 1 else F.one_hot(labels, own.shape[-1]).to(own)
    shares = (1 - label_smoothing) * shares + label_smoothing / own.shape[-1]
    loss = (1 - weight) * F.cross_entropy(own, shares)
    match kind:
        case "soft":
            return loss + weight * soft_distillation_loss(told, teacher_logits, temperature)
        case "hard":
            return loss + weight * hard_distillation_loss(told, teacher_logits)
    return loss + weight * F.cross_entropy(told, shares)
