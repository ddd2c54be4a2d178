"""The whole loop by the public commands: optimize, serve what was chosen, load it, judge.

The examples' scripts differ in their model, data and spec only.
"""

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console

from optimizer.report import print_table
from optimizer.result import ResultInvalid, StudyResult, from_json
from optimizer.verify import ProcessFailed, Timeouts, is_spoiled, running_server

PROGRAM = (sys.executable, "-m", "trimserve")
EXIT_INTERNAL, EXIT_INTERRUPTED = 70, 130
VERDICTS = {0: "met", 1: "violated", 3: "inconclusive"}
STYLES = {"met": "bold green", "violated": "bold red", "inconclusive": "bold yellow"}
OPTIMIZE_TIMEOUT_S = 3600.0
LOADTEST_TIMEOUT_S = 900.0
GRACE_S = 30.0
INCONCLUSIVE = 3
MAX_REPEATS = 2


def make_console() -> Console:
    """The terminal's; where there is none, wide enough for the table."""
    found = Console()
    return found if found.is_terminal else Console(width=120)


@dataclass(frozen=True)
class Loop:
    """One run of it. Everything that it makes goes to `output`, but for the models of an earlier
    run, which it replaces; the store there is kept, so a second run measures only what is new.

    `inputs` is an .npz file of real inputs for the load test; `environ` is added to the
    environment of the optimizer, and shown in the command that makes the result again.
    """

    spec: Path
    slo: Path
    output: Path
    inputs: Path | None = None
    environ: Mapping[str, str] = field(default_factory=dict)
    console: Console = field(default_factory=make_console)

    def run(self) -> int:
        """Returns the exit code: 0 only if the served variant met its SLO."""
        self.output.mkdir(parents=True, exist_ok=True)
        try:
            return self._run()
        except (OSError, ProcessFailed, ResultInvalid, subprocess.TimeoutExpired) as error:
            self.console.print(f"error: {error}", style="bold red", markup=False)
            return EXIT_INTERNAL
        except KeyboardInterrupt:
            return EXIT_INTERRUPTED

    def _run(self) -> int:
        step(self.console, "Optimize: build, measure, compare and verify variants")
        shutil.rmtree(self._repository, ignore_errors=True)
        self._study_json.unlink(missing_ok=True)
        code = self._optimize()
        if not self._study_json.exists():
            return code
        result = from_json(self._study_json.read_bytes(), str(self._study_json))
        self._print_study(result)
        verdict = str(result.outcome)
        if code == 0:
            code = self._serve_and_load(result)
            verdict = VERDICTS.get(code, f"none, exit code {code}")
        self.console.print(f"\nVerdict: {verdict}", style=STYLES.get(verdict, "bold red"))
        self._print_paths()
        return code

    def _optimize(self) -> int:
        """Its progress goes to the terminal; its table is printed here, under the command."""
        command = [*PROGRAM, *self._optimize_arguments()]
        command += ["--json", str(self._study_json), "--html", str(self.output / "study.html")]
        environ = {**os.environ, **self.environ}
        return _run(command, OPTIMIZE_TIMEOUT_S, environ, stdout=subprocess.DEVNULL)

    def _optimize_arguments(self) -> list[str]:
        store = str(self.output / "store.sqlite")
        arguments = [str(self.spec), "--repository", str(self._repository), "--store", store]
        return ["optimize", *arguments]

    def _print_study(self, result: StudyResult) -> None:
        variables = [f"{name}={shlex.quote(value)}" for name, value in self.environ.items()]
        command = " ".join([*variables, "trimserve", shlex.join(self._optimize_arguments())])
        self.console.print("\nThis command makes the table again:", style="dim")
        self.console.print(f"  {command}\n", soft_wrap=True, highlight=False, markup=False)
        print_table(result, self.console)

    def _serve_and_load(self, result: StudyResult) -> int:
        assert result.chosen is not None
        step(self.console, f"Serve version {result.chosen.version}, and load it over REST and gRPC")
        serve = [*PROGRAM, "serve", "--repository", str(self._repository)]
        serve += ["--log-level", "warning"]
        report = self.output / "loadtest.json"
        with running_server(serve, Timeouts()) as ports:
            command = [*PROGRAM, "loadtest", str(self.slo), "--model", result.model]
            for target in ports.targets(result.slo):
                command += ["--target", target]
            command += ["--metrics-url", ports.metrics_url]
            command += ["--json", str(report)]
            command += ["--html", str(self.output / "loadtest.html")]
            command += ["--inputs", str(self.inputs)] if self.inputs else []
            for repeats_left in range(MAX_REPEATS, -1, -1):
                report.unlink(missing_ok=True)
                code = _run(command, LOADTEST_TIMEOUT_S, os.environ)
                if code != INCONCLUSIVE or not repeats_left or not is_spoiled(report):
                    break
                self.console.print("The load generator was held up, so that says nothing: again.")
            return code

    def _print_paths(self) -> None:
        self.console.print()
        for name in ("study.html", "study.json", "loadtest.html", "loadtest.json"):
            path = self.output / name
            if path.exists():
                self.console.print(f"{path.stem:>9} {path.suffix[1:]:4} {path}", soft_wrap=True)

    @property
    def _repository(self) -> Path:
        return self.output / "models"

    @property
    def _study_json(self) -> Path:
        return self.output / "study.json"


def step(console: Console, title: str) -> None:
    """Announce the next part."""
    console.print()
    console.rule(f"[bold]{title}", align="left", style="dim")


def run_step(command: list[str]) -> int:
    """Run a part of an example that prints for itself; returns its exit code."""
    return _run(command, OPTIMIZE_TIMEOUT_S, os.environ)


def _run(
    command: list[str], timeout_s: float, environ: Mapping[str, str], stdout: int | None = None
) -> int:
    """Run to the end; where that takes too long or Ctrl-C comes, the child ends first."""
    with subprocess.Popen(command, env=environ, stdout=stdout) as child:
        try:
            return child.wait(timeout_s)
        except BaseException:
            child.terminate()
            try:
                child.wait(GRACE_S)
            except subprocess.TimeoutExpired:
                child.kill()
            raise


def shown(path: Path) -> Path:
    """Relative to where we are, if it is below: commands are shorter so."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
