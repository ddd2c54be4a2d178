"""Whether who follows a stream still may: a key can be revoked, and a token expire, meanwhile."""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import TypeVar

from optimizer.service.database import DatabaseUnavailable

T = TypeVar("T")
RECHECK_S = 10.0


@dataclass
class Watched:
    """`check` raises what ends the stream; it blocks, and is called again after `every_s`. While
    the database is away it can't tell, and nothing new can be told to anybody either."""

    check: Callable[[], object]
    every_s: float = RECHECK_S
    clock: Callable[[], float] = time.monotonic
    _checked_s: float = field(init=False)

    def __post_init__(self) -> None:
        self._checked_s = self.clock()

    async def look(self) -> None:
        if self.clock() - self._checked_s < self.every_s:
            return
        try:
            await asyncio.to_thread(self.check)
        except DatabaseUnavailable:
            return
        self._checked_s = self.clock()

    async def stream(self, items: AsyncGenerator[T, None]) -> AsyncGenerator[T, None]:
        """The items, each after a look; they must come, or None for them, within `every_s`. They
        are closed with this one."""
        async with aclosing(items):
            async for item in items:
                await self.look()
                yield item
