"""What can go wrong for a reason the user can mend, as a tree.

Every sentence says what is wrong, where, and what to do next. Jobs print it as one line and exit
with status 1. Anything that is not an `LLKDError` is our own mistake and keeps its traceback.
"""


class LLKDError(Exception):
    """Base of every error whose remedy is in the user's hands."""


class ConfigError(LLKDError):
    """The experiment file or an override is wrong: a key, a value, a file that is not TOML."""


class CorpusError(LLKDError):
    """The corpus cannot be read: no such file, no rows, a column that is not there."""


class TooManyRejectedError(LLKDError):
    """More rows were kept aside than the experiment allows."""


class ArtifactError(LLKDError):
    """An input artifact is missing, or another experiment made it."""


class StorageError(LLKDError):
    """The store of a run cannot be used: no such bucket, no right to write, nobody answers."""


class TeacherError(LLKDError):
    """The teacher cannot answer: no such model, labels its tokenizer cannot tell apart."""


class StudentError(LLKDError):
    """The student cannot be loaded or trained: no such model, no rows to train on."""


class EndpointError(LLKDError):
    """An endpoint does not answer as a classifier should."""


class ClusterError(LLKDError):
    """The Ray cluster cannot be reached or cannot hold what the experiment asks for."""
