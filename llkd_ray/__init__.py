"""Turn a large language model into a small, fast, served text classifier, on Ray."""

__version__ = "0.1.0"
