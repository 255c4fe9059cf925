"""A float network with the quantization of another engine in it, placed as the engine's data say (``backends``).

The result is a :class:`QuantizedModel` like that of the integer graph, so everything that calibrates, corrects and
rounds applies to it; but it cannot be converted, and no bias is rounded.
"""

from collections.abc import Mapping
from dataclasses import replace

from utils.quantization_utils.backends import Backend
from utils.quantization_utils.capture import Captured
from utils.quantization_utils.coded import CodedLayer, CodedQuantizer, make_code
from utils.quantization_utils.cost_model import LayerBits
from utils.quantization_utils.float_ops import Op
from utils.quantization_utils.prepare import Network, Placement, QuantizedModel, describe_layers
from utils.quantization_utils.quant_modules import QuantBatchNorm

OTHER_BITS = 8


def simulate(captured: Captured, network: Network, bits: Mapping[str, LayerBits], backend: Backend) -> QuantizedModel:
    """Build the simulation of a folded network; quantization is off until calibration.

    bits: per layer name.  A tensor has the largest activation width of the layers that read it; one that no layer
    reads has that of the layers between the first and the last.
    """
    return _Simulation(network, bits, backend).build(captured)


class _Simulation:
    def __init__(self, network: Network, bits: Mapping[str, LayerBits], backend: Backend) -> None:
        self.network, self.bits, self.backend = network, bits, backend
        self.layers = describe_layers(network)
        inner = [bits[layer.name].activation for layer in self.layers if not (layer.first or layer.last)]
        self.other_bits = max(inner, default=OTHER_BITS)
        self.place = Placement(network, bits, OTHER_BITS)

    def build(self, captured: Captured) -> QuantizedModel:
        where: dict[str, str] = {}
        ops: list[Op] = []
        for op in self.network.ops:
            new = replace(op, inputs=[where[name] for name in op.inputs], attrs=dict(op.attrs))
            self._swap_layer(new)
            ops.append(new)
            where[op.name] = op.name
            width = self._width(op)
            if width is not None:
                ops.append(self._quantize(op, width))
                where[op.name] = ops[-1].name
        return QuantizedModel(captured.model, ops, self.layers, self.bits, captured.input_shape)

    def _swap_layer(self, op: Op) -> None:
        if op.kind == "affine":
            op.module = op.run = QuantBatchNorm(op.module)  # type: ignore[arg-type]  # without a source: float
        elif op.kind in ("conv", "linear"):
            width, backend = self.bits[op.attrs["layer"]].weight, self.backend
            code = make_code(width, backend.weights == "asymmetric", backend.narrow)
            layer = CodedLayer(op.module, op.attrs.get("bn"), width, code, backend.folds_bn)  # type: ignore[arg-type]
            layer.per_channel = backend.per_channel
            op.module = op.run = layer

    def _width(self, op: Op) -> int | None:
        """Bits of a value; None where nobody who reads it wants it quantized."""
        readers = [reader for reader in self.network.readers[op.name] if reader.kind in self.backend.reads]
        if not readers:
            return None
        layers = [self.bits[r.attrs["layer"]].activation for r in readers if "layer" in r.attrs]
        return max(layers, default=self.other_bits)

    def _quantize(self, op: Op, width: int) -> Op:
        nonnegative = self.place.nonnegative(op)
        kind = self.backend.activations
        code = make_code(width, kind == "asymmetric" or (kind == "unsigned" and nonnegative), self.backend.narrow)
        quantizer = CodedQuantizer(code, width, signed=not (code.affine and nonnegative))
        return Op(f"{op.name}_q{width}", "quantize", [op.name], quantizer, op.shape, module=quantizer)
