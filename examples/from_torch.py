"""Load a model trained with PyTorch's `local-attention`, compare its logits and generate from it.

    python examples/from_torch.py weights.safetensors --window-size 256 --heads 8
    python examples/from_torch.py weights.pt --window-size 256 --heads 8 --prompt "The " --length 200

The file holds the state dict of a `LocalTransformer`. The script infers the model from it and prints its sizes. If
PyTorch and `local-attention` are installed, it computes the logits of random tokens with both and prints the greatest
difference. If the model is causal and has 256 tokens (bytes), it continues a prompt.

The flags are what weights cannot show; give the values the model was built with. --window-size is always needed,
--heads only if an error asks for it.

A .safetensors file (`pip install safetensors`) holds only arrays. A .pt file is a pickle, which can run any code when
it is read; PyTorch reads it here with `weights_only=True`, which refuses everything but arrays.
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

if not __package__:  # run as a file: sys.path then holds this folder, but `examples` is in the one above
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from examples.files import check_regular
from examples.screen import keep_printable
from flax_local_attention import LocalTransformer, generate
from flax_local_attention.convert import from_torch, model_from_torch, to_torch

BYTE_TOKENS = 256  # vocabulary of a model over bytes


def read_weights(path: Path) -> Mapping[str, Any]:
    """Read a state dict, names to arrays, from a .safetensors or .pt file.

    Raises:
      ImportError: the package that reads such files is not installed.
      OSError: there is no such file, or it is a pipe or a device.
      ValueError: it is damaged, or holds something else.
    """
    readers = {".safetensors": read_safetensors, ".pt": read_pickled, ".pth": read_pickled}
    if path.suffix not in readers:
        raise ValueError(f"`weights` must be a .safetensors, .pt or .pth file, got {path.name!r}; save them as one.")
    check_regular(path)
    return readers[path.suffix](path)


def read_safetensors(path: Path) -> Mapping[str, Any]:
    """Read a .safetensors file into NumPy arrays."""
    from safetensors.numpy import load_file

    with as_value_error("an intact .safetensors file of dtypes that NumPy has", path):
        return load_file(path)


def read_pickled(path: Path) -> Mapping[str, Any]:
    """Read a .pt file into PyTorch tensors, without running any code in it."""
    import torch

    with as_value_error("an intact file by `torch.save` that holds only tensors", path), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch warns about pickles that it then refuses
        if zipfile.is_zipfile(path):
            check_not_compressed(path)
        return torch.load(path, map_location="cpu", weights_only=True)


def check_not_compressed(path: Path) -> None:
    """Refuse a compressed archive: PyTorch never writes one, and would decompress any size into memory."""
    with zipfile.ZipFile(path) as archive:
        if any(info.compress_type != zipfile.ZIP_STORED for info in archive.infolist()):
            raise ValueError("it is compressed")


@contextlib.contextmanager
def as_value_error(rule: str, path: Path) -> Iterator[None]:
    """Raise a library's error on a damaged or hostile file as a ValueError of one sentence."""
    try:
        yield
    except ImportError:
        raise
    except Exception as error:
        if isinstance(error, pickle.UnpicklingError):  # PyTorch's message is a page that explains how to run the code
            reason = "it holds something else, or is not such a file"
        else:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(
            f"`weights` must be {rule}, got {path.name!r} ({reason[:120]}); save the state dict again, or as "
            ".safetensors."
        ) from error


def max_logit_difference(model: LocalTransformer, variables: Mapping[str, Any], tokens: np.ndarray) -> float:
    """Return the greatest difference between our logits and the original's, in float32."""
    import local_attention
    import torch

    names = ["num_tokens", "max_seq_len", "dim", "depth", "causal", "local_attn_window_size", "dim_head", "heads"]
    names += ["ff_mult", "use_xpos", "use_dynamic_pos_bias", "num_residual_streams", "qk_rmsnorm", "qk_scale"]
    names += ["exact_windowsize", "gate_values_per_head", "look_backward", "look_forward", "shared_qk"]
    original = local_attention.LocalTransformer(**{name: getattr(model, name) for name in names}).eval()
    weights = {name: torch.from_numpy(x.astype(np.float32)) for name, x in to_torch(variables, model).items()}
    original.load_state_dict(weights, strict=True)
    # Without a mask, the bidirectional original attends to its own padding.
    mask = None if model.causal else torch.ones(tokens.shape, dtype=torch.bool)
    with torch.no_grad():
        theirs = original(torch.from_numpy(tokens).long(), mask=mask).numpy()
    ours = jax.jit(model.clone(dtype=jnp.float32).apply)(variables, tokens)
    return float(np.abs(theirs - np.asarray(ours)).max())


def continue_prompt(
    model: LocalTransformer, variables: Mapping[str, Any], prompt: bytes, length: int, temperature: float
) -> str:
    """Generate `length` bytes after a prompt, as text that is safe to print on a terminal."""
    tokens = jnp.asarray(np.frombuffer(prompt, np.uint8).astype(np.int32))[None]
    new, _ = generate(model, variables, tokens, length, rng=jax.random.key(0), temperature=temperature)
    return keep_printable(bytes(np.asarray(new[0]).tolist()).decode("utf-8", errors="replace"))


def report(model: LocalTransformer, variables: Mapping[str, Any], options: argparse.Namespace):
    """Print the sizes of the model, the difference from the original, and generated text."""
    count = sum(x.size for x in jax.tree.leaves(variables))
    facts = f"dim {model.dim}, depth {model.depth}, {model.heads} heads of {model.dim_head}"
    print(f"{count:,} parameters: {facts}, {model.num_residual_streams} residual streams, {model.num_tokens} tokens")
    if not model.num_tokens:
        return
    if util.find_spec("torch") and util.find_spec("local_attention"):
        shape = 2, min(model.max_seq_len, 2 * model.local_attn_window_size + 1)
        tokens = np.random.default_rng(0).integers(0, model.num_tokens, shape)
        print(f"greatest difference from the original's logits: {max_logit_difference(model, variables, tokens):.1e}")
    if model.causal and model.num_tokens == BYTE_TOKENS:
        prompt = options.prompt.encode()
        print(options.prompt + continue_prompt(model, variables, prompt, options.length, options.temperature))


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", type=Path, help="a .safetensors or .pt file with the state dict")
    parser.add_argument("--prefix", default="", help="prefix of all names in the file, such as module.")
    model = parser.add_argument_group("the values the model was built with")
    model.add_argument("--window-size", type=int, required=True, metavar="N", help="local_attn_window_size")
    model.add_argument("--heads", type=int, metavar="N", help="heads (default: inferred where the weights show them)")
    model.add_argument("--bidirectional", action="store_true", help="causal=False")
    model.add_argument("--look-backward", type=int, default=1, metavar="N", help="look_backward (default: 1)")
    model.add_argument("--look-forward", type=int, metavar="N", help="look_forward (default: 0 if causal, else 1)")
    model.add_argument("--plain-windows", action="store_true", help="exact_windowsize=False")
    model.add_argument("--use-xpos", action="store_true", help="use_xpos=True")
    model.add_argument("--shared-qk", action="store_true", help="shared_qk=True")
    model.add_argument("--qk-scale", type=float, default=8, metavar="X", help="qk_scale, with qk_rmsnorm (default: 8)")
    text = parser.add_argument_group("generated text")
    text.add_argument("--prompt", default="The ", metavar="TEXT", help="text to continue (default: 'The ')")
    text.add_argument("--length", type=int, default=100, metavar="N", help="bytes to generate (default: 100)")
    text.add_argument("--temperature", type=float, default=0.8, metavar="X", help="0: greedy (default: 0.8)")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command line `argv` (None: `sys.argv`) and return the exit status."""
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
        report(model, variables, options)
    except ImportError as error:
        print(f"error: {error}; install it with `pip install {error.name}`", file=sys.stderr)
        return 2
    except (OSError, TypeError, ValueError) as error:
        print(keep_printable(f"error: {error}"), file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
