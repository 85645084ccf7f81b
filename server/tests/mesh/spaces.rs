//! Machines in network namespaces.
