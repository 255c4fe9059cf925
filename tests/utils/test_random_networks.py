"""Random networks behave like trained ones: their activations are spread, and the same in every process."""

import torch

from utils.data_utils import normalize
from utils.integer_graph.serialize import graph_hash
from utils.models import create_model
from utils.random_networks import calibrated, random_images, spread_statistics


def test_images_are_reproducible_and_fill_the_range() -> None:
    images = random_images((3, 32, 32), 4, seed=5)
    assert (images.dtype, images.shape) == (torch.uint8, (4, 3, 32, 32))
    assert torch.equal(images, random_images((3, 32, 32), 4, seed=5))
    assert not torch.equal(images, random_images((3, 32, 32), 4, seed=6))
    assert images.min() < 32
    assert images.max() > 223


def test_normalised_activations_have_the_statistics_of_their_layer() -> None:
    info = create_model("resnet20_cifar10")
    images = normalize(random_images(info.preprocess.input_shape, 4), info.preprocess)
    spread_statistics(info.module, images)
    seen: list[torch.Tensor] = []
    bn = next(module for module in info.module.modules() if isinstance(module, torch.nn.BatchNorm2d))
    # A copy, as the ReLU behind it works in place.
    handle = bn.register_forward_hook(lambda module, inputs, output: seen.append(output.clone()))
    with torch.no_grad():
        info.module(images)
    handle.remove()
    # On the images that made the statistics, each channel has mean ``bias`` and deviation ``weight``.
    torch.testing.assert_close(seen[0].mean((0, 2, 3)), bn.bias.detach(), atol=1e-3, rtol=0)
    torch.testing.assert_close(seen[0].std((0, 2, 3)), bn.weight.detach(), atol=1e-2, rtol=0)


def test_the_same_graph_every_time() -> None:
    first, second = (calibrated("digits", "uniform4").convert(()) for _ in range(2))
    assert graph_hash(first) == graph_hash(second)
