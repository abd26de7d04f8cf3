"""Folded BatchNorms say what the network says, and leave it alone."""

import pytest
import torch
from torch import nn

from codistill.evaluation.fold_batchnorm import folded_for_evaluation
from codistill.peers.branches import BranchPeers
from codistill.peers.networks import NetworkPeers
from helpers.common import close


@pytest.mark.slow
@pytest.mark.parametrize("model", ["resnet8", "wrn16_2", "densenet40_12", "vgg16"])
@pytest.mark.parametrize("kind", [NetworkPeers, BranchPeers])
def test_folded_peers_say_the_same(model, kind):
    peers = kind(model, 2, 10, image_size=16).double()
    peers.train()
    with torch.no_grad():
        peers(torch.randn(8, 3, 16, 16, dtype=torch.float64) * 2 + 1)  # running statistics that matter
    peers.eval()
    state = {k: v.clone() for k, v in peers.state_dict().items()}
    x = torch.randn(5, 3, 16, 16, dtype=torch.float64)
    folded = folded_for_evaluation(peers, x[:1])
    with torch.no_grad():
        close(folded(x).logits_PBC, peers(x).logits_PBC, 1e-9)
    assert all(torch.equal(v, state[k]) for k, v in peers.state_dict().items())
    count = [sum(isinstance(m, nn.BatchNorm2d) for m in p.modules()) for p in (folded, peers)]
    assert count[0] < count[1]
    if model == "resnet8":
        assert count[0] == 0


def test_under_autocast_everything_is_folded_too():
    peers = NetworkPeers("resnet8", 2, 10, image_size=16)
    peers.autocast = torch.bfloat16
    peers.train()
    peers(torch.randn(8, 3, 16, 16) * 2 + 1)
    x = torch.randn(4, 3, 16, 16)
    folded = folded_for_evaluation(peers, x[:1])
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
    assert folded.autocast == peers.autocast == torch.bfloat16
    with torch.no_grad():
        gap = (folded(x).logits_PBC - peers(x).logits_PBC).abs().max()
    assert 0 < gap < 0.05 * folded(x).logits_PBC.abs().max()


def test_a_map_that_is_used_twice_is_not_folded_wrongly():
    class Odd(nn.Module):
        def __init__(self, num_classes=3):
            super().__init__()
            self.conv, self.norm, self.fc = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, num_classes)

        def forward(self, x):
            y = self.conv(x)
            return self.fc((self.norm(y) + y).mean((2, 3)))

    peers = NetworkPeers(Odd, 2, 3, image_size=8)
    peers.train()
    peers(torch.randn(8, 3, 8, 8) * 3 + 1)
    peers.eval()
    x = torch.randn(4, 3, 8, 8)
    assert torch.allclose(folded_for_evaluation(peers, x)(x).logits_PBC, peers(x).logits_PBC, atol=1e-5)
