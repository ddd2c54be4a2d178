"""Studies on a Ray cluster: several nodes on this machine, one of which dies in the middle."""

import importlib.util
import json
import os
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from optimizer.store import Store
from tests.optimizer.tiny_study import write_study

pytestmark = pytest.mark.full

ROOT = Path(__file__).parents[2]
PATIENCE_S = 400.0
PLUGIN = """
import json, os, time
from pathlib import Path

from tests.optimizer.synthetic import Narrow, Tune

HERE = Path(__file__).parent

def note(what):
    # A builder has the environment of the node that it is on.
    line = json.dumps({"what": what, "node": int(os.environ["RAY_RAYLET_PID"]), "pid": os.getpid()})
    with (HERE / "builds").open("a") as file:
        file.write(line + "\\n")

class Watched(Narrow):
    def apply(self, model, parameters, context, directory):
        note("begins")
        while (HERE / "hold").exists():
            time.sleep(0.05)
        made = super().apply(model, parameters, context, directory)
        note("ends")
        return made

class Trained(Tune):
    def epochs(self, parameters, context):
        return {"recalibrate": 0.0, "short": 0.5, "full": 1.5}[str(parameters["effort"])]
"""
PLACEMENT = """
import json, sys
from pathlib import Path
from optimizer.execution.cluster import Cluster
from optimizer.execution.cluster.actors import BuildActor
from optimizer.execution.cluster.connection import ClusterLost, TooLate, connected
from optimizer.execution.cluster.measurer import RayMeasurer
from optimizer.execution.cluster.terms import marked

def is_placed(actor, terms, within_s):
    try:
        return json.loads(actor.call("ready", terms, within_s))["problems"] == []
    except TooLate:
        return False

address, folder = sys.argv[1], Path(sys.argv[2])
with connected(Cluster(address)) as connection, marked(folder, Path(__file__), True) as terms:
    measurer = RayMeasurer(connection, terms, folder)
    machine = measurer.machine
    builders = [connection.actor(BuildActor, {"CPU": 1}) for _ in range(3)]
    raw = json.dumps(terms.to_dict()).encode()
    placed = [is_placed(one, raw, 60.0) for one in builders[:2]]
    placed.append(is_placed(builders[2], raw, 5.0))
    measurer.close()
    placed.append(is_placed(builders[2], raw, 60.0))
    worker = connection._ray._private.worker.global_worker
    exported = worker.gcs_client.internal_kv_keys(b"", b"fun")
    waiting = connection.actor(BuildActor, {"CPU": 1})
    print(json.dumps({"placed": placed, "cores": machine.cores, "exported": len(exported)}))
    sys.stdout.flush()
    sys.stdin.readline()
    try:
        waiting.call("ready", raw, 300.0)
    except ClusterLost as error:
        print(json.dumps(str(error)))
"""


@dataclass
class Nodes:
    """`address` is the head's, which builds nothing. Nodes are named by their raylet's process."""

    process: "subprocess.Popen[str]"
    environ: Mapping[str, str]
    address: str = ""

    def add(self, **given: Any) -> int:
        return int(self._asked({"add": given}))

    def kill(self, node: "int | str") -> None:
        self._asked({"kill": node})

    def heard(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, (Path(self.environ["RAY_TMPDIR"]) / "log").read_text()
        return json.loads(line)

    def _asked(self, request: Any) -> Any:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return self.heard()


@pytest.fixture
def nodes() -> Iterator[Nodes]:
    if importlib.util.find_spec("ray") is None:
        assert not os.environ.get("CI"), "ray is missing: pip install 'trimserve[distributed]'"
        pytest.skip("ray isn't installed")
    # pytest's own folders are too long for a socket's name.
    with tempfile.TemporaryDirectory(prefix="trimserve-ray-", ignore_cleanup_errors=True) as folder:
        environ = {
            **os.environ, "RAY_TMPDIR": folder, "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_worker_niceness": "0", "PYTHONPATH": str(ROOT),
        }  # fmt: skip
        with (Path(folder) / "log").open("w") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "tests.optimizer.ray_nodes"], cwd=ROOT, env=environ,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
            )  # fmt: skip
            with process:
                made = Nodes(process, environ)
                try:
                    made.address = made.heard()
                    yield made
                finally:
                    assert process.stdin is not None
                    process.stdin.close()
                    try:
                        process.wait(PATIENCE_S)
                    finally:
                        process.kill()


def study(directory: Path) -> Path:
    path = write_study(directory, max_drop_points=90)
    (directory / "shapes.py").write_text(PLUGIN)
    plugins = "exclude: [quantization, torch_compilation], "
    plugins += "plugins: ['shapes:Watched', 'shapes:Trained']"
    text = path.read_text().replace("exclude: [torch_compilation]", plugins)
    text = text.replace("target: {", "target: {cores: 1, ").replace("trials: 3", "trials: 6")
    path.write_text(text)
    return path


def command(directory: Path, *more: str) -> list[str]:
    given = ["--repository", "models", "--store", "store.sqlite", "--no-verify"]
    return [
        sys.executable, "-m", "trimserve", "optimize", str(directory / "spec.yaml"), *given,
        "--trials-at-once", "2", *more,
    ]  # fmt: skip


def builds(directory: Path) -> list[Any]:
    path = directory / "builds"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def logged(store: Path) -> Mapping[int, Any]:
    """Of the one study in the store."""
    with closing(sqlite3.connect(store)) as connection:
        [[name]] = connection.execute("SELECT DISTINCT study_id FROM trials").fetchall()
    with Store(store) as opened:
        return opened.numbered_trials(str(name))


def measured_twice(store: Path) -> list[Any]:
    query = (
        "SELECT metric, variant_id, serving FROM measurements WHERE metric NOT LIKE '%.wall_s' "
        "GROUP BY metric, protocol_version, variant_id, machine, serving HAVING count(*) > 1"
    )
    with closing(sqlite3.connect(store)) as connection:
        return connection.execute(query).fetchall()


def test_study_on_a_cluster_loses_and_repeats_nothing_when_a_node_dies_and_is_what_it_is_here(
    nodes: Nodes, tmp_path: Path
) -> None:
    study(tmp_path)
    building = {nodes.add(num_cpus=1) for _ in range(2)}
    nodes.add(num_cpus=1, resources={"trimserve_measure": 1})
    hold, store = tmp_path / "hold", tmp_path / "store.sqlite"
    hold.touch()
    with (tmp_path / "log").open("w") as log:
        on_cluster = subprocess.Popen(
            command(tmp_path, "--ray", nodes.address, "--json", "there.json"),
            cwd=tmp_path, env=nodes.environ, stdout=log, stderr=log,
        )  # fmt: skip
        with on_cluster:
            try:
                until_s = time.monotonic() + PATIENCE_S
                while not (begun := builds(tmp_path)):
                    assert on_cluster.poll() is None, (tmp_path / "log").read_text()
                    assert time.monotonic() < until_s, (tmp_path / "log").read_text()
                    time.sleep(0.1)
                died, builder = begun[0]["node"], Path("/proc", str(begun[0]["pid"]))
                nodes.kill(died)
                instead = nodes.add(num_cpus=1)  # as KubeRay would
                while builder.exists():  # it ends by itself, since its node is gone
                    assert time.monotonic() < until_s
                    time.sleep(0.1)
                hold.unlink()
                code = on_cluster.wait(PATIENCE_S)
            finally:
                on_cluster.kill()
    assert code == 0, (tmp_path / "log").read_text()
    there = json.loads((tmp_path / "there.json").read_text())
    assert any("was lost" in note for note in there["notes"]), there["notes"]
    # Measuring had its node, CPUs and all, for itself.
    ended = {one["node"] for one in builds(tmp_path) if one["what"] == "ends"}
    assert ended
    assert ended <= building - {died} | {instead}
    assert {one["node"] for one in builds(tmp_path)} <= building | {instead}
    before = logged(store)
    assert list(before) == [1, 2, 3, 4, 5, 6]
    assert measured_twice(store) == []

    # The log is of one study only as long as each proposal is what the log has.
    environ = {**nodes.environ, "RAY_RAYLET_PID": "0"}
    ran = subprocess.run(
        command(tmp_path, "--json", "here.json"), cwd=tmp_path, env=environ, check=False,
        capture_output=True, text=True, timeout=PATIENCE_S,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    here = json.loads((tmp_path / "here.json").read_text())
    assert logged(store) == before
    assert [row["id"] for row in here["variants"]] == [row["id"] for row in there["variants"]]
    assert measured_twice(store) == []


def test_measurer_has_its_node_alone_no_code_is_sent_and_a_lost_head_is_told(
    nodes: Nodes, tmp_path: Path
) -> None:
    for given in ({}, {}, {"resources": {"trimserve_measure": 1}}):
        nodes.add(num_cpus=1, **given)
    program = tmp_path / "placement.py"
    program.write_text(PLACEMENT)
    with subprocess.Popen(
        [sys.executable, str(program), nodes.address, str(tmp_path)], env=nodes.environ,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as ran:  # fmt: skip
        try:
            assert ran.stdout is not None
            found = json.loads(ran.stdout.readline())
            assert found["placed"] == [True, True, False, True]
            assert found["cores"] >= 1
            assert found["exported"] == 0
            nodes.kill("head")
            said, _ = ran.communicate("go on\n", timeout=PATIENCE_S)
            assert ran.returncode == 0
            assert json.loads(said) == f"Ray cluster {nodes.address}: the head is gone"
        finally:
            ran.kill()
