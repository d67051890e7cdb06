"""The configuration of a training run, and its presets. Every field is a flag of the command line."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

Windows = tuple[int | None, ...]  # one window for all layers, or one per layer; None is a global layer
INTEGER_LIMIT = 2**31 - 1  # largest integer of a field without a `maximum`: devices count steps in 32 bits
GLOBAL = "global"  # a global layer's window on the command line and in settings.json


def option(group: str, meaning: str, default: Any = dataclasses.MISSING, **rule: Any) -> Any:
    """Declare a field and its flag.

    Args:
      group: heading of the flag in the help.
      meaning: help of the flag.
      default: value in presets that do not set the field.
      **rule: `zero=True` allows 0; `maximum` replaces `INTEGER_LIMIT`; `choices` lists the strings allowed; `all=True`
        allows None, written "all"; `display=True` lets a resumed run change the value, because it affects only what
        is logged and saved, not what is learned.
    """
    return dataclasses.field(default=default, metadata={"group": group, "meaning": meaning, **rule})


def check_number(value: float, zero: bool = False, maximum: float = math.inf) -> None:
    """Refuse a number out of range.

    Raises:
      ValueError: it is negative, 0 without `zero`, above `maximum`, or not finite.
    """
    if not (value >= 0 if zero else value > 0):
        raise ValueError(f"must be {'at least' if zero else 'greater than'} 0, got {value}")
    if not math.isfinite(value):
        raise ValueError(f"must be finite, got {value}")
    if value > maximum:
        raise ValueError(f"must be at most {maximum:,}, got {value}")


MODEL, TRAINING, LOGGING = "model", "training", "logging and checkpoints"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """The hyperparameters of a run. Runs with equal values, on equal data and hardware, give equal results."""

    dim: int = option(MODEL, "model width")
    depth: int = option(MODEL, "number of layers", maximum=1000)
    heads: int = option(MODEL, "attention heads")
    kv_heads: int | None = option(
        MODEL, "heads of keys and values, a divisor of --heads; all: as many as --heads", None, all=True
    )
    dim_head: int = option(MODEL, "head width")
    windows: tuple[int | None, ...] = option(
        MODEL, "tokens a query sees before its own: one number, or one per layer as in 64,64,global"
    )
    ff_mult: float = option(MODEL, "width of the feed-forward layers, in multiples of --dim", 4.0, maximum=1000)
    residual_streams: int = option(MODEL, "hyper-connection streams; 1: a plain residual", 1, maximum=1000)
    abs_pos_emb: bool = option(
        MODEL, "add learned absolute positions to rotary; inputs are then limited to --seq-len", False
    )
    qk_norm: bool = option(MODEL, "normalise queries and keys", False)
    gates: bool = option(MODEL, "scale each head's output by a learned sigmoid gate", False)
    sinks: bool = option(MODEL, "give each head an attention sink: an extra learned logit with no value", False)
    memory_tokens: int = option(
        MODEL, "learned keys and values per layer that every query sees besides its window", 0, zero=True
    )
    dtype: str = option(
        MODEL, "dtype of the computation; parameters are float32", "float32", choices=("float32", "bfloat16")
    )

    seq_len: int = option(TRAINING, "tokens in a training sequence")
    batch_size: int = option(TRAINING, "sequences in a microbatch")
    accumulate: int = option(TRAINING, "microbatches whose gradients a step accumulates", 1)
    steps: int = option(TRAINING, "total steps; a resumed run may have more")
    decay_steps: int | None = option(
        TRAINING,
        "step at which the learning rate reaches a tenth of its peak; all: the first --steps given",
        None,
        all=True,
    )
    warmup_steps: int = option(TRAINING, "steps of linear warm-up to the peak learning rate", zero=True)
    optimizer: str = option(
        TRAINING, "muon updates the layers' matrices, and AdamW the rest", "adamw", choices=("adamw", "muon")
    )
    learning_rate: float = option(TRAINING, "peak learning rate")
    weight_decay: float = option(TRAINING, "weight decay of matrices", 0.1, zero=True)
    clip_norm: float = option(TRAINING, "largest global norm of a gradient; larger ones are clipped", 1.0)
    corpus_bytes: int | None = option(
        TRAINING, "use only the first N bytes of the corpus", None, all=True, maximum=2**63 - 1
    )
    seed: int = option(TRAINING, "seed of the parameters, the batches and the samples", 0, zero=True, maximum=2**63 - 1)

    steps_per_call: int = option(LOGGING, "most steps in one device call", display=True)
    log_every: int = option(LOGGING, "steps between log lines", display=True)
    eval_every: int = option(LOGGING, "steps between validations, each with a sample and a checkpoint", display=True)
    sample_bytes: int = option(LOGGING, "length of a sample; 0: no samples", zero=True, display=True, maximum=2**20)
    temperature: float = option(
        LOGGING, "sampling temperature; 0: always the likeliest byte", 0.8, zero=True, display=True
    )

    @property
    def steps_in_call(self) -> int:
        """The most steps in one device call; none spans two log lines or two validations."""
        return min(self.steps_per_call, self.steps, self.log_every, self.eval_every)

    @property
    def tokens_per_step(self) -> int:
        """Tokens that one step trains on."""
        return self.accumulate * self.batch_size * self.seq_len

    @property
    def layer_windows(self) -> Windows:
        """The window of each layer."""
        return self.windows * self.depth if len(self.windows) == 1 else self.windows

    def learns_like(self, preset: "Config") -> bool:
        """Return whether every field that affects learning equals the preset's."""
        decided = dataclasses.replace(preset, decay_steps=preset.decay_steps or preset.steps)
        return all(
            getattr(self, field.name) == getattr(decided, field.name)
            for field in dataclasses.fields(self)
            if not field.metadata.get("display")
        )

    def describe(self, group: str) -> str:
        """Return the names and values of a group's fields, without those that are None, False or 0."""
        fields = [field for field in dataclasses.fields(self) if field.metadata["group"] == group]
        values = [(field.name, getattr(self, field.name)) for field in fields]
        return ", ".join(f"{name} {format_value(value)}" for name, value in values if value not in (None, False, 0))

    def to_json(self) -> dict[str, Any]:
        """Return the fields as a JSON object."""
        return dataclasses.asdict(self) | {"windows": format_windows(self.windows)}

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "Config":
        """Return the configuration that `to_json` converted.

        Raises:
          ValueError: fields are missing or unknown, as of another version, or have a wrong type or value.
        """
        differing = {field.name for field in dataclasses.fields(cls)} ^ set(fields)
        if differing:
            raise ValueError(f"fields of another version: {', '.join(sorted(differing))}")
        types = {field.name: str if field.name == "windows" else field.type for field in dataclasses.fields(cls)}
        wrong = [
            name
            for name, value in fields.items()
            if not isinstance(value, types[name]) or (isinstance(value, bool) and types[name] is not bool)
        ]
        if wrong:
            raise ValueError(f"values of the wrong type: {', '.join(sorted(wrong))}")
        for field in dataclasses.fields(cls):
            check_value(field, fields[field.name])
        return cls(**{**fields, "windows": parse_windows(fields["windows"])})


def check_value(field: dataclasses.Field, value: Any) -> None:
    """Refuse a value that has the field's type but that its flag would not accept.

    Raises:
      ValueError: it is out of range, or not one of the choices.
    """
    choices = field.metadata.get("choices")
    if choices and value not in choices:
        raise ValueError(f"{field.name} must be one of {', '.join(choices)}, got {value}")
    if isinstance(value, int | float) and field.type is not bool:
        try:
            check_number(value, **range_of(field))
        except ValueError as error:
            raise ValueError(f"{field.name} {error}") from error


def range_of(field: dataclasses.Field) -> dict[str, Any]:
    """Return the keyword arguments of `check_number` for a field."""
    maximum = field.metadata.get("maximum", math.inf if field.type is float else INTEGER_LIMIT)
    return {"zero": field.metadata.get("zero", False), "maximum": maximum}


def parse_windows(text: str) -> Windows:
    """Parse windows as in "64" or "64,64,global".

    Raises:
      ValueError: a part is neither a number in range nor "global".
    """
    windows = tuple(None if part.strip() == GLOBAL else int(part) for part in text.split(","))
    for window in windows:
        if window is not None:
            check_number(window, maximum=INTEGER_LIMIT)
    return windows


def format_windows(windows: Windows) -> str:
    """Format windows as `parse_windows` parses them."""
    return ",".join(GLOBAL if window is None else str(window) for window in windows)


def format_value(value: Any) -> str:
    """Format a field's value for people: as on the command line, with "yes" and "no" for switches."""
    if isinstance(value, tuple):
        return format_windows(value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "all" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


# Learns most in two minutes on two cores: a small model, small batches, Muon, and a wider window in each layer.
CPU_DEMO = Config(
    dim=96, depth=3, heads=3, dim_head=32, windows=(16, 32, 128), seq_len=256, batch_size=4, steps=1600,
    warmup_steps=100, optimizer="muon", learning_rate=6e-3, corpus_bytes=4_000_000, steps_per_call=10, log_every=100,
    eval_every=400, sample_bytes=200, temperature=0.7,
)  # fmt: skip

# The model, batch size and sequence length of the original's train.py.
ORIGINAL = Config(
    dim=512, depth=6, heads=8, dim_head=64, windows=(256,), residual_streams=4, abs_pos_emb=True, dtype="bfloat16",
    seq_len=4096, batch_size=4, accumulate=4, steps=20_000, warmup_steps=500, learning_rate=2e-4, clip_norm=0.5,
    steps_per_call=10, log_every=50, eval_every=1000, sample_bytes=1024,
)  # fmt: skip

PRESETS: dict[str, Config] = {"cpu-demo": CPU_DEMO, "original": ORIGINAL}

MAY_CHANGE = {field.name for field in dataclasses.fields(Config) if field.metadata.get("display")} | {"steps"}
