"""What a worker keeps of its checkpoint for those that start later."""

from kvrelay_engine.models.resident import ResidentWeights
from kvrelay_engine.runner import ModelRunner
from kvrelay_engine.runtime.config import WorkerConfig
from kvrelay_protocol.weights.kept import KeptFiles
from kvrelay_protocol.weights.source import WeightSource


def share_weights(
    config: WorkerConfig, runner: ModelRunner, source: WeightSource
) -> KeptFiles | ResidentWeights | None:
    """The bytes to read from: those on disk if it was told to keep them, else those it computes with.

    None where nobody could ask for them: local files, no manifest, or `--share-weights off`.
    """
    if config.share_weights == "off" or not source.identity:
        return None
    if source.kept is not None:
        return source.kept
    return ResidentWeights(lambda: runner.decoder.weights, runner.config, source)


def why_not_shared(shared: KeptFiles | ResidentWeights) -> str:
    """One line for the log of a start."""
    if isinstance(shared, KeptFiles):
        return f"not for other workers: they could not be kept on disk ({shared.failed})"
    return (
        f"not for other workers: they were rounded ({shared.rounded}); "
        "--share-weights disk keeps them as they came"
    )
