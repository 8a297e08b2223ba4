"""Pretraining data2vec models (speech, vision, text) at scale."""

from d2v_scale.torchaudio_guard import install as _install_torchaudio_guard

__version__ = "0.1.0"

_install_torchaudio_guard()
