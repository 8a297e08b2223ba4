"""How every verb explains itself: its text as it is written, every default, and what to do about words too many."""

import argparse
import os
from collections.abc import Iterable
from typing import Any

from d2v_scale.answers.patterns import quoted


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Adds `(default: VALUE)` where there is a value and the text does not name it."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text = action.help
        if text is None or text is argparse.SUPPRESS or "default" in text:
            return text
        none = action.default is None or action.default is False or action.default in (argparse.SUPPRESS, [])
        if none or not (action.option_strings or action.nargs == "?"):
            return text
        return f"{text} (default: %(default)s)"


class VerbParser(argparse.ArgumentParser):
    """The command line of a verb: `description` is the module's text."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"formatter_class": HelpFormatter, **options})

    def parse_args(self, args: Iterable[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """As usual; of words too many, because the shell has resolved a pattern, with the remedy."""
        found, extra = self.parse_known_args(None if args is None else list(args), namespace)
        given = [word for value in vars(found).values() for word in (value if isinstance(value, list) else [value])]
        files = [str(word) for word in [*given, *extra] if _is_shard(word)]
        options = [word for word in extra if word.startswith("-")]
        if extra and not options and len(files) > 1:
            self.error(f"words too many: {' '.join(extra[:3])}. {quoted('', sorted(files))}")
        if extra:
            self.error(f"unrecognized arguments: {' '.join(extra)}")
        return found


def _is_shard(word: Any) -> bool:
    return str(word).endswith((".tar", ".json", ".tar.gz", ".tgz")) or (isinstance(word, str) and os.path.isfile(word))
