"""Shared fixtures: small real things, synthesized."""

from __future__ import annotations
