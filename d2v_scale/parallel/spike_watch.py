"""A rule for spikes inside DeepSpeed's optimizer step: asked with the norm that all ranks have reduced already, and
with the loss, which they reduce here.

That is one collective of one number, and no wait but for these two, of which DeepSpeed reads the norm itself right
after. A spike is told to DeepSpeed as a norm that is not finite: it then changes nothing on any rank.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from d2v_scale.errors import ConfigError
from d2v_scale.parallel.groups import Topology
from d2v_scale.spikes import Spike, SpikeConfig, SpikeRule


class SpikeWatch:
    """Judges the global gradient norm and the loss of every step of one engine."""

    def __init__(self, config: SpikeConfig, zero: Any, stage: int, topology: Topology) -> None:
        """`zero`: DeepSpeed's optimizer at this ZeRO stage. Raises ConfigError where it computes its norm otherwise."""
        asked = "scaled_global_norm" if stage < 3 else "_get_norm_groups"
        if not hasattr(zero, asked):
            raise ConfigError(
                "optim.spikes.on_spike",
                f"is {config.on_spike}, but this DeepSpeed's {type(zero).__name__} has no {asked}, where it is decided",
                "Leave it out, or install deepspeed==0.19.8.",
            )
        self.rule = SpikeRule(config)
        self.loss: Tensor | None = None
        """This rank's share of the step's loss, added up in place: the sum over replicas and pipeline stages is the
        loss. Set for every step."""
        self._topology = topology
        self._spike: Spike | None = None
        self._zero = zero
        if stage < 3:
            self._whole = zero.scaled_global_norm
            zero.scaled_global_norm = self._judged_norm
        else:
            self._groups = zero._get_norm_groups
            zero._get_norm_groups = self._judged_groups

    def take(self) -> Spike | None:
        """The spike that the step just taken is; None: it is none."""
        spike, self._spike = self._spike, None
        return spike

    def _judged_norm(self, *arguments: Any, **options: Any) -> Any:
        norm = self._whole(*arguments, **options)
        return torch.full_like(torch.as_tensor(norm), float("nan")) if self._is_spike(norm) else norm

    def _judged_groups(self) -> list[Tensor]:
        from deepspeed.runtime.zero.stage3 import combine_grad_norm_groups

        groups: list[Tensor] = self._groups()
        if self._is_spike(combine_grad_norm_groups(groups)):
            return [torch.full_like(torch.as_tensor(one), float("nan")) for one in groups]
        return groups

    def _is_spike(self, scaled: Any) -> bool:
        """Collective: all ranks must call."""
        assert self.loss is not None, "a step says what its loss is added up in"
        # Over the world: tensor-parallel ranks have the same share, but their last bits may differ, and so must not
        # what they decide.
        loss = self.loss / self._topology.tensor_size
        if self._topology.world_size > 1:
            dist.all_reduce(loss)
        norm, total = torch.stack([torch.as_tensor(scaled, dtype=loss.dtype, device=loss.device), loss]).tolist()
        # DeepSpeed says -1 where something was not finite.
        self._spike = self.rule.judge(norm / float(self._zero.loss_scale), total) if norm >= 0 else None
        return self._spike is not None
