"""What a pipeline's stages say to each other."""

from pathlib import Path

from launch import run_ranks

WORKER = Path(__file__).with_name("pipeline_messages_worker.py")


def test_a_pipeline_sends_no_shapes_and_reads_nothing_of_the_device() -> None:
    """A message about shapes came before every micro-batch, and the host waited for eleven values to read it."""
    for output in run_ranks(2, WORKER):
        assert "no shapes were sent" in output
