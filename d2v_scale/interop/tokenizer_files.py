"""A tokenizer as the files that `AutoTokenizer` loads."""

import json
from functools import singledispatch
from pathlib import Path
from typing import Any

from d2v_scale.errors import DataError
from d2v_scale.modalities.text.pieces import PieceTokenizer
from d2v_scale.modalities.text.published import PublishedTokenizer
from d2v_scale.modalities.text.tokenizer import PUBLISHED, SETTINGS, Tokenizer, copy_tokenizer, settings_beside
from d2v_scale.model.stem_config import TextStem

_SPACE = "\u2581"


@singledispatch
def write_tokenizer(tokenizer: Tokenizer, stem: TextStem, out: Path) -> None:
    """Write what `AutoTokenizer` makes the same ids with, <s> and </s> added around a text; and the tokenizer's own
    files, by which it is known again. Raises `DataError` or `ConfigError` where it does not fit the stem."""
    raise AssertionError(f"{type(tokenizer).__name__} is no kind of tokenizer that is exported")


@write_tokenizer.register
def _published(tokenizer: PublishedTokenizer, stem: TextStem, out: Path) -> None:
    """The files as they are."""
    tokenizer.check(stem)
    copied = copy_tokenizer(tokenizer.path, out)
    # What the file holds is what made the ids, whatever class others would read it with.
    loader = "PreTrainedTokenizerFast" if copied.name == PUBLISHED else "RobertaTokenizer"
    decided = {"tokenizer_class": loader, "model_max_length": stem.max_positions}
    settings = tokenizer.words | settings_beside(tokenizer.path) | decided
    (out / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n")


@write_tokenizer.register
def _pieces(pieces_of: PieceTokenizer, stem: TextStem, out: Path) -> None:
    """tokenizer.json, which does what sentencepiece does."""
    from sentencepiece import sentencepiece_model_pb2 as schema
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    model_file, processor = pieces_of.path, pieces_of.model
    proto: Any = schema.ModelProto()
    proto.ParseFromString(model_file.read_bytes())
    pieces = [(piece.piece, piece.score) for piece in proto.pieces]
    if len(pieces) > stem.mask_id:
        raise DataError(f"{model_file} has {len(pieces)} pieces, but the model's <mask> has id {stem.mask_id}.")
    if proto.trainer_spec.model_type == schema.TrainerSpec.BPE:
        vocabulary = {piece: index for index, (piece, _) in enumerate(pieces)}
        merges = _merges(proto)
        model: Any = models.BPE(
            vocabulary, merges, unk_token=pieces[stem.unk_id][0], fuse_unk=True, byte_fallback=True, ignore_merges=False
        )
    else:
        model = models.Unigram(pieces, unk_id=stem.unk_id, byte_fallback=True)
    tokenizer = Tokenizer(model)
    steps: list[Any] = []
    if proto.normalizer_spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(proto.normalizer_spec.precompiled_charsmap))
    if proto.normalizer_spec.remove_extra_whitespaces:
        from tokenizers import Regex

        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if steps:
        tokenizer.normalizer = normalizers.Sequence(steps)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement=_SPACE, prepend_scheme="always", split=True)
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace(_SPACE, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1),
        ]
    )
    bos, eos = processor.id_to_piece(stem.bos_id), processor.id_to_piece(stem.eos_id)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A {eos}",
        pair=f"{bos} $A {eos} {eos} $B {eos}",
        special_tokens=[(bos, stem.bos_id), (eos, stem.eos_id)],
    )
    special = [bos, processor.id_to_piece(stem.pad_id), eos, processor.id_to_piece(stem.unk_id)]
    tokenizer.add_special_tokens([AddedToken(word, special=True) for word in special])
    _fill_up(tokenizer, stem.mask_id)
    tokenizer.add_special_tokens([AddedToken("<mask>", special=True, lstrip=True)])
    assert tokenizer.token_to_id("<mask>") == stem.mask_id
    copy_tokenizer(model_file, out)
    tokenizer.save(str(out / PUBLISHED))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": bos,
        "cls_token": bos,
        "eos_token": eos,
        "sep_token": eos,
        "pad_token": special[1],
        "unk_token": special[3],
        "mask_token": "<mask>",
        "model_max_length": stem.max_positions,
        "clean_up_tokenization_spaces": False,
    }
    (out / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n")


def _merges(proto: Any) -> list[tuple[str, str]]:
    """The merges that sentencepiece makes, best first: every way to make a piece of two, at the piece's score."""
    scores = {piece.piece: piece.score for piece in proto.pieces if piece.type == piece.NORMAL}
    order = {piece.piece: index for index, piece in enumerate(proto.pieces)}
    found = []
    for piece, score in scores.items():
        halves = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        pairs = [(left, right) for left, right in halves if left in scores and right in scores]
        found += [(score, order[piece], order[left], order[right], left, right) for left, right in pairs]
    found.sort(key=lambda item: (-item[0], item[1], item[2], item[3]))
    return [(left, right) for *_, left, right in found]


def _fill_up(tokenizer: Any, size: int) -> None:
    """Unused ids between the last piece and <mask> get names, since added words take the next free id."""
    from tokenizers import AddedToken

    while tokenizer.get_vocab_size() < size:
        tokenizer.add_special_tokens([AddedToken(f"<unused{tokenizer.get_vocab_size()}>", special=True)])
