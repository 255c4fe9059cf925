"""Images to uint8 tensors: the evaluation transform and augmentation whose random numbers are hashes of the image."""

import math

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F

from utils.errors import UserError
from utils.preprocess import Preprocess
from utils.seeded import integers, uniform

CROP_AREA = (0.08, 1.0)  # of RandomResizedCrop: part of the image's area
CROP_LOG_RATIO = (math.log(3 / 4), math.log(4 / 3))  # width / height
CROP_ATTEMPTS = 10
SHIFT_DIVISOR = 8  # small images are shifted by up to 1/8 of their edge: 4 pixels of 32, 1 of 8
STREAM_CROP, STREAM_FLIP, STREAM_ROW, STREAM_COLUMN = 1, 2, 3, 4


def to_tensor(image: Image.Image, preprocess: Preprocess) -> torch.Tensor:
    """Evaluation transform: resize the shortest edge, centre crop, optional turn by 180 degrees; uint8 [C, S, S].

    Without a resize the image must have the input size. Raises UserError (without the file name) if it has not.
    """
    size = preprocess.input_size
    image = _in_mode(image, preprocess)
    if preprocess.resize is None:
        return _turned(_exact(image, size), preprocess)
    image = F.resize(image, [preprocess.resize], InterpolationMode(preprocess.interpolation))
    return _turned(F.pil_to_tensor(F.center_crop(image, [size, size])), preprocess)


def to_augmented_tensor(
    image: Image.Image, preprocess: Preprocess, seed: int, epoch: int, index: int, flip: bool
) -> torch.Tensor:
    """Training transform: random resized crop (or random shift, without a resize) and flip; uint8 [C, S, S].

    index: number of the image in its data set. Raises UserError as `to_tensor` does.
    """
    if preprocess.resize is None:
        tensor = to_tensor(image, preprocess)
        return shift_and_flip(tensor[None], seed, epoch, np.array([index]), flip)[0]
    image = _in_mode(image, preprocess)
    top, left, height, width = random_crop_box(image.height, image.width, seed, epoch, index)
    edge = [preprocess.input_size, preprocess.input_size]
    image = F.resized_crop(image, top, left, height, width, edge, InterpolationMode(preprocess.interpolation))
    tensor = _turned(F.pil_to_tensor(image), preprocess)
    return tensor.flip(-1) if flip and uniform(seed, epoch, index, STREAM_FLIP)[0] < 0.5 else tensor


def random_crop_box(height: int, width: int, seed: int, epoch: int, index: int) -> tuple[int, int, int, int]:
    """(top, left, height, width) in pixels of the random resized crop of an image [height, width].

    Area uniform in 8..100 %, log of the aspect ratio uniform in 3/4..4/3, first of ten attempts that fits; else the
    largest centred box with an allowed ratio. Source: Szegedy et al., arXiv 1409.4842, section 6.
    """
    draws = uniform(seed, epoch, index, STREAM_CROP, np.arange(4 * CROP_ATTEMPTS)).reshape(CROP_ATTEMPTS, 4)
    area = height * width * (CROP_AREA[0] + draws[:, 0] * (CROP_AREA[1] - CROP_AREA[0]))
    ratio = np.exp(CROP_LOG_RATIO[0] + draws[:, 1] * (CROP_LOG_RATIO[1] - CROP_LOG_RATIO[0]))
    widths, heights = np.rint(np.sqrt(area * ratio)), np.rint(np.sqrt(area / ratio))
    fits = (widths >= 1) & (widths <= width) & (heights >= 1) & (heights <= height)
    if not fits.any():
        return _centred_box(height, width)
    first = int(np.argmax(fits))
    box_height, box_width = int(heights[first]), int(widths[first])
    top = int(draws[first, 2] * (height - box_height + 1))
    left = int(draws[first, 3] * (width - box_width + 1))
    return top, left, box_height, box_width


def _centred_box(height: int, width: int) -> tuple[int, int, int, int]:
    low, high = math.exp(CROP_LOG_RATIO[0]), math.exp(CROP_LOG_RATIO[1])
    box_width = min(width, max(1, round(height * high)))
    box_height = min(height, max(1, round(width / low)))
    return (height - box_height) // 2, (width - box_width) // 2, box_height, box_width


def shift_and_flip(images: torch.Tensor, seed: int, epoch: int, indices: np.ndarray, flip: bool) -> torch.Tensor:
    """Crop of each image at a random place after padding with 1/8 of the edge in zeros, and a random flip.

    images: uint8 [N, C, H, W]; indices: int64 [N], numbers of the images in their data set. Returns uint8 [N, C, H, W].
    """
    padding = images.shape[-1] // SHIFT_DIVISOR
    height, width = images.shape[-2:]
    padded = torch.nn.functional.pad(images, (padding, padding, padding, padding))
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)
    rows = torch.from_numpy(integers(2 * padding + 1, seed, epoch, indices, STREAM_ROW))
    columns = torch.from_numpy(integers(2 * padding + 1, seed, epoch, indices, STREAM_COLUMN))
    shifted = windows[torch.arange(len(images)), :, rows, columns]
    if flip:
        flipped = torch.from_numpy(uniform(seed, epoch, indices, STREAM_FLIP) < 0.5)
        shifted[flipped] = shifted[flipped].flip(-1)
    return shifted


def _in_mode(image: Image.Image, preprocess: Preprocess) -> Image.Image:
    return image.convert("RGB" if preprocess.channels == 3 else "L")


def _exact(image: Image.Image, size: int) -> torch.Tensor:
    if image.size != (size, size):
        got = f"{image.width}x{image.height}"
        raise UserError(f"the image is {got} pixels, the network takes {size}x{size}; give a resize to scale images")
    return F.pil_to_tensor(image)


def _turned(tensor: torch.Tensor, preprocess: Preprocess) -> torch.Tensor:
    return tensor.flip((-2, -1)) if preprocess.rotate180 else tensor
