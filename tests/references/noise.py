"""SplitMix64 (Steele, Lea and Flood 2014) in Python integers: uniform numbers by seed, tensor, model and element."""

import numpy as np
import xxhash

MASK = (1 << 64) - 1


def splitmix64(state):
    z = state & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def uniform(seed, tensor, model, shape):
    key = xxhash.xxh3_64_intdigest(f"{seed}\0{tensor}\0{model}".encode())
    count = int(np.prod(shape))
    numbers = [(splitmix64(key + (i + 1) * 0x9E3779B97F4A7C15) >> 40) / 2**24 for i in range(count)]
    return np.array(numbers, np.float32).reshape(shape)
