"""The record of a run: metrics.jsonl on disk first, MLflow and the terminal behind it."""

from d2v_scale.tracking.config import TrackingConfig
from d2v_scale.tracking.environment import environment_tags, write_environment
from d2v_scale.tracking.events import log_evaluation
from d2v_scale.tracking.meters import SpeedMeter, host_values
from d2v_scale.tracking.record import read_records
from d2v_scale.tracking.system import SystemMonitor
from d2v_scale.tracking.tracker import RunTracker

__all__ = [
    "RunTracker",
    "SpeedMeter",
    "SystemMonitor",
    "TrackingConfig",
    "environment_tags",
    "host_values",
    "log_evaluation",
    "read_records",
    "write_environment",
]
