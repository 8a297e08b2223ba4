"""A model as one list of layers, from which student, teacher, plans and pipelines are made."""

from d2v_scale import modalities
from d2v_scale.model.config import ModelConfig
from d2v_scale.model.layers import LayerSpec
from d2v_scale.model.stem_config import parts_of


def describe(config: ModelConfig, sequence: str) -> list[LayerSpec]:
    """The layers that a sample of the stem `sequence` passes, in order; of paired samples, those of every part, then
    the blocks in which the parts are one sequence, then every part's predictor."""
    stems = parts_of(sequence)
    layers = []
    for stem in stems:
        prefix = f"stems.{stem}"
        layers += [
            LayerSpec("features", f"{prefix}.features", stem=stem),
            LayerSpec("context", f"{prefix}.context", stem=stem),
        ]
        if modalities.of(config, stem).has_bias:
            layers.append(LayerSpec("bias", f"{prefix}.bias", stem=stem))
        layers += [
            LayerSpec("block", f"{prefix}.prenet.{i}", index=i, stem=stem)
            for i in range(config.of(stem).backbone.prenet_depth)
        ]
    prenet = longest_prenet(config, sequence)
    layers += [LayerSpec("block", f"blocks.{i}", index=prenet + i, main=i) for i in range(config.backbone.depth)]
    if config.backbone.final_norm:
        layers.append(LayerSpec("final_norm", "final_norm"))
    layers += [LayerSpec("predictor", f"predictors.{config.of(stem).predictor_name}", stem=stem) for stem in stems]
    return layers


def longest_prenet(config: ModelConfig, sequence: str) -> int:
    """Blocks before the main ones, of paired samples the most that a part has: main blocks are counted from there."""
    return max(config.of(stem).backbone.prenet_depth for stem in parts_of(sequence))
