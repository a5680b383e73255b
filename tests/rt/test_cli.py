"""The command line: paths on stdout, everything else on stderr, one line and an exit code for what goes wrong."""

from __future__ import annotations

import errno
import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rt import session
from rt.backends import BACKENDS, ON_HOST, Availability, get, inductor, openvino_cpu, ort_cpu
from rt.bundle import MANIFEST, Bundle
from rt.cli import run
from rt.cli.main import main
from rt.errors import RtError
from rt.model import Component
from rt.processors import Processors

LONG = "warning: the prompt has "
VERBS = ("build", "run", "inspect", "verify", "bench", "doctor")
FAST = ("--steps", "2", "--seed", "7")


@dataclass(frozen=True)
class Result:
    code: object
    out: str
    err: str

    @property
    def error(self) -> str:
        """The only line on stderr, which begins with `error: `; nothing is on stdout."""
        assert self.out == ""
        assert self.err.strip().startswith("error: ") and "\n" not in self.err.strip(), self.err
        return self.err.strip().removeprefix("error: ")


Rt = Callable[..., Result]


@pytest.fixture
def rt(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Iterator[Rt]:
    """`rt("run", path, ...)`: the whole command line in this process, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    logger = logging.getLogger("rt")
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGALRM)}
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    handlers, level = logger.handlers[:], logger.level

    def call(*args: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["rt", *map(str, args)])
        with pytest.raises(SystemExit) as stop:
            main()
        logger.handlers[:] = handlers
        captured = capsys.readouterr()
        return Result(stop.value.code or 0, captured.out, captured.err)

    yield call
    logger.setLevel(level)
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def process(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """`process("run", path, ...)`: the command as users start it, from a folder that is not the repository."""

    def call(*args: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "rt", *map(str, args)],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            check=False,
        )

    return call


@pytest.fixture
def no_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail the test when an engine is loaded."""

    def load(*args: object, **options: object) -> None:
        raise AssertionError("an engine was loaded")

    for backend in BACKENDS.values():
        monkeypatch.setattr(backend, "load", load)


# Help


@pytest.mark.parametrize("args", [[], *([verb] for verb in VERBS)])
def test_help_fits_100_columns(rt: Rt, monkeypatch: pytest.MonkeyPatch, args: list[str]) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    result = rt(*args, "--help")
    assert (result.code, result.err) == (0, "")
    assert result.out.startswith("Usage: rt") and max(map(len, result.out.splitlines())) <= 100
    assert all(verb in result.out for verb in VERBS if not args)


def test_without_a_verb_the_help_is_shown(rt: Rt) -> None:
    result = rt()
    assert (result.code, result.err) == (0, "")
    assert result.out.startswith("Usage:") and "doctor" in result.out


def test_the_version_is_the_packages(rt: Rt) -> None:
    from importlib.metadata import version

    assert rt("--version").out == f"rt, version {version('rt-diffusion')}\n"


# Happy paths


def test_run_prints_the_path_alone_and_writes_a_picture_of_the_size(
    process: Rt, demo_bundle: Path, tmp_path: Path
) -> None:
    done = process("run", demo_bundle, "--prompt", "a red heart", *FAST, "--clip-skip", 1, "-o", "heart.png")
    assert (done.returncode, done.stdout, done.stderr) == (0, "heart.png\n", "")  # type: ignore[attr-defined]
    with Image.open(tmp_path / "heart.png") as image:
        assert image.size == (64, 64)
        assert "a red heart" in image.info["parameters"] and "Seed: 7" in image.info["parameters"]
        assert ", RNG: CPU, " in image.info["parameters"]
        assert ", Clip skip: 2, " in image.info["parameters"]  # as others count, from the last layer on


def test_underscores_are_dashes(rt: Rt, demo_bundle: Path, tmp_path: Path) -> None:
    options = (
        "--num_inference_steps",
        2,
        "--guidance_scale=3",
        "--num_images_per_prompt",
        2,
        "--no_metadata",
    )
    result = rt("run", demo_bundle, "--prompt", "x", "--seed", 1, *options, "-o", "x.png")
    assert (result.code, result.out, result.err) == (0, "x-000.png\nx-001.png\n", "")
    with Image.open(tmp_path / "x-000.png") as image:
        assert "parameters" not in image.info


def test_run_json_says_what_was_drawn_with_what(rt: Rt, demo_bundle: Path) -> None:
    result = rt(
        "run", demo_bundle, "--prompt", "x", *FAST, "-n", 2, "-o", "out/", "--json", "--scheduler", "euler"
    )
    summary = json.loads(result.out)
    assert result.code == 0 and result.err == ""
    assert [image["seed"] for image in summary["images"]] == [7, 8]
    assert all(Path(image["path"]).is_file() for image in summary["images"])
    assert summary["scheduler"] == "euler" and summary["backend"] == "openvino"
    assert summary["timings"]["steps"] == 2 and summary["timings"]["total_s"] > 0


def test_run_draws_several_prompts_and_a_sheet(rt: Rt, demo_bundle: Path, tmp_path: Path) -> None:
    prompts = ("-p", "a red heart", "-p", "a pizza")
    result = rt(
        "run", demo_bundle, *prompts, *FAST, "-n", 2, "-o", "out/", "--sheet", "out/sheet.png", "--json"
    )
    summary = json.loads(result.out)
    images = summary["images"]
    assert summary["sheet"] == "out/sheet.png"
    assert [image["prompt"] for image in images] == ["a red heart"] * 2 + ["a pizza"] * 2
    assert [image["seed"] for image in images] == [7, 8, 9, 10]
    alone = rt("run", demo_bundle, "-p", "a pizza", *FAST[:-1], 9, "-o", "alone.png")
    assert alone.code == 0
    with Image.open(tmp_path / "alone.png") as one, Image.open(images[2]["path"]) as other:
        assert np.abs(np.asarray(one, int) - np.asarray(other, int)).max() <= 1
        assert one.info["parameters"] == other.info["parameters"]
    with Image.open(tmp_path / "out" / "sheet.png") as page:
        assert page.width == 4 * (128 + 12) + 12


def test_a_folder_for_the_sheet(rt: Rt, demo_bundle: Path, tmp_path: Path) -> None:
    result = rt("run", demo_bundle, "-p", "a pizza", *FAST, "-o", "out/", "--sheet", "out/")
    assert result.code == 0, result.error
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["7-000.png", "sheet.png"]


def test_inspect_describes_and_json_is_the_manifest(rt: Rt, demo_bundle: Path, no_engine: None) -> None:
    described = rt("inspect", demo_bundle)
    assert described.code == 0 and described.err == ""
    for word in (
        "emoji-ldm (folder), sd1",
        "fp32 for openvino",
        "1 x 64 x 64, 2 x 64 x 64",
        "unet-2x64x64-guided",
    ):
        assert word in described.out
    assert json.loads(rt("inspect", demo_bundle, "--json").out) == json.loads(
        (demo_bundle / MANIFEST).read_bytes()
    )


def test_verify_names_every_engine_and_json_parses(rt: Rt, demo_bundle: Path) -> None:
    engines = [engine.name for engine in Bundle.open(demo_bundle).manifest.engines]
    result = rt("verify", demo_bundle)
    assert (result.code, result.err) == (0, "")
    assert [line.split()[:2] for line in result.out.splitlines()[:-1]] == [["ok", name] for name in engines]
    files = len(Bundle.open(demo_bundle).manifest.files)
    assert result.out.splitlines()[-1].startswith(f"ok  {files} files; openvino: ")
    parsed = json.loads(rt("verify", demo_bundle, "--json", "--backend", "onnxruntime").out)
    assert parsed["backend"] == "onnxruntime" and list(parsed["relative_l2"]) == engines


def test_doctor_names_engines_and_json_parses(rt: Rt) -> None:
    assert all(f"ok       {name}" in rt("doctor").out for name in ON_HOST)
    assert str(Processors.here()) in rt("doctor").out
    report = json.loads(rt("doctor", "--json").out)
    assert set(report["engines"]) == set(BACKENDS)
    assert report["extras"]["build"]["missing"] == []


def test_doctor_says_what_is_built_for_and_cannot_run_here(rt: Rt, monkeypatch: pytest.MonkeyPatch) -> None:
    unused = Availability(version="1.7.1", problem="needs an NVIDIA GPU; this machine has none")
    monkeypatch.setattr(BACKENDS["tensorrt-rtx"], "available", lambda: unused)
    assert f"unused   tensorrt-rtx: {unused.problem}" in rt("doctor").out


def test_doctor_says_why_nothing_can_be_built_for_a_gpu(rt: Rt, monkeypatch: pytest.MonkeyPatch) -> None:
    from rt.export import target

    inductor = BACKENDS["inductor"]
    monkeypatch.setattr(inductor, "available", lambda: Availability(version="torch 2.13.0"))
    for reason in ("there is no nv/target; run: pip", ""):
        monkeypatch.setattr(target, "refusal", lambda backend, request, reason=reason: reason)
        said = rt("doctor").out
        assert "ok       inductor torch 2.13.0" in said
        assert (f"\n           rt build: {reason}\n" in said) == ("rt build: " in said) == bool(reason)
        assert json.loads(rt("doctor", "--json").out)["engines"]["inductor"]["build_problem"] == reason


def test_doctor_says_whether_the_native_kernels_are_used(rt: Rt, monkeypatch: pytest.MonkeyPatch) -> None:
    from rt.backends.native import Kernels
    from rt.cli import doctor

    monkeypatch.setattr(doctor, "kernels", lambda: Kernels(instruction_set="avx512"))
    assert "ok       native kernels: avx512" in rt("doctor").out
    monkeypatch.setattr(doctor, "kernels", lambda: Kernels(instruction_set=None, problem="not built"))
    assert "unused   native kernels: not built" in rt("doctor").out


def test_doctor_counts_the_gpu_kernels(rt: Rt, monkeypatch: pytest.MonkeyPatch) -> None:
    from rt.cli import doctor

    monkeypatch.setattr(doctor, "gpu_images", lambda: 256)
    assert "ok       GPU kernels for C and C++: 256" in rt("doctor").out
    monkeypatch.setattr(doctor, "gpu_images", lambda: 0)
    assert "unused   GPU kernels for C and C++: not built" in rt("doctor").out
    assert json.loads(rt("doctor", "--json").out)["gpu_kernels"] == 0


@pytest.mark.parametrize("option", ["--refittable", "--portable", "--tune"])
def test_options_of_tensorrt_are_refused_for_other_engines(rt: Rt, option: str) -> None:
    result = rt("build", "synthetic:tiny", "-o", "x", "--backend", "openvino", option)
    assert result.code == 2
    assert result.error.startswith(f"{option} is for TensorRT, and this build is for openvino; leave it out")


def test_doctor_says_how_to_get_what_is_missing(rt: Rt, hide: Callable[..., None]) -> None:
    hide("openvino")
    line = next(line for line in rt("doctor").out.splitlines() if "openvino:" in line)
    assert line.startswith('missing  openvino: not installed; run: pip install "openvino>=')


@pytest.mark.slow
def test_build_prints_the_path_and_the_bundle_verifies(process: Rt, tmp_path: Path) -> None:
    done = process("build", "synthetic:tiny", "-o", "out/tiny", "--height", 64, "--width", 64)
    assert (done.returncode, done.stdout) == (0, "out/tiny\n")  # type: ignore[attr-defined]
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("built in ")  # type: ignore[attr-defined]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["tiny"]
    Bundle.open(tmp_path / "out/tiny").verify()
    for file in (tmp_path / "out/tiny").rglob("*"):
        assert not file.is_file() or os.getcwd().encode() not in file.read_bytes()


# Damage


@pytest.fixture
def damaged(demo_bundle: Path, tmp_path: Path) -> Callable[[str], Path]:
    """`damaged(file)`: a copy of the demo bundle, that file with one bit flipped; the rest are hard links."""

    def flip(name: str) -> Path:
        copy = tmp_path / "damaged"
        shutil.copytree(demo_bundle, copy, copy_function=os.link)
        data = bytearray((copy / name).read_bytes())
        data[random.randrange(len(data))] ^= 1 << random.randrange(8)
        (copy / name).unlink()
        (copy / name).write_bytes(data)
        return copy / name

    return flip


def test_verify_finds_one_flipped_bit_in_every_file_before_any_engine_loads(
    rt: Rt, damaged: Callable[[str], Path], demo_bundle: Path, tmp_path: Path, no_engine: None
) -> None:
    for name in [MANIFEST, *Bundle.open(demo_bundle).manifest.files]:
        file = damaged(name)
        result = rt("verify", tmp_path / "damaged")
        assert result.code == 3
        assert (
            result.error.startswith(f"{file} is damaged") and "build or copy the bundle again" in result.error
        )
        shutil.rmtree(tmp_path / "damaged")


def test_run_finds_one_flipped_bit_in_every_file_that_it_reads(
    rt: Rt, damaged: Callable[[str], Path], demo_bundle: Path, tmp_path: Path, no_engine: None
) -> None:
    unused = ("unet-1x64x64", "unet-2x64x64", "unet-2x64x64-guided")
    engines = [engine for engine in Bundle.open(demo_bundle).manifest.engines if engine.name not in unused]
    names = {name for engine in engines for name in (*engine.forms.values(), engine.weights)}
    for name in [MANIFEST, "tokenizer/text_encoder.json", *sorted(names)]:
        file = damaged(name)
        result = rt("run", tmp_path / "damaged", "--prompt", "x", *FAST, "-o", "x.png")
        assert result.code == 3 and result.error.startswith(f"{file} is damaged")
        assert not (tmp_path / "x.png").exists()
        shutil.rmtree(tmp_path / "damaged")


@pytest.mark.parametrize("verb", ["run", "inspect", "verify", "bench"])
def test_what_is_not_a_bundle_is_code_3(rt: Rt, tmp_path: Path, verb: str) -> None:
    result = rt(verb, "nowhere", *(["--prompt", "x"] if verb == "run" else []))
    assert result.code == 3
    assert (
        result.error == "nowhere is not a bundle: it does not exist; make one with: rt build MODEL -o nowhere"
    )


# Usage


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["bild"], ["'bild'", "did you mean 'build'", "use one of build, run"]),
        (["build", "synthetic:tiny"], ["--output"]),
        (["build"], ["MODEL"]),
        (["build", "synthetic:tiny", "-o", "x", "--height", "big"], ["'big'", "--height"]),
        (["build", "synthetic:tiny", "-o", "x", "--fp16", "--bf16"], ["bf16 and fp16 exclude each other"]),
        (
            ["build", "synthetic:tiny", "-o", "x", "--int8", "--bf16"],
            ["bf16 and int8 exclude each other", "--int8"],
        ),
        (["build", "synthetic:tiny", "-o", "x", "--fp16", "--dtype", "fp32"], ["exclude each other"]),
        (
            ["build", "synthetic:tiny", "-o", "x", "--bf16", "--backend", "onnxruntime"],
            ["--backend openvino"],
        ),
        (["build", "synthetic:tiny", "-o", "x", "--backend", "tensort"], ["--backend", "openvino"]),
        (["build", "org/never", "-o", "x", "--height", 10**9], ["height 1000000000", "too large"]),
        (["build", "org/never", "-o", "x", "--width", 10**30], ["too large", "268,435,456 pixels"]),
        (
            ["build", "org/never", "-o", "x", "--batch-size", f"1,{10**9}"],
            ["batch_size is 1000000000", "at most 1024"],
        ),
        (["build", "org/never", "-o", "x", "--batch-size", "0"], ["batch_size is 0", "at least 1"]),
    ],
)
def test_usage_of_build(rt: Rt, tmp_path: Path, args: list[str], words: list[str]) -> None:
    result = rt(*args)
    assert result.code == 2
    assert all(word in result.error for word in words), result.error
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--stepz", "2"], ["--stepz", "--steps"]),
        (["--steps", "0"], ["num_inference_steps", "0", "from 1 to 1000"]),
        (["--steps", "-1"], ["num_inference_steps", "-1"]),
        (["--steps", "x"], ["--steps", "'x'"]),
        (["-n", "0"], ["num_images_per_prompt is 0", "at least 1"]),
        (["-n", "-2"], ["num_images_per_prompt is -2"]),
        (["--scheduler", "eulr"], ["'eulr'", "did you mean 'euler'", "ddim"]),
        (["--height", "512"], ["512 x any", "built for 64 x 64", "rebuild with --height"]),
        (["--width", "512"], ["any x 512"]),
        (["--backend", "cuda"], ["'cuda'", "openvino"]),
        (["--prompt", " "], ["the prompt is empty", "--prompt"]),
        (["-o", "x.bmp"], [".bmp", ".png"]),
        (["-o", "x"], ["no suffix"]),
        (["-o", "{sed}.png"], ["{sed}", "{seed}"]),
        (["-o", "taken.png"], ["taken.png exists", "--force"]),
        (["-o", "taken.png/x.png"], ["taken.png"]),
        (["--sheet", "taken.png"], ["taken.png exists", "--sheet", "--force"]),
        (["-o", "x.png", "--sheet", "x.png"], ["x.png would be a picture and the sheet", "--sheet"]),
        (["--sheet", "x.bmp"], [".bmp", ".png"]),
        (["-n", 10**12], ["num_images_per_prompt is 1000000000000", "at most 65536 pictures"]),
        (["-n", 40000, "-p", "another"], ["at most 65536 pictures"]),
        (["--height", 10**9], ["1000000000 x any", "built for 64 x 64"]),
        (["--threads", 10**9], ["threads is 1000000000", "from 1 to 1024"]),
        (["--seed", 2**64 - 1, "-n", 2], ["seed 18446744073709551616 does not fit into 64 bits"]),
        (["--prompt", "a\udcff"], ["prompt is not a string of valid Unicode", r"'a\udcff'"]),
        (["--negative-prompt", "\udcff"], ["negative_prompt is not a string of valid Unicode"]),
        (["-o", "x" * 300 + ".png"], ["File name too long", "-o"]),
        (["-o", f"{'y/' * 3000}x.png"], ["File name too long", "-o"]),
        (["-o", "{seed:0999999999d}.png"], ["a field of width 0999999999", "at most 255"]),
        (["-o", "{prompt_hash:>" + "9" * 5000 + "}.png"], ["a field of width 99999", "at most 255"]),
        (["-o", "{date:%999999Y}.png"], ["a field of width 999999"]),
        (
            ["-n", 12, "--seed", 1, "-o", "{seed:.0e}.png"],
            ["1e+01.png would be picture 9 and picture 10", "{index}"],
        ),
        (["-n", 2, "-o", "{index:.0}.png"], ["a format that does not fit its field"]),
        (["-o", "{index:c}.png"], ["a format that does not fit its field", "no name can have"]),
        (["-o", "{seed:c}.png", "--seed", 2**40], ["a format that does not fit its field"]),
        (["-o", "x.png", "--sheet", "y/../x.png"], ["would be a picture and the sheet"]),
    ],
)
def test_usage_of_run(
    rt: Rt, demo_bundle: Path, tmp_path: Path, no_engine: None, options: list[str], words: list[str]
) -> None:
    (tmp_path / "taken.png").write_bytes(b"mine")
    result = rt("run", demo_bundle, "--prompt", "a red heart", *options)
    assert result.code == 2
    assert all(word in result.error for word in words), result.error
    assert [path.name for path in tmp_path.iterdir()] == ["taken.png"]
    assert (tmp_path / "taken.png").read_bytes() == b"mine"


def test_a_folder_and_a_dead_link_are_not_drawn_into(
    rt: Rt, demo_bundle: Path, tmp_path: Path, no_engine: None
) -> None:
    (tmp_path / "7.png").mkdir()
    (tmp_path / "8.png").symlink_to("nowhere")
    folder = rt("run", demo_bundle, "-p", "x", "--seed", 7, "-o", "{seed}.png", "--force")
    assert folder.code == 2 and folder.error.startswith("7.png is a folder")
    link = rt("run", demo_bundle, "-p", "x", "--seed", 8, "-o", "{seed}.png")
    assert link.code == 2 and link.error.startswith("8.png exists")


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [(KeyboardInterrupt(), 130, "interrupted"), (RtError("the disk went away"), 1, "the disk went away")],
    ids=["Ctrl-C", "error"],
)
def test_pictures_are_saved_as_they_are_done(
    rt: Rt,
    demo_bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    code: int,
    says: str,
) -> None:
    """The third does not come to its end: two are there, whole and named, and no sheet."""
    finite = session.check_finite
    decoded = []

    def check(output: object, component: Component) -> None:
        decoded.append(component is Component.VAE_DECODER)
        if sum(decoded) == 3:
            raise error
        finite(output, component)  # type: ignore[arg-type]

    monkeypatch.setattr(session, "check_finite", check)
    result = rt(
        "run", demo_bundle, "-p", "a red heart", *FAST, "-n", 5, "-o", "{index}.png", "--sheet", "sheet.png"
    )
    assert (result.code, result.out) == (code, "0.png\n1.png\n")
    assert result.err.strip() == f"error: {says}"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.png", "1.png"]
    for index in range(2):
        with Image.open(tmp_path / f"{index}.png") as image:
            assert image.size == (64, 64) and f"Seed: {7 + index}" in image.info["parameters"]


def test_build_asks_for_the_output_before_it_fetches_a_model(
    rt: Rt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rt.export import checkpoint

    monkeypatch.setattr(checkpoint, "open_hub", lambda *_: pytest.fail("fetched"))
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine").write_bytes(b"mine")
    result = rt("build", "org/name", "-o", "taken")
    assert result.code == 1 and "taken exists" in result.error


def test_run_without_a_prompt_says_so(rt: Rt, demo_bundle: Path) -> None:
    result = rt("run", demo_bundle)
    assert result.code == 2 and "--prompt" in result.error


def test_force_overwrites_a_picture(rt: Rt, demo_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(b"old")
    assert rt("run", demo_bundle, "--prompt", "x", *FAST, "-o", "x.png", "--force").code == 0
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_an_over_long_prompt_is_drawn_with_a_warning(rt: Rt, demo_bundle: Path, tmp_path: Path) -> None:
    result = rt("run", demo_bundle, "--prompt", "heart " * 40 + "nebuchadnezzar", *FAST, "-o", "x.png")
    assert (result.code, result.out) == (0, "x.png\n")
    assert result.err.startswith("warning: the prompt has ") and result.err.count("\n") == 1
    assert "nebuchadnezzar" in result.err and (tmp_path / "x.png").is_file()


def test_a_picture_that_cannot_be_written_is_said(
    rt: Rt, demo_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    result = rt("run", demo_bundle, "--prompt", "x", *FAST, "-o", "x.png")
    assert result.code == 1 and result.error.startswith("cannot write x.png: No space left on device")
    assert not any(tmp_path.iterdir()), "a half-written picture was left behind"


# What is missing


@pytest.fixture
def hide(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`hide("openvino")`: as if that package were not installed."""
    from importlib.metadata import PackageNotFoundError, version

    def hide(*names: str) -> None:
        def found(package: str) -> str:
            if package.removesuffix("-gpu") in names:
                raise PackageNotFoundError(package)
            return version(package)

        for module in (openvino_cpu, ort_cpu, inductor):
            monkeypatch.setattr(module, "version", found)

    return hide


def test_no_engine_installed_is_code_4_with_the_commands(
    rt: Rt, demo_bundle: Path, hide: Callable[..., None]
) -> None:
    hide(*ON_HOST, "torch")
    for args in (
        ("run", demo_bundle, "--prompt", "x"),
        ("verify", demo_bundle),
        ("build", "synthetic:tiny", "-o", "x"),
    ):
        result = rt(*args)
        assert result.code == 4
        for name in ("openvino", "onnxruntime"):
            assert f'{name} (not installed; run: pip install "{name}>=' in result.error


def test_a_named_engine_that_is_not_installed_is_code_4(
    rt: Rt, demo_bundle: Path, hide: Callable[..., None]
) -> None:
    hide("onnxruntime")
    result = rt("run", demo_bundle, "--prompt", "x", "--backend", "onnxruntime")
    assert result.code == 4
    assert result.error.startswith('onnxruntime: not installed; run: pip install "onnxruntime>=')


@pytest.mark.parametrize("package", ["torch", "diffusers"])
def test_build_without_its_extra_is_code_4_with_the_command(tmp_path: Path, package: str) -> None:
    hidden = f"import sys; sys.modules[{package!r}] = None; from rt.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", hidden, "build", "synthetic:tiny", "-o", "x"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert (done.returncode, done.stdout) == (4, "")
    assert done.stderr.startswith(
        f"error: rt build needs {package}, which is not installed; run: pip install "
    )
    assert '"torch>=' in done.stderr and '"diffusers>=' in done.stderr and done.stderr.count("\n") == 1
    assert not any(tmp_path.iterdir())


def test_run_imports_no_torch(demo_bundle: Path, tmp_path: Path) -> None:
    hidden = "import sys\nfor name in ('torch', 'diffusers', 'transformers'): sys.modules[name] = None\n"
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            hidden + "from rt.cli import main; main()",
            "run",
            demo_bundle,
            "--prompt",
            "x",
            *FAST,
        ],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")


# Ends that are not errors of rt


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (MemoryError("72 GiB"), 5, "out of memory; build a smaller size or batch"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_memory_and_interrupts_have_their_codes(
    rt: Rt,
    demo_bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    code: int,
    message: str,
) -> None:
    def load(*args: object, **options: object) -> None:
        raise error

    monkeypatch.setattr(get("openvino"), "load", load)
    result = rt("run", demo_bundle, "--prompt", "x", *FAST, "-o", "x.png")
    assert result.code == code and result.error.startswith(message)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_drawing_is_code_130_and_leaves_nothing(
    demo_bundle: Path, tmp_path: Path, number: signal.Signals
) -> None:
    ready = "import rt.session as s; loop = s.Session.run\n" + (
        "def run(self, *args):\n print('drawing', flush=True)\n return loop(self, *args)\n"
        "s.Session.run = run\nfrom rt.cli import main; main()"
    )
    command = [
        sys.executable,
        "-c",
        ready,
        "run",
        demo_bundle,
        "--prompt",
        "x",
        "--steps",
        "900",
        "-o",
        "x.png",
    ]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path
    ) as child:
        assert child.stdout and child.stdout.readline() == "drawing\n"
        child.send_signal(number)
        out, err = child.communicate()
    assert (child.returncode, out, err) == (130, "", "\nerror: interrupted\n")
    assert not any(tmp_path.iterdir())


def test_ctrl_c_in_a_destructor_is_not_lost(tmp_path: Path) -> None:
    script = """
import os, signal, time
from rt.bundle import Bundle
from rt.cli import main

class Dying:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.1)

def slow(path):
    for _ in range(3):
        Dying()
    print("went on", flush=True)
    time.sleep(10)
    print("to the end")

Bundle.open = slow
main()
"""
    done = subprocess.run(
        [sys.executable, "-c", script, "inspect", "x"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 130 and "to the end" not in done.stdout
    assert done.stderr == "\nerror: interrupted\n"


def test_a_reader_that_leaves_early_gets_no_traceback(demo_bundle: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-m", "rt", "inspect", demo_bundle, "--json"],
        stdout=writing,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    os.close(writing)
    assert "Traceback" not in done.stderr and "Error" not in done.stderr, done.stderr


def test_a_reader_that_leaves_is_no_error_wherever_it_is_noticed(
    rt: Rt, demo_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within a verb or when the last of its output is brought out."""

    def leave() -> None:
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    module = sys.modules["rt.cli.main"]  # whose name in its package is the function's
    monkeypatch.setattr(module, "check_written", leave)
    monkeypatch.setattr(module, "abandon", lambda stream: None)
    result = rt("inspect", demo_bundle)
    assert (result.code, result.err) == (1, "")


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_paths_are_printed_as_pictures_are_done(
    rt: Rt, demo_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str]
) -> None:
    """To read while others are drawn; a file that cannot be said is kept, and what went wrong is not hidden."""
    files, printed = [], []

    def hand_out(*lines: str) -> None:
        printed.append(lines)
        files.append(sorted(path.name for path in tmp_path.iterdir()))
        if len(printed) == 2:
            raise RtError("cannot write to stdout: full")

    monkeypatch.setattr(run, "hand_out", hand_out)
    result = rt("run", demo_bundle, "-p", "x", *FAST, "-n", 3, "-o", "{index}.png", *options)
    if options:
        assert result.code == 0 and files == [["0.png", "1.png", "2.png"]]
        return
    assert (result.code, result.error) == (1, "cannot write to stdout: full")
    assert printed == [("0.png",), ("1.png",)] and files == [["0.png"], ["0.png", "1.png"]]


def test_another_error_is_not_hidden_by_a_full_stdout(
    rt: Rt, demo_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RtError("the disk went away")

    monkeypatch.setattr(run, "save", fail)
    monkeypatch.setattr(run, "hand_out", lambda *_: pytest.fail("nothing is there to say"))
    assert rt("run", demo_bundle, "-p", "x", *FAST).error == "the disk went away"


@pytest.mark.parametrize(
    ("redirection", "code", "says"),
    [
        ("2>&-", 0, ""),
        (">&-", 0, ""),
        ("<&- >&- 2>&-", 0, ""),
        (">/dev/full", 1, "error: cannot write to stdout: No space left on device\n"),
        ("2>/dev/full", 0, ""),
    ],
)
def test_streams_that_are_closed_or_full(
    demo_bundle: Path, tmp_path: Path, redirection: str, code: int, says: str
) -> None:
    """The picture is there all the same, and nothing else was written into it."""
    command = (
        f'"{sys.executable}" -m rt run "{demo_bundle}" -p "{"heart " * 40}" --steps 1 -o x.png {redirection}'
    )
    done = subprocess.run(command, shell=True, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == code
    assert done.stdout == ("" if ">&- " in f"{redirection} ".replace("2>&-", "") or code else "x.png\n")
    warned = "" if "2>" in redirection else LONG
    assert done.stderr.startswith(warned) and done.stderr.endswith(says) and done.stderr.count("\n") <= 2
    with Image.open(tmp_path / "x.png") as image:
        image.load()


@pytest.mark.parametrize("arguments", ["inspect nowhere", "--nonsense", "run nowhere"])
def test_errors_keep_their_code_without_a_stderr(tmp_path: Path, arguments: str) -> None:
    for redirection in ("2>&-", "2>/dev/full"):
        command = f'"{sys.executable}" -m rt {arguments} {redirection}'
        done = subprocess.run(command, shell=True, capture_output=True, cwd=tmp_path, check=False)
        assert (done.returncode, done.stdout, done.stderr) == (3 if "inspect" in arguments else 2, b"", b"")


@pytest.mark.parametrize("arguments", ["--help", "inspect --help", "--version", "doctor --json"])
def test_a_full_stdout_is_an_error(tmp_path: Path, arguments: str) -> None:
    command = f'"{sys.executable}" -m rt {arguments} >/dev/full'
    done = subprocess.run(command, shell=True, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ") and done.stderr.endswith("No space left on device\n")
    assert done.stderr.count("\n") == 1


EVIL = "no\x1b[31mwhere\n\u202eend\udcff"
HARMLESS = r"no\x1b[31mwhere\n\u202eend\udcff"


@pytest.mark.parametrize(
    "arguments",
    [
        *(
            ["inspect", EVIL],
            ["verify", EVIL],
            ["bench", EVIL],
            ["run", EVIL, "-p", "x"],
            ["build", EVIL, "-o", "x"],
        ),
        *([EVIL], ["run", "x", f"--{EVIL}"], ["bench", "x", "--json", f"{EVIL}/x"]),
    ],
    ids=lambda arguments: arguments[0][:7].strip("-"),
)
def test_names_cannot_steer_a_terminal(rt: Rt, arguments: list[str]) -> None:
    assert HARMLESS in rt(*arguments, *(["--offline"] if arguments[0] == "build" else [])).error


def test_nor_can_a_prompt_a_traceback_or_a_bundle(
    rt: Rt, demo_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from rt.cli import streams

    cut = rt("run", demo_bundle, "-p", "heart " * 40 + "\x1b[31m\x07red", *FAST, "-o", "x.png")
    assert cut.code == 0 and r"\x1b[31m\x07red" in cut.err and cut.err.count("\n") == 1
    assert "\x1b" not in rt("-v", "inspect", EVIL).err
    streams.show(EVIL)
    assert capsys.readouterr().out == HARMLESS + "\n"


def test_a_path_is_handed_out_as_it_is_but_not_to_a_terminal(
    process: Rt,
    demo_bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from rt.cli import streams

    name = "a\x1b[31m\udcff.png"
    done = subprocess.run(
        [sys.executable, "-m", "rt", "run", demo_bundle, "-p", "x", "--steps", "1", "-o", name],
        capture_output=True,
        cwd=tmp_path,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, os.fsencode(name) + b"\n")
    assert (tmp_path / name).is_file()
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    streams.hand_out(name)
    assert capsys.readouterr().out == r"a\x1b[31m\udcff.png" + "\n"


@pytest.mark.parametrize("verb", ["inspect", "verify", "bench", "run"])
def test_names_of_any_length(rt: Rt, verb: str) -> None:
    for name in ("x" * 300, "x/" * 3000):
        result = rt(verb, name, *(["-p", "x"] if verb == "run" else []))
        assert result.code in (1, 3) and "too long" in result.error


def test_verbose_shows_the_traceback_above_the_one_line(rt: Rt) -> None:
    result = rt("-v", "inspect", "nowhere")
    assert result.err.startswith("Traceback") and result.err.splitlines()[-1].startswith("error: nowhere")
