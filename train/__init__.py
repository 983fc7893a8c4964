"""Pretraining of GraniteMoe and dense Granite: configuration, model, loss, run, engine, checkpoint, export."""

if __name__ != "powertrain.train":
    raise ImportError("This folder is the package powertrain.train; import it by that name.")
