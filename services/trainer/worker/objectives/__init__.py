"""Objectives: what a job learns. Authors of plug-ins import `api` alone."""
