"""Checkpoints: whole or not there, verified on load, kept by rule, read by other runners."""

import contextlib
import json
import math
import pathlib
import re
import shutil
import threading

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from transformer.training import checkpoint, folders, manifest
from transformer.training.checkpoint import FORMAT, Checkpointer, find_checkpoint, load_params
from transformer.training.folders import committed_steps, latest_undamaged
from transformer.training.state import create_state
from transformer.types import UserError

OPTIMIZER = optax.adam(0.1)
LOOP = {"batches": {"n": [1, 2], "text": "ä"}, "window": {"loss": 0.1 + 0.2, "weight": 1e300}}


def make_state(step=0, *, width=3, ema=True, carry=()):
    """A state whose every number says at which step it was made."""
    params = {"a": {"kernel": jnp.full((width, 2), float(step))}, "b": {"scale": jnp.full((2,), step + 0.5)}}
    state = create_state(params, OPTIMIZER, jax.random.key(step), carry=carry, ema=ema)
    return state._replace(step=jnp.int32(step))


def plain(state):
    """For comparing: keys as numbers."""
    return jax.tree.map(np.asarray, state._replace(key=jax.random.key_data(state.key)))


def save(directory, *steps, keep=10, losses=None):
    checkpointer = Checkpointer(directory, keep=keep)
    for step in steps:
        checkpointer.save(make_state(step), LOOP, validation_loss=(losses or {}).get(step))
    checkpointer.wait()
    return checkpointer


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory):
    directory = tmp_path_factory.mktemp("checkpoints")
    save(directory, 10, 20)
    return directory


@pytest.fixture
def directory(two_checkpoints, tmp_path):
    """Checkpoints of steps 10 and 20, to be damaged."""
    return pathlib.Path(shutil.copytree(two_checkpoints, tmp_path / "checkpoints"))


# ---- Save and restore ------------------------------------------------------------------------------------------------


def test_relative_directories_work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save("runs/new", 3)
    assert committed_steps("runs/new") == [3]
    assert load_params(find_checkpoint("runs/new"), make_state().ema_params)[0] == 3


@pytest.mark.parametrize("piecewise", [False, True])
def test_an_array_may_be_most_of_a_state(tmp_path, monkeypatch, piecewise):
    """What is on its way at a time has a limit, and the largest array passes it."""
    monkeypatch.setattr(checkpoint, "_LEAST_IN_FLIGHT", 1)
    state = make_state(3, width=2**18)
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save(state, LOOP, piecewise=piecewise)
    checkpointer.wait()
    step, params = load_params(find_checkpoint(tmp_path), state.ema_params)
    assert step == 3 and jax.tree.all(jax.tree.map(np.array_equal, params, state.ema_params))


@pytest.mark.parametrize("options", [{}, {"ema": False}, {"carry": {"memory": jnp.arange(4.0)}}], ids=str)
def test_everything_comes_back_to_the_bit(tmp_path, options):
    state = make_state(3, **options)
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save(state, LOOP)
    checkpointer.wait()
    step, restored, loop = checkpointer.restore(make_state(**options))
    assert step == 3
    assert loop == LOOP
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    jax.tree.map(np.testing.assert_array_equal, plain(restored), plain(state))


def test_no_checkpoint_is_none(tmp_path):
    assert Checkpointer(tmp_path / "nothing").restore(make_state()) is None
    assert latest_undamaged(tmp_path) is None


def test_arrays_may_be_donated_as_soon_as_save_returns(tmp_path):
    state = make_state(5)
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save(state, LOOP)
    jax.tree.map(lambda x: x.delete(), state)
    checkpointer.wait()
    restored = checkpointer.restore(make_state()).state
    jax.tree.map(np.testing.assert_array_equal, plain(restored), plain(make_state(5)))


def test_save_does_not_wait_for_the_disk(tmp_path, monkeypatch):
    """The manifest, written last, is held back; save has returned by then and the checkpoint does not count."""
    gate = threading.Event()
    write = manifest.write_manifest
    monkeypatch.setattr(manifest, "write_manifest", lambda path: (gate.wait(20), write(path)))
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save(make_state(5), LOOP)
    assert checkpointer.steps() == []
    gate.set()
    checkpointer.close()
    assert checkpointer.steps() == [5]


def test_trouble_in_the_background_is_raised(tmp_path, monkeypatch):
    def fail(path):
        raise OSError("disk full")

    monkeypatch.setattr(manifest, "write_manifest", fail)
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save(make_state(5), LOOP)
    with pytest.raises(UserError, match="disk full"):
        checkpointer.save(make_state(6), LOOP)
    assert checkpointer.steps() == []
    checkpointer.close()


def test_restores_the_latest(directory):
    assert Checkpointer(directory).restore(make_state()).step == 20


# ---- What does not fit -----------------------------------------------------------------------------------------------


def test_other_shapes_are_shown_as_a_difference(directory):
    with pytest.raises(UserError) as error:
        Checkpointer(directory).restore(make_state(width=4))
    text = str(error.value)
    assert "must fit the model and optimizer, but differs in" in text
    assert "params/a/kernel: float32[3,2] there, float32[4,2] here" in text
    assert "params/b" not in text
    assert "Use the configuration it was trained with" in text


def test_other_trees_are_shown_as_a_difference(directory):
    with pytest.raises(UserError, match=r"ema_params/a/kernel: float32\[3,2\] there, absent here"):
        Checkpointer(directory).restore(make_state(ema=False))


def test_a_long_difference_is_cut(directory):
    other = make_state()._replace(params={f"p{i}": jnp.ones(2) for i in range(30)})
    with pytest.raises(UserError, match=r"and \d+ more"):
        Checkpointer(directory).restore(other)


# ---- Parameters alone ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ema", [True, False])
def test_load_params_gives_the_average_if_there_is_one(tmp_path, ema):
    state = make_state(4, ema=ema)
    if ema:
        state = state._replace(ema_params=jax.tree.map(lambda x: x + 100, state.params))
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save(state, LOOP)
    checkpointer.wait()
    step, params = load_params(find_checkpoint(tmp_path), jax.eval_shape(lambda: make_state().params))
    assert step == 4
    jax.tree.map(np.testing.assert_array_equal, params, state.ema_params if ema else state.params)


def test_load_params_of_another_model(directory):
    with pytest.raises(UserError, match=r"ema_params/a/kernel: float32\[3,2\] there, float32\[7,2\] here"):
        load_params(find_checkpoint(directory), make_state(width=7).params)


# ---- Damage ----------------------------------------------------------------------------------------------------------


def files(directory):
    return sorted(str(p.relative_to(directory)) for p in directory.rglob("*") if p.is_file())


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(bytes(content))


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def remove(path):
    path.unlink()


def add(path):
    (path.parent / "extra").write_bytes(b"")


@pytest.mark.parametrize("damage", [flip, truncate, remove, add])
def test_damage_to_any_file_is_named_and_the_previous_checkpoint_used(two_checkpoints, tmp_path, damage):
    # Without a manifest a checkpoint is an unfinished one, see below; and an empty file has nothing to flip.
    names = [name for name in files(two_checkpoints / "20") if not (damage is remove and name == manifest.NAME)]
    if damage in (flip, truncate):
        names = [name for name in names if (two_checkpoints / "20" / name).stat().st_size > 0]
    assert sum("/d/" in name for name in names) >= 3, "the files that hold the arrays are among them"
    for number, name in enumerate(names):
        directory = tmp_path / str(number)
        shutil.copytree(two_checkpoints, directory)
        damage(directory / "20" / name)
        messages = []
        found = latest_undamaged(directory, messages.append)
        assert found.name == "10", name
        named = str(pathlib.PurePosixPath(name).parent / "extra") if damage is add else name
        assert re.search(rf"Checkpoint .*/20: {re.escape(named)} (is damaged|is missing|was added)", messages[0]), (
            messages
        )


def test_restore_says_what_is_damaged_and_goes_on(directory):
    flip(directory / "20" / "checkpoint.json")
    messages = []
    restored = Checkpointer(directory, report=messages.append).restore(make_state())
    assert restored.step == 10
    jax.tree.map(np.testing.assert_array_equal, plain(restored.state), plain(make_state(10)))
    assert messages == [f"Checkpoint {directory}/20: checkpoint.json is damaged. It is not used."]


def test_nothing_but_damage_is_an_error_that_removes_nothing(directory):
    flip(directory / "20" / "checkpoint.json")
    truncate(directory / "10" / "checkpoint.json")
    before = files(directory)
    with pytest.raises(
        UserError, match=r"At least one checkpoint must be undamaged.*20: checkpoint.json.*10: checkp.*afresh"
    ):
        Checkpointer(directory, report=lambda _: None).restore(make_state())
    assert files(directory) == before


def test_without_a_manifest_it_does_not_count(directory):
    (directory / "20" / manifest.NAME).unlink()
    assert committed_steps(directory) == [10]
    assert Checkpointer(directory).restore(make_state()).step == 10


# ---- A run that starts -----------------------------------------------------------------------------------------------


@pytest.fixture(params=["local", "bucket"])
def storage(request, monkeypatch):
    """Where a rename is one act, and where it is not: a save in a bucket is written in its place, beside a mark."""
    if request.param == "bucket":
        monkeypatch.setattr(folders, "is_local", lambda path: False)
    return request.param


def test_clean_removes_what_a_kill_left(directory):
    (directory / "20").rename(directory / "20.unfinished")
    for name in ("30.orbax-checkpoint-tmp", "40.unfinished.orbax-checkpoint-tmp"):
        (directory / name / "d").mkdir(parents=True)
    (directory / "50").mkdir()  # in a bucket
    (directory / "50.unfinished").write_text("")
    (directory / "10.unfinished").write_text("")  # killed between the manifest and the removal of the mark
    (directory / "notes.txt").write_text("a user's own file")
    messages = []
    Checkpointer(directory, report=messages.append).clean(10)
    names = (
        "10.unfinished",
        "20.unfinished",
        "30.orbax-checkpoint-tmp",
        "40.unfinished.orbax-checkpoint-tmp",
        "50.unfinished",
    )
    assert messages == [
        f"{directory}/{name} was left by a save that an end of the run cut short. It is removed." for name in names
    ]
    assert sorted(p.name for p in directory.iterdir()) == ["10", "notes.txt"]


def test_a_folder_without_a_manifest_is_somebodys_training_and_stays(directory):
    """A save never leaves one: it has its number only when it is whole."""
    (directory / "20" / manifest.NAME).unlink()
    (directory / "30.unfinished").mkdir()
    before = files(directory), sorted(directory.iterdir())
    with pytest.raises(UserError, match=rf"{directory}/20 has no {manifest.NAME}.*Nothing was changed.*from step 10\."):
        Checkpointer(directory).clean(10)
    assert before == (files(directory), sorted(directory.iterdir()))
    # Where the run goes on after it, it is no hindrance.
    save(directory, 40, keep=1)
    Checkpointer(directory, report=lambda _: None).clean(40)
    assert sorted(p.name for p in directory.iterdir()) == ["20", "40"]


def test_clean_sets_later_damaged_checkpoints_aside(directory):
    """So that the run can save at that step again, and retention does not count it; none is overwritten."""
    flip(directory / "20" / "checkpoint.json")
    checkpointer = Checkpointer(directory, keep=1, report=lambda _: None)
    for names in (["10", "20.damaged"], ["10", "20.damaged", "20.damaged.2"]):
        if len(names) == 3:
            shutil.copytree(directory / "20.damaged", directory / "20")
        checkpointer.clean(checkpointer.restore(make_state()).step)
        assert sorted(p.name for p in directory.iterdir()) == names
    checkpointer.save(make_state(15), LOOP)
    checkpointer.wait()
    assert checkpointer.steps() == [15]
    checkpointer.save(make_state(20), LOOP)
    checkpointer.wait()
    assert checkpointer.restore(make_state()).step == 20


def test_clean_of_a_directory_that_is_not_there(tmp_path):
    Checkpointer(tmp_path / "new").clean(0)


@pytest.mark.parametrize(
    "moment", ["in Orbax", "before the description", "before the manifest", "in the manifest", "after it"]
)
def test_death_while_saving_leaves_the_previous_one(tmp_path, monkeypatch, moment, storage):
    """Whatever had been written when the process died; the next run cleans up and saves at that step."""

    class Death(BaseException):
        pass

    def die(*_, **__):
        raise Death

    path = type(manifest.epath.Path("/"))

    def dying(name, method):
        act = getattr(path, method)
        return lambda self, *rest, **named: die() if self.name == name else act(self, *rest, **named)

    save(tmp_path, 10)
    checkpointer = Checkpointer(tmp_path)
    with monkeypatch.context() as patch:
        match moment:
            case "in Orbax":
                patch.setattr(checkpoint.ocp, "save_checkpointables_async", die)
            case "before the description":
                patch.setattr(path, "write_bytes", dying("checkpoint.json", "write_bytes"))
            case "before the manifest":
                patch.setattr(manifest, "write_manifest", die)
            case "in the manifest":
                patch.setattr(manifest, "write_whole", die)
            case _:
                method = "rename" if storage == "local" else "unlink"
                patch.setattr(path, method, dying("20.unfinished", method))
        with contextlib.suppress(Death):
            checkpointer.save(make_state(20), LOOP)
            checkpointer.wait()
            pytest.fail("it lived")
    whole = storage == "bucket" and moment == "after it"
    again = Checkpointer(tmp_path, report=lambda _: None)
    assert again.steps() == ([10, 20] if whole else [10])
    assert again.restore(make_state()).step == (20 if whole else 10)
    again.clean(20 if whole else 10)
    assert sorted(p.name for p in tmp_path.iterdir()) == (["10", "20"] if whole else ["10"])
    again.save(make_state(30 if whole else 20), LOOP)
    again.wait()
    assert again.restore(make_state()).step == (30 if whole else 20)


@pytest.mark.parametrize("moment", [1, 2, 3])
def test_death_while_removing_a_checkpoint(tmp_path, monkeypatch, moment, storage):
    """The oldest is removed in several acts; a death before any of them leaves the others, and the next run cleans up."""

    class Death(BaseException):
        pass

    save(tmp_path, 10)
    acts = iter(range(1, 100))
    path = type(manifest.epath.Path("/"))
    with monkeypatch.context() as patch:
        for name in ("rename", "unlink", "rmtree"):
            act = getattr(path, name)

            def dying(self, *arguments, act=act, **named):
                if self.name.startswith("10") and next(acts) == moment:
                    raise Death
                return act(self, *arguments, **named)

            patch.setattr(path, name, dying)
        checkpointer = Checkpointer(tmp_path, keep=1)
        checkpointer.save(make_state(20), LOOP)
        with contextlib.suppress(Death):
            checkpointer.wait()
    again = Checkpointer(tmp_path, report=lambda _: None)
    assert again.restore(make_state()).step == 20
    again.clean(20)
    assert sorted(int(p.name) for p in tmp_path.iterdir()) == again.steps()


def test_a_run_that_never_saved_differs_from_one_that_lost_its_checkpoints(tmp_path):
    root = manifest.epath.Path(tmp_path)
    assert not folders.never_saved(root)
    folders.begin(root)
    assert folders.never_saved(root)
    save(tmp_path, 5)
    assert not folders.never_saved(root)
    assert [p.name for p in tmp_path.iterdir()] == ["5"]


# ---- The run's record ------------------------------------------------------------------------------------------------


def test_a_checkpoint_holds_the_record_of_its_run_under_its_manifest(tmp_path):
    checkpointer = Checkpointer(tmp_path, record={"run/config.json": b"{}", "run/deeper/tokenizer.json": b"\xff"})
    checkpointer.save(make_state(5), LOOP)
    checkpointer.wait()
    assert (tmp_path / "5" / "run" / "deeper" / "tokenizer.json").read_bytes() == b"\xff"
    assert checkpointer.restore(make_state()).step == 5
    flip(tmp_path / "5" / "run" / "config.json")
    with pytest.raises(UserError, match=r"run/config\.json is damaged"):
        latest_undamaged(tmp_path)
    assert latest_undamaged(tmp_path, only=("checkpoint.json",)).name == "5"


@pytest.mark.parametrize("number", [None, 0, FORMAT - 1, FORMAT + 1, str(FORMAT)])
def test_another_format_is_refused_in_one_sentence(directory, number):
    path = directory / "20" / "checkpoint.json"
    description = json.loads(path.read_text())
    description["format"] = number
    if number is None:
        del description["format"]
    path.write_text(json.dumps(description))
    manifest.write_manifest(manifest.epath.Path(directory / "20"))
    for read in (
        lambda: Checkpointer(directory).restore(make_state()),
        lambda: load_params(find_checkpoint(directory)),
        lambda: load_params(find_checkpoint(directory), make_state().params),
    ):
        with pytest.raises(UserError, match=rf"must be of format {FORMAT}, .*/20 has .*: it is of another version"):
            read()


# ---- Retention -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("losses", "kept"),
    [
        ({}, [4, 5]),
        ({1: 3.0, 2: 1.0, 3: 2.0}, [2, 4, 5]),
        ({1: 3.0, 4: 1.0}, [4, 5]),
        ({1: 1.0, 5: 1.0}, [1, 4, 5]),
        ({1: math.nan, 3: 2.0}, [3, 4, 5]),
    ],
)
def test_keeps_the_latest_and_the_best(tmp_path, losses, kept):
    assert save(tmp_path, 1, 2, 3, 4, 5, keep=2, losses=losses).steps() == kept


def test_retention_is_remembered_by_the_files(tmp_path):
    save(tmp_path, 1, 2, keep=1, losses={1: 1.0, 2: 2.0})
    assert save(tmp_path, 3, 4, keep=1, losses={3: 3.0}).steps() == [1, 4]


def test_damage_to_an_old_description_does_not_stop_the_run(directory):
    (directory / "10" / "checkpoint.json").write_text("{")
    assert save(directory, 30, keep=2).steps() == [20, 30]


def test_a_folder_that_is_removed_after_a_save_is_no_defect_of_ours(tmp_path, monkeypatch):
    commit = folders.commit

    def commit_then_remove(directory, step):
        commit(directory, step)
        (tmp_path / "run").rename(tmp_path / "removed")

    monkeypatch.setattr(folders, "commit", commit_then_remove)
    assert save(tmp_path / "run" / "checkpoints", 1).steps() == []
    assert not (tmp_path / "run").exists()


def test_description_is_readable(directory):
    description = json.loads((directory / "20" / "checkpoint.json").read_text())
    assert description["step"] == 20
    assert description["loop"] == LOOP
    assert description["arrays"]["params/a/kernel"] == "float32[3,2]"
