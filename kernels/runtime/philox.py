"""Standard normal noise as a function of a key and an element's index, so that a kernel can make it where it needs it.

Philox4x32-10 (Salmon et al., Parallel random numbers: as easy as 1, 2, 3, SC 2011) turns a 64-bit key and a counter
into four uint32. Element 4 c + j of a tensor, counted in logical order (last dimension fastest, whatever the strides), is
the j-th of the four normals that counter c gives by Box-Muller:

    u = (r_0 + 1/2) / 2^32,   radius = sqrt(-2 ln u),   angle = 2 pi r_1 / 2^32,   radius (cos angle, sin angle)

and the same from r_2 and r_3. An element's noise depends on key and index only, not on batch size, device or launch.
"""

import hashlib
import math
from dataclasses import dataclass

import torch
from torch import Tensor

ROUND = (0xD2511F53, 0xCD9E8D57)
KEY = (0x9E3779B9, 0xBB67AE85)
NUM_ROUNDS = 10
LOW = 0xFFFFFFFF


@dataclass(frozen=True)
class Philox:
    """A stream of standard normals. key: an int, 0 <= key < 2^63. Equal keys give equal noise: use a key for one tensor,
    and make it with `Philox.of`.

    The key is a constant in CUDA graphs and in torch.compile: replays repeat the noise, and another key compiles again.
    Raises TypeError for a key that is no int, ValueError for one out of range.
    """

    key: int

    def __post_init__(self):
        if isinstance(self.key, bool) or not isinstance(self.key, int):
            raise TypeError(f"key is a {type(self.key).__name__}; it needs to be an int")
        if not 0 <= self.key < 2**63:
            raise ValueError(f"key is {self.key}; it needs to be in [0, 2**63)")

    @staticmethod
    def of(*parts: object) -> "Philox":
        """The stream for `parts`, such as seed, iteration, role and shard. The key is a hash of their repr, of 63 bits, as
        torch.Generator takes no more on some devices."""
        digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
        return Philox(int.from_bytes(digest, "big") >> 1)

    def normal(
        self, shape: tuple[int, ...], *, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None
    ) -> Tensor:
        """Standard normals (*shape), computed in float32 in plain PyTorch: the reference of the kernels' noise."""
        count = math.prod(shape)
        counter = torch.arange((count + 3) // 4, device=device)
        r = philox4x32((counter & LOW, counter >> 32, torch.zeros_like(counter), torch.zeros_like(counter)), self.words)
        pairs = [_box_muller(r[0], r[1]), _box_muller(r[2], r[3])]
        normals = torch.stack([*pairs[0], *pairs[1]], dim=-1)
        return normals.flatten()[:count].reshape(shape).to(dtype)

    @property
    def words(self) -> tuple[int, int]:
        return self.key & LOW, self.key >> 32


def philox4x32(counter: tuple[Tensor, ...], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Philox4x32-10 of four counter words and two key words, uint32 held in int64."""
    c0, c1, c2, c3 = counter
    for i in range(NUM_ROUNDS):
        k0, k1 = ((word + i * step) & LOW for word, step in zip(key, KEY, strict=True))
        # int64 wraps around as uint64 does; shift and mask take the right bits.
        left, right = ROUND[0] * c0, ROUND[1] * c2
        c0 = ((right >> 32) & LOW) ^ c1 ^ k0
        c2 = ((left >> 32) & LOW) ^ c3 ^ k1
        c1, c3 = right & LOW, left & LOW
    return c0, c1, c2, c3


def _box_muller(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    radius = torch.sqrt(-2 * torch.log((first.float() + 0.5) * 2**-32))
    angle = 2 * math.pi * (second.float() * 2**-32)
    return radius * torch.cos(angle), radius * torch.sin(angle)
