"""Files of the original: recognised in every layout, read without running code, refused where they are damaged."""

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.utils.hawq import golden
from tests.utils.hawq.original import five_dicts, network
from utils.errors import UserError
from utils.float_weights import load_float_weights
from utils.hawq.files import HawqFile, float_state, read_hawq, recognise
from utils.models import create_model

PATH = Path("some.pth.tar")
NAMED = ("resnet18", "bops_0.5")
# One recorded network for each layout that has one; the layout of resnet101 is that of resnet50 with more units.
RECORDED = (NAMED, ("resnet50", "uniform4"), ("mobilenetv2_w1", "uniform8"), ("inceptionv3", "uniform8"))


def read(content: Any) -> HawqFile:
    file = recognise(content, PATH)
    assert file is not None
    return file


# ---- recorded layouts -----------------------------------------------------------------------------------------------


@pytest.mark.data
@pytest.mark.parametrize(("arch", "scheme"), RECORDED)
def test_recorded_layouts(shared: Path, arch: str, scheme: str) -> None:
    """Checkpoint with and without the prefix, the five dicts of its own entries, and its float weights."""
    rule = golden.checkpoint_rule(shared)
    content = rule.checkpoint(arch, scheme)
    file, bare = read(content), read({"state_dict": {k[7:]: v for k, v in content["state_dict"].items()}})
    assert (file.arch, file.epoch, file.kind, file.integers) == (arch, 1, "checkpoint", False)
    assert (bare.arch, bare.epoch) == (None, 0)
    assert file.tensors.keys() == bare.tensors.keys() == {row[0] for row in rule.layout(arch)["quant"]}

    quantized = read(five_dicts(content["state_dict"]))
    assert (quantized.kind, quantized.integers, quantized.arch) == ("quantized_checkpoint", True, None)
    assert quantized.tensors.keys() < file.tensors.keys()
    assert all(torch.equal(value, file.tensors[key]) for key, value in quantized.tensors.items())

    state, expected = float_state(file), rule.float_state_dict(arch)
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[key], torch.from_numpy(value)) for key, value in expected.items())
    assert all(state[key].dtype == torch.int64 for key in state if key.endswith("num_batches_tracked"))


# ---- files on disk --------------------------------------------------------------------------------------------------


def saved(folder: Path, content: Any, **how: Any) -> Path:
    path = folder / "checkpoint.pth.tar"
    torch.save(content, path, **how)
    return path


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("arch", ["resnet18", "mobilenetv2_w1"])
def test_float_weights_load_into_the_float_network(tmp_path: Path, arch: str, zipped: bool) -> None:
    """Of files in either format of torch.save: the original is older than the newer one."""
    original = network(arch, "bops_0.5")
    path = saved(tmp_path, original.checkpoint(), _use_new_zipfile_serialization=zipped)
    module = create_model(arch, 10).module
    load_float_weights(module, path, arch)
    expected = original.module.state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in module.state_dict().items())


def test_epoch_and_architecture_come_from_the_file(tmp_path: Path) -> None:
    content = network(*NAMED).checkpoint(epoch=37)
    file = read_hawq(saved(tmp_path, content))
    assert file is not None
    assert (file.arch, file.epoch) == ("resnet18", 37)
    strange = read(content | {"arch": 3, "epoch": "last"})
    assert (strange.arch, strange.epoch) == (None, 0)


@pytest.mark.parametrize(
    "content",
    [
        None,
        torch.zeros(3),
        [],
        {},
        {"state_dict": 3},
        {"state_dict": {"features.init_block.conv.weight": torch.zeros(1)}},
        {"conv.weight": torch.zeros(1), 3: torch.zeros(1)},
        {"weight_integer": {}, "bias_integer": {}},
        {**dict.fromkeys(five_dicts({}), 3)},
    ],
)
def test_other_files_are_not_recognised(content: Any) -> None:
    assert recognise(content, PATH) is None


@pytest.mark.parametrize("entry", ["quant_input.x_max", "a.weight_integer", "module.a.fc_scaling_factor"])
def test_one_entry_is_enough(entry: str) -> None:
    """Also of a bare state_dict, and of files from which derived entries were dropped."""
    assert read({entry: torch.zeros(1)}).tensors.keys() == {entry.removeprefix("module.")}


class _Code:
    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.system, ("touch executed",)


def test_code_is_never_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = saved(tmp_path, network(*NAMED).checkpoint() | {"optimizer": _Code()})
    with pytest.raises(UserError, match=r"holds Python code or objects .*which is never run"):
        read_hawq(path)
    path.write_bytes(pickle.dumps({"state_dict": _Code()}))
    with pytest.raises(UserError, match="which could run code"):
        read_hawq(path)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint.pth.tar"]


@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_a_file_cut_short_is_refused(tmp_path: Path, share: float) -> None:
    path = saved(tmp_path, {"state_dict": {"quant_input.x_max": torch.zeros(1000)}})
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(UserError, match=r"is damaged, cut short or not a file saved by torch\.save"):
        read_hawq(path)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (3, "its entry 'quant_input.x_min' is int, expected a tensor"),
        (torch.tensor([float("nan")]), "has NaN or infinite values in quant_input.x_min"),
        (torch.tensor(float("inf")), "has NaN or infinite values in quant_input.x_min"),
    ],
)
def test_entries_that_cannot_be_used(value: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        recognise({"state_dict": {"module.quant_input.x_min": value}}, PATH)


def test_integers_are_no_float_weights() -> None:
    file = read(network(*NAMED).quantized_checkpoint())
    with pytest.raises(UserError, match="holds integers only, no float weights to start from; give the checkpoint"):
        float_state(file)
