"""Forks of networks of other shapes, and what is refused."""

import pytest
import torch
from torch import nn

from codistill.peers.branch_point_table import branch_point_rows
from codistill.peers.branches import BranchPeers
from codistill.utils.errors import InputError
from helpers.peer_networks import (
    CLASSES,
    SmallNet,
    TinyViT,
    assert_same_state,
    branches,
    loss_of,
    named,
    owners_of,
    some_images,
)

# ----------------------------------------------------------------------------------------------------------------------
# Networks of other shapes


def test_root_parameters_are_shared_by_every_branch():
    peers = branches(3, spec=TinyViT, branch_at="blocks.1")
    assert len({id(member.body.token) for member in peers.members}) == 1
    assert len({id(member.body.position) for member in peers.members}) == 1
    assert owners_of(peers, "patch") == owners_of(peers, "blocks.0") == [0, 0, 0]
    assert owners_of(peers, "blocks.1") == owners_of(peers, "blocks.2") == owners_of(peers, "norm") == [0, 1, 2]

    plains = [peers.export_member(p) for p in range(3)]
    for plain in plains[1:]:
        plain.token, plain.position, plain.patch = plains[0].token, plains[0].position, plains[0].patch
        plain.blocks[0] = plains[0].blocks[0]
    images = some_images()
    x = plains[0].tokens(images)
    trunk = x + plains[0].blocks[0](x)
    features = [plain.norm((y := trunk + plain.blocks[1](trunk)) + plain.blocks[2](y))[:, 0] for plain in plains]
    logits = [plain.head(f) for plain, f in zip(plains, features)]
    outputs = peers(images)
    torch.testing.assert_close(outputs.logits_PBC, torch.stack(logits), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(outputs.trunk_BD, trunk.sum(1) / 5, rtol=1e-10, atol=1e-10)
    loss_of(outputs.logits_PBC, outputs.features).backward()
    loss_of(logits, features).backward()
    assert plains[0].token.grad.abs().max() > 0
    assert_same_state(peers, plains, 1e-10)


def test_parameters_between_two_forks_are_shared_below_them():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.randn(4, 1, 1))
            self.first, self.second = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)

        def forward(self, x):
            return self.second(self.first(x) * self.scale)

    class Staged(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.low, self.high = nn.Conv2d(3, 4, 3, padding=1), Scaled(), Scaled()
            self.head = nn.Linear(4, CLASSES)

        def forward(self, x):
            return self.head(self.high(self.low(self.stem(x))).mean((2, 3)))

    peers = branches(4, spec=Staged, branch_at=("low", "high.second"), fan_out=(2, 2))
    scales = [id(member.body.high.scale) for member in peers.members]
    assert [scales.index(s) for s in scales] == [0, 0, 2, 2]
    assert owners_of(peers, "low.first") == owners_of(peers, "high.first") == [0, 0, 2, 2]
    plains = [peers.export_member(p) for p in range(4)]
    outputs = peers(some_images())
    logits = torch.stack([plain(some_images()) for plain in plains])
    torch.testing.assert_close(outputs.logits_PBC, logits, rtol=1e-10, atol=1e-10)


def test_layers_may_sit_in_a_module_list():
    class Listed(nn.Module):
        def __init__(self, num_classes):
            super().__init__()
            self.stages = nn.ModuleList(nn.Conv2d(3, 3, 3, padding=1) for _ in range(4))
            self.norms = nn.ModuleList(nn.BatchNorm2d(3) for _ in range(4))
            self.fc = nn.Linear(3, num_classes)

        def forward(self, x):
            for stage, norm in zip(self.stages, self.norms):
                x = norm(stage(x)).tanh()
            return self.fc(x.mean((2, 3)))

    peers = branches(3, spec=Listed, branch_at="stages.2")
    for layer, owners in (("stages.1", [0, 0, 0]), ("norms.1", [0, 0, 0]), ("stages.2", [0, 1, 2])):
        assert owners_of(peers, layer) == owners, layer
    assert owners_of(peers, "norms.2") == [0, 1, 2]
    plains = [peers.export_member(p) for p in range(3)]
    images = some_images()
    outputs = peers(images)
    logits = torch.stack([plain(images) for plain in plains])
    torch.testing.assert_close(outputs.logits_PBC, logits, rtol=1e-10, atol=1e-10)
    assert int(named(peers, 2)["norms.0.num_batches_tracked"]) == 1


def test_a_module_run_twice_before_the_fork_is_replayed():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.again, self.last = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 4, 1)
            self.fc = nn.Linear(4, CLASSES)

        def forward(self, x):
            x = self.again(self.again(x).tanh())
            return self.fc(self.last(x).mean((2, 3)))

    peers = branches(3, spec=Twice, branch_at="last")
    plains = [peers.export_member(p) for p in range(3)]
    images = some_images()
    logits = torch.stack([plain(images) for plain in plains])
    torch.testing.assert_close(peers(images).logits_PBC, logits, rtol=1e-12, atol=1e-12)
    assert owners_of(peers, "again") == [0, 0, 0]


def test_a_network_may_branch_at_its_classifier_alone():
    peers = branches(3, branch_at="fc")
    assert owners_of(peers, "layer3") == [0, 0, 0]
    assert len({id(member.head.weight) for member in peers.members}) == 3
    outputs = peers(some_images())
    torch.testing.assert_close(outputs.trunk_BD, outputs.features[1], rtol=1e-12, atol=1e-12)


# ----------------------------------------------------------------------------------------------------------------------
# What is refused


@pytest.mark.parametrize("fork", ["layer4", "layer3.7", "fc.weight", "conv"])
def test_an_unknown_fork_is_an_error_that_lists_the_modules(fork):
    with pytest.raises(InputError, match=f'--branch-at "{fork}".*layer3'):
        branches(2, branch_at=fork)


def test_a_fork_that_never_runs_is_refused():
    class Idle(SmallNet):
        def __init__(self):
            super().__init__()
            self.idle = nn.Conv2d(3, 3, 1)

    with pytest.raises(InputError, match="must run"):
        branches(2, spec=Idle, branch_at="idle")


@pytest.mark.parametrize("forks", [("layer3", "layer2"), ("layer3", "layer3")])
def test_forks_in_the_wrong_order_or_given_twice_are_refused(forks):
    with pytest.raises(InputError, match="in this order"):
        branches(4, branch_at=forks, fan_out=(2, 2))


@pytest.mark.parametrize(
    ("count", "forks", "fan_out"),
    [
        (4, ("layer2", "layer3"), ()),
        (4, ("layer2", "layer3"), (4,)),
        (4, ("layer2", "layer3"), (2, 3)),
        (4, (), (2, 2)),
        (4, "layer3", (3,)),
        (3, ("layer2", "layer3"), (2, 2)),
    ],
)
def test_a_fan_out_that_does_not_make_the_branches_is_refused(count, forks, fan_out):
    with pytest.raises(InputError, match="--fan-out"):
        branches(count, branch_at=forks, fan_out=fan_out)


def test_a_network_without_a_place_of_its_own_needs_branch_at():
    with pytest.raises(InputError, match="--branch-at is needed: SmallNet"):
        branches(2, spec=SmallNet)


class BothSides(nn.Module):
    """One module, with parameters or statistics, that runs before and after conv2."""

    def __init__(self, used_twice):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.common, self.fc = used_twice, nn.Linear(4, CLASSES)

    def forward(self, x):
        return self.fc(self.common(self.conv2(self.common(self.conv1(x)))).mean((2, 3)))


@pytest.mark.parametrize(
    "make", [lambda: nn.BatchNorm2d(4), lambda: nn.BatchNorm2d(4, affine=False), lambda: nn.Conv2d(4, 4, 1)]
)
def test_a_stateful_module_on_both_sides_of_the_fork_is_refused(make):
    with pytest.raises(InputError, match='"common" runs before and after'):
        branches(2, spec=lambda: BothSides(make()), branch_at="conv2")


def test_a_stateless_module_may_run_on_both_sides_of_the_fork():
    peers = branches(2, spec=lambda: BothSides(nn.Tanh()), branch_at="conv2")
    plains = [peers.export_member(p) for p in range(2)]
    logits = torch.stack([plain(some_images()) for plain in plains])
    torch.testing.assert_close(peers(some_images()).logits_PBC, logits, rtol=1e-12, atol=1e-12)


IN_PLACE = {
    "a branch that begins with an in-place ReLU": ("relu", {"inplace": True}),
    "an in-place ReLU between trunk and branch": ("conv2", {"activation": "function"}),
    "one in-place ReLU for both sides": ("conv2", {"activation": "both sides", "inplace": True}),
}


@pytest.mark.parametrize("case", IN_PLACE)
@pytest.mark.parametrize("rescale", [False, True])
def test_a_branch_that_modifies_the_trunk_output_is_refused(case, rescale):
    # Such a ReLU leaves every output right (it does nothing the second time), but backward would fail.
    fork, options = IN_PLACE[case]
    with pytest.raises(InputError, match=f'--branch-at "{fork}".*in place'):
        branches(2, spec=lambda: SmallNet(**options), branch_at=fork, rescale=rescale)


def test_a_branch_that_adds_to_what_the_trunk_gave_is_refused():
    class Adder(nn.Module):
        def forward(self, x):
            return x.add_(1.0)

    class Adding(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.add, self.fc = nn.Conv2d(3, 4, 3), Adder(), nn.Linear(4, CLASSES)

        def forward(self, x):
            return self.fc(self.add(self.conv(x)).mean((2, 3)))

    with pytest.raises(InputError, match="in place"):
        branches(2, spec=Adding, branch_at="add")


@pytest.mark.parametrize("fork", ["conv2", "relu"])
def test_in_place_layers_within_the_trunk_or_a_branch_are_fine(fork):
    inplace = fork == "conv2"  # before conv2 the ReLU is the trunk's own
    peers = branches(2, spec=lambda: SmallNet(inplace=inplace), branch_at=fork)
    plains = [peers.export_member(p) for p in range(2)]
    loss_of(*_ends(peers(some_images()))).backward()
    assert named(peers, 0)["conv1.weight"].grad.abs().max() > 0
    logits = torch.stack([plain(some_images()) for plain in plains])
    torch.testing.assert_close(peers(some_images()).logits_PBC, logits, rtol=1e-12, atol=1e-12)


def _ends(outputs):
    return outputs.logits_PBC, outputs.features


def test_only_places_are_offered_that_training_accepts():
    offered = [row["module"].split()[0] for row in branch_point_rows("resnet8", 16)]
    assert "layer3.0.bn1" in offered
    assert not {"layer3.0.bn2", "layer3.0.shortcut"} & {*offered}
    for place in offered:
        BranchPeers("resnet8", 2, 10, branch_at=place, image_size=16)
