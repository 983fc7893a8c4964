"""Pretraining of GraniteMoe and dense Granite: model, loss, loop, engine, checkpoint, export."""
