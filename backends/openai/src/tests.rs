//! Against stand-ins of several kinds.
