"""What the search keeps, drops and prefers."""

import dataclasses
from pathlib import Path

import pytest

from d2v_scale import command_line
from d2v_scale.errors import ConfigError
from d2v_scale.planning import hardware, memory, printing
from d2v_scale.planning.costs import assumed
from d2v_scale.planning.job import ModelSizes
from d2v_scale.planning.search import Cluster, Option, Search, search

pytestmark = pytest.mark.usefixtures("world_of_one")

CONFIGS = Path(__file__).resolve().parents[2] / "ds_configs"


def found_for(name: str, nodes: int, device: hardware.Hardware = hardware.H100) -> tuple[Search, Cluster]:
    recipe = command_line.parse([f"--recipe={name}"])[0]
    cluster = Cluster(nodes=nodes, devices_per_node=8, device=device, costs=assumed(device, 0.4))
    return search(recipe, cluster, ModelSizes.of(recipe), CONFIGS), cluster


def test_options_that_fit_come_fastest_first_and_do_fit() -> None:
    found, cluster = found_for("d2v2_vision_huge14", 2)
    assert found.fitting
    seconds = [option.seconds for option in found.fitting]
    assert seconds == sorted(seconds)
    limit = cluster.device.memory_bytes * (1 - memory.RESERVED)
    assert all(option.budget.device_total <= limit for option in found.fitting)
    assert all(option.budget.device_total > limit for option in found.too_large if option.missing_device)


def test_a_small_device_leaves_fewer_options_and_says_what_is_missing() -> None:
    small = dataclasses.replace(hardware.A100, memory_bytes=12e9)
    found, _ = found_for("d2v2_vision_7b", 1, small)
    assert not [
        option for option in found.fitting if option.deepspeed_config == "zero1.json" and not option.missing_host
    ]
    assert all(option.missing_device > 0 or option.missing_host > 0 for option in found.too_large)
    missing = [option.missing_device + option.missing_host for option in found.too_large]
    assert missing == sorted(missing)


def test_what_the_program_would_refuse_is_refused_with_its_reason() -> None:
    recipe = command_line.parse(["--recipe=d2v2_vision_base"])[0]
    cluster = Cluster(nodes=1, devices_per_node=8, device=hardware.H100, costs=assumed(hardware.H100, 0.4))
    found = search(recipe, cluster, ModelSizes.of(recipe), CONFIGS)
    assert "8 does not divide the 12 heads" in found.refused["tensor 8, pipeline 1, zero1.json"]


def test_a_plan_says_in_which_precision_and_follows_one_that_is_given() -> None:
    """Of a CPU fp32 was assumed without a word, though a run there may take bf16."""
    costs = assumed(hardware.H100, 0.4)
    cpu = dataclasses.replace(hardware.H100, name="cpu")
    on_cpu = Cluster(
        nodes=1, devices_per_node=1, device=cpu, costs=dataclasses.replace(costs, precision="fp32", waits=True)
    )
    on_gpu = Cluster(nodes=1, devices_per_node=1, device=hardware.H100, costs=costs)
    recipe = command_line.parse(["--recipe=tiny2_vision"])[0]
    said = printing.report(recipe, on_cpu, 1)[2]
    assert said.startswith("computed in fp32, as these figures are (`precision: auto`); ")
    assert said.endswith("takes bf16 where that is faster: plan it with --precision bf16")
    assert "CPU" not in printing.computed_in(recipe, on_gpu)
    recipe.precision = "fp32"
    assert printing.computed_in(recipe, on_gpu) == "computed in fp32, as `precision` says; times are bf16's"
    found = search(recipe, on_gpu, ModelSizes.of(recipe), CONFIGS)
    assert {option.job.itemsize for option in found.fitting} == {4}


def test_a_batch_smaller_than_the_ranks_is_refused_with_the_numbers() -> None:
    found, _ = found_for("d2v2_speech_large", 32)
    assert (
        "960 seconds are 48 samples of the longest length a step, fewer than 256"
        in found.refused["tensor 1, pipeline 1, zero3.json"]
    )


def test_a_recipe_that_every_topology_refuses_is_refused() -> None:
    """The plan said "0 topologies fit" and ended with code 0."""
    recipe = command_line.parse(["--recipe=demo_vision", "--objective.masking.target_count=99"])[0]
    cluster = Cluster(nodes=1, devices_per_node=1, device=hardware.H100, costs=assumed(hardware.H100, 0.4))
    with pytest.raises(ConfigError, match=r"99 of 16 patches cannot be masked.*topologies are refused") as error:
        printing.report(recipe, cluster, 8)
    assert error.value.key == "objective.masking.target_count"


def test_a_step_of_all_sources_together_is_planned_as_one_step() -> None:
    """Of three sources: as many micro-batches of each, the work and the samples of all, and one update."""
    given = ["--recipe=tests/distributed/joint.yaml", "--data.mixing=together", "--accumulation=3"]
    cluster = Cluster(nodes=1, devices_per_node=2, device=hardware.H100, costs=assumed(hardware.H100, 0.4))
    together, apart = command_line.parse(given)[0], command_line.parse(given[:1])[0]
    sizes = ModelSizes.of(together)
    found = {
        option.job.recipe.data.mixing: option
        for one in (together, apart)
        for option in [
            next(
                o
                for o in search(one, cluster, sizes, CONFIGS).fitting
                if o.deepspeed_config == "zero1.json" and o.job.parallel.tensor == 1 and o.job.recipe.rounds == 1
            )
        ]
    }
    whole, single = found["together"], found["alternate"]
    [time] = whole.times.values()
    assert list(whole.times) == ["vision + speech + text"]
    assert time.compute == pytest.approx(sum(one.compute for one in single.times.values()))
    assert time.update == pytest.approx(single.times["vision"].update)
    assert whole.job.recipe.accumulation == 3 * single.job.recipe.accumulation
    assert whole.job.micro_batch("speech") == single.job.micro_batch("speech")
    assert whole.budget.device["activations"] == single.budget.device["activations"]
    assert any("samples/s of speech" in line for line in printing.details(whole, cluster))
    together.data.sources[1].batch_size, together.data.sources[1].batch_unit = 64, "seconds"
    assert "  samples of a step    64" in printing.workload(together)


def test_zero_1_is_recommended_where_it_fits_and_traffic_says_nothing_else() -> None:
    """ZeRO-3 was recommended everywhere: its gathers overlap, and what its host does was not counted."""
    found, cluster = found_for("d2v2_vision_huge14", 2)
    chosen = found.recommended
    assert chosen.job.stage < 3
    assert chosen.seconds <= 1.1 * found.fitting[0].seconds
    assert "start it with  --deepspeed_config ds_configs/zero" in "\n".join(printing.recommendation(found, cluster))
    third = next(one for one in found.fitting if one.job.stage == 3)

    def taking(seconds: float, option: Option) -> Option:
        [time] = option.times.values()
        only = dataclasses.replace(time, compute=seconds, bubble=0.0, hidden=0.0, exposed=0.0, update=0.0, host=0.0)
        return dataclasses.replace(option, times={"vision": only})

    slow, fast, near = taking(1.0, chosen), taking(0.8, third), taking(0.95, third)
    assert Search([fast, slow], [], {}).recommended is fast
    found = Search([near, slow], [], {})
    assert found.recommended is slow
    assert printing.recommendation(found, cluster)[0].startswith(f"{slow.deepspeed_config} rather than")
