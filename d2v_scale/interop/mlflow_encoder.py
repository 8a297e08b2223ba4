"""What MLflow runs to serve an exported folder. It keeps this file with the model: nothing is pickled."""

from typing import Any

import numpy as np
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel


class ExportedModel(PythonModel):
    """Of an encoder: (B, ...) inputs to the mean over positions of its last states, (B, D) in fp32. Of a fine-tuned
    model: to its scores, (B, outputs) in fp32 in the order of config.json's classes, or to texts (B,)."""

    def load_context(self, context: Any) -> None:
        """Load the folder as its users do."""
        import transformers

        import d2v_scale  # noqa: F401  # lets transformers import beside torchaudio's CUDA wheel

        self.settings: dict[str, Any] = dict(context.model_config)
        self.auto_class = self.settings["auto_class"]
        folder = context.artifacts["encoder"]
        loader = getattr(transformers, self.auto_class)
        self.model: Any = loader.from_pretrained(folder, trust_remote_code=True).eval().float()
        self.tokenizer: Any = None
        if self.auto_class == "AutoModelForCTC":
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder)

    def predict(self, context: Any, model_input: np.ndarray, params: dict[str, Any] | None = None) -> np.ndarray:
        """`model_input`: images (B, C, H, W) as the image processor gives them, waves (B, samples), all real, or token
        ids (B, T), filled with the padding's id."""
        import torch

        values = torch.from_numpy(np.array(model_input, dtype=self.settings["input_type"]))
        arguments = {self.settings["input_name"]: values}
        if self.settings["padded"]:
            arguments["attention_mask"] = (values != self.model.config.pad_token_id).long()
        with torch.no_grad():
            outputs = self.model(**arguments)
        if self.tokenizer is not None:
            return np.array(self.tokenizer.batch_decode(outputs.logits.argmax(dim=-1)))
        if self.auto_class != "AutoModel":
            return outputs.logits.numpy()
        states_btd = outputs.last_hidden_state[:, self.settings["extra_tokens"] :]
        if not self.settings["padded"]:
            return states_btd.mean(dim=1).numpy()
        real_bt1 = arguments["attention_mask"][..., None]
        return ((states_btd * real_bt1).sum(dim=1) / real_bt1.sum(dim=1).clamp(min=1)).numpy()


set_model(ExportedModel())
