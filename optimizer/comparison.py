"""Two variants side by side: recipes, accuracy, size, times, serving, cost and kernels."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from optimizer.quantities import bytes_, milliseconds, number, percent, points
from optimizer.subject import Subject
from optimizer.tasks import comparison
from serve.artifact import Quality, ServiceTime

CONFIDENCE = 0.95
"""Of the paired difference's interval."""
ABSENT = "–"
MAX_KERNELS = 6


@dataclass(frozen=True)
class Row:
    """One figure of both. `change` is what B has against A, in words, where that can be said."""

    section: str
    name: str
    a: str
    b: str
    change: str = ""

    @property
    def differs(self) -> bool:
        return self.a != self.b


@dataclass(frozen=True)
class Paired:
    """What B gains on A on the same samples, as shares, with its two-sided interval."""

    data_digest: str
    n_samples: int
    a: float
    b: float
    gain: float
    lower: float
    upper: float
    confidence: float


def compared(a: Subject, b: Subject) -> list[Row]:
    """All rows, section by section; figures that neither has are left out."""
    rows = [
        *_recipe(a, b),
        *_accuracy(a, b),
        Row("model", "size", bytes_(a.size_bytes), bytes_(b.size_bytes),
            _ratio(a.size_bytes, b.size_bytes)),
        *_serving(a, b),
        *_service_times(a, b),
        *_evidence(a, b),
        *_kernels(a, b),
    ]  # fmt: skip
    return [row for row in rows if (row.a, row.b) != (ABSENT, ABSENT)]


def document(a: Subject, b: Subject) -> dict[str, Any]:
    """The rows with their ids, and the paired difference with its interval."""
    return {
        "a": {"name": a.name, "variant_id": a.variant_id},
        "b": {"name": b.name, "variant_id": b.variant_id},
        "paired": asdict(paired) if (paired := paired_difference(a, b)) is not None else None,
        "rows": [{**asdict(row), "differs": row.differs} for row in compared(a, b)],
    }


def print_comparison(a: Subject, b: Subject, console: Console) -> None:
    """A table whose differing rows stand out."""
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    table.add_column("", no_wrap=True)
    for name in (a.name, b.name):
        table.add_column(name, overflow="fold")
    table.add_column("B against A", overflow="fold")
    rows = compared(a, b)
    section = ""
    for row in rows:
        if row.section != section:
            section = row.section
            table.add_row(Text(section, style="bold underline"))
        style = "" if row.differs else "dim"
        marked = Text(
            f"{'≠' if row.differs else ' '} {row.name}", style="bold" if style == "" else style
        )
        table.add_row(marked, Text(row.a), Text(row.b), Text(row.change), style=style)
    console.print(table)
    if not any(row.differs for row in rows):
        console.print("The two don't differ in anything on record.")


def paired_difference(a: Subject, b: Subject) -> Paired | None:
    """B against A, sample by sample, on a split that both were measured on; None without one."""
    judged = [one.manifest.quality for one in (a, b) if one.manifest and one.manifest.quality]
    preferred = {quality.data_digest for quality in judged}
    shared = sorted(a.scores.keys() & b.scores.keys(), key=lambda one: (one not in preferred, one))
    if not shared:
        return None
    one, two = a.scores[shared[0]], b.scores[shared[0]]
    lost = comparison.Paired().drop(two, one, CONFIDENCE)
    return Paired(
        shared[0], len(one), one.mean, two.mean,
        -lost.estimate, -lost.upper, -lost.lower, CONFIDENCE,
    )  # fmt: skip


def _recipe(a: Subject, b: Subject) -> Iterator[Row]:
    """Each parameter of each step, in the order of A's recipe and then B's."""
    one, two = _flattened(a), _flattened(b)
    for name in dict.fromkeys([*one, *two]):
        yield Row("recipe", name, one.get(name, ABSENT), two.get(name, ABSENT))


def _flattened(subject: Subject) -> dict[str, str]:
    told = {}
    for origin in subject.origins:
        step = origin.step
        told[step.technique] = f"version {step.technique_version}, seed {step.seed}"
        for name, value in step.parameters.items():
            told[f"{step.technique}: {name.replace('_', ' ')}"] = str(value)
        for name, version in step.packages.items():
            told[f"{step.technique}: {name}"] = version
    return told


def _accuracy(a: Subject, b: Subject) -> Iterator[Row]:
    one, two = _quality(a), _quality(b)
    if one is not None or two is not None:
        values = [percent(q.value) if q else ABSENT for q in (one, two)]
        metric = one.metric if one is not None else two.metric if two is not None else ""
        yield Row("accuracy", metric, values[0], values[1], _points_between(one, two))
        yield Row("accuracy", "drop, points", *(_drop(q) for q in (one, two)))
        yield Row("accuracy", "guarantee", *(q.guarantee if q else ABSENT for q in (one, two)))
        yield Row("accuracy", "data", *(q.data_digest[:12] if q else ABSENT for q in (one, two)))
    paired = paired_difference(a, b)
    if paired is not None:
        told = (
            f"{paired.gain * 100:+.2f} points [{points(paired.lower)}, {points(paired.upper)}], "
            f"{paired.confidence:.0%}"
        )
        name = f"paired, {paired.n_samples:,} samples"
        yield Row("accuracy", name, percent(paired.a), percent(paired.b), told)


def _quality(subject: Subject) -> Quality | None:
    return subject.manifest.quality if subject.manifest else None


def _points_between(one: Quality | None, two: Quality | None) -> str:
    """Only where both are of the same samples."""
    if one is None or two is None or one.data_digest != two.data_digest:
        return ""
    return f"{(two.value - one.value) * 100:+.2f} points"


def _drop(found: Quality | None) -> str:
    if found is None:
        return ABSENT
    return f"{points(found.drop)} [{points(found.drop_lower)}, {points(found.drop_upper)}]"


def _serving(a: Subject, b: Subject) -> Iterator[Row]:
    one, two = _served(a), _served(b)
    for name in dict.fromkeys([*one, *two]):
        yield Row("serving", name, one.get(name, ABSENT), two.get(name, ABSENT))


def _served(subject: Subject) -> dict[str, str]:
    engine, manifest = subject.engine, subject.manifest
    told: dict[str, str] = {}
    if engine is not None:
        told |= {"engine": engine.name, "precision": engine.precision}
        told |= {f"option {name}": str(value) for name, value in engine.options.items()}
    if manifest is not None:
        batching = manifest.batching
        told["instances × threads"] = f"{manifest.engine.instances} × {manifest.engine.threads}"
        told["max batch size"] = str(batching.max_batch_size)
        told["max queue delay"] = f"{milliseconds(batching.max_queue_delay_s)} ms"
    return told


def _service_times(a: Subject, b: Subject) -> Iterator[Row]:
    """Of the same configuration in both, that in which A is served if it can be; else none, since
    other instances and threads are another measurement."""
    shared = [configuration for configuration in a.times if configuration in b.times]
    if not shared:
        return
    served = (a.engine.instances, a.engine.threads) if a.engine else shared[0]
    instances, threads = configuration = served if served in shared else shared[0]
    one, two = _by_size(a.times[configuration]), _by_size(b.times[configuration])
    section = f"ms by batch size, {instances} × {threads}"
    for size in sorted({*one, *two}):
        first, second = one.get(size), two.get(size)
        yield Row(
            section, str(size), milliseconds(first), milliseconds(second), _ratio(first, second)
        )


def _by_size(times: Sequence[ServiceTime]) -> dict[int, float]:
    return {one.batch_size: one.p50_s for one in times}


def _evidence(a: Subject, b: Subject) -> Iterator[Row]:
    one, two = _figures(a), _figures(b)
    for name in dict.fromkeys([*one, *two]):
        first, second = one.get(name), two.get(name)
        yield Row("cost and load", name, number(first), number(second), _ratio(first, second))


def _figures(subject: Subject) -> dict[str, float]:
    """What the study recorded with the version."""
    evidence: Mapping[str, Any] = (subject.manifest.evidence if subject.manifest else None) or {}
    serving, loaded = evidence.get("serving"), evidence.get("verification")
    found = {
        "cost per million": _of(serving, "cost_per_million"),
        "highest rate, requests/s": _of(serving, "max_rate_per_s"),
        "measured latency, ms": _of(loaded, "slo_latency_s", 1e3),
    }
    return {name: value for name, value in found.items() if value is not None}


def _of(mapping: object, name: str, scale: float = 1.0) -> float | None:
    value = mapping.get(name) if isinstance(mapping, Mapping) else None
    return value * scale if isinstance(value, int | float) else None


def _kernels(a: Subject, b: Subject) -> Iterator[Row]:
    """Shares of a run's time, the longest in either first."""
    one, two = _shares(a), _shares(b)
    longest = sorted({*one, *two}, key=lambda name: -max(one.get(name, 0.0), two.get(name, 0.0)))
    for name in longest[:MAX_KERNELS]:
        yield Row(
            "kernels, share of time",
            name,
            *(percent(shares[name], 1) if name in shares else ABSENT for shares in (one, two)),
        )


def _shares(subject: Subject) -> dict[str, float]:
    shares: dict[str, float] = {}
    for kernel in subject.kernels.kernels if subject.kernels else ():
        name = f"{kernel.kernel.removesuffix(' (CPUExecutionProvider)')}, {kernel.precision}"
        shares[name] = shares.get(name, 0.0) + kernel.time_share
    return shares


def _ratio(one: float | None, two: float | None) -> str:
    """B's value over A's."""
    if not one or not two:
        return ""
    return f"{number(two / one)}×"
