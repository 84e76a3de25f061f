"""The program: `flux2-lora <command>`, or `python -m stages <command>`."""

import signal

# Nobody hears Ctrl-C before `main` does, and there is nothing to clean up: no traceback out of an import.
if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from stages.cli import main

if __name__ == "__main__":
    main()
