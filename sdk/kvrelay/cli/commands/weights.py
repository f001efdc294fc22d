"""`kvrelay weights push DIR s3://bucket/prefix`."""

from types import SimpleNamespace

from kvrelay.cli.command import Command
from kvrelay.cli.flags import Flag, text


def _run(values: SimpleNamespace) -> int:
    from kvrelay.cli.weights import run_weights

    return run_weights(values)


WEIGHTS = Command(
    "weights",
    "Upload a model folder to S3 with checksums that every start verifies as it loads.",
    (
        Flag("action", "push", text, metavar="push"),
        Flag("directory", "model folder, hub id or kvrelay-demo", text, metavar="DIR"),
        Flag("target", "s3://bucket/prefix, one prefix a revision", text, metavar="URL"),
        Flag("--revision", "branch, tag or commit of a hub id", text, group="model", metavar="REV"),
    ),
    _run,
    epilog="Region, credentials and endpoint are found as boto3 does (AWS_ENDPOINT_URL...).",
)
