"""What a run says at its start: classes, augmentation, and a network that is too large for its images."""

import dataclasses
import warnings

import numpy as np
import pytest
from PIL import Image

from codistill.training.build import build_run
from codistill.training.loop import train
from codistill.training.summary import describe_run
from codistill.utils.errors import InputError
from helpers.runs import small, tiny


def notes_of(config):
    return "\n".join(describe_run(build_run(config.resolved())))


def test_the_start_names_the_classes(tmp_path):
    assert "\n10 classes: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9\n" in notes_of(small(tmp_path)) + "\n"


def test_no_flip_is_obeyed_and_told(tmp_path):
    for part in ("train", "test"):
        for n, name in enumerate((":x:", "café")):
            (tmp_path / part / name).mkdir(parents=True)
            for i in range(8):
                pixels = np.full((8, 8, 3), 90 * n + i, dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / part / name / f"{i}.png")
    options = {"data": f"folder:{tmp_path}", "train_per_class": None, "batch_size": 4}
    assert "pad 1 and crop + flip;" in notes_of(small(tmp_path / "r", **options))
    run = build_run(small(tmp_path / "r", flip=False, **options).resolved())
    said = "\n".join(describe_run(run))
    assert "pad 1 and crop;" in said
    assert "2 classes: :x:, café" in said
    assert run.loader.options.augmentation is not None
    assert not run.loader.options.augmentation.flip


@pytest.mark.parametrize(("size", "warned"), [(97, True), (96, False)])
def test_a_network_for_small_images_is_warned_of_on_large_ones(size, warned, tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    for part in ("train", "test"):
        for name in ("a", "b"):
            (tmp_path / part / name).mkdir(parents=True)
            for i in range(2):
                pixels = rng.integers(0, 256, (size, size, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / part / name / f"{i}.png")
    config = tiny(data=f"folder:{tmp_path}", train_per_class=None, batch_size=2, epochs=5, val_fraction=0.0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        notes_of(config)
    said = [str(w.message) for w in caught if "made for images of about 32 x 32" in str(w.message)]
    assert bool(said) is warned
    if warned:
        megabytes = float(said[0].split("take about ")[1].split(" MB")[0].replace(",", ""))
        assert 5 < megabytes < 100  # three resnet8, 9,409 pixels in 16 channels of 4 bytes, some 20 maps
        assert f"{megabytes * 2 / 1e3:,.1f} GB for a batch of 2" in said[0]
        monkeypatch.setattr("codistill.training.summary.physical_memory", lambda: 2**20)
        with pytest.raises(InputError, match=r"--image-size: the activations of one .* and this machine has 0.0"):
            train(dataclasses.replace(config, out=str(tmp_path / "run")))
        assert not (tmp_path / "run").exists()
