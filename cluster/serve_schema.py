"""Checks a Serve config against Ray Serve's own schema, with unknown keys refused at every level.

Ray's models ignore unknown keys so that old versions accept new configs; a misspelt option would silently
keep its default.
"""

import types
import typing
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel, ValidationError

from cluster.documents import flatten
from cluster.object_schema import join_path

Problem = tuple[str, str]
_Path = tuple[str | int, ...]


def check_serve_config(config: object) -> list[Problem]:
    """Every fault of a Serve config file's parsed content, as (path, sentence)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Ray's own use of pydantic, at its first import
        from ray.serve.schema import ServeDeploySchema

    problems = dict(_unknown_keys(config, ServeDeploySchema, ()))
    for path, sentence in _validation_errors(config, ServeDeploySchema, ()):
        problems.setdefault(path, sentence)
    return [(join_path(path), sentence) for path, sentence in problems.items()]


def _validation_errors(value: object, model: type[BaseModel], path: _Path) -> Iterator[tuple[_Path, str]]:
    try:
        model.model_validate(value)
    except ValidationError as error:
        for detail in error.errors(include_url=False, include_context=False):
            yield (*path, *detail["loc"]), flatten(ValueError(detail["msg"]))


def _unknown_keys(value: object, annotation: Any, path: _Path) -> Iterator[tuple[_Path, str]]:
    """Walk `value` beside the type that pydantic gives it."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        if isinstance(value, Mapping):
            yield from _unknown_keys_of_model(value, annotation, path)
        return
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in {typing.Union, types.UnionType}:
        yield from _unknown_keys_of_union(value, arguments, path)
    elif origin is typing.Annotated:
        yield from _unknown_keys(value, arguments[0], path)
    elif origin is list and arguments and isinstance(value, list):
        for index, item in enumerate(value):
            yield from _unknown_keys(item, arguments[0], (*path, index))
    elif origin is dict and arguments and isinstance(value, Mapping):
        for key, item in value.items():
            yield from _unknown_keys(item, arguments[1], (*path, str(key)))


def _unknown_keys_of_model(
    value: Mapping[Any, object], model: type[BaseModel], path: _Path
) -> Iterator[tuple[_Path, str]]:
    fields = {
        key: field
        for name, field in model.model_fields.items()
        for key in {name, field.alias or name}  # Serve's models take either
    }
    for key, item in value.items():
        if key not in fields:
            yield (*path, str(key)), f"is a key that Ray Serve's {model.__name__} does not know"
        elif key == "runtime_env":
            yield from _unknown_runtime_env_keys(item, (*path, key))
        else:
            yield from _unknown_keys(item, fields[key].annotation, (*path, key))


def _unknown_keys_of_union(value: object, members: tuple[Any, ...], path: _Path) -> Iterator[tuple[_Path, str]]:
    models = [member for member in members if isinstance(member, type) and issubclass(member, BaseModel)]
    if isinstance(value, Mapping) and models:
        # Serve lets a plain dict through where it will build the model only later: check it now.
        problems = [
            dict([*_validation_errors(value, model, path), *_unknown_keys(value, model, path)]) for model in models
        ]
        yield from min(problems, key=len).items()
        return
    for member in members:
        yield from _unknown_keys(value, member, path)


def _unknown_runtime_env_keys(value: object, path: _Path) -> Iterator[tuple[_Path, str]]:
    from ray.runtime_env import RuntimeEnv

    if isinstance(value, Mapping):
        for key in value:
            if key not in RuntimeEnv.known_fields:
                yield (*path, str(key)), "is a key that Ray's runtime_env does not know"
