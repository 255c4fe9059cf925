"""Calibrated quantized networks with random weights, for measurements and long tests."""

import torch
from torch import Tensor, nn

from bit_config import Scheme
from utils.data_utils import normalize
from utils.experiment import Experiment
from utils.models import create_model
from utils.quantization_utils.calibrate import calibrate


def random_images(shape: tuple[int, ...], count: int, seed: int = 0) -> Tensor:
    """uint8 [count, *shape]: smooth random images, which fill activations as photographs do."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, shape[0], max(2, shape[1] // 8), max(2, shape[2] // 8), generator=generator)
    fine = torch.rand(count, *shape, generator=generator)
    smooth = nn.functional.interpolate(coarse, shape[1:], mode="bilinear", align_corners=False)
    return ((0.8 * smooth + 0.2 * fine) * 255).to(torch.uint8)


def spread_statistics(model: nn.Module, images: Tensor) -> None:
    """Give a randomly initialised network BatchNorm statistics and factors of its own, as training would."""
    generator = torch.Generator().manual_seed(1)
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for bn in norms:
        bn.momentum = None
        bn.reset_running_stats()
        if bn.weight is not None:
            with torch.no_grad():
                bn.weight.copy_(torch.rand(bn.weight.shape, generator=generator) + 0.5)
                bn.bias.copy_(0.2 * torch.randn(bn.bias.shape, generator=generator))
    model.train()
    with torch.no_grad():
        model(images)
    model.eval()


def calibrated(arch: str, scheme: str | Scheme, calibration_images: int = 4) -> Experiment:
    """A network with random weights under a scheme, calibrated on random images."""
    torch.manual_seed(0)
    info = create_model(arch)
    images = normalize(random_images(info.preprocess.input_shape, calibration_images), info.preprocess)
    spread_statistics(info.module, images)
    experiment = Experiment(info, info.preprocess, scheme, torch.device("cpu"))
    calibrate(experiment.model, [images])
    return experiment
