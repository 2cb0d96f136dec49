"""The core: health, lifecycle, shutdown and correlation; standard library only."""
