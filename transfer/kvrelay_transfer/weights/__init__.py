"""Weights from a worker that runs to one that starts, over the transport that carries KV."""
