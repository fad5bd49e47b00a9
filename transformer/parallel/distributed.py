"""One run in several processes: how they find each other, and how all of them leave when one is gone."""

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


def bind_address(coordinator: str) -> str | None:
    """`IP:PORT` that process 0 listens on, so that no other interface of its machine does.

    A name stands for the first of its addresses that is one of this machine; its loopback address is passed over (a machine often
    calls itself 127.0.1.1), except for `localhost`.

    Args:
        coordinator: `HOST:PORT`, an IPv6 address in brackets.

    Returns:
        None where HOST is not an address of this machine, or stands for all (`0.0.0.0`); then it listens on all interfaces.

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
            coordinator_bind_address=bound,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
        )
    except Exception as error:
        raise UserError(f"{missing} What was said there: {error}") from error
    finally:
        watch.cancel()
    return True


def _process_number(config: ParallelConfig) -> int:
    """This process's number as the config or the environment has it; -1 where neither does in a way known here."""
    names = ("SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "TPU_WORKER_ID")
    numbers = [str(config.process_id), *(os.environ.get(name, "") for name in names)]
    return next((int(number) for number in numbers if number.isdecimal()), -1)


def _give_up(message: str) -> None:
    print(f"error: {message}", file=sys.stderr, flush=True)
    os._exit(2)


@contextlib.contextmanager
def joined(config: ParallelConfig) -> Iterator[None]:
    """Within, this process is one of those that `start` finds, and leaves them as `leaving` says; or the only one."""
    with leaving() if start(config) else contextlib.nullcontext():
        yield


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
