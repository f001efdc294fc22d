"""A scaler on a port of its own, and KEDA with a ScaledObject for each pool."""

from collections.abc import AsyncIterator

import pytest
from keda_double import KedaDouble, ScaledObject
from scaling_doubles import MODEL, RecordingProvider, Source

from kvrelay_infra.providers import Pool
from kvrelay_router.keda import ScalerServer, create_scaler_server


@pytest.fixture
def source() -> Source:
    return Source()


@pytest.fixture
async def server(source: Source) -> AsyncIterator[ScalerServer]:
    served = await create_scaler_server(source, model=MODEL, host="127.0.0.1", port=0)
    yield served
    await served.stop()


@pytest.fixture
def provider() -> RecordingProvider:
    return RecordingProvider()


@pytest.fixture
async def keda(server: ScalerServer, provider: RecordingProvider) -> AsyncIterator[KedaDouble]:
    address = (f"127.0.0.1:{server.port}",)
    objects = [ScaledObject(pool, address, MODEL) for pool in Pool]
    async with KedaDouble(provider, *objects).running() as double:
        yield double
