"""Batches of uint8 images and labels, the same for any number of loader processes and after any resume.

Images stay uint8 until `normalize`, as the integer graph takes uint8. Small images are decoded once and kept in memory.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from utils.errors import UserError
from utils.image_sources import DIGITS, ImageSource, open_source
from utils.preprocess import Preprocess
from utils.seeded import permutation
from utils.transforms import shift_and_flip, to_augmented_tensor, to_tensor

CACHE_LIMIT = 2 << 30  # bytes of decoded images kept in memory
STREAM_ORDER, STREAM_SUBSET = 11, 12

Batch = tuple[torch.Tensor, torch.Tensor]


class ImageDataset(Dataset):
    """Labelled images of one split, transformed: item i is (uint8 [C, S, S], label).

    classes: names; labels: int64 [N]; seed and epoch: where augmentation takes its random numbers from.
    """

    def __init__(
        self, source: ImageSource, preprocess: Preprocess, augment: bool, seed: int, members: np.ndarray | None = None
    ) -> None:
        self.source = source
        self.preprocess = preprocess
        self.augment = augment
        self.seed = seed
        self.epoch = 0
        self.members = np.arange(len(source.labels)) if members is None else members
        self.classes = source.classes
        self.labels = source.labels[self.members]
        self._decoded: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.members)

    @property
    def cached(self) -> bool:
        """Whether all images are kept decoded in memory: those that need no resize, up to 2 GiB."""
        return self.preprocess.resize is None and len(self) * int(np.prod(self.preprocess.input_shape)) <= CACHE_LIMIT

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        number = int(self.members[index])
        image = self.source.read(number)
        try:
            if self.augment:
                flip = self.source.flippable
                tensor = to_augmented_tensor(image, self.preprocess, self.seed, self.epoch, number, flip)
            else:
                tensor = to_tensor(image, self.preprocess)
        except UserError as error:
            raise UserError(f"cannot use image {self.source.describe(number)}: {error}") from error
        return tensor, int(self.labels[index])

    def batch(self, indices: np.ndarray) -> Batch:
        """Items `indices` (int64 [N]) of a cached data set at once: uint8 [N, C, S, S] and int64 [N]."""
        images = self._all_images()[torch.from_numpy(indices)]
        if self.augment:
            images = shift_and_flip(images, self.seed, self.epoch, self.members[indices], self.source.flippable)
        return images, torch.from_numpy(self.labels[indices])

    def _all_images(self) -> torch.Tensor:
        """uint8 [len(self), C, S, S] without augmentation, decoded on first use."""
        if self._decoded is None:
            decoded = torch.empty((len(self), *self.preprocess.input_shape), dtype=torch.uint8)
            plain = ImageDataset(self.source, self.preprocess, False, self.seed, self.members)
            for index in tqdm(range(len(self)), desc="decoding images", unit="image", disable=None, leave=False):
                decoded[index] = plain[index][0]
            self._decoded = decoded
        return self._decoded


class SeededSampler:
    """Order of the images of an epoch, in batches; shuffled by (seed, epoch) or as they are.

    count: number of images. drop_last: leave out a last batch that is not full (never the only one).
    rank, world_size: each of `world_size` processes takes every world_size-th image; when shuffled, equally many.
    """

    def __init__(
        self,
        count: int,
        batch_size: int,
        shuffle: bool,
        seed: int = 0,
        drop_last: bool = False,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if batch_size < 1:
            raise UserError(f"the batch size is {batch_size}, expected at least 1")
        if count < world_size:
            raise UserError(f"got {count} images for {world_size} processes, expected at least one for each")
        self.count, self.batch_size, self.shuffle, self.seed = count, batch_size, shuffle, seed
        self.drop_last, self.rank, self.world_size = drop_last, rank, world_size
        self.epoch, self.start_batch = 0, 0

    def set_epoch(self, epoch: int, start_batch: int = 0) -> None:
        """Select the epoch and the batch to start from (0: the first) for the next iteration."""
        self.epoch, self.start_batch = epoch, start_batch

    def _own_images(self) -> np.ndarray:
        if not self.shuffle:
            return np.arange(self.rank, self.count, self.world_size)
        order = permutation(self.count, self.seed, STREAM_ORDER, self.epoch)
        return order[self.rank :: self.world_size][: self.count // self.world_size]

    def __len__(self) -> int:
        """Batches of a whole epoch, whatever the start."""
        images = len(range(self.rank, self.count, self.world_size))
        images = self.count // self.world_size if self.shuffle else images
        return max(1, images // self.batch_size) if self.drop_last else -(-images // self.batch_size)

    def __iter__(self) -> Iterator[np.ndarray]:
        """int64 [batch] of image numbers for each batch from the start on."""
        images = self._own_images()
        for number in range(self.start_batch, len(self)):
            yield images[number * self.batch_size : (number + 1) * self.batch_size]


class Loader:
    """Iterate to get batches (uint8 [N, C, S, S], int64 [N]); `len` is the number of batches of a whole epoch.

    Cached data sets are served from memory, others by `workers` processes. Raises UserError, naming the file, while
    iterating when an image cannot be used, from worker processes too.
    """

    def __init__(self, dataset: ImageDataset, sampler: SeededSampler, workers: int = 0) -> None:
        if workers < 0:
            raise UserError(f"got {workers} loader processes, expected 0 or more")
        self.dataset = dataset
        self.sampler = sampler
        self.workers = min(workers, _usable_cores())

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes; label i is classes[i]."""
        return self.dataset.classes

    @property
    def batch_size(self) -> int:
        """Images per full batch."""
        return self.sampler.batch_size

    def set_epoch(self, epoch: int, start_batch: int = 0) -> None:
        """Select epoch (for order and augmentation) and first batch of the next iteration."""
        self.dataset.epoch = epoch
        self.sampler.set_epoch(epoch, start_batch)

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[Batch]:
        return self._from_memory() if self.dataset.cached else self._from_processes()

    def _from_memory(self) -> Iterator[Batch]:
        for indices in self.sampler:
            yield self.dataset.batch(indices)

    def _from_processes(self) -> Iterator[Batch]:
        batches = [indices.tolist() for indices in self.sampler]
        loader = DataLoader(
            _ErrorsAsItems(self.dataset),
            batch_sampler=batches,
            num_workers=self.workers,
            collate_fn=_collate,
            generator=torch.Generator(),  # else each pass would advance torch's global random state
        )
        for result in loader:
            if isinstance(result, UserError):
                raise result
            yield result


class _ErrorsAsItems(Dataset):
    """Hands a UserError over as an item, as torch would bury its sentence in a worker's traceback."""

    def __init__(self, dataset: ImageDataset) -> None:
        self.dataset = dataset

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int] | UserError:
        try:
            return self.dataset[index]
        except UserError as error:
            return UserError(str(error))


def _collate(items: list[tuple[torch.Tensor, int] | UserError]) -> Batch | UserError:
    pairs = []
    for item in items:
        if isinstance(item, UserError):
            return item
        pairs.append(item)
    return torch.stack([image for image, _ in pairs]), torch.tensor([label for _, label in pairs])


def _usable_cores() -> int:
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on every system
        return os.cpu_count() or 1


def open_dataset(
    location: str | Path, split: str, preprocess: Preprocess, augment: bool = False, seed: int = 0
) -> ImageDataset:
    """Images of a split ("train" or "val") of `location` (see `open_source`), transformed for a network.

    augment: random crops and flips, numbered by (seed, epoch, image); otherwise the evaluation transform.
    Raises UserError as `open_source` does, and when the digits meet a network for other images.
    """
    if str(location) == DIGITS and preprocess.channels != 1:
        shape = "x".join(str(edge) for edge in preprocess.input_shape)
        raise UserError(f"the digits are grey 8x8 images, the network takes {shape}; use the architecture 'digits'")
    return ImageDataset(open_source(location, split), preprocess, augment, seed)


def make_loader(
    dataset: ImageDataset, batch_size: int, *, train: bool, workers: int = 0, rank: int = 0, world_size: int = 1
) -> Loader:
    """Loader for training (shuffled by the data set's seed, full batches) or evaluation (in order, every image)."""
    sampler = SeededSampler(len(dataset), batch_size, train, dataset.seed, train, rank, world_size)
    return Loader(dataset, sampler, workers)


def subset(
    dataset: ImageDataset, *, fraction: float | None = None, count: int | None = None, seed: int = 0
) -> ImageDataset:
    """A fixed random part of a data set, in its order: the same images for the same seed, size and data set.

    Give either fraction, in (0, 1], rounded to at least one image, or count, at least 1 (more than there are: all).
    """
    if (fraction is None) == (count is None):
        raise ValueError("give either fraction or count")
    if fraction is not None and not 0 < fraction <= 1:
        raise UserError(f"the part of the images is {fraction}, expected more than 0 and at most 1")
    if count is not None and count < 1:
        raise UserError(f"the number of images is {count}, expected at least 1")
    wanted = max(1, round(fraction * len(dataset))) if fraction is not None else min(count or 1, len(dataset))
    chosen = np.sort(permutation(len(dataset), seed, STREAM_SUBSET)[:wanted])
    return ImageDataset(dataset.source, dataset.preprocess, dataset.augment, dataset.seed, dataset.members[chosen])


def check_classes(dataset: ImageDataset, num_classes: int, location: str | Path) -> None:
    """Raise UserError if the images have another number of classes than the network."""
    if len(dataset.classes) != num_classes:
        raise UserError(
            f"{location} has {len(dataset.classes)} classes, the network {num_classes}; "
            "use other images or another number of classes"
        )


def check_same_classes(train: ImageDataset, val: ImageDataset, location: str | Path) -> None:
    """Raise UserError, naming a class, if the two splits of `location` do not have the same classes."""
    different = sorted(set(train.classes) ^ set(val.classes))
    if different:
        place = "train/" if different[0] in train.classes else "val/"
        raise UserError(
            f"{location} has different classes in train/ and val/: {different[0]!r} is only in {place}; make them equal"
        )


def normalize(images: torch.Tensor, preprocess: Preprocess) -> torch.Tensor:
    """(v / 255 - mean) / std per channel: uint8 [N, C, H, W] -> float32, on the device of the images.

    Three separate float32 operations, bit for bit those of torchvision's ToTensor and Normalize on a CPU. (By a number
    instead of a tensor, a GPU would divide through a rounded reciprocal.)
    """
    mean = torch.tensor(preprocess.mean, dtype=torch.float32, device=images.device).view(-1, 1, 1)
    std = torch.tensor(preprocess.std, dtype=torch.float32, device=images.device).view(-1, 1, 1)
    largest = torch.full_like(mean, 255.0)
    return images.to(torch.float32).div(largest).sub(mean).div(std)
