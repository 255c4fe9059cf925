"""The families' structure: which module gets which bits, under every published scheme."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch

import bit_config
from tests.utils.hawq.golden import expand, scheme_tables
from utils.hawq.arithmetic import LayerIntegers
from utils.hawq.builder import Builder
from utils.hawq.graph import float_layers
from utils.hawq.networks import FAMILIES, Network
from utils.hawq.schemes import bits_of
from utils.models import create_model

# Published schemes of MobileNetV2 name these inner modules too, without effect.
WITHOUT_EFFECT = {f"features.stage4.unit5.conv1.{part}" for part in ("conv", "bn")}
CASES = [(arch, name) for arch, schemes in bit_config.PUBLISHED.items() for name in schemes]


@dataclass(frozen=True)
class Asked:
    """Parameters of zeros and scales of 1, which write down what is asked for."""

    bits: dict[str, int] = field(default_factory=dict)

    def layer(self, name: str, shape: tuple[int, ...], bits: int, input_scale: np.float32, eps: float | None
              ) -> LayerIntegers:  # fmt: skip
        self.bits[name] = bits
        zeros = np.zeros(shape, np.float32)
        return LayerIntegers(zeros, np.ones(shape[0], np.float32), np.zeros(shape[0], np.float32))

    def activation(self, name: str, bits: int) -> np.float32:
        assert self.bits.setdefault(name, bits) == bits
        return np.float32(1)


@pytest.mark.data
@pytest.mark.parametrize(("arch", "name"), CASES)
def test_every_module_has_its_published_bits(shared: Path, arch: str, name: str) -> None:
    table = expand(scheme_tables(shared)["resnet50" if arch == "resnet50b" else arch], name)
    expected = {module: bits for module, bits in table.items() if module not in WITHOUT_EFFECT}
    with torch.device("meta"):
        info = create_model(arch)
        bits = bits_of(name, arch, float_layers(info))
    asked = Asked()
    FAMILIES[arch](Network(Builder(info.module, asked, bits), tuple(expected), info.preprocess.input_shape, None))
    assert asked.bits == expected
