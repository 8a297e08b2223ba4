"""Documents: tokenise, cut into blocks that start with <s>. A block is a pure function of the shard and its number."""

import io
import logging
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from d2v_scale.data.config import DataConfig
from d2v_scale.modalities.text.token_cache import TokenCache
from d2v_scale.modalities.text.tokenizer import Tokenizer, Tokens, open_tokenizer, tokenizer_sha256
from d2v_scale.model.stem_config import TextStem
from d2v_scale.shards.reading import RawSample, SampleStore, Store
from d2v_scale.shards.rows import Row, Stacked

log = logging.getLogger(__name__)

EXTENSIONS = ("npy", "txt")
SECOND_EXTENSIONS = ("npy2", "txt2")


def chunks_of_documents(length_n: Tokens, block: int) -> tuple[Tokens, Tokens, Tokens]:
    """Every document cut into chunks of at most `block` tokens: document, first and last + 1 token of each chunk."""
    length_n = length_n.clip(min=0)
    chunks_n = -(-length_n // block)
    document_c = np.repeat(np.arange(len(length_n)), chunks_n)
    first_chunk_n = np.cumsum(chunks_n) - chunks_n
    start_c = (np.arange(len(document_c)) - first_chunk_n[document_c]) * block
    return document_c, start_c, np.minimum(start_c + block, length_n[document_c])


def require_text(text: str) -> str:
    """The text, as it is. Raises ValueError for one that training would not use as it is meant."""
    if "\0" in text:
        raise ValueError("holds NUL bytes: it is no text, or of another encoding")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        if 0xDC80 <= ord(text[error.start]) <= 0xDCFF:  # how Python keeps a byte that it cannot decode
            read_in = "the encoding that it was read in (UTF-8, or what --encoding says)"
            raise ValueError(f"is not of {read_in} from character {error.start} on") from None
        raise ValueError(f"holds half of a surrogate pair at character {error.start}") from None
    if not text.strip():
        raise ValueError("is empty")
    return text


def tokens_of(extension: str, content: bytes, tokenizer: Tokenizer | None) -> Tokens:
    """The ids in a member's bytes, at least one. Raises ValueError where they are no text or ids."""
    if extension == "npy":
        ids = np.load(io.BytesIO(content), allow_pickle=False)
        if ids.ndim != 1 or ids.dtype.kind not in "iu" or len(ids) == 0:
            raise ValueError(f"its .npy ({ids.dtype}, {'x'.join(map(str, ids.shape))}) is no line of token ids")
        if int(ids.min()) < 0:
            raise ValueError(f"its .npy, no line of token ids, holds the id {ids.min()}")
        return ids.astype(np.int64)
    if tokenizer is None:
        raise ValueError("is text, but there is no tokenizer (data.text.tokenizer)")
    return tokenizer(require_text(content.decode("utf-8", errors="surrogateescape")))


class TextDecoder:
    """Documents to blocks of ids, blocks to a batch."""

    draws = 0

    def __init__(self, data: DataConfig, stem: TextStem, tokenizer: Path | None) -> None:
        self.extensions: tuple[str, ...] = EXTENSIONS
        self._stem = stem
        self._by_document = data.text.packing == "document"
        self._block = stem.max_positions - 1
        self._tokenizer: Tokenizer | None = None
        self._cache: TokenCache | None = None
        if tokenizer is not None:
            self._tokenizer = open_tokenizer(tokenizer)
            self._tokenizer.check(stem)
            checksum = tokenizer_sha256(tokenizer)
            self._cache = TokenCache(data.cache_dir, data.cache_gib * 2**30, checksum, data.shards_kept)
        self._cache_failed = False
        self._left = np.zeros(0, dtype=np.int64)
        self._left_key = ""
        self._shards_kept = data.shards_kept
        self._layouts: OrderedDict[int, tuple[Tokens, Tokens, tuple[Tokens, Tokens, Tokens]]] = OrderedDict()

    def training_row(self, store: Store, shard: int, item: int, length: int, draws: NDArray[np.float64]) -> Row:
        """A block, filled with <pad> to `length` (0: to the longest the model takes)."""
        if not isinstance(store, SampleStore):
            key, tokens = self._next_streamed(store, shard, item)
            return Row(key, self._filled(tokens, length))
        length_n, end_n, chunks = self._layout_of(store, shard)
        if self._by_document:
            document_c, start_c, stop_c = chunks
            first = last = int(document_c[item])
            begin = int(end_n[first] - length_n[first])
            start, stop = begin + int(start_c[item]), begin + int(stop_c[item])
        else:
            start, stop = item * self._block, min((item + 1) * self._block, int(end_n[-1]))
            first, last = np.searchsorted(end_n, [start, stop - 1], side="right").tolist()
        tokens = self._stream(store, shard, first, last, start, stop)
        return Row(f"block {item} from {store.members(shard).key(first)}", self._filled(tokens, length))

    def _filled(self, tokens: Tokens, length: int) -> Tokens:
        row = np.full(length or self._block + 1, self._stem.pad_id, dtype=np.int64)
        row[0] = self._stem.bos_id
        row[1 : 1 + len(tokens)] = tokens
        return row

    def _next_streamed(self, store: Store, shard: int, item: int) -> tuple[str, Tokens]:
        """The next block of a stream of documents; what is left of the last document begins the next block."""
        enough = 1 if self._by_document else self._block
        while len(self._left) < enough:
            sample = store.read(shard, item)
            tokens = self._tokens_of(sample)
            self._left_key = sample.key
            self._left = np.concatenate((self._left, tokens))
        tokens, self._left = self._left[: self._block], self._left[self._block :]
        return self._left_key, tokens

    def part_row(self, sample: RawSample, draws: NDArray[np.float64]) -> tuple[Tokens, bool]:
        """The document's beginning, as in evaluation: what stands beside others is no part of a longer text; whether
        there is more of it."""
        del draws
        return self._beginning(sample)

    def evaluation_row(self, sample: RawSample) -> Tokens:
        """The document's beginning, or a pair of texts: <s> first </s> </s> second </s>, the longer one shortened."""
        return self._beginning(sample)[0]

    def _beginning(self, sample: RawSample) -> tuple[Tokens, bool]:
        first = self._tokens_of(sample)
        if not any(sample.has(extension) for extension in SECOND_EXTENSIONS):
            row = np.concatenate(([self._stem.bos_id], self._shortened(first, self._block)))
            return row, len(first) > self._block
        second = self._tokens_of(sample, SECOND_EXTENSIONS)
        room = self._block - 1
        kept = min(len(first), max(room - len(second), room - room // 2))
        pair = self._shortened(first, kept), self._shortened(second, room - kept)
        row = np.concatenate(([self._stem.bos_id], pair[0], [self._stem.eos_id], pair[1]))
        return row, len(first) + len(second) > room

    def _tokens_of(self, sample: RawSample, extensions: tuple[str, ...] | None = None) -> Tokens:
        """The ids of a document. Raises SampleFault, which knows the document: an item is a block of several."""
        extension, content = sample.member(self.extensions if extensions is None else extensions)
        try:
            tokens = tokens_of(extension.removesuffix("2"), bytes(content), self._tokenizer)
        except Exception as error:  # numpy raises many for what is no array
            raise sample.fault(f"cannot be decoded: {error}") from error
        if (highest := int(tokens.max())) >= self._stem.vocab_size:  # on a GPU it would end the run
            raise sample.fault(f"holds the id {highest}, the model has {self._stem.vocab_size} (model.text.vocab_size)")
        if (tokens == self._stem.pad_id).any():
            raise sample.fault(f"holds the id {self._stem.pad_id}, which is padding (model.text.pad_id)")
        return tokens

    def _shortened(self, tokens: Tokens, length: int) -> Tokens:
        """At most `length` tokens, the last one still </s>."""
        if len(tokens) <= length:
            return tokens
        return np.concatenate((tokens[: length - 1], [self._stem.eos_id]))

    def stack(self, rows: list[Tokens], longest: int | None = None) -> Stacked:
        """int64 (B, T). `longest`: tokens beside <s>."""
        least = 0 if longest is None else max(1 + longest, len(self.blank()))
        length = max(least, *(len(row) for row in rows))
        tokens_bt = np.full((len(rows), length), self._stem.pad_id, dtype=np.int64)
        for k, row in enumerate(rows):
            tokens_bt[k, : len(row)] = row
        valid_bt = tokens_bt != self._stem.pad_id
        if valid_bt.all():
            return Stacked(torch.from_numpy(tokens_bt), length=length)
        return Stacked(
            torch.from_numpy(tokens_bt), torch.from_numpy(valid_bt), length=length, valid_lengths=valid_bt.sum(1)
        )

    def blank(self) -> Tokens:
        """A row of a batch that has none."""
        return np.array([self._stem.bos_id, self._stem.eos_id], dtype=np.int64)

    def _layout_of(self, store: SampleStore, shard: int) -> tuple[Tokens, Tokens, tuple[Tokens, Tokens, Tokens]]:
        """Length of each document, where each ends in the shard's stream of tokens, and the chunks of documents."""
        if shard not in self._layouts:
            length_n = store.members(shard).length_n.clip(min=0)
            self._layouts[shard] = length_n, np.cumsum(length_n), chunks_of_documents(length_n, self._block)
            if len(self._layouts) > self._shards_kept:
                self._layouts.popitem(last=False)
        return self._layouts[shard]

    def _stream(self, store: SampleStore, shard: int, first: int, last: int, start: int, stop: int) -> Tokens:
        """Tokens `start` to `stop` of the shard's stream of documents, which the documents `first` to `last` hold."""
        length_n, _, _ = self._layout_of(store, shard)
        known: dict[int, Tokens] = {}
        if self._cache is not None and "txt" in store.members(shard).extensions:
            try:
                cached = self._cache.shard(store.sha256(shard), length_n)
                for number in cached.unknown(first, last):
                    if length_n[number]:
                        known[number] = self._document(store, shard, number)
                        cached.put(number, known[number])
                return cached.get(start, stop)
            except OSError as error:
                # The cache saves time; without it the same tokens come more slowly.
                if not self._cache_failed:
                    log.warning("Tokens are not kept (data.cache_dir): %s", error)
                self._cache_failed = True
        numbers = [number for number in range(first, last + 1) if length_n[number]]
        documents = [known[n] if n in known else self._document(store, shard, n) for n in numbers]
        begin = int(length_n[:first].sum())
        return np.concatenate(documents)[start - begin : stop - begin]

    def _document(self, store: SampleStore, shard: int, number: int) -> Tokens:
        sample = store.read(shard, number)
        tokens = self._tokens_of(sample)
        expected = int(store.members(shard).length_n[number])
        if len(tokens) != expected:
            raise sample.fault(f"has {len(tokens)} tokens, its index says {expected}: another tokenizer?")
        return tokens


class TokenCounter:
    """A `Measure` for text shards: tokens of a document, </s> included. Of a pair both texts have to be readable."""

    def __init__(self, tokenizer: Path | None) -> None:
        self._tokenizer = open_tokenizer(tokenizer) if tokenizer is not None else None

    def __call__(self, members: Mapping[str, bytes | memoryview]) -> int:
        first = self._tokens(members, EXTENSIONS)
        if any(extension in members for extension in SECOND_EXTENSIONS):
            self._tokens(members, SECOND_EXTENSIONS)
        return first

    def _tokens(self, members: Mapping[str, bytes | memoryview], extensions: tuple[str, ...]) -> int:
        for extension, content in members.items():
            if extension in extensions:
                return len(tokens_of(extension.removesuffix("2"), bytes(content), self._tokenizer))
        raise ValueError(f"has no .{', .'.join(extensions)}")
