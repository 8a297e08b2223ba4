"""From the files of a tar to samples: consecutive files of one key, in WebDataset's layout."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from webdataset.tariterators import base_plus_ext

from d2v_scale.data.tar_members import PassedOver, Piece, TarMember


@dataclass(slots=True)
class TarSample:
    """The files of one key."""

    key: str
    members: dict[str, TarMember] = field(default_factory=dict)
    """By extension."""
    unreadable: str = ""
    """Why the sample is lost; empty: it is not."""

    @property
    def start(self) -> int:
        """Where its first header begins, bytes."""
        return next(iter(self.members.values())).start

    @property
    def end(self) -> int:
        """Where its own bytes in the tar end."""
        return max(member.end for member in self.members.values())

    @property
    def reach(self) -> int:
        """Where the last of its bytes ends, its own or those that a link leads to."""
        return max([self.end, *(piece.start + piece.size for piece in self.pieces_outside())])

    def lose(self, why: str) -> None:
        """The sample cannot be had; the first reason stays."""
        self.unreadable = self.unreadable or why

    def holds(self, member: TarMember) -> bool:
        """Whether a member lies in one piece among the sample's own bytes."""
        if not member.pieces:
            return member.size == 0
        return (
            len(member.pieces) == 1 and member.pieces[0].size == member.size and not self._is_outside(member.pieces[0])
        )

    def pieces_outside(self) -> list[Piece]:
        """What links lead to, in the order in which `Members.pieces_p5` has it."""
        return [piece for member in self.members.values() for piece in member.pieces if self._is_outside(piece)]

    def _is_outside(self, piece: Piece) -> bool:
        return not self.start <= piece.start or piece.start + piece.size > self.end


def tar_samples(members: list[TarMember | None], passed_over: PassedOver) -> Iterator[TarSample]:
    """The samples of a tar. None among `members` is a gap that none spans. What belongs to no sample is counted in
    `passed_over`."""
    seen: set[str] = set()
    current: str | None = None
    files: list[tuple[str, TarMember]] = []
    for member in [*members, None]:
        if member is not None and (kind := _no_file_of_a_sample(member)):
            passed_over.add(kind, member.name)
            continue
        key, extension = base_plus_ext(member.name) if member is not None else (None, None)
        if key != current or member is None:
            if current is not None:
                if current in seen:
                    passed_over.add("keys that are there again behind other samples, each of these one more", current)
                seen.add(current)
                yield from _of_one_key(current, files, passed_over)
            current, files = key, []
        if member is not None and extension is not None:
            files.append((extension.lower(), member))


def _no_file_of_a_sample(member: TarMember) -> str:
    """As what `member` is passed over; empty: it belongs to a sample."""
    if member.kind:
        return member.kind
    folders, _, name = member.name.rpartition("/")
    if name.startswith("._"):
        return "AppleDouble files (._*)"
    if "__MACOSX" in folders.split("/"):
        return "files in __MACOSX"
    if name.startswith("."):
        return "hidden files"
    return "" if base_plus_ext(member.name)[0] is not None else "files without an extension"


def _of_one_key(key: str, files: list[tuple[str, TarMember]], passed_over: PassedOver) -> Iterator[TarSample]:
    """The sample of consecutive files; several, where their names repeat."""
    samples = [TarSample(key)]
    for extension, member in files:
        if extension in samples[-1].members:
            samples.append(TarSample(key))
        samples[-1].members[extension] = member
    for sample in samples:
        for extension, member in sample.members.items():
            if member.unreadable:
                sample.lose(f"its .{extension} {member.unreadable}")
        if sample.members.keys() != samples[0].members.keys():
            for other in samples:
                other.lose("has several members of one name, and nothing tells which of them belong together")
    for _ in samples[1:]:
        passed_over.add("keys that are there twice in a row, each time a sample", key)
    yield from samples
