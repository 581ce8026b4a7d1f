#!/usr/bin/env python3
"""Writes the pinned vectors of the placement (dialog, slot, shard of four), from an implementation of its own.

    dev/placement_vectors.py > chat/tests/data/placement.tsv

It shares no code with the server: agreement of the two is what the test checks.
"""
import bisect

MASK = (1 << 64) - 1


def siphash24(data: bytes) -> int:
    """SipHash-2-4 with the zero key (Aumasson and Bernstein, 2012)."""

    def rotl(x, b):
        return ((x << b) | (x >> (64 - b))) & MASK

    v = [0x736F6D6570736575, 0x646F72616E646F6D, 0x6C7967656E657261, 0x7465646279746573]

    def rounds(n):
        for _ in range(n):
            v[0] = (v[0] + v[1]) & MASK; v[1] = rotl(v[1], 13) ^ v[0]; v[0] = rotl(v[0], 32)
            v[2] = (v[2] + v[3]) & MASK; v[3] = rotl(v[3], 16) ^ v[2]
            v[0] = (v[0] + v[3]) & MASK; v[3] = rotl(v[3], 21) ^ v[0]
            v[2] = (v[2] + v[1]) & MASK; v[1] = rotl(v[1], 17) ^ v[2]; v[2] = rotl(v[2], 32)

    padded = data + b"\0" * (7 - len(data) % 8) + bytes([len(data) & 255])
    for i in range(0, len(padded), 8):
        word = int.from_bytes(padded[i:i + 8], "little")
        v[3] ^= word
        rounds(2)
        v[0] ^= word
    v[2] ^= 255
    rounds(4)
    return v[0] ^ v[1] ^ v[2] ^ v[3]


# The example of the paper's appendix has another key; this is the zero key over nothing, from the reference code.
assert siphash24(b"") == 0x1E924B9D737700D7

ring = sorted((siphash24(f"{shard}#{i}".encode()), shard) for shard in ("shard1", "shard2", "shard3", "shard4") for i in range(1000))
points = [point for point, _ in ring]


def target(slot: int) -> str:
    return ring[bisect.bisect_left(points, siphash24(slot.to_bytes(2, "big"))) % len(ring)][1]


state = 1
for n in range(1000):
    state = (state * 6364136223846793005 + 1442695040888963407) & MASK
    low = 1 + (state >> 33) % (50 if n < 500 else 9007199254740990)
    state = (state * 6364136223846793005 + 1442695040888963407) & MASK
    high = low + (state >> 33) % (1000 if n < 500 else 9007199254740991 - low)
    dialog = f"{low}_{high}"
    slot = siphash24(dialog.encode()) % 4096
    print(dialog, slot, target(slot), sep="\t")
