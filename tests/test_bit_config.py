"""Schemes: the published ones against the original's tables, resolution rules, files, and every error message."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bit_config import PUBLISHED, Rule, Scheme, load_scheme, resolve, save_scheme, scheme_names
from tests.utils.hawq.golden import expand, scheme_tables
from utils.errors import UserError
from utils.hawq.names import float_layer
from utils.quantization_utils.cost_model import Layer, LayerBits


def layer(name: str, kind: str = "conv", *, reads: str | None = None, first: bool = False, last: bool = False) -> Layer:
    return Layer(name, kind, 10, 100, 2, reads or f"tensor before {name}", first, last)


LAYERS = [
    layer("stem", first=True),
    layer("block1.conv1", reads="x1"),
    layer("block1.shortcut", reads="x1"),
    layer("block1.conv2"),
    layer("norm", "affine", reads="x2"),
    layer("block2.conv1", reads="x2"),
    layer("head", "linear", last=True),
]


def pairs(scheme: Scheme, layers: list[Layer] = LAYERS) -> dict[str, tuple[int, int]]:
    return {name: (bits.weight, bits.activation) for name, bits in resolve(scheme, layers).items()}


# --- The published schemes -----------------------------------------------------------------------------------------


def activation_of(arch: str, name: str, modules: set[str]) -> str:
    """Name of the original's activation module in front of its layer ``name``."""
    unit, _, short = name.rpartition(".")
    prefix = unit + "." if unit else ""
    if arch == "inceptionv3":
        return _inception_activation(name, modules)
    if short in ("quant_init_block_convbn", "quant_init_convbn", "init_block"):
        return "quant_input"
    if short in ("quant_output", "output"):
        return "quant_act_output"
    if short == "final_block":
        return "quant_act_before_final_block"
    number = 1 if short == "quant_identity_convbn" else int(short[-1])
    return f"{prefix}quant_act{number - 1 or ''}"


def _inception_activation(name: str, modules: set[str]) -> str:
    if name == "output.q_fc":
        return "features.q_concat_activ"
    path = name.removesuffix(".q_convbn")
    parent, _, conv = path.rpartition(".")
    if match := re.fullmatch(r"q_conv([2-9])", conv):  # inside a sequence: the one before
        return f"{parent}.q_conv{int(match[1]) - 1}.q_activ"
    if parent.endswith("q_init_block"):
        return f"{parent}.q_input_activ"
    if conv in ("q_conv1x3", "q_conv3x1"):  # both read the end of the sequence before
        ends = [m for m in modules if re.fullmatch(re.escape(parent) + r"\.q_conv_list\.q_conv\d\.q_activ", m)]
        return max(ends)
    branch = parent.removesuffix(".q_conv_list")
    return f"{branch}.q_pool_act" if f"{branch}.q_pool_act" in modules else f"{branch}.q_input_act"


CASES = [(arch, scheme) for arch, schemes in PUBLISHED.items() for scheme in schemes]


@pytest.fixture(scope="session")
def originals(shared: Path) -> dict[str, Any]:
    return scheme_tables(shared)


def test_exactly_the_published_schemes_exist(originals: dict[str, Any]) -> None:
    assert {(arch, name) for arch, table in originals.items() for name in table["schemes"]} == set(CASES)
    assert len(CASES) == 32


@pytest.mark.parametrize(("arch", "name"), CASES)
def test_published_scheme(originals: dict[str, Any], network: Callable[..., Any], arch: str, name: str) -> None:
    """Weight bits of every layer, bits of the activation in front of it, and the 16-bit tensors."""
    original, layers = expand(originals[arch], name), network(arch).layers
    names, expected = {layer.name for layer in layers}, {}
    for module, bits in original.items():
        if path := float_layer(module, names):
            expected[path] = (bits, original[activation_of(arch, module, set(original))])
    scheme = load_scheme(name, arch)
    assert pairs(scheme, layers) == expected
    assert set(expected) == names
    assert {bits for bits in original.values() if bits > 8} == {scheme.residual_bits}


@pytest.mark.parametrize("arch", ["resnet18", "resnet50", "resnet101"])
def test_shortcut_convolutions_follow_the_first_convolution(network: Callable[..., Any], arch: str) -> None:
    for name in PUBLISHED[arch]:
        bits = pairs(load_scheme(name, arch), network(arch).layers)
        shortcuts = [layer for layer in bits if "identity_conv" in layer]
        assert shortcuts
        for shortcut in shortcuts:
            assert bits[shortcut] == bits[shortcut.replace("identity_conv", "body.conv1")]


# --- Resolution ----------------------------------------------------------------------------------------------------


def test_first_match_wins_and_the_ends_are_8_bit() -> None:
    scheme = Scheme("s", (Rule(r"block2", 2), Rule(r"conv", 5), Rule(r".*", 3)))
    resolved = resolve(scheme, [x for x in LAYERS if x.kind != "affine"])
    assert list(resolved) == ["stem", "block1.conv1", "block1.shortcut", "block1.conv2", "block2.conv1", "head"]
    assert resolved["stem"] == LayerBits(8, 8, "first layer")
    assert resolved["head"] == LayerBits(8, 8, "last layer")
    assert resolved["block1.conv1"] == LayerBits(5, 5, "rule 'conv'")
    assert resolved["block2.conv1"] == LayerBits(2, 2, "rule 'block2'")
    assert resolved["block1.shortcut"] == LayerBits(3, 5, "rule '.*'; tied to block1.conv1")


def test_free_ends_obey_the_rules_and_standalone_bn_never_does() -> None:
    resolved = resolve(Scheme("s", (Rule(".*", 4),), ends="free"), LAYERS)
    assert resolved["stem"] == LayerBits(4, 4, "rule '.*'")
    assert resolved["head"] == LayerBits(4, 4, "rule '.*'")
    assert resolved["norm"] == LayerBits(8, 8, "standalone BN")
    assert resolved["block2.conv1"] == LayerBits(4, 8, "rule '.*'; tied to norm")


def test_a_pair_sets_weights_and_activation_apart() -> None:
    bits = pairs(Scheme("s", (Rule("conv2", (3, 6)), Rule(".*", 8))))
    assert bits["block1.conv2"] == (3, 6)
    assert bits["block1.conv1"] == (8, 8)


def test_a_regex_that_occurs_in_no_layer_is_refused() -> None:
    with pytest.raises(UserError, match=r"rule 'blok1\\\.conv' of scheme 's' occurs in no layer.*near: block1\.conv"):
        resolve(Scheme("s", (Rule(r"blok1\.conv", 4), Rule(".*", 8))), LAYERS)


def test_a_layer_without_a_rule_is_refused() -> None:
    with pytest.raises(UserError, match=r"no rule of scheme 's' matches the layer 'block1\.shortcut'.*'\.\*'"):
        resolve(Scheme("s", (Rule("conv", 4),)), LAYERS)


@pytest.mark.parametrize(
    ("pattern", "reason"), [("^head$", "last layer"), ("stem", "first"), ("norm", "standalone BN")]
)
def test_a_rule_that_an_implicit_rule_overrules_is_refused(pattern: str, reason: str) -> None:
    with pytest.raises(UserError, match=f"only matches layers that are always 8 bit .*{reason}.*ends: free"):
        resolve(Scheme("s", (Rule(pattern, 4), Rule(".*", 8))), LAYERS)
    assert pairs(Scheme("s", (Rule(pattern, 8), Rule(".*", 8))))


def test_a_network_of_ends_alone_takes_a_uniform_scheme() -> None:
    ends = [layer("stem", first=True), layer("head", "linear", last=True)]
    assert pairs(load_scheme("uniform4", "tiny"), ends) == {"stem": (8, 8), "head": (8, 8)}


def test_names_must_be_unique() -> None:
    with pytest.raises(ValueError, match=r"layer names must be unique, got \['stem'\]"):
        resolve(Scheme("s", (Rule(".*", 8),)), [LAYERS[0], LAYERS[0]])


# --- Names ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", range(2, 9))
def test_general_names_fit_every_network(n: int) -> None:
    assert pairs(load_scheme(f"uniform{n}", "anything"))["block1.conv2"] == (n, n)
    assert pairs(load_scheme(f"w{n}a{10 - n}", "anything"))["block1.conv2"] == (n, 10 - n)


@pytest.mark.parametrize("text", ["uniform9", "uniform1", "w4a9", "W4A4", "bops_05", "modelsize0.5", ""])
def test_an_unknown_name_lists_those_that_exist(text: str) -> None:
    with pytest.raises(UserError, match=f"no quantization scheme '{re.escape(text)}' for resnet18") as caught:
        load_scheme(text, "resnet18")
    assert all(name in str(caught.value) for name in [*scheme_names("resnet18"), "wXaY", ".yaml"])


def test_an_unknown_name_lists_the_closest_first() -> None:
    with pytest.raises(UserError, match=r"for resnet18: expected bops_0\.5, "):
        load_scheme("bops_05", "resnet18")
    with pytest.raises(UserError, match="for resnet50b: expected uniform"):
        load_scheme("bops_0.5", "resnet50b")


# --- Files ---------------------------------------------------------------------------------------------------------


def written(tmp_path: Path, text: str) -> str:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    return str(path)


def test_a_file_of_rules(tmp_path: Path) -> None:
    text = "rules:\n  - ['block2', 4]\n  - [conv2, [3, 6]]\n  - ['.*', 8]\nresidual_bits: 8\nends: free\n"
    scheme = load_scheme(written(tmp_path, text), "tiny")
    assert scheme == Scheme("mine", (Rule("block2", 4), Rule("conv2", (3, 6)), Rule(".*", 8)), 8, "free")
    assert load_scheme(written(tmp_path, "{name: a, ends: 8, rules: [[x, 2]]}"), "tiny") == Scheme("a", (Rule("x", 2),))


def test_a_saved_scheme_reads_back_to_the_same_bits(tmp_path: Path) -> None:
    rules = (Rule("conv2", (3, 6)), Rule(r"block[12]\.", 4), Rule(".*", 5))
    for ends in ("8", "free"):
        scheme = Scheme("s", rules, residual_bits=8, ends=ends)
        path = tmp_path / "found.yaml"
        save_scheme(path, resolve(scheme, LAYERS), name="a: 'quoted' name", residual_bits=8)
        loaded = load_scheme(str(path), "tiny")
        assert (loaded.name, loaded.residual_bits) == ("a: 'quoted' name", 8)
        assert pairs(loaded) == pairs(scheme)
        assert resolve(loaded, LAYERS)["block1.conv2"].reason == "set by name"
        assert [p.name for p in tmp_path.iterdir()] == ["found.yaml"]


def test_a_saved_scheme_fits_its_network_only(tmp_path: Path) -> None:
    path = tmp_path / "found.yaml"
    save_scheme(path, resolve(load_scheme("uniform4", "tiny"), LAYERS), name="found")
    with pytest.raises(UserError, match="no rule of scheme 'found' matches the layer 'block3'"):
        resolve(load_scheme(str(path), "tiny"), [*LAYERS, layer("block3")])
    with pytest.raises(UserError, match=r"layer 'block1\.conv2' of scheme 'found' occurs in no layer name"):
        resolve(load_scheme(str(path), "tiny"), [x for x in LAYERS if x.name != "block1.conv2"])


def test_saving_where_nothing_can_be_written(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot write the scheme file .*No such file"):
        save_scheme(tmp_path / "absent" / "x.yaml", {}, name="x")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rules: [", "is not YAML"),
        ("date: 2001-99-99", "is not YAML: month must be"),
        ("ends: 8\nends: free\nrules: [['.*', 4]]", "is not YAML: the key 'ends' occurs twice"),
        ("", "must hold a mapping with 'rules' or 'layers', got NoneType"),
        ("- 4", "must hold a mapping with 'rules' or 'layers', got list"),
        ("rule: [['.*', 4]]", "has the unknown key 'rule'; expected name, rules, layers, residual_bits, ends"),
        ("ends: free", "must have either 'rules' or 'layers', and not both"),
        ("{rules: [['.*', 4]], layers: {a: 4}}", "must have either 'rules' or 'layers', and not both"),
        ("rules: []", r"'rules' must be a non-empty list of \[regex, bits\], got \[\]"),
        ("rules: [4]", r"a rule must be \[regex, bits\], got 4"),
        ("layers: 4", "'layers' must be a non-empty mapping of layer names to bits, got 4"),
        ("rules: [[3, 4]]", "the pattern of a rule must be a string, got 3"),
        ("rules: [['(', 4]]", r"the pattern '\(' of a rule is no regular expression: missing \)"),
        ("rules: [['.*', 9]]", r"rule '\.\*' asks for 9 bits; expected a whole number from 2 to 8 or a pair"),
        ("rules: [['.*', 1]]", "asks for 1 bits"),
        ("rules: [['.*', true]]", "asks for True bits"),
        ("rules: [['.*', 4.0]]", r"asks for 4\.0 bits"),
        ("rules: [['.*', [4, 4, 4]]]", r"asks for \(4, 4, 4\) bits"),
        ("rules: [['.*', [4, 16]]]", r"asks for \(4, 16\) bits"),
        ("layers: {a.b: four}", r"layer 'a\.b' asks for 'four' bits"),
        ("{rules: [['.*', 4]], residual_bits: 12}", "residual_bits of scheme 'mine' must be 16 or 8, got 12"),
        ("{rules: [['.*', 4]], ends: 4}", "ends of scheme 'mine' must be 8 or free, got '4'"),
        ("{rules: [['.*', 4]], name: 3}", "the name of a scheme must be a non-empty string, got 3"),
    ],
)
def test_an_unusable_file_is_refused_in_one_sentence(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=f"scheme file .*mine.yaml.*{message}") as caught:
        load_scheme(written(tmp_path, text), "tiny")
    assert "\n" not in str(caught.value)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot read the scheme file .*absent\.yaml: No such file"):
        load_scheme(str(tmp_path / "absent.yaml"), "tiny")
    (tmp_path / "binary.yml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="is not a text file; expected YAML"):
        load_scheme(str(tmp_path / "binary.yml"), "tiny")
