"""Who takes part: a peer, how it is set up, and what it needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rt.errors import ConfigError, nearest


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One row of the result.

    Attributes:
        name: For people.
        peer: The module of this package that loads it.
        options: See that module's `load`.
        exports: Whether that module has a `prepare`, which makes files once.
        extra: Of rt, with which its packages are installed.
        copies: Memory that it holds, as a multiple of the float32 weights; a little more than measured.
    """

    name: str
    peer: str
    options: Mapping[str, Any] = field(default_factory=dict)
    exports: bool = False
    extra: str
    copies: float

    @property
    def ours(self) -> bool:
        """Whether it is rt."""
        return self.peer == "bundle"


REFERENCE = Candidate(
    name="diffusers fp32", peer="eager", options={"dtype": "fp32"}, extra="build", copies=1.3
)
"""What errors are measured from."""

ANCHOR = Candidate(
    name="OpenVINO bf16",
    peer="openvino_cpu",
    exports=True,
    options={"precision": "bf16"},
    extra="openvino",
    copies=1.9,
)
"""In every group; what ratios are taken to."""

PEERS: tuple[Candidate, ...] = (
    REFERENCE,
    Candidate(name="diffusers bf16", peer="eager", options={"dtype": "bf16"}, extra="build", copies=0.8),
    Candidate(
        name="torch.compile bf16", peer="inductor", options={"dtype": "bf16"}, extra="build", copies=1.4
    ),
    Candidate(
        name="ONNX Runtime fp32", peer="onnxruntime_cpu", exports=True, extra="onnxruntime", copies=2.2
    ),
    ANCHOR,
    Candidate(
        name="OpenVINO bf16, fp16 IR",
        peer="openvino_cpu",
        exports=True,
        options={"precision": "bf16", "ir": True},
        extra="openvino",
        copies=1.3,
    ),
    Candidate(
        name="openvino_genai bf16",
        peer="genai",
        exports=True,
        options={"precision": "bf16"},
        extra="peers",
        copies=1.3,
    ),
)


def variant(text: str) -> Candidate:
    """A candidate of ours from `NAME=BUNDLE[,KEYWORD=NUMBER...]`, the keywords those of `Pipeline.__call__`.

    Raises:
        ConfigError: When `text` is nothing like it.
    """
    name, _, rest = text.partition("=")
    bundle, *pairs = rest.split(",")
    keywords = {key: value for key, _, value in (pair.partition("=") for pair in pairs)}
    try:
        numbers = {key: float(value) if "." in value else int(value) for key, value in keywords.items()}
    except ValueError:
        numbers = None
    if not name or not bundle or numbers is None or "" in numbers:
        raise ConfigError(
            f"{text!r} is not a variant of rt; expected NAME=BUNDLE[,KEYWORD=NUMBER...], such as rt=out/sd15"
        )
    options = {"bundle": str(Path(bundle).absolute()), **numbers}
    return Candidate(name=name, peer="bundle", options=options, extra="openvino", copies=1.5)


def choose(candidates: Sequence[Candidate], only: Sequence[str], skip: Sequence[str] = ()) -> list[Candidate]:
    """Those named in `only`, or all, without those in `skip`, and always the anchor.

    Raises:
        ConfigError: When there is no candidate of that name, or two have the same.
    """
    names = [candidate.name for candidate in candidates]
    for name in (*only, *skip):
        if name not in names:
            raise ConfigError(f"no candidate {name!r}{nearest(name, names)}; there are: {', '.join(names)}")
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ConfigError(f"two candidates are called {twice!r}; give each a name of its own")
    wanted = set(only or names) - set(skip) | {ANCHOR.name}
    return [candidate for candidate in candidates if candidate.name in wanted]


def group(candidates: Sequence[Candidate], weights_gib: float, memory_gib: float) -> list[list[Candidate]]:
    """As many at a time as memory holds, the anchor among each of them; the reference comes first.

    A candidate that does not fit beside the anchor still gets a group: it may do with less than was thought.

    Args:
        candidates: With the anchor or without.
        weights_gib: Of the model in float32.
        memory_gib: What all of a group may hold.
    """
    groups: list[list[Candidate]] = []
    for candidate in sorted(candidates, key=lambda each: each != REFERENCE):
        if candidate == ANCHOR:
            continue
        for each in groups:
            if sum(member.copies for member in [*each, candidate]) * weights_gib <= memory_gib:
                each.append(candidate)
                break
        else:
            groups.append([ANCHOR, candidate])
    return groups or [[ANCHOR]]
