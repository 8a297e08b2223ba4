from pathlib import Path

import pytest

from d2v_scale.tracking.mirror_state import MirrorState, tracking_uri


@pytest.mark.parametrize(
    "store", ["postgresql://h/db", "http://h:5000", "file:///elsewhere", "sqlite:///{dir}/there.db"]
)
def test_without_the_variable_a_run_stays_with_its_store_of_any_kind(tmp_path: Path, store: str) -> None:
    (tmp_path / "there.db").touch()
    store = store.format(dir=tmp_path)
    (tmp_path / "run").mkdir()
    MirrorState(tracking_uri=store).save(tmp_path / "run")
    assert tracking_uri(tmp_path / "run") == store


def test_a_local_store_that_is_no_more_is_made_anew_beside_the_run(tmp_path: Path) -> None:
    local = f"sqlite:///{tmp_path}/mlflow.db"
    assert tracking_uri(tmp_path / "run") == local
    (tmp_path / "run").mkdir()
    MirrorState(tracking_uri=f"sqlite:///{tmp_path}/moved/mlflow.db").save(tmp_path / "run")
    assert tracking_uri(tmp_path / "run") == local
