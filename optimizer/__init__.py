"""Search for the cheapest variant of a trained model that keeps its service-level objective.

`optimizer.optimize(spec, repository, options)` is the way in from Python; it is imported when it
is asked for, since every other module passes through here.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from optimizer.study import Options as Options
    from optimizer.study import optimize as optimize

_LAZY = {"Options": "optimizer.study", "optimize": "optimizer.study"}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)
