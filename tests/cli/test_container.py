"""`kvrelay serve`: what a platform's variables become, and what is refused before anything starts."""

import pytest

from kvrelay.cli.commands.serve import FOREIGN, SERVE_FLAGS
from kvrelay.cli.container import PLATFORMS, first_line, recognise, stack_values
from kvrelay.cli.main import main
from kvrelay.cli.settings import resolve
from kvrelay_protocol.errors import UsageError

S3 = "s3://bucket/model"
PORTS = "requests and /ping are answered on one port; set them alike"


@pytest.fixture
def serve(tmp_path):
    """Platform and values of a container with these variables and arguments."""

    def told(environ=None, folder=tmp_path / "absent", **given):
        environ = environ or {}
        return stack_values(resolve(SERVE_FLAGS, given, environ=environ), environ, FOREIGN, folder)

    return told


@pytest.mark.parametrize(
    ("environ", "name", "port", "grace", "starting", "limit"),
    [
        ({"K_SERVICE": "llm", "PORT": "9000"}, "cloud-run", 9000, 7, 503, 600),
        ({"RUNPOD_POD_ID": "x", "PORT": "80", "PORT_HEALTH": "80"}, "runpod", 80, 7, 204, 325),
        ({"PORT_HEALTH": "5000"}, "runpod", 5000, 7, 204, 325),
        ({"SAGEMAKER_BIND_TO_PORT": "8081"}, "sagemaker", 8081, 27, 503, 475),
        ({}, "other", 8080, 7, 503, 600),
    ],
)
def test_a_platform_is_known_by_its_variables(serve, environ, name, port, grace, starting, limit):
    platform, values = serve(environ | {"KVRELAY_MODEL": S3})
    assert platform.name == name
    assert (values.host, values.port, values.model) == ("0.0.0.0", port, S3)
    assert (values.prefill, values.decode, values.transport) == (0, 1, "inproc")
    assert (values.drain_grace, values.request_timeout) == (grace, limit)
    assert values.ping_while_starting == starting


def test_what_the_user_says_wins(serve):
    environ = {"K_SERVICE": "llm", "KVRELAY_DRAIN_GRACE": "5", "KVRELAY_REQUEST_TIMEOUT": "20m"}
    platform, values = serve(environ, model=S3, platform="sagemaker")
    assert (platform.name, values.drain_grace, values.request_timeout) == ("sagemaker", 5, 1200)


def test_a_model_in_sagemakers_folder_is_served(serve, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    platform, values = serve(folder=tmp_path)
    assert (platform.name, values.model) == ("sagemaker", str(tmp_path))
    assert serve(folder=tmp_path, model=str(tmp_path))[1].model == str(tmp_path)


def test_the_folder_alone_is_a_mark_of_sagemaker(tmp_path):
    assert recognise({}, tmp_path).name == "sagemaker"
    assert recognise({"K_SERVICE": "llm"}, tmp_path).name == "cloud-run"


@pytest.mark.parametrize("platform", PLATFORMS.values(), ids=lambda p: p.name)
def test_the_first_line_says_that_there_is_one_pool(platform):
    assert "one aggregated pool, no disaggregation" in first_line(platform)
    if platform.grace_s is not None:
        assert platform.grace_s >= 10


CONTRADICTIONS = {
    "ports": ({"PORT": "80", "PORT_HEALTH": "81"}, f"PORT 80, PORT_HEALTH 81: {PORTS}"),
    "own port": ({"PORT": "80", "KVRELAY_PORT": "81"}, f"--port 81, PORT 80: {PORTS}"),
    "no port": ({"PORT": "http"}, "PORT=http must be a whole number from 1 to 65535"),
    "revision": (
        {"KVRELAY_MODEL": "owner/name"},
        (
            "owner/name has no revision, so containers that start later may serve another model; "
            "set KVRELAY_REVISION to a commit of it"
        ),
    ),
    "second pool": (
        {"KVRELAY_PREFILL": "1"},
        (
            "KVRELAY_PREFILL=1: kvrelay serve has no --prefill, for it runs one decode worker alone; "
            "remove it, or run kvrelay up"
        ),
    ),
    "secret": (
        {"KVRELAY_JOIN_TOKEN": "hunter2"},
        (
            "KVRELAY_JOIN_TOKEN=***: kvrelay serve has no --join-token, for it runs one decode worker "
            "alone; remove it, or run kvrelay up"
        ),
    ),
    "models": (
        {"SAGEMAKER_MULTI_MODEL": "true"},
        "SAGEMAKER_MULTI_MODEL=true: one container serves one model; use an endpoint for each",
    ),
    "key": (
        {"SAGEMAKER_BIND_TO_PORT": "8080", "KVRELAY_API_KEY": "k"},
        (
            "--api-key: SageMaker hands on no header that could carry a key, so every request would be "
            "refused; remove it, access is by IAM"
        ),
    ),
    "TLS": (
        {"K_SERVICE": "x", "KVRELAY_TLS_CERT": __file__},
        (
            "--tls-cert, --tls-key: Cloud Run speaks plain HTTP to the container and ends TLS itself; "
            "remove them"
        ),
    ),
    "grace": (
        {"K_SERVICE": "x", "KVRELAY_DRAIN_GRACE": "30"},
        "--drain-grace 30: Cloud Run kills the container 10 s after SIGTERM; 7 leaves time to end",
    ),
}


@pytest.mark.parametrize(("environ", "line"), CONTRADICTIONS.values(), ids=CONTRADICTIONS)
def test_what_contradicts_is_one_line(serve, environ, line):
    with pytest.raises(UsageError) as caught:
        serve({"KVRELAY_MODEL": S3} | environ)
    assert caught.value.message == line


def test_no_model_says_where_one_is_looked_for(serve, tmp_path):
    (tmp_path / "there").mkdir()
    for name, lacks in (("absent", "is not there"), ("there", "has no config.json")):
        folder = tmp_path / name
        with pytest.raises(UsageError) as caught:
            serve(folder=folder)
        (line,) = caught.value.message.splitlines()
        assert line.startswith("no model: set KVRELAY_MODEL to s3://bucket/prefix")
        assert line.endswith(f"put one into {folder}, which {lacks}")


def test_two_models_are_one_too_many(serve, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UsageError, match=f"^two models: {S3} and the one in {tmp_path};"):
        serve(folder=tmp_path, model=S3)


def test_a_revision_that_was_chosen_is_taken(serve):
    assert serve(model="owner/name", revision="main")[1].revision == "main"


def test_all_that_is_wrong_is_said_at_once(monkeypatch, capsys):
    monkeypatch.setenv("KVRELAY_DECODE", "2")
    monkeypatch.setenv("KVRELAY_MODEL", "owner/name")
    monkeypatch.setenv("PORT", "0")
    assert main(["serve"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[1] for line in lines] == ["KVRELAY_DECODE=2:", "owner/name", "PORT=0"]
