"""The training loop: schedule, distillation, accumulation, checkpoints that continue bit for bit."""

import math
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from tqdm import tqdm

from utils.checkpoint import rng_state, set_rng_state
from utils.data_utils import Loader, normalize
from utils.distillation import distillation_loss, teacher_logits
from utils.errors import Interrupted, UserError
from utils.metrics import AverageMeter, topk_correct
from utils.preprocess import Preprocess
from utils.quantization_utils.prepare import QuantizedModel
from utils.quantization_utils.training import parameter_groups
from utils.run_log import log

STEP_EPOCHS = 30
STEP_FACTOR = 0.1


@dataclass(frozen=True)
class Recipe:
    """How to train.  Times are in epochs unless named otherwise; see ``quant_train.py --help`` for each."""

    epochs: int
    lr: float
    momentum: float = 0.9
    weight_decay: float = 1e-4
    schedule: str = "step"
    warmup_epochs: float = 0.0
    accumulate: int = 1
    fix_bn: bool = False
    fix_bn_threshold: int | None = None
    checkpoint_iter: int = -1
    evaluate_times: int = 1
    distill_alpha: float = 0.0
    temperature: float = 6.0
    print_freq: int = 10


def learning_rate(recipe: Recipe, epoch: float) -> float:
    """Learning rate at a moment of training (``epoch`` 1.5 is the middle of the second epoch).

    ``step``: times 0.1 every 30 epochs, as the original.  ``cosine``: half a cosine from ``lr`` to 0 over all epochs,
    warm-up included.  Warm-up rises linearly from 0.

    >>> learning_rate(Recipe(epochs=90, lr=1.0), 31), learning_rate(Recipe(epochs=2, lr=1.0, schedule="cosine"), 1.0)
    (0.1, 0.5)
    """
    if epoch < recipe.warmup_epochs:
        return recipe.lr * epoch / recipe.warmup_epochs
    if recipe.schedule == "cosine":
        return recipe.lr * 0.5 * (1 + math.cos(math.pi * epoch / max(recipe.epochs, 1e-9)))
    return recipe.lr * STEP_FACTOR ** (int(epoch) // STEP_EPOCHS)


class Hooks(Protocol):
    """What the loop tells its owner."""

    def validate(self, epoch: float) -> None:
        """Measure; ``epoch`` counts finished epochs and parts of one."""

    def save(self) -> None:
        """Save model and :meth:`Trainer.state`; they fit each other now."""

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Curves after a number of training batches."""


class Trainer:
    """Trains a quantized model (or, with quantization off, a float one); ``state`` and ``load`` make it resumable.

    epoch, batch, step: finished epochs, batches of the current one, and batches in all.  due: whether a validation is
    still to come at this position.
    """

    def __init__(
        self, model: QuantizedModel, loader: Loader, preprocess: Preprocess, recipe: Recipe, teacher: nn.Module | None
    ) -> None:
        self.model, self.loader, self.preprocess, self.recipe, self.teacher = model, loader, preprocess, recipe, teacher
        self.device = next(model.model.parameters()).device
        groups = parameter_groups(model, recipe.weight_decay)
        self.optimizer = torch.optim.SGD(groups, lr=recipe.lr, momentum=recipe.momentum)
        self.epoch, self.batch, self.step = 0, 0, 0
        self.due = self._stop = self._validating = False
        self._validate_at: set[int] = set()

    def state(self) -> dict[str, Any]:
        """Everything but the model that the next step depends on."""
        position = {"epoch": self.epoch, "batch": self.batch, "step": self.step, "due": self.due}
        return {**position, "optimizer": self.optimizer.state_dict(), "rng": rng_state()}

    def load(self, state: dict[str, Any]) -> None:
        """Continue where :meth:`state` was taken.

        The optimizer's momentum is taken over (unless other scales are learned now), its settings are the recipe's.
        """
        self.epoch, self.batch, self.step, self.due = (state[key] for key in ("epoch", "batch", "step", "due"))
        saved, own = state["optimizer"], self.optimizer.state_dict()
        if [len(g["params"]) for g in saved["param_groups"]] == [len(g["params"]) for g in own["param_groups"]]:
            self.optimizer.load_state_dict({"state": saved["state"], "param_groups": own["param_groups"]})
        set_rng_state(state["rng"])

    def fit(self, hooks: Hooks) -> None:
        """Train up to the recipe's last epoch, validating and saving after each.

        SIGINT or SIGTERM finishes the step (or ends a validation at once) and saves; then Interrupted is raised.
        Raises UserError when the loss diverges.
        """
        with self._signals():
            if self.due:
                self._validate(hooks)
            while self.epoch < self.recipe.epochs:
                self._train_epoch(hooks)
                self.epoch, self.batch, self.due = self.epoch + 1, 0, True
                self._validate(hooks)
                hooks.save()
                self._check_stop(hooks)

    @contextmanager
    def _signals(self) -> Iterator[None]:
        previous = {s: signal.signal(s, self._request_stop) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _request_stop(self, number: int, frame: FrameType | None) -> None:
        self._stop = True
        if self._validating:
            raise KeyboardInterrupt

    def _check_stop(self, hooks: Hooks) -> None:
        if self._stop:
            hooks.save()
            raise Interrupted

    def _validate(self, hooks: Hooks) -> None:
        self._check_stop(hooks)
        try:
            self._validating = True
            hooks.validate(self.epoch + self.batch / len(self.loader))
            self.due = False
        except KeyboardInterrupt:
            self._validating = False
            self._check_stop(hooks)
        finally:
            self._validating = False

    def _train_epoch(self, hooks: Hooks) -> None:
        self.loader.set_epoch(self.epoch, self.batch)
        total = len(self.loader)
        self._validate_at = validation_batches(total, self.recipe)
        losses, correct = AverageMeter(), AverageMeter()
        title = f"epoch {self.epoch + 1}/{self.recipe.epochs}"
        with tqdm(total=total, initial=self.batch, desc=title, unit="batch", leave=False, disable=None) as bar:
            for images, labels in self._batches():
                logits, loss = self._train_batch(images, labels, total, hooks)
                losses.update(loss, len(labels))
                correct.update(100 * topk_correct(logits, labels.to(logits.device), (1,))[0] / len(labels), len(labels))
                bar.update()
                if self.batch % self.recipe.print_freq == 0:
                    rate = (bar.format_dict["rate"] or 0) * len(labels)
                    figures = {"loss": f"{losses.average:.3f}", "top1": f"{correct.average:.2f}"}
                    bar.set_postfix(figures | {"images_per_s": f"{rate:.0f}"})
                if self.due:
                    self._validate(hooks)
        lr = self.optimizer.param_groups[0]["lr"]
        hooks.scalars(self.step, {"train/loss": losses.average, "train/top1": correct.average, "train/lr": lr})
        log.info(
            "epoch %d: train loss %.4f, train top-1 %.2f, lr %.3g", self.epoch + 1, losses.average, correct.average, lr
        )

    def _batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The rest of the epoch; a signal to the whole process group may kill loader processes before we stop."""
        try:
            yield from self.loader
        except RuntimeError:
            if self._stop:
                raise Interrupted from None
            raise

    def _train_batch(self, images: Tensor, labels: Tensor, total: int, hooks: Hooks) -> tuple[Tensor, float]:
        accumulate = self.recipe.accumulate
        self.model.train()
        self.model.freeze_bn(self._bn_is_frozen())
        if self.batch % accumulate == 0:
            self._set_rate(learning_rate(self.recipe, self.epoch + self.batch / total))
        inputs, labels = self._inputs(images), labels.to(self.device)
        logits = self.model(inputs)
        loss = self._loss(logits, inputs, labels)
        value = float(loss.detach())
        if not math.isfinite(value):
            raise UserError(
                f"the training loss became {value} in epoch {self.epoch + 1}, batch {self.batch + 1}; lower the "
                "learning rate (--lr, --float-lr) or add --warmup-epochs; what was saved before is intact"
            )
        (loss / accumulate).backward()
        self.batch, self.step = self.batch + 1, self.step + 1
        self.due = self.batch in self._validate_at
        if self.batch % accumulate == 0 or self.batch == total:
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            self._step_done(total, hooks)
        return logits.detach(), value

    def _inputs(self, images: Tensor) -> Tensor:
        """Normalised images; channels last on a CPU, whose convolutions are a fifth faster that way."""
        inputs = normalize(images.to(self.device), self.preprocess)
        return inputs.contiguous(memory_format=torch.channels_last) if self.device.type == "cpu" else inputs

    def _set_rate(self, rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    def _step_done(self, total: int, hooks: Hooks) -> None:
        """Between the steps of an epoch (its end is :meth:`fit`'s): save where it is due, stop where it is asked."""
        if self.batch == total:
            return
        if self.recipe.checkpoint_iter > 0 and self.step // self.recipe.checkpoint_iter > (
            (self.step - self.recipe.accumulate) // self.recipe.checkpoint_iter
        ):
            hooks.save()
        self._check_stop(hooks)

    def _bn_is_frozen(self) -> bool:
        threshold = self.recipe.fix_bn_threshold
        return self.recipe.fix_bn or (threshold is not None and self.step + 1 >= threshold)

    def _loss(self, logits: Tensor, inputs: Tensor, labels: Tensor) -> Tensor:
        if self.teacher is None:
            return nn.functional.cross_entropy(logits, labels)
        soft = teacher_logits(self.teacher, inputs)
        return distillation_loss(logits, soft, labels, self.recipe.distill_alpha, self.recipe.temperature)


def validation_batches(total: int, recipe: Recipe) -> set[int]:
    """Batches of an epoch of ``total`` after which to validate besides its end: ``evaluate_times`` - 1 of them.

    They end a step, so with accumulation no gradients are pending.

    >>> sorted(validation_batches(10, Recipe(epochs=1, lr=0.1, evaluate_times=3, accumulate=2)))
    [4, 8]
    """
    times = max(1, recipe.evaluate_times)
    wanted = {math.ceil(round(total * i / times) / recipe.accumulate) * recipe.accumulate for i in range(1, times)}
    return {batch for batch in wanted if 0 < batch < total}
