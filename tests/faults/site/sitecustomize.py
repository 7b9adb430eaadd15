"""Registers the engines of drive.py in every Python process that has this folder in PYTHONPATH."""

import drive

drive.register()
