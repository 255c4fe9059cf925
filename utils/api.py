"""Quantize a model of your own from Python; ``quant_train.py`` does the same from the command line.

>>> import torch
>>> from torch import nn
>>> from utils.api import Preprocess, calibrate, convert, evaluate, normalize, predict, quantize
>>> _ = torch.manual_seed(0)
>>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4))
>>> images = torch.randint(0, 256, (32, 3, 8, 8), dtype=torch.uint8)
>>> preprocess = Preprocess(resize=None, input_size=8)        # mean and std are ImageNet's unless given
>>> model = quantize(net, normalize(images, preprocess), "uniform8", preprocess)
>>> calibrate(model, normalize(images, preprocess).split(8))
32
>>> graph = convert(model, preprocess, classes=["a", "b", "c", "d"])
>>> logits = predict(graph, images)                           # integers inside, the same on every engine
>>> float_labels = net(normalize(images, preprocess)).argmax(1)
>>> evaluate(graph, [(images, float_labels)]).top1 > 90
True

For quantization-aware training train ``model`` between ``calibrate`` and ``convert`` like any module, after
:func:`configure` and with the groups of :func:`parameter_groups`; see ``examples/own_model.py``.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

import bit_config
from utils.data_utils import normalize
from utils.errors import UserError
from utils.evaluation import Accuracy, float_predictor
from utils.evaluation import evaluate as evaluate_predictor
from utils.experiment import quantize_module
from utils.integer_graph import serialize
from utils.integer_graph.from_torch import from_torch
from utils.integer_graph.ir import Graph
from utils.integer_graph.torch_engine import TorchEngine
from utils.preprocess import Preprocess
from utils.quantization_utils.calibrate import calibrate
from utils.quantization_utils.prepare import QuantizedModel
from utils.quantization_utils.training import configure, parameter_groups, reestimate_bn

__all__ = [
    "Accuracy",
    "Graph",
    "Preprocess",
    "QuantizedModel",
    "UserError",
    "calibrate",
    "configure",
    "convert",
    "evaluate",
    "load",
    "normalize",
    "parameter_groups",
    "predict",
    "quantize",
    "reestimate_bn",
    "save",
]


def quantize(
    model: nn.Module, example_input: Tensor, scheme: str = "uniform8", preprocess: Preprocess | None = None
) -> QuantizedModel:
    """The quantized form of a float model, around the same parameters; behaves like the float model until calibrated.

    example_input: float32 [N, C, H, W] of which only the shape matters; C, H and W are fixed by it.  scheme:
    "uniformN", "wXaY" (2 to 8 bits) or the path of a YAML file, see :func:`bit_config.load_scheme`; layers are named
    by their module path.  preprocess: if given, is checked to make inputs of that shape.

    Raises UserError, naming the operator, for a model that torch.fx or the quantizer cannot handle, and for a scheme
    that does not fit its layers.
    """
    if preprocess is not None and preprocess.input_shape != tuple(example_input.shape[1:]):
        got, expected = list(example_input.shape[1:]), list(preprocess.input_shape)
        raise UserError(f"the example input has the shape {got} per image, the preprocessing gives {expected}")
    loaded = bit_config.load_scheme(scheme, type(model).__name__)
    return quantize_module(model, example_input, loaded)[0].to(_device(model))


def convert(
    model: QuantizedModel,
    preprocess: Preprocess,
    *,
    classes: Sequence[str] = (),
    arch: str | None = None,
    scheme: str = "own",
    strict_integer: bool = False,
) -> Graph:
    """The integer graph of a calibrated (and perhaps trained) model; it takes uint8 images.

    preprocess: how pixels become the model's input, kept in the graph.  classes: names for predictions.  arch and
    scheme: names to record (default: the class of the float model).

    Raises UserError for a model that was not calibrated, and as :func:`from_torch` does.
    """
    if not any(quantizer.enabled for quantizer in model.activation_quantizers().values()):
        raise UserError("the model has no activation ranges yet; call calibrate(model, batches) before convert")
    meta = {"arch": arch or type(model.model).__name__, "scheme": scheme}
    names = {"classes": list(classes)} if classes else {}
    return from_torch(model, preprocess, meta=meta | names, strict_integer=strict_integer)


def predict(graph: Graph, images: Tensor, device: str | torch.device = "cpu") -> Tensor:
    """Logits float32 [N, classes] of uint8 images [N, C, H, W].  For many batches make one :class:`TorchEngine`."""
    return TorchEngine(graph, device)(images)


def evaluate(
    target: Graph | nn.Module, batches: Iterable[tuple[Tensor, Tensor]], preprocess: Preprocess | None = None
) -> Accuracy:
    """Top-1 and top-5 accuracy in percent of an integer graph, or of a float or quantized model.

    batches: uint8 images [N, C, H, W] and int64 labels [N].  preprocess: needed for a model, which takes normalised
    images; a graph has its own.
    """
    if isinstance(target, Graph):
        return evaluate_predictor(TorchEngine(target), batches, "integer graph")
    if preprocess is None:
        raise UserError("a model takes normalised images; give evaluate the preprocess it was quantized with")
    return evaluate_predictor(float_predictor(target, preprocess, _device(target)), batches, "model")


def save(graph: Graph, path: str | Path) -> None:
    """Write an integer graph to one file, atomically.  Raises UserError where the system refuses."""
    serialize.save(graph, path)


def load(path: str | Path) -> Graph:
    """Read and verify an integer graph; never runs code.  Raises UserError for a file that cannot be used."""
    return serialize.load(path)


def _device(model: nn.Module) -> torch.device:
    parameter = next(model.parameters(), None)
    return torch.device("cpu") if parameter is None else parameter.device
