"""Folders of images, recordings or text to WebDataset shards with an index; also the demo data.

    python tools/make_shards.py demo [--modality vision|speech|text|all] [OUT]
    python tools/make_shards.py images SRC OUT      labels: the folder an image lies in
    python tools/make_shards.py audio SRC OUT       any format soundfile reads, to 16 kHz mono FLAC
    python tools/make_shards.py text SRC OUT        .txt files, or .jsonl with `text` and perhaps `label`
    python tools/make_shards.py text train.tsv OUT --columns sentence1,sentence2,label     a table of texts or pairs
    python tools/make_shards.py audio SRC OUT --transcripts FILE    lines `path below SRC, without ending<TAB>text`

Interrupted runs continue where they stopped. A file that cannot be read is skipped, named and counted.
"""

import argparse
import hashlib
import io
import itertools
import os
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import get_args

import numpy as np

from d2v_scale.data import demo, speech, text, tokenizer, vision
from d2v_scale.data.config import SAMPLE_RATE
from d2v_scale.data.shard_index import SetIndex, ShardEntry
from d2v_scale.data.shard_jobs import Part, run_all
from d2v_scale.data.shard_set import INDEX_SUFFIX
from d2v_scale.data.text_files import Columns, Document, documents, transcripts
from d2v_scale.data.writing import Sample, is_written, shard_name, write_shard
from d2v_scale.errors import EXIT_BAD_INPUT, DataError, UserError
from d2v_scale.files import file_sha256
from d2v_scale.model.config import Modality

TEXT_FILES = ("txt", "md", "rst", "jsonl", "tsv")
_NAMED = 1000

MODALITIES: dict[str, Modality] = {"images": "vision", "audio": "speech", "text": "text"}


@dataclass
class Item:
    """One sample to be made: a file, or a document's text."""

    name: str
    path: str | None = None
    content: str = ""
    label: int | None = None
    second: str | None = None
    """The other text of a pair."""
    score: float | None = None
    transcript: str | None = None


@dataclass
class Job:
    """One shard to be written, by any process."""

    kind: str
    tar: Path
    items: list[Item]
    resize: int | None = None
    tokenizer: Path | None = None
    tokenizer_sha256: str | None = None
    ids: bool = False

    @property
    def record(self) -> Path:
        return self.tar.parent / ".make_shards" / f"{self.tar.stem}.json"

    def is_done(self) -> bool:
        return is_written(self.tar)

    def run(self) -> Part:
        skipped: dict[str, str] = {}
        counter = text.TokenCounter(None if self.ids else self.tokenizer) if self.kind == "text" else None
        measure = {"images": None, "audio": speech.measure, "text": counter}[self.kind]
        entry = write_shard(self.tar, _samples(self, skipped), measure)
        return Part("", asdict(entry), skipped)

    def digest(self) -> str:
        state = hashlib.sha256(repr((self.kind, self.resize, self.ids, self.tokenizer_sha256)).encode())
        for item in self.items:
            stat = os.stat(item.path) if item.path else None
            state.update(repr((item, stat and (stat.st_size, stat.st_mtime_ns))).encode())
        return state.hexdigest()


def _samples(job: Job, skipped: dict[str, str]) -> Iterator[Sample]:
    pieces = text.Tokenizer(job.tokenizer) if job.ids and job.tokenizer else None
    for item in job.items:
        try:
            sample: Sample = {"__key__": item.name} | _convert(job, item, pieces)
        except Exception as error:  # whatever a damaged file makes a decoder raise
            skipped[item.path or item.name] = f"{type(error).__name__}: {error}"
            continue
        if item.label is not None:
            sample["cls"] = item.label
        if item.score is not None:
            sample["score"] = str(item.score).encode()
        if item.transcript is not None:
            sample["txt"] = item.transcript
        yield sample


def _convert(job: Job, item: Item, pieces: text.Tokenizer | None) -> Sample:
    if job.kind == "text":
        document = item.content if item.path is None else Path(item.path).read_text("utf-8-sig")
        if not document.strip():
            raise ValueError("is empty")
        parts = {"": document} | ({"2": item.second} if item.second is not None else {})
        if pieces:
            return {f"npy{which}": _npy(pieces(part).astype(np.int32)) for which, part in parts.items()}
        return {f"txt{which}": part.encode() for which, part in parts.items()}
    assert item.path is not None
    content = Path(item.path).read_bytes()
    extension = item.path.rsplit(".", 1)[-1].lower()
    return _image(content, extension, job.resize) if job.kind == "images" else _recording(content)


def _npy(ids: np.ndarray) -> bytes:
    out = io.BytesIO()
    np.save(out, ids)
    return out.getvalue()


def _image(content: bytes, extension: str, resize: int | None) -> Sample:
    from PIL import Image

    image = Image.open(io.BytesIO(content))
    image.load()
    pixels = vision.eight_bit(image)
    if resize is None or min(image.size) <= resize:
        return {extension: content}
    scale = resize / min(image.size)
    smaller = pixels.convert("RGB").resize([round(side * scale) for side in image.size], Image.Resampling.BICUBIC)
    out = io.BytesIO()
    smaller.save(out, "JPEG", quality=95)
    return {"jpg": out.getvalue()}


def _recording(content: bytes) -> Sample:
    import soundfile

    info = soundfile.info(io.BytesIO(content))
    wave = speech.decode(content)
    if len(wave) == 0:
        raise ValueError("has no samples")
    if (info.format, info.samplerate, info.channels) == ("FLAC", SAMPLE_RATE, 1):
        return {"flac": content}
    out = io.BytesIO()
    soundfile.write(out, wave.clip(-1, 1), SAMPLE_RATE, format="FLAC", subtype="PCM_16")
    return {"flac": out.getvalue()}


def find_files(source: Path, extensions: Iterable[str], match: str | None) -> list[Path]:
    """Files below `source` in the order of their names. Raises DataError when there are none."""
    if not source.exists():
        raise DataError(f"{source} does not exist.")
    wanted = set(extensions)
    found = [source] if source.is_file() else sorted(path for path in source.rglob("*") if path.is_file())
    files = [
        path
        for path in found
        if path.suffix[1:].lower() in wanted and (match is None or re.search(match, _relative(path, source)))
    ]
    if not files:
        raise DataError(f"No file below {source} ends in .{', .'.join(sorted(wanted))}.", "Check SRC and --match.")
    return files


def _relative(path: Path, source: Path) -> str:
    return path.name if path == source else path.relative_to(source).as_posix()


def file_items(source: Path, files: list[Path], label: str | None, known: list[str]) -> tuple[list[Item], list[str]]:
    """Files in a fixed random order, and the classes. `label`: pattern whose group is the label; null: the folder."""
    labels: list[str | None] = []
    for path in files:
        if label is not None:
            found = re.search(label, _relative(path, source))
            labels.append(found.group(1) if found else None)
        else:
            folder = path.parent.relative_to(source) if path != source else Path()
            labels.append(folder.as_posix() if folder != Path() else None)
    classes = _classes(labels, known)
    items = []
    for number, k in enumerate(np.random.default_rng(0).permutation(len(files))):
        name = f"{number:08d}-{_key(files[k].stem)}"
        items.append(Item(name, str(files[k]), label=_number(labels[k], classes)))
    return items, classes


def _key(name: str) -> str:
    return re.sub(r"[^\w-]+", "_", name)[:80]


def _classes(labels: Iterable[str | None], known: list[str]) -> list[str]:
    new = sorted({label for label in labels if label is not None} - set(known))
    if new and known:
        raise DataError(f"The labels {', '.join(new[:5])} are not among the classes of the set that is in OUT already.")
    return known or new


def _number(label: str | None, classes: list[str]) -> int | None:
    return None if label is None else classes.index(label)


def text_items(found: Iterable[Document], classes: list[str], score: bool) -> Iterator[Item]:
    """Documents as items. `score`: labels are numbers and not classes."""
    for number, document in enumerate(found):
        item = Item(f"{number:08d}", content=document.text, second=document.second)
        if score and document.label is not None:
            try:
                item.score = float(document.label)
            except ValueError:
                raise DataError(f"Document {number} has the label {document.label!r}, which is no number.") from None
        elif document.label is not None:
            item.label = classes.index(document.label)
        yield item


def transcribed(items: list[Item], source: Path, texts: dict[str, str]) -> list[Item]:
    """The items with their texts, those without one left out. Raises DataError where no item has any."""
    for item in items:
        assert item.path is not None
        name = Path(_relative(Path(item.path), source)).with_suffix("")
        item.transcript = texts.get(name.as_posix(), texts.get(name.name))
    kept = [item for item in items if item.transcript is not None]
    print(f"{len(kept)} of {len(items)} recordings have a transcript", file=sys.stderr)
    if not kept:
        raise DataError("No recording has a transcript.", "Lines are: path below SRC without ending, then the text.")
    return kept


def convert(arguments: argparse.Namespace) -> SetIndex:
    """Convert SRC to shards and write their index. Raises DataError."""
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    modality = MODALITIES[arguments.command]
    known = next(
        (index.classes for path in sorted(out.glob(f"*{INDEX_SUFFIX}")) if (index := SetIndex.load(path)).classes), []
    )
    model: Path | None = None
    if arguments.command == "text":
        files = find_files(arguments.source, TEXT_FILES, arguments.match)
        model = _tokenizer(arguments, files)
        columns = Columns.parse(arguments.columns) if arguments.columns else None

        def found() -> Iterator[Document]:
            return documents(files, arguments.documents, columns)

        classes = [] if arguments.score else _classes((document.label for document in found()), known)
        items: Iterable[Item] = text_items(found(), classes, arguments.score)
    else:
        extensions = vision.EXTENSIONS if arguments.command == "images" else (*speech.EXTENSIONS, "aif", "au", "oga")
        files = find_files(arguments.source, extensions, arguments.match)
        labelled, classes = file_items(arguments.source, files, arguments.label, known)
        if getattr(arguments, "transcripts", None) is not None:
            labelled = transcribed(labelled, arguments.source, transcripts(arguments.transcripts))
        items = labelled
    parts = run_all(_jobs(arguments, items, model), arguments.processes)
    skipped = {name: reason for part in parts for name, reason in part.skipped.items()}
    index = SetIndex(modality=modality, shards=[ShardEntry(**part.entry) for part in parts], classes=classes)
    index.skipped = dict(itertools.islice(skipped.items(), _NAMED))
    if model is not None:
        index.tokenizer, index.tokenizer_sha256 = os.path.relpath(model, out), file_sha256(model)
    for name, reason in skipped.items():
        print(f"skipped {name}: {reason}", file=sys.stderr)
    if len(skipped) > arguments.max_bad * (len(skipped) + index.samples):
        raise DataError(
            f"{len(skipped)} of {len(skipped) + index.samples} files could not be read, more than "
            f"--max_bad {arguments.max_bad}; no index was written.",
            "Remove the files named above, or raise --max_bad.",
        )
    index.save(out / f"{arguments.prefix}{INDEX_SUFFIX}")
    return index


def _tokenizer(arguments: argparse.Namespace, files: list[Path]) -> Path:
    """The given tokenizer, the one in OUT, or a new one trained on the documents."""
    if arguments.tokenizer is not None:
        if arguments.tokenizer.suffix == ".json":
            raise DataError(
                f"{arguments.tokenizer} is no sentencepiece model, and nothing else is read.",
                'Store the ids that it gives as .npy: see "Weights from elsewhere" in README.md.',
            )
        text.Tokenizer(arguments.tokenizer)
        return arguments.tokenizer
    model = arguments.out / "tokenizer.model"
    if not model.is_file():
        print(f"training a tokenizer of {arguments.vocab_size} pieces: {model}", file=sys.stderr)
        columns = Columns.parse(arguments.columns) if arguments.columns else None
        first = itertools.islice(documents(files, arguments.documents, columns), 1_000_000)
        texts = (text for document in first for text in (document.text, document.second) if text)
        size, fewer = arguments.vocab_size, arguments.fewer_pieces
        tokenizer.train(texts, model, vocab_size=size, threads=arguments.processes, fewer=fewer)
    return model


def _jobs(arguments: argparse.Namespace, items: Iterable[Item], model: Path | None) -> Iterator[Job]:
    iterator = iter(items)
    checksum = None if model is None else file_sha256(model)
    for number in itertools.count():
        chosen = list(itertools.islice(iterator, arguments.per_shard))
        if not chosen:
            return
        tar = arguments.out / shard_name(arguments.prefix, number)
        yield Job(
            arguments.command,
            tar,
            chosen,
            getattr(arguments, "resize", None),
            model,
            checksum,
            getattr(arguments, "ids", False),
        )


def make_demo(arguments: argparse.Namespace) -> None:
    """Write the demo sets; where a package is missing, the other demos go on."""
    wanted = get_args(Modality) if arguments.modality == "all" else (arguments.modality,)
    missing: list[str] = []
    for modality in wanted:
        try:
            print(demo.write(modality, arguments.out))
        except DataError as error:
            print(f"{modality}: {error}", file=sys.stderr)
            missing.append(modality)
    if len(missing) == len(wanted):
        raise DataError("No demo set could be written.", "See above.")


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("demo", help="real data from installed packages")
    command.add_argument("out", type=Path, nargs="?", default=Path(demo.ROOT), metavar="OUT")
    command.add_argument("--modality", choices=[*get_args(Modality), "all"], default="all")
    for name in MODALITIES:
        command = commands.add_parser(name, help=f"shards from {name}")
        command.add_argument("source", type=Path, metavar="SRC")
        command.add_argument("out", type=Path, metavar="OUT")
        command.add_argument("--prefix", default="train", help="shards are PREFIX-000000.tar and so on")
        command.add_argument("--per_shard", type=int, default=1000, help="samples per shard")
        command.add_argument("--processes", type=int, default=os.cpu_count() or 1)
        command.add_argument("--max_bad", type=float, default=0.01, help="share of bad files that is an error")
        command.add_argument("--match", help="take only files whose path below SRC matches this pattern")
        if name == "text":
            command.add_argument("--tokenizer", type=Path, help="sentencepiece model; without it one is trained")
            command.add_argument("--vocab_size", type=int, default=16000, help="pieces of the trained tokenizer")
            command.add_argument(
                "--fewer_pieces", action="store_true", help="be content with fewer where the texts are too few"
            )
            command.add_argument("--documents", choices=["file", "paragraph", "line"], default="file")
            command.add_argument("--ids", action="store_true", help="store token ids instead of text")
            command.add_argument(
                "--columns", help="TEXT,LABEL or TEXT,TEXT,LABEL: columns of a .tsv (or numbers), keys of a .jsonl"
            )
            command.add_argument("--score", action="store_true", help="labels are numbers, not classes")
        else:
            command.add_argument("--label", help="pattern on the path below SRC whose first group is the label")
        if name == "audio":
            command.add_argument("--transcripts", type=Path, help="file with a line for each recording: name, text")
        if name == "images":
            command.add_argument("--resize", type=int, help="shrink to this shorter side, pixels")
    return parser


def main() -> int:
    arguments = make_parser().parse_args()
    try:
        if arguments.command == "demo":
            make_demo(arguments)
            return 0
        index = convert(arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    size = sum(shard.bytes for shard in index.shards)
    print(
        f"{len(index.shards)} shards, {index.samples} samples, {size / 1e6:.1f} MB, {len(index.skipped)} skipped: "
        f"{arguments.out / (arguments.prefix + INDEX_SUFFIX)}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
