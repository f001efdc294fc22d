"""Where a worker takes its weights from: local files, a store, or a worker that has them already."""

from types import SimpleNamespace
from typing import TYPE_CHECKING

from kvrelay.cli.preflight import transport_uri
from kvrelay_protocol.model_files import ModelFiles
from kvrelay_protocol.weights.peer import FindPeer, PeerRanges
from kvrelay_protocol.weights.source import WeightSource
from kvrelay_protocol.weights.stream import StreamOptions

if TYPE_CHECKING:
    from kvrelay_engine.runtime.config import WorkerConfig


def stream_options(values: SimpleNamespace, model: ModelFiles | None = None) -> StreamOptions:
    """How weights that are not here are fetched, and whether they are kept for others."""
    given = values.link_gbps * 1e9 / 8 if values.link_gbps else None
    keep = model is not None and values.share_weights == "disk"
    return StreamOptions(
        streams=values.fetch_streams,
        part_bytes=values.fetch_part,
        window_bytes=values.fetch_window,
        link_bytes_per_s=given,
        keep_in=model.directory if model is not None and keep else None,
    )


def open_weights(role: str, name: str, model: ModelFiles, values: SimpleNamespace) -> WeightSource:
    """Begin to fetch a worker's weights; nothing of it waits for a router.

    Raises:
        InvalidModel: they are incomplete, or a file is damaged.
    """
    remote = model.remote is not None
    find_peer = None
    if remote and values.weights_from != "store":
        find_peer = _finder(role, name, model, values)
    return model.open_weights(stream_options(values, model), find_peer)


def _finder(role: str, name: str, model: ModelFiles, values: SimpleNamespace) -> FindPeer:
    def find(weights_id: str) -> PeerRanges | None:
        # Imported on the thread that searches: gRPC and UCX, while the store's client is made.
        from kvrelay_engine.runtime.find_weights import WeightSearch
        from kvrelay_engine.runtime.join_tls import join_tls
        from kvrelay_protocol import fleet_pb2 as pb
        from kvrelay_transfer.weights.client import UNHURRIED, Patience, PeerReader

        uri = transport_uri(values)
        config = join_config(name, model, values)
        search = WeightSearch(
            config.routers,
            join_tls(config),
            name=name,
            role=pb.ROLE_PREFILL if role == "prefill" else pb.ROLE_DECODE,
            model=config.model_name,
            join_token=config.join_token,
            transport=uri.partition(":")[0],
        )
        # A transport takes a moment to start: only for somebody to read from.
        if search.ask(weights_id) is None:
            return None
        reader = PeerReader(uri, UNHURRIED if values.weights_from == "peer" else Patience())
        try:
            found = search.ask(weights_id, reader.address)
            if found is not None:
                reader.read_from(found, weights_id)
                return reader
        except BaseException:
            reader.close()
            raise
        reader.close()
        return None

    return find


def join_config(name: str, model: ModelFiles, values: SimpleNamespace) -> "WorkerConfig":
    """As much of the worker's settings as it takes to dial its routers."""
    from kvrelay_engine.runtime.config import WorkerConfig

    return WorkerConfig(
        name=name,
        model_dir=model.directory,
        model_name=values.served_model_name or model.name,
        router=values.join,
        join_token=values.join_token,
        router_ca=values.router_ca,
        router_cert=values.router_cert,
        router_key=values.router_key,
        router_name=values.router_name or "",
    )
