"""Where a verb may write, found out before it computes anything: types of arguments."""

import argparse
from pathlib import Path


def out_folder(text: str) -> Path:
    """A folder, perhaps one that is not there yet."""
    path = Path(text)
    _refuse_file(path)
    return path


def out_file(text: str) -> Path:
    """A file, perhaps one that is not there yet, in a folder that may be made."""
    path = Path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is a folder. Name a file in it.")
    _refuse_file(path.parent)
    return path


def out_page(text: str) -> Path:
    """A file that browsers show as a page: a name without an ending gets one. Others end as they are written."""
    path = out_file(text)
    return path if path.suffix else out_file(f"{text}.html")


def _refuse_file(folder: Path) -> None:
    for one in (folder, *folder.parents):
        if one.exists() and not one.is_dir():
            raise argparse.ArgumentTypeError(f"{one} exists already, and is a file. Name a folder, or another one.")
