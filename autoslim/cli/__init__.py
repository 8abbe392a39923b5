"""The ``autoslim`` command, one module per subcommand: ``*_cli`` has the options, an ordinary function does the work.

Nothing here imports torch at the top, so that help and usage errors appear at once.
"""
