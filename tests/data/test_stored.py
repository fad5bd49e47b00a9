"""A stored dataset is data: nothing that it names is imported or run, and what is damaged is a short error."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
from etils import epath

from transformer.config import DataConfig
from transformer.data.datasets import open_data
from transformer.data.examples import prepare_examples
from transformer.data.forms.labelled import LabelledTexts
from transformer.data.stored import find_stored, open_stored
from transformer.objective import OBJECTIVES
from transformer.objectives.classification import Classification
from transformer.objectives.next_token import NextToken
from transformer.types import UserError

PLANTED = "planted_features"
EVIL = f"{PLANTED}.Evil"
TEXT = {"pythonClassName": "tensorflow_datasets.core.features.text_feature.Text", "text": {}}
SEQUENCE = "tensorflow_datasets.core.features.sequence_feature.Sequence"


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A data_dir with one labelled dataset."""
    root = tmp_path_factory.mktemp("stored")
    (root / "a.csv").write_text("text,label\n" + "".join(f"text {i},{'ab'[i % 2]}\n" for i in range(8)))
    prepare_examples(LabelledTexts(), "mine", {"train": [str(root / "a.csv")]}, DataConfig(data_dir=str(root / "data")))
    return root / "data"


@pytest.fixture
def data_dir(tmp_path, prepared, monkeypatch):
    """A copy of it in the current directory, where a module waits to be imported, which writes a file."""
    shutil.copytree(prepared, tmp_path / "data")
    (tmp_path / f"{PLANTED}.py").write_text(
        f"import pathlib, tensorflow_datasets as tfds\npathlib.Path({str(tmp_path / 'ran')!r}).touch()\n"
        "class Evil(tfds.features.Text): pass\nBuilder = Evil\n"
    )
    for name in ("mine", "tensorflow"):  # code beside the data, and a package that is not installed
        (tmp_path / f"{name}.py").write_text(f"import {PLANTED}\n")
    (tmp_path / "data" / "mine" / "mine.py").write_text(f"import {PLANTED}\n")
    (tmp_path / "data" / "mine" / "mine_dataset_builder.py").write_text(f"import {PLANTED}\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend("")
    yield tmp_path / "data"
    assert not (tmp_path / "ran").exists()
    assert PLANTED not in sys.modules


def rewrite(data_dir, file, change):
    path = data_dir / "mine" / "1.0.0" / file
    content = json.loads(path.read_text())
    path.write_text(json.dumps(change(content)))


def with_feature(feature):
    def change(content):
        content["featuresDict"]["features"]["more"] = feature
        return content

    return change


LEGACY = {"type": EVIL, "content": {}}
BAD_FEATURES = {
    "a class of the folder": with_feature(TEXT | {"pythonClassName": EVIL}),
    "in a sequence": with_feature({"pythonClassName": SEQUENCE, "sequence": {"feature": {"pythonClassName": EVIL}}}),
    "at the top": lambda content: content | {"pythonClassName": EVIL},
    "in the old form": lambda content: LEGACY,
    "the old form inside": with_feature(LEGACY),
    "in JSON as a string": with_feature(
        {"pythonClassName": SEQUENCE, "jsonFeature": {"json": json.dumps({"feature": LEGACY, "length": None})}}
    ),
    "by its other name": with_feature({"python_class_name": EVIL, "text": {}}),
    "by both names": with_feature(TEXT | {"python_class_name": EVIL}),
    "a class of TFDS that is no text": with_feature({"pythonClassName": "tensorflow_datasets.core.features.Video"}),
    "a type that TensorFlow would know": with_feature(
        {
            "pythonClassName": "tensorflow_datasets.core.features.tensor_feature.Tensor",
            "tensor": {"dtype": "half_float"},
        }
    ),
    "a name that is a path": lambda content: {
        **content,
        "featuresDict": {"features": {"../mine": {**TEXT}}},
    },
    "no class": with_feature({}),
    "no object": with_feature("text"),
    "a list": lambda content: [content],
    "too many classes": with_feature(
        {
            "pythonClassName": "tensorflow_datasets.core.features.class_label_feature.ClassLabel",
            "classLabel": {"numClasses": "1000000000000"},
        }
    ),
}


@pytest.mark.parametrize("objective", ["next_token", "classification"])
@pytest.mark.parametrize("change", BAD_FEATURES.values(), ids=BAD_FEATURES)
def test_features_of_other_kinds_are_refused_before_anything_is_imported(data_dir, change, objective):
    rewrite(data_dir, "features.json", change)
    config = DataConfig(source=("mine",), data_dir=str(data_dir))
    with pytest.raises(UserError, match=r"features\.json"):
        open_data(config, OBJECTIVES.find(objective)())


def test_features_in_the_other_description_are_refused(data_dir):
    rewrite(data_dir, "dataset_info.json", lambda content: content | {"features": TEXT | {"pythonClassName": EVIL}})
    with pytest.raises(UserError, match=r"dataset_info\.json has some too"):
        open_stored(epath.Path(data_dir / "mine" / "1.0.0"))


def test_the_module_of_a_dataset_is_not_imported(data_dir):
    rewrite(data_dir, "dataset_info.json", lambda content: content | {"moduleName": PLANTED})
    data = open_data(DataConfig(source=("mine",), data_dir=str(data_dir)), Classification())
    assert data.class_names == ("a", "b")
    assert len(list(data.texts("train"))) == 7


@pytest.mark.parametrize("objective", ["next_token", "classification"])
@pytest.mark.parametrize(
    "name",
    [PLANTED, f"{PLANTED}.Evil", f"{PLANTED}:mine", "huggingface:mine", "kaggle:mine", f"mine/{PLANTED}", "mine/a=1"],
)
def test_names_do_not_lead_to_code(data_dir, name, objective):
    with pytest.raises(UserError, match=r"neither a file or folder|is written name|be written name"):
        open_data(DataConfig(source=(name,), data_dir=str(data_dir)), OBJECTIVES.find(objective)())


def test_local_text_prepared_by_a_stranger_is_checked_too(data_dir, tmp_path):
    (tmp_path / "text.txt").write_text("text\n" * 100)
    config = DataConfig(source=("text.txt",), data_dir=str(data_dir))
    open_data(config, NextToken())
    (features,) = data_dir.glob("text_records/**/features.json")
    features.write_text(json.dumps(with_feature(TEXT | {"pythonClassName": EVIL})(json.loads(features.read_text()))))
    with pytest.raises(UserError, match="is never imported"):
        open_data(config, NextToken())


def test_the_command_line_imports_nothing_from_the_current_directory(data_dir, tmp_path):
    rewrite(data_dir, "features.json", BAD_FEATURES["a class of the folder"])
    command = [sys.executable, "-m", "transformer", "prepare", "mine", "--data-dir", "data"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    (tmp_path / "mine.py").unlink()  # or else it is the source
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert "is never imported" in done.stderr + done.stdout


# ---- What is accepted ------------------------------------------------------------------------------------------------


def test_every_known_kind_is_read_as_tfds_writes_it(tmp_path):
    features = tfds.features.FeaturesDict(
        {
            "text": tfds.features.Text(doc="what is read"),
            "label": tfds.features.ClassLabel(num_classes=3),
            "number": tfds.features.Scalar(np.int32),
            "vector": tfds.features.Tensor(shape=(2,), dtype=np.float32),
            "flags": tfds.features.Sequence(np.bool_, length=3),
            "nested": tfds.features.Sequence({"text": tfds.features.Text(), "more": {"still": np.int64}}),
            "rows": tfds.features.Dataset({"text": tfds.features.Text()}),
            "both": tfds.features.Translation(("de", "en")),
            "many": tfds.features.TranslationVariableLanguages(languages=("de", "en")),
        }
    )

    class Mixed(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = "1.0.0"
        name = "mixed"
        url_infos = {}  # noqa: RUF012

        def _info(self):
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, dl_manager):
            raise NotImplementedError

        def _generate_examples(self):
            raise NotImplementedError

    directory = tmp_path / "mixed" / "1.0.0"
    directory.mkdir(parents=True)
    Mixed(data_dir=tmp_path).info.write_to_directory(directory)
    assert sorted(open_stored(epath.Path(directory)).info.features) == sorted(features)


@pytest.mark.parametrize(
    ("name", "there", "expected"),
    [
        ("ds", ["ds/1.0.0", "ds/1.10.0", "ds/1.9.0"], "ds/1.10.0"),
        ("ds:1.9.0", ["ds/1.10.0", "ds/1.9.0"], "ds/1.9.0"),
        ("ds:1.*.*", ["ds/1.2.0", "ds/2.0.0"], "ds/1.2.0"),
        ("ds:3.0.0", ["ds/1.0.0"], None),
        ("ds/1.0.0", ["ds/1.0.0", "ds/2.0.0"], "ds/1.0.0"),
        ("ds", ["ds/plain/1.0.0"], "ds/plain/1.0.0"),
        ("ds/plain", ["ds/plain/1.0.0", "ds/other/1.0.0"], "ds/plain/1.0.0"),
        ("ds/plain:1.0.0", ["ds/plain/1.0.0", "ds/plain/2.0.0"], "ds/plain/1.0.0"),
        ("MyData", ["my_data/1.0.0"], "my_data/1.0.0"),
        ("ds", ["ds/unfinished"], None),
        ("ds", [], None),
    ],
)
def test_a_dataset_is_found_by_name_configuration_and_version(tmp_path, name, there, expected):
    for path in there:
        (tmp_path / path).mkdir(parents=True)
        if "unfinished" not in path:
            (tmp_path / path / "dataset_info.json").write_text("{}")
    assert find_stored(name, epath.Path(tmp_path)) == (expected and epath.Path(tmp_path / expected))


def test_one_of_several_configurations_must_be_named(tmp_path):
    for config in ("plain", "other"):
        (tmp_path / "ds" / config / "1.0.0").mkdir(parents=True)
        (tmp_path / "ds" / config / "1.0.0" / "dataset_info.json").write_text("{}")
    with pytest.raises(UserError, match="'ds' has other, plain: for example ds/other"):
        find_stored("ds", epath.Path(tmp_path))


@pytest.mark.parametrize("file", ["dataset_info.json", "features.json"])
@pytest.mark.parametrize("content", [None, b"", b"{", b"[]", b"\xff", b"[" * 100_000, b'{"splits": 3}'])
def test_a_damaged_description_is_a_short_error(data_dir, file, content):
    path = data_dir / "mine" / "1.0.0" / file
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=r"stored dataset must be|feature must be|features"):
        open_stored(epath.Path(path.parent))


DAMAGE = {
    "empty": lambda data: b"",
    "half": lambda data: data[: len(data) // 2],
    "flipped": lambda data: data[:100] + bytes([data[100] ^ 255]) + data[101:],
    "other": lambda data: b"x" * 1000,
    "gone": None,
}


@pytest.mark.parametrize("objective", ["next_token", "classification"])
@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_damaged_examples_are_a_short_error(data_dir, damage, objective):
    (shard,) = (data_dir / "mine" / "1.0.0").glob("*.array_record*")
    content = shard.read_bytes()
    shard.unlink()
    if damage is not None:
        shard.write_bytes(damage(content))
    with pytest.raises(UserError, match=r"must be whole|must name text features"):
        open_data(DataConfig(source=("mine",), data_dir=str(data_dir)), OBJECTIVES.find(objective)())


@pytest.mark.parametrize("count", ["1000000000000", "9", "-1"])
@pytest.mark.parametrize("objective", ["next_token", "classification"])
def test_more_examples_than_there_are_is_a_short_error(data_dir, count, objective):
    def change(content):
        content["splits"][0]["shardLengths"] = [count]
        return content

    rewrite(data_dir, "dataset_info.json", change)
    with pytest.raises(UserError, match="must be whole"):
        open_data(DataConfig(source=("mine",), data_dir=str(data_dir)), OBJECTIVES.find(objective)())


def test_classes_of_one_name_are_refused(data_dir):
    (data_dir / "mine" / "1.0.0" / "label.labels.txt").write_text("a\na \n")
    with pytest.raises(UserError, match="Classes must have different names, 'mine' has a, a"):
        open_data(DataConfig(source=("mine",), data_dir=str(data_dir)), Classification())
