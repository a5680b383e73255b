"""Every engine behind the seam: which one is taken, that it computes, and what it says when it cannot."""

from __future__ import annotations

import json
import shutil
import tracemalloc
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed_version
from pathlib import Path

import numpy as np
import pytest

from rt.backends import (
    AUTO,
    BACKENDS,
    ON_HOST,
    Backend,
    Engine,
    Form,
    choose,
    get,
    inductor,
    openvino_cpu,
    ort_cpu,
)
from rt.backends.base import failure
from rt.bundle import Bundle, EngineRecord
from rt.config import DType
from rt.errors import BackendError, BackendUnavailableError, ConfigError
from rt.pipeline import Pipeline

NAMES = [name for name in ON_HOST if Form.ONNX in BACKENDS[name].forms(DType.FP32)]
"""Those that run a bundle of any build."""
INSTALL = {"openvino": 'pip install "openvino>=', "onnxruntime": 'pip install "onnxruntime>='}


VOCABULARY = Path(__file__).parents[2] / "examples" / "emoji-ldm" / "tokenizer" / "vocab.json"
END = max(json.loads(VOCABULARY.read_text(encoding="utf-8")).values())


@pytest.fixture
def uninstall(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`uninstall("openvino")`: as if that package were not there."""

    def hide(*names: str) -> None:
        def version(package: str) -> str:
            if package.removesuffix("-gpu") in names:
                raise PackageNotFoundError(package)
            return installed_version(package)

        for module in (openvino_cpu, ort_cpu, inductor):
            monkeypatch.setattr(module, "version", version)

    return hide


@pytest.fixture(scope="module")
def demo(demo_bundle: Path) -> Bundle:
    return Bundle.open(demo_bundle)


@pytest.fixture
def load(demo: Bundle) -> Callable[[str, EngineRecord], Engine]:
    return lambda name, record: get(name).load(
        demo.path / record.forms[Form.ONNX], record.inputs, record.outputs, dtype=DType.FP32, threads=1
    )


def fill(engine: Engine, seed: int) -> None:
    """Fresh inputs, the same for every engine of a seed; NaN where the outputs will be."""
    rng = np.random.default_rng(seed)
    for name, buffer in engine.inputs.items():
        if name == "tokens":
            buffer[...] = rng.integers(0, END, buffer.shape)
            buffer[..., -1] = END  # the pooled state is read at an end of text
        else:
            buffer[...] = (
                rng.integers(1, 999, buffer.shape) if name == "timestep" else rng.normal(size=buffer.shape)
            )
    for buffer in engine.outputs.values():
        buffer.fill(np.nan)


@pytest.mark.parametrize("dtype", DType)
@pytest.mark.parametrize("name", NAMES)
def test_a_backend_asked_for_by_name_is_taken_or_refused(name: str, dtype: DType) -> None:
    if (name, dtype) == ("onnxruntime", DType.BF16):
        with pytest.raises(
            ConfigError, match=r"onnxruntime cannot run bf16 graphs: .*--backend openvino or rebuild"
        ):
            choose(name, dtype)
        return
    backend, why = choose(name, dtype, preferred="the other one")
    assert (backend.name, why) == (name, f"{name}: as asked")


@pytest.mark.parametrize(
    ("missing", "dtype", "preferred", "expected", "why"),
    [
        ((), DType.FP32, "", "openvino", "openvino: computes fp32 graphs in f32"),
        ((), DType.FP32, "onnxruntime", "onnxruntime", "onnxruntime: computes fp32 graphs in f32"),
        ((), DType.FP16, "onnxruntime", "onnxruntime", "onnxruntime: computes fp16 graphs in f16"),
        ((), DType.BF16, "onnxruntime", "openvino", "not onnxruntime (its CPU kernels"),
        (
            ("openvino",),
            DType.FP32,
            "openvino",
            "onnxruntime",
            "not openvino (not installed; run: pip install",
        ),
        (
            ("openvino",),
            DType.FP16,
            "",
            "onnxruntime",
            "onnxruntime: computes fp16 graphs in f16; not openvino",
        ),
        (("onnxruntime",), DType.BF16, "", "openvino", "openvino: computes bf16 graphs in "),
        ((), DType.INT8, "", "openvino", "openvino: computes int8 graphs in int8 and "),
        (("openvino",), DType.INT8, "", "onnxruntime", "onnxruntime: computes int8 graphs in int8 and f32"),
        (("onnxruntime",), DType.FP32, "onnxruntime", "openvino", "not onnxruntime (not installed; run: pip"),
        ((), DType.FP32, "gone", "openvino", "openvino: computes fp32"),
    ],
)
def test_auto_prefers_what_the_bundle_was_verified_with_and_says_why(
    uninstall: Callable[..., None],
    missing: tuple[str, ...],
    dtype: DType,
    preferred: str,
    expected: str,
    why: str,
) -> None:
    uninstall(*missing)
    backend, reason = choose(AUTO, dtype, preferred)
    assert backend.name == expected
    assert why in reason and "\n" not in reason


@pytest.mark.parametrize(("missing", "dtype"), [(NAMES, DType.FP32), (["openvino"], DType.BF16)])
def test_auto_without_a_candidate_names_each_and_what_would_help(
    uninstall: Callable[..., None], missing: list[str], dtype: DType
) -> None:
    uninstall(*missing, "torch")
    with pytest.raises(BackendUnavailableError, match=f"^no engine can run {dtype.value} graphs: ") as error:
        choose(AUTO, dtype)
    assert error.value.exit_code == 4
    for name in missing:
        assert f"{name} (not installed; run: {INSTALL[name]}" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", NAMES)
def test_a_backend_that_is_not_installed_gives_the_exact_install_line(
    uninstall: Callable[..., None], name: str
) -> None:
    uninstall(name)
    assert not BACKENDS[name].available()
    with pytest.raises(BackendUnavailableError) as error:
        choose(name, DType.FP32)
    assert str(error.value).startswith(f"{name}: not installed; run: {INSTALL[name]}")
    assert str(error.value).endswith('"')


def test_a_backend_that_the_bundle_was_not_built_for_is_refused_or_passed_over() -> None:
    def unfit(backend: Backend) -> str:
        return "built as a stone; rebuild with --backend openvino" if backend.name != "onnxruntime" else ""

    with pytest.raises(
        ConfigError, match=r"^openvino cannot run this bundle: built as a stone; rebuild with"
    ):
        choose("openvino", DType.FP32, unfit=unfit)
    backend, reason = choose(AUTO, DType.FP32, "openvino", unfit)
    assert backend.name == "onnxruntime" and "not openvino (built as a stone;" in reason
    with pytest.raises(BackendUnavailableError, match=r"openvino \(built as a stone"):
        choose(AUTO, DType.BF16, unfit=unfit)


def test_an_unknown_backend_is_refused_with_the_nearest() -> None:
    with pytest.raises(
        ConfigError, match=r"'openvin' does not exist \(did you mean 'openvino'\?\); use one of auto"
    ):
        choose("openvin", DType.FP32)
    with pytest.raises(
        ConfigError,
        match="'coreml' does not exist; use one of auto, tensorrt, tensorrt-rtx, inductor, onnxruntime-cuda, ",
    ):
        get("coreml")


def test_what_is_installed_is_available_with_its_version() -> None:
    for name in NAMES:
        assert BACKENDS[name].available().version == installed_version(name)
        assert not BACKENDS[name].available().problem


@pytest.mark.parametrize("name", NAMES)
def test_buffers_have_the_recorded_shapes_and_keep_their_address(
    demo: Bundle, load: Callable[[str, EngineRecord], Engine], name: str
) -> None:
    record = demo.manifest.engines[-1]
    engine = load(name, record)
    for specs, buffers in ((record.inputs, engine.inputs), (record.outputs, engine.outputs)):
        assert [(s.name, s.shape, s.dtype) for s in specs] == [
            (key, buffer.shape, str(buffer.dtype)) for key, buffer in buffers.items()
        ]
    buffers = [*engine.inputs.values(), *engine.outputs.values()]
    before = [buffer.ctypes.data for buffer in buffers]
    results = []
    for seed in (1, 2, 1):
        fill(engine, seed)
        engine.enqueue()
        results.append(engine.outputs["image"].copy())
    assert [buffer.ctypes.data for buffer in (*engine.inputs.values(), *engine.outputs.values())] == before
    assert np.array_equal(results[0], results[2])
    assert not np.allclose(results[0], results[1])


@pytest.mark.parametrize("name", NAMES)
def test_a_call_allocates_no_arrays(
    demo: Bundle, load: Callable[[str, EngineRecord], Engine], name: str
) -> None:
    engine = load(name, demo.manifest.engines[-1])
    fill(engine, 0)
    engine.enqueue()
    tracemalloc.start()
    try:
        for _ in range(3):
            engine.enqueue()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < min(buffer.nbytes for buffer in engine.outputs.values()) / 4


def test_the_engines_agree_in_fp32(demo: Bundle, load: Callable[[str, EngineRecord], Engine]) -> None:
    seed = np.random.SeedSequence().entropy
    for record in demo.manifest.engines:
        results = []
        for name in NAMES:
            engine = load(name, record)
            fill(engine, seed)  # type: ignore[arg-type]
            engine.enqueue()
            results.append({key: value.copy() for key, value in engine.outputs.items()})
        for key, expected in results[0].items():
            distance = np.linalg.norm(results[1][key] - expected) / np.linalg.norm(expected)
            assert distance < 1e-5, (record.name, key, seed)


def garble(graph: Path, weights: Path) -> None:
    graph.write_bytes(np.random.default_rng().bytes(4096))


def truncate(graph: Path, weights: Path) -> None:
    graph.write_bytes(graph.read_bytes()[: graph.stat().st_size // 2])


def truncate_weights(graph: Path, weights: Path) -> None:
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])


def lose_weights(graph: Path, weights: Path) -> None:
    weights.unlink()


@pytest.mark.parametrize("damage", [garble, truncate, truncate_weights, lose_weights])
@pytest.mark.parametrize("name", NAMES)
def test_a_damaged_engine_is_one_line(
    demo: Bundle,
    tmp_path: Path,
    name: str,
    damage: Callable[[Path, Path], None],
    capfd: pytest.CaptureFixture[str],
) -> None:
    record = demo.manifest.engines[-1]
    shutil.copytree(demo.path / "engines", tmp_path / "engines")
    damage(tmp_path / record.forms[Form.ONNX], tmp_path / record.weights)
    with pytest.raises(BackendError) as error:
        get(name).load(
            tmp_path / record.forms[Form.ONNX], record.inputs, record.outputs, dtype=DType.FP32, threads=1
        )
    assert str(error.value).startswith(f"{name} cannot load {tmp_path / record.forms[Form.ONNX]}: ")
    assert "\n" not in str(error.value) and error.value.exit_code == 1
    if name == "onnxruntime":
        assert capfd.readouterr().err == "", "the library logs what it raises"


@pytest.mark.parametrize(
    "reason", ["std::bad_alloc", "can't alloc", "Failed to allocate memory for requested buffer"]
)
def test_a_library_out_of_memory_is_a_memory_error(monkeypatch: pytest.MonkeyPatch, reason: str) -> None:
    import onnxruntime

    def fail(*args: object, **options: object) -> None:
        raise RuntimeError(f"Exception from src/core.cpp:1\n{reason}\n")

    monkeypatch.setattr(onnxruntime, "InferenceSession", fail)
    monkeypatch.setattr(get("openvino")._core, "read_model", fail, raising=False)  # type: ignore[attr-defined]
    for name in NAMES:
        with pytest.raises(MemoryError, match=f"{name} cannot load some.onnx"):
            get(name).load(Path("some.onnx"), (), (), dtype=DType.FP32, threads=1)


@pytest.mark.parametrize(
    "reason",
    [
        "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 8.00 GiB",
        "IExecutionContext: Error Code 2: OutOfMemory (Requested size was 4294967296 bytes.)",
    ],
)
def test_a_gpu_out_of_memory_is_a_memory_error(reason: str) -> None:
    error = failure("inductor cannot load some.pt2", RuntimeError(reason), "the first line")
    assert type(error) is MemoryError and str(error) == "inductor cannot load some.pt2"
    other = failure("inductor cannot load some.pt2", RuntimeError("the file is cut"), "the file is cut")
    assert isinstance(other, BackendError) and str(other) == "inductor cannot load some.pt2: the file is cut"


@pytest.mark.parametrize("name", NAMES)
def test_an_engine_that_fails_while_running_is_one_line(
    demo: Bundle, load: Callable[[str, EngineRecord], Engine], name: str
) -> None:
    class Broken:
        def start_async(self, *args: object) -> None:
            raise RuntimeError("Exception from src/infer.cpp:1:\nthe lights\nwent out\n")

        run_with_iobinding = start_async

        def wait(self) -> None:
            """Returns at once, as of a request that was never started."""

    engine = load(name, demo.manifest.engines[-1])
    holder, attribute = (engine, "_request") if name == "openvino" else (engine._session, "_session")  # type: ignore[attr-defined]
    setattr(holder, attribute, Broken())
    with pytest.raises(BackendError, match=f"^{name} failed while running: .*went out$") as error:
        engine.enqueue()
    assert "\n" not in str(error.value)


def test_ctrl_c_does_not_leave_openvino_computing(
    demo: Bundle, load: Callable[[str, EngineRecord], Engine]
) -> None:
    waited = []

    class Interrupted:
        def start_async(self) -> None:
            raise KeyboardInterrupt

        def wait(self) -> None:
            waited.append(True)

    engine = load("openvino", demo.manifest.engines[-1])
    setattr(engine, "_request", Interrupted())  # noqa: B010  # it is no attribute of an Engine
    with pytest.raises(KeyboardInterrupt):
        engine.enqueue()
    assert waited == [True]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backend", "dtype", "limit"),
    [("openvino", "fp32", 1e-4), ("onnxruntime", "fp32", 1e-4), ("openvino", "bf16", 0.05)],
)
def test_two_threads_draw_what_one_draws(
    build_bundle: Callable[..., Path], backend: str, dtype: str, limit: float
) -> None:
    """A worker of the suite has one thread otherwise. Of the largest latent; bf16 sums in another order."""
    bundle = build_bundle("synthetic:tiny", dtype=dtype)
    drawn = []
    for threads in (1, 2):
        with Pipeline.from_bundle(bundle, backend=backend, threads=threads) as pipe:
            call = {"num_inference_steps": 3, "seed": 5, "output_type": "latent"}
            drawn.append(np.asarray(pipe("a red heart", **call).images))
    assert np.abs(drawn[0] - drawn[1]).max() <= limit * np.abs(drawn[0]).max() > 0
