"""The runtimes that a compiled model is measured against, each computing the float network it was made from.

A runtime that is not installed, or cannot run the network, costs one line and is left out of the comparison.
"""

import contextlib
import io
import logging
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from utils.data_utils import normalize
from utils.preprocess import Preprocess

INSTALL = "pip install 'hawq[peers]'"
OPENVINO_INT8, UINT8_INPUT = "openvino", "openvino (uint8 input)"


class Engine(Protocol):
    """Something that computes the network on one batch that it holds.

    name: what the runtime is called.  precision: of its arithmetic, "fp32" or "int8" for peers.
    """

    name: str
    precision: str

    def run(self) -> object:
        """Compute the logits of the batch once; what is timed."""


@dataclass(frozen=True)
class Workload:
    """What all engines compute.

    module: float network in evaluation mode on the CPU, float32 [N, C, H, W] -> logits.  images: uint8
    [batch, C, H, W], the batch they compute.  calibration: uint8 [N, C, H, W], for the ranges of int8 peers.
    threads: of each engine.
    """

    module: nn.Module
    preprocess: Preprocess
    images: Tensor
    calibration: Tensor
    threads: int

    @property
    def inputs(self) -> Tensor:
        """The batch as the float network takes it, float32 [batch, C, H, W]."""
        return normalize(self.images, self.preprocess)


@dataclass(frozen=True)
class Missing:
    """A peer that cannot take part, and why, in one line."""

    name: str
    precision: str
    reason: str


class TorchEngine:
    """PyTorch, eager or compiled with inductor."""

    precision = "fp32"

    def __init__(self, workload: Workload, compiled: bool) -> None:
        self.name = "torch.compile" if compiled else "pytorch"
        self._threads = workload.threads
        # What torch.compile remembers of other batch sizes would make it generate code for any size.
        torch.compiler.reset()
        # Freezing folds BatchNorm into the convolutions and packs the weights, as the other engines do.
        options: dict[str, Any] = {"freezing": True}
        self._module = torch.compile(workload.module, options=options) if compiled else workload.module
        self._inputs = workload.inputs

    def run(self) -> object:
        torch.set_num_threads(self._threads)
        with torch.no_grad():
            return self._module(self._inputs)


@cache
def _openvino_core() -> Any:
    """The only one of the process, never freed.

    Every core's plugin gives the thread a signal stack of its own.  Two that are freed in the order they were made
    leave a freed one behind, and the next signal, such as the end of a data worker, ends the process.
    """
    import openvino

    return openvino.Core()


class OpenVinoEngine:
    """OpenVINO's CPU plugin on one compiled model."""

    def __init__(self, model: Any, inputs: np.ndarray, name: str, precision: str, threads: int) -> None:
        import openvino

        self.name, self.precision = name, precision
        config = {
            "INFERENCE_NUM_THREADS": threads,
            "INFERENCE_PRECISION_HINT": "f32",
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": 1,
            "ENABLE_CPU_PINNING": False,
        }
        self._request = _openvino_core().compile_model(model, "CPU", config).create_infer_request()
        self._request.set_input_tensor(openvino.Tensor(np.ascontiguousarray(inputs)))

    def run(self) -> object:
        return self._request.infer()


class OnnxRuntimeEngine:
    """ONNX Runtime's CPU provider, the network exported by torch."""

    name, precision = "onnxruntime", "fp32"

    def __init__(self, workload: Workload) -> None:
        import onnx  # noqa: F401  torch's exporter needs it and says so less clearly
        import onnxruntime

        file: Any = io.BytesIO()  # accepted, though not in the exporter's signature
        torch.onnx.export(workload.module, (workload.inputs,), file, dynamo=False, input_names=["x"])
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = workload.threads, 1
        self._session = onnxruntime.InferenceSession(file.getvalue(), options, providers=["CPUExecutionProvider"])
        self._feed = {"x": workload.inputs.numpy()}

    def run(self) -> object:
        return self._session.run(None, self._feed)


def openvino_model(workload: Workload, batch: int) -> Any:
    """The float network for batches of a fixed size."""
    import openvino

    model = openvino.convert_model(workload.module, example_input=workload.inputs[:1])
    model.reshape([batch, *workload.images.shape[1:]])
    return model


def _openvino_fp32(workload: Workload) -> list[Engine]:
    inputs = workload.inputs.numpy()
    return [OpenVinoEngine(openvino_model(workload, len(inputs)), inputs, "openvino", "fp32", workload.threads)]


def openvino_int8_model(workload: Workload) -> Any:
    """The float network as an OpenVINO model after post-training quantization by NNCF; float32 batches as images."""
    import nncf

    nncf.set_log_level(logging.ERROR)
    images = normalize(workload.calibration, workload.preprocess).numpy()
    samples = nncf.Dataset([image[None] for image in images])
    model = nncf.quantize(openvino_model(workload, 1), samples, subset_size=len(images))
    model.reshape(list(workload.images.shape))
    return model


def _openvino_int8(workload: Workload) -> list[Engine]:
    """Once fed floats and once the pixels, converted and normalised inside."""
    model = openvino_int8_model(workload)
    pixels = workload.images.permute(0, 2, 3, 1).numpy()
    from_pixels = _takes_pixels(model.clone(), workload.preprocess)
    return [
        OpenVinoEngine(model, workload.inputs.numpy(), OPENVINO_INT8, "int8", workload.threads),
        OpenVinoEngine(from_pixels, pixels, UINT8_INPUT, "int8", workload.threads),
    ]


def _takes_pixels(model: Any, preprocess: Preprocess) -> Any:
    """The model with uint8 [N, H, W, C] as its input."""
    import openvino
    from openvino.preprocess import PrePostProcessor

    steps = PrePostProcessor(model)
    steps.input().tensor().set_element_type(openvino.Type.u8).set_layout(openvino.Layout("NHWC"))
    steps.input().model().set_layout(openvino.Layout("NCHW"))
    convert = steps.input().preprocess().convert_element_type(openvino.Type.f32)
    convert.mean([255 * x for x in preprocess.mean]).scale([255 * x for x in preprocess.std])
    return steps.build()


@dataclass(frozen=True)
class PeerKind:
    """One row of the table of peers: names and precisions of the engines that ``build`` gives, in order."""

    names: tuple[str, ...]
    precision: str
    build: Callable[[Workload], Sequence[Engine]]


PEERS = (
    PeerKind((OPENVINO_INT8, UINT8_INPUT), "int8", _openvino_int8),
    PeerKind(("openvino",), "fp32", _openvino_fp32),
    PeerKind(("onnxruntime",), "fp32", lambda workload: [OnnxRuntimeEngine(workload)]),
    PeerKind(("pytorch",), "fp32", lambda workload: [TorchEngine(workload, compiled=False)]),
    PeerKind(("torch.compile",), "fp32", lambda workload: [TorchEngine(workload, compiled=True)]),
)


def build_peers(workload: Workload, kinds: Sequence[PeerKind] = PEERS) -> tuple[list[Engine], list[Missing]]:
    """Every peer that runs here, each having run once, and those that do not, with the reason."""
    engines: list[Engine] = []
    missing: list[Missing] = []
    for kind in tqdm(kinds, desc="preparing peers", unit="peer"):
        try:
            with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
                warnings.simplefilter("ignore")
                built = list(kind.build(workload))
                for engine in built:
                    engine.run()
            engines += built
        except ImportError as error:
            missing += _absent(kind, f"not installed ({error.name}): {INSTALL}")
        except Exception as error:  # whatever another runtime raises must not stop the measurement
            missing += _absent(kind, f"cannot run this network ({type(error).__name__}: {_first_line(error)})")
    return engines, missing


def without_network(reason: str) -> list[Missing]:
    """All peers as missing."""
    return [missing for kind in PEERS for missing in _absent(kind, reason)]


def _absent(kind: PeerKind, reason: str) -> list[Missing]:
    return [Missing(name, kind.precision, reason) for name in kind.names]


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")[:200]
