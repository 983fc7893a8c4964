"""One module a verb: `python -m launch.VERB` and `powertrain VERB` are the same."""
