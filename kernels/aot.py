"""Compile a kernel ahead of time, without a GPU: PTX and a cubin that take the declared arguments and nothing else.

Triton appends two hidden pointers to every entry, to global and to profiling scratch memory. Neither TensorRT nor our
launcher passes them, so they are removed from the PTX, and what remains is assembled again. That is sound only while
the kernel uses no scratch memory, which Triton records; a kernel that does is refused.

The assembler is the `ptxas` that comes with Triton, CUDA 12.8 or 12.9: it knows every architecture that we compile for,
is there wherever Triton is, and its cubins load on drivers of CUDA 12, where those of Triton's own choice for new
architectures, and of whatever toolkit is on PATH, may need CUDA 13. PTX is version 8.7 for the same reason.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rt.errors import BuildError, ConfigError
from rt.extras import needs
from rt.kernel_image import KernelImage, TensorArgument
from rt.kernels.spec import Case, KernelSpec

with needs("gpu", "compiling a GPU kernel"):
    import triton
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

CAPABILITIES = {80: 163, 89: 99, 90: 227, 120: 99}
"""Compute capabilities that we compile for, and the KiB of shared memory that a block may have there."""
PTX_VERSION = 87
POINTERS = {
    "float32": "*fp32",
    "float16": "*fp16",
    "bfloat16": "*bf16",
    "float8_e4m3fn": "*fp8e4nv",
    "int32": "*i32",
    "uint32": "*u32",
    "uint8": "*u8",
}


@dataclass(frozen=True, kw_only=True)
class Compiled:
    """A kernel for one architecture.

    Attributes:
        image: How to launch it.
        cubin: The machine code.
        ptx: What it was assembled from; TensorRT embeds this.
        spill_bytes: What a thread spills to memory, 0 if all is well.
    """

    image: KernelImage
    cubin: bytes
    ptx: str
    spill_bytes: int


def translate(spec: KernelSpec, case: Case, capability: int) -> Any:
    """`case` as Triton compiles it for GPUs of `capability`: `asm["ptx"]`, `metadata`.

    Raises:
        ConfigError: For a capability that we do not compile for.
    """
    spec = spec.on(capability)
    if capability not in CAPABILITIES:
        raise ConfigError(f"no kernels for compute capability {capability}; valid: {[*CAPABILITIES]}")
    config, constants = spec.config(case), spec.constants(case)
    arguments = (*spec.inputs, *spec.outputs)
    pointers = {argument.name: POINTERS[spec.dtype(argument, case)] for argument in arguments}
    described = {
        name: f"tensordesc<{pointers.pop(name).removeprefix('*')}{spec.block(name, case)}>"
        for name in spec.descriptors
    }
    names: list[str] = spec.kernel.arg_names
    types = {
        **pointers,
        **described,
        **dict.fromkeys(spec.scalars, "i32"),
        **dict.fromkeys(constants, "constexpr"),
    }
    source = ASTSource(
        spec.kernel,
        {name: types[name] for name in names},
        {(names.index(name),): value for name, value in constants.items()},
        {(names.index(name),): [["tt.divisibility", 16]] for name in pointers},
    )
    options = {
        "num_warps": config.warps,
        "num_stages": config.stages,
        "ptx_version": PTX_VERSION,
        "enable_fp_fusion": True,
    }
    with knobs.compilation.scope():
        knobs.compilation.disable_line_info = True  # which says in what folder the sources lay
        return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def compile_case(spec: KernelSpec, case: Case, capability: int) -> Compiled:
    """`case` for GPUs of `capability`.

    Raises:
        ConfigError: For a capability that we do not compile for.
        BuildError: When the kernel takes descriptors, needs scratch memory or cannot be assembled.
    """
    spec = spec.on(capability)
    if spec.descriptors:
        raise BuildError(
            f"{spec.name} takes descriptors, which no launcher of ours makes; it is for inductor"
        )
    compiled = translate(spec, case, capability)
    metadata, constants = compiled.metadata, spec.constants(case)
    if metadata.global_scratch_size or metadata.profile_scratch_size:
        raise BuildError(f"{spec.name} for {case} needs scratch memory, which no launcher of ours provides")
    declared = len(spec.inputs) + len(spec.scalars) + len(spec.outputs)
    ptx = portable(strip_scratch(compiled.asm["ptx"], declared=declared), capability)
    cubin, registers, spill_bytes = assemble(ptx)
    name = image_name(spec, case, capability)
    image = KernelImage(
        kernel=spec.name,
        name=name,
        symbol=metadata.name,
        capability=capability,
        file=f"{name}.cubin",
        sizes={size: case.sizes[size] for size in spec.fixed},
        constants={key: value for key, value in constants.items() if key not in spec.fixed},
        inputs=tuple(_resolved(argument, spec, case) for argument in spec.inputs),
        scalars=dict(spec.scalars),
        outputs=tuple(_resolved(argument, spec, case) for argument in spec.outputs),
        grid=spec.grid,
        threads=metadata.num_warps * 32,
        shared_bytes=metadata.shared,
        registers=registers,
    )
    return Compiled(image=image, cubin=cubin, ptx=ptx, spill_bytes=spill_bytes)


def image_name(spec: KernelSpec, case: Case, capability: int) -> str:
    """`group_norm-float16-channels320-groups32-eps1e-05-siluTrue-BLOCK256-WIDTH16-8warps-sm90`."""
    spec = spec.on(capability)
    config = spec.config(case)
    constants = [f"{name}{value}" for name, value in spec.constants(case).items()]
    return "-".join([spec.name, case.dtype, *constants, f"{config.warps}warps", f"sm{capability}"])


def strip_scratch(ptx: str, declared: int) -> str:
    """`ptx` whose entry has its first `declared` parameters alone.

    Raises:
        BuildError: When the code reads one of the others.
    """
    entry = re.search(r"\.visible \.entry (\w+)\((.*?)\n\)", ptx, re.S)
    if entry is None:
        raise BuildError("the PTX has no entry with parameters")
    parameters = [text.strip() for text in entry[2].split(",\n")]
    for index in range(declared, len(parameters)):
        if len(re.findall(rf"\b{entry[1]}_param_{index}\b", ptx)) > 1:
            raise BuildError(
                f"{entry[1]} reads parameter {index}, which is not one of its {declared} arguments"
            )
    return ptx[: entry.start(2)] + "\n\t" + ",\n\t".join(parameters[:declared]) + ptx[entry.end(2) :]


def portable(ptx: str, capability: int) -> str:
    """`ptx` for every GPU of the major version, where Triton asks for one model alone.

    sm_90a stays, because Hopper's matrix instructions need it, and there is no other GPU of that major version.
    """
    return ptx if capability == 90 else ptx.replace(f".target sm_{capability}a", f".target sm_{capability}")


def assemble(ptx: str) -> tuple[bytes, int, int]:
    """The cubin, the registers of a thread and the bytes it spills.

    Raises:
        BuildError: With what ptxas said.
    """
    target = re.search(r"^\.target (\w+)", ptx, re.M)
    if target is None:
        raise BuildError("the PTX names no target")
    with tempfile.TemporaryDirectory() as folder:
        source, cubin = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        source.write_text(ptx)
        command = [knobs.nvidia.ptxas.path, "-v", f"--gpu-name={target[1]}", str(source), "-o", str(cubin)]
        done = subprocess.run(command, capture_output=True, text=True)
        report = done.stdout + done.stderr
        if done.returncode:
            raise BuildError(f"ptxas refused a kernel: {' '.join(report.split())[:500]}")
        registers = re.search(r"Used (\d+) registers", report)
        spills = [int(count) for count in re.findall(r"(\d+) bytes spill", report)]
        if registers is None or not spills:
            raise BuildError(f"ptxas did not report registers and spills: {' '.join(report.split())[:500]}")
        return cubin.read_bytes(), int(registers[1]), sum(spills)


def _resolved(argument: TensorArgument, spec: KernelSpec, case: Case) -> TensorArgument:
    """With the case's format in place of "T"."""
    return TensorArgument(name=argument.name, shape=argument.shape, dtype=spec.dtype(argument, case))
