"""Times functions by turns in one process, so that a noisy machine disturbs all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from limits import fresh_pages

# As much as a large function of the benchmark takes from the system at a time (the batched write, both ways).
LARGE_RESULTS = 256 << 20


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of one quantity over the rounds."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        if len(values) < 2:
            return cls(values[0], values[0], values[0])
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)

    def __str__(self) -> str:
        return f"{self.median:.3g} ({self.low:.3g} to {self.high:.3g})"


class Rounds:
    """The seconds that each of several functions took, round by round."""

    def __init__(self, seconds: dict[str, list[float]]) -> None:
        self.seconds = seconds

    def time(self, name: str) -> Spread:
        return Spread.of(self.seconds[name])

    def ratio(self, name: str, to: str) -> Spread:
        """Time of ``name`` divided by the time of ``to`` in the same round."""
        pairs = zip(self.seconds[name], self.seconds[to], strict=True)
        return Spread.of([own / other for own, other in pairs])

    def with_difference(self, name: str, whole: str, part: str) -> Rounds:
        """These rounds and a further function: what ``whole`` took longer than ``part`` in the same round."""
        pairs = zip(self.seconds[whole], self.seconds[part], strict=True)
        return Rounds(self.seconds | {name: [all_of_it - one for all_of_it, one in pairs]})

    def with_sum(self, name: str, *parts: str) -> Rounds:
        """These rounds and a further function: what ``parts`` took together in the same round."""
        return Rounds(
            self.seconds | {name: [sum(each) for each in zip(*(self.seconds[p] for p in parts), strict=True)]}
        )

    def fastest(self, *names: str) -> str:
        """The one of ``names`` with the least median time."""
        return min(names, key=lambda name: self.time(name).median)


def by_turns(
    functions: Mapping[str, Callable[[], object]],
    rounds: int,
    warm_up: int = 1,
    alternating: bool = True,
    touched_bytes: int = 0,
) -> Rounds:
    """Runs all functions once a round.

    A virtual machine may give memory that has been free for some seconds back to its host (free page reporting). The
    next to touch it waits for the host: on one machine 0.5 GB/s instead of 10. Large results are fresh memory in every
    call, so a slow function would lengthen the time of the one after it; ``touched_bytes`` keeps that out.

    Args:
        functions: what to time, by name.
        rounds: how many times each is timed.
        warm_up: rounds before, which are not timed (compilers, caches, allocators).
        alternating: every second round in reverse order (``A B B A ...``), so that no function always has the same
            one before it; else ``A B A B ...``, where what the one before leaves in the cache matters.
        touched_bytes: memory to take from the system, touch and give back before each call, outside its time: what the
            call then takes is memory that the machine has. It empties the caches; none by default, which is right where
            results are small.
    """
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for round_index in range(warm_up + rounds):
        order = list(functions)
        if alternating and round_index % 2 == 1:
            order.reverse()
        for name in order:
            if touched_bytes > 0:
                fresh_pages(touched_bytes)
            start = time.perf_counter()
            functions[name]()
            elapsed = time.perf_counter() - start
            if round_index >= warm_up:
                seconds[name].append(elapsed)
    return Rounds(seconds)
