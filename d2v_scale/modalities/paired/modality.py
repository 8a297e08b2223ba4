"""What samples of several modalities say of themselves: what their parts say, put together."""

import math
from typing import TYPE_CHECKING, Any, NoReturn, cast

from d2v_scale.data2vec.block_sizes import Axis
from d2v_scale.errors import ConfigError
from d2v_scale.modalities.base import Modality
from d2v_scale.modalities.costs import Lengths, Setting
from d2v_scale.model.config import ModelConfig
from d2v_scale.model.stem_config import sequence_of

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from torch import Tensor

    from d2v_scale.batch import Batch
    from d2v_scale.data.config import DataConfig
    from d2v_scale.data.items import Lengths as SampleLengths
    from d2v_scale.data.items import Pairs
    from d2v_scale.modalities.paired.decoder import PairedDecoder
    from d2v_scale.shards.content import Content
    from d2v_scale.shards.rows import PartDecoder
    from d2v_scale.shards.shard_set import ShardSet


class Paired(Modality):
    """One sequence of the positions of several stems. `model` has all stems of the whole model."""

    unit = "tokens"
    throughput = ("positions", 1)
    raw_name = "what the parts are without any model"

    def __init__(self, model: ModelConfig, parts: list[Modality]) -> None:
        super().__init__(model, sequence_of(part.name for part in parts))
        self._parts = parts
        self.content = parts[0].content  # type: ignore[misc]
        self.uses_tokenizer = any(part.uses_tokenizer for part in parts)  # type: ignore[misc]

    @property
    def parts(self) -> list[Modality]:
        """Of the sequence, in its order."""
        return self._parts

    @property
    def most_pieces(self) -> int | None:
        """Of the part that reads ids."""
        return next((part.most_pieces for part in self.parts if part.most_pieces is not None), None)

    @property
    def contents(self) -> "list[Content]":
        """What the parts read."""
        return [part.content for part in self.parts]

    @classmethod
    def plain_model(cls, tokenizer: "Path | None") -> ModelConfig:
        """There is none: which stems there are, a recipe says. Raises ConfigError."""
        del tokenizer
        raise ConfigError("recipe", "is not given, and only it says which parts samples have", "Give a recipe.")

    @property
    def extra_tokens(self) -> int:
        """Of all parts."""
        return sum(part.extra_tokens for part in self.parts)

    @property
    def has_bias(self) -> bool:
        """Where a part has one: 0 between parts, and within those that have none."""
        return any(part.has_bias for part in self.parts)

    @property
    def named_axes(self) -> tuple[Axis, ...]:
        """A line of the positions of all parts, which have no other unit."""
        return (Axis("positions"),)

    def extent(self, data: "DataConfig", size: float | None = None) -> tuple[int, tuple[int, ...]]:
        """Every part's longest sample, or a part of `size` positions of it."""
        whole = sum(math.prod(part.extent(data)[1]) for part in self.parts)
        length = whole if size is None else max(2, round(size))
        return length, (length,)

    def noise(self, samples: int, size: int, generator: "torch.Generator") -> "Tensor":
        """Parts have noise, one by one."""
        _only_of_parts(samples, size, generator)

    def read(self, shards: "ShardSet") -> "ShardSet":
        """All parts together."""
        from d2v_scale.shards.one_content import reading_together

        return reading_together(shards, self.contents)

    def items(self, shards: "ShardSet", data: "DataConfig", lengths: "SampleLengths") -> "Pairs":
        """Whole samples, of all their parts together."""
        from d2v_scale.data.items import Pairs

        return Pairs(shards, data, lengths, self.parts)

    def build_decoder(  # type: ignore[override]
        self, data: "DataConfig", tokenizer: "Path | None"
    ) -> "PairedDecoder":
        """Each part by itself. Of texts beside arrays only `.txt` is read, since `.npy` holds the array."""
        from d2v_scale.modalities.paired.decoder import PairedDecoder, Part
        from d2v_scale.shards.one_content import hidden_beside

        decoders = [cast("PartDecoder", part.build_decoder(data, tokenizer)) for part in self.parts]
        for part, decoder in zip(self.parts, decoders, strict=True):
            hidden = hidden_beside(part.content, self.contents)
            decoder.extensions = tuple(one for one in decoder.extensions if one not in hidden)
        return PairedDecoder([Part(part.name, one) for part, one in zip(self.parts, decoders, strict=True)])

    def sizes(self, batch: "Batch") -> tuple[int, int]:
        """Positions."""
        padded = sum(len(part.inputs) * part.masked_rt.shape[1] for part in batch.parts)
        blank = [part for part in batch.parts if part.real_bt is not None]
        return padded - sum(int((~part.real_bt).sum()) for part in blank if part.real_bt is not None), padded

    def build_stem(self, exists: Any, section: Any) -> NoReturn:
        """Parts have stems, one by one."""
        _only_of_parts(exists, section)

    def build_head(self, outputs: int) -> NoReturn:
        """There is no head."""
        _only_of_parts(outputs)

    def feature_flops(self, lengths: Lengths) -> NoReturn:
        """Of parts, one by one."""
        _only_of_parts(lengths)

    def feature_weights(self) -> NoReturn:
        """Of parts, one by one."""
        _only_of_parts()

    def feature_bytes(self, lengths: Lengths, setting: Setting) -> NoReturn:
        """Of parts, one by one."""
        _only_of_parts(lengths, setting)

    def context_bytes(self, lengths: Lengths, setting: Setting) -> NoReturn:
        """Of parts, one by one."""
        _only_of_parts(lengths, setting)

    @classmethod
    def build_drawing(cls) -> NoReturn:
        """Of parts, one by one."""
        _only_of_parts()

    def raw_features(self, batch: "Batch") -> "Tensor":
        """Those of all parts, side by side; zero for a part that is not there."""
        import torch

        found = []
        for part, own in zip(self.parts, batch.parts, strict=True):
            x_bf = part.raw_features(own)
            found.append(x_bf if own.present_b is None else x_bf * own.present_b[:, None])
        return torch.cat(found, dim=1)


def _only_of_parts(*_: Any) -> NoReturn:
    raise AssertionError("this is said of the parts, one by one")
