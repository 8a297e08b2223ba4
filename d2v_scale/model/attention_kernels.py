"""Which of PyTorch's attention kernels a call on a GPU may use, by what is added to its logits.

| call | kernels, in PyTorch's order for the device |
|---|---|
| nothing is added | cuDNN, flash, memory-efficient, math |
| a constant mask or bias | memory-efficient, math; cuDNN where its version is of `CUDNN_TESTED_WITH_MASK` |
| a bias that learns | memory-efficient, math: no other has a gradient of the bias |

On Hopper cuDNN gives NaN as the gradient of the queries when all hold: something is added, the length is 64 modulo 128,
and the log-sum-exp of a row is below -88.7 (https://github.com/pytorch/pytorch/issues/196678). PyTorch prefers cuDNN
there: 2.11 to 2.13 bring 9.19 and 9.20. It is said to be mended in cuDNN 9.26, of which other faults of the same
backward pass are open (NVIDIA/cudnn-frontend#1072, #987): a version counts once `tests/model/test_attention_kernels.py`
has passed with it on a GPU.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

CUDNN_TESTED_WITH_MASK: frozenset[int] = frozenset()
"""Values of `torch.backends.cudnn.version()`, 92600 for 9.26.0. None has been tested."""

_WITHOUT_CUDNN = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def attend(q_rhsd: Tensor, k_rhsd: Tensor, v_rhsd: Tensor, added: Tensor | None, dropout: float) -> Tensor:
    """softmax(q k / sqrt(d) + added) v, (R, H, S, d) each, with dropout on the weights, in a kernel of the table above.

    `added`: broadcast to (R, H, S, S) in the dtype of the others, or bool (True: attend). The backward pass is of the
    kernel that the forward pass used. Local.
    """
    if added is None or not _is_on_gpu(q_rhsd) or may_use_cudnn(added.requires_grad):
        return F.scaled_dot_product_attention(q_rhsd, k_rhsd, v_rhsd, attn_mask=added, dropout_p=dropout)
    if torch.compiler.is_compiling():
        # The kernel is chosen while the graph is traced, where the flag cannot be read.
        with sdpa_kernel(_WITHOUT_CUDNN):
            return F.scaled_dot_product_attention(q_rhsd, k_rhsd, v_rhsd, attn_mask=added, dropout_p=dropout)
    # What `sdpa_kernel` does for all kernels, in 8 calls instead of 70: flash takes no mask anyway.
    was_enabled = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        return F.scaled_dot_product_attention(q_rhsd, k_rhsd, v_rhsd, attn_mask=added, dropout_p=dropout)
    finally:
        torch.backends.cuda.enable_cudnn_sdp(was_enabled)


def may_use_cudnn(learned: bool) -> bool:
    """Whether cuDNN may attend where something is added to the logits. `learned`: whether that has a gradient."""
    # Read when the module is imported: a compiled block must not ask.
    return not learned and _IS_CUDNN_TESTED


def describe(device_name: str) -> str:
    """One line for the log: what each kind of call may use here."""
    number = torch.backends.cudnn.version()
    version = "no cuDNN" if number is None else f"cuDNN {number // 10000}.{number // 100 % 100}.{number % 100}"
    with_mask = "memory-efficient or math"
    constant = f"cuDNN, {with_mask}" if may_use_cudnn(False) else f"{with_mask} (cuDNN is not tested with one)"
    return (
        f"Attention on {device_name} ({version}): without a mask whatever PyTorch prefers; "
        f"with a constant mask or bias {constant}; with a bias that learns {with_mask}"
    )


def _is_on_gpu(x: Tensor) -> bool:
    return x.device.type == "cuda"


_IS_CUDNN_TESTED = torch.backends.cudnn.version() in CUDNN_TESTED_WITH_MASK
