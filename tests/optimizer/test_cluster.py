"""A Ray cluster without Ray: what is chosen, what nodes have to meet, and who measures where."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from optimizer.cli import main
from optimizer.errors import MeasurerUnavailable, SpecInvalid, TechniqueFailed
from optimizer.execution import ExecutorLost, NoExecutor
from optimizer.execution.calls import error_to
from optimizer.execution.cluster import Cluster, Node
from optimizer.execution.cluster.actors import BuildActor, MeasureActor
from optimizer.execution.cluster.connection import ActorLost, TooLate
from optimizer.execution.cluster.executor import RayExecutor
from optimizer.execution.cluster.measurer import MAX_LOST, RayMeasurer
from optimizer.execution.cluster.terms import Terms, host, marked, versions
from optimizer.measuring import ContenderFailed
from optimizer.measuring.frames import Frame, encode
from optimizer.overheads import trivial_model
from optimizer.places import refuse_local_store
from optimizer.spec import ModuleSource
from optimizer.store import StoreInvalid
from optimizer.store.location import locate
from optimizer.study import Options, optimize
from optimizer.timing import Contender, Effort
from serve.engines import EngineSpec
from serve.machine import this_machine
from tests.optimizer.tiny_study import write_study

CLUSTER = Cluster("head:6379", max_pending_s=0.1)
TERMS = Terms(versions(), {})
MEASURING = {"CPU": 4.0, "GPU": 1.0, "trimserve_measure": 1.0}
Answer = Callable[[str, bytes], bytes]


def dumped(document: Any) -> bytes:
    return json.dumps(document).encode()


@dataclass(eq=False)
class ScriptedActor:
    """Answers by a function; `lost` after it was killed."""

    answer: Answer
    asked: list[tuple[str, Any]] = field(default_factory=list)
    is_killed: bool = False

    def call(
        self,
        method: str,
        argument: bytes,
        timeout_s: float,
        meanwhile: Any = bool,
        every_s: Any = 1,
    ) -> bytes:
        if self.is_killed:
            raise ActorLost("killed")
        self.asked.append((method, argument))
        meanwhile()
        return self.answer(method, argument)

    def kill(self) -> None:
        self.is_killed = True


@dataclass(eq=False)
class ScriptedConnection:
    """Each actor that is asked for answers as the next of `answers`, the last for all later."""

    answers: list[Answer]
    found: list[Node] = field(default_factory=lambda: [Node("a", "m1", "10.0.0.1", MEASURING)])
    cluster: Cluster = CLUSTER
    actors: list[ScriptedActor] = field(default_factory=list)
    shares: list[Mapping[str, float]] = field(default_factory=list)

    def nodes(self) -> list[Node]:
        return self.found

    def described(self) -> str:
        return "; ".join(map(str, self.found)) or "no nodes"

    def actor(self, kind: type, share: Mapping[str, float]) -> ScriptedActor:
        self.shares.append(share)
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        self.actors.append(ScriptedActor(answer))
        return self.actors[-1]


# --- what is chosen


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param({"address": "ray://head:10001"}, "Ray's client sends code", id="a client's"),
        pytest.param({"address": "head"}, "want HOST:PORT of the head", id="no port"),
        pytest.param({"address": "head:0"}, "want HOST:PORT of the head", id="port 0"),
        pytest.param({"build_cpus": 0}, "build_cpus: got 0, want 1 to 4096", id="no CPUs"),
        pytest.param({"measure_resource": "CPU"}, "measure_resource: got 'CPU'", id="Ray's own"),
        pytest.param({"measure_resource": "a b"}, "measure_resource: got 'a b'", id="no name"),
        pytest.param({"max_pending_s": 0.0}, "max_pending_s: got 0", id="no patience"),
    ],
)
def test_value_is_refused_by_name_when_it_is(change: dict[str, Any], message: str) -> None:
    [problem] = replace(Cluster("head:6379"), **change).problems()
    assert message in problem


@pytest.mark.parametrize("address", ["10.0.0.1:6379", "head.svc:6379", "[fd00::1]:6379"])
def test_addresses_of_heads_are_taken(address: str) -> None:
    assert Cluster(address).problems() == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(
            ["--ray", "head"], "--ray: got 'head', want HOST:PORT of the head", id="address"
        ),
        pytest.param(["--ray-build-cpus", "2"], "want --ray with them", id="CPUs of no cluster"),
        pytest.param(
            ["--ray", "h:1", "--ray-measure", "GPU"], "--ray-measure: got 'GPU'", id="resource"
        ),
    ],
)
def test_exit_code_is_2_when_options_dont_name_a_cluster(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = main([str(tmp_path / "spec.yaml"), "--repository", str(tmp_path), *arguments])
    assert code == 2
    assert message in capsys.readouterr().err


def test_cluster_that_is_none_is_refused_before_the_spec_is_read(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cluster\.address: got 'head', want HOST:PORT"):
        optimize(tmp_path / "spec.yaml", tmp_path, Options(cluster=Cluster("head")))


def test_cluster_is_refused_for_a_model_that_is_an_object(tmp_path: Path) -> None:
    from torch import nn

    options = Options(store=tmp_path / "s", cluster=CLUSTER)
    with pytest.raises(ValueError, match="cluster: want a spec that is a file"):
        optimize(write_study(tmp_path), tmp_path, options, ModuleSource(nn.Identity(), (), ()))


# --- what nodes have to meet


def test_terms_are_met_where_they_were_made_and_leave_nothing(tmp_path: Path) -> None:
    spec = write_study(tmp_path)
    with marked(tmp_path / "artifacts", spec, only_here=True) as terms:
        assert Terms.from_dict(json.loads(json.dumps(terms.to_dict()))).problems() == []
    assert list((tmp_path / "artifacts").iterdir()) == []


def test_node_is_unfit_when_it_sees_other_files_or_has_other_packages(tmp_path: Path) -> None:
    spec = write_study(tmp_path)
    with marked(tmp_path / "artifacts", spec, only_here=False) as terms:
        spec.write_text("another")
        for mark in (tmp_path / "artifacts").iterdir():
            mark.unlink()
        other = replace(terms, versions={**terms.versions, "numpy": "0.1"})
        found = "\n".join(other.problems())
    assert f"{tmp_path / 'artifacts'} isn't what it is where the study is led" in found
    assert f"{spec} isn't what it is" in found
    assert "numpy: " in found
    assert "0.1 where the study is led" in found


def test_node_is_unfit_for_an_sqlite_store_of_another_machine() -> None:
    [problem] = Terms(versions(), {}, host="elsewhere").problems()
    assert "SQLite file on elsewhere; want postgresql://" in problem
    assert Terms(versions(), {}, host=host()).problems() == []


def test_sqlite_store_is_refused_before_anything_when_other_machines_would_build(
    tmp_path: Path,
) -> None:
    here, there = (Node(name, name, "-", {"CPU": 1.0}) for name in (host(), "b2"))
    file, url = (
        locate(one, tmp_path) for one in (tmp_path / "store.sqlite", "postgresql://u@db/store")
    )
    refuse_local_store(file, [here])
    refuse_local_store(url, [here, there])
    with pytest.raises(StoreInvalid, match=r"store.sqlite: an SQLite file .* b2: want postgresql"):
        refuse_local_store(file, [there])


def test_nodes_build_that_have_cpus_for_it_and_dont_measure() -> None:
    cluster = replace(CLUSTER, build_cpus=2)
    shares = [{"CPU": 1.0}, {"CPU": 2.0}, {"CPU": 2.0, "trimserve_measure": 1.0}]
    found = [Node("n", "n", "-", share).can_build(cluster) for share in shares]
    assert found == [False, True, False]


# --- builders


def builder(*answers: Answer, told: list[str] | None = None) -> tuple[RayExecutor, Any]:
    connection: Any = ScriptedConnection(list(answers))
    tell = (told if told is not None else []).append
    setup = {"spec": "spec.yaml"}
    return RayExecutor(connection, setup, TERMS, measurer(MEASURES)[0], tell), connection


def builds(method: str, argument: bytes) -> bytes:
    return {
        "ready": dumped({"host": "b1", "problems": []}),
        "start": dumped({"answer": "ready"}),
        "build": dumped({"answer": "an id"}),
        "told": b"epoch 3",
    }[method]


def instead(method: str, answer: Any) -> Answer:
    """As `builds`, but for one method, which answers or raises that."""

    def act(asked: str, argument: bytes) -> bytes:
        if asked != method:
            return builds(asked, argument)
        if isinstance(answer, Exception):
            raise answer
        return dumped(answer)

    return act


RECIPE = {"recipe": [["prune", {}]]}


def test_builder_is_kept_between_calls_and_says_how_far_it_is() -> None:
    told: list[str] = []
    executor, connection = builder(builds, told=told)
    assert [executor.build("build", RECIPE) for _ in range(2)] == ["an id"] * 2
    [actor] = connection.actors
    assert connection.shares == [{"CPU": 1}]
    asked = [method for method, _ in actor.asked if method != "told"]
    assert asked == ["ready", "start", "build", "build"]
    started = json.loads(actor.asked[1][1])
    assert started == {"setup": {"spec": "spec.yaml"}, "threads": 1}
    assert "epoch 3" in told


def test_another_builder_is_had_after_one_was_lost() -> None:
    executor, connection = builder(instead("build", ActorLost("its node died")), builds)
    with pytest.raises(ExecutorLost, match="the builder on b1 was lost: its node died"):
        executor.build("build", RECIPE)
    assert executor.build("build", RECIPE) == "an id"
    assert [one.is_killed for one in connection.actors] == [True, False]


@pytest.mark.parametrize(
    ("method", "answer", "error", "message"),
    [
        pytest.param("ready", TooLate(""), NoExecutor, r"no node had room .* m1 .*: CPU 4, GPU 1",
                     id="no node has room"),
        pytest.param("ready", {"host": "b1", "problems": ["numpy: 1 here"]}, NoExecutor,
                     "node b1: numpy: 1 here", id="the node is unfit"),
        pytest.param("ready", ActorLost("gone"), ExecutorLost, "while it started: gone",
                     id="it is lost at the start"),
        pytest.param("start", {"error": error_to(SpecInvalid("s", ["model: bad"]))}, SpecInvalid,
                     "model: bad", id="the model can't be used"),
        pytest.param("build", TooLate("no answer within 1 s"), TechniqueFailed,
                     "prune failed: on b1: no answer", id="it hangs"),
    ],
)  # fmt: skip
def test_builder_is_given_back_when(
    method: str, answer: Any, error: type[Exception], message: str
) -> None:
    executor, connection = builder(instead(method, answer))
    with pytest.raises(error, match=message):
        executor.build("build", RECIPE)
    assert connection.actors[0].is_killed


def test_builder_is_kept_when_a_technique_failed() -> None:
    failed = {"error": error_to(TechniqueFailed("prune", "no memory"))}
    executor, connection = builder(instead("build", failed))
    with pytest.raises(TechniqueFailed, match="prune failed: no memory"):
        executor.build("build", RECIPE)
    assert not connection.actors[0].is_killed
    executor.close()
    assert connection.actors[0].is_killed


def test_actor_that_builds_says_what_speaks_against_its_node() -> None:
    answered = json.loads(BuildActor().ready(dumped(Terms({"numpy": "0.1"}, {}).to_dict())))
    assert answered["host"] == host()
    assert "numpy" in answered["problems"][0]


# --- the measurer


def measurer(*answers: Answer, **given: Any) -> tuple[RayMeasurer, Any]:
    connection: Any = ScriptedConnection(list(answers), **given)
    return RayMeasurer(connection, TERMS, Path("/shared"), max_wait_s=5.0), connection


def measuring(changes: Mapping[str, Any] | None = None, **machine: Any) -> Answer:
    """With other answers of some methods: bytes, or what is raised."""
    shown = {**this_machine().to_dict(), **machine}
    answers = {
        "ready": dumped({"host": "m1", "machine": shown, "problems": []}),
        "start": dumped({"answer": "ready"}),
        "take": dumped({"answer": "taken"}),
        "close": dumped({"answer": "closed"}),
        "exchange": b"".join(encode(Frame({"result": 4096}))),
        **(changes or {}),
    }

    def act(method: str, argument: bytes) -> bytes:
        answer = answers[method]
        if isinstance(answer, Exception):
            raise answer
        return bytes(answer)

    return act


MEASURES = measuring()
BATCH = {"x": np.zeros((1, 4), np.float32)}
SHARED = Contender(Path("/shared/0123"), EngineSpec("onnxruntime", "model.onnx"))


def test_measurer_asks_for_all_that_a_node_has() -> None:
    ours, connection = measurer(MEASURES)
    assert ours.machine == this_machine()
    assert ours.memory_bytes(SHARED, BATCH) == 4096
    assert connection.shares == [MEASURING]
    ours.close()
    assert connection.actors[0].is_killed


def test_measurer_says_what_the_cluster_has_when_no_node_may_measure() -> None:
    ours, _ = measurer(MEASURES, found=[Node("a", "b1", "10.0.0.2", {"CPU": 4.0})])
    with pytest.raises(MeasurerUnavailable, match=r"no node has the resource .*b1 \(10.0.0.2\)"):
        ours.machine  # noqa: B018


def test_measurer_refuses_nodes_of_different_kinds_under_one_name() -> None:
    found = [Node(name, name, "-", {**MEASURING, "CPU": n}) for name, n in (("a", 4.0), ("b", 8.0))]
    ours, _ = measurer(MEASURES, found=found)
    with pytest.raises(MeasurerUnavailable, match="want one resource for each kind of machine"):
        ours.machine  # noqa: B018


def test_call_is_made_again_on_another_node_of_the_same_kind_when_one_is_lost() -> None:
    ours, connection = measurer(measuring({"exchange": ActorLost("node died")}), MEASURES)
    assert ours.memory_bytes(SHARED, BATCH) == 4096
    assert [one.is_killed for one in connection.actors] == [True, False]


def test_study_ends_when_the_other_node_is_another_machine() -> None:
    lost = measuring({"exchange": ActorLost("node died")})
    ours, _ = measurer(lost, measuring(cores=64))
    with pytest.raises(MeasurerUnavailable, match=r"isn't of the kind .* cores: \d+ here, 64"):
        ours.memory_bytes(SHARED, BATCH)


def test_call_that_loses_one_node_after_the_other_is_given_up() -> None:
    ours, connection = measurer(measuring({"exchange": ActorLost("node died")}))
    with pytest.raises(MeasurerUnavailable, match="3 nodes were lost in one call"):
        ours.memory_bytes(SHARED, BATCH)
    assert len(connection.actors) == MAX_LOST


def test_node_that_another_study_has_is_waited_for_and_then_given_up() -> None:
    ours, connection = measurer(measuring({"ready": TooLate("late")}))
    with pytest.raises(MeasurerUnavailable, match="not free within 5 s: another study"):
        ours.machine  # noqa: B018
    assert connection.actors[0].is_killed


@pytest.mark.parametrize(
    ("header", "error"),
    [({"failure": "Killed"}, ContenderFailed), ({"unavailable": "cores"}, MeasurerUnavailable)],
)
def test_failures_of_engines_and_of_the_node_are_told_apart(
    header: dict[str, str], error: type[Exception]
) -> None:
    answer = b"".join(encode(Frame(header)))
    ours, _ = measurer(measuring({"exchange": answer}))
    with pytest.raises(error, match=next(iter(header.values()))):
        ours.memory_bytes(SHARED, BATCH)


def test_calls_fail_after_stop() -> None:
    ours, connection = measurer(MEASURES)
    ours.machine  # noqa: B018
    ours.stop()
    with pytest.raises(MeasurerUnavailable, match="stopped"):
        ours.memory_bytes(SHARED, BATCH)
    assert connection.actors[0].is_killed
    assert len(connection.actors) == 1


def test_files_in_no_shared_folder_are_sent_once_to_each_node(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(trivial_model(4))
    contender = Contender(tmp_path, EngineSpec("onnxruntime", "model.onnx"))
    ours, connection = measurer(MEASURES)
    for _ in range(2):
        ours.memory_bytes(contender, BATCH)
    [actor] = connection.actors
    sent = [argument for method, argument in actor.asked if method == "take"]
    assert len(sent) == 1
    taker = MeasureActor()
    assert "too early" in json.loads(taker.take(sent[0][:-1]))["refused"]
    assert json.loads(taker.take(sent[0])) == {"answer": "taken"}
    taker.close(b"")


def test_actor_measures_what_was_sent_and_what_lies_in_the_shared_folder(tmp_path: Path) -> None:
    actor = MeasureActor()
    actor.start(dumped({"max_wait_s": 60.0}))

    def by_actor(method: str, argument: bytes) -> bytes:
        return bytes(getattr(actor, method)(argument))

    for artifacts in (tmp_path, tmp_path / "elsewhere"):
        folder = tmp_path / "0123"
        folder.mkdir(exist_ok=True)
        (folder / "model.onnx").write_bytes(trivial_model(4))
        connection: Any = ScriptedConnection([by_actor])
        ours = RayMeasurer(connection, TERMS, artifacts, max_wait_s=60.0)
        contender = Contender(folder, EngineSpec("onnxruntime", "model.onnx"))
        [output] = ours.outputs(contender, [BATCH])
        assert next(iter(output.values())).shape[0] == 1
        effort = Effort(min_passes=3, max_passes=3, seconds=0.0, max_warmup_passes=1,
                        max_warmup_s=0.1, max_retries=0)  # fmt: skip
        timing = ours.time(contender, None, BATCH, (1,), effort=effort, seed=0)
        assert timing.times.times[0].p50_s > 0
    ours.close()
