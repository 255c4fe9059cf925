"""Recipes as a whole: the order of their steps, what they say, what they leave behind, what they refuse."""

import dataclasses

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from utils.api import Preprocess, convert, quantize
from utils.data_utils import Loader, make_loader, normalize, open_dataset, subset
from utils.digits_net import DIGITS_PREPROCESS
from utils.errors import UserError
from utils.evaluation import agreement
from utils.experiment import Experiment
from utils.integer_graph.serialize import graph_hash
from utils.integer_graph.torch_engine import TorchEngine
from utils.models import create_model
from utils.quantization_utils import ptq
from utils.quantization_utils.prepare import QuantizedModel
from utils.quantization_utils.ptq import quantize_after_training
from utils.quantization_utils.ptq_recipe import parse_recipe
from utils.quantization_utils.quant_modules import QuantLayer
from utils.quantization_utils.reconstruct import Settings, reconstruct
from utils.random_networks import spread_statistics

STEPS = ("equalize", "calibrate", "calibrate_weights", "limited", "float_means", "correct_biases")
QUICK = Settings(steps=20, positions=128)
PREPROCESS = Preprocess(mean=(0.5,) * 3, std=(0.25,) * 3, resize=None, input_size=6)


class Net(nn.Module):
    """A pair that can be equalised, a ReLU6 that cannot, a layer without bias."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.second, self.third = nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(6, 6, 3, bias=False)
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.relu6(self.second(torch.relu(self.norm(self.first(x)))))
        return self.head(torch.relu(self.third(x)).mean((2, 3)))


def images(count: int = 12) -> Tensor:
    return torch.randn(count, 3, 6, 6, generator=torch.Generator().manual_seed(1))


def network(scheme: str = "w4a8") -> QuantizedModel:
    torch.manual_seed(4)
    module = Net()
    spread_statistics(module, images())
    return quantize(module, torch.zeros(1, 3, 6, 6), scheme).eval()


def carried_out(model: QuantizedModel, text: str, batches: list[Tensor] | None = None) -> tuple[dict, list[str]]:
    """The reference state and the lines said."""
    said: list[str] = []
    given = list(images().split(5)) if batches is None else batches

    def rounding(model: QuantizedModel) -> None:
        reconstruct(model, given, QUICK)

    reference = quantize_after_training(model, given, parse_recipe(text), rounding=rounding, say=said.append)
    return reference, said


def test_the_order_of_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    happened: list[str] = []
    for name in STEPS:
        original = vars(ptq)[name]

        def noted(*args, name=name, original=original, **kwargs):
            happened.append(name)
            return original(*args, **kwargs)

        monkeypatch.setattr(ptq, name, noted)
    recipe = parse_recipe("bias+adaround+mse+equalize")
    quantize_after_training(
        network(), [images()], recipe, rounding=lambda *_: happened.append("rounding"), say=lambda line: None
    )
    assert happened == [
        "equalize",
        "calibrate",
        "calibrate_weights",
        "limited",
        "float_means",
        "rounding",
        "correct_biases",
    ]
    happened.clear()
    quantize_after_training(network(), [images()], parse_recipe("minmax"), say=lambda line: None)
    assert happened == ["calibrate", "calibrate_weights"]


def test_what_is_said() -> None:
    _, said = carried_out(network(), "minmax/ema+equalize+bias")
    assert said[0].startswith("equalisation: 2 pairs of layers, ")
    assert said[0].endswith(" sweeps; 1 left out (second: an upper clip at 6 (ReLU6) lies behind it)")
    assert said[1:] == [
        "activation ranges: ema on 12 images",
        "weight ranges: minmax, one per output channel",
        "bias correction: 3 layers on 12 images; 1 left out (third: it has no bias)",
    ]
    said = []
    quantize_after_training(network(), [images()], parse_recipe("mse"), per_channel=False, say=said.append)
    assert said == ["activation ranges: mse on 12 images", "weight ranges: mse, one per layer"]


def test_several_layers_left_out_for_one_reason_are_counted() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(
        *(nn.Conv2d(3, 3, 1, bias=False), nn.ReLU(), nn.Conv2d(3, 3, 6, bias=False), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(3, 2)),
    )
    _, said = carried_out(quantize(module, torch.zeros(1, 3, 6, 6), "w8a8"), "minmax+bias")
    assert said[-1] == "bias correction: 1 layers on 12 images; 2 left out (0 and others: it has no bias)"


def test_the_reference_is_the_float_network_that_the_result_stands_for() -> None:
    """Equalised, but neither rounded nor corrected."""
    model = network()
    original = {key: value.clone() for key, value in model.model.state_dict().items()}
    with torch.no_grad():
        expected = model(images())
    reference, _ = carried_out(model, "mse+equalize+adaround+bias")
    assert all(q.enabled for q in model.activation_quantizers().values())
    final = {key: value.clone() for key, value in model.model.state_dict().items()}
    changed = {key for key in final if not torch.equal(final[key], reference[key])}
    assert {"first.weight", "second.weight", "second.bias", "norm.bias", "head.bias"} <= changed
    assert {key for key in final if not torch.equal(original[key], reference[key])} >= {"norm.weight", "second.weight"}
    model.enable(False)
    model.model.load_state_dict(reference)
    with torch.no_grad():
        torch.testing.assert_close(model(images()), expected, rtol=1e-4, atol=1e-5)


def test_without_corrections_parameters_stay() -> None:
    model = network()
    original = {key: value.clone() for key, value in model.model.state_dict().items()}
    reference, _ = carried_out(model, "mse")
    assert list(reference) == list(original)
    for key, value in model.model.state_dict().items():
        assert torch.equal(value, original[key])
        assert torch.equal(reference[key], original[key])
        assert reference[key] is not value


def test_the_search_before_rounding_has_its_own_power(monkeypatch: pytest.MonkeyPatch) -> None:
    powers: list[float] = []
    original = ptq.calibrate_weights
    monkeypatch.setattr(ptq, "calibrate_weights", lambda *args: (powers.append(args[2]), original(*args)))
    for text, given in (("mse", None), ("mse+adaround", None), ("mse+adaround", 3.0)):
        quantize_after_training(
            network(), [images()], parse_recipe(text), power=given, rounding=lambda *_: None, say=lambda line: None
        )
    assert powers == [2.0, 2.4, 3.0]


# ---- conversion -----------------------------------------------------------------------------------------------------


def digits(scheme: str) -> tuple[Experiment, Loader]:
    torch.manual_seed(0)
    info = create_model("digits")
    data = subset(open_dataset("digits", "val", DIGITS_PREPROCESS), count=64, seed=0)
    loader = make_loader(data, 32, train=False, workers=0)
    spread_statistics(info.module, normalize(next(iter(loader))[0], DIGITS_PREPROCESS))
    return Experiment(info, DIGITS_PREPROCESS, scheme, torch.device("cpu")), loader


@pytest.mark.parametrize("scheme", ["w8a8", "w4a4"])
@pytest.mark.parametrize("text", ["mse", "minmax+equalize+bias", "ema_quantile", "mse/kl+equalize+adaround+bias"])
def test_the_integer_graph_is_the_simulation(text: str, scheme: str) -> None:
    experiment, loader = digits(scheme)
    batches = [normalize(batch, DIGITS_PREPROCESS) for batch, _ in loader]
    carried_out(experiment.model, text, batches)
    graph = experiment.convert([])
    same = agreement(experiment.model, TorchEngine(graph), loader, DIGITS_PREPROCESS, 64)
    assert same.images == 64
    assert same.top1 >= 100 * 63 / 64  # sums of 16 bits may round to the step beside, and what reads them too
    assert same.narrow > 98
    nodes = [node for node in graph.nodes if "weight" in node.arrays]
    for node, layer in zip(nodes, layers(experiment.model), strict=True):
        assert np.array_equal(node.arrays["weight"], layer.integer_weights().weight.numpy())


def layers(model: QuantizedModel) -> list[QuantLayer]:
    return [layer for layer in model.weight_layers().values() if isinstance(layer, QuantLayer)]


def test_the_same_recipe_gives_the_same_graph() -> None:
    hashes = []
    for _ in range(2):
        model = network()
        carried_out(model, "mse+equalize+adaround+bias")
        hashes.append(graph_hash(convert(model, PREPROCESS)))
    assert hashes[0] == hashes[1]


# ---- odd inputs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["mse+adaround", "minmax+block"])
def test_rounding_without_what_rounds_is_refused(text: str) -> None:
    with pytest.raises(UserError, match=rf"^--ptq with {text.split('+')[1]} is not available here; leave it out$"):
        quantize_after_training(network(), [images()], parse_recipe(text), say=lambda line: None)


RECIPES = ("minmax+equalize+bias", "ema_quantile+bias", "mse+equalize+adaround+bias", "kl", "percentile", "ema_mse")


@pytest.mark.parametrize("text", RECIPES)
def test_one_image_is_enough(text: str) -> None:
    model = network()
    carried_out(model, text, [images(1)])
    assert graph_hash(convert(model, PREPROCESS))
    with torch.no_grad():
        assert bool(torch.isfinite(model(images())).all())


@pytest.mark.parametrize("text", RECIPES)
@pytest.mark.parametrize("value", [0.0, 1.0, -2.0])
def test_constant_images_give_a_result(text: str, value: float) -> None:
    model = network()
    carried_out(model, text, [torch.full((3, 3, 6, 6), value)])
    graph = convert(model, PREPROCESS)
    logits = TorchEngine(graph)(torch.randint(0, 256, (4, 3, 6, 6), dtype=torch.uint8))
    assert bool(torch.isfinite(logits).all())
    assert all(bool(torch.isfinite(value).all()) for value in model.model.state_dict().values())


@pytest.mark.parametrize("text", RECIPES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_images_that_are_not_finite_are_refused(text: str, bad: float) -> None:
    broken = images()
    broken[7, 1, 2, 3] = bad
    with pytest.raises(UserError, match=r"^calibration met .* not finite at 'input_1_q8' .* NaN or infinity$"):
        carried_out(network(), text, list(broken.split(5)))


@pytest.mark.parametrize("text", RECIPES)
@pytest.mark.parametrize("name", ["first", "second", "head"])
def test_weights_that_are_not_finite_are_refused(text: str, name: str) -> None:
    model = network()
    with torch.no_grad():
        model.model.get_submodule(name).weight.view(-1)[3] = float("nan")
    with pytest.raises(UserError, match=r"not finite.*; check the .*NaN or infinity$") as caught:
        carried_out(model, text)
    assert "\n" not in str(caught.value)


def test_no_images_are_refused() -> None:
    with pytest.raises(UserError, match=r"^calibration got 0 images; give at least one"):
        carried_out(network(), "mse+bias", [])


def test_recipes_are_data() -> None:
    """A recipe made without text serves as well."""
    recipe = dataclasses.replace(parse_recipe("minmax"), weights="mse", bias=True)
    model = network()
    quantize_after_training(model, [images()], recipe, say=lambda line: None)
    assert all(layer.learned is not None for layer in layers(model))
