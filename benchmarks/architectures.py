"""Check which architectures work as peers and branches, and with which methods; writes docs/architectures.md.

    OMP_NUM_THREADS=1 python benchmarks/architectures.py --out docs/architectures.md           # 4 minutes, 1 core
    OMP_NUM_THREADS=1 python benchmarks/architectures.py --matrix                            # every method: 3

For every architecture, two branches at the default fork are compared with explicit copies: outputs and the gradient of
every parameter, float64, training mode, dropout and stochastic depth off. Then two steps run with a method. `--matrix`
runs two steps of one architecture per family with every method instead, and writes that table below the first.
The networks are those of the libraries, made narrow or shallow by their own options where they would be slow.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from codistill.config.config import Config
from codistill.config.methods import METHODS, CodistillationConfig, method_config
from codistill.peers.branches import BranchPeers
from codistill.peers.heads import places
from codistill.peers.networks import NetworkPeers
from codistill.peers.shared_trunk import BranchEntry
from codistill.training.build import build_run
from codistill.training.run import zero_sums
from codistill.training.step import train_step
from codistill.utils.errors import InputError, MachineError

CLASSES = 5
SMALL_SWIN = "depths=(1,1,1,1),embed_dim=24,num_heads=(1,2,4,8)"
ARCHITECTURES = [
    # family, name, side of the images
    ("ResNet", "timm:resnet10t", 32),
    ("ResNet", "torchvision:resnet18", 32),
    ("ResNet-D", "timm:resnet18d", 32),
    ("SE-ResNet", "timm:seresnet18", 32),
    ("ResNeXt", "timm:resnext26ts", 32),
    ("ResNeXt", "torchvision:resnext50_32x4d", 32),
    ("MobileNetV2", "timm:mobilenetv2_035", 32),
    ("MobileNetV2", "torchvision:mobilenet_v2,width_mult=0.5", 32),
    ("MobileNetV3", "timm:mobilenetv3_small_050", 32),
    ("MobileNetV3", "torchvision:mobilenet_v3_small", 32),
    ("EfficientNet", "timm:efficientnet_b0", 32),
    ("EfficientNetV2", "timm:tf_efficientnetv2_b0,channel_multiplier=0.25", 32),
    ("MNASNet", "torchvision:mnasnet0_5", 32),
    ("ConvNeXt", "timm:convnext_atto,depths=(1,1,1,1)", 32),
    ("ConvNeXt V2", "timm:convnextv2_atto,depths=(1,1,1,1)", 32),
    ("DenseNet", "timm:densenet121,growth_rate=8", 32),
    ("DenseNet", "torchvision:densenet121", 32),
    ("RegNet", "timm:regnetx_002", 32),
    ("RegNet", "torchvision:regnet_y_400mf", 32),
    ("VGG", "timm:vgg11,mlp_ratio=0.02", 32),
    ("VGG", "timm:vgg11_bn,mlp_ratio=0.02", 32),
    ("GhostNet", "timm:ghostnet_050,drop_rate=0.0", 32),
    ("ShuffleNetV2", "torchvision:shufflenet_v2_x0_5", 32),
    ("GoogLeNet", "torchvision:googlenet", 32),
    ("ViT", "timm:vit_tiny_patch16_224,depth=4,embed_dim=48,num_heads=3", 32),
    ("DeiT", "timm:deit_tiny_patch16_224,depth=4,embed_dim=48,num_heads=3", 32),
    ("Swin", f"timm:swin_tiny_patch4_window7_224,{SMALL_SWIN}", 32),
    ("Swin V2", f"timm:swinv2_tiny_window8_256,{SMALL_SWIN}", 32),
    ("PoolFormer", "timm:poolformer_s12", 32),
]
LARGE = [  # in the table only: too slow for the tests
    ("VGG", "torchvision:vgg11", 32),
    ("ConvNeXt", "torchvision:convnext_tiny", 32),
    ("Swin", "torchvision:swin_t", 32),
    ("ViT", "torchvision:vit_b_16", 32),
    ("EfficientNet", "torchvision:efficientnet_b0", 32),
    ("SqueezeNet", "torchvision:squeezenet1_1", 64),
    ("DeiT, distilled", "timm:deit_tiny_distilled_patch16_224,depth=2,embed_dim=48", 32),
]
ROTATION = [  # every method, on every topology that it supports
    (name, topology) for topology in ("branches", "networks") for name, c in METHODS.items() if topology in c.topologies
]
# FFSD compares maps of three sizes, which a vision transformer at its turn lacks; it takes the turn of a ConvNeXt.
_ffsd, _convnext = ROTATION.index(("ffsd", "networks")), 13
ROTATION[_ffsd], ROTATION[_convnext] = ROTATION[_convnext], ROTATION[_ffsd]


@dataclass
class Proof:
    """Result of the comparison with explicit copies."""

    fork: str
    head: str
    outputs: float
    """Largest difference of logits, relative where they exceed 1."""
    gradients: float


def prove(name: str, size: int, num_peers: int = 2) -> Proof:
    """Compare branches at the default fork with explicit copies that share nothing."""
    peers = BranchPeers(name, num_peers, CLASSES, image_size=size).double().train()
    disable_dropout(peers)
    copies = [peers.export_member(p) for p in range(num_peers)]
    rng = torch.Generator().manual_seed(1)
    x_BCHW = torch.randn(8, 3, size, size, generator=rng, dtype=torch.float64)
    slopes_PBC = torch.randn(num_peers, 8, CLASSES, generator=rng, dtype=torch.float64)
    logits_PBC = peers(x_BCHW).logits_PBC
    (logits_PBC * slopes_PBC).sum().backward()
    expected_PBC = torch.stack([copy(x_BCHW) for copy in copies])
    (expected_PBC * slopes_PBC).sum().backward()
    expected: dict[int, Tensor] = {}
    ours: dict[int, Tensor] = {}
    for p, copy in enumerate(copies):
        theirs = dict(copy.named_parameters())
        for path, parameter in plain_names(peers, p).items():
            grad = theirs[path].grad
            zeros = torch.zeros_like(parameter)
            expected[id(parameter)] = expected.get(id(parameter), zeros) + (zeros if grad is None else grad)
            ours[id(parameter)] = zeros if parameter.grad is None else parameter.grad
    fork = next(n for n, m in peers.member(0).body.named_modules() if isinstance(m, BranchEntry)).replace(".inner", "")
    gradients = max(largest_difference(ours[key], expected[key]) for key in ours)
    return Proof(fork, peers.member(0).head_path, largest_difference(logits_PBC, expected_PBC), gradients)


def largest_difference(ours: Tensor, theirs: Tensor) -> float:
    """Return the largest difference, relative where the value exceeds 1."""
    ours, theirs = ours.detach(), theirs.detach()
    return ((ours - theirs).abs() / theirs.abs().clamp_min(1.0)).max().item() if ours.numel() else 0.0


def plain_names(peers: BranchPeers, index: int) -> dict[str, nn.Parameter]:
    """Return a member's parameters by their names in the plain network."""
    member = peers.member(index)
    body = {n.replace(".inner", ""): p for n, p in member.body.named_parameters(remove_duplicate=False)}
    parts = places(member.head_path, member.head).items()
    return body | {f"{place}.{n}": p for place, part in parts for n, p in part.named_parameters()}


def disable_dropout(module: nn.Module) -> None:
    """Switch dropout and stochastic depth off."""
    for part in module.modules():
        if isinstance(part, nn.modules.dropout._DropoutNd):
            part.p = 0.0
        for name in ("drop_prob", "p"):
            if type(part).__name__ in ("DropPath", "StochasticDepth") and isinstance(getattr(part, name, None), float):
                setattr(part, name, 0.0)


def write_images(path: Path, size: int) -> str:
    """Write a small data set of noise for a network of that input size, and return its name."""
    rng = np.random.default_rng(0)
    labels = np.arange(20) % CLASSES
    arrays = {f"x_{part}": rng.integers(0, 256, (20, size, size, 3), dtype=np.uint8) for part in ("train", "test")}
    np.savez(path / f"noise{size}.npz", **arrays, y_train=labels, y_test=labels)
    return f"npz:{path / f'noise{size}.npz'}"


def two_steps(name: str, size: int, method: str, topology: str, folder: Path) -> list[float]:
    """Return the losses of two steps of a run as training builds it.

    Raises:
        MachineError: a loss or a gradient was not finite.
    """
    peers = METHODS[method].max_peers or (3 if method in ("okddip", "ffsd") else 2)
    values = {"peers": peers, "batch_size": 4, "epochs": 1, "lr": 0.001, "val_fraction": 0.0}
    chosen = method_config(method)
    if isinstance(chosen, CodistillationConfig):
        chosen.burn_in_epochs = 0  # the only epoch distills
    config = Config(chosen, name, write_images(folder, size), topology=topology, device="cpu", **values)  # type: ignore[arg-type]
    teacher = None
    if method == "kd":
        teacher = NetworkPeers("resnet8", 1, CLASSES, image_size=size).export_member(0)
    t = build_run(config.resolved(), teacher)
    t.progress.sums = zero_sums(t)
    t.peers.train()
    batches = t.loader.epoch(0)
    losses = [train_step(t, *next(batches), 1.0)["loss"].item() for _ in range(2)]
    if t.guard.check_finite() is not None:
        raise MachineError(f"{method} on {topology}: not finite ({losses})")
    return losses


def row(family: str, name: str, size: int, pair: tuple[str, str], folder: Path) -> list[str]:
    """Check one architecture and return its row of the table."""
    began = time.perf_counter()
    shown = [family, f"`{name}`", str(size)]
    try:
        proof = prove(name, size)
    except InputError as error:
        return [*shown, "-", "-", "-", "-", f"refused: {error}"]
    method, topology = pair
    under = f"{method} ({topology})"
    try:
        two_steps(name, size, method, topology, folder)
    except (InputError, MachineError) as error:
        under += f": {error}"
    print(f"{name}: {time.perf_counter() - began:.1f} s", file=sys.stderr, flush=True)
    figures = [f"{proof.outputs:.1e}", f"{proof.gradients:.1e}"]
    return [*shown, f"`{proof.fork}`", f"`{proof.head}`", *figures, under]


HEAD = ["family", "name", "size", "fork", "head", "outputs", "gradients", "two steps with"]
TEXT = """# Architectures

Written by `benchmarks/architectures.py` (torch {torch}, timm {timm}, torchvision {torchvision}; CPU). Two branches
that fork at the default module are compared with two explicit copies that share no modules. The columns "outputs" and
"gradients" are the largest difference of outputs and of all parameter gradients (float64, training mode; relative where
the value is above 1). "size" is the side of the test images in pixels. Two training steps were then run with the method
in the last column. Options after a name make the network small enough for the test.

{table}
"""


MATRIX_HEADING = "## The first eight methods\n"
MATRIX_TEXT = """{head}
Two training steps with finite losses and gradients (`--matrix`), on branches (B) and on whole networks (N); okddip
with 3 members, the others with 2; `one` needs a shared trunk. The first small architecture of each of {tried}
families took {minutes:.0f} minutes of CPU time in total (1 thread, AMD EPYC Milan).

{table}
"""


def matrix_row(name: str, size: int, folder: Path) -> list[str]:
    """Check one architecture with every method and return its row of the matrix."""
    cells = dict.fromkeys(METHODS, "")
    for method, topology in ROTATION:
        try:
            two_steps(name, size, method, topology, folder)
            cells[method] += topology[0].upper() + " "
        except (InputError, MachineError) as error:
            print(f"{name}, {method} ({topology}): {error}", file=sys.stderr)
            cells[method] += f"no {topology} "
    print(name, file=sys.stderr, flush=True)
    return [f"`{name}`", *(cell.strip() for cell in cells.values())]


def write_matrix(path: Path) -> None:
    """Check one architecture per family with every method, and write the table below the file's first table."""
    with tempfile.TemporaryDirectory() as folder:
        first = {family: (name, size) for family, name, size in reversed(ARCHITECTURES)}
        lines = [matrix_row(name, size, Path(folder)) for name, size in reversed(first.values())]
    table = markdown([["name", *METHODS], *lines])
    above = path.read_text().partition(MATRIX_HEADING)[0].rstrip() if path.exists() else ""
    text = MATRIX_TEXT.format(head=MATRIX_HEADING, tried=len(lines), minutes=time.process_time() / 60, table=table)
    path.write_text(f"{above}\n\n{text}")


def markdown(rows: list[list[str]]) -> str:
    """Return a Markdown table; the first row is its head."""
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [rows[0], ["---"] * len(rows[0]), *rows[1:]])


def main() -> int:
    """Check all architectures and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="docs/architectures.md", type=Path)
    parser.add_argument(
        "--matrix", action="store_true", help="every method on every topology, not one per architecture"
    )
    options = parser.parse_args()
    import timm
    import torchvision

    torch.set_num_threads(1)
    if options.matrix:
        write_matrix(options.out)
        return 0
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        for index, case in enumerate(ARCHITECTURES + LARGE):
            lines.append(row(*case, ROTATION[index % len(ROTATION)], Path(folder)))
    table = markdown([HEAD, *lines])
    versions = {"torch": torch.__version__, "timm": timm.__version__, "torchvision": torchvision.__version__}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(TEXT.format(table=table, **versions))
    return 0


if __name__ == "__main__":
    sys.exit(main())
