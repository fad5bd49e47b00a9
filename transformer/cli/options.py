"""What each command can be told, read and checked before anything heavy is imported."""

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
    """Other data than the run's own."""

    source: tuple[str, ...] = ()
    """Corpora to score instead of those the run was trained on: files, folders or datasets, as training takes them."""
    data_dir: str = ""
    """Where prepared datasets live; empty means where the run's do, if you have trained with that, else ~/tensorflow_datasets (or
    TFDS_DATA_DIR)."""
    text_key: str | None = None
    """Field of the text, where it has another name than in training."""
    prompt_key: str | None = None
    """Field of a prompt, likewise."""
    label_key: str | None = None
    """Field of the class, likewise."""
    source_key: str | None = None
    """Field of a pair's source, likewise."""
    target_key: str | None = None
    """Field of a pair's target, likewise."""
    stride: int | None = None
    """Score windows of running text that move on by so many tokens; 0 means packed documents."""
    limit: int | None = None
    """Score no more than so many tokens of running text; 0 means all."""


@dataclasses.dataclass(frozen=True)
class EvaluateModel:
    """Another way to run the model than in training."""

    memory_length: int | None = None
    """Vectors that each layer remembers of the rows before; 0 means that rows are scored without what precedes them."""


@dataclasses.dataclass(frozen=True)
class EvaluateOptions:
    """Score a run's model over a whole split, and print one JSON object.

    With --tasks, score a language model on tasks of EleutherAI's lm-eval (the extra lm-eval) instead; the run may be a folder of
    Hugging Face then.
    """

    workdir: str = positional("")
    """Directory of the run."""
    step: str = "latest"
    """Of the checkpoint: latest, best (by validation loss), or a number."""
    base: str = ""
    """Of adapters: directory of the run that they were trained on, if it lies elsewhere now."""
    weights: Weights = ""
    """Type of the model's matrices in memory: int8 (a quarter of float32) or bfloat16 (half); empty means as they are stored."""
    split: str | None = None
    """Which split: train, validation, test or all; without, validation, or all of a corpus that the run was not trained on."""
    data: EvaluateData = EvaluateData()
    model: EvaluateModel = EvaluateModel()
    reliability: str = ""
    """Of a classifier: a new .svg file for its reliability diagram, accuracy by confidence."""
    tasks: tuple[str, ...] = ()
    """Tasks, groups or tags of lm-eval, by name."""
    include_path: str = ""
    """With --tasks: a folder of your own tasks. A task may name Python functions, which then run."""
    num_fewshot: int | None = None
    """With --tasks: examples before each question; without, as the task has it."""
    limit: int = 0
    """With --tasks: score no more than so many examples of each; 0 means all."""


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
    of_both = {"workdir", "step", "base", "tasks", *of_tasks}
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

    Running text is also prepared by training itself. Labelled texts (.jsonl, .csv, .tsv, or a folder with one folder for
    each class) and pairs (.jsonl, .csv, .tsv, or two files that belong together line by line) are prepared here, under a
    name that --data.source then takes. Files may be compressed (.gz, .bz2, .xz, .zst).
    """

    files: tuple[str, ...] = positional(())
    """The text (a file, a folder, a .jsonl file, or python_stdlib), or the files of the training split."""
    kind: str = chosen_from(FORMS, "text")
    """Running text, texts with a class, or pairs of texts."""
    name: str = ""
    """Labelled texts and pairs: name of the dataset."""
    validation: tuple[str, ...] = ()
    """Files of the validation split; without, training holds out a part."""
    test: tuple[str, ...] = ()
    """Labelled texts and pairs: files of the test split."""
    separator: str = DataConfig.separator
    """Running text: what stands between the documents of a text file, as <|endoftext|>."""
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
    """Running text: part held out for validation."""
    test_fraction: float = DataConfig.test_fraction
    """Running text: part held out for testing."""
    record_bytes: int = DataConfig.record_bytes
    """Running text: longer documents are stored in pieces of about this size."""
    tokenizer: str = ""
    """Store the tokens too, as training with this data.tokenizer.kind does: bytes, characters, bpe or words (of pairs, with one
    vocabulary for both sides); or as a run that starts from this directory does, of a run or of a pretrained model."""
    tokenizer_size: int = 0
    """data.tokenizer.size of the training; 0 means 4096."""
    tokenizer_bytes: int = DataConfig.tokenizer_bytes
    """data.tokenizer_bytes of the training."""
    data_dir: str = DataConfig.data_dir
    """Where prepared datasets live; empty means ~/tensorflow_datasets (or TFDS_DATA_DIR)."""
    beam_pipeline_options: str = ""
    """Running text: prepare it on Apache Beam; its options, with commas between, as of `tfds build`: runner=DirectRunner,..."""


def _prepare(arguments: list[str]) -> tuple[PrepareOptions, Given]:
    options, given = read(PrepareOptions(), arguments, "transformer prepare")
    require(len(options.files) > 0, "There must be something to prepare, got no file.")
    form, forms = FORMS.find(options.kind), [FORMS.find(name) for name in FORMS.names]
    of_some = {name for other in forms for name in other.prepares}
    refuse(
        {name: given[name] for name in given if name in of_some.difference(form.prepares)},
        lambda name: (
            f"is for --kind {' or '.join(other.kind for other in forms if name in other.prepares)}, got --kind "
            f"{options.kind}; leave it out, or say which kind it is."
        ),
    )
    require(
        options.tokenizer in ("", "bytes", "characters", "bpe", "words") or os.path.isdir(expand(options.tokenizer)),
        f"--tokenizer must be bytes, characters, bpe, words, or the directory of a run or of a pretrained model, got "
        f"{options.tokenizer!r}; other kinds are not alike each time, and training stores their tokens itself.",
    )
    require(
        options.tokenizer in ("bpe", "words") or not {"tokenizer_size", "tokenizer_bytes"} & set(given),
        f"--tokenizer-size and --tokenizer-bytes are of --tokenizer bpe or words, got {options.tokenizer!r}; leave them out.",
    )
    require(
        not {"validation", "validation_fraction"} <= set(given),
        "--validation-fraction is for text without files of --validation, got both; leave one out.",
    )
    require(
        not form.needs_name or options.name != "",
        f"A dataset of {form.title} needs a name that training can ask for; give --name.",
    )
    return options, given


# ---- plan --------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class PlanOptions:
    """Compile the step of a config for hardware that is not there, and say what it takes."""

    topology: str = ""
    """v5e:4x4, v5p:8x8x8, v6e-256, h100:8, ... (kinds: v4, v5e, v5p, v6e, tpu7x, h100)"""
    search: bool = False
    """Try meshes, remat and micro-batches, compile the best dozen, and rank them."""
    decode: tuple[int, int] = (0, 0)
    """A step of decoding instead of training: so many rows, caches of so many tokens; 0 0 means training."""
    json: bool = False
    """Print one JSON object (with --search a line each) on standard output and nothing else there."""


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
    """Say what the folder of a pretrained model is, and whether a model here can be it; its weights are not read.

    What `transformer import` would refuse is refused in the same words. A config file in its place has its batches and parameters
    shown.
    """

    folder: str = positional("")
    """The folder of the pretrained model."""
    dtype: Dtype = ""
    """Of parameters, as for import."""


def _inspect(arguments: list[str]) -> tuple[Config | InspectOptions]:
    """A folder of a pretrained model; or a config file, or the directory of a run."""
    name = expand(arguments[0]) if arguments else ""
    if os.path.isdir(name) and not os.path.exists(os.path.join(name, "checkpoints")):
        return (read(InspectOptions(), arguments, "transformer inspect")[0],)
    return (parse_config(arguments, command="transformer inspect"),)


@dataclasses.dataclass(frozen=True)
class ImportOptions:
    """Make a run's directory of a pretrained model: a folder as Hugging Face has them, with safetensors.

    Every tensor and every key of its config must be known, or the folder is refused. `transformer inspect HF_DIR` says whether it
    is, without reading a weight. The run can be used by every command, and others can start from it:
    transformer train DIR --data.source my.txt --workdir runs/mine
    """

    folder: str = positional("")
    """The folder of the pretrained model."""
    workdir: str = ""
    """A new directory for the run."""
    base: str = ""
    """Of a folder with an adapter of PEFT: directory of the run of its base."""
    dtype: Dtype = ""
    """Of parameters and activations; empty means as the weights are stored."""


def _import(arguments: list[str]) -> tuple[ImportOptions, Given]:
    options, given = read(ImportOptions(), arguments, "transformer import")
    require(options.workdir != "", "An imported model needs a directory of its own; give --workdir DIR.")
    return options, given


@dataclasses.dataclass(frozen=True)
class ExportOptions:
    """Write a run's model as a folder that Hugging Face's libraries read: config, safetensors and tokenizer.

    A model that no family can express is refused, and the fields in the way are named.
    """

    workdir: str = positional("")
    """Directory of the run."""
    folder: str = positional("")
    """A new folder."""
    step: str = "latest"
    """Of the checkpoint: latest, best (by validation loss), or a number."""
    base: str = ""
    """Of adapters: directory of the run that they were trained on, if it lies elsewhere now."""
    dtype: Dtype = ""
    """Of the weights; empty means as the imported files had them, or as the parameters are."""
    family: str = ""
    """The model_type to write, such as llama; empty means that of the import, or the first that can express the model."""
    adapter: bool = False
    """Write the adapters alone, as PEFT reads them beside their base; without, they are merged."""


# ---- prove -------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class ProveOptions:
    """Train a small model on the CPU four times: undisturbed, killed, with a damaged checkpoint, and on two devices; compare."""

    keep: str = ""
    """A new directory for the runs, which stay there; empty means a temporary one."""


# ---- all ---------------------------------------------------------------------------------------------------------------


class Command(NamedTuple):
    """How a command line of one command is read."""

    parse: Callable[[list[str]], tuple[Any, ...]]
    """Its arguments become those of the command's `main`."""
    flags: Callable[[], dict[str, Flag]]
    """For messages that name a field."""


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
