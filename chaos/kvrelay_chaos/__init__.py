"""Faults injected into a real stack under load, and the proof that nothing came of them.

`kvrelay chaos` starts router and workers as processes, asks them questions whose answers it knows, breaks
things after a plan drawn from a seed, and judges every answer.
"""
