"""d2v_scale.conversion.text_files and tables: documents and transcripts from files, whatever people have in them."""

import gzip
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from d2v_scale.conversion.tables import Columns
from d2v_scale.conversion.text_files import Document, Reading, documents, transcripts
from d2v_scale.errors import DataError

BOM = b"\xef\xbb\xbf"


def read(path: Path, content: bytes, columns: str | None = None, **options: str) -> list[tuple[str, str | None]]:
    """Texts that are found, each with its fault."""
    path.write_bytes(content)
    reading = Reading(columns=Columns.parse(columns) if columns else None, **options)  # type: ignore[arg-type]
    return [("" if found.fault else found.text, found.fault) for found in documents([path], reading)]


def texts(path: Path, content: bytes, columns: str | None = None, **options: str) -> list[str]:
    """The same of a file without a fault."""
    found = read(path, content, columns, **options)
    assert [fault for _, fault in found if fault] == []
    return [text for text, _ in found]


def test_a_byte_order_mark_is_no_part_of_the_first_word(tmp_path: Path) -> None:
    """MRPC's tables begin with one."""
    table = BOM + b"Quality\t#1 String\n1\ta fox\n"
    assert texts(tmp_path / "a.tsv", table, "#1 String,Quality") == ["a fox"]
    assert texts(tmp_path / "a.csv", BOM + b"text;label\na fox;1\n", "text,label") == ["a fox"]
    assert texts(tmp_path / "b.jsonl", BOM + b'{"text": "a dog", "label": 0}\n') == ["a dog"]
    assert texts(tmp_path / "c.txt", BOM + b"a cat\n") == ["a cat\n"]
    (tmp_path / "transcripts.txt").write_bytes(BOM + b"one HELLO\n")
    assert transcripts(tmp_path / "transcripts.txt") == {"one": "HELLO"}


def test_values_of_json_that_are_no_text_are_named_and_not_written_out(tmp_path: Path) -> None:
    """`null` became the word None."""
    values = [None, ["a", "b"], 3.5, {"x": 1}, True, "a fox", "", "broken \ud83d", "a\0b"]
    lines = [json.dumps({"text": value}) for value in values] + ["[]", "{,}", '{"content": "x"}', "", "7"]
    found = read(tmp_path / "a.jsonl", "\n".join(lines).encode())
    assert [text for text, fault in found if fault is None] == ["a fox"]
    faults = [fault or "" for _, fault in found]
    expected = [
        "null",
        "list",
        "number",
        "object",
        "truth value",
        "",
        "empty",
        "surrogate",
        "NUL",
        "list",
        "no line of",
    ]
    for fault, word in zip(faults, [*expected, "has no 'text'", "number"], strict=True):
        assert word in fault
    named = list(documents([tmp_path / "a.jsonl"], Reading()))
    assert named[0].place == f"{tmp_path / 'a.jsonl'}:1"


@pytest.mark.parametrize("layout", ["list", "pretty list", "pretty objects", "lines", "crlf", "utf-16", "gz"])
def test_json_is_read_as_people_lay_it_out(tmp_path: Path, layout: str) -> None:
    records = [{"text": "Grüße\u2028 \x85 fox", "label": 1}, {"text": 'two "words"\nand a line', "label": None}]
    lines = "\n".join(json.dumps(record, ensure_ascii=False) for record in records)
    content = {
        "list": json.dumps(records),
        "pretty list": json.dumps(records, indent=2),
        "pretty objects": "\n".join(json.dumps(record, indent=2) for record in records),
        "crlf": lines.replace("\n", "\r\n"),
    }.get(layout, lines)
    encoded = content.encode("utf-16" if layout == "utf-16" else "utf-8")
    path = tmp_path / ("a.json.gz" if layout == "gz" else "a.json")
    assert texts(path, gzip.compress(encoded) if layout == "gz" else encoded) == [record["text"] for record in records]
    assert [document.label for document in documents([path], Reading())] == ["1", None]


def test_a_key_that_is_asked_for_has_to_be_there(tmp_path: Path) -> None:
    content = b'{"a": "one", "b": "two", "c": 1}\n{"a": "one", "c": 1}\n{"a": "one", "b": null, "c": [1]}\n'
    found = read(tmp_path / "a.jsonl", content, "a,b,c")
    assert [fault for _, fault in found] == [None, "has no 'b'", "'b' is a JSON null, no text"]


def test_text_of_another_encoding_is_converted_or_named(tmp_path: Path) -> None:
    """Latin-1 and UTF-16 were stored mangled."""
    words = "Grüße über Flüsse"
    for encoding in ("utf-16", "utf-32", "utf-8-sig"):
        assert texts(tmp_path / "a.txt", words.encode(encoding)) == [words]
    assert texts(tmp_path / "a.txt", words.encode("latin-1"), encoding="latin-1") == [words]
    assert texts(tmp_path / "a.txt", words.encode("utf-16-le"), encoding="utf-16-le") == [words]
    [(_, fault)] = read(tmp_path / "a.txt", words.encode("latin-1"))
    assert "is not of the encoding that it was read in" in (fault or "")
    assert "NUL bytes" in (read(tmp_path / "a.txt", words.encode("utf-16-le").replace(b"\xfc", b"u"))[0][1] or "")
    assert "cannot be read" in (read(tmp_path / "a.txt", words.encode("utf-16")[:-1])[0][1] or "")
    with pytest.raises(DataError, match="--encoding 'latin-99' is not known"):
        Reading(encoding="latin-99")


def test_one_bad_line_does_not_cost_the_others(tmp_path: Path) -> None:
    lines = b"a fox\nGr\xfc\xdfe\n\na dog\r\na\xe2\x80\xa8cat\n"
    found = read(tmp_path / "a.txt", lines, split="line")
    assert [text for text, fault in found if fault is None] == ["a fox\n", "a dog\n", "a\u2028cat\n"]
    assert len(found) == 4
    paragraphs = read(tmp_path / "a.txt", lines, split="paragraph")
    assert [fault is None for _, fault in paragraphs] == [False, True]


def test_files_without_a_document_are_named(tmp_path: Path) -> None:
    for name in ("a.txt", "a.jsonl", "a.json", "a.csv"):
        [(_, fault)] = read(tmp_path / name, b"", "text,label" if name == "a.csv" else None)
        assert fault in ("is empty", "holds no document")
    [(_, fault)] = read(tmp_path / "cut.txt.gz", gzip.compress(b"a fox " * 9999)[:-20])
    assert "cannot be read" in (fault or "")
    assert "cannot be read" in (read(tmp_path / "no.txt.gz", b"a fox")[0][1] or "")


def test_a_table_may_hold_long_documents(tmp_path: Path) -> None:
    """A field of more than 128 kB was a traceback."""
    long = "word " * 40000
    assert texts(tmp_path / "a.tsv", f"text\tlabel\n{long}\t1\n".encode(), "text,label") == [long]
    assert texts(tmp_path / "a.csv", f'text,label\n"{long}",1\n'.encode(), "text,label") == [long]


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_a_csv_is_quoted_and_of_any_delimiter(tmp_path: Path, delimiter: str) -> None:
    rows = 'label;text\r\n1;"a ""fox"";\nand a dog, too"\r\n\r\n2;plain\r\n'.replace(";", delimiter)
    expected = [f'a "fox"{delimiter}\nand a dog, too', "plain"]
    if delimiter == ",":
        expected[0] = 'a "fox",\nand a dog, too'
    assert texts(tmp_path / "a.csv", rows.encode(), "text,label") == expected
    assert texts(tmp_path / "a.csv", rows.encode(), "text") == expected


def test_rows_that_are_none_are_named(tmp_path: Path) -> None:
    content = b"text\tlabel\nsound\t1\nshort\ncut\tat a tab\t1\ntrailing\t2\t\n\t3\n"
    found = read(tmp_path / "a.tsv", content, "text,label")
    faults = [None, "has 1 columns, not 2", "has 3 columns, not 2", None, "is empty"]
    assert [fault for _, fault in found] == faults
    open_quote = read(tmp_path / "a.csv", b'text,label\na,1\n"never closed,2\nb,3\n', "text,label")
    assert [fault is None for _, fault in open_quote] == [True, False]
    with pytest.raises(DataError, match=r"no column 'body'.*It has: text, label"):
        read(tmp_path / "a.csv", b"text,label\na,1\n", "body,label")
    with pytest.raises(DataError, match="is a table"):
        read(tmp_path / "a.csv", b"text,label\na,1\n")


@settings(deadline=None, max_examples=60)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1), min_size=1))
def test_what_is_written_as_json_is_read_back(tmp_path_factory: pytest.TempPathFactory, values: list[str]) -> None:
    path = tmp_path_factory.mktemp("json") / "a.jsonl"
    path.write_text("\n".join(json.dumps({"text": value}, ensure_ascii=False) for value in values), encoding="utf-8")
    found = list(documents([path], Reading()))
    assert [document.text for document in found] == values
    assert [document.fault is None for document in found] == [bool(value.strip()) for value in values]


def test_a_path_with_spaces_has_a_transcript_behind_a_tab(tmp_path: Path) -> None:
    path = tmp_path / "texts"
    path.write_bytes("speaker one/t1\thello\x85there\nspeaker/t2 good  bye\r\nt3\n".encode())
    assert transcripts(path) == {"speaker one/t1": "hello\x85there", "speaker/t2": "good  bye", "t3": ""}
    path.write_bytes("a Grüße\n".encode("latin-1"))
    with pytest.raises(DataError, match="not of the encoding"):
        transcripts(path)
    assert transcripts(path, "latin-1") == {"a": "Grüße"}
    path.write_text("a one\na two\n")
    with pytest.raises(DataError, match="'a' has another text above"):
        transcripts(path)


def test_a_document_knows_where_it_is_from(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('text,label\n"two\nlines",x\nb,y\n')
    found = list(documents([tmp_path / "a.csv"], Reading(columns=Columns("text", None, "label"))))
    assert found[1] == Document("b", "y", None, f"{tmp_path / 'a.csv'}:4")
