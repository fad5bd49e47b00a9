"""Optimizers and learning-rate schedules: the base classes of the package's and of user-defined ones."""

import dataclasses
import itertools
import re
from typing import TYPE_CHECKING, ClassVar

from transformer.kinds import Family, Kind
from transformer.types import Array
from transformer.validation import require, require_at_least, require_range

if TYPE_CHECKING:
    import optax

    from transformer.config import Config

OPTIMIZERS = Family(
    "optimizer",
    {
        "adamw": "transformer.optimizers.adamw",
        "lion": "transformer.optimizers.lion",
        "adafactor": "transformer.optimizers.adafactor",
        "muon": "transformer.optimizers.muon",
    },
)
SCHEDULES = Family(
    "optimizer.schedule",
    {
        "cosine": "transformer.schedules.cosine",
        "linear": "transformer.schedules.linear",
        "inverse_sqrt": "transformer.schedules.inverse_sqrt",
        "constant": "transformer.schedules.constant",
        "wsd": "transformer.schedules.wsd",
    },
)


@dataclasses.dataclass(frozen=True)
class Schedule(Kind):
    """The learning rate by step, as a fraction of its peak. Its fields are its settings.

    A user-defined schedule derives from this or from one of the package's, has a name (`kind`), and is registered by
    `SCHEDULES.register`. It must define `decay`. Warm-up and restarts are common to all (`training.learning_rate`).
    """

    family = SCHEDULES

    warmup_steps: int = 0
    """Steps of linear warm-up from 0."""
    restarts: tuple[int, ...] = ()
    """Steps after which the schedule restarts with warm-up and decay, until the next restart or the last step (warm restarts,
    Loshchilov and Hutter 2017). To extend a finished run of N steps, raise training.steps and put N here."""

    def __post_init__(self) -> None:
        require_at_least(self, 0, "warmup_steps")
        require(
            all(a < b for a, b in itertools.pairwise((0, *self.restarts))),
            f"{type(self).__name__}.restarts must be rising steps above 0, got {self.restarts}.",
        )

    def decay(self, count: Array, steps: int) -> Array:
        """The fraction of the peak after `count` steps, from `warmup_steps` on; a pure function of arrays.

        Args:
            count: steps since the start or the last restart, float32; `warmup_steps` is the first at the peak.
            steps: number of steps to the end or the next restart.
        """
        raise NotImplementedError(f"{type(self).__name__} must define decay().")

    def check(self, config: "Config") -> None:
        """Raise UserError unless the warm-up fits in every period; for a run by epochs, once its steps are known."""
        if config.training.epochs > 0:
            return
        steps = config.training.steps
        require(
            self.warmup_steps <= steps,
            f"optimizer.schedule.warmup_steps must not exceed training.steps={steps}, got {self.warmup_steps}.",
        )
        shortest = min(b - a for a, b in itertools.pairwise((0, *self.restarts, steps)))
        require(
            shortest >= max(1, self.warmup_steps),
            f"Between optimizer.schedule.restarts={self.restarts} and training.steps={steps} must be steps, at least "
            f"optimizer.schedule.warmup_steps={self.warmup_steps}, got {shortest}; raise training.steps or change these.",
        )


@dataclasses.dataclass(frozen=True)
class Optimizer(Kind):
    """An update rule, with the settings common to all rules. Its fields are its settings.

    A user-defined optimizer derives from this or from one of the package's, has a name (`kind`), and is registered by
    `OPTIMIZERS.register`. It must define `rule`.
    """

    family = OPTIMIZERS
    fixed: ClassVar[tuple[str, ...]] = ()
    """Config fields that a resumed run of this optimizer may not change, although runs of others may."""

    learning_rate: float = 1e-3
    """Peak learning rate."""
    schedule: Schedule = dataclasses.field(default_factory=SCHEDULES.default)
    weight_decay: float = 0.1
    """Decoupled weight decay, on matrices only (not on norms, biases or position embeddings)."""
    clip_norm: float = 1.0
    """Scale the gradient down to this global norm; 0 means off."""
    accumulate_steps: int = 1
    """Number of micro-batches per step."""
    ema_decay: float = 0.0
    """Decay of an exponential moving average of the parameters, used for scores and samples; 0 means off."""
    parameter_groups: tuple[str, ...] = ()
    """REGEX=SCALE: learning-rate factor of parameters whose path matches, 0 freezes; the first match counts."""

    def __post_init__(self) -> None:
        name = type(self).__name__
        require(self.learning_rate > 0, f"{name}.learning_rate must be positive, got {self.learning_rate}.")
        require_at_least(self, 0, "weight_decay", "clip_norm")
        require_at_least(self, 1, "accumulate_steps")
        require_range(self, 0, 1, "ema_decay")
        self.groups()

    def rule(self) -> "optax.GradientTransformation":
        """An `optax.GradientTransformation` from gradient to ascent direction.

        Clipping is applied before it; weight decay, the learning rate and parameter groups after it.
        """
        raise NotImplementedError(f"{type(self).__name__} must define rule().")

    def check(self, config: "Config") -> None:
        """Raise UserError if the run's config does not fit."""
        require(
            config.data.batch_size % self.accumulate_steps == 0,
            f"data.batch_size must be divisible by optimizer.accumulate_steps={self.accumulate_steps}, got "
            f"{config.data.batch_size}.",
        )
        self.schedule.check(config)

    def groups(self) -> tuple[tuple[re.Pattern[str], float], ...]:
        """The parameter groups as (compiled pattern, learning-rate factor)."""
        groups = []
        for text in self.parameter_groups:
            pattern, _, scale = text.rpartition("=")
            try:
                groups.append((re.compile(pattern), float(scale)))
                valid = pattern != "" and float(scale) >= 0
            except (re.error, ValueError):
                valid = False
            require(
                valid,
                f"{type(self).__name__}.parameter_groups must be REGEX=SCALE with SCALE >= 0, got {text!r}; "
                "for example 'token_embedding=0' freezes the embedding.",
            )
        return tuple(groups)
