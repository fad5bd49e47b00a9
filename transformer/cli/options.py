"""Options of each command, read and checked before heavy imports."""

import dataclasses
import os
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

from transformer.cli.arguments import parse_config, parse_config_and
from transformer.cli.fields import Flag, all_flags, chosen_from, flags, positional
from transformer.cli.reading import Given, read, refuse
from transformer.cli.row_options import EmbedOptions, PredictOptions, ScoreOptions, embed, predict, score
from transformer.cli.using import AttentionOptions, GenerateOptions, ReportOptions, parse_attention, parse_report
from transformer.config import Config, DataConfig
from transformer.form import FORMS
from transformer.model_config import Weights
from transformer.storage import expand
from transformer.validation import require

# ---- evaluate ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class EvaluateData:
    """Data to score, if not the run's own."""

    source: tuple[str, ...] = ()
    """Corpora to score instead of the training corpora: files, folders or datasets, as for training."""
    data_dir: str = ""
    """Folder of prepared datasets; empty means the run's folder, if you have trained with it, else ~/tensorflow_datasets (or
    TFDS_DATA_DIR)."""
    text_key: str | None = None
    """Field of the text, if its name differs from training."""
    prompt_key: str | None = None
    """Field of a prompt, if its name differs from training."""
    label_key: str | None = None
    """Field of the class, if its name differs from training."""
    source_key: str | None = None
    """Field of a pair's source, if its name differs from training."""
    target_key: str | None = None
    """Field of a pair's target, if its name differs from training."""
    stride: int | None = None
    """Score running text in overlapping windows, each this many tokens after the previous one; 0 means packed documents."""
    limit: int | None = None
    """Score at most this many tokens of running text; 0 means all."""


@dataclasses.dataclass(frozen=True)
class EvaluateModel:
    """Settings of the model that may differ from training."""

    memory_length: int | None = None
    """Length of the Transformer-XL memory; 0 means that each row is scored without the text before it."""


@dataclasses.dataclass(frozen=True)
class EvaluateOptions:
    """Score a run's model over a whole split, and print one JSON object.

    With --tasks, a language model is scored on tasks of EleutherAI's lm-eval instead (install the extra lm-eval). The run may
    then be a Hugging Face folder.
    """

    workdir: str = positional("")
    """Directory of the run."""
    step: str = "latest"
    """Step of the checkpoint: latest, best (by validation loss), or a number."""
    base: str = ""
    """For adapters: directory of their base run, if it has moved."""
    weights: Weights = ""
    """Type of the model's matrices in memory: int8 (a quarter of float32) or bfloat16 (half); empty means their stored type."""
    split: str | None = None
    """The split: train, validation, test or all. The default is validation, or all for a corpus that was not trained on."""
    data: EvaluateData = EvaluateData()
    model: EvaluateModel = EvaluateModel()
    reliability: str = ""
    """For a classifier: a new .svg file for its reliability diagram (accuracy by confidence)."""
    tasks: tuple[str, ...] = ()
    """Tasks, groups or tags of lm-eval, by name."""
    include_path: str = ""
    """With --tasks: a folder of your own tasks. Python functions that a task names are executed."""
    num_fewshot: int | None = None
    """With --tasks: number of examples before each question; the task's own number by default."""
    limit: int = 0
    """With --tasks: score at most this many examples of each task; 0 means all."""


def _evaluate(arguments: list[str]) -> tuple[EvaluateOptions, Given]:
    options, given = read(EvaluateOptions(), arguments, "transformer evaluate")
    of_tasks = {"include_path", "num_fewshot", "limit"}
    require(
        options.reliability == "" or options.reliability.endswith(".svg"),
        f"--reliability must be the name of a new .svg file, got {options.reliability!r}.",
    )
    if not options.tasks:
        refuse(
            {name: given[name] for name in given if name in of_tasks},
            lambda name: "is for --tasks; name some, or leave it out.",
        )
        return options, given
    of_both = {"workdir", "step", "base", "weights", "tasks", *of_tasks}
    refuse(
        {name: given[name] for name in given if name not in of_both},
        lambda name: "is for a split of data, got --tasks too; leave one of them out.",
    )
    require(options.limit >= 0, f"--limit must be at least 0, got {options.limit}.")
    require((options.num_fewshot or 0) >= 0, f"--num-fewshot must be at least 0, got {options.num_fewshot}.")
    return options, given


# ---- prepare -----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class PrepareOptions:
    """Turn text into a TFDS dataset (ArrayRecord) on disk.

    Running text needs no such step, since training prepares it too. Labelled texts are .jsonl, .csv or .tsv files, or a folder
    with one folder for each class. Pairs are .jsonl, .csv or .tsv files, or two files with equally many lines. The dataset of
    labelled texts or pairs gets a name for --data.source. Files may be compressed (.gz, .bz2, .xz, .zst).
    """

    files: tuple[str, ...] = positional(())
    """The text (a file, a folder, a .jsonl file, or python_stdlib), or the files of the training split."""
    kind: str = chosen_from(FORMS, "text")
    """Running text, texts with a class, or pairs of texts."""
    name: str = ""
    """Labelled texts and pairs: name of the dataset, for --data.source."""
    validation: tuple[str, ...] = ()
    """Files of the validation split. By default, training holds out a part."""
    test: tuple[str, ...] = ()
    """Labelled texts and pairs: files of the test split."""
    separator: str = DataConfig.separator
    """Running text: separator of the documents in a text file, such as <|endoftext|>."""
    text_key: str = DataConfig.text_key
    """Running and labelled text: field of the text."""
    prompt_key: str = DataConfig.prompt_key
    """Running text: field of a .jsonl record that holds a prompt."""
    label_key: str = DataConfig.label_key
    """Labelled texts: field of the class."""
    source_key: str = DataConfig.source_key
    """Pairs: field of the source."""
    target_key: str = DataConfig.target_key
    """Pairs: field of the target."""
    validation_fraction: float = DataConfig.validation_fraction
    """Running text: fraction held out for validation."""
    test_fraction: float = DataConfig.test_fraction
    """Running text: fraction held out for testing."""
    record_bytes: int = DataConfig.record_bytes
    """Running text: longer documents are stored in pieces of about this size."""
    tokenizer: str = ""
    """Store the tokens too, with the same tokenizer as the training: a data.tokenizer.kind (bytes, characters, bpe or words), or
    the directory of the run or pretrained model that training starts from. Pairs have one vocabulary for both sides."""
    tokenizer_size: int = 0
    """Value of data.tokenizer.size in the training; 0 means 4096."""
    tokenizer_bytes: int = DataConfig.tokenizer_bytes
    """Value of data.tokenizer_bytes in the training."""
    data_dir: str = DataConfig.data_dir
    """Folder of prepared datasets; empty means ~/tensorflow_datasets (or TFDS_DATA_DIR)."""
    beam_pipeline_options: str = ""
    """Running text: prepare it on Apache Beam with these options, separated by commas as for `tfds build`:
    runner=DirectRunner,..."""


def _prepare(arguments: list[str]) -> tuple[PrepareOptions, Given]:
    options, given = read(PrepareOptions(), arguments, "transformer prepare")
    require(len(options.files) > 0, "There must be something to prepare, got no file.")
    form, forms = FORMS.find(options.kind), [FORMS.find(name) for name in FORMS.names]
    of_some = {name for other in forms for name in other.prepares}
    refuse(
        {name: given[name] for name in given if name in of_some.difference(form.prepares)},
        lambda name: (
            f"is for --kind {' or '.join(other.kind for other in forms if name in other.prepares)}, got --kind "
            f"{options.kind}; leave it out, or give another --kind."
        ),
    )
    require(
        options.tokenizer in ("", "bytes", "characters", "bpe", "words") or os.path.isdir(expand(options.tokenizer)),
        f"--tokenizer must be bytes, characters, bpe, words, or the directory of a run or of a pretrained model, got "
        f"{options.tokenizer!r}; other kinds may differ each time, and training stores their tokens itself.",
    )
    require(
        options.tokenizer in ("bpe", "words") or not {"tokenizer_size", "tokenizer_bytes"} & set(given),
        f"--tokenizer-size and --tokenizer-bytes are for --tokenizer bpe or words, got {options.tokenizer!r}; leave them out.",
    )
    require(
        not {"validation", "validation_fraction"} <= set(given),
        "--validation-fraction is for text without --validation files, got both; leave one out.",
    )
    require(
        not form.needs_name or options.name != "",
        f"A dataset of {form.title} needs a name for --data.source of the training; give --name.",
    )
    return options, given


# ---- plan --------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class PlanOptions:
    """Compile the step of a config for absent hardware, and print its memory, time and communication."""

    topology: str = ""
    """v5e:4x4, v5p:8x8x8, v6e-256, h100:8, ... (kinds: v4, v5e, v5p, v6e, tpu7x, h100)"""
    search: bool = False
    """Try meshes, remat and micro-batches, compile the best dozen, and rank them."""
    decode: tuple[int, int] = (0, 0)
    """Plan a decoding step with this many rows and cache slots; 0 0 means a training step."""
    json: bool = False
    """Print only JSON on standard output: one object, or with --search one on each line."""


def _plan(arguments: list[str]) -> tuple[Config, PlanOptions]:
    config, own = parse_config_and(PlanOptions(), arguments, command="transformer plan")
    options = PlanOptions(**own)
    require(
        options.topology != "",
        "plan needs --topology NAME, such as v5e:4x4; `transformer plan --help` lists the kinds.",
    )
    require(
        "decode" not in own or min(options.decode) > 0,
        f"--decode takes rows and capacity, two positive numbers, got {' '.join(map(str, options.decode))}.",
    )
    require("decode" not in own or not options.search, "--search is for training; leave out --decode.")
    return config, options


# ---- inspect, import, export --------------------------------------------------------------------------------------------------


Dtype = Literal["", "float32", "bfloat16", "float16"]


@dataclasses.dataclass(frozen=True)
class InspectOptions:
    """Describe a pretrained model's folder without reading its weights, or show batches and parameters of a config.

    A folder that `transformer import` refuses is refused here too, with the same message.
    """

    folder: str = positional("")
    """The folder of the pretrained model."""
    dtype: Dtype = ""
    """Type of the parameters, as for import."""


def _inspect(arguments: list[str]) -> tuple[Config | InspectOptions]:
    """The options for a pretrained folder, or the config of a config file or of a run."""
    name = expand(arguments[0]) if arguments else ""
    if os.path.isdir(name) and not os.path.exists(os.path.join(name, "checkpoints")):
        return (read(InspectOptions(), arguments, "transformer inspect")[0],)
    return (parse_config(arguments, command="transformer inspect"),)


@dataclasses.dataclass(frozen=True)
class ImportOptions:
    """Make a run's directory from a pretrained model: a Hugging Face folder with safetensors.

    A folder with an unknown tensor or config key is refused; `transformer inspect HF_DIR` checks this without reading weights.
    Every command accepts the run, and a new run can start from it:
    transformer train DIR --data.source my.txt --workdir runs/mine
    """

    folder: str = positional("")
    """The folder of the pretrained model."""
    workdir: str = ""
    """A new directory for the run."""
    base: str = ""
    """For a folder with a PEFT adapter: directory of its base run."""
    dtype: Dtype = ""
    """Type of parameters and activations; empty means the stored type of the weights."""


def _import(arguments: list[str]) -> tuple[ImportOptions, Given]:
    options, given = read(ImportOptions(), arguments, "transformer import")
    require(options.workdir != "", "An imported model needs a new directory; give --workdir DIR.")
    return options, given


@dataclasses.dataclass(frozen=True)
class ExportOptions:
    """Write a run's model as a Hugging Face folder: config, safetensors and tokenizer.

    A model that no family can express is refused; the message names the fields.
    """

    workdir: str = positional("")
    """Directory of the run."""
    folder: str = positional("")
    """A new folder."""
    step: str = "latest"
    """Step of the checkpoint: latest, best (by validation loss), or a number."""
    base: str = ""
    """For adapters: directory of their base run, if it has moved."""
    dtype: Dtype = ""
    """Type of the weights; empty means the type of the imported files, or of the parameters."""
    family: str = ""
    """The model_type to write, such as llama; empty means the imported one, or the first that can express the model."""
    adapter: bool = False
    """Write only the adapters, for PEFT. By default, they are merged into the base."""


# ---- prove -------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class ProveOptions:
    """Train a small model on the CPU four times: undisturbed, killed, with a damaged checkpoint, and on two devices; compare."""

    keep: str = ""
    """A new directory in which the runs are kept; empty means a temporary one."""


# ---- all ---------------------------------------------------------------------------------------------------------------


class Command(NamedTuple):
    """Parser and flags of a command."""

    parse: Callable[[list[str]], tuple[Any, ...]]
    """Turns the command line into the arguments of the command's `main`."""
    flags: Callable[[], dict[str, Flag]]
    """All flags, for error messages."""


def _of_config(name: str) -> Command:
    def parsed(arguments: list[str]) -> tuple[Config]:
        return (parse_config(arguments, command=f"transformer {name}", trains=name == "train"),)

    return Command(parsed, lambda: all_flags(Config()))


def _of_options(name: str, default: Any) -> Command:
    return Command(lambda arguments: read(default, arguments, f"transformer {name}"), lambda: flags(default))


OPTIONS = {
    "train": _of_config("train"),
    "inspect": Command(_inspect, lambda: all_flags(Config())),
    "plan": Command(_plan, lambda: all_flags(Config()) | flags(PlanOptions())),
    "evaluate": Command(_evaluate, lambda: flags(EvaluateOptions())),
    "generate": _of_options("generate", GenerateOptions()),
    "attention": Command(parse_attention, lambda: flags(AttentionOptions())),
    "report": Command(parse_report, lambda: flags(ReportOptions())),
    "predict": Command(predict, lambda: flags(PredictOptions())),
    "embed": Command(embed, lambda: flags(EmbedOptions())),
    "score": Command(score, lambda: flags(ScoreOptions())),
    "prove": _of_options("prove", ProveOptions()),
    "import": Command(_import, lambda: flags(ImportOptions())),
    "export": _of_options("export", ExportOptions()),
    "prepare": Command(_prepare, lambda: flags(PrepareOptions())),
}
