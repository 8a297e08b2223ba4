"""A small student and teacher with parameters of awkward sizes, and the loop they are compared with.

Sizes 1, 7 and 12 leave empty, partial and unequal partitions on 2 and 4 ranks. The calling convention is the real
one: the student sees a masked view, the teacher the full one, the teacher's targets come from its blocks.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

WIDTH = 12


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.fc1 = nn.Linear(WIDTH, 7)
        self.fc2 = nn.Linear(7, WIDTH)
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale * self.fc2(torch.nn.functional.gelu(self.fc1(self.norm(x))))


class Student(nn.Module):
    def __init__(self, depth: int = 3) -> None:
        super().__init__()
        self.stem = nn.Linear(5, WIDTH)
        self.mask_embedding = nn.Parameter(torch.zeros(WIDTH))
        self.blocks = nn.ModuleList(Block() for _ in range(depth))
        self.predictor = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, masked: Tensor) -> Tensor:
        h = torch.where(masked[..., None], self.mask_embedding, self.stem(x))
        for block in self.blocks:
            h = block(h)
        return self.predictor(h)


class Teacher(nn.Module):
    """`stem` is copied, `blocks` are averaged, the rest is absent."""

    def __init__(self, depth: int = 3) -> None:
        super().__init__()
        self.stem = nn.Linear(5, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(depth))
        self.requires_grad_(False)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        h, total = self.stem(x), torch.zeros((), dtype=torch.float32)
        for block in self.blocks:
            h = block(h)
            total = total + torch.nn.functional.layer_norm(h.float(), (WIDTH,))
        return total / len(self.blocks)

    def features(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        for block in self.blocks:
            h = block(h)
        return h


def role(name: str) -> str:
    if name.startswith("stem."):
        return "copied"
    return "averaged" if name.startswith("blocks.") else "absent"


def initialize(module: nn.Module) -> None:
    """Weights as a function of the name alone; works on whole and on partitioned parameters."""
    from deepspeed import comm

    from d2v_scale.data2vec.stateless import key

    for name, p in module.named_parameters():
        shape = getattr(p, "ds_shape", p.shape)
        generator = torch.Generator().manual_seed(key(7, name) >> 2)
        full = torch.randn(shape, generator=generator) * 0.3 + (1.0 if name.endswith("scale") else 0.0)
        if hasattr(p, "ds_tensor"):
            part, flat = p.ds_tensor, full.flatten()
            start = comm.get_rank() * part.numel()
            mine = flat[start : start + part.numel()]
            part.data.zero_()
            part.data[: mine.numel()].copy_(mine)
        else:
            p.data.copy_(full)


def sample(step: int, rows: slice) -> tuple[Tensor, Tensor]:
    """Rows of a global batch of 12: inputs (b, 6, 5) and mask (b, 6)."""
    generator = torch.Generator().manual_seed(1000 + step)
    x = torch.randn(12, 6, 5, generator=generator)
    masked = torch.rand(12, 6, generator=generator) < 0.5
    masked[:, 0] = True
    return x[rows], masked[rows]


def loss_sum(prediction: Tensor, target: Tensor, masked: Tensor) -> Tensor:
    return (prediction.float() - target.float())[masked].square().sum()


@dataclass
class Settings:
    lr: float = 1e-2
    eps: float = 1e-4
    clip: float = 0.5
    decay: float = 0.9
    steps: int = 6


def groups(named: list[tuple[str, nn.Parameter]]) -> list[dict]:
    decayed = [p for name, p in named if not name.endswith("bias")]
    plain = [p for name, p in named if name.endswith("bias")]
    return [{"params": decayed, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}]


def optimizer(named: list[tuple[str, nn.Parameter]], settings: Settings) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups(named), lr=settings.lr, eps=settings.eps, fused=True)


def reference(settings: Settings, skip: tuple[int, ...] = ()) -> dict:
    """Plain torch, one process, whole batch at once. Steps in `skip` do not happen."""
    student, teacher = Student(), Teacher()
    initialize(student)
    weights = dict(student.named_parameters())
    with torch.no_grad():
        for name, p in teacher.named_parameters():
            p.copy_(weights[name])
    adam = optimizer(list(student.named_parameters()), settings)
    losses, norms = [], []
    for step in range(settings.steps):
        x, masked = sample(step, slice(0, 12))
        loss = loss_sum(student(x, masked), teacher(x), masked) / masked.sum()
        losses.append(float(loss.detach()))
        if step in skip:
            continue
        loss.backward()
        norms.append(float(nn.utils.clip_grad_norm_(student.parameters(), settings.clip)))
        before = {name: p.detach().clone() for name, p in weights.items()}
        adam.step()
        parts = part_figures(weights, before, norms[-1])
        adam.zero_grad()
        with torch.no_grad():
            for name, p in teacher.named_parameters():
                if role(name) == "copied":
                    p.copy_(weights[name])
                else:
                    p.lerp_(weights[name], 1 - settings.decay)
    return {
        "losses": losses,
        "norms": norms,
        "parts": parts,
        "student": {name: p.detach().clone() for name, p in weights.items()},
        "teacher": {name: p.detach().clone() for name, p in teacher.named_parameters()},
    }


def part_figures(weights: dict[str, nn.Parameter], before: dict[str, Tensor], norm: float) -> dict[str, float]:
    """What `StepDiagnostics` reports of a step, from whole tensors. The gradients are clipped, `norm` is not."""
    total = torch.cat([p.grad.flatten() for p in weights.values()]).norm()
    roots = {
        "stem": ("stem.", "mask_"),
        "blocks_first": ("blocks.0.",),
        "blocks_middle": ("blocks.1.",),
        "blocks_last": ("blocks.2.",),
        "predictor": ("predictor.",),
    }
    figures = {}
    for part, starts in roots.items():
        names = [name for name in weights if name.startswith(starts)]
        gradient = torch.cat([weights[name].grad.flatten() for name in names]).norm()
        old = torch.cat([before[name].flatten() for name in names])
        new = torch.cat([weights[name].detach().flatten() for name in names])
        figures[f"grad_norm/{part}"] = float(norm * gradient / total)
        figures[f"update_ratio/{part}"] = float((new - old).norm() / old.norm())
    return figures


def count(step: int) -> int:
    """Masked positions of the whole step."""
    return int(sample(step, slice(0, 12))[1].sum())


def loss(student, teacher, step: int, rows: slice, bf16: bool = False) -> Tensor:
    """The loss sum of some rows of a step's batch, through the engines."""
    x, masked = sample(step, rows)
    x = x.bfloat16() if bf16 else x
    return loss_sum(student(x, masked), teacher(x), masked)
