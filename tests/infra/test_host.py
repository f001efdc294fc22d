"""Cores, memory and ports, read from made-up `/proc` and `/sys` trees."""

import socket
from pathlib import Path

import pytest

from kvrelay_infra import host

GIB = 1024**3


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return root


MEMINFO = f"MemTotal: {8 * GIB // 1024} kB\nMemFree: 5 kB\nMemAvailable: {6 * GIB // 1024} kB\n"


def test_without_cgroups_the_machine_counts(tmp_path):
    memory = host.read_memory(tree(tmp_path, {"proc/meminfo": MEMINFO}))
    assert memory == host.Memory(8 * GIB, 6 * GIB)
    assert host.read_cgroup(tmp_path) == host.CgroupLimits(1, None, None)


def test_v2_limits_of_an_outer_group_hold(tmp_path):
    base = "sys/fs/cgroup"
    root = tree(
        tmp_path,
        {
            "proc/meminfo": MEMINFO,
            "proc/self/cgroup": "0::/outer/inner\n",
            f"{base}/cgroup.controllers": "cpu memory\n",
            f"{base}/outer/cpu.max": "150000 100000\n",
            f"{base}/outer/inner/cpu.max": "max 100000\n",
            f"{base}/outer/inner/memory.max": "max\n",
            f"{base}/outer/memory.max": f"{2 * GIB}\n",
            f"{base}/outer/memory.current": f"{GIB}\n",
            f"{base}/outer/memory.stat": f"anon 1\ninactive_file {GIB // 2}\n",
        },
    )
    assert host.read_cgroup(root) == host.CgroupLimits(2, 1.5, 2 * GIB)
    assert host.read_memory(root) == host.Memory(2 * GIB, GIB + GIB // 2)
    assert host.read_cores(root) == 1


def test_v1_limits_are_read_and_its_no_limit_is_none(tmp_path):
    base = "sys/fs/cgroup"
    root = tree(
        tmp_path,
        {
            "proc/meminfo": MEMINFO,
            "proc/self/cgroup": "4:memory:/box\n2:cpu,cpuacct:/box\n0::/\n",
            f"{base}/memory/memory.limit_in_bytes": "9223372036854771712\n",
            f"{base}/memory/memory.usage_in_bytes": "1\n",
            f"{base}/memory/box/memory.limit_in_bytes": f"{GIB}\n",
            f"{base}/memory/box/memory.usage_in_bytes": f"{GIB // 4}\n",
            f"{base}/cpu,cpuacct/box/cpu.cfs_quota_us": "200000\n",
            f"{base}/cpu,cpuacct/box/cpu.cfs_period_us": "100000\n",
        },
    )
    assert host.read_cgroup(root) == host.CgroupLimits(1, 2.0, GIB)
    assert host.read_memory(root) == host.Memory(GIB, GIB - GIB // 4)


def test_this_machine_has_cores_and_memory():
    assert host.read_cores() >= 1
    memory = host.read_memory()
    assert 0 < memory.available <= memory.total


def test_gpus_are_counted_by_device_file_without_the_tool(tmp_path, monkeypatch):
    monkeypatch.setattr(host, "query_nvidia_smi", lambda *_: None)
    for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm"):
        (tmp_path / name).touch()
    assert host.count_gpus(tmp_path) == 2
    monkeypatch.setattr(host, "query_nvidia_smi", lambda *_: "GPU 0: some model\n")
    assert host.count_gpus(tmp_path) == 1


def test_a_listener_makes_a_port_taken_and_a_closed_one_frees_it():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        problem = host.port_problem("127.0.0.1", port)
        assert problem is not None
        assert host.is_port_taken(problem)
        assert host.accepts_connections("127.0.0.1", port)
    assert host.port_problem("127.0.0.1", port) is None
    assert not host.accepts_connections("127.0.0.1", port)


def test_an_unknown_host_is_a_problem_but_not_a_taken_port():
    problem = host.port_problem("no.such.host.invalid", 80)
    assert problem is not None
    assert not host.is_port_taken(problem)


_RANGE = "proc/sys/net/ipv4/ip_local_port_range"


@pytest.mark.parametrize(
    ("setting", "limit"), [("20000\t60999\n", 20_000), ("", 32_768), ("nonsense", 32_768)]
)
def test_a_free_port_is_none_that_the_kernel_gives_to_connections(tmp_path, setting, limit):
    tree(tmp_path, {_RANGE: setting})
    ports = {host.free_port("127.0.0.1", tmp_path) for _ in range(20)}
    assert all(10_000 <= port < limit for port in ports)
    assert len(ports) > 1


def test_a_kernel_that_takes_all_ports_for_connections_still_leaves_one(tmp_path):
    tree(tmp_path, {_RANGE: "1024\t65535\n"})
    port = host.free_port("127.0.0.1", tmp_path)
    assert host.port_problem("127.0.0.1", port) is None
