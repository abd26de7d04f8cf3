"""Slow, independent versions of the papers' equations: loops over samples and peers, on scalars and rows of float64.

They share no code with codistill. A row is one sample's logits or features, a 1-d tensor.
"""

import math

import torch
from torch import Tensor


def log_softmax(row: Tensor) -> list[Tensor]:
    top = max(float(v.detach()) for v in row)
    total = sum(torch.exp(v - top) for v in row)
    return [v - top - torch.log(total) for v in row]


def log_sum(values: list[Tensor]) -> Tensor:
    """log of a sum of exponentials of scalars, some of which may be -inf."""
    finite = [v for v in values if float(v.detach()) > -math.inf]
    top = max(float(v.detach()) for v in finite)
    return top + torch.log(sum(torch.exp(v - top) for v in finite))


def ce(z: Tensor, y: Tensor) -> Tensor:
    """Mean over the batch of -log softmax(z)[y]; z is B x C."""
    return sum(-log_softmax(z[b])[int(y[b])] for b in range(len(z))) / len(z)


def kl_row(log_target: list[Tensor], student: Tensor, temperature: float, guard: float = 0.0) -> Tensor:
    """T^2 sum_c t (log t - log s) of one sample."""
    log_s = log_softmax(student / temperature)
    total = torch.zeros((), dtype=torch.float64)
    for lt, ls in zip(log_target, log_s):
        t = torch.exp(lt)
        if guard:
            t = t + guard
            lt = torch.log(t)
        total = total + t * (lt - ls)
    return temperature**2 * total


def kl(student: Tensor, target: Tensor, temperature: float, guard: float = 0.0) -> Tensor:
    """KLT(student <- target), mean over the batch; both B x C logits."""
    rows = [kl_row(log_softmax(target[b] / temperature), student[b], temperature, guard) for b in range(len(student))]
    return sum(rows) / len(rows)


def mixed_log_probs(log_weights: list[Tensor], rows: list[Tensor], temperature: float) -> list[Tensor]:
    """log sum_b w_b softmax(z_b / T), class by class."""
    log_probs = [log_softmax(row / temperature) for row in rows]
    return [log_sum([w + lp[c] for w, lp in zip(log_weights, log_probs)]) for c in range(len(rows[0]))]


def mixed_logits(log_weights: list[Tensor], rows: list[Tensor]) -> Tensor:
    return sum(torch.exp(w) * row for w, row in zip(log_weights, rows))


def okddip(
    z, h, w_query, w_key, y, *, temperature, weight, variant="paper", detach="none", mask_self=False, ablation="none"
):
    """OKDDip's loss, from its equations; z: P x B x C, h: P x B x D. Returns (loss, alpha as B x A x A floats)."""
    num_peers, batch = z.shape[:2]
    aux = num_peers - 1 if ablation != "no_leader" else num_peers
    guard = 1e-7 if variant == "okddip_code" else 0.0
    loss = sum(ce(z[p], y) for p in range(num_peers))
    source = z if detach == "none" else z.detach()

    def target(log_weights, b):
        rows = [source[j][b] for j in range(aux)]
        if variant == "paper":
            log_t = mixed_log_probs(log_weights, rows, temperature)
        else:
            log_t = log_softmax(mixed_logits(log_weights, rows) / temperature)
        return [v.detach() for v in log_t] if detach == "all" else log_t

    attention = torch.zeros(batch, aux, aux, dtype=torch.float64)
    for b in range(batch):
        for a in range(aux):
            scores = []
            for j in range(aux):
                if mask_self and j == a:
                    scores.append(torch.tensor(-math.inf, dtype=torch.float64))
                elif ablation == "symmetric":
                    scores.append((h[a][b] * h[j][b]).sum())
                elif ablation == "mean":
                    scores.append(torch.zeros((), dtype=torch.float64))
                else:
                    scores.append((w_query @ h[a][b]) @ (w_key @ h[j][b]))
            total = log_sum(scores)
            log_alpha = [s - total for s in scores]
            attention[b, a] = torch.stack(log_alpha).exp().detach()
            loss = loss + weight * kl_row(target(log_alpha, b), z[a][b], temperature, guard) / batch
        if ablation != "no_leader":
            uniform = [torch.tensor(-math.log(aux), dtype=torch.float64)] * aux
            loss = loss + weight * kl_row(target(uniform, b), z[-1][b], temperature, guard) / batch
    return loss, attention
