"""Configuration: one typed, frozen tree of options, and how it is read from YAML and the command line."""

from cpt_mega.config.load import explained_yaml, load_config, resolved_yaml
from cpt_mega.config.schema import Config

__all__ = ["Config", "explained_yaml", "load_config", "resolved_yaml"]
