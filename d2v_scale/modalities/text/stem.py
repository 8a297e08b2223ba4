"""Token ids to embeddings, and those to what the blocks see."""

import torch
from torch import Tensor, nn

from d2v_scale.errors import DataError
from d2v_scale.model import cpu_ops
from d2v_scale.model.config import ModelConfig
from d2v_scale.model.init import InitRule, set_rule
from d2v_scale.model.layers import Section, rows_of
from d2v_scale.model.stem import Exists, ExtraTokens, Stem, StemFeatures
from d2v_scale.model.stem_config import TextStem


class TextFeatures(StemFeatures):
    """Token and learned position embeddings, norm, dropout (spec 3.4)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        stem, width = config.sole(TextStem), config.backbone.width
        self.pad_id = stem.pad_id
        self.max_positions = stem.max_positions
        self.dropout = config.backbone.input_dropout
        self.zero_pads = not config.visible_only
        self.tokens = nn.Embedding(stem.vocab_size, width, padding_idx=stem.pad_id)
        # Position ids count from pad_id + 1; pads have id pad_id.
        self.positions = nn.Embedding(stem.max_positions + stem.pad_id + 1, width, padding_idx=stem.pad_id)
        for table, std in ((self.tokens, stem.token_std), (self.positions, stem.position_std)):
            set_rule(table.weight, InitRule("normal", std, zero_row=stem.pad_id))
        self.norm = nn.LayerNorm(width)
        self.add_modality(config)

    def forward(self, tokens_bt: Tensor, valid_bt: Tensor | None) -> Tensor:
        """int64 (B, T) to (B, T, D). `valid_bt` None: nothing is padding. Raises `DataError` if T is too long."""
        if tokens_bt.shape[1] > self.max_positions:
            raise DataError(
                f"A text of {tokens_bt.shape[1]} tokens is longer than model.text.max_positions {self.max_positions}.",
                "Pack shorter blocks or raise it.",
            )
        if valid_bt is None:
            positions_bt = torch.arange(1, tokens_bt.shape[1] + 1, device=tokens_bt.device)[None] + self.pad_id
        else:
            positions_bt = valid_bt.cumsum(dim=1) * valid_bt + self.pad_id
        x_btd = self.with_modality(self.norm(self.tokens(tokens_bt) + self.positions(positions_bt)))
        x_btd = cpu_ops.dropout(x_btd, self.dropout, self.training)
        return x_btd if valid_bt is None or not self.zero_pads else x_btd * valid_bt[..., None]


class TextContext(ExtraTokens):
    """The choice of rows, and extra tokens: masking happened to the tokens (1.0) or is removal (2.0)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.add_tokens(config)

    def forward(
        self,
        features_btd: Tensor,
        masked_rt: Tensor | None,
        visible_rs: Tensor | None,
        valid_bt: Tensor | None,
        clones: int,
    ) -> Tensor:
        """(B, T, D) to (R, n + S, D): R = B * clones; n extra tokens; S = visible tokens if given, else all."""
        del masked_rt, valid_bt
        return self.behind_tokens(rows_of(features_btd, visible_rs, clones))


class TokenStem(Stem):
    """Embeddings of tokens and of their positions."""

    def __init__(self, config: ModelConfig, exists: Exists, section: Section) -> None:
        super().__init__(config)
        self.pad_id = config.sole(TextStem).pad_id
        if not section.starts:
            return
        if exists("features"):
            self.features = TextFeatures(config)
        self.context = TextContext(config)

    def valid_positions(self, inputs: Tensor, valid: Tensor) -> Tensor:
        """Tokens that are no padding."""
        del valid
        return inputs != self.pad_id

    def represent(self, inputs: Tensor, valid_bt: Tensor | None) -> Tensor:
        """Padding has no position."""
        return self.features(inputs, valid_bt)
