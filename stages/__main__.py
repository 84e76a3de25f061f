"""`python -m stages <command>`: the same program as `flux2-lora`."""

from stages.cli import main

main()
