"""One run in several processes: how they find each other, and how all of them leave when one is gone."""

import contextlib
import os
import sys
import threading
import traceback
from collections.abc import Iterator, Mapping

import jax

from transformer.config import ParallelConfig
from transformer.types import Interrupted, UserError

HEARTBEAT_SECONDS = 30
"""After so long without a sign of life, a process counts as gone, and the others end."""
EXIT_CODE = 3
"""Of a process that ends because another one is gone."""


def several_processes(environment: Mapping[str, str]) -> bool:
    """Whether the environment tells that this is one of several processes that `jax.distributed` can find.

    Example:
        >>> several_processes({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "2"}), several_processes({})
        (True, False)
    """
    counts = ("SLURM_NTASKS" if "SLURM_JOB_ID" in environment else "", "OMPI_COMM_WORLD_SIZE")
    return (
        any(environment.get(name, "1") not in ("", "1") for name in counts)
        or "," in environment.get("TPU_WORKER_HOSTNAMES", "")
        or "JAX_COORDINATOR_ADDRESS" in environment
    )


def start(config: ParallelConfig) -> bool:
    """Join the other processes of the run, if the config or the environment says that there are any; before JAX starts.

    Returns:
        Whether there are.

    Raises:
        UserError: they cannot meet. Where some have not come within `start_timeout`, the process ends, with the same message.
    """
    if not config.coordinator and not several_processes(os.environ):
        return False
    explicit = config.coordinator not in ("", "auto")
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    who = f"process {config.process_id}" if explicit and config.process_id >= 0 else "this process"
    missing = (
        f"All processes of the run must start within parallel.start_timeout={config.start_timeout} seconds; {who} of "
        f"{config.num_processes or 'those that the environment names'} did not meet the others at "
        f"{config.coordinator if explicit else 'the address that the environment names'}. Start the missing ones, and give "
        "each a process_id of its own."
    )
    # JAX would wait a little longer, and then end the process with a trace of its C++ side.
    watch = threading.Timer(config.start_timeout, _give_up, [missing])
    watch.daemon = True
    watch.start()
    try:
        jax.distributed.initialize(
            coordinator_address=config.coordinator if explicit else None,
            num_processes=config.num_processes or None,
            process_id=config.process_id if config.process_id >= 0 else None,
            initialization_timeout=config.start_timeout + 60,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
        )
    except Exception as error:
        raise UserError(f"{missing} What was said there: {error}") from error
    finally:
        watch.cancel()
    return True


def _give_up(message: str) -> None:
    print(f"error: {message}", file=sys.stderr, flush=True)
    os._exit(2)


@contextlib.contextmanager
def leaving() -> Iterator[None]:
    """End this process at once if the work inside fails, as it does when another process is gone; so others see it go.

    Python's ordinary end would wait for the others, and they for this one. A process that waits for the others in something
    else than an exchange, at the end of a checkpoint say, is ended by JAX, with JAX's message and SIGABRT, within
    `HEARTBEAT_SECONDS` and a little.
    """
    code = EXIT_CODE
    try:
        yield
        return
    except Interrupted as error:
        if error.agreed:  # The others leave too.
            raise
        code, message = error.exit_code, f"{error}"
    except UserError as error:
        code, message = 2, f"error: {error}"
    except jax.errors.JaxRuntimeError as error:
        message = (
            f"error: process {jax.process_index()} of {jax.process_count()} cannot go on: {str(error).splitlines()[0]}\n"
            "If another process is gone, or the network between them, start all again: the run goes on from its last "
            "checkpoint."
        )
    except BaseException:
        message = traceback.format_exc()
    sys.stdout.flush()
    print(message, file=sys.stderr, flush=True)
    os._exit(code)
