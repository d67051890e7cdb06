"""What a training run is made of: every field is a flag of the command line, and a preset is a value of them all."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

Windows = tuple[int | None, ...]  # one for all layers, or one for each; None has no limit: a global layer
MOST = 2**31 - 1  # of a whole number whose field says nothing else: devices count steps in 32 bits
GLOBAL = "global"  # how the command line and the settings of a run call a window without a limit


def option(group: str, meaning: str, default: Any = dataclasses.MISSING, **rule: Any) -> Any:
    """Declare a field that is a flag.

    Args:
      group: heading of the flag in the help.
      meaning: what the flag is for.
      default: value in presets that say nothing.
      **rule: `zero=True` if 0 is allowed, `most` if less than `MOST` is, `choices` of a string, `all=True` if None is
        written "all", and `display=True` if a resumed run may have another value, since it changes what is shown or
        kept alone.
    """
    return dataclasses.field(default=default, metadata={"group": group, "meaning": meaning, **rule})


def check_number(value: float, zero: bool = False, most: float = math.inf) -> None:
    """Refuse a number that is not in range.

    Raises:
      ValueError: it is below 0, 0 unless `zero`, above `most`, or not finite.
    """
    if not (value >= 0 if zero else value > 0):
        raise ValueError(f"must be {'at least' if zero else 'greater than'} 0, got {value}")
    if not math.isfinite(value):
        raise ValueError(f"must be finite, got {value}")
    if value > most:
        raise ValueError(f"must be at most {most:,}, got {value}")


MODEL, TRAINING, SHOWN = "model", "training", "what is shown and kept"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """What a run is made of. Two runs with equal values, on equal bytes and hardware, are equal."""

    dim: int = option(MODEL, "width of the model")
    depth: int = option(MODEL, "layers", most=1000)
    heads: int = option(MODEL, "heads of attention")
    kv_heads: int | None = option(MODEL, "heads of keys and values, a divisor of --heads; all: as many", None, all=True)
    dim_head: int = option(MODEL, "width of a head")
    windows: tuple[int | None, ...] = option(
        MODEL, "tokens seen before one: a number, or one a layer as in 64,64,global"
    )
    ff_mult: float = option(MODEL, "width of the feed-forward layers, in widths of the model", 4.0, most=1000)
    residual_streams: int = option(MODEL, "streams of the hyper-connections; 1 is a plain residual", 1, most=1000)
    abs_pos_emb: bool = option(
        MODEL, "learn positions too, beside rotary ones; inputs are then limited to --seq-len", False
    )
    qk_norm: bool = option(MODEL, "normalise queries and keys", False)
    gates: bool = option(MODEL, "scale what each head attended to by a learned sigmoid gate", False)
    sinks: bool = option(MODEL, "give each head a learned logit for attending to nothing", False)
    memory_tokens: int = option(MODEL, "learned keys and values that every query sees beside its window", 0, zero=True)
    dtype: str = option(MODEL, "of the computation; parameters are float32", "float32", choices=("float32", "bfloat16"))

    seq_len: int = option(TRAINING, "predictions in a training sequence")
    batch_size: int = option(TRAINING, "sequences in a microbatch")
    accumulate: int = option(TRAINING, "microbatches in a step, averaged", 1)
    steps: int = option(TRAINING, "steps to take in all; a resumed run may have more")
    decay_steps: int | None = option(
        TRAINING, "steps until the rate is a tenth; all: --steps as first given", None, all=True
    )
    warmup_steps: int = option(TRAINING, "steps until the rate is at its peak", zero=True)
    optimizer: str = option(
        TRAINING, "muon is for the matrices of layers, with AdamW for the rest", "adamw", choices=("adamw", "muon")
    )
    learning_rate: float = option(TRAINING, "peak of the rate")
    weight_decay: float = option(TRAINING, "of matrices", 0.1, zero=True)
    clip_norm: float = option(TRAINING, "most that a gradient's norm may be", 1.0)
    corpus_bytes: int | None = option(
        TRAINING, "train on that many bytes of the corpus", None, all=True, most=2**63 - 1
    )
    seed: int = option(TRAINING, "of parameters, batches and samples", 0, zero=True, most=2**63 - 1)

    steps_per_call: int = option(SHOWN, "steps in one call of the device, at most", display=True)
    log_every: int = option(SHOWN, "steps between figures", display=True)
    eval_every: int = option(SHOWN, "steps between validations, each with a sample and a checkpoint", display=True)
    sample_bytes: int = option(SHOWN, "length of a sample; 0: none", zero=True, display=True, most=2**20)
    temperature: float = option(SHOWN, "of a sample; 0 takes the likeliest bytes", 0.8, zero=True, display=True)

    @property
    def steps_in_call(self) -> int:
        """Steps in one call of the device, as many as ever fit between figures."""
        return min(self.steps_per_call, self.steps, self.log_every, self.eval_every)

    @property
    def tokens_per_step(self) -> int:
        """Predictions that one step learns from."""
        return self.accumulate * self.batch_size * self.seq_len

    @property
    def layer_windows(self) -> Windows:
        """The window of each layer."""
        return self.windows * self.depth if len(self.windows) == 1 else self.windows

    def learns_like(self, preset: "Config") -> bool:
        """Return whether all that decides what is learnt is as in a preset."""
        decided = dataclasses.replace(preset, decay_steps=preset.decay_steps or preset.steps)
        return all(
            getattr(self, field.name) == getattr(decided, field.name)
            for field in dataclasses.fields(self)
            if not field.metadata.get("display")
        )

    def describe(self, group: str) -> str:
        """Return the fields of a group, by name and value, without those that are off."""
        fields = [field for field in dataclasses.fields(self) if field.metadata["group"] == group]
        values = [(field.name, getattr(self, field.name)) for field in fields]
        return ", ".join(f"{name} {write_value(value)}" for name, value in values if value not in (None, False, 0))

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON has them."""
        return dataclasses.asdict(self) | {"windows": write_windows(self.windows)}

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "Config":
        """Return what `to_json` wrote.

        Raises:
          ValueError: the fields are not those of this version.
        """
        unlike = {field.name for field in dataclasses.fields(cls)} ^ set(fields)
        if unlike:
            raise ValueError(f"fields of another version: {', '.join(sorted(unlike))}")
        types = {field.name: str if field.name == "windows" else field.type for field in dataclasses.fields(cls)}
        wrong = [
            name
            for name, value in fields.items()
            if not isinstance(value, types[name]) or (isinstance(value, bool) and types[name] is not bool)
        ]
        if wrong:
            raise ValueError(f"values of another type: {', '.join(sorted(wrong))}")
        for field in dataclasses.fields(cls):
            check_value(field, fields[field.name])
        return cls(**{**fields, "windows": read_windows(fields["windows"])})


def check_value(field: dataclasses.Field, value: Any) -> None:
    """Refuse a value of a field's type that its flag would not take.

    Raises:
      ValueError: it is out of range, or none of the choices.
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
    """Return the arguments of `check_number` for a field."""
    most = field.metadata.get("most", math.inf if field.type is float else MOST)
    return {"zero": field.metadata.get("zero", False), "most": most}


def read_windows(text: str) -> Windows:
    """Return the windows that `text` names, as in "64" or "64,64,global".

    Raises:
      ValueError: a part is neither a number in range nor "global".
    """
    windows = tuple(None if part.strip() == GLOBAL else int(part) for part in text.split(","))
    for window in windows:
        if window is not None:
            check_number(window, most=MOST)
    return windows


def write_windows(windows: Windows) -> str:
    """Return the windows as `read_windows` reads them."""
    return ",".join(GLOBAL if window is None else str(window) for window in windows)


def write_value(value: Any) -> str:
    """Return a field's value as the command line would have it."""
    if isinstance(value, tuple):
        return write_windows(value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "all" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


# What learns most in two minutes of two cores: a small model, small batches and Muon, and windows that grow from layer
# to layer.
CPU_DEMO = Config(
    dim=96, depth=3, heads=3, dim_head=32, windows=(16, 32, 128), seq_len=256, batch_size=4, steps=1600,
    warmup_steps=100, optimizer="muon", learning_rate=6e-3, corpus_bytes=4_000_000, steps_per_call=10, log_every=100,
    eval_every=400, sample_bytes=200, temperature=0.7,
)  # fmt: skip

# The model, the batch and the sequences of the original's train.py.
ORIGINAL = Config(
    dim=512, depth=6, heads=8, dim_head=64, windows=(256,), residual_streams=4, abs_pos_emb=True, dtype="bfloat16",
    seq_len=4096, batch_size=4, accumulate=4, steps=20_000, warmup_steps=500, learning_rate=2e-4, clip_norm=0.5,
    steps_per_call=10, log_every=50, eval_every=1000, sample_bytes=1024,
)  # fmt: skip

PRESETS: dict[str, Config] = {"cpu-demo": CPU_DEMO, "original": ORIGINAL}

MAY_CHANGE = {field.name for field in dataclasses.fields(Config) if field.metadata.get("display")} | {"steps"}
