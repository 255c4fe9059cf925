"""Data sets, samplers and loaders: the same batches for any number of workers and after any resume."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from utils.data_utils import (
    ImageDataset,
    Loader,
    SeededSampler,
    check_classes,
    check_same_classes,
    make_loader,
    open_dataset,
    subset,
)
from utils.digits_net import DIGITS_PREPROCESS
from utils.errors import UserError
from utils.preprocess import Preprocess

SMALL = Preprocess(resize=None, input_size=16)
LARGE = Preprocess(resize=18, input_size=16)
CLASSES, PER_CLASS = 3, 7


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random 16x16 images in three classes of seven, the same in train/ and val/."""
    folder = tmp_path_factory.mktemp("tree")
    pixels = np.random.default_rng(0).integers(0, 256, (CLASSES, PER_CLASS, 16, 16, 3), dtype=np.uint8)
    for split in ("train", "val"):
        for label in range(CLASSES):
            (folder / split / f"class{label}").mkdir(parents=True)
            for number in range(PER_CLASS):
                image = Image.fromarray(pixels[label, number])
                image.save(folder / split / f"class{label}" / f"{number}.png")
    return folder


def joined(loader: Loader) -> tuple[torch.Tensor, torch.Tensor]:
    """All batches of a loader in one."""
    batches = list(loader)
    return torch.cat([images for images, _ in batches]), torch.cat([labels for _, labels in batches])


@pytest.mark.parametrize("preprocess", [SMALL, LARGE], ids=["cached", "files"])
@pytest.mark.parametrize("train", [False, True])
def test_batches_equal_items(tree: Path, preprocess: Preprocess, train: bool) -> None:
    dataset = open_dataset(tree, "train", preprocess, augment=train, seed=5)
    loader = make_loader(dataset, 4, train=train)
    loader.set_epoch(3)
    images, labels = joined(loader)
    assert images.dtype == torch.uint8
    assert labels.dtype == torch.int64
    order = np.concatenate(list(loader.sampler))
    for position, index in enumerate(order):
        image, label = dataset[int(index)]
        assert torch.equal(images[position], image)
        assert labels[position] == label == dataset.labels[index]


@pytest.mark.parametrize("train", [False, True])
def test_workers_do_not_matter(tree: Path, train: bool) -> None:
    dataset = open_dataset(tree, "train", LARGE, augment=train)
    results = [joined(make_loader(dataset, 4, train=train, workers=workers)) for workers in (0, 1, 2)]
    for images, labels in results[1:]:
        assert torch.equal(images, results[0][0])
        assert torch.equal(labels, results[0][1])


@pytest.mark.parametrize("preprocess", [SMALL, LARGE], ids=["cached", "files"])
def test_loading_leaves_the_global_generator_alone(tree: Path, preprocess: Preprocess) -> None:
    before = torch.get_rng_state()
    joined(make_loader(open_dataset(tree, "train", preprocess, augment=True), 4, train=True))
    assert torch.equal(torch.get_rng_state(), before)


def test_workers_see_the_epoch(tree: Path) -> None:
    dataset = open_dataset(tree, "train", LARGE, augment=True)
    loader = make_loader(dataset, 21, train=True, workers=1)
    epochs = []
    for epoch in (0, 1, 0):
        loader.set_epoch(epoch)
        epochs.append(joined(loader)[0])
    assert torch.equal(epochs[0], epochs[2])
    assert not torch.equal(epochs[0].sort(0).values, epochs[1].sort(0).values)


@pytest.mark.parametrize("preprocess", [SMALL, LARGE], ids=["cached", "files"])
def test_resume_in_the_middle_of_an_epoch(tree: Path, preprocess: Preprocess) -> None:
    loader = make_loader(open_dataset(tree, "train", preprocess, augment=True), 4, train=True)
    loader.set_epoch(2)
    whole = list(loader)
    assert len(whole) == len(loader) == 5
    loader.set_epoch(2, start_batch=3)
    rest = list(loader)
    assert len(loader) == 5
    assert len(rest) == 2
    for (images, labels), (expected_images, expected_labels) in zip(rest, whole[3:], strict=True):
        assert torch.equal(images, expected_images)
        assert torch.equal(labels, expected_labels)


def test_evaluation_is_every_image_in_order(tree: Path) -> None:
    loader = make_loader(open_dataset(tree, "val", SMALL), 4, train=False)
    _, labels = joined(loader)
    assert labels.tolist() == sorted(list(range(CLASSES)) * PER_CLASS)
    assert len(loader) == 6
    assert loader.classes == ("class0", "class1", "class2")
    assert loader.batch_size == 4


def test_sampler_shuffles_by_seed_and_epoch() -> None:
    sampler = SeededSampler(103, 10, shuffle=True, seed=1)
    first = np.concatenate(list(sampler))
    assert sorted(first.tolist()) == list(range(103))
    sampler.set_epoch(1)
    assert np.concatenate(list(sampler)).tolist() != first.tolist()
    other = SeededSampler(103, 10, shuffle=True, seed=2)
    assert np.concatenate(list(other)).tolist() != first.tolist()


def test_sampler_drops_the_last_batch_but_never_the_only_one() -> None:
    sampler = SeededSampler(103, 10, shuffle=True, drop_last=True)
    assert [len(batch) for batch in sampler] == [10] * 10
    only = SeededSampler(7, 10, shuffle=True, drop_last=True)
    assert len(only) == 1
    assert [len(batch) for batch in only] == [7]


@pytest.mark.parametrize("shuffle", [True, False])
def test_processes_share_the_images(shuffle: bool) -> None:
    samplers = [SeededSampler(103, 10, shuffle, rank=rank, world_size=4) for rank in range(4)]
    parts = [np.concatenate(list(sampler)).tolist() for sampler in samplers]
    everything = [index for part in parts for index in part]
    assert len(set(everything)) == len(everything)
    assert [len(part) for part in parts] == ([25] * 4 if shuffle else [26, 26, 26, 25])
    assert [len(list(sampler)) for sampler in samplers] == [len(sampler) for sampler in samplers]


@pytest.mark.parametrize("request_", [{"fraction": 0.3}, {"count": 6}])
def test_subset_is_fixed_sorted_and_seeded(tree: Path, request_: dict[str, float]) -> None:
    dataset = open_dataset(tree, "train", SMALL)
    part = subset(dataset, seed=1, **request_)  # type: ignore[arg-type]
    assert len(part) == 6
    assert part.members.tolist() == sorted(set(part.members.tolist()))
    assert part.members.tolist() == subset(dataset, seed=1, **request_).members.tolist()  # type: ignore[arg-type]
    assert part.members.tolist() != subset(dataset, seed=2, **request_).members.tolist()  # type: ignore[arg-type]
    for index, member in enumerate(part.members):
        assert torch.equal(part[index][0], dataset[int(member)][0])
        assert part[index][1] == dataset[int(member)][1]
    assert torch.equal(part.batch(np.array([4, 2]))[0][1], part[2][0])


def test_subset_of_a_subset_keeps_its_augmentation(tree: Path) -> None:
    whole = open_dataset(tree, "train", SMALL, augment=True)
    part = subset(whole, count=5, seed=3)
    images, _ = part.batch(np.arange(5))
    for image, member in zip(images, part.members, strict=True):
        assert torch.equal(image, whole[int(member)][0])


def test_subset_limits(tree: Path) -> None:
    dataset = open_dataset(tree, "train", SMALL)
    assert len(subset(dataset, count=1000)) == 21
    assert len(subset(dataset, fraction=1e-6)) == 1
    with pytest.raises(UserError, match="part of the images is 0, expected more than 0"):
        subset(dataset, fraction=0)
    with pytest.raises(UserError, match=r"part of the images is 1\.5"):
        subset(dataset, fraction=1.5)
    with pytest.raises(UserError, match="number of images is 0"):
        subset(dataset, count=0)
    with pytest.raises(ValueError, match="either fraction or count"):
        subset(dataset)


def test_digits_in_batches() -> None:
    loader = make_loader(open_dataset("digits", "train", DIGITS_PREPROCESS, augment=True), 128, train=True)
    images, labels = next(iter(loader))
    assert images.shape == (128, 1, 8, 8)
    assert labels.shape == (128,)
    with pytest.raises(UserError, match="the digits are grey 8x8 images, the network takes 3x16x16"):
        open_dataset("digits", "train", SMALL)


@pytest.fixture
def damaged(tree: Path, tmp_path: Path) -> tuple[Path, Path]:
    """(copy of val/ with one image cut short, path of that image)."""
    for path in (tree / "val").rglob("*.png"):
        copy = tmp_path / path.relative_to(tree)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    bad = tmp_path / "val" / "class1" / "3.png"
    bad.write_bytes(bad.read_bytes()[:100])
    return tmp_path, bad


@pytest.mark.parametrize("preprocess", [SMALL, LARGE], ids=["cached", "files"])
@pytest.mark.parametrize("workers", [0, 2])
def test_damaged_images_are_named_from_workers_too(
    damaged: tuple[Path, Path], preprocess: Preprocess, workers: int
) -> None:
    folder, bad = damaged
    loader = make_loader(open_dataset(folder, "val", preprocess), 4, train=False, workers=workers)
    with pytest.raises(UserError, match=re.escape(str(bad))) as caught:
        joined(loader)
    assert "\n" not in str(caught.value)


def test_images_of_another_size_are_named(tree: Path) -> None:
    dataset = open_dataset(tree, "val", Preprocess(resize=None, input_size=8))
    with pytest.raises(UserError, match=r"class0.0\.png: the image is 16x16 pixels, the network takes 8x8"):
        joined(make_loader(dataset, 4, train=False))


def test_class_counts(tree: Path) -> None:
    dataset = open_dataset(tree, "val", SMALL)
    check_classes(dataset, CLASSES, tree)
    with pytest.raises(UserError, match=re.escape(f"{tree} has 3 classes, the network 1000")):
        check_classes(dataset, 1000, tree)


def test_classes_of_both_splits(tree: Path) -> None:
    train, val = open_dataset(tree, "train", SMALL), open_dataset(tree, "val", SMALL)
    check_same_classes(train, val, tree)
    renamed = ImageDataset(train.source, SMALL, False, 0)
    renamed.classes = ("class0", "class1", "klass2")
    with pytest.raises(UserError, match="'class2' is only in val/"):
        check_same_classes(renamed, val, tree)


def test_senseless_loader_settings(tree: Path) -> None:
    dataset = open_dataset(tree, "val", SMALL)
    with pytest.raises(UserError, match="batch size is 0"):
        make_loader(dataset, 0, train=False)
    with pytest.raises(UserError, match="got -1 loader processes"):
        make_loader(dataset, 4, train=False, workers=-1)
    with pytest.raises(UserError, match="got 21 images for 22 processes"):
        make_loader(dataset, 4, train=True, world_size=22)
    with pytest.raises(ValueError, match="split 'test'"):
        open_dataset(tree, "test", SMALL)
