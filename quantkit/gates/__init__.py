"""Bars that a measured artifact has to clear, and how sure the measurement is that it does. Imports no torch."""
