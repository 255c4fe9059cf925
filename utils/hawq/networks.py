"""The three families of the original, as sequences of builder steps.  Names are those of its modules.

Order differs in places where it does not matter: rescaling does not decrease, so it commutes with ReLU and max pooling.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass

from utils.hawq.builder import Builder, Value
from utils.hawq.schemes import RESIDUAL_BITS as WIDE_BITS
from utils.preprocess import Preprocess


@dataclass(frozen=True)
class Network:
    """Builds the whole graph.  names: modules that the file has, from which the blocks are read."""

    builder: Builder
    names: Collection[str]
    shape: tuple[int, ...]
    preprocess: Preprocess | None

    def has(self, name: str) -> bool:
        """Whether the file has a module of this name, or modules inside it."""
        return any(other == name or other.startswith(f"{name}.") for other in self.names)

    def units(self, prefix: str) -> list[str]:
        """``PREFIXstage1.unit1`` ... as far as they go."""
        found = []
        for stage in range(1, self._count(f"{prefix}stage{{}}") + 1):
            units = f"{prefix}stage{stage}.unit{{}}"
            found += [units.format(unit) for unit in range(1, self._count(units) + 1)]
        return found

    def _count(self, pattern: str) -> int:
        number = 0
        while self.has(pattern.format(number + 1)):
            number += 1
        return number


def resnet(n: Network) -> None:
    """ResNet with basic blocks or bottlenecks."""
    b = n.builder
    first = "quant_init_block_convbn" if n.has("quant_init_block_convbn") else "quant_init_convbn"
    x = b.conv(first, b.input("quant_input", b.bits_before(first), n.shape, n.preprocess))
    x = b.act("quant_act_int32.unpooled", WIDE_BITS, x, quantizer="quant_act_int32")
    x = b.relu(b.max_pool("quant_act_int32", x, 3, 2, 1))
    for unit in n.units(""):
        x = b.relu(_residual_unit(n, unit, x))
    x = b.global_mean("quant_act_output", b.bits_before("quant_output"), x)
    b.logits(b.linear("quant_output", b.flat(x)))


def _residual_unit(n: Network, unit: str, x: Value) -> Value:
    """One block; its shortcut is the 16-bit input, or a convolution of what the main path reads."""
    b, identity = n.builder, x
    x = b.act(f"{unit}.quant_act", b.bits_before(f"{unit}.quant_convbn1"), x)
    if n.has(f"{unit}.quant_identity_convbn"):
        identity = b.conv(f"{unit}.quant_identity_convbn", x)
    x = b.conv(f"{unit}.quant_convbn1", x)
    for i in (2, 3):
        if n.has(f"{unit}.quant_convbn{i}"):
            x = b.act(f"{unit}.quant_act{i - 1}", b.bits_before(f"{unit}.quant_convbn{i}"), x, positive=True)
            x = b.conv(f"{unit}.quant_convbn{i}", x)
    return b.add(f"{unit}.quant_act_int32", x, identity)


def mobilenetv2(n: Network) -> None:
    """MobileNetV2: ReLU6, linear bottlenecks, a convolution as classifier."""
    b = n.builder
    x = b.input("quant_input", b.bits_before("init_block"), n.shape, n.preprocess)
    x = b.relu6(b.conv("init_block", x))
    x = b.act("quant_act_int32", WIDE_BITS, x)
    for unit in n.units("features."):
        x = _bottleneck(n, unit, x)
    x = b.act("quant_act_before_final_block", b.bits_before("features.final_block"), x)
    x = b.relu6(b.conv("features.final_block", x))
    x = b.act("quant_act_int32_final", WIDE_BITS, x)
    x = b.global_mean("quant_act_output", b.bits_before("output"), x)
    b.logits(b.flat(b.conv("output", x)))


def _bottleneck(n: Network, unit: str, x: Value) -> Value:
    b, identity = n.builder, x
    for i, act in ((1, "quant_act"), (2, "quant_act1"), (3, "quant_act2")):
        if i > 1:
            x = b.relu6(x)
        x = b.act(f"{unit}.{act}", b.bits_before(f"{unit}.conv{i}"), x)
        x = b.conv(f"{unit}.conv{i}", x)
    name = f"{unit}.quant_act_int32"
    if x.node.type.shape == identity.node.type.shape:
        return b.add(name, x, identity)
    return b.act(name, WIDE_BITS, x)


def inceptionv3(n: Network) -> None:
    """InceptionV3: every branch has an input quantizer of its own."""
    b, block = n.builder, "features.q_init_block"
    x = b.input(f"{block}.q_input_activ", b.bits_before(f"{block}.q_conv1.q_convbn"), n.shape, n.preprocess)
    for i in range(1, 6):
        layer = f"{block}.q_conv{i}"
        bits = b.bits_before(f"{block}.q_conv{i + 1}.q_convbn") if i < 5 else WIDE_BITS
        x = _conv_relu(n, layer, x, bits)
        if i in (3, 5):
            x = b.max_pool(f"{layer}.pool", x, 3, 2)
    for unit in n.units("features."):
        branches = [_branch(n, f"{unit}.branches.branch{i}", x) for i in (1, 2, 3, 4)
                    if n.has(f"{unit}.branches.branch{i}")]  # fmt: skip
        x = b.concat(f"{unit}.q_rescaling_activ", branches)
    x = b.global_mean("features.q_concat_activ", b.bits_before("output.q_fc"), x)
    b.logits(b.linear("output.q_fc", b.flat(x)))


def _conv_relu(n: Network, name: str, x: Value, bits: int) -> Value:
    return n.builder.act(f"{name}.q_activ", bits, n.builder.conv(f"{name}.q_convbn", x), positive=True)


def _branch(n: Network, branch: str, x: Value) -> Value:
    b, act = n.builder, f"{branch}.q_input_act"
    chain = [f"{branch}.q_conv_list.q_conv{i}" for i in range(1, 6) if n.has(f"{branch}.q_conv_list.q_conv{i}")]
    split = [f"{branch}.q_conv{kind}" for kind in ("1x3", "3x1") if n.has(f"{branch}.q_conv{kind}")]
    if n.has(f"{branch}.q_pool_act"):
        x = b.avg_pool(f"{branch}.pool", b.act(act, WIDE_BITS, x), 3, 1, 1)
        x = b.act(f"{branch}.q_pool_act", b.bits_before(f"{branch}.q_conv.q_convbn"), x)
        return _conv_relu(n, f"{branch}.q_conv", x, WIDE_BITS)
    if not chain and not n.has(f"{branch}.q_conv"):
        return b.max_pool(f"{branch}.pool", b.act(act, WIDE_BITS, x), 3, 2)
    chain = chain or [f"{branch}.q_conv"]
    following = [*chain[1:], *split[:1]]
    x = b.act(act, b.bits_before(f"{chain[0]}.q_convbn"), x)
    for i, layer in enumerate(chain):
        bits = b.bits_before(f"{following[i]}.q_convbn") if i < len(following) else WIDE_BITS
        x = _conv_relu(n, layer, x, bits)
    if not split:
        return x
    return b.concat(f"{branch}.q_rescaling_activ", [_conv_relu(n, layer, x, WIDE_BITS) for layer in split])


FAMILIES: dict[str, Callable[[Network], None]] = {
    **dict.fromkeys(("resnet18", "resnet50", "resnet50b", "resnet101"), resnet),
    "mobilenetv2_w1": mobilenetv2,
    "inceptionv3": inceptionv3,
}
