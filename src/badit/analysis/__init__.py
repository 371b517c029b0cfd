"""What tasks and experts do to one another, measured into tables: functions that return pandas DataFrames.

Importing the package declares every table in :data:`badit.analysis.tables.TABLES`.
"""

from badit.analysis import atlas, gates, gradients, interference, learning

__all__ = ["atlas", "gates", "gradients", "interference", "learning"]
