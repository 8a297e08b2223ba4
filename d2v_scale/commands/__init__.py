"""What `d2v VERB` runs: a module for each verb, with its command line and what it prints. The work is in other rooms.

`verbs.py` is the table. A module has `make_parser()` and `main(arguments)`, which returns the exit code. What takes
long to import it imports where it begins to work: `--help` and a refusal come at once.
"""
