"""What the fork servers import before they make the first process."""


def preload_worker() -> None:
    """Everything a worker needs, and its agent."""
    import kvrelay_chaos.agent
    import kvrelay_chaos.kv_plane  # noqa: F401 - for the workers
    from kvrelay.cli.preload import preload_workers

    preload_workers()


def preload_router() -> None:
    """Everything a router needs: its restart costs its clients as little as a worker's."""
    import kvrelay.cli.processes  # noqa: F401 - for the router
    import kvrelay_router.main  # noqa: F401 - as above
