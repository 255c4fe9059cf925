"""What is seen of a tensor's channels, and what rounding errors it foretells."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from utils.errors import not_finite
from utils.quantization_utils.bias_correction import limited
from utils.quantization_utils.execution import channel_rows, run_ops
from utils.quantization_utils.prepare import QuantizedModel
from utils.quantization_utils.quant_modules import Quantizer
from utils.quantization_utils.quant_primitives import int_range

IMAGES = 128
AT_CEILING = 0.9999  # share of a ceiling from which on a value is at it
POWER = 8  # of the mean that stands for the largest weight of a row
STEP = 1.4  # best step times the largest integer and a half, over that mean: of normal weights at 4 bits
AT_A_TIME = 1 << 16  # values of a channel in float64
DAMPING = 1e-6  # of the covariance's diagonal
TINY = 1e-12


@dataclass
class Seen:
    """The values of a tensor [C, values]: how many, sums float64 [C] and [C, C], largest, and how many at a ceiling."""

    count: int
    total: Tensor
    products: Tensor
    largest: Tensor
    clipped: Tensor

    @classmethod
    def of(cls, rows: Tensor, ceiling: float | None) -> "Seen":
        """From values float32 [C, values]."""
        top = torch.inf if ceiling is None else AT_CEILING * ceiling
        largest, clipped = rows.abs().amax(1).double(), (rows >= top).sum(1)
        products = torch.zeros(len(rows), len(rows), dtype=torch.float64, device=rows.device)
        for part in rows.split(AT_A_TIME, 1):
            products.addmm_(part.double(), part.double().T)
        return cls(rows.shape[1], rows.sum(1, dtype=torch.float64), products, largest, clipped)

    def with_more(self, other: "Seen") -> "Seen":
        """Together with the values of other images."""
        largest = torch.maximum(self.largest, other.largest)
        total, products = self.total + other.total, self.products + other.products
        return Seen(self.count + other.count, total, products, largest, self.clipped + other.clipped)

    @property
    def mean(self) -> Tensor:
        """Float64 [C]."""
        return self.total / self.count

    def covariance(self) -> Tensor:
        """Float64 [C, C], a little of the diagonal added so that it has an inverse."""
        covariance = self.products / self.count - self.mean[:, None] * self.mean
        diagonal = covariance.diagonal()
        return covariance + torch.diag(DAMPING * diagonal.clamp_min(0) + TINY * (1 + diagonal.mean()))


@torch.no_grad()
def observe(
    model: QuantizedModel, batches: Iterable[Tensor], tensors: Mapping[str, float | None], job: str
) -> dict[str, Seen]:
    """What the float network has in some tensors (operator name -> ceiling) on the first 128 images.

    batches: normalised float32 [N, C, H, W] on the model's device.  Raises UserError for values that are not finite,
    with the name of the job they are for.
    """
    seen: dict[str, Seen] = {}
    left = IMAGES
    model.eval()
    for batch in tqdm(batches, job, unit="batch", leave=False, disable=None) if tensors else ():
        for part in limited(model, [batch[:left]]):
            for op, (output,) in run_ops(model, [part], quantized=False):
                if op.name in tensors:
                    found = Seen.of(channel_rows(op, output), tensors[op.name])
                    seen[op.name] = seen[op.name].with_more(found) if op.name in seen else found
        left -= len(batch)
        if left <= 0:
            break
    bad = next((name for name, values in seen.items() if not bool(torch.isfinite(values.products).all())), None)
    if bad is not None:
        raise not_finite(job, repr(bad))
    return seen


def weight_steps(columns: Tensor, bits: int) -> Tensor:
    """Foretold steps [...] of rows of weights [..., inputs, positions]; smooth in the weights."""
    peaks = columns.abs().pow(POWER).mean((-2, -1)).clamp_min(TINY**POWER).pow(1 / POWER)  # rows may be all zero
    return STEP / (int_range(bits, True)[1] + 0.5) * peaks


def input_step(largest: Tensor, source: Quantizer | None) -> Tensor:
    """The step of a layer's input whose values reach so far; 0 where it is not quantized to at most 8 bits."""
    if source is None or source.bits > 8:
        return torch.zeros_like(largest)
    return largest / int_range(source.bits, source.signed)[1]


def output_power(columns: Tensor, covariance: Tensor) -> Tensor:
    """Variance of a layer's outputs, added up over them.

    columns: weights [groups, O / groups, I / groups, positions].  covariance: of the input channels [I, I]; the
    positions of a kernel are taken to be independent.
    """
    groups, _, size, _ = columns.shape
    own = torch.stack([covariance[i : i + size, i : i + size] for i in range(0, groups * size, size)])
    return torch.einsum("goip,gij,gojp->", columns, own, columns).clamp_min(TINY)
