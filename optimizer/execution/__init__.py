"""Execution: where a study's work is done, in two classes.

*Build* makes variants and may share a machine; *measure* holds its cores alone. Only names,
digests and plain values travel, never live models. This module holds the contract; `processes`
does it in processes of this machine, `inline` in this one.
"""

from typing import Any, Protocol

from optimizer.measuring import Measurer

Json = Any
"""What JSON can hold."""


class Executor(Protocol):
    """Used from one thread; closed after use."""

    @property
    def measurer(self) -> Measurer:
        """Measures on the target, holding its cores."""
        ...

    def start(self) -> None:
        """Be ready to build. Raises SpecInvalid where model or data can't be used."""
        ...

    def build(self, call: str, arguments: Json) -> Json:
        """Do one piece of building: a `call` of `optimizer.execution.calls`.

        Raises what the call raises; TechniqueFailed where the process that does it dies or takes
        too long.
        """
        ...

    def close(self) -> None: ...
