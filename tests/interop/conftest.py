"""What several tests of exports share."""

from pathlib import Path

import pytest
from exported_models import checkpoint_of, tool, tuned
from host_models import Folders

from d2v_scale.finetuning.config import CtcConfig, TaskConfig

CTC = TaskConfig(kind="ctc", ctc=CtcConfig(letters="abc"))


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """Exports of the same sizes in both versions: encoders, and fine-tuned models."""
    from d2v_scale.parallel import groups

    groups.single_process()
    made = {}
    for version in ("v1", "v2"):
        runs: dict[str, Path] = {}
        for kind in ("speech", "vision"):
            runs[kind] = checkpoint_of(f"{version}_{kind}", tmp_path_factory.mktemp("encoder"))
            runs[f"{kind}_classes"] = tuned(
                f"{version}_{kind}", TaskConfig(classes=3), tmp_path_factory.mktemp("classes")
            )
        runs["ctc"] = tuned(f"{version}_speech", CTC, tmp_path_factory.mktemp("ctc"))
        for kind, run in runs.items():
            made[f"{version}_{kind}"] = run.parent / "hf"
            assert tool("export").main([str(run), str(made[f"{version}_{kind}"])]) == 0
    return made
