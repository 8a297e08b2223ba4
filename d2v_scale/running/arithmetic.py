"""What a run computes in: the precision that `auto` stands for, and on a CPU which library multiplies.

The first start measures both, rank 0 for all; the run keeps them in its directory, so that a resumed run has the same
bits, on whatever machine it goes on.
"""

import dataclasses
import json
import logging
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch.distributed as dist

from d2v_scale import modalities
from d2v_scale.errors import ConfigError
from d2v_scale.files import write_whole
from d2v_scale.model import cpu_ops, cpu_speed
from d2v_scale.parallel.groups import Topology
from d2v_scale.planning import calibration, legal
from d2v_scale.process.doing import doing
from d2v_scale.process.started import MEASURE
from d2v_scale.recipe import Recipe
from d2v_scale.run_files.run_start import has_trained
from d2v_scale.running.run_directory import write_deepspeed

log = logging.getLogger(__name__)

FILE = "arithmetic.json"


@dataclass(frozen=True, kw_only=True)
class Arithmetic:
    """What a run computes in, and why."""

    precision: Literal["fp32", "bf16"]
    """What `precision: auto` stands for."""
    by_blas: tuple[str, ...] = ()
    """Classes of fp32 products on a CPU (`cpu_ops.product_class`) that the BLAS makes; all others are oneDNN's."""
    why: str = ""
    """What was measured, in words; empty: nothing was."""
    processor: str = ""
    """Where it was decided."""


def settle(recipe: Recipe, raw: dict[str, Any], directory: Path, topology: Topology) -> dict[str, Any]:
    """Decide what the claimed run in `directory` computes in, or take what it has kept once it has taken a step; set
    this process up for it, and return DeepSpeed's configuration. `raw`: the JSON of it.

    Raises ConfigError, on all ranks, for a file that cannot be read. Collective: all ranks must call.
    """
    natives = [cpu_speed.has_native_bf16()]
    if topology.world_size > 1:
        natives *= topology.world_size
        dist.all_gather_object(natives, natives[0])
    found: list[Any] = [None]
    if topology.rank == 0:
        with doing("measuring what this processor is fast in"):
            found = [_kept_or_measured(recipe, raw, directory, topology, native=all(natives))]
    if topology.world_size > 1:
        dist.broadcast_object_list(found, src=0)
    arithmetic: Arithmetic | ConfigError = found[0]
    if isinstance(arithmetic, ConfigError):
        raise arithmetic
    cpu_ops.multiply_by_blas(arithmetic.by_blas)
    config = legal.deepspeed_config(recipe, raw, topology.world_size, auto=arithmetic.precision)
    if topology.rank == 0:
        write_whole(directory / FILE, json.dumps(dataclasses.asdict(arithmetic), indent=2) + "\n")
        write_deepspeed(directory, config)
    return config


def read(directory: Path) -> Arithmetic | None:
    """What a run has kept; None where it keeps nothing, as those of earlier versions."""
    try:
        held = json.loads((directory / FILE).read_text())
        return Arithmetic(**{**held, "by_blas": tuple(held["by_blas"])})
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConfigError(
            "run_dir",
            f"{directory / FILE}, which says what the run computes in, cannot be read: {error}",
            "Restore it; without it the run goes on as one that never measured.",
        ) from None


def told(directory: Path, precision: str) -> str:
    """What was measured, in words, for a run that computes in this; empty: nothing was, or another was chosen since.
    Raises ConfigError as `read` does."""
    kept = read(directory)
    return kept.why if kept is not None and kept.precision == precision else ""


def _kept_or_measured(
    recipe: Recipe, raw: dict[str, Any], directory: Path, topology: Topology, *, native: bool
) -> Arithmetic | ConfigError:
    """Of rank 0, which hands an error to all. `native`: every rank's processor multiplies bf16 itself."""
    device = topology.device.type
    here = calibration.machine()["processor" if device == "cpu" else "device"]
    usual = Arithmetic(precision=legal.usual_precision(device), processor=here)
    if has_trained(directory):
        try:
            kept = read(directory) or usual
        except ConfigError as error:
            return error
        if kept.processor != here:
            slower = "" if native or device != "cpu" or kept.precision == "fp32" else ", which has no bf16 of its own"
            log.info("The run computes as it began, measured on %s, not on this %s%s", kept.processor, here, slower)
        return kept
    if device != "cpu" or os.environ.get(MEASURE) == "0":
        return usual
    return dataclasses.replace(_measured(recipe, raw, topology, native=native), processor=here)


def _measured(recipe: Recipe, raw: dict[str, Any], topology: Topology, *, native: bool) -> Arithmetic:
    precision, why = recipe.resolved_precision("fp32"), []
    if recipe.precision == "auto" and not native:
        why.append("fp32, without processors that multiply bf16")
    elif recipe.precision == "auto" and _is_legal_in_bf16(recipe, raw, topology.world_size):
        length, biased = max((_length(recipe, stem), stem.has_bias) for stem in modalities.stems(recipe.model))
        gain = cpu_speed.gain_of_bf16(recipe.model.backbone, length, biased=biased)
        faster = gain >= cpu_speed.CLEARLY
        precision = "bf16" if faster else "fp32"
        why.append(f"bf16, at {gain:.2f} of fp32's speed" if faster else f"fp32, bf16 at {gain:.2f} of its speed")
    by_blas = cpu_speed.faster_by_blas() if precision == "fp32" else []
    if by_blas:
        why.append(f"BLAS for {len(by_blas)} of {cpu_speed.CLASSES} kinds of products")
    return Arithmetic(precision=precision, by_blas=tuple(by_blas), why="; ".join(why))


def _is_legal_in_bf16(recipe: Recipe, raw: dict[str, Any], world_size: int) -> bool:
    """Whether the DeepSpeed JSON leaves the precision open."""
    try:
        legal.deepspeed_config(recipe, raw, world_size, auto="bf16")
    except ConfigError:
        return False
    return True


def _length(recipe: Recipe, stem: modalities.Modality) -> int:
    """Positions of the longest sample in blocks that see it whole."""
    return math.prod(stem.extent(recipe.data)[1]) + stem.extra_tokens
