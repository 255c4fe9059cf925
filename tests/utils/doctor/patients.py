"""A small trained network, and images of it, to be made sick."""

from functools import cache
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bit_config import Rule, Scheme
from utils.doctor.outcomes import Images
from utils.experiment import quantize_module
from utils.quantization_utils.calibrate import calibrate
from utils.quantization_utils.prepare import QuantizedModel

CLASSES, COUNT, SIZE = 6, 384, 6
EIGHT = Scheme("eight", (Rule(".*", 8),))


class Small(nn.Module):
    """Three convolutions with BatchNorm and ReLU in a row, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        widths = (1, 8, 12, 12)
        for number, (old, new) in enumerate(pairwise(widths), 1):
            block = nn.Sequential(nn.Conv2d(old, new, 3, padding=1, bias=False), nn.BatchNorm2d(new), nn.ReLU())
            self.add_module(f"block{number}", block)
        self.pool = nn.AdaptiveAvgPool2d(2)
        self.output = nn.Linear(4 * widths[-1], CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block3(self.block2(self.block1(x)))
        result: Tensor = self.output(torch.flatten(self.pool(x), 1))
        return result


def labelled(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Noisy copies of one pattern per class: float32 images [N, 1, 6, 6] and labels, equally many of each class."""
    patterns = torch.randn(CLASSES, 1, SIZE, SIZE, generator=torch.Generator().manual_seed(5))
    labels = torch.arange(count) % CLASSES
    noise = torch.randn(count, 1, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))
    return patterns[labels] + 1.8 * noise, labels


@cache
def trained_state() -> dict[str, Tensor]:
    """Weights after 60 steps of Adam, a second or two."""
    torch.manual_seed(0)
    model = Small()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for step in range(60):
        images, labels = labelled(96, 100 + step)
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
    return {key: value.clone() for key, value in model.state_dict().items()}


def network(scheme: Scheme = EIGHT) -> QuantizedModel:
    """The trained network under a scheme, calibrated on images of its own."""
    module = Small()
    module.load_state_dict(trained_state())
    module.eval()
    model, _, _ = quantize_module(module, torch.zeros(1, 1, SIZE, SIZE), scheme)
    calibrate(model, [labelled(192, 2)[0]], "minmax")
    return model


def images(count: int = COUNT) -> Images:
    """Images that neither training nor calibration saw."""
    pixels, labels = labelled(count, 1)
    return Images(list(zip(pixels.split(64), labels.split(64), strict=True)), lambda x: x)


def narrow(layer: str, bits: int) -> Scheme:
    """All layers at 8 bits but one."""
    rules = (Rule(layer, (bits, 8)), Rule(".*", 8))
    return Scheme("narrow", rules, ends="free")
