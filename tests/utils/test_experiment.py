"""A network under a scheme, and its part of a checkpoint."""

import pytest
import torch

from bit_config import Rule, Scheme
from utils.errors import UserError
from utils.experiment import FLOAT, Experiment, scheme_of
from utils.integer_graph.serialize import graph_hash
from utils.models import create_model
from utils.quantization_utils import cost_model
from utils.quantization_utils.calibrate import calibrate

CPU = torch.device("cpu")


def experiment(scheme: str | Scheme = "uniform4", seed: int = 0) -> Experiment:
    torch.manual_seed(seed)
    info = create_model("digits")
    return Experiment(info, info.preprocess, scheme, CPU)


@pytest.fixture
def calibrated() -> Experiment:
    found = experiment()
    calibrate(found.model, [torch.randn(8, 1, 8, 8)])
    return found


def test_state_restores_the_integer_graph(calibrated: Experiment) -> None:
    saved = calibrated.state()
    other = experiment(scheme_of(saved), seed=1)
    other.load_state(saved, "file")
    assert graph_hash(other.convert(["a"] * 10)) == graph_hash(calibrated.convert(["a"] * 10))


def test_recorded_scheme_needs_no_name(calibrated: Experiment) -> None:
    rules = (Rule("unit", (4, 6)), Rule(".*", 5))
    own = experiment(Scheme("mine", rules, residual_bits=8, ends="free"))
    again = experiment(scheme_of(own.state()))
    assert (again.bits_table(), again.residual_bits, again.scheme_name) == (own.bits_table(), 8, "mine")
    assert scheme_of({**own.state(), "scheme": FLOAT}) == FLOAT


def test_other_schemes_are_refused_with_both_names(calibrated: Experiment) -> None:
    saved = calibrated.state()
    with pytest.raises(UserError, match=r"file was saved with the scheme uniform4, not uniform5: the layer"):
        experiment("uniform5").load_state(saved, "file")
    narrow = Scheme("narrow", (Rule(".*", 4),), residual_bits=8)
    with pytest.raises(UserError, match="uniform4, not narrow: residuals have 16 bits there and 8 here"):
        experiment(narrow).load_state(saved, "file")
    with pytest.raises(UserError, match="uniform4, not float"):
        experiment(FLOAT).load_state(saved, "file")


def test_same_bits_under_another_name_are_accepted(calibrated: Experiment) -> None:
    experiment(Scheme("another", (Rule(".*", 4),))).load_state(calibrated.state(), "file")


def test_tampered_state_is_refused(calibrated: Experiment) -> None:
    saved = calibrated.state()
    saved["quantizers"] = {**saved["quantizers"], "activations": None}
    with pytest.raises(UserError, match="file does not fit digits: it was changed after saving"):
        experiment().load_state(saved, "file")


def test_costs_are_those_of_the_layers() -> None:
    quantized, plain = experiment("uniform4"), experiment(FLOAT)
    bits = {name: 8 if name in ("features.init_block.conv", "output") else 4 for name in quantized.bits}
    weights = {layer.name: layer.weights for layer in quantized.layers}
    assert quantized.cost().size_mib == sum(weights[name] * bits[name] for name in bits) / 8 / 2**20
    assert plain.parameters == sum(p.numel() for p in plain.info.module.parameters())
    assert plain.cost().size_mib == plain.parameters * 4 / 2**20
    assert plain.cost().bops_g == cost_model.float_bops_g(plain.layers)


def test_float_is_no_name_for_a_scheme() -> None:
    with pytest.raises(UserError, match="a scheme cannot be called 'float'"):
        experiment(Scheme(FLOAT, (Rule(".*", 4),)))


def test_table_names_every_layer() -> None:
    found = experiment()
    assert all(layer.name in found.table() for layer in found.layers)


def test_graph_records_network_and_classes(calibrated: Experiment) -> None:
    meta = calibrated.convert([str(i) for i in range(10)]).meta
    assert (meta["arch"], meta["scheme"], meta["num_classes"]) == ("digits", "uniform4", 10)
    assert meta["classes"] == [str(i) for i in range(10)]
