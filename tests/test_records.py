import json
from dataclasses import asdict, dataclass, field

import pytest

from ghostify import GhostifyError
from ghostify.records import from_json


@dataclass(frozen=True)
class Inner:
    names: tuple[str, ...]
    size: tuple[int, int] | None = None


@dataclass(frozen=True)
class Outer:
    count: int
    share: float
    inner: tuple[Inner, ...] = ()
    seconds: dict[str, float] = field(default_factory=dict)
    flag: bool = False


RECORD = Outer(3, 0.5, (Inner(("a", "b"), (1, 2)), Inner(())), {"fit": 1.5}, True)


def test_a_record_is_read_as_it_was_written():
    assert from_json(Outer, json.loads(json.dumps(asdict(RECORD))), "record") == RECORD
    assert from_json(Outer, {"count": 3, "share": 1}, "record") == Outer(3, 1)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"count": 1.5}, "record: count has another type than int"),
        ({"count": True}, "record: count has another type than int"),
        ({"share": "x"}, "record: share has another type than float"),
        ({"share": None}, "record: share has another type than float"),
        ({"flag": 1}, "record: flag has another type than bool"),
        ({"inner": {}}, "record: inner has another type"),
        ({"inner": [3]}, "record: inner: is not an object"),
        ({"inner": [{}]}, "record: inner: has no names"),
        ({"inner": [{"names": ["a"], "size": [1]}]}, "record: inner: size has another type"),
        ({"inner": [{"names": ["a\x1b[31m"]}]}, "record: inner: names has another type than str"),
        ({"seconds": {"fit": "1"}}, "record: seconds has another type than float"),
        ({"more": 1}, "record: has an unknown field 'more'"),
    ],
)
def test_other_values_are_refused(change, problem):
    with pytest.raises(GhostifyError, match=problem):
        from_json(Outer, {**asdict(RECORD), **change}, "record")


def test_a_record_that_is_no_object_is_refused():
    with pytest.raises(GhostifyError, match="record: is not an object"):
        from_json(Outer, [1], "record")
