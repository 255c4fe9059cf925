"""One network under one scheme: the float model, its quantized form, and its integer graph."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

import bit_config
from bit_config import Rule, Scheme
from utils.errors import UserError
from utils.integer_graph.from_torch import from_torch
from utils.integer_graph.ir import Graph
from utils.models import ModelInfo
from utils.preprocess import Preprocess
from utils.quantization_utils import cost_model
from utils.quantization_utils.backends import BACKENDS, DEFAULT, Backend
from utils.quantization_utils.capture import capture
from utils.quantization_utils.cost_model import Layer, LayerBits
from utils.quantization_utils.prepare import QuantizedModel, describe_layers, fold_network, prepare
from utils.quantization_utils.scheme_report import format_table
from utils.quantization_utils.simulate import simulate
from utils.quantization_utils.state import load_quantizer_state, quantizer_state

FLOAT = "float"


@dataclass(frozen=True)
class Cost:
    """size_mib: weights in MiB; bops_g: bit operations of one image in 1e9; both by the uniform convention."""

    size_mib: float
    bops_g: float


def quantize_module(
    module: nn.Module, example_input: Tensor, scheme: Scheme, backend: Backend = BACKENDS[DEFAULT]
) -> tuple[QuantizedModel, list[Layer], dict[str, LayerBits]]:
    """Capture a float model and build its quantized form around it; quantization is off until calibration.

    example_input: float32 [N, C, H, W], of which only the shape matters.  backend: one that does not convert is
    simulated, and says itself whether the ends have 8 bits, whatever the scheme says.  Raises UserError for a model
    that cannot be captured and a scheme that does not fit its layers.
    """
    captured = capture(module, example_input)
    network = fold_network(captured)
    layers = describe_layers(network)
    if backend.ends_8bit is not None:
        scheme = replace(scheme, ends="8" if backend.ends_8bit else "free")
    bits = bit_config.resolve(scheme, layers)
    if not backend.converts:
        return simulate(captured, network, bits, backend), layers, bits
    return prepare(captured, network, bits, scheme.residual_bits), layers, bits


class Experiment:
    """Builds everything that depends on network and scheme alone.

    scheme: a name or YAML path, see :func:`bit_config.load_scheme`, or ``float`` for no quantization.  Raises
    UserError for networks that cannot be captured and schemes that do not fit.
    backend: whose quantization; only what converts has an integer graph and checkpoints.
    """

    def __init__(
        self,
        info: ModelInfo,
        preprocess: Preprocess,
        scheme: str | Scheme,
        device: torch.device,
        backend: Backend = BACKENDS[DEFAULT],
    ) -> None:
        self.info, self.preprocess, self.device, self.backend = info, preprocess, device, backend
        self.is_float = scheme == FLOAT
        if isinstance(scheme, str):
            scheme = bit_config.load_scheme("uniform8" if self.is_float else scheme, info.name)
        if scheme.name == FLOAT:
            raise UserError(f"a scheme cannot be called {FLOAT!r}, which means no quantization; give it another name")
        self.scheme_name = FLOAT if self.is_float else scheme.name
        self.residual_bits = scheme.residual_bits
        example = torch.zeros(1, *preprocess.input_shape)
        model, self.layers, self.bits = quantize_module(info.module.to(device), example, scheme, backend)
        self.model: QuantizedModel = model.to(device)

    @property
    def simulates(self) -> bool:
        """Whether the quantized network is another engine's, in float: nothing of it can be converted or resumed."""
        return not (self.is_float or self.backend.converts)

    @property
    def parameters(self) -> int:
        """Number of float parameters."""
        return sum(p.numel() for p in self.info.module.parameters())

    def cost(self) -> Cost:
        """Size and BOPS under the scheme, or of the float network."""
        if self.is_float:
            return Cost(cost_model.float_size_mib(self.parameters), cost_model.float_bops_g(self.layers))
        return Cost(cost_model.size_mib(self.layers, self.bits), cost_model.bops_g(self.layers, self.bits))

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

    def convert(self, classes: Sequence[str], strict_integer: bool = False) -> Graph:
        """The integer graph as the model now stands; the model is left in eval mode.

        Raises UserError for a simulation.
        """
        if self.simulates:
            raise UserError(f"the backend {self.backend.name} has no integer graph: {self.backend.why}")
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

    def state(self) -> dict[str, Any]:
        """Entries of a checkpoint: network, scheme, preprocessing, weights and quantizers."""
        return {
            "arch": self.info.name,
            "scheme": self.scheme_name,
            "bits": self.bits_table(),
            "residual_bits": self.residual_bits,
            "num_classes": self.info.num_classes,
            "preprocess": self.preprocess.as_dict(),
            "state_dict": dict(self.model.model.state_dict()),
            "quantizers": quantizer_state(self.model),
        }

    def load_state(self, saved: Mapping[str, Any], source: str) -> None:
        """Take weights and quantizers of :meth:`state`.  Raises UserError, naming ``source``, for another scheme's."""
        self._check_scheme(saved, source)
        try:
            self.model.model.load_state_dict(saved["state_dict"])
            load_quantizer_state(self.model, saved["quantizers"])
        except (KeyError, TypeError, AttributeError, RuntimeError) as error:
            raise UserError(f"{source} does not fit {self.info.name}: it was changed after saving") from error

    def _check_scheme(self, saved: Mapping[str, Any], source: str) -> None:
        ours, theirs = self.bits_table(), saved["bits"]
        names = f"{source} was saved with the scheme {saved['scheme']}, not {self.scheme_name}"
        if self.is_float != (saved["scheme"] == FLOAT):
            raise UserError(f"{names}; leave out --quant-scheme to go on, or give the file to --weights to start anew")
        different = [name for name in [*theirs, *ours] if theirs.get(name) != ours.get(name)]
        if different:
            layer = different[0]
            raise UserError(
                f"{names}: the layer {layer!r} has the bits {theirs.get(layer)} (weight, activation) there and "
                f"{ours.get(layer)} here; leave out --quant-scheme to take the file's"
            )
        if saved["residual_bits"] != self.residual_bits:
            got, expected = saved["residual_bits"], self.residual_bits
            raise UserError(f"{names}: residuals have {got} bits there and {expected} here; leave out --quant-scheme")


def scheme_of(saved: Mapping[str, Any]) -> str | Scheme:
    """The scheme that :meth:`Experiment.state` recorded, layer by layer, so that no scheme file is needed again."""
    if saved["scheme"] == FLOAT:
        return FLOAT
    rules = tuple(Rule(f"^{re.escape(name)}$", (pair[0], pair[1])) for name, pair in saved["bits"].items())
    return Scheme(saved["scheme"], rules, saved["residual_bits"], "free")
