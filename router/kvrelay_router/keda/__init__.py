"""KEDA's external scaler, served by the router: what Kubernetes asks instead of scraping a metric."""

from kvrelay_router.keda.servicer import (
    ExternalScalerServicer,
    ScalerServer,
    ScalingSource,
    create_scaler_server,
    metric_name,
)

__all__ = [
    "ExternalScalerServicer",
    "ScalerServer",
    "ScalingSource",
    "create_scaler_server",
    "metric_name",
]
