"""One run in several processes: how they connect, and how all of them stop when one is gone."""

import contextlib
import ipaddress
import os
import socket
import sys
import threading
import traceback
from collections.abc import Iterator, Mapping

import jax

from transformer.config import ParallelConfig
from transformer.types import Interrupted, UserError

HEARTBEAT_SECONDS = 30
"""A process without a heartbeat for this long counts as gone, and the others stop."""
EXIT_CODE = 3
"""Exit code of a process that stops because another one is gone."""


def several_processes(environment: Mapping[str, str]) -> bool:
    """Whether the environment describes one of several processes that `jax.distributed` can connect.

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


def bind_address(coordinator: str) -> str | None:
    """The `IP:PORT` on which process 0 listens; its machine's other interfaces stay closed.

    A host name stands for its first address on this machine. Its loopback address is skipped, except for `localhost`: a machine
    often resolves its own name to 127.0.1.1.

    Args:
        coordinator: `HOST:PORT`, an IPv6 address in brackets.

    Returns:
        None if HOST is not an address of this machine, or means all (`0.0.0.0`); process 0 then listens on all interfaces.

    Example:
        >>> bind_address("127.0.0.1:1234"), bind_address("192.0.2.1:1234")
        ('127.0.0.1:1234', None)
    """
    host, _, port = coordinator.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return None
    for family, *_, address in found:
        ip = ipaddress.ip_address(address[0])
        named = str(ip) != host and host != "localhost"
        if ip.is_unspecified or (ip.is_loopback and named):
            continue
        with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.bind(address)
            return f"[{ip}]:{port}" if ip.version == 6 else f"{ip}:{port}"
    return None


def start(config: ParallelConfig) -> bool:
    """Join the other processes of the run, if the config or the environment names any; call it before JAX starts.

    Returns:
        Whether there are other processes.

    Raises:
        UserError: the processes cannot connect. After `start_timeout`, this process exits with the same message.
    """
    if not config.coordinator and not several_processes(os.environ):
        return False
    explicit = config.coordinator not in ("", "auto")
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    address = config.coordinator if explicit else os.environ.get("JAX_COORDINATOR_ADDRESS", "")
    bound = os.environ.get("JAX_COORDINATOR_BIND_ADDRESS") or bind_address(address)
    if bound is None and _process_number(config) == 0:
        reason = f"{address} is not an address of its own" if address else "the environment names the address"
        print(
            f"note: process 0 listens on all interfaces of its machine, because {reason}. Whoever reaches the port can take part "
            "in the run (docs/scaling.md).",
            file=sys.stderr,
            flush=True,
        )
    who = f"process {config.process_id}" if explicit and config.process_id >= 0 else "this process"
    missing = (
        f"All processes of the run must start within parallel.start_timeout={config.start_timeout} seconds; {who} of "
        f"{config.num_processes or 'those that the environment names'} did not meet the others at "
        f"{config.coordinator if explicit else 'the address that the environment names'}. Start the missing ones, and give "
        "each a process_id of its own."
    )
    # JAX would wait a little longer, and then abort the process with a C++ stack trace.
    watch = threading.Timer(config.start_timeout, _give_up, [missing])
    watch.daemon = True
    watch.start()
    try:
        jax.distributed.initialize(
            coordinator_address=config.coordinator if explicit else None,
            num_processes=config.num_processes or None,
            process_id=config.process_id if config.process_id >= 0 else None,
            initialization_timeout=config.start_timeout + 60,
            coordinator_bind_address=bound,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
        )
    except Exception as error:
        raise UserError(f"{missing} What was said there: {error}") from error
    finally:
        watch.cancel()
    return True


def _process_number(config: ParallelConfig) -> int:
    """This process's number in the config or the environment; -1 if neither has it in a known form."""
    names = ("SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "TPU_WORKER_ID")
    numbers = [str(config.process_id), *(os.environ.get(name, "") for name in names)]
    return next((int(number) for number in numbers if number.isdecimal()), -1)


def _give_up(message: str) -> None:
    print(f"error: {message}", file=sys.stderr, flush=True)
    os._exit(2)


@contextlib.contextmanager
def joined(config: ParallelConfig) -> Iterator[None]:
    """In this context, the process is connected to the others that `start` finds, and leaves as in `leaving`."""
    with leaving() if start(config) else contextlib.nullcontext():
        yield


@contextlib.contextmanager
def leaving() -> Iterator[None]:
    """End this process at once if the block fails, for example because another process is gone; the others then notice.

    Python's ordinary exit would wait for the others, and they for this one. A process that waits outside a collective operation
    (at the end of a checkpoint, say) is ended by JAX, with JAX's message and SIGABRT, shortly after `HEARTBEAT_SECONDS`.
    """
    code = EXIT_CODE
    try:
        yield
        return
    except Interrupted as error:
        if error.agreed:  # The other processes stop too.
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
