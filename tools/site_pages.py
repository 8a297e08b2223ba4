"""A hook of mkdocs (mkdocs.yml): the pages of the repository in one folder, where links lead on as in the tree."""

import shutil
import tempfile
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("*.md", "docs/*.md", "slurm/README.md", "ds_configs/README.md", "d2v_scale/recipes/README.md")
LINKED = (".assets/*", "constraints/*.txt", "Dockerfile", "docs/notebooks/*.ipynb", "docs/evidence/**/*", "LICENSE")
"""What pages show or lead to."""


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Before anything is read."""
    laid_out = Path(tempfile.mkdtemp(prefix="d2v-site-"))
    for pattern in (*PAGES, *LINKED):
        for path in filter(Path.is_file, ROOT.glob(pattern)):
            # Folders whose names begin with a dot are no part of a site.
            target = laid_out / str(path.relative_to(ROOT)).replace(".assets/", "assets/")
            target.parent.mkdir(parents=True, exist_ok=True)
            if path.suffix == ".md":
                target.write_text(path.read_text().replace(".assets/", "assets/"))
            else:
                shutil.copy(path, target)
    config.docs_dir = str(laid_out)
    return config


def on_post_build(config: MkDocsConfig) -> None:
    """The laid out pages are in the site now."""
    if Path(config.docs_dir).name.startswith("d2v-site-"):
        shutil.rmtree(config.docs_dir, ignore_errors=True)
