"""An exported Hugging Face folder as an MLflow model: `mlflow models predict --env-manager local -m models:/<id>`."""

from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
from mlflow.models import ModelSignature
from mlflow.types import Schema, TensorSpec

from d2v_scale import modalities
from d2v_scale.finetuning.config import TaskConfig
from d2v_scale.finetuning.model import outputs_of
from d2v_scale.interop.huggingface import row_of
from d2v_scale.interop.task_heads import auto_class
from d2v_scale.model.config import ModelConfig

_PACKAGES = ("torch", "transformers", "numpy", "d2v_scale")


def signature(config: ModelConfig, modality: str, task: TaskConfig | None) -> ModelSignature:
    """Shapes that the model takes and gives; -1 is any size."""
    row = row_of(config, modality)
    inputs = TensorSpec(np.dtype(row.input_type), row.input_shape(config.of(modality)))
    width = config.backbone.width if task is None else outputs_of(task)
    given = TensorSpec(np.dtype(np.float32), (-1, width))
    if task is not None and task.kind == "ctc":
        given = TensorSpec(np.dtype(str), (-1,))
    return ModelSignature(inputs=Schema([inputs]), outputs=Schema([given]))


def model_settings(config: ModelConfig, modality: str, task: TaskConfig | None) -> dict[str, Any]:
    """What `mlflow_encoder.py` must know of a folder."""
    row = row_of(config, modality)
    return {
        "auto_class": auto_class(task, config, modality),
        "input_name": row.input_name,
        "input_type": row.input_type,
        "padded": row.padded,
        "extra_tokens": modalities.of(config, modality).extra_tokens,
    }


def log_model(
    folder: Path,
    config: ModelConfig,
    modality: str,
    task: TaskConfig | None,
    *,
    tracking_uri: str,
    run_id: str,
    step: int,
) -> str:
    """Log the folder as a LoggedModel of an MLflow run; returns its URI. Needs the server, and says so if it fails."""
    mlflow.set_tracking_uri(tracking_uri)
    client = mlflow.MlflowClient()
    status = client.get_run(run_id).info.status
    with mlflow.start_run(run_id=run_id):
        info = mlflow.pyfunc.log_model(
            name="encoder" if task is None else "fine_tuned",
            python_model=str(Path(__file__).with_name("mlflow_encoder.py")),
            model_config=model_settings(config, modality, task),
            artifacts={"encoder": str(folder.resolve())},
            signature=signature(config, modality, task),
            pip_requirements=[f"{name}=={version(name)}" for name in _PACKAGES],
            step=step,
        )
    if status != "FINISHED":  # leaving the block calls the run finished
        client.update_run(run_id, status=status)
    return info.model_uri
