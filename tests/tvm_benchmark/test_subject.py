"""Where the measured network comes from, and what its scheme costs."""

import re
from pathlib import Path

import pytest
import torch

from tvm_benchmark.subject import cost, load_subject
from utils.checkpoint import save_checkpoint
from utils.errors import UserError
from utils.experiment import Experiment
from utils.integer_graph import serialize
from utils.integer_graph.ir import Graph
from utils.random_networks import calibrated


@pytest.fixture(scope="module")
def experiment() -> Experiment:
    return calibrated("digits", "w4a8")


@pytest.fixture
def graph_file(experiment: Experiment, tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    serialize.save(experiment.convert(()), path)
    return path


def test_cost_of_a_graph_is_its_experiments(experiment: Experiment) -> None:
    assert cost(experiment.convert(())) == experiment.cost()


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["densenet121", "inceptionv3", "efficientnet_b0", "shufflenetv2_w1"])
def test_cost_of_large_graphs(arch: str) -> None:
    large = calibrated(arch, "uniform4")
    assert cost(large.convert(())) == large.cost()


def test_random_network() -> None:
    subject = load_subject("digits", "uniform4", None, None)
    assert (subject.arch, subject.scheme) == ("digits", "uniform4")
    assert subject.network is not None
    assert subject.images(3, seed=0).shape == (3, *subject.network.preprocess.input_shape)


def test_graph_file(experiment: Experiment, graph_file: Path) -> None:
    subject = load_subject(None, None, graph_file, None)
    assert serialize.graph_hash(subject.graph) == serialize.graph_hash(experiment.convert(()))
    assert subject.network is not None
    assert subject.network.num_classes == 10


def test_graph_of_a_network_of_ones_own_has_no_float_network(experiment: Experiment, tmp_path: Path) -> None:
    graph = experiment.convert(())
    path = tmp_path / "own.safetensors"
    serialize.save(Graph(graph.nodes, {**graph.meta, "arch": "mynet"}), path)
    subject = load_subject(None, None, path, None)
    assert subject.network is None
    assert subject.reason.startswith("the float network of own.safetensors cannot be built (unknown architecture 'my")


def test_checkpoint(experiment: Experiment, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pth.tar"
    save_checkpoint(path, experiment.state())
    subject = load_subject("digits", None, None, path)
    assert serialize.graph_hash(subject.graph) == serialize.graph_hash(experiment.convert(()))
    assert subject.network is not None
    state = experiment.info.module.state_dict()
    assert all(torch.equal(tensor, state[key]) for key, tensor in subject.network.module.state_dict().items())


def test_checkpoint_of_a_float_network(tmp_path: Path) -> None:
    floats = calibrated("digits", "uniform8")
    path = tmp_path / "float.pth.tar"
    save_checkpoint(path, floats.state() | {"scheme": "float"})
    with pytest.raises(UserError, match=r"float\.pth\.tar holds a float network; give a checkpoint of a quantized one"):
        load_subject(None, None, None, path)


def test_nothing_given() -> None:
    with pytest.raises(UserError, match="nothing to measure; give an architecture with -a, or a file"):
        load_subject(None, "uniform8", None, None)


def test_graph_of_another_network(graph_file: Path) -> None:
    with pytest.raises(UserError, match=re.escape("is a graph of digits, not of resnet18; leave out -a")):
        load_subject("resnet18", None, graph_file, None)


def test_graph_without_bits(experiment: Experiment) -> None:
    graph = experiment.convert(())
    meta = {key: value for key, value in graph.meta.items() if key != "layers"}
    with pytest.raises(UserError, match="does not record the bits of its layers; convert the model again"):
        cost(Graph(graph.nodes, meta))


def test_scheme_for_a_file(graph_file: Path) -> None:
    with pytest.raises(UserError, match=r"got the scheme uniform4 for .* which has its own; leave out --quant-scheme"):
        load_subject(None, "uniform4", graph_file, None)
