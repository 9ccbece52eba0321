"""Core ML packages on any system: an interpreter of saved ML programs that verifies what an export wrote."""
