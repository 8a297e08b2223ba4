"""Words of a command line that belong to no key: most are files, from a pattern that the shell has resolved."""

import os
import re
import typing
from collections.abc import Sequence

from d2v_scale.answers.patterns import quoted
from d2v_scale.errors import ConfigError
from d2v_scale.run_files import recipe_file

_ALONE = re.compile(r"-h|--(help|help_all|list_recipes|print_config|.*\.help)")
"""Options that take no value."""


def refuse(arguments: Sequence[str]) -> None:
    """Raises ConfigError for the first word that is neither `--KEY`, nor the value of one."""
    key, values, waits = "", [], False
    for place, word in enumerate(arguments):
        if word.startswith("--") or word == "-h":
            option, equals, value = word.partition("=")
            key, values, waits = option.removeprefix("--"), [value] if equals else [], not equals
            waits = waits and not _ALONE.fullmatch(word)
        elif waits:
            values, waits = [word], False
        else:
            more = [*values, *_until_key(arguments[place:])]
            if values and any(map(_is_file, more)):
                raise ConfigError(key, f"got {len(more)} values, the second is {word}", quoted(f"--{key} ", more))
            if values and typing.get_origin(recipe_file.kind_at(key)) in (list, tuple):
                raise ConfigError(key, f"is a list, of which {word!r} is a word", f"Write --{key} '{_list(more)}'.")
            if re.fullmatch(r"[A-Za-z_][\w.]*=.*", word):
                raise ConfigError("command line", f"{word!r} is no key and value", f"Write --{word}.")
            raise ConfigError("command line", f"{word!r} belongs to no key", "Write --KEY VALUE, or --KEY=VALUE.")


def _list(words: Sequence[str]) -> str:
    return f"[{', '.join(word.strip('[],') for word in words)}]"


def _until_key(words: Sequence[str]) -> list[str]:
    found = []
    for word in words:
        if word.startswith("--"):
            break
        found.append(word)
    return found


def _is_file(word: str) -> bool:
    return os.path.lexists(word) or re.search(r"\.(tar|json|tgz|index)\b", word) is not None
