"""Student and teacher: two stacks from one list of layers."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from d2v_scale import modalities
from d2v_scale.batch import Batch
from d2v_scale.data2vec import stateless, targets
from d2v_scale.data2vec.config import TargetConfig
from d2v_scale.model.block import with_zero_gradient
from d2v_scale.model.config import ModelConfig
from d2v_scale.model.layers import Carry, LayerSpec, Section, StudentOutput
from d2v_scale.model.stem_config import parts_of
from d2v_scale.model.teacher_parts import TeacherParts
from d2v_scale.networks.draw import Draw
from d2v_scale.networks.layered import Layered, by_part, student_inputs, whole_inputs
from d2v_scale.networks.layers import longest_prenet
from d2v_scale.networks.predictor import ConvPredictor, Widths


class Student(Layered):
    """The network that is trained: it sees a masked sample and predicts the teacher's targets at masked positions."""

    def __init__(
        self,
        config: ModelConfig,
        names: list[str] | None = None,
        section: Section | None = None,
        parts: TeacherParts | None = None,
        target_widths: Widths | None = None,
    ) -> None:
        """Parameters are unfilled until `initialize` or a checkpoint writes them. Torch distributed and megatron's
        parallel_state must be initialised. `names`: the stems to build; `section`: the part of the layers; `parts`:
        what of them exists here. None: all. `target_widths`: of each stem's targets; None: one, of the model's
        width."""
        super().__init__(config, config.modalities if names is None else names, parts, section, target_widths or {})
        self._heads = {name: tuple(widths)[1:] for name, widths in (target_widths or {}).items()}
        backbone = config.backbone
        self._has_dropout = bool(backbone.dropout or backbone.attention_dropout or backbone.activation_dropout)

    def forward(
        self, batch: Batch, draw: Draw, noise_rtd: Tensor | None = None, *, only_read: bool = False
    ) -> StudentOutput:
        """Predictions at the batch's masked positions. `noise_rtd`: the decoder's mask tokens (2.0), drawn if None;
        `only_read`: nothing is computed that only `encoder_rsd` would hold.

        Under tensor parallelism or ZeRO-3 all ranks of the group must call, with the same modality.
        """
        carry, features_btd = self.enter(batch)
        read_n = self.read(batch) if only_read else None
        self.run_blocks(batch, carry, draw, read_n)
        (predictions_nd, *further), encoder_rsd, cls = self.leave(batch, carry, draw, noise_rtd, read_n)
        return StudentOutput(predictions_nd, features_btd.detach(), encoder_rsd, cls, tuple(further))

    def encode(self, batch: Batch, draw: Draw, features_btd: Tensor | None = None, *, masked: bool = False) -> Tensor:
        """Output (B, T, D) of the last block on unmasked inputs, without extra tokens and final norm.

        `features_btd`: the stem's; None: made here. `masked`: masked positions are hidden as in pretraining.
        """
        valids = self._valids(batch, whole_inputs)
        features_btd = self._features(batch, whole_inputs, valids) if features_btd is None else features_btd
        carry = self._enter(batch, features_btd, valids, masked=masked)
        self._run_blocks(batch, carry, draw, masked=masked)
        return carry.states_rsd[:, carry.extra_tokens :]

    def features(self, batch: Batch, layers: list[int]) -> list[Tensor]:
        """As `Teacher.features`, of the student. In eval mode."""
        return self.outputs_of(batch, self.enter_whole(batch), layers)

    def enter_whole(self, batch: Batch, features_btd: Tensor | None = None) -> Carry:
        """The stem on the unmasked input: what the first block gets. `features_btd`: the stem's; None: made here."""
        valids = self._valids(batch, whole_inputs)
        features_btd = self._features(batch, whole_inputs, valids) if features_btd is None else features_btd
        return self._enter(batch, features_btd, valids, masked=False)

    def resume_whole(self, batch: Batch, states_rsd: Tensor, positions: tuple[Tensor, ...]) -> Carry:
        """As `resume`, on the unmasked input."""
        return self._carry(batch, states_rsd, self._valids(batch, whole_inputs), positions, masked=False)

    def enter(self, batch: Batch) -> tuple[Carry, Tensor]:
        """The stem on the masked input: what the first block gets, and the features (B, T, D) before masking."""
        if self.config.visible_only:
            assert batch.layout.visible_rs is not None, "rows of a 2.0 batch must keep equal numbers of positions"
        valids = self._valids(batch, student_inputs)
        features_btd = self._features(batch, student_inputs, valids)
        return self._enter(batch, features_btd, valids, masked=True), features_btd

    def resume(self, batch: Batch, states_rsd: Tensor, positions: tuple[Tensor, ...]) -> Carry:
        """What the first block of a later section gets: the states and `Carry.positions` of the section before."""
        return self._carry(batch, states_rsd, self._valids(batch, student_inputs), positions, masked=True)

    def run_blocks(self, batch: Batch, carry: Carry, draw: Draw, read_n: Tensor | None = None) -> None:
        """Move the carry through the blocks that are here. `read_n`: of `read`; the last main block's states are then
        (N, D), of these positions."""
        self._run_blocks(batch, carry, draw, masked=True, read_n=read_n)

    def _run_blocks(
        self, batch: Batch, carry: Carry, draw: Draw, *, masked: bool, read_n: Tensor | None = None
    ) -> None:
        scales: dict[str, Tensor | None] = {}
        for own, its, layer, block in self._each_block(batch, carry, masked=masked):
            if own.modality not in scales:
                scales[own.modality] = self._branch_scales(own, draw)
            places_n = batch.places_n(read_n) if read_n is not None and self.is_last(layer) else None
            if self._dropped(layer, draw):
                its.states_rsd = with_zero_gradient(block, its.states_rsd)
                if places_n is not None:
                    its.states_rsd = its.states_rsd.flatten(0, 1).index_select(0, places_n)
                continue
            scale = scales[own.modality]
            its.states_rsd = self._run_block(block, its, None if scale is None else scale[layer.index], places_n)

    def leave(
        self,
        batch: Batch,
        carry: Carry,
        draw: Draw,
        noise_rtd: Tensor | None = None,
        read_n: Tensor | None = None,
    ) -> tuple[tuple[Tensor, ...], Tensor, tuple[Tensor | None, ...]]:
        """Predictions (N, W) of every target, encoder output (R, S, D) and of each stem the last extra token's output
        (R, D): see `StudentOutput`. `read_n`: what `run_blocks` was given."""
        x_rsd = carry.states_rsd
        if self.config.backbone.final_norm:
            x_rsd = self.final_norm(x_rsd)
        if read_n is not None:
            none_rsd = x_rsd.new_empty(len(batch.masked_rt), 0, x_rsd.shape[-1])
            return self._predict_at(batch.modality, x_rsd), none_rsd, (None,)
        encoder_rsd = x_rsd[:, carry.extra_tokens :]
        predictions: list[Tensor] = []
        cls: list[Tensor | None] = []
        token, place = 0, 0
        for part in batch.of_stems:
            visible_rs = part.layout.visible_rs if self.config.visible_only else None
            kept = part.masked_rt.shape[1] if visible_rs is None else visible_rs.shape[1]
            own_rsd = encoder_rsd[:, place : place + kept] if batch.parts else encoder_rsd
            predictions += self._predict(part, own_rsd, draw, noise_rtd)
            place, token = place + kept, token + part.extra_tokens
            cls.append(x_rsd[:, token - 1] if self.config.visible_only and part.extra_tokens else None)
        return tuple(predictions), encoder_rsd, tuple(cls)

    def _run_block(self, block: nn.Module, carry: Carry, scale_2r11: Tensor | None, places_n: Tensor | None) -> Tensor:
        arguments = (carry.states_rsd, carry.attention_bias, scale_2r11, places_n)
        if self.config.activation_checkpointing and torch.is_grad_enabled():
            states_rsd, _ = checkpoint(block, *arguments, use_reentrant=False, preserve_rng_state=self._has_dropout)
        else:
            states_rsd, _ = block(*arguments)
        return states_rsd

    def _predict(self, batch: Batch, encoder_rsd: Tensor, draw: Draw, noise_rtd: Tensor | None) -> tuple[Tensor, ...]:
        one, heads = self.configs[batch.modality], self._heads.get(batch.modality, ())
        predictor = self.predictors[one.predictor_name]
        masked_n = batch.layout.masked_n
        width = encoder_rsd.shape[-1]
        if not isinstance(predictor, ConvPredictor):
            return self._predict_at(batch.modality, encoder_rsd.reshape(-1, width).index_select(0, masked_n))
        if noise_rtd is not None:
            noise_nd = noise_rtd.reshape(-1, width).index_select(0, masked_n)
        else:
            length = batch.masked_rt.shape[1]
            keys_n = self._row_keys(batch, draw).index_select(0, masked_n // length) + masked_n % length
            noise_nd = stateless.normal(stateless.row_keys(keys_n, "decoder noise"), width)
            noise_nd = noise_nd * one.predictor.noise_std
        layout = batch.layout
        return predictor(encoder_rsd, layout.visible_rs, masked_n, noise_nd, batch.extents, heads, layout.decoded_n)

    def _predict_at(self, modality: str, states_nd: Tensor) -> tuple[Tensor, ...]:
        """Of states (N, D) at masked positions, by a predictor that looks at each by itself."""
        predictor = self.predictors[self.configs[modality].predictor_name]
        found: tuple[Tensor, ...] = predictor(states_nd, self._heads.get(modality, ()))
        return found

    def _row_keys(self, batch: Batch, draw: Draw) -> Tensor:
        """int64 (R,): a key for each row from (seed, step, sample id, clone)."""
        clones = batch.clones
        keys_b = stateless.row_keys(batch.sample_ids, draw.seed, draw.step)
        clone_m = torch.arange(clones, device=keys_b.device)
        return stateless.row_keys((keys_b[:, None] + clone_m).flatten(), "row")

    def _branch_scales(self, batch: Batch, draw: Draw) -> Tensor | None:
        """Drop path: fp32 (blocks, 2, R, 1, 1), 0 or 1 / (1 - rate of the block); None where it is off."""
        backbone = self.config.backbone
        rates = replace(backbone, prenet_depth=longest_prenet(self.config, batch.modality)).drop_path_rates()
        if not self.training or not any(rates):
            return None
        count = len(rates)
        uniform_rc = stateless.uniform(stateless.row_keys(self._row_keys(batch, draw), "drop path"), 2 * count)
        keep_c = 1 - torch.tensor(rates).to(uniform_rc.device, non_blocking=True).repeat_interleave(2)
        scales_rc = (uniform_rc < keep_c) / keep_c
        return scales_rc.t().reshape(count, 2, -1, 1, 1)

    def _dropped(self, layer: LayerSpec, draw: Draw) -> bool:
        """Layer drop, decided alike on all ranks: a block that only some of them run would hang ZeRO-3."""
        rate = self.config.backbone.layer_drop
        if not self.training or rate == 0:
            return False
        return stateless.numpy_generator(draw.seed, draw.step, "layer drop", layer.index).random() < rate


class Teacher(Layered):
    """The teacher's own copies of what it runs: frozen, and in eval mode whatever `train()` is called with."""

    def __init__(
        self,
        config: ModelConfig,
        target: TargetConfig | Mapping[str, Sequence[TargetConfig]] | None,
        parts: TeacherParts,
        section: Section | None = None,
    ) -> None:
        """`target`: one for all stems, or all of each by the stem's name; None: no targets are made."""
        every = {m: [target] for m in config.modalities} if isinstance(target, TargetConfig) else target or {}
        built = {m: targets.build_all(each, modalities.target_place(config, m)) for m, each in every.items()}
        super().__init__(
            config, config.modalities, parts, section, {m: targets.widths(each) for m, each in built.items()}
        )
        self.targets = built
        """How targets are made, by stem; the first one first."""
        self.state: dict[str, list[targets.State]] = {}
        """The state of each target of a stem ({}: it has none), in fp32 whatever the module is cast to, on the stage
        that makes targets; only stems that have some."""
        self.requires_grad_(False)
        super().train(False)

    def train(self, mode: bool = True) -> "Teacher":
        """Stays in eval mode: engines call `train()` on everything they hold."""
        del mode
        return self

    def owns_features(self, modality: str) -> bool:
        """Whether this teacher computes the stem features of `modality` itself."""
        return hasattr(self.stems[modality], "features")

    @torch.no_grad()
    def forward(self, batch: Batch, features_btd: Tensor | None = None) -> Tensor:
        """Targets, fp32 (B, T, W), of the unmasked samples, those of the first kind. `features_btd`: the student's,
        where they are shared."""
        return self.make(batch, features_btd)[0].targets_btd

    @torch.no_grad()
    def make(
        self, batch: Batch, features_btd: Tensor | None = None, *, only_read: bool = False
    ) -> tuple[targets.Made, ...]:
        """All targets, and what is observed of them. `only_read`: values at other positions than `read` may be NaN.
        Other arguments as for `forward`."""
        read_n = self.read(batch) if only_read else None
        running = self.run_blocks(batch, self.enter(batch, features_btd), read_n=read_n)
        return self.leave(batch, running, read_n)

    def read(self, batch: Batch) -> Tensor | None:
        """As of the student, where each position's targets are made from that position alone, of samples with one
        mask each; None: targets are needed at all of them."""
        every = (target for part in batch.of_stems for target in self.targets[part.modality])
        by_position = all(target.is_by_position for target in every)
        return super().read(batch) if by_position and batch.clones == 1 else None

    def begin_state(self, device: torch.device) -> None:
        """Give targets that have a state the one that a run begins with. Local."""
        if self.section.ends:
            initial = {m: [target.initial_state() for target in each] for m, each in self.targets.items()}
            self.state = {
                m: [{n: x.to(device) for n, x in one.items()} for one in each]
                for m, each in initial.items()
                if any(each)
            }

    def taps_before(self, sequence: str, block: int) -> list[bool]:
        """For each target, of paired samples of all parts, whether a main block that it taps comes before this one."""
        every = (target for stem in parts_of(sequence) for target in self.targets[stem])
        return [any(layer < block for layer in target.layers) for target in every]

    def enter(self, batch: Batch, features_btd: Tensor | None) -> Carry:
        """The stem on the unmasked input: what the first block gets."""
        parts = batch.of_stems
        if all(self.owns_features(part.modality) for part in parts):
            features_btd = None
        cut = None if features_btd is None else by_part(batch, features_btd)
        valids = self._valids(batch, whole_inputs)
        found = []
        for number, part in enumerate(parts):
            if self.owns_features(part.modality):
                found.append(self._features(part, whole_inputs, valids[number : number + 1]))
                continue
            assert cut is not None, f"this teacher shares {part.modality} features and was given none"
            # The student's may be of another precision.
            found.append(cut[number].to(next(self.blocks.parameters()).dtype))
        return self._enter(batch, found[0] if len(found) == 1 else torch.cat(found, dim=1), valids, masked=False)

    def resume(self, batch: Batch, states_rsd: Tensor, positions: tuple[Tensor, ...]) -> Carry:
        """What the first block of a later section gets: the states and `Carry.positions` of the section before."""
        return self._carry(batch, states_rsd, self._valids(batch, whole_inputs), positions, masked=False)

    def run_blocks(
        self,
        batch: Batch,
        carry: Carry,
        running: Sequence[Tensor | None] | None = None,
        read_n: Tensor | None = None,
    ) -> list[Tensor | None]:
        """Move the carry through the blocks that are here, and add their taps to the running sum of each target, (B, T,
        D). `read_n`: of `read`; the sums are then (1, N, D), of these positions."""
        made = list(self._targets_of(batch))
        running = [None] * len(made) if running is None else list(running)
        places_n = None if read_n is None else batch.places_n(read_n)
        for _, its, layer, block in self._each_block(batch, carry, masked=False):
            at_n = places_n if self.is_last(layer) else None
            its.states_rsd, ffn_rsd = block(its.states_rsd, its.attention_bias, None, at_n)
            for number, (part, first, target) in enumerate(made):
                if layer.main in target.layers:
                    tap_rsd = ffn_rsd if target.config.tap == "ffn" else its.states_rsd
                    if places_n is not None:
                        tap_nd = tap_rsd if at_n is not None else tap_rsd.flatten(0, 1).index_select(0, places_n)
                        running[number] = target.add(running[number], tap_nd[None])
                        continue
                    own_rsd = tap_rsd[:, its.extra_tokens :]
                    if batch.parts:
                        own_rsd = own_rsd[:, first : first + part.masked_rt.shape[1]]
                    running[number] = target.add(running[number], own_rsd)
        return running

    def _targets_of(self, batch: Batch) -> Iterator[tuple[Batch, int, targets.Target]]:
        """The targets of every part, with the part and the first of its positions."""
        first = 0
        for part in batch.of_stems:
            yield from ((part, first, target) for target in self.targets[part.modality])
            first += part.masked_rt.shape[1]

    def leave(
        self, batch: Batch, running: Sequence[Tensor | None], read_n: Tensor | None = None
    ) -> tuple[targets.Made, ...]:
        """The targets of the sums of all taps. `read_n`: what `run_blocks` was given; elsewhere they are NaN."""
        if read_n is not None:
            own = zip(self.targets[batch.modality], running, strict=True)
            return tuple(
                _placed(targets.make(target, sum_1nd, None, None, {}), batch, read_n) for target, sum_1nd in own
            )
        made: list[targets.Made] = []
        rest = iter(running)
        for part in batch.of_stems:
            every = self.targets[part.modality]
            states = self.state.get(part.modality) or [{}] * len(every)
            stem = modalities.of(self.config, part.modality)
            inputs_btd = stem.input_values(part) if any(target.reads_inputs for target in every) else None
            counted_bt = self._counted(part) if any(states) else None
            made += (
                targets.make(target, next(rest), inputs_btd, counted_bt, state)
                for target, state in zip(every, states, strict=True)
            )
        return tuple(made)

    def _counted(self, batch: Batch) -> Tensor:
        """fp32 (B, T): 1 where a position is of the input, 0 in padding and rows that stand for no sample."""
        shape = (len(batch.inputs), batch.masked_rt.shape[1])
        valid_bt = None if batch.is_blank else self._valid(batch, whole_inputs)
        whole_bt = torch.full(shape, float(not batch.is_blank), device=batch.inputs.device)
        return whole_bt if valid_bt is None else valid_bt.float()

    @torch.no_grad()
    def features(self, batch: Batch, features_btd: Tensor | None, layers: list[int]) -> list[Tensor]:
        """Outputs (B, T, D) of these main blocks on the unmasked input, without CLS; negative numbers count from the
        end. Pool them over `valid_positions(batch)`."""
        return self.outputs_of(batch, self.enter(batch, features_btd), layers)

    @torch.no_grad()
    def features_of_visible(self, batch: Batch) -> Tensor:
        """Output (B, S, D) of the last main block on the visible positions alone, without CLS (2.0): the masked ones
        are not there. Of a batch of one stem."""
        assert self.config.visible_only
        assert batch.clones == 1
        assert not batch.parts
        valids = self._valids(batch, whole_inputs)
        carry = self._enter(batch, self._features(batch, whole_inputs, valids), valids, masked=True)
        last = self.config.backbone.depth - 1
        return self.outputs(batch, carry, {last})[last]


def _placed(made: targets.Made, batch: Batch, read_n: Tensor) -> targets.Made:
    """Targets (1, N, W) of positions in their places, (B, T, W). They have no state, so these are the raw ones too."""
    width = made.targets_btd.shape[-1]
    targets_btd = made.targets_btd.new_full((*batch.masked_rt.shape, width), float("nan"))
    targets_btd.view(-1, width).index_copy_(0, read_n, made.targets_btd[0])
    return targets.Made(targets_btd, targets_btd, None)
