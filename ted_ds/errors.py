"""The errors that a user of ted_ds can cause: each message says what is wrong, where, and what to do.

The command line prints them without a stack trace. Any other error is a bug and keeps its trace.
"""


class TedError(Exception):
    """Base of the errors that name a mistake of the user and its remedy."""

    exit_code = 2
    """Of the process that it ends. 2: a person has to change something before the next start."""

    said_by_main = False
    """True on a rank that got the error from rank 0, which prints it."""


class ConfigError(TedError):
    """A recipe, an override or a DeepSpeed file is wrong or contradicts another."""


class DataError(TedError):
    """A data file, a tokenizer or prepared data is missing, unreadable or does not fit."""


class ModelError(TedError):
    """A model has a structure, width, depth or vocabulary that the request does not fit."""


class NotFiniteError(ModelError):
    """A model's outputs are nan or infinite, so they have no score."""


class CheckpointError(TedError):
    """A checkpoint or a finished stage's folder is torn, or belongs to another run."""


class TrainingError(TedError):
    """Training cannot go on, e.g. a loss is not finite."""


class Stopped(TedError):
    """A signal or the clock ended the run, whose state is saved: the same command continues from there."""

    exit_code = 75  # EX_TEMPFAIL of sysexits.h: try again later


class RankLost(TedError):
    """Another rank died, hangs, is cut off or never came: the same command continues from the last checkpoint."""

    exit_code = 76


def load_failure(error: Exception) -> str:
    """The first line of transformers' message about a model that it does not load.

    If the model has code that is not trusted: what to set in the recipe, as transformers names an argument of its own.
    """
    if "trust_remote_code" in str(error):
        return (
            "it has code of its own, which runs only if you trust it: read it, then set trust_remote_code: true in its "
            "section, teacher or student (ted-ds evaluate: --trust-remote-code)"
        )
    return str(error).strip().partition("\n")[0] or type(error).__name__


def in_a_line(error: Exception | str) -> str:
    """An error's message without line breaks, and not more than 200 characters of it."""
    return " ".join(str(error).split())[:200]
