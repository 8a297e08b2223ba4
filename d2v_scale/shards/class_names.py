"""Names of the classes that labels are numbers of, compared between sets of shards."""

from d2v_scale.errors import DataError

ClassNames = tuple[str, list[str]]
"""What a set of shards is called, and the names of its classes."""


def agreed_classes(sets: list[ClassNames]) -> list[str]:
    """The names of the classes that `sets` have in common: the longest list, which all others begin.

    A set that names none, or only numbers them, agrees with every other. Raises DataError where two sets call the same
    number by different names.
    """
    longest = max(sets, key=lambda one: (len(one[1]), not _only_numbers(one[1])), default=("", []))
    named = [one for one in sets if not _only_numbers(one[1])]
    reference = max(named, key=lambda one: len(one[1]), default=longest)
    for name, classes in named:
        for number, (ours, theirs) in enumerate(zip(classes, reference[1], strict=False)):
            if ours != theirs:
                raise DataError(
                    f"Class {number} is {ours!r} in {name} and {theirs!r} in {reference[0]}.",
                    "Write both sets into the same directory with `d2v shards`, or index both with the same "
                    "`d2v index` --classes.",
                )
    return longest[1]


def _only_numbers(classes: list[str]) -> bool:
    return classes == [str(number) for number in range(len(classes))]
