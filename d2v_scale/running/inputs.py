"""The data of a run as MLflow lists them: a name, where they are, and a digest of what is in them."""

from typing import Any

from d2v_scale.data.config import SourceConfig
from d2v_scale.redaction import redact
from d2v_scale.running.loop import AnyRun
from d2v_scale.shards.shard_set import ShardSet, find_shards


def inputs(run: AnyRun[Any]) -> list[dict[str, str]]:
    """What is trained on, a row a source, and what is measured on. The digest of shards with an index is that of their
    samples, wherever they lie and however they are read; of others that of their names."""
    rows = []
    for given, source in zip(run.recipe.data.sources, run.loader.sources, strict=True):
        digest = source.shards.fingerprint() if source.shards.indexed else source.fingerprint
        rows.append(_row(source.name, given.shards, source.shards, digest, "training"))
    for pattern in dict.fromkeys(run.recipe.evaluation.shards):
        if (shards := find_shards(SourceConfig(shards=pattern))).indexed:
            rows.append(_row("evaluation", pattern, shards, shards.fingerprint(), "evaluation"))
    return rows


def _row(name: str, pattern: str, shards: ShardSet, digest: int, context: str) -> dict[str, str]:
    count = f"{len(shards.paths):,} shards"
    said = f"{int(shards.samples_s.sum()):,} samples in {count}" if shards.indexed else f"{count} without an index"
    return {"name": name, "digest": f"{digest:016x}", "source": redact(pattern), "said": said, "context": context}
