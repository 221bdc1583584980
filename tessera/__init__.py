"""Tessera, a discrete-token text-to-image system: the base that every other package stands on."""

__version__ = "0.1.0"
