"""`--sampler pairs:M`: batches of M images of each class, in both pipelines, on meshes and in a resumed run."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from codistill.config import images_per_class
from codistill.config.config import Config
from codistill.data import DeviceLoader
from codistill.data.class_balance import check_class_batches, draw_class_batches
from codistill.data.loader import Augmentation, LoaderOptions
from codistill.training.build import build_run
from codistill.training.load import load_without_images
from codistill.training.loop import train
from codistill.training.state import checkpoint_state
from codistill.training.summary import describe_run
from codistill.utils import InputError
from helpers.folders import write_images
from helpers.images import shuffled_labels
from helpers.runs import StopAt, small, tiny


def loader(counts, batch_size, **options):
    labels = shuffled_labels(counts)
    images = np.random.default_rng(1).integers(0, 256, (len(labels), 8, 8, 1), dtype=np.uint8)
    options = LoaderOptions(batch_size, Augmentation(pad=1), **options)
    return DeviceLoader(images, labels, (0.0,), (1.0,), options)


@pytest.mark.parametrize(("counts", "batch_size", "count"), [((9, 5, 0, 30), 4, 2), ((4, 6, 8), 9, 3), ((2, 2), 4, 2)])
def test_every_batch_holds_so_many_different_images_of_its_classes(counts, batch_size, count):
    labels = shuffled_labels(counts)
    order = draw_class_batches(labels, batch_size, count, torch.Generator().manual_seed(2))
    assert len(order) == len(labels) // batch_size * batch_size
    for batch in order.view(-1, batch_size):
        assert len(batch.unique()) == batch_size
        assert set(Counter(labels[batch].tolist()).values()) == {count}
    again = draw_class_batches(labels, batch_size, count, torch.Generator().manual_seed(2))
    assert torch.equal(order, again)


def test_classes_and_the_images_of_a_class_are_equally_likely():
    labels = np.repeat(np.arange(3), (4, 5, 6))
    groups: Counter = Counter()
    for seed in range(600):
        order = draw_class_batches(labels, 4, 2, torch.Generator().manual_seed(seed))
        groups.update(tuple(sorted(pair)) for pair in order.view(-1, 2).tolist())
    total = groups.total()
    of_class = Counter(dict.fromkeys(range(3), 0))
    for pair, times in groups.items():
        of_class[int(labels[pair[0]])] += times
    assert len(groups) == 6 + 10 + 15  # every pair of every class
    assert all(abs(times / total - 1 / 3) < 0.02 for times in of_class.values())
    for pair, times in groups.items():
        pairs = {0: 6, 1: 10, 2: 15}[int(labels[pair[0]])]
        assert abs(times / total - 1 / 3 / pairs) < 0.01


def test_an_epoch_is_as_many_whole_batches_as_the_images_fill():
    ours = loader((20, 30, 17), 6, images_per_class=3)
    assert len(ours) == 11
    assert ours.num_samples == 66
    batches = list(ours.epoch(2))
    assert [len(y) for _, y in batches] == [6] * 11
    resumed = list(ours.epoch(2, start=7))
    for (x, y), (x_again, y_again) in zip(batches[7:], resumed, strict=True):
        assert torch.equal(x, x_again)
        assert torch.equal(y, y_again)
    assert not torch.equal(batches[0][0], next(ours.epoch(3))[0])


def test_the_shards_of_a_mesh_make_up_the_batch():
    whole = next(loader((8, 9), 4, images_per_class=2, views=2).epoch(0))[0]
    parts = []
    for index in range(2):
        part = loader((8, 9), 4, images_per_class=2, views=2)
        part.shard(index, 2, range(2))
        parts.append(next(part.epoch(0))[0])
    assert torch.equal(torch.cat(parts, 1), whole)


@pytest.mark.parametrize("pipeline", ["resident", "files"])
def test_both_pipelines_draw_the_same_batches(tmp_path, pipeline):
    folder = write_images(tmp_path, per_class=7)
    options = {"sampler": "pairs:2", "batch_size": 4, "data_pipeline": pipeline, "image_size": 8, "val_fraction": 0.0}
    t = build_run(
        small(tmp_path / "run", data=f"folder:{folder}", train_per_class=None, data_workers=0, **options).resolved()
    )
    labels = [y for _, y in t.loader.epoch(1)]
    assert len(labels) == len(t.loader) == 5
    order = draw_class_batches(t.data.y_train, 4, 2, torch.Generator().manual_seed(1))
    assert torch.cat(labels).tolist() == t.data.y_train[order].tolist()
    said = " ".join(describe_run(t))
    assert "every batch holds 2 images of each of 2 classes, drawn anew, 5 batches an epoch" in said


def test_a_resumed_run_ends_bit_identical_and_its_student_loads_without_images(tmp_path: Path):
    options = {
        "sampler": "pairs:2",
        "batch_size": 8,
        "epochs": 2,
        "model": "resnet8",
        "checkpoint_every_steps": 1,
        "log_every_steps": 1,
    }
    whole = train(small(tmp_path / "whole", **options))
    with pytest.raises(KeyboardInterrupt):
        train(small(tmp_path / "stopped", **options), StopAt(1, 2))
    again = train(small(tmp_path / "stopped", **options, resume="auto"))
    theirs = checkpoint_state(again.training)["peers"]
    assert all(torch.equal(value, theirs[key]) for key, value in checkpoint_state(whole.training)["peers"].items())
    assert whole.figures["cost"]["samples_seen"] == 2 * 7 * 8
    assert load_without_images(tmp_path / "whole").peers.num_peers == 2


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"sampler": "pairs:2", "balanced_sampling": True}, "--balanced-sampling and --sampler pairs:2 both choose"),
        ({"sampler": "pairs:3"}, "--batch-size 16 is no multiple of 3"),
        ({"sampler": "pairs:1"}, "give uniform, or pairs:M with M of 2 or more"),
        ({"sampler": "pairs"}, "give uniform, or pairs:M"),
        ({"sampler": "random"}, "give uniform, or pairs:M"),
        ({"sampler": "pairs:99999999999999999999"}, "give uniform, or pairs:M"),
        (
            {"sampler": "pairs:2", "batch_size": 32},
            "needs 16 classes, and the training images have 10; give --batch-size 20",
        ),
        ({"sampler": "pairs:8"}, "a class has only 6 training images; give pairs:6"),
    ],
)
def test_what_cannot_be_drawn_is_refused(options, words):
    with pytest.raises(InputError, match=words):
        build_run(tiny(method="independent", **options).resolved())


def test_a_class_of_one_image_has_no_pair():
    with pytest.raises(InputError, match="only 1 training image; give uniform, or add images to it"):
        check_class_batches(np.array([0, 0, 1]), 2, 2)


def test_the_option_is_read_from_text():
    assert images_per_class("uniform") == 0
    assert images_per_class("pairs:4") == 4
    assert Config().sampler == "uniform"
