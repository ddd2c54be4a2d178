"""A plan in parts, one for each generator process, and their samples put together again.

Of an open loop each part has every n-th arrival, so together the parts send exactly what the plan
says, and a Poisson process of each stays one of the whole. Nothing is summed or rounded: what is
judged are the parts' raw samples.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from loadtest.arrivals import Arrivals
from loadtest.plan import ClosedLoop, Plan
from loadtest.samples import Samples


def split(plan: Plan, n: int) -> tuple[Plan, ...]:
    """`n` plans, whose limits of requests in flight add up to at least the plan's.

    A closed loop's clients are shared out instead of its arrivals, which say no more than an order.
    """
    if not 1 <= n <= plan.max_in_flight:
        raise ValueError(f"n: got {n}, want 1 to max_in_flight {plan.max_in_flight}")
    return tuple(
        replace(
            plan,
            max_in_flight=-(-plan.max_in_flight // n),
            warmup=_every(plan.warmup, index, n),
            window=_every(plan.window, index, n),
        )
        if plan.closed is None
        else _with_clients(plan, plan.closed, index, n)
        for index in range(n)
    )


def merge(parts: Sequence[Samples]) -> Samples:
    """In the order of the intended sends."""
    graded = [part.n_right for part in parts if part.n_right is not None]
    together = {
        name: np.concatenate([getattr(part, name) for part in parts])
        for name in ("intended_s", "sent_s", "done_s", "target", "status")
    }
    order = np.argsort(together["intended_s"], kind="stable")
    n_right = np.concatenate(graded)[order] if len(graded) == len(parts) else None
    return Samples(**{name: column[order] for name, column in together.items()}, n_right=n_right)


def _every(arrivals: Arrivals, first: int, step: int) -> Arrivals:
    return Arrivals(**{name: column[first::step] for name, column in vars(arrivals).items()})


def _with_clients(plan: Plan, closed: ClosedLoop, index: int, n: int) -> Plan:
    n_clients = closed.n_clients // n + (index < closed.n_clients % n)
    return replace(
        plan, closed=replace(closed, n_clients=n_clients), max_in_flight=max(1, n_clients)
    )
