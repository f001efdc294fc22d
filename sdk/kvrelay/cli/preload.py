"""What every worker imports, for the fork server of `kvrelay up`: neither threads nor devices."""

import contextlib


def preload_workers() -> None:
    """Import the workers' modules, torch and UCX."""
    import kvrelay_decode.main  # noqa: F401 - for the workers
    import kvrelay_prefill.main  # noqa: F401 - for the workers
    from kvrelay_engine.runtime.startup import import_engine
    from kvrelay_transfer.ucx_worker import load_ucx

    import_engine()
    # A worker that needs it says why it does not load.
    with contextlib.suppress(ImportError):
        load_ucx()


def preload_workers_with_s3() -> None:
    """The same and boto3, for weights in S3."""
    preload_workers()
    with contextlib.suppress(ImportError):
        import boto3.session  # noqa: F401 - for the workers
