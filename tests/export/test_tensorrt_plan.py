"""Plans: by the real TensorRT for RTX, which needs no GPU to build one, and what is asked of the classic one."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from rt.backends import get
from rt.backends.tensorrt import CLASSIC, RTX
from rt.bundle import Bundle
from rt.config import BuildConfig, DType
from rt.cuda.probe import NO_GPU
from rt.errors import BuildError, ConfigError
from rt.export.forms import Request, check_options
from rt.export.tensorrt import forms, plan
from rt.export.tensorrt.plan import Options, build_plan, check_machine, timing_cache_file
from rt.export.tensorrt.refit import refit_plan
from rt.shapes import ShapeProfile

FLAGS = 1 << 0 | 1 << 2  # of the fake: strong typing, plugins as code


@pytest.fixture(scope="module")
def rtx() -> Any:
    """The real library. CI has it; without it there is nothing to test here."""
    return pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx-cu13 is not installed")


def write_graph(folder: Path, operator: str = "MatMul", weights: str | None = "w.weights") -> Path:
    """x (4, 64) times w (64, 64), the weights in a file beside the graph."""
    w = numpy_helper.from_array(np.ones((64, 64), np.float16), "w")
    if weights is not None:
        (folder / weights).write_bytes(w.raw_data)
        w.ClearField("raw_data")
        w.data_location = TensorProto.EXTERNAL
        for key, value in {"location": weights, "offset": "0", "length": "8192"}.items():
            w.external_data.add(key=key, value=value)
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT16, (4, 64))
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT16, (4, 64))
    graph = helper.make_graph(
        [helper.make_node(operator, ["x", "w"], ["y"], name="the node")], "g", [x], [y], [w]
    )
    path = folder / "graph.onnx"
    path.write_bytes(
        helper.make_model(
            graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10
        ).SerializeToString()
    )
    return path


def test_rtx_builds_a_plan_with_weights_from_beside_the_graph(rtx: Any, tmp_path: Path) -> None:
    build_plan(RTX, write_graph(tmp_path), tmp_path / "a.plan", Options())
    assert (tmp_path / "a.plan").stat().st_size > 8192


def test_the_parser_names_the_node(rtx: Any, tmp_path: Path) -> None:
    with pytest.raises(
        BuildError,
        match=r"^tensorrt-rtx cannot read graph\.onnx: node 'the node' \(Nonsense\): .*Plugin not found",
    ) as error:
        build_plan(RTX, write_graph(tmp_path, "Nonsense"), tmp_path / "a.plan", Options())
    assert "\n" not in str(error.value) and not (tmp_path / "a.plan").exists()


def test_missing_weights_are_one_line(rtx: Any, tmp_path: Path) -> None:
    graph = write_graph(tmp_path)
    (tmp_path / "w.weights").unlink()
    with pytest.raises(BuildError, match=r"^tensorrt-rtx cannot read graph\.onnx: \S.*") as error:
        build_plan(RTX, graph, tmp_path / "a.plan", Options())
    assert "\n" not in str(error.value)


def test_a_plan_keeps_weights_under_the_names_of_initializers(rtx: Any, tmp_path: Path) -> None:
    """What a refit of another graph with the same names relies on."""
    log = rtx.Logger(rtx.Logger.ERROR)
    network = rtx.Builder(log).create_network(0)
    parser = rtx.OnnxParser(network, log)
    assert parser.parse_from_file(str(write_graph(tmp_path)))
    assert network.mark_weights_refittable("w") and network.are_weights_marked_refittable("w")


def test_rtx_as_it_is_asked(trt: Any, tmp_path: Path) -> None:
    build_plan(RTX, write_graph(tmp_path), tmp_path / "a.plan", Options(portable=True))
    assert trt.named("create_network") == [(FLAGS,)]
    assert trt.named("clear_flag") == [("TF32",)]
    assert trt.named("set_flag") == [("REQUIRE_USER_ALLOCATION",)]
    assert trt.named("hardware_compatibility_level") == []
    assert (tmp_path / "a.plan").read_bytes() == b"a plan"


def test_classic_as_it_is_asked(trt: Any, tmp_path: Path) -> None:
    build_plan(CLASSIC, write_graph(tmp_path), tmp_path / "a.plan", Options(portable=True, refittable=True))
    assert trt.named("create_network") == [(FLAGS,)]
    assert trt.named("clear_flag") == [("TF32",)]
    assert trt.named("set_flag") == [("REFIT",)]
    assert trt.named("hardware_compatibility_level") == [("AMPERE_PLUS",)]


def test_a_version_without_a_flag_is_not_asked_for_it(
    fake_tensorrt: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fake = fake_tensorrt.Fake(flags=("STRONGLY_TYPED",))
    monkeypatch.setitem(sys.modules, "tensorrt", fake.module())
    build_plan(CLASSIC, write_graph(tmp_path), tmp_path / "a.plan", Options())
    assert fake.named("create_network") == [(1,)]


def test_a_build_that_fails_says_why(trt: Any, tmp_path: Path) -> None:
    trt.fails = {"build"}
    with pytest.raises(Exception, match=r"^tensorrt cannot build graph\.onnx: build went wrong$"):
        build_plan(CLASSIC, write_graph(tmp_path), tmp_path / "a.plan", Options())


def test_a_parser_without_a_reason() -> None:
    assert plan.parser_error(SimpleNamespace(num_errors=0)) == "no reason given"


def test_timings_are_kept_and_extended(trt: Any, tmp_path: Path) -> None:
    cache = tmp_path / "new" / "t.timing"
    for _ in range(2):
        build_plan(CLASSIC, write_graph(tmp_path), tmp_path / "a.plan", Options(timing_cache=cache))
    assert trt.named("set_timing_cache") == [(b"", False), (b"+", False)]
    assert cache.read_bytes() == b"++"
    assert list(cache.parent.iterdir()) == [cache], "written aside and renamed"


def test_timings_of_another_version_are_begun_anew(trt: Any, tmp_path: Path) -> None:
    cache = tmp_path / "t.timing"
    cache.write_bytes(b"old")
    trt.fails = {"set_timing_cache"}
    build_plan(CLASSIC, write_graph(tmp_path), tmp_path / "a.plan", Options(timing_cache=cache))
    assert trt.named("set_timing_cache") == [(b"old", False), (b"", False)]
    assert cache.read_bytes() == b"+"


def test_timings_lie_in_the_users_cache(trt: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    file = tmp_path / "rt" / "tensorrt-11.4.0.106-nvidia-h100-80gb-hbm3.timing"
    assert timing_cache_file(CLASSIC, "NVIDIA H100 80GB HBM3") == file
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert timing_cache_file(CLASSIC, "GPU").is_relative_to(Path(os.path.expanduser("~/.cache/rt")))


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """`gpu("")` is a machine with one, `gpu(NO_GPU)` one without."""
    return lambda problem: monkeypatch.setattr(plan, "gpu_problem", lambda: problem)


def test_what_needs_a_gpu_is_refused_before_any_work(gpu: Callable[[str], None]) -> None:
    gpu(NO_GPU)
    with pytest.raises(
        ConfigError, match=rf"^tensorrt times its kernels .*{NO_GPU}; build there, or with --backend"
    ):
        check_machine(CLASSIC, Options())
    with pytest.raises(ConfigError, match=rf"^--refittable {NO_GPU}; build there, or without it"):
        check_machine(RTX, Options(refittable=True))
    check_machine(RTX, Options())
    gpu("")
    check_machine(CLASSIC, Options(refittable=True))


def config(backend: str = "tensorrt", **more: Any) -> BuildConfig:
    return BuildConfig(profiles=(ShapeProfile(64, 64),), dtype=DType.FP16, backend=backend, **more)


def request_for(made: BuildConfig, donor: Bundle | None = None) -> Request:
    return Request(stage=Path("out"), config=made, donor=donor)


@pytest.mark.parametrize("option", ["refittable", "portable", "tune"])
def test_options_of_tensorrt_are_refused_for_others(option: str) -> None:
    with pytest.raises(ConfigError, match=rf"^--{option} is for TensorRT, and this build is for openvino; "):
        check_options(get("openvino"), request_for(config("openvino", **{option: True})))
    check_options(get("openvino"), request_for(config("openvino")))


def test_rtx_has_nothing_to_tune(gpu: Callable[[str], None]) -> None:
    gpu("")
    with pytest.raises(ConfigError, match=r"^--tune compares our plugins .* takes no plugins; leave it out"):
        check_options(get("tensorrt-rtx"), request_for(config("tensorrt-rtx", tune=True)))


class Donor:
    """As much of a bundle as a refit asks for."""

    def __init__(self, made: BuildConfig, path: Path = Path("old")) -> None:
        self.path = path
        self.manifest = type("Manifest", (), {"config": made})


@pytest.mark.parametrize(
    ("old", "message"),
    [
        (
            config(),
            "^old has no refittable plans for tensorrt; build it with --backend tensorrt --refittable$",
        ),
        (config("tensorrt-rtx", refittable=True), "^old has no refittable plans for tensorrt; "),
        (
            config(refittable=True, step_cache=True),
            "^old was built with other options; a refit keeps --height",
        ),
        (config(refittable=True, portable=True), "^old was built with other options; "),
    ],
)
def test_a_donor_that_cannot_be_refit(gpu: Callable[[str], None], old: BuildConfig, message: str) -> None:
    gpu("")
    with pytest.raises(ConfigError, match=message):
        check_options(get("tensorrt"), request_for(config(refittable=True), Donor(old)))  # type: ignore[arg-type]
    good = Donor(config(refittable=True))
    check_options(get("tensorrt"), request_for(config(), good))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"^--refit is for TensorRT"):
        check_options(get("openvino"), request_for(config("openvino"), good))  # type: ignore[arg-type]


@pytest.fixture
def old_plan(fake_tensorrt: Any, tmp_path: Path) -> Callable[[bool], Path]:
    def write(refittable: bool = True) -> Path:
        path = tmp_path / "old.plan"
        path.write_bytes(fake_tensorrt.Plan((), refittable=refittable).to_bytes())
        return path

    return write


def test_a_refit_takes_the_weights_of_a_graph(trt: Any, old_plan: Any, tmp_path: Path) -> None:
    refit_plan(CLASSIC, old_plan(), write_graph(tmp_path), tmp_path / "new.plan")
    assert (tmp_path / "new.plan").read_bytes() == old_plan().read_bytes() + b" refitted"
    assert [name for name, _ in trt.calls] == ["deserialize", "parse", "refit"]


@pytest.mark.parametrize(
    ("bend", "message"),
    [
        (
            {"fails": {"deserialize"}},
            r"^tensorrt cannot load .*old\.plan: deserialize went wrong; build without",
        ),
        ({"refittable": False}, r"old\.plan keeps its weights; build that bundle with --refittable"),
        (
            {"parser_errors": [("shape\n differs", "MatMul", "m")]},
            r"^the weights of graph\.onnx do not fit .*: node 'm' \(MatMul\): shape differs$",
        ),
        (
            {"missing": ["a", "b", "c", "d"]},
            r"^graph\.onnx lacks weights of .*old\.plan: a, b, c; build without",
        ),
        ({"fails": {"refit"}}, r"^tensorrt cannot refit .*old\.plan: refit went wrong$"),
    ],
)
def test_a_refit_that_fails(
    trt: Any, old_plan: Any, tmp_path: Path, bend: dict[str, Any], message: str
) -> None:
    old = old_plan(bend.pop("refittable", True))
    for name, value in bend.items():
        setattr(trt, name, value)
    with pytest.raises(BuildError, match=message):
        refit_plan(CLASSIC, old, write_graph(tmp_path), tmp_path / "new.plan")
    assert not (tmp_path / "new.plan").exists()


def test_both_flavours_have_a_writer() -> None:
    assert {name: writer.reads_fused for name, writer in forms.WRITERS.items()} == {
        "tensorrt": True,
        "tensorrt-rtx": False,
    }
