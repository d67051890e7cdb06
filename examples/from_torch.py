"""Go on in JAX with the weights of a model that was trained with PyTorch's `local-attention`.

    python examples/from_torch.py weights.safetensors --window-size 256 --heads 8
    python examples/from_torch.py weights.pt --window-size 256 --heads 8 --prompt "The " --length 200

Loads the state dict of a `LocalTransformer`, builds the model that it is of, and, if the model is causal and
over bytes (256 tokens), goes on from a prompt. Where PyTorch and the original are installed, both compute the
logits of the same tokens, and the greatest difference is printed.

Give what weights do not show as the model was made: the window size always, the heads where they are not shown.

A .safetensors file (`pip install safetensors`) holds arrays and nothing else. A .pt file is a pickle, which may run
any code when it is opened: it is read by PyTorch with `weights_only=True`, which refuses all but arrays.
"""

import argparse
import contextlib
import pickle
import sys
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from importlib import util
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

if not __package__:  # run as a file: the path then has this folder, but not the one above, where `examples` is
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from examples.files import check_regular
from examples.screen import keep_printable
from flax_local_attention import LocalTransformer, generate
from flax_local_attention.convert import from_torch, model_from_torch, to_torch

BYTES = 256


def read_weights(path: Path) -> Mapping[str, Any]:
    """Names to arrays, as a .safetensors file or a .pt file has them.

    Raises:
        ImportError: The package that reads such files is not installed.
        OSError: There is no such file, or it is a pipe or a device.
        ValueError: It is damaged, or holds something else.
    """
    readers = {".safetensors": read_safetensors, ".pt": read_pickled, ".pth": read_pickled}
    if path.suffix not in readers:
        raise ValueError(f"The weights must be a .safetensors, .pt or .pth file, got {path.name!r}; save them as one.")
    check_regular(path)
    return readers[path.suffix](path)


def read_safetensors(path: Path) -> Mapping[str, Any]:
    """Names to arrays of NumPy."""
    from safetensors.numpy import load_file

    with refused_as("a whole .safetensors file of dtypes that NumPy has", path):
        return load_file(path)


def read_pickled(path: Path) -> Mapping[str, Any]:
    """Names to tensors of PyTorch; nothing in the file is run."""
    import torch

    with refused_as("a whole file by `torch.save` of tensors and nothing else", path), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of pickles that are refused in the end
        if zipfile.is_zipfile(path):
            check_not_packed(path)
        return torch.load(path, map_location="cpu", weights_only=True)


def check_not_packed(path: Path) -> None:
    """Raise if an archive holds more than its own size; PyTorch packs none, and would unpack it at once."""
    with zipfile.ZipFile(path) as archive:
        if any(info.compress_type != zipfile.ZIP_STORED for info in archive.infolist()):
            raise ValueError("it is compressed")


@contextlib.contextmanager
def refused_as(rule: str, path: Path) -> Iterator[None]:
    """Within, whatever a library makes of a damaged or hostile file is one sentence."""
    try:
        yield
    except ImportError:
        raise
    except Exception as error:
        is_more = isinstance(error, pickle.UnpicklingError)  # of which PyTorch says a page, and how to run it
        reason = (
            "it holds more, or is no such file" if is_more else " ".join(f"{type(error).__name__}: {error}".split())
        )
        raise ValueError(
            f"The weights must be {rule}, got {path.name!r} ({reason[:120]}); save the state dict again, or as "
            ".safetensors."
        ) from error


def greatest_difference(model: LocalTransformer, variables: Mapping[str, Any], tokens: np.ndarray) -> float:
    """Between the logits of the original and ours, in float32."""
    import local_attention
    import torch

    names = ["num_tokens", "max_seq_len", "dim", "depth", "causal", "local_attn_window_size", "dim_head", "heads"]
    names += ["ff_mult", "use_xpos", "use_dynamic_pos_bias", "num_residual_streams", "qk_rmsnorm", "qk_scale"]
    names += ["exact_windowsize", "gate_values_per_head", "look_backward", "look_forward", "shared_qk"]
    original = local_attention.LocalTransformer(**{name: getattr(model, name) for name in names}).eval()
    weights = {name: torch.from_numpy(x.astype(np.float32)) for name, x in to_torch(variables, model).items()}
    original.load_state_dict(weights, strict=True)
    # Without a mask a bidirectional original attends to its own padding.
    mask = None if model.causal else torch.ones(tokens.shape, dtype=torch.bool)
    with torch.no_grad():
        theirs = original(torch.from_numpy(tokens).long(), mask=mask).numpy()
    ours = jax.jit(model.clone(dtype=jnp.float32).apply)(variables, tokens)
    return float(np.abs(theirs - np.asarray(ours)).max())


def continue_prompt(
    model: LocalTransformer, variables: Mapping[str, Any], prompt: bytes, length: int, temperature: float
) -> str:
    """What the model writes after a prompt, as text that no terminal takes for commands."""
    tokens = jnp.asarray(np.frombuffer(prompt, np.uint8).astype(np.int32))[None]
    new, _ = generate(model, variables, tokens, length, rng=jax.random.key(0), temperature=temperature)
    return keep_printable(bytes(np.asarray(new[0]).tolist()).decode("utf-8", errors="replace"))


def show(model: LocalTransformer, variables: Mapping[str, Any], options: argparse.Namespace):
    """Print what was loaded, how near the original is, and what the model writes."""
    count = sum(x.size for x in jax.tree.leaves(variables))
    facts = f"dim {model.dim}, depth {model.depth}, {model.heads} heads of {model.dim_head}"
    print(f"{count:,} parameters: {facts}, {model.num_residual_streams} residual streams, {model.num_tokens} tokens")
    if not model.num_tokens:
        return
    if util.find_spec("torch") and util.find_spec("local_attention"):
        shape = 2, min(model.max_seq_len, 2 * model.local_attn_window_size + 1)
        tokens = np.random.default_rng(0).integers(0, model.num_tokens, shape)
        print(f"logits differ from the original's by at most {greatest_difference(model, variables, tokens):.1e}")
    if model.causal and model.num_tokens == BYTES:
        prompt = options.prompt.encode()
        print(options.prompt + continue_prompt(model, variables, prompt, options.length, options.temperature))


def build_parser() -> argparse.ArgumentParser:
    """Return the parser."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", type=Path, help="a .safetensors or .pt file with the state dict")
    parser.add_argument("--prefix", default="", help="what all names begin with, such as module.")
    parser.add_argument("--window-size", type=int, required=True, help="local_attn_window_size of the model")
    parser.add_argument("--heads", type=int, help="heads, where the weights do not show them")
    parser.add_argument("--bidirectional", action="store_true", help="the model was made with causal=False")
    parser.add_argument("--look-backward", type=int, default=1)
    parser.add_argument("--look-forward", type=int)
    parser.add_argument("--plain-windows", action="store_true", help="made with exact_windowsize=False")
    parser.add_argument("--use-xpos", action="store_true")
    parser.add_argument("--shared-qk", action="store_true")
    parser.add_argument("--qk-scale", type=float, default=8)
    parser.add_argument("--prompt", default="The ")
    parser.add_argument("--length", type=int, default=100, help="bytes to write after the prompt")
    parser.add_argument("--temperature", type=float, default=0.8)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command line `argv` (None: the process's own) and return the exit status."""
    options = build_parser().parse_args(argv)
    try:
        state_dict = read_weights(options.weights)
        model = model_from_torch(
            state_dict,
            local_attn_window_size=options.window_size,
            heads=options.heads,
            causal=not options.bidirectional,
            look_backward=options.look_backward,
            look_forward=options.look_forward,
            exact_windowsize=not options.plain_windows,
            use_xpos=options.use_xpos,
            shared_qk=options.shared_qk,
            qk_scale=options.qk_scale,
            prefix=options.prefix,
        )
        variables = jax.device_put(from_torch(state_dict, model, prefix=options.prefix))
        show(model, variables, options)
    except ImportError as error:
        print(f"error: {error}; install it with `pip install {error.name}`", file=sys.stderr)
        return 2
    except (OSError, TypeError, ValueError) as error:
        print(keep_printable(f"error: {error}"), file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
