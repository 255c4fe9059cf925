"""``python -m utils.hawq``: a file of the original becomes an integer graph, or one sentence says why not."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers import refusal
from tests.utils.hawq.original import network
from utils.hawq import __main__ as command
from utils.hawq.files import recognise
from utils.hawq.graph import integer_graph
from utils.integer_graph.ir import Graph
from utils.integer_graph.serialize import graph_hash, load

CASE = ("mobilenetv2_w1", "uniform4")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a checkpoint and what is none."""
    monkeypatch.chdir(tmp_path)
    original = network(*CASE)
    torch.save(original.checkpoint(), "f.pth.tar")
    torch.save(original.quantized_checkpoint(), "q.pth.tar")
    torch.save({"state_dict": original.module.state_dict()}, "float.pth.tar")
    Path("cut.pth.tar").write_bytes(Path("f.pth.tar").read_bytes()[:1000])
    return tmp_path


def expected() -> Graph:
    file = recognise(network(*CASE).checkpoint(), Path("f.pth.tar"))
    assert file is not None
    return integer_graph(file).graph


def test_conversion(folder: Path, capsys: Any) -> None:
    assert command.main(["f.pth.tar", "-o", "model.safetensors"]) == 0
    assert capsys.readouterr().out == "model.safetensors: mobilenetv2_w1, uniform4\n"
    graph = load(folder / "model.safetensors")
    assert graph_hash(graph) == graph_hash(expected())
    assert graph.meta["input_size"] == [3, 224, 224]
    assert graph.nodes[0].attrs.get("lo") is None  # of pixels, through a table


def test_flags_that_the_file_does_not_record(folder: Path) -> None:
    flags = ["-a", CASE[0], "--quant-scheme", CASE[1], "--weight-percentile", "90"]
    assert command.main(["f.pth.tar", "-o", "model.safetensors", *flags]) == 0
    assert graph_hash(load(folder / "model.safetensors")) != graph_hash(expected())


MISTAKES = {
    "no file": (["absent", "-o", "m.safetensors"], "the file absent does not exist"),
    "cut": (["cut.pth.tar", "-o", "m.safetensors"], "cut.pth.tar is damaged, cut short"),
    "float": (["float.pth.tar", "-o", "m.safetensors"], "float.pth.tar is no quantized network of the original HAWQ"),
    "integers": (["q.pth.tar", "-o", "m.safetensors"], "q.pth.tar lacks the weight scale of output"),
    "name": (["f.pth.tar", "-o", "m.onnx"], "the output m.onnx needs a name that ends in .safetensors"),
    "arch": (["f.pth.tar", "-o", "m.safetensors", "-a", "resnet18"], "is a checkpoint of mobilenetv2_w1, not of resn"),
    "scheme": (["f.pth.tar", "-o", "m.safetensors", "--quant-scheme", "uniform8"], "it fits uniform4"),
    "per tensor": (["f.pth.tar", "-o", "m.safetensors", "--no-channel-wise"], "leave out --no-channel-wise"),
    "folder": (["f.pth.tar", "-o", "q.pth.tar/m.safetensors"], "q.pth.tar"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_one_sentence(name: str, folder: Path, capsys: Any) -> None:
    argv, sentence = MISTAKES[name]
    before = sorted(os.listdir(folder))
    assert sentence in refusal(command.main, argv, capsys)
    assert sorted(os.listdir(folder)) == before


@pytest.mark.parametrize("percentile", ["50", "101", "nan", "x"])
def test_percentiles_that_are_none(percentile: str, folder: Path, capsys: Any) -> None:
    """argparse answers, with its own code 2."""
    with pytest.raises(SystemExit) as caught:
        command.main(["f.pth.tar", "-o", "m.safetensors", "--weight-percentile", percentile])
    assert caught.value.code == 2
    assert "argument --weight-percentile" in capsys.readouterr().err
