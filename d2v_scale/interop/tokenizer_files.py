"""A sentencepiece model as the files that `AutoTokenizer` loads."""

import json
from pathlib import Path
from typing import Any

from d2v_scale.errors import DataError
from d2v_scale.model.stem_config import TextStem

_SPACE = "\u2581"


def write_tokenizer(model_file: Path, stem: TextStem, out: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json; the same ids as sentencepiece, <s> and </s> added around a text.

    Raises `DataError` when the model cannot be read or does not have as many pieces as the stem's <mask> id says.
    """
    import sentencepiece
    from sentencepiece import sentencepiece_model_pb2 as schema
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    try:
        processor: Any = sentencepiece.SentencePieceProcessor(model_file=str(model_file))
    except (OSError, RuntimeError) as error:
        raise DataError(f"The tokenizer {model_file} cannot be read: {error}.") from error
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
    tokenizer.save(str(out / "tokenizer.json"))
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
    (out / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


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
