"""Which node takes whose place."""

from hypothesis import given, settings
from hypothesis import strategies as st

from d2v_scale.agents.plan import replaced

NODES = tuple(f"n{number}" for number in range(1, 8))


def test_spares_take_the_places_of_excluded_nodes_in_their_order() -> None:
    assert replaced(NODES[:5], ("n1", "n2", "n3"), {"n2"}) == ("n1", "n4", "n3")
    assert replaced(NODES[:5], ("n1", "n2", "n3"), {"n1", "n3"}) == ("n4", "n2", "n5")
    assert replaced(NODES[:5], ("n1", "n2", "n3"), {"n2", "n4"}) == ("n1", "n5", "n3")
    assert replaced(NODES[:5], ("n1", "n2", "n3"), {"n2"}, unfit={"n4"}) == ("n1", "n5", "n3")
    assert replaced(NODES[:5], ("n1", "n2", "n3"), {"n1", "n2", "n3"}) is None
    assert replaced(NODES[:3], ("n1", "n2", "n3"), ()) == ("n1", "n2", "n3")


@settings(max_examples=200, deadline=None)
@given(world=st.integers(1, len(NODES)), struck=st.lists(st.sets(st.sampled_from(NODES), max_size=3), max_size=7))
def test_a_world_keeps_its_size_and_its_places_and_never_sees_an_excluded_node_again(
    world: int, struck: list[set[str]]
) -> None:
    active: tuple[str, ...] = NODES[:world]
    excluded: set[str] = set()
    for bad in struck:
        excluded |= bad
        follows = replaced(NODES, active, excluded)
        if follows is None:
            assert len(NODES) - len(excluded) < world
            return
        assert len(follows) == len({*follows}) == world
        assert not excluded & {*follows}
        assert all(old == new for old, new in zip(active, follows, strict=True) if old not in excluded)
        active = follows
