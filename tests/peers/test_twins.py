"""Twins: one network as two peers, in one forward, counted once."""

import pytest
import torch
from tiny_network import Dropping, Tiny

from codistill.peers import NetworkPeers, TwinPeers
from codistill.peers.twins import join_rows
from codistill.training.trial import check_twins_differ
from codistill.utils import InputError, count_parameters


def images(*shape):
    return torch.randn(*shape, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def test_twins_share_all_weights_and_begin_as_the_plain_network():
    twins = TwinPeers("resnet8", num_classes=10, in_channels=1, image_size=8, seed=4)
    plain = NetworkPeers("resnet8", 1, 10, in_channels=1, image_size=8, seed=4)
    assert twins.num_peers == 2
    assert count_parameters(twins) == count_parameters(plain)
    assert twins.state_dict().keys() == plain.state_dict().keys()
    for key, value in plain.state_dict().items():
        assert torch.equal(twins.state_dict()[key], value)
    assert twins.export_member(1).state_dict().keys() == plain.export_member(0).state_dict().keys()


def test_a_forward_is_that_of_both_rows_at_once():
    twins = TwinPeers(Tiny, num_classes=10, in_channels=1, image_size=8).double().train()
    plain = twins.export_member(0).train()
    views = images(2, 6).double()
    outputs = twins(views)
    expected = plain(torch.cat(list(views)))
    assert torch.equal(outputs.logits_PBC.flatten(0, 1), expected)
    assert [tuple(f.shape) for f in outputs.features] == [(6, 6), (6, 6)]
    head = twins.member(0).head
    assert torch.equal(head(outputs.features[1]), outputs.logits_PBC[1])
    for ours, theirs in zip(twins.buffers(), plain.buffers(), strict=True):
        assert torch.equal(ours, theirs)  # BatchNorm has recorded one batch of 12 rows
    outputs.logits_PBC[0].sum().backward()
    expected[:6].sum().backward()
    for ours, theirs in zip(twins.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)


def test_dropout_makes_twins_of_the_same_images_differ_in_training_alone():
    twins = TwinPeers(Dropping, num_classes=10, in_channels=1, image_size=8).train()
    batch = images(6)
    first, second = twins(batch).logits_PBC
    assert not torch.equal(first, second)
    twins.eval()
    with torch.no_grad():
        once = twins(batch)
    both = twins(batch)  # with gradient the network runs on all rows, as a step does
    assert torch.equal(once.logits_PBC[0], once.logits_PBC[1])
    assert torch.allclose(once.logits_PBC, both.logits_PBC, atol=1e-6)
    assert not once.logits_PBC.requires_grad


def test_rows_of_any_input_are_joined():
    views = [{"a": torch.zeros(2, 3), "b": torch.zeros(2)}, {"a": torch.ones(1, 3), "b": torch.ones(1)}]
    joined = join_rows(views)
    assert joined["a"].sum(1).tolist() == [0.0, 0.0, 3.0]
    assert joined["b"].tolist() == [0.0, 0.0, 1.0]
    assert join_rows(torch.zeros(2, 5, 3)).shape == (10, 3)


def test_what_is_not_random_is_found_and_leaves_no_trace():
    batch, state = images(16), torch.get_rng_state()
    dropping = TwinPeers(Dropping, num_classes=10, in_channels=1, image_size=8)
    buffers = [b.clone() for b in dropping.buffers()]
    check_twins_differ(dropping, batch)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(buffers, dropping.buffers(), strict=True))
    with pytest.raises(InputError, match="nothing is random in this network"):
        check_twins_differ(TwinPeers(Tiny, num_classes=10, in_channels=1, image_size=8), batch)


@pytest.mark.slow
def test_drop_path_of_a_library_network_is_random():
    options = {"num_classes": 10, "in_channels": 3, "image_size": 32}
    batch = torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    check_twins_differ(TwinPeers("timm:test_convnext,drop_path_rate=0.1", **options), batch)
    check_twins_differ(TwinPeers("timm:test_resnet,drop_path_rate=0.1", **options), batch)  # its blocks begin at 0
    with pytest.raises(InputError, match="nothing is random"):
        check_twins_differ(TwinPeers("timm:test_convnext", **options), batch)


def test_a_list_and_a_wrong_number_of_views_are_refused():
    with pytest.raises(InputError, match="twins are one network; give a name"):
        TwinPeers(["resnet8", "resnet8"], num_classes=10)
    twins = TwinPeers(Tiny, num_classes=10, in_channels=1, image_size=8)
    with pytest.raises(InputError, match="3 views for 2 peers"):
        twins(images(3, 4))
