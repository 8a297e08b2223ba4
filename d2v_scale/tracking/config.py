"""What is recorded about a run, and how often."""

from dataclasses import dataclass

from d2v_scale.errors import ConfigError


@dataclass(kw_only=True)
class TrackingConfig:
    """The record of a run: metrics.jsonl always, MLflow beside it."""

    enabled: bool = True
    """Mirror metrics.jsonl to MLflow. The file itself is always written."""
    experiment: str = "d2v_scale"
    """MLflow experiment; runs of one experiment are compared on one page."""
    run_name: str | None = None
    """Name of the run in MLflow; null: the name of the run directory."""
    log_every: int = 10
    """Steps between records. The first and the last step are always recorded."""
    straggler_factor: float | None = 2.0
    """A rank whose own part of a step takes so many times (above 1) as long as the median of its peers is named; null:
    ranks are not compared, nor are they on GPUs, where NCCL does not say who waited."""
    peak_tflops: float | None = None
    """Peak of one device, TFLOP/s, that `mfu` is a share of; null: bf16 of A100, H100 or H200, elsewhere no mfu."""
    plot_every: int | None = 0
    """Steps between pictures in `plots/`: curves, and what the teacher makes of some samples; 0: only at the end;
    null: never, which spares a short run the seconds that drawing takes."""
    finish_timeout: float = 60.0
    """Seconds the end of a run may wait for MLflow to catch up; what is left then can be sent by
    `d2v sync`. A server that does not answer at all is given up after the first failure."""

    def check(self) -> None:
        """Raises ConfigError for what no run can mean."""
        if self.straggler_factor is not None and self.straggler_factor <= 1:
            raise ConfigError(
                "tracking.straggler_factor",
                f"is {self.straggler_factor}, by which half of the ranks are slow",
                "Give a number above 1, or null to compare no ranks.",
            )
