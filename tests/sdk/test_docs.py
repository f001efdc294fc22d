import re
from pathlib import Path

import pytest

from kvrelay import Finished, TextDelta

PAGE = Path(__file__).parents[2] / "docs" / "sdk.md"
EXAMPLES = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)


def test_the_page_has_examples():
    assert len(EXAMPLES) >= 5


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_every_example_of_the_page_runs(number, kvrelay_server, capsys):
    exec(compile(EXAMPLES[number], f"{PAGE.name}[{number}]", "exec"), {})  # noqa: S102 - our page
    assert "Traceback" not in capsys.readouterr().err


def test_the_fixture_serves_clients_without_arguments(kvrelay_server):
    from kvrelay import Client

    kvrelay_server.queue([TextDelta("yes"), Finished("stop")])
    with Client() as client:
        assert client.chat("shall we?").text == "yes"
