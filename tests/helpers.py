"""What several tests need: the sentence of a refusal, a reconstruction stopped early, CIFAR-10 images as files."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from utils.errors import UserError
from utils.quantization_utils.reconstruct import LayerResult


def refusal(main: Callable[[Any], int], argv: Sequence[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line, ``error: ...``, that a command refuses its arguments with; its exit code must be 2."""
    capsys.readouterr()
    assert main(list(argv)) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    return error


def sentence_of(action: Callable[[], object]) -> str:
    """The one line of the UserError that an action must raise."""
    with pytest.raises(UserError) as caught:
        action()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def stop_after(count: int) -> Callable[[LayerResult], None]:
    """A ``progress`` of :func:`reconstruct` that interrupts it after so many units."""
    seen: list[LayerResult] = []

    def stop(result: LayerResult) -> None:
        seen.append(result)
        if len(seen) == count:
            raise KeyboardInterrupt

    return stop


def write_cifar(shared: Path, folder: Path, per_class: int | None = None) -> None:
    """Write the validation images of CIFAR-10 as JPEG files into folder/val: all, or some of each class."""
    archive = shared / "data" / "cifar10_val.npz"
    if not archive.exists():
        pytest.skip(f"the images {archive.name} are absent")
    with np.load(archive) as content:
        jpeg, offsets, labels = content["jpeg"], content["offsets"], content["labels"]
        names = [str(name) for name in content["classes"]]
    for label, name in enumerate(names):
        (folder / "val" / name).mkdir(parents=True)
        for i in np.flatnonzero(labels == label)[:per_class]:
            (folder / "val" / name / f"{i}.jpg").write_bytes(jpeg[offsets[i] : offsets[i + 1]].tobytes())
