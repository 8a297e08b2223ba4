"""d2v_scale.shards.class_names"""

import pytest

from d2v_scale.errors import DataError
from d2v_scale.shards.class_names import agreed_classes


def test_the_longest_list_holds_where_the_others_begin_it() -> None:
    names = ["cat", "dog", "eel"]
    assert agreed_classes([("a", names[:2]), ("b", names), ("c", []), ("d", ["0", "1"])]) == names
    assert agreed_classes([("a", ["0", "1"]), ("b", [])]) == ["0", "1"]
    assert agreed_classes([]) == []


def test_sets_that_call_a_number_differently_are_both_named() -> None:
    with pytest.raises(DataError, match=r"Class 1 is 'eel' in b.json and 'dog' in a.json.*--classes"):
        agreed_classes([("a.json", ["cat", "dog", "eel"]), ("b.json", ["cat", "eel"])])
