"""The worker: a process that builds, asked over its standard input and output.

One JSON document a line: first what to build for, then calls (`optimizer.execution.calls`), each
answered by a line, after lines that tell how far it is, and which span has ended where the call
names a `traceparent`. What techniques print goes to standard error, and they have nothing to read.

    python -m optimizer.execution.worker LIFELINE

It ends with its input, and in the middle of a call as soon as the pipe LIFELINE is closed: whoever
asked has died, and training on would keep the cores from the next.
"""

import json
import os
import signal
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from optimizer.execution.calls import answer, error_to, machine_from
from optimizer.execution.setup import make_builder
from optimizer.measuring.cores import building
from optimizer.spec import read_spec
from optimizer.telling import Seldom, Tell
from optimizer.tracing import recording

TELL_EVERY_S = 1.0


def main(lifeline: int) -> int:
    """Answer until the input ends; returns the exit code."""
    requests = os.fdopen(os.dup(sys.stdin.fileno()), encoding="utf-8")
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    with requests, answers, open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), sys.stdin.fileno())
        threading.Thread(target=_end_with_parent, args=(lifeline,), daemon=True).start()
        return _serve(requests, answers)


def _serve(requests: TextIO, answers: TextIO) -> int:
    tell = Seldom(lambda message: _say(answers, {"told": message}), TELL_EVERY_S)
    try:
        given = json.loads(next(requests))
        builder = _builder(given, tell)
    except StopIteration:
        return 0
    except Exception as error:  # noqa: BLE001 - the process boundary: told to whoever asked
        _say(answers, {"error": error_to(error)})
        return 1
    _say(answers, {"answer": "ready"})
    for line in requests:
        request = json.loads(line)
        with recording(
            request.get("traceparent"), lambda one: _say(answers, {"span": one.to_dict()})
        ):
            document = _answered(builder, request, given["max_wait_s"])
        _say(answers, document)
    return 0


def _answered(builder: Any, request: Mapping[str, Any], max_wait_s: float) -> Mapping[str, Any]:
    try:
        with building(max_wait_s=max_wait_s):
            return {"answer": answer(builder, request["call"], request["arguments"])}
    except Exception as error:  # noqa: BLE001 - as above
        return {"error": error_to(error)}


def _end_with_parent(lifeline: int) -> None:
    """With all that techniques started: it leads a group of its own."""
    os.read(lifeline, 1)  # returns when the other end is closed: nobody writes to it
    os.killpg(0, signal.SIGKILL)


def _builder(given: Mapping[str, Any], tell: Tell) -> Any:
    spec = read_spec(Path(given["spec"]))
    artifacts = None if given["artifacts"] is None else Path(given["artifacts"])
    return make_builder(spec, given["store"], artifacts, machine_from(given["machine"]), tell)


def _say(answers: TextIO, document: Mapping[str, Any]) -> None:
    answers.write(json.dumps(document) + "\n")
    answers.flush()


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
