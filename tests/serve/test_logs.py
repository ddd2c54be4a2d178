"""Structured logs: one line a record, whatever is in it."""

import io
import json
import logging
from collections.abc import Iterator

import pytest

from serve import logs


@pytest.fixture
def root() -> Iterator[logging.Logger]:
    """The root logger, given back as it was."""
    logger = logging.getLogger()
    handlers, level = logger.handlers[:], logger.level
    yield logger
    logger.handlers[:] = handlers
    logger.setLevel(level)


def test_json_log_is_one_line_when_a_message_has_line_breaks(root: logging.Logger) -> None:
    stream = io.StringIO()
    logs.configure("json", "info", stream)
    root.info("a\r\n%s", '{"level":"forged"}', extra={"model": "m\n:1"})
    (line,) = stream.getvalue().splitlines()
    record = json.loads(line)
    assert record["message"] == 'a\r\n{"level":"forged"}'
    assert (record["level"], record["model"], record["logger"]) == ("info", "m\n:1", "root")


def test_json_log_carries_the_trace_when_an_exception_is_logged(root: logging.Logger) -> None:
    stream = io.StringIO()
    logs.configure("json", "info", stream)
    try:
        raise ValueError("because")
    except ValueError:
        root.exception("failed")
    assert "ValueError: because" in json.loads(stream.getvalue())["exception"]


def test_log_leaves_out_records_when_they_are_below_the_level(root: logging.Logger) -> None:
    stream = io.StringIO()
    logs.configure("text", "warning", stream)
    root.info("quiet")
    root.warning("loud")
    assert stream.getvalue().endswith("loud\n")
    assert "quiet" not in stream.getvalue()
