"""Latencies on this machine: layers and whole models in their inference form, in any runtime."""
