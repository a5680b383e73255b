"""The C library of GPU kernels: what is generated for it, and that its table is the registry's."""

from __future__ import annotations

import _ctypes
import ctypes
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from rt.backends.native import GPU_LIBRARY, gpu_images
from rt.errors import BuildError, ConfigError
from rt.kernel_image import TensorArgument
from rt.kernels import aot, c_table, library, registry
from rt.kernels.spec import Budget, Case, Config, KernelSpec

built = pytest.mark.skipif(gpu_images() == 0, reason="librt_kernels.so is not built")

HEADERS = Path(__file__).resolve().parents[2] / "kernels" / "native" / "gpu"
DTYPES = ("float32", "float16", "bfloat16", "float8_e4m3fn", "int32", "uint32", "uint8")
ROLES = ("input", "scalar", "output", "inout")


class Constant(ctypes.Structure):
    _fields_ = [("name", ctypes.c_char_p), ("number", ctypes.c_double), ("text", ctypes.c_char_p)]


class Argument(ctypes.Structure):
    _fields_ = [
        ("name", ctypes.c_char_p),
        ("role", ctypes.c_int),
        ("dtype", ctypes.c_int),
        ("shape", ctypes.c_char_p),
    ]


class Kernel(ctypes.Structure):
    _fields_ = [
        ("name", ctypes.c_char_p),
        ("op", ctypes.c_char_p),
        ("symbol", ctypes.c_char_p),
        ("dtype", ctypes.c_int),
        ("capability", ctypes.c_int),
        ("size_count", ctypes.c_size_t),
        ("sizes", ctypes.POINTER(ctypes.c_char_p)),
        ("fixed", ctypes.POINTER(ctypes.c_int64)),
        ("attribute_count", ctypes.c_size_t),
        ("constant_count", ctypes.c_size_t),
        ("constants", ctypes.POINTER(Constant)),
        ("argument_count", ctypes.c_size_t),
        ("arguments", ctypes.POINTER(Argument)),
        ("threads", ctypes.c_uint),
        ("shared_bytes", ctypes.c_uint),
        ("registers", ctypes.c_uint),
        ("cubin_bytes", ctypes.c_size_t),
        ("cubin", ctypes.c_void_p),
    ]


def opened() -> ctypes.CDLL:
    loaded = ctypes.CDLL(str(GPU_LIBRARY))
    loaded.rt_kernel_at.restype = ctypes.POINTER(Kernel)
    loaded.rt_kernel_at.argtypes = [ctypes.c_size_t]
    return loaded


def table() -> dict[str, Kernel]:
    """Every image of the library by name."""
    loaded = opened()
    kernels = [loaded.rt_kernel_at(index).contents for index in range(gpu_images())]
    return {kernel.name.decode(): kernel for kernel in kernels}


def jobs(kernels: dict[str, Kernel]) -> list[library.Job]:
    """What the library must hold; it may be built for a part of the architectures."""
    return library.jobs(registry.specs(), sorted({kernel.capability for kernel in kernels.values()}))


def value(constant: Constant) -> float | str:
    return constant.text.decode() if constant.text else constant.number


@built
def test_the_table_is_the_registry() -> None:
    kernels, expected = table(), {}
    for job in jobs(kernels):
        expected[aot.image_name(registry.spec(job.kernel), job.case, job.capability)] = job
    assert set(kernels) == set(expected) and kernels
    for name, job in expected.items():
        kernel, spec, case = kernels[name], registry.spec(job.kernel).on(job.capability), job.case
        config, constants = spec.config(case), spec.constants(case)
        assert kernel.op.decode() == spec.name and DTYPES[kernel.dtype] == case.dtype
        assert kernel.capability == job.capability and kernel.threads == 32 * config.warps
        assert kernel.shared_bytes <= 1024 * aot.CAPABILITIES[job.capability] and kernel.registers <= 255
        assert [size.decode() for size in kernel.sizes[: kernel.size_count]] == [*case.sizes]
        assert kernel.fixed[: kernel.size_count] == [
            case.sizes[size] if size in spec.fixed else 0 for size in case.sizes
        ]
        found = {c.name.decode(): value(c) for c in kernel.constants[: kernel.constant_count]}
        assert found == {name: value for name, value in constants.items() if name not in spec.fixed}
        assert [*found][: kernel.attribute_count] == [*case.attributes]


@built
def test_the_arguments_are_the_kernels() -> None:
    kernels = table()
    for job in jobs(kernels):
        spec = registry.spec(job.kernel)
        kernel = kernels[aot.image_name(spec, job.case, job.capability)]
        arguments = kernel.arguments[: kernel.argument_count]
        names = [name for name in spec.kernel.arg_names if name not in spec.constants(job.case)]
        assert [argument.name.decode() for argument in arguments] == names
        for argument in arguments:
            name, role, shape = argument.name.decode(), ROLES[argument.role], argument.shape.decode()
            if name in spec.scalars:
                assert (role, DTYPES[argument.dtype], shape) == ("scalar", "int32", spec.scalars[name])
                continue
            tensor = next(tensor for tensor in (*spec.inputs, *spec.outputs) if tensor.name == name)
            written = "inout" if name in spec.inplace else "output"
            assert role == ("input" if tensor in spec.inputs else written)
            assert DTYPES[argument.dtype] == spec.dtype(tensor, job.case)
            assert shape == ", ".join(tensor.shape)


@built
def test_every_workload_finds_its_image() -> None:
    loaded, kernels = opened(), table()
    for job in jobs(kernels):
        spec = registry.spec(job.kernel)
        for case in (spec.workloads[name] for name in job.workloads):
            given = [(Constant(n.encode(), 0, v.encode()) if isinstance(v, str) else Constant(n.encode(), v))
                     for n, v in case.attributes.items()]  # fmt: skip
            found = ctypes.POINTER(Kernel)()
            status = loaded.rt_kernel_find(
                spec.name.encode(),
                DTYPES.index(case.dtype),
                job.capability,
                (Constant * len(given))(*given),
                ctypes.c_size_t(len(given)),
                (ctypes.c_int64 * len(case.sizes))(*case.sizes.values()),
                ctypes.byref(found),
            )
            assert status == 0
            assert found.contents.name.decode() == aot.image_name(spec, case, job.capability)


@built
def test_it_exports_its_interface_and_no_more() -> None:
    exported = {f"rt_{name}" for name in registry.NAMES}
    header = (HEADERS / "rt_kernels.h").read_text()
    exported |= set(re.findall(r"^RT_API .*?\b(rt_\w+)\(", header, re.M))
    assert _exported(GPU_LIBRARY) == exported


def _exported(path: Path) -> set[str]:
    """Names of the functions in the dynamic symbol table of a 64-bit ELF file."""
    data = path.read_bytes()
    offset, size, count = (int.from_bytes(data[a:b], "little") for a, b in ((40, 48), (58, 60), (60, 62)))
    sections = [data[offset + i * size :][:size] for i in range(count)]

    def field(section: bytes, at: int, length: int) -> int:
        return int.from_bytes(section[at : at + length], "little")

    [dynsym] = [section for section in sections if field(section, 4, 4) == 11]
    strings = field(sections[field(dynsym, 40, 4)], 24, 8)
    start, length = field(dynsym, 24, 8), field(dynsym, 32, 8)
    names = set()
    for at in range(start, start + length, 24):
        symbol = data[at : at + 24]
        if symbol[4] & 15 == 2 and field(symbol, 6, 2):  # a function that is defined here
            name = strings + field(symbol, 0, 4)
            names.add(data[name : data.index(b"\0", name)].decode())
    return names


def test_the_header_has_every_format() -> None:
    header = (HEADERS / "rt_kernels.h").read_text()
    enum = re.search(r"enum rt_dtype \{(.*?)\}", header, re.S)
    assert enum and re.findall(r"RT_(\w+)", enum[1]) == [name.upper() for name in DTYPES]
    assert set(aot.POINTERS) == set(DTYPES)
    most = re.search(r"RT_MOST_ARGUMENTS = (\d+)", (HEADERS / "table.h").read_text())
    assert most and int(most[1]) == c_table.MOST_ARGUMENTS
    assert tuple(aot.CAPABILITIES) == library.CAPABILITIES


def test_formulas_become_c() -> None:
    names = ("batch", "pixels", "BLOCK")
    assert c_table.formula("7", names) == "7"
    assert c_table.formula("cdiv(pixels, BLOCK) * batch", names) == (
        "multiply(cdiv(pixels, BLOCK, &fits), batch, &fits)"
    )
    assert c_table.formula("2 * batch - 1 + min(3, pixels)", names) == (
        "add(subtract(multiply(2, batch, &fits), 1, &fits), least(3, pixels), &fits)"
    )
    assert c_table.formula("7 // max(batch, 2)", names) == "floor_divide(7, most(batch, 2), &fits)"
    assert c_table.formula("(1 + batch) // 2 + (5 - batch)", names) == (
        "add(floor_divide(add(1, batch, &fits), 2, &fits), subtract(5, batch, &fits), &fits)"
    )
    with pytest.raises(ConfigError, match="'colour'"):
        c_table.formula("batch * colour", names)


def spec(**changes: Any) -> KernelSpec:
    """Of a kernel that is never compiled."""
    good: dict[str, Any] = {
        "name": "double",
        "kernel": None,
        "inputs": (TensorArgument(name="x", shape=("count",), dtype="T"),),
        "outputs": (TensorArgument(name="y", shape=("count",), dtype="T"),),
        "config": lambda case: Config(constants={"BLOCK": 1024}, warps=4),
        "grid": ("cdiv(count, BLOCK)",),
        "reference": lambda x: (2 * x,),
        "cases": (),
        "workloads": {"one": Case(sizes={"count": 5})},
        "tolerance": {"float16": 0.0},
        "budget": Budget(registers=32, shared_bytes=0),
    }
    return KernelSpec(**{**good, **changes})


@pytest.mark.skipif(not shutil.which("cc"), reason="needs a C compiler")
@pytest.mark.parametrize(
    ("bounds", "count", "fits"),
    [
        ((), 2**31 - 1, True),
        (("4 * count",), 2**29 - 1, True),
        (("4 * count",), 2**29, False),
        (("count", "count * BLOCK"), 2**21 - 1, True),
        (("count * BLOCK", "count"), 2**21, False),
        (("count * count * count",), 2**31 - 1, False),  # beyond 64 bits
    ],
)
def test_what_a_kernel_cannot_count_is_refused(
    tmp_path: Path, bounds: tuple[str, ...], count: int, fits: bool
) -> None:
    """The function that the library asks before a launch, compiled by itself."""
    plan = c_table._Operator.of(spec(bounds=bounds)).plan()
    lines = [
        '#include "formula.h"',
        '#include "table.h"',
        *plan,
        "bool asked(int64_t count, double block) {",
        '  const rt_constant constants[] = {{"BLOCK", block, 0}};',
        "  int64_t grid[3];",
        "  return plan_double(&count, constants, 0, grid);",
        "}",
    ]
    (tmp_path / "plan.c").write_text("\n".join([*lines, ""]))
    command = ["cc", "-shared", "-fPIC", "-fvisibility=default", f"-I{HEADERS}", "plan.c", "-o", "plan.so"]
    subprocess.run(command, cwd=tmp_path, check=True)
    asked = ctypes.CDLL(str(tmp_path / "plan.so")).asked
    asked.restype, asked.argtypes = ctypes.c_bool, [ctypes.c_int64, ctypes.c_double]
    assert asked(count, 1024) is fits


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"workloads": {}}, "double has no workloads"),
        (
            {"workloads": {"a": Case(sizes={"count": 5}), "b": Case(sizes={"number": 5})}},
            "the workloads of double differ",
        ),
        (
            {"outputs": (TensorArgument(name="count", shape=("count",), dtype="T"),)},
            "two parameters called count",
        ),
        ({"scalars": {f"s{i}": "count" for i in range(31)}}, "double takes more than 32 arguments"),
    ],
)
def test_what_c_cannot_say_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(BuildError, match=message):
        c_table.table({"double": spec(**changes)}, [])


def test_images_survive_json() -> None:
    entry = next(iter(small()))
    assert library.LibraryImage.from_json(json.loads(json.dumps(entry.to_json()))) == entry


def small() -> Iterator[library.LibraryImage]:
    """The images of one small kernel, compiled here."""
    for job in library.jobs({"feed": registry.spec("feed")}, [80]):
        yield library.compile_job(job)[0]


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_a_build_is_reproducible_and_done_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "specs", lambda: {"feed": registry.spec("feed")})
    first = library.build(tmp_path / "a", [80, 90], 2)
    assert [entry.image.capability for entry in first] == [80, 90]
    library.build(tmp_path / "b", [80, 90], 1)
    assert files(tmp_path / "a") == files(tmp_path / "b")
    assert set(files(tmp_path / "a")) == {*library.GENERATED, *(f"cubin/{e.image.file}" for e in first)}
    assert str(Path(library.__file__).parent).encode() not in b"".join(files(tmp_path / "a").values())

    monkeypatch.setattr(library, "compile_job", None)  # nothing is compiled any more
    assert library.build(tmp_path / "a", [80, 90], 2) == first
    (tmp_path / "a" / "manifest.json").unlink()
    with pytest.raises(Exception, match="NoneType"):
        library.build(tmp_path / "a", [80, 90], 1)


def test_other_sources_are_another_build(monkeypatch: pytest.MonkeyPatch) -> None:
    digest = library.source_digest([80])
    assert digest == library.source_digest([80]) != library.source_digest([80, 90])
    monkeypatch.setattr(library, "version", lambda name: "0.0")
    assert digest != library.source_digest([80])


def test_an_unknown_capability_is_one_line(tmp_path: Path) -> None:
    result = CliRunner().invoke(library.command, [str(tmp_path), "--capability", "75"])
    assert result.exit_code == 2
    assert result.stderr.splitlines() == [
        "error: no kernels for compute capability [75]; valid: [80, 89, 90, 120]"
    ]
    assert not [*tmp_path.iterdir()]


def test_shared_images_list_their_workloads() -> None:
    norm = registry.spec("group_norm")
    one = library.jobs({"group_norm": norm}, [80])
    assert sorted(name for job in one for name in job.workloads) == sorted(norm.workloads)
    assert len(one) < len(norm.workloads)
    alone = replace(norm, workloads={"a": norm.workloads["sd15 64x64x320"]})
    assert len(library.jobs({"group_norm": alone}, [80, 90])) == 2


def test_a_missing_library_is_counted_as_nothing(tmp_path: Path) -> None:
    path = tmp_path / "librt_kernels.so"
    assert gpu_images(path) == 0
    path.write_bytes(b"not a library")
    assert gpu_images(path) == 0


def test_a_library_of_an_older_build_is_counted_as_nothing() -> None:
    assert gpu_images(Path(_ctypes.__file__)) == 0, "it loads, and has no function of ours"
