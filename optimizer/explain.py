"""Where a variant comes from: its lineage, what is known of it, and how to make it again."""

import shlex
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.text import Text

from loadtest.slo import Slo
from optimizer.fusion_rows import fusion_summary, unfused, what
from optimizer.quantities import bytes_, duration, milliseconds, number, percent, points
from optimizer.subject import Origin, Subject
from optimizer.wording import guarantee, slo_sentence
from serve.artifact import Manifest, Quality

_SHORT = 12
"""Digits of an id or digest."""
_MAX_FUSIONS = 8
_MAX_UNFUSED = 3


def document(subject: Subject) -> dict[str, Any]:
    """All that is known, as JSON can hold it."""
    manifest = subject.manifest
    return {
        "name": subject.name,
        "variant_id": subject.variant_id,
        "base_id": subject.origins[0].parent_id if subject.origins else "",
        "lineage": [asdict(origin) for origin in subject.origins],
        "engine": asdict(subject.engine) if subject.engine else None,
        "size_bytes": subject.size_bytes,
        "service_times": [
            {"instances": instances, "threads": threads, "times": [asdict(one) for one in times]}
            for (instances, threads), times in sorted(subject.times.items())
        ],
        "notes": list(subject.notes),
        "fusions": [asdict(one) for one in subject.fusions],
        "batching": asdict(manifest.batching) if manifest else None,
        "quality": asdict(manifest.quality) if manifest and manifest.quality else None,
        "slo": manifest.slo if manifest else None,
        "evidence": manifest.evidence if manifest else None,
        "machine": asdict(manifest.profile.machine) if manifest and manifest.profile else None,
        "made_by": list(manifest.made_by) if manifest else [],
    }


def print_explanation(subject: Subject, console: Console) -> None:
    """The lineage from the base model on, then a block for each thing that is known."""
    title = Text(subject.name, style="bold")
    if subject.variant_id and subject.variant_id[:_SHORT] != subject.name:
        title.append(f"  variant {subject.variant_id[:_SHORT]}", style="dim")
    console.print(title)
    _print_lineage(subject, console)
    for name, lines in _blocks(subject):
        if lines:
            console.print()
            console.print(Text(name, style="bold"))
            for line in lines:
                console.print(Text(f"  {line}"), soft_wrap=True)


def _print_lineage(subject: Subject, console: Console) -> None:
    origins = subject.origins
    base = origins[0].parent_id if origins else subject.variant_id
    console.print()
    console.print(Text("Lineage", style="bold"))
    console.print(Text(f"  0 base model  {base[:_SHORT]}".rstrip(), style="bold"))
    for index, origin in enumerate(origins, 1):
        step = origin.step
        line = Text(f"  {index} {step.technique}", style="bold")
        line.append(f" {step.technique_version}", style="dim")
        line.append(f"  {_parameters(origin)}", style="not bold")
        console.print(line, soft_wrap=True)
        if made := _made(origin):
            console.print(Text(f"    {made}", style="dim"), soft_wrap=True)
        if step.packages:
            told = ", ".join(f"{name} {version}" for name, version in step.packages.items())
            console.print(Text(f"    with {told}", style="dim"), soft_wrap=True)
    if not all(origin.artifact for origin in origins):
        hint = "  The store of its study knows the ids and artifacts of all steps: --store"
        console.print(Text(hint, style="dim"), soft_wrap=True)


def _parameters(origin: Origin) -> str:
    parameters = origin.step.parameters.items()
    return ", ".join(f"{name}={value}" for name, value in (*parameters, ("seed", origin.step.seed)))


def _made(origin: Origin) -> str:
    parts = []
    if origin.variant_id:
        parts.append(f"variant {origin.variant_id[:_SHORT]}")
    if origin.parent_id:
        parts.append(f"of {origin.parent_id[:_SHORT]}")
    if origin.artifact:
        parts.append(f"artifact {origin.artifact[:_SHORT]}")
    if origin.build_s is not None:
        parts.append(f"built in {duration(origin.build_s)}")
    return ", ".join(parts)


def _blocks(subject: Subject) -> Iterator[tuple[str, list[str]]]:
    manifest = subject.manifest
    yield "Notes", list(subject.notes)
    yield "Quality", _quality(manifest.quality) if manifest and manifest.quality else []
    yield "Serving", _serving(subject)
    yield "Service times", _times(subject)
    yield "Fusion", _fusion(subject)
    if manifest is not None:
        yield "Evidence", _evidence(manifest)
        yield "Machine", _machine(manifest)
    yield "Make it again", [_command(subject)]


def _quality(quality: Quality) -> list[str]:
    confidence = f"{quality.confidence * 100:g}%"
    return [
        f"{quality.metric} {percent(quality.value)}, {points(quality.drop)} points below its base "
        f"[{points(quality.drop_lower)}, {points(quality.drop_upper)}], at most "
        f"{points(quality.drop_bound)} ({confidence} confidence)",
        guarantee(quality),
        f"data {quality.data_digest[:_SHORT]}",
        *(f"{name.replace('_', ' ')} {number(value)}" for name, value in quality.figures.items()),
    ]


def _serving(subject: Subject) -> list[str]:
    engine, manifest = subject.engine, subject.manifest
    if engine is None:
        return ["no engine yet: it is a step on the way"]
    options = "".join(f", {name}={value}" for name, value in engine.options.items())
    lines = [f"{engine.name}, {engine.precision}{options}, {bytes_(subject.size_bytes)}"]
    if manifest is not None:
        batching = manifest.batching
        lines.append(
            f"{engine.instances} × {engine.threads} (instances × threads), batches up to "
            f"{batching.max_batch_size}, queue delay {milliseconds(batching.max_queue_delay_s)} ms"
        )
    if subject.kernels is not None and subject.kernels.n_heavy:
        proof = subject.kernels
        what = (
            "multiply-accumulates" if proof.is_told else "convolutions' and matrix products' time"
        )
        lines.append(f"{percent(proof.int8_share, 1)} of the {what} in int8 kernels")
    return lines


def _fusion(subject: Subject) -> list[str]:
    if not subject.fusions:
        return []
    lines = [f"{fusion_summary(subject.fusions)} The longest:"]
    for row in subject.fusions[:_MAX_FUSIONS]:
        kernel = row.kernel or "no kernel"
        times = f"{milliseconds(row.base_s)} → {milliseconds(row.seconds)} ms"
        lines += [f"{row.n} × {what(row)} in {kernel}: {times}"]
    alone = unfused(subject.fusions)
    if alone:
        told = ", ".join(
            f"{what(row)} ({row.kernel}) {milliseconds(row.seconds)} ms"
            for row in alone[:_MAX_UNFUSED]
        )
        lines.append(f"unfused: {told}")
    return lines


def _times(subject: Subject) -> list[str]:
    lines = []
    for (instances, threads), times in sorted(subject.times.items()):
        told = ", ".join(f"{one.batch_size}: {milliseconds(one.p50_s)}" for one in times)
        lines.append(f"{instances} × {threads}, ms by batch size: {told}")
    return lines


def _evidence(manifest: Manifest) -> list[str]:
    """What the study recorded with the version; a manifest of other hands may hold anything."""
    evidence: Mapping[str, Any] = manifest.evidence or {}
    lines = [f"promises {slo_sentence(Slo.model_validate(manifest.slo))}"] if manifest.slo else []
    found = evidence.get("verification")
    if isinstance(found, Mapping):
        measured = _number(found.get("slo_latency_s"))
        rate = _number(found.get("rate_per_s"))
        at = f", {milliseconds(measured)} ms at {number(rate)} requests/s" if measured else ""
        lines.append(f"load test: {found.get('verdict', 'unknown')}{at}")
        reasons = found.get("reasons")
        lines += [f"  {reason}" for reason in reasons] if isinstance(reasons, list | tuple) else []
    else:
        lines.append("load test: none on record, so it is unverified here")
    serving = evidence.get("serving")
    if isinstance(serving, Mapping) and (cost := _number(serving.get("cost_per_million"))):
        most = number(_number(serving.get("max_rate_per_s")))
        lines.append(f"{number(cost)} per million inferences, a replica sustains {most} requests/s")
    return lines


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) else None


def _machine(manifest: Manifest) -> list[str]:
    if manifest.profile is None:
        return []
    machine = manifest.profile.machine
    runtimes = ", ".join(f"{name} {version}" for name, version in machine.runtimes.items())
    flags = ", ".join(machine.flags) or "no vector instructions of note"
    return [f"{machine.processor}, {machine.cores} cores, {flags}", machine.system, runtimes]


def _command(subject: Subject) -> str:
    manifest = subject.manifest
    if manifest is not None and manifest.made_by:
        return shlex.join(manifest.made_by)
    if manifest is not None:
        return "the manifest doesn't name the command; the recipe and the seeds are above"
    return "trimserve optimize with the study's spec and this store, which has the variant already"
