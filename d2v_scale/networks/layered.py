"""The layers of student and teacher that exist here, and how a batch gets from its stems into the main blocks.

A batch of one stem is a sequence of one part. The parts of paired samples pass their own stems, prenets included, each
for itself; then they are one sequence: the extra tokens of all parts, then their positions, in the order of the parts.
"""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d2v_scale import modalities
from d2v_scale.batch import Batch
from d2v_scale.errors import ConfigError
from d2v_scale.model.block import Block, beit_depth_scale
from d2v_scale.model.config import ModelConfig
from d2v_scale.model.init import BEIT, InitRule
from d2v_scale.model.layers import Carry, LayerSpec, Section
from d2v_scale.model.learned_bias import LearnedBias, pieces_of
from d2v_scale.model.position_bias import AlibiBias, add_padding, block_diagonal, distances
from d2v_scale.model.stem import HiddenPart, Stem
from d2v_scale.model.teacher_parts import TeacherParts
from d2v_scale.networks.layers import describe
from d2v_scale.networks.predictor import Widths, build_predictors

Given = Callable[[Batch], Tensor]
"""What of a batch of one stem this stem is given."""


class Layered(nn.Module):
    """The layers of `describe(config, sequence)` that exist here, and how each one moves the carry."""

    def __init__(
        self,
        config: ModelConfig,
        names: list[str],
        parts: TeacherParts | None,
        section: Section | None,
        target_widths: Widths,
    ) -> None:
        super().__init__()
        self.config = config
        self.modalities = names
        self.section = section or Section.whole(config)
        self.configs = {modality: config.of(modality) for modality in names}
        """What each stem's samples pass (`ModelConfig.of`)."""
        self.layers = {modality: describe(config, modality) for modality in names}
        """Of batches of each stem; of paired samples too, once they were asked for (`layers_of`)."""
        backbone = config.backbone

        def exists(name: str) -> bool:
            return parts is None or parts.role(name) != "absent"

        self.stems = nn.ModuleDict({m: _build_stem(config, m, exists, self.section) for m in names})
        # Places of blocks that are elsewhere stay empty, so that every parameter has one name in every section.
        self.blocks = nn.ModuleList(
            _build_block(config, backbone.prenet_depth + i)
            if self.section.first <= i < self.section.last
            else nn.Identity()
            for i in range(backbone.depth)
        )
        if self.section.ends and backbone.final_norm and exists("final_norm"):
            self.final_norm = nn.LayerNorm(backbone.width, backbone.norm_eps)
        if self.section.ends and exists("predictors"):
            self.predictors = nn.ModuleDict(build_predictors(self.configs, target_widths))
        if config.compile:
            for module in self.modules():
                if isinstance(module, Block):
                    module.compile_forward()

    def layers_of(self, sequence: str) -> list[LayerSpec]:
        """The layers that a batch of this stem, or of paired samples, passes."""
        if sequence not in self.layers:
            self.layers[sequence] = describe(self.config, sequence)
        return self.layers[sequence]

    def is_last(self, layer: LayerSpec) -> bool:
        """Whether it is the last main block."""
        return layer.main == self.config.backbone.depth - 1

    def read(self, batch: Batch) -> Tensor | None:
        """int64 (N,): the flat positions r * T + t of the last main block's states that training reads. None: all are
        needed, of 2.0, whose decoder reads every state there is, and of paired samples; or the block is compiled, once
        for all lengths."""
        read_n = batch.layout.masked_n
        needed = self.config.visible_only or self.config.compile or batch.parts or not len(read_n)
        return None if needed else read_n

    def mean_states(self, batch: Batch, encoder_rsd: Tensor) -> tuple[Tensor, ...]:
        """Of each stem the mean (R, D) of the encoder's output over the positions that it was given, but padding; fp32.
        `encoder_rsd`: the student's, of all positions."""
        found, place = [], 0
        for part, valid_bt in zip(batch.of_stems, self._valids(batch, student_inputs), strict=True):
            visible_rs = part.layout.visible_rs if self.config.visible_only else None
            kept = part.masked_rt.shape[1] if visible_rs is None else visible_rs.shape[1]
            own_rsd = encoder_rsd[:, place : place + kept]
            place += kept
            if valid_bt is None:
                found.append(own_rsd.mean(dim=1, dtype=torch.float32))
                continue
            valid_rs = valid_bt.repeat_interleave(part.clones, dim=0)
            valid_rs = valid_rs if visible_rs is None else valid_rs.gather(1, visible_rs)
            total_rd = (own_rsd * valid_rs[..., None]).sum(dim=1, dtype=torch.float32)
            found.append(total_rd / valid_rs.sum(dim=1, keepdim=True).clamp(min=1))
        return tuple(found)

    def stem_features(self, batch: Batch) -> Tensor:
        """Features (B, T, D) of the unmasked input, with this stack's own stems, e.g. for evaluation."""
        return self._features(batch, whole_inputs, self._valids(batch, whole_inputs))

    def valid_positions(self, batch: Batch) -> Tensor | None:
        """bool (B, T): positions that are there, and no padding. None: all are."""
        valids = self._valids(batch, whole_inputs)
        if all(valid is None for valid in valids):
            return None
        return torch.cat([_all_valid(p) if v is None else v for p, v in zip(batch.of_stems, valids, strict=True)], 1)

    def check_layers(self, layers: list[int]) -> list[int]:
        """The same list. Raises ConfigError unless all are numbers of main blocks."""
        depth = self.config.backbone.depth
        if not all(-depth <= layer < depth for layer in layers):
            raise ConfigError("layers", f"{layers} are not all blocks of a model of depth {depth}.")
        return layers

    @torch.no_grad()
    def outputs_of(self, batch: Batch, carry: Carry, layers: list[int]) -> list[Tensor]:
        """Outputs (B, T, D) of these main blocks, all of which are here, in this order; without CLS."""
        depth = self.config.backbone.depth
        states = self.outputs(batch, carry, {layer % depth for layer in self.check_layers(layers)})
        return [states[layer % depth] for layer in layers]

    @torch.no_grad()
    def outputs(self, batch: Batch, carry: Carry, wanted: set[int]) -> dict[int, Tensor]:
        """Move the carry through the blocks that are here; outputs (B, T, D), without CLS, of the `wanted` ones."""
        states = {}
        for _, its, layer, block in self._each_block(batch, carry, masked=False):
            its.states_rsd, _ = block(its.states_rsd, its.attention_bias, None)
            if layer.main in wanted:
                states[layer.main] = its.states_rsd[:, its.extra_tokens :]
        return states

    def _valids(self, batch: Batch, given: Given) -> list[Tensor | None]:
        """The same of every part by itself."""
        return [self._valid(part, given) for part in batch.of_stems]

    def _valid(self, part: Batch, given: Given) -> Tensor | None:
        stem = self._stem(part.modality)
        valid_bt = None if part.valid is None else stem.valid_positions(given(part), part.valid)
        if part.present_b is None:
            return valid_bt
        present_bt = part.present_b[:, None].expand(-1, part.masked_rt.shape[1])
        return present_bt if valid_bt is None else valid_bt & present_bt

    def _stem(self, modality: str) -> Stem:
        stem = self.stems[modality]
        assert isinstance(stem, Stem)
        return stem

    def _features(self, batch: Batch, given: Given, valids: list[Tensor | None]) -> Tensor:
        found = [
            self._stem(part.modality).represent(given(part), valid_bt)
            for part, valid_bt in zip(batch.of_stems, valids, strict=True)
        ]
        return found[0] if len(found) == 1 else torch.cat(found, dim=1)

    def _enter(self, batch: Batch, features_btd: Tensor, valids: list[Tensor | None], *, masked: bool) -> Carry:
        """The context layers and the attention biases: what the first blocks get, of a prenet or the main ones.
        `valids`: `_valids` of the batch."""
        entered = []
        for part, x_btd, valid_bt in zip(batch.of_stems, by_part(batch, features_btd), valids, strict=True):
            stem = self._stem(part.modality)
            carry = self._carry(part, self._states(part, x_btd, valid_bt, masked=masked), [valid_bt], masked=masked)
            carry.valid_bt = valid_bt
            if not self.section.ends:
                carry.positions = (stem.bias.parameter,) if hasattr(stem, "bias") else ()
            entered.append(carry)
        return Carry(features_btd, parts=tuple(entered)) if batch.parts else entered[0]

    def _states(self, part: Batch, features_btd: Tensor, valid_bt: Tensor | None, *, masked: bool) -> Tensor:
        """(R, n + S, D): what the context of one stem makes of its features."""
        stem = self._stem(part.modality)
        visible_rs = self._visible(part, masked=masked)
        masked_rt, clones = (part.masked_rt, part.clones) if masked else (None, 1)
        states_rsd = stem.context(features_btd, masked_rt, visible_rs, valid_bt, clones)
        if masked and part.hidden_r is not None:
            states_rsd = stem.hidden(states_rsd, part.hidden_r, visible_rs, part.extents, stem.extra_tokens)
        return states_rsd

    def _visible(self, part: Batch, *, masked: bool) -> Tensor | None:
        return part.layout.visible_rs if masked and self.config.visible_only else None

    def _carry(
        self,
        batch: Batch,
        states_rsd: Tensor,
        valids: list[Tensor | None],
        positions: tuple[Tensor, ...] = (),
        *,
        masked: bool,
    ) -> Carry:
        """States with the bias that every block adds to its attention. `valids`: `_valids` of the batch; `positions`:
        the first stage's parameters of the bias, where this stack has none of its own."""
        parts, coming = batch.of_stems, iter(positions)
        sizes, biases, slots = [], [], []
        for part, valid_bt in zip(parts, valids, strict=True):
            stem = self._stem(part.modality)
            visible_rs = self._visible(part, masked=masked)
            kept = part.masked_rt.shape[1] if visible_rs is None else visible_rs.shape[1]
            sizes.append((stem.extra_tokens, kept))
            # Of which the bias asks the size.
            own_rsd = states_rsd[:, : stem.extra_tokens + kept] if batch.parts else states_rsd
            has_bias = hasattr(stem, "bias")
            biases.append(stem.attention_bias(own_rsd, visible_rs, next(coming, None)) if has_bias else None)
            slots.append(self._valid_slots(part, valid_bt, visible_rs, masked=masked))
        assert all(bias is None or bias.shape[0] in (1, len(states_rsd)) for bias in biases)
        bias, valid_rs = biases[0], slots[0]
        if len(parts) > 1:
            lengths = [extra + kept for extra, kept in sizes]
            bias = block_diagonal([None if one is None else one.to(states_rsd.dtype) for one in biases], lengths)
            valid_rs = _together(slots, lengths)
            if any(extra for extra, _ in sizes[1:]):
                order = _tokens_first(sizes, states_rsd.device)
                bias = None if bias is None else bias.index_select(2, order).index_select(3, order)
                valid_rs = None if valid_rs is None else valid_rs.index_select(1, order)
        if valid_rs is not None:
            # A row without any real key attends to its padding: what a kernel gives over no key at all is its own
            # affair, zeros or NaN. Nothing of such a row is counted.
            valid_rs = valid_rs | ~valid_rs.any(dim=1, keepdim=True)
        extra = sum(extra for extra, _ in sizes)
        added = add_padding(bias, valid_rs, states_rsd.dtype)
        if added is not None and added.requires_grad and not extra and not batch.parts:
            alibi = self._stem(batch.modality).bias
            if isinstance(alibi, AlibiBias):
                kept_rs = self._visible(batch, masked=masked)
                places_rs = torch.arange(added.shape[-1], device=added.device)[None] if kept_rs is None else kept_rs
                pieces = pieces_of(len(states_rsd), added)
                learned = LearnedBias(added.detach(), alibi.slopes(*positions), distances(places_rs), pieces)
                return Carry(states_rsd, learned, extra, positions)
        return Carry(states_rsd, added, extra, positions)

    def _valid_slots(
        self, part: Batch, valid_bt: Tensor | None, visible_rs: Tensor | None, *, masked: bool
    ) -> Tensor | None:
        """bool (R, n + S): what of one stem's tokens and positions blocks may attend to. None: all."""
        if valid_bt is None:
            return None
        clones = part.clones if masked else 1
        valid_rs = valid_bt.repeat_interleave(clones, dim=0)
        if visible_rs is not None:
            valid_rs = valid_rs.gather(1, visible_rs)
        extra = self._stem(part.modality).extra_tokens
        if not extra:
            return valid_rs
        if part.present_b is None:
            return F.pad(valid_rs, (extra, 0), value=True)
        present_r = part.present_b.repeat_interleave(clones, dim=0)
        return torch.cat((present_r[:, None].expand(-1, extra), valid_rs), dim=1)

    def _joined(self, batch: Batch, carry: Carry, *, masked: bool) -> Carry:
        """What the main blocks get of parts that have passed their prenets."""
        own = [(part.states_rsd, part.extra_tokens) for part in carry.parts]
        pieces = [x_rsd[:, :extra] for x_rsd, extra in own] + [x_rsd[:, extra:] for x_rsd, extra in own]
        joined = self._carry(batch, torch.cat(pieces, dim=1), [part.valid_bt for part in carry.parts], masked=masked)
        joined.positions = tuple(position for part in carry.parts for position in part.positions)
        return joined

    def _prenet(self, stem: str) -> Iterator[tuple[LayerSpec, nn.Module]]:
        """The blocks of one stem that are in this section, in order."""
        for layer in self.layers_of(stem):
            if layer.kind == "block" and layer.main < 0 and self.section.holds(layer):
                yield layer, self._stem(stem).prenet[layer.index]

    def _main_blocks(self, sequence: str) -> Iterator[tuple[LayerSpec, nn.Module]]:
        """The main blocks of this section, in order."""
        for layer in self.layers_of(sequence):
            if layer.main >= 0 and self.section.holds(layer):
                yield layer, self.blocks[layer.main]

    def _each_block(
        self, batch: Batch, carry: Carry, *, masked: bool
    ) -> Iterator[tuple[Batch, Carry, LayerSpec, nn.Module]]:
        """Every block of this section in order with the carry that it moves, and the batch that this is of: parts
        become one sequence, and `carry` what travels of it, once they have passed their prenets."""
        for part, own in zip(batch.of_stems, carry.parts or (carry,), strict=True) if self.section.starts else ():
            for layer, block in self._prenet(part.modality):
                yield part, own, layer, block
        if carry.parts:
            carry.become(self._joined(batch, carry, masked=masked))
        for layer, block in self._main_blocks(batch.modality):
            yield batch, carry, layer, block


def by_part(batch: Batch, x_btd: Tensor) -> tuple[Tensor, ...]:
    """(B, T, D) of a batch cut into those of its parts; of a batch of one stem, which may have no masks, as it is."""
    return x_btd.split([part.masked_rt.shape[1] for part in batch.parts], dim=1) if batch.parts else (x_btd,)


def whole_inputs(part: Batch) -> Tensor:
    """What the teacher's stem is given, and that of whoever looks at whole samples."""
    return part.inputs


def student_inputs(part: Batch) -> Tensor:
    """What the student's stem is given."""
    return part.inputs if part.student_inputs is None else part.student_inputs


def _all_valid(part: Batch) -> Tensor:
    return torch.ones(len(part.inputs), part.masked_rt.shape[1], dtype=torch.bool, device=part.inputs.device)


def _together(valids: list[Tensor | None], sizes: list[int]) -> Tensor | None:
    """What of all parts blocks may attend to. None: everything."""
    known = next((valid for valid in valids if valid is not None), None)
    if known is None:
        return None
    pieces = [known.new_ones(len(known), n) if v is None else v for v, n in zip(valids, sizes, strict=True)]
    return torch.cat(pieces, dim=1)


def _tokens_first(sizes: list[tuple[int, int]], device: torch.device) -> Tensor:
    """Where what stands part by part, each as (extra tokens, positions), stands with the tokens of all before it."""
    tokens, places, before = [], [], 0
    for extra, kept in sizes:
        tokens.append(torch.arange(before, before + extra, device=device))
        places.append(torch.arange(before + extra, before + extra + kept, device=device))
        before += extra + kept
    return torch.cat([*tokens, *places])


def _build_stem(config: ModelConfig, modality: str, exists: Callable[[str], bool], section: Section) -> Stem:
    stem = modalities.of(config, modality).build_stem(lambda name: exists(f"stems.{modality}.{name}"), section)
    if section.starts:
        if config.stems[modality].paired and exists(f"stems.{modality}.hidden"):
            stem.hidden = HiddenPart(config.backbone.width)
        depth = config.of(modality).backbone.prenet_depth
        stem.prenet = nn.ModuleList(_build_block(config, i) for i in range(depth))
    return stem


def _build_block(config: ModelConfig, index: int) -> Block:
    if config.init == "beit":
        return Block(config.backbone, rule=BEIT, depth_scale=beit_depth_scale(index))
    return Block(config.backbone, rule=InitRule("normal", config.backbone.init_std))
