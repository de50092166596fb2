"""Runs every test on eight fake CPU devices, and adds the option `--golden DIR`."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# XLA takes the last value of a repeated flag, so the user's other flags stay.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
).strip()

import atexit  # noqa: E402
import shutil  # noqa: E402
import tempfile  # noqa: E402
from pathlib import Path  # noqa: E402

import jax  # noqa: E402
import pytest  # noqa: E402

if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    # The real commands, each a process of its own, compile the same programs over and over.
    COMPILED = tempfile.mkdtemp(prefix="dspark-jax-compiled.")
    atexit.register(shutil.rmtree, COMPILED, ignore_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = COMPILED
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.3"


ASKED = os.environ.get("JAX_DISABLE_MOST_OPTIMIZATIONS")


@pytest.fixture(autouse=True, scope="module")
def compiled_quickly(request: pytest.FixtureRequest) -> None:
    """Tests compile far more than they run, which without optimising takes half the time.

    Not files marked `optimised`, nor any where JAX_DISABLE_MOST_OPTIMIZATIONS is 0. The commands
    that tests start compile as users do.
    """
    quickly = ASKED is None and request.node.get_closest_marker("optimised") is None
    if ASKED is None and quickly != jax.config.read("jax_disable_most_optimizations"):
        jax.config.update("jax_disable_most_optimizations", quickly)
        # What files share was compiled the other way, which jit does not look at.
        jax.clear_caches()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds `--golden DIR`: where the parity tests find their files."""
    parser.addoption(
        "--golden",
        type=Path,
        default=Path(__file__).parent / "golden",
        metavar="DIR",
        help="folder of golden files, laid out like tests/golden (the default)",
    )


@pytest.fixture(scope="session")
def golden(request: pytest.FixtureRequest) -> Path:
    """The folder of golden files."""
    folder = request.config.option.golden.resolve()
    if not folder.is_dir():
        pytest.exit(f"--golden {folder} is not a folder", returncode=pytest.ExitCode.USAGE_ERROR)
    return folder
