"""The worker: a process that answers calls until its parent closes the pipe, or dies.

    python -m optimizer.measuring.worker LIFELINE

Frames come on standard input and go to what standard output was; what engines print there goes
to standard error. It holds no lock on the cores: its parent does.
"""

import os
import sys
import threading
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO

from optimizer.measuring import Batch
from optimizer.measuring.calls import Call, Named, call_of
from optimizer.measuring.frames import Frame, encode, read
from optimizer.measuring.local import LocalMeasurer
from optimizer.measuring.memory import grown_bytes
from optimizer.timing import Contender
from serve.engines import Engine, load_engine


class Answerer:
    """Answers one call after the other. Between calls of a session its engine stays loaded."""

    def __init__(self) -> None:
        self._measurer = LocalMeasurer(takes_cores=False)
        self._loaded = ExitStack()
        self._engine: Engine | None = None
        self._session = ""

    def answer(self, call: Call, batches: Sequence[Batch]) -> Frame:
        """The result, or what the engine raised."""
        if call.name != "outputs" or call.session != self._session:
            self._unload()
        try:
            if call.name == "outputs":
                return Frame({"result": None}, self._outputs(call, batches))
            return Frame({"result": self._result(call, batches[0])})
        except Exception as error:  # noqa: BLE001 - the process boundary: engines raise anything
            self._unload()
            return Frame({"failure": f"{type(error).__name__}: {error}"})

    def _outputs(self, call: Call, batches: Sequence[Batch]) -> list[Batch]:
        if self._engine is None:
            contender = _contender(call.contenders[0])
            self._engine = load_engine(contender.directory, contender.spec)
            self._loaded.callback(self._engine.close)
            self._session = call.session
        outputs: list[Batch] = [self._engine.run(batch) for batch in batches]
        if call.is_last:
            self._unload()
        return outputs

    def _result(self, call: Call, batch: Batch) -> object:
        variant, *rest = map(_contender, call.contenders)
        match call.name:
            case "kernels":
                times = self._measurer.kernels(variant, batch, call.n_runs)
                return [vars(time) for time in times]
            case "time":
                return self._measurer.time(
                    variant,
                    rest[0] if rest else None,
                    batch,
                    call.batch_sizes,
                    effort=call.effort,
                    seed=call.seed,
                ).to_dict()
            case "memory_bytes":
                return grown_bytes(variant, batch)
            case "joules":
                return self._measurer.joules(variant, batch, call.seconds)
        raise AssertionError(call.name)

    def _unload(self) -> None:
        self._engine = None
        self._session = ""
        self._loaded.close()


def main(lifeline: int) -> None:
    """Answer frames until there are no more."""
    given = os.fdopen(os.dup(sys.stdin.fileno()), "rb")
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    with given, answers, open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), sys.stdin.fileno())
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
        threading.Thread(target=_end_with_parent, args=(lifeline,), daemon=True).start()
        _serve(given, answers)


def _serve(given: BinaryIO, answers: BinaryIO) -> None:
    answerer = Answerer()
    while (frame := read(given.read)) is not None:
        for piece in encode(answerer.answer(call_of(frame.header), frame.batches)):
            answers.write(piece)
        answers.flush()


def _end_with_parent(lifeline: int) -> None:
    """An engine that hangs would otherwise outlive a parent that was killed."""
    os.read(lifeline, 1)  # returns when the other end is closed: nobody writes to it
    os._exit(1)


def _contender(named: Named) -> Contender:
    return Contender(Path(named.files), named.spec)


if __name__ == "__main__":
    main(int(sys.argv[1]))
