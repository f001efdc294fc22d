"""From zero and back under KEDA's rules, over real gRPC and on a virtual clock."""

import asyncio

import pytest
from keda_double import KedaDouble, ScaledObject
from scaling_doubles import MODEL, RecordingProvider, Source

from kvrelay_infra.providers import Pool
from kvrelay_router.keda import create_scaler_server

PREFILL, DECODE = Pool.PREFILL, Pool.DECODE


async def test_both_pools_go_from_zero_to_one_to_many_and_back(keda, source, provider):
    source.want(prefill=1, decode=1)
    await keda.until_scaled(PREFILL, 1)
    await keda.until_scaled(DECODE, 1)
    source.want(prefill=3, decode=5)
    await keda.advance(15)
    assert provider.replicas == {PREFILL: 3, DECODE: 5}
    source.want(prefill=1, decode=2)
    await keda.advance(285)
    assert provider.replicas == {PREFILL: 3, DECODE: 5}, "the HPA stabilises for 300 s"
    await keda.advance(30)
    assert provider.replicas == {PREFILL: 1, DECODE: 2}
    source.want(prefill=0, decode=0)
    await keda.advance(700)
    assert provider.replicas == {PREFILL: 0, DECODE: 0}


async def test_a_request_wakes_its_pool_without_a_poll(keda, source, provider):
    source.want(decode=1)
    await keda.until_scaled(DECODE, 1)
    assert keda.now == 0
    assert provider.calls == [(DECODE, 1)]


async def test_many_requests_are_one_activation(keda, source, provider):
    for waiting in range(100):
        source.want(decode=1 + waiting // 50)
        await asyncio.sleep(0)
    await keda.until_scaled(DECODE, 1)
    await keda.advance(0)
    assert provider.calls == [(DECODE, 1)]


async def test_one_that_is_over_before_the_next_poll_has_woken_its_pool(keda, source, provider):
    await keda.advance(31)
    source.want(decode=1)
    await keda.until_scaled(DECODE, 1)
    source.want(decode=0)
    await keda.advance(20)
    assert provider.calls == [(DECODE, 1)]


@pytest.mark.parametrize("pool", Pool)
async def test_zero_comes_a_cooldown_after_the_last_activity(keda, source, provider, pool):
    source.want(**{pool: 1})
    await keda.until_scaled(pool, 1)
    await keda.advance(59)  # a poll at 30 s saw it active last
    source.want(**{pool: 0})
    await keda.advance(271)  # 330 s
    assert provider.replicas[pool] == 1
    await keda.advance(30)
    assert provider.replicas[pool] == 0


async def test_a_pool_that_is_active_all_the_time_never_goes_to_zero(keda, source, provider):
    source.want(decode=1)
    await keda.until_scaled(DECODE, 1)
    await keda.advance(900)
    assert provider.calls == [(DECODE, 1)]


async def test_what_is_not_known_holds(keda, source, provider):
    source.want(decode=4)
    await keda.until_scaled(DECODE, 1)
    await keda.advance(15)
    assert provider.replicas[DECODE] == 4
    source.want(decode=None)
    await keda.advance(900)
    assert provider.replicas[DECODE] == 4
    assert any("decode needs is not known" in line for line in keda.unreadable)


async def test_a_router_that_is_gone_holds_too(source, provider):
    server = await create_scaler_server(source, model=MODEL, host="127.0.0.1", port=0)
    scaled = ScaledObject(DECODE, (f"127.0.0.1:{server.port}",), MODEL)
    async with KedaDouble(provider, scaled).running() as keda:
        source.want(decode=2)
        await keda.until_scaled(DECODE, 1)
        await keda.advance(15)
        await server.stop()
        await keda.advance(900)
        assert provider.replicas[DECODE] == 2
        assert keda.unreadable


async def test_of_several_routers_the_one_that_wants_most_is_followed(provider):
    sources = [Source(), Source()]
    servers = [
        await create_scaler_server(source, model=MODEL, host="127.0.0.1", port=0)
        for source in sources
    ]
    addresses = tuple(f"127.0.0.1:{server.port}" for server in servers)
    async with KedaDouble(provider, ScaledObject(DECODE, addresses, MODEL)).running() as keda:
        sources[1].want(decode=1)  # the first knows nothing of it
        await keda.until_scaled(DECODE, 1)
        sources[0].want(decode=2)
        sources[1].want(decode=3)
        await keda.advance(15)
        assert provider.replicas[DECODE] == 3
        sources[0].want(decode=0)
        sources[1].want(decode=1)
        await keda.advance(900)
        assert provider.replicas[DECODE] == 1, "one that is idle does not end what another serves"
    for server in servers:
        await server.stop()


@pytest.mark.parametrize("wanted", range(1, 10))
async def test_up_to_nine_workers_the_hpa_lands_on_the_target(keda, source, provider, wanted):
    source.want(decode=wanted)
    await keda.until_scaled(DECODE, 1)
    await keda.advance(60)
    assert provider.replicas[DECODE] == wanted
    source.want(decode=max(wanted - 1, 1))
    await keda.advance(400)
    assert provider.replicas[DECODE] == max(wanted - 1, 1)


async def test_beyond_nine_its_tolerance_swallows_a_single_worker(keda, source, provider):
    source.want(decode=20)
    await keda.until_scaled(DECODE, 1)
    await keda.advance(60)
    assert provider.replicas[DECODE] == 20
    source.want(decode=21)
    await keda.advance(60)
    assert provider.replicas[DECODE] == 20
    source.want(decode=23)
    await keda.advance(60)
    assert provider.replicas[DECODE] == 23


async def test_a_provider_of_nothing_is_left_alone(keda, provider: RecordingProvider):
    await keda.advance(600)
    assert provider.calls == []
