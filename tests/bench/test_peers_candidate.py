"""Who takes part in a comparison, and who runs with whom."""

from __future__ import annotations

import secrets

import numpy as np
import pytest

from rt.bench.peers.candidate import ANCHOR, PEERS, REFERENCE, Candidate, choose, group, variant
from rt.errors import ConfigError


def names(candidates: list[Candidate]) -> list[str]:
    return [candidate.name for candidate in candidates]


def test_a_variant_has_a_bundle_and_keywords_with_their_types() -> None:
    candidate = variant("rt cached=/x/sd15,step_cache=3,guidance_rescale=0.5")
    assert candidate.name == "rt cached" and candidate.ours
    assert candidate.options == {"bundle": "/x/sd15", "step_cache": 3, "guidance_rescale": 0.5}
    assert type(candidate.options["step_cache"]) is int


@pytest.mark.parametrize(
    "text", ["", "rt", "rt=", "=out/sd15", "rt=out,steps", "rt=out,steps=few", "rt=out,=3"]
)
def test_what_is_no_variant_is_refused_with_the_form(text: str) -> None:
    with pytest.raises(ConfigError, match=r"is not a variant of rt; expected NAME=BUNDLE"):
        variant(text)


def test_choosing_always_keeps_the_anchor() -> None:
    assert choose(PEERS, []) == list(PEERS)
    assert names(choose(PEERS, ["ONNX Runtime fp32"])) == ["ONNX Runtime fp32", ANCHOR.name]
    assert names(choose(PEERS, [], [REFERENCE.name])) == names(list(PEERS))[1:]
    assert choose(PEERS, [], [ANCHOR.name]) == list(PEERS)


@pytest.mark.parametrize("option", ["only", "skip"])
def test_an_unknown_candidate_is_refused_with_the_nearest(option: str) -> None:
    with pytest.raises(ConfigError, match=r"no candidate 'Openvino bf'.*OpenVINO bf16"):
        choose(PEERS, **{"only": [], option: ["Openvino bf"]})


def test_two_of_one_name_are_refused() -> None:
    with pytest.raises(ConfigError, match="two candidates are called 'rt'"):
        choose([variant("rt=a"), variant("rt=b"), *PEERS], [])


def test_groups_hold_everyone_once_beside_the_anchor_within_the_memory() -> None:
    rng = np.random.default_rng(secrets.randbits(64))
    others = [
        Candidate(name=str(i), peer="eager", extra="build", copies=float(rng.uniform(0.5, 2.5)))
        for i in range(9)
    ]
    groups = group([*others, REFERENCE, ANCHOR], weights_gib=4.0, memory_gib=20.0)
    assert all(each[0] == ANCHOR for each in groups)
    assert groups[0][1] == REFERENCE
    assert sorted(names([c for each in groups for c in each[1:]])) == sorted(names([*others, REFERENCE]))
    assert all(sum(c.copies for c in each) * 4.0 <= 20.0 for each in groups)
    assert len(groups) > 1


def test_who_does_not_fit_has_a_group_alone_with_the_anchor() -> None:
    assert group([ANCHOR, REFERENCE], weights_gib=4.0, memory_gib=1.0) == [[ANCHOR, REFERENCE]]
    assert group([ANCHOR], weights_gib=4.0, memory_gib=1.0) == [[ANCHOR]]
