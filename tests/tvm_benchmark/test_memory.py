"""Offsets of the workspace: nothing that lives at one time overlaps, nothing is larger than it has to be."""

from hypothesis import given
from hypothesis import strategies as st

from tvm_benchmark.memory import Lifetime, assign_offsets

ALIGNMENT = 64


@st.composite
def lifetimes(draw: st.DrawFn) -> list[Lifetime]:
    """Up to 12 buffers of 1 to 1000 bytes over 10 steps."""
    found = []
    for i in range(draw(st.integers(0, 12))):
        first = draw(st.integers(0, 9))
        found.append(Lifetime(f"b{i}", draw(st.integers(1, 1000)), first, draw(st.integers(first, 9))))
    return found


@given(lifetimes())
def test_buffers_that_live_at_one_time_share_no_byte(items: list[Lifetime]) -> None:
    offsets, size = assign_offsets(items, ALIGNMENT)
    for step in range(10):
        taken: set[int] = set()
        for item in items:
            if item.first <= step <= item.last:
                own = set(range(offsets[item.name], offsets[item.name] + item.size))
                assert not taken & own
                taken |= own
        assert not taken or max(taken) < size


@given(lifetimes())
def test_offsets_are_aligned_and_the_workspace_is_used(items: list[Lifetime]) -> None:
    offsets, size = assign_offsets(items, ALIGNMENT)
    assert list(offsets) == [item.name for item in items]
    assert all(offset % ALIGNMENT == 0 for offset in offsets.values())
    padded = {item.name: -(-item.size // ALIGNMENT) * ALIGNMENT for item in items}
    assert size == max((offsets[name] + length for name, length in padded.items()), default=0)
    assert size <= sum(padded.values())
    live = [sum(padded[i.name] for i in items if i.first <= step <= i.last) for step in range(10)]
    assert size >= max(live)


def test_a_chain_needs_two_buffers() -> None:
    chain = [Lifetime(f"b{i}", 100, i, i + 1) for i in range(8)]
    assert assign_offsets(chain, ALIGNMENT)[1] == 2 * 128


def test_lifetimes_meet_where_they_share_a_step() -> None:
    a = Lifetime("a", 1, 2, 4)
    assert a.meets(Lifetime("b", 1, 4, 4))
    assert a.meets(Lifetime("b", 1, 0, 9))
    assert not a.meets(Lifetime("b", 1, 5, 9))
    assert not a.meets(Lifetime("b", 1, 0, 1))
