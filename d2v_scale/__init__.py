"""Pretraining data2vec models (speech, vision, text) at scale."""

import warnings

from d2v_scale.process.torchaudio_guard import install as _install_torchaudio_guard

__version__ = "0.1.0"

# megatron-core's optional CUDA packages, and torch names that DeepSpeed still uses: nothing a user can act on.
warnings.filterwarnings("ignore", message="Transformer Engine and Apex are not installed")
warnings.filterwarnings("ignore", message=r"`torch.distributed.\w+` is deprecated", category=FutureWarning)

_install_torchaudio_guard()
