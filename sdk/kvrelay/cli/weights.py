"""`kvrelay weights`: models into S3."""

from types import SimpleNamespace

from kvrelay.cli.units import format_size
from kvrelay_protocol.errors import UsageError
from kvrelay_protocol.model_files import MODEL_FILES, resolve_model


def run_weights(values: SimpleNamespace) -> int:
    """Push a model; returns the exit code.

    Raises:
        UsageError: an argument is missing or none of ours.
        InvalidModel: there is no such model, or the upload failed.
    """
    if values.action != "push":
        given = "nothing" if values.action is None else values.action
        raise UsageError(f"kvrelay weights {given}: the one action is push DIR s3://bucket/prefix")
    if values.directory is None or values.target is None:
        raise UsageError("kvrelay weights push needs DIR and s3://bucket/prefix")
    if values.directory.startswith("s3://"):
        raise UsageError(f"{values.directory} is in S3 already; give a folder or a hub id")
    files = resolve_model(values.directory, revision=values.revision)
    files.read_config()

    from kvrelay_protocol.weights.pin import push_model

    def tell(name: str, nbytes: int) -> None:
        print(f"{name:<32} {format_size(nbytes)}", flush=True)

    revision = push_model(files.directory, values.target, MODEL_FILES, tell)
    print(f"{values.target} is at revision {revision}")
    return 0
