"""Every public method of tritonclient's four clients is known here, and some test calls it.

A new release that brings a method fails the first test, a method that no test uses the second.
"""

import ast
import importlib
import inspect
from pathlib import Path

import pytest

from tests.clients.api import APIS

COMMON = frozenset({
    "close", "get_cuda_shared_memory_status", "get_inference_statistics", "get_log_settings",
    "get_model_config", "get_model_metadata", "get_model_repository_index", "get_server_metadata",
    "get_system_shared_memory_status", "get_trace_settings", "infer", "is_model_ready",
    "is_server_live", "is_server_ready", "load_model", "plugin", "register_cuda_shared_memory",
    "register_plugin", "register_system_shared_memory", "unload_model",
    "unregister_cuda_shared_memory", "unregister_plugin", "unregister_system_shared_memory",
    "update_log_settings", "update_trace_settings",
})  # fmt: skip
METHODS: dict[str, frozenset[str]] = {
    "http": COMMON | {"async_infer", "generate_request_body", "parse_response_body"},
    "http aio": COMMON | {"generate_request_body", "parse_response_body"},
    "grpc": COMMON | {"async_infer", "async_stream_infer", "start_stream", "stop_stream"},
    "grpc aio": COMMON | {"stream_infer"},
}


def public_methods(api: str) -> set[str]:
    client = importlib.import_module(APIS[api]).InferenceServerClient
    return {name for name, _ in inspect.getmembers(client) if not name.startswith("_")}


def called() -> set[str]:
    """Names of attributes in the tests of this folder."""
    return {
        node.attr
        for path in Path(__file__).parent.glob("test_*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute)
    }


@pytest.mark.parametrize("api", list(APIS))
def test_clients_have_no_method_that_is_unknown_when_released(api: str) -> None:
    assert public_methods(api) == METHODS[api]


def test_methods_are_called_by_a_test_when_clients_have_them() -> None:
    # The fixtures close the clients.
    assert frozenset().union(*METHODS.values()) - {"close"} <= called()
