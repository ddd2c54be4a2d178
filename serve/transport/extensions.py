"""gRPC beside inference: health, metadata, statistics, and the extensions of Triton's clients.

Each method is one of the service's, named like it; what is refused is raised as a ServeError.
"""

from typing import Any

import grpc

from serve import oip_pb2 as pb
from serve.control import ModelControl
from serve.errors import Forbidden, InvalidRequest, ModelNotReady, NotSupported
from serve.logs import settings as log_settings
from serve.planning import Wanted
from serve.service import InferenceService, ModelStatistics
from serve.statistics import BatchStatistics, Duration
from serve.tensor import TensorSpec
from serve.transport import documents
from serve.transport.admin import CONTROL_ELSEWHERE, change_logs, refuse_tracing

Context = grpc.aio.ServicerContext[Any, Any]


class ExtensionCalls:
    """Every method but those of inference."""

    def __init__(self, service: InferenceService) -> None:
        self._service = service

    async def ServerLive(self, _: pb.ServerLiveRequest, __: Context) -> pb.ServerLiveResponse:
        return pb.ServerLiveResponse(live=True)

    async def ServerReady(self, _: pb.ServerReadyRequest, __: Context) -> pb.ServerReadyResponse:
        return pb.ServerReadyResponse(ready=self._service.is_ready)

    async def ModelReady(self, request: pb.ModelReadyRequest, _: Context) -> pb.ModelReadyResponse:
        try:
            self._service.check_model_ready(request.name, request.version)
        except ModelNotReady:
            return pb.ModelReadyResponse(ready=False)
        return pb.ModelReadyResponse(ready=True)

    async def ServerMetadata(
        self, _: pb.ServerMetadataRequest, __: Context
    ) -> pb.ServerMetadataResponse:
        name, version, extensions = self._service.server_metadata()
        return pb.ServerMetadataResponse(name=name, version=version, extensions=extensions)

    async def ModelMetadata(
        self, request: pb.ModelMetadataRequest, _: Context
    ) -> pb.ModelMetadataResponse:
        metadata = self._service.model_metadata(request.name, request.version)
        return pb.ModelMetadataResponse(
            name=metadata.name,
            versions=metadata.versions,
            platform=metadata.platform,
            inputs=[_tensor_metadata(spec) for spec in metadata.signature.inputs],
            outputs=[_tensor_metadata(spec) for spec in metadata.signature.outputs],
        )

    async def ModelConfig(
        self, request: pb.ModelConfigRequest, _: Context
    ) -> pb.ModelConfigResponse:
        config = self._service.model_config(request.name, request.version)
        return pb.ModelConfigResponse(config=config)

    async def ModelStatistics(
        self, request: pb.ModelStatisticsRequest, _: Context
    ) -> pb.ModelStatisticsResponse:
        found = self._service.model_statistics(request.name, request.version)
        return pb.ModelStatisticsResponse(model_stats=[_statistics(one) for one in found])

    async def RepositoryIndex(
        self, request: pb.RepositoryIndexRequest, _: Context
    ) -> pb.RepositoryIndexResponse:
        _check_repository(request.repository_name)
        return pb.RepositoryIndexResponse(
            models=[
                pb.RepositoryIndexResponse.ModelIndex(
                    name=slot.name, version=slot.version, state=slot.state, reason=slot.reason
                )
                for slot in await self._service.index(request.ready)
            ]
        )

    async def RepositoryModelLoad(
        self, request: pb.RepositoryModelLoadRequest, _: Context
    ) -> pb.RepositoryModelLoadResponse:
        _check_repository(request.repository_name)
        texts = {}
        for name, value in request.parameters.items():
            if name not in ("config", "digest"):
                want = "config or digest; files can't be sent along"
                raise InvalidRequest(f"parameters.{name}", "a parameter", want)
            if value.WhichOneof("parameter_choice") != "string_param":
                raise InvalidRequest(f"parameters.{name}", "another type", "a string_param")
            texts[name] = value.string_param
        await self._control().load(
            Wanted(request.model_name, texts.get("config", ""), texts.get("digest", ""))
        )
        return pb.RepositoryModelLoadResponse()

    async def RepositoryModelUnload(
        self, request: pb.RepositoryModelUnloadRequest, _: Context
    ) -> pb.RepositoryModelUnloadResponse:
        _check_repository(request.repository_name)
        for name in request.parameters:
            if name != "unload_dependents":
                raise InvalidRequest(f"parameters.{name}", "a parameter", "unload_dependents")
        await self._control().unload(request.model_name)
        return pb.RepositoryModelUnloadResponse()

    async def SystemSharedMemoryStatus(
        self, request: pb.SystemSharedMemoryStatusRequest, _: Context
    ) -> pb.SystemSharedMemoryStatusResponse:
        response = pb.SystemSharedMemoryStatusResponse()
        for region in self._service.shared_memory.status(request.name):
            status = response.regions[region.name]
            status.name, status.key = region.name, region.key
            status.offset, status.byte_size = region.offset, region.byte_size
        return response

    async def SystemSharedMemoryRegister(
        self, request: pb.SystemSharedMemoryRegisterRequest, _: Context
    ) -> pb.SystemSharedMemoryRegisterResponse:
        self._service.shared_memory.register(
            request.name, request.key, request.offset, request.byte_size
        )
        return pb.SystemSharedMemoryRegisterResponse()

    async def SystemSharedMemoryUnregister(
        self, request: pb.SystemSharedMemoryUnregisterRequest, _: Context
    ) -> pb.SystemSharedMemoryUnregisterResponse:
        if request.name:
            self._service.shared_memory.unregister(request.name)
        else:
            self._service.shared_memory.unregister_all()
        return pb.SystemSharedMemoryUnregisterResponse()

    async def CudaSharedMemoryStatus(
        self, _: pb.CudaSharedMemoryStatusRequest, __: Context
    ) -> pb.CudaSharedMemoryStatusResponse:
        raise NotSupported("CUDA shared memory is not supported")

    async def CudaSharedMemoryRegister(
        self, _: pb.CudaSharedMemoryRegisterRequest, __: Context
    ) -> pb.CudaSharedMemoryRegisterResponse:
        raise NotSupported("CUDA shared memory is not supported")

    async def CudaSharedMemoryUnregister(
        self, _: pb.CudaSharedMemoryUnregisterRequest, __: Context
    ) -> pb.CudaSharedMemoryUnregisterResponse:
        raise NotSupported("CUDA shared memory is not supported")

    async def TraceSetting(
        self, request: pb.TraceSettingRequest, _: Context
    ) -> pb.TraceSettingResponse:
        if request.model_name:
            self._service.model_metadata(request.model_name)
        refuse_tracing({name: list(one.value) for name, one in request.settings.items()})
        response = pb.TraceSettingResponse()
        for name, value in documents.TraceSettingsDocument().model_dump().items():
            response.settings[name].value.extend(value if isinstance(value, list) else [value])
        return response

    async def LogSettings(
        self, request: pb.LogSettingsRequest, _: Context
    ) -> pb.LogSettingsResponse:
        if request.settings:
            self._check_control()
            change_logs(_log_request(request))
        now = log_settings()
        response = pb.LogSettingsResponse()
        response.settings["log_file"].string_param = ""
        response.settings["log_info"].bool_param = now.info
        response.settings["log_warning"].bool_param = now.warning
        response.settings["log_error"].bool_param = now.error
        response.settings["log_verbose_level"].uint32_param = now.verbose_level
        response.settings["log_format"].string_param = "default"
        return response

    def _check_control(self) -> None:
        if not self._service.options.control_on_data_port:
            raise Forbidden(CONTROL_ELSEWHERE)

    def _control(self) -> ModelControl:
        self._check_control()
        assert self._service.control is not None
        return self._service.control


def _check_repository(name: str) -> None:
    if name:
        raise InvalidRequest("repository_name", name, "none: there is one repository")


def _tensor_metadata(spec: TensorSpec) -> pb.ModelMetadataResponse.TensorMetadata:
    return pb.ModelMetadataResponse.TensorMetadata(
        name=spec.name, datatype=spec.datatype, shape=spec.shape
    )


def _statistics(given: ModelStatistics) -> pb.ModelStatistics:
    statistics = given.statistics
    durations = {name: _duration(one) for name, one in statistics.durations()}
    return pb.ModelStatistics(
        name=given.name,
        version=given.version,
        last_inference=statistics.last_inference_ms,
        inference_count=statistics.inference_count,
        execution_count=statistics.execution_count,
        inference_stats=pb.InferStatistics(**durations),
        batch_stats=[_batch(size, one) for size, one in sorted(statistics.batches.items())],
    )


def _batch(size: int, one: BatchStatistics) -> pb.InferBatchStatistics:
    return pb.InferBatchStatistics(
        batch_size=size,
        compute_input=_duration(one.compute_input),
        compute_infer=_duration(one.compute_infer),
        compute_output=_duration(one.compute_output),
    )


def _duration(one: Duration) -> pb.StatisticDuration:
    return pb.StatisticDuration(count=one.count, ns=one.ns)


def _log_request(request: pb.LogSettingsRequest) -> documents.LogSettingsRequest:
    values: dict[str, Any] = {}
    for name, setting in request.settings.items():
        if name not in documents.LogSettingsRequest.model_fields:
            want = f"one of {', '.join(documents.LogSettingsRequest.model_fields)}"
            raise InvalidRequest(f"settings.{name}", "a setting", want)
        chosen = setting.WhichOneof("parameter_choice")
        values[name] = getattr(setting, chosen) if chosen else None
    try:
        return documents.LogSettingsRequest.model_validate(values)
    except ValueError as error:
        raise InvalidRequest("settings", values, str(error).splitlines()[0]) from error
