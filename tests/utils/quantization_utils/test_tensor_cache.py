import pytest
import torch

from utils.quantization_utils.coded import CodedQuantizer, make_code
from utils.quantization_utils.quant_modules import Quantizer
from utils.quantization_utils.tensor_cache import TensorCache, bytes_per_value


@pytest.mark.parametrize(
    ("bits", "signed"),
    [(2, True), (2, False), (4, True), (4, False), (8, True), (8, False), (16, True)],  # 16-bit streams are signed
)
def test_quantized_values_come_back_bit_for_bit(bits: int, signed: bool) -> None:
    x = torch.randn(5, 3, 4, 4) if signed else torch.rand(5, 3, 4, 4)
    quantizer = Quantizer(bits, signed).eval()
    quantizer.set_range(x.min(), x.max() / 1.5)
    quantizer.enabled = True
    values = quantizer(x)
    cache = TensorCache(5)
    for index in (slice(0, 2), slice(2, 5)):
        cache.put("x", index, values[index], quantizer)
    assert torch.equal(cache.fetch("x", slice(1, 4)), values[1:4])
    assert torch.equal(cache.fetch("x", torch.tensor([4, 0])), values[[4, 0]])


def test_what_is_fetched_is_a_copy() -> None:
    cache = TensorCache(2)
    cache.put("x", slice(0, 2), torch.ones(2, 3))
    cache.fetch("x", slice(0, 2)).zero_()
    assert torch.equal(cache.fetch("x", slice(0, 2)), torch.ones(2, 3))


def test_rows_are_positions_of_images() -> None:
    x = torch.randn(2, 3, 4, 5)
    cache = TensorCache(2)
    cache.put("x", slice(0, 2), x)
    index = torch.tensor([0, 7, 39])
    assert torch.equal(cache.rows("x", index), torch.stack([x[0, :, 0, 0], x[0, :, 1, 2], x[1, :, 3, 4]]))


def test_an_alias_lives_on_alone() -> None:
    cache = TensorCache(1)
    cache.put("x", slice(0, 1), torch.ones(1, 2))
    cache.alias("y", "x")
    cache.drop("x")
    assert torch.equal(cache.fetch("y", slice(0, 1)), torch.ones(1, 2))
    with pytest.raises(KeyError):
        cache.fetch("x", slice(0, 1))


@pytest.mark.parametrize(("low", "bytes_each"), [(-3.0, 2), (0.0, 1)])
def test_codes_with_a_zero_point_come_back_bit_for_bit(low: float, bytes_each: int) -> None:
    x = torch.linspace(low, 2, 64).reshape(2, 32)
    quantizer = CodedQuantizer(make_code(8, affine=True, narrow=False), 8, signed=low < 0).eval()
    quantizer.set_range(x.min(), x.max())
    quantizer.enabled = True
    cache = TensorCache(2)
    cache.put("x", slice(0, 2), quantizer(x), quantizer)
    assert torch.equal(cache.fetch("x", slice(0, 2)), quantizer(x))
    assert bytes_per_value(quantizer) == bytes_each
