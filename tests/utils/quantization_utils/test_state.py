import pytest
import torch
from torch import nn

from bit_config import load_scheme, resolve
from utils.errors import UserError
from utils.quantization_utils.calibrate import calibrate
from utils.quantization_utils.capture import capture
from utils.quantization_utils.prepare import QuantizedModel, describe_layers, fold_network, prepare
from utils.quantization_utils.quant_modules import QuantLayer
from utils.quantization_utils.state import load_quantizer_state, quantizer_state
from utils.quantization_utils.training import configure, learned_scales


def small(width: int = 4) -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, 4, 3), nn.ReLU(), nn.Flatten(),
        nn.Linear(4 * 4 * 4, 5),
    )  # fmt: skip


def quantized(model: nn.Module, scheme: str = "uniform4") -> QuantizedModel:
    captured = capture(model, torch.zeros(1, 3, 8, 8))
    network = fold_network(captured)
    return prepare(captured, network, resolve(load_scheme(scheme, "small"), describe_layers(network)))


@pytest.mark.parametrize("act_range", ["ema", "lsq"])
def test_a_restored_model_computes_the_same(act_range: str) -> None:
    images = torch.randn(8, 3, 8, 8)
    first, second = quantized(small()), quantized(small())
    calibrate(first, [images])
    configure(first, act_range=act_range)
    load_quantizer_state(second, quantizer_state(first))
    second.eval()
    assert torch.equal(first(images), second(images))
    assert [name for name, _ in learned_scales(first)] == [name for name, _ in learned_scales(second)]
    assert bool(learned_scales(first)) == (act_range == "lsq")


def test_state_is_a_copy() -> None:
    model = quantized(small())
    calibrate(model, [torch.randn(8, 3, 8, 8)])
    state = quantizer_state(model)
    before = {name: entry["x_max"].clone() for name, entry in state["activations"].items()}
    calibrate(model, [10 * torch.randn(8, 3, 8, 8)])
    assert all(torch.equal(before[name], entry["x_max"]) for name, entry in state["activations"].items())


def test_which_integers_weights_may_take_is_restored() -> None:
    model, restored = quantized(small()), quantized(small())
    name, layer = next((name, found) for name, found in model.weight_layers().items() if found.bits == 4)
    assert isinstance(layer, QuantLayer)
    layer.learn_scale()
    layer.narrow_range = False
    state = quantizer_state(model)
    load_quantizer_state(restored, state)
    same = restored.weight_layers()[name]
    assert isinstance(same, QuantLayer)
    assert same.integer_range() == (-8, 7)
    for saved in state["weights"].values():
        del saved["narrow_range"]  # as files of earlier versions
    load_quantizer_state(restored, state)
    assert same.integer_range() == (-7, 7)


def test_another_scheme_is_refused() -> None:
    state = quantizer_state(quantized(small(), "uniform4"))
    with pytest.raises(
        UserError, match=r"exists only in the checkpoint|exists only in this network|bits in the checkpoint"
    ):
        load_quantizer_state(quantized(small(), "uniform8"), state)


def test_another_network_is_refused() -> None:
    state = quantizer_state(quantized(small()))
    other = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 36, 5))
    with pytest.raises(UserError, match=r"exists only in .*--quant-scheme"):
        load_quantizer_state(quantized(other), state)
