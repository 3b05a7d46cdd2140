"""Codes of an exported head, from features. Needs NumPy and safetensors alone.

from codes import assign
numbers = assign("HEAD_FOLDER", features)       # (n, in_dim) -> (n,)
"""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file


def mix(x):
    """Apply SplitMix64's finalizer to unsigned 64-bit integers."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


def fair_signs(about, start, stop):
    """Draw rows start..stop-1 of an endless table of -1 and +1. Shape: -> (stop - start, embed_dim)"""
    width, golden = about["embed_dim"], 0x9E3779B97F4A7C15
    words = -(-width // 64)
    stream = mix(np.array([(about["seed"] + 1) * golden % 2**64], dtype=np.uint64))
    counter = np.arange(start * words + 1, stop * words + 1, dtype=np.uint64)
    bits = mix(stream + counter * golden).astype("<u8").view(np.uint8).reshape(stop - start, -1)
    return np.unpackbits(bits, axis=1, count=width, bitorder="little").astype(np.float64) * 2 - 1


def dictionary(head, about, start, stop):
    """Return codes start..stop-1. Shape: -> (stop - start, embed_dim)"""
    if about["dictionary"] == "rademacher":
        return fair_signs(about, start, stop)
    width, j = about["embed_dim"], np.arange(start, stop)  # hadamard: a row of H times its block's signs
    signs = fair_signs(about, start // width, (stop - 1) // width + 1)
    return head["hadamard"][j % width] * signs[j // width - start // width]


def embed(head, about, features):
    """Return the embeddings. Shape: (n, in_dim) -> (n, embed_dim)"""
    a = features.astype(np.float64) @ head["linear.weight"].T + head["linear.bias"]
    a = (a - head["norm.running_mean"]) / np.sqrt(head["norm.running_var"] + about["norm_eps"])
    a = a * head["norm.weight"] + head["norm.bias"]
    return np.tanh(a) if about["activation"] == "tanh" else a / np.linalg.norm(a, axis=1, keepdims=True)


def assign(folder, features, block=8192):
    """Return the number of the code nearest to each embedding. Shape: (n, in_dim) -> int64 (n,)"""
    head, about = load_file(Path(folder, "head.safetensors")), json.loads(Path(folder, "head.json").read_text())
    h = embed(head, about, features)
    best, codes = np.full(len(h), -np.inf), np.zeros(len(h), dtype=np.int64)
    for start in range(0, about["out_dim"], block):
        scores = h @ dictionary(head, about, start, min(start + block, about["out_dim"])).T
        better = scores.max(axis=1) > best
        codes[better], best[better] = start + scores.argmax(axis=1)[better], scores.max(axis=1)[better]
    return codes
