"""How inference engines quantize, as data: codes of weights and activations, folding, where activations are quantized.

One class simulates all of them (:mod:`simulate`); only ``hawq`` is our own integer graph.  Sources: MQBench (backends
Academic and TensorRT, https://github.com/ModelTC/MQBench), NNCF's setup for OpenVINO on CPUs, ONNX Runtime's static
quantization in the QDQ format.
"""

from dataclasses import dataclass
from typing import Literal

LAYERS = ("conv", "linear")  # kinds of operators, see ``float_ops``
SUMS, POOLS = ("add", "mul"), ("max_pool", "avg_pool")


@dataclass(frozen=True)
class Backend:
    """One engine.

    weights: codes ``-2**(b-1) .. 2**(b-1) - 1`` around zero, without the lowest one where ``narrow``; or ``0 .. 2**b -
    1`` with a zero point.  per_channel: a range for each output channel.
    activations: the same, one range for each tensor; ``unsigned`` is symmetric, and without a sign where the graph
    shows that values are never negative.
    folds_bn: whether weights are quantized with the BatchNorm behind them folded in; it stays float otherwise.
    ends_8bit: whether the first and the last layer, with what they read, have 8 bits; None: as the scheme says.
    reads: a tensor is quantized where an operator of one of these kinds reads it (``output``: the logits); then all
    its readers see the quantized tensor, as in a graph with one pair of quantize and dequantize behind the producer.
    converts: whether the integer graph computes exactly this.  why: the reason in words.
    """

    name: str
    weights: Literal["symmetric", "asymmetric"]
    narrow: bool
    per_channel: bool
    activations: Literal["symmetric", "asymmetric", "unsigned"]
    folds_bn: bool
    ends_8bit: bool | None
    reads: tuple[str, ...]
    converts: bool
    why: str


_ZERO_POINTS = (
    "zero points would fold into the biases, but convolutions, pads and ReLUs of the integer graph take zero for the "
    "code 0 at borders and bounds"
)

BACKENDS: dict[str, Backend] = {
    backend.name: backend
    for backend in (
        Backend(
            name="hawq",
            weights="symmetric",
            narrow=True,
            per_channel=True,
            activations="unsigned",
            folds_bn=True,
            ends_8bit=None,
            reads=(*LAYERS, "affine", "avg_pool", "mul", "add", "concat"),
            converts=True,
            why="this is the arithmetic of the integer graph; sums take 16-bit or 8-bit operands as the scheme says",
        ),
        Backend(
            name="academic",
            weights="asymmetric",
            narrow=False,
            per_channel=True,
            activations="asymmetric",
            folds_bn=False,
            ends_8bit=True,
            reads=LAYERS,
            converts=False,
            why=f"BatchNorms and sums stay in float; {_ZERO_POINTS}",
        ),
        Backend(
            name="tensorrt",
            weights="symmetric",
            narrow=True,  # as TensorRT itself; the table of MQBench 0.0.5 had the lowest code too
            per_channel=True,
            activations="symmetric",
            folds_bn=True,
            ends_8bit=False,
            reads=(*LAYERS, *POOLS, *SUMS, "affine", "concat"),
            converts=False,
            why="the integer graph has no sign where a ReLU leaves none, and adds accumulators without rounding them "
            "to 8 bits first",
        ),
        Backend(
            name="openvino",
            weights="symmetric",
            narrow=True,
            per_channel=True,
            activations="unsigned",
            folds_bn=True,
            ends_8bit=False,
            reads=(*LAYERS, *SUMS, "avg_pool", "affine"),
            converts=False,
            why="the integer graph adds accumulators without rounding them to 8 bits first; a scheme with "
            "residual_bits 8 is its nearest form",
        ),
        Backend(
            name="onnxruntime",
            weights="symmetric",
            narrow=True,
            per_channel=True,
            activations="asymmetric",
            folds_bn=True,
            ends_8bit=False,
            reads=(*LAYERS, *POOLS, *SUMS, "concat", "output"),
            converts=False,
            why=_ZERO_POINTS,
        ),
    )
}
DEFAULT = "hawq"


def why_not(backend: Backend, rounding: str | None) -> str | None:
    """Why a way of rounding (``descent``, ``adaround``, ``block``) is not offered for an engine; None where it is."""
    if rounding == "block" and not backend.converts:
        return f"block learns activation scales, which the simulation of {backend.name} does not offer; use adaround"
    if rounding == "descent" and not (backend.weights == "symmetric" and backend.narrow and backend.per_channel):
        return "descent needs a scale for every channel and the same codes above and below zero; use adaround"
    return None
