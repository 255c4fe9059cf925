"""The original's forward written anew with plain torch operators, and checkpoints that it would have saved.

No arithmetic here is of ``utils.hawq``: integers are carried in float64, rescaling follows the formula with frexp,
pooling and ReLU happen where the original has them.  Networks: ResNets and MobileNetV2, at any input size.
"""

import functools
import re
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from pytorchcv.model_provider import get_model
from torch import Tensor, nn

import bit_config
from utils.hawq.graph import float_layers
from utils.models import create_model

SIZE = 64  # of the random networks' images
RANGE = torch.tensor(1e-8)
Bits = Mapping[str, int]  # layer of the original -> bits of its weights and of the activation in front of it
RENAMED = (
    (r"features\.init_block\.conv\.((?:conv|bn)\..*)", r"quant_init_block_convbn.\1"),
    (r"features\.(stage\d\.unit\d+)\.body\.conv(\d)\.(.*)", r"\1.quant_convbn\2.\3"),
    (r"features\.(stage\d\.unit\d+)\.identity_conv\.(.*)", r"\1.quant_identity_convbn.\2"),
    (r"output\.(.*)", r"quant_output.\1"),
)
RENAMED_MOBILENET = ((r"features\.init_block\.(.*)", r"init_block.\1"), (r"(.*)", r"\1"))


def original_key(arch: str, key: str) -> str:
    """The original's key for one of PyTorchCV's."""
    for pattern, replacement in RENAMED_MOBILENET if arch == "mobilenetv2_w1" else RENAMED:
        if match := re.fullmatch(pattern, key):
            return match.expand(replacement)
    raise KeyError(key)


@dataclass(frozen=True)
class Scaled:
    """Integers in float64, the scale of the activation that they come from, and of the weights (1 without)."""

    z: Tensor
    a: Tensor
    w: Tensor = field(default_factory=lambda: torch.ones(1))

    @property
    def real(self) -> Tensor:
        return self.z * (self.a.double() * self.w.double()).view(1, -1, 1, 1)


class Original:
    """One network of the original.

    state: float32 entries under the original's names; ranges are added by ``forward(..., calibrate=True)``.
    derived: scales and integers as of the last forward.  acts: integers of every activation quantizer in it.
    """

    def __init__(self, arch: str, module: nn.Module, bits: Bits) -> None:
        self.arch, self.module, self.bits = arch, module, bits
        self.state = {original_key(arch, key): value.clone() for key, value in module.state_dict().items()}
        self.derived: dict[str, Tensor] = {}
        self.acts: dict[str, Tensor] = {}
        self.calibrate = False

    def forward(self, images: Tensor, calibrate: bool = False) -> Tensor:
        """Logits float32 [N, classes] of normalised float32 images."""
        self.calibrate, self.acts = calibrate, {}
        with torch.inference_mode():
            return self._mobilenet(images) if self.arch == "mobilenetv2_w1" else self._resnet(images)

    # ---- arithmetic ------------------------------------------------------------------------------------------------

    def act_scale(self, name: str, bits: int, real: Tensor) -> Tensor:
        if self.calibrate:
            self.state[f"{name}.x_min"] = real.min().float().reshape(1)
            self.state[f"{name}.x_max"] = real.max().float().reshape(1)
        low, high = self.state[f"{name}.x_min"], self.state[f"{name}.x_max"]
        if bits == 4:
            scale = torch.maximum(high - low, RANGE) / 15
        else:
            scale = torch.maximum(torch.maximum(low.abs(), high.abs()), RANGE) / (2 ** (bits - 1) - 1)
        self.derived[f"{name}.act_scaling_factor"] = scale
        return scale

    def clamp(self, z: Tensor, bits: int) -> Tensor:
        return z.clamp(0, 15) if bits == 4 else z.clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)

    def rescale(self, x: Scaled, scale: Tensor) -> Tensor:
        ratio = (x.a.double() * x.w.double()).float().double() / scale.double()
        fraction, exponent = torch.frexp(ratio)
        multiplier = torch.floor(fraction * 2**31 + 0.5)
        factor = multiplier * torch.exp2(exponent.double() - 31)  # exact: a power of two
        return torch.round(x.z * factor.view(1, -1, *(1,) * (x.z.ndim - 2)))

    def act(self, name: str, bits: int, x: Scaled) -> Scaled:
        scale = self.act_scale(name, bits, x.real)
        self.acts[name] = self.clamp(self.rescale(x, scale), bits)
        return Scaled(self.acts[name], scale)

    def add(self, name: str, x: Scaled, identity: Scaled) -> Scaled:
        scale = self.act_scale(name, 16, x.real + identity.real)
        self.acts[name] = self.rescale(identity, scale) + self.rescale(x, scale)
        return Scaled(self.acts[name], scale)

    def input(self, bits: int, images: Tensor) -> Scaled:
        scale = self.act_scale("quant_input", bits, images)
        self.acts["quant_input"] = self.clamp(torch.round(1 / scale * images).double(), bits)
        return Scaled(self.acts["quant_input"], scale)

    def weight_range(self, weight: Tensor) -> Tensor:
        return torch.maximum(weight.flatten(1).abs().amax(1), RANGE)

    def layer(self, name: str, path: str, x: Scaled) -> Scaled:
        get, conv = self.state.__getitem__, self.module.get_submodule(path)
        if f"{name}.bn.weight" in self.state:
            bn = self.module.get_submodule(path.removesuffix("conv") + "bn")
            deviation = torch.sqrt((get(f"{name}.bn.running_var") + bn.eps).double()).float()  # correctly rounded
            factor = get(f"{name}.bn.weight") / deviation
            weight = get(f"{name}.conv.weight") * factor.view(-1, 1, 1, 1)
            bias: Tensor | None = (0 - get(f"{name}.bn.running_mean")) * factor + get(f"{name}.bn.bias")
            kind = "convbn"
        else:
            weight, bias = get(f"{name}.weight"), self.state.get(f"{name}.bias")
            kind = "conv" if weight.ndim == 4 else "fc"
        top = 2 ** (self.bits[name] - 1) - 1
        scale = self.weight_range(weight) / top
        q = torch.round((1 / scale).view(-1, *(1,) * (weight.ndim - 1)) * weight).clamp(-top - 1, top)
        self.derived |= {f"{name}.{kind}_scaling_factor": scale, f"{name}.weight_integer": q}
        if isinstance(conv, nn.Conv2d):
            z = F.conv2d(x.z, q.double(), None, conv.stride, conv.padding, conv.dilation, conv.groups)
        else:
            z = F.linear(x.z.flatten(1), q.double())
        if bias is not None:
            integers = torch.round(1 / (scale * x.a) * bias).clamp(-(2.0**31), 2.0**31)
            self.derived[f"{name}.bias_integer"] = integers
            z = z + integers.double().view(1, -1, *(1,) * (z.ndim - 2))
        return Scaled(z, x.a, scale)

    def mean(self, x: Scaled) -> Scaled:
        return Scaled(torch.trunc(F.avg_pool2d(x.z, x.z.shape[-1]) + 0.01), x.a)

    def logits(self, x: Scaled) -> Tensor:
        return x.z.flatten(1).float() * (x.w * x.a)

    # ---- networks --------------------------------------------------------------------------------------------------

    def _resnet(self, images: Tensor) -> Tensor:
        first = "quant_init_block_convbn"
        x = self.layer(first, "features.init_block.conv.conv", self.input(self.bits[first], images))
        x = self.act("quant_act_int32", 16, Scaled(F.max_pool2d(x.z, 3, 2, 1), x.a, x.w))
        x = Scaled(x.z.relu(), x.a)
        units = {key.split(".quant_")[0]: None for key in self.state if key.startswith("stage")}
        for unit in units:
            x = self._block(unit, x)
        x = self.act("quant_act_output", self.bits["quant_output"], self.mean(x))
        return self.logits(self.layer("quant_output", "output", x))

    def _block(self, unit: str, x: Scaled) -> Scaled:
        identity, path = x, f"features.{unit}"
        x = self.act(f"{unit}.quant_act", self.bits[f"{unit}.quant_convbn1"], x)
        if f"{unit}.quant_identity_convbn" in self.bits:
            identity = self.layer(f"{unit}.quant_identity_convbn", f"{path}.identity_conv.conv", x)
        for i in (1, 2, 3):
            if f"{unit}.quant_convbn{i}" in self.bits:
                if i > 1:
                    x = Scaled(x.z.relu(), x.a, x.w)
                    x = self.act(f"{unit}.quant_act{i - 1}", self.bits[f"{unit}.quant_convbn{i}"], x)
                x = self.layer(f"{unit}.quant_convbn{i}", f"{path}.body.conv{i}.conv", x)
        x = self.add(f"{unit}.quant_act_int32", x, identity)
        return Scaled(x.z.relu(), x.a)

    def _relu6(self, x: Scaled) -> Scaled:
        bound = torch.round(torch.tensor(6.0) / x.a / x.w).double().view(1, -1, 1, 1)
        return Scaled(torch.minimum(x.z.relu(), bound), x.a, x.w)

    def _mobilenet(self, images: Tensor) -> Tensor:
        x = self._relu6(self.layer("init_block", "features.init_block.conv", self.input(8, images)))
        x = self.act("quant_act_int32", 16, x)
        units = {m[0]: None for key in self.state if (m := re.match(r"features\.stage\d\.unit\d", key))}
        for unit in units:
            x = self._bottleneck(unit, x)
        x = self.act("quant_act_before_final_block", self.bits["features.final_block"], x)
        x = self._relu6(self.layer("features.final_block", "features.final_block.conv", x))
        x = self.act("quant_act_int32_final", 16, x)
        x = self.act("quant_act_output", self.bits["output"], self.mean(x))
        return self.logits(self.layer("output", "output", x))

    def _bottleneck(self, unit: str, x: Scaled) -> Scaled:
        identity = x
        for i, name in ((1, "quant_act"), (2, "quant_act1"), (3, "quant_act2")):
            x = x if i == 1 else self._relu6(x)
            x = self.layer(
                f"{unit}.conv{i}", f"{unit}.conv{i}.conv", self.act(f"{unit}.{name}", self.bits[f"{unit}.conv{i}"], x)
            )
        stays = self.module.get_submodule(f"{unit}.conv2.conv").stride == (1, 1)
        if stays and x.z.shape == identity.z.shape:
            return self.add(f"{unit}.quant_act_int32", x, identity)
        return self.act(f"{unit}.quant_act_int32", 16, x)

    # ---- files -----------------------------------------------------------------------------------------------------

    def entries(self, shape: tuple[int, ...] = (1,)) -> OrderedDict[str, Tensor]:
        """Everything its state_dict would hold, ranges in the given shape, () or (1,)."""
        entries = OrderedDict(self.state | self.derived)
        if self.arch == "mobilenetv2_w1":
            entries["output.conv.weight"] = torch.full_like(entries["output.weight"], 7.0)  # stale
        for name in self.acts:
            for leaf in ("x_min", "x_max", "act_scaling_factor"):
                entries[f"{name}.{leaf}"] = entries[f"{name}.{leaf}"].reshape(shape)
            entries |= {f"{name}.{leaf}": torch.ones(1) for leaf in ("pre_weight_scaling_factor",)}
            entries |= {f"{name}.identity_weight_scaling_factor": torch.ones(1)}
        return entries

    def checkpoint(self, prefix: str = "module.", shape: tuple[int, ...] = (1,), epoch: int = 1) -> dict[str, Any]:
        """Content of its checkpoint.pth.tar."""
        state = OrderedDict((prefix + key, value.clone()) for key, value in self.entries(shape).items())
        group = {"lr": 1e-4, "momentum": 0.9, "dampening": 0, "weight_decay": 1e-4, "nesterov": False, "params": [0]}
        optimizer = {"state": {0: {"momentum_buffer": torch.zeros(2)}}, "param_groups": [group]}
        best = torch.tensor(12.5)
        return {"epoch": epoch, "arch": self.arch, "state_dict": state, "best_acc1": best, "optimizer": optimizer}

    def quantized_checkpoint(self, prefix: str = "module.") -> dict[str, Any]:
        """Content of its quantized_checkpoint.pth.tar."""
        return five_dicts(self.checkpoint(prefix)["state_dict"])


def five_dicts(state: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """What the original takes out of a state_dict for its quantized_checkpoint.pth.tar: by a part of the key."""
    names = ("convbn_scaling_factor", "fc_scaling_factor", "weight_integer", "bias_integer", "act_scaling_factor")
    return {name: {key: value for key, value in state.items() if name in key} for name in names}


def layer_bits(arch: str, scheme: str) -> Bits:
    """Bits of every layer of the original under a published scheme."""
    with torch.device("meta"):
        layers = float_layers(create_model(arch))
    bits = bit_config.resolve(bit_config.load_scheme(scheme, arch), layers)
    keys = {original_key(arch, f"{path}.weight").removesuffix(".weight"): pair for path, pair in bits.items()}
    return {key.removesuffix(".conv"): pair.weight for key, pair in keys.items()}


@functools.cache
def network(arch: str, scheme: str, classes: int = 10) -> Original:
    """A random network whose ranges are those of four images; made once, not to be changed."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        original = random_network(arch, layer_bits(arch, scheme), classes=classes)
        original.forward(torch.randn(4, 3, SIZE, SIZE), calibrate=True)
    return original


def random_network(arch: str, bits: Bits, *, classes: int = 10) -> Original:
    """A network with random weights and BatchNorms, among them channels that training leaves behind.

    In the first convolution of the second stage: all-zero filters with a bias of either sign that saturates, a negative
    gamma, gamma 0, a variance of 0, and a filter next to 0 whose bias saturates too.
    """
    module = get_model(arch, num_classes=classes).eval()
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            nn.init.normal_(layer.bias, 0, 0.1)
            nn.init.normal_(layer.running_mean, 0, 0.1)
            nn.init.uniform_(layer.running_var, 0.5, 1.5)
    unit: Any = module.features.stage2.unit1
    block = unit.conv1 if arch == "mobilenetv2_w1" else unit.body.conv1
    with torch.no_grad():
        block.conv.weight[0], block.bn.bias[0] = 0, 10.0
        block.conv.weight[1], block.bn.bias[1] = 0, -10.0
        block.bn.weight[2], block.bn.weight[3], block.bn.running_var[4] = -0.7, 0, 0
        block.conv.weight[5] *= 5e-8
        block.bn.bias[5] = 10.0
    return Original(arch, module, bits)
