"""The training loop's one door to the record of a run."""

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from d2v_scale.process.doing import doing
from d2v_scale.redaction import redact
from d2v_scale.tracking.config import TrackingConfig
from d2v_scale.tracking.environment import origin
from d2v_scale.tracking.events import append_event, earlier_starts
from d2v_scale.tracking.mirror_state import EVENTS_FILE, MirrorState, shown_uri
from d2v_scale.tracking.record import MetricsLog
from d2v_scale.tracking.terminal import Terminal
from d2v_scale.tracking.timeline import Timeline

if TYPE_CHECKING:
    from d2v_scale.batch import Batch
    from d2v_scale.model.stem_config import Kind
    from d2v_scale.plots.gallery import Gallery

STOPPED_TIMEOUT = 3.0
DRAWING_TIMEOUT = 60.0
RunEnd = Literal["done", "requeue", "failed"]


class RunTracker:
    """metrics.jsonl, the terminal, and MLflow behind them. Everything is a no-op where `is_main` is False.

    Nothing here is collective, and nothing of MLflow's can raise or wait: it lives in a process of its own
    (d2v_scale.tracking.follow) which follows the files.
    """

    def __init__(self, run_dir: Path | str, config: TrackingConfig, is_main: bool) -> None:
        self.run_dir = Path(run_dir)
        self.config = config
        self.is_main = is_main
        self._log: MetricsLog | None = None
        self._terminal: Terminal | None = None
        self.timeline: Timeline | None = None
        """What the account of the run's time is made of; None before `start`, and on ranks that keep no record."""
        self._mirror: subprocess.Popen[bytes] | None = None
        self._complained = False
        self._drawing: list[subprocess.Popen[bytes]] = []
        self._curves: subprocess.Popen[bytes] | None = None
        self._curves_due = False

    def start(
        self,
        params: Mapping[str, Any],
        tags: Mapping[str, Any],
        *,
        stems: Mapping[str, str] | None = None,
        resume_step: int | None = None,
        total_steps: int | None = None,
    ) -> None:
        """Open the record. `params`: the resolved recipe (nested is fine). `stems`: of every source that is measured by
        itself. `resume_step`: of the checkpoint loaded.

        Records of later steps, from an attempt that died, are moved to logs/metrics_superseded.jsonl. `total_steps`
        is for the time that remains.
        """
        if not self.is_main:
            return
        self.run_dir.mkdir(parents=True, exist_ok=True)
        (self.run_dir / "logs").mkdir(exist_ok=True)
        self._log = MetricsLog(self.run_dir, resume_step)
        self.timeline = Timeline(self.run_dir, resume_step or 0)
        self._terminal = Terminal(total_steps)
        restarts = earlier_starts(self.run_dir)
        self._event(
            "begin",
            experiment=self.config.experiment,
            run_name=self.config.run_name,
            origin=origin(),
            stems=dict(stems or {}),
        )
        self._event("params", values=flatten(params))
        self._event("tags", values={key: str(value) for key, value in tags.items()} | {"restarts": str(restarts)})
        if self.config.enabled:
            self._start_mirror()

    def __enter__(self) -> "RunTracker":
        return self

    def __exit__(self, *_error: object) -> None:
        """Leave the terminal as it was, also where the run ends in an error."""
        if self._terminal is not None:
            self._terminal.close()

    def due(self, step: int, last_step: int | None = None) -> bool:
        """Whether this step is recorded: the first, the last and every `log_every`-th."""
        return step == 1 or step == last_step or step % self.config.log_every == 0

    def log(self, step: int, samples: int, values: Mapping[str, float]) -> None:
        """Append a record. `step`: completed optimizer steps; `samples`: seen by the whole job so far.

        Reads 0-d tensors, so call it at the steps that are `due` only.
        """
        if self._log is None or self._terminal is None:
            return
        self._terminal.record(self._log.write(step, samples, values))
        if self._log.trouble is not None and not self._complained:
            self._complained = True
            self.message(
                f"{self._log.path} takes no lines ({self._log.trouble}); they are kept in memory and tried again."
            )
        self._curves_due |= bool(self.config.plot_every) and step % (self.config.plot_every or 1) == 0
        # A step has several records: while one drawing runs no other starts, and the next one has them all.
        if self._curves_due and (self._curves is None or self._curves.poll() is not None):
            self._draw_curves()
        self._relay()

    def spent(self, step: int, seconds: Mapping[str, float]) -> None:
        """`step` steps are done; what this process has waited for so far (`SpeedMeter.spent`). Cheap at every step."""
        if self.timeline is not None:
            self.timeline.at(step, seconds)

    def rewinds(self, step: int, seconds: Mapping[str, float]) -> None:
        """`step` steps are done, and the run begins to go back (`seconds`: as for `spent`)."""
        if self.timeline is not None:
            self.timeline.rewinds(step, seconds)

    def rewound(self, step: int) -> None:
        """The run goes on after an earlier step: records of later ones move to logs/metrics_superseded.jsonl."""
        if self._log is None or self.timeline is None:
            return
        self._log.close()
        self._log = MetricsLog(self.run_dir, step)
        self.timeline.rewound(step)

    def message(self, text: str) -> None:
        """Say something at the terminal (main rank only)."""
        if self._terminal is not None:
            self._terminal.message(redact(text))

    def artifact(self, path: Path | str, folder: str = "") -> None:
        """Have MLflow keep a file or directory of the run directory, in `folder` of the run's artifacts."""
        if self.is_main and self._log is not None:
            self._event("artifact", path=os.path.relpath(path, self.run_dir), folder=folder)

    def describe(self, text: str) -> None:
        """Have MLflow show this as the run's description (Markdown), in place of what was said before."""
        if self.is_main and self._log is not None:
            self._event("description", text=redact(text))

    def inputs(self, datasets: Sequence[Mapping[str, str]]) -> None:
        """Have MLflow list these data sets: `name`, `digest`, `source`, what is `said` of it, and its `context`."""
        if self.is_main and self._log is not None and datasets:
            self._event("inputs", datasets=[dict(one) for one in datasets])

    def preview(self, batch: "Batch", kind: "Kind", tokenizer: Path | None = None, name: str = "first_batch") -> None:
        """Draw the first batch with its masks to plots/`name`.png; what goes wrong is said and costs nothing.

        `kind`: of the stem that reads it. `tokenizer`: of a batch of text, so that its words are shown instead of their
        ids.
        """
        if self._log is None:
            return
        path = self.run_dir / "plots" / f"{name}.png"
        try:
            import torch  # not above: the mirror imports this package and has no use for it

            from d2v_scale.modalities.text.tokenizer import open_tokenizer
            from d2v_scale.plots.samples import plot_masks

            decode = open_tokenizer(tokenizer).piece if tokenizer else None
            plot_masks(batch.to(torch.device("cpu")), kind, path, decode=decode)
        except Exception as error:  # a picture may not end a run
            self.message(f"The first batch was not drawn ({error}).")
            return
        self.artifact(path, "plots")

    def pictures(self, step: int, galleries: Sequence["Gallery"]) -> None:
        """Have pictures drawn of some samples of each stem and what the teacher makes of them, by one process."""
        if self._log is None:
            return
        saved = []
        for gallery in galleries:
            path = self.run_dir / "plots" / f".gallery-{step}{gallery.suffix}.pt"
            try:
                path.parent.mkdir(exist_ok=True)
                gallery.save(path)
            except OSError as error:
                self.message(f"The pictures of step {step} were not drawn ({error}).")
                continue
            saved.append(str(path.resolve()))
        if saved:
            self._draw("d2v_scale.plots.gallery", *saved)

    def checkpoint(self, directory: Path, manifest: str, step: int) -> None:
        """Have MLflow keep the manifest of a committed checkpoint, and show the step."""
        if self._terminal is not None:
            self._terminal.checkpoint(step)
        self.artifact(directory / manifest, f"checkpoints/{directory.name}")

    def flush(self) -> None:
        """Force the record to disk; before a checkpoint is committed."""
        if self._log is not None:
            self._log.flush()

    def run_id(self) -> str | None:
        """The MLflow run's id, once the server has answered."""
        return MirrorState.load(self.run_dir).run_id or None

    def finish(self, status: RunEnd, outcome: str = "", verdict: str = "") -> None:
        """Close the record, draw it, and give MLflow up to `finish_timeout` to catch up; one line if it did not.
        `outcome` and `verdict`: sentences on how it ended and on its health.

        A run that was asked to stop waits for `STOPPED_TIMEOUT` at most: the next attempt sends what is left.
        """
        if self._log is None or self._terminal is None:
            return
        self._log.close()
        self._log = None
        if status != "requeue" and self.config.plot_every is not None:  # the next attempt draws
            with doing("drawing"):
                if self._curves is not None:  # an older drawing must not end after the last one
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        self._curves.wait(timeout=DRAWING_TIMEOUT)
                self._draw_curves()
                self._wait_for_drawings()
        self._event("status", status=status, outcome=outcome, verdict=verdict)
        if self._mirror is not None:
            try:
                patience = self.config.finish_timeout + 5
                if status == "requeue":
                    patience = min(patience, STOPPED_TIMEOUT)
                with doing(f"sending what is left to MLflow at {shown_uri(self.run_dir)}"):
                    output, _ = self._mirror.communicate(b"finish\n", timeout=patience)
                self._show(output)
            except subprocess.TimeoutExpired:
                self._mirror.kill()
                self._mirror.wait()
            if self._mirror.returncode != 0:
                self.message(
                    f"MLflow at {shown_uri(self.run_dir)} has not got all of this run (details: "
                    f"{self.run_dir / 'logs' / 'mlflow.log'}). Send the rest with: "
                    f"d2v sync {self.run_dir}"
                )
            self._mirror = None
        self._terminal.close()

    def _event(self, event: str, **content: Any) -> None:
        try:
            append_event(self.run_dir, event, **content)
        except OSError as error:
            self.message(f"{self.run_dir / EVENTS_FILE} takes no lines ({error}): MLflow will not hear of {event}.")

    def _draw_curves(self) -> None:
        self._curves_due, self._curves = False, self._draw("d2v_scale.plots.curves")

    def _draw(self, program: str, *arguments: str) -> "subprocess.Popen[bytes] | None":
        """Start a program that draws into plots/: drawing is seconds of pure Python. None: it did not start."""
        command = [sys.executable, "-m", program, str(self.run_dir.resolve()), *arguments]
        try:
            with (self.run_dir / "logs" / "plots.log").open("ab") as log:
                process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        except OSError as error:
            self.message(f"Nothing was drawn ({error}).")
            return None
        self._drawing = [p for p in [*self._drawing, process] if p.poll() is None]
        return process

    def _wait_for_drawings(self) -> None:
        deadline = time.monotonic() + DRAWING_TIMEOUT
        for process in self._drawing:
            try:
                process.wait(timeout=max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                self.message(f"Pictures are not finished after {DRAWING_TIMEOUT:.0f} s; they will be in plots/ later.")
                return

    def _start_mirror(self) -> None:
        command = [sys.executable, "-m", "d2v_scale.tracking.follow", str(self.run_dir.resolve())]
        command += ["--finish-timeout", str(self.config.finish_timeout)]
        try:
            with (self.run_dir / "logs" / "mlflow.log").open("ab") as log:
                # A session of its own: Ctrl-C at the terminal is for the training process, which says when to stop.
                self._mirror = subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, start_new_session=True
                )
        except OSError as error:
            self.message(f"The MLflow mirror did not start ({error}); metrics.jsonl has everything.")
            return
        assert self._mirror.stdout is not None
        os.set_blocking(self._mirror.stdout.fileno(), False)

    def _relay(self) -> None:
        """Show what the mirror has to say, without waiting for it."""
        if self._mirror is not None and self._mirror.stdout is not None:
            self._show(self._mirror.stdout.read())

    def _show(self, output: bytes | None) -> None:
        for line in (output or b"").decode(errors="replace").splitlines():
            self.message(line)


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested mappings as dotted names; lists and other values as JSON or text."""
    flat: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value if isinstance(value, str) else json.dumps(value, default=str)
    return flat
