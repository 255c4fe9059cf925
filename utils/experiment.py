"""One network under one scheme: the float model, its quantized form, and its integer graph."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import bit_config
from utils.integer_graph.from_torch import from_torch
from utils.integer_graph.ir import Graph
from utils.models import ModelInfo
from utils.preprocess import Preprocess
from utils.quantization_utils import cost_model
from utils.quantization_utils.capture import capture
from utils.quantization_utils.cost_model import Layer, LayerBits
from utils.quantization_utils.prepare import QuantizedModel, describe_layers, fold_network, prepare
from utils.quantization_utils.scheme_report import format_table

FLOAT = "float"


@dataclass(frozen=True)
class Cost:
    """size_mib: weights in MiB; bops_g: bit operations of one image in 1e9; both by the uniform convention."""

    size_mib: float
    bops_g: float


class Experiment:
    """Builds everything that depends on network and scheme alone.

    scheme: a name or YAML path, see :func:`bit_config.load_scheme`, or ``float`` for no quantization.  Raises
    UserError for networks that cannot be captured and schemes that do not fit.
    """

    def __init__(self, info: ModelInfo, preprocess: Preprocess, scheme: str, device: torch.device) -> None:
        self.info, self.preprocess, self.scheme_name, self.device = info, preprocess, scheme, device
        info.module.to(device)
        captured = capture(info.module, torch.zeros(1, *preprocess.input_shape))
        network = fold_network(captured)
        self.layers: list[Layer] = describe_layers(network)
        self.is_float = scheme == FLOAT
        loaded = bit_config.load_scheme("uniform8" if self.is_float else scheme, info.name)
        self.residual_bits = loaded.residual_bits
        self.bits: dict[str, LayerBits] = bit_config.resolve(loaded, self.layers)
        self.model: QuantizedModel = prepare(captured, network, self.bits, self.residual_bits).to(device)

    @property
    def parameters(self) -> int:
        """Number of float parameters."""
        return sum(p.numel() for p in self.info.module.parameters())

    def cost(self) -> Cost:
        """Size and BOPS under the scheme, or of the float network."""
        if self.is_float:
            return Cost(cost_model.float_size_mib(self.parameters), cost_model.float_bops_g(self.layers))
        return Cost(cost_model.size_mib(self.layers, self.bits), cost_model.bops_g(self.layers, self.bits))

    def float_cost(self) -> Cost:
        """Size and BOPS of the float network."""
        return Cost(cost_model.float_size_mib(self.parameters), cost_model.float_bops_g(self.layers))

    def table(self) -> str:
        """Every layer's bits with the reason, and what the scheme costs in both conventions."""
        return format_table(
            self.layers,
            self.bits,
            self.info.name,
            scheme=self.scheme_name,
            parameters=self.parameters,
            residual_bits=self.residual_bits,
        )

    def convert(self, classes: tuple[str, ...], strict_integer: bool = False) -> Graph:
        """The integer graph as the model now stands; the model is left in eval mode."""
        meta: dict[str, Any] = {
            "arch": self.info.name,
            "scheme": self.scheme_name,
            "num_classes": self.info.num_classes,
            "classes": list(classes),
            "residual_bits": self.residual_bits,
        }
        return from_torch(self.model, self.preprocess, meta=meta, strict_integer=strict_integer)

    def bits_table(self) -> dict[str, list[int]]:
        """Layer -> [weight bits, activation bits], as checkpoints record the scheme."""
        return {name: [bits.weight, bits.activation] for name, bits in self.bits.items()}

    def to_device(self, images: Tensor) -> Tensor:
        """Images on the device the model runs on."""
        return images.to(self.device)
