"""An exported Hugging Face folder as an MLflow model: `mlflow models predict --env-manager local -m models:/<id>`."""

from importlib.metadata import version
from pathlib import Path

import mlflow
import numpy as np
from mlflow.models import ModelSignature
from mlflow.types import Schema, TensorSpec

from d2v_scale.model.config import Modality, ModelConfig

_PACKAGES = ("torch", "transformers", "numpy")


def signature(config: ModelConfig, modality: Modality) -> ModelSignature:
    """Shapes that the model takes and gives; -1 is any size."""
    shape: tuple[int, ...] = (-1, -1)
    if modality == "vision":
        assert config.vision is not None
        shape = (-1, config.vision.channels, config.vision.image_size, config.vision.image_size)
    kind = np.dtype(np.int64 if modality == "text" else np.float32)
    features = TensorSpec(np.dtype(np.float32), (-1, config.backbone.width))
    return ModelSignature(inputs=Schema([TensorSpec(kind, shape)]), outputs=Schema([features]))


def log_model(
    folder: Path, config: ModelConfig, modality: Modality, *, tracking_uri: str, run_id: str, step: int
) -> str:
    """Log the folder as a LoggedModel of an MLflow run; returns its URI. Needs the server, and says so if it fails."""
    mlflow.set_tracking_uri(tracking_uri)
    client = mlflow.MlflowClient()
    status = client.get_run(run_id).info.status
    with mlflow.start_run(run_id=run_id):
        info = mlflow.pyfunc.log_model(
            name="encoder",
            python_model=str(Path(__file__).with_name("mlflow_encoder.py")),
            model_config={"modality": modality},
            artifacts={"encoder": str(folder.resolve())},
            signature=signature(config, modality),
            pip_requirements=[f"{name}=={version(name)}" for name in _PACKAGES] + ["d2v_scale"],
            step=step,
        )
    if status != "FINISHED":  # leaving the block calls the run finished
        client.update_run(run_id, status=status)
    return info.model_uri
