"""The process: devices and seeds, launching several processes, stopping, and filtered output."""
