"""What a recovery is asked to do, and what it reports."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from edgekit.errors import UsageError

LEVELS = ("closed-form", "blocks", "distill")


@dataclass(frozen=True)
class Settings:
    """How a student is recovered.

    Attributes:
        level: One level alone, or `auto`: all in order.
        minutes: How long it may take; it is turned into steps once, which `Recovered.steps` tells.
        steps: Steps a level instead of minutes, as an earlier recovery told them: repeats it bit for bit on as many threads.
        seed: Seed of the order of samples.
        trainable: Patterns of names of weights that may change (`blocks.3.*`, `*norm*`).
        batch: Samples a step.
        features: Weight of the alignment of features beside the outputs, in `distill`.
        relations: Weight of the relations of tokens, in `distill`.
        threads: Threads; 0: as torch is set.
        checkpoint_s: Seconds between checkpoints.
    """

    level: Literal["auto", "closed-form", "blocks", "distill"] = "auto"
    minutes: float = 3.0
    steps: Mapping[str, int] = field(default_factory=dict)
    seed: int = 0
    trainable: tuple[str, ...] = ("*",)
    batch: int = 32
    features: float = 1.0
    relations: float = 0.0
    threads: int = 0
    checkpoint_s: float = 60.0

    def __post_init__(self) -> None:
        if not self.minutes > 0:
            raise UsageError(f"{self.minutes:g} minutes for a recovery", where="recover", fix="give a positive number of minutes")
        if self.level not in ("auto", *LEVELS):
            raise UsageError(f"there is no level '{self.level}'", where="recover", fix=f"one of: auto, {', '.join(LEVELS)}")
        unknown = [name for name in self.steps if name not in LEVELS]
        if unknown or any(count < 0 for count in self.steps.values()):
            raise UsageError(f"steps for '{(unknown or list(self.steps))[0]}'", where="recover", fix=f"give steps for {', '.join(LEVELS)}")
        if self.batch < 1:
            raise UsageError(f"a batch of {self.batch}", where="recover", fix="give 1 or more")

    @property
    def levels(self) -> tuple[str, ...]:
        """The levels to run, in order."""
        return LEVELS if self.level == "auto" else (self.level,)


@dataclass(frozen=True)
class LevelResult:
    """What one level did.

    Attributes:
        level: Its name.
        steps: Steps of training that it took.
        seconds: Its time.
        before_db: SQNR of the outputs on held-out samples before it.
        after_db: The same after it.
        accepted: Whether its weights were kept.
        note: Why it did nothing, or what it left out.
    """

    level: str
    steps: int
    seconds: float
    before_db: float
    after_db: float
    accepted: bool
    note: str = ""


@dataclass(frozen=True)
class Recovered:
    """What a recovery did.

    Attributes:
        levels: The levels.
        steps: Steps a level; given as `Settings.steps` they repeat it.
        before_db: SQNR of the outputs on held-out samples at first.
        after_db: The same at last.
        agreement: Share of held-out samples with the teacher's prediction, at first and at last; None where there are no class scores.
        held_out: Number of held-out batches.
    """

    levels: tuple[LevelResult, ...]
    steps: dict[str, int]
    before_db: float
    after_db: float
    agreement: tuple[float, float] | None
    held_out: int

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return {
            "levels": [level.__dict__ for level in self.levels],
            "steps": self.steps,
            "before_db": self.before_db,
            "after_db": self.after_db,
            "agreement": None if self.agreement is None else list(self.agreement),
            "held_out": self.held_out,
        }


@dataclass(frozen=True)
class Progress:
    """How far a recovery has come.

    Attributes:
        level: The level.
        done: Share of it that is done, 0 … 1.
        sqnr_db: SQNR of the outputs on held-out samples, the last that was measured.
        left_s: Seconds that the level will still take.
    """

    level: str
    done: float
    sqnr_db: float
    left_s: float
