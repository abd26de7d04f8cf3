"""Small things that several tests use."""

import json
from pathlib import Path

import numpy as np
import torch

GOLDEN = Path(__file__).parent.parent / "golden" / "okddip_code.npz"


def golden() -> dict[str, torch.Tensor]:
    """The numbers that the authors' OKDDip code computes."""
    with np.load(GOLDEN) as archive:
        return {name: torch.tensor(archive[name]) for name in archive.files}


def close(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float = 1e-10) -> None:
    """Assert agreement: relative, absolute below 1."""
    scale = theirs.abs().clamp_min(1.0)
    gap = ((ours - theirs).abs() / scale).max().item()
    assert gap <= tolerance, f"largest difference {gap:.3g}"


def random_peers(num_peers=4, batch=5, classes=7, dims=(16, 16, 16, 16), scale=1.0, seed=0):
    """Logits P x B x C, features (a list), labels; float64, leaves that ask for gradients."""
    rng = torch.Generator().manual_seed(seed)
    z = (torch.randn(num_peers, batch, classes, generator=rng, dtype=torch.float64) * 2 * scale).requires_grad_()
    h = [torch.randn(batch, d, generator=rng, dtype=torch.float64).requires_grad_() for d in dims[:num_peers]]
    y = torch.randint(classes, (batch,), generator=rng)
    return z, h, y


def read_json(path) -> dict:
    return json.loads(Path(path).read_text())
