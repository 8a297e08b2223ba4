"""The same input through our encoder and an exported folder."""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from d2v_scale import modalities
from d2v_scale.checkpoint import Checkpoint
from d2v_scale.evaluation.frozen import FrozenEncoder
from d2v_scale.finetuning.predictor import TaskPredictor
from d2v_scale.interop.exporting import ChosenWeights
from d2v_scale.interop.huggingface import row_of
from d2v_scale.interop.task_heads import auto_class

LARGEST_DIFFERENCE = 1e-4


@torch.no_grad()
def largest_difference(encoder: FrozenEncoder, folder: Path, modality: str, checkpoint: Checkpoint) -> float:
    """Largest absolute difference over the outputs of all main blocks (and the final norm) at valid positions.

    Loads the folder as a user would, through `AutoModel`; a modelling file in it is the one written by this package.
    """
    from transformers import AutoModel

    config = encoder.recipe.model
    exported: Any = AutoModel.from_pretrained(folder, trust_remote_code=True).eval().float()
    batch, arguments = row_of(config, modality).sample(config.of(modality), modality)
    ours = [states.cpu() for states in encoder.hidden_states(batch.to(encoder.device))]
    theirs = exported(**arguments, output_hidden_states=True)
    extra = modalities.of(config, modality).extra_tokens
    before = len(theirs.hidden_states) - len(ours)
    pairs = [(mine, theirs.hidden_states[before + i][:, extra:]) for i, mine in enumerate(ours)]
    if config.backbone.final_norm:
        chosen = ChosenWeights(checkpoint, "student" if encoder.weights == "student" else "teacher")
        weight, bias = chosen("final_norm.weight"), chosen("final_norm.bias")
        normed = F.layer_norm(ours[-1], ours[-1].shape[-1:], weight, bias, config.backbone.norm_eps)
        pairs.append((normed, theirs.last_hidden_state[:, extra:]))
    valid = encoder.valid_positions(batch)
    # torch's max, which passes a NaN on wherever it stands.
    return float(torch.stack([_at(valid, mine - other).abs().max() for mine, other in pairs]).max())


@torch.no_grad()
def largest_logit_difference(predictor: TaskPredictor, folder: Path, modality: str) -> float:
    """Largest absolute difference between the logits of a fine-tuned model and of its exported folder."""
    import transformers

    config = predictor.recipe.model
    loader = getattr(transformers, auto_class(predictor.task, config, modality))
    exported: Any = loader.from_pretrained(folder, trust_remote_code=True).eval().float()
    batch, arguments = row_of(config, modality).sample(config.of(modality), modality)
    ours, theirs = predictor.logits(batch.to(predictor.device)).cpu(), exported(**arguments).logits
    valid = predictor.model.encoder.valid_positions(batch) if predictor.task.kind == "ctc" else None
    return float(_at(valid, ours - theirs).abs().max())


def _at(valid_bt: Tensor | None, x_btd: Tensor) -> Tensor:
    return x_btd if valid_bt is None else x_btd[valid_bt.cpu()]
