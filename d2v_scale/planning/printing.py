"""A plan as text, and the table of sizes by devices: `d2v plan`."""

import argparse
import contextlib
import io
import logging
import os

from d2v_scale import command_line, templates
from d2v_scale.errors import ConfigError
from d2v_scale.interop.teacher_model import adopt_teacher
from d2v_scale.planning import collectives, flops, hardware, stages, traffic
from d2v_scale.planning.collectives import SUMS
from d2v_scale.planning.costs import Costs
from d2v_scale.planning.job import ModelSizes, step_samples
from d2v_scale.planning.search import Cluster, Option, Search, describe, search
from d2v_scale.recipe import Recipe

GB = 1e9

# Students of the table: recipe, and the keys that make it another size.
TABLE_SIZES: dict[str, list[str]] = {
    "0.3B": ["--recipe=d2v2_vision_large"],
    "1B": ["--recipe=d2v2_vision_1b"],
    "7B": ["--recipe=d2v2_vision_7b"],
    "30B": [
        "--recipe=d2v2_vision_7b",
        *["--model.backbone.width=7168", "--model.backbone.heads=56", "--model.backbone.ffn=28672"],
        *["--model.backbone.depth=48", "--objective.target.top_k_layers=36"],
    ],
}
TABLE_NODES = (1, 8, 32, 128)
TABLE_BATCH = 1024


def workload(recipe: Recipe) -> list[str]:
    """What a sample and a step are."""
    lines = []
    for modality in recipe.sequences:
        lengths, cost = flops.lengths_of(recipe, modality), flops.cost_of(recipe, modality)
        parts = {"student": cost.student, "teacher": cost.teacher, "decoder": cost.decoder, "stem": cost.stem}
        lines += [
            f"{modality}: {lengths.positions} positions, {lengths.kept} kept, {lengths.masked:.0f} masked, "
            f"{lengths.clones} masks a sample",
            f"  FLOPs of a sample    {cost.total / 1e9:.1f} G: "
            + ", ".join(f"{name} {value / cost.total:.1%}" for name, value in parts.items()),
            f"  samples of a step    {step_samples(recipe, modality, lengths):.0f}",
        ]
    return lines


def row(option: Option) -> str:
    """One line of the list."""
    job, budget = option.job, option.budget
    micro = min(job.micro_batch(modality) for modality in job.costs)
    kept = "recomputed" if job.recipe.model.activation_checkpointing else "kept"
    missing = []
    if option.missing_device:
        missing.append(f"{option.missing_device / GB:.0f} GB of device memory")
    if option.missing_host:
        missing.append(f"{option.missing_host / GB:.0f} GB of host memory")
    bubble = max(time.bubble for time in option.times.values())
    return (
        f"{job.parallel.tensor:3d} {job.parallel.pipeline:3d} {job.data:5d}  {option.deepspeed_config:28s}"
        f"{micro:6.1f} {job.recipe.accumulation:5d}  {kept:11s} {job.recipe.teacher.placement:7s}"
        f"{budget.device_total / GB:9.1f} {budget.host_total / GB:8.1f} {bubble:7.1%} {option.seconds:8.3f}"
        + (f"  lacks {' and '.join(missing)}" if missing else "")
    )


HEADING = (
    " TP  PP    DP  DeepSpeed JSON              micro  acc.  activations teacher GB/device  GB host  bubble   step s"
)


def details(option: Option, cluster: Cluster) -> list[str]:
    """The best option in full."""
    job, budget = option.job, option.budget
    lines = ["start it with  " + " ".join(f"--{key} {str(value).lower()}" for key, value in describe(option).items())]
    for place, held in (("device", budget.device), ("host", budget.host)):
        shown = ", ".join(f"{name} {size / GB:.2f}" for name, size in held.items() if size)
        if shown:
            lines.append(f"  GB on each {place:6s}    {shown}")
    for step, time in option.times.items():
        sent = traffic.transfers(job, step, cluster.devices_per_node)
        calls = collectives.collectives(job)
        lines += [f"  {step}, each device and step:"]
        lines += [
            f"    {one.name:22s} {one.within / GB:9.3f} GB within the node, {one.between / GB:.3f} GB between nodes"
            + (f", {calls[one.name]} collectives" if one.name in calls else "")
            + (" (overlaps)" if one.hidden else "")
            for one in sent
        ]
        lines += [f"    {name:22s} {calls[name]} collectives of a few numbers" for name in calls if name == SUMS]
        lines.append(
            f"    estimated step         {time.total:.3f} s: products {time.products:.3f} s, issued in "
            f"{time.issuing:.3f} s, transfers {time.exposed:.3f} s and {time.hidden:.3f} s overlapping, "
            f"updates {time.update:.3f} s, host {time.host:.3f} s"
        )
        if job.parallel.pipeline > 1:
            even = stages.even_bubble(job.parallel.pipeline, job.recipe.accumulation)
            shares = ", ".join(f"{share:.1%}" for share in job.split.shares)
            lines.append(f"    bubble                 {time.bubble:.1%} ({even:.1%} if stages were equal: {shares})")
        for modality in job.steps[step]:
            rate = job.step_samples(modality) / time.total
            of_one = f" of {modality}" if len(job.steps[step]) > 1 else ""
            lines.append(
                f"    loader rate needed     {rate:.0f} samples/s{of_one}, {rate / cluster.nodes:.1f} on each node"
            )
        hours = time.total * job.recipe.optim.max_steps / 3600
        lines.append(f"    estimated run          {hours:.1f} h for {job.recipe.optim.max_steps} steps")
    return lines


def recommendation(found: Search, cluster: Cluster) -> list[str]:
    """What to start, and why if it is not the fastest."""
    chosen, fastest = found.recommended, found.fitting[0]
    lines = details(chosen, cluster)
    if chosen is not fastest:
        lines.insert(
            0,
            f"{chosen.deepspeed_config} rather than {fastest.deepspeed_config}: {chosen.seconds:.3f} and "
            f"{fastest.seconds:.3f} s are not told apart, and ZeRO-{chosen.job.stage} gathers no weights on the way",
        )
    return lines


def computed_in(recipe: Recipe, cluster: Cluster) -> str:
    """The precision that is planned with, and what it follows from."""
    measured, taken = cluster.costs.precision, recipe.resolved_precision(cluster.costs.precision)
    if recipe.precision != "auto":
        return f"computed in {taken}, as `precision` says" + (f"; times are {measured}'s" if taken != measured else "")
    said = f"computed in {taken}, as these figures are (`precision: auto`)"
    if cluster.device.name == "cpu" and taken == "fp32":
        said += "; a run on a CPU measures, and takes bf16 where that is faster: plan it with --precision bf16"
    return said


def report(recipe: Recipe, cluster: Cluster, shown: int) -> list[str]:
    """The plan as lines of text. Raises ConfigError where the recipe is refused however it is divided."""
    device = cluster.device
    sizes = ModelSizes.of(recipe)
    found = search(recipe, cluster, sizes, templates.folder("ds_configs"))
    if found.refused and not (found.fitting or found.too_large):
        place, reason = next(iter(found.refused.items()))
        key, _, said = reason.partition(": ")
        raise ConfigError(key, said, f"So it is with {place}; all {len(found.refused)} topologies are refused.")
    parameters = sum(one.numel for one in sizes.student)
    lines = [
        f"{recipe.name} ({parameters / 1e9:.2f} billion parameters) on {cluster.world_size} x {device.name}, "
        f"{device.memory_bytes / GB:.0f} GB",
        f"times are estimates: {cluster.costs.source}",
        computed_in(recipe, cluster),
        *workload(recipe),
        "",
        f"{len(found.fitting)} topologies fit, fastest first (estimated):",
    ]
    if found.fitting:
        lines += [HEADING, *(row(option) for option in found.fitting[:shown]), "", *recommendation(found, cluster)]
    if found.too_large:
        lines += ["", f"{len(found.too_large)} do not fit:", HEADING, *(row(one) for one in found.too_large[:shown])]
    if found.refused:
        lines += ["", f"{len(found.refused)} are refused, such as:"]
        reasons = {reason: place for place, reason in reversed(found.refused.items())}
        lines += [f"  {place}: {reason}" for reason, place in list(reasons.items())[-shown:]]
    return lines


def table(device: hardware.Hardware, costs: Costs) -> list[str]:
    """Markdown: the recommended way to train each size on each number of devices."""
    lines = [
        "| student | devices | TP x PP x DP | DeepSpeed | micro-batch x accumulation | GB a device | step, s "
        "| images/s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for size, arguments in TABLE_SIZES.items():
        recipe, _ = command_line.parse([*arguments, f"--global_batch_size={TABLE_BATCH}"])
        sizes = ModelSizes.of(recipe)
        for nodes in TABLE_NODES:
            cluster = Cluster(nodes=nodes, devices_per_node=8, device=device, costs=costs)
            found = search(recipe, cluster, sizes, templates.folder("ds_configs"))
            if not found.fitting:
                lines.append(f"| {size} | {cluster.world_size} | does not fit | | | | | |")
                continue
            chosen = found.recommended
            job = chosen.job
            kept = ", recomputed" if job.recipe.model.activation_checkpointing else ""
            host = ", teacher in host memory" if job.recipe.teacher.placement == "cpu" else ""
            lines.append(
                f"| {size} | {cluster.world_size} | {job.parallel.tensor} x {job.parallel.pipeline} x {job.data} | "
                f"`{chosen.deepspeed_config}`{kept}{host} | {job.micro_batch('vision'):.0f} x "
                f"{job.recipe.accumulation} | {chosen.budget.device_total / GB:.0f} | {chosen.seconds:.2f} | "
                f"{TABLE_BATCH / chosen.seconds:.0f} |"
            )
    return lines


def form_groups() -> None:
    """A world of one, which modules need to be described; quietly."""
    from d2v_scale.parallel import groups

    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    logging.disable(logging.WARNING)
    with contextlib.redirect_stdout(io.StringIO()):
        groups.single_process()


def lines_of(options: argparse.Namespace, keys: list[str], device: hardware.Hardware, costs: Costs) -> list[str]:
    """What the command line asks for. `keys`: further arguments, of the recipe. Raises ConfigError."""
    if options.table:
        form_groups()
        return table(device, costs)
    recipe, run_options = command_line.parse([f"--recipe={options.recipe}", *keys])
    if recipe.teacher.checkpoint is not None:
        adopt_teacher(recipe, run_options)
    precision = recipe.resolved_precision(costs.precision)
    if options.calibration is not None and precision != costs.precision:
        raise ConfigError(
            "precision",
            f"is {precision}, and the calibration is of {costs.precision}",
            f"Measure with --calibrate --precision {precision}, which replaces it.",
        )
    cluster = Cluster(nodes=options.nodes, devices_per_node=options.gpus, device=device, costs=costs)
    form_groups()
    return report(recipe, cluster, options.show)
