"""Kernels compiled for every architecture, without a GPU: registers, spills, shared memory, parameters, the record."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from functools import lru_cache
from types import SimpleNamespace

import pytest
import triton
import triton.language as tl

from rt.errors import BackendUnavailableError, BuildError, ConfigError
from rt.kernel_image import KernelImage, TensorArgument
from rt.kernels import aot, registry
from rt.kernels.spec import Budget, Case, Config, KernelSpec


@lru_cache
def compiled(name: str, capability: int) -> aot.Compiled:
    """The first workload of a kernel, compiled once for all tests."""
    spec = registry.spec(name)
    return aot.compile_case(spec, first_workload(name), capability)


def first_workload(name: str) -> Case:
    return next(iter(registry.spec(name).workloads.values()))


def fits(spec: KernelSpec, image: KernelImage, spill_bytes: int) -> None:
    assert spill_bytes == 0, image.name
    assert image.registers <= spec.budget.registers, image.name
    assert image.shared_bytes <= spec.budget.shared_bytes, image.name
    assert image.shared_bytes <= aot.CAPABILITIES[image.capability] * 1024, image.name


@pytest.mark.parametrize("capability", aot.CAPABILITIES)
@pytest.mark.parametrize("name", registry.NAMES)
def test_a_kernel_compiles_within_its_budget(name, capability):
    spec, case = registry.spec(name).on(capability), first_workload(name)
    found = compiled(name, capability)
    image = found.image
    fits(spec, image, found.spill_bytes)

    entries = re.findall(r"\.visible \.entry (\w+)\((.*?)\)", found.ptx, re.S)
    assert [entry for entry, _ in entries] == [image.symbol] == [name]
    declared = [
        *[".u64" for _ in spec.inputs],
        *[".u32" for _ in spec.scalars],
        *[".u64" for _ in spec.outputs],
    ]
    assert re.findall(r"\.param (\.\w+)", entries[0][1]) == declared
    assert re.search(r"\.version (\S+)", found.ptx)[1] == "8.7"
    assert image.threads == int(re.search(r"\.(?:req|max)ntid (\d+)", found.ptx)[1])
    assert re.search(r"\.target (\S+)", found.ptx)[1] == f"sm_{capability}" + "a" * (capability == 90)
    assert found.cubin.startswith(b"\x7fELF") and image.symbol.encode() in found.cubin
    assert b"kernels/" not in found.cubin  # nothing of the folder that it was compiled in

    assert KernelImage.from_json(json.loads(json.dumps(image.to_json()))) == image
    assert image.launch_grid(case.sizes) == tuple([*spec.blocks(case), 1, 1][:3])
    assert "T" not in {argument.dtype for argument in (*image.inputs, *image.outputs)}
    for argument in (*image.inputs, *image.outputs):
        assert image.extent(argument, case.sizes) == spec.extent(argument, case)
    assert image.capability == capability and image.name.endswith(f"-sm{capability}")
    assert len(image.scalar_values(case.sizes)) == len(spec.scalars)


def images(name: str) -> dict[str, Case]:
    """Every different image that the cases and workloads of a kernel need on an H100."""
    spec = registry.spec(name).on(90)
    return {aot.image_name(spec, case, 90): case for case in (*spec.cases, *spec.workloads.values())}


@pytest.mark.slow
@pytest.mark.parametrize("name", registry.NAMES)
def test_every_case_fits_an_h100(name):
    spec = registry.spec(name).on(90)
    for case in images(name).values():
        found = aot.compile_case(spec, case, 90)
        fits(spec, found.image, found.spill_bytes)


def test_images_of_different_constants_have_different_names():
    spec = registry.spec("layer_norm")
    assert aot.image_name(spec, spec.workloads["sd15 4096x320"], 90) == (
        "layer_norm-float16-channels320-eps1e-05-ROWS2-TILE512-4warps-sm90"
    )
    rows = {
        aot.image_name(spec, replace(spec.cases[0], sizes={"rows": n, "channels": 320}), 90) for n in (1, 2)
    }
    assert len(rows) == 1
    for change in (
        {"dtype": "bfloat16"},
        {"attributes": {"eps": 0.1}},
        {"sizes": {"rows": 8, "channels": 640}},
    ):
        assert aot.image_name(spec, replace(spec.cases[0], **change), 90) not in rows


@pytest.mark.parametrize(
    ("name", "loads", "stores"), [("geglu", 2, 1), ("group_normalize", 2, 2), ("group_statistics", 2, 0)]
)
def test_half_precision_moves_16_bytes_at_a_time(name, loads, stores):
    """Which Triton does where it may take pointers to be aligned, and knows that channels are a multiple of eight."""
    ptx = compiled(name, 90).ptx
    assert len(re.findall(r"ld\.global\.v4\.b32", ptx)) >= loads
    assert len(re.findall(r"st\.global\.v4\.b32", ptx)) == stores
    assert not re.search(r"(ld|st)\.global\.[bu]16", ptx)


@pytest.mark.parametrize(
    ("workload", "capability", "features"),
    [
        ("sdxl 1024x1280", 90, 128),
        ("sdxl 4096x640", 90, 64),
        ("sd15 256x1280", 90, 64),
        ("sdxl 1024x1280", 80, 64),
    ],
)
def test_a_hopper_has_tiles_of_its_own_where_they_pay(workload, capability, features):
    spec = registry.spec("geglu_linear")
    name = aot.image_name(spec, spec.workloads[workload], capability)
    assert f"-FEATURES{features}-" in name


def programs_a_processor(registers: int, warps: int, shared_bytes: int) -> int:
    """Of a Hopper: registers are given by eights to each of 32 threads, and a kilobyte of a program is the driver's."""
    return min(65536 // (-(-registers // 8) * 8 * 32 * warps), 228 * 1024 // (shared_bytes + 1024))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("workload", "products", "resident"),
    [
        ("sd15 4096x40", {"m64n128k16", "m64n16k16", "m64n64k16"}, 2),
        ("sdxl 1024x64", {"m64n128k16", "m64n16k16", "m64n64k16"}, 2),
        ("sd15 1024x80", {"m64n64k16", "m64n16k16"}, 4),
    ],
)
def test_a_processor_has_more_than_one_program_of_query_attention(workload, products, resident):
    """Which work while the other waits; and two heads of 64 columns are one product of 128."""
    spec = registry.spec("query_attention")
    found = aot.compile_case(spec, spec.workloads[workload], 90)
    assert {*re.findall(r"wgmma\.mma_async\.sync\.aligned\.(\w+)", found.ptx)} == products
    image = found.image
    assert programs_a_processor(image.registers, image.threads // 32, image.shared_bytes) == resident


@pytest.mark.slow
@pytest.mark.parametrize(
    ("workload", "columns", "resident"), [("sdxl 1024x1280", 256, 1), ("sdxl 4096x640", 128, 2)]
)
def test_both_halves_of_geglu_are_one_product(workload, columns, resident):
    """An instruction of 64 by `columns` runs while the next are loaded, and so many programs fit a processor."""
    spec = registry.spec("geglu_linear")
    found = aot.compile_case(spec, spec.workloads[workload], 90)
    assert {*re.findall(r"wgmma\.mma_async\.sync\.aligned\.(\w+)", found.ptx)} == {f"m64n{columns}k16"}
    assert "wgmma.wait_group.sync.aligned 1" in found.ptx
    assert programs_a_processor(found.image.registers, 8, found.image.shared_bytes) == resident


@pytest.mark.slow
@pytest.mark.parametrize(
    ("workload", "columns", "resident"), [("sdxl 1024x1280", 256, 1), ("sdxl 4096x640", 128, 2)]
)
def test_tiles_are_fetched_by_the_memory_accelerator(workload, columns, resident):
    """No address is computed in a thread, nothing needs scratch memory, and stores go out while the loop goes on."""
    spec = registry.spec("geglu_linear_tma")
    found = aot.translate(spec, spec.workloads[workload], 90)
    ptx, metadata = found.asm["ptx"], found.metadata
    _, registers, spill_bytes = aot.assemble(ptx)
    assert (
        spill_bytes == 0
        and registers <= spec.budget.registers
        and metadata.shared <= spec.budget.shared_bytes
    )
    assert not metadata.global_scratch_size
    # Inductor makes descriptors from the blocks alone and swizzles 128 bytes, which is 3 here.
    case = spec.workloads[workload]
    made = [(one["block_size"], one["swizzle"], one["elem_size"]) for one in metadata.tensordesc_meta]
    assert made == [(spec.block(name, case), 3, 2) for name in ("x", "weight", "y")]
    assert {*re.findall(r"wgmma\.mma_async\.sync\.aligned\.(\w+)", ptx)} == {f"m64n{columns}k16"}
    assert {*re.findall(r"cp\.async\.bulk\.tensor\.(\dd)\.shared", ptx)} == {"2d", "3d"}
    assert re.search(r"cp\.async\.bulk\.tensor\.2d\.global", ptx) and "cp.async.cg" not in ptx
    assert programs_a_processor(registers, metadata.num_warps, metadata.shared) == resident


def test_descriptors_are_for_inductor():
    spec = registry.spec("geglu_linear_tma")
    with pytest.raises(
        BuildError, match="geglu_linear_tma takes descriptors, which no launcher of ours makes"
    ):
        aot.compile_case(spec, spec.cases[0], 90)


def test_a_capability_without_kernels():
    spec = registry.spec("layer_norm")
    with pytest.raises(
        ConfigError, match=r"no kernels for compute capability 75; valid: \[80, 89, 90, 120\]"
    ):
        aot.compile_case(spec, spec.cases[0], 75)


@triton.jit
def described(x, y, WIDTH: tl.constexpr):
    """Makes descriptors on the device, which need scratch memory."""
    source = tl.make_tensor_descriptor(
        x, shape=[WIDTH, WIDTH], strides=[WIDTH, 1], block_shape=[WIDTH, WIDTH]
    )
    target = tl.make_tensor_descriptor(
        y, shape=[WIDTH, WIDTH], strides=[WIDTH, 1], block_shape=[WIDTH, WIDTH]
    )
    target.store([0, 0], source.load([0, 0]))


def test_a_kernel_with_scratch_memory_is_refused():
    x, y = (TensorArgument(name=name, shape=("64", "64"), dtype="T") for name in "xy")
    spec = KernelSpec(
        name="described",
        kernel=described,
        inputs=(x,),
        outputs=(y,),
        config=lambda case: Config(constants={"WIDTH": 64}, warps=4),
        grid=("1",),
        reference=lambda x: (x,),
        cases=(),
        workloads={},
        tolerance={},
        budget=Budget(registers=0, shared_bytes=0),
    )
    with pytest.raises(
        BuildError, match="described for float16 needs scratch memory, which no launcher of ours"
    ):
        aot.compile_case(spec, Case(sizes={}), 90)


PTX = """.version 8.7
.target sm_80
.address_size 64
.visible .entry copy(
	.param .u64 .ptr .global .align 1 copy_param_0,
	.param .u32 copy_param_1,
	.param .u64 .ptr .global .align 1 copy_param_2,
	.param .u64 .ptr .global .align 1 copy_param_3
)
.reqntid 32
{
	.reg .b64 %rd<2>;
	ld.param.b64 %rd1, [copy_param_0];
	ret;
}
"""


def test_hidden_parameters_are_removed():
    stripped = aot.strip_scratch(PTX, declared=2)
    assert re.findall(r"\.param .*?(copy_param_\d)", stripped) == ["copy_param_0", "copy_param_1"]
    assert stripped.splitlines()[5:8] == ["\t.param .u32 copy_param_1", ")", ".reqntid 32"]
    cubin, registers, spills = aot.assemble(stripped)
    assert cubin.startswith(b"\x7fELF") and 0 < registers < 32 and spills == 0


def test_hidden_parameters_that_are_read_are_refused():
    with pytest.raises(BuildError, match="copy reads parameter 2, which is not one of its 2 arguments"):
        aot.strip_scratch(PTX.replace("[copy_param_0]", "[copy_param_2]"), declared=2)
    with pytest.raises(BuildError, match="the PTX has no entry"):
        aot.strip_scratch(".version 8.7", declared=2)


def test_what_ptxas_says_is_passed_on(monkeypatch):
    with pytest.raises(BuildError, match=r"ptxas refused a kernel: .*Unknown symbol 'copy_param_2'"):
        aot.assemble(aot.strip_scratch(PTX, declared=2).replace("[copy_param_0]", "[copy_param_2]"))
    with pytest.raises(BuildError, match="the PTX names no target"):
        aot.assemble(".version 8.7")
    silent = SimpleNamespace(returncode=0, stdout="", stderr="ptxas info: none")
    monkeypatch.setattr(subprocess, "run", lambda *arguments, **options: silent)
    with pytest.raises(BuildError, match="ptxas did not report registers and spills: ptxas info: none"):
        aot.assemble(PTX)


def test_spills_are_counted():
    """A kernel that keeps 128 values with 24 registers for them."""
    loads = "\n".join(f"ld.global.f32 %f{i}, [%rd1+{4 * i}];" for i in range(128))
    stores = "\n".join(f"st.global.f32 [%rd1+{4 * i}], %f{127 - i};" for i in range(128))
    body = (
        f".reg .f32 %f<128>;\nld.param.u64 %rd1, [copy_param_0];\n{loads}\nbar.sync 0;\n{stores}\nret;\n}}\n"
    )
    ptx = PTX.replace(".reqntid 32", ".reqntid 32\n.maxnreg 24")
    ptx = ptx[: ptx.index("	ld.param")] + body
    _, registers, spills = aot.assemble(ptx)
    assert registers <= 24 and spills > 0


def test_only_hopper_keeps_instructions_of_one_model():
    assert aot.portable(".target sm_120a\n", 120) == ".target sm_120\n"
    assert aot.portable(".target sm_90a\n", 90) == ".target sm_90a\n"
    assert compiled("layer_norm", 120).image.runs_on(121)


def test_without_triton(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "rt.kernels.aot")
    with pytest.raises(BackendUnavailableError, match="compiling a GPU kernel needs triton"):
        __import__("rt.kernels.aot")
