"""A `gs://` whose objects lie in a folder of this machine."""

from etils.epath import backend, gpath


class Bucket:
    """Objects in a folder. Whoever opens `gs://...` without epath finds nothing."""

    def __init__(self, root):
        self.root = str(root)

    def __getattr__(self, name):
        method = getattr(backend.os_backend, name)

        def call(*paths, **options):
            given = [
                str(path).replace("gs:/", self.root, 1).replace("//", "/") if "gs:/" in str(path) else path
                for path in paths
            ]
            found = method(*given, **options)
            if name == "glob":
                return [path.replace(self.root, "gs:/", 1) for path in found]
            return found

        return call


def make_bucket(path, monkeypatch):
    """A folder that is also `gs://b`."""
    monkeypatch.setitem(gpath._PREFIX_TO_BACKEND, "gs", Bucket(path / "objects"))
    folder = path / "objects" / "b"
    folder.mkdir(parents=True)
    return folder
