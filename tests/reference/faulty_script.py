"""A script of this project whose own file operations signal it, inside a save.

python faulty_script.py SCRIPT ARGUMENTS, with FAULT_AT: which file operation of a save, counted
from 1, before and after each; and FAULT_SIGNAL: its name. The code is the real one, and so is the
signal.
"""

import os
import runpy
import sys
from pathlib import Path
from signal import Signals

REPOSITORY = Path(__file__).parents[2]

if __name__ == "__main__":
    from benchmarks.crash_recovery import signal_inside_a_save
    from dalle_mini_impl.training import trainer

    trainer.save_checkpoint = signal_inside_a_save(  # type: ignore[attr-defined]
        trainer.save_checkpoint, int(os.environ["FAULT_AT"]), Signals[os.environ["FAULT_SIGNAL"]]
    )
    sys.argv = sys.argv[1:]
    runpy.run_path(str(REPOSITORY / "scripts" / f"{sys.argv[0]}.py"), run_name="__main__")
