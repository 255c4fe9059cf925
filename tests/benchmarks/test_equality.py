import pytest

from benchmarks.equality import CASES, compare

LARGE = [(arch, scheme) for arch, schemes in CASES.items() for scheme in schemes if arch != "resnet20_cifar10"]


@pytest.mark.parametrize("scheme", CASES["resnet20_cifar10"])
def test_engine_equals_interpreter_on_a_small_network(scheme: str) -> None:
    row = compare("resnet20_cifar10", scheme, images=8)
    assert (row["different"], row["first_different_node"]) == (0, "")
    assert row["images"] == 8


@pytest.mark.slow
@pytest.mark.parametrize(("arch", "scheme"), LARGE)
def test_engine_equals_interpreter_on_a_large_network(arch: str, scheme: str) -> None:
    assert compare(arch, scheme, images=8)["different"] == 0
