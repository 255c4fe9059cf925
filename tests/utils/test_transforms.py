"""Transforms against torchvision's own, and augmentation against its definition."""

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import ks_2samp
from torchvision import transforms

from utils.data_utils import normalize
from utils.errors import UserError
from utils.preprocess import Preprocess
from utils.seeded import integers
from utils.transforms import (
    STREAM_COLUMN,
    STREAM_ROW,
    random_crop_box,
    shift_and_flip,
    to_augmented_tensor,
    to_tensor,
)


def picture(width: int, height: int, mode: str = "RGB") -> Image.Image:
    """A random image, the same for the same arguments."""
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(("width", "height"), [(60, 41), (41, 60), (33, 33)])
def test_evaluation_equals_torchvision(width: int, height: int, interpolation: str) -> None:
    preprocess = Preprocess(resize=36, input_size=32, interpolation=interpolation)
    image = picture(width, height)
    method = transforms.InterpolationMode(interpolation)
    theirs = transforms.Compose(
        [
            transforms.Resize(36, method),
            transforms.CenterCrop(32),
            transforms.ToTensor(),
            transforms.Normalize(preprocess.mean, preprocess.std),
        ]
    )
    ours = to_tensor(image, preprocess)
    assert ours.dtype == torch.uint8
    assert torch.equal(normalize(ours[None], preprocess)[0], theirs(image))


def test_rotation_is_of_the_cropped_image() -> None:
    image = picture(60, 41)
    plain, turned = Preprocess(resize=36, input_size=32), Preprocess(resize=36, input_size=32, rotate180=True)
    expected = torch.from_numpy(np.rot90(to_tensor(image, plain).numpy(), 2, axes=(1, 2)).copy())
    assert torch.equal(to_tensor(image, turned), expected)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK"])
def test_other_modes_become_rgb_or_grey(mode: str) -> None:
    image = picture(8, 8, mode)
    assert to_tensor(image, Preprocess(resize=None, input_size=8)).shape == (3, 8, 8)
    grey = Preprocess(mean=(0.5,), std=(0.5,), resize=None, input_size=8, channels=1)
    assert to_tensor(image, grey).shape == (1, 8, 8)


def test_without_a_resize_the_size_must_fit() -> None:
    with pytest.raises(UserError, match="the image is 9x8 pixels, the network takes 8x8"):
        to_tensor(picture(9, 8), Preprocess(resize=None, input_size=8))


def test_crop_boxes_are_inside_and_distributed_as_torchvisions() -> None:
    height, width, count = 100, 150, 3000
    ours = np.array([random_crop_box(height, width, 0, 0, index) for index in range(count)])
    assert (ours[:, 2:] >= 1).all()
    assert (ours[:, :2] >= 0).all()
    assert (ours[:, :2] + ours[:, 2:] <= (height, width)).all()
    sampler, image = transforms.RandomResizedCrop(32), picture(width, height)
    theirs = np.array([sampler.get_params(image, list(sampler.scale), list(sampler.ratio)) for _ in range(count)])
    for column in range(4):
        assert ks_2samp(ours[:, column], theirs[:, column]).pvalue > 1e-3
    assert ks_2samp(ours[:, 2] * ours[:, 3], theirs[:, 2] * theirs[:, 3]).pvalue > 1e-3
    assert ks_2samp(ours[:, 3] / ours[:, 2], theirs[:, 3] / theirs[:, 2]).pvalue > 1e-3


def test_crop_of_a_strip_is_centred() -> None:
    """No box of a strip 1000 x 10 has 8 % of its area and an allowed ratio: the widest allowed one is taken."""
    top, left, height, width = random_crop_box(10, 1000, 0, 0, 0)
    assert (top, height, width) == (0, 10, 13)
    assert left == (1000 - 13) // 2


def test_augmentation_depends_on_seed_epoch_and_image_only() -> None:
    preprocess, image = Preprocess(resize=36, input_size=32), picture(60, 41)
    first = to_augmented_tensor(image, preprocess, 1, 2, 3, True)
    assert first.shape == (3, 32, 32)
    assert torch.equal(first, to_augmented_tensor(image, preprocess, 1, 2, 3, True))
    for other in [(0, 2, 3), (1, 0, 3), (1, 2, 0)]:
        assert not torch.equal(first, to_augmented_tensor(image, preprocess, *other, True))


def test_shift_pads_with_zeros_and_flips_half() -> None:
    count, size = 400, 16
    images = torch.randint(1, 256, (count, 3, size, size), dtype=torch.uint8)
    indices = np.arange(count) + 7
    shifted = shift_and_flip(images, 3, 4, indices, flip=True)
    rows = integers(5, 3, 4, indices, STREAM_ROW) - 2
    columns = integers(5, 3, 4, indices, STREAM_COLUMN) - 2
    flips = 0
    for image, result, row, column in zip(images, shifted, rows, columns, strict=True):
        expected = torch.zeros_like(image)
        inside = image[:, max(row, 0) : size + min(row, 0), max(column, 0) : size + min(column, 0)]
        expected[:, max(-row, 0) : size + min(-row, 0), max(-column, 0) : size + min(-column, 0)] = inside
        flipped = torch.equal(result, expected.flip(-1))
        assert flipped or torch.equal(result, expected)
        flips += flipped
    assert abs(flips - count / 2) < 5 * (count / 4) ** 0.5


def test_shift_of_one_equals_shift_of_many() -> None:
    images = torch.randint(0, 256, (20, 1, 8, 8), dtype=torch.uint8)
    together = shift_and_flip(images, 1, 1, np.arange(20), flip=False)
    alone = [shift_and_flip(images[i : i + 1], 1, 1, np.array([i]), flip=False) for i in range(20)]
    assert torch.equal(together, torch.cat(alone))
