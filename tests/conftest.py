"""What every test may rely on, however the suite was started."""

import contextlib
import signal

with contextlib.suppress(ImportError):  # the tests on a GPU machine go without
    from hypothesis import settings

    # The same examples in every run, however long one takes: what fails is what changed.
    # `--hypothesis-profile=default` draws others.
    settings.register_profile("suite", derandomize=True, deadline=None)
    settings.load_profile("suite")


def pytest_configure() -> None:
    # A shell starts background jobs with SIGINT ignored, and children would inherit that.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
