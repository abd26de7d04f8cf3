"""A handful of kills (benchmarks/kills.py: over a hundred): resumed runs end bit-identical, all files are readable."""

import random

import pytest

import kills
from kept_whole import unreadable

pytestmark = pytest.mark.slow

CASES = ["pcl, networks", "kdcl general, branches", "one, branches, bfloat16", "dml alternating, networks"]


@pytest.fixture(scope="module", autouse=True)
def _imported():
    kills.warm_up()


@pytest.mark.parametrize("case", CASES)
def test_a_run_that_is_killed_twice_ends_as_one_that_is_not(case, tmp_path):
    count = kills.Count()
    kills.survive(case, 2, tmp_path, random.Random(3), count)
    assert not count.trouble
    assert count.kills.total() == 2
    assert count.identical == count.runs >= 1
    assert count.repeated <= kills.EVERY


def test_a_mesh_with_a_killed_rank_resumes_to_the_same_end(tmp_path):
    count = kills.Count()
    kills.survive("pcl, 2 processes", 1, tmp_path, random.Random(0), count)
    assert not count.trouble
    assert count.identical == count.runs == 1


def test_a_grid_survives_kills_in_its_own_files(tmp_path):
    count = kills.Count()
    kills.survive_grid(1, tmp_path, random.Random(1), count)
    assert not count.trouble
    assert count.identical == count.runs == 3


def test_a_kill_at_any_write_leaves_a_resumable_folder(tmp_path):
    """A folder that holds next to nothing is still this run's."""
    board, out = kills.SharedCounters(), tmp_path / "run"
    config = kills.config_of("dml alternating, networks", out, epochs=1)
    for place in ("flush", "rename", "bytes", "metrics"):
        assert kills.attempt(config, board, place, 1, 0.0, 0), place
        assert not unreadable(out)
    assert not kills.attempt(config, board, None, 0, 0.0, 0)
    assert not list(out.glob(".*"))
