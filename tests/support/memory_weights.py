"""A checkpoint of one file in memory, and a store that serves it."""

import threading

from kvrelay_protocol.weights.header import StoredTensor
from kvrelay_protocol.weights.source import layer_order
from kvrelay_protocol.weights.stream import RangeFetcher

KIB = 1024
LAYERS = 12
HEAD = 512


def checkpoint(layers=LAYERS, tensor_bytes=8 * KIB):
    """Names in the order of files that are sorted by name: layer 10 before layer 2."""
    names = ["lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"]
    names += [f"model.layers.{n}.{part}.weight" for n in range(layers) for part in ("down", "up")]
    at, tensors = HEAD, {}
    for name in sorted(names):
        tensors[name] = StoredTensor("m", "BF16", (tensor_bytes // 2,), at, at + tensor_bytes)
        at += tensor_bytes
    return tensors, at


class Memory(RangeFetcher):
    """Serves bytes that say where they are; remembers what was asked for."""

    def __init__(self, size):
        self.content = b"".join(bytes([n & 0xFF]) * KIB for n in range(size // KIB + 1))[:size]
        self.asked = []
        self.gate = threading.Event()
        self.gate.set()
        self._lock = threading.Lock()

    def fetch(self, file, start, into, received):
        with self._lock:
            self.asked.append((start, start + len(into)))
        assert self.gate.wait(60)
        into[:] = self.content[start : start + len(into)]
        received(len(into))


def in_order(tensors):
    return sorted(tensors, key=lambda name: (layer_order(name), tensors[name].start))
