"""What a recipe costs on a cluster, before a job is queued: FLOPs, and the rate the loader must keep up.

    python tools/plan.py --recipe d2v2_vision_huge14 --nodes 32 --gpus 8 --device h100

Nothing is allocated. The times are estimates from the peak of the device and the utilisation that `--mfu` assumes;
memory, traffic between devices and pipelines are not estimated.
"""

import argparse
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from d2v_scale import command_line  # noqa: E402
from d2v_scale.errors import ConfigError, UserError  # noqa: E402
from d2v_scale.planning import flops, hardware  # noqa: E402
from d2v_scale.recipe import Recipe  # noqa: E402


def samples_per_step(recipe: Recipe, lengths: flops.Lengths) -> float:
    """Samples of the longest length that make one optimizer step."""
    match recipe.batch_unit:
        case "seconds":
            return recipe.global_batch_size * flops.SAMPLE_RATE / lengths.inputs
        case "tokens":
            return recipe.global_batch_size / lengths.inputs
    return recipe.global_batch_size


def report(recipe: Recipe, devices: int, nodes: int, device: hardware.Hardware, assumed: float) -> list[str]:
    """The plan as lines of text."""
    lines = [f"{recipe.name} on {devices} x {device.name} ({device.bf16_flops / 1e12:.0f} TFLOP/s bf16 peak each)"]
    for modality in recipe.model.modalities:
        lengths = flops.lengths_of(recipe, modality)
        cost = flops.cost_of(recipe, modality)
        count = samples_per_step(recipe, lengths)
        if count < devices:
            shown = f"{recipe.global_batch_size} {recipe.batch_unit} are {count:.0f} samples of {modality}"
            raise ConfigError(
                "global_batch_size", f"{shown} a step, fewer than {devices} devices", "Take fewer devices."
            )
        seconds = cost.total * count / (devices * device.bf16_flops * assumed)
        parts = {"student": cost.student, "teacher": cost.teacher, "decoder": cost.decoder, "stem": cost.stem}
        hours = seconds * recipe.optim.max_steps / 3600
        lines += [
            f"{modality}: {lengths.positions} positions, {lengths.kept} kept, {lengths.masked:.0f} masked, "
            f"{lengths.clones} masks a sample",
            f"  FLOPs of a sample    {cost.total / 1e9:.1f} G: "
            + ", ".join(f"{name} {value / cost.total:.1%}" for name, value in parts.items()),
            f"  samples of a step    {count:.0f}, {count / devices:.2f} on each device",
            f"  estimated step       {seconds:.3f} s at an assumed utilisation of {assumed:.0%}",
            f"  loader rate needed   {count / seconds:.0f} samples/s, {count / seconds / nodes:.0f} on each node",
            f"  estimated run        {hours:.1f} h for {recipe.optim.max_steps} steps",
        ]
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", required=True, help="recipe of the package or a YAML file")
    parser.add_argument("--nodes", type=int, default=1, help="number of nodes")
    parser.add_argument("--gpus", type=int, default=8, help="devices on each node")
    parser.add_argument("--device", default="h100", help=f"one of {', '.join(hardware.PRESETS)}")
    parser.add_argument("--mfu", type=float, default=0.4, help="assumed utilisation of the peak, as a fraction")
    options = parser.parse_args()
    if options.nodes < 1 or options.gpus < 1 or not 0 < options.mfu <= 1:
        print("error: nodes and gpus start at 1, mfu is above 0 and at most 1", file=sys.stderr)
        return 2
    try:
        recipe, _ = command_line.parse([f"--recipe={options.recipe}"])
        device = hardware.preset(options.device)
        print("\n".join(report(recipe, options.nodes * options.gpus, options.nodes, device, options.mfu)))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
