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
# What pydantic says in Python's words.
_WANTED = {
    "dict_type": "a mapping of keys to values",
    "model_attributes_type": "a mapping of keys to values",
    "model_type": "a mapping of keys to values",
    "too_long": "at most {max_length} values",
    "too_short": "{min_length} or more values",
}


def read_document(path: Path, kind: type[Document]) -> Document:
    """Read the YAML (or JSON) file at `path` as a `kind`.

    Raises DocumentInvalid for a missing, oversized, malformed or unfitting file.
    """
    return parse_document(_text(path), kind, source=str(path))


def read_mapping(path: Path) -> dict[str, Any]:
    """Read the YAML file at `path` as it is written, whatever its keys. Raises DocumentInvalid."""
    return _content(_text(path), str(path))[0]


def parse_document(text: str, kind: type[Document], source: str) -> Document:
    """Parse YAML `text` as a `kind`; `source` names it in errors."""
    content, lines = _content(text, source)
    try:
        return kind.model_validate(content)
    except pydantic.ValidationError as error:
        raise DocumentInvalid(source, _problems(error, kind, source, lines)) from error


def nearest(name: str, known: Sequence[str]) -> str | None:
    """The known name most like `name`, or None where none is close."""
    found = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return found[0] if found else None


def _text(path: Path) -> str:
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
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DocumentInvalid(
            str(path), [f"{path}: byte {error.start} is not UTF-8, want a UTF-8 text"]
        ) from error


def _content(text: str, source: str) -> tuple[dict[str, Any], dict[Location, int]]:
    """The mapping that the text is, and the lines of what is in it."""
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
        what = "the file is empty" if content is None else f"got {_shown(content)}"
        raise DocumentInvalid(source, [f"{source}: {what}, want a mapping of keys to values"])
    return content, lines


def _problems(
    error: pydantic.ValidationError,
    kind: type[pydantic.BaseModel],
    source: str,
    lines: dict[Location, int],
) -> list[str]:
    problems = []
    for detail in error.errors(include_url=False):
        location = tuple(detail["loc"])
        tag = _tag_of(detail)
        if tag is not None:
            problems.append(_tag_problem(detail["input"], kind, (*location, tag), source, lines))
            continue
        key = ".".join(str(part) for part in location) or "document"
        where = f"{source}:{_line(location, lines)}: {key}"
        if detail["type"] == "extra_forbidden":
            problems.append(f"{where}: unknown key, {_allowed_keys(kind, location)}")
        elif detail["type"] == "missing":
            problems.append(f"{where}: missing, it must be given")
        elif not _is_of_another(detail):
            problems.append(f"{where}: got {_shown(detail['input'])}, {_wanted(detail)}")
    return problems


def _wanted(detail: Any) -> str:
    if detail["type"] in _WANTED:
        return f"want {_WANTED[detail['type']].format(**detail.get('ctx', {}))}"
    message: str = detail["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    return message if message.startswith("want ") else f"want {message}"


def _is_of_another(detail: Any) -> bool:
    """Whether a list is too short only since values in it, which have their own problems, are
    none."""
    if detail["type"] != "too_short":
        return False
    return len(detail["input"]) >= int(detail["ctx"]["min_length"])


def _tag_of(detail: Any) -> str | None:
    """The key by which a mapping should say which of several it is, where it doesn't."""
    if detail["type"] not in ("union_tag_invalid", "union_tag_not_found"):
        return None
    shown: str = detail["ctx"]["discriminator"]
    return shown.strip("'") if shown.startswith("'") else None  # else a function, without a key


def _tag_problem(
    given: Any,
    kind: type[pydantic.BaseModel],
    location: Location,
    source: str,
    lines: dict[Location, int],
) -> str:
    """`given` is the mapping, `location` that of the key in it."""
    tag = str(location[-1])
    fields = [one.model_fields[tag] for one in _models_at(kind, location[:-1])]
    known = [str(value) for field in fields for value in get_args(field.annotation)]
    where = f"{source}:{_line(location, lines)}: {'.'.join(map(str, location))}"
    want = f"want {', '.join(known[:-1])} or {known[-1]}"
    if tag not in given:
        return f"{where}: missing, {want}"
    close = nearest(str(given[tag]), known)
    hint = f"did you mean '{close}'? " if close else ""
    return f"{where}: got {_shown(given[tag])}, {hint}{want}"


def _allowed_keys(kind: type[pydantic.BaseModel], location: Location) -> str:
    fields = _model_at(kind, location[:-1]).model_fields
    known = sorted(field.alias or name for name, field in fields.items())
    close = nearest(str(location[-1]), known)
    hint = f"did you mean '{close}'? " if close else ""
    return f"{hint}allowed: {', '.join(known)}"


def _model_at(kind: type[pydantic.BaseModel], location: Location) -> type[pydantic.BaseModel]:
    return _models_at(kind, location)[0]


def _models_at(
    kind: type[pydantic.BaseModel], location: Location
) -> list[type[pydantic.BaseModel]]:
    """The model types that the mapping at `location` may be read as.

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
    return candidates


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
