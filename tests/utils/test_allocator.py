"""Freed memory stays with the process while it trains, and goes back at the end."""

import subprocess
import sys

import pytest

from codistill.config.config import Config
from codistill.training.loop import train

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the allocator of glibc is meant")

PROBE = """
import resource, sys, torch
from codistill.utils.cpu_memory import keep_freed_memory, release_kept_memory
if sys.argv[1] == "keep" and not keep_freed_memory():
    sys.exit("refused")
def blocks():  # more than glibc's largest threshold, each in its turn
    for _ in range(20):
        torch.zeros(12 * 2**20)
def megabytes():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize() / 2**20
blocks()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
blocks()
faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
held = megabytes()
release_kept_memory()
print(faults, held - megabytes())
"""


def probe(mode):
    done = subprocess.run([sys.executable, "-c", PROBE, mode], capture_output=True, text=True, check=True)
    return tuple(map(float, done.stdout.split()))


@pytest.mark.slow
@linux
def test_kept_memory_is_not_cleared_again_and_is_released():
    default, _ = probe("default")
    kept, released = probe("keep")
    assert default > 20 * 12  # at least a page of 2 MB each time where huge pages are, or 12,000 small ones
    assert kept < 20
    assert released > 40


@pytest.mark.slow
@linux
def test_training_on_a_cpu_keeps_it_and_lets_go_at_the_end(monkeypatch, tmp_path):
    called, loop = [], sys.modules[train.__module__]
    monkeypatch.setattr(loop, "keep_freed_memory", lambda: called.append("keep") or True)
    monkeypatch.setattr(loop, "release_kept_memory", lambda: called.append("release"))
    train(Config("independent", "resnet8", "digits", peers=1, epochs=1, batch_size=64, out=str(tmp_path / "run")))
    assert called == ["keep", "release"]
