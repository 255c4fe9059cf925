"""The published table: complete, and read as it stands."""

import json

import pytest

from utils.models import create_model
from utils.quantization_utils.backends import BACKENDS
from utils.quantization_utils.ptq_recipe import parse_recipe
from utils.quantization_utils.published_ptq import ALIASES, TABLE, combinations, networks, published, source


def test_every_row_has_every_network_and_a_recipe_that_exists():
    table = json.loads(TABLE.read_text())
    keys = {(row["calibrator"], row["backend"], row["bits"]) for row in table["rows"]}
    assert len(keys) == len(table["rows"]) == 9
    for row in table["rows"]:
        parse_recipe(row["calibrator"])
        assert row["backend"] in BACKENDS
        assert len(row["top1"]) == len(table["float"][row["backend"]]) == len(networks()) == 5
    assert "279c5a9" in source()


@pytest.mark.parametrize(
    ("arch", "backend", "bits", "calibrator", "drop"),
    [
        ("mobilenetv2_w1", "academic", "w4a8", "minmax/ema", 47.92),
        ("mobilenetv2_w1", "academic", "w4a8", "mse/ema_mse+adaround", 0.86),
        ("resnet50", "tensorrt", "w8a8", "minmax/ema", 1.22),
        ("resnet18", "tensorrt", "w8a8", "mse/ema_mse", 0.08),
        ("regnetx_800m", "academic", "w8a8", "minmax/ema", -0.02),
        ("regnetx008", "academic", "w8a8", "minmax/ema", -0.02),
    ],
)
def test_drops(arch, backend, bits, calibrator, drop):
    found = published(arch, backend, bits, calibrator)
    assert round(found.float_top1 - found.top1, 2) == drop


def test_what_is_not_in_the_table():
    assert published("resnet20_cifar10", "academic", "w8a8", "minmax/ema") is None
    assert published("resnet18", "hawq", "w8a8", "minmax/ema") is None
    assert published("resnet18", "academic", "w4a4", "minmax/ema") is None
    assert combinations("tensorrt") == [("minmax/ema", "w8a8"), ("mse/ema_mse", "w8a8")]
    assert combinations("hawq") == combinations("academic")
    assert len(combinations("academic")) == 7


@pytest.mark.parametrize("arch", networks())
def test_names_of_networks_exist(arch):
    assert create_model(ALIASES.get(arch, arch)).num_classes == 1000
