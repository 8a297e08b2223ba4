"""What a row of the table of Hugging Face's classes (`huggingface.TABLE`) says of one kind of stem."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from d2v_scale.batch import Batch
from d2v_scale.errors import CheckpointError
from d2v_scale.finetuning.config import TaskConfig
from d2v_scale.interop.keymap import KeyMap
from d2v_scale.interop.reference_options import Shapes
from d2v_scale.modalities import Kind
from d2v_scale.model.config import Backbone, ModelConfig
from d2v_scale.recipe import Recipe

STEM_EPS = 1e-5
"""Of the norms of features of speech and text, whatever `model.backbone.norm_eps` is."""


@dataclass(frozen=True)
class Head:
    """How a fine-tuned model is loaded."""

    auto: str
    """The automatic class that a user names."""
    native: str
    """transformers' own class behind it."""
    pipeline: str
    """What the hub calls its task."""


@dataclass(frozen=True)
class Example:
    """Lines of a model card that run the model on a stand-in for the user's input."""

    processors: tuple[str, ...]
    """Automatic classes that make the inputs; none: they are made by hand."""
    given: str
    call: str
    """What the model is called with."""
    remote_processor: bool = False
    """Whether they are those of the exported folder, not transformers' own."""


class HuggingFaceRow(ABC):
    """One kind of stem. `model` is always a model with this stem alone (`ModelConfig.of`), `name` the stem's name."""

    kind: ClassVar[Kind]
    model_type: ClassVar[str | None] = None
    """Of the native class; None: there is none."""
    native_class: ClassVar[str]
    native_prefix: ClassVar[str]
    """Under which the native task classes hold the encoder."""
    remote_configuration: ClassVar[str | None] = None
    """Class in configuration_data2vec2.py for what no native class computes; None: the modelling files know no such
    stem."""
    remote_module: ClassVar[str] = "modeling_data2vec2"
    """Modelling file that has these classes."""
    remote_imports: ClassVar[tuple[str, ...]] = ()
    """What that file imports beside what all do."""
    names_are_ours: ClassVar[bool] = False
    """Whether tensors are called in that file as they are here."""
    remote_classes: ClassVar[dict[str, str]] = {}
    """By the automatic class that loads them."""
    joint_unless_native: ClassVar[bool] = False
    """Whether the modelling file of samples of several parts computes what no native class does of this stem alone."""
    any_extra_tokens: ClassVar[bool] = False
    """Whether there may be others than is usual."""
    encoder_task: ClassVar[str] = "feature-extraction"
    """What the hub calls the task of an encoder without a head."""
    heads: ClassVar[dict[str, Head]]
    """By the task's kind."""
    input_name: ClassVar[str]
    """Argument of the model that takes its inputs."""
    input_type: ClassVar[str] = "float32"
    """numpy's name of their type."""
    padded: ClassVar[bool] = False
    """Whether inputs of the same shape may be filled with the id of the padding."""
    dropout_names: ClassVar[tuple[str, str]] = ("hidden_dropout_prob", "attention_probs_dropout_prob")
    """Of `backbone.dropout` and `backbone.attention_dropout`."""

    @property
    def remote_modality(self) -> str:
        """What the modelling files' config.json calls it."""
        return self.kind

    @abstractmethod
    def is_native(self, model: ModelConfig) -> bool:
        """Whether the native class computes exactly this encoder."""

    def beyond_remote(self, model: ModelConfig) -> list[str]:
        """Settings with which the modelling files do not compute this encoder."""
        backbone = model.backbone
        unlike = {
            "model.backbone.norm_first": backbone.norm_first,
            "model.backbone.key_bias": not backbone.key_bias,
            "model.backbone.layer_scale": backbone.layer_scale > 0,
            "model.backbone.final_norm": backbone.final_norm,
        }
        return [key for key, is_unlike in unlike.items() if is_unlike]

    # Names and settings

    @abstractmethod
    def add_keys(self, keys: KeyMap, model: ModelConfig, name: str) -> None:
        """The native class's names."""

    @abstractmethod
    def settings(self, model: ModelConfig) -> dict[str, Any]:
        """What the native class's config.json says beside the sizes of blocks."""

    def remote_settings(self, model: ModelConfig) -> dict[str, Any]:
        """What the modelling files' config.json says beside the sizes of blocks."""
        raise AssertionError(f"there is no modelling file for {model.modalities}")

    # As a part of samples that have several

    def joint_settings(self, model: ModelConfig) -> dict[str, Any]:
        """Sizes of the stem, as `stems_data2vec2_joint.py` reads them: `kind` is how it is cut into positions."""
        raise AssertionError(f"{model.modalities} are no part of others")

    def joint_reading(self, recipe: Recipe, model: ModelConfig) -> dict[str, Any]:
        """What `feature_extraction_data2vec2_joint.py` is told: `kind` is what it makes inputs of."""
        raise AssertionError(f"{model.modalities} are no part of others")

    def joint_example(self, model: ModelConfig, name: str, folder: Path) -> str:
        """A line that makes a stand-in for the user's input, called `name`."""
        raise AssertionError(f"{model.modalities} are no part of others")

    @abstractmethod
    def read_settings(self, settings: Mapping[str, Any], shapes: Shapes, backbone: Backbone) -> ModelConfig:
        """The model of a native folder's config.json and shapes; completes `backbone`, which has its sizes. Raises
        CheckpointError for options that no data2vec model has."""

    def may_lack(self, settings: Mapping[str, Any]) -> list[str]:
        """Prefixes of our names that a native folder with these settings has nothing for."""
        del settings
        return []

    def fold(self, tensors: dict[str, Tensor]) -> list[str]:
        """Add constants of a native folder's model that our stem has no parameter for to one that it has, in place;
        what is lost by it, for the user."""
        del tensors
        return []

    @abstractmethod
    def add_head(self, keys: KeyMap, task: TaskConfig, native: bool) -> None:
        """Names of a fine-tuned model's head, without the encoder's prefix."""

    @abstractmethod
    def head_settings(self) -> dict[str, Any]:
        """What config.json says of a head that gives one answer a sample."""

    # Inputs

    @abstractmethod
    def write_processor(self, recipe: Recipe, model: ModelConfig, out: Path, tokenizer: Path | None) -> list[str]:
        """Files that make inputs of what users have; lines for the user. Raises CheckpointError."""

    @abstractmethod
    def example(self, model: ModelConfig, folder: Path) -> Example:
        """How the exported `folder` is used."""

    @abstractmethod
    def sample(self, model: ModelConfig, name: str) -> tuple[Batch, dict[str, Tensor]]:
        """Two random samples, the second one shorter where there are lengths: for us, and as arguments there."""

    def unmasked(self, name: str, inputs: Tensor, valid: Tensor | None) -> Batch:
        """Inputs of which nothing is masked."""
        samples = inputs.shape[0]
        nothing_masked = torch.zeros(samples, 1, dtype=torch.bool)
        ids = torch.arange(samples)
        return Batch(modality=name, inputs=inputs, valid=valid, masked_rt=nothing_masked, sample_ids=ids)

    @abstractmethod
    def input_shape(self, model: ModelConfig) -> tuple[int, ...]:
        """Of a batch of inputs; -1 is any size."""


class RowOfOurs(HuggingFaceRow):
    """What transformers has no class for, so that the modelling files' is the only one."""

    called: ClassVar[str]
    """What it is, for messages."""

    def is_native(self, model: ModelConfig) -> bool:
        del model
        return False

    def beyond_remote(self, model: ModelConfig) -> list[str]:
        del model
        return []

    def add_keys(self, keys: KeyMap, model: ModelConfig, name: str) -> None:
        raise AssertionError(f"transformers has no class for {self.called}")

    def settings(self, model: ModelConfig) -> dict[str, Any]:
        raise AssertionError(f"transformers has no class for {self.called}")

    def read_settings(self, settings: Mapping[str, Any], shapes: Shapes, backbone: Backbone) -> ModelConfig:
        raise CheckpointError(f"transformers has no class for {self.called}.")


def blocks_of(model: ModelConfig, name: str) -> list[str]:
    """Names of all blocks in order, those before the main ones first."""
    prenet = [f"stems.{name}.prenet.{i}" for i in range(model.backbone.prenet_depth)]
    return prenet + [f"blocks.{i}" for i in range(model.backbone.depth)]


def has_plain_blocks(backbone: Backbone) -> bool:
    """Post-norm blocks with all biases and no norm behind the last: what transformers' speech and text classes have.
    They take the epsilon of the blocks in the stem, too, where ours has its own."""
    plain = not backbone.norm_first and backbone.key_bias and not backbone.final_norm
    return plain and backbone.norm_eps == STEM_EPS
