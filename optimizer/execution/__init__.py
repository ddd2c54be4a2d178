"""Execution: where a study's work is done, in two classes.

*Build* makes variants and may share a machine; *measure* holds its cores alone. Only names,
digests and plain values travel, never live models. This module holds the contract; `processes`
does it in a process of this machine, `inline` in this one, and `slots` are several as one.
"""

from typing import Any, Protocol

from optimizer.errors import OptimizerError
from optimizer.measuring import Measurer

Json = Any
"""What JSON can hold."""


class ExecutorLost(OptimizerError):
    """The place where a call was being done is gone, with no fault of the call's that is known:
    it can be made again elsewhere. The message says which."""


class NoExecutor(OptimizerError):
    """There is no place left where calls can be done: the study can't go on."""


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
        too long; ExecutorLost where the machine does, and NoExecutor where there is none.
        """
        ...

    def close(self) -> None: ...
