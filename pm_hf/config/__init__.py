"""What a run is asked to do: every setting, its rules, its presets."""

from pm_hf.config.kinds import STREAM_KINDS
from pm_hf.config.loading import load_config, save_config
from pm_hf.config.presets import PRESETS
from pm_hf.config.schema import RunConfig

__all__ = ["PRESETS", "STREAM_KINDS", "RunConfig", "load_config", "save_config"]
