"""What ``--ptq`` understands, and how it answers everything else."""

import pytest

from utils.errors import UserError
from utils.quantization_utils.calibrators import METHODS
from utils.quantization_utils.ptq_recipe import PtqRecipe, parse_recipe


@pytest.mark.parametrize(
    ("text", "recipe"),
    [
        ("minmax", PtqRecipe("minmax", "minmax")),
        ("mse", PtqRecipe("mse", "mse")),
        ("ema_mse", PtqRecipe("mse", "ema_mse")),
        ("ema_quantile", PtqRecipe("minmax", "ema_quantile")),
        ("minmax/mse", PtqRecipe("minmax", "mse")),
        ("mse/ema_quantile", PtqRecipe("mse", "ema_quantile")),
        ("minmax+equalize+bias", PtqRecipe("minmax", "minmax", equalize=True, bias=True)),
        ("bias+kl", PtqRecipe("minmax", "kl", bias=True)),
        ("mse+adaround", PtqRecipe("mse", "mse", rounding="adaround")),
        ("balance+mse+descent", PtqRecipe("mse", "mse", balance=True, rounding="descent")),
        ("affine+mse+descent", PtqRecipe("mse", "mse", affine=True, rounding="descent")),
        ("block+equalize+mse/ema+bias", PtqRecipe("mse", "ema", equalize=True, bias=True, rounding="block")),
    ],
)
def test_recipes(text: str, recipe: PtqRecipe) -> None:
    assert parse_recipe(text) == recipe


@pytest.mark.parametrize("method", METHODS)
def test_every_calibrator_is_a_recipe(method: str) -> None:
    assert parse_recipe(method).activations == method
    assert parse_recipe(f"mse/{method}") == PtqRecipe("mse", method)


def test_powers() -> None:
    assert parse_recipe("mse+bias").power == 2.0
    assert parse_recipe("mse+adaround").power == parse_recipe("mse+block").power == 2.4


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "does not know the part ''"),
        ("mse+", "does not know the part ''"),
        ("mse+gptq", "does not know the part 'gptq'"),
        ("MSE", "does not know the part 'MSE'"),
        ("mse, bias", "does not know the part 'mse, bias'"),
        ("kl/mse", "does not know the part 'kl/mse'"),
        ("/mse", "does not know the part '/mse'"),
        ("mse/", "does not know the part 'mse/'"),
        ("mse/mse/mse", "does not know the part 'mse/mse/mse'"),
        ("equalize", "has 0 calibrators"),
        ("adaround+bias", "has 0 calibrators"),
        ("mse+minmax", "has 2 calibrators"),
        ("mse+bias+bias", "names a part twice"),
        ("mse+adaround+adaround", "names a part twice"),
        ("mse+balance+affine", "has affine without a rounding that it prepares for"),
        ("mse+adaround+block", "has both adaround and block"),
    ],
)
def test_refusals(text: str, sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_recipe(text)
    message = str(caught.value)
    assert message.startswith(f"--ptq {text!r} {sentence}; give one calibrator (")
    assert "\n" not in message
    assert message.endswith("equalize, balance, affine, bias and one of descent, adaround, block, joined by +")
