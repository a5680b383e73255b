"""What a comparison found out: for each candidate times, ratios, errors and memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from rt.bench.timing import Samples


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One measure of one candidate.

    Attributes:
        samples: One a turn.
        ratio: Of the median to the anchor's in the same group; below 1 is faster.
        error: Relative L2 distance from the reference on the inputs of the first turn; None where the reference did
            not take part or a library gives bytes.
    """

    samples: Samples
    ratio: float
    error: float | None

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {"ratio": self.ratio, "error": self.error, **self.samples.to_json()}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One candidate.

    Attributes:
        name: Of the candidate.
        ours: Whether it is a bundle of rt.
        group: Which of the groups it ran in, from 0.
        versions: Of the libraries that its process loaded.
        ready_s: Loading and the first call of each measure, compilers included.
        load_mib: Peak of the resident set of its process until then.
        steady_mib: And after.
        figures: By measure.
    """

    name: str
    ours: bool
    group: int
    versions: Mapping[str, str]
    ready_s: float
    load_mib: float
    steady_mib: float
    figures: Mapping[str, Figure]

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        figures = {measure: figure.to_json() for measure, figure in self.figures.items()}
        return {**asdict(self), "figures": figures}


@dataclass(frozen=True, kw_only=True)
class Result:
    """Of one group: its rows, how fast the machine was before each round, and name → why a candidate has no row."""

    rows: tuple[Row, ...]
    gemm_gflops: tuple[float, ...]
    absent: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One run.

    Attributes:
        model: What was drawn with.
        size: Of a picture, pixels.
        steps: Of a picture.
        threads: Of each candidate.
        seed: Of the inputs.
        anchor: Name of the candidate that ratios are taken to.
        gemm_gflops: Of each group, the matrix product's speed before every round and after the last.
        rows: In the order of the candidates; the anchor has one in each group.
        absent: Name → why a candidate has no row.
    """

    model: str
    size: int
    steps: int
    threads: int
    seed: int
    anchor: str
    gemm_gflops: tuple[tuple[float, ...], ...] = ()
    rows: tuple[Row, ...] = ()
    absent: Mapping[str, str] = field(default_factory=dict)

    def add(self, result: Result) -> Comparison:
        """With one more group."""
        return replace(
            self,
            gemm_gflops=(*self.gemm_gflops, result.gemm_gflops),
            rows=(*self.rows, *result.rows),
            absent={**self.absent, **result.absent},
        )

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {**asdict(self), "rows": [row.to_json() for row in self.rows]}
