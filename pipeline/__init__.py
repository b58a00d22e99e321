"""Murmuration's engine and bulk job. Import the module you need; nothing is imported here."""
