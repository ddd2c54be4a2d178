"""The child process that runs one job: a study, or the load test of a published version.

    python -P -m optimizer.service.child JOB.json

The file names the job's folders (`Order`). Events go to the descriptor that it names, a line of
JSON each; what user code prints goes to standard output and error, which are the job's log. It
ends with its worker: the lifeline is a pipe whose other end the worker holds.

Exit codes are those of the commands: 0 for a study that came to its end, whatever its outcome;
2 for what the job's author has to mend (told as an `error` event); 70 otherwise.
"""

import ctypes
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import traceback
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil

from optimizer.service.reporting import SPAN, Lines, Reporter
from optimizer.tracing import recording, span

EXIT_DONE, EXIT_USAGE, EXIT_INTERNAL = 0, 2, 70
RESULT, REPORT, REPOSITORY = "result.json", "report.html", "versions"
LOAD_TEST_JSON, LOAD_TEST_HTML = "loadtest.json", "loadtest.html"
_NO_NEW_PRIVILEGES = 38  # PR_SET_NO_NEW_PRIVS, linux/prctl.h


@dataclass(frozen=True)
class Order:
    """What a child is to do. `kind` is the job's; `spec` the materialized spec of a study, or the
    SLO of a load test; `out` the folder for what is made. `model`, `version`, `repository` are a
    load test's, with `trusts_code` where the version's files may carry code. `lifeline` and
    `events` are descriptors, `traceparent` the place in a trace that it is a part of."""

    kind: str
    spec: str
    out: str
    lifeline: int
    events: int
    store: str = ""
    artifacts: str | None = None
    verify: bool = True
    max_file_bytes: int | None = None
    cluster: dict[str, Any] | None = None
    """Of a study: the fields of `optimizer.execution.cluster.Cluster`."""
    model: str = ""
    version: str = ""
    repository: str = ""
    trusts_code: bool = False
    traceparent: str | None = None
    command: tuple[str, ...] = field(default=())

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)), "utf-8")

    @classmethod
    def read(cls, path: Path) -> "Order":
        held = json.loads(path.read_text("utf-8"))
        return cls(**{**held, "command": tuple(held["command"])})


def main(order_file: str) -> int:
    order = Order.read(Path(order_file))
    threading.Thread(target=end_with_worker, args=(order.lifeline,), daemon=True).start()
    signal.signal(signal.SIGTERM, _interrupted)
    _confine(order)
    os.environ["TMPDIR"] = str(Path(order.out).parent / "tmp")
    Path(os.environ["TMPDIR"]).mkdir(exist_ok=True)
    lines = Lines(order.events)
    try:
        with recording(order.traceparent, lambda span: lines.tell(SPAN, span.to_dict())):
            outcome = _carried_out(order, lines)
    except KeyboardInterrupt:
        return 130
    except _mendable() as error:
        lines.tell("error", {"message": str(error)})
        return EXIT_USAGE
    except MemoryError:
        lines.tell("error", {"message": "out of memory"})
        return EXIT_INTERNAL
    except Exception as error:  # noqa: BLE001 - the process boundary: told to the job's author
        traceback.print_exc()
        lines.tell("error", {"message": f"{type(error).__name__}: {error}; the log has the trace"})
        return EXIT_INTERNAL
    lines.tell("result", {"outcome": outcome})
    return EXIT_DONE


def _carried_out(order: Order, lines: Lines) -> str:
    is_study = order.kind == "optimization"
    with span("study" if is_study else "load test") as under_way:
        outcome = _study(order, lines) if is_study else _load(order, lines)
        under_way.set("trimserve.outcome", outcome)
    return outcome


def _study(order: Order, lines: Lines) -> str:
    from optimizer.execution.cluster import Cluster
    from optimizer.report import render_html
    from optimizer.result import to_json
    from optimizer.service.reporting import summary
    from optimizer.study import Options, optimize

    out = Path(order.out)
    options = Options(
        store=order.store if "://" in order.store else Path(order.store),
        artifacts=None if order.artifacts is None else Path(order.artifacts),
        verify=order.verify,
        observer=Reporter(lines),
        command=order.command,
        cluster=None if order.cluster is None else Cluster(**order.cluster),
    )
    result = optimize(order.spec, out / REPOSITORY, options)
    (out / RESULT).write_text(to_json(result), "utf-8")
    (out / REPORT).write_text(render_html(result), "utf-8")
    chosen = result.chosen
    lines.tell(
        "answer",
        {
            "outcome": result.outcome,
            "model": result.model,
            "chosen": chosen.id if chosen is not None else None,
            "version": chosen.version if chosen is not None else None,
            "baseline": result.baseline_id,
            "objective": result.objective,
            "variants": [summary(variant) for variant in result.variants],
            "notes": list(result.notes),
        },
    )
    return result.outcome


def _load(order: Order, lines: Lines) -> str:
    """Serve the version alone on loopback, put the SLO's load on it, and keep the reports."""
    from loadtest.slo import read_slo
    from optimizer.verify import Timeouts, read_report, running_server

    slo, out, timeouts = read_slo(Path(order.spec)), Path(order.out), Timeouts()
    program = [sys.executable, "-P", "-m", "trimserve"]
    serve = [
        *program, "serve", "--repository", order.repository, "--model-control", "explicit",
        "--load-model", order.model, "--version-policy", f"specific:{order.version}",
        "--slo", order.spec, "--control-port", "0",
    ]  # fmt: skip
    if order.trusts_code:
        serve.append("--trust-code")
    lines.tell("phase", {"name": "starting the server"})
    with running_server(serve, timeouts) as ports:
        lines.tell("phase", {"name": f"load test, {slo.window_s:g} s and its warm-up"})
        report = out / LOAD_TEST_JSON
        command = [
            *program, "loadtest", order.spec, "--model", order.model, "--json", str(report),
            "--html", str(out / LOAD_TEST_HTML), "--metrics-url", ports.metrics_url,
        ]  # fmt: skip
        for target in ports.targets(slo):
            command += ["--target", target]
        limit_s = slo.window_s + timeouts.loadtest_s
        done = subprocess.run(command, timeout=limit_s, check=False)  # noqa: S603 - our own
    verification = read_report(report, done.returncode, slo.latency.quantile)
    told: dict[str, Any] = asdict(verification)
    lines.tell("load_test", {**told, "reasons": list(verification.reasons)})
    return verification.verdict


def _mendable() -> tuple[type[BaseException], ...]:
    """What the job's author can mend: its message is all that has to be said."""
    from loadtest.document import DocumentInvalid
    from optimizer.errors import MeasurerUnavailable, SpecInvalid
    from optimizer.execution import NoExecutor
    from optimizer.verify import ProcessFailed
    from serve.engines import EngineUnavailable
    from serve.errors import ArtifactInvalid

    return (
        ArtifactInvalid, DocumentInvalid, EngineUnavailable, MeasurerUnavailable, NoExecutor,
        ProcessFailed, SpecInvalid,
    )  # fmt: skip


def _confine(order: Order) -> None:
    """What user code can't be trusted with: no more privileges by setuid programs, no core dumps,
    no file larger than allowed. Memory and time are the worker's to watch."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if order.max_file_bytes is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (order.max_file_bytes, order.max_file_bytes))


def end_with_worker(lifeline: int) -> None:
    """Wait for the worker's death, then end this process with all that it started.

    The pipe closes when the worker dies, however it dies: running on would keep the cores from
    the next, and a result that nobody waits for."""
    os.read(lifeline, 1)
    for process in psutil.Process().children(recursive=True):  # servers have sessions of their own
        with suppress(psutil.Error):
            process.kill()
    os.killpg(0, signal.SIGKILL)


def _interrupted(_number: int, _frame: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
