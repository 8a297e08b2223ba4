"""Which parts of paired samples are hidden from the student altogether."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from d2v_scale.data2vec.row_draws import Bools, stream
from d2v_scale.data2vec.stateless import array_keys


def hidden_parts(
    probability: float,
    present_bp: Bools,
    clones: int,
    *,
    sample_ids: Sequence[int] | NDArray[np.int64],
    seed: int,
    step: int,
) -> Bools:
    """bool (B * clones, P), rows sample-major: every part that a sample has is hidden with this probability, each by
    itself; where that would be all of them, one that is drawn among them is shown.

    A row's draw is a pure function of (seed, step, sample id, clone), and of which parts the sample has.
    """
    ids_b = np.asarray(sample_ids, dtype=np.int64)
    samples_b = array_keys(ids_b, "hide", seed, step)
    clones_m = array_keys(np.arange(clones), "clone")
    keys_r = array_keys((samples_b[:, None] ^ clones_m).reshape(-1).view(np.int64), "row")
    present_rp = np.repeat(present_bp, clones, axis=0)
    parts = present_rp.shape[1]
    uniform_rp = stream(keys_r, "parts", parts)
    hidden_rp = (uniform_rp < probability) & present_rp
    shown_rp = np.where(present_rp, stream(keys_r, "shown", parts), 2.0).argmin(axis=1)[:, None] == np.arange(parts)
    all_hidden_r = (hidden_rp == present_rp).all(axis=1)
    return hidden_rp & ~(shown_rp & all_hidden_r[:, None])
