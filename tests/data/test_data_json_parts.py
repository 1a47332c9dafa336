"""Lists of a JSON object, one entry at a time, and the same faults as the whole."""

import json

import pytest

from ocvtp.data.json_parts import json_parts

GOOD = [
    '{}',
    ' { } \n',
    '{"a": []}',
    '{"a": [ ], "b" : 3}',
    '{"a":[1],"b":[{"a":[5]}],"c":{"a":[7]}}',
    '\n{ "x" : "]}" , "a"\t: [ 1 , {"y": [2]} , "three,]" , [4] ] , "b" : [null , true] }\r\n',
    '{"a": {"b": [1]}, "b": [2, -1.5e3, NaN]}',
]  # fmt: skip
BAD = [
    '', ' ', '{', '{"a"', '{"a":', '{"a": [', '{"a": [1', '{"a": [1,', '{"a": [1,]}',
    '{"a": [1 2]}',
    '{"a": [1]', '{"a": [1],}', '{"a" [1]}', '{"a": [1]} x', '{1: [2]}', '{"a": [1}', '{"b": 3, ]}',
    '{"a": [,1]}', '{,"a": 1}', '{"b": [1] "a": [2]}',
]  # fmt: skip


@pytest.mark.parametrize("text", GOOD)
def test_entries_are_those_of_the_whole(text):
    wanted = {name: v for name, v in json.loads(text).items() if isinstance(v, list)}
    found = {}
    for name, place, value in json_parts(text, ("a", "b")):
        if place:
            assert place == len(found[name]) + 1
            found[name].append(value)
        else:
            found[name] = []
    assert repr(found) == repr({name: wanted[name] for name in wanted if name in ("a", "b")})


@pytest.mark.parametrize("text", BAD)
def test_what_is_no_json_is_refused(text):
    with pytest.raises(ValueError):  # noqa: PT011  # its own words differ between versions
        json.loads(text)
    with pytest.raises(json.JSONDecodeError):
        list(json_parts(text, ("a", "b")))


@pytest.mark.parametrize("text", ["[]", "null", '"a"', " 3 "])
def test_what_is_no_object_is_told_apart(text):
    with pytest.raises(TypeError, match="in the place of an object"):
        list(json_parts(text, ("a",)))
