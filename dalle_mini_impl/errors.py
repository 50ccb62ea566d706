"""The exceptions that scripts show as a single line instead of a traceback."""


class UserError(ValueError):
    """Bad input from outside: a config value, a path, a prompt, a data file.

    The message names the field, the value got and the value wanted.
    """


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
