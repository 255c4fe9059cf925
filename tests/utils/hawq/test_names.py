"""Names of the original against the recorded layouts of its files, and of networks made here."""

import json
from pathlib import Path

import pytest
import torch
from pytorchcv.model_provider import get_model

from tests.utils.hawq.original import original_key
from utils.hawq.names import DERIVED_ENTRIES, float_key, float_module, plain_key

LAYOUTS = ("resnet18", "resnet50", "resnet101", "mobilenetv2_w1", "inceptionv3")
STALE = "output.conv.weight"  # of MobileNetV2: a copy of output.weight that is never trained


def layout(shared: Path, arch: str) -> dict[str, list[list[object]]]:
    return json.loads((shared / "reference" / "hawq_golden" / f"layout_{arch}.json").read_text())


@pytest.mark.data
@pytest.mark.parametrize("arch", LAYOUTS)
def test_every_key_translates_to_its_source_or_is_derived(shared: Path, arch: str) -> None:
    recorded = layout(shared, arch)
    sources = {str(key): source for key, _, _, source in recorded["quant"] if key != STALE}
    assert {key: float_key(key) for key in sources} == sources
    assert {key.rpartition(".")[2] for key, source in sources.items() if source is None} <= DERIVED_ENTRIES
    assert float_key(STALE) is None
    assert set(sources.values()) - {None} == {key for key, _ in recorded["float"]}


@pytest.mark.data
@pytest.mark.parametrize("arch", LAYOUTS)
def test_layers_translate_to_the_blocks_their_weights_come_from(shared: Path, arch: str) -> None:
    sources: dict[str, dict[str, str]] = layout(shared, arch)["layer_sources"]  # type: ignore[assignment]
    blocks = {name: source["weight"].removesuffix(".weight") for name, source in sources.items()}
    blocks = {name: block.removesuffix(".conv") if "bn" in sources[name] else block for name, block in blocks.items()}
    assert {name: float_module(name) for name in sources} == blocks


@pytest.mark.parametrize("arch", ["resnet18", "mobilenetv2_w1"])
def test_keys_of_networks_made_here(arch: str) -> None:
    with torch.device("meta"):
        keys = get_model(arch).state_dict()
    assert keys
    assert {float_key(original_key(arch, key)) for key in keys} == set(keys)


@pytest.mark.parametrize(
    "name", ["quant_input", "stage1.unit1.quant_act1", "stage1.unit1", "quant_output.weight", "fc", "", "output.fc"]
)
def test_what_is_no_layer_has_no_counterpart(name: str) -> None:
    assert float_module(name) is None


@pytest.mark.parametrize("entry", sorted(DERIVED_ENTRIES))
def test_derived_entries_have_no_float_tensor(entry: str) -> None:
    assert float_key(f"stage1.unit1.quant_convbn1.{entry}") is None
    assert float_key(f"quant_act_output.{entry}") is None


def test_only_the_prefix_in_front_is_taken_off() -> None:
    assert plain_key("module.quant_output.bias") == "quant_output.bias"
    assert plain_key("quant_output.module.bias") == "quant_output.module.bias"
