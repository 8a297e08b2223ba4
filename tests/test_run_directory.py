"""Who may use a run directory, and what it remembers until the first checkpoint."""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from d2v_scale import command_line, errors, run_directory, run_start
from d2v_scale.command_line import Options
from d2v_scale.errors import ConfigError, UserError

HOLDER = """
import sys, time
from pathlib import Path
from d2v_scale.run_directory import lock
lock(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("kind", [UserError, errors.DataError, errors.CheckpointError])
def test_errors_that_rank_0_sends_arrive_as_they_are(kind: type[UserError]) -> None:
    sent = kind("That is wrong", "Do this.")
    arrived = pickle.loads(pickle.dumps(sent))
    assert (type(arrived), str(arrived)) == (kind, "That is wrong. Do this.")


def test_config_errors_arrive_with_their_key() -> None:
    arrived = pickle.loads(pickle.dumps(ConfigError("optim.lr", "is 0", "Give more.")))
    assert isinstance(arrived, ConfigError)
    assert (str(arrived), arrived.key) == ("optim.lr: is 0. Give more.", "optim.lr")


def test_a_second_program_is_refused_until_the_first_is_gone(tmp_path: Path, monkeypatch, caplog) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    environment = {**os.environ, "SLURM_JOB_ID": "7"}
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as holder:
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline() == "held\n"
            with pytest.raises(UserError, match=rf"process {holder.pid} on .*, Slurm job 7\. Wait"):
                run_directory.lock(tmp_path, wait_s=0.6)
            # The lock of a node that went down outlives it: the same job's next attempt may go on.
            monkeypatch.setenv("SLURM_JOB_ID", "7")
            run_directory.lock(tmp_path, wait_s=0)
            assert "earlier attempt of this job" in caplog.text
            monkeypatch.delenv("SLURM_JOB_ID")
        finally:
            holder.kill()
    run_directory.lock(tmp_path, wait_s=20)
    assert (tmp_path / run_directory.LOCK_FILE).read_text().startswith(f"process {os.getpid()} on ")


def test_a_run_that_is_resumed_before_its_first_checkpoint_begins_from_the_same_weights(tmp_path: Path) -> None:
    recipe, options = command_line.parse(["--init_from", str(tmp_path / "source"), "--reset_teacher", "true"])
    (tmp_path / run_start.RECIPE_FILE).write_text(command_line.dump(recipe))
    run_start.note_start(tmp_path, options)
    _, resumed = command_line.parse(["--resume", str(tmp_path)])
    assert (resumed.init_from, resumed.reset_teacher) == (str(tmp_path / "source"), True)
    committed = tmp_path / "checkpoints" / "step-00000001" / "COMMITTED"
    committed.parent.mkdir(parents=True)
    committed.write_text(json.dumps({}))
    _, later = command_line.parse(["--resume", str(tmp_path)])
    assert (later.init_from, later.reset_teacher) == (None, False)


def test_resetting_the_teacher_of_nothing_is_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        command_line.parse(["--reset_teacher", "true"])
    assert caught.value.key == "reset_teacher"


def test_other_weights_to_start_from_are_refused_once_the_run_goes_on_from_its_checkpoint(
    tmp_path: Path, caplog
) -> None:
    began, other = Options(init_from=str(tmp_path / "a")), Options(init_from=str(tmp_path / "b"))
    run_start.note_start(tmp_path, began)
    run_start.check_same_start(tmp_path, other)
    committed = tmp_path / "checkpoints" / "step-00000001" / "COMMITTED"
    committed.parent.mkdir(parents=True)
    committed.write_text(json.dumps({}))
    # A requeued job gives the same again.
    run_start.check_same_start(tmp_path, began)
    run_start.check_same_start(tmp_path, Options())
    with pytest.raises(ConfigError) as caught:
        run_start.check_same_start(tmp_path, other)
    assert caught.value.key == "init_from"
    assert not caplog.text
    # Half a file, of a node that went down, is none; nor does a later start write what the run did not begin from.
    (tmp_path / run_start.START_FILE).write_text("")
    run_start.check_same_start(tmp_path, other)
    assert "--init_from is not read" in caplog.text
    run_start.note_start(tmp_path, other)
    assert (tmp_path / run_start.START_FILE).read_text() == ""


def test_a_requeue_gives_the_same_link_that_leads_elsewhere_by_now(tmp_path: Path) -> None:
    (tmp_path / "latest").symlink_to(tmp_path / "a")
    options = Options(init_from=str(tmp_path / "latest"))
    run_start.note_start(tmp_path, options)
    committed = tmp_path / "checkpoints" / "step-00000001" / "COMMITTED"
    committed.parent.mkdir(parents=True)
    committed.write_text(json.dumps({}))
    (tmp_path / "latest").unlink()
    (tmp_path / "latest").symlink_to(tmp_path / "b")
    run_start.check_same_start(tmp_path, options)
