"""The order in which a checkpoint is taken apart: what a kill leaves on the way never looks whole."""

import pytest
from etils import epath

from transformer.training import folders, manifest


def checkpoint(directory, step):
    place = epath.Path(directory) / str(step)
    (place / "params").mkdir(parents=True)
    (place / "params" / "a").write_text("numbers")
    manifest.write_manifest(place)
    return place


@pytest.mark.parametrize("local", [True, False], ids=["local", "bucket"])
def test_a_checkpoint_loses_its_manifest_before_its_files(tmp_path, monkeypatch, local):
    """Killed in between, it is a draft, which the next start removes; not a checkpoint with files missing."""
    place = checkpoint(tmp_path, 3)
    monkeypatch.setattr(folders, "is_local", lambda path: local)
    found = []

    def killed(path, *others, **settings):
        found.append((path / manifest.NAME).exists())
        (path / "params" / "a").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(type(place), "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            folders.discard(epath.Path(tmp_path), 3)
    assert found == [False]
    assert (tmp_path / "3.unfinished").exists()
    told = []
    folders.clean(epath.Path(tmp_path), 0, told.append)
    assert not list(tmp_path.iterdir())
    assert len(told) == 1 and "3.unfinished" in told[0]


@pytest.mark.parametrize("local", [True, False], ids=["local", "bucket"])
def test_nothing_is_left_of_a_discarded_checkpoint(tmp_path, monkeypatch, local):
    checkpoint(tmp_path, 3), checkpoint(tmp_path, 4)
    monkeypatch.setattr(folders, "is_local", lambda path: local)
    folders.discard(epath.Path(tmp_path), 3)
    assert [path.name for path in tmp_path.iterdir()] == ["4"]
    manifest.verify_manifest(epath.Path(tmp_path) / "4")
