"""Embedding with an encoder in any Python program: no process group, no launcher, no environment variables."""

import itertools
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from d2v_scale import modalities
from d2v_scale.api.given import HeldSample, Members, members_of
from d2v_scale.batch import Batch
from d2v_scale.data.labelled import unmasked
from d2v_scale.data.paired import unmasked_pairs
from d2v_scale.errors import CheckpointError, DataError, UserError
from d2v_scale.evaluation.frozen import FrozenEncoder, Weights
from d2v_scale.interop.encoder_source import open_encoder
from d2v_scale.interop.exporting import find_tokenizer
from d2v_scale.modalities.paired.decoder import Values
from d2v_scale.modalities.paired.modality import Paired
from d2v_scale.modalities.text.tokenizer import tokenizer_file, tokenizer_sha256
from d2v_scale.model.pooling import mean_over_positions
from d2v_scale.model.stem_config import sequence_of
from d2v_scale.recipe import Recipe
from d2v_scale.shards.content import length_of
from d2v_scale.shards.reading import SampleFault
from d2v_scale.shards.rows import Decoder


def load_encoder(
    path: str | PathLike[str],
    *,
    weights: Weights = "teacher",
    device: str | torch.device | None = None,
    tokenizer: str | PathLike[str] | None = None,
) -> "Encoder":
    """The encoder of a run directory (of its newest valid checkpoint), a checkpoint, an exported folder, imported
    weights, or a Hugging Face folder whose model is known.

    `weights`: the teacher's (where it has none of a tensor, the student's, with which it shares it), the student's, or
    those a run began with. `device`: default is the current GPU, or the CPU where there is none. `tokenizer`: of a
    text encoder; default is the one beside it, or that of its training data, where it is still there. Nothing of the
    process is changed. Raises CheckpointError where there is no such encoder, or a newer version made it, and DataError
    for a tokenizer that is not the encoder's.
    """
    if weights not in ("teacher", "student", "random"):
        raise CheckpointError(f"weights is {weights!r}.", "Give 'teacher', 'student' or 'random'.")
    path = Path(path)
    if path.is_file():
        raise CheckpointError(
            f"{path} is a file, and no encoder.",
            "Give the folder of a run, a checkpoint or an export; `d2v import` makes one of others' weights.",
        )
    source = open_encoder(path, "student" if weights == "student" else "teacher")
    if not source.recipe.model.modalities:
        raise CheckpointError(f"{path} has no stem.")
    frozen = FrozenEncoder.of(source, weights, _device(device))
    return Encoder(frozen, None if tokenizer is None else tokenizer_file(Path(tokenizer)))


def _device(wanted: str | torch.device | None) -> torch.device:
    if wanted is None:
        return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    try:
        return torch.empty(0, device=wanted).device
    except (RuntimeError, AssertionError) as error:
        told = (str(error).splitlines() or ["it is not here"])[0].rstrip(".")
        raise UserError(f"device {str(wanted)!r} cannot be used: {told}.", "Give 'cpu', 'cuda' or 'cuda:N'.") from error


class Encoder:
    """A frozen encoder that embeds samples. Made by `load_encoder`; fp32, in eval mode."""

    def __init__(self, frozen: FrozenEncoder, tokenizer: Path | None) -> None:
        self._frozen = frozen
        self._tokenizer = tokenizer
        self._decoders: dict[str, Decoder] = {}

    @property
    def frozen(self) -> FrozenEncoder:
        """Its network and device, for programs that make batches of their own."""
        return self._frozen

    @property
    def recipe(self) -> Recipe:
        """What it was trained with."""
        return self._frozen.recipe

    @property
    def stems(self) -> list[str]:
        """The names of its stems: one, or several of a jointly trained encoder."""
        return self.recipe.model.modalities

    @property
    def width(self) -> int:
        """D, channels of its features."""
        return self.recipe.model.backbone.width

    @property
    def depth(self) -> int:
        """Its main blocks, L."""
        return self.recipe.model.backbone.depth

    @property
    def device(self) -> torch.device:
        """Where it computes; results are on the CPU."""
        return self._frozen.device

    @property
    def step(self) -> int:
        """Optimizer steps that it was trained for; 0 where it is not known."""
        return self._frozen.step

    def __repr__(self) -> str:
        """In a line."""
        return f"Encoder({str(self._frozen.source)!r}, stems={self.stems}, width={self.width}, depth={self.depth})"

    def embed(
        self,
        samples: Iterable[Any],
        *,
        stem: str | None = None,
        layers: Sequence[int] = (-1,),
        batch_size: int = 32,
    ) -> Tensor:
        """float32 (N, D) on the CPU, a vector for each sample: the mean over the main blocks `layers` (from 0; negative
        from the end), then over the valid positions, without CLS. It is what `d2v extract` writes, and of one layer
        what `d2v probe` and k-NN are given.

        Samples of an image stem: paths or bytes of files, PIL images, uint8 arrays (H, W) or (H, W, 3). Of a speech
        stem: paths or bytes, mono waves (n,) in float or 16- or 32-bit integers at 16 kHz, or pairs (wave, rate), as
        `soundfile.read` gives. Of a text stem: str, paths, pairs of str, or int arrays of token ids with </s>, without
        <s>. Of an array stem: arrays (channels, axis 1, ...) or files of them. They are decoded as in evaluation:
        images cropped to the centre, recordings normalised. Of what is longer than the encoder reads
        (`data.speech.max_seconds`, `model.text.max_positions`) the beginning is embedded, with a warning.

        Shorter samples are padded and masked, `batch_size` at a time in the order given. Positional convolutions of
        speech encoders see padded frames beyond their first layer, as in the reference: where a vector must not
        depend on the recordings beside it, give `batch_size=1`.

        Of an encoder that was trained on paired samples `samples` may name stems, each with as many samples:
        `{"vision": [...], "text": [...]}`, None where a sample has no such part. Each vector is the mean over all parts
        that a sample has; stems that are not named no sample has.

        `samples` may be any iterable: `batch_size` of them are in memory. `stem`: the name of one of several. Raises
        DataError for a sample that cannot be used, which it names, and where there is none.
        """
        pooled = []
        for batch in self._batches(samples, stem, batch_size):
            states = self._states(batch, layers)
            mean_btd = torch.stack(states).mean(dim=0)
            pooled.append(mean_over_positions(mean_btd, self._frozen.valid_positions(batch)).cpu())
        return torch.cat(pooled)

    def layers(
        self,
        samples: Iterable[Any],
        layers: Sequence[int] | None = None,
        *,
        stem: str | None = None,
        batch_size: int = 32,
    ) -> list[Tensor]:
        """For each sample float32 (L, T, D) on the CPU: the outputs of these main blocks (None: of all) at its own T
        positions, without CLS and padding, and without patches of arrays that miss a value. Arguments and errors as of
        `embed`."""
        chosen = range(self.depth) if layers is None else layers
        found = []
        for batch in self._batches(samples, stem, batch_size):
            states_bltd = torch.stack(self._states(batch, chosen), dim=1).cpu()
            valid_bt = self._frozen.valid_positions(batch)
            if valid_bt is None:
                found += [row.clone() for row in states_bltd]
            else:
                found += [row[:, valid] for row, valid in zip(states_bltd, valid_bt.cpu(), strict=True)]
        return found

    def _states(self, batch: Batch, layers: Sequence[int]) -> list[Tensor]:
        if not len(layers):
            raise DataError("layers is empty.", f"Give numbers of blocks, 0 to {self.depth - 1}.")
        return [state.float() for state in self._frozen.model.features(batch, None, list(layers))]

    def _batches(self, samples: Iterable[Any], stem: str | None, batch_size: int) -> Iterator[Batch]:
        if isinstance(samples, Mapping):
            yield from self._paired_batches(samples, stem, batch_size)
            return
        if isinstance(samples, str | bytes | PathLike | Image.Image | dict) or not isinstance(samples, Iterable):
            raise DataError(f"samples is of type {type(samples).__name__}.", "Give a list, of one sample as well.")
        if batch_size < 1:
            raise DataError(f"batch_size is {batch_size}.", "Give at least 1.")
        kind = modalities.of(self.recipe.model, self._stem(stem))
        decoder = self._decoder(kind)
        numbered, cut, made = enumerate(samples), 0, 0
        while chunk := list(itertools.islice(numbered, batch_size)):
            rows = []
            for number, given in chunk:
                row, was_cut = self._row(kind, decoder, number, given)
                rows.append(row)
                cut += was_cut
            made += len(rows)
            ids = torch.tensor([number for number, _ in chunk])
            keys = tuple(str(number) for number, _ in chunk)
            yield unmasked(kind, decoder, rows, ids, keys).to(self.device)
        if not made:
            raise DataError("There are no samples.", "Give at least one.")
        self._warn_of_cut(kind, cut, made, stacklevel=4)

    def _warn_of_cut(self, kind: modalities.Modality, cut: int, made: int, stacklevel: int) -> None:
        """`stacklevel`: of the line that called `embed` or `layers`."""
        if cut:
            warnings.warn(
                f"{cut} of {made} samples are longer than the encoder reads ({kind.longest_read(self.recipe.data)} "
                f"{length_of(kind.content).unit}): their beginnings are embedded.",
                stacklevel=stacklevel,
            )

    def _paired_batches(
        self, samples: Mapping[str, Sequence[Any]], stem: str | None, batch_size: int
    ) -> Iterator[Batch]:
        if stem is not None:
            raise DataError("stem is given, and samples names stems, too.", "Leave one out.")
        if batch_size < 1:
            raise DataError(f"batch_size is {batch_size}.", "Give at least 1.")
        trained = [source.stems for source in self.recipe.data.sources if len(source.stems) > 1]
        stems = next((each for each in trained if set(samples) <= set(each)), None)
        if stems is None or not samples:
            known = " or ".join("+".join(each) for each in trained) or "no samples of several stems"
            raise DataError(
                f"samples names {', '.join(samples) or 'no stem'}; it was trained on {known}.", "See stems."
            )
        for name, each in samples.items():
            if isinstance(each, str | bytes | PathLike | Image.Image):
                shown = f"samples has a {type(each).__name__} for {name}."
                raise DataError(shown, "Give a list, of one sample as well.")
        counts = {name: len(each) for name, each in samples.items()}
        if len(set(counts.values())) > 1 or not next(iter(counts.values())):
            said = ", ".join(f"{count} of {name}" for name, count in counts.items())
            raise DataError(f"There are {said}.", "Give as many of each, at least one; None where there is none.")
        sequence = modalities.of(self.recipe.model, sequence_of(name for name in stems if name in samples))
        parts = sequence.parts
        decoders = [self._decoder(part) for part in parts]
        cut = [0] * len(parts)
        for first in range(0, next(iter(counts.values())), batch_size):
            rows: list[Values] = []
            numbers = range(first, min(first + batch_size, next(iter(counts.values()))))
            for number in numbers:
                given = [samples[part.name][number] for part in parts]
                if all(one is None for one in given):
                    raise DataError(f"Sample {number} has no part.", "Leave it out.")
                values: list[NDArray[Any] | None] = []
                for k, one in enumerate(given):
                    row, was_cut = (None, False) if one is None else self._row(parts[k], decoders[k], number, one)
                    values.append(row)
                    cut[k] += was_cut
                rows.append(tuple(values))
            ids, keys = torch.tensor(list(numbers)), tuple(map(str, numbers))
            if isinstance(sequence, Paired):
                yield unmasked_pairs(sequence, decoders, rows, ids, keys).to(self.device)
            else:
                alone = [row[0] for row in rows if row[0] is not None]
                yield unmasked(sequence, decoders[0], alone, ids, keys).to(self.device)
        for part, count in zip(parts, cut, strict=True):
            self._warn_of_cut(part, count, sum(one is not None for one in samples[part.name]), stacklevel=5)

    def _row(
        self, kind: modalities.Modality, decoder: Decoder, number: int, given: object
    ) -> tuple[NDArray[Any], bool]:
        """A sample, decoded; whether something of it was cut off."""
        shown = f" ({Path(given).name})" if isinstance(given, PathLike) else ""
        try:
            members = members_of(kind.content, given)
            if kind.uses_tokenizer and "txt" in members and self._tokenizer is None:
                raise DataError(
                    "The tokenizer of this encoder is not known, or not there any more.",
                    "Give load_encoder tokenizer=PATH, or embed arrays of token ids.",
                )
            row = decoder.evaluation_row(HeldSample(str(number), members))
            return row, self._was_cut(kind, row, members)
        except UserError:
            raise
        except SampleFault as error:
            reason = error.fault.reason
        except Exception as error:  # a decoder raises anything for damaged content
            reason = str(error) if type(error) is ValueError else f"cannot be decoded: {type(error).__name__}: {error}"
        raise DataError(f"Sample {number}{shown} of the stem {kind.name!r}: {reason}")

    def _was_cut(self, kind: modalities.Modality, row: NDArray[Any], members: Members) -> bool:
        from d2v_scale.conversion.measures import measure_of

        longest = kind.longest_read(self.recipe.data)
        if longest is None or len(row) < longest:
            return False
        return measure_of(kind.content, self._tokenizer, self.recipe.data.vision.max_pixels)(members) > longest

    def _stem(self, wanted: str | None) -> str:
        """Raises DataError unless `wanted` is a stem, or there is one alone."""
        if wanted is None and len(self.stems) == 1:
            return self.stems[0]
        if wanted is None or wanted not in self.stems:
            contents = {name: modalities.of(self.recipe.model, name).content for name in self.stems}
            takes = ", ".join(f"{name!r} ({content}s)" for name, content in contents.items())
            what = "has several stems" if wanted is None else f"has no stem {wanted!r}"
            raise DataError(f"The encoder {what}.", f"Give stem= one of {takes}.")
        return wanted

    def _decoder(self, kind: modalities.Modality) -> Decoder:
        if kind.name not in self._decoders:
            if kind.uses_tokenizer:
                self._tokenizer = self._checked_tokenizer()
            self._decoders[kind.name] = kind.build_decoder(self.recipe.data, self._tokenizer)
        return self._decoders[kind.name]

    def _checked_tokenizer(self) -> Path | None:
        """The one that was given, or that of the training data. Raises DataError for another than the encoder's."""
        expected, tokenizer = self._frozen.tokenizer_sha256, self._tokenizer
        if tokenizer is None:
            return find_tokenizer(self.recipe, self._frozen.source, expected)
        if expected is None or not tokenizer.is_file() or tokenizer_sha256(tokenizer) == expected:
            return tokenizer
        raise DataError(
            f"{tokenizer} is another tokenizer than the encoder was trained with (sha256 {expected[:12]}).",
            "Give that one: ids would mean other pieces.",
        )
