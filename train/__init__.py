"""Pretraining of GraniteMoe and dense Granite: model, loss, loop, engine, checkpoint, export."""

if __name__ != "powertrain.train":
    raise ImportError("This folder is the package powertrain.train; import it by that name.")
