"""The recipes of launch/: their fields exist, their scripts run with stand-ins for programs, and our commands in them parse."""

import json
import math
import pathlib
import re
import subprocess
import sys

import pytest
import yaml

from transformer.cli.arguments import parse_config
from transformer.config import Config
from transformer.parallel.distributed import several_processes

LAUNCH = pathlib.Path(__file__).parent.parent / "launch"
# The fields that the API's own types have (JobSet v1alpha2: jobset_types.go; batch/v1; core/v1: only fields in use here).
JOBSET = {
    "": {"apiVersion", "kind", "metadata", "spec"},
    "spec": {
        "replicatedJobs", "network", "successPolicy", "failurePolicy", "startupPolicy", "suspend", "coordinator", "managedBy",
        "ttlSecondsAfterFinished", "volumeClaimPolicies",
    },
    "spec.failurePolicy": {"maxRestarts", "restartStrategy", "rules"},
    "spec.replicatedJobs": {"name", "groupName", "template", "replicas", "dependsOn"},
    "spec.replicatedJobs.template": {"metadata", "spec"},
    "spec.replicatedJobs.template.spec": {
        "parallelism", "completions", "completionMode", "backoffLimit", "activeDeadlineSeconds", "podFailurePolicy", "suspend",
        "template", "ttlSecondsAfterFinished",
    },
    "spec.replicatedJobs.template.spec.template": {"metadata", "spec"},
    "spec.replicatedJobs.template.spec.template.spec": {
        "containers", "initContainers", "nodeSelector", "restartPolicy", "terminationGracePeriodSeconds", "tolerations",
        "volumes", "serviceAccountName", "hostNetwork", "dnsPolicy", "priorityClassName",
    },
    "spec.replicatedJobs.template.spec.template.spec.containers": {
        "name", "image", "command", "args", "env", "resources", "ports", "volumeMounts", "securityContext", "workingDir",
    },
    "spec.replicatedJobs.template.spec.template.spec.containers.env": {"name", "value", "valueFrom"},
    "spec.replicatedJobs.template.spec.template.spec.containers.resources": {"limits", "requests"},
}  # fmt: skip
# SkyPilot's YAML specification.
SKYPILOT = {
    "": {"name", "workdir", "num_nodes", "resources", "envs", "secrets", "volumes", "file_mounts", "setup", "run", "config"},
    "resources": {
        "infra", "accelerators", "accelerator_args", "cpus", "memory", "instance_type", "use_spot", "disk_size", "disk_tier",
        "network_tier", "max_hourly_cost", "image_id", "ports", "labels", "autostop", "any_of", "ordered", "job_recovery",
    },
}  # fmt: skip
# sbatch's manual, long options.
SBATCH = {
    "job-name", "nodes", "ntasks", "ntasks-per-node", "gpus-per-node", "cpus-per-task", "time", "signal", "requeue", "open-mode",
    "output", "error", "partition", "account", "exclusive", "array",
}  # fmt: skip
PROGRAM = f"""#!{sys.executable}
import json, os, sys
with open(os.environ["CALLS"], "a") as file:
    print(json.dumps([os.path.basename(sys.argv[0]), *sys.argv[1:]]), file=file)
words = sys.argv[1:]
while words and words[0].startswith("-"):
    del words[0]
if os.path.basename(sys.argv[0]) == "srun":
    os.execvp(words[0], words)
"""


def unknown(values, fields, path=""):
    """Fields that are not in a table; a place that the table does not have is free."""
    if isinstance(values, list):
        return [name for part in values for name in unknown(part, fields, path)]
    if not isinstance(values, dict) or path not in fields:
        return []
    found = [f"{path}.{name}".strip(".") for name in values if name not in fields[path]]
    return found + [x for name, part in values.items() for x in unknown(part, fields, f"{path}.{name}".strip("."))]


@pytest.fixture
def run(tmp_path):
    """Run a script where `transformer`, `srun`, `python3` and `pip` only note how they were called; a list of the calls."""
    (tmp_path / "bin").mkdir()
    for folder, name in (("bin", "transformer"), ("bin", "srun"), ("bin", "python3"), ("venv/bin", "pip")):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        (tmp_path / folder / name).write_text(PROGRAM)
        (tmp_path / folder / name).chmod(0o755)
    (tmp_path / "venv/bin/activate").write_text("")

    def start(command, **variables):
        calls = tmp_path / "calls"
        calls.write_text("")
        environment = {
            "PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin",
            "HOME": str(tmp_path),
            "CALLS": str(calls),
            **variables,
        }
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=60)
        assert done.returncode == 0, done.stderr
        return [json.loads(line) for line in calls.read_text().splitlines()]

    return start


def config_of(calls):
    """The config of the one call of `transformer train`, as that reads it."""
    (words,) = [call for call in calls if call[0] == "transformer"]
    assert words[1] == "train"
    return parse_config(words[2:], command="transformer train")


def check_fits(config: Config, devices):
    """The rows of a micro-batch are shared among all devices evenly."""
    assert (config.data.batch_size // config.optimizer.accumulate_steps) % devices == 0
    fixed = math.prod(size for size in config.parallel.sizes.values() if size > 0)
    assert devices % fixed == 0 and (-1 in config.parallel.sizes.values() or fixed == devices)


def test_slurm(run):
    script = LAUNCH / "slurm.sh"
    lines = script.read_text().splitlines()
    assert lines[0].startswith("#!") and subprocess.run(["bash", "-n", script], check=False).returncode == 0
    last = max(number for number, line in enumerate(lines) if line.startswith("#SBATCH"))
    # sbatch reads no directive behind the first line that is neither a comment nor empty.
    assert all(line.startswith("#") for line in lines[: last + 1])
    given = dict(re.findall(r"^#SBATCH --([a-z-]+)(?:=(\S+))?$", script.read_text(), re.MULTILINE))
    assert len(given) == sum(line.startswith("#SBATCH") for line in lines) and set(given) <= SBATCH
    # JAX takes the one GPU that has the number of the task on its node.
    assert given["ntasks-per-node"] == given["gpus-per-node"]
    tasks = int(given["nodes"]) * int(given["ntasks-per-node"])
    assert several_processes({"SLURM_JOB_ID": "1", "SLURM_NTASKS": str(tasks)})
    calls = run(["bash", script])
    assert [call[0] for call in calls] == ["srun", "transformer"]
    config = config_of(calls)
    assert config.workdir.endswith("/runs/llama_1b") and config.parallel.coordinator == ""
    check_fits(config, tasks)


def test_gke(run):
    task = yaml.safe_load((LAUNCH / "gke.yaml").read_text())
    assert (task["apiVersion"], task["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert unknown(task, JOBSET) == []
    (job,) = task["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    chips = math.prod(map(int, pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")))
    assert chips == spec["parallelism"] * container["resources"]["limits"]["google.com/tpu"]
    assert spec["completions"] == spec["parallelism"] and pod["restartPolicy"] in ("Never", "OnFailure")
    hosts = ",".join(f"host-{number}" for number in range(spec["parallelism"]))
    assert several_processes({"TPU_WORKER_HOSTNAMES": hosts})
    calls = run(container["command"], **{pair["name"]: pair["value"] for pair in container["env"]})
    config = config_of(calls)
    assert config.workdir == "gs://BUCKET/runs/llama_1b" and config.parallel.dcn == job["replicas"]
    check_fits(config, chips * job["replicas"])


def test_skypilot(run):
    task = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
    assert unknown(task, SKYPILOT) == []
    ((_, gpus),) = re.findall(r"^([A-Z]\w*):(\d+)$", task["resources"]["accelerators"])
    nodes = task["num_nodes"]
    assert run(["bash", "-c", task["setup"]])[-1] == ["pip", "install", "--quiet", ".[cuda12]"]
    ips = "\n".join(f"10.0.0.{number + 1}" for number in range(nodes))
    for rank in range(nodes):
        variables = {"SKYPILOT_NODE_IPS": ips, "SKYPILOT_NUM_NODES": str(nodes), "SKYPILOT_NODE_RANK": str(rank)}
        config = config_of(run(["bash", "-c", task["run"]], **task["envs"], **variables))
        parallel = config.parallel
        assert (parallel.coordinator, parallel.num_processes, parallel.process_id) == ("10.0.0.1:8476", nodes, rank)
        check_fits(config, nodes * int(gpus))


@pytest.mark.parametrize(("values", "found"), [({"spec": {"replicas": 1}}, ["spec.replicas"]), ({"kind": ""}, [])])
def test_unknown_fields_are_seen(values, found):
    assert unknown(values, JOBSET) == found
