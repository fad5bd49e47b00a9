"""The config of a run as frozen dataclasses, validated on construction: data, objective, optimizer, devices, bookkeeping."""

import dataclasses
import os
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, cast

from transformer.adapter_config import AdapterConfig as AdapterConfig
from transformer.form import FORMS
from transformer.model_config import ModelConfig
from transformer.objective import OBJECTIVES, Objective
from transformer.optimizer import OPTIMIZERS, Optimizer
from transformer.parallel_config import ParallelConfig as ParallelConfig
from transformer.storage import expand
from transformer.tokenizer import TOKENIZERS, TokenizerKind
from transformer.tracker import TRACKERS
from transformer.validation import Settings, require, require_at_least, require_range, shown


def _user_path(path: Any) -> Any:
    return (expand(path) if path else "") if isinstance(path, (str, os.PathLike)) else path


UserPath = Annotated[str, _user_path]
"""A field that holds a path; ~ is expanded to the home directory on construction."""


@dataclasses.dataclass(frozen=True)
class DataConfig(Settings):
    """The data to read, and how it becomes batches."""

    source: tuple[UserPath, ...] = ("python_stdlib",)
    """Corpora: text files, folders of them, .jsonl files, tables (.csv, .tsv), token ids (.bin), names of TFDS datasets, or
    python_stdlib. Labelled texts: .jsonl, tables or a folder with one folder per class. Pairs: .jsonl, a table, or two aligned
    files."""
    validation: tuple[UserPath, ...] = ()
    """Data to score during training, named like sources; empty means a part of the sources (validation_fraction)."""
    weights: tuple[float, ...] = ()
    """Share of rows drawn from each source; empty means equal shares."""
    validation_fraction: float = 0.1
    """Share of a local source's text held out for validation: whole files of a folder if they fit, else its end. For labelled
    texts and pairs without a validation split: the share of each class taken from training."""
    test_fraction: float = 0.0
    """Share of a local source's text held out for testing, after the validation part."""
    separator: str = ""
    """Separator between the documents of a text file (including the newline after it), such as <|endoftext|>; empty means one
    document per file."""
    text_key: str = "text"
    """Feature with the text (TFDS names, .jsonl)."""
    prompt_key: str = "prompt"
    """Feature with a prompt, which is read but not learnt (in records that have one)."""
    label_key: str = "label"
    """Feature with the class of a labelled text."""
    source_key: str = "source"
    """Feature with the source of a pair."""
    target_key: str = "target"
    """Feature with the target of a pair."""
    tokenizer: TokenizerKind = dataclasses.field(default_factory=TOKENIZERS.default)
    """How text becomes tokens."""
    tokenizer_bytes: int = 100_000_000
    """Bytes of evenly spaced training text on which a vocabulary of byte pairs, word pieces or words is trained; a smaller
    split is used whole."""
    share_vocabulary: bool = True
    """Pairs: one vocabulary for both sources and targets, or one for each."""
    sequence_length: int = 256
    """Tokens per row."""
    batch_size: int = 16
    """Rows per optimizer step, over all devices and micro-batches."""
    truncate: Literal["head", "tail", "head_tail"] = "head"
    """Part to keep of a labelled text or a source that is longer than a row."""
    buckets: tuple[int, ...] = ()
    """Lengths that batches of labelled texts or pairs are padded to; empty means 1/4, 1/2 and 1 of sequence_length."""
    pack: bool = True
    """Fill rows with several documents, separated by segment ids; off: windows of contiguous text from random positions."""
    max_segments: int = 32
    """Largest number of documents per row; the row then ends in padding. 0 means no limit; fused attention on a GPU then refuses
    packed rows. A higher limit takes more memory there."""
    best_fit: bool = False
    """Training: pack whole documents into rows, from some hundred rows at a time, and cut only documents longer than a row. Off:
    a document that does not fit continues in the next row, where it does not see its earlier tokens."""
    stride: int = 0
    """Evaluation of running text: 0 scores rows of packed documents. Otherwise windows of a document advance by this many
    tokens, and only these are scored: each is preceded by (almost) a whole window."""
    limit: int = 0
    """Evaluation of running text: score at most this many tokens, the first ones of a split; 0 means all."""
    num_streams: int = 0
    """Parts of the corpus that are shuffled and read independently; 0 means the largest divisor of batch_size up to 64."""
    shuffle_seed: Annotated[int, 63] = 0  # hashed, never an array
    """Seed of the order of documents."""
    record_bytes: int = 16_384
    """Size of the pieces in which longer documents of local sources are stored, in bytes."""
    data_dir: UserPath = ""
    """Directory of prepared datasets; empty means ~/tensorflow_datasets (or TFDS_DATA_DIR)."""

    def __post_init__(self) -> None:
        require(len(self.source) > 0, "DataConfig.source must name at least one corpus, got none.")
        require(all(self.source), f"Each of DataConfig.source must not be empty, got {self.source}.")
        require(all(self.validation), f"Each of DataConfig.validation must not be empty, got {self.validation}.")
        require(
            len(self.weights) in (0, len(self.source)),
            f"DataConfig.weights must be one per source ({len(self.source)}) or none, got {len(self.weights)}.",
        )
        require(all(w > 0 for w in self.weights), f"DataConfig.weights must be positive, got {self.weights}.")
        require_range(self, 0, 1, "validation_fraction", "test_fraction")
        require(
            self.validation_fraction + self.test_fraction < 1,
            "DataConfig.validation_fraction + test_fraction must leave something to train on, "
            f"got {self.validation_fraction} + {self.test_fraction}.",
        )
        require_at_least(self, 1, "batch_size")
        require_at_least(self, 2, "sequence_length")
        require_at_least(self, 64, "record_bytes")
        require_at_least(self, 1000, "tokenizer_bytes")
        require_at_least(self, 0, "num_streams", "shuffle_seed", "stride", "limit", "max_segments")
        require(
            self.stride <= self.sequence_length,
            f"DataConfig.stride must not exceed sequence_length={self.sequence_length}, got {self.stride}.",
        )
        require(
            all(0 < bucket <= self.sequence_length for bucket in self.buckets)
            and tuple(sorted(set(self.buckets))) == self.buckets
            and self.sequence_length in (self.buckets or (self.sequence_length,)),
            f"DataConfig.buckets must rise to sequence_length={self.sequence_length}, got {self.buckets}.",
        )
        n, b = self.num_streams, self.batch_size
        require(
            n == 0 or (n % b == 0 and n <= max(b, 2**16)) or b % n == 0,
            f"DataConfig.num_streams must divide batch_size={b} or be a multiple of it, got {n} (at most 65,536).",
        )

    def unused(self) -> Mapping[str, str]:
        """Shares of a single source, packing of windows, and the sample of tokenizers that are not trained."""
        unused = {} if len(self.source) > 1 else {"weights": "several sources (data.source)"}
        if self.validation and self.validation_fraction > 0:
            unused["validation_fraction"] = "runs without validation files of their own (data.validation)"
        if not self.pack:
            unused["best_fit"] = "packed rows (data.pack=True)"
        if not self.tokenizer.sampled:
            unused["tokenizer_bytes"] = "tokenizers that are trained on a sample (data.tokenizer.kind=bpe)"
        return unused


@dataclasses.dataclass(frozen=True)
class TrainingConfig(Settings):
    """The run: its length, its reports, and its checkpoints."""

    steps: int = 1000
    """Optimizer steps."""
    epochs: float = 0.0
    """Passes over the training split, instead of steps, which then follow from its size; 0 means steps. Running text must have
    one source. It is tokenized once to be counted: an epoch has as many tokens as the split."""
    seed: int = 0
    """Seed of initialisation and dropout."""
    init_from: UserPath = ""
    """Directory of a run from which to take initial parameters, where names and shapes agree."""
    init_from_step: str = "latest"
    """Checkpoint of that run: latest, best (by validation loss), or a step number."""
    log_every: int = 10
    """Steps between metric rows."""
    eval_every: int = 200
    """Steps between evaluations on the whole validation split; 0 means at the end only."""
    patience: int = 0
    """Number of evaluations in a row without a lower validation loss after which training stops. Steps with a new lowest loss are
    saved, for `--step best`. 0 means that training takes all its steps."""
    checkpoint_every: int = 200
    """Steps between checkpoints; 0 means at the end only."""
    keep_checkpoints: int = 2
    """Number of latest checkpoints to keep, besides the best one by validation loss."""
    sample_every: int = 0
    """Steps between printed samples; 0 means at the end only."""
    sample_prompt: str = ""
    """Prompt of the samples; empty means the end-of-text token."""
    sample_length: int = 200
    """Tokens per sample; 0 means no samples."""
    profile_steps: tuple[int, int] = (0, 0)
    """First and last step of a trace in WORKDIR/profile (for TensorBoard, XProf and Perfetto); 0 0 means none."""
    trackers: tuple[str, ...] = ()
    """Trackers that receive rows of metrics besides the run's directory: wandb, mlflow, or a custom one (`TRACKERS`)."""
    skip_spikes: float = 0.0
    """Skip a step whose gradient norm exceeds this many times the median of the last 128 (like a float16 step that overflows);
    metric rows count them (skipped_spikes). 0 means off."""
    hang_timeout: int = 0
    """Seconds after which an unfinished step ends the process, with a traceback; a run's other processes then end too. 0 means
    1,800 for several processes and no limit for one. Compiling, evaluating and saving have four hours."""

    def __post_init__(self) -> None:
        require_at_least(self, 1, "steps", "log_every", "keep_checkpoints")
        require_at_least(self, 0, "eval_every", "checkpoint_every", "sample_every", "sample_length", "hang_timeout")
        require_at_least(self, 0, "patience", "epochs")
        for name in self.trackers:
            TRACKERS.find(name)
        require(
            self.patience == 0 or self.eval_every > 0,
            f"TrainingConfig.patience counts evaluations, got patience={self.patience} and eval_every=0; set eval_every.",
        )
        require(
            self.init_from_step in ("latest", "best") or self.init_from_step.isdecimal(),
            f"TrainingConfig.init_from_step must be latest, best or the number of a step, got {self.init_from_step!r}.",
        )
        require(
            self.skip_spikes == 0 or self.skip_spikes > 1,
            f"TrainingConfig.skip_spikes must be 0 (off) or above 1, in medians of the norm, got {self.skip_spikes}.",
        )
        first, last = self.profile_steps
        require(
            (first, last) == (0, 0) or (2 <= first <= last and (last <= self.steps or self.epochs > 0)),
            "TrainingConfig.profile_steps must start at step 2 or later (step 1 compiles), end at or after their start, and not "
            f"exceed the run's last step {self.steps}, got {first} {last}.",
        )

    def unused(self) -> Mapping[str, str]:
        """Settings for an initial run, evaluations or samples, if there are none."""
        found = {} if self.init_from else {"init_from_step": "runs that start from another (training.init_from)"}
        if self.eval_every == 0:
            found["patience"] = "runs that are evaluated (training.eval_every)"
        if self.sample_length == 0:
            found |= dict.fromkeys(("sample_every", "sample_prompt"), "runs with samples (training.sample_length)")
        return found


OF_SOME = (
    "model.decoder_layers",
    "model.memory_length",
    "model.pooling",
    "model.pooler",
    "model.token_types",
    "model.masked_head",
    "model.head_bias",
    "data.weights",
    "data.separator",
    "data.text_key",
    "data.prompt_key",
    "data.label_key",
    "data.source_key",
    "data.target_key",
    "data.share_vocabulary",
    "data.test_fraction",
    "data.truncate",
    "data.buckets",
    "data.pack",
    "data.max_segments",
    "data.best_fit",
    "data.stride",
    "data.limit",
    "data.num_streams",
    "data.record_bytes",
    "training.sample_every",
    "training.sample_prompt",
    "training.sample_length",
)
"""Settings that not every run uses; an objective, and the form of its data, declare the ones they use."""


@dataclasses.dataclass(frozen=True)
class Config(Settings):
    """A run: model, data, objective, adapters, optimizer, devices and bookkeeping."""

    model: ModelConfig = ModelConfig()
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    objective: Objective = dataclasses.field(default_factory=OBJECTIVES.default)
    adapter: AdapterConfig = AdapterConfig()
    optimizer: Optimizer = dataclasses.field(default_factory=OPTIMIZERS.default)
    parallel: ParallelConfig = ParallelConfig()
    training: TrainingConfig = TrainingConfig()
    workdir: UserPath = ""
    """Directory of the run (may be remote, gs://...); empty means runs/NAME-OF-CONFIG."""

    def __post_init__(self) -> None:
        require(
            self.model.max_length == 0 or self.model.max_length >= self.data.sequence_length,
            f"model.max_length must be 0 or at least data.sequence_length={self.data.sequence_length}, "
            f"got {self.model.max_length}.",
        )
        require(
            self.adapter.rank == 0 or self.training.init_from != "",
            f"Adapters are trained on a frozen base, got adapter.rank={self.adapter.rank} without one; set "
            "training.init_from to its run.",
        )
        for path, purpose in self.unused().items():
            value, default = value_and_default(self, path)
            require(
                says_nothing(value, default),
                f"{path} is for {purpose or users(path)}, got {shown(value)} for the {self.objective.kind} objective; leave it "
                "out.",
            )
        self.objective.check(self)
        self.optimizer.check(self)

    def unused(self) -> Mapping[str, str]:
        """Settings that have no effect in this run, by path, each with its purpose if that depends on values."""
        of_objective = {path: "" for path in OF_SOME if not self.objective.uses(path)}
        if not self.model.has_experts:
            of_objective |= dict.fromkeys(("objective.load_balance", "objective.router_z"), "models with experts")
        if self.model.memory_length > 0:
            settings = ("data.max_segments", "data.best_fit")
            of_objective |= dict.fromkeys(settings, "rows that do not continue each other (model.memory_length=0)")
        parts = [(getattr(self, field.name), f"{field.name}.") for field in dataclasses.fields(self)]
        return {path: purpose for part, start in parts for path, purpose in _unused_within(part, start)} | of_objective


def _unused_within(part: Any, path: str) -> Iterator[tuple[str, str]]:
    """The unused settings of a part of a config, and of its own parts, by path."""
    if isinstance(part, Settings):
        yield from ((path + name, purpose) for name, purpose in part.unused().items())
        for field in dataclasses.fields(cast(Any, part)):
            yield from _unused_within(getattr(part, field.name), f"{path}{field.name}.")
    elif isinstance(part, tuple):
        for index, element in enumerate(part):
            yield from _unused_within(element, f"{path}{index}.")


def says_nothing(value: object, default: object) -> bool:
    """Whether a setting requests nothing: it has its default, or is 0."""
    return value == default or (type(value) is int and value == 0)


def value_and_default(config: Config, path: str) -> tuple[Any, Any]:
    """The value and the default of a setting."""
    *sections, name = path.split(".")
    part: Any = config
    for section in sections:
        part = part[int(section)] if isinstance(part, tuple) else getattr(part, section)
    (field,) = (field for field in dataclasses.fields(part) if field.name == name)
    default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    return getattr(part, name), default


def users(setting: str) -> str:
    """The objectives, or the forms of data, that use a setting."""
    forms = [form.title for form in map(FORMS.find, FORMS.names) if setting in form.settings]
    kinds = [kind for kind in OBJECTIVES.names if OBJECTIVES.find(kind).uses(setting)]
    return " and ".join(forms) or f"the objective{'s' * (len(kinds) > 1)} {' and '.join(kinds)}"
