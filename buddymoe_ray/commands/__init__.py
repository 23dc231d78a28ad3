"""One module per command of `buddymoe`; each has `add_arguments(parser)` and `run(args) -> int` (the exit status).

They hold no logic of their own: they parse, call a layer below, and print for a person or as JSON lines.
"""
