"""An encoder as an ONNX graph, through the class that transformers loads an export with, and the proof that ONNX
Runtime computes the same."""

import importlib.util
import json
import logging
import math
import re
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from d2v_scale.checkpoint import Checkpoint
from d2v_scale.errors import UserError
from d2v_scale.files import open_as_usual
from d2v_scale.interop import export_check
from d2v_scale.interop.encoder_source import EXPORT_FILE
from d2v_scale.interop.exporting import Weights, export_huggingface
from d2v_scale.interop.huggingface import row_of
from d2v_scale.interop.model_card import ONNX_FILE
from d2v_scale.interop.remote_code import modelling_files
from d2v_scale.interop.task_heads import auto_class
from d2v_scale.interop.weight_files import write_json
from d2v_scale.recipe import Recipe

DATA_FILE = "model.onnx.data"
"""Beside it, where one file cannot hold the weights."""
PACKAGES = ("onnx", "onnxruntime", "onnxscript")
FIRST_OPSET = 18
"""The lowest that torch.onnx writes."""
_FEWEST_HALVED = 128
_FILE_BYTES = 2_000_000_000
"""A protobuf message holds less than 2^31 bytes; what is left is the graph's."""


def require_packages() -> None:
    """Raises UserError where what this format needs is not installed."""
    lacking = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if lacking:
        raise UserError(f"--to onnx needs {', '.join(lacking)}.", f"Run `pip install {' '.join(PACKAGES)}`.")


class _Called(nn.Module):
    """A model of transformers as a function of tensors in order."""

    def __init__(self, model: nn.Module, names: list[str], output: str) -> None:
        super().__init__()
        self.model = model
        self.names = names
        self.output = output

    def forward(self, *values: Tensor) -> Tensor:
        """The one output that is wanted."""
        output = self.model(**dict(zip(self.names, values, strict=True)))
        found: Tensor = getattr(output, self.output)
        return found


def export_onnx(
    checkpoint: Checkpoint,
    recipe: Recipe,
    modality: str,
    out: Path,
    weights: Weights,
    tokenizer: Path | None,
    opset: int = FIRST_OPSET,
    half: bool = False,
) -> list[str]:
    """Write model.onnx and what prepares its inputs, once ONNX Runtime has computed with it what torch does. Batches,
    and lengths of recordings and texts, may be of any size. Returns lines that say what was written.

    Raises CheckpointError for what transformers has no class for, and UserError, which names the operator, where the
    opset lacks one, and where the two differ; nothing is written then.
    """
    require_packages()
    if next(out.glob("*.safetensors"), None) is not None:
        raise UserError(f"{out} holds weights of another export.", "Give a folder of its own.")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as staged:
        folder = Path(staged) / "model"
        lines = export_huggingface(checkpoint, recipe, modality, folder, weights, tokenizer, half)
        pairs = export_check.exported_pairs(checkpoint, recipe.task, folder, modality, weights)
        ours, limit = export_check.largest(pairs, relative=half), export_check.limit_of(half)
        if not ours <= limit:
            raise UserError(f"The exported model differs from ours by {ours:.3g} on the same input ({limit:g} may be).")
        called, inputs, free = _loaded(folder, recipe, modality)
        unused = [*folder.glob("*.safetensors*"), *modelling_files(recipe.model, modality), folder / EXPORT_FILE]
        for file in unused:
            (folder / file.name).unlink(missing_ok=True)
        settings = json.loads((folder / "config.json").read_text())
        settings.pop("auto_map", None)  # of classes that are not here
        write_json(folder / "config.json", settings)
        note = {"recipe": recipe.name, "step": str(checkpoint.step), "weights": weights}
        _write_graph(called, inputs, free, folder / ONNX_FILE, opset, note, half)
        difference = largest_difference(called, _other_sizes(inputs, free), folder / ONNX_FILE)
        if not difference <= export_check.LARGEST_DIFFERENCE:
            raise UserError(f"ONNX Runtime differs from torch by {difference:.3g} on the same input.")
        out.mkdir(exist_ok=True)
        for old in (ONNX_FILE, DATA_FILE):
            (out / old).unlink(missing_ok=True)
        for file in sorted(folder.iterdir()):
            open_as_usual(file)
            file.rename(out / file.name)
    lines = [line for line in lines if "trust_remote_code" not in line and "AutoTokenizer" not in line]
    lines.append(f"{ONNX_FILE}, opset {opset}: {', '.join(called.names)} to {called.output}")
    relative = "relative " if half else ""
    lines.append(f"largest {relative}difference of torch's model to ours on the same input: {ours:.3g}")
    return [*lines, f"largest difference of ONNX Runtime to torch on the same input: {difference:.3g}"]


def _loaded(
    folder: Path, recipe: Recipe, modality: str
) -> tuple[_Called, dict[str, Tensor], dict[str, dict[int, Any]]]:
    """The model as transformers loads it, inputs of it, and of each input the axes that may have any size."""
    import transformers

    model, auto = recipe.model, auto_class(recipe.task, recipe.model, modality)
    loader = getattr(transformers, auto)
    # The attention that is made of matrix products; others are the same, and not every opset has them.
    loaded: Any = loader.from_pretrained(folder, trust_remote_code=True, attn_implementation="eager").eval().float()
    loaded.config.return_dict = True
    row, one = row_of(model, modality), model.of(modality)
    _, inputs = row.sample(one, modality)
    values = inputs[row.input_name]
    free = [axis for axis, size in enumerate(row.input_shape(one)) if size == -1]
    axes = {
        name: dict.fromkeys(free if value.shape == values.shape else (0,), torch.export.Dim.DYNAMIC)
        for name, value in inputs.items()
    }
    return _Called(loaded, list(inputs), "last_hidden_state" if auto == "AutoModel" else "logits"), inputs, axes


def _write_graph(
    called: _Called,
    inputs: dict[str, Tensor],
    free: dict[str, dict[int, Any]],
    file: Path,
    opset: int,
    note: dict[str, str],
    half: bool,
) -> None:
    """Raises UserError for an operator that there is no form of."""
    from onnx import defs

    if not 1 <= opset <= (highest := defs.onnx_opset_version()):
        raise UserError(f"There is no opset {opset} in the onnx that is installed.", f"Give at most {highest}.")
    try:
        with torch.no_grad(), _quiet():
            program = torch.onnx.export(
                called,
                tuple(inputs.values()),
                input_names=list(inputs),
                output_names=[called.output],
                dynamic_shapes={"values": tuple(free.values())},
                opset_version=opset,
                dynamo=True,
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:
        raise _lacking(error, opset) from error
    assert program is not None
    held = program.model.opset_imports[""]
    if held != opset:  # no form of some operator, and the graph stayed as it was
        named = ", ".join(_newer_operators(program.model, opset)) or "some operator"
        raise UserError(f"Opset {opset} has no form of {named} that this model needs.", f"Give --opset {held}.")
    program.model.producer_name = "d2v_scale"
    if half:
        _store_half(program.model)
    program.model.metadata_props.update({f"d2v_scale.{key}": value for key, value in note.items()})
    size = sum(v.const_value.nbytes for v in program.model.graph.initializers.values() if v.const_value is not None)
    program.save(file, external_data=size > _FILE_BYTES)


def _newer_operators(model: Any, opset: int) -> list[str]:
    """Operators of the graph that became what they are after this opset."""
    from onnx import defs

    held = model.opset_imports[""]
    used = {node.op_type for node in model.graph if node.domain in ("", "ai.onnx")}
    return sorted(name for name in used if defs.get_schema(name, held).since_version > opset)


def _store_half(model: Any) -> None:
    """Weights of the graph in float16, each with a cast to float32 behind it; in place. Small tensors stay: constants
    of operators are among them, which may lie beyond float16."""
    from onnxscript import ir

    for name, value in list(model.graph.initializers.items()):
        array = value.const_value.numpy()
        if array.dtype != np.float32 or array.size < _FEWEST_HALVED:
            continue
        stored = ir.Value(
            name=f"{name}_float16", const_value=ir.tensor(array.astype(np.float16), name=f"{name}_float16")
        )
        cast = ir.node("Cast", [stored], attributes={"to": ir.DataType.FLOAT})
        cast.outputs[0].name = f"{name}_float32"
        ir.convenience.replace_all_uses_with(value, cast.outputs[0])
        model.graph.initializers.pop(name)
        model.graph.register_initializer(stored)
        model.graph.insert_before(model.graph[0], cast)


def _other_sizes(inputs: dict[str, Tensor], free: dict[str, dict[int, Any]]) -> list[dict[str, Tensor]]:
    """The inputs; the last row alone; and three rows, shorter where lengths are free."""
    three = {name: torch.cat((value, value[:1])) for name, value in inputs.items()}
    for name, axes in free.items():
        if 1 in axes:
            three[name] = three[name][:, : 3 * inputs[name].shape[1] // 4]
    return [inputs, {name: value[-1:] for name, value in inputs.items()}, three]


@torch.no_grad()
def largest_difference(called: _Called, every: list[dict[str, Tensor]], file: Path) -> float:
    """Largest absolute difference between torch's outputs and those of ONNX Runtime on the CPU."""
    import onnxruntime

    try:
        session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    except Exception as error:
        raise UserError(f"ONNX Runtime does not run this model: {str(error).splitlines()[0]}") from error
    found = [0.0]
    for inputs in every:
        [theirs] = session.run(None, {name: value.numpy() for name, value in inputs.items()})
        found.append(float((called(*inputs.values()) - torch.from_numpy(theirs)).abs().max()))
    return math.nan if any(map(math.isnan, found)) else max(found)


def _lacking(error: Exception, opset: int) -> UserError:
    told = str(error)
    if found := re.search(r"op='([\w.:]+)'", told):
        return UserError(f"Opset {opset} has no form of the operator {found[1]}.", "Try a higher --opset.")
    return UserError(f"torch.onnx cannot write this model: {told.splitlines()[0]}")


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what torch.onnx says of packages that nothing here uses."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
