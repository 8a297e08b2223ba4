"""The optimizer and its schedules. Learning rate and epsilon are pure functions of the completed updates."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from d2v_scale.errors import ConfigError
from d2v_scale.spikes import SpikeConfig

if TYPE_CHECKING:
    import torch


@dataclass(kw_only=True)
class MuonConfig:
    """Muon for the matrices of blocks and decoders; everything else stays AdamW's (`muon.py`)."""

    momentum: float = 0.95
    """Share of the momentum that an update keeps; Nesterov's."""
    iterations: int = 5
    """Of Newton and Schulz, towards the orthogonal matrix."""
    lr_scale: float = 1.0
    """Factor on the learning rate of the matrices, whose updates have the size of AdamW's by themselves."""

    def check(self) -> None:
        """Raises ConfigError."""
        if not 0 <= self.momentum < 1:
            raise ConfigError("optim.muon.momentum", f"is {self.momentum}", "It must be in [0, 1).")
        if self.iterations < 1:
            raise ConfigError("optim.muon.iterations", f"is {self.iterations}", "Give 1 or more; 5 is usual.")
        if not 0 <= self.lr_scale < math.inf:
            raise ConfigError("optim.muon.lr_scale", f"is {self.lr_scale}", "Give a finite number that is not below 0.")


@dataclass(kw_only=True)
class OptimConfig:
    """AdamW with decoupled weight decay, and the schedule of its learning rate."""

    lr: float = 5e-4
    """Peak learning rate."""
    min_lr: float = 0.0
    """Where the cosine ends."""
    schedule: Literal["cosine", "tri_stage", "constant", "polynomial", "wsd"] = "cosine"
    """`cosine`: linear warm-up, half cosine to min_lr. `tri_stage`: warm-up, hold, exponential decay. `constant`:
    warm-up, then flat. `polynomial`: warm-up, then linear to min_lr. `wsd`: warm-up, flat until `decay_from`, then down
    to min_lr; where it ends is decided while it runs."""
    warmup_steps: int = 0
    """Updates of linear warm-up (all but tri_stage). The first update then has learning rate 0."""
    decay_from: int | None = None
    """`wsd`: the step from which the rate falls, as 1 - sqrt, to reach min_lr at max_steps. null: flat to max_steps. A
    resumed run may still choose both, `--decay_from N --optim.max_steps M`, until its decay has begun."""
    phase_ratio: list[float] = field(default_factory=lambda: [0.03, 0.90, 0.07])
    """Shares of max_steps for warm-up, hold and decay (tri_stage)."""
    phase_scale: list[float] = field(default_factory=lambda: [0.01, 0.01])
    """Learning rate at the very start and the very end, as a share of the peak (tri_stage)."""
    max_steps: int = 400_000
    """The schedule's horizon and the end of the run, in steps. `--stop_at` ends earlier without changing it."""
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-6
    eps_placement: Literal["torch", "fairseq"] = "torch"
    """`torch`: added to the bias-corrected root; `fairseq`: to the uncorrected one (differs in early updates only)."""
    weight_decay: float = 0.01
    """Decoupled: times the learning rate."""
    weight_decay_end: float | None = None
    """Where a half cosine over max_steps takes the weight decay. null: it stays."""
    decay_on: Literal["all", "matrices"] = "all"
    """`all`: every parameter (fairseq runs); `matrices`: not biases, norms, layer scales, CLS token (BEiT)."""
    clip: float = 0.0
    """Largest global gradient norm; 0 does not clip."""
    muon: MuonConfig | None = None
    """null: AdamW for everything."""
    lr_scale: dict[str, float] | None = None
    """Factor on the learning rate of a stem's own parameters (its layers and its predictor), by the name of the stem:
    `{vision: 0.5}`. null, and stems that are not named: 1."""
    spikes: SpikeConfig = field(default_factory=SpikeConfig)
    """Steps whose gradient is far larger than those before."""

    def check(self) -> None:
        """Raises ConfigError for values that contradict each other."""
        if self.schedule in ("cosine", "polynomial", "wsd") and self.min_lr > self.lr:
            raise ConfigError("optim.min_lr", f"is {self.min_lr}, above optim.lr {self.lr}", "Give at most optim.lr.")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError("optim.betas", f"is {list(self.betas)}", "Both must be in [0, 1).")
        if self.schedule != "tri_stage" and not 0 <= self.warmup_steps < self.max_steps:
            raise ConfigError(
                "optim.warmup_steps",
                f"is {self.warmup_steps}, while optim.max_steps is {self.max_steps}",
                "Warm-up must end before the run does.",
            )
        ratio = self.phase_ratio
        if self.schedule == "tri_stage" and (len(ratio) != 3 or min(ratio) < 0 or abs(sum(ratio) - 1) > 1e-6):
            raise ConfigError("optim.phase_ratio", f"is {ratio}", "Give three shares that add up to 1.")
        if self.schedule == "tri_stage" and not (
            len(self.phase_scale) == 2 and self.phase_scale[0] >= 0 and self.phase_scale[1] > 0
        ):
            raise ConfigError(
                "optim.phase_scale",
                f"is {self.phase_scale}",
                "Give two shares of the peak; the last one above 0, as an exponential decay never reaches 0.",
            )
        self._check_decay()
        self.spikes.check()
        if self.muon is not None:
            self.muon.check()
        if self.clip < 0:
            raise ConfigError("optim.clip", f"is {self.clip}", "Give 0 for no clipping, or a positive norm.")
        for name, scale in (self.lr_scale or {}).items():
            if not 0 <= scale < math.inf:
                raise ConfigError(f"optim.lr_scale.{name}", f"is {scale}", "Give a finite number that is not below 0.")

    def _check_decay(self) -> None:
        if self.decay_from is not None and self.schedule != "wsd":
            raise ConfigError(
                "optim.decay_from",
                f"is {self.decay_from}, while optim.schedule is {self.schedule}, which has no such step",
                "Set optim.schedule to wsd, or leave optim.decay_from out.",
            )
        if self.decay_from is not None and not self.warmup_steps <= self.decay_from < self.max_steps:
            raise ConfigError(
                "optim.decay_from",
                f"is {self.decay_from}; warm-up ends at step {self.warmup_steps} and the run at {self.max_steps}",
                "Give a step between the two; optim.max_steps is where the decay ends.",
            )
        if self.weight_decay_end is not None and not 0 <= self.weight_decay_end < math.inf:
            raise ConfigError("optim.weight_decay_end", f"is {self.weight_decay_end}", "Give 0 or more, or null.")


def learning_rate(config: OptimConfig, completed_updates: int) -> float:
    """The learning rate of the next update (spec 1.7). fairseq's first cosine update therefore has rate 0.

    The decay of `wsd` is the 1 - sqrt of Hägele et al. 2024 (arXiv 2405.18392).
    """
    n, peak, horizon = completed_updates, config.lr, config.max_steps
    if config.schedule == "tri_stage":
        warmup, hold, decay = (int(share * horizon) for share in config.phase_ratio)
        first, last_scale = config.phase_scale[0] * peak, config.phase_scale[1]
        if n < warmup:
            return first + (peak - first) * n / warmup
        if n < warmup + hold:
            return peak
        progress = min(1.0, (n - warmup - hold) / max(1, decay))
        return peak * math.exp(math.log(last_scale) * progress)
    if n < config.warmup_steps:
        return peak * n / config.warmup_steps
    if config.schedule == "wsd":
        begin = horizon if config.decay_from is None else config.decay_from
        progress = min(1.0, max(0, n - begin) / max(1, horizon - begin))
        return config.min_lr + (peak - config.min_lr) * (1 - math.sqrt(progress))
    progress = min(1.0, (n - config.warmup_steps) / max(1, horizon - config.warmup_steps))
    if config.schedule == "cosine":
        return config.min_lr + 0.5 * (peak - config.min_lr) * (1 + math.cos(math.pi * progress))
    if config.schedule == "polynomial":
        return config.min_lr + (peak - config.min_lr) * (1 - progress)
    return peak


END_OF_DECAY = ("optim.decay_from", "optim.max_steps")
"""What a run of schedule `wsd` may change until its decay has begun."""


def check_end_is_open(old: Mapping[str, Any], new: Mapping[str, Any], step: int) -> bool:
    """Whether a run at `step` may take `END_OF_DECAY` of the section `new` in place of `old`: no rate up to there
    depends on them. Raises ConfigError where one did."""
    sections = (old, new)
    if any(s.get("schedule") != "wsd" or s.get("weight_decay_end") is not None for s in sections):
        return False
    for section in sections:
        if (begin := section.get("decay_from")) is not None and begin < step:
            raise ConfigError(
                "optim.decay_from",
                f"{'was' if section is old else 'is'} {begin}, and the run is at step {step}: those from {begin} on "
                f"{'decayed towards another end' if section is old else 'were taken without decay'}",
                f"Leave its end as it is, or begin the decay at step {step} or later of a run that has none yet.",
            )
    return True


def epsilon(config: OptimConfig, completed_updates: int) -> float:
    """The epsilon to give torch's Adam for the next update.

    fairseq adds epsilon to the root of the second moment before its bias correction, which is the same as torch's
    Adam with epsilon / sqrt(1 - beta2^t) at update t (spec 1.7).
    """
    if config.eps_placement == "torch":
        return config.eps
    return config.eps / math.sqrt(1 - config.betas[1] ** (completed_updates + 1))


def weight_decay(config: OptimConfig, completed_updates: int) -> float:
    """The weight decay of the next update: a half cosine as DINO's (Caron et al. 2021) where it has an end."""
    if config.weight_decay_end is None:
        return config.weight_decay
    progress = min(1.0, completed_updates / config.max_steps)
    first, last = config.weight_decay, config.weight_decay_end
    return last + 0.5 * (first - last) * (1 + math.cos(math.pi * progress))


def set_rates(optimizer: "torch.optim.Optimizer", config: OptimConfig, completed_updates: int) -> float:
    """Prepare `optimizer` for the next update; returns its learning rate. Local; call before every step."""
    lr = learning_rate(config, completed_updates)
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
        if config.muon is not None and group["is_matrix"]:
            group["lr"] *= config.muon.lr_scale
        group["eps"] = epsilon(config, completed_updates)
        if config.weight_decay_end is not None and group["is_decayed"]:
            group["weight_decay"] = weight_decay(config, completed_updates)
    return lr


def scheduled(config: OptimConfig, lr: float, completed_updates: int) -> dict[str, float]:
    """For the record: the rates of an update, `lr` that of all stems that have no factor of their own, and the weight
    decay where it has a schedule."""
    of_stems = {f"lr/{name}": lr * scale for name, scale in (config.lr_scale or {}).items()}
    decay = {} if config.weight_decay_end is None else {"weight_decay": weight_decay(config, completed_updates)}
    return {"lr": lr, **of_stems, **decay}


def _is_decayed(name: str, shape: "torch.Size", config: OptimConfig) -> bool:
    if config.decay_on == "all":
        return True
    # BEiT keeps the mask token and the position table decayed, and the CLS token not.
    return len(shape) > 1 and not name.endswith((".bias", ".q_bias", ".v_bias", ".cls"))


def is_matrix(name: str, shape: Sequence[int], config: OptimConfig) -> bool:
    """Whether Muon steps a parameter: a matrix, or convolutions, of a block or a decoder. Embeddings are none."""
    inside = name.startswith(("blocks.", "predictors.")) or ".prenet." in name
    return config.muon is not None and inside and len(shape) > 1


def stem_scale(name: str, config: OptimConfig) -> float:
    """What `lr_scale` says of the parameter `name`; 1 of main blocks, and of a predictor that all stems share."""
    section, _, rest = name.partition(".")
    return (config.lr_scale or {}).get(rest.partition(".")[0], 1.0) if section in ("stems", "predictors") else 1.0


def parameter_groups(
    named_parameters: "Iterable[tuple[str, torch.nn.Parameter]]",
    config: OptimConfig,
    traits: Callable[[str], dict[str, float]] | None = None,
) -> list[dict[str, Any]]:
    """Trainable parameters in groups: decayed and not, and apart where `traits` of their names differ.

    `traits` become keys of the group (`lr_scale` multiplies its learning rate); None: what the configuration says of
    their stems. Shapes are the full ones, also when partitioned.
    """

    def of_stem(name: str) -> dict[str, float]:
        scale = stem_scale(name, config)
        return {} if scale == 1 else {"lr_scale": scale}

    traits = traits or of_stem
    groups: dict[tuple[bool, tuple[tuple[str, float], ...], bool], list[torch.nn.Parameter]] = {}
    for name, parameter in named_parameters:
        if parameter.requires_grad:
            shape = getattr(parameter, "ds_shape", parameter.shape)
            plain = not _is_decayed(name, shape, config)
            key = (plain, tuple(traits(name).items()), is_matrix(name, shape, config))
            groups.setdefault(key, []).append(parameter)
    return [
        {
            "params": params,
            "weight_decay": 0.0 if plain else config.weight_decay,
            "is_decayed": not plain,
            "is_matrix": matrices,
            **dict(items),
        }
        for (plain, items, matrices), params in sorted(groups.items(), key=lambda group: group[0])
    ]


def make_optimizer(groups: list[dict[str, Any]], config: OptimConfig) -> "torch.optim.AdamW":
    """torch's single-pass AdamW over `groups`, and Muon for those of matrices where the configuration has it."""
    import torch

    if config.muon is None:
        return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)
    from d2v_scale.muon import MatrixOptimizer

    own = config.muon
    adamw = {"lr": config.lr, "betas": config.betas, "eps": config.eps}
    return MatrixOptimizer(groups, momentum=own.momentum, iterations=own.iterations, **adamw)
