"""d2v_scale.data.text_files: documents and transcripts from files."""

from pathlib import Path

from d2v_scale.data.text_files import Columns, Document, documents, transcripts

BOM = b"\xef\xbb\xbf"


def test_a_byte_order_mark_is_no_part_of_the_first_word(tmp_path: Path) -> None:
    """MRPC's tables begin with one."""
    files = {
        "a.tsv": b"Quality\t#1 String\n1\ta fox\n",
        "b.jsonl": b'{"text": "a dog", "label": 0}\n',
        "c.txt": b"a cat\n",
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(BOM + content)
    found = list(
        documents([tmp_path / name for name in sorted(files)][:1], "file", Columns("#1 String", None, "Quality"))
    )
    assert found == [Document("a fox", "1")]
    rest = list(documents([tmp_path / "b.jsonl", tmp_path / "c.txt"], "file", None))
    assert rest == [Document("a dog", "0"), Document("a cat\n")]
    (tmp_path / "transcripts.txt").write_bytes(BOM + b"one HELLO\n")
    assert transcripts(tmp_path / "transcripts.txt") == {"one": "HELLO"}
