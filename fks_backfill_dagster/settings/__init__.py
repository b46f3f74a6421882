"""Settings: keys, validation, defaults.

sources    file and environment, with the place of every value
types      single values         sections   the sections of the file
symbols    asset classes         model      the whole: `Settings`
errors     error messages        load       loading and checking
catalog    questions about instruments and series: `Catalog(settings)`

Does not belong here: anything that acts on a setting (`app.py` and the interfaces).
"""

from fks_backfill_dagster.settings.catalog import Catalog
from fks_backfill_dagster.settings.load import load_settings
from fks_backfill_dagster.settings.model import SHIPPED, Settings, SettingsError

__all__ = ["SHIPPED", "Catalog", "Settings", "SettingsError", "load_settings"]
