"""Execution: building answers the same wherever it is done, and costs a trial when it fails."""

import json
import math
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from optimizer.errors import (
    OptimizerError,
    ParityMismatch,
    SpecInvalid,
    TechniqueFailed,
    TechniqueNotApplicable,
)
from optimizer.execution import Json
from optimizer.execution.calls import (
    blocks_from,
    error_from,
    error_to,
    option_from,
    space_from,
    space_to,
    timed_blocks_from,
)
from optimizer.execution.delegation import DelegatingBuilder
from optimizer.execution.inline import InlineExecutor
from optimizer.execution.processes import MAX_BUILD_S, ProcessExecutor, setup_of
from optimizer.execution.setup import Surroundings, enabled_techniques, read_data
from optimizer.measuring import Measurer
from optimizer.measuring.local import LocalMeasurer
from optimizer.recipe import Recipe
from optimizer.space import Categorical, Number
from optimizer.spec import read_spec
from optimizer.store import Store
from optimizer.variant import Kind
from serve.machine import this_machine
from tests.optimizer.rogues import PLUGINS, Refusing, Rogue
from tests.optimizer.tiny_study import write_study

ROOT = Path(__file__).parents[2]
NARROW = [["narrow", {"width": 0.5}]]
PATIENCE_S = 120


def rogue(way: str) -> Json:
    return {"recipe": [["rogue", {"way": way}]]}


@pytest.fixture(scope="module", autouse=True)
def own_locks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Whoever else measures on this machine now is none of these tests' business."""
    directory = tmp_path_factory.mktemp("runtime")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_RUNTIME_DIR", str(directory))
        patch.setenv("PYTHONPATH", str(ROOT))
        yield


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = write_study(tmp_path_factory.mktemp("study"))
    plugins = json.dumps([*PLUGINS, "tests.optimizer.synthetic:Narrow"])
    path.write_text(
        path.read_text().replace("techniques: {", f"techniques: {{plugins: {plugins}, ")
    )
    return path


@pytest.fixture(scope="module")
def processes(spec: Path) -> Iterator[ProcessExecutor]:
    """A worker, which the tests of this module share."""
    setup = setup_of(spec, spec.with_name("store.sqlite"), None, this_machine())
    executor = ProcessExecutor(setup, LocalMeasurer())
    executor.start()
    yield executor
    executor.close()


@pytest.fixture(scope="module")
def inline(spec: Path) -> Iterator[InlineExecutor]:
    with Store(spec.with_name("inline.sqlite")) as store:
        yield InlineExecutor(surroundings(spec), store, LocalMeasurer())


def surroundings(path: Path) -> Surroundings:
    spec = read_spec(path)
    return Surroundings(spec, read_data(spec), this_machine(), enabled_techniques(spec))


# --- the same answers


def test_worker_builds_under_the_same_ids_as_the_inline_executor(
    processes: ProcessExecutor, inline: InlineExecutor, spec: Path
) -> None:
    recipes = [{"recipe": NARROW}, rogue("talks")]
    made = [processes.build("build", recipe) for recipe in recipes]

    assert made == [inline.build("build", recipe) for recipe in recipes]
    with Store(spec.with_name("store.sqlite")) as store:
        assert digests(store, made) == digests(inline.store, made)


def digests(store: Store, ids: Sequence[str]) -> list[str]:
    found = [store.find(one) for one in ids]
    return [one.model.digest for one in found if one is not None]


def test_worker_gives_the_same_options_and_blocks_as_the_inline_executor(
    processes: ProcessExecutor, inline: InlineExecutor
) -> None:
    asked = {"technique": "rogue", "recipe": []}
    ours, theirs = processes.build("option", asked), inline.build("option", asked)
    assert option_from(ours, Rogue.traits) == option_from(theirs, Rogue.traits)
    assert len(space_from(ours["space"])["way"].choices) == 5

    asked = {"technique": "refusing", "recipe": []}
    assert processes.build("option", asked) == {"refusal": "no layer is wide enough"}
    assert option_from(inline.build("option", asked), Refusing.traits) is None

    blocks = blocks_from(processes.build("blocks", {"recipe": NARROW}))
    assert blocks
    assert blocks == blocks_from(inline.build("blocks", {"recipe": NARROW}))


def test_worker_gives_the_same_layers_to_time_as_the_inline_executor(
    processes: ProcessExecutor, inline: InlineExecutor
) -> None:
    for technique, n in (("rogue", 1), ("narrow", 0)):
        asked = {"technique": technique}
        layers = timed_blocks_from(processes.build("timed_blocks", asked))
        assert layers == timed_blocks_from(inline.build("timed_blocks", asked))
        assert len(layers) == n
        assert all(hash(layer) for layer in layers)


def test_blocks_are_none_when_the_recipe_cannot_be_made(
    processes: ProcessExecutor, inline: InlineExecutor
) -> None:
    assert processes.build("blocks", rogue("raises")) is None
    assert inline.build("blocks", rogue("raises")) is None


def test_space_survives_the_wire() -> None:
    space = {
        "engine": Categorical(("onnxruntime", "openvino"), is_baseline=True),
        "flag": Categorical((True, False)),
        "percentile": Number(99.0, 100.0, 99.9, when={"engine": ("openvino",)}),
        "width": Number(8, 64, 32, whole=True, logarithmic=True, step=8, when={"flag": (True,)}),
    }
    again = space_from(json.loads(json.dumps(space_to(space))))
    assert again == space
    assert list(again) == list(space)


# --- errors


@pytest.mark.parametrize(
    ("technique", "parameters", "kind"),
    [
        pytest.param("refusing", {}, TechniqueNotApplicable, id="a check that refuses"),
        pytest.param("rogue", {"way": "raises"}, TechniqueFailed, id="a technique that raises"),
        pytest.param("rogue", {"way": "unknown"}, TechniqueFailed, id="parameters of no space"),
        pytest.param("lossy", {}, ParityMismatch, id="outputs that differ"),
    ],
)
def test_error_is_the_same_over_the_wire_as_inline(
    technique: str,
    parameters: Json,
    kind: type[Exception],
    processes: ProcessExecutor,
    inline: InlineExecutor,
) -> None:
    asked = {"recipe": [[technique, parameters]]}
    with pytest.raises(kind) as ours:
        processes.build("build", asked)
    with pytest.raises(kind) as theirs:
        inline.build("build", asked)
    assert str(ours.value) == str(theirs.value)


@pytest.mark.parametrize(
    "error",
    [
        TechniqueNotApplicable("pruning", "no layer"),
        TechniqueFailed("pruning", "its process ended"),
        ParityMismatch("a and b", 3, 0.5, 0.1),
        SpecInvalid("spec.yaml", ["one", "two"]),
    ],
)
def test_error_survives_the_wire_with_what_it_carries(error: OptimizerError) -> None:
    again = error_from(json.loads(json.dumps(error_to(error), allow_nan=False)))
    assert type(again) is type(error)
    assert vars(again) == vars(error)


def test_error_is_told_in_words_when_it_is_nobody_s_own() -> None:
    again = error_from(error_to(MemoryError("no room")))
    assert type(again) is OptimizerError
    assert str(again) == "building failed: MemoryError: no room"
    endless = error_from(error_to(ParityMismatch("a and b", 1, math.inf, 0.1)))
    assert isinstance(endless, ParityMismatch)
    assert endless.max_difference == 1e308


def test_start_raises_spec_invalid_each_time_when_the_worker_cannot_use_the_model() -> None:
    error = json.dumps({"error": error_to(SpecInvalid("spec.yaml", ["model: no such file"]))})
    executor = shell(f"read setup; echo '{error}'")
    for _ in range(2):
        with pytest.raises(SpecInvalid, match="model: no such file"):
            executor.start()


def test_step_is_heard_in_its_order_when_it_tells_before_its_answer() -> None:
    told = [json.dumps({"told": f"epoch {n} of 2"}) for n in (1, 2)]
    lines = " ".join(f"'{line}'" for line in (*told, json.dumps({"answer": 7})))
    executor = shell(f"read setup; echo '{{\"answer\": 1}}'; read call; printf '%s\\n' {lines}")
    heard: list[str] = []
    executor.tell = heard.append
    assert executor.build("build", {"recipe": [["one", {}]]}) == 7
    assert heard == ["epoch 1 of 2", "epoch 2 of 2"]
    executor.close()


def test_telling_step_ends_at_the_limit_all_the_same() -> None:
    forever = 'while true; do echo \'{"told": "still here"}\'; sleep 0.02; done'
    executor = shell(f"read setup; echo '{{\"answer\": 1}}'; read call; {forever}")
    executor.max_build_s = 0.3
    with pytest.raises(TechniqueFailed, match=r"longer than 0\.3 s"):
        executor.build("build", {"recipe": [["one", {}]]})


def shell(script: str) -> ProcessExecutor:
    """With a worker that is a script, whose answers are given."""
    return ProcessExecutor({}, LocalMeasurer(), program=("sh", "-c", script))


# --- techniques that behave badly


def test_worker_answers_as_always_when_a_technique_writes_to_its_output_and_reads_its_input(
    processes: ProcessExecutor, inline: InlineExecutor
) -> None:
    builder = surroundings_builder(inline)
    for way in ("talks", "listens"):
        want = builder.variant_id(Recipe(Kind.TORCH).then(Rogue.traits, {"way": way}))
        assert processes.build("build", rogue(way)) == want


def surroundings_builder(inline: InlineExecutor) -> DelegatingBuilder:
    shared = inline.surroundings
    return DelegatingBuilder(
        inline.store, shared.base, shared.techniques, shared.context, shared.inputs, executor=inline
    )


def test_technique_that_kills_its_process_is_named_and_the_next_call_works(
    processes: ProcessExecutor,
) -> None:
    said = r"rogue failed: its process ended by SIGKILL: (.*\n)*last words"
    with pytest.raises(TechniqueFailed, match=said):
        processes.build("build", rogue("is killed"))
    assert processes.build("build", rogue("talks"))


def test_technique_that_ends_its_process_is_named_with_the_exit_code() -> None:
    executor = shell("""read setup; echo '{"answer": "ready"}'; read call; echo bye >&2; exit 7""")
    with pytest.raises(TechniqueFailed, match=r"rogue failed: .* exit code 7: bye"):
        executor.build("build", rogue("talks"))


def test_technique_that_hangs_is_named_with_the_limit_and_the_next_call_works(
    processes: ProcessExecutor,
) -> None:
    processes.start()
    processes.max_build_s = 0.5
    with pytest.raises(TechniqueFailed, match=r"rogue failed: it took longer than 0\.5 s"):
        processes.build("build", rogue("hangs"))
    processes.max_build_s = MAX_BUILD_S
    assert processes.build("build", rogue("talks"))


# --- the worker's end


@pytest.fixture
def worker(spec: Path) -> Iterator["Worker"]:
    """One by hand, that can build. Its standard error ends when all that it started has ended."""
    lifeline, ours = os.pipe()
    command = [sys.executable, "-P", "-m", "optimizer.execution.worker", str(lifeline)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        pass_fds=[lifeline], start_new_session=True,
    ) as process:  # fmt: skip
        os.close(lifeline)
        made = Worker(process, ours)
        try:
            made.tell(setup_of(spec, spec.with_name("store.sqlite"), None, this_machine()))
            assert made.heard() == {"answer": "ready"}
            yield made
        finally:
            made.close_lifeline()
            process.communicate(timeout=PATIENCE_S)


@dataclass
class Worker:
    process: "subprocess.Popen[str]"
    lifeline: int

    def tell(self, document: Json) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(document) + "\n")
        self.process.stdin.flush()

    def heard(self) -> Json:
        assert self.process.stdout is not None
        return json.loads(self.process.stdout.readline())

    def close_lifeline(self) -> None:
        if self.lifeline >= 0:
            os.close(self.lifeline)
        self.lifeline = -1


def test_worker_ends_in_the_middle_of_a_call_with_what_it_started_when_whoever_asked_is_gone(
    worker: Worker,
) -> None:
    worker.tell({"call": "build", "arguments": rogue("hangs")})
    assert worker.process.stderr is not None
    assert any("lingering" in line for line in worker.process.stderr)
    worker.close_lifeline()
    assert worker.process.wait(PATIENCE_S) == -signal.SIGKILL
    worker.process.communicate(timeout=PATIENCE_S)


def test_worker_ends_when_its_input_does() -> None:
    lifeline, ours = os.pipe()
    command = [sys.executable, "-P", "-m", "optimizer.execution.worker", str(lifeline)]
    ended = subprocess.run(
        command, input="", pass_fds=[lifeline], start_new_session=True, timeout=PATIENCE_S,
        check=False,
    )  # fmt: skip
    for descriptor in (lifeline, ours):
        os.close(descriptor)
    assert ended.returncode == 0


def test_close_ends_the_worker_and_what_it_started() -> None:
    executor = shell(
        """read setup; echo '{"answer": "ready"}'; read call; sleep 1000 & """
        """echo "{\\"answer\\": $!}"; read more"""
    )
    descriptor = os.pidfd_open(executor.build("build", rogue("talks")))
    executor.close()
    executor.close()
    # A descriptor of a process can be read once that has ended.
    assert select.select([descriptor], [], [], PATIENCE_S)[0]
    os.close(descriptor)


COORDINATOR = """
import sys
from pathlib import Path
from optimizer.study import Options, optimize
from optimizer.timing import Effort

effort = Effort(
    min_passes=3, max_passes=3, seconds=0.0, max_warmup_passes=1, max_warmup_s=0.1, max_retries=0
)
spec = Path(sys.argv[1])
options = Options(store=spec.with_name("isolated.sqlite"), verify=False, effort=effort)
result = optimize(spec, spec.with_name("models"), options)
print(result.outcome, [row.label for row in result.variants], "torch" in sys.modules)
"""


def test_coordinator_never_imports_torch_when_the_study_is_isolated(tmp_path: Path) -> None:
    plain = write_study(tmp_path)  # a plugin's module may import torch, to say what it is
    text = plain.read_text().replace("trials: 3", "trials: 1")
    plain.write_text(text.replace("target: {", "target: {cores: 1, "))
    ended = subprocess.run(
        [sys.executable, "-c", COORDINATOR, str(plain)], capture_output=True, text=True,
        timeout=PATIENCE_S, check=False, cwd=ROOT,
    )  # fmt: skip
    assert ended.stdout == "unverified ['ONNX Runtime'] False\n", ended.stderr


# --- delegation


@dataclass
class Failing:
    """An executor whose every call fails the same way."""

    error: Exception
    measurer: Measurer = field(default_factory=LocalMeasurer)
    asked: list[str] = field(default_factory=list)

    def start(self) -> None: ...

    def build(self, call: str, arguments: Json) -> Json:
        self.asked.append(call)
        raise self.error

    def close(self) -> None: ...


def test_delegating_builder_blames_the_first_step_that_is_missing_and_asks_once(
    inline: InlineExecutor,
) -> None:
    first = Recipe(Kind.TORCH).then(Rogue.traits, {"way": "talks"})
    both = first.then(Refusing.traits, {})
    assert inline.build("build", rogue("talks")) == surroundings_builder(inline).variant_id(first)
    failing = Failing(TechniqueNotApplicable("refusing", "no layer is wide enough"))
    builder = replace(surroundings_builder(inline), executor=failing)
    for _ in range(2):
        with pytest.raises(TechniqueNotApplicable):
            builder.build(both)
    assert failing.asked == ["build"]
    assert builder.failed_id(both) == builder.ids(both)[1]
    assert builder.build(first).id == builder.variant_id(first)


def test_delegating_builder_knows_no_blocks_when_the_worker_dies_over_them(
    inline: InlineExecutor,
) -> None:
    failing = Failing(TechniqueFailed("rogue", "its process ended by SIGKILL"))
    builder = replace(surroundings_builder(inline), executor=failing)
    assert builder.blocks(Recipe(Kind.TORCH).then(Rogue.traits, {"way": "is killed"})) is None
