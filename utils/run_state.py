"""State of one run of ``quant_train.py`` between its steps: what is measured, what is saved where."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from utils.checkpoint import save_checkpoint
from utils.errors import UserError
from utils.evaluation import Accuracy, Engine, evaluate, float_predictor
from utils.experiment import Experiment
from utils.integer_graph.ir import Graph
from utils.provenance import commit
from utils.run_data import Data
from utils.run_log import log
from utils.train_flags import resume_command
from utils.trainer import Trainer

SCRIPT = Path(__file__).resolve().parent.parent / "quant_train.py"
CHECKPOINT, BEST, GRAPH = "checkpoint.pth.tar", "model_best.pth.tar", "model.safetensors"


class Run:
    """The hooks of the training loop, and everything its owner measures.

    args: parsed and filled in.  make_engine: what evaluates an integer graph.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        command: str,
        experiment: Experiment,
        data: Data,
        make_engine: Callable[[Graph], Engine],
    ) -> None:
        self.args, self.command, self.experiment, self.data = args, command, experiment, data
        self.make_engine = make_engine
        self.trainer: Trainer | None = None
        self.best_top1 = -1.0
        self.top1_float: float | None = None
        self.float_classes: Tensor | None = None
        self.last: Accuracy | None = None
        self.graph: Graph | None = None
        self.phase = "evaluation of the float network"
        self.saved: Path | None = None
        self.kept = "nothing was saved"
        self.measured: dict[str, Any] = {}  # further entries of the report
        self.writer: Any = _tensorboard(args) if args.tensorboard else None

    def validate(self, epoch: float) -> None:
        """Evaluate the integer graph of the current weights; a new best is kept."""
        is_float = self.experiment.is_float
        self.last = self.evaluate_float("float") if is_float else self.evaluate_integer()
        kind = "float network" if is_float else "integer graph"
        log.info("epoch %g: top-1 %.2f, top-5 %.2f (%s)", epoch, self.last.top1, self.last.top5, kind)
        self.scalars(self.trainer.step if self.trainer else 0, {"val/top1": self.last.top1})
        if self.last.top1 > self.best_top1:
            self.best_top1 = self.last.top1
            self._save(BEST)

    def evaluate_float(self, label: str) -> Accuracy:
        """Top-1 and top-5 of the float model, or of the fake-quantized one once quantization is on."""
        predictor = float_predictor(self.experiment.model, self.experiment.preprocess, self.experiment.device)
        return evaluate(predictor, self.data.val, label)

    def evaluate_integer(self) -> Accuracy:
        """Convert, evaluate the integer graph on the validation images, keep it."""
        self.graph = self.experiment.convert(self.data.val.classes, self.args.strict_integer)
        return evaluate(self.make_engine(self.graph), self.data.val, "integer graph")

    def save(self) -> None:
        """Write the checkpoint everything can continue from."""
        self._save(CHECKPOINT)
        self.saved = self.args.save_path / CHECKPOINT

    def _save(self, name: str) -> None:
        contents = self.experiment.state() | {
            "trainer": self.trainer.state() if self.trainer else None,
            "best_top1": self.best_top1,
            "top1_float": self.top1_float,
            "arguments": {key: str(value) for key, value in vars(self.args).items()},
            "threads": torch.get_num_threads(),
            "commit": commit(),
        }
        path = self.args.save_path / name
        for key, tensor in contents["state_dict"].items():
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise UserError(f"{key} has become NaN or infinite; lower the learning rate ({path} was not changed)")
        save_checkpoint(path, contents)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Curves for TensorBoard, when asked for."""
        if self.writer is not None:
            for name, value in values.items():
                self.writer.add_scalar(name, value, step)
            self.writer.flush()

    def how_to_continue(self) -> str:
        """Answer to Ctrl-C."""
        checkpoint = self.saved or self.args.resume
        if checkpoint is None or self.args.evaluate:
            return f"stopped during the {self.phase}; {self.kept}"
        state = "saved" if self.saved else "nothing new was saved"
        command = resume_command(self.args, SCRIPT, checkpoint)
        return f"stopped during the {self.phase}, {state}; to continue: {command}"


class FloatPhase:
    """Hooks of the float phase: accuracy is printed, nothing is saved."""

    def __init__(self, job: Run) -> None:
        self.job = job

    def validate(self, epoch: float) -> None:
        """Top-1 of the float network."""
        log.info("float epoch %g: top-1 %.2f", epoch, self.job.evaluate_float("float").top1)

    def save(self) -> None:
        """Nothing: the quantized run has not begun."""

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Nothing: curves begin with quantization."""


def _tensorboard(args: argparse.Namespace) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UserError("--tensorboard needs the package tensorboard: pip install tensorboard") from error
    return SummaryWriter(str(args.save_path))
