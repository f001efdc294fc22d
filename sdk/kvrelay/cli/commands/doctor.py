"""`kvrelay doctor`."""

from types import SimpleNamespace

from kvrelay.cli.command import Command
from kvrelay.cli.flags import Flag, boolean


def _run(values: SimpleNamespace) -> int:
    from kvrelay.cli.doctor import run_doctor

    return run_doctor(values)


DOCTOR = Command(
    "doctor",
    "Report versions, devices, limits and the measured transport, as text to paste.",
    (
        Flag(
            "--skip-probe",
            "leave out the transfer between two processes",
            boolean,
            False,
            "doctor",
            switch=True,
        ),
    ),
    _run,
)
