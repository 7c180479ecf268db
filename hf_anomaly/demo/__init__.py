"""A page in the browser on which a detector judges the images that are dropped on it; and the same as a Space of the Hub."""

from .page import build_demo
from .serving import run_demo
from .space import make_space

__all__ = ["build_demo", "make_space", "run_demo"]
