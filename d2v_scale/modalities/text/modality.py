"""What texts say of themselves."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from d2v_scale.data2vec.block_sizes import Axis
from d2v_scale.modalities.base import Modality
from d2v_scale.modalities.costs import INDEX_BYTES, NORM_BYTES, Lengths, Setting
from d2v_scale.model.config import ModelConfig
from d2v_scale.model.stem_config import TextStem
from d2v_scale.model.teacher_parts import TeacherParts

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import numpy as np
    import torch
    from numpy.typing import NDArray
    from torch import Tensor, nn

    from d2v_scale.batch import Batch
    from d2v_scale.data.config import DataConfig
    from d2v_scale.data.items import Lengths as SampleLengths
    from d2v_scale.data.items import TextBlocks
    from d2v_scale.data2vec.masking import Masks
    from d2v_scale.modalities.text.decoder import TextDecoder
    from d2v_scale.modalities.text.drawing import TextDrawing
    from d2v_scale.modalities.text.stem import TokenStem
    from d2v_scale.model.layers import Section
    from d2v_scale.shards.shard_set import ShardSet


class Text(Modality):
    """Tokens to embeddings."""

    content = "text"
    unit = "tokens"
    uses_tokenizer = True
    limit_key = "model.text.max_positions"
    throughput = ("tokens", 1)
    usual_size = 512
    feature_bias = "features.norm.bias"
    raw_name = "bag of tokens"

    @property
    def stem(self) -> TextStem:
        """Its section of the model's configuration."""
        return self.model.sole(TextStem)

    @classmethod
    def plain_model(cls, tokenizer: "Path | None") -> ModelConfig:
        """The tokenizer's ids."""
        from d2v_scale.modalities.text.tokenizer import open_tokenizer

        return ModelConfig(text=TextStem() if tokenizer is None else open_tokenizer(tokenizer).stem)

    @property
    def most_pieces(self) -> int:
        """As many as there are ids before <mask>."""
        return self.stem.mask_id

    @property
    def named_axes(self) -> tuple[Axis, ...]:
        """Of tokens, which have no other unit."""
        return (Axis("tokens"),)

    def extent(self, data: "DataConfig", size: float | None = None) -> tuple[int, tuple[int, ...]]:
        """A whole block, or one of `size` tokens."""
        del data
        tokens = self.stem.max_positions if size is None else max(2, round(size))
        return tokens, (tokens,)

    def longest_read(self, data: "DataConfig") -> int:
        """Tokens beside <s>."""
        del data
        return self.stem.max_positions - 1

    def read_of(
        self, length_n: "NDArray[np.int64]", data: "DataConfig", extensions: "Sequence[str]"
    ) -> "NDArray[np.int64]":
        """An index does not count the second of two texts: rows may be as long as any."""
        from d2v_scale.modalities.text.decoder import SECOND_EXTENSIONS

        if any(extension in SECOND_EXTENSIONS for extension in extensions):
            return length_n.clip(min=self.longest_read(data), max=self.longest_read(data))
        return super().read_of(length_n, data, extensions)

    def noise(self, samples: int, size: int, generator: "torch.Generator") -> "Tensor":
        """Any ordinary token."""
        import torch

        stem = self.stem
        special = [stem.bos_id, stem.pad_id, stem.eos_id, stem.unk_id, stem.mask_id]
        ordinary = torch.tensor([number for number in range(stem.vocab_size) if number not in special])
        return ordinary[torch.randint(len(ordinary), (samples, size), generator=generator)]

    def mean_size(self, data: "DataConfig", length_n: "NDArray[np.int64]") -> float:
        """Tokens of a row, with <s>."""
        block = self.stem.max_positions - 1
        if data.text.packing == "continuous":
            return float(block + 1)
        return float(1 + length_n.sum() / (-(-length_n // block)).sum())

    def positions_of(self, length_n: "NDArray[np.int64]", data: "DataConfig") -> "NDArray[np.int64]":
        """Tokens with <s>, as many as the model takes."""
        del data
        return 1 + length_n.clip(max=self.stem.max_positions - 1)

    def items(self, shards: "ShardSet", data: "DataConfig", lengths: "SampleLengths") -> "TextBlocks":
        """Blocks, or chunks of documents."""
        from d2v_scale.data.items import TextBlocks, TextChunks

        kind = TextChunks if data.text.packing == "document" else TextBlocks
        return kind(shards, data, lengths, self.stem.max_positions)

    def build_decoder(self, data: "DataConfig", tokenizer: "Path | None") -> "TextDecoder":
        """Tokens to rows."""
        from d2v_scale.modalities.text.decoder import TextDecoder

        return TextDecoder(data, self.stem, tokenizer)

    def student_inputs(self, inputs: "Tensor", masks: "Masks") -> "Tensor | None":
        """1.0: the tokens with <mask>; 2.0 leaves masked tokens out later."""
        from d2v_scale.data2vec import masking

        if self.model.visible_only:
            return None
        import torch

        stem = self.stem
        replaced = masking.replace_tokens(
            inputs.numpy(),
            masks,
            vocab_size=stem.vocab_size,
            mask_id=stem.mask_id,
            special_ids=[stem.bos_id, stem.pad_id, stem.eos_id, stem.unk_id],
        )
        return torch.from_numpy(replaced)

    def masked_only(
        self, inputs: "Tensor", valid: "Tensor | None", masked_bt: "Tensor"
    ) -> "tuple[Tensor, Tensor | None]":
        """Padding everywhere else; `valid` may not be None then, since the teacher's input is padded."""
        import torch

        valid = torch.ones_like(inputs, dtype=torch.bool) if valid is None else valid
        return torch.where(masked_bt, inputs, self.stem.pad_id), valid

    def build_stem(self, exists: Callable[[str], bool], section: "Section") -> "TokenStem":
        """Embeddings; choice of tokens."""
        from d2v_scale.modalities.text.stem import TokenStem

        return TokenStem(self.model, exists, section)

    @property
    def decoder_projection_std(self) -> float:
        """As every other matrix of published text models."""
        return 0.02

    def build_head(self, outputs: int) -> "nn.Module":
        """The vector of <s>."""
        from d2v_scale.finetuning.heads import TextHead

        return TextHead(self.width, outputs)

    def add_published_parts(self, parts: TeacherParts) -> None:
        """Embeddings are the student's in 2.0, and copied in 1.0."""
        (parts.shared if self.model.visible_only else parts.copied).append(f"stems.{self.name}.features")

    def feature_flops(self, lengths: Lengths) -> list[float]:
        """Looking up is free."""
        del lengths
        return [0.0]

    def feature_weights(self) -> float:
        """The tables."""
        return (self.stem.vocab_size + self.stem.max_positions + self.stem.pad_id + 1) * self.width

    def feature_bytes(self, lengths: Lengths, setting: Setting) -> float:
        """Indices and the norm."""
        return setting.samples * lengths.positions * (setting.itemsize * self.width + NORM_BYTES + INDEX_BYTES)

    def context_bytes(self, lengths: Lengths, setting: Setting) -> float:
        """The choice of visible tokens (2.0)."""
        return INDEX_BYTES * setting.samples * lengths.clones * lengths.kept if self.model.visible_only else 0.0

    @classmethod
    def build_drawing(cls) -> "TextDrawing":
        """Texts."""
        from d2v_scale.modalities.text.drawing import TextDrawing

        return TextDrawing()

    def raw_features(self, batch: "Batch") -> "Tensor":
        """How often each token occurs."""
        from d2v_scale.evaluation.raw import bag_of_tokens

        return bag_of_tokens(batch.inputs, self.stem.vocab_size, self.stem.pad_id)
