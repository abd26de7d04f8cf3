"""Slow, independent versions of the papers' equations: loops over samples and peers, on scalars and rows of float64.

They share no code with codistill. A row is one sample's logits or features, a 1-d tensor.
"""

import math

import torch
from torch import Tensor

ZERO = torch.zeros((), dtype=torch.float64)


def log_softmax(row: Tensor) -> list[Tensor]:
    top = max(float(v.detach()) for v in row)
    total = sum(torch.exp(v - top) for v in row)
    return [v - top - torch.log(total) for v in row]


def log_sum(values: list[Tensor]) -> Tensor:
    """log of a sum of exponentials of scalars, some of which may be -inf."""
    finite = [v for v in values if float(v.detach()) > -math.inf]
    top = max(float(v.detach()) for v in finite)
    return top + torch.log(sum((torch.exp(v - top) for v in finite), ZERO))


def ce(z: Tensor, y: Tensor) -> Tensor:
    """Mean over the batch of -log softmax(z)[y]; z is B x C."""
    return sum((-log_softmax(z[b])[int(y[b])] for b in range(len(z))), ZERO) / len(z)


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
    return sum(rows, ZERO) / len(rows)


def mixed_log_probs(log_weights: list[Tensor], rows: list[Tensor], temperature: float) -> list[Tensor]:
    """log sum_b w_b softmax(z_b / T), class by class."""
    log_probs = [log_softmax(row / temperature) for row in rows]
    return [log_sum([w + lp[c] for w, lp in zip(log_weights, log_probs)]) for c in range(len(rows[0]))]


def mixed_logits(log_weights: list[Tensor], rows: list[Tensor]) -> Tensor:
    return sum((torch.exp(w) * row for w, row in zip(log_weights, rows)), ZERO)


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


def soft_ce(student: Tensor, target: Tensor, temperature: float) -> Tensor:
    """-T^2 sum_c q_c log s_c, mean over the batch; target is B x C logits."""
    total = torch.zeros((), dtype=torch.float64)
    for b in range(len(student)):
        log_s, log_q = log_softmax(student[b] / temperature), log_softmax(target[b] / temperature)
        total = total - sum(torch.exp(lq) * ls for lq, ls in zip(log_q, log_s))
    return temperature**2 * total / len(student)


def others_mean(z: Tensor, i: int) -> Tensor:
    return sum((z[j] for j in range(len(z)) if j != i), ZERO) / (len(z) - 1)


def kd(z, teacher, y, *, variant, temperature, alpha):
    teacher = teacher.detach()
    if variant == "paper":
        return sum((1 - alpha) * ce(s, y) + alpha * kl(s, teacher, temperature) for s in z)
    return sum(ce(s, y) + alpha * kl(s, teacher, temperature, 1e-7) for s in z)


def dml(z, y, *, variant, target, temperature, weight):
    """Sum of the members' losses, each as its own network sees it (the others constant, unless the code does not)."""
    total = torch.zeros((), dtype=torch.float64)
    for i in range(len(z)):
        source = z if variant == "okddip_code" else z.detach()
        guard = 1e-7 if variant == "okddip_code" else 0.0
        if target == "mean":
            distill = _authors_kl(z[i], others_mean(source, i), temperature) if variant == "authors" else None
            distill = kl(z[i], others_mean(source, i), temperature, guard) if distill is None else distill
        else:
            distill = torch.zeros((), dtype=torch.float64)
            for j in range(len(z)):
                if j == i:
                    continue
                if variant == "authors":
                    distill = distill + _authors_kl(z[i], source[j], temperature)
                else:
                    distill = distill + kl(z[i], source[j], temperature, guard) / (len(z) - 1)
        total = total + ce(z[i], y) + weight * distill
    return total


def _authors_kl(student: Tensor, target: Tensor, temperature: float) -> Tensor:
    """mean_b sum p_j log(1e-8 + p_j / (p_i + 1e-8))"""
    total = torch.zeros((), dtype=torch.float64)
    for b in range(len(student)):
        p_i = [torch.exp(v) for v in log_softmax(student[b] / temperature)]
        p_j = [torch.exp(v) for v in log_softmax(target[b] / temperature)]
        total = total + sum(pj * torch.log(1e-8 + pj / (pi + 1e-8)) for pi, pj in zip(p_i, p_j))
    return temperature**2 * total / len(student)


def cl_ilr(z, y, *, variant, temperature, beta, weight):
    total = torch.zeros((), dtype=torch.float64)
    for h in range(len(z)):
        if variant == "paper":
            target = others_mean(z.detach(), h)
            total = total + beta * ce(z[h], y) + weight * (1 - beta) * soft_ce(z[h], target, temperature)
        else:
            total = total + ce(z[h], y) + weight * kl(z[h], others_mean(z, h), temperature, 1e-7)
    return total


def one(z, gate_logits, y, *, variant, temperature, weight):
    """gate_logits are what goes into the softmax, B x P."""
    rows = []
    for b in range(z.shape[1]):
        gate = [torch.exp(v) for v in log_softmax(gate_logits[b])]
        rows.append(sum(g * z[i][b] for i, g in enumerate(gate)))
    teacher = torch.stack(rows)
    constant = teacher if variant == "okddip_code" else teacher.detach()
    guard = 0.0 if variant == "paper" else 1e-7
    distill = sum(kl(z[i], constant, temperature, guard) for i in range(len(z)))
    return sum(ce(z[i], y) for i in range(len(z))) + ce(teacher, y) + weight * distill


def one_gate(trunk, weight, bias, norm_weight, norm_bias, eps=1e-5):
    """ReLU(BatchNorm(W t + b)), with the batch's own statistics."""
    scores = [[(weight[p] * trunk[b]).sum() + bias[p] for p in range(len(weight))] for b in range(len(trunk))]
    columns = []
    for p in range(len(weight)):
        column = [row[p] for row in scores]
        mean = sum(column) / len(column)
        variance = sum((v - mean) ** 2 for v in column) / len(column)
        columns.append(
            [torch.relu((v - mean) / torch.sqrt(variance + eps) * norm_weight[p] + norm_bias[p]) for v in column]
        )
    return torch.stack([torch.stack([columns[p][b] for p in range(len(weight))]) for b in range(len(trunk))])


def pcl(z, h, ema, classifier_weight, classifier_bias, y, *, temperature, weight):
    rows = [classifier_weight @ torch.cat([f[b] for f in h]) + classifier_bias for b in range(z.shape[1])]
    ensemble = torch.stack(rows)
    total = ce(ensemble, y) + sum(ce(z[i], y) for i in range(len(z)))
    for i in range(len(z)):
        total = total + weight * kl(z[i], ensemble.detach(), temperature)
        for j in range(len(z)):
            if j != i:
                total = total + weight / (len(z) - 1) * kl(z[i], ema[j].detach(), temperature)
    return total


def kdcl(z, y, *, target, temperature, weight, mixture=None, mix="probs"):
    """`mixture` holds the weights of linear (B x P) or general (P); naive and minlogit find their own."""
    fixed = z.detach()
    total = sum(ce(z[i], y) for i in range(len(z)))
    for b in range(z.shape[1]):
        label = int(y[b])
        rows = [fixed[i][b] for i in range(len(z))]
        if target == "naive":
            losses = [float(-log_softmax(row)[label]) for row in rows]
            log_t = log_softmax(rows[losses.index(min(losses))] / temperature)
        elif target == "minlogit":
            lowest = [min(float(row[c] - row[label]) for row in rows) for c in range(len(rows[0]))]
            log_t = log_softmax(torch.tensor(lowest, dtype=torch.float64) / temperature)
        else:
            weights = mixture if mixture.dim() == 1 else mixture[b]
            if target == "general" and mix == "probs":
                log_t = mixed_log_probs([torch.log(w) for w in weights], rows, temperature)
            else:
                log_t = log_softmax(sum(w * row for w, row in zip(weights, rows)) / temperature)
        for i in range(len(z)):
            total = total + weight * kl_row(log_t, z[i][b], temperature) / z.shape[1]
    return total


def standardized(row: Tensor) -> Tensor:
    mean = sum(row) / len(row)
    deviation = torch.sqrt(sum((v - mean) ** 2 for v in row) / (len(row) - 1))
    return torch.stack([(v - mean) / (deviation + 1e-7) for v in row])


def pearson(a: list[Tensor], b: list[Tensor]) -> Tensor:
    mean_a, mean_b = sum(a) / len(a), sum(b) / len(b)
    a, b = [v - mean_a for v in a], [v - mean_b for v in b]
    norms = torch.sqrt(sum(v * v for v in a)) * torch.sqrt(sum(v * v for v in b))
    return sum(u * v for u, v in zip(a, b)) / (norms + 1e-8)


def divergence(student, target, y, *, kind, temperature, standardize=False, weights=None):
    """D(student <- target) of B x C logits, from its equation."""
    if standardize:
        student, target = (torch.stack([standardized(row) for row in z]) for z in (student, target))
    rows, total = [], ZERO
    for b in range(len(student)):
        ls, lt = log_softmax(student[b] / temperature), log_softmax(target[b] / temperature)
        s, t = [torch.exp(v) for v in ls], [torch.exp(v) for v in lt]
        rows.append((s, t))
        for c in range(len(ls)):
            if kind == "kl":
                total = total + temperature**2 * t[c] * (lt[c] - ls[c])
            elif kind == "reverse_kl":
                total = total + temperature**2 * s[c] * (ls[c] - lt[c])
            elif kind == "js":
                log_m = log_sum([ls[c], lt[c]]) - math.log(2)
                total = total + temperature**2 / 2 * (t[c] * (lt[c] - log_m) + s[c] * (ls[c] - log_m))
            elif kind == "mse":
                u, v = (z[b][c] - sum(z[b]) / len(ls) for z in (student, target))
                total = total + (u - v) ** 2 / len(ls)
        if kind == "dkd":
            alpha, beta = weights or (1.0, 8.0)
            own, others = int(y[b]), [c for c in range(len(ls)) if c != int(y[b])]
            binary = [[row[own], log_sum([row[c] for c in others])] for row in (ls, lt)]
            rest = [log_softmax(torch.stack([row[c] for c in others])) for row in (ls, lt)]
            for weight, (of_s, of_t) in ((alpha, binary), (beta, rest)):
                total = total + weight * temperature**2 * sum(torch.exp(v) * (v - u) for u, v in zip(of_s, of_t))
    total = total / len(student)
    if kind == "dist":
        beta, gamma = weights or (1.0, 1.0)
        of_samples = sum(pearson(s, t) for s, t in rows) / len(rows)
        classes = range(len(rows[0][0]))
        of_classes = sum(pearson([s[c] for s, _ in rows], [t[c] for _, t in rows]) for c in classes) / len(classes)
        total = temperature**2 * (beta * (1 - of_samples) + gamma * (1 - of_classes))
    return total


def with_divergence(z, y, targets, *, ce_weight=1.0, weight=1.0, **how):
    """sum_i ce_weight CE_i + weight sum_(i, target of i) D(z_i <- target); `targets` maps i to B x C logits."""
    total = sum(ce_weight * ce(z[i], y) for i in range(len(z)))
    for i, of in targets.items():
        for target in of:
            total = total + weight * divergence(z[i], target, y, **how)
    return total


def codistillation(z, stale, y, *, temperature, weight):
    """sum_i CE_i + weight T^2 softCE(z_i; mean over the others of the snapshots' probabilities)."""
    total = sum(ce(z[i], y) for i in range(len(z)))
    for i in range(len(z)):
        for b in range(len(y)):
            log_s = log_softmax(z[i][b] / temperature)
            others = [log_softmax(stale[j][b].detach() / temperature) for j in range(len(z)) if j != i]
            for c in range(len(log_s)):
                q = sum(torch.exp(row[c]) for row in others) / len(others)
                total = total - weight * temperature**2 * q * log_s[c] / len(y)
    return total


def codistillation_disjoint(z, stale, y, *, temperature, weight):
    """The same where peer i has its own images and labels y[i]; stale[j][i] is what snapshot j gives for them."""
    total = sum(ce(z[i], y[i]) for i in range(len(z)))
    for i in range(len(z)):
        for b in range(z.shape[1]):
            log_s = log_softmax(z[i][b] / temperature)
            others = [log_softmax(stale[j][i][b].detach() / temperature) for j in range(len(z)) if j != i]
            for c in range(len(log_s)):
                q = sum(torch.exp(row[c]) for row in others) / len(others)
                total = total - weight * temperature**2 * q * log_s[c] / z.shape[1]
    return total


def attention(maps: Tensor) -> list[Tensor]:
    """A of one sample: the mean over channels of squares, position by position."""
    channels, height, width = maps.shape
    places = [(y, x) for y in range(height) for x in range(width)]
    return [sum((maps[c, y, x] ** 2 for c in range(channels)), ZERO) / channels for y, x in places]


def unit_and_norm(values: list[Tensor]) -> tuple[list[Tensor], Tensor]:
    """Numbers divided by their norm, and the norm."""
    norm = torch.sqrt(sum((v**2 for v in values), ZERO))
    return [v / norm for v in values], norm


def rows_distance(a: list[list[Tensor]], b: list[list[Tensor]]) -> Tensor:
    """d: mean over samples and numbers of squared differences of normalized numbers."""
    pairs = [(unit_and_norm(u)[0], unit_and_norm(v)[0]) for u, v in zip(a, b)]
    return sum((sum(((s - t) ** 2 for s, t in zip(u, v)), ZERO) / len(u) for u, v in pairs), ZERO) / len(a)


def maps_distance(x: Tensor, y: Tensor, *, of_attention: bool = True) -> Tensor:
    """d(A(x), A(y)), or d(x, y)."""
    values = attention if of_attention else lambda maps: [*maps.flatten()]
    return rows_distance([values(own) for own in x], [values(own) for own in y])


def turned_attention(maps: Tensor) -> tuple[list[Tensor], Tensor, list[Tensor]]:
    """v, r and the attention that another student is to have, of one sample."""
    v, r = unit_and_norm(attention(maps))
    theta = sorted(v, key=float)[len(v) // 3 - 1]
    target = [r / 2 if u == theta else (r - u if u > theta else u) for u in v]
    return v, r, target


def ffsd(z, maps, modules, y, *, temperature, kl_weight, a, b):
    """The losses of students, fusion and leader without the decoders' own.

    maps[p] are a member's maps, the last one last; modules are the method's (fusion, leader_mixer, decoders), of which
    the decoders run in evaluation mode.
    """

    def soft(s, t):
        return kl(s, t.detach(), temperature)

    students = range(len(z) - 1)
    joined = torch.cat([maps[i][-1].detach() for i in students], 1)
    fused, u = modules.fusion(joined)
    total = ce(u, y) + kl_weight * soft(u, sum(z[i].detach() for i in students) / len(students))
    for i in students:
        others = [soft(z[i], z[j]) for j in students if j != i]
        total = total + ce(z[i], y) + kl_weight * sum(others) / len(others)
    total = total + ce(z[-1], y) + kl_weight * soft(z[-1], u)

    def self_distilled(member, x):
        decoder = modules.decoders[member - 1].eval()
        made = [m.detach() for m in decoder(x.detach())]
        decoder.train()
        return sum(maps_distance(own, m) for own, m in zip(maps[member][-2::-1], made))

    for i in students[1:]:
        before = maps[i - 1][-1].detach()
        shifted, rows = before.clone(), []
        for n in range(len(before)):
            v, r, target = turned_attention(before[n])
            change = torch.stack([(t - s) * r / before.shape[1] for s, t in zip(v, target)])
            shifted[n] = before[n] + change.view(1, *before.shape[2:])
            own = unit_and_norm(attention(maps[i][-1][n]))[0]
            rows.append(sum((s - t) ** 2 for s, t in zip(own, target)) / len(own))
        total = total + a * (sum(rows) / len(rows) + self_distilled(i, shifted))
    leader = maps[-1]
    compared = maps_distance(leader[-1], fused.detach()) + maps_distance(modules.leader_mixer(leader[-1]), joined)
    return total + b * (compared + self_distilled(len(z) - 1, fused))


def distance(p: list[list[Tensor]], q: list[list[Tensor]]) -> float:
    """mean_b ||p - q||_1 of rows of probabilities."""
    return sum(float(abs(u - v)) for a, b in zip(p, q) for u, v in zip(a, b)) / len(p)


def switokd_learns(student: Tensor, teacher: Tensor, y: Tensor) -> tuple[bool, float, float]:
    """Whether the teacher is in learning mode, G, and the threshold."""
    s, t = ([[torch.exp(v) for v in log_softmax(row)] for row in z.detach()] for z in (student, teacher))
    labels = [[float(c == int(y[b])) for c in range(student.shape[1])] for b in range(len(y))]
    a, b, gap = distance(s, labels), distance(t, labels), distance(s, t)
    threshold = a - math.exp(-b / (b + a)) * b
    return not (gap > threshold and b < a), gap, threshold


def switokd(z, y, *, students, weight=1.0):
    """Sum of the losses (a paused teacher's included), and who learns, teacher by teacher and student by student."""
    teachers, fixed, total = len(z) - students, z.detach(), ZERO
    learns = [[switokd_learns(z[s], z[t], y)[0] for s in range(teachers, len(z))] for t in range(teachers)]
    for i in range(len(z)):
        others = {j: 1.0 for j in range(len(z)) if j != i}
        label_weight = 1.0
        if students == 2 and i == 0:
            others = {1: float(learns[0][0]), 2: float(learns[0][1])}
            label_weight = max(others.values())
        total = (
            total + label_weight * ce(z[i], y) + weight * sum(w * kl(z[i], fixed[j], 1.0) for j, w in others.items())
        )
    return total, learns


def normalized(row: Tensor) -> list[Tensor]:
    length = torch.sqrt(sum(v * v for v in row))
    return [v / length for v in row]


def mcl_parts(v, y, *, tau, temperature):
    """VCL, softVCL, ICL and softICL of embeddings v[i][b] (lists of numbers), summed over the peers."""
    peers, batch = range(len(v)), range(len(y))

    def similarity(i, j):
        return [[sum(a * b for a, b in zip(v[i][b], v[j][k])) / tau for k in batch] for b in batch]

    def nce(s):
        rows = []
        for b in batch:
            others = [k for k in batch if k != b]
            positives = [k for k in others if int(y[k]) == int(y[b])]
            if positives:
                total = log_sum([s[b][k] for k in others])
                rows.append(-sum(s[b][k] - total for k in positives) / len(positives))
        return sum(rows, ZERO) / max(len(rows), 1)

    def soft(student, target):
        rows = [kl_row(log_softmax(torch.stack(t).detach() / temperature), torch.stack(s), temperature)
                for s, t in zip(student, target)]  # fmt: skip
        return sum(rows, ZERO) / len(rows)

    s = [[similarity(i, j) for j in peers] for i in peers]
    pairs = [(i, j) for i in peers for j in peers if i != j]
    return (
        sum((nce(s[i][i]) for i in peers), ZERO),
        sum((soft(s[i][i], s[j][j]) for i, j in pairs), ZERO),
        sum((nce(s[i][j]) for i, j in pairs), ZERO),
        sum((soft(s[i][j], s[j][i]) for i, j in pairs), ZERO),
    )


def mcl(z, h, heads, y, *, tau, temperature, weights, logit_weight=0.0, weight=1.0):
    """sum_i CE_i + weight (weighted parts and logit term); `heads` holds (W1, b1, W2, b2) of each peer."""

    def embed(row, w1, b1, w2, b2):
        hidden = [torch.clamp(sum(w * x for w, x in zip(ws, row)) + b, min=0.0) for ws, b in zip(w1, b1)]
        return normalized([sum(w * x for w, x in zip(ws, hidden)) + b for ws, b in zip(w2, b2)])

    v = [[embed(row, *heads[i]) for row in h[i]] for i in range(len(z))]
    parts = mcl_parts(v, y, tau=tau, temperature=temperature)
    total = sum(ce(z[i], y) for i in range(len(z))) + weight * sum(w * part for w, part in zip(weights, parts))
    mean = sum(z.detach()) / len(z)
    for i in range(len(z)) if len(z) == 2 else [len(z) - 1]:
        total = total + weight * logit_weight * kl(z[i], mean, temperature)
    return total


def l_mcl_parts(v, y, match, *, tau, temperature):
    """VCL, softVCL, ICL and softICL of embeddings v[p][s][b], summed over ordered pairs of heads of two networks.

    `match(p, s, q, r, b)` is the weight of row b in the pair of head s of network p and head r of network q.
    """
    batch = range(len(y))

    def similarity(one, other):
        return [[sum(a * c for a, c in zip(one[b], other[k])) / tau for k in batch] for b in batch]

    def nce(s, w):
        rows = []
        for b in batch:
            others = [k for k in batch if k != b]
            positives = [k for k in others if int(y[k]) == int(y[b])]
            if positives:
                total = log_sum([s[b][k] for k in others])
                rows.append(-w[b] * sum(s[b][k] - total for k in positives) / len(positives))
        return sum(rows, ZERO) / max(len(rows), 1)

    def soft(student, target, w):
        rows = [w[b] * kl_row(log_softmax(torch.stack(target[b]).detach() / temperature), torch.stack(student[b]),
                              temperature) for b in batch]  # fmt: skip
        return sum(rows, ZERO) / len(rows)

    heads = [(p, s) for p in range(len(v)) for s in range(len(v[p]))]
    found = [ZERO] * 4
    for p, s in heads:
        for q, r in heads:
            if p == q:
                continue
            a, c = v[p][s], v[q][r]
            w = [match(p, s, q, r, b) for b in batch]
            aa, cc, ac, ca = similarity(a, a), similarity(c, c), similarity(a, c), similarity(c, a)
            terms = (nce(aa, w) + nce(cc, w), soft(aa, cc, w) + soft(cc, aa, w),
                     nce(ac, w) + nce(ca, w), soft(ac, ca, w) + soft(ca, ac, w))  # fmt: skip
            found = [total + term for total, term in zip(found, terms)]
    return found


def l_mcl_match(maps, features):
    """Return the function (p, s, q, r, b) -> sigmoid(cos(M f, M' f')), for features[p][s] and maps[p][s] = (W, b)."""

    def mapped(p, s, b):
        w, bias = maps[p][s]
        row = features[p][s][b]
        return normalized(torch.stack([sum(x * u for x, u in zip(row, ws)) + c for ws, c in zip(w, bias)]))

    return lambda p, s, q, r, b: 1 / (1 + torch.exp(-sum(u * v for u, v in zip(mapped(p, s, b), mapped(q, r, b)))))


def l_mcl(z, features, exits, y, *, heads, classifiers, gates, match, tau, temperature, weights, weight=1.0):
    """The loss of the module's docstring; `exits[p]` are lists of B x D, `features[p]` the own head's.

    `heads[p][s]` and `gates[p]` hold (W1, b1, W2, b2), `classifiers[p][s]` (W, b).
    """

    def linear(w, b, row):
        return [sum(x * u for x, u in zip(row, ws)) + c for ws, c in zip(w, b)]

    def two_layers(w1, b1, w2, b2, row):
        return linear(w2, b2, [torch.clamp(u, min=0.0) for u in linear(w1, b1, row)])

    total, logits, aggregated, embeddings = ZERO, [], [], []
    for p in range(len(z)):
        maps = [*exits[p], features[p]]
        own = [torch.stack([torch.stack(linear(*classifiers[p][s], row)) for row in exits[p][s]])
               for s in range(len(exits[p]))]  # fmt: skip
        logits.append([*own, z[p]])
        rows = []
        for b in range(len(y)):
            log_g = log_softmax(torch.stack(two_layers(*gates[p], torch.cat([f[b] for f in maps]))))
            rows.append(sum(torch.exp(g) * one[b] for g, one in zip(log_g, logits[p])))
        aggregated.append(torch.stack(rows))
        embeddings.append([[normalized(torch.stack(two_layers(*heads[p][s], row))) for row in maps[s]]
                           for s in range(len(maps))])  # fmt: skip
        total = total + sum(ce(one, y) for one in logits[p]) + ce(aggregated[p], y)
    for p in range(len(z)):
        total = total + weight * sum(kl(z[p], a.detach(), temperature) for a in aggregated)
    parts = l_mcl_parts(embeddings, y, match, tau=tau, temperature=temperature)
    return total + weight * sum(w * part for w, part in zip(weights, parts))


def dlb(z, y, again, old, y_before, *, temperature, weight):
    """CE over the rows of both batches together + weight KLT(again <- old)."""
    rows = [(z[b], y[b]) for b in range(len(y))] + [(again[b], y_before[b]) for b in range(len(y_before))]
    total = sum(-log_softmax(row)[int(label)] for row, label in rows) / len(rows)
    return total + weight * kl(again, old.detach(), temperature)


def hssakd(z, exits, y, *, temperature=3.0, weight=1.0, rotations=4):
    """Sum of the losses; z is P x R x C, exits P x E x R x (rotations C), rows rotations * b + k of image b."""
    total, fixed, fixed_exits = ZERO, z.detach(), exits.detach()
    joint = [rotations * int(label) + k for label in y for k in range(rotations)]
    for p in range(len(z)):
        total = total + ce(torch.stack([z[p][rotations * b] for b in range(len(y))]), y)
        others = [j for j in range(len(z)) if j != p]
        total = total + weight * sum((kl(z[p], fixed[j], temperature) for j in others), ZERO) / max(len(others), 1)
        for e in range(exits.shape[1]):
            total = total + ce(exits[p][e], joint)
            from_others = sum((kl(exits[p][e], fixed_exits[j][e], temperature) for j in others), ZERO)
            total = total + weight * from_others / max(len(others), 1)
    return total


def bce(z, targets):
    """Mean over rows and classes of -[t log sigmoid(z) + (1 - t) log(1 - sigmoid(z))]."""
    total = ZERO
    for row, labels in zip(z, targets):
        for v, t in zip(row, labels):
            total = total - t * torch.log(1 / (1 + torch.exp(-v))) - (1 - t) * torch.log(1 / (1 + torch.exp(v)))
    return total / targets.numel()


def cosub(z, targets, *, loss, weight):
    """1/4 sum_i [L(z_i, Y) + weight L(z_i, sg of the other twin's probabilities)]; Y is B x C."""

    def soft(i, rows):
        total = ZERO
        for row, labels in zip(z[i], rows):
            total = total - sum(t * lp for t, lp in zip(labels, log_softmax(row)))
        return total / len(rows)

    terms = []
    for i in (0, 1):
        other = z[1 - i].detach()
        if loss == "bce":
            terms += [bce(z[i], targets), weight * bce(z[i], 1 / (1 + torch.exp(-other)))]
        else:
            fixed = torch.stack([torch.stack([torch.exp(v) for v in log_softmax(row)]) for row in other])
            terms += [soft(i, targets), weight * soft(i, fixed)]
    return sum(terms) / 4


def okdph(z, hybrid, y, *, label_weight, weight, temperature):
    """sum_k w CE_k + b KL(z_k <- mean of all logits and the hybrid's), and (1 - w) CE of the hybrid once."""
    mean = (sum(z[k].detach() for k in range(len(z))) + hybrid.detach()) / (len(z) + 1)
    total = (1 - label_weight) * ce(hybrid, y)
    for k in range(len(z)):
        total = total + label_weight * ce(z[k], y) + weight * kl(z[k], mean, temperature)
    return total
