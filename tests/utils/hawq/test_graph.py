"""Graphs of the original's files against its forward written anew: every activation and the logits, by equality."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.utils.hawq.original import SIZE, Original, layer_bits, network, random_network
from utils.errors import UserError
from utils.hawq.arithmetic import Options
from utils.hawq.files import HawqFile, recognise
from utils.hawq.graph import Converted, integer_graph
from utils.integer_graph import interpreter
from utils.integer_graph.ir import Graph
from utils.integer_graph.serialize import graph_hash, load, save
from utils.integer_graph.torch_engine import TorchEngine
from utils.preprocess import Preprocess

CASES = [("resnet18", "bops_0.5"), ("resnet18", "uniform4"), ("mobilenetv2_w1", "bops_0.5"),
         ("mobilenetv2_w1", "uniform4")]  # fmt: skip
SMALL = Preprocess(resize=SIZE, input_size=SIZE)
WIDE = 1 << 15


def file_of(content: Mapping[str, Any]) -> HawqFile:
    file = recognise(content, Path("f.pth.tar"))
    assert file is not None
    return file


def converted(content: Mapping[str, Any], **options: Any) -> Converted:
    return integer_graph(file_of(content), preprocess=SMALL, float_input=True, **options)


def images(count: int = 2) -> Tensor:
    """Twice the ranges, so that clamps and sums beyond 16 bits occur."""
    return 2 * torch.randn(count, 3, SIZE, SIZE)


def check(graph: Graph, original: Original, x: Tensor, *, interpreted: bool = True) -> None:
    """Hold both engines to the forward."""
    logits = original.forward(x)
    values = TorchEngine(graph).run(x)
    for name, expected in original.acts.items():
        np.testing.assert_array_equal(values[name].numpy(), expected.reshape(values[name].shape).numpy(), name)
    np.testing.assert_array_equal(values["logits"].numpy(), logits.numpy(), strict=True)
    if interpreted:
        exact = interpreter.run(graph, x.numpy(), keep=True)
        assert exact.keys() == values.keys()
        assert [name for name in exact if not np.array_equal(exact[name], values[name].numpy())] == []


@pytest.mark.parametrize(("arch", "scheme"), CASES)
def test_every_activation_is_the_originals(arch: str, scheme: str) -> None:
    original, x = network(arch, scheme), images()
    graph = converted(original.checkpoint()).graph
    assert (graph.meta["scheme"], graph.meta["num_classes"]) == (scheme, 10)
    check(graph, original, x)
    sums = [original.acts[node.name] for node in graph.nodes if node.op == "add"]
    assert max(float(total.abs().max()) for total in sums) > WIDE
    clamped = [node for node in graph.nodes if node.op == "requantize" and node.type.bits <= 8]
    assert any((original.acts[node.name] == node.attrs["hi"]).any() for node in clamped)


def test_channels_that_training_leaves_behind() -> None:
    """Their biases saturate at 2^31: a channel without weights stays exact, one with some is said to be reduced."""
    original = network("resnet18", "uniform4")
    name, path = "stage2.unit1.quant_convbn1", "features.stage2.unit1.body.conv1.conv"
    x = images(1)
    original.forward(x)
    biases, integers = (original.derived[f"{name}.{kind}_integer"] for kind in ("bias", "weight"))
    assert biases[[0, 1, 5]].tolist() == [2**31, -(2**31), 2**31]
    assert not integers[[0, 1, 3]].any()
    assert integers[5].any()
    result = converted(original.checkpoint())
    assert result.saturated == {path: 1}
    bias = result.graph.node(path).arrays["bias"]
    assert bias[[0, 1]].tolist() == [2**30, -(2**30)]
    reach = int(result.graph.node(f"{name.removesuffix('convbn1')}act").type.hi) * int(integers[5].clamp(0).sum())
    assert bias[5] == 2**31 - 1 - reach


@pytest.mark.parametrize(("arch", "scheme"), CASES[1:3])
@pytest.mark.parametrize("shape", [(1,), ()])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_layouts_give_one_graph(arch: str, scheme: str, shape: tuple[int, ...], prefix: str) -> None:
    original = network(arch, scheme)
    expected = graph_hash(converted(original.checkpoint()).graph)
    assert graph_hash(converted(original.checkpoint(prefix, shape)).graph) == expected


def test_quantized_checkpoint_gives_the_same_graph() -> None:
    original = network("resnet18", "bops_0.5")
    original.forward(images(1))
    ours = converted(original.checkpoint()).graph
    assert graph_hash(converted(original.quantized_checkpoint()).graph) == graph_hash(ours)
    assert graph_hash(converted(original.quantized_checkpoint(""), arch="resnet18").graph) == graph_hash(ours)


def test_quantized_checkpoint_of_mobilenet_lacks_a_scale() -> None:
    content = network("mobilenetv2_w1", "uniform4").quantized_checkpoint()
    with pytest.raises(UserError, match=r"f\.pth\.tar lacks the weight scale of output, .*give the checkpoint\.pth\.t"):
        converted(content)


def test_derived_entries_are_not_read() -> None:
    """Scales that a GPU made one step off, other integers of the same bits: quantized anew, as by the original."""
    original = network("resnet18", "uniform4")
    content = original.checkpoint()
    expected = graph_hash(converted(content).graph)
    for key, value in content["state_dict"].items():
        if key.endswith("scaling_factor"):
            content["state_dict"][key] = torch.nextafter(value, torch.tensor(torch.inf))
        if key.endswith("weight_integer"):
            content["state_dict"][key] = -value
    assert graph_hash(converted(content).graph) == expected
    bare = {key: v for key, v in content["state_dict"].items() if "_integer" not in key and "scaling_factor" not in key}
    graph = converted({"state_dict": bare}, arch="resnet18", scheme="uniform4").graph
    assert graph_hash(graph) == expected


def test_a_file_keeps_the_graph(tmp_path: Path) -> None:
    original, x = network("mobilenetv2_w1", "bops_0.5"), images(1)
    graph = converted(original.checkpoint()).graph
    save(graph, tmp_path / "model.safetensors")
    read = load(tmp_path / "model.safetensors")
    assert graph_hash(read) == graph_hash(graph)
    check(read, original, x, interpreted=False)


def test_pixels_are_quantized_through_a_table() -> None:
    """As ToTensor, Normalize and the first quantizer would: the rest of the graph is the same."""
    original = network("resnet18", "bops_0.5")
    graph = integer_graph(file_of(original.checkpoint()), preprocess=SMALL).graph
    pixels = torch.randint(0, 256, (1, 3, SIZE, SIZE), dtype=torch.uint8)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (SMALL.mean, SMALL.std))
    logits = original.forward((pixels / 255 - mean) / std)
    assert torch.equal(TorchEngine(graph)(pixels), logits)


# ---- flags that the files do not record -----------------------------------------------------------------------------


class PerTensor(Original):
    """One weight scale per layer, as ``--channel-wise`` gave in the original."""

    def weight_range(self, weight: Tensor) -> Tensor:
        return super().weight_range(weight.reshape(1, -1))


def per_tensor(arch: str) -> Original:
    original = network(arch, "uniform4")
    made = PerTensor(arch, original.module, original.bits)
    made.state |= original.state
    made.forward(images(1))
    return made


@pytest.mark.parametrize("arch", ["resnet18", "mobilenetv2_w1"])
def test_one_scale_per_layer(arch: str) -> None:
    """The recorded scales show it; without them the flag says it."""
    original = per_tensor(arch)
    content, x = original.checkpoint(), images(1)
    scales = [value for key, value in content["state_dict"].items() if key.endswith("bn_scaling_factor")]
    assert {value.numel() for value in scales} == {1}
    graph = converted(content).graph
    check(graph, original, x)
    for key in [key for key in content["state_dict"] if "scaling_factor" in key]:
        del content["state_dict"][key]
    assert graph_hash(converted(content, options=Options(channel_wise=False)).graph) == graph_hash(graph)
    assert graph_hash(converted(content).graph) != graph_hash(graph)


def test_one_scale_per_layer_among_integers() -> None:
    original = per_tensor("resnet18")
    expected = graph_hash(converted(original.checkpoint()).graph)
    assert graph_hash(converted(original.quantized_checkpoint()).graph) == expected


def test_no_channel_wise_contradicts_recorded_scales() -> None:
    content = network("resnet18", "uniform4").checkpoint()
    with pytest.raises(UserError, match="quant_init_block_convbn has 64 weight scales; leave out --no-channel-wise"):
        converted(content, options=Options(channel_wise=False))


@pytest.mark.parametrize(("arch", "classifier"), [("resnet18", False), ("mobilenetv2_w1", True)])
def test_weight_percentiles_hold_for_convolutions_alone(arch: str, classifier: bool) -> None:
    """MobileNetV2's classifier is a convolution."""
    content = network(arch, "uniform4").checkpoint()
    plain, cut = (converted(content, options=Options(p)).graph for p in (0, 90))
    changed = {
        node.attrs["layer"]
        for node in plain.nodes
        if "layer" in node.attrs and not np.array_equal(node.arrays["weight"], cut.node(node.name).arrays["weight"])
    }
    layers = [row[0] for row in plain.meta["layers"]]
    assert layers[0] in changed
    assert (layers[-1] in changed) == classifier


# ---- files that do not fit ------------------------------------------------------------------------------------------

Change = Callable[[dict[str, Tensor]], object]
FIRST = "stage1.unit1.quant_convbn1"
CHANGES: dict[str, tuple[bool, Change, str]] = {
    "no range": (
        False,
        lambda s: s.pop("stage2.unit1.quant_act.x_max"),
        r"f\.pth\.tar does not fit: stage2\.unit1\.quant_act\.x_max \[1\] is missing; it fits uniform4",
    ),
    "range of two": (
        False,
        lambda s: s.update({"quant_act_output.x_min": torch.zeros(2)}),
        r"quant_act_output\.x_min has shape \[2\], expected \[1\]",
    ),
    "no forward yet": (
        False,
        lambda s: s.update({f"quant_input.{leaf}": torch.zeros(1) for leaf in ("x_min", "x_max")}),
        "the range of quant_input is 0: the file was saved before its first forward, give a later one",
    ),
    "negative variance": (
        False,
        lambda s: s[f"{FIRST}.bn.running_var"].fill_(-1),
        r"stage1\.unit1\.quant_convbn1\.bn makes weights that are not finite, from a variance of -1",
    ),
    "sums beyond int32": (
        False,
        lambda s: s.update({f"stage1.unit1.quant_act_int32.{leaf}": torch.tensor([1e-6]) for leaf in ("x_min", "x_max")}
                           | {"stage1.unit1.quant_act_int32.act_scaling_factor": torch.zeros(1)}),
        r"network does not fit 32-bit integers: stage1\.unit1\.quant_act_int32: values reach",
    ),
    "ratios beyond any": (
        False,
        lambda s: s.update({f"stage1.unit1.quant_act_int32.{leaf}": torch.zeros(1) for leaf in ("x_min", "x_max")}
                           | {"quant_act_int32.x_max": torch.tensor([1e9])}
                           | {f"{name}quant_act_int32.act_scaling_factor": torch.zeros(1)
                              for name in ("", "stage1.unit1.")}),
        r"network does not fit 32-bit integers: ",
    ),
    "half integers": (
        True,
        lambda s: s[f"{FIRST}.weight_integer"].view(-1)[:1].fill_(0.5),
        r"stage1\.unit1\.quant_convbn1\.weight_integer holds 0\.5, expected whole numbers",
    ),
    "no activation scale": (
        True,
        lambda s: s["quant_input.act_scaling_factor"].zero_(),
        r"quant_input\.act_scaling_factor is 0\.0, expected a positive number",
    ),
    "no weight scale": (
        True,
        lambda s: s[f"{FIRST}.convbn_scaling_factor"].neg_(),
        r"the weight scales of stage1\.unit1\.quant_convbn1 reach -.*, expected positive numbers",
    ),
    "no bias of a convolution": (
        True,
        lambda s: s.pop(f"{FIRST}.bias_integer"),
        r"stage1\.unit1\.quant_convbn1\.bias_integer \[64\] is missing",
    ),
    "no bias of the classifier": (
        True,
        lambda s: s.pop("quant_output.bias_integer"),
        r"quant_output\.bias_integer \[10\] is missing; it fits uniform4",
    ),
    "scales of another layer": (
        True,
        lambda s: s.update({f"{FIRST}.convbn_scaling_factor": torch.ones(3)}),
        r"quant_convbn1\.convbn_scaling_factor has shape \[3\], expected \[64\]",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_what_does_not_fit_is_named(name: str) -> None:
    integers, change, message = CHANGES[name]
    original = network("resnet18", "uniform4")
    file = file_of(original.quantized_checkpoint("") if integers else original.checkpoint(""))
    tensors = {key: value.clone() for key, value in file.tensors.items()}
    change(tensors)
    with pytest.raises(UserError, match=message) as caught:
        integer_graph(replace(file, tensors=tensors), "resnet18", preprocess=SMALL)
    assert "\n" not in str(caught.value)


# ---- ranges far from the numbers ------------------------------------------------------------------------------------


def with_ranges(factor: Mapping[str, float]) -> Original:
    original = network("resnet18", "uniform4")
    made = Original(original.arch, original.module, original.bits)
    made.state |= {key: value.clone() for key, value in original.state.items()}
    for name, by in factor.items():
        for end in ("x_min", "x_max"):
            made.state[f"{name}.{end}"] *= by
    made.forward(images(1))
    return made


def test_a_mean_of_very_large_sums() -> None:
    """The pixels of the last pool may add up beyond 2^30: they are clipped where the quantizer behind clamps anyway."""
    original, x = with_ranges({"stage4.unit2.quant_act_int32": 1 / 200, "quant_act_output": 1 / 4}), images(1)
    graph = converted(original.checkpoint()).graph
    assert graph.node("stage4.unit2.quant_act_int32.relu.enough").op == "clip"
    check(graph, original, x)
    output = original.acts["quant_act_output"]
    assert (output == 127).any()
    assert (output < 127).any()


def test_ranges_of_nothing() -> None:
    """An activation that was 0 in training: every other integer is clamped, whatever the ratio."""
    original, x = with_ranges({"stage2.unit2.quant_act1": 0.0, "stage3.unit1.quant_act": 0.0}), images(1)
    check(converted(original.checkpoint()).graph, original, x)
    assert set(original.acts["stage2.unit2.quant_act1"].unique().tolist()) == {0, 15}


def test_the_classifier_reads_nothing() -> None:
    """Then its biases saturate too, and are reduced by what the weights may add, which is said; all else is exact."""
    original, x = with_ranges({"quant_act_output": 0.0}), images(1)
    result = converted(original.checkpoint())
    assert result.saturated["output"] == 10
    logits, values = original.forward(x), TorchEngine(result.graph).run(x)
    for name, expected in original.acts.items():
        np.testing.assert_array_equal(values[name].numpy(), expected.reshape(values[name].shape).numpy(), name)
    assert set(original.acts["quant_act_output"].unique().tolist()) == {0, 127}
    np.testing.assert_allclose(values["logits"].numpy(), logits.numpy(), rtol=0.01)


def test_other_widths(tmp_path: Path) -> None:
    """Bits that the original accepts and never published: 2 and 3 are signed, so half their range is lost."""
    bits = {name: 3 if "stage2" in name else value for name, value in layer_bits("resnet18", "uniform8").items()}
    bits |= {name: 2 for name in bits if "stage3" in name}
    bits |= {"quant_output": 4}
    original = random_network("resnet18", bits)
    x = images(2)
    original.forward(x, calibrate=True)
    path = tmp_path / "mine.yaml"
    path.write_text("rules: [['stage2', 3], ['stage3', 2], ['^output', 4], ['.*', 8]]\nends: free\n")
    assert float(original.acts["stage3.unit2.quant_act1"].max()) == 1
    check(converted(original.checkpoint(), scheme=str(path)).graph, original, x)
