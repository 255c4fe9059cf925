"""Preprocess: overriding, round trip and refusals."""

import json
from typing import Any

import pytest

from utils.errors import UserError
from utils.preprocess import Preprocess


def test_override_keeps_what_is_not_given() -> None:
    assert Preprocess().override() == Preprocess()
    changed = Preprocess().override(mean=[0.1, 0.2, 0.3], rotate180=True, interpolation="bicubic")
    assert changed == Preprocess(mean=(0.1, 0.2, 0.3), rotate180=True, interpolation="bicubic")


def test_override_of_one_number_is_for_all_channels() -> None:
    assert Preprocess().override(std=[0.5]).std == (0.5, 0.5, 0.5)


def test_a_new_input_size_scales_the_resize() -> None:
    assert Preprocess().override(input_size=112).resize == 128
    assert Preprocess().override(input_size=299).resize == 342
    assert Preprocess().override(input_size=112, resize=150).resize == 150


def test_resize_zero_is_no_resize() -> None:
    assert Preprocess().override(resize=0).resize is None
    assert Preprocess(resize=None).override(input_size=32).resize is None


def test_dict_survives_json() -> None:
    original = Preprocess(mean=(0.1,), std=(0.3,), resize=None, input_size=8, channels=1)
    assert Preprocess.from_dict(json.loads(json.dumps(original.as_dict()))) == original
    assert original.input_shape == (1, 8, 8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mean": (0.5, 0.5)}, r"mean is \[0.5, 0.5\], expected 3 finite numbers"),
        ({"std": (0.5, float("nan"), 1.0)}, "std is .* expected 3 finite numbers"),
        ({"std": (0.5, 0.0, 1.0)}, r"std is \[0.5, 0.0, 1.0\], expected positive"),
        ({"resize": 200}, "resize is 200, expected at least the input size 224"),
        ({"input_size": 0, "resize": None}, "input size is 0"),
        ({"channels": 2, "mean": (0.0, 0.0), "std": (1.0, 1.0)}, "got 2 image channels"),
        ({"interpolation": "cubic"}, "interpolation is 'cubic', expected one of bilinear, bicubic"),
    ],
)
def test_senseless_values_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Preprocess(**change)


def test_unknown_or_missing_entries_are_refused() -> None:
    values = Preprocess().as_dict()
    with pytest.raises(UserError, match="'colour'"):
        Preprocess.from_dict(values | {"colour": 1})
    del values["mean"]
    with pytest.raises(UserError, match=r"expected .*'mean'"):
        Preprocess.from_dict(values)
