"""What a playing process brings home after the window."""

from dataclasses import dataclass

from loadtest.samples import Samples


@dataclass(frozen=True)
class Finish:
    samples: Samples
    errors: dict[int, str]
    """by status, the first error text seen"""
    cpu_share: float
    """CPU of the thread that does all the sending, in cores"""
    process_cores: float
