"""Heads that are no single linear layer: outputs, gradients and the deployed network are the plain network's."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from codistill.models.weights import load_weights
from codistill.peers.branches import BranchPeers
from codistill.peers.heads import AveragedHeads, ConvolutionHead, MapHead
from codistill.peers.networks import NetworkPeers
from codistill.utils.errors import InputError
from helpers.common import close

CLASSES = 5


class Squeezed(nn.Module):
    """As in SqueezeNet: dropout, a 1 x 1 convolution, a ReLU and the pooling are the classifier."""

    def __init__(self, num_classes=CLASSES):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 8, 3))
        pooling = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(nn.Dropout(0.0), nn.Conv2d(8, num_classes, 1), nn.ReLU(inplace=True), pooling)

    def forward(self, x):
        return self.classifier(self.features(x)).flatten(1)


class Averaged(nn.Module):
    """A 1 x 1 convolution whose outputs are averaged over an image, or over time."""

    def __init__(self, num_classes=CLASSES, axes=2):
        super().__init__()
        convolution = (nn.Conv1d, nn.Conv2d)[axes - 1]
        self.stem, self.middle = convolution(3, 6, 3), convolution(6, 8, 3)
        self.last = convolution(8, num_classes, 1)

    def forward(self, x):
        return self.last(self.middle(self.stem(x).relu()).relu()).flatten(2).mean(-1)


class Distilled(nn.Module):
    """Two linear layers on vectors of their own, averaged, as in a distilled DeiT."""

    def __init__(self, num_classes=CLASSES):
        super().__init__()
        self.stem, self.middle = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 16, 3)
        self.head, self.head_dist = nn.Linear(8, num_classes), nn.Linear(8, num_classes)

    def forward(self, x):
        x, y = self.middle(self.stem(x).relu()).mean((2, 3)).chunk(2, 1)
        return (self.head(x) + self.head_dist(y)) / 2


class Waves(Averaged):
    def __init__(self, num_classes=CLASSES):
        super().__init__(num_classes, axes=1)


_rng = torch.Generator().manual_seed(0)
IMAGES = torch.randn(6, 3, 8, 8, dtype=torch.float64, generator=_rng)
WAVES = torch.randn(6, 3, 20, dtype=torch.float64, generator=_rng)
CASES = [
    (Squeezed, MapHead, "classifier", "features.2", 8, IMAGES),
    (Averaged, ConvolutionHead, "last", "middle", 8, IMAGES),
    (Waves, ConvolutionHead, "last", "middle", 8, WAVES),
    (Distilled, AveragedHeads, "head", "middle", 16, IMAGES),
]


@pytest.mark.parametrize(
    ("network", "kind", "path", "fork", "width", "x"), CASES, ids=lambda v: getattr(v, "__name__", "")
)
@pytest.mark.parametrize("branches", [False, True])
def test_a_head_gives_what_the_plain_network_gives(network, kind, path, fork, width, x, branches):
    options = {"branch_at": fork} if branches else {}
    peers = (BranchPeers if branches else NetworkPeers)(network, 2, CLASSES, example=x, **options).double()
    assert isinstance(peers.member(0).head, kind)
    assert peers.member(0).head_path == path
    assert peers.feature_dims == [width] * 2
    plain = [peers.export_member(p) for p in range(2)]
    assert plain[0].state_dict().keys() == network().state_dict().keys()
    outputs = peers(x)
    assert [feature.shape for feature in outputs.features] == [(6, width)] * 2
    slopes = torch.randn(2, 6, CLASSES, dtype=torch.float64)
    (outputs.logits_PBC * slopes).sum().backward()
    expected = torch.stack([one(x) for one in plain])
    close(outputs.logits_PBC, expected, 1e-12)
    (expected * slopes).sum().backward()
    of_heads = dict(peers.member(1).head.named_parameters())
    theirs = {id(p): g for p, g in zip(of_heads.values(), _head_gradients(plain[1]))}
    for parameter in of_heads.values():
        close(parameter.grad, theirs[id(parameter)], 1e-12)


def _head_gradients(plain):
    heads = [module for name, module in plain.named_children() if name in ("classifier", "last", "head", "head_dist")]
    return [p.grad for head in heads for p in head.parameters()]


def test_features_of_a_map_are_its_mean():
    peers = NetworkPeers(Squeezed, 2, CLASSES, example=IMAGES).double()
    maps = peers.export_member(0).features(IMAGES)
    close(peers(IMAGES).features[0], maps.mean((2, 3)), 1e-12)


def test_a_declared_convolution_is_the_head():
    class Declared(Squeezed):
        head_path = "classifier"

    assert isinstance(NetworkPeers(Declared, 1, example=IMAGES.float()).member(0).head, MapHead)


def test_heads_whose_outputs_are_summed_are_refused():
    class Summed(Distilled):
        def forward(self, x):
            return 2 * super().forward(x)

    with pytest.raises(InputError, match="is not its classifier head"):
        NetworkPeers(Summed, 2, example=IMAGES.float())


def test_weights_for_other_classes_load_into_all_but_a_convolution_that_classifies():
    trained, network = Squeezed(9), Squeezed(CLASSES)
    before = network.classifier[1].weight.clone()
    load_weights(network, trained.state_dict(), "--weights x")
    assert torch.equal(network.features[0].weight, trained.features[0].weight)
    assert torch.equal(network.classifier[1].weight, before)
    narrow = Squeezed(CLASSES)
    narrow.features[2] = nn.Conv2d(6, 8, 1)
    with pytest.raises(InputError, match="does not fit"):
        load_weights(narrow, trained.state_dict() | {"features.2.weight": torch.zeros(4, 6, 1, 1)}, "--weights x")


def test_members_with_the_same_weights_get_heads_of_their_own(tmp_path):
    from codistill.models import WithWeights

    factory = WithWeights(Squeezed, Squeezed().state_dict(), "--weights x")
    peers = NetworkPeers(factory, 2, CLASSES, example=IMAGES.float())
    bodies = [peers.member(p).body.features[0].weight for p in range(2)]
    heads = [peers.member(p).head.layers[1].weight for p in range(2)]
    assert torch.equal(*bodies)
    assert not torch.equal(*heads)
    assert F.cosine_similarity(heads[0].flatten(), heads[1].flatten(), 0) < 0.99


@pytest.mark.parametrize(
    ("network", "message"),
    [
        ("Halves", "it fails on one row and answers 4 rows with 2: its forward must take any number of rows"),
        ("EvenOnly", "it fails on one row and answers 4 rows with 4"),
        ("Doubled", "returns 2 rows for one image"),
        ("FixedBatch", "cannot take images of 1 x 8 x 8"),
    ],
)
def test_networks_that_do_not_answer_row_by_row_are_told_so(network, message):
    with pytest.raises(InputError, match=message):
        NetworkPeers(f"helpers.row_networks:{network}", 2, 10, in_channels=1, image_size=8)
