"""Which runs are one model and which are seeds of one another; the same encoders without training."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from d2v_scale.alignment.concepts import ConceptSet
from d2v_scale.errors import DataError, UserError
from d2v_scale.evaluation.frozen import FrozenEncoder, Weights
from d2v_scale.interop.encoder_source import EncoderSource, open_encoder
from d2v_scale.interop.exporting import find_tokenizer
from d2v_scale.modalities.base import Modality
from d2v_scale.modalities.text.tokenizer import tokenizer_file, tokenizer_sha256
from d2v_scale.shards.content import Content
from d2v_scale.shards.rows import Decoder

_SEED_OF_CONTROLS = 7_919
"""Added to a run's seed for the first encoder that is not trained."""


@dataclass
class Model:
    """One seed: a joint run, or several runs that have a stem each."""

    sources: list[EncoderSource]

    @property
    def stems(self) -> dict[str, EncoderSource]:
        """Which run has which stem."""
        return {stem: source for source in self.sources for stem in source.recipe.model.modalities}


def opened(paths: Sequence[str], weights: Weights) -> list[EncoderSource]:
    """The encoders of all runs. Raises CheckpointError, and UserError for one that is there twice."""
    sources = [open_encoder(path, "student" if weights == "student" else "teacher") for path in paths]
    places = [source.path.resolve() for source in sources]
    for number, place in enumerate(places):
        if place in places[:number]:
            raise UserError(f"{paths[number]} is given twice.", "A seed counts once: name every run once.")
    seen: dict[object, Path] = {}
    for source in sources:
        stems = tuple(source.recipe.model.modalities)
        other = seen.setdefault((stems, _weights_of(source, weights)), source.path)
        if other != source.path:
            raise UserError(
                f"{source.path} and {other} have the same weights.", "A seed counts once: give one of them."
            )
    return sources


def _weights_of(source: EncoderSource, weights: Weights) -> object:
    """The same for encoders of equal weights: what they begin from, or a matrix of the last block."""
    if weights == "random":
        return source.recipe.seed
    last = source.recipe.model.backbone.depth - 1
    matrix = source.read(f"blocks.{last}.attention.qkv.weight")
    return source.path if matrix is None else hashlib.sha256(matrix.float().contiguous().numpy().tobytes()).hexdigest()


def models_of(sources: Sequence[EncoderSource]) -> list[Model]:
    """Runs with the same stems are seeds of one another; the first run of each kind is of the first model, and so on.
    Raises UserError where they do not make whole models."""
    kinds: dict[tuple[str, ...], list[EncoderSource]] = {}
    for source in sources:
        kinds.setdefault(tuple(source.recipe.model.modalities), []).append(source)
    stems = [stem for kind in kinds for stem in kind]
    if twice := next((stem for stem in stems if stems.count(stem) > 1), None):
        both = [str(found[0].path) for kind, found in kinds.items() if twice in kind]
        raise UserError(
            f"{both[0]} and {both[1]} both have a stem {twice!r}, and differ in their others.", "Compare one by one."
        )
    if len(stems) < 2:
        raise UserError(
            f"{', '.join(str(source.path) for source in sources)}: there is the stem {stems[0]!r} alone."
            if stems
            else "No run has a stem.",
            "Give a run with several stems, or a run for each.",
        )
    counts = {"+".join(kind): len(found) for kind, found in kinds.items()}
    if len(set(counts.values())) > 1:
        shown = ", ".join(f"{count} of {kind}" for kind, count in counts.items())
        raise UserError(f"There are {shown}.", "Give as many seeds of each.")
    for kind, found in kinds.items():
        for source in found[1:]:
            if source.recipe.model != found[0].recipe.model:
                raise UserError(
                    f"{source.path} and {found[0].path} have the same stems ({', '.join(kind)}) and other models: they "
                    "are no seeds of one another.",
                    "Compare one by one.",
                )
    return [Model([found[number] for found in kinds.values()]) for number in range(len(next(iter(kinds.values()))))]


def untrained(models: Sequence[Model], count: int) -> list[Model]:
    """Models of the same shape as a run of the same recipe with another seed begins."""
    taken = {source.recipe.seed for model in models for source in model.sources}
    first = max(taken) - min(taken) + _SEED_OF_CONTROLS
    # Separate runs that began from one seed do so here, too: their blocks were alike.
    return [
        Model(
            [
                replace(source, recipe=replace(source.recipe, seed=source.recipe.seed + first + number))
                for source in models[0].sources
            ]
        )
        for number in range(count)
    ]


def built(source: EncoderSource, weights: Weights) -> FrozenEncoder:
    """The encoder, on the GPU where there is one."""
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    return FrozenEncoder.of(source, weights, device)


def decoder_of(source: EncoderSource, kind: Modality, samples: ConceptSet, tokenizer: Path | None) -> Decoder:
    """How samples of the set become rows of an encoder: with its own tokenizer. Raises DataError where that is not at
    hand."""
    return kind.build_decoder(source.recipe.data, tokenizer_of(source, kind, samples, tokenizer))


def tokenizer_of(source: EncoderSource, kind: Modality, samples: ConceptSet, wanted: Path | None) -> Path | None:
    """The tokenizer of a stem; None where it needs none. Raises DataError for another than the encoder's, and where
    that is not at hand."""
    of_text = any("text" in place.digests and place.caption for place in samples.places)
    if not kind.uses_tokenizer or not of_text:  # ids need none
        return None
    wanted = None if wanted is None else tokenizer_file(wanted)
    own = find_tokenizer(source.recipe, source.path, source.tokenizer_sha256)
    known = [path for path in (wanted, own, samples.tokenizer) if path is not None]
    for path in known:
        if not path.is_file():
            raise DataError(f"The tokenizer {path} is not there.", "Give the encoder's with --tokenizer.")
        if source.tokenizer_sha256 in (None, tokenizer_sha256(path)):
            return path
        if path is wanted:
            break
    if known:
        raise DataError(
            f"{known[0]} is another tokenizer than {source.path} was trained with (sha256 "
            f"{(source.tokenizer_sha256 or '')[:12]}).",
            "Give that one with --tokenizer: ids would mean other pieces.",
        )
    raise DataError(f"The tokenizer of {source.path} is not known, or not there any more.", "Give it with --tokenizer.")


def contents_of(models: Iterable[Model]) -> list[Content]:
    """What all stems read."""
    from d2v_scale import modalities

    found = [
        modalities.of(source.recipe.model, stem).content for model in models for stem, source in model.stems.items()
    ]
    return list(dict.fromkeys(found))
