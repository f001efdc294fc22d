"""Engines as long-lived processes. `main.py` is run by path, in the interpreter of each engine.

Peers live in environments without kvrelay: nothing here but `kvrelay_llm` imports it.
"""
