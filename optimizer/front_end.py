"""The front end of a study: what serving costs beside the engine, as it was measured here or
corrected by a load test.

Measured once for each machine and kept in the store.
"""

import math
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from optimizer import overheads
from optimizer.errors import SpecInvalid
from optimizer.evidence import Evidence, check_subject, corrected, read_evidence
from optimizer.measuring.cores import measuring_cores
from optimizer.overheads import Overheads, measure_overheads
from optimizer.result import InstanceTimes
from optimizer.simulation import FrontEnd, Replica
from optimizer.spec import Spec
from optimizer.store import Key, Store
from optimizer.verify import ProcessFailed
from serve.artifact import Manifest, read_manifest
from serve.machine import Machine, allowed_cpus

_ID = "front end"
_MAX_VALUES = 1_000_000


def measured_front_end(
    store: Store,
    machine: Machine,
    cores: int,
    spec: Spec,
    n_values: int,
    note: Callable[[str], None],
    measure: Callable[..., Overheads] = measure_overheads,
) -> FrontEnd:
    """Of requests of `n_values` numbers: what the store has, or else measured now, in about half
    a minute; the default one where the server can't be measured, which `note` is told."""
    n_values = min(_rounded(n_values * spec.slo.workload.rows), _MAX_VALUES)
    encoding = spec.slo.workload.encoding
    what = {"cores": cores, "n_values": n_values, "encoding": encoding}
    key = Key(_ID, machine, "overheads", overheads.PROTOCOL_VERSION, what)
    stored = store.recorded(key)
    if stored is None:
        try:
            with measuring_cores(len(allowed_cpus())):
                measured = measure(cores, n_values=n_values, encoding=encoding, seed=spec.seed)
        except (ProcessFailed, OSError, subprocess.TimeoutExpired) as error:
            note(f"the server's own cost couldn't be measured, another machine's is used: {error}")
            return FrontEnd()
        stored = measured.to_dict()
        store.record(key, stored)
    return Overheads.from_dict(stored).front_end()


@dataclass(frozen=True)
class Lesson:
    """A load test's evidence, and the version that it is about."""

    evidence: Evidence
    manifest: Manifest


def read_lesson(report: Path, repository: Path, machine: Machine) -> Lesson:
    """What the report says of a version in the repository. Raises EvidenceInvalid for one that
    says nothing of this machine's server, SpecInvalid where the version isn't there."""
    evidence = read_evidence(report)
    version = evidence.version or _newest(repository / evidence.model)
    directory = repository / evidence.model / version
    if not (directory / "manifest.json").is_file():
        problem = f"{report}: is of {evidence.model}/{version}, which isn't in {repository}"
        raise SpecInvalid(str(report), [f"{problem}: name its repository by --repository"])
    manifest = read_manifest(directory)
    check_subject(evidence, manifest, machine)
    return Lesson(evidence, manifest)


def front_end_from(lesson: Lesson, cores: int, given: FrontEnd) -> FrontEnd:
    """`given`, corrected so that it explains what the load test saw. Raises EvidenceInvalid where
    nothing of it can."""
    return corrected(_replica(lesson.manifest, cores, given), lesson.evidence)


def _replica(manifest: Manifest, cores: int, front_end: FrontEnd) -> Replica:
    assert manifest.profile is not None, "check_subject has seen it"
    engine, batching = manifest.engine, manifest.batching
    times = InstanceTimes(
        engine.instances, engine.threads, manifest.profile.service_times, bool(engine.batch_sizes)
    )
    return Replica(
        times,
        cores,
        batching.max_batch_size,
        batching.max_queue_delay_s,
        front_end=front_end,
    )


def _newest(directory: Path) -> str:
    versions = [path.name for path in directory.glob("*") if path.name.isdigit()]
    return max(versions, key=int, default="")


def _rounded(n: int) -> int:
    """To a power of four, so that requests of about the same size share a measurement."""
    return int(4 ** max(1, round(math.log(max(n, 1), 4))))
