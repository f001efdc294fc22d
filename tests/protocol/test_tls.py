"""TLS files are read once, at the start, and what is wrong with them is one line."""

import re

import pytest
from certificates import Authority

from kvrelay_protocol.errors import UsageError
from kvrelay_protocol.tls import read_tls

FLAGS = ("--cert", "--key", "--ca")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("certificates")


@pytest.fixture(scope="module")
def authority(folder):
    return Authority(folder)


@pytest.fixture(scope="module")
def router(authority):
    return authority.issue("127.0.0.1")


def test_files_that_fit_are_read(authority, router) -> None:
    files = read_tls(router.cert, router.key, authority.cert, flags=FLAGS)
    assert files.certificate == router.cert.read_bytes()
    assert files.key == router.key.read_bytes()
    assert files.authority == authority.cert.read_bytes()
    assert read_tls(None, None, None, flags=FLAGS) is None


def test_what_does_not_fit_is_one_line_with_flags_and_files(
    authority, router, folder, tmp_path
) -> None:
    other = authority.issue("other.example")
    missing = tmp_path / "missing.pem"
    (garbage := tmp_path / "garbage.pem").write_text("no certificate\n")
    cases = [
        ((router.cert, None, None), "--cert needs --key"),
        ((None, router.key, None), "--key needs --cert"),
        ((router.cert, other.key, None), f"can't use --cert {router.cert} with --key {other.key}"),
        ((missing, router.key, None), f"can't use --cert {missing}"),
        ((garbage, router.key, None), f"can't use --cert {garbage}"),
        ((router.cert, garbage, None), f"with --key {garbage}"),
        ((None, None, missing), f"can't use --ca {missing}: No such file"),
        ((None, None, garbage), f"can't use --ca {garbage}"),
    ]
    for files, words in cases:
        with pytest.raises(UsageError, match=re.escape(words)) as caught:
            read_tls(*files, flags=FLAGS)
        assert "\n" not in caught.value.message


def test_a_key_behind_a_passphrase_is_refused_and_not_asked_for(router, tmp_path) -> None:
    import subprocess

    locked = tmp_path / "locked.pem"
    command = ["openssl", "ec", "-aes256", "-passout", "pass:x", "-in", router.key, "-out", locked]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    with pytest.raises(UsageError, match="can't use --cert"):
        read_tls(router.cert, locked, None, flags=FLAGS)
