"""What is minimised beside the task's loss."""

from . import p_norm, path_norm  # noqa: F401  (importing a method registers it)
