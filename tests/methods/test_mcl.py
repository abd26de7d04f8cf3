"""Mutual contrastive learning: its parts, heads that are not deployed, and what it refuses."""

from pathlib import Path

import numpy as np
import pytest
import torch

from codistill.config import MCLConfig
from codistill.deploy import export_student
from codistill.methods import MCL
from codistill.methods.contrib.mcl import PARTS, info_nce
from codistill.models import build, resolve
from codistill.peers import PeerOutputs
from codistill.training.build import build_run
from codistill.training.load import load_run
from codistill.training.loop import train
from codistill.training.step import train_step
from codistill.utils import InputError, count_parameters
from helpers import oracles
from helpers.common import GOLDEN, close, random_peers
from helpers.host_reads import CountHostReads
from helpers.runs import small, tiny


def golden_embeddings():
    with np.load(GOLDEN.parent / "next.npz") as archive:
        return {name: torch.tensor(archive[name]) for name in archive.files if name.startswith("mcl_")}


def test_the_authors_numbers():
    g = golden_embeddings()
    v = torch.nn.functional.normalize(g["mcl_embeddings"], dim=-1)
    method = MCL(3, (16,) * 3)
    parts_PK, positives_B = method.contrast(v, g["mcl_labels"])
    for part, name in zip(parts_PK.sum(0), PARTS):
        close(part, g[f"mcl_{name}"])
    assert positives_B.tolist() == [1.0] * 12
    weights = torch.tensor([0.1, 1.0, 0.1, 1.0], dtype=torch.float64)
    close((parts_PK.sum(0) * weights).sum(), g["mcl_loss"])


def heads_of(method):
    return [[p for layer in (head[0], head[2]) for p in (layer.weight, layer.bias)] for head in method.heads]


@pytest.mark.parametrize("num_peers", [1, 2, 3])
@pytest.mark.parametrize("logit_weight", [0.0, 0.7])
@pytest.mark.parametrize("labels", [[3, 1, 3, 1, 1], [0, 1, 2, 3, 3], [0, 1, 2, 3, 4]])
def test_equals_the_loop(num_peers, logit_weight, labels):
    """Also with images that have no positive, some of them or all."""
    torch.manual_seed(4)
    z, h, _ = random_peers(num_peers, dims=(6, 5, 4))
    y = torch.tensor(labels)
    options = {"tau": 0.2, "temperature": 2.0, "embedding_dim": 3, "logit_weight": logit_weight}
    weights = {"vcl_weight": 0.3, "soft_vcl_weight": 0.9, "icl_weight": 0.4, "soft_icl_weight": 1.1}
    method = MCL(num_peers, (6, 5, 4)[:num_peers], **options, **weights).double()
    loss = method(PeerOutputs(z, h), y, weight=0.8)["loss"]
    naive = oracles.mcl(z, h, heads_of(method), y, tau=0.2, temperature=2.0, weights=weights.values(),
                        logit_weight=logit_weight if num_peers > 1 else 0.0, weight=0.8)  # fmt: skip
    close(loss, naive)
    inputs = [z, *h, *method.parameters()]
    ours, theirs = (torch.autograd.grad(v, inputs, allow_unused=True) for v in (loss, naive))
    for a, b in zip(ours, theirs, strict=True):
        if b is None:  # nothing to compare: no image has a positive, and no peer a peer
            assert a is None or not a.any()
        else:
            close(a, b)


def contrast_of(v, y):
    return MCL(len(v), (16,) * len(v)).contrast(v, y)[0].sum(0)


def test_the_order_of_peers_and_of_images_does_not_matter():
    g = golden_embeddings()
    v, y = torch.nn.functional.normalize(g["mcl_embeddings"], dim=-1), g["mcl_labels"]
    order = torch.randperm(12, generator=torch.Generator().manual_seed(3))
    close(contrast_of(v[[2, 0, 1]], y), contrast_of(v, y))
    close(contrast_of(v[:, order], y[order]), contrast_of(v, y))


def test_embeddings_have_length_1_whatever_the_features_scale():
    _, h, _ = random_peers(2)
    method = MCL(2, (16, 16)).double()
    for head in method.heads:
        for layer in (head[0], head[2]):
            torch.nn.init.zeros_(layer.bias)
    near, far = method.embed(h[:2]), method.embed([100 * f for f in h[:2]])
    close(near.norm(dim=-1), torch.ones(2, 5, dtype=torch.float64))
    close(near, far)


def test_one_peer_has_supervised_contrast_alone():
    z, h, y = random_peers(1)
    terms = MCL(1, (16,)).double()(PeerOutputs(z, h), y)
    assert [terms[f"{name}_BP"][0].item() for name in PARTS[1:]] == [0.0, 0.0, 0.0]
    assert terms["vcl_BP"][0].item() > 0


def test_equal_peers_have_nothing_to_learn_softly():
    g = golden_embeddings()
    v = torch.nn.functional.normalize(g["mcl_embeddings"][:1], dim=-1).repeat(2, 1, 1)
    _, soft_vcl, _, soft_icl = contrast_of(v, g["mcl_labels"])
    close(torch.stack((soft_vcl, soft_icl)), torch.zeros(2, dtype=torch.float64))


def test_a_batch_of_one_or_of_different_classes_has_no_contrast():
    assert info_nce(torch.ones(2, 1, 1), torch.tensor([4]))[0].tolist() == [0.0, 0.0]
    value, positives = info_nce(torch.randn(3, 3), torch.tensor([0, 1, 2]))
    assert (value, positives.sum()) == (0.0, 0.0)


def test_who_is_deployed_depends_on_the_logit_term():
    assert MCL(2, (4, 4), logit_weight=1.0).deployed == 0
    assert MCL(4, (4,) * 4, logit_weight=1.0).deployed == 3
    assert MCL(4, (4,) * 4).deployed == 0


def test_the_logit_term_of_more_than_two_teaches_the_last_alone():
    z, h, y = random_peers(3)
    ours = MCL(3, (16,) * 3, logit_weight=1.0, divergence="reverse_kl").double()
    plain = MCL(3, (16,) * 3).double()
    plain.load_state_dict(ours.state_dict())
    gaps = ours(PeerOutputs(z, h), y)["loss_P"] - plain(PeerOutputs(z, h), y)["loss_P"]
    assert gaps[:2].tolist() == [0.0, 0.0]
    close(gaps[2], oracles.divergence(z[2], z.detach().mean(0), y, kind="reverse_kl", temperature=3.0))


@pytest.mark.parametrize("topology", ["networks", "branches"])
def test_heads_are_trained_but_not_deployed(topology, tmp_path: Path):
    c = tiny(method="mcl", topology=topology, peers=2, epochs=1, sampler="pairs:2", out=str(tmp_path / "run"))
    result = train(c)
    plain = build(resolve("resnet8"), num_classes=10, in_channels=1, image_size=8)
    assert result.student.state_dict().keys() == plain.state_dict().keys()
    of_heads = count_parameters(result.training.method)
    assert of_heads == 2 * (64 * 128 + 128 + 128 * 128 + 128)
    assert result.figures["parameters_trained"] == count_parameters(result.training.peers) + of_heads
    assert result.figures["parameters_deployed"] == count_parameters(plain)
    assert export_student(load_run(tmp_path / "run"), tmp_path / "student.safetensors") < 1e-4
    line = (tmp_path / "run/metrics.jsonl").read_text()
    assert '"positives": [1.0, 1.0]' in line
    assert '"soft_icl": [' in line


def test_the_step_reads_nothing_on_the_host():
    t = build_run(tiny(method=MCLConfig(logit_weight=1.0), peers=2).resolved())
    t.peers.train()
    views, targets = next(t.loader.epoch(0))
    train_step(t, views, targets, 1.0)
    with CountHostReads() as counter:
        train_step(t, views, targets, 1.0)
    assert not counter.reads


def test_both_executions_train_the_same():
    states = []
    for execution in ("loop", "stacked"):
        options = {"execution": execution, "dtype": "float64", "sampler": "pairs:2"}
        t = build_run(tiny(method="mcl", peers=2, **options).resolved())
        t.peers.train()
        for views, targets in list(t.loader.epoch(0))[:2]:
            train_step(t, views, targets, 1.0)
        states.append(t.peers.state_dict() | t.method.state_dict())
    for key, value in states[0].items():
        close(states[1][key].double(), value.double())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"mixup": 0.2}, "--mixup makes labels soft"),
        ({"label_smoothing": 0.1}, "--label-smoothing makes labels soft"),
        ({"accumulate": 2}, "mcl needs the full batch"),
        ({"method": MCLConfig(logit_weight=1.0), "peers": 1}, "one peer has no other to learn from"),
        ({"method": MCLConfig(divergence="js")}, "--method.divergence is about mcl's logit term"),
        ({"method": MCLConfig(standardize_logits=True)}, "--method.standardize-logits is about mcl's logit term"),
        ({"method": MCLConfig(tau=0.0)}, "--method.tau is 0.0; give a number above 0"),
    ],
)
def test_what_makes_no_sense_is_refused(options, words):
    with pytest.raises(InputError, match=words):
        build_run(tiny(**{"method": "mcl"} | options).resolved())


def test_soft_labels_are_refused_in_python_too():
    z, h, y = random_peers(2)
    with pytest.raises(InputError, match="one hard label per image"):
        MCL(2, (16, 16)).double()(PeerOutputs(z, h), torch.nn.functional.one_hot(y, 7).double())


def test_a_loaded_run_has_its_heads(tmp_path: Path):
    whole = train(small(tmp_path / "whole", method="mcl", epochs=2))
    load = load_run(tmp_path / "whole", allow_import=True)
    for key, value in whole.training.method.state_dict().items():
        assert torch.equal(load.method.state_dict()[key], value), key
