"""The commands of ``autoslim``: each a pair, ``*_cli`` with the options and their help, and a function that works.

Nothing here imports torch at the top: help and typing errors come at once.
"""
