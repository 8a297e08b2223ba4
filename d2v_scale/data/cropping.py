"""What is said, before a run, of how much of its recordings and texts it will not read."""

import logging

from d2v_scale.data.config import DataConfig
from d2v_scale.data.source import Source
from d2v_scale.data.streaming import StreamedSource, StreamPlan
from d2v_scale.shards.content import length_of
from d2v_scale.shards.plan import Cursor, SourcePlan

log = logging.getLogger(__name__)

_MUCH = 0.1


def warn_of_cropping(
    source: Source | StreamedSource, plan: SourcePlan | StreamPlan, cursor: Cursor, data: DataConfig
) -> None:
    """Log where much of the window of shards at `cursor` is cropped away. Of streams nothing is known beforehand."""
    if not isinstance(source, Source) or not isinstance(plan, SourcePlan):
        return
    if source.stem.cropped and (share := plan.cropped_share(cursor)) > _MUCH:
        log.warning(
            "%.0f %% of the audio of %s is cropped away: rows take the length of their batch's shortest, and a "
            "window holds few batches. Raise data.window_shards (%d).",
            100 * share,
            source.name,
            data.window_shards,
        )
    parts = {part.name: part for part in source.stem.parts}
    for name, share in source.items.cropped_shares(plan.shards(cursor)).items():
        if share > _MUCH:
            log.warning(
                "%.0f %% of the %s of %s is cropped away: %d %s of a sample are read (%s).",
                100 * share,
                name,
                source.name,
                parts[name].longest_read(data),
                length_of(parts[name].content).unit,
                parts[name].limit_key,
            )
