"""Names of the original HAWQ's modules, translated into those of the float network (PyTorchCV's), in one table.

The original has a class of its own for each family, whose modules are called otherwise than the float network's.
Weights are translated; activation quantizers have no counterpart in the float network and keep their names.
"""

import re
from collections.abc import Container

RANGE_ENTRIES = ("x_min", "x_max")
ACT_SCALE = "act_scaling_factor"
ACT_SCALE_ENTRIES = (ACT_SCALE, "pre_weight_scaling_factor", "identity_weight_scaling_factor")
SCALE_ENTRIES = ("convbn_scaling_factor", "conv_scaling_factor", "fc_scaling_factor")
WEIGHTS, BIASES = "weight_integer", "bias_integer"
INTEGER_ENTRIES = (WEIGHTS, BIASES)
DERIVED_ENTRIES = frozenset((*RANGE_ENTRIES, *ACT_SCALE_ENTRIES, *SCALE_ENTRIES, *INTEGER_ENTRIES))
COUNTER = "num_batches_tracked"
PREFIX = "module."

# Module in the original -> module in the float network; the first pattern that matches the whole name decides.
_LAYERS = tuple(
    (re.compile(pattern), float_name)
    for pattern, float_name in (
        (r"quant_init(?:_block)?_convbn", r"features.init_block.conv"),
        (r"(stage\d+\.unit\d+)\.quant_convbn(\d)", r"features.\1.body.conv\2"),
        (r"(stage\d+\.unit\d+)\.quant_identity_convbn", r"features.\1.identity_conv"),
        (r"quant_output", r"output"),
        (r"features\.q_init_block\.q_(conv\d)\.q_convbn", r"features.init_block.\1"),
        (r"(features\.stage\d+\.unit\d+\.branches\.branch\d)\.q_conv_list\.q_(conv\d)\.q_convbn", r"\1.conv_list.\2"),
        (r"(features\.stage\d+\.unit\d+\.branches\.branch\d)\.q_(conv(?:1x3|3x1)?)\.q_convbn", r"\1.\2"),
        (r"output\.q_fc", r"output.fc"),
        (r"init_block", r"features.init_block"),
        (r"(features\.stage\d+\.unit\d+\.conv\d|features\.final_block|output)", r"\1"),
    )
)
_PARTS = re.compile(r"(.*?)\.((?:conv|bn)\.\w+|\w+)")
_STALE = "output.conv.weight"  # MobileNetV2 keeps a copy of its last layer's weights that is not trained


def float_module(name: str) -> str | None:
    """The float network's module for a layer of the original, None for activation quantizers and unknown names.

    >>> float_module("stage2.unit1.quant_identity_convbn")
    'features.stage2.unit1.identity_conv'
    >>> float_module("features.stage3.unit2.branches.branch2.q_conv1x3.q_convbn")
    'features.stage3.unit2.branches.branch2.conv1x3'
    """
    for pattern, float_name in _LAYERS:
        if match := pattern.fullmatch(name):
            return match.expand(float_name)
    return None


def float_layer(name: str, layers: Container[str]) -> str | None:
    """The one among the float network's layers that a module of the original is: itself, or a block's convolution.

    >>> float_layer("quant_init_convbn", {"features.init_block.conv.conv", "output"})
    'features.init_block.conv.conv'
    """
    path = float_module(name)
    return next((found for found in (f"{path}.conv", str(path)) if found in layers), None)


def float_key(key: str) -> str | None:
    """The float network's tensor for an entry of the original's state_dict; None for what it derives or repeats.

    >>> float_key("stage1.unit2.quant_convbn1.bn.running_mean")
    'features.stage1.unit2.body.conv1.bn.running_mean'
    >>> float_key("quant_input.x_max") is None
    True
    """
    match = _PARTS.fullmatch(key)
    if match is None or key == _STALE or match[2] in DERIVED_ENTRIES:
        return None
    module = float_module(match[1])
    return None if module is None else f"{module}.{match[2]}"


def plain_key(key: str) -> str:
    """A key without the prefix that DataParallel puts in front."""
    return key.removeprefix(PREFIX)
