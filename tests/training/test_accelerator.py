"""On a simulated device other than the CPU: nothing mixes devices, the host never waits, the figures are the same."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from codistill.config.config import Config
from codistill.training.build import build_run
from codistill.utils.errors import InputError
from helpers.accelerator_cases import CASES

WORKER = Path(__file__).parent.parent / "helpers" / "accelerator_worker.py"


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Run all cases, in processes of their own: a device must be known before a process's first backward."""
    folder = tmp_path_factory.mktemp("accelerator")
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    halves = [
        subprocess.Popen(
            [sys.executable, WORKER, folder, *list(CASES)[half::2]], stdout=subprocess.PIPE, text=True, env=env
        )
        for half in range(2)
    ]
    lines = [line for half in halves for line in half.communicate()[0].splitlines()]
    return {case["case"]: case for case in map(json.loads, lines)}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_run_on_a_device_is_the_cpus_and_waits_for_nothing(found, name):
    case = found[name]
    assert "error" not in case, case["error"]
    assert case["gap"] <= case["allowed"]
    assert case["guesses"] <= case["allowed"]
    assert case["figures"] or case["allowed"]
    if "stacked" in name:
        assert case["execution"] == "stacked"
    if not ("no float64" in name and "linear" in name):  # the CPU solves it
        assert not any(case["steps"])
    if "resumed" not in name:  # that one writes a checkpoint after every step
        assert not any(case["between"])
    (few, waits), (more, last_waits) = case["evaluations"][0], case["evaluations"][-1]
    assert more > few
    assert last_waits == waits


def test_float64_is_refused_on_a_device_without_it(monkeypatch):
    monkeypatch.setattr("codistill.training.build.pick_device", lambda _name: torch.device("mps"))
    config = Config("okddip", "resnet8", "digits", dtype="float64").resolved()
    with pytest.raises(InputError, match="--dtype float64: mps has none; give --device cpu"):
        build_run(config)


@pytest.mark.slow
def test_what_a_device_refuses_is_seen(tmp_path):
    """Let the simulation itself fail where a GPU would, and count where the host would wait."""
    script = """
import torch
from helpers.accelerator import DEVICE, Simulated

with Simulated() as mode:
    x, host = torch.ones(3).to(DEVICE), torch.ones(3)
    mode.waits.clear()
    for mixed in (lambda: x + host, lambda: torch.cat((x, host)), lambda: torch.where(host > 0, x, x)):
        try:
            mixed()
        except RuntimeError as error:
            assert "mixes devices" in str(error)
        else:
            raise SystemExit("two devices were mixed")
    assert (x * 2.0 + torch.tensor(1.0)).sum() is not None and not mode.waits.total()
    for waits in (x.sum().item, x.tolist, lambda: bool((x > 0).all()), lambda: x[[0, 1]], lambda: x[host > 0],
                  lambda: torch.tensor([1.0], device=DEVICE), x.nonzero, lambda: x.copy_(host), x.cpu,
                  lambda: x.to("cpu", non_blocking=True)):
        before = mode.waits.total()
        waits()
        assert mode.waits.total() > before, waits
    before = mode.waits.total()
    x.copy_(host, True), x.copy_(host, non_blocking=True), host.to(DEVICE, non_blocking=True)
    assert mode.waits.total() == before
with Simulated(float64=False):
    try:
        x.double()
    except TypeError:
        raise SystemExit(0)
raise SystemExit("float64 where there is none")
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=WORKER.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
