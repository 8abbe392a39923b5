"""The ``autoslim`` command, one module for each subcommand.

A function ``*_cli`` defines the options; an ordinary function does the work. Modules import torch only inside
functions, so that help and usage errors appear at once.
"""
