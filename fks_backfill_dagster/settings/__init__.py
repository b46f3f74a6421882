"""Settings: keys, validation, defaults.

sources    file and environment, with the place of every value
types      single values         sections   the sections of the file
symbols    asset classes         model      the whole, with lookups by series and provider
errors     error messages        load       loading and checking

Does not belong here: anything that acts on a setting (`app.py` and the interfaces).
"""

from fks_backfill_dagster.settings.load import load_settings
from fks_backfill_dagster.settings.model import SHIPPED, Settings, SettingsError

__all__ = ["SHIPPED", "Settings", "SettingsError", "load_settings"]
