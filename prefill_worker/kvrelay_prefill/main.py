"""The prefill worker's process."""

import asyncio

from kvrelay_engine.runtime.config import WorkerConfig
from kvrelay_engine.runtime.host import Advertisement, WorkerHost
from kvrelay_engine.runtime.process import run_process
from kvrelay_engine.runtime.start_report import StartReport
from kvrelay_engine.runtime.startup import Engine, Phases, start_engine
from kvrelay_prefill.scheduler import PrefillScheduler
from kvrelay_prefill.worker import PrefillWorker
from kvrelay_protocol import fleet_pb2 as pb
from kvrelay_protocol.telemetry import Telemetry
from kvrelay_transfer.setup import make_kit
from kvrelay_transfer.weights.server import serve_weights


def run(config: WorkerConfig) -> int:
    """Serve until SIGTERM or SIGINT; returns the exit code."""
    phases = Phases.of_process()
    with StartReport(config, pb.ROLE_PREFILL, begun=phases.begun) as phases.listener:
        return run_process(
            lambda: start_engine(config, phases),
            lambda engine, shutdown: serve(config, engine, phases, shutdown),
        )


async def serve(
    config: WorkerConfig,
    engine: Engine,
    phases: Phases,
    shutdown: asyncio.Event,
) -> None:
    """Join the router with a loaded engine and work until `shutdown`, then drain.

    Raises:
        TransportMisconfigured: the environment leaves no usable transport.
        StartupError: the router refused this worker.
    """
    with phases.phase("start transport"):
        kit = await make_kit(
            config.transport,
            engine.kv_layout,
            staging_count=config.staging_buffers,
            staging_bytes=config.staging_bytes,
        )
    phases.line(f"{'KV travels over':<18} {kit.transport.chosen}")
    telemetry = Telemetry("kvrelay-prefill", instance=config.name)
    phases.trace(telemetry)
    scheduler = PrefillScheduler(
        engine.allocator,
        fingerprint=engine.fingerprint,
        max_batch_tokens=config.max_batch_tokens,
        max_sequences=config.max_sequences,
    )
    host = WorkerHost(config, engine, phases)
    worker = PrefillWorker(host, kit, scheduler, telemetry)
    advertisement = Advertisement(
        role=pb.ROLE_PREFILL,
        kv_layout=engine.kv_layout,
        transport=kit.transport.scheme,
        transport_address=kit.transport.address,
        weights_id=engine.shared_weights.identity if engine.shared_weights else "",
    )
    weights = serve_weights(kit.transport, engine.shared_weights, lambda: worker.open_sequences > 0)
    if weights is not None:
        host.on_weights_offer = weights.offer
    try:
        await host.run(worker, advertisement, scheduler, worker.step, shutdown)
    finally:
        if weights is not None:
            await weights.close()
        await kit.close()
        telemetry.shutdown()
