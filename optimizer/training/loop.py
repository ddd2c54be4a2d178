"""The training loop: a module, data and a loss in, the module trained.

It is the only one; what is learned is the loss's matter, so fine-tuning, distillation and training
with simulated quantization are one loop. Equal seeds, data and numbers of threads give equal
weights. It knows neither teachers nor techniques.
"""

import math
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import nn

from optimizer.telling import Tell, untold
from optimizer.training.augmentation import augmented
from optimizer.training.batches import Batch, Batches, Rows
from optimizer.training.checkpoint import Checkpoint
from optimizer.training.masks import Masks
from optimizer.training.memory import kept_memory
from optimizer.training.schedule import SCHEDULES

_MAX_NORM = 5.0
"""Of all gradients together: what is larger is scaled down, so that one batch ruins nothing."""
_MOMENTUM = 0.9
_HELD_OUT = 20
"""One in so many rows of train tells when to stop, where that is asked for."""
_MAX_HELD_OUT = 2048
_IMAGES_NDIM = 4


class Loss(Protocol):
    def parameters(self) -> Iterable[nn.Parameter]:
        """What is learned beside the module's own."""
        ...

    def __call__(self, module: nn.Module, batch: Batch) -> torch.Tensor:
        """The mean over the batch, with gradients."""
        ...


class TrainingDiverged(Exception):
    """The loss or its gradient is no number any more; the message says where and what to do."""


@dataclass(frozen=True)
class Settings:
    """How it is trained. With `patience` a part of the data is held out, training ends when that
    many epochs in a row haven't bettered its loss, and the best epoch's weights are kept; 0 for
    all epochs and the last one's."""

    epochs: float
    batch_size: int
    learning_rate: float
    """The peak of the schedule."""
    seed: int
    optimizer: Literal["sgd", "adamw"] = "sgd"
    weight_decay: float = 5e-4
    """Of matrices and kernels; not of biases and scales."""
    schedule: Literal["one_cycle", "cosine"] = "one_cycle"
    augmentation: str = "none"
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: matrix products in it, weights and sums in fp32 (autocast)."""
    patience: int = 0


@dataclass
class Progress:
    """What was done: `losses` and `held_out` are means of each epoch."""

    n_steps: int = 0
    losses: list[float] = field(default_factory=list)
    held_out: list[float] = field(default_factory=list)
    best: dict[str, torch.Tensor] = field(default_factory=dict)
    """State of the best epoch, with patience."""

    @property
    def n_waited(self) -> int:
        """Epochs since the best."""
        return len(self.held_out) - 1 - int(np.argmin(self.held_out)) if self.held_out else 0


def train(
    module: nn.Module,
    data: Batches,
    loss: Loss,
    settings: Settings,
    masks: Masks | None = None,
    checkpoint: Checkpoint | None = None,
    tell: Tell = untold,
) -> Progress:
    """Train the module in place; it ends in eval mode. `tell` hears of every step.

    With a `checkpoint` it goes on after the last whole epoch that was saved there, to the weights
    that it would have come to anyway. Raises TrainingDiverged, and ValueError where the data
    doesn't do for the loss or the augmentation.
    """
    rows, held_out = _divided(len(data), settings)
    plan = _Plan(len(rows), settings)
    optimizer = _optimizer([*module.parameters(), *loss.parameters()], settings)
    zeros = masks or Masks(nn.Identity())
    with _seeded(settings.seed):
        lay_out = _layout_of(module, data)
    run = _Run(module, data, loss, settings, plan, optimizer, zeros, tell, lay_out)
    progress = Progress() if checkpoint is None else _resumed(checkpoint, run)
    with _seeded(settings.seed), kept_memory():
        for epoch in range(len(progress.losses), plan.n_epochs):
            # Before the epoch: one that had waited long enough when it was killed has ended.
            if settings.patience and progress.n_waited >= settings.patience:
                break
            run.epoch(epoch, rows, progress)
            # Before all zeros have come, a better loss is no merit.
            if settings.patience and run.masks.is_settled(progress.n_steps, plan.n_steps):
                _look(run, held_out, progress)
            if checkpoint is not None:
                _save(checkpoint, run, progress)
    if progress.best:
        module.load_state_dict(progress.best)
    module.eval()
    return progress


@dataclass(frozen=True)
class _Plan:
    """Steps of a training over `n_rows`."""

    n_rows: int
    settings: Settings

    @property
    def per_epoch(self) -> int:
        """The last batch of an epoch is left out unless it is whole or the only one."""
        return max(1, self.n_rows // self.settings.batch_size)

    @property
    def n_steps(self) -> int:
        return math.ceil(self.settings.epochs * self.per_epoch)

    @property
    def n_epochs(self) -> int:
        """Those begun."""
        return math.ceil(self.n_steps / self.per_epoch)


@dataclass(frozen=True)
class _Run:
    module: nn.Module
    data: Batches
    loss: Loss
    settings: Settings
    plan: _Plan
    optimizer: torch.optim.Optimizer
    masks: Masks
    tell: Tell
    lay_out: "Layout"

    def epoch(self, epoch: int, rows: Rows, progress: Progress) -> None:
        # By the epoch, so that one that is resumed draws what it would have drawn.
        rng = np.random.default_rng([self.settings.seed, epoch])
        order = rng.permutation(rows)
        generator = torch.Generator().manual_seed(int(rng.integers(2**31)))
        _seed(int(rng.integers(2**31)))
        self.module.train()
        total, n_done = 0.0, 0
        for batch in self.data.each(order, self.settings.batch_size, whole=True):
            if progress.n_steps >= self.plan.n_steps:
                break
            views = augmented(self.settings.augmentation, batch.inputs, generator, batch.kept)
            total += self._step(replace(batch, inputs=self.lay_out(views)), progress.n_steps)
            progress.n_steps += 1
            n_done += 1
            epochs = progress.n_steps / self.plan.per_epoch
            mean = total / n_done
            self.tell(f"epoch {epochs:.1f} of {self.settings.epochs:g}, loss {mean:.3g}")
        progress.losses.append(total / max(1, n_done))

    def _step(self, batch: Batch, step: int) -> float:
        rate = SCHEDULES[self.settings.schedule](step, self.plan.n_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * self.settings.learning_rate
        self.optimizer.zero_grad()
        loss = self.of(batch)
        value = self.finite("loss", loss, step)
        loss.backward()  # type: ignore[no-untyped-call]
        parameters = [one for group in self.optimizer.param_groups for one in group["params"]]
        norm = nn.utils.clip_grad_norm_(parameters, _MAX_NORM)
        self.finite("norm of its gradient", norm, step)
        self.optimizer.step()
        self.masks.apply(step + 1, self.plan.n_steps)
        return value

    def finite(self, name: str, value: torch.Tensor, step: int) -> float:
        """The value as a number. Raises TrainingDiverged where it is none."""
        found = float(value.detach())
        if math.isfinite(found):
            return found
        highest = self.settings.learning_rate
        rate = SCHEDULES[self.settings.schedule](step, self.plan.n_steps) * highest
        raise TrainingDiverged(
            f"the {name} is {found} at step {step + 1} of {self.plan.n_steps}, at a learning rate "
            f"of {rate:.3g}: lower training.learning_rate, now {highest:g}"
        )

    def of(self, batch: Batch) -> torch.Tensor:
        """The loss of a batch."""
        if self.settings.precision == "fp32":
            return self.loss(self.module, batch)
        with torch.autocast("cpu", torch.bfloat16):
            return self.loss(self.module, batch)


Layout = Callable[[Sequence[torch.Tensor]], tuple[torch.Tensor, ...]]
"""How inputs lie in memory."""


def _layout_of(module: nn.Module, data: Batches) -> Layout:
    """Channels last, unless the module fails on images that lie so, as one does that takes a
    feature map's memory for rows (`view`)."""
    inputs = data.read(np.arange(min(2, len(data)))).inputs
    module.eval()
    try:
        with torch.no_grad():
            module(*_channels_last(inputs))
    except RuntimeError:
        return tuple
    return _channels_last


def _channels_last(inputs: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """Images with their channels last in memory: what follows takes that on, and CPUs train
    convolutions some 15 % faster by it."""
    return tuple(
        one.contiguous(memory_format=torch.channels_last) if one.ndim == _IMAGES_NDIM else one
        for one in inputs
    )


def _divided(n_rows: int, settings: Settings) -> tuple[Rows, Rows]:
    """Rows to learn from, and those held out."""
    order = np.random.default_rng(settings.seed).permutation(n_rows)
    n_held = min(max(1, n_rows // _HELD_OUT), _MAX_HELD_OUT) if settings.patience else 0
    if n_held >= n_rows:
        raise ValueError(f"got {n_rows} training samples, want at least {n_held + 1}")
    return order[n_held:], order[:n_held]


def _optimizer(parameters: Sequence[nn.Parameter], settings: Settings) -> torch.optim.Optimizer:
    learned = [one for one in parameters if one.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [one for one in learned if one.ndim > 1]},
        {"params": [one for one in learned if one.ndim <= 1], "weight_decay": 0.0},
    ]
    rate, decay = settings.learning_rate, settings.weight_decay
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=rate, weight_decay=decay, fused=True)
    return torch.optim.SGD(
        groups, lr=rate, momentum=_MOMENTUM, weight_decay=decay, nesterov=True, fused=True
    )


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Random numbers of the module's own (dropout) are the training's, and the process's state of
    them stays as it was."""
    plain, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            _seed(seed)
            yield
    finally:
        random.setstate(plain)
        np.random.set_state(numpy)


def _seed(seed: int) -> None:
    """Of all generators that a module's own code may draw from."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


def _look(run: _Run, held_out: Rows, progress: Progress) -> None:
    """At the rows held out; keeps the state if it is the best so far."""
    run.module.eval()
    total = 0.0
    with torch.no_grad():
        for batch in run.data.each(held_out, run.settings.batch_size):
            value = run.finite("loss of what is held out", run.of(batch), progress.n_steps - 1)
            total += value * len(batch.rows)
    progress.held_out.append(total / len(held_out))
    if progress.n_waited == 0:
        state = run.module.state_dict()
        progress.best = {name: tensor.detach().clone() for name, tensor in state.items()}


def _save(checkpoint: Checkpoint, run: _Run, progress: Progress) -> None:
    tensors = {f"module.{name}": tensor for name, tensor in run.module.state_dict().items()}
    tensors |= {f"masks.{name}": tensor for name, tensor in run.masks.state().items()}
    tensors |= {f"best.{name}": tensor for name, tensor in progress.best.items()}
    tensors |= {f"loss.{i}": tensor for i, tensor in enumerate(run.loss.parameters())}
    for index, state in run.optimizer.state_dict()["state"].items():
        tensors |= {
            f"optimizer.{index}.{name}": value
            for name, value in state.items()
            if isinstance(value, torch.Tensor)
        }
    history = {"losses": progress.losses, "held_out": progress.held_out}
    tensors |= {f"progress.{n}": torch.tensor(v, dtype=torch.float64) for n, v in history.items()}
    checkpoint.save(tensors, {"n_steps": progress.n_steps})


def _resumed(checkpoint: Checkpoint, run: _Run) -> Progress:
    found = checkpoint.load()
    if found is None:
        return Progress()
    tensors, counters = found
    run.module.load_state_dict(_within(tensors, "module"))
    run.masks.load_state(_within(tensors, "masks"))
    with torch.no_grad():
        for index, parameter in enumerate(run.loss.parameters()):
            parameter.copy_(tensors[f"loss.{index}"])
    state: dict[int, dict[str, torch.Tensor]] = {}
    for name, value in _within(tensors, "optimizer").items():
        place, _, key = name.partition(".")
        state.setdefault(int(place), {})[key] = value
    run.optimizer.load_state_dict({**run.optimizer.state_dict(), "state": state})
    return Progress(
        int(counters["n_steps"]),
        tensors["progress.losses"].tolist(),
        tensors["progress.held_out"].tolist(),
        _within(tensors, "best"),
    )


def _within(tensors: dict[str, torch.Tensor], part: str) -> dict[str, torch.Tensor]:
    prefix = f"{part}."
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }
