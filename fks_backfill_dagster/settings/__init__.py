"""Settings: keys, validation, defaults.

sources    file and environment, with the place of every value
types      single values         sections   the sections of the file
symbols    asset classes         model      the whole, and what it answers about series and providers
errors     sentences             load       all of it together

Does not belong here: anything that acts on a setting (`app.py` and the faces).
"""

from fks_backfill_dagster.settings.load import load_settings
from fks_backfill_dagster.settings.model import Settings, SettingsError

__all__ = ["Settings", "SettingsError", "load_settings"]
