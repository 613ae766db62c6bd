"""Property tests of the deployments are the same in every run, and no slow machine fails them."""

from hypothesis import settings

settings.register_profile("deployments", deadline=None, derandomize=True, database=None)
settings.load_profile("deployments")
