"""Image trees, CIFAR files and digits, and one sentence naming the path for each way a tree can be wrong."""

import hashlib
import pickle
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits
from torchvision.datasets import CIFAR10, ImageFolder

from utils.errors import UserError
from utils.image_sources import ArraySource, FolderSource, open_source


def write_image(path: Path, value: int, size: int = 8) -> None:
    """A PNG of one grey level."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (size, size), (value, value, value)).save(path)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """val/ and train/ with the classes ant, bee, cat of 1, 2, 3 images; the first of cat is in a folder of its own."""
    for split in ("train", "val"):
        for number, name in enumerate(("cat", "ant", "bee")):
            for image in range({"ant": 1, "bee": 2, "cat": 3}[name]):
                below = "deep/" if (name, image) == ("cat", 0) else ""
                write_image(tmp_path / split / name / f"{below}{image}.png", 10 * number + image)
    return tmp_path


def test_tree_equals_torchvision(tree: Path) -> None:
    (tree / "val" / "ant" / ".DS_Store").write_bytes(b"x")
    (tree / "val" / "ant" / "Thumbs.db").write_bytes(b"x")
    source = open_source(tree, "val")
    theirs = ImageFolder(tree / "val")
    assert isinstance(source, FolderSource)
    assert source.classes == tuple(theirs.classes) == ("ant", "bee", "cat")
    assert list(zip(source.paths, source.labels.tolist(), strict=True)) == theirs.samples
    for index, (image, _) in enumerate(theirs):
        assert source.read(index).tobytes() == image.tobytes()


def test_only_the_split_asked_for_is_opened(tree: Path) -> None:
    for path in sorted((tree / "train").rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    (tree / "train").rmdir()
    assert len(open_source(str(tree), "val").labels) == 6
    with pytest.raises(UserError, match=re.escape(f"{tree} has no folder train/")):
        open_source(tree, "train")


def empty_val(tree: Path) -> None:
    """val/ without anything."""
    for path in sorted((tree / "val").rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()


def flat_val(tree: Path) -> None:
    """val/ with images but no class folders, as ImageNet is distributed."""
    empty_val(tree)
    write_image(tree / "val" / "1.png", 1)
    write_image(tree / "val" / "2.png", 1)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (empty_val, "{tree}/val has no images, expected one folder per class"),
        (flat_val, "{tree}/val has 2 files and no class folders"),
        (lambda tree: (tree / "val" / "dog").mkdir(), "the class folder {tree}/val/dog is empty"),
        (lambda tree: (tree / "val/ant/notes.txt").write_text("x"), "{tree}/val/ant/notes.txt is not an image file"),
    ],
    ids=["empty", "flat", "empty class", "no image"],
)
def test_wrong_trees(tree: Path, spoil: Callable[[Path], object], message: str) -> None:
    spoil(tree)
    with pytest.raises(UserError, match=re.escape(message.format(tree=tree))) as caught:
        open_source(tree, "val")
    assert "\n" not in str(caught.value)


def test_missing_folder_file_and_nested_folder(tree: Path) -> None:
    with pytest.raises(UserError, match=re.escape(f"{tree}/none does not exist")):
        open_source(tree / "none", "val")
    with pytest.raises(UserError, match="is a file"):
        open_source(tree / "val/ant/0.png", "val")


def test_a_folder_around_the_tree_is_recognised(tree: Path) -> None:
    inner = tree / "outer" / "images"
    inner.mkdir(parents=True)
    for split in ("train", "val"):
        (tree / split).rename(inner / split)
    with pytest.raises(UserError, match=re.escape(f"did you mean {inner}?")):
        open_source(inner.parent, "val")


@pytest.mark.parametrize("content", [b"", b"no image", None], ids=["empty", "text", "cut"])
def test_damaged_images_are_named(tree: Path, content: bytes | None) -> None:
    path = tree / "val" / "bee" / "1.png"
    path.write_bytes(path.read_bytes()[:45] if content is None else content)
    source = open_source(tree, "val")
    with pytest.raises(UserError, match=re.escape(f"cannot decode the image {path}")):
        source.read(2)


def test_digits() -> None:
    train, val = open_source("digits", "train"), open_source("digits", "val")
    assert isinstance(train, ArraySource)
    assert isinstance(val, ArraySource)
    assert (len(train.labels), len(val.labels)) == (1437, 360)
    data = load_digits()
    expected = {
        (bytes(round(v * 255 / 16) for v in image.flat), label)
        for image, label in zip(data.images, data.target, strict=True)
    }
    got = [
        (pixels.tobytes(), label)
        for part in (train, val)
        for pixels, label in zip(part.pixels, part.labels, strict=True)
    ]
    assert set(got) == expected
    assert len(got) == len(data.target)
    shares = np.bincount(val.labels) / np.bincount(data.target)
    assert np.all(np.abs(shares - 360 / 1797) < 0.01)
    assert not train.flippable
    assert train.read(5).size == (8, 8)


def write_cifar(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, np.ndarray]:
    """CIFAR-10 files with two images each, and torchvision told their checksums."""
    folder.mkdir()
    random = np.random.default_rng(0)
    pixels = {}
    checksums = {}
    for name in [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]:
        pixels[name] = random.integers(0, 256, (2, 3072), dtype=np.uint8)
        content = pickle.dumps({"data": pixels[name], "labels": [3, 7]})
        (folder / name).write_bytes(content)
        checksums[name] = hashlib.md5(content).hexdigest()
    meta = pickle.dumps({"label_names": [f"class{i}" for i in range(10)]})
    (folder / "batches.meta").write_bytes(meta)
    monkeypatch.setattr(CIFAR10, "train_list", [[n, s] for n, s in checksums.items() if n != "test_batch"])
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", checksums["test_batch"]]])
    entry = {"filename": "batches.meta", "key": "label_names", "md5": hashlib.md5(meta).hexdigest()}
    monkeypatch.setattr(CIFAR10, "meta", entry)
    return pixels


def test_published_cifar_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "cifar-10-batches-py"
    pixels = write_cifar(folder, monkeypatch)
    for location in (tmp_path, folder):
        train, val = open_source(location, "train"), open_source(location, "val")
        assert len(train.labels) == 10
        assert val.labels.tolist() == [3, 7]
        assert val.classes[3] == "class3"
        first = np.asarray(val.read(0)).transpose(2, 0, 1)
        assert np.array_equal(first, pixels["test_batch"][0].reshape(3, 32, 32))


def test_changed_cifar_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "cifar-10-batches-py"
    write_cifar(folder, monkeypatch)
    (folder / "data_batch_2").write_bytes(b"changed")
    with pytest.raises(UserError, match=re.escape(f"{folder} is incomplete or damaged")):
        open_source(tmp_path, "train")
