"""The configuration as config files see it: an `ml_collections.ConfigDict` with every field of `jitjax.settings`.

Config files are plain `get_config()` functions that start from `default_config()`. Fields that are unset are None until a
config file or the command line sets them; `--config.field=None` unsets one again.
"""

from __future__ import annotations

from ml_collections import ConfigDict, config_dict

from jitjax import settings


def default_config() -> ConfigDict:
    """All fields at their defaults; `jitjax train --help` says what each is."""
    config = ConfigDict()
    for name, field in settings.fields().items():
        *parents, leaf = name.split(".")
        target = config
        for key in parents:
            if key not in target:
                target[key] = ConfigDict()
            target = target[key]
        target[leaf] = config_dict.placeholder(field.type) if field.default is None else field.default
    return config
