"""The JSON documents of REST, but for inference itself: what they hold, typed for validation and
for the OpenAPI description. Field names are the protocol's."""

from typing import Any, Literal

import pydantic

from serve.repository import Slot
from serve.service import InferenceService, ModelMetadata, ModelStatistics
from serve.shared_memory import MAX_REGION_BYTES, Region
from serve.tensor import TensorSpec


class Document(pydantic.BaseModel):
    """Unknown fields of requests are refused, values aren't bent to fit."""

    model_config = pydantic.ConfigDict(extra="forbid", strict=True, frozen=True)


class ErrorDocument(Document):
    error: str


class LiveDocument(Document):
    live: bool


class ReadyDocument(Document):
    ready: bool


class ModelReadyDocument(Document):
    name: str
    ready: bool


class ServerDocument(Document):
    name: str
    version: str
    extensions: list[str]

    @classmethod
    def of(cls, service: InferenceService) -> "ServerDocument":
        name, version, extensions = service.server_metadata()
        return cls(name=name, version=version, extensions=list(extensions))


class TensorDocument(Document):
    """-1 marks a variable dimension, the batch dimension included."""

    name: str
    datatype: str
    shape: list[int]

    @classmethod
    def of(cls, spec: TensorSpec) -> "TensorDocument":
        return cls(name=spec.name, datatype=spec.datatype, shape=list(spec.shape))


class ModelDocument(Document):
    name: str
    versions: list[str]
    platform: str
    inputs: list[TensorDocument]
    outputs: list[TensorDocument]

    @classmethod
    def of(cls, metadata: ModelMetadata) -> "ModelDocument":
        return cls(
            name=metadata.name,
            versions=list(metadata.versions),
            platform=metadata.platform,
            inputs=[TensorDocument.of(spec) for spec in metadata.signature.inputs],
            outputs=[TensorDocument.of(spec) for spec in metadata.signature.outputs],
        )


class DurationDocument(Document):
    """How often something happened and, in nanoseconds, for how long in all."""

    count: int
    ns: int


class InferStatisticsDocument(Document):
    success: DurationDocument
    fail: DurationDocument
    queue: DurationDocument
    compute_input: DurationDocument
    compute_infer: DurationDocument
    compute_output: DurationDocument
    cache_hit: DurationDocument
    cache_miss: DurationDocument


class BatchStatisticsDocument(Document):
    batch_size: int
    compute_input: DurationDocument
    compute_infer: DurationDocument
    compute_output: DurationDocument


class ModelStatisticsDocument(Document):
    """`last_inference` is in milliseconds since 1970; `inference_count` counts rows,
    `execution_count` batches."""

    name: str
    version: str
    last_inference: int
    inference_count: int
    execution_count: int
    inference_stats: InferStatisticsDocument
    batch_stats: list[BatchStatisticsDocument]

    @classmethod
    def of(cls, given: ModelStatistics) -> "ModelStatisticsDocument":
        statistics = given.statistics
        durations = {
            name: DurationDocument(count=one.count, ns=one.ns)
            for name, one in statistics.durations()
        }
        batches = [
            BatchStatisticsDocument(
                batch_size=size,
                compute_input=_duration(one.compute_input),
                compute_infer=_duration(one.compute_infer),
                compute_output=_duration(one.compute_output),
            )
            for size, one in sorted(statistics.batches.items())
        ]
        return cls(
            name=given.name,
            version=given.version,
            last_inference=statistics.last_inference_ms,
            inference_count=statistics.inference_count,
            execution_count=statistics.execution_count,
            inference_stats=InferStatisticsDocument(**durations),
            batch_stats=batches,
        )


class StatisticsDocument(Document):
    model_stats: list[ModelStatisticsDocument]


class IndexRequest(Document):
    """`ready` leaves out what isn't."""

    ready: bool = False


class IndexEntry(Document):
    """`reason` says why a version isn't ready."""

    name: str
    version: str
    state: Literal["UNKNOWN", "READY", "UNAVAILABLE", "LOADING", "UNLOADING"]
    reason: str

    @classmethod
    def of(cls, slot: Slot) -> "IndexEntry":
        return cls(name=slot.name, version=slot.version, state=slot.state, reason=slot.reason)


class LoadParameters(pydantic.BaseModel):
    """`config` is a model configuration as JSON text, in place of the folder's; `digest` picks
    the version with that content ("sha256:..."). Files can't be sent along."""

    model_config = pydantic.ConfigDict(extra="forbid", strict=True, frozen=True)
    config: str = ""
    digest: str = ""


class LoadRequest(Document):
    parameters: LoadParameters = LoadParameters()


class UnloadParameters(Document):
    """There are no ensembles, so nothing depends on a model."""

    unload_dependents: bool = False


class UnloadRequest(Document):
    parameters: UnloadParameters = UnloadParameters()


class LogSettingsDocument(Document):
    """What the server logs. `log_file` is empty: logs go to standard error, where they stay."""

    log_file: str
    log_info: bool
    log_warning: bool
    log_error: bool
    log_verbose_level: int
    log_format: str


class LogSettingsRequest(Document):
    """What isn't given, or null, stays. Each severity includes the greater ones; where logs go and
    in which format is chosen when the server is started."""

    log_file: str | None = pydantic.Field(None, json_schema_extra={"enum": ["", None]})
    log_info: bool | None = None
    log_warning: bool | None = None
    log_error: bool | None = None
    log_verbose_level: int | None = pydantic.Field(None, ge=0)
    log_format: str | None = pydantic.Field(None, json_schema_extra={"enum": ["default", None]})


class TraceSettingsDocument(Document):
    """Requests aren't traced: always the settings of a server that doesn't."""

    trace_file: str = ""
    trace_level: list[str] = ["OFF"]
    trace_rate: str = "1000"
    trace_count: str = "-1"
    log_frequency: str = "0"
    trace_mode: str = "triton"


class RegionDocument(Document):
    name: str
    key: str
    offset: int
    byte_size: int

    @classmethod
    def of(cls, region: Region) -> "RegionDocument":
        return cls(
            name=region.name, key=region.key, offset=region.offset, byte_size=region.byte_size
        )


class RegisterRequest(Document):
    """`byte_size` bytes from `offset` on of the memory `key`, which begins with the server's
    prefix."""

    # Shared memory itself says what is wrong with a key; this is for the description.
    key: str = pydantic.Field(json_schema_extra={"pattern": r"^/?[A-Za-z0-9._-]{1,255}$"})
    byte_size: int = pydantic.Field(ge=1, le=MAX_REGION_BYTES)
    offset: int = pydantic.Field(0, ge=0)


class NothingDocument(pydantic.BaseModel):
    """Done; there is nothing to say."""

    model_config = pydantic.ConfigDict(extra="forbid")


# The body of a change of trace settings, for the description: any of them, as long as it is off.
TRACE_BODY: dict[str, Any] = {
    "requestBody": {
        "content": {
            "application/json": {
                "schema": {
                    "type": "object",
                    "additionalProperties": {"enum": [None, [], "OFF", ["OFF"]]},
                }
            }
        },
        "required": False,
    }
}


def _duration(one: Any) -> DurationDocument:
    return DurationDocument(count=one.count, ns=one.ns)
