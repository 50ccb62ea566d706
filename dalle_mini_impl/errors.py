"""The exceptions that commands show as a single line instead of a traceback."""

import os
import re

_SECRET_NAMES = re.compile(r"KEY|TOKEN|SECRET|PASSW|CREDENTIAL", re.IGNORECASE)
_MIN_SECRET_LENGTH = 8  # shorter values of such variables are words like "true"


def without_secrets(text: str) -> str:
    """Redact passwords in addresses, and values of variables such as WANDB_API_KEY and HF_TOKEN."""
    # One slash where the address went through a Path.
    text = re.sub(r"(\w\w:/{1,2})[^/\s]+@", r"\1***@", text)
    secrets = {
        value
        for name, value in os.environ.items()
        if _SECRET_NAMES.search(name) and len(value) >= _MIN_SECRET_LENGTH
    }
    # Longest first: one secret may be part of another.
    for secret in sorted(secrets, key=len, reverse=True):
        text = text.replace(secret, "***")
    return text


def one_line(error: BaseException) -> str:
    """Return an error's message on one line, or its type where it has none."""
    return " ".join(str(error).split()) or type(error).__name__


class UserError(ValueError):
    """Bad input from outside: a config value, a path, a prompt, a data file.

    The message is one line, "field: got X, expected Y; remedy". Secrets in it are redacted.
    """

    def __init__(self, message: str) -> None:
        super().__init__(without_secrets(message))


class StoppedError(Exception):
    """A run has stopped at a signal, after ``step`` updates; ``saved`` tells of a checkpoint."""

    def __init__(self, step: int, signal: int, *, saved: bool = True) -> None:
        kept = ", with a checkpoint" if saved else "; it was not finite: no checkpoint of it"
        super().__init__(f"stopped after step {step}{kept}")
        self.step, self.signal = step, signal
