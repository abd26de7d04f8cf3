"""Fine-tuning: weights from files, frozen parts, rates a group, AdamW, soft labels under every method."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from codistill.config.methods import METHODS, method_config
from codistill.data.mixup import Mixer, cut_square
from codistill.models import resolve
from codistill.training.build import build_run
from codistill.training.loop import train
from codistill.training.run import zero_sums
from codistill.training.state import checkpoint_state
from codistill.training.step import train_step
from codistill.training.student import count_trained_and_deployed
from codistill.utils.errors import InputError
from helpers.method_cases import config, teacher_for


def build(c, teacher=None):
    t = build_run(c.resolved(), teacher)
    t.progress.sums = zero_sums(t)
    t.peers.train()
    t.method.train()
    return t


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
@pytest.mark.parametrize("topology", ["networks", "branches"])
def test_peers_start_from_a_file_with_heads_of_their_own(suffix, topology, tmp_path):
    from safetensors.torch import save_file

    network = resolve("resnet8")(num_classes=7, in_channels=1)
    file = tmp_path / f"w.{suffix}"
    save_file(network.state_dict(), file) if suffix == "safetensors" else torch.save(network.state_dict(), file)
    t = build(config("dml", {}, topology, weights=str(file)))
    for p in range(t.peers.num_peers):
        plain = t.peers.export_member(p)
        assert torch.equal(plain.layer3[0].conv1.weight, network.layer3[0].conv1.weight)
        assert plain.fc.weight.shape == (10, 64)
    assert not torch.equal(t.peers.member(0).head.weight, t.peers.member(1).head.weight)


def test_weights_of_another_network_or_a_broken_file_are_refused(tmp_path):
    torch.save(resolve("resnet20")(num_classes=10, in_channels=1).state_dict(), tmp_path / "other.pt")
    with pytest.raises(InputError, match="does not fit the network at layer1"):
        build(config("dml", {}, "networks", weights=str(tmp_path / "other.pt")))
    (tmp_path / "broken.pt").write_bytes(b"no")
    with pytest.raises(InputError, match="cannot be read"):
        build(config("dml", {}, "networks", weights=str(tmp_path / "broken.pt")))
    with pytest.raises(InputError, match="does not exist"):
        build(config("dml", {}, "networks", weights=str(tmp_path / "none.pt")))
    with pytest.raises(InputError, match="built in and has no pretrained weights"):
        build(config("dml", {}, "networks", pretrained=True))


@pytest.mark.parametrize("topology", ["networks", "branches"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_frozen_parts_stand_still_and_the_rest_moves(topology, optimizer):
    t = build(config("dml", {}, topology, freeze=("conv1", "bn1", "layer1"), optimizer=optimizer, lr=0.001))
    for module in t.frozen:
        module.eval()
    before = {name: value.clone() for name, value in t.peers.state_dict().items()}
    batches = t.loader.epoch(0)
    for _ in range(2):
        train_step(t, *next(batches), 1.0)
    for name, value in t.peers.state_dict().items():
        still = any(part in name for part in ("body.conv1", "body.bn1", "body.layer1"))
        assert torch.equal(value, before[name]) == still, name


def test_freeze_trunk_freezes_shared_parts_or_all_but_heads():
    t = build(config("dml", {}, "branches", freeze=("trunk",)))
    trained = {
        n.split(".body.")[1].split(".")[0] for n, p in t.peers.named_parameters() if p.requires_grad and "body" in n
    }
    assert trained == {"layer3"}
    t = build(config("dml", {}, "networks", freeze=("trunk",)))
    assert {n.split(".")[2] for n, p in t.peers.named_parameters() if p.requires_grad} == {"head"}
    with pytest.raises(InputError, match="is no module of the network"):
        build(config("dml", {}, "networks", freeze=("layer9",)))


@pytest.mark.parametrize("topology", ["networks", "branches"])
def test_the_mean_teacher_of_a_frozen_part_stands_still_too(topology):
    t = build(config("pcl", {}, topology, freeze=("trunk",)))
    for module in (*t.peers.modules(), *t.frozen):
        module.eval()  # students as a whole, of the mean teachers what is frozen
    views, _ = next(t.loader.epoch(0))
    twins = [twin for twin in t.ema.modules() if not twin.training and any(True for _ in twin.parameters())]
    assert len(twins) > 10
    if topology == "networks":  # then the head alone is trained: both say the same on any batch
        assert torch.allclose(t.ema(views).logits_PBC, t.peers(views).logits_PBC, atol=1e-12)


def test_what_is_frozen_is_deployed_but_not_trained():
    trained, deployed = count_trained_and_deployed(build(config("dml", {}, "networks", freeze=("trunk",))))
    plain = resolve("resnet8")(10, 1)
    assert deployed == sum(p.numel() for p in plain.parameters())
    assert trained == 3 * sum(p.numel() for p in plain.fc.parameters())


def test_heads_take_their_own_rate():
    plain, fast = (build(config("independent", {}, "networks", head_lr_scale=f, peers=1)) for f in (1.0, 10.0))
    moves = []
    for t in (plain, fast):
        before = [t.peers.member(0).head.weight.clone(), t.peers.member(0).body.conv1.weight.clone()]
        for optimizer in t.optimizers:
            from codistill.training.optim import set_learning_rate

            set_learning_rate(optimizer, 0.01)
        train_step(t, *next(t.loader.epoch(0)), 1.0)
        after = [t.peers.member(0).head.weight, t.peers.member(0).body.conv1.weight]
        moves.append([(b - a).norm().item() for a, b in zip(before, after)])
    assert moves[1][0] == pytest.approx(10 * moves[0][0], rel=1e-3)
    assert moves[1][1] == pytest.approx(moves[0][1], rel=1e-5)


SOFT = [(name, topology) for name, c in METHODS.items() for topology in c.topologies]


@pytest.mark.parametrize(("name", "topology"), SOFT)
def test_every_method_takes_soft_labels_or_says_why_not(name, topology):
    soft = {"label_smoothing": 0.1, "mixup": 0.2, "cutmix": 1.0}
    if name == "kdcl":
        for target in ("naive", "linear", "minlogit"):
            with pytest.raises(InputError, match=f"kdcl's {target} target reads one hard label"):
                config(name, {"target": target}, topology, **soft).resolved()
    options = {"target": "general", "holdout_fraction": 0.1} if name == "kdcl" else {}
    if name in ("mcl", "l_mcl"):
        with pytest.raises(InputError, match=f"--label-smoothing makes labels soft, and {name} "):
            config(name, options, topology, **soft).resolved()
        return
    t = build(config(name, options, topology, **soft), teacher_for(name))
    batches = t.loader.epoch(0)
    for _ in range(2):
        assert train_step(t, *next(batches), 1.0)["loss"].isfinite()


def test_smoothed_labels_are_torchs_own_smoothing():
    from codistill.losses import cross_entropy

    mixer = Mixer(5, label_smoothing=0.2)
    logits, labels = torch.randn(3, 6, 5, dtype=torch.float64), torch.randint(5, (6,))
    views = torch.zeros(1, 6, 1, 8, 8, dtype=torch.float64)
    _, soft = mixer(views, labels, 0, 0)
    for p in range(3):
        theirs = F.cross_entropy(logits[p], labels, label_smoothing=0.2)
        assert torch.allclose(cross_entropy(logits, soft)[p], theirs, atol=1e-12)


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_labels_are_mixed_as_the_pixels_are(kind):
    mixer = Mixer(8, seed=3, **{kind: 1.0})
    labels = torch.arange(8)
    views = labels.double().view(1, 8, 1, 1, 1).expand(2, 8, 1, 16, 16).contiguous()  # every pixel is its image's label
    mixed, soft = mixer(views, labels, 2, 5)
    assert torch.allclose(soft.sum(1), torch.ones(8, dtype=soft.dtype))
    expected = (soft * torch.arange(8)).sum(1)  # a mean of labels by their shares is the mean pixel
    for view in mixed:
        assert torch.allclose(view.mean((1, 2, 3)), expected, atol=1e-12)
    again, _ = mixer(views, labels, 2, 5)
    assert torch.equal(mixed, again)
    other, _ = mixer(views, labels, 2, 6)
    assert not torch.equal(mixed, other)


def test_a_cut_never_leaves_the_image():
    import numpy as np

    rng = np.random.default_rng(0)
    for share in (0.0, 0.3, 1.0):
        for _ in range(50):
            rows, columns, left = cut_square(9, 13, share, rng)
            assert 0 <= rows.start <= rows.stop <= 9
            assert 0 <= columns.start <= columns.stop <= 13
            assert 0 <= left <= 1


@pytest.mark.slow
def test_a_run_with_all_of_it_resumes_bit_identically(tmp_path):
    from helpers.runs import StopAt

    base = config("okddip", {}, "branches", epochs=2, mixup=0.2, cutmix=1.0, label_smoothing=0.1, optimizer="adamw",
                  lr=0.001, head_lr_scale=3.0, freeze=("conv1",), checkpoint_every_steps=1,
                  log_every_steps=1)  # fmt: skip
    whole = train(dataclasses.replace(base, out=str(tmp_path / "whole")))
    stopped = dataclasses.replace(base, out=str(tmp_path / "stopped"))
    with pytest.raises(KeyboardInterrupt):
        train(stopped, StopAt(1, 2))
    again = train(dataclasses.replace(stopped, resume="auto"))
    for key, value in checkpoint_state(whole.training)["peers"].items():
        assert torch.equal(value, checkpoint_state(again.training)["peers"][key]), key
    assert method_config("okddip").name == "okddip"
