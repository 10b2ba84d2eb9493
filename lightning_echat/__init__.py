"""lightning-echat: an experiment platform for empathetic spoken dialogue models on PyTorch Lightning."""

__version__ = "0.1.0"
