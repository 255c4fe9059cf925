"""Bit widths as data: a scheme is an ordered list of rules, the first that matches a layer's name decides.

    Scheme("mine", (Rule(r"stage4", 4), Rule(r".*", 8)))

:func:`load_scheme` takes what a user gives (a published name, ``uniformN``, ``wXaY`` or a YAML file),
:func:`resolve` applies a scheme to the layers of a network, :func:`save_scheme` writes the result as such a file.

The published schemes below are those of the original HAWQ-V3; a name is a module path in the PyTorchCV model.
"""

import difflib
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from utils.errors import UserError
from utils.quantization_utils.cost_model import Layer, LayerBits

MIN_BITS, MAX_BITS = 2, 8
Bits = int | tuple[int, int]

_EIGHT = ((r".*", 8),)
_FOUR = ((r".*", 4),)
_RESNET18_BOPS_75 = ((r"(stage[23]\.unit2|stage4\.unit\d)\.body\.conv2", 4), *_EIGHT)
_RESNET18_BOPS_25 = (
    (r"stage1\.unit1", 8),
    (r"(stage1\.unit2|stage2\.unit1)\.body\.conv1", 8),
    (r"stage2\.unit1\.identity_conv", 8),
    *_FOUR,
)

# PyTorchCV architecture -> published scheme -> rules.  A shortcut convolution has the bits of the first convolution
# of its unit, which reads the same tensor.
PUBLISHED: dict[str, dict[str, tuple[tuple[str, Bits], ...]]] = {
    "resnet18": {
        "uniform8": _EIGHT,
        "uniform4": _FOUR,
        "modelsize_0.75": ((r"stage[34]\.unit2\.body\.conv2", 4), *_EIGHT),
        "modelsize_0.5": ((r"stage4\.unit(1\.body\.conv2|2)", 4), *_EIGHT),
        "modelsize_0.25": ((r"stage4", 4), *_EIGHT),
        "bops_0.75": _RESNET18_BOPS_75,
        "bops_0.5": ((r"stage[12]\.unit2\.body\.conv2", 4), (r"stage3\.unit2|stage4", 4), *_EIGHT),
        "bops_0.25": _RESNET18_BOPS_25,
        "latency_0.75": _RESNET18_BOPS_75,
        "latency_0.5": (
            (r"(stage2\.unit\d|stage4\.unit1)\.body\.conv2", 4),
            (r"stage[34]\.unit2", 4),
            *_EIGHT,
        ),
        "latency_0.25": _RESNET18_BOPS_25,
    },
    "resnet50": {
        "uniform8": _EIGHT,
        "uniform4": _FOUR,
        "modelsize_0.75": ((r"stage4\.unit\d\.body\.conv2", 4), *_EIGHT),
        "modelsize_0.5": (
            (r"(stage3\.unit[1356]|stage4\.unit\d)\.body\.conv2", 4),
            (r"(stage3\.unit3|stage4\.unit[23])\.body\.conv3", 4),
            *_EIGHT,
        ),
        # As published.  The exact optimum of the original's own integer program keeps stage3.unit6.body.conv1 at
        # 8 bit, and the size and BOPS printed in its model zoo (16.0, 168) are the optimum's, not this scheme's.
        "modelsize_0.25": (
            (r"stage[34]\.unit\d\.body\.conv2", 4),
            (r"(stage3\.unit[2-6]|stage4\.unit[23])\.body\.conv3", 4),
            (r"(stage3\.unit6|stage4\.unit[12])\.body\.conv1", 4),
            (r"stage4\.unit1\.identity_conv", 4),
            *_EIGHT,
        ),
        "bops_0.75": (
            (r"(stage1\.unit3|stage2\.unit4|stage3\.unit[13456]|stage4\.unit1)\.body\.conv2", 4),
            (r"stage3\.unit3\.body\.conv3", 4),
            *_EIGHT,
        ),
        "bops_0.5": (
            (r"(stage1\.unit3|stage[234]\.unit\d)\.body\.conv2", 4),
            (r"(stage2\.unit3|stage3\.unit[2345])\.body\.conv3", 4),
            *_EIGHT,
        ),
        "bops_0.25": (
            (r"stage\d\.unit1\.(body\.conv[13]|identity_conv)", 8),
            (r"stage1\.unit2\.body\.conv3", 8),
            (r"(stage1\.unit3|stage2\.unit4|stage4\.unit[23])\.body\.conv1", 8),
            *_FOUR,
        ),
        "latency_0.75": (
            (r"(stage1\.unit3|stage2\.unit[14]|stage3\.unit[1356]|stage4\.unit1)\.body\.conv2", 4),
            *_EIGHT,
        ),
        "latency_0.5": (
            (r"(stage1\.unit3|stage3\.unit[2-6])\.body\.conv[23]", 4),
            (r"(stage2\.unit[134]|stage3\.unit1|stage4\.unit\d)\.body\.conv2", 4),
            (r"stage3\.unit2\.body\.conv1", 4),
            *_EIGHT,
        ),
        "latency_0.25": (
            (r"stage1\.unit1", 8),
            (r"stage1\.unit2\.body\.conv[13]", 8),
            (r"stage[24]\.unit1\.(body\.conv[13]|identity_conv)", 8),
            (r"(stage1\.unit3|stage2\.unit4|stage3\.unit6|stage4\.unit[23])\.body\.conv1", 8),
            (r"stage3\.unit1\.body\.conv3", 8),
            *_FOUR,
        ),
    },
    "resnet50b": {"uniform8": _EIGHT, "uniform4": _FOUR},
    "resnet101": {"uniform8": _EIGHT, "uniform4": _FOUR},
    "inceptionv3": {"uniform8": _EIGHT, "uniform4": _FOUR},
    "mobilenetv2_w1": {
        "uniform8": _EIGHT,
        "uniform4": ((r"final_block", 8), *_FOUR),
        "modelsize_0.5": (
            (r"stage3\.unit[23]\.conv1", 4),
            (r"(stage4\.unit[23467]|stage5\.unit2)\.conv[13]", 4),
            *_EIGHT,
        ),
        "bops_0.5": (
            (r"(stage[235]\.unit\d|stage4\.unit[23467])\.conv1", 4),
            (r"stage4\.unit[346]\.conv3", 4),
            (r"stage5\.unit4\.conv2", 4),
            *_EIGHT,
        ),
    },
}


@dataclass(frozen=True)
class Rule:
    """Bits of every layer whose full name contains ``pattern`` (``re.search``).

    bits: 2..8 for the weights and the activation in front of them, or a pair (weight bits, activation bits).
    Raises UserError for other bits or a pattern that is no regular expression.
    """

    pattern: str
    bits: Bits

    def __post_init__(self) -> None:
        if not isinstance(self.pattern, str):
            raise UserError(f"the pattern of a rule must be a string, got {self.pattern!r}; put it in quotes")
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise UserError(f"the pattern {self.pattern!r} of a rule is no regular expression: {error}") from error
        pair = self.bits if isinstance(self.bits, tuple) else (self.bits, self.bits)
        if len(pair) != 2 or not all(type(bits) is int and MIN_BITS <= bits <= MAX_BITS for bits in pair):
            raise UserError(
                f"{_describe(self)} asks for {self.bits!r} bits; expected a whole number from {MIN_BITS} to "
                f"{MAX_BITS} or a pair of them (weight bits, activation bits)"
            )

    @property
    def pair(self) -> tuple[int, int]:
        """Weight bits and activation bits."""
        return self.bits if isinstance(self.bits, tuple) else (self.bits, self.bits)


@dataclass(frozen=True)
class Scheme:
    """Ordered rules; the first that matches a layer decides.

    residual_bits: width of residual sums and of the tensors they add, 16 as in HAWQ-V3 or 8.
    ends: "8" puts an 8-bit rule for the first and the last layers in front of all rules, "free" does not.
    Raises UserError for other values.
    """

    name: str
    rules: tuple[Rule, ...]
    residual_bits: int = 16
    ends: str = "8"

    def __post_init__(self) -> None:
        if not (isinstance(self.name, str) and self.name):
            raise UserError(f"the name of a scheme must be a non-empty string, got {self.name!r}")
        if type(self.residual_bits) is not int or self.residual_bits not in (8, 16):
            raise UserError(f"residual_bits of scheme {self.name!r} must be 16 or 8, got {self.residual_bits!r}")
        if self.ends not in ("8", "free"):
            raise UserError(f"ends of scheme {self.name!r} must be 8 or free, got {self.ends!r}")


def resolve(scheme: Scheme, layers: Sequence[Layer]) -> dict[str, LayerBits]:
    """Bits of every layer, in the order of ``layers``, with the reason in words.

    Standalone BN is always (8, 8); then ``ends``; then the rules.  Layers which read the same tensor share one
    activation quantizer, which takes the largest of their activation bits.
    Raises UserError for a rule that occurs in no layer name, a rule that only contradicts implicit ones, and a layer
    that no rule matches; ValueError where two layers have one name.
    """
    names = [layer.name for layer in layers]
    if len(set(names)) != len(names):
        raise ValueError(f"layer names must be unique, got {sorted({n for n in names if names.count(n) > 1})}")
    implicit = {layer.name: reason for layer in layers if (reason := implicit_reason(scheme, layer))}
    for rule in scheme.rules:
        _check_rule(scheme, rule, names, implicit)
    own = {name: _own_bits(scheme, name, implicit) for name in names}
    return _share_activations(layers, own)


def load_scheme(text: str, arch: str) -> Scheme:
    """The scheme a user names: a published one of ``arch``, "uniformN", "wXaY" (N, X, Y in 2..8) or a YAML file.

    arch: name of the network, which selects the published schemes (a published name wins over the general form).
    Raises UserError for an unknown name, listing those that exist, closest first, and for an unusable file.
    """
    if text in PUBLISHED.get(arch, {}):
        return Scheme(text, tuple(Rule(pattern, bits) for pattern, bits in PUBLISHED[arch][text]))
    if match := re.fullmatch(r"uniform([2-8])", text):
        return Scheme(text, (Rule(".*", int(match[1])),))
    if match := re.fullmatch(r"w([2-8])a([2-8])", text):
        return Scheme(text, (Rule(".*", (int(match[1]), int(match[2]))),))
    if text.lower().endswith((".yaml", ".yml")) or os.sep in text or Path(text).is_file():
        return read_scheme(Path(text))
    raise UserError(
        f"no quantization scheme {text!r} for {arch}: expected {', '.join(_closest(text, scheme_names(arch)))}, "
        f"wXaY with X and Y from {MIN_BITS} to {MAX_BITS}, or the path of a .yaml file"
    )


def scheme_names(arch: str) -> list[str]:
    """Names that :func:`load_scheme` knows for ``arch``: the published ones, then the general uniform ones."""
    general = [f"uniform{bits}" for bits in range(MIN_BITS, MAX_BITS + 1)]
    return list(dict.fromkeys([*PUBLISHED.get(arch, {}), *general]))


# --- Files ---------------------------------------------------------------------------------------------------------

_KEYS = ("name", "rules", "layers", "residual_bits", "ends")


def read_scheme(path: Path) -> Scheme:
    """Scheme in a YAML file: a mapping with

    * ``rules``: list of [regex, bits], or ``layers``: {full layer name: bits}, which must then name every layer;
      bits is a number from 2 to 8 or [weight bits, activation bits],
    * optional ``name`` (default: the file's), ``residual_bits`` (16 or 8; default 16),
      ``ends`` (8 or free; default 8 with ``rules`` and free with ``layers``).

    Raises UserError, naming the file, for everything else.
    """
    data = _read_yaml(path)
    for key in data:
        if key not in _KEYS:
            raise UserError(f"scheme file {path} has the unknown key {key!r}; expected {', '.join(_KEYS)}")
    if ("rules" in data) == ("layers" in data):
        raise UserError(f"scheme file {path} must have either 'rules' or 'layers', and not both")
    try:
        rules = _rules_of_list(data["rules"]) if "rules" in data else _rules_of_mapping(data["layers"])
        ends = str(data.get("ends", "8" if "rules" in data else "free"))
        return Scheme(data.get("name", path.stem), rules, data.get("residual_bits", 16), ends)
    except UserError as error:
        raise UserError(f"scheme file {path}: {error}") from error


def save_scheme(
    path: Path, bits: Mapping[str, LayerBits], *, name: str, residual_bits: int = 16, comments: Sequence[str] = ()
) -> None:
    """Write resolved bits, layer by layer, as a file that :func:`load_scheme` reads back to the same bits.

    comments: lines for the top of the file.  The file is replaced atomically.  Raises UserError where it cannot be
    written.
    """
    lines = [
        *(f"# {line}" for comment in comments for line in comment.splitlines()),
        f"name: {json.dumps(name, ensure_ascii=False)}",
        f"residual_bits: {residual_bits}",
        "ends: free",
        "layers:",
    ]
    for layer, b in bits.items():
        value = str(b.weight) if b.weight == b.activation else f"[{b.weight}, {b.activation}]"
        lines.append(f"  {json.dumps(layer, ensure_ascii=False)}: {value}")
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write("\n".join(lines) + "\n")
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise UserError(f"cannot write the scheme file {path}: {error.strerror}; choose another path") from error


class _Loader(yaml.SafeLoader):
    """Safe YAML that refuses a key given twice, where YAML would silently take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.YAMLError(f"the key {key!r} occurs twice")
        return super().construct_mapping(node, deep)


def _read_yaml(path: Path) -> dict[Any, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"scheme file {path} is not a text file; expected YAML") from error
    except OSError as error:
        raise UserError(f"cannot read the scheme file {path}: {error.strerror}") from error
    try:
        data = yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"scheme file {path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(data, dict):
        raise UserError(f"scheme file {path} must hold a mapping with 'rules' or 'layers', got {type(data).__name__}")
    return data


def _rules_of_list(value: object) -> tuple[Rule, ...]:
    if not (isinstance(value, list) and value):
        raise UserError(f"'rules' must be a non-empty list of [regex, bits], got {value!r}")
    for item in value:
        if not (isinstance(item, list) and len(item) == 2):
            raise UserError(f"a rule must be [regex, bits], got {item!r}")
    return tuple(Rule(pattern, _bits_of(bits)) for pattern, bits in value)


def _rules_of_mapping(value: object) -> tuple[Rule, ...]:
    if not (isinstance(value, dict) and value):
        raise UserError(f"'layers' must be a non-empty mapping of layer names to bits, got {value!r}")
    return tuple(Rule(_exactly(str(name)), _bits_of(bits)) for name, bits in value.items())


def _bits_of(value: Any) -> Any:
    """Rule's own form of bits read from a file; anything else passes through, for Rule to refuse."""
    return tuple(value) if isinstance(value, list) else value


# --- Resolution ----------------------------------------------------------------------------------------------------


def _exactly(name: str) -> str:
    return f"^{re.escape(name)}$"


def _describe(rule: Rule) -> str:
    """How messages call a rule: one for a single layer by that layer."""
    name = re.sub(r"\\(.)", r"\1", rule.pattern[1:-1])
    return f"layer {name!r}" if rule.pattern == _exactly(name) else f"rule '{rule.pattern}'"


def implicit_reason(scheme: Scheme, layer: Layer) -> str | None:
    """Why a layer has 8 bits whatever the rules of a scheme say; None where they decide."""
    if layer.kind == "affine":
        return "standalone BN"
    if scheme.ends == "8" and (layer.first or layer.last):
        return "first layer" if layer.first else "last layer"
    return None


def _check_rule(scheme: Scheme, rule: Rule, names: Sequence[str], implicit: Mapping[str, str]) -> None:
    found = [name for name in names if re.search(rule.pattern, name)]
    if not found:
        near = ", ".join(_closest(re.sub(r"[^\w.]+", "", rule.pattern.replace("\\", "")), names)[:3])
        raise UserError(
            f"{_describe(rule)} of scheme {scheme.name!r} occurs in no layer name of this network; near: {near}"
        )
    if rule.pair != (8, 8) and len(implicit) < len(names) and all(name in implicit for name in found):
        raise UserError(
            f"{_describe(rule)} of scheme {scheme.name!r} only matches layers that are always 8 bit "
            f"({found[0]}: {implicit[found[0]]}); remove it, or for first and last layers write 'ends: free'"
        )


def _own_bits(scheme: Scheme, name: str, implicit: Mapping[str, str]) -> LayerBits:
    if name in implicit:
        return LayerBits(8, 8, implicit[name])
    for rule in scheme.rules:
        if re.search(rule.pattern, name):
            return LayerBits(*rule.pair, f"rule '{rule.pattern}'" if rule.pattern != _exactly(name) else "set by name")
    raise UserError(
        f"no rule of scheme {scheme.name!r} matches the layer {name!r}; name every layer or end with the rule ['.*', 8]"
    )


def _share_activations(layers: Iterable[Layer], own: Mapping[str, LayerBits]) -> dict[str, LayerBits]:
    widest: dict[str, str] = {}
    for layer in layers:
        best = widest.setdefault(layer.reads, layer.name)
        if own[layer.name].activation > own[best].activation:
            widest[layer.reads] = layer.name
    shared: dict[str, LayerBits] = {}
    for layer in layers:
        bits, other = own[layer.name], widest[layer.reads]
        if bits.activation < own[other].activation:
            bits = replace(bits, activation=own[other].activation, reason=f"{bits.reason}; tied to {other}")
        shared[layer.name] = bits
    return shared


def _closest(text: str, names: Iterable[str]) -> list[str]:
    return sorted(names, key=lambda name: -difflib.SequenceMatcher(None, text, name).ratio())
