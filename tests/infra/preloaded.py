"""What the fake worker needs, and who imported it."""

import os
import time

PID = os.getpid()


def load() -> None:
    pass


def fail() -> None:
    raise ImportError("nothing here")


def hang() -> None:
    time.sleep(600)
