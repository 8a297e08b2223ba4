"""Text: CPython's own documentation topics and docstrings; the label is the module family."""

import ast
import hashlib
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from d2v_scale.modalities.text.decoder import TokenCounter
from d2v_scale.modalities.text.tokenizer_training import train
from d2v_scale.shards.writing import Sample, write_set

VOCAB_SIZE = 4095
"""Pieces of the tokenizer; <mask> follows as number 4095."""

_TEST_SHARE = 0.15
_PER_SHARD = 512
_SHORTEST, _LONGEST = 120, 1500
_SKIPPED = {"site-packages", "dist-packages", "test", "tests", "__pycache__", "idlelib", "lib2to3", "ensurepip"}
_FAMILIES = {
    "concurrency": ("asyncio", "concurrent", "threading", "multiprocessing", "queue", "sched", "subprocess"),
    "graphics": ("tkinter", "turtle"),
    "importing": ("importlib", "pkgutil", "modulefinder", "runpy", "zipimport", "inspect"),
    "language": ("topics",),
    "logging": ("logging",),
    "mail": ("email", "smtplib", "imaplib", "poplib", "mailbox"),
    "network": ("http", "urllib", "ipaddress", "socketserver", "wsgiref", "ssl", "socket", "ftplib"),
    "numbers": ("_pydecimal", "statistics", "fractions", "random", "numbers", "datetime", "_strptime", "calendar"),
    "testing": ("unittest", "doctest", "pdb", "bdb"),
    "xml": ("xml", "xmlrpc", "html", "plistlib"),
}


def write(out: Path) -> None:
    """Write the shards of both splits and the tokenizer to `out`."""
    classes = sorted(_FAMILIES)
    family_of = {module: classes.index(family) for family, modules in _FAMILIES.items() for module in modules}
    train_samples: list[Sample] = []
    test_samples: list[Sample] = []
    for module, text in _documents():
        # The hash decides order and split, so that one document's place does not depend on the others.
        digest = hashlib.sha256(text.encode()).hexdigest()
        sample: Sample = {"__key__": f"{digest[:12]}-{module}", "txt": text}
        if module in family_of:
            sample["cls"] = family_of[module]
        held_out = module in family_of and int(digest[-8:], 16) < _TEST_SHARE * 2**32
        (test_samples if held_out else train_samples).append(sample)
    tokenizer = out / "tokenizer.model"
    for samples in (train_samples, test_samples):
        samples.sort(key=lambda sample: sample["__key__"])
    train((sample["txt"] for sample in train_samples), tokenizer, vocab_size=VOCAB_SIZE)
    measure = TokenCounter(tokenizer)
    for split, samples in (("train", train_samples), ("test", test_samples)):
        write_set(
            out, split, "text", samples, per_shard=_PER_SHARD, measure=measure, classes=classes, tokenizer=tokenizer
        )


def _documents() -> Iterator[tuple[str, str]]:
    """Module and text of every document, each text once."""
    seen: set[str] = set()
    for module, text in (*_topics(), *_docstrings()):
        text = " ".join(text.split())
        if len(text) >= _SHORTEST and text not in seen:
            seen.add(text)
            yield module, text


def _topics() -> Iterator[tuple[str, str]]:
    from pydoc_data.topics import topics

    for text in topics.values():
        part = ""
        for paragraph in text.split("\n\n"):
            part += paragraph + "\n\n"
            if len(part) > _LONGEST:
                yield "topics", part
                part = ""
        yield "topics", part


def _docstrings() -> Iterator[tuple[str, str]]:
    library = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(library.rglob("*.py")):
        relative = path.relative_to(library)
        if _SKIPPED & set(relative.parts):
            continue
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                text = ast.get_docstring(node)
                if text:
                    yield relative.parts[0].removesuffix(".py"), text
