"""Specs that come over the wire: read as strictly as a file's, and with nothing taken on trust.

The SLO comes inside of the spec. Where a file would name a path, a job names an upload
(`upload:ID`) or an address in an allowed store; functions are those of an allow-list; variables
aren't expanded. It opens nothing.
"""

import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from loadtest.document import MAX_DOCUMENT_BYTES, DocumentInvalid, parse_document
from loadtest.slo import Slo
from optimizer.service.addresses import AddressRefused, Stores
from optimizer.spec import SpecBody
from optimizer.spec_values import within

SOURCE = "spec"
UPLOAD = "upload:"
SPEC_FILE, SLO_FILE = "spec.yaml", "slo.yaml"
_UPLOAD_ID = re.compile(r"upload:([0-9a-f]{16})")


class SubmittedDocument(SpecBody):
    """A spec whose SLO comes along."""

    slo: Slo


@dataclass(frozen=True)
class Policy:
    """What specs may ask for. `factories` are names `module:function`, `*` and `?` as in file
    names; `agents` the URLs of measuring agents; `pt2` whether archives of torch.export, which
    can carry code, are taken; `max_wall_clock_s` bounds `budget.wall_clock_s`."""

    stores: Stores = field(default_factory=Stores)
    factories: tuple[str, ...] = ()
    agents: tuple[str, ...] = ()
    pt2: bool = False
    max_wall_clock_s: float = 86_400.0


@dataclass(frozen=True)
class Submitted:
    """A checked spec: `document` as it was given, `references` what it names that has to be
    fetched before it can be run."""

    name: str
    document: Mapping[str, Any]
    references: tuple[str, ...]
    wall_clock_s: float


class _Resolver:
    """Paths and functions by the policy; `upload` gives an upload's file name, or raises
    ValueError."""

    def __init__(self, policy: Policy, upload: Callable[[str], str]) -> None:
        self._policy = policy
        self._upload = upload
        self.references: dict[str, None] = {}

    def path(self, text: str) -> Path:
        if match := _UPLOAD_ID.fullmatch(text):
            name = self._upload(match[1])
            self.references[text] = None
            return Path("/upload", match[1], name)
        if text.startswith(UPLOAD) or "://" not in text:
            raise ValueError(
                "want upload:ID of a finished upload, or an address in an allowed store "
                f"({self._policy.stores.shown})"
            )
        try:
            name = self._policy.stores.check(text)
            local = self._policy.stores.local(text) if text.startswith("file:") else None
        except AddressRefused as error:
            raise ValueError(f"want an allowed address: {error}") from error
        self.references[text] = None
        return local if local is not None else Path("/fetched", name)

    def function(self, name: str) -> None:
        allowed = self._policy.factories
        if not any(fnmatchcase(name, pattern) for pattern in allowed):
            listed = ", ".join(allowed) or "none is"
            raise ValueError(f"want a function that the service allows ({listed})")


def read_submitted(
    spec: str | Mapping[str, Any], policy: Policy, upload: Callable[[str], str]
) -> Submitted:
    """Check a spec, YAML text or a mapping. Raises DocumentInvalid with every problem found."""
    text = spec if isinstance(spec, str) else json.dumps(spec, indent=1)
    if len(text) > MAX_DOCUMENT_BYTES:
        raise DocumentInvalid(SOURCE, [f"{SOURCE}: over {MAX_DOCUMENT_BYTES} characters"])
    _refuse_aliases(text)
    resolver = _Resolver(policy, upload)
    with within(Path("/"), {}, resolver):
        document = parse_document(text, SubmittedDocument, SOURCE)
    problems = list(_against(policy, document))
    if problems:
        raise DocumentInvalid(SOURCE, problems)
    plain = yaml.safe_load(text) if isinstance(spec, str) else json.loads(text)
    return Submitted(document.name, plain, tuple(resolver.references), document.budget.wall_clock_s)


def materialize(document: Mapping[str, Any], files: Mapping[str, Path], directory: Path) -> Path:
    """Write the spec, its references replaced by `files`, and its SLO into `directory`; returns
    the spec's path, which `optimizer.spec.read_spec` takes."""
    body = {name: value for name, value in document.items() if name != "slo"}
    body = _replaced(body, {name: str(path) for name, path in files.items()})
    for name, content in ((SLO_FILE, document["slo"]), (SPEC_FILE, {**body, "slo": SLO_FILE})):
        temporary = directory / f".{name}"
        temporary.write_text(yaml.safe_dump(content, sort_keys=False, allow_unicode=True), "utf-8")
        os.replace(temporary, directory / name)
    return directory / SPEC_FILE


def _against(policy: Policy, document: SubmittedDocument) -> list[str]:
    """What the document asks for that its form alone doesn't show."""
    problems = []
    if document.model is None:
        problems.append(f"{SOURCE}:1: model: missing, it must be given")
    elif document.model.exported is not None and not policy.pt2:
        problems.append(
            f"{SOURCE}:1: model.exported: got a .pt2 archive, which can carry code; this service "
            "takes onnx, or factory with safetensors weights"
        )
    agent = document.target.agent
    if agent is not None and agent.rstrip("/") not in {one.rstrip("/") for one in policy.agents}:
        listed = ", ".join(policy.agents) or "none is"
        problems.append(
            f"{SOURCE}:1: target.agent: got {agent!r}, want one that the service allows ({listed})"
        )
    wall_clock_s = document.budget.wall_clock_s
    if wall_clock_s > policy.max_wall_clock_s:
        problems.append(
            f"{SOURCE}:1: budget.wall_clock_s: got {wall_clock_s:g}, want at most "
            f"{policy.max_wall_clock_s:g}"
        )
    return problems


def _refuse_aliases(text: str) -> None:
    """YAML's aliases let a short text stand for one of any length ("billion laughs")."""
    try:
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            if isinstance(event, yaml.AliasEvent):
                line = event.start_mark.line + 1 if event.start_mark else 1
                raise DocumentInvalid(
                    SOURCE, [f"{SOURCE}:{line}: *{event.anchor}: want no YAML aliases here"]
                )
    except (yaml.YAMLError, RecursionError) as error:
        raise DocumentInvalid(SOURCE, [f"{SOURCE}: not valid YAML: {error}"]) from error


def _replaced(value: Any, files: Mapping[str, str]) -> Any:
    if isinstance(value, Mapping):
        return {name: _replaced(one, files) for name, one in value.items()}
    if isinstance(value, list):
        return [_replaced(one, files) for one in value]
    return files.get(value, value) if isinstance(value, str) else value


def file_name(name: str) -> str:
    """The name that a file may have on disk. Raises ValueError for what isn't a plain one."""
    plain = PurePosixPath(name).name
    if plain != name or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}", name):
        raise ValueError("want letters, digits, '.', '_' or '-', at most 128, without a folder")
    return name
