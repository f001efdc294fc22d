"""`kvrelay deploy aws`: plan without AWS, and errors before anything is called."""

import pytest

from kvrelay.cli.main import main

PLACE = ["--region=eu-west-1", "--vpc=vpc-1", "--router-subnets=a", "--router-subnets=b",
         "--worker-subnets=a", "--router-image=router:1", "--worker-image=worker:1"]  # fmt: skip


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("plan must not call AWS")

    monkeypatch.setattr("botocore.client.BaseClient._make_api_call", refuse)
    for name in ("AWS_PROFILE", "AWS_REGION", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nonexistent")


def test_plan_shows_what_is_made_and_what_it_costs_at_zero(capsys):
    assert main(["deploy", "aws", "plan", *PLACE, "--max-decode=4"]) == 0
    out = capsys.readouterr().out
    assert "DecodeService" in out
    assert "at zero" in out
    assert "decode: 0 to 4 x g5.xlarge" in out
    assert "They are not those of eu-west-1." in out


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["deploy"], "platform is missing"),
        (["deploy", "gcp", "plan"], "gcp must be aws"),
        (["deploy", "aws", "burn"], "burn must be plan or apply or status or destroy"),
        (["deploy", "aws", "plan", *PLACE[:2]], "plan needs --router-subnets, --worker-subnets"),
        (["deploy", "aws", "plan", *PLACE[1:]], "no AWS region: give --region"),
        (["deploy", "aws", "plan", *PLACE, "--stack=Big_One"], "--stack Big_One must be at most"),
        (["deploy", "aws", "destroy", PLACE[0]], "give --yes where nobody can be asked"),
    ],
)
def test_what_is_missing_or_wrong_is_one_line(arguments, text, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin.isatty", lambda: False)
    assert main(arguments) == 2
    assert text in capsys.readouterr().err
