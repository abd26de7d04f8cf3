"""Batches and their augmentation, against loops over samples and pixels."""

import numpy as np
import pytest
import torch

from codistill.data import DeviceLoader
from codistill.data.device_loader import augment
from codistill.data.loader import Augmentation, LoaderOptions
from helpers.images import pixel_loader, random_images, slow_crop, slow_square, whole_epoch

# ----------------------------------------------------------------------------------------------------------------------
# Augmentation


@pytest.mark.parametrize("views", [1, 3])
@pytest.mark.parametrize(("pad", "flip"), [(2, True), (1, False), (0, True)])
def test_augment_equals_augmenting_one_image_at_a_time(views, pad, flip):
    images = random_images(9, size=6, channels=2)
    rng = torch.Generator().manual_seed(1)
    draws = {}
    if pad:
        draws["top"] = torch.randint(2 * pad + 1, (views, 9), generator=rng)
        draws["left"] = torch.randint(2 * pad + 1, (views, 9), generator=rng)
    if flip:
        draws["flip"] = torch.randint(2, (views, 9), generator=rng).bool()
    result = augment(torch.from_numpy(images), draws, Augmentation(pad=pad, flip=flip))
    assert result.dtype == torch.uint8
    assert result.shape == (views, 9, 6, 6, 2)
    for v in range(views):
        for b in range(9):
            top, left, flipped = (int(draws[k][v, b]) if k in draws else 0 for k in ("top", "left", "flip"))
            assert result[v, b].tolist() == slow_crop(images[b].tolist(), top, left, flipped, pad), (v, b)


@pytest.mark.parametrize("views", [1, 3])
def test_training_images_are_crops_at_every_position(views):
    pad, images = 1, random_images(60, channels=1)
    pixels, labels = whole_epoch(pixel_loader(images, Augmentation(pad=pad, flip=True), views=views))
    assert pixels.shape == (views, 60, 1, 8, 8)
    found = []
    for place, label in enumerate(labels.tolist()):
        crops = {
            str(slow_crop(images[label].tolist(), top, left, flip, pad)): (top, left, flip)
            for top in range(3)
            for left in range(3)
            for flip in (False, True)
        }
        for v in range(views):
            pixel = pixels[v, place].permute(1, 2, 0).round().to(torch.int64)
            assert str(pixel.tolist()) in crops
            found.append(crops[str(pixel.tolist())])
    for axis, places in enumerate(({0, 1, 2}, {0, 1, 2}, {False, True})):
        assert {draw[axis] for draw in found} == places
    assert {top == left for top, left, _ in found} == {True, False}  # drawn apart
    assert {(top > 0) == flip for top, _, flip in found} == {True, False}


@pytest.mark.parametrize("side", [1, 3, 4])
@pytest.mark.parametrize("views", [1, 2])
def test_cutout_zeroes_one_square_per_view_at_every_center(side, views):
    size = 6
    images = np.full((400, size, size, 1), 255, dtype=np.uint8)
    loader = DeviceLoader(
        images,
        np.arange(400),
        (0.0,),
        (1.0,),
        LoaderOptions(batch_size=150, augmentation=Augmentation(cutout=side), views=views, dtype=torch.float64),
    )
    masks = {str(slow_square(size, y, x, side)): (y, x) for y in range(size) for x in range(size)}
    assert len(masks) == size * size
    pixels, _ = whole_epoch(loader)
    assert pixels.shape == (views, 400, 1, size, size)
    found = [masks[str(image.long().tolist())] for image in pixels.flatten(0, 2)]
    assert set(found) == {(y, x) for y in range(size) for x in range(size)}


def test_cutout_blanks_with_the_mean_colour_after_cropping():
    images = np.full((50, 8, 8, 1), 255, dtype=np.uint8)
    loader = DeviceLoader(
        images,
        np.arange(50),
        (0.25,),
        (0.5,),
        LoaderOptions(batch_size=50, augmentation=Augmentation(pad=2, cutout=3), dtype=torch.float64),
    )
    pixels, _ = whole_epoch(loader)
    # White is (1 - 0.25) / 0.5, black padding (0 - 0.25) / 0.5, and what is cut out is 0.
    assert sorted({round(float(v), 12) for v in pixels.flatten()}) == [-0.5, 0.0, 1.5]
    assert 4 <= int((pixels[0, 0] == 0).sum()) <= 9


def test_padding_is_black_before_normalising():
    images = np.full((40, 8, 8, 3), 255, dtype=np.uint8)
    mean, std = (0.25, 0.5, 0.1), (0.5, 0.2, 0.3)
    loader = DeviceLoader(images, np.arange(40), mean, std, LoaderOptions(40, Augmentation(pad=2), dtype=torch.float64))
    pixels, _ = whole_epoch(loader)
    for c in range(3):
        values = sorted({round(float(v), 10) for v in pixels[:, :, c].flatten()})
        assert values == pytest.approx([-mean[c] / std[c], (1 - mean[c]) / std[c]], abs=1e-9)


# ----------------------------------------------------------------------------------------------------------------------
# Batches


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 2e-6)])
@pytest.mark.parametrize("channels", [1, 3])
def test_normalization_is_scaled_pixels_minus_mean_over_std(dtype, tolerance, channels):
    images = random_images(5, channels=channels)
    mean, std = (0.5071, 0.4865, 0.4409)[:channels], (0.2673, 0.2564, 0.2762)[:channels]
    loader = DeviceLoader(images, np.arange(5), mean, std, LoaderOptions(2, dtype=dtype))
    pixels, _ = whole_epoch(loader)
    assert pixels.dtype == dtype
    for n in range(5):
        for c in range(channels):
            for i in range(8):
                for j in range(8):
                    expected = (int(images[n, i, j, c]) / 255 - mean[c]) / std[c]
                    assert float(pixels[0, n, c, i, j]) == pytest.approx(expected, abs=tolerance)


def test_without_augmentation_order_and_last_batch_are_kept():
    images = random_images(10)
    loader = pixel_loader(images, batch_size=4, views=3)
    batches = list(loader.epoch(5))
    assert len(loader) == len(batches) == 3
    assert [len(labels) for _, labels in batches] == [4, 4, 2]
    assert torch.cat([labels for _, labels in batches]).tolist() == list(range(10))
    pixels = torch.cat([views for views, _ in batches], 1)
    assert pixels.shape == (1, 10, 3, 8, 8)
    assert np.array_equal(pixels[0].permute(0, 2, 3, 1).round().numpy(), images)


FULL = Augmentation(pad=2, flip=True, cutout=3)


@pytest.mark.parametrize("epoch", [0, 1, 7])
def test_every_epoch_has_every_image_once_in_its_own_order(epoch):
    loader = pixel_loader(random_images(50), FULL)
    _, labels = whole_epoch(loader, epoch)
    assert sorted(labels.tolist()) == list(range(50))
    assert labels.tolist() != list(range(50))
    assert labels.tolist() != whole_epoch(loader, epoch + 1)[1].tolist()


def test_labels_stay_with_their_images():
    images = random_images(30)
    pixels, labels = whole_epoch(pixel_loader(images, Augmentation()))
    assert np.array_equal(pixels[0].permute(0, 2, 3, 1).round().numpy(), images[labels.numpy()])


def test_order_and_augmentation_depend_on_seed_and_epoch_alone():
    images = random_images(50)
    first = whole_epoch(pixel_loader(images, FULL, seed=3), 4)
    other = pixel_loader(images, FULL, seed=3, batch_size=9)
    torch.manual_seed(99)
    np.random.seed(99)
    whole_epoch(other, 2)
    next(other.epoch(4))
    before = torch.get_rng_state()
    second = whole_epoch(other, 4)
    assert torch.equal(torch.get_rng_state(), before)
    for a, b in zip(first, second):
        assert torch.equal(a, b)
    for changed in (whole_epoch(pixel_loader(images, FULL, seed=4), 4), whole_epoch(other, 5)):
        assert not torch.equal(changed[1], first[1])


def test_augmentation_is_drawn_anew_in_every_epoch():
    images = np.repeat(random_images(1), 40, 0)  # one image, so that the order cannot tell
    loader = pixel_loader(images, FULL)
    assert not torch.equal(whole_epoch(loader, 0)[0], whole_epoch(loader, 1)[0])


@pytest.mark.parametrize("augmentation", [None, FULL])
def test_an_epoch_started_at_batch_k_is_the_tail_of_the_epoch(augmentation):
    loader = pixel_loader(random_images(50), augmentation, batch_size=8, views=2)
    whole = list(loader.epoch(6))
    for start in range(len(whole) + 1):
        tail = list(loader.epoch(6, start=start))
        assert len(tail) == len(whole) - start
        for (views, labels), (expected_views, expected_labels) in zip(tail, whole[start:]):
            assert torch.equal(views, expected_views)
            assert torch.equal(labels, expected_labels)


def test_view_0_and_order_do_not_depend_on_the_number_of_views():
    images = random_images(50)
    one, labels = whole_epoch(pixel_loader(images, FULL), 2)
    for views in (2, 4):
        more, same_labels = whole_epoch(pixel_loader(images, FULL, views=views), 2)
        assert more.shape[0] == views
        assert torch.equal(more[0], one[0])
        assert torch.equal(same_labels, labels)


@pytest.mark.parametrize("augmentation", [Augmentation(pad=2), Augmentation(flip=True), Augmentation(cutout=3)])
def test_views_differ(augmentation):
    pixels, _ = whole_epoch(pixel_loader(random_images(50), augmentation, views=3))
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert not torch.equal(pixels[a], pixels[b])


@pytest.mark.parametrize("augmentation", [None, FULL])
@pytest.mark.parametrize("channels", [1, 3])
def test_both_memory_formats_hold_the_same_values(augmentation, channels):
    images = random_images(20, channels=channels)
    last = list(pixel_loader(images, augmentation, batch_size=8, views=2, channels_last=True).epoch(1))
    first = list(pixel_loader(images, augmentation, batch_size=8, views=2, channels_last=False).epoch(1))
    for (a, _), (b, _) in zip(last, first):
        assert torch.equal(a, b)
        assert b.is_contiguous()
        for view in a:
            assert view.is_contiguous(memory_format=torch.channels_last)
            if channels > 1:
                assert view.stride() == (8 * 8 * channels, 1, 8 * channels, channels)


def test_the_images_given_are_not_changed():
    images = random_images(20)
    before = images.copy()
    whole_epoch(pixel_loader(images, FULL, views=2))
    assert np.array_equal(images, before)
