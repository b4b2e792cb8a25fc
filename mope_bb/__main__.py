"""`python -m mope_bb` is `mope-bb`."""

from mope_bb.cli.main import main

main()
