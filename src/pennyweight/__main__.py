"""`python -m pennyweight ...`, which `accelerate launch -m pennyweight ...` needs."""

from .cli import app

app()
