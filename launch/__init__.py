"""One module or package a verb: `powertrain VERB` and `python -m powertrain.launch.VERB` are the same."""

if __name__ != "powertrain.launch":
    raise ImportError("This folder is the package powertrain.launch; import it by that name.")
