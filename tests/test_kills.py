"""A handful of kills (benchmarks/kills.py does over a hundred): resumed runs end bit-identical, no file is unreadable."""

import random

import pytest

import kills


@pytest.mark.parametrize(
    ("case", "number"),
    [
        ("pcl, networks", 3),
        ("kdcl general, branches", 2),
        ("one, branches, bfloat16", 2),
        ("dml alternating, networks", 2),
    ],
)
def test_a_run_that_is_killed_again_and_again_ends_as_one_that_is_not(case, number, tmp_path):
    count = kills.Count()
    kills.survive(case, number, tmp_path, random.Random(3), count)
    assert not count.trouble
    assert count.kills.total() == number
    assert count.identical == count.runs >= 1
    assert count.repeated <= kills.EVERY


def test_a_mesh_whose_rank_is_killed_ends_as_one_that_is_left_alone(tmp_path):
    count = kills.Count()
    kills.survive("pcl, 2 processes", 1, tmp_path, random.Random(0), count)
    assert not count.trouble
    assert count.identical == count.runs == 1


def test_a_grid_survives_kills_in_its_own_files(tmp_path):
    count = kills.Count()
    kills.survive_grid(2, tmp_path, random.Random(1), count)
    assert not count.trouble
    assert count.unreadable == 0
    assert count.identical == count.runs == 3


@pytest.mark.parametrize("place", ["metrics", "bytes", "rename", "flush"])
def test_a_kill_at_every_write_before_the_first_checkpoint_leaves_a_folder_to_go_on_with(place, tmp_path):
    """A folder that holds next to nothing is still this run's."""
    board, count = kills.Board(), kills.Count()
    config = kills.config_of("dml alternating, networks", tmp_path / "run", epochs=1)
    assert kills.attempt(config, board, place, 1, 0.0, 0)
    assert not kills.unreadable(tmp_path / "run")
    assert not kills.attempt(config, board, None, 0, 0.0, 0)
    kills.attempt(kills.config_of("dml alternating, networks", tmp_path / "whole", epochs=1), board, None, 0, 0.0, 0)
    kills.compare_ended(tmp_path / "whole", tmp_path / "run", count)
    assert not count.trouble
