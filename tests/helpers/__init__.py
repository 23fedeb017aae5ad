"""What tests share: tiny models, streams, adapters, references."""

import copy


def with_changes(config: dict, changes: dict) -> dict:
    """A copy of nested settings with the changes, whose keys have __ for the dot."""
    made = copy.deepcopy(config)
    for key, value in changes.items():
        *parents, last = key.split("__")
        place = made
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = value
    return made
