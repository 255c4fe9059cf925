"""Accuracy and agreement, counted again by hand."""

import pytest
import torch
from torch import Tensor

from utils.digits_net import DIGITS_PREPROCESS
from utils.errors import UserError
from utils.evaluation import agreement, evaluate, evaluation_batch, float_predictor
from utils.experiment import Experiment
from utils.integer_graph.torch_engine import TorchEngine
from utils.models import create_model
from utils.quantization_utils.calibrate import calibrate


def random_batches(count: int, size: int) -> list[tuple[Tensor, Tensor]]:
    images = torch.randint(0, 256, (count * size, 1, 8, 8), dtype=torch.uint8)
    return list(zip(images.split(size), torch.randint(0, 10, (count * size,)).split(size), strict=True))


@pytest.fixture
def experiment() -> Experiment:
    info = create_model("digits")
    found = Experiment(info, info.preprocess, "uniform8", torch.device("cpu"))
    calibrate(found.model, [torch.randn(32, 1, 8, 8)])
    return found


def test_accuracy_is_counted_over_images_not_batches() -> None:
    logits = torch.randn(10, 7)
    labels = torch.randint(0, 7, (10,))
    numbers = torch.arange(10)
    batches = [(numbers[:7], labels[:7]), (numbers[7:], labels[7:])]
    found = evaluate(lambda batch: logits[batch], batches, "test")
    ranked = logits.argsort(1, descending=True)
    assert found.top1 == 100 * int((ranked[:, 0] == labels).sum()) / 10
    assert found.top5 == 100 * int((ranked[:, :5] == labels[:, None]).sum()) / 10
    assert found.images == 10
    assert found.seconds > 0
    assert torch.equal(found.predictions, ranked[:, 0])


def test_no_images_are_refused() -> None:
    with pytest.raises(UserError, match="there are 0 images to evaluate"):
        evaluate(lambda batch: batch, [], "test")


@pytest.mark.parametrize(("size", "most"), [(8, 128), (32, 128), (224, 64), (299, 64 * 224**2 // 299**2)])
def test_batches_are_capped_by_their_pixels(size: int, most: int) -> None:
    assert evaluation_batch(128, size) == most
    assert evaluation_batch(3, size) == 3


def test_predictor_normalises_and_evaluates(experiment: Experiment) -> None:
    experiment.model.enable(False)
    experiment.model.train()
    (images, _), *_ = random_batches(1, 4)
    predictor = float_predictor(experiment.model, DIGITS_PREPROCESS, torch.device("cpu"))
    mean, std = DIGITS_PREPROCESS.mean[0], DIGITS_PREPROCESS.std[0]
    expected = create_model("digits").module
    expected.load_state_dict(experiment.model.model.state_dict())
    torch.testing.assert_close(predictor(images), expected.eval()((images / 255 - mean) / std), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("limit", [1, 5, 24, 100])
def test_agreement_looks_at_the_first_images(experiment: Experiment, limit: int) -> None:
    engine = TorchEngine(experiment.convert([]))
    batches = random_batches(2, 12)
    found = agreement(experiment.model, engine, batches, DIGITS_PREPROCESS, limit)
    images = torch.cat([batch for batch, _ in batches])[:limit]
    assert found.images == len(images)
    predictor = float_predictor(experiment.model, DIGITS_PREPROCESS, torch.device("cpu"))
    same = (predictor(images).argmax(1) == engine(images).argmax(1)).double().mean()
    assert found.top1 == pytest.approx(100 * float(same))
    assert 50 < found.activations <= 100


def test_agreement_counts_every_activation(experiment: Experiment) -> None:
    graph = experiment.convert([])
    engine = TorchEngine(graph)
    batches = random_batches(1, 3)
    (images, _), *_ = batches
    simulated = experiment.model.activation_integers(
        (images / 255 - DIGITS_PREPROCESS.mean[0]) / DIGITS_PREPROCESS.std[0]
    )
    integers = engine.run(images)
    names = set(simulated) - {"logits"}
    assert names <= set(integers)
    same = sum(int((integers[n].flatten() == simulated[n].flatten()).sum()) for n in names)
    total = sum(simulated[n].numel() for n in names)
    found = agreement(experiment.model, engine, batches, DIGITS_PREPROCESS, 3)
    assert found.activations == pytest.approx(100 * same / total, abs=0.5)
