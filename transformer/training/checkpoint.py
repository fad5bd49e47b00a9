"""Checkpoints: written by Orbax in the background, completed by a manifest, and verified before use."""

import json
import logging
import math
import re
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from etils import epath
from jax.sharding import SingleDeviceSharding
from orbax.checkpoint import v1 as ocp

from transformer.config_io import from_json
from transformer.memory import check_bytes, device_bytes, host_memory
from transformer.storage import explained
from transformer.training import folders, manifest
from transformer.training.layout import stored_layout
from transformer.training.state import TrainState
from transformer.types import PyTree, UserError
from transformer.validation import require, typed

FORMAT = 3
"""Version of a checkpoint's files; other versions are refused."""
DESCRIPTION = "checkpoint.json"
_ARRAY = re.compile(
    r"(?P<dtype>bfloat16|float(16|32|64)|u?int(8|16|32|64))\[(?P<shape>(\d{1,18}(,\d{1,18})*)?)\]"
)  # the format of `describe`
_LEAST_IN_FLIGHT = 2**26
_log = logging.getLogger(__name__)
# Errors in Orbax's threads are raised by the save; a logged traceback of each thread would repeat them.
logging.getLogger("absl").addFilter(lambda record: "_SignalingThread.run() raised" not in record.getMessage())


class Restored(NamedTuple):
    """The content of a checkpoint."""

    step: int
    state: TrainState
    loop: dict[str, Any]
    """The `loop` argument of `Checkpointer.save`."""


class Checkpointer:
    """Saves and restores `DIRECTORY/STEP/`, keeping the latest ones and the best one.

    A step is written in a temporary folder: by Orbax, then the files of the run's record, a description, and a manifest. Then the
    folder is renamed. A kill at any moment therefore leaves either a complete checkpoint or none.

    Args:
        directory: the folder of the checkpoints; may be remote.
        keep: number of latest checkpoints kept, besides the one with the lowest validation loss.
        record: further files of each checkpoint, path -> content, which a model needs besides its arrays.
        report: receives a sentence about damage, for the user; by default a logged warning.
    """

    def __init__(
        self,
        directory: epath.PathLike,
        *,
        keep: int = 2,
        record: Mapping[str, bytes] | None = None,
        report: folders.Report = _log.warning,
    ) -> None:
        self._directory = folders.absolute(directory)
        self._keep = keep
        self._record = dict(record or {})
        self._report = report
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None

    def save(
        self, state: TrainState, loop: dict[str, Any], *, validation_loss: float | None = None, piecewise: bool = False
    ) -> None:
        """Start saving; returns when the state has been copied from the devices, and may be donated.

        Args:
            state: the state of one replica (`Runner.fetch_state`).
            loop: JSON-serializable data that the host needs to resume.
            validation_loss: measured at this very step, if it was evaluated.
            piecewise: save with little memory beyond the state's own, and not in the background; the state must not change.
        """
        self.wait()
        step = int(state.step)
        description = {
            "format": FORMAT,
            "step": step,
            "validation_loss": None if validation_loss is None or math.isnan(validation_loss) else validation_loss,
            "arrays": describe(state),
            "loop": loop,
        }
        text = json.dumps(description, indent=1)
        folders.require_plain(self._directory)
        path = folders.draft(self._directory, step)
        what = f"Checkpoint {self._directory / str(step)}"
        with explained(what), _saving(state, piecewise=piecewise):
            self._directory.mkdir(parents=True, exist_ok=True)
            if jax.process_index() == 0:
                folders.mark(self._directory, step)
            response = ocp.save_checkpointables_async(path, _to_parts(state))

        def commit() -> None:
            with explained(what):
                response.result()
                if jax.process_index() == 0:
                    for name, content in {**self._record, DESCRIPTION: text.encode()}.items():
                        (path / name).parent.mkdir(exist_ok=True)  # without parents: a removed folder is not made again
                        (path / name).write_bytes(content)
                    folders.commit(self._directory, step)
                    retire(self._directory, self._keep)

        self._pending = self._worker.submit(commit)

    def wait(self) -> None:
        """Wait until the last save is complete; raises errors of the background thread."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def check(self) -> None:
        """Raise the error of the last save, if it has ended; never waits."""
        if self._pending is not None and self._pending.done():
            self.wait()

    def close(self) -> None:
        """Complete the last save and stop."""
        try:
            self.wait()
        finally:
            self._worker.shutdown()

    def steps(self) -> list[int]:
        """Steps of the valid checkpoints in ascending order, judged without reading their files."""
        return folders.committed_steps(self._directory)

    def restore(self, target: TrainState) -> Restored | None:
        """The latest checkpoint whose files all match its manifest; None if there are no checkpoints.

        Args:
            target: a state of the same shapes, or their `jax.ShapeDtypeStruct`s; arrays are loaded with its shardings. The
            layers may be scanned in the checkpoint and looped in the target, or vice versa.

        Raises:
            UserError: all checkpoints are damaged, or the latest good one belongs to another model or optimizer.
        """
        path = folders.latest_undamaged(self._directory, self._report)
        if path is None:
            return None
        description, parts = _load(path, _to_parts(target), _by_field(target), of="the model and optimizer")
        return Restored(description["step"], _from_parts(parts, target), description["loop"])

    def clean(self, step: int) -> None:
        """Remove or set aside what conflicts with a run that starts from `step` (see `folders.clean`).

        Raises:
            UserError: a later folder may be part of a copied run.
        """
        if jax.process_index() == 0:
            folders.clean(self._directory, step, self._report)


def retire(directory: epath.PathLike, keep: int) -> None:
    """Remove checkpoints that are neither among the latest `keep` nor the best."""
    directory = folders.absolute(directory)
    steps = folders.committed_steps(directory)
    losses = {step: _validation_loss(directory / str(step)) for step in steps}
    best = min(steps, key=lambda step: losses[step], default=None)  # None if the folder has been removed
    for step in steps[:-keep]:
        if step != best or math.isinf(losses[step]):
            folders.discard(directory, step)


def _saving(state: Any, *, piecewise: bool) -> ocp.Context:
    """Orbax settings for saving: one part after another, or everything at once from a copy, so that the caller may change it."""
    context = ocp.Context()
    # A folder that cannot be created in the background blocks Orbax's thread, and the process, for minutes.
    context.asynchronous.create_directories_asynchronously = False
    if piecewise:
        context.memory.write_concurrent_bytes = context.memory.transfer_concurrent_bytes = _in_flight(state, 1)
    return context


def _loading(tree: Any) -> ocp.Context:
    """Orbax settings for loading, with few bytes beyond the arrays themselves."""
    context = ocp.Context()
    context.pytree.loading.partial_load = True  # stored arrays were already compared, by their description
    context.memory.read_concurrent_bytes = _in_flight(tree, 2)  # files in other chunks count with their full size
    return context


def _in_flight(tree: Any, largest: int) -> int:
    """The limit of bytes in flight: a multiple of the largest array."""
    sizes = [math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree)]
    return max(_LEAST_IN_FLIGHT, largest * max(sizes, default=0) + 2**20, sum(sizes) // 16)


def checked_step(step: int | str, name: str = "A step to load") -> int | str:
    """The step of a checkpoint to use: a number, `latest` or `best`; a string of digits is converted to a number.

    Raises:
        UserError: the step is none of these.
    """
    number = int(step) if str(step).isdecimal() else -1
    require(
        step in ("latest", "best") or number >= 0, f"{name} must be latest, best or the number of one, got {step!r}."
    )
    return step if step in ("latest", "best") else number


def find_checkpoint(directory: epath.PathLike, step: int | str = "latest") -> epath.Path | None:
    """The undamaged checkpoint of a step; None if there are no checkpoints.

    Args:
        directory: the folder of the checkpoints.
        step: its number; `best` for the lowest validation loss, among checkpoints whose step was evaluated; `latest` for the
            latest undamaged one.

    Raises:
        UserError: that checkpoint is damaged or missing, none was evaluated, or all are damaged.
    """
    directory, step = folders.absolute(directory), checked_step(step)
    asked = step
    steps = folders.committed_steps(directory)
    if step == "latest" or not steps:
        return folders.latest_undamaged(directory)
    kept = f"{directory} has {', '.join(map(str, steps))}"
    if step == "best":
        losses = {found: _validation_loss(directory / str(found)) for found in steps}
        step = min(steps, key=lambda found: losses[found])
        require(
            math.isfinite(losses[step]),
            f"The best checkpoint is one whose step was evaluated, but none of these was: {kept}. Use the latest, or train with "
            "a validation split and training.checkpoint_every a multiple of training.eval_every.",
        )
    require(step in steps, f"A step to load must have a checkpoint, step {step} has none: {kept}.")
    path = directory / str(step)
    try:
        manifest.verify_manifest(path)
    except FileNotFoundError:
        if path.exists():
            raise
        return find_checkpoint(directory, asked)  # the run, which is still training, has just removed it
    except manifest.DamagedError as error:
        raise UserError(f"A checkpoint to load must be undamaged. {path}: {error}. Use another: {kept}.") from error
    return path


def load_params(path: epath.Path, target: PyTree | None = None, *, some: bool = False) -> tuple[int, PyTree]:
    """Step and parameters of a checkpoint, known to be undamaged; the moving average if it has one.

    Args:
        path: its folder, as `find_checkpoint` gives it.
        target: parameters, or their `jax.ShapeDtypeStruct`s; arrays are loaded with their shardings, or to the first device
            without shardings. None loads the stored parameters to the host.
        some: read only the parts of the model in `target`.

    Raises:
        UserError: it is a checkpoint of another model, or its parameters exceed the host's memory.
    """
    field, stored = stored_params(path)
    if target is None:
        target = stored
        check_bytes(device_bytes(target), host_memory(), f"the parameters of {path}", "Start from a smaller model.")
        host = SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
        target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=host), target)
    within = tuple(f"{field}/{part}/" for part in target or ()) if some else (f"{field}/",)
    description, parts = _load(path, {field: target}, {field: target}, of="the model", within=within)
    return description["step"], parts[field]


def stored_params(path: epath.Path) -> tuple[str, PyTree]:
    """The field of the state that `load_params` reads, and the shapes and types of its arrays."""
    arrays: dict[str, str] = read_description(path)["arrays"]
    field = "ema_params" if any(n.startswith("ema_params/") for n in arrays) else "params"
    found = {n.removeprefix(f"{field}/"): text for n, text in arrays.items() if n.startswith(f"{field}/")}
    return field, _from_description(found, path / DESCRIPTION)


def _load(
    path: epath.Path, parts: dict[str, PyTree], fields: dict[str, PyTree], *, of: str, within: tuple[str, ...] = ("",)
) -> tuple[dict[str, Any], dict[str, PyTree]]:
    """A checkpoint's description and some of its parts; `fields` maps the parts to their names in the description."""
    parts = jax.tree.map(_abstract, parts)
    found: dict[str, str] = read_description(path)["arrays"]
    found = {name: text for name, text in found.items() if name.startswith(within)}
    layout = stored_layout(found, jax.tree.map(_abstract, fields), describe)
    description = _check_fit(path, describe(fields if layout is None else layout.stored(fields)), of=of, within=within)
    stored = parts if layout is None else layout.stored(parts)
    with _loading(stored):
        found_parts = ocp.load_checkpointables(path, stored)
    return description, found_parts if layout is None else layout.read(found_parts, parts)


def read_description(path: epath.Path) -> dict[str, Any]:
    """The description stored in a checkpoint.

    Raises:
        UserError: the checkpoint has another format.
    """
    stored = path / DESCRIPTION
    require(stored.exists(), f"A checkpoint must hold {DESCRIPTION}, {path} does not; put a copy back.")
    description: dict[str, Any] = from_json(dict[str, Any], stored.read_bytes(), stored)
    found = description.get("format", "none")
    require(
        found == FORMAT,
        f"A checkpoint must be of format {FORMAT}, {path} has {found}: it is of another version of this library; use that "
        "version, or train again in another workdir.",
    )
    for name, kind in (("step", int), ("arrays", dict[str, str]), ("loop", dict[str, Any])):
        typed(kind, description.get(name), f"{stored}: {name}")
    require(
        path.name == str(description["step"]),
        f"A checkpoint must be in the folder of its step, {path} is of step {description['step']}; rename the folder.",
    )
    return description


def _from_description(arrays: dict[str, str], file: epath.Path) -> PyTree:
    """The inverse of `describe`, for nested dictionaries; `file` is named in messages."""
    tree: dict[str, Any] = {}
    for name, text in arrays.items():
        *path, last = name.split("/")
        node = tree
        for part in path:
            node = node.setdefault(part, {})
            require(isinstance(node, dict), f"{file} must describe a tree, {name} is below another array.")
        match = _ARRAY.fullmatch(text)
        require(match is not None, f"{file} must give types and shapes, {name} has {text!r:.80}.")
        assert match is not None
        shape = tuple(map(int, filter(None, match["shape"].split(","))))
        node[last] = jax.ShapeDtypeStruct(shape, jnp.dtype(match["dtype"]))
    return tree


def _by_field(tree: Any) -> Any:
    return tree._replace(frozen=())._asdict() if isinstance(tree, TrainState) else tree


def describe(tree: PyTree) -> dict[str, str]:
    """The type and shape of every array by its path: `{"params/output/kernel": "float32[16,64]"}`."""
    tree = _by_field(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): f"{x.dtype}{list(x.shape)}".replace(" ", "")
        for path, x in jax.tree_util.tree_leaves_with_path(tree)
    }


def _check_fit(
    path: epath.Path, expected: dict[str, str], *, of: str, within: tuple[str, ...] = ("",)
) -> dict[str, Any]:
    """The checkpoint's description, if its arrays (with names that begin with one of `within`) match the expected ones."""
    description = read_description(path)
    found = {name: text for name, text in description["arrays"].items() if name.startswith(within)}
    names = [name for name in sorted(found | expected) if found.get(name) != expected.get(name)]
    if names:
        lines = [f"  {name}: {found.get(name, 'absent')} there, {expected.get(name, 'absent')} here" for name in names]
        rest = [f"  and {len(lines) - 10} more"] if len(lines) > 10 else []
        raise UserError(
            "\n".join([f"Checkpoint {path} must fit {of}, but differs in", *lines[:10], *rest])
            + "\nUse the configuration it was trained with, or another directory."
        )
    return description


def _validation_loss(path: epath.Path) -> float:
    """The stored validation loss; infinite if it was not measured or is unreadable."""
    try:
        loss = json.loads((path / DESCRIPTION).read_text())["validation_loss"]
        return math.inf if loss is None else float(loss)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return math.inf


def _to_parts(state: TrainState) -> dict[str, PyTree]:
    """A state as separately loadable parts, without empty ones, which Orbax refuses."""
    parts = {name: getattr(state, name) for name in ("params", "ema_params", "carry", "loss_scale", "spikes")}
    parts["rest"] = {"step": state.step, "opt_state": state.opt_state, "key": state.key}
    return {name: part for name, part in parts.items() if jax.tree.leaves(part)}


def _from_parts(parts: dict[str, PyTree], target: TrainState) -> TrainState:
    rest = parts["rest"]
    return target._replace(**{name: part for name, part in parts.items() if name != "rest"}, **rest)


def _abstract(x: Any) -> jax.ShapeDtypeStruct:
    # Without a sharding, Orbax would require the devices of the run that saved.
    sharding = getattr(x, "sharding", None) or SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
