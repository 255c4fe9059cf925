"""``python -m zoo list``: the entries as a table, and where each figure comes from."""

from collections.abc import Sequence

from utils.errors import UserError
from utils.tables import plain_table
from zoo.manifest import Entry, Notes, Own, Published


def select(
    entries: Sequence[Entry], *, arch: str | None = None, max_size: float | None = None, kind: type[Entry] | None = None
) -> list[Entry]:
    """Entries of one architecture, of at most ``max_size`` MiB, of one class; None does not restrict.

    Raises UserError where nothing is left.
    """
    chosen = [entry for entry in entries if kind is None or isinstance(entry, kind)]
    of_arch = [entry for entry in chosen if arch in (None, entry.arch)]
    if not of_arch:
        known = ", ".join(sorted({entry.arch for entry in chosen})) or "there are none yet"
        raise UserError(f"no such entry of {arch or 'this kind'}; architectures there: {known}")
    small = [entry for entry in of_arch if max_size is None or entry.size <= max_size]
    if not small:
        smallest = min(of_arch, key=lambda entry: entry.size)
        raise UserError(
            f"no entry has at most {max_size:g} MiB; the smallest is {smallest.name}, {smallest.size:g} MiB"
        )
    return small


def listing(entries: Sequence[Entry], notes: Notes) -> str:
    """The text: a table, then what the figures are.  entries: at least one."""
    lines = [plain_table([line(entry) for entry in entries]), ""]
    if any(isinstance(entry, Published) for entry in entries):
        lines += [f"published: {notes.figures}", f"  from {notes.source}", f"  {notes.licence}"]
    own = [entry for entry in entries if isinstance(entry, Own)]
    if own:
        lines.append(
            "measured: top-1 of integers (float: of the float network), on all validation images, by this project"
        )
        lines += [f"  {text}" for text in dict.fromkeys(_origin(entry) for entry in own)]
        lines += [f"  data: {text}" for text in dict.fromkeys(entry.trained_on for entry in own)]
        lines.append("  control: top-1 of the float network after equal training")
    return "\n".join(lines)


def line(entry: Entry) -> dict[str, str]:
    """One row of the table; figures that an entry does not have are "-"."""
    common = {"name": entry.name, "arch": entry.arch, "scheme": entry.scheme}
    if isinstance(entry, Own):
        return common | {
            "MiB": f"{entry.size_mib:.3f}",
            "GBOPS": f"{entry.bops_g:.3f}",
            "top-1 %": f"{entry.top1:.2f}",
            "control %": "-" if entry.control_top1 is None else f"{entry.control_top1:.2f}",
            "speed-up": "-",
            "figures": f"measured on {entry.images:,} images",
        }
    return common | {
        "MiB": f"{entry.size_mb:.1f}",
        "GBOPS": f"{entry.bops_g:.0f}",
        "top-1 %": f"{entry.top1:.2f}",
        "control %": "-",
        "speed-up": "-" if entry.speedup is None else f"{entry.speedup:.2f}x",
        "figures": "published",
    }


def _origin(entry: Own) -> str:
    versions = ", ".join(f"{name} {text}" for name, text in entry.versions.items())
    return f"on {entry.machine}; {versions}; commit {entry.commit}"
