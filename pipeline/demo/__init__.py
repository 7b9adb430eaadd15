"""The bundled instrumental of `make demo`, Paper Lanterns, made by `compose`."""

from pathlib import Path

TITLE = "Paper Lanterns"
INSTRUMENTAL = Path(__file__).with_name("paper-lanterns.ogg")
