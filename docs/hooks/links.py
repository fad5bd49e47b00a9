"""MkDocs: files of the repository that pages link to become pages of the site, and links lead there."""

import pathlib
import posixpath
import re

from mkdocs.structure.files import File

ROOT = pathlib.Path(__file__).parents[2]
_LINK = re.compile(r"(?<=\]\()([^)\s#]+)")


def in_repository(page, link):
    """The path of a link's target in the repository; empty if there is no such file or folder."""
    where = page.removeprefix("repository/") if page.startswith("repository/") else f"docs/{page}"
    path = posixpath.normpath(posixpath.join(posixpath.dirname(where), link))
    return path if ":" not in link and not path.startswith("..") and (ROOT / path).exists() else ""


def in_site(path):
    """The page of a file: pages of docs/ keep their names, and other files are below repository/."""
    return path.removeprefix("docs/") if path.startswith("docs/") else f"repository/{path.removesuffix('.md')}.md"


def text_of(path):
    """A page with the content of a file, or with links to the files of a folder."""
    file = ROOT / path
    if file.is_dir():
        names = sorted(child.name for child in file.iterdir() if child.is_file())
        return f"# `{path}/`\n\n" + "".join(f"* [`{name}`]({file.name}/{name})\n" for name in names)
    language = {".ipynb": "json", "": "make"}.get(file.suffix, file.suffix.removeprefix("."))
    return file.read_text() if file.suffix == ".md" else f"# `{path}`\n\n````{language}\n{file.read_text()}````\n"


def on_files(files, config):
    """Add a page for each linked file, for the files that it links to, and so on."""
    pages = {file.src_uri: file.content_string for file in files.documentation_pages()}
    while pages:
        name, text = pages.popitem()
        for path in filter(None, (in_repository(name, link) for link in _LINK.findall(text))):
            if not path.startswith("docs/") and in_site(path) not in files.src_uris:
                pages[in_site(path)] = text_of(path)
                files.append(File.generated(config, in_site(path), content=pages[in_site(path)]))


def on_page_markdown(markdown, page, **_):
    """Make each link to the repository one to its page."""
    here = page.file.src_uri
    found = {link: in_repository(here, link) for link in _LINK.findall(markdown)}
    to = {link: posixpath.relpath(in_site(path), posixpath.dirname(here)) for link, path in found.items() if path}
    return _LINK.sub(lambda match: to.get(match[0], match[0]), markdown)
