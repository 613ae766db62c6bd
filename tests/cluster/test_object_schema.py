"""A CRD's schema becomes a closed one, and nothing in it goes unchecked without a word."""

import pytest
from jsonschema import Draft202012Validator

from cluster.object_schema import CrdError, close
from cluster.serve_schema import check_serve_config


def accepts(schema: dict[str, object], value: object) -> bool:
    return Draft202012Validator(close(schema)).is_valid(value)


OBJECT: dict[str, object] = {"type": "object", "properties": {"a": {"type": "integer", "format": "int32"}}}


def test_object_with_properties_is_closed() -> None:
    assert accepts(OBJECT, {"a": 1})
    assert not accepts(OBJECT, {"a": 1, "b": 2})


def test_object_without_properties_is_closed_as_the_api_server_would_prune_it() -> None:
    assert not accepts({"type": "object"}, {"a": 1})


def test_object_that_preserves_unknown_fields_stays_open() -> None:
    assert accepts(OBJECT | {"x-kubernetes-preserve-unknown-fields": True}, {"b": 2})
    assert accepts(OBJECT | {"additionalProperties": True}, {"b": 2})


def test_map_checks_its_values() -> None:
    schema: dict[str, object] = {"type": "object", "additionalProperties": OBJECT}
    assert accepts(schema, {"x": {"a": 1}})
    assert not accepts(schema, {"x": {"b": 1}})


def test_list_checks_its_items() -> None:
    assert not accepts({"type": "array", "items": OBJECT}, [{"b": 1}])


def test_int_or_string_takes_both_and_nothing_else() -> None:
    schema: dict[str, object] = {
        "anyOf": [{"type": "integer"}, {"type": "string"}],
        "x-kubernetes-int-or-string": True,
        "pattern": "^[0-9]+%?$",
    }
    assert accepts(schema, 3)
    assert accepts(schema, "30%")
    assert not accepts(schema, "many")
    assert not accepts(schema, True)
    assert not accepts(schema, [3])


def test_nullable_takes_null() -> None:
    assert accepts({"type": "string", "nullable": True}, None)
    assert not accepts({"type": "string"}, None)


def test_unknown_keyword_is_refused() -> None:
    with pytest.raises(CrdError, match=r"/a uses the keyword 'dependentRequired'"):
        close({"type": "object", "properties": {"a": {"type": "object", "dependentRequired": {}}}})


@pytest.mark.parametrize("config", [None, [], "applications", 3, {"applications": "one"}])
def test_serve_config_of_the_wrong_shape_is_found(config: object) -> None:
    assert check_serve_config(config)
