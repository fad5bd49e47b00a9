"""MkDocs: files of the repository that pages link to become pages of the site, and links lead there."""

import pathlib
import posixpath
import re

from mkdocs.structure.files import File

ROOT = pathlib.Path(__file__).parents[2]
_LINK = re.compile(r"(?<=\]\()([^)\s#]+)")
_LANGUAGES = {".py": "python", ".ipynb": "json", ".yml": "yaml", ".yaml": "yaml", ".sh": "sh", "Makefile": "make"}


def in_repository(page, link):
    """The path of a link's target in the repository; empty if there is no such file or folder."""
    where = page.removeprefix("repository/") if page.startswith("repository/") else f"docs/{page}"
    path = posixpath.normpath(posixpath.join(posixpath.dirname(where), link))
    return path if ":" not in link and not path.startswith("..") and (ROOT / path).exists() else ""


def in_site(path):
    """The page of a file: pages of docs/ have their own name, other files are below repository/."""
    return path.removeprefix("docs/") if path.startswith("docs/") else f"repository/{path.removesuffix('.md')}.md"


def text_of(path):
    """A page with the content of a file, or with links to the files of a folder."""
    if path.endswith(".md"):
        return (ROOT / path).read_text()
    if (ROOT / path).is_dir():
        names = sorted(file.name for file in (ROOT / path).iterdir() if file.is_file() and file.suffix != ".pyc")
        return f"# `{path}/`\n\n" + "".join(f"* [`{name}`]({posixpath.basename(path)}/{name})\n" for name in names)
    content = (ROOT / path).read_text()
    return f"# `{path}`\n\n````{_LANGUAGES.get(pathlib.Path(path).suffix or path, 'text')}\n{content}````\n"


def on_files(files, config):
    """Add a page for each linked file, for the files that it links to, and so on."""
    pages = {file.src_uri: file.content_string for file in files.documentation_pages()}
    while pages:
        name, text = pages.popitem()
        for path in filter(None, (in_repository(name, link) for link in _LINK.findall(text))):
            if not path.startswith("docs/") and in_site(path) not in files.src_uris:
                pages[in_site(path)] = text_of(path)
                files.append(File.generated(config, in_site(path), content=pages[in_site(path)]))
    return files


def on_page_markdown(markdown, page, config, files):
    """Make each link to the repository one to its page."""

    def moved(match):
        path = in_repository(page.file.src_uri, match[0])
        return posixpath.relpath(in_site(path), posixpath.dirname(page.file.src_uri)) if path else match[0]

    return _LINK.sub(moved, markdown)
