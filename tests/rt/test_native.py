"""Our CPU kernels under OpenVINO; where they are not built, that everything says so and goes on."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from rt.backends import BACKENDS, Form, native
from rt.backends.openvino_cpu import OpenVINO
from rt.bundle import Bundle
from rt.config import DType
from rt.engines import Engines
from rt.model import Component
from rt.verify import verify

built = pytest.mark.skipif(not native.LIBRARY.exists(), reason="the native kernels are not built")
pays = pytest.mark.skipif(
    Form.FUSED not in OpenVINO().forms(DType.BF16), reason="the native kernels are not used on this machine"
)


def test_a_missing_library_is_said_and_missed_by_nothing(tmp_path: Path) -> None:
    state = native.kernels(tmp_path / "librt_openvino.so")
    assert not state and "not built" in state.problem and native.BUILD in state.problem


def test_a_library_that_does_not_load_is_said(tmp_path: Path) -> None:
    library = tmp_path / "librt_openvino.so"
    library.write_bytes(b"not a library")
    state = native.kernels(library)
    assert not state and "another OpenVINO" in state.problem and "\n" not in state.problem


@built
def test_an_instruction_set_that_the_processor_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    BACKENDS["openvino"].available()  # loads what the kernels link to
    monkeypatch.setenv("RT_ISA", "quantum")
    state = native.kernels()
    assert not state and "quantum" in state.problem


@pays
def test_fused_graphs_run_in_bf16_alone() -> None:
    assert native.kernels().instruction_set == os.environ.get("RT_ISA", native.BEST)
    for dtype in (DType.FP32, DType.FP16):
        assert OpenVINO().forms(dtype) == (Form.ONNX,)
    assert BACKENDS["onnxruntime"].forms(DType.BF16) == (Form.ONNX,)


@pays
def test_the_fused_step_is_chosen_and_as_close_as_the_other(
    bf16: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = next(r for r in bf16.manifest.engines if r.component is Component.UNET and r.guided)
    assert record.form(OpenVINO()) == record.forms[Form.FUSED]
    assert record.form(BACKENDS["onnxruntime"]) == record.forms[Form.ONNX]
    backend = OpenVINO()
    fused = dict(_errors(bf16, backend))
    monkeypatch.setattr(OpenVINO, "forms", lambda self, dtype: (Form.ONNX,))
    assert record.form(backend) == record.forms[Form.ONNX]
    plain = dict(_errors(bf16, backend))
    for name, error in fused.items():
        assert error <= 2 * plain[name] + 2e-3, name


@pays
def test_engines_run_the_fused_graph(bf16: Bundle) -> None:
    engines = Engines(bf16, "openvino")
    profile = bf16.manifest.config.profiles[0]
    unet = engines.get(Component.UNET, profile, guided=True)
    for buffer in unet.inputs.values():
        buffer[:] = np.random.default_rng().standard_normal(buffer.shape)
    unet.enqueue()
    first = unet.outputs["prediction"].copy()
    unet.outputs["prediction"].fill(np.nan)
    unet.enqueue()
    np.testing.assert_array_equal(unet.outputs["prediction"], first)


@pays
def test_verify_runs_both_graphs(bf16: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = []
    load = OpenVINO.load

    def watched(self: OpenVINO, path: Path, *rest: object, **options: object) -> object:
        loaded.append(path.name)
        return load(self, path, *rest, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(OpenVINO, "load", watched)
    _errors(bf16, OpenVINO())
    fused = [record for record in bf16.manifest.engines if Form.FUSED in record.forms]
    assert {Path(record.forms[Form.ONNX]).name for record in bf16.manifest.engines} <= {*loaded}
    assert fused and {Path(record.forms[Form.FUSED]).name for record in fused} <= {*loaded}


def _errors(bundle: Bundle, backend: OpenVINO) -> list[tuple[str, float]]:
    return [(record.name, max(errors.values())) for record, errors in verify(bundle, backend)]


@pytest.fixture(scope="module")
def bf16(build_bundle: Callable[..., Path]) -> Bundle:
    return Bundle.open(build_bundle("synthetic:tiny", dtype="bf16"))
