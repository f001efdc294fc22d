import pytest

from kvrelay_protocol import errors
from kvrelay_protocol.errors import KvrelayError, WireError, error_from_wire, error_to_wire


def _all(cls: type[KvrelayError]) -> list[type[KvrelayError]]:
    return [cls, *(leaf for sub in cls.__subclasses__() for leaf in _all(sub))]


LEAVES = [cls for cls in _all(KvrelayError) if not cls.__subclasses__()]


@pytest.mark.parametrize("cls", LEAVES, ids=lambda cls: cls.__name__)
def test_an_error_survives_the_wire(cls):
    wire = error_to_wire(cls("what happened"))
    back = error_from_wire(wire)
    assert type(back) is cls
    assert back.message == "what happened"


def test_codes_and_start_up_exit_codes_are_distinct():
    ours = [cls for cls in LEAVES if cls.__module__ == errors.__name__]
    codes = [cls.code for cls in ours]
    assert len(set(codes)) == len(codes)
    exits = [cls.exit_code for cls in ours if issubclass(cls, errors.StartupError)]
    exits.append(errors.TransportMisconfigured.exit_code)
    assert len(set(exits)) == len(exits)
    assert 0 not in exits
    assert 1 not in exits


def test_an_unknown_exception_does_not_leak_its_text():
    wire = error_to_wire(ValueError("the prompt was: secret"))
    assert wire == WireError("internal_error", "internal error (ValueError)")


def test_a_code_of_a_newer_peer_is_kept_in_the_text():
    back = error_from_wire(WireError("quantum_error", "sorry"))
    assert type(back) is errors.InternalError
    assert back.message == "quantum_error: sorry"


def test_the_drawn_tree_names_every_class():
    for cls in LEAVES:
        if cls.__module__ == errors.__name__:
            assert cls.__name__ in errors.__doc__
