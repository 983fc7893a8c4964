"""Text to token files to training samples; knows nothing of models, schedules or engines."""


class DataError(ValueError):
    """Something a user can put right: one readable paragraph with the value, the limit and the remedy."""
