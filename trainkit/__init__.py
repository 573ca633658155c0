"""Watch, steer, go back: interactive training for PyTorch, at home in Jupyter."""

__version__ = "0.1.0"
