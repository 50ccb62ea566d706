"""The exceptions that scripts show as a single line instead of a traceback."""

import os
import re

_SECRET_NAMES = re.compile(r"KEY|TOKEN|SECRET|PASSW|CREDENTIAL", re.IGNORECASE)
_SHORTEST_SECRET = 8  # characters; shorter values of such variables are words like "true"


def without_secrets(text: str) -> str:
    """Blot out what must not stand in a log.

    Args:
        text: A message.

    Returns:
        The message without passwords in addresses, and without the values of environment variables
        whose names say that they are secret, such as ``WANDB_API_KEY`` and ``HF_TOKEN``.
    """
    # One slash where the address went through a Path.
    text = re.sub(r"(\w\w:/{1,2})[^/\s]+@", r"\1***@", text)
    secrets = {
        value
        for name, value in os.environ.items()
        if _SECRET_NAMES.search(name) and len(value) >= _SHORTEST_SECRET
    }
    for secret in sorted(secrets, key=len, reverse=True):
        text = text.replace(secret, "***")
    return text


class UserError(ValueError):
    """Bad input from outside: a config value, a path, a prompt, a data file.

    The message names the field, the value got and the value expected. Secrets in it are blotted out.
    """

    def __init__(self, message: str) -> None:
        """Keep the message.

        Args:
            message: One line.
        """
        super().__init__(without_secrets(message))


class StoppedError(Exception):
    """A run that was asked to stop has stopped, with all that was worth keeping."""

    def __init__(self, step: int, signal: int, *, saved: bool = True) -> None:
        """Remember where and why.

        Args:
            step: Optimizer updates done, all of them in the checkpoint.
            signal: Number of the signal that asked.
            saved: Whether there is a checkpoint of that step.
        """
        kept = ", with a checkpoint" if saved else "; it was not finite: no checkpoint of it"
        super().__init__(f"stopped after step {step}{kept}")
        self.step, self.signal = step, signal
