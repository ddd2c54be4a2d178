"""A submission's body: JSON, or the spec alone as YAML."""

import json
from typing import Any

import yaml
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict, Field

from loadtest.document import MAX_DOCUMENT_BYTES, DocumentInvalid
from optimizer.service.operations import RequestInvalid
from optimizer.service.status import UnsupportedMedia

MAX_BODY_BYTES = MAX_DOCUMENT_BYTES + 100_000
YAML_TYPES = ("application/yaml", "application/x-yaml", "text/yaml")


class Submission(BaseModel):
    """A job to run. `spec` is that of `trimserve optimize`, with the SLO inside of it as `slo`, as
    a mapping or as YAML text."""

    model_config = ConfigDict(extra="forbid")
    spec: dict[str, Any] | str
    labels: dict[str, str] = Field(default_factory=dict)
    priority: int = Field(default=0, ge=-100, le=100, description="Above 0 is for admins.")
    verify: bool = Field(default=True, description="Put the best variants to the real server.")


def submission(body: bytes, content_type: str) -> Submission:
    kind = content_type.partition(";")[0].strip().lower()
    if kind in YAML_TYPES:
        try:
            return Submission(spec=body.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise RequestInvalid("body", "not UTF-8", "a UTF-8 text") from error
    if kind != "application/json":
        raise UnsupportedMedia(
            f"Content-Type: got {kind or 'none'!r}, want application/json or application/yaml"
        )
    try:
        return Submission.model_validate(json.loads(body))
    except (ValueError, RecursionError) as error:
        if isinstance(error, ValueError) and hasattr(error, "errors"):
            raise RequestValidationError(error.errors()) from error
        raise RequestInvalid("body", "not JSON", f"a JSON document ({error})") from error


def with_parsed_slo(spec: dict[str, Any] | str) -> dict[str, Any] | str:
    """An SLO may come as the text of its file."""
    if not isinstance(spec, dict) or not isinstance(spec.get("slo"), str):
        return spec
    try:
        slo = yaml.safe_load(spec["slo"])
    except (yaml.YAMLError, RecursionError) as error:
        raise DocumentInvalid("slo", [f"spec: slo: not valid YAML: {error}"]) from error
    return {**spec, "slo": slo}


def spec_body() -> dict[str, Any]:
    schema = Submission.model_json_schema()
    return {
        "required": True,
        "content": {
            "application/json": {"schema": schema},
            "application/yaml": {"schema": {"type": "string"}},
        },
    }
