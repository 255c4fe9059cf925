"""Classify image files with a graph, as it would be done on the target."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from utils.errors import UserError
from utils.integer_graph.interpreter import run
from utils.integer_graph.ir import Graph
from utils.preprocess import Preprocess
from utils.transforms import to_tensor


def predict(graph: Graph, paths: Sequence[Path], top: int = 5) -> list[list[tuple[str, float]]]:
    """For each image the `top` classes, best first, with their shares (softmax of the logits, 0..1).

    The first of classes with equal logits is the one of smaller index.  Raises UserError for a graph that does not
    say how images are prepared, and for a file that is missing or no image.
    """
    preprocess, names = _preprocess(graph), _class_names(graph)
    results = []
    for path in paths:
        logits = run(graph, _read(path, preprocess)[None])[0]
        best = np.argsort(-logits, kind="stable")[:top]
        results.append([(names[i], float(share)) for i, share in zip(best, softmax(logits)[best], strict=True)])
    return results


def softmax(logits: np.ndarray) -> np.ndarray:
    """Shares float64 [classes] that sum to 1."""
    powers = np.exp(logits.astype(np.float64) - float(logits.max()))
    return powers / powers.sum()


def _preprocess(graph: Graph) -> Preprocess:
    if graph.nodes[0].op != "image" or "preprocess" not in graph.meta:
        raise UserError("the graph does not say how image files become its input; convert the model again")
    preprocess = Preprocess.from_dict(graph.meta["preprocess"])
    if preprocess.input_shape != graph.nodes[0].type.shape:
        got, expected = list(preprocess.input_shape), list(graph.nodes[0].type.shape)
        raise UserError(f"the graph's preprocessing gives images {got}, its input is {expected}; convert it again")
    return preprocess


def _class_names(graph: Graph) -> list[str]:
    """Names in meta["classes"] (a list), else the indices."""
    count, classes = graph.nodes[-1].type.shape[0], graph.meta.get("classes")
    if not isinstance(classes, list):
        return [f"class {i}" for i in range(count)]
    if len(classes) != count:
        raise UserError(f"the graph names {len(classes)} classes but has {count} outputs; convert the model again")
    return [str(name) for name in classes]


def _read(path: Path, preprocess: Preprocess) -> np.ndarray:
    """uint8 [C, S, S]."""
    if not path.is_file():
        raise UserError(f"{path} is {'not a file' if path.exists() else 'missing'}; give an image file")
    try:
        with Image.open(path) as image:
            image.load()
            pixels: Any = to_tensor(image, preprocess)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except Exception as error:  # PIL's decoders raise a dozen unrelated types on damaged files
        raise UserError(f"cannot decode the image {path}: it is damaged or no image; give another file") from error
    return pixels.numpy()
