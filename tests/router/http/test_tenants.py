"""Requests share cached prefixes within one API key only."""

import httpx
import pytest

BODY = {"model": "org/tiny", "prompt": [5, 6, 7], "max_tokens": 1}


@pytest.fixture
def salt_of(make_app, service):
    """The cache salt that a request with this key and body reaches the service with."""

    async def ask(key: str | None, keys: tuple[str, ...], **body: object) -> bytes:
        transport = httpx.ASGITransport(make_app(api_keys=keys))
        headers = {"authorization": f"Bearer {key}"} if key else {}
        async with httpx.AsyncClient(transport=transport, base_url="http://edge") as client:
            answer = await client.post("/v1/completions", json=BODY | body, headers=headers)
        assert answer.status_code == 200, answer.text
        salt: bytes = service.last.request.cache_salt
        return salt

    return ask


async def test_two_keys_never_share_a_prefix_whatever_salt_they_send(salt_of):
    keys = ("key-one", "key-two")
    ones, twos = [
        {await salt_of(key, keys, **salt) for salt in ({}, {"cache_salt": "s"})} for key in keys
    ]
    assert len(ones) == len(twos) == 2
    assert not ones & twos


async def test_one_key_shares_with_itself_and_its_salt_divides_further(salt_of):
    plain, again = [await salt_of("key-one", ("key-one",)) for _ in range(2)]
    salted = await salt_of("key-one", ("key-one",), cache_salt="s")
    assert plain == again != salted


async def test_the_salt_does_not_tell_the_key(salt_of):
    salt = await salt_of("key-one", ("key-one",))
    assert b"key-one" not in salt
    assert len(salt) == 16


async def test_without_keys_the_salt_is_the_clients_own(salt_of):
    assert await salt_of(None, ()) == b""
    assert await salt_of(None, (), cache_salt="s") == b"s"
