"""Running bundles: their folder, a session per runtime, many adapters over one program, training on the device."""
