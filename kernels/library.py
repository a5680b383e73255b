"""Compile the kernels of the sampling loop into the package, where `rt.cuda.library` finds them:

    python -m rt.kernels.library              for every GPU that we compile for
    python -m rt.kernels.library 90           for compute capability 9.0 alone

Needs Triton, torch and no GPU. Each of the five kernels comes in three formats of the network.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path

from rt import kernel_image
from rt.errors import RtError
from rt.kernels.aot import CAPABILITIES, compile_case
from rt.kernels.registry import spec
from rt.kernels.spec import Case

LOOP = ("feed", "guidance_rescale", "guide_and_step", "select_rows", "to_pixels")
"""The kernels that a loop launches itself; those of a network are in its engines."""
FORMATS = ("float32", "float16", "bfloat16")
INSTALLED = Path(kernel_image.__file__).parent / "_native" / "kernels"


def compile_loop(folder: Path, capabilities: Iterable[int], formats: Iterable[str] = FORMATS) -> list[str]:
    """Write cubins and their list, `kernels.json`, into `folder`; gives the names of the kernels.

    Raises:
        ConfigError: For a capability that we do not compile for.
        BuildError: A kernel cannot be compiled.
    """
    folder.mkdir(parents=True, exist_ok=True)
    images = []
    for name in LOOP:
        kernel = spec(name)
        largest = [*kernel.workloads.values()][-1]  # its sizes are arguments; none of them is compiled in
        for dtype in formats:
            for capability in capabilities:
                compiled = compile_case(kernel, Case(sizes=largest.sizes, dtype=dtype), capability)
                (folder / compiled.image.file).write_bytes(compiled.cubin)
                images.append(compiled.image)
    (folder / "kernels.json").write_text(json.dumps([image.to_json() for image in images], indent=1) + "\n")
    return [image.name for image in images]


def main(arguments: list[str]) -> int:
    """The command line; gives its exit code."""
    try:
        if not all(argument.isdigit() for argument in arguments):
            raise SystemExit(f"usage: python -m rt.kernels.library [{'|'.join(map(str, CAPABILITIES))}]...")
        names = compile_loop(INSTALLED, [int(argument) for argument in arguments] or CAPABILITIES)
    except RtError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(f"{len(names)} kernels in {INSTALLED}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
