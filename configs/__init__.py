"""Hydra configs that are installed with powertrain."""

if __name__ != "powertrain.configs":
    raise ImportError("This folder is the package powertrain.configs; import it by that name.")
