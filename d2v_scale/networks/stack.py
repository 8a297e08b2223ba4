"""Student and teacher: two stacks from one list of layers."""

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from d2v_scale import modalities
from d2v_scale.batch import Batch
from d2v_scale.data2vec import stateless, targets
from d2v_scale.data2vec.config import TargetConfig
from d2v_scale.errors import ConfigError
from d2v_scale.model.block import Block, beit_depth_scale, with_zero_gradient
from d2v_scale.model.config import ModelConfig
from d2v_scale.model.init import BEIT, InitRule
from d2v_scale.model.layers import Carry, LayerSpec, Section, StudentOutput
from d2v_scale.model.position_bias import add_padding
from d2v_scale.model.stem import Stem
from d2v_scale.model.teacher_parts import TeacherParts
from d2v_scale.networks.draw import Draw
from d2v_scale.networks.layers import describe
from d2v_scale.networks.predictor import ConvPredictor, Widths, build_predictors


class _Stack(nn.Module):
    """The layers of `describe(config, modality)` that exist here, and how each one moves the carry."""

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

    def stem_features(self, batch: Batch) -> Tensor:
        """Features (B, T, D) of the unmasked input, with this stack's own stem, e.g. for evaluation."""
        return self._features(batch, batch.inputs)

    def valid_positions(self, batch: Batch) -> Tensor | None:
        """bool (B, T): positions that are not padding. None: none is."""
        return self._valid(batch, batch.inputs)

    def _valid(self, batch: Batch, inputs: Tensor) -> Tensor | None:
        return None if batch.valid is None else self._stem(batch.modality).valid_positions(inputs, batch.valid)

    def _stem(self, modality: str) -> Stem:
        stem = self.stems[modality]
        assert isinstance(stem, Stem)
        return stem

    def _features(self, batch: Batch, inputs: Tensor) -> Tensor:
        return self._stem(batch.modality).represent(inputs, self._valid(batch, inputs))

    def _enter(self, batch: Batch, features_btd: Tensor, valid_bt: Tensor | None, *, masked: bool) -> Carry:
        """The context layer and the attention bias: what the first block gets."""
        stem = self._stem(batch.modality)
        visible_rs = batch.layout.visible_rs if masked and self.config.visible_only else None
        masked_rt = batch.masked_rt if masked else None
        states_rsd = stem.context(features_btd, masked_rt, visible_rs, valid_bt, batch.clones if masked else 1)
        carry = self._carry(batch, states_rsd, valid_bt, None, masked=masked)
        if not self.section.ends and hasattr(stem, "bias"):
            carry.position = stem.bias.parameter
        return carry

    def _carry(
        self, batch: Batch, states_rsd: Tensor, valid_bt: Tensor | None, position: Tensor | None, *, masked: bool
    ) -> Carry:
        """States with the bias that every block adds to its attention. `position`: the first stage's parameter of it,
        where this stack has none of its own."""
        visible_rs = batch.layout.visible_rs if masked and self.config.visible_only else None
        clones = batch.clones if masked else 1
        stem = self._stem(batch.modality)
        bias = stem.attention_bias(states_rsd, visible_rs, position) if hasattr(stem, "bias") else None
        if valid_bt is not None:
            valid_bt = valid_bt.repeat_interleave(clones, dim=0)
            if visible_rs is not None:
                valid_bt = valid_bt.gather(1, visible_rs)
            if stem.extra_tokens:
                valid_bt = F.pad(valid_bt, (stem.extra_tokens, 0), value=True)
            # A row without any real key attends to its padding: what a kernel gives over no key at all is its own
            # affair, zeros or NaN. Nothing of such a row is counted.
            valid_bt = valid_bt | ~valid_bt.any(dim=1, keepdim=True)
        assert bias is None or bias.shape[0] in (1, len(states_rsd))
        return Carry(states_rsd, add_padding(bias, valid_bt, states_rsd.dtype), stem.extra_tokens, position)

    def _blocks(self, modality: str) -> Iterator[tuple[LayerSpec, nn.Module]]:
        """The blocks of this section, prenet included, in order."""
        for layer in self.layers[modality]:
            if layer.kind == "block" and self.section.holds(layer):
                main = layer.main >= 0
                yield layer, self.blocks[layer.main] if main else self._stem(modality).prenet[layer.index]


class Student(_Stack):
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

    def forward(self, batch: Batch, draw: Draw, noise_rtd: Tensor | None = None) -> StudentOutput:
        """Predictions at the batch's masked positions. `noise_rtd`: the decoder's mask tokens (2.0), drawn if None.

        Under tensor parallelism or ZeRO-3 all ranks of the group must call, with the same modality.
        """
        carry, features_btd = self.enter(batch)
        self.run_blocks(batch, carry, draw)
        (predictions_nd, *further), encoder_rsd, cls_rd = self.leave(batch, carry, draw, noise_rtd)
        return StudentOutput(predictions_nd, features_btd.detach(), encoder_rsd, cls_rd, tuple(further))

    def encode(self, batch: Batch, draw: Draw, features_btd: Tensor | None = None, *, masked: bool = False) -> Tensor:
        """Output (B, T, D) of the last block on unmasked inputs, without extra tokens and final norm.

        `features_btd`: the stem's; None: made here. `masked`: masked positions are hidden as in pretraining.
        """
        features_btd = self.stem_features(batch) if features_btd is None else features_btd
        carry = self._enter(batch, features_btd, self.valid_positions(batch), masked=masked)
        self.run_blocks(batch, carry, draw)
        return carry.states_rsd[:, carry.extra_tokens :]

    def enter(self, batch: Batch) -> tuple[Carry, Tensor]:
        """The stem on the masked input: what the first block gets, and the features (B, T, D) before masking."""
        if self.config.visible_only:
            assert batch.layout.visible_rs is not None, "rows of a 2.0 batch must keep equal numbers of positions"
        inputs = _student_inputs(batch)
        features_btd = self._features(batch, inputs)
        return self._enter(batch, features_btd, self._valid(batch, inputs), masked=True), features_btd

    def resume(self, batch: Batch, states_rsd: Tensor, position: Tensor | None) -> Carry:
        """What the first block of a later section gets: the states and `Carry.position` of the section before."""
        return self._carry(batch, states_rsd, self._valid(batch, _student_inputs(batch)), position, masked=True)

    def run_blocks(self, batch: Batch, carry: Carry, draw: Draw) -> None:
        """Move the carry through the blocks that are here."""
        scales = self._branch_scales(batch, draw)
        for layer, block in self._blocks(batch.modality):
            if self._dropped(layer, draw):
                carry.states_rsd = with_zero_gradient(block, carry.states_rsd)
                continue
            carry.states_rsd = self._run_block(block, carry, None if scales is None else scales[layer.index])

    def leave(
        self, batch: Batch, carry: Carry, draw: Draw, noise_rtd: Tensor | None = None
    ) -> tuple[tuple[Tensor, ...], Tensor, Tensor | None]:
        """Predictions (N, W) of every target, encoder output (R, S, D) and the last extra token's output (R, D): see
        `StudentOutput`."""
        x_rsd = carry.states_rsd
        if self.config.backbone.final_norm:
            x_rsd = self.final_norm(x_rsd)
        encoder_rsd = x_rsd[:, carry.extra_tokens :]
        predictions = self._predict(batch, encoder_rsd, draw, noise_rtd)
        cls_rd = x_rsd[:, carry.extra_tokens - 1] if self.config.visible_only and carry.extra_tokens else None
        return predictions, encoder_rsd, cls_rd

    def _run_block(self, block: nn.Module, carry: Carry, scale_2r11: Tensor | None) -> Tensor:
        arguments = (carry.states_rsd, carry.attention_bias, scale_2r11)
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
            found: tuple[Tensor, ...] = predictor(encoder_rsd.reshape(-1, width).index_select(0, masked_n), heads)
            return found
        if noise_rtd is not None:
            noise_nd = noise_rtd.reshape(-1, width).index_select(0, masked_n)
        else:
            length = batch.masked_rt.shape[1]
            keys_n = self._row_keys(batch, draw).index_select(0, masked_n // length) + masked_n % length
            noise_nd = stateless.normal(stateless.row_keys(keys_n, "decoder noise"), width)
            noise_nd = noise_nd * one.predictor.noise_std
        return predictor(encoder_rsd, batch.layout.visible_rs, masked_n, noise_nd, batch.extents, heads)

    def _row_keys(self, batch: Batch, draw: Draw) -> Tensor:
        """int64 (R,): a key for each row from (seed, step, sample id, clone)."""
        clones = batch.clones
        keys_b = stateless.row_keys(batch.sample_ids, draw.seed, draw.step)
        clone_m = torch.arange(clones, device=keys_b.device)
        return stateless.row_keys((keys_b[:, None] + clone_m).flatten(), "row")

    def _branch_scales(self, batch: Batch, draw: Draw) -> Tensor | None:
        """Drop path: fp32 (blocks, 2, R, 1, 1), 0 or 1 / (1 - rate of the block); None where it is off."""
        rates = self.configs[batch.modality].backbone.drop_path_rates()
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


class Teacher(_Stack):
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
    def make(self, batch: Batch, features_btd: Tensor | None = None) -> tuple[targets.Made, ...]:
        """All targets, and what is observed of them. Arguments as for `forward`."""
        return self.leave(batch, self.run_blocks(batch, self.enter(batch, features_btd)))

    def begin_state(self, device: torch.device) -> None:
        """Give targets that have a state the one that a run begins with. Local."""
        if self.section.ends:
            initial = {m: [target.initial_state() for target in each] for m, each in self.targets.items()}
            self.state = {
                m: [{n: x.to(device) for n, x in one.items()} for one in each]
                for m, each in initial.items()
                if any(each)
            }

    def taps_before(self, modality: str, block: int) -> list[bool]:
        """For each target whether a main block that it taps comes before this one."""
        return [any(layer < block for layer in target.layers) for target in self.targets[modality]]

    def enter(self, batch: Batch, features_btd: Tensor | None) -> Carry:
        """The stem on the unmasked input: what the first block gets."""
        if self.owns_features(batch.modality):
            features_btd = self._features(batch, batch.inputs)
        assert features_btd is not None, f"this teacher shares {batch.modality} features and was given none"
        # The student's may be of another precision.
        features_btd = features_btd.to(next(self.blocks.parameters()).dtype)
        return self._enter(batch, features_btd, self._valid(batch, batch.inputs), masked=False)

    def resume(self, batch: Batch, states_rsd: Tensor, position: Tensor | None) -> Carry:
        """What the first block of a later section gets: the states and `Carry.position` of the section before."""
        return self._carry(batch, states_rsd, self._valid(batch, batch.inputs), position, masked=False)

    def run_blocks(
        self, batch: Batch, carry: Carry, running: Sequence[Tensor | None] | None = None
    ) -> list[Tensor | None]:
        """Move the carry through the blocks that are here, and add their taps to the running sum of each target."""
        made = self.targets[batch.modality]
        running = [None] * len(made) if running is None else list(running)
        for layer, block in self._blocks(batch.modality):
            carry.states_rsd, ffn_rsd = block(carry.states_rsd, carry.attention_bias, None)
            for number, target in enumerate(made):
                if layer.main in target.layers:
                    tap_rsd = ffn_rsd if target.config.tap == "ffn" else carry.states_rsd
                    running[number] = target.add(running[number], tap_rsd[:, carry.extra_tokens :])
        return running

    def leave(self, batch: Batch, running: Sequence[Tensor | None]) -> tuple[targets.Made, ...]:
        """The targets of the sums of all taps."""
        every = self.targets[batch.modality]
        states = self.state.get(batch.modality) or [{}] * len(every)
        stem = modalities.of(self.config, batch.modality)
        inputs_btd = stem.input_values(batch) if any(target.reads_inputs for target in every) else None
        counted_bt = self._counted(batch) if any(states) else None
        return tuple(
            targets.make(target, running_btd, inputs_btd, counted_bt, state)
            for target, running_btd, state in zip(every, running, states, strict=True)
        )

    def _counted(self, batch: Batch) -> Tensor:
        """fp32 (B, T): 1 where a position is of the input, 0 in padding and rows that stand for no sample."""
        shape = (len(batch.inputs), batch.masked_rt.shape[1])
        valid_bt = None if batch.is_blank else self._valid(batch, batch.inputs)
        whole_bt = torch.full(shape, float(not batch.is_blank), device=batch.inputs.device)
        return whole_bt if valid_bt is None else valid_bt.float()

    @torch.no_grad()
    def features(self, batch: Batch, features_btd: Tensor | None, layers: list[int]) -> list[Tensor]:
        """Outputs (B, T, D) of these main blocks on the unmasked input, without CLS; negative numbers count from the
        end. Pool them over `valid_positions(batch)`."""
        depth = self.config.backbone.depth
        wanted = {layer % depth for layer in self.check_layers(layers)}
        states = self.outputs(batch, self.enter(batch, features_btd), wanted)
        return [states[layer % depth] for layer in layers]

    def check_layers(self, layers: list[int]) -> list[int]:
        """The same list. Raises ConfigError unless all are numbers of main blocks."""
        depth = self.config.backbone.depth
        if not all(-depth <= layer < depth for layer in layers):
            raise ConfigError("layers", f"{layers} are not all blocks of a model of depth {depth}.")
        return layers

    @torch.no_grad()
    def outputs(self, batch: Batch, carry: Carry, wanted: set[int]) -> dict[int, Tensor]:
        """Move the carry through the blocks that are here; outputs (B, T, D), without CLS, of the `wanted` ones."""
        states = {}
        for layer, block in self._blocks(batch.modality):
            carry.states_rsd, _ = block(carry.states_rsd, carry.attention_bias, None)
            if layer.main in wanted:
                states[layer.main] = carry.states_rsd[:, carry.extra_tokens :]
        return states


def _student_inputs(batch: Batch) -> Tensor:
    return batch.inputs if batch.student_inputs is None else batch.student_inputs


def _build_stem(config: ModelConfig, modality: str, exists: Callable[[str], bool], section: Section) -> Stem:
    stem = modalities.of(config, modality).build_stem(lambda name: exists(f"stems.{modality}.{name}"), section)
    if section.starts:
        depth = config.of(modality).backbone.prenet_depth
        stem.prenet = nn.ModuleList(_build_block(config, i) for i in range(depth))
    return stem


def _build_block(config: ModelConfig, index: int) -> Block:
    if config.init == "beit":
        return Block(config.backbone, rule=BEIT, depth_scale=beit_depth_scale(index))
    return Block(config.backbone, rule=InitRule("normal", config.backbone.init_std))
