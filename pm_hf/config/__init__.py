"""What a run is asked to do: every setting, its rules, its presets."""
