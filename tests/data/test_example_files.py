"""A stranger's labelled texts and pairs: each form is read exactly, or refused with its place and a remedy."""

import bz2
import gzip
import json
import lzma

import pytest
from etils import epath

from transformer.config import DataConfig
from transformer.data.forms.labelled import LabelledText, LabelledTexts
from transformer.data.forms.pairs import Pairs, TextPair
from transformer.data.registry import find_source
from transformer.data.tables import table_rows
from transformer.types import UserError


def read_labelled(paths, **keys):
    return (text for _, text in LabelledTexts().read(find_source, paths, DataConfig(**keys)))


def read_pairs(paths, **keys):
    return (pair for _, pair in Pairs().read(find_source, paths, DataConfig(**keys)))


EXAMPLES = [
    LabelledText('He said: "no", twice', "bad"),
    LabelledText("two\nlines, ünïcode 🎈", "good"),
    LabelledText("", "so-so"),
    LabelledText("x" * 1_000_000, "bad"),
]


def write_csv(path, delimiter=","):
    quoted = ['"' + text.replace('"', '""') + '"' for text, _ in EXAMPLES]
    rows = [delimiter.join(row) for row in zip(quoted, (label for _, label in EXAMPLES), strict=True)]
    path.write_text("\n".join([delimiter.join(("text", "label")), *rows]) + "\n")


@pytest.mark.parametrize("compress", [bytes, gzip.compress, bz2.compress, lzma.compress])
def test_json_lines(tmp_path, compress):
    path = tmp_path / "a.jsonl.packed"
    lines = "\n".join(json.dumps(example._asdict() | {"other": 1}) for example in EXAMPLES)
    path = tmp_path / ("a.jsonl" if compress is bytes else "a.jsonl.gz")
    path.write_bytes(compress(f"{lines}\n\n".encode()))
    assert list(read_labelled([str(path)])) == EXAMPLES


def test_a_table_is_read_row_by_row(tmp_path):
    (tmp_path / "a.csv").write_bytes(b'text,label\r\n"one\r\nline",x\rtwo,y\nthr\xff,z\n')
    rows = table_rows(epath.Path(tmp_path / "a.csv"), ",", ("text", "label"))
    assert [row["text"] for _, row in (next(rows), next(rows))] == ["one\r\nline", "two"]
    with pytest.raises(UserError, match=r"a\.csv, line 4 is not \(byte 3: 0xff\)"):
        next(rows)


@pytest.mark.parametrize(("suffix", "delimiter"), [("csv", ","), ("tsv", "\t")])
def test_tables(tmp_path, suffix, delimiter):
    path = tmp_path / f"a.{suffix}"
    write_csv(path, delimiter)
    assert list(read_labelled([str(path)])) == EXAMPLES
    path.write_bytes("\ufeff".encode() + path.read_bytes().replace(b"\n", b"\r\n"))
    assert [label for _, label in read_labelled([str(path)])] == [label for _, label in EXAMPLES]


def test_folders_of_classes(tmp_path):
    for name, label, text in (("2.txt", "pos", "good"), ("1.txt", "pos", "fine"), ("1.txt", "neg", "bad\n")):
        (tmp_path / label).mkdir(exist_ok=True)
        (tmp_path / label / name).write_text(text)
    (tmp_path / ".hidden").mkdir()
    expected = [LabelledText("bad\n", "neg"), LabelledText("fine", "pos"), LabelledText("good", "pos")]
    assert list(read_labelled([str(tmp_path)])) == expected


def test_files_follow_each_other_and_labels_may_be_numbers(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"t": "a", "l": 0}\n')
    (tmp_path / "b.csv").write_text("l,t\n1,b\n")
    paths = [str(tmp_path / "a.jsonl"), str(tmp_path / "b.csv")]
    assert list(read_labelled(paths, text_key="t", label_key="l")) == [LabelledText("a", "0"), LabelledText("b", "1")]


def test_two_files_line_by_line(tmp_path):
    (tmp_path / "a.en.gz").write_bytes(gzip.compress(b"A dog.\r\n\nTwo men\n"))
    (tmp_path / "a.de").write_text("Ein Hund.\n\nZwei Männer")
    pairs = [TextPair("A dog.", "Ein Hund."), TextPair("", ""), TextPair("Two men", "Zwei Männer")]
    assert list(read_pairs([str(tmp_path / "a.en.gz"), str(tmp_path / "a.de")])) == pairs


def test_pairs_of_one_file(tmp_path):
    (tmp_path / "a.tsv").write_text("source\ttarget\nA dog.\tEin Hund.\n")
    (tmp_path / "a.jsonl").write_text('{"en": "A dog.", "de": "Ein Hund."}')
    assert list(read_pairs([str(tmp_path / "a.tsv")])) == [TextPair("A dog.", "Ein Hund.")]
    keys = {"source_key": "en", "target_key": "de"}
    assert list(read_pairs([str(tmp_path / "a.jsonl")], **keys)) == [TextPair("A dog.", "Ein Hund.")]


@pytest.mark.parametrize(
    ("json_label", "text"),
    [("0", "0"), ("0.0", "0.0"), ("1.5", "1.5"), ("-1", "-1"), ("true", "true"), ('"null"', "null"), ('"1"', "1")],
)
def test_a_label_is_the_same_text_in_every_kind_of_file(tmp_path, json_label, text):
    (tmp_path / "a.jsonl").write_text(f'{{"text": "a", "label": {json_label}}}\n')
    (tmp_path / "a.csv").write_text(f"text,label\na,{text}\n")
    (tmp_path / "a.tsv").write_text(f"text\tlabel\na\t{text}\n")
    (tmp_path / "folder" / text).mkdir(parents=True)
    (tmp_path / "folder" / text / "1.txt").write_text("a")
    paths = [str(tmp_path / name) for name in ("a.jsonl", "a.csv", "a.tsv", "folder")]
    assert set(read_labelled(paths)) == {LabelledText("a", text)}


def test_a_byte_order_mark_is_dropped_everywhere(tmp_path):
    files = {"a.jsonl": '{"text": "a", "label": "x"}', "a.csv": "text,label\na,x", "a.tsv": "text\tlabel\na\tx"}
    for name, content in files.items():
        (tmp_path / name).write_text("\ufeff" + content)
    assert set(read_labelled([str(tmp_path / name) for name in files])) == {LabelledText("a", "x")}
    for name in ("a.en", "a.de"):
        (tmp_path / name).write_text("\ufefftext\n")
    assert list(read_pairs([str(tmp_path / "a.en"), str(tmp_path / "a.de")])) == [TextPair("text", "text")]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "a", "label": NaN}', "'label' must be the name or number of a class, .* has nan"),
        ("a.jsonl", '{"text": "a", "label": []}', r"'label' must be the name or number of a class, .* has \[\]"),
        ("a.jsonl", '{"text": "a", "label": "\\n"}', "'label' must be the name or number of a class"),
        ("a.jsonl", "[" * 100_000, "must be a JSON object; .*line 1"),
        ("a.jsonl", '{"label": ' + "1" * 5000 + "}", "must be a JSON object; .*line 1"),
        ("a.csv", "text,label\na,\n", "'label' must be the name or number of a class, .*line 2 has ''"),
        ("a.csv", "text,label,label\na,x,y\n", r"different names, .*a\.csv has 'label' as columns 2 and 3"),
        ("a.jsonl", '{"text": "a", "label": "x"}\n{"text": "a"}', r"must have 'label', .*a\.jsonl, line 2 has 'text'"),
        ("a.jsonl", '{"text": "a", "text": "b", "label": "x"}', "line 1: it has 'text' twice"),
        ("a.jsonl", '{"%s": 1}' % ("k" * 9999), "line 1 has 'k{39}\\.$"),
        ("a.jsonl", '{"text": 3, "label": "x"}', "'text' must be text, .*line 1 has int"),
        ("a.jsonl", '{"text": "a", "label": null}', "'label' must be the name or number of a class, .* has None"),
        ("a.jsonl", '{"text": "a", "label": " "}', "'label' must be the name or number of a class"),
        ("a.jsonl", "not json", "must be a JSON object; .*line 1"),
        (
            "a.csv",
            "text,label\nfine,1\nunquoted, comma,1\n",
            r"the 2 columns of the header, .*line 3 has more or fewer",
        ),
        ("a.csv", "text,label\nshort\n", "line 2 has more or fewer"),
        (
            "a.csv",
            "words,label\nfine,1\n",
            "must name the columns text and label, .*line 1 has words, label; if it has no",
        ),
        (
            "a.csv",
            "I like it,good\n",
            "line 1 has I like it, good; .*add one as its first line; .* options that end in -key",
        ),
        ("a.csv", "text;label\nfine;1\n", "line 1 has text;label; its columns are separated by semicolons: .* commas"),
        (
            "a.tsv",
            "text,label\nfine,1\n",
            "line 1 has text,label; its columns are separated by commas: save it with tabs",
        ),
        ("a.csv", "", r"a\.csv is empty"),
        (
            "a.csv",
            'text,label\nfine,1\n"never closed,1\n\n',
            "not, in the row that begins in line 3: unexpected end of data",
        ),
        (
            "a.csv",
            'text,label\n"two\nlines",1\n"a" b,1\n',
            "not, in the row that begins in line 4: .* quote is doubled",
        ),
        ("a.xlsx", "?", r"must be \.jsonl, \.csv, \.tsv"),
    ],
)
def test_bad_labelled_files_are_refused(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        list(read_labelled([str(tmp_path / name)]))


def test_bad_folders_and_missing_files_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"there is no file or folder 'nowhere\.csv'"):
        list(read_labelled(["nowhere.csv"]))
    with pytest.raises(UserError, match=r"one folder for each class, .* holds none"):
        list(read_labelled([str(tmp_path)]))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty has no files"):
        list(read_labelled([str(tmp_path)]))
    # A class or a text less would be no error otherwise.
    (tmp_path / "empty" / "text").write_text("text")
    for link in ("empty/link", "link"):
        (tmp_path / link).symlink_to("nowhere")
        with pytest.raises(UserError, match=f"{link} is a link to nowhere, which does not: remove the link"):
            list(read_labelled([str(tmp_path)]))
        with pytest.raises(UserError, match=f"{link} is a link to nowhere"):
            list(read_labelled([str(tmp_path / link)]))
        (tmp_path / link).unlink()


def test_files_of_unequal_length_are_refused(tmp_path):
    (tmp_path / "a").write_text("1\n2\n3\n")
    (tmp_path / "b").write_text("1\n2\n")
    with pytest.raises(UserError, match=r"as many lines, .*a has 3 and .*b 2"):
        list(read_pairs([str(tmp_path / "a"), str(tmp_path / "b")]))
    with pytest.raises(UserError, match="got 3 files"):
        list(read_pairs([str(tmp_path / "a")] * 3))
