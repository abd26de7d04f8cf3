"""Every method with its options and topologies, built through the real set-up."""

import dataclasses

import pytest

from codistill.config.config import Config
from codistill.config.methods import METHODS, method_config
from codistill.peers.networks import NetworkPeers
from codistill.training.build import build_run
from codistill.training.run import zero_sums
from helpers.runs import tiny

OPTIONS = {
    "kdcl-naive": ("kdcl", {"target": "naive"}),
    "kdcl-linear": ("kdcl", {"target": "linear"}),
    "kdcl-linear-batch": ("kdcl", {"target": "linear", "granularity": "batch"}),
    "kdcl-general": ("kdcl", {"target": "general", "holdout_fraction": 0.1}),
    "kdcl-one-view": ("kdcl", {"own_views": False}),
    "dml-joint": ("dml", {"update": "joint"}),
    "dml-code": ("dml", {"variant": "okddip_code"}),
    "one-code": ("one", {"variant": "okddip_code"}),
    "cl_ilr-code": ("cl_ilr", {"variant": "okddip_code"}),
    "okddip-code": ("okddip", {"variant": "okddip_code"}),
    "okddip-detached": ("okddip", {"detach": "all"}),
    "okddip-no-leader": ("okddip", {"ablation": "no_leader"}),
    "okddip-random": ("okddip", {"ablation": "random"}),
    "kd-dist": ("kd", {"divergence": "dist", "temperature": 1.0}),
    "dml-dkd": ("dml", {"divergence": "dkd", "update": "joint"}),
    "cl_ilr-js": ("cl_ilr", {"divergence": "js"}),
    "one-mse": ("one", {"divergence": "mse"}),
    "okddip-reverse_kl": ("okddip", {"divergence": "reverse_kl"}),
    "pcl-dist": ("pcl", {"divergence": "dist", "temperature": 1.0}),
    "kdcl-standardized": ("kdcl", {"standardize_logits": True}),
    "codistillation-disjoint": ("codistillation", {"partition": "disjoint", "interval": 2}),
    "switokd-two-students": ("switokd", {"students": 2}),
    "mcl-logits": ("mcl", {"logit_weight": 1.0}),
    "hssakd-upright": ("hssakd", {"rotations": False, "exits": 2}),
    "hssakd-no-exits": ("hssakd", {"exits": 0}),
    "hssakd-dkd": ("hssakd", {"divergence": "dkd", "exits": 1}),
    "l_mcl-dkd": ("l_mcl", {"divergence": "dkd", "exits": 1}),
    "l_mcl-learned": ("l_mcl", {"match": "learned", "match_interval": 1, "match_dim": 8, "exits": 1}),
    "cosub-ce": ("cosub", {"loss": "ce"}),
    "cosub-own-views": ("cosub", {"own_views": True}),
    "okdph-authors": ("okdph", {"variant": "authors", "interval": 1}),
    "okdph-dirichlet": ("okdph", {"shares": "dirichlet", "label_weight": 0.5}),
    "ffsd-logits": ("ffsd", {"feature_terms": False}),
    "ffsd-ffl": ("ffsd", {"feature_terms": False, "leader": False}),
    "independent-rescaled": ("independent", {"rescale": True}),
}


CASES = [(name, {}, topology) for name, c in METHODS.items() for topology in c.topologies]


EXTRA = [
    (n, o, t) for n, o in OPTIONS.values() for t in METHODS[n].topologies if o.get("update") is None or t == "networks"
]


every = pytest.mark.parametrize(("name", "options", "topology"), CASES + EXTRA)


def config(name, options, topology, **more) -> Config:
    method = dataclasses.replace(method_config(name), **options)
    peers = 1 if name == "kd" and topology == "networks" else min(3, method.max_peers or 3)
    values = {"method": method, "topology": topology, "peers": peers, "batch_size": 12}
    if topology == "twins":
        values |= {"model": "tiny_network:Dropping"}  # twins differ by what is random
    return tiny(**values | more)


def teacher_for(name):
    return (
        NetworkPeers("resnet8", 1, 10, seed=5, in_channels=1, image_size=8).export_member(0) if name == "kd" else None
    )


def build(name, options, topology, **more):
    t = build_run(config(name, options, topology, **more).resolved(), teacher_for(name))
    t.progress.sums = zero_sums(t)
    t.peers.train()
    t.method.train()
    return t
