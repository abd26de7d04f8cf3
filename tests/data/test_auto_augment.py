"""RandAugment, TrivialAugment and random erasing: torchvision's operations, draws that depend on the epoch alone."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode
from torchvision.transforms import RandomErasing, v2

from codistill.data import Augmentation, DeviceLoader, FileLoader, LoaderOptions, load_set
from codistill.data.auto_augment import ATTEMPTS, BINS, RAND_AUGMENT_BIN, AutoAugment, draw_erasing, outside_rectangle
from codistill.training.loop import train
from helpers.common import read_json
from helpers.folders import write_images
from helpers.runs import StopAt, tiny

NAMES = (
    *("Identity", "ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate", "Brightness", "Color", "Contrast"),
    *("Sharpness", "Posterize", "Solarize", "AutoContrast", "Equalize"),
)


def random_images(count, size=12, channels=3):
    return np.random.default_rng(3).integers(0, 256, (count, size, size, channels), dtype=np.uint8)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("policy", ["randaugment", "trivialaugment"])
def test_operations_are_torchvisions(policy, channels):
    """Every operation, at every magnitude that is drawn and with both signs, on a batch and image by image."""
    theirs = v2.RandAugment() if policy == "randaugment" else v2.TrivialAugmentWide()
    ours = AutoAugment(policy, 12, 12)
    pixels = torch.from_numpy(random_images(3, channels=channels))
    for number, name in enumerate(NAMES):
        magnitudes, signed = theirs._AUGMENTATION_SPACE[name]
        values = magnitudes(BINS, 12, 12)
        assert ours.operations[number].signed == signed
        drawn_bins = range(BINS) if ours.wide else (RAND_AUGMENT_BIN,)
        for bin_number in drawn_bins if values is not None else (0,):
            for sign in (0, 1) if signed else (0,):
                magnitude = 0.0 if values is None else float(values[bin_number]) * (-1) ** sign
                expected = [
                    theirs._apply_image_or_video_transform(
                        x.movedim(-1, 0), name, magnitude, v2.InterpolationMode.NEAREST, fill=theirs._fill
                    ).movedim(0, -1)
                    for x in pixels
                ]
                code = (number * BINS + bin_number) * 2 + sign
                drawn = torch.full((1, 1, 3), code)
                found = ours.apply(pixels.clone().unsqueeze(0), drawn)[0]
                assert torch.equal(found, torch.stack(expected)), (name, bin_number, sign)


def test_each_image_gets_what_it_drew():
    ours = AutoAugment("randaugment", 12, 12)
    pixels = torch.from_numpy(random_images(40)).unsqueeze(0)
    drawn = ours.draw(40, torch.Generator().manual_seed(1)).unsqueeze(0)
    together = ours.apply(pixels.clone(), drawn)
    alone = [ours.apply(pixels[:, b : b + 1].clone(), drawn[..., b : b + 1]) for b in range(40)]
    assert torch.equal(together, torch.cat(alone, 1))
    assert not torch.equal(together, pixels)


def test_no_constant_is_copied_to_the_device():
    """`torch.tensor(..., device=...)` makes the host wait for all that a GPU still has to do."""

    class Counter(TorchFunctionMode):
        copies = 0

        def __torch_function__(self, func, types, args=(), kwargs=None):
            self.copies += func is torch.tensor
            return func(*args, **(kwargs or {}))

    for policy in ("randaugment", "trivialaugment"):
        ours = AutoAugment(policy, 12, 12)
        pixels, drawn = torch.from_numpy(random_images(200)).unsqueeze(0), ours.draw(200, torch.Generator())
        with Counter() as first:
            ours.apply(pixels.clone(), drawn.unsqueeze(0))
        with Counter() as second:
            ours.apply(pixels.clone(), drawn.unsqueeze(0))
        assert first.copies > 0  # the tables of positions are made once
        assert second.copies == 0


def test_draws_are_uniform():
    drawn = AutoAugment("trivialaugment", 32, 32).draw(30_000, torch.Generator().manual_seed(2))[0]
    counts = torch.bincount(drawn // 2 // BINS, minlength=14) / 30_000
    assert (counts - 1 / 14).abs().max() < 0.01
    rotations = drawn[drawn // 2 // BINS == 5]
    assert torch.bincount(rotations // 2 % BINS, minlength=BINS).min() > 30
    assert 0.45 < (rotations % 2).float().mean() < 0.55
    fixed = AutoAugment("randaugment", 32, 32).draw(1000, torch.Generator().manual_seed(2))
    assert fixed.shape == (2, 1000)
    assert set((fixed // 2 % BINS).flatten().tolist()) == {0, RAND_AUGMENT_BIN}  # 0 where there is no magnitude


def test_a_rectangle_is_that_of_torchvision_for_the_same_numbers(monkeypatch):
    """Of the first attempt that fits; areas and ratios are handed to both."""
    size, count = 16, 60
    draws = draw_erasing(1.0, count, size, torch.Generator().manual_seed(4))
    rng = torch.Generator().manual_seed(4)
    area = torch.empty(ATTEMPTS, count).uniform_(0.02, 0.33, generator=rng)
    ratio = torch.empty(ATTEMPTS, count).uniform_(math.log(0.3), math.log(3.3), generator=rng)
    uniform = torch.Tensor.uniform_
    for n in range(count):
        numbers = iter([value for attempt in zip(area[:, n], ratio[:, n]) for value in attempt])
        monkeypatch.setattr(torch.Tensor, "uniform_", lambda self, low, high: self.copy_(next(numbers)))  # noqa: B023
        found = RandomErasing.get_params(torch.zeros(3, size, size), (0.02, 0.33), (0.3, 3.3), [0.0])
        height, width = found[2:4]
        monkeypatch.setattr(torch.Tensor, "uniform_", uniform)
        assert (height, width) == (int(draws["erase_height"][n]), int(draws["erase_width"][n]))
        assert 0 <= int(draws["erase_top"][n]) <= size - height
        assert 0 <= int(draws["erase_left"][n]) <= size - width


def test_erasing_sets_a_rectangle_to_the_mean():
    options = LoaderOptions(20, Augmentation(erasing=0.5), dtype=torch.float64)
    images = random_images(20) | 1
    loader = DeviceLoader(images, np.arange(20), (0.0,) * 3, (1.0,) * 3, options)
    (views, labels) = next(loader.epoch(0))
    whole = torch.from_numpy(images[labels]).movedim(-1, 1).double() / 255
    erased = (views[0] == 0).all(1)
    assert torch.allclose(torch.where(erased.unsqueeze(1), whole, views[0]), whole)
    assert 4 <= erased.any((1, 2)).sum() <= 16
    for mask in erased[erased.any((1, 2))]:
        rows, columns = mask.any(1), mask.any(0)
        assert torch.equal(mask, rows.unsqueeze(1) & columns)


FULL = Augmentation(pad=2, flip=True, cutout=3, policy="randaugment", erasing=0.5)


def batches(loader, epoch=1, start=0):
    return list(loader.epoch(epoch, start))


@pytest.mark.parametrize(
    "augmentation", [FULL, Augmentation(policy="trivialaugment"), dataclasses.replace(FULL, pad=0)]
)
def test_draws_depend_on_seed_epoch_and_view_alone(augmentation):
    def loader(views=2):
        options = LoaderOptions(8, augmentation, views=views, seed=5)
        return DeviceLoader(random_images(30), np.arange(30), (0.5,) * 3, (0.2,) * 3, options)

    whole = batches(loader())
    assert all(torch.equal(a[0], b[0]) for a, b in zip(whole[2:], batches(loader(), start=2), strict=True))
    assert all(torch.equal(a[0][:1], b[0]) for a, b in zip(whole, batches(loader(views=1)), strict=True))
    assert not torch.equal(whole[0][0][0], whole[0][0][1])
    assert not torch.equal(whole[0][0], batches(loader(), epoch=2)[0][0])
    for shard in range(2):
        part = loader()
        part.shard(shard, 2, range(1, 2))
        for ours, theirs in zip(batches(part), whole, strict=True):
            rows = slice(0, len(ours[0][0])) if shard == 0 else slice(-len(ours[0][0]), None)
            assert torch.equal(ours[0], theirs[0][1:, rows])


def test_old_draws_stay_as_they_were():
    old = DeviceLoader(random_images(9), np.arange(9), (0.5,) * 3, (0.2,) * 3, LoaderOptions(9, FULL, views=1))
    plain = dataclasses.replace(FULL, policy="none", erasing=0.0)
    new = DeviceLoader(random_images(9), np.arange(9), (0.5,) * 3, (0.2,) * 3, LoaderOptions(9, plain, views=1))
    (order, draws, _), (other, fewer, none) = old._draw_epoch(3, FULL), new._draw_epoch(3, plain)
    assert none is None
    assert torch.equal(order, other)
    assert all(torch.equal(draws[name], value) for name, value in fewer.items())


@pytest.mark.parametrize("policy", ["randaugment", "trivialaugment"])
@pytest.mark.parametrize("varied", [False, True])
def test_files_are_augmented_by_their_workers(policy, varied, tmp_path):
    folder = write_images(tmp_path)
    data = load_set(f"folder:{folder}", image_size=16, pipeline="files")

    def epoch(augmentation):
        options = LoaderOptions(5, augmentation, views=2, seed=5)
        return next(FileLoader(data.x_train, data.y_train, (0.0,) * 3, (1.0,) * 3, options).epoch(1))[0]

    plain = Augmentation(flip=varied, resized_crop=varied)
    augmented = dataclasses.replace(plain, policy=policy, erasing=1.0)
    assert torch.equal(epoch(augmented), epoch(augmented))
    assert not torch.equal(epoch(augmented)[0], epoch(augmented)[1])
    assert (epoch(augmented) == 0).any()
    assert not torch.equal(epoch(dataclasses.replace(plain, policy=policy)), epoch(plain))


@pytest.mark.parametrize("topology", ["networks", "branches"])
def test_a_run_resumes_exactly_and_says_what_it_draws(topology, tmp_path):
    common = {"method": "kdcl", "topology": topology, "peers": 2, "checkpoint_every_steps": 1, "epochs": 2}
    common |= {"auto_augment": "randaugment", "random_erasing": 0.3}
    train(tiny(out=str(tmp_path / "whole"), **common))
    with pytest.raises(KeyboardInterrupt):
        train(tiny(out=str(tmp_path / "stopped"), **common), StopAt(1, 2))
    train(tiny(out=str(tmp_path / "stopped"), resume="auto", **common))
    assert (tmp_path / "whole/metrics.jsonl").read_text() == (tmp_path / "stopped/metrics.jsonl").read_text()
    said = read_json(tmp_path / "whole/result.json")["augmentation"]
    assert said.endswith("randaugment + random erasing 0.3")


def test_a_mask_has_the_rectangles_place():
    draws = {"erase_top": 1, "erase_left": 2, "erase_height": 2, "erase_width": 1}
    mask = outside_rectangle({name: torch.tensor([[value]]) for name, value in draws.items()}, 4, 5)
    assert mask.shape == (1, 1, 4, 5, 1)
    assert [tuple(place) for place in (~mask)[0, 0, ..., 0].nonzero().tolist()] == [(1, 2), (2, 2)]
