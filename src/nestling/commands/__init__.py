"""The verbs of the command line: each module is a dataclass of settings and `run(settings) -> exit code`."""
