"""An environment that can't work is refused at start, by name, within seconds."""

import asyncio
import os
import sys
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvrelay_protocol.errors import PeerLost, TransportMisconfigured
from kvrelay_transfer.transport import create_transport
from kvrelay_transfer.ucx_env import (
    UcxOptions,
    carries,
    check_devices,
    check_resources,
    check_tls,
    ucx_config,
)

SHARED = ("sm", "shm", "mm", "posix", "sysv", "cma", "xpmem", "knem", "\\cma", "cma:aux")
START = """
import asyncio, sys
from kvrelay_protocol.errors import TransportMisconfigured
from kvrelay_transfer.transport import create_transport
async def main():
    transport = create_transport(sys.argv[1])
    try:
        await transport.start()
    except TransportMisconfigured as error:
        print("refused:", error)
        return
    print("started:", transport.chosen)
    {end}
asyncio.run(main())
"""


async def start(
    env: dict[str, str], uri: str = "ucx://", end: str = "await transport.close()"
) -> tuple[int, str, str]:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-W",
        "error",
        "-c",
        START.replace("{end}", end),
        uri,
        env={**os.environ, **env},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await asyncio.wait_for(process.communicate(), 60)
    return process.returncode or 0, out.decode(), err.decode()


@pytest.mark.parametrize(
    ("env", "words"),
    [
        ({"UCX_TLS": "sm"}, ["UCX_TLS='sm'", "unset it", "tcp"]),
        ({"UCX_TLS": "cma,tcp"}, ["UCX_TLS='cma,tcp'", "UCX_TLS=tcp"]),
        ({"UCX_TLS": "posix"}, ["UCX_TLS='posix'", "cma aborts this process", "UCX_TLS=tcp"]),
        ({"UCX_TLS": "tcp,\\cma"}, ["names shared memory (\\cma)", "UCX_TLS=tcp"]),
        ({"UCX_TLS": "tcp,mm:aux"}, ["names shared memory (mm:aux)", "UCX_TLS=tcp"]),
        ({"UCX_TLS": "^all"}, ["UCX_TLS='^all,sm'", "unset"]),
        ({"UCX_TLS": "self"}, ["UCX_TLS='self'", "unset"]),
        ({"UCX_TLS": "rc_nonsense"}, ["UCX_TLS='rc_nonsense'", "unset"]),
        ({"UCX_NET_DEVICES": "mlx9_9:1"}, ["UCX_NET_DEVICES='mlx9_9:1'", "lo", "Unset"]),
        ({"UCX_NET_DEVICES": "lo,mlx9_9:1"}, ["UCX_NET_DEVICES", "mlx9_9:1"]),
    ],
)
async def test_a_poisoned_variable_is_named_with_its_value_and_the_fix(env, words):
    code, out, err = await start(env)
    assert code == 0, err
    assert out.startswith("refused: ")
    assert len(out.splitlines()) == 1, "one clear line"
    assert all(word in out for word in words), out
    assert err == ""


@pytest.mark.parametrize(
    "env",
    [
        {},
        *(
            {"UCX_TLS": value}
            for value in ("tcp", "all", " all", "^cma", "^posix", "^sm", "tcp,all")
        ),
    ],
)
async def test_a_sane_environment_starts(env):
    code, out, err = await start(env)
    assert (code, err) == (0, "")
    assert out.startswith("started: tcp/")


@pytest.mark.parametrize(
    "end", ["pass", "transport.receive(1, bytearray(10))", "import os; os._exit(0)"]
)
async def test_an_exit_without_close_is_clean_and_quick(end: str):
    code, out, err = await start({}, end=end)
    assert (code, err) == (0, "")
    assert out.startswith("started: ")


async def test_a_required_fabric_that_is_absent_is_refused():
    code, out, _ = await start({}, uri="ucx://?require=rc,dc")
    assert code == 0
    assert out.startswith("refused: --require-transport rc,dc: UCX chose tcp/")
    assert all(word in out for word in ("UCX_TLS='^sm'", "UCX_NET_DEVICES='all'")), out


async def test_a_required_fabric_that_is_there_starts():
    code, out, err = await start({}, uri="ucx://?require=rc,tcp")
    assert (code, err) == (0, "")
    assert out.startswith("started: tcp/")


@pytest.mark.parametrize(
    ("lanes", "names", "met"),
    [
        ("tcp/lo", "tcp", True),
        ("tcp/lo", "rc, tcp", True),
        ("tcp/lo", "rc", False),
        ("rc_mlx5/mlx5_0:1+tcp/eth0", "rc", True),
        ("rc_mlx5/mlx5_0:1", "rc_mlx5", True),
        ("rc_mlx5/mlx5_0:1", "rc_verbs,dc", False),
        ("cuda_copy/cuda+tcp/lo", "cuda_ipc", False),
        ("cuda_ipc/cuda+tcp/lo", "cuda_ipc", True),
        ("dc_mlx5/mlx5_0:1", "d", False),
        ("", "tcp", False),
    ],
)
def test_a_transport_goes_by_its_name_or_that_of_its_family(lanes: str, names: str, met: bool):
    assert carries(lanes, names) is met


async def test_a_peer_reached_by_less_than_was_required_is_given_up():
    """What two workers of one process use says nothing about another host."""
    strict = create_transport("ucx://?require=tcp")
    other = create_transport("ucx://")
    await strict.start()
    await other.start()
    strict.options = replace(strict.options, require="rc")
    with pytest.raises(PeerLost, match="--require-transport rc: UCX chose tcp/"):
        await strict.send(other.address, 1, bytes(100_000))
    await strict.abort()
    await other.abort()


async def test_an_argument_beats_the_environment():
    _, out, _ = await start({"UCX_TLS": "cma"}, uri="ucx://?tls=tcp")
    assert out.startswith("started: tcp/")


@pytest.mark.parametrize(
    ("value", "policy"),
    [
        ("", "^sm"),
        ("all", "^sm"),
        (" all ", "^sm"),
        ("all,", "^sm"),
        ("tcp,all", "^sm"),
        (" ^ cma", "^cma,sm"),
        ("^cma", "^cma,sm"),
        ("^sm", "^sm"),
        ("rc,cuda_copy,cuda_ipc", "rc,cuda_copy,cuda_ipc"),
        ("tcp , self", "tcp,self"),
    ],
)
def test_the_policy_never_contains_shared_memory(value: str, policy: str):
    assert check_tls("UCX_TLS", value) == policy


@pytest.mark.parametrize("value", ["shm", "mm", "posix,tcp", "xpmem", "tcp,knem", ",", "^"])
def test_a_list_with_shared_memory_or_nothing_is_refused(value: str):
    with pytest.raises(TransportMisconfigured, match="UCX_TLS"):
        check_tls("UCX_TLS", value)


@given(
    st.lists(st.sampled_from(["tcp", "rc", "all", "", " ", *SHARED]), min_size=1, max_size=4),
    st.sampled_from(["", "^", " ^", "^ "]),
    st.sampled_from([",", " ,", ", "]),
)
def test_no_list_lets_shared_memory_in(names: list[str], sign: str, comma: str):
    value = sign + comma.join(names)
    try:
        policy = check_tls("UCX_TLS", value)
    except TransportMisconfigured:
        return
    listed = policy.removeprefix("^").split(",")
    if policy.startswith("^"):
        assert "sm" in listed
    else:
        assert policy != "all"
        assert not set(listed) & set(SHARED)


def test_what_was_opened_in_the_end_has_the_last_word():
    check_resources(["tcp/lo", "self/memory", "cuda_ipc/cuda"])
    with pytest.raises(TransportMisconfigured, match=r"shared memory \(cma/memory, posix/memory\)"):
        check_resources(["tcp/lo", "posix/memory", "cma/memory"])


async def test_ucx_says_what_it_opened():
    started = create_transport("ucx://?tls=tcp")
    await started.start()
    assert set(started._worker.resources) >= {"tcp/lo"}
    assert all(each.startswith("tcp/") for each in started._worker.resources)
    await started.abort()


def test_devices_that_exist_are_accepted():
    check_devices("UCX_NET_DEVICES", "all")
    check_devices("UCX_NET_DEVICES", "lo")


def test_the_environment_is_only_read_where_no_option_is_given():
    config = ucx_config(UcxOptions(tls="tcp", devices="lo"), {"UCX_TLS": "cma"})
    assert (config["TLS"], config["NET_DEVICES"]) == ("tcp", "lo")


@pytest.mark.parametrize(
    ("uri", "words"),
    [
        ("nccl://", "no transport for 'nccl://'"),
        ("ucx", "no transport"),
        ("ucx://?colour=red", "no option 'colour'"),
        ("ucx://?chunk_bytes=big", "positive number, not 'big'"),
        ("ucx://?window=0", "positive number, not '0'"),
        ("inproc://?x=1", "no options"),
    ],
)
def test_a_uri_that_means_nothing_is_refused(uri: str, words: str):
    with pytest.raises(TransportMisconfigured, match=words):
        create_transport(uri)
