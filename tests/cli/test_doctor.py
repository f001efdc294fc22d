"""`kvrelay doctor` is plain text without secrets, and says whether a stack can run here."""

import sys
from types import SimpleNamespace

import pytest

from kvrelay.cli import doctor
from kvrelay.cli.main import main
from kvrelay_protocol.errors import TransportMisconfigured


@pytest.fixture
def probed(monkeypatch):
    """What the transport probe does, without its processes."""

    def install(probe):
        module = SimpleNamespace(probe=probe)
        monkeypatch.setitem(sys.modules, "kvrelay_transfer.probe", module)

    return install


def test_the_report_has_every_section_and_no_secret(monkeypatch, capsys):
    monkeypatch.setenv("KVRELAY_JOIN_TOKEN", "hunter2")
    assert main(["doctor", "--skip-probe"]) == 0
    out = capsys.readouterr().out
    titles = [line for line in out.splitlines() if not line.startswith(" ")]
    assert titles == ["versions", "machine", "devices", "limits", "environment", "verdict"]
    assert "hunter2" not in out
    assert "KVRELAY_JOIN_TOKEN=*** (7 characters)" in out
    assert "\x1b" not in out


def test_a_missing_package_fails_the_report(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "_NEEDED", ("not-a-package",))
    monkeypatch.setattr(doctor, "_PACKAGES", ("not-a-package",))
    assert main(["doctor", "--skip-probe"]) == 1
    assert "not-a-package is not installed: pip install 'kvrelay[all]'" in capsys.readouterr().out


def test_the_transport_and_its_speed_are_reported(probed, capsys):
    result = SimpleNamespace(
        transport="tcp/lo", gb_per_s={1 << 20: 0.61, 1 << 26: 1.25}, latency_us=81.4
    )
    probed(lambda: result)
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "  ucx               tcp/lo between two local processes" in out
    assert "  speed 1 MiB       0.61 GB/s" in out
    assert "  speed 64 MiB      1.25 GB/s" in out
    assert "  latency 4 KiB     81 us one way" in out


def test_a_refused_transport_fails_the_report(probed, capsys):
    def probe():
        raise TransportMisconfigured("UCX_TLS=sm leaves no usable transport")

    probed(probe)
    assert main(["doctor"]) == 1
    assert "transport: UCX_TLS=sm leaves no usable transport" in capsys.readouterr().out
