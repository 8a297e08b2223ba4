"""How every verb explains itself: its text as it is written, and the default of every option."""

import argparse


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
