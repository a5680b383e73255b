"""Compiled kernels: picks the one that fits sizes, formats and GPU, and loads each at most once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from rt.cuda.device import Device, Kernel
from rt.errors import BackendError, IntegrityError
from rt.kernel_image import KernelImage


class KernelLibrary:
    """The kernels of one folder on one device.

    Args:
        device: Where they run.
        images: What there is, for any GPU.
        folder: That `KernelImage.file` is relative to.
    """

    def __init__(self, device: Device, images: Iterable[KernelImage], folder: Path) -> None:
        self._device, self._folder = device, folder
        self._images = tuple(images)
        self._loaded: dict[str, Kernel] = {}

    def __len__(self) -> int:
        """How many there are; none in a bundle that was built for a processor."""
        return len(self._images)

    def get(self, kernel: str, *, dtypes: Mapping[str, str], sizes: Mapping[str, int]) -> Kernel:
        """The kernel that was compiled for these, loaded if need be; of those that the GPU executes the newest cubin.

        Args:
            kernel: Name of the op.
            dtypes: Argument to format, for those that come in more than one.
            sizes: Of the launch; those that were fixed must be equal.

        Raises:
            BackendError: None was, with what there is; or the driver refuses the code.
            IntegrityError: Its file is missing.
        """
        named = [image for image in self._images if image.kernel == kernel]
        if not named:
            known = ", ".join(sorted({image.kernel for image in self._images})) or "none"
            raise BackendError(
                f"there is no compiled kernel {kernel}; there are: {known}. Build the bundle again"
            )
        fitting = [
            image
            for image in named
            if all(sizes.get(name, fixed) == fixed for name, fixed in image.sizes.items())
            and dtypes.items() <= _dtypes(image).items()
        ]
        if not fitting:
            wanted = _describe({**dtypes, **sizes})
            there = "; ".join(sorted({image.name for image in named}))
            raise BackendError(
                f"{kernel} was not compiled for {wanted}; there are: {there}. Build the bundle again"
            )
        runs = [image for image in fitting if image.runs_on(self._device.capability)]
        if not runs:
            there = ", ".join(str(each) for each in sorted({image.capability for image in fitting}))
            raise BackendError(
                f"{kernel} was compiled for compute capability {there}, and {self._device.name} has "
                f"{self._device.capability}; build the bundle again, with an rt that knows it"
            )
        return self._load(max(runs, key=lambda image: (not image.is_ptx, image.capability)))

    def _load(self, image: KernelImage) -> Kernel:
        if image.name not in self._loaded:
            try:
                code = (self._folder / image.file).read_bytes()
            except FileNotFoundError:
                raise IntegrityError(
                    f"{self._folder / image.file} is missing, the code of {image.name}; build the bundle again"
                ) from None
            self._loaded[image.name] = self._device.load(image, code)
        return self._loaded[image.name]


def _dtypes(image: KernelImage) -> dict[str, str]:
    return {argument.name: argument.dtype for argument in (*image.inputs, *image.outputs)}


def _describe(values: Mapping[str, object]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())
