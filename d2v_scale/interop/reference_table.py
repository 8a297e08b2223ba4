"""The table of the reference's models: a row a kind of stem. A kind without one is refused by name."""

from d2v_scale.errors import CheckpointError
from d2v_scale.interop.reference_options import Settings, Shapes
from d2v_scale.interop.reference_row import ReferenceRow
from d2v_scale.interop.reference_speech import SpeechReference
from d2v_scale.interop.reference_text import TextReference
from d2v_scale.interop.reference_vision import VisionReference
from d2v_scale.model.config import ModelConfig

TABLE: tuple[ReferenceRow, ...] = (SpeechReference(), VisionReference(), TextReference())


def row_of(config: ModelConfig, modality: str) -> ReferenceRow:
    """What is said of the kind of this stem. Raises CheckpointError where there is no row."""
    kind = config.kind(modality)
    row = next((row for row in TABLE if row.kind == kind), None)
    if row is None:
        remedy = "Use --to safetensors, which writes any model under our own names."
        raise CheckpointError(f"the reference has no model of {modality}, a stem of the kind {kind}.", remedy)
    return row


def recognised(keys: Settings | Shapes) -> tuple[ReferenceRow, bool]:
    """The row of a reference's state dict, and whether it is a 2.0 model. Raises CheckpointError if it is none."""
    marks = [(row, True, f"{row.second_prefix}.") for row in TABLE] + [(row, False, row.first_mark) for row in TABLE]
    found = [(row, second) for row, second, mark in marks if any(key.startswith(mark) for key in keys)]
    if len(found) != 1:
        listing = ", ".join(list(keys)[:8])
        which = "several architectures" if found else "no data2vec architecture"
        raise CheckpointError(
            f"the keys belong to {which}: {listing}, ... ({len(keys)} keys).",
            "Known are fairseq data2vec 1.0 (speech, text) and 2.0, data2vec_vision, and Hugging Face Data2Vec.",
        )
    return found[0]
