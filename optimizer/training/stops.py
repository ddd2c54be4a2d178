"""Stops: runs of a network over many batches that wait at its layers.

What is solved layer by layer needs what reaches each layer after all before it are solved. To run
the network anew for each takes time by the square of its depth. Here every batch has a run of its
own, a coroutine that waits at a layer and goes on from there when it is asked for the next. What is
alive in it is held meanwhile, so only as many wait as there is memory for; the others run anew. It
knows neither what is done at the layers nor why.
"""

# torch has no types for much of this.
# mypy: disable-error-code="no-untyped-call"

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, Protocol

import torch
from greenlet import greenlet
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from optimizer.training.batches import Batch

Side = Literal["inputs", "output"]
"""Of a layer: a run waits before it, with its first input, or behind it."""
_Stop = tuple[nn.Module, torch.Tensor]
_Look = Callable[[nn.Module, torch.Tensor], None]


class Unreached(Exception):
    """The run has ended without the layer."""


class Run(Protocol):
    """Of the network on one batch."""

    def reach(self, layer: nn.Module) -> torch.Tensor:
        """What there is at the layer's side, once. Raises Unreached."""
        ...


@contextmanager
def stopping(
    module: nn.Module,
    layers: Sequence[nn.Module],
    batches: Sequence[Batch],
    side: Side,
    max_bytes: int,
) -> Iterator[Sequence[Run]]:
    """A run of `module` on each batch, in its order, without gradients. `layers` run once each; in
    which order they are reached doesn't matter, but what a layer behind gives is what it gave when
    the run came past it. Those that wait hold about `max_bytes` at most."""
    n_waiting = _n_waiting(module, layers, batches[0], side, max_bytes)
    waiting = [_Waiting(module, batch) for batch in batches[:n_waiting]]
    anew = [_Anew(module, side, batch) for batch in batches[n_waiting:]]
    try:
        with torch.no_grad(), _at(layers, side, _wait):
            yield [*waiting, *anew]
    finally:
        for one in waiting:
            one.end()


class _Walk(greenlet):
    """A run of the module; whoever switches to it gets the next layer with its tensor."""

    def __init__(self, module: nn.Module, batch: Batch) -> None:
        super().__init__()
        self._module = module
        self._batch = batch

    def run(self) -> None:
        """Of the greenlet."""
        self._module(*self._batch.inputs)


def _wait(layer: nn.Module, tensor: torch.Tensor) -> None:
    walk = greenlet.getcurrent()
    if isinstance(walk, _Walk):
        assert walk.parent is not None
        walk.parent.switch((layer, tensor))


class _Waiting:
    def __init__(self, module: nn.Module, batch: Batch) -> None:
        self._walk = _Walk(module, batch)
        self._passed: dict[nn.Module, torch.Tensor] = {}

    def reach(self, layer: nn.Module) -> torch.Tensor:
        while layer not in self._passed:
            stop: _Stop | None = None if self._walk.dead else self._walk.switch()
            if stop is None:
                raise Unreached
            at, tensor = stop
            if at is layer:
                return tensor
            # What comes behind the layer may write into the tensor.
            self._passed[at] = tensor.clone()
        return self._passed.pop(layer)

    def end(self) -> None:
        """What it holds is free."""
        if not self._walk.dead:
            self._walk.throw()
        self._passed.clear()


class _Reached(Exception):
    """Ends a run: nothing behind a layer matters."""

    def __init__(self, tensor: torch.Tensor) -> None:
        super().__init__()
        self.tensor = tensor


class _Anew:
    def __init__(self, module: nn.Module, side: Side, batch: Batch) -> None:
        self._module = module
        self._side = side
        self._batch = batch

    def reach(self, layer: nn.Module) -> torch.Tensor:
        def stop(_layer: nn.Module, tensor: torch.Tensor) -> None:
            raise _Reached(tensor)

        with _at([layer], self._side, stop):
            try:
                self._module(*self._batch.inputs)
            except _Reached as reached:
                return reached.tensor
        raise Unreached


@contextmanager
def _at(layers: Sequence[nn.Module], side: Side, look: _Look) -> Iterator[None]:
    """`look` sees what is at each layer's side in the runs within."""

    def before(layer: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        look(layer, inputs[0])

    def behind(layer: nn.Module, _inputs: Any, output: torch.Tensor) -> None:
        look(layer, output)

    hooks = [
        one.register_forward_pre_hook(before)
        if side == "inputs"
        else one.register_forward_hook(behind)
        for one in layers
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class _Living(TorchDispatchMode):
    """Knows what of the tensors that were made within is still alive, views of `known` apart."""

    def __init__(self, known: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self._known = {StorageWeakRef(one.untyped_storage()).cdata for one in known}
        self._made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Of the mode."""
        made = func(*args, **(kwargs or {}))
        for one in tree_leaves(made):
            if isinstance(one, torch.Tensor):
                storage = one.untyped_storage()
                reference = StorageWeakRef(storage)
                if reference.cdata not in self._known:
                    self._made[reference.cdata] = reference, storage.nbytes()
        return made

    def n_bytes(self) -> int:
        """Of those alive, views of one storage together."""
        alive = {key: one for key, one in self._made.items() if not one[0].expired()}
        self._made = alive
        return sum(n for _, n in alive.values())


def _n_waiting(
    module: nn.Module, layers: Sequence[nn.Module], batch: Batch, side: Side, max_bytes: int
) -> int:
    """How many runs can wait, by one of them; none where a layer runs in a mode of torch that the
    module sets, or where a part of it remembers something of a run: runs in turns would leave each
    other theirs."""
    living = _Living([*module.parameters(), *module.buffers(), *batch.inputs])
    held = [0]
    modes = []

    def look(_layer: nn.Module, _tensor: torch.Tensor) -> None:
        held.append(living.n_bytes())
        modes.append(_modes())

    before = _memory(module)
    with torch.no_grad(), _at(layers, side, look), living:
        usual = _modes()
        module(*batch.inputs)
    is_alike = all(one == usual for one in modes) and not _remembers(before, _memory(module))
    return max_bytes // max(1, *held) if is_alike else 0


_Memory = list[dict[str, tuple[object, int]]]


def _memory(module: nn.Module) -> _Memory:
    """Attributes and buffers of each part: the object, and how often it was written to, or how much
    it holds."""
    return [
        {name: (value, _extent(value)) for name, value in {**vars(part), **part._buffers}.items()}
        for part in module.modules()
    ]


def _extent(value: object) -> int:
    if isinstance(value, torch.Tensor):
        return value._version
    return len(value) if isinstance(value, list | dict | set) else 0


def _remembers(before: _Memory, after: _Memory) -> bool:
    """Whether something of a part is another object now, or was written to."""
    return len(before) != len(after) or any(
        one.keys() != other.keys()
        or any(one[name][0] is not other[name][0] or one[name][1] != other[name][1] for name in one)
        for one, other in zip(before, after, strict=True)
    )


def _modes() -> tuple[bool, ...]:
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.backends.cuda.flash_sdp_enabled(),
        torch.backends.cuda.mem_efficient_sdp_enabled(),
        torch.backends.cuda.math_sdp_enabled(),
    )
