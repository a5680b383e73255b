"""torch's CUDA `randn` in numpy: one seed, the same latents as diffusers with a CUDA generator, on any machine.

torch draws from Philox4x32-10, https://www.thesalmons.org/john/random123/papers/random123sc11.pdf, through cuRAND. Each
thread of the kernel has its own stream, numbered by the thread, and turns four 32-bit words into four normals by
Box-Muller (curand_normal.h). Thread t of T writes its normals to the elements t, t + T, t + 2T …; there are as many
threads as elements, up to those that the GPU holds at once (ATen/native/cuda/DistributionTemplates.h). So a picture
depends on the model of the GPU if, and only if, it has more elements than that: 270,336 on an H100, the latents of
four pictures of 1024 × 1024.

The words are exact. The normals differ from torch's by rounding, because its kernel takes the GPU's fast sine.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from rt.noise import bits_of, room

Words = NDArray[np.uint32]
BLOCK = 256
"""Threads of a block of torch's kernel."""
_MULTIPLIERS = np.array([0xD2511F53, 0xCD9E8D57], np.uint64)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def philox4x32(counter: Words, key: tuple[int, int], rounds: int = 10) -> Words:
    """Four random words for each counter (4, …), low word first, and a key of two 32-bit words."""
    c0, c1, c2, c3 = (np.asarray(word, np.uint64) for word in counter)
    k0, k1 = key
    low = np.uint64(0xFFFFFFFF)
    for _ in range(rounds):
        product0, product2 = _MULTIPLIERS[0] * c0, _MULTIPLIERS[1] * c2
        c0, c1 = (product2 >> np.uint64(32)) ^ c1 ^ np.uint64(k0), product2 & low
        c2, c3 = (product0 >> np.uint64(32)) ^ c3 ^ np.uint64(k1), product0 & low
        k0, k1 = (k0 + _WEYL[0]) % 2**32, (k1 + _WEYL[1]) % 2**32
    return np.stack([c0, c1, c2, c3]).astype(np.uint32)


def threads_of(elements: int, processors: int, threads_per_processor: int = 2048) -> int:
    """Threads that torch launches for a tensor.

    Args:
        elements: Of the tensor, at least 1.
        processors: Streaming multiprocessors of the GPU.
        threads_per_processor: That a multiprocessor holds: 2048 on A100 and H100, 1536 on consumer GPUs.
    """
    return BLOCK * min(processors * (threads_per_processor // BLOCK), -(-elements // BLOCK))


def key_of(seed: int) -> tuple[int, int]:
    """The key of a seed: its low and high word.

    Raises:
        ConfigError: The seed does not fit into 64 bits.
    """
    bits = bits_of(seed)
    return bits % 2**32, bits >> 32


class CudaGenerator:
    """The stream of normals that `torch.Generator("cuda").manual_seed(seed)` gives to `torch.randn`.

    A tensor in half precision is the same normals, rounded.

    Args:
        seed: -2**63 … 2**64 - 1; a negative one counts down from 2**64, as in torch.
        processors: See `threads_of`; 132 for an H100.
        threads_per_processor: See `threads_of`.

    Raises:
        ConfigError: The seed does not fit into 64 bits.
    """

    def __init__(self, seed: int, *, processors: int = 132, threads_per_processor: int = 2048) -> None:
        self._key = key_of(seed)
        self._gpu = processors, threads_per_processor
        self._offset = 0

    def randn(self, shape: Sequence[int], out: NDArray[np.float32] | None = None) -> NDArray[np.float32]:
        """See `Noise`."""
        out = room(shape, out)
        if out.size:
            threads = threads_of(out.size, *self._gpu)
            calls = -(-out.size // (4 * threads))  # of a thread, for four values each
            counter = np.zeros((4, calls, threads), np.uint32)
            counter[0] = np.arange(self._offset, self._offset + calls)[:, None]
            counter[2] = np.arange(threads)
            out.reshape(-1)[:] = (
                _normals(philox4x32(counter, self._key)).swapaxes(0, 1).reshape(-1)[: out.size]
            )
            self._offset += calls
        return out


def _normals(words: Words) -> NDArray[np.float32]:
    """Box-Muller on words 0 and 1, and on 2 and 3: (4, …) → (4, …); the sine comes first."""
    unit, turn = np.float32(2.0**-32), np.float32(2.0**-32 * 2 * math.pi)
    u = words[0::2].astype(np.float32) * unit + unit / 2
    angle = words[1::2].astype(np.float32) * turn + turn / 2
    radius = np.sqrt(-2 * np.log(u))
    return np.stack([radius * np.sin(angle), radius * np.cos(angle)], 1).reshape(words.shape)
