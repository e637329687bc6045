"""Rows of the benchmark's table: a ratio with its spread, what it is held against, and how near the limit that is."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from timing import Spread


@dataclass(frozen=True)
class Target:
    """What a ratio shall reach: a gate, and the value to reach for."""

    sense: Literal[">=", "<="]
    gate: float
    reach: float | None = None

    def is_met(self, value: float) -> bool:
        return value >= self.gate if self.sense == ">=" else value <= self.gate

    def __str__(self) -> str:
        reach = "" if self.reach is None else f" ({self.reach:g})"
        return f"{self.sense} {self.gate:g}{reach}"


@dataclass(frozen=True)
class Limit:
    """The least time in which the processor can do what must be done, measured in the same rounds."""

    what: str  # what takes that time
    fraction: Spread  # that time divided by the time taken

    def __str__(self) -> str:
        return f"{100 * self.fraction.median:.0f} % of {self.what}"


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    what: str
    ratio: Spread
    target: Target | None = None
    achieved: str = ""  # what the machine did: GFLOP/s, GB/s, milliseconds
    limit: Limit | None = None
    note: str = ""
    shape: str = ""

    @property
    def verdict(self) -> str:
        if self.target is None:
            return ""
        return "met" if self.target.is_met(self.ratio.median) else "MISSED"

    def record(self) -> dict[str, Any]:
        """For the JSON file."""
        return {**asdict(self), "verdict": self.verdict}

    def plain(self) -> str:
        """For the terminal."""
        target = "" if self.target is None else str(self.target)
        limit = "" if self.limit is None else str(self.limit)
        note = ", ".join(part for part in (self.note, self.shape) if part)
        measured = f"{self.what:<52}{self.ratio!s:<26}{target:<15}{self.verdict:<8}{self.achieved:<26}"
        return f"{measured}{limit:<34}{note}".rstrip()

    def markdown(self) -> str:
        """For a README."""
        target = "" if self.target is None else str(self.target)
        limit = "" if self.limit is None else str(self.limit)
        cells = (self.what, str(self.ratio), target, self.verdict.lower(), self.achieved, limit, self.note, self.shape)
        return "| " + " | ".join(cells) + " |"


PLAIN_HEADER = (
    f"{'what':<52}{'median (quartiles)':<26}{'gate (reach)':<15}{'':<8}{'achieved':<26}{'of the limit':<34}note"
)
MARKDOWN_HEADER = (
    "| what | median (quartiles) | gate (reach) | | achieved | of the limit | note | shape |\n" + "| --- " * 8 + "|"
)


def gflops(flops: float, seconds: float) -> str:
    return f"{flops / seconds / 1e9:.0f} GFLOP/s"


def gigabytes(num_bytes: float, seconds: float) -> str:
    return f"{num_bytes / seconds / 1e9:.1f} GB/s"
