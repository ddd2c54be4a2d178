"""Structured logs: one JSON object a line, or text for people."""

import json
import logging
import sys
import time
from dataclasses import dataclass
from typing import TextIO

from serve.errors import InvalidRequest

_PLAIN = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "color_message"}


class JsonFormatter(logging.Formatter):
    """A record as one line of JSON: time, level, logger, message, extra fields, exception."""

    def format(self, record: logging.LogRecord) -> str:
        fields: dict[str, object] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
            + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        fields |= {k: v for k, v in vars(record).items() if k not in _PLAIN}
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        return json.dumps(fields, default=str)


def configure(log_format: str, level: str, stream: TextIO | None = None) -> None:
    """Send the process's logs to `stream` (standard error) as "text" or "json" lines."""
    handler = logging.StreamHandler(stream or sys.stderr)
    if log_format == "json":
        handler.setFormatter(JsonFormatter())
    else:
        handler.setFormatter(
            logging.Formatter("%(asctime)s %(levelname)-7s %(name)s: %(message)s", "%H:%M:%S")
        )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())


# Least severe level that is shown -> what Triton's logging extension calls it: information,
# warnings, errors, verbose level.
_SHOWN: dict[int, tuple[bool, bool, bool, int]] = {
    logging.DEBUG: (True, True, True, 1),
    logging.INFO: (True, True, True, 0),
    logging.WARNING: (False, True, True, 0),
    logging.ERROR: (False, False, True, 0),
    logging.CRITICAL: (False, False, False, 0),
}


@dataclass(frozen=True)
class LogSettings:
    """Which severities are shown. Each includes those more severe than itself."""

    info: bool
    warning: bool
    error: bool
    verbose_level: int


def settings() -> LogSettings:
    """What the process logs now."""
    level = logging.getLogger().level
    return LogSettings(*_SHOWN[max((one for one in _SHOWN if one <= level), default=logging.DEBUG)])


def change_settings(wanted: LogSettings) -> None:
    """Log what `wanted` says from now on. Raises InvalidRequest where a severity is to be shown
    and a greater one isn't."""
    shown = (wanted.info, wanted.warning, wanted.error, min(wanted.verbose_level, 1))
    level = next((level for level, known in _SHOWN.items() if known == shown), None)
    if level is None or wanted.verbose_level < 0:
        raise InvalidRequest(
            "log_info, log_warning, log_error, log_verbose_level",
            shown,
            "every severity to include the greater ones",
        )
    logging.getLogger().setLevel(level)
