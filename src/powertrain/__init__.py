"""Pretraining of GraniteMoe and dense Granite: the packages train, schedulers, data, launch and configs.

Each is a link to the folder of that name at the top of the repository.
"""
