"""The engine's randomness: Gumbel noise that is a pure function of who asks for it.

A token is drawn as argmax over v of (x_v + G_v), where x is the filtered, temperature-divided logit
row and G is standard Gumbel noise; this draws from softmax(x) exactly (Gumbel-max). The noise of
one token of one draw is

    G(key, sample_index, output_position, token_id)

- `key`: uint64 from `noise_key`, the row's own seed or a hash of the job seed and the row's id;
- `sample_index`: which of the row's n samples;
- `output_position`: how many output tokens the sample had before this one;
- `token_id`: the candidate.

It depends on nothing else: not on the batch, its order, preemption, resume, or the number of
threads. No state is kept. Speculation can evaluate the same noise ahead of time
and stay token-identical.

Source of bits: Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC11).

    words of a block = philox(counter=(token_id // 4, output_position, sample_index, domain),
                              key=(key mod 2^32, key div 2^32))

Word `token_id % 4` of domain 0 is the high half of a 64-bit integer and the same word of domain 1
its low half, so almost every candidate is ruled out by its high word alone. With
u = (high + (low + 1/2) / 2^32) / 2^32, uniform on (0, 1),

    E = -log1p(-u)      exponential; small u keep their full relative precision
    G = -log(E)

Resolution: E is exact to float64 rounding down to its smallest value 2^-65, so the noise is capped
at 65 log 2 = 45.05 (24-bit uniforms would cap it at 16.6, 32-bit ones at 22.9): a token of
probability 1e-15 can still be drawn. u is kept below 1, which bounds G from below by -log(36.8).
"""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt

UInt32Array = npt.NDArray[np.uint32]
UInt64Array = npt.NDArray[np.uint64]
Float64Array = npt.NDArray[np.float64]

HIGH_DOMAIN = 0
"""Fourth counter word of the blocks that hold the high halves of the uniforms."""

LOW_DOMAIN = 1
"""Fourth counter word of the blocks that hold the low halves."""

MAX_NOISE = 45.06
"""Upper bound of G: 65 log 2, rounded up."""

LARGEST_UNIFORM = 1.0 - 2.0**-53

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_MASK = np.uint64(0xFFFFFFFF)


def noise_key(seed: int | None, job_seed: int, request_id: str) -> int:
    """The uint64 key of one row's noise.

    A row's own seed and a derived key are hashed under different labels (BLAKE2b's
    personalisation), so that rows with `seed=7` share noise with each other, as they asked, and
    with no other row. Any integers are accepted. A row without a seed gets its own noise from its
    id, whatever its place in the file.
    """
    if seed is not None:
        label, message = b"batchwright row", str(seed)
    else:
        label, message = b"batchwright job", f"{job_seed}:{request_id}"
    data = message.encode("utf-8", "surrogatepass")
    digest = hashlib.blake2b(data, digest_size=8, person=label).digest()
    return int.from_bytes(digest, "little")


def philox4x32(counter: UInt32Array, key: UInt32Array) -> UInt32Array:
    """Philox4x32-10: counter [..., 4] uint32 and key [..., 2] uint32 to words [..., 4] uint32."""
    c0, c1, c2, c3 = (counter[..., i].astype(np.uint64) for i in range(4))
    k0, k1 = (key[..., i].astype(np.uint64) for i in range(2))
    for _ in range(10):
        product0 = c0 * np.uint64(_MULTIPLIERS[0])
        product1 = c2 * np.uint64(_MULTIPLIERS[1])
        c0, c1, c2, c3 = (
            (product1 >> np.uint64(32)) ^ c1 ^ k0,
            product1 & _MASK,
            (product0 >> np.uint64(32)) ^ c3 ^ k1,
            product0 & _MASK,
        )
        k0 = (k0 + np.uint64(_WEYL[0])) & _MASK
        k1 = (k1 + np.uint64(_WEYL[1])) & _MASK
    return np.stack([c0, c1, c2, c3], axis=-1).astype(np.uint32)


def noise_words(
    key: int, sample_index: int, output_position: int, token_ids: npt.NDArray[np.int32], domain: int
) -> UInt32Array:
    """The Philox word of every token of `token_ids` in one domain, [len(token_ids)] uint32."""
    counter = np.empty((len(token_ids), 4), np.uint32)
    counter[:, 0] = token_ids // 4
    counter[:, 1:] = (output_position, sample_index, domain)
    words = philox4x32(counter, np.array([key & 0xFFFFFFFF, key >> 32], np.uint32))
    picked: UInt32Array = words[np.arange(len(token_ids)), token_ids % 4]
    return picked


def gumbel_from_words(high: UInt32Array, low: UInt32Array) -> Float64Array:
    """Gumbel noise, float64, from the two halves of 64-bit uniforms."""
    uniform = (high + (low + 0.5) * 2.0**-32) * 2.0**-32
    exponential = -np.log1p(-np.minimum(uniform, LARGEST_UNIFORM))
    noise: Float64Array = -np.log(exponential)
    return noise


def gumbel_noise(
    key: int, sample_index: int, output_position: int, token_ids: npt.NDArray[np.int32]
) -> Float64Array:
    """G(key, sample_index, output_position, token_id) for every token of `token_ids`, float64.

    This is the definition; kernels/sample computes the same numbers for the few tokens that need
    them.
    """
    high = noise_words(key, sample_index, output_position, token_ids, HIGH_DOMAIN)
    low = noise_words(key, sample_index, output_position, token_ids, LOW_DOMAIN)
    return gumbel_from_words(high, low)
