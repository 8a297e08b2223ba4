"""Shards whose samples hold an image, a recording and a text side by side, some of them without one."""

from pathlib import Path

from small_shards import documents, image_samples, sound_samples

from d2v_scale.conversion.measures import measures_of
from d2v_scale.modalities.text.tokenizer_training import train
from d2v_scale.shards.content import Content
from d2v_scale.shards.shard_set import INDEX_SUFFIX
from d2v_scale.shards.writing import Sample, write_set

PARTS: tuple[Content, ...] = ("image", "recording", "text")


def paired_samples(count: int, lacking: bool = True) -> list[Sample]:
    """Of every five samples one has all but the image, one all but the recording, one all but the text."""
    images, sounds, texts = image_samples(count, side=16), sound_samples(count), documents(count)
    samples: list[Sample] = []
    for k in range(count):
        sample = {"__key__": f"pair-{k:04d}", "png": images[k]["png"], "flac": sounds[k]["flac"], "txt": texts[k]}
        if lacking and k % 5 < 3:
            del sample[("png", "flac", "txt")[k % 5]]
        samples.append(sample | {"cls": k % 3})
    return samples


def write_pairs(out: Path, samples: list[Sample], parts: tuple[Content, ...] = PARTS, per_shard: int = 20) -> Path:
    """Shards with an index and a tokenizer; returns the index."""
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = out / "tokenizer.model"
    train(documents(200), tokenizer, vocab_size=330)
    (first, measure), *others = measures_of(parts, tokenizer if "text" in parts else None).items()
    write_set(
        out,
        "train",
        first,
        samples,
        per_shard=per_shard,
        measure=measure,
        beside=dict(others),
        classes=["a", "b", "c"],
        tokenizer=tokenizer if "text" in parts else None,
    )
    return out / f"train{INDEX_SUFFIX}"


RECIPE = """
name: pairs
global_batch_size: 8
precision: fp32
model:
  visible_only: true
  vision: {image_size: 16, patch_size: 4, positions: sincos}
  speech:
    conv_layers: [[16, 20, 10], [16, 3, 2], [16, 3, 2], [16, 2, 2], [16, 2, 2]]
    pos_conv_depth: 2
    pos_conv_kernel: 3
    pos_conv_groups: 4
    alibi: true
  text: {vocab_size: 331, max_positions: 32, mask_id: 330}
  backbone: {width: 32, heads: 4, ffn: 64, depth: 2}
  predictor: {kind: conv1d, width: 32, kernel: 3, groups: 4, layers: 2}
objective:
  masking: {kind: random, prob: 0.5, clones: 2}
  target: {tap: ffn, top_k_layers: 2, layer_norm: instance, final_norm: none}
data:
  sources: [{shards: SHARDS, modality: [vision, speech, text], name: pairs, hide_whole: 0.3}]
  workers: 0
optim: {lr: 1.0e-3, schedule: constant, warmup_steps: 0, max_steps: 20}
tracking: {log_every: 1}
checkpoint: {every: 100}
"""


def write_recipe(path: Path, index: Path, **replaced: str) -> Path:
    """The recipe on these shards; `replaced`: words of it by others."""
    text = RECIPE.replace("SHARDS", str(index))
    for old, new in replaced.items():
        assert old in text
        text = text.replace(old, new)
    path.write_text(text)
    return path
