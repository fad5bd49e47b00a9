"""Files that are whole or absent: written aside, then renamed."""

from etils import epath


def write_whole(path: epath.Path, text: str) -> None:
    """Write aside and rename: a reader finds the old file or the new one."""
    aside = path.parent / f"{path.name}.tmp"
    aside.write_text(text)
    aside.replace(path)
