"""The images of a run: what is opened, and which of them calibrate."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from utils.data_utils import normalize
from utils.digits_net import DIGITS_PREPROCESS
from utils.errors import UserError
from utils.preprocess import Preprocess
from utils.run_data import CALIBRATION_BATCH, Data, DataFlags, inputs, load_data

DIGITS = DataFlags("digits", batch_size=100, workers=0, seed=3)
SMALL = Preprocess(resize=None, input_size=8)


def members(data: Data) -> set[int]:
    assert data.calibration is not None
    return set(data.calibration.dataset.members.tolist())


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for split, count in (("train", 3), ("val", 2)):
        for name in ("a", "b"):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(count):
                Image.fromarray(np.full((8, 8, 3), i, np.uint8)).save(tmp_path / split / name / f"{i}.png")
    return tmp_path


def test_only_what_is_needed_is_opened() -> None:
    data = load_data(DIGITS, DIGITS_PREPROCESS, 10, train=False, calibration=0)
    assert (data.train, data.calibration, data.lacks_train) == (None, None, False)
    assert data.sizes() == "360 validation"


def test_calibration_images_are_the_same_with_and_without_training() -> None:
    flags = DataFlags("digits", 100, 0, 3, share=0.5)
    trained = load_data(flags, DIGITS_PREPROCESS, 10, train=True, calibration=50)
    alone = load_data(flags, DIGITS_PREPROCESS, 10, train=False, calibration=50)
    assert members(trained) == members(alone)
    assert trained.train is not None
    assert members(trained) <= set(trained.train.dataset.members.tolist())
    assert trained.sizes() == f"{round(0.5 * 1437)} train, 360 validation, 50 calibration"


def test_calibration_images_are_not_augmented() -> None:
    data = load_data(DIGITS, DIGITS_PREPROCESS, 10, train=True, calibration=20)
    assert data.calibration is not None
    assert data.calibration.batch_size == min(100, CALIBRATION_BATCH)
    (first, _), *_ = data.calibration
    data.calibration.set_epoch(5)
    (again, _), *_ = data.calibration
    assert torch.equal(first, again)


def test_validation_images_calibrate_where_there_are_no_others(tree: Path) -> None:
    flags = DataFlags(str(tree), 4, 0, 0)
    with_train = load_data(flags, SMALL, 2, train=False, calibration=4)
    assert not with_train.lacks_train
    for path in sorted((tree / "train").rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    with pytest.raises(UserError, match="train has no images"):
        load_data(flags, SMALL, 2, train=False, calibration=4)
    (tree / "train").rmdir()
    assert load_data(flags, SMALL, 2, train=False, calibration=4).lacks_train
    with pytest.raises(UserError, match="has no folder train/"):
        load_data(flags, SMALL, 2, train=True, calibration=4)


def test_large_images_come_in_small_batches(tree: Path) -> None:
    large = load_data(DataFlags(str(tree), 128, 0, 0), Preprocess(), 2, train=False, calibration=0)
    small = load_data(DataFlags(str(tree), 128, 0, 0), SMALL, 2, train=False, calibration=0)
    assert (large.val.batch_size, small.val.batch_size) == (64, 128)


def test_inputs_are_normalised_images() -> None:
    data = load_data(DIGITS, DIGITS_PREPROCESS, 10, train=False, calibration=0)
    found = list(inputs(data.val, 2, DIGITS_PREPROCESS, torch.device("cpu"), "test"))
    expected = [normalize(images, DIGITS_PREPROCESS) for images, _ in data.val][:2]
    assert len(found) == 2
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
