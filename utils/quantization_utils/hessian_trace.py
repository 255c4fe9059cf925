"""Trace of the loss Hessian of every layer, with its standard error, by random probes.

The Hessian is that of the mean cross-entropy over the given images, in the float network with BatchNorms folded by
their running statistics, with respect to the folded weights: the ones that are quantized.  So the exact trace is a
definite number, and the standard error is that of the probes alone; images are strata, each with probes of its own.

A layer's block of the Hessian has two parts, which are estimated separately and without bias:

* ``J' S J`` with ``J`` the Jacobian of an image's logits and ``S = diag(p) - p p'`` the Hessian of its cross-entropy.
  ``S = B B'`` for ``B = diag(sqrt(p)) - p sqrt(p)'``, so the trace is the mean of ``|J' B v|^2`` over Rademacher
  vectors v with one entry per class: one backward pass serves all layers, and no layer disturbs another.  The vectors
  of an image are the rows of a Hadamard matrix with random signs, in random order and without repetition: once all
  are used, the trace is exact.
* the curvature of the logits themselves, weighted with the gradient of the loss.  Where only convolutions, sums,
  ReLU, pools and the like follow, logits are piecewise linear in one layer's weights and it is zero; elsewhere
  (sigmoids and their kind, products) it is found by Hutchinson's estimator: Rademacher probes of all those layers in
  one Hessian-vector product.

Sources: Hutchinson 1990 (trace estimator); HAWQ-V2, arXiv 1911.03852 (mean Hessian trace as sensitivity).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from utils.errors import UserError
from utils.quantization_utils.fold_bn import fold
from utils.quantization_utils.prepare import QuantizedModel
from utils.quantization_utils.quant_modules import QuantLayer
from utils.quantization_utils.sensitivity_loss import check_finite
from utils.quantization_utils.sensitivity_state import Labelled, Progress, Settings
from utils.quantization_utils.single_layer import Site, sites
from utils.seeded import hash64, integers, permutation

CURVED = ("function", "mul", "island")  # operators whose output is not piecewise linear in their inputs
PROBES_PER_VISIT = 2  # of an image; they share its forward pass
MIN_FREEDOM = 30  # degrees of freedom of a variance that a stop rule may trust
ORDER, SIGNS, CURVATURE = range(3)  # streams of random numbers


@dataclass(frozen=True)
class Trace:
    """Estimated trace and its standard error; elements: weights of the layer, or values it reads of one image."""

    value: float
    error: float
    elements: int


def number_of_probes(classes: int) -> int:
    """Probes of an image that make the first part exact: the classes, rounded up to a power of two.

    >>> number_of_probes(10), number_of_probes(2), number_of_probes(1)
    (16, 2, 1)
    """
    return 1 << max(classes - 1, 0).bit_length()


def new_sums(images: int, model: QuantizedModel, activations: bool) -> dict[str, Tensor]:
    """Zeros for :func:`hessian_traces` to sum into: of both parts, for every image and unknown, float64 [2, N, M]."""
    count = len(Unknowns(model, activations).names)
    return {name: torch.zeros(2, images, count, dtype=torch.float64) for name in ("sums", "squares")}


def hessian_traces(
    model: QuantizedModel,
    batches: Sequence[Labelled],
    settings: Settings,
    progress: Progress,
    activations: bool = False,
) -> dict[str, Trace]:
    """Traces by layer name, and, with ``activations``, of what layers read under ``input of NAME``.

    progress: holds :func:`new_sums`.  The model must be inside ``untouched``.  Raises UserError for a loss that is
    not finite, and for a network with an operator that cannot be differentiated twice.
    """
    model.enable(False)
    unknowns = Unknowns(model, activations)
    images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    count, rounds = len(images), math.ceil(settings.max_probes / PROBES_PER_VISIT)
    classes = _classes(model, images[:1])
    for step in progress.steps(count * rounds, "Hessian trace"):
        done, index = divmod(step, count)
        if index == 0 and done > 0 and _enough(unknowns, progress, classes, done, settings):
            break
        visit = _Visit(unknowns, images[index : index + 1], labels[index : index + 1])
        for probe in range(done * PROBES_PER_VISIT, (done + 1) * PROBES_PER_VISIT):
            sample = visit.sample(settings.seed, index, probe).cpu()
            progress.values["sums"][:, index] += sample
            progress.values["squares"][:, index] += sample.square()
    progress.save()
    return _estimates(unknowns, progress, classes, progress.position // count)


class Unknowns:
    """Tensors the Hessian is taken of: folded weights and, on request, the tensor each layer reads."""

    def __init__(self, model: QuantizedModel, activations: bool) -> None:
        self.model = model
        self.sites = sites(model)
        self.layers = {s.op.name: s for s in self.sites.values() if isinstance(s.layer, QuantLayer)}
        self.weights = {s.name: _folded(s) for s in self.layers.values()}
        self.readers = {s.op.name: s for s in self.sites.values()} if activations else {}
        shapes = {op.name: op.shape for op in model.ops}
        self.elements = {name: weight.numel() for name, (weight, _) in self.weights.items()}
        for site in self.readers.values():
            self.elements[input_name(site.name)] = math.prod(shapes[site.op.inputs[0]])
        self.names = list(self.elements)
        curved = max((i for i, op in enumerate(model.ops) if op.kind in CURVED), default=-1)
        early = [site.name for site in self.sites.values() if site.position < curved]
        self.curved = [name for name in self.names if name in {n for e in early for n in (e, input_name(e))}]

    def forward(self, image: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Logits [1, classes] of one image, and the leaves they are differentiated by."""
        leaves = {name: weight.clone().requires_grad_() for name, (weight, _) in self.weights.items()}
        values: dict[str, Tensor] = {}
        for op in self.model.ops:
            inputs = [values[name] for name in op.inputs] if op.inputs else [image]
            if op.name in self.readers:
                name = input_name(self.readers[op.name].name)
                leaves[name] = torch.zeros_like(inputs[0], requires_grad=True)
                inputs[0] = inputs[0] + leaves[name]
            if op.name in self.layers:
                site = self.layers[op.name]
                assert isinstance(site.layer, QuantLayer)
                values[op.name] = site.layer.apply_weights(inputs[0], leaves[site.name], self.weights[site.name][1])
            else:
                values[op.name] = op.run(*inputs)
        return values[self.model.ops[-1].name], {name: leaves[name] for name in self.names}


def input_name(layer: str) -> str:
    """Name of the tensor a layer reads among the unknowns."""
    return f"input of {layer}"


class _Visit:
    """One image with its forward pass, for several probes."""

    def __init__(self, unknowns: Unknowns, image: Tensor, label: Tensor) -> None:
        self.unknowns = unknowns
        with torch.enable_grad():
            self.logits, self.leaves = unknowns.forward(image)
            loss = F.cross_entropy(self.logits, label)
            check_finite(loss.detach(), "")
            self.gradients = self._curvature(label) if unknowns.curved else []

    def _curvature(self, label: Tensor) -> list[Tensor]:
        """Gradient, itself differentiable, of the logits weighted with the fixed gradient of the loss."""
        weights = torch.softmax(self.logits.detach(), 1) - F.one_hot(label, self.logits.shape[1])
        curved = [self.leaves[name] for name in self.unknowns.curved]
        scalar = (weights * self.logits).sum()
        return list(torch.autograd.grad(scalar, curved, create_graph=True, allow_unused=True, materialize_grads=True))

    def sample(self, seed: int, index: int, probe: int) -> Tensor:
        """Unbiased estimates of both parts of every trace, float64 [2, M]."""
        found = torch.zeros(2, len(self.leaves), dtype=torch.float64)
        if probe < number_of_probes(self.logits.shape[1]):  # exact after that
            found[0] = torch.stack(self._gauss_newton(seed, index, probe))
        for name, value in zip(self.unknowns.curved, self._hutchinson(seed, index, probe), strict=True):
            found[1, self.unknowns.names.index(name)] = value
        return found

    def _gauss_newton(self, seed: int, index: int, probe: int) -> list[Tensor]:
        p = torch.softmax(self.logits.detach().double(), 1)[0]
        v = _signs(len(p), seed, index, probe).to(p)
        direction = (p.sqrt() * v - p * (p.sqrt() @ v)).to(self.logits).reshape(1, -1)
        leaves = list(self.leaves.values())
        found = torch.autograd.grad(
            self.logits, leaves, direction, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        return [gradient.square().sum(dtype=torch.float64) for gradient in found]

    def _hutchinson(self, seed: int, index: int, probe: int) -> list[Tensor]:
        if not any(gradient.requires_grad for gradient in self.gradients):
            return [torch.zeros(()) for _ in self.gradients]
        leaves = [self.leaves[name] for name in self.unknowns.curved]
        generator = torch.Generator().manual_seed(int(hash64(seed, CURVATURE, index, probe)[0] >> np.uint64(1)))
        probes = [(2 * torch.randint(0, 2, x.shape, generator=generator) - 1).to(x) for x in leaves]
        pairs = [(g, z) for g, z in zip(self.gradients, probes, strict=True) if g.requires_grad]
        try:
            products = torch.autograd.grad(
                [g for g, _ in pairs], leaves, [z for _, z in pairs], retain_graph=True, allow_unused=True
            )
        except RuntimeError as error:
            raise UserError(
                f"the network cannot be differentiated twice ({str(error).splitlines()[0][:120]}); "
                "measure another sensitivity than the trace, for example fisher"
            ) from error
        zero = self.logits.new_zeros(())
        return [zero if h is None else (z.double() * h).sum() for z, h in zip(probes, products, strict=True)]


def _signs(classes: int, seed: int, index: int, probe: int) -> Tensor:
    """Probe of an image, [classes] of 1 and -1: a row of its Hadamard matrix, another one for every probe."""
    rows = number_of_probes(classes)
    row = int(permutation(rows, seed, ORDER, index)[probe])
    columns = np.arange(classes)
    parity = np.bitwise_count(columns & row) & 1
    flips = integers(2, seed, SIGNS, index, columns)
    return torch.from_numpy(1 - 2 * (parity.astype(np.int64) ^ flips))


def _folded(site: Site) -> tuple[Tensor, Tensor | None]:
    assert isinstance(site.layer, QuantLayer)
    module = site.layer.module
    weight, bias = fold(module.weight, module.bias, site.layer.bn)
    return weight.detach(), None if bias is None else bias.detach()


@torch.no_grad()
def _classes(model: QuantizedModel, image: Tensor) -> int:
    return int(model(image).shape[1])


def _enough(unknowns: Unknowns, progress: Progress, classes: int, rounds: int, settings: Settings) -> bool:
    """The stop rule."""
    probes, images = rounds * PROBES_PER_VISIT, progress.values["sums"].shape[1]
    if _exact(unknowns, classes, probes):
        return True
    if images * (probes - 1) < MIN_FREEDOM:
        return False
    found = _estimates(unknowns, progress, classes, rounds)
    largest = sorted(unknowns.weights, key=lambda name: -unknowns.elements[name])[: settings.largest]
    watched = largest + [input_name(name) for name in largest if input_name(name) in found]
    return all(found[name].error <= settings.tolerance * abs(found[name].value) for name in watched)


def _exact(unknowns: Unknowns, classes: int, probes: int) -> bool:
    """Whether nothing random is left."""
    return not unknowns.curved and probes >= number_of_probes(classes)


def _estimates(unknowns: Unknowns, progress: Progress, classes: int, rounds: int) -> dict[str, Trace]:
    """Traces after some rounds of probes of every image."""
    rows = number_of_probes(classes)
    probes = torch.tensor([min(rounds * PROBES_PER_VISIT, rows), rounds * PROBES_PER_VISIT]).reshape(2, 1, 1)
    sums, squares = progress.values["sums"], progress.values["squares"]
    means = (sums / probes).sum(0).mean(0)
    variances = ((squares - sums.square() / probes) / (probes - 1).clamp_min(1)).clamp_min(0) / probes
    variances[0] *= 1 - probes[0] / rows  # drawn without repetition
    errors = variances.sum((0, 1)).sqrt() / sums.shape[1]
    pairs = zip(unknowns.names, means.tolist(), errors.tolist(), strict=True)
    return {name: Trace(mean, error, unknowns.elements[name]) for name, mean, error in pairs}
