"""Recorded runs of the original HAWQ (../shared/reference/hawq_golden) as test material."""

import functools
import hashlib
import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from utils.hawq.files import HawqFile, recognise
from utils.hawq.graph import integer_graph
from utils.integer_graph.ir import Graph

NETWORKS = (
    ("resnet18", "uniform8"),
    ("resnet18", "uniform4"),
    ("resnet18", "bops_0.5"),
    ("resnet50", "uniform8"),
    ("resnet50", "uniform4"),
    ("mobilenetv2_w1", "uniform8"),
    ("mobilenetv2_w1", "bops_0.5"),
    ("inceptionv3", "uniform8"),
)
SIZES = {"inceptionv3": 299}


@dataclass(frozen=True)
class Golden:
    """One recorded network: its file, our graph of it, the images, and what the original gave for them."""

    file: HawqFile
    graph: Graph
    images: np.ndarray
    record: dict[str, np.ndarray]

    @property
    def expected(self) -> dict[str, str]:
        """Activation quantizer -> digest of its integers for the images."""
        return dict(zip(self.record["act_names"].tolist(), self.record["exact_act_int_sha"].tolist(), strict=True))


def digest(integers: np.ndarray) -> str:
    """As recorded: sha256 of the int32 bytes in C order, 16 digits."""
    return hashlib.sha256(np.ascontiguousarray(integers, "<i4").tobytes()).hexdigest()[:16]


@functools.cache
def checkpoint_rule(shared: Path) -> ModuleType:
    """The program that generates the recorded networks' weights, images and checkpoints."""
    path = shared / "reference" / "hawq_golden" / "make_checkpoint.py"
    spec = importlib.util.spec_from_file_location("make_checkpoint", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def load(shared: Path, arch: str, scheme: str) -> Golden:
    """Build the checkpoint by the rule and convert it; scheme and architecture are left for the reader to find."""
    rule = checkpoint_rule(shared)
    file = recognise(rule.checkpoint(arch, scheme), Path(f"{arch}_{scheme}.pth.tar"))
    assert file is not None
    images = rule.det_images("eval", 4, SIZES.get(arch, 224))
    with np.load(shared / "reference" / "hawq_golden" / f"golden_{arch}_{scheme}.npz") as record:
        return Golden(file, integer_graph(file, float_input=True).graph, images, dict(record))


def scheme_tables(shared: Path) -> dict[str, Any]:
    """Architecture -> modules of the original and their bits under its published schemes."""
    tables: dict[str, Any] = json.loads((shared / "reference" / "hawq_schemes.json").read_text())["archs"]
    return tables


def expand(table: dict[str, Any], scheme: str) -> dict[str, int]:
    """All modules of a scheme with their bits, as the format line of hawq_schemes.json says."""
    entry = table["schemes"][scheme]
    bits = dict.fromkeys(table["modules"], entry["default"])
    bits |= dict.fromkeys(entry.get("residual16", table["residual16"]), 16)
    for value, names in entry["overrides"].items():
        bits |= dict.fromkeys(names, int(value))
    return {name: value for name, value in bits.items() if name not in entry.get("absent", [])}
