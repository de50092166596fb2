"""DSpark speculative decoding in JAX: the algorithm, as models and pure functions."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("dspark-jax")
except PackageNotFoundError:  # a checkout that was never installed
    __version__ = "0+checkout"

__all__ = ["__version__"]
