"""The training loop: schedule, distillation, accumulation, checkpoints that continue bit for bit."""

import math
import signal
from dataclasses import dataclass
from types import FrameType
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from tqdm import tqdm

from utils.checkpoint import rng_state, set_rng_state
from utils.data_utils import Loader, normalize
from utils.distillation import distillation_loss, teacher_logits
from utils.errors import UserError
from utils.metrics import AverageMeter, topk_correct
from utils.preprocess import Preprocess
from utils.quantization_utils.prepare import QuantizedModel
from utils.quantization_utils.training import parameter_groups

STEP_EPOCHS = 30
STEP_FACTOR = 0.1


class Interrupted(Exception):
    """Training was asked to stop; the state is saved."""


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

    def validate(self, epoch: float) -> None: ...

    def save(self) -> None: ...

    def scalars(self, step: int, values: dict[str, float]) -> None: ...


class Trainer:
    """Trains a quantized model (or, with quantization off, a float one); ``state`` and ``load`` make it resumable."""

    def __init__(
        self, model: QuantizedModel, loader: Loader, preprocess: Preprocess, recipe: Recipe, teacher: nn.Module | None
    ) -> None:
        self.model, self.loader, self.preprocess, self.recipe, self.teacher = model, loader, preprocess, recipe, teacher
        self.device = next(model.model.parameters()).device
        groups = parameter_groups(model, recipe.weight_decay)
        self.optimizer = torch.optim.SGD(groups, lr=recipe.lr, momentum=recipe.momentum)
        self.epoch, self.batch, self.step = 0, 0, 0
        self._stop = False

    def state(self) -> dict[str, Any]:
        """Everything but the model that the next step depends on."""
        position = {"epoch": self.epoch, "batch": self.batch, "step": self.step}
        return {**position, "optimizer": self.optimizer.state_dict(), "rng": rng_state()}

    def load(self, state: dict[str, Any]) -> None:
        """Continue where :meth:`state` was taken; the optimizer's state too, unless the scales it covers changed."""
        self.epoch, self.batch, self.step = state["epoch"], state["batch"], state["step"]
        saved, own = state["optimizer"], self.optimizer.state_dict()
        if [len(g["params"]) for g in saved["param_groups"]] == [len(g["params"]) for g in own["param_groups"]]:
            self.optimizer.load_state_dict(saved)
        set_rng_state(state["rng"])

    def fit(self, hooks: Hooks) -> None:
        """Train up to the recipe's last epoch, validating and saving after each.

        Raises Interrupted after saving when the process got SIGINT or SIGTERM, UserError when the loss diverges.
        """
        previous = {s: signal.signal(s, self._request_stop) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            while self.epoch < self.recipe.epochs:
                self._train_epoch(hooks)
                self.epoch, self.batch = self.epoch + 1, 0
                hooks.validate(self.epoch)
                hooks.save()
                self._check_stop(hooks)
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _request_stop(self, number: int, frame: FrameType | None) -> None:
        self._stop = True

    def _check_stop(self, hooks: Hooks) -> None:
        if self._stop:
            hooks.save()
            raise Interrupted

    def _train_epoch(self, hooks: Hooks) -> None:
        self.loader.set_epoch(self.epoch, self.batch)
        total = len(self.loader)
        validate_at = _validation_batches(total, self.recipe)
        losses, correct = AverageMeter(), AverageMeter()
        title = f"epoch {self.epoch + 1}/{self.recipe.epochs}"
        with tqdm(total=total, initial=self.batch, desc=title, unit="batch", leave=False, disable=None) as bar:
            for images, labels in self.loader:
                logits, loss = self._train_batch(images, labels, total, hooks)
                losses.update(loss, len(labels))
                correct.update(100 * topk_correct(logits, labels.to(logits.device), (1,))[0] / len(labels), len(labels))
                bar.update()
                if self.batch % self.recipe.print_freq == 0:
                    rate = (bar.format_dict["rate"] or 0) * len(labels)
                    bar.set_postfix(
                        loss=f"{losses.average:.3f}", top1=f"{correct.average:.2f}", images_per_s=f"{rate:.0f}"
                    )
                if self.batch in validate_at:
                    hooks.validate(self.epoch + self.batch / total)
        values = {
            "train/loss": losses.average,
            "train/top1": correct.average,
            "train/lr": self.optimizer.param_groups[0]["lr"],
        }
        hooks.scalars(self.step, values)
        print(f"epoch {self.epoch + 1}: train loss {losses.average:.4f}, train top-1 {correct.average:.2f}")

    def _train_batch(self, images: Tensor, labels: Tensor, total: int, hooks: Hooks) -> tuple[Tensor, float]:
        self.model.train()
        self.model.freeze_bn(self._bn_is_frozen())
        rate = learning_rate(self.recipe, self.epoch + self.batch / total)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        inputs, labels = normalize(images.to(self.device), self.preprocess), labels.to(self.device)
        logits = self.model(inputs)
        loss = self._loss(logits, inputs, labels)
        value = float(loss.detach())
        if not math.isfinite(value):
            raise UserError(
                f"the training loss became {value} in epoch {self.epoch + 1}, batch {self.batch + 1}; "
                "lower --lr or add --warmup-epochs (the last saved checkpoint is intact)"
            )
        accumulate = self.recipe.accumulate
        (loss / accumulate).backward()
        self.batch, self.step = self.batch + 1, self.step + 1
        if self.batch % accumulate == 0 or self.batch == total:
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            if self.recipe.checkpoint_iter > 0 and self.step % self.recipe.checkpoint_iter == 0 and self.batch < total:
                hooks.save()
            if self.batch < total:
                self._check_stop(hooks)
        return logits.detach(), value

    def _bn_is_frozen(self) -> bool:
        threshold = self.recipe.fix_bn_threshold
        return self.recipe.fix_bn or (threshold is not None and self.step + 1 >= threshold)

    def _loss(self, logits: Tensor, inputs: Tensor, labels: Tensor) -> Tensor:
        if self.teacher is None:
            return nn.functional.cross_entropy(logits, labels)
        soft = teacher_logits(self.teacher, inputs)
        return distillation_loss(logits, soft, labels, self.recipe.distill_alpha, self.recipe.temperature)


def _validation_batches(total: int, recipe: Recipe) -> set[int]:
    """Batches of an epoch after which to validate besides its end (``--evaluate-times`` n: n in all)."""
    times = max(1, recipe.evaluate_times)
    return {round(total * i / times) for i in range(1, times)} - {0, total}
