"""Draw the pictures of the documentation: ``python -m docs.draw``, from the root of the repository.

Each is written to ``docs/pictures`` as NAME-light.svg and NAME-dark.svg.
"""

from pathlib import Path

import jax

from docs.drawing import running, windows
from docs.drawing.canvas import THEMES

FOLDER = Path(__file__).parent / "pictures"
PICTURES = windows.PICTURES | running.PICTURES


def draw_all() -> dict[str, str]:
    """Return all pictures, by the names of their files."""
    return {f"{name}-{theme}.svg": picture.draw(theme) for name, picture in PICTURES.items() for theme in THEMES}


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 4)  # of the picture of devices
    FOLDER.mkdir(exist_ok=True)
    for name, text in draw_all().items():
        (FOLDER / name).write_text(text, encoding="utf-8")
