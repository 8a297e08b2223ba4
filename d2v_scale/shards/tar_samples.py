"""From the files of a tar to samples: consecutive files of one key, in WebDataset's layout."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from d2v_scale.shards.tar_members import PassedOver, Piece, TarMember


@dataclass(slots=True)
class TarSample:
    """The files of one key."""

    key: str
    start: int
    """Where its first header begins, bytes."""
    end: int = 0
    """Where its own bytes in the tar end."""
    members: dict[str, TarMember] = field(default_factory=dict)
    """By extension."""
    unreadable: str = ""
    """Why the sample is lost; empty: it is not."""

    def add(self, extension: str, member: TarMember) -> None:
        """Take in the file of an extension; they come in their order."""
        self.members[extension] = member
        self.end = max(self.end, member.end)
        if member.unreadable:
            self.lose(f"its .{extension} {member.unreadable}")

    def lose(self, why: str) -> None:
        """The sample cannot be had; the first reason stays."""
        self.unreadable = self.unreadable or why

    def holds(self, member: TarMember) -> bool:
        """Whether a member lies in one piece among the sample's own bytes."""
        if member.is_link or len(member.pieces) != 1:
            return member.size == 0
        return member.pieces[0].size == member.size

    def pieces_outside(self) -> list[Piece]:
        """What links lead to, in the order in which `Members.pieces_p5` has it."""
        links = [member for member in self.members.values() if member.is_link]
        return [
            piece
            for member in links
            for piece in member.pieces
            if piece.start < self.start or piece.start + piece.size > self.end
        ]


def tar_samples(members: list[TarMember | None], passed_over: PassedOver) -> Iterator[TarSample]:
    """The samples of a tar. None among `members` is a gap that none spans. What belongs to no sample is counted in
    `passed_over`."""
    from webdataset.tariterators import base_plus_ext  # which imports torch

    seen: set[str] = set()
    current: str | None = None
    files: list[tuple[str, TarMember]] = []
    for member in [*members, None]:
        key, extension = None, ""
        if member is not None:
            kind = _no_file_of_a_sample(member)
            if not kind:
                key, extension = base_plus_ext(member.name)
            if key is None:
                passed_over.add(kind or "files without an extension", member.name)
                continue
        if key != current or member is None:
            if current is not None:
                if current in seen:
                    passed_over.add("keys that are there again behind other samples, each of these one more", current)
                seen.add(current)
                yield from _of_one_key(current, files, passed_over)
            current, files = key, []
        if member is not None:
            files.append((extension.lower(), member))


def _no_file_of_a_sample(member: TarMember) -> str:
    """As what `member` is passed over; empty: it is a file that is not hidden."""
    if member.kind:
        return member.kind
    if "/." not in member.name and not member.name.startswith((".", "__MACOSX/")) and "/__MACOSX/" not in member.name:
        return ""
    folders, _, name = member.name.rpartition("/")
    if name.startswith("._"):
        return "AppleDouble files (._*)"
    if "__MACOSX" in folders.split("/"):
        return "files in __MACOSX"
    return "hidden files" if name.startswith(".") else ""


def _of_one_key(key: str, files: list[tuple[str, TarMember]], passed_over: PassedOver) -> Iterator[TarSample]:
    """The sample of consecutive files; several, where their names repeat."""
    samples = [TarSample(key, files[0][1].start)]
    for extension, member in files:
        if extension in samples[-1].members:
            samples.append(TarSample(key, member.start))
        samples[-1].add(extension, member)
    if len(samples) > 1:
        alike = all(sample.members.keys() == samples[0].members.keys() for sample in samples)
        for sample in samples:
            if not alike:
                sample.lose("has several members of one name, and nothing tells which of them belong together")
        for _ in samples[1:]:
            passed_over.add("keys that are there twice in a row, each time a sample", key)
    yield from samples
