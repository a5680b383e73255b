"""Whatever a caller gives is drawn or refused by an error of rt, before anything is loaded."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import rt
from rt.errors import ConfigError, RtError
from rt.noise import Generator
from rt.philox import CudaGenerator
from rt.samplers import SAMPLERS, Scheduler

PARAMETERS = [
    name
    for name, each in inspect.signature(rt.Pipeline.__call__).parameters.items()
    if name not in ("self", "unknown") and each.kind is not each.VAR_KEYWORD
]


class Hostile:
    """Fails whatever it is asked."""

    def __repr__(self) -> str:
        raise RuntimeError("no repr")

    def __array__(self, *args: object, **options: object) -> Any:
        raise RuntimeError("no array")

    def __len__(self) -> int:
        raise RuntimeError("no length")


POOL: list[Any] = [
    *(None, True, False, 0, 1, -1, 3, 10**12, 2**63, 2**64, -(2**63) - 1, 10**400, 10**5000, -(10**400)),
    *(0.0, 0.5, 1.5, -0.5, 1e300, float("nan"), float("inf"), -float("inf"), 1 + 2j),
    *(Fraction(1, 3), Fraction(10**400), Decimal("0.5"), Decimal("nan")),
    *("", " ", "text", "3", "nan", "latents", "\0", "\udcff", "a\udcffb", "\x1b[31m\n", "x" * 100_000),
    *(b"", b"\0\1", b"text", bytearray(b"ab"), memoryview(b"ab")),
    *(
        [],
        [[]],
        [1],
        [1, 2],
        [0.2, 0.8],
        [1.5],
        ["a"],
        ["a", None],
        ["\udcff"],
        [True],
        [10**400],
        [[1], [2, 3]],
    ),
    *((), (0, 1), (float("nan"), 1), (0, 10**400), ("latents", "x"), ([],)),
    *({}, {"latents": 1}, {1: 2}, set(), {"latents"}, frozenset({1})),
    *(range(3), range(10**12), range(10**30), iter([1]), (n for n in range(3))),
    *(
        np.int64(3),
        np.uint8(1),
        np.float32(0.5),
        np.float64("nan"),
        np.float16("inf"),
        np.bool_(True),
        np.str_("a"),
    ),
    *(
        np.zeros(()),
        np.zeros(3),
        np.array([3, 2, 1]),
        np.array([1.5]),
        np.array(["a", "b"]),
        np.array([None]),
    ),
    *(np.zeros((1, 4, 16, 16)), np.full((1, 4, 16, 16), np.nan), np.full((1, 4, 16, 16), 1e300)),
    *(np.zeros((1, 4, 16, 16), complex), np.zeros((1, 4, 16, 16), object), np.zeros((1, 4, 16, 16), bool)),
    *(
        np.full((1, 4, 16, 16), "1"),
        [[[["x"]]]],
        np.zeros((8, 8, 3), np.uint8),
        np.ma.masked_all((1, 4, 16, 16)),
    ),
    *(object(), Hostile(), Hostile, int, len, lambda *step: None, Ellipsis, NotImplemented, np, slice(3)),
    *(Path("nowhere"), Path("\0"), Path("/dev/zero"), Path("x" * 300), Generator(1), rt.Pipeline),
]
IDS = [str(index) for index in range(len(POOL))]


class Reached(Exception):
    """The call would load engines now, and draw."""


@pytest.fixture(scope="module")
def pipe(demo_bundle: Path) -> Iterator[rt.Pipeline]:
    def load(*args: object, **options: object) -> None:
        raise Reached

    with pytest.MonkeyPatch.context() as patch, rt.Pipeline.from_bundle(demo_bundle) as opened:
        patch.setattr(opened, "_load", load)
        yield opened


def check_one_line(error: RtError) -> None:
    assert len(str(error).splitlines()) == 1 and str(error).isprintable(), ascii(str(error))


def call(pipe: rt.Pipeline, **arguments: Any) -> None:
    """It is refused by one line, or would be drawn."""
    try:
        pipe(**{"prompt": "x", "num_inference_steps": 2, **arguments})
    except Reached:
        pass
    except RtError as error:
        check_one_line(error)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", PARAMETERS)
def test_every_argument_of_a_call(pipe: rt.Pipeline, name: str) -> None:
    for value in POOL:
        call(pipe, **{name: value})
        call(pipe, **{"scheduler": "ddim" if name == "eta" else "euler", name: value})


anything = st.recursive(
    st.integers(0, len(POOL) - 1).map(
        lambda index: POOL[index]
    )  # not all can be written, as Hypothesis would
    | st.integers()
    | st.floats()
    | st.text()
    | st.binary()
    | st.complex_numbers(),
    lambda each: (
        st.lists(each, max_size=3) | st.dictionaries(st.text(), each, max_size=2) | st.tuples(each, each)
    ),
    max_leaves=5,
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(arguments=st.dictionaries(st.sampled_from(PARAMETERS), anything, max_size=4))
def test_several_arguments_of_a_call(pipe: rt.Pipeline, arguments: dict[str, Any]) -> None:
    call(pipe, **arguments)


@pytest.mark.parametrize("name", ["path", "backend", "threads"])
def test_every_argument_of_opening(demo_bundle: Path, name: str) -> None:
    for value in POOL:
        try:
            rt.Pipeline.from_bundle(**{"path": demo_bundle, name: value}).close()
        except RtError as error:
            if name != "path":  # which is named as it is
                check_one_line(error)


OPTIONS = (
    *("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "steps_offset"),
    *("prediction_type", "timestep_spacing", "clip_sample", "_class_name", "_use_default_values"),
)


@pytest.mark.parametrize("sampler", ["ddim", "euler", "lcm", "dpmpp-2m"])
def test_every_argument_of_a_scheduler(sampler: str) -> None:
    config = {"num_train_timesteps": 1000, "beta_schedule": "scaled_linear"}
    scheduler = Scheduler.from_config(config, sampler)
    attempts: list[Any] = []
    for value in POOL:
        attempts += [
            lambda value=value: scheduler.schedule(value),
            lambda value=value: scheduler.schedule(2, timesteps=value),
            lambda value=value: scheduler.schedule(2, eta=value),
            lambda value=value: Scheduler.from_config(value, sampler).schedule(2),
            lambda value=value: Scheduler.from_config(config, value).schedule(2),
            lambda value=value: Scheduler.from_config(config, sampler, spacing=value).schedule(2),
            lambda value=value: Scheduler(value).schedule(2),
        ]
        for name in OPTIONS:
            attempts.append(
                lambda name=name, value=value: Scheduler.from_config(
                    {**config, name: value}, sampler
                ).schedule(2)
            )
    for attempt in attempts:
        try:
            attempt()
        except RtError as error:
            check_one_line(error)


@pytest.mark.parametrize("kind", [Generator, CudaGenerator])
def test_every_argument_of_a_generator(kind: Any) -> None:
    for value in POOL:
        for attempt in (
            lambda value=value: kind(value),
            lambda value=value: kind(1).randn(value),
            lambda value=value: kind(1).randn((2, 3), out=value),
        ):
            try:
                attempt()
            except RtError as error:
                check_one_line(error)
            except MemoryError:
                pass


RETURNED = [
    *(5, True, "latents", ["latents"], {"latents": None}, {"latents": "x"}, {"latents": [[1], [2, 3]]}),
    *({"latents": np.full((1, 4, 16, 16), np.nan)}, {"latents": np.zeros((1, 4, 16, 16), complex)}),
    *({"latents": Hostile()}, {"prompt_embeds": 1}, {1: 2}, np.zeros((1, 4, 16, 16)), Hostile()),
]


@pytest.fixture(scope="module")
def drawing(demo_bundle: Path) -> Iterator[rt.Pipeline]:
    with rt.Pipeline.from_bundle(demo_bundle) as opened:
        yield opened


@pytest.mark.parametrize("value", RETURNED, ids=[str(i) for i in range(len(RETURNED))])
def test_what_a_callback_returns(drawing: rt.Pipeline, value: Any) -> None:
    arguments = {"num_inference_steps": 1, "guidance_scale": 1, "output_type": "latent"}
    with pytest.raises(ConfigError, match=r"^the callback (returned|gave latents)") as caught:
        drawing("x", **arguments, callback_on_step_end=lambda *s: value)
    check_one_line(caught.value)
    assert np.isfinite(drawing("x", **arguments).images).all()  # and the next call draws


def test_what_means_something_is_drawn(pipe: rt.Pipeline) -> None:
    """The net above catches nothing where a call never comes as far as drawing."""
    good: Mapping[str, list[Any]] = {
        "prompt": ["a", ["a", "b"], ("a",), np.str_("a")],
        "height": [None, 64, np.int64(64)],
        "num_inference_steps": [1, np.int32(3)],
        "timesteps": [None, [3, 2, 1], np.array([3, 2, 1]), (900, 1), range(9, 3, -1)],
        "guidance_scale": [0, 7.5, np.float32(3), np.float16(1), Fraction(3, 2), -1],
        "guidance_interval": [(0, 1), [0.2, 0.8], (np.float32(0.25), 1)],
        "negative_prompt": [None, "", ["x"]],
        "num_images_per_prompt": [1, np.int64(2)],
        "latents": [
            None,
            np.zeros((1, 4, 16, 16)),
            np.zeros((1, 4, 16, 16), int),
            np.zeros((1, 4, 16, 16)).tolist(),
        ],
        "seed": [None, 0, -1, 2**64 - 1, np.uint64(7), [5], range(1), (np.int8(1),)],
        "scheduler": [None, *SAMPLERS],
    }
    for name, values in good.items():
        for value in values:
            with pytest.raises(Reached):
                pipe(**{"prompt": "x", "num_inference_steps": 5, "scheduler": "euler", name: value})
