"""Process 0 of several listens on the address that it was given, and on no other interface."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import pytest

from transformer.config import ParallelConfig
from transformer.parallel import distributed
from transformer.parallel.distributed import bind_address

ROOT = pathlib.Path(__file__).parent.parent.parent
PROBE = """
import json, os, pathlib, sys, jax
from transformer.config import ParallelConfig
from transformer.parallel.distributed import start

def listening():
    links = [os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if os.path.islink(f"/proc/self/fd/{fd}")]
    lines = [line.split() for name in ("tcp", "tcp6") for line in open(f"/proc/self/net/{name}").readlines()[1:]]
    return [line[1].split(":") for line in lines if line[3] == "0A" and f"socket:[{line[9]}]" in links]

for address in sys.argv[1:]:
    start(ParallelConfig(coordinator=address, num_processes=1, process_id=0))
    print(json.dumps(listening()))
    jax.distributed.shutdown()
"""
LOOPBACK = {"0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000"}
ALL = {"00000000", "00000000000000000000000000000000"}


def free_port():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


@pytest.mark.skipif(not os.path.exists("/proc/net/tcp"), reason="reads /proc")
def test_it_listens_on_the_given_address_and_nowhere_else():
    hosts = ["127.0.0.1", "localhost", "0.0.0.0"]
    if bind_address("[::1]:1"):
        hosts.append("[::1]")
    addresses = [f"{host}:{free_port()}" for host in hosts]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    environment.pop("JAX_COORDINATOR_BIND_ADDRESS", None)
    command = [sys.executable, "-c", PROBE, *addresses]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=True)
    for address, line in zip(addresses, done.stdout.splitlines(), strict=True):
        found = json.loads(line)
        assert found, address
        for ip, port in found:
            assert ip in (ALL if address.startswith("0.0.0.0") else LOOPBACK), (address, ip)
            assert int(port, 16) == int(address.rpartition(":")[2])
    assert done.stderr.count("listens on all interfaces") == 1
    assert f"because {addresses[2]} is not an address of its own" in done.stderr


def resolved(*ips):
    """`socket.getaddrinfo` of a name with these addresses."""
    families = [socket.AF_INET6 if ":" in ip else socket.AF_INET for ip in ips]
    answer = [(f, socket.SOCK_STREAM, 6, "", (ip, 0)) for f, ip in zip(families, ips, strict=True)]
    return lambda host, port, type: answer


@pytest.mark.parametrize(
    ("host", "ips", "expected"),
    [
        ("192.0.2.7", ["192.0.2.7"], None),  # of documentation: no machine has it
        ("trainer", ["127.0.1.1"], None),  # what a machine calls itself, others reach elsewhere
        ("trainer", ["127.0.1.1", "192.0.2.7"], None),
        ("localhost", ["127.0.0.1"], "127.0.0.1:80"),
        ("127.0.0.1", ["127.0.0.1"], "127.0.0.1:80"),
        ("[::]", ["::"], None),
    ],
)
def test_an_address_of_this_machine_is_bound_to(host, ips, expected, monkeypatch):
    monkeypatch.setattr(distributed.socket, "getaddrinfo", resolved(*ips))
    assert bind_address(f"{host}:80") == expected


def test_a_name_that_cannot_be_looked_up_is_left_to_jax(monkeypatch):
    def fail(*arguments, **options):
        raise socket.gaierror("no such name")

    monkeypatch.setattr(distributed.socket, "getaddrinfo", fail)
    assert bind_address("nowhere:80") is None


@pytest.mark.parametrize("variable", ["SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "TPU_WORKER_ID"])
def test_process_0_alone_says_that_it_listens_everywhere(variable, monkeypatch, capsys):
    given = []
    monkeypatch.setattr(
        "transformer.parallel.distributed.jax.distributed.initialize", lambda **options: given.append(options)
    )
    monkeypatch.setattr("transformer.parallel.distributed.jax.config.update", lambda name, value: None)
    for number in ("1", "0"):
        monkeypatch.setenv(variable, number)
        distributed.start(ParallelConfig(coordinator="auto"))
    assert capsys.readouterr().err.count("because the environment names the address") == 1
    assert [options["coordinator_bind_address"] for options in given] == [None, None]
