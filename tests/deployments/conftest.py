"""Imports Ray Serve once, before warnings become errors, and makes property tests the same in every run."""

import warnings

from hypothesis import settings

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Serve's own modules use deprecated parts of pydantic
    import ray.serve  # noqa: F401

settings.register_profile("deployments", deadline=None, derandomize=True, database=None)
settings.load_profile("deployments")
