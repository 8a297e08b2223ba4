"""What MLflow runs to serve an exported encoder. It keeps this file with the model: nothing is pickled."""

from typing import Any

import numpy as np
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel


class EncoderModel(PythonModel):
    """Mean over positions of the encoder's last states: (B, ...) inputs to (B, D) features in fp32."""

    def load_context(self, context: Any) -> None:
        """Load the folder as its users do."""
        from transformers import AutoModel

        import d2v_scale  # noqa: F401  # lets transformers import beside torchaudio's CUDA wheel

        self.modality = context.model_config["modality"]
        folder = context.artifacts["encoder"]
        self.model: Any = AutoModel.from_pretrained(folder, trust_remote_code=True).eval().float()

    def predict(self, context: Any, model_input: np.ndarray, params: dict[str, Any] | None = None) -> np.ndarray:
        """`model_input`: images (B, C, H, W) as the image processor gives them, waves (B, samples), or token ids."""
        import torch

        values = torch.from_numpy(np.array(model_input))
        name = {"vision": "pixel_values", "speech": "input_values", "text": "input_ids"}[self.modality]
        values = values.long() if self.modality == "text" else values.float()
        with torch.no_grad():
            states_btd = self.model(**{name: values}).last_hidden_state
        if self.modality == "vision":
            states_btd = states_btd[:, 1:]
        return states_btd.mean(dim=1).numpy()


set_model(EncoderModel())
