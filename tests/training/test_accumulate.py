"""A batch run in parts steps as the whole batch does whose BatchNorm normalises the same parts."""

import pytest
from torch import nn

from codistill.config.methods import method_config
from codistill.training.build import build_run
from codistill.training.run import zero_sums
from codistill.training.step import train_step
from codistill.utils.errors import InputError
from helpers.common import close
from helpers.mesh_reference import ChunkNorm
from helpers.runs import tiny

CASES = [("okddip", "networks"), ("okddip", "branches"), ("pcl", "networks"), ("kdcl", "networks"), ("dml", "branches")]


def build(name, topology, accumulate=1, **options):
    method = method_config(name)
    for key in [k for k in options if hasattr(method, k)]:
        setattr(method, key, options.pop(key))
    values = {"batch_size": 20, "epochs": 2, "topology": topology, "accumulate": accumulate, "dtype": "float64"}
    t = build_run(tiny(method=method, **values | options).resolved())
    t.progress.sums = zero_sums(t)
    t.peers.train()
    return t


@pytest.mark.parametrize(("name", "topology"), CASES)
def test_parts_add_up_to_the_batch(name, topology):
    ours, whole = build(name, topology, 3), build(name, topology)
    for module in (whole.peers, whole.ema):
        for norm in module.modules() if module is not None else ():
            if isinstance(norm, nn.BatchNorm2d):
                norm.__class__, norm.chunks = ChunkNorm, 3
    for batch in list(ours.loader.epoch(0))[:3]:
        terms = [train_step(t, *batch, 0.7) for t in (ours, whole)]
        close(terms[0]["loss"], terms[1]["loss"].detach(), 1e-11)
        for t in (ours, whole):
            t.progress.step += 1
    close(ours.progress.sums["hits_P"], whole.progress.sums["hits_P"])
    for name in ("loss", "distill_P"):
        close(ours.progress.sums[name], whole.progress.sums[name], 1e-11)
    assert ours.progress.sums.keys() == whole.progress.sums.keys()
    for part in ("peers", "method"):
        theirs = dict(getattr(whole, part).named_parameters())
        for key, value in getattr(ours, part).named_parameters():
            close(value.detach(), theirs[key].detach(), 1e-11)


@pytest.mark.parametrize(("options", "sentence"), [
    ({"name": "one", "topology": "branches"}, "needs the full batch"),
    ({"name": "dml", "topology": "networks"}, "one member after the other"),
    ({"name": "okddip", "topology": "networks", "accumulate": 21}, "--accumulate 21: --batch-size 20"),
    ({"name": "okddip", "topology": "networks", "accumulate": 0}, "--accumulate is 0; give at least 1"),
])  # fmt: skip
def test_what_cannot_run_in_parts_is_refused(options, sentence):
    with pytest.raises(InputError, match=sentence):
        build(**{"accumulate": 2} | options)
