"""Modules that stand in for wandb and trackio: they only write down what is called."""

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace


class Config(dict):
    """The settings of a run, as both packages have them."""

    def update(self, values, allow_val_change=False):
        assert allow_val_change
        super().update(values)


def _module(monkeypatch, name, **content):
    made = ModuleType(name)
    made.__spec__ = ModuleSpec(name, None)
    vars(made).update(content)
    monkeypatch.setitem(sys.modules, name, made)
    return made


def fake_wandb(monkeypatch):
    """wandb with `calls`: ("init", {...}), ("define", {...}), ("log", {...}), ("finish", {...}) in their order."""
    calls = []
    wandb = _module(monkeypatch, "wandb", run=None, config=Config(), calls=calls)
    for part in ("sdk", "sdk.lib"):
        _module(monkeypatch, f"wandb.{part}")
    _module(monkeypatch, "wandb.sdk.lib.config_util", ConfigError=type("ConfigError", (Exception,), {}))

    def init(**arguments):
        calls.append(("init", arguments))
        wandb.run = SimpleNamespace(summary={}, _label=lambda **_: None)

    def log(row):
        assert wandb.run is not None
        calls.append(("log", row))

    def finish(**arguments):
        calls.append(("finish", arguments))
        wandb.run = None

    wandb.init, wandb.log, wandb.finish = init, log, finish
    wandb.define_metric = lambda name, **how: calls.append(("define", {"name": name, **how}))
    return wandb


def fake_trackio(monkeypatch):
    """trackio with `calls`, as `fake_wandb`."""
    calls = []
    trackio = _module(monkeypatch, "trackio", config=Config(), calls=calls)
    trackio.context_vars = SimpleNamespace(current_space_id=SimpleNamespace(get=lambda: None))
    trackio.init = lambda **arguments: calls.append(("init", arguments))
    trackio.log = lambda row: calls.append(("log", row))
    trackio.finish = lambda: calls.append(("finish", {}))
    return trackio
