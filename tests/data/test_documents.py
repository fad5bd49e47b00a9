"""Local corpora: what is read of files, folders and .jsonl, and what is refused with its reason."""

import gzip
import os
import sys
import sysconfig

import pytest

from transformer.config import DataConfig
from transformer.data.registry import find_source
from transformer.types import UserError

CONFIG = DataConfig()


def read_local(source, config):
    return find_source(source).corpus(source, config)


def _texts(source, config=CONFIG):
    corpus = read_local(str(source), config)
    documents = list(corpus.documents())
    assert len(documents) == corpus.count
    return {document.name: document.text for document in documents}


def test_a_folder_is_read_in_the_order_of_its_paths(tmp_path):
    for name in ("b.txt", "a/z.md", "a/y.txt", "a.txt", ".hidden/x.txt", ".DS_Store", "c/empty.txt"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"text of {name}" if "empty" not in name else " \n")
    assert list(_texts(tmp_path)) == ["a/y.txt", "a/z.md", "a.txt", "b.txt"]


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_line_endings_are_kept_and_a_byte_order_mark_is_not(tmp_path, pack):
    (tmp_path / "a.txt").write_bytes(pack(b"\xef\xbb\xbfone\r\ntwo\r\xef\xbb\xbf"))
    assert _texts(tmp_path / "a.txt") == {"a.txt": "one\r\ntwo\r\ufeff"}
    (tmp_path / "a.jsonl").write_bytes(pack(b'\xef\xbb\xbf{"text": "one"}\n'))
    assert list(_texts(tmp_path / "a.jsonl").values()) == ["one"]


def test_the_fingerprint_follows_contents_only(tmp_path, write_folder):
    one, two = write_folder("same"), tmp_path / "elsewhere" / "same"
    two.parent.mkdir()
    two.symlink_to(one)
    before = read_local(str(one), CONFIG).fingerprint
    assert read_local(str(two), CONFIG).fingerprint == before
    file = one / "sub0" / "00.txt"
    file.write_text(file.read_text().replace("0", "1"))  # as long as before
    changed = read_local(str(one), CONFIG).fingerprint
    file.rename(file.with_name("0.txt"))
    assert read_local(str(one), CONFIG).fingerprint == changed != before


def test_the_standard_library_is_read_without_its_tests(tmp_path, monkeypatch):
    files = {
        "os.py": b"os",
        "email/message.py": b"message",
        "test/test_os.py": b"test",
        "idlelib/idle_test/test_a.py": b"test",
        "lib2to3/tests/data/x.py": b"test",
        "site-packages/numpy/__init__.py": b"installed",
        "__pycache__/os.py": b"cache",
        "latin1.py": b"# \xe9",
        "lib.so": b"\0\0",
        "empty.py": b"",
    }
    for name, content in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    assert _texts("python_stdlib") == {"email/message.py": "message", "os.py": "os"}
    corpus = read_local("python_stdlib", CONFIG)
    assert (corpus.name, corpus.version) == ("python_stdlib", ".".join(map(str, sys.version_info[:3])))


def test_a_jsonl_has_texts_and_prompts_under_the_names_of_the_config(write_jsonl):
    records = [{"q": "2+2=", "a": "4"}, {"a": "no prompt", "label": 1}, {"a": ""}, {"q": "", "a": "lone \ud800"}]
    path = write_jsonl(records)
    corpus = read_local(str(path), DataConfig(text_key="a", prompt_key="q"))
    assert [(d.prompt, d.text, d.name) for d in corpus.documents()] == [
        ("2+2=", "4", "records.jsonl:1"),
        ("", "no prompt", "records.jsonl:2"),
        ("", "lone ?", "records.jsonl:4"),
    ]
    assert corpus.fingerprint == read_local(str(path), DataConfig(text_key="a", prompt_key="q")).fingerprint
    assert corpus.fingerprint != read_local(str(path), DataConfig(text_key="a")).fingerprint
    write_jsonl([records[0], {"a": "no PROMPT", "label": 1}, *records[2:]])
    assert corpus.fingerprint != read_local(str(path), DataConfig(text_key="a", prompt_key="q")).fingerprint


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "must hold text"),
        (b" \n\n", "must hold text"),
        (b"text\0text", "is binary .NUL at byte 4"),
        ("text".encode("utf-16"), "is UTF-16: save it as UTF-8"),
        ("text".encode("utf-16-le"), "is UTF-16LE: save it .* `iconv -f UTF-16LE -t UTF-8`"),
        ("text".encode("utf-16-be"), "is UTF-16BE: save it"),
        ("text".encode("utf-32"), "is UTF-32: save it"),
        (b"caf\xe9 au lait", "must be UTF-8, .*byte 3: 0xe9.*iconv"),
        (b"PK\x03\x04rest", "is zip data: unpack it first"),
        (gzip.compress(b"text" * 100)[:-9], "must be whole"),
    ],
    ids=["empty", "blank", "binary", "utf16", "utf16le", "utf16be", "utf32", "latin1", "zip", "torn"],
)
@pytest.mark.parametrize("in_folder", [False, True])
def test_what_is_not_text_is_refused(tmp_path, content, message, in_folder):
    path = tmp_path / "corpus" / "some.txt"
    path.parent.mkdir()
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        read_local(str(path.parent if in_folder else path), CONFIG)
    assert str(path if not in_folder or content.strip() else path.parent) in str(error.value)


def test_a_folder_without_files_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"must hold text, .* has 0 files"):
        read_local(str(tmp_path), CONFIG)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("", "no line with a non-empty 'text'"),
        ('{"text": "a"}\n{"text": ', "line 2: "),
        ('["a"]', "line 1 is not"),
        ('{"text": "a", "n": {"b": 1, "b": 2}}', "line 1: it has 'b' twice"),
        (
            '{"txt": "a", "n": 1}',
            r"its text as a string, in the field data\.text_key='text'.*line 1 has txt \(str\), n \(int\)",
        ),
        ('{"text": 3}', r"text \(int\)"),
        ('{"text": "a", "prompt": null}', r"prompt \(NoneType\)"),
    ],
)
def test_a_malformed_jsonl_is_refused_with_its_line(tmp_path, lines, message):
    path = tmp_path / "a.jsonl"
    path.write_text(lines)
    with pytest.raises(UserError, match=message):
        read_local(str(path), CONFIG)


def test_a_separator_stands_between_documents(tmp_path):
    (tmp_path / "a.txt").write_text("one\n<|endoftext|>\ntwo\n\nand more<|endoftext|>three<|endoftext|>\n \n")
    (tmp_path / "b.txt").write_text("four")
    apart = DataConfig(separator="<|endoftext|>")
    texts = {"a.txt": "one\n", "a.txt:2": "two\n\nand more", "a.txt:3": "three", "b.txt": "four"}
    assert _texts(tmp_path, apart) == texts
    whole = read_local(str(tmp_path), CONFIG)
    assert whole.count == 2
    assert whole.fingerprint != read_local(str(tmp_path), apart).fingerprint
    # What it stands between is what counts, not how it is written.
    (tmp_path / "a.txt").write_text("one\n@@two\n\nand more@@three")
    assert _texts(tmp_path, DataConfig(separator="@@")) == texts


# ---- Links and things that are no files ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "links", [{"a": ".", "b": "."}, {"a": "..", "b": "."}, {"sub/a": "..", "sub/b": "../.."}, {"a": "/"}]
)
def test_links_that_lead_back_are_not_followed(tmp_path, links):
    """With two links to the folder itself, a walk that follows them has 2^n paths of length n."""
    folder = tmp_path / "above" / "texts"
    (folder / "sub").mkdir(parents=True)
    (tmp_path / "above" / "other.txt").write_text("not of the folder")
    (folder / "sub" / "text.txt").write_text("text")
    before = _texts(folder), read_local(str(folder), CONFIG).fingerprint
    for name, target in links.items():
        (folder / name).symlink_to(target)
    assert (
        (_texts(folder), read_local(str(folder), CONFIG).fingerprint) == before == ({"sub/text.txt": "text"}, before[1])
    )


def test_a_linked_folder_is_read_once(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "text.txt").write_text("text")
    (tmp_path / "texts").mkdir()
    for name in "ab":
        (tmp_path / "texts" / name).symlink_to(tmp_path / "elsewhere")
    assert _texts(tmp_path / "texts") == {"a/text.txt": "text"}


@pytest.mark.parametrize("in_folder", [False, True])
def test_what_has_no_end_is_not_read(tmp_path, in_folder):
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "folder" / "pipe")
    with pytest.raises(UserError, match=r"must be a file, .*pipe is a folder, a pipe or a device"):
        read_local(str(tmp_path / "folder" if in_folder else tmp_path / "folder" / "pipe"), CONFIG)


@pytest.mark.parametrize("name", ["a.json", "a.json.gz", "a.JSON"])
def test_syntax_is_not_learnt_as_text(tmp_path, name):
    (tmp_path / name).write_text('[{"text": "fine"}]')
    with pytest.raises(UserError, match=r"would be read with its commas, quotes and braces\. Save it as \.jsonl"):
        read_local(str(tmp_path / name), DataConfig())
    (tmp_path / name).rename(tmp_path / "a.txt")
    assert read_local(str(tmp_path / "a.txt"), DataConfig()).count == 1


def test_each_row_of_a_table_is_a_document(tmp_path):
    (tmp_path / "a.tsv").write_text("n\ttext\tprompt\n1\tone\t\n2\t \t\n3\tthree\tbefore\n")
    corpus = read_local(str(tmp_path / "a.tsv"), CONFIG)
    assert list(corpus.documents()) == [("one", "", "a.tsv:2"), ("three", "before", "a.tsv:4")]
    with pytest.raises(UserError, match=r"must name the column words, .*a\.tsv, line 1 has n, text, prompt"):
        read_local(str(tmp_path / "a.tsv"), DataConfig(text_key="words"))
