"""Differences of codistill's losses to loops written from the papers' equations, and to numbers of the authors' code.

    OMP_NUM_THREADS=1 python benchmarks/parity.py             # half a minute

Largest differences of losses and of all gradients (relative; absolute below 1), float64, over random logits and logits
100 times as large. The losses depend only on logits, features, trunk and teachers, so both topologies share a row.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from codistill.methods import CLILR, DML, KD, KDCL, ONE, PCL, Independent, OKDDip
from codistill.peers.base import PeerOutputs
from codistill.utils.tables import markdown
from helpers import oracles
from helpers.common import golden, random_peers


def gap(ours: torch.Tensor | None, theirs: torch.Tensor | None) -> float:
    """Return the largest difference, relative above 1."""
    ours, theirs = (torch.zeros(1) if v is None else v.detach() for v in (ours, theirs))
    return float(((ours - theirs).abs() / theirs.abs().clamp_min(1)).max())


def compare(loss: torch.Tensor, naive: torch.Tensor, inputs: list[torch.Tensor]) -> float:
    """Return the largest difference of the losses and of their gradients."""
    ours = torch.autograd.grad(loss, inputs, allow_unused=True)
    theirs = torch.autograd.grad(naive, inputs, allow_unused=True)
    return max(gap(loss, naive), *(gap(a, b) for a, b in zip(ours, theirs)))


def oracle_rows(scale: float) -> dict[tuple[str, str], float]:
    """Return {(method, variant): difference} for one scale of logits."""
    z, h, y = random_peers(batch=4, classes=6, scale=scale)
    w, out = 0.37, PeerOutputs(z, h)
    rows = {("independent", "-"): compare(Independent(4)(out, y)["loss"], sum(oracles.ce(p, y) for p in z), [z])}
    for variant, t, a in (("paper", 4.0, 0.9), ("okddip_code", 3.0, 1.0)):
        teacher = z.detach()[0].roll(1, 0)
        loss = KD(4, variant)(PeerOutputs(z, h, teacher_logits_BC=teacher), y)["loss"]
        rows["kd", variant] = compare(loss, oracles.kd(z, teacher, y, variant=variant, temperature=t, alpha=a), [z])
    for variant, t in (("paper", 1.0), ("authors", 1.0), ("okddip_code", 3.0)):
        for target in ("pairwise", "mean"):
            naive = oracles.dml(z, y, variant=variant, target=target, temperature=t, weight=1.0)
            rows[f"dml {target}", variant] = compare(DML(4, variant, target)(out, y)["loss"], naive, [z])
    for variant, t in (("paper", 2.0), ("okddip_code", 3.0)):
        naive = oracles.cl_ilr(z, y, variant=variant, temperature=t, beta=0.5, weight=w)
        rows["cl_ilr", variant] = compare(CLILR(4, variant)(out, y, w)["loss"], naive, [z])
    for variant in ("paper", "authors", "okddip_code"):
        trunk = torch.randn(4, 8, dtype=torch.float64, requires_grad=True)
        method = ONE(4, 8, variant).double()
        gate = oracles.one_gate(trunk, *(p for m in (method.gate, method.gate_norm) for p in m.parameters()))
        naive = oracles.one(z, gate, y, variant=variant, temperature=3.0, weight=w)
        loss = method(PeerOutputs(z, h, trunk_BD=trunk), y, w)["loss"]
        rows["one", variant] = compare(loss, naive, [z, trunk, *method.parameters()])
    for variant in ("paper", "okddip_code"):
        for ablation in ("none", "mean", "symmetric", "no_leader"):
            method = OKDDip(4, 16, variant, ablation=ablation).double()
            pair = [*method.parameters()] or [None, None]
            naive, _ = oracles.okddip(z, h, *pair, y, temperature=3.0, weight=w, variant=variant, ablation=ablation)
            name = "okddip" if ablation == "none" else f"okddip {ablation}"
            rows[name, variant] = compare(method(out, y, w)["loss"], naive, [z, *h, *method.parameters()])
    method, ema = PCL(4, (16,) * 4, 6).double(), z.detach().roll(1, 0)
    naive = oracles.pcl(z, h, ema, method.classifier.weight, method.classifier.bias, y, temperature=3.0, weight=w)
    loss = method(PeerOutputs(z, h, ema_logits_PBC=ema), y, w)["loss"]
    rows["pcl", "paper"] = compare(loss, naive, [z, *h, *method.parameters()])
    for target in ("naive", "minlogit", "linear", "general"):
        method = KDCL(4, target).double()
        method.update_on_holdout(torch.randn(4, 30, 6).double(), torch.randint(6, (30,)))
        terms = method(out, y)
        mixture = method.weights_P if target == "general" else terms.get("weights_BP")
        naive = oracles.kdcl(z, y, target=target, temperature=2.0, weight=1.0, mixture=mixture)
        rows[f"kdcl {target}", "paper"] = compare(terms["loss"], naive, [z])
    return rows


def golden_rows() -> dict[str, float]:
    """Return {method: difference from the authors' loss and its gradients}."""
    g, w = golden(), 0.37
    z, h = g["logits"].clone().requires_grad_(), [f.clone() for f in g["features"]]
    method = OKDDip(4, 64, "okddip_code").double()
    method.query.weight.data.copy_(g["w_query"])
    method.key.weight.data.copy_(g["w_key"])
    out, y = PeerOutputs(z, h), g["labels"]
    losses = {
        "okddip": (method(out, y, w)["loss"], "okddip"),
        "one": (ONE(4, 8, "okddip_code").distil(z, g["one_gate_logits"], y, w)["loss"], "one"),
        "cl_ilr": (CLILR(4, "okddip_code")(out, y, w)["loss"], "clilr"),
        "dml pairwise": (DML(4, "okddip_code")(out, y)["loss"], "dml"),
    }
    rows = {}
    for name, (loss, key) in losses.items():
        (grad,) = torch.autograd.grad(loss, z)
        rows[name] = max(gap(loss, g[f"{key}_loss"]), gap(grad, g[f"{key}_grad_logits"]))
    kd = KD(1, "okddip_code")(PeerOutputs(z[:1], [], teacher_logits_BC=g["logits"][1]), y)
    rows["kd"] = max(gap(kd["ce_P"][0], g["kd_ce"]), gap(kd["distill_P"][0], g["kd_kl"]))
    return rows


def main() -> int:
    """Print the table."""
    torch.manual_seed(0)
    near, far, authors = oracle_rows(1.0), oracle_rows(100.0), golden_rows()
    table = []
    for method, variant in near:
        printed = f"{authors[method]:.1e}" if variant == "okddip_code" and method in authors else "-"
        cells = {"oracle": f"{near[method, variant]:.1e}", "oracle, logits x 100": f"{far[method, variant]:.1e}"}
        table.append({"method": method, "variant": variant, **cells, "authors' numbers": printed})
    print(markdown(table))
    return 0


if __name__ == "__main__":
    sys.exit(main())
