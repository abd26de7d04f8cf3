"""Evaluating all members on a data set."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from codistill.data import Loader
from codistill.distributed import Mesh, MeshPeers
from codistill.evaluation.fold_batchnorm import folded_for_evaluation
from codistill.evaluation.metrics import PeerMetrics
from codistill.methods import Method
from codistill.peers import Inputs, Peers, call_network, eval_mode, map_tensors
from codistill.utils import InputError

MANY_PIXELS_ON_GPU = 500_000_000
"""Pixels of a data set below which a GPU evaluates it in less time than the host needs to fold the networks."""


def evaluate_peers(
    peers: Peers,
    method: Method,
    loader: Loader | Iterable[tuple[Inputs, Tensor]],
    mesh: Mesh | None = None,
    *,
    detail: bool = False,
) -> PeerMetrics:
    """Run every member and the method's ensemble over a data set and return the metrics of all its samples.

    Args:
        peers: What is evaluated; modes are put back.
        method: It makes the ensemble.
        loader: The samples: a loader of images (on a mesh, of this data rank's), or pairs of what the peers take and
            the labels `B`, which are moved to the peers' device.
        mesh: The ranks, whose metrics are added, if there are several.
        detail: Also accumulate a confusion matrix.

    Raises:
        InputError: labels of given pairs are no class numbers.

    >>> from codistill.methods import Independent
    >>> from codistill.peers import NetworkPeers
    >>> rows, labels = torch.eye(2), torch.tensor([0, 1])
    >>> network = torch.nn.Sequential(torch.nn.Linear(2, 2, bias=False), torch.nn.Identity())
    >>> network[0].weight.data = torch.tensor([[0.0, 0.0], [1.0, 1.0]])  # always class 1
    >>> peers = NetworkPeers([network], example=rows)
    >>> evaluate_peers(peers, Independent(1), [(rows, labels)]).compute()["top1"]
    [50.0]
    """
    own = isinstance(loader, Loader)
    device = loader.device if own else next(peers.parameters()).device
    metrics = PeerMetrics(peers.num_peers, peers.num_classes, method.group, device, detail)
    with eval_mode(peers), eval_mode(method), torch.inference_mode():
        folded = fold_members(peers, loader) if own else peers
        for inputs, targets_B in loader.epoch() if own else _move_batches(loader, device):
            outputs = folded(inputs)
            if not own:
                check_labels(outputs.logits_PBC, targets_B)
            metrics.update(outputs.logits_PBC, targets_B, method.ensemble(outputs))
    if mesh is not None and mesh.num_data > 1:
        metrics.add_up(mesh.sum_along_data)
    return metrics


def score_network(network: nn.Module, batches: Iterable[tuple[Inputs, Tensor]]) -> tuple[Tensor, Tensor]:
    """Return a plain network's logits, `N x C` in float64 on the CPU, and the labels, `N`; for the calibration figures.

    Args:
        network: A deployed student, say; its modes are put back.
        batches: Pairs of what it takes (a mapping as its keywords, a tuple as its arguments) and the labels, which are
            moved to its device.

    Raises:
        InputError: there is no batch, or labels are no class numbers.

    >>> from codistill.evaluation import confusion_matrix
    >>> confusion_matrix(*score_network(nn.Identity(), [(torch.eye(2), torch.tensor([0, 0]))]))
    [[1, 1], [0, 0]]
    """
    parameter = next(network.parameters(), None)
    device = torch.device("cpu") if parameter is None else parameter.device
    with eval_mode(network), torch.inference_mode():
        pairs = [(call_network(network, x).cpu().double(), y.cpu()) for x, y in _move_batches(batches, device)]
    for logits_BC, labels_B in pairs:
        check_labels(logits_BC, labels_B)
    if not pairs:
        raise InputError("there is no batch to evaluate; give pairs of inputs and labels (an iterator runs only once)")
    scores, labels = zip(*pairs)
    return torch.cat(scores), torch.cat(labels)


def check_labels(logits_BC: Tensor, labels_B: Tensor) -> None:
    """Check the labels by which outputs are judged.

    Args:
        logits_BC: The outputs, `B x C` or `P x B x C`.
        labels_B: What must be whole numbers from 0 to C - 1.

    Raises:
        InputError: they are not.

    >>> check_labels(torch.zeros(2, 3), torch.tensor([0, 3]))
    Traceback (most recent call last):
    codistill.utils.errors.InputError: a label is 3, which is none of the 3 classes; they count from 0 to 2
    """
    batch, classes = logits_BC.shape[-2:]
    if labels_B.dtype not in (torch.int64, torch.int32) or labels_B.shape != (batch,):
        shape = " x ".join(map(str, labels_B.shape)) or "one number"
        raise InputError(
            f"the labels are {labels_B.dtype} of shape {shape}; outputs are judged by class numbers (int64, {batch})"
        )
    low, high = (int(bound) for bound in labels_B.aminmax()) if batch else (0, 0)
    if low < 0 or high >= classes:
        raise InputError(
            f"a label is {low if low < 0 else high}, which is none of the {classes} classes; they count from 0 to "
            f"{classes - 1}"
        )


def _move_batches(batches: Iterable[tuple[Inputs, Tensor]], device: torch.device) -> Iterator[tuple[Inputs, Tensor]]:
    for inputs, targets_B in batches:
        yield map_tensors(lambda x: x.to(device), inputs), targets_B.to(device)


def fold_members(peers: Peers, loader: Loader) -> Peers:
    """Return peers with the same outputs that evaluate faster; this process folds its own members.

    Args:
        peers: In evaluation mode.
        loader: Samples to try the members on; without any, `peers` is returned as it is.
    """
    if not len(loader):
        return peers
    example_BCHW = loader.sample_batch()[0][:2]
    pixels = loader.num_samples * example_BCHW.shape[-1] * example_BCHW.shape[-2]
    if example_BCHW.device.type == "cuda" and pixels < MANY_PIXELS_ON_GPU:
        return peers
    local = folded_for_evaluation(peers.local, example_BCHW)
    return peers.with_members(local) if isinstance(peers, MeshPeers) else local
