"""Post-training quantization as a recipe says.

Whatever the recipe, the order is: equalise, balance, transform linear streams, calibrate activations on the float
network, choose weight ranges, round by least squares or learning, correct biases.  Everything ends up in the float
model's parameters, in ranges and in learned scales, so conversion, checkpoints and later training need to know nothing
of it.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from utils.errors import UserError
from utils.quantization_utils.affine import transform_streams
from utils.quantization_utils.balance import balance
from utils.quantization_utils.bias_correction import correct_biases, float_means, limited
from utils.quantization_utils.calibrate import calibrate
from utils.quantization_utils.equalize import equalize
from utils.quantization_utils.prepare import QuantizedModel
from utils.quantization_utils.ptq_recipe import PtqRecipe
from utils.quantization_utils.weight_ranges import calibrate_weights

Rounding = Callable[[QuantizedModel], None]  # learns the rounding of all weights, in place


def quantize_after_training(
    model: QuantizedModel,
    batches: Iterable[Tensor],
    recipe: PtqRecipe,
    *,
    percentile: float = 99.99,
    power: float | None = None,
    per_channel: bool = True,
    rounding: Rounding | None = None,
    say: Callable[[str], None] = print,
) -> dict[str, Tensor]:
    """Carry out a recipe; quantization is on afterwards.

    batches: float32 [N, C, H, W], normalised, on the model's device, gone through several times.  percentile, power:
    see :func:`calibrators.make_observer` (power: the recipe's own unless given).  per_channel: of weight ranges.
    rounding: what ``descent``, ``adaround`` or ``block`` calls.  say: gets a line about each step.  Returns the
    state_dict of the float network that the result stands for, to compare with.  Raises UserError as :func:`calibrate`
    does.
    """
    power = recipe.power if power is None else power
    if recipe.equalize:
        _equalize(model, say)
    if recipe.balance:
        balanced = balance(model, batches)
        say(f"balanced channels: {balanced.groups} groups of tensors, noise foretold {balanced.decibels:.2f} dB lower")
    if recipe.affine:
        done = transform_streams(model, batches)
        gain = f", noise foretold {done.decibels:.2f} dB lower" if done.streams else " (the network has none)"
        say(f"transformed linear streams: {done.streams}{gain}")
    reference = {key: value.clone() for key, value in model.model.state_dict().items()}
    images = calibrate(model, batches, recipe.activations, percentile, power)
    say(f"activation ranges: {recipe.activations} on {images} images")
    calibrate_weights(model, recipe.weights, power, per_channel)
    say(f"weight ranges: {recipe.weights}, one per {'output channel' if per_channel else 'layer'}")
    first = limited(model, batches) if recipe.bias else []
    means = float_means(model, first) if recipe.bias else {}
    model.enable()
    if recipe.rounding is not None:
        if rounding is None:
            raise UserError(f"--ptq with {recipe.rounding} is not available here; leave it out")
        rounding(model)
    if recipe.bias:
        corrected = correct_biases(model, first, means)
        left_out = _left_out(corrected.skipped)
        say(f"bias correction: {len(corrected.layers)} layers on {corrected.images} images{left_out}")
    return reference


def _equalize(model: QuantizedModel, say: Callable[[str], None]) -> None:
    done = equalize(model)
    if not all(bool(torch.isfinite(p).all()) for p in model.model.parameters()):
        raise UserError("equalisation met weights that are not finite; check the weights for NaN or infinity")
    say(f"equalisation: {len(done.pairs)} pairs of layers, {done.sweeps} sweeps{_left_out(done.skipped)}")


def _left_out(skipped: dict[str, str]) -> str:
    reasons = {reason: [name for name, why in skipped.items() if why == reason] for reason in skipped.values()}
    return "".join(
        f"; {len(names)} left out ({names[0]}{' and others' if len(names) > 1 else ''}: {why})"
        for why, names in reasons.items()
    )
