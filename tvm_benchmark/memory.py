"""The workspace: byte offsets for buffers, so that no two that live at the same time overlap."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Lifetime:
    """A buffer of so many bytes, in use from step ``first`` to step ``last``, both included."""

    name: str
    size: int
    first: int
    last: int

    def meets(self, other: "Lifetime") -> bool:
        return self.first <= other.last and other.first <= self.last


def assign_offsets(lifetimes: Sequence[Lifetime], alignment: int) -> tuple[dict[str, int], int]:
    """Offset of every buffer and the size of the workspace, in bytes.

    Largest first, each at the lowest offset where it meets nobody who lives at the same time.

    >>> assign_offsets([Lifetime("a", 64, 0, 1), Lifetime("b", 64, 1, 2), Lifetime("c", 64, 2, 3)], 64)
    ({'a': 0, 'b': 64, 'c': 0}, 128)
    """
    placed: list[tuple[int, int, Lifetime]] = []
    offsets: dict[str, int] = {}
    for item in sorted(lifetimes, key=lambda item: (-item.size, item.first, item.name)):
        start = 0
        for begin, end, _ in sorted((p for p in placed if p[2].meets(item)), key=lambda p: p[:2]):
            if start + item.size <= begin:
                break
            start = max(start, end)
        end = start + -(-item.size // alignment) * alignment
        placed.append((start, end, item))
        offsets[item.name] = start
    return {item.name: offsets[item.name] for item in lifetimes}, max((end for _, end, _ in placed), default=0)
