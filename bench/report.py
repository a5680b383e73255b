"""What `rt bench` found out: a record for machines, a table for people."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from rt.bench.record import Provenance
from rt.bench.timing import Calibration, Samples
from rt.errors import ConfigError
from rt.shapes import ShapeProfile

SCHEMA = 1
_WIDTH = 80


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What was measured: which bundle, computed how."""

    model: str
    fingerprint: str
    dtype: str
    profile: ShapeProfile
    backend: str
    arithmetic: str
    threads: int

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Subject:
        """From the `asdict` of one."""
        return cls(**{**data, "profile": ShapeProfile(**data["profile"])})

    def __str__(self) -> str:
        return (
            f"{self.model}, {self.profile}, {self.dtype} computed in {self.arithmetic} "
            f"by {self.backend} on {self.threads} threads"
        )


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How it was measured.

    Attributes:
        steps: Of the checkpoint's own sampler.
        guidance_scale: 1 or less draws without guidance.
        warmup: Calls before the first sample of each stage.
        iterations: Samples of each stage.
    """

    steps: int
    guidance_scale: float
    warmup: int
    iterations: int

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("warmup", 0), ("iterations", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least {least}")

    @property
    def guided(self) -> bool:
        """Whether the U-Net runs with guidance, as `Pipeline` decides it."""
        return self.guidance_scale > 1

    @property
    def calls(self) -> int:
        """Of each stage."""
        return self.warmup + self.iterations


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One engine, or the whole way from prompt to pictures.

    Attributes:
        name: For people.
        pictures: How many pass through it in one call.
        load_s: Hashing, reading and compiling; the whole way loads all that it needs at the same time.
        peak_rss_mib: Of the process with nothing loaded but what the stage needs.
        samples: One call each.
    """

    name: str
    pictures: int
    load_s: float
    peak_rss_mib: float
    samples: Samples

    @property
    def pictures_per_s(self) -> float:
        """At the median."""
        return self.pictures / self.samples.median

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values; `from_json` is the inverse."""
        return {**asdict(self), "samples": self.samples.to_json()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Stage:
        """From what `to_json` gave."""
        return cls(**{**data, "samples": Samples.from_json(data["samples"])})


@dataclass(frozen=True, kw_only=True)
class Loop:
    """What the sampling loop adds to its U-Net.

    Attributes:
        calls: Of the U-Net, in one run.
        denoise: The whole loop, one run each.
        engine: The part of the same runs that was spent inside `Engine.enqueue`.
    """

    calls: int
    denoise: Samples
    engine: Samples

    @property
    def step_s(self) -> float:
        """Median time of a step, with everything."""
        return self.denoise.median / self.calls

    @property
    def overhead_s(self) -> float:
        """Median time of a step outside the engine."""
        return Samples(tuple(d - e for d, e in self._runs)).median / self.calls

    @property
    def overhead_percent(self) -> float:
        """Median share of a step that is outside the engine."""
        return 100 * Samples(tuple(1 - e / d for d, e in self._runs)).median

    @property
    def _runs(self) -> list[tuple[float, float]]:
        return list(zip(self.denoise.seconds, self.engine.seconds, strict=True))

    def __str__(self) -> str:
        return (
            f"{self.overhead_s * 1e6:.0f} us of a {self.step_s * 1e3:.3g} ms step "
            f"({self.overhead_percent:.2f} %) are outside the engine"
        )

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values; `from_json` is the inverse."""
        return {
            "calls": self.calls,
            "step_s": self.step_s,
            "overhead_s": self.overhead_s,
            "overhead_percent": self.overhead_percent,
            "denoise": self.denoise.to_json(),
            "engine": self.engine.to_json(),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Loop:
        """From what `to_json` gave."""
        denoise, engine = (Samples.from_json(data[key]) for key in ("denoise", "engine"))
        return cls(calls=data["calls"], denoise=denoise, engine=engine)


@dataclass(frozen=True, kw_only=True)
class Report:
    """Everything about one measurement of one bundle; the last of the stages is the whole way."""

    provenance: Provenance
    subject: Subject
    settings: Settings
    calibration: Calibration
    stages: tuple[Stage, ...]
    loop: Loop

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values; `from_json` is the inverse."""
        return {
            "schema": SCHEMA,
            "provenance": asdict(self.provenance),
            "subject": asdict(self.subject),
            "settings": asdict(self.settings),
            "calibration": asdict(self.calibration),
            "stages": [stage.to_json() for stage in self.stages],
            "loop": self.loop.to_json(),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Report:
        """From what `to_json` gave."""
        return cls(
            provenance=Provenance.from_json(data["provenance"]),
            subject=Subject.from_json(data["subject"]),
            settings=Settings(**data["settings"]),
            calibration=Calibration(**data["calibration"]),
            stages=tuple(Stage.from_json(stage) for stage in data["stages"]),
            loop=Loop.from_json(data["loop"]),
        )

    def table(self) -> str:
        """Lines of at most 80 columns."""
        machine, settings = self.provenance.machine, self.settings
        columns = ("load s", "median ms", "p90 ms", "p99 ms", "images/s", "peak MiB")
        rows = [f"{'stage':<20}" + "".join(f"{column:>10}" for column in columns)]
        for stage in self.stages:
            ms = (1e3 * seconds for seconds in (stage.samples.median, stage.samples.p90, stage.samples.p99))
            figures = (stage.load_s, *ms, stage.pictures_per_s, stage.peak_rss_mib)
            rows.append(f"{stage.name:<20}" + "".join(f"{_short(figure):>10}" for figure in figures))
        prose = (
            str(self.subject),
            f"{settings.steps} steps, guidance {settings.guidance_scale:g}, median of {settings.iterations}",
            f"{machine.processor}, {machine.cores} cores, {machine.memory_gib} GiB; {self.calibration}",
            f"loop: {self.loop}",
        )
        above, below = prose[:-1], prose[-1]
        return "\n".join([*(textwrap.fill(line, _WIDTH) for line in above), "", *rows, "", below])


def _short(figure: float) -> str:
    """Three digits, all of those before the point."""
    return f"{figure:.0f}" if figure >= 100 else f"{figure:.3g}"
