"""The ways a call can fail, the one-line guard that raises the first of them, and the warning that is given once."""

import functools
import warnings


class ContractError(ValueError):
    """The caller's mistake: says what was wrong, what came, and what to do."""


class NoBackendError(RuntimeError):
    """The machine's limit: lists every backend of the op with the reason it refused."""


def require(condition: bool, sentence: str) -> None:
    """Raise ``ContractError(sentence)`` unless ``condition`` holds.

    Example:
        >>> require(1 < 2, "never shown")
        >>> require(False, "stride=3 does not divide block=128; use 4, 8 or 16")
        Traceback (most recent call last):
        ...
        sparse_attn.errors.ContractError: stride=3 does not divide block=128; use 4, 8 or 16
    """
    if not condition:
        raise ContractError(sentence)


class NotServed(Exception):
    """A method cannot choose blocks for this call; the sentence says why. The call then runs dense and says so once."""


@functools.cache
def warn_once(sentence: str) -> None:
    """Warn, but with each sentence only once per process."""
    warnings.warn(sentence, stacklevel=3)
