"""Strict reading of YAML documents into typed, frozen models.

Every error names file, line and key, what was given and what is allowed. The reader knows
nothing of what the documents mean; `loadtest.slo` and the optimizer's spec say that.
"""

import difflib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import pydantic
import yaml

MAX_DOCUMENT_BYTES = 1_000_000


class Strict(pydantic.BaseModel):
    """Base of every document model: frozen, no unknown keys, no silent conversion."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, strict=True)


class DocumentInvalid(Exception):
    """A document that can't be used; `str()` is the message for its author, a line a problem."""

    def __init__(self, source: str, problems: Sequence[str]) -> None:
        super().__init__("\n".join(problems))
        self.source = source
        self.problems = tuple(problems)


Document = TypeVar("Document", bound=pydantic.BaseModel)
Location = tuple[str | int, ...]


def read_document(path: Path, kind: type[Document]) -> Document:
    """Read the YAML (or JSON) file at `path` as a `kind`.

    Raises DocumentInvalid for a missing, oversized, malformed or unfitting file.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_DOCUMENT_BYTES + 1)
    except OSError as error:
        raise DocumentInvalid(str(path), [f"{path}: {error.strerror or error}"]) from error
    if len(raw) > MAX_DOCUMENT_BYTES:
        raise DocumentInvalid(
            str(path), [f"{path}: over {MAX_DOCUMENT_BYTES} bytes, want a smaller document"]
        )
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DocumentInvalid(
            str(path), [f"{path}: byte {error.start} is not UTF-8, want a UTF-8 text"]
        ) from error
    return parse_document(text, kind, source=str(path))


def parse_document(text: str, kind: type[Document], source: str) -> Document:
    """Parse YAML `text` as a `kind`; `source` names it in errors."""
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        lines = dict(_lines(node)) if node is not None else {}
        _refuse_repeated_keys(node, source)
        content = yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise DocumentInvalid(
            source, [f"{source}:{line}: not valid YAML: {error.problem}"]
        ) from error
    except (yaml.YAMLError, RecursionError) as error:
        raise DocumentInvalid(source, [f"{source}: not valid YAML: {error}"]) from error
    if not isinstance(content, dict):
        raise DocumentInvalid(
            source, [f"{source}: got {_shown(content)}, want a mapping of keys to values"]
        )
    try:
        return kind.model_validate(content)
    except pydantic.ValidationError as error:
        raise DocumentInvalid(source, _problems(error, kind, source, lines)) from error


def nearest(name: str, known: Sequence[str]) -> str | None:
    """The known name most like `name`, or None where none is close."""
    found = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return found[0] if found else None


def _problems(
    error: pydantic.ValidationError,
    kind: type[pydantic.BaseModel],
    source: str,
    lines: dict[Location, int],
) -> list[str]:
    problems = []
    for detail in error.errors(include_url=False):
        location = tuple(detail["loc"])
        key = ".".join(str(part) for part in location) or "document"
        where = f"{source}:{_line(location, lines)}: {key}"
        if detail["type"] == "extra_forbidden":
            problems.append(f"{where}: unknown key, {_allowed_keys(kind, location)}")
        elif detail["type"] == "missing":
            problems.append(f"{where}: missing, it must be given")
        else:
            message = detail["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
            want = message if message.startswith("want ") else f"want {message}"
            problems.append(f"{where}: got {_shown(detail['input'])}, {want}")
    return problems


def _allowed_keys(kind: type[pydantic.BaseModel], location: Location) -> str:
    fields = _model_at(kind, location[:-1]).model_fields
    known = sorted(field.alias or name for name, field in fields.items())
    close = nearest(str(location[-1]), known)
    hint = f"did you mean '{close}'? " if close else ""
    return f"{hint}allowed: {', '.join(known)}"


def _model_at(kind: type[pydantic.BaseModel], location: Location) -> type[pydantic.BaseModel]:
    """The model type that the mapping at `location` is read as.

    Where a mapping may be one of several, the location holds the tag of the one it claims to be.
    """
    candidates = [kind]
    for part in location:
        tagged = [one for one in candidates if _has_tag(one, part)]
        if len(candidates) > 1 and tagged:
            candidates = tagged
            continue
        field = candidates[0].model_fields.get(str(part))
        inner = list(_models(field.annotation)) if field is not None else []
        candidates = inner or candidates
    return candidates[0]


def _has_tag(kind: type[pydantic.BaseModel], tag: str | int) -> bool:
    return any(tag in get_args(field.annotation) for field in kind.model_fields.values())


def _models(annotation: Any) -> Iterator[type[pydantic.BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, pydantic.BaseModel):
        yield annotation
    for inner in getattr(annotation, "__args__", ()):
        yield from _models(inner)


def _lines(node: yaml.Node, location: Location = ()) -> Iterator[tuple[Location, int]]:
    """(location, 1-based line) of every value in the document, by its key where it has one."""
    yield location, node.start_mark.line + 1
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            inner = (*location, str(key.value))
            yield from _lines(value, inner)
            yield inner, key.start_mark.line + 1
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            yield from _lines(value, (*location, index))


def _line(location: Location, lines: dict[Location, int]) -> int:
    while location and location not in lines:
        location = location[:-1]
    return lines.get(location, 1)


def _refuse_repeated_keys(node: yaml.Node | None, source: str) -> None:
    """YAML lets a key come twice and PyYAML keeps the last: an author's slip, so refuse it."""
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            name = str(key.value)
            if name in seen:
                raise DocumentInvalid(
                    source,
                    [f"{source}:{key.start_mark.line + 1}: {name}: given twice, want it once"],
                )
            seen.add(name)
            _refuse_repeated_keys(value, source)
    elif isinstance(node, yaml.SequenceNode):
        for value in node.value:
            _refuse_repeated_keys(value, source)


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
