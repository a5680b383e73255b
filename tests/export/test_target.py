"""Which backend a build for "auto" is for, before the work and when a compile fails in the middle of it."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch._inductor.exc import CppCompileError

from rt.backends import AUTO, BACKENDS, Form
from rt.backends.ort_cpu import OnnxRuntime
from rt.bundle import MANIFEST, Bundle
from rt.config import DType
from rt.errors import AccuracyError, BackendError, BackendUnavailableError, BuildError, ConfigError
from rt.export import build as build_module
from rt.export import inductor
from rt.export.build import build
from rt.export.forms import Request, Writer
from rt.verify import verify

from .test_build import config, toy


class Compiling(OnnxRuntime):
    """A backend with a form of its own, of the family of inductor: the graph under another name.

    Attributes:
        refuses_machine: What its check says.
        broken: What its compiler raises, by the name of a program.
        unloadable: What loading raises, likewise.
        compiled: Programs, in order.
    """

    name = "inductor-fake"
    form = Form.INDUCTOR_CPU

    def __init__(self) -> None:
        super().__init__()
        self.refuses_machine = ""
        self.broken: dict[str, Exception] = {}
        self.unloadable: dict[str, Exception] = {}
        self.compiled: list[str] = []

    def forms(self, dtype: DType) -> tuple[Form, ...]:
        return (self.form,)

    def load(self, path: Path, *specs: Any, **options: Any) -> Any:
        if error := self.unloadable.get(path.name.partition(".")[0]):
            raise error
        return super().load(path, *specs, **options)

    def check(self, request: Request) -> None:
        if self.refuses_machine:
            raise BackendUnavailableError(self.refuses_machine)

    def compile(self, program: Any, module: Any, weights: Any, request: Request) -> Mapping[Form, str]:
        self.compiled.append(program.name)
        path = f"engines/{program.name}.{self.form.value}"
        if error := self.broken.get(program.name):
            (request.stage / path).write_bytes(b"half")
            raise error
        shutil.copyfile(request.stage / f"engines/{program.name}.onnx", request.stage / path)
        return {self.form: path}


@pytest.fixture
def compiling(monkeypatch: pytest.MonkeyPatch) -> Compiling:
    """Preferred to ONNX Runtime, and nothing else is there."""
    made = Compiling()
    monkeypatch.setattr(
        "rt.backends.BACKENDS", {made.name: made, OnnxRuntime.name: BACKENDS[OnnxRuntime.name]}
    )
    writers = {made.name: Writer(check=made.check, compile=made.compile)}
    monkeypatch.setattr(inductor, "WRITERS", writers)
    return made


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """What a build for ONNX Runtime gives."""
    return build(toy(), tmp_path_factory.mktemp("graphs") / "bundle", config())


def auto(path: Path, **options: Any) -> Bundle:
    return build(toy(), path, replace(config(backend=AUTO), **options))


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [
        record.getMessage()
        for record in caplog.records
        if (record.levelname, record.name) == ("WARNING", "rt.export.target")
    ]


def is_that_of(graphs: Bundle, bundle: Bundle) -> None:
    """The same bytes as a build that was for that backend from the beginning."""
    assert bundle.manifest.files == graphs.manifest.files
    made, wanted = (json.loads((each.path / MANIFEST).read_bytes()) for each in (bundle, graphs))
    assert (made["config"], made["fingerprint"]) == (wanted["config"], wanted["fingerprint"])
    assert len([*bundle.path.parent.iterdir()]) == 1
    assert len([*verify(bundle, BACKENDS[OnnxRuntime.name])]) == len(graphs.manifest.engines)


def test_what_can_be_built_for_is_taken(
    compiling: Compiling, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bundle = auto(tmp_path / "bundle")
    assert bundle.manifest.config.backend == compiling.name and not warnings(caplog)
    assert compiling.compiled == [engine.name for engine in bundle.manifest.engines]
    assert all(compiling.form in engine.forms for engine in bundle.manifest.engines)


def test_what_this_machine_cannot_build_for_is_passed_over(
    compiling: Compiling, graphs: Bundle, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    compiling.refuses_machine = "there is no compiler; install one"
    is_that_of(graphs, auto(tmp_path / "bundle"))
    assert compiling.compiled == []
    assert warnings(caplog) == [
        "onnxruntime: computes fp32 graphs in f32; not inductor-fake (there is no compiler; install one)"
    ]
    with pytest.raises(BackendUnavailableError, match=r"^there is no compiler; install one$"):
        build(toy(), tmp_path / "other", config(backend=compiling.name))


LINK = CppCompileError(
    ["g++", "x.o"], "/usr/bin/ld: cannot find -lcuda\ncollect2: error: ld returned 1 exit status"
)
SAID = "unet-1x16x16-guided: compile: C++ compile error: ld: cannot find -lcuda"


def test_a_compile_that_fails_leads_to_the_next_backend(
    compiling: Compiling, graphs: Bundle, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    compiling.broken["unet-1x16x16-guided"] = LINK
    is_that_of(graphs, auto(tmp_path / "bundle"))
    assert len(compiling.compiled) == 4, "others were compiled before it"
    assert warnings(caplog) == [f"onnxruntime: computes fp32 graphs in f32; not inductor-fake ({SAID})"]


def test_who_asks_for_a_backend_gets_its_error(compiling: Compiling, tmp_path: Path) -> None:
    compiling.broken["unet-1x16x16-guided"] = LINK
    asked = config(backend=compiling.name)
    for wish in (asked, replace(asked, backend=AUTO, max_autotune=True)):
        with pytest.raises(BuildError, match=f"^{re.escape(SAID)}; nothing was left behind$") as error:
            build(toy(), tmp_path / "bundle", wish)
        assert error.value.__cause__ is LINK
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            BackendError("inductor cannot load it: no symbol"),
            "text_encoder: verify: inductor cannot load it: no symbol",
        ),
        (MemoryError(), "text_encoder: verify: out of memory"),
        (RuntimeError("CUDA error\nof some kind"), "text_encoder: verify: CUDA error"),
    ],
)
def test_an_engine_that_does_not_run_leads_to_the_next_backend(
    compiling: Compiling,
    graphs: Bundle,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    error: Exception,
    said: str,
) -> None:
    compiling.unloadable["text_encoder"] = error
    is_that_of(graphs, auto(tmp_path / "bundle"))
    assert warnings(caplog) == [f"onnxruntime: computes fp32 graphs in f32; not inductor-fake ({said})"]


def test_a_full_disk_is_no_fault_of_the_backend(compiling: Compiling, tmp_path: Path) -> None:
    compiling.broken["text_encoder"] = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with pytest.raises(BuildError, match=r"bundle could not be written: No space left on device"):
        auto(tmp_path / "bundle")
    assert compiling.compiled == ["text_encoder"] and not any(tmp_path.iterdir())


def test_without_another_backend_all_reasons_are_said(
    compiling: Compiling, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rt.backends.BACKENDS", {compiling.name: compiling})
    compiling.broken["text_encoder"] = LINK
    with pytest.raises(
        BackendUnavailableError,
        match=r"^no engine can run fp32 graphs: inductor-fake \(text_encoder: compile: C\+\+",
    ) as error:
        auto(tmp_path / "bundle")
    assert "\n" not in str(error.value) and not any(tmp_path.iterdir())


def test_a_wrong_graph_is_not_built_again(
    compiling: Compiling, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a backend that compiles nothing: the next one would run the same graph."""
    compiling.refuses_machine = "no"
    checked: list[str] = []

    def wrong(record: Any, *rest: Any) -> Any:
        checked.append(record.name)
        raise AccuracyError("far off")

    monkeypatch.setattr(build_module, "check", wrong)
    with pytest.raises(AccuracyError, match=r"^far off$"):
        auto(tmp_path / "bundle")
    assert checked == ["text_encoder"]


def test_an_option_of_another_backend_is_refused(
    compiling: Compiling, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    compiling.refuses_machine = "there is no compiler"
    with pytest.raises(
        ConfigError, match=r"^--max-autotune is for inductor, and this build is for onnxruntime;"
    ):
        auto(tmp_path / "bundle", max_autotune=True)
    assert "not inductor-fake (there is no compiler)" in caplog.text, "and why it is not for inductor"


def test_the_command_says_what_it_was_built_for(
    compiling: Compiling, graphs: Bundle, capfd: pytest.CaptureFixture[str]
) -> None:
    from rt.cli.build import _report

    _report(graphs, 12.0)
    assert capfd.readouterr().err.strip().endswith("MiB; onnxruntime computes fp32 graphs in f32")
