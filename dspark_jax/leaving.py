"""How one of several processes ends when it has failed."""

import os
import sys


def leave(code: int) -> int:
    """The exit code; where there are other processes, a failed one ends here.

    jax would make it wait for the others, which may be waiting for it.
    """
    jax = sys.modules.get("jax")
    if code and jax is not None and jax.distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code
